"""Curves and bars as SVG: parts of a page, or files of their own. Pure functions."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from html import escape

WIDTH, HEIGHT = 460, 250
WIDE, TILTED = 960, 34  # a chart over the whole page; room for names that do not fit in a line
LEFT, RIGHT, TOP, BOTTOM = 52, 12, 30, 40
MAX_POINTS = 300  # of one line
SMOOTHING = 0.9
FILE_STYLE = """svg{font-family:system-ui,sans-serif;background:#fff} text{fill:#5d6570;font-size:11px}
.title{fill:#1c1f24;font-size:13px} .small{font-size:10px} .grid{stroke:#dfe3e8}
.line{fill:none;stroke-width:1.8} .whisker{stroke:#1c1f24;stroke-width:1.4}
.mark{stroke:#1c1f24;stroke-dasharray:2 3}"""


@dataclass(frozen=True)
class Line:
    """A curve: equal numbers of x and y, all finite."""

    label: str
    xs: Sequence[float]
    ys: Sequence[float]
    colour: str
    faint: bool = False
    dashed: bool = False
    dots: bool = False


@dataclass(frozen=True)
class Bars:
    """One bar for each name (None: left out), with the ends of its interval."""

    label: str
    values: Sequence[float | None]
    colour: str
    intervals: Sequence[tuple[float, float] | None] = field(default_factory=list)


@dataclass(frozen=True)
class Chart:
    """A drawn chart. parts: SVG elements; extra: height below the axis; legend: (label, colour)."""

    title: str
    parts: list[str]
    legend: list[tuple[str, str]]
    width: float = WIDTH
    extra: float = 0
    is_wide: bool = False

    def svg(self) -> str:
        """The drawing, for a page that has the style and shows title and legend itself."""
        least = 760 if self.width > WIDTH else 280
        return (
            f'<svg viewBox="{-self.extra} 0 {self.width + self.extra:.0f} {HEIGHT + self.extra}" '
            f'style="min-width:{least}px" role="img" aria-label="{escape(self.title)}">'
            f"{''.join(self.parts)}</svg>"
        )

    def file(self) -> str:
        """A whole SVG file, with title and legend above the drawing."""
        x = float(LEFT)
        keys = []
        for label, colour in self.legend:
            keys.append(f'<rect x="{x:.0f}" y="-13" width="9" height="9" fill="{colour}"/>')
            keys.append(_text(x + 13, -5, label, "start"))
            x += 25 + 6.2 * len(label)
        width = max(self.width, x)
        view = f"{-self.extra} -44 {width + self.extra:.0f} {HEIGHT + self.extra + 44}"
        return (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="{view}" width="{width + self.extra:.0f}">'
            f'<style>{FILE_STYLE}</style><text class="title" x="{LEFT}" y="-24">{escape(self.title)}</text>'
            f"{''.join(keys)}{''.join(self.parts)}</svg>\n"
        )


def smooth(values: Sequence[float]) -> list[float]:
    """An exponential average that starts unbiased: weights 0.9^k, normalised."""
    result, total, weight = [], 0.0, 0.0
    for value in values:
        total = SMOOTHING * total + value
        weight = SMOOTHING * weight + 1
        result.append(total / weight)
    return result


def ticks(low: float, high: float, num_wanted: int = 5) -> list[float]:
    """Round values that lie in [low, high], about num_wanted of them.

    >>> ticks(0.0, 1.0)
    [0.0, 0.2, 0.4, 0.6, 0.8, 1.0]
    """
    if not high > low:
        return [low]
    rough = (high - low) / num_wanted
    unit = 10.0 ** math.floor(math.log10(rough))
    step = next(unit * k for k in (1, 2, 5, 10) if unit * k >= rough * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [round(i * step, 12) for i in range(first, math.floor(high / step + 1e-9) + 1)]


def tick_text(value: float) -> str:
    """12, 0.25, 1.5k, 3.2M."""
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.3g}{letter}"
    return f"{value:.3g}"


def thin(xs: Sequence[float], ys: Sequence[float]) -> list[tuple[float, float]]:
    """At most MAX_POINTS points, means of equal runs of neighbours."""
    run = -(-len(xs) // MAX_POINTS)
    points = []
    for i in range(0, len(xs), run):
        some_x, some_y = xs[i : i + run], ys[i : i + run]
        points.append((sum(some_x) / len(some_x), sum(some_y) / len(some_y)))
    return points


def line_chart(title: str, lines: Sequence[Line], x: str, y: str, zero: bool = False) -> Chart | None:
    """Curves over one axis; None where there is no point. x, y: names of the axes; zero: y begins at 0."""
    shown = [(line, thin(line.xs, line.ys)) for line in lines if len(line.xs)]
    points = [point for _, part in shown for point in part]
    if not points:
        return None
    x0, x1 = min(p[0] for p in points), max(p[0] for p in points)
    y0, y1 = min(p[1] for p in points), max(p[1] for p in points)
    if zero:
        y0 = min(y0, 0.0)
    margin = 0.05 * (y1 - y0) or abs(y1) * 0.1 or 1.0
    y1 += margin
    if not (zero and y0 == 0):
        y0 -= margin
    if x1 == x0:
        x1 = x0 + 1

    def at_x(value: float) -> float:
        return LEFT + (value - x0) / (x1 - x0) * (WIDTH - LEFT - RIGHT)

    at_y = _vertical_scale(y0, y1)
    parts = [_grid(at_y, ticks(y0, y1), WIDTH), _axis_names(x, y, WIDTH)]
    for value in ticks(x0, x1):
        parts.append(_text(at_x(value), HEIGHT - BOTTOM + 15, tick_text(value), "middle"))
    for line, part in shown:
        path = " ".join(f"{at_x(px):.1f},{at_y(py):.1f}" for px, py in part)
        style = f'stroke="{line.colour}" opacity="{0.3 if line.faint else 1}"'
        if line.dashed:
            style += ' stroke-dasharray="4 3"'
        parts.append(f'<polyline points="{path}" class="line" {style}/>')
        if line.dots or len(part) == 1:
            for px, py in part:
                tip = escape(f"{line.label} {tick_text(px)}: {py:.4g}")
                place = f'cx="{at_x(px):.1f}" cy="{at_y(py):.1f}"'
                parts.append(f'<circle {place} r="3" fill="{line.colour}"><title>{tip}</title></circle>')
    return Chart(title, parts, [(line.label, line.colour) for line, _ in shown if line.label])


def bar_chart(
    title: str,
    names: Sequence[str],
    series: Sequence[Bars],
    y: str,
    marks: Sequence[float | None] = (),
    top: float | None = None,
    is_wide: bool = False,
) -> Chart | None:
    """Groups of bars, one group for each name; None without a value.

    marks: a dotted line for each name, such as chance; top: the end of the y axis.
    """
    values = [value for bars in series for value in bars.values if value is not None]
    if not names or not values:
        return None
    y0 = min(0.0, *values)
    y1 = top if top is not None else max(*values, 0.0) * 1.08 or 1.0
    width = max(WIDE if is_wide else WIDTH, LEFT + RIGHT + 9 * len(names) * len(series))
    group = (width - LEFT - RIGHT) / len(names)
    bar = group * 0.8 / len(series)
    is_tilted = any(len(name) * 6.2 > group for name in names)
    at_y = _vertical_scale(y0, y1)
    parts = [_grid(at_y, ticks(y0, y1), width), _axis_names("", y, width)]
    for i, name in enumerate(names):
        left = LEFT + i * group + group * 0.1
        for k, bars in enumerate(series):
            value = bars.values[i]
            if value is not None:
                interval = bars.intervals[i] if i < len(bars.intervals) else None
                tip = escape(f"{bars.label}, {name}: {value:.4g}")
                parts.append(_bar(left + k * bar, bar, at_y(value), at_y(0.0), bars.colour, tip))
                if interval is not None:
                    low, high = map(at_y, interval)
                    middle = left + (k + 0.45) * bar
                    parts.append(f'<path class="whisker" d="M{middle:.1f} {low:.1f}V{high:.1f}"/>')
        mark = marks[i] if i < len(marks) else None
        if mark:
            path = f"M{left:.1f} {at_y(mark):.1f}h{group * 0.8:.1f}"
            parts.append(f'<path class="mark" d="{path}"><title>chance</title></path>')
        parts.append(_bar_name(LEFT + (i + 0.5) * group, name, is_tilted))
    legend = [(bars.label, bars.colour) for bars in series]
    return Chart(title, parts, legend, width, TILTED if is_tilted else 0, is_wide)


def _vertical_scale(y0: float, y1: float) -> Callable[[float], float]:
    return lambda value: HEIGHT - BOTTOM - (value - y0) / (y1 - y0) * (HEIGHT - TOP - BOTTOM)


def _bar(left: float, width: float, end: float, base: float, colour: str, tip: str) -> str:
    return (
        f'<rect x="{left:.1f}" y="{min(end, base):.1f}" width="{width * 0.9:.1f}" '
        f'height="{abs(end - base):.1f}" fill="{colour}"><title>{tip}</title></rect>'
    )


def _bar_name(x: float, name: str, is_tilted: bool) -> str:
    if not is_tilted:
        return _text(x, HEIGHT - BOTTOM + 15, name, "middle")
    short = name if len(name) <= 20 else name[:19] + "…"
    y = HEIGHT - BOTTOM + 12
    turn = f'transform="rotate(-25 {x:.1f} {y})"'
    return f'<text x="{x:.1f}" y="{y}" text-anchor="end" class="small" {turn}>{escape(short)}</text>'


def _grid(at_y: Callable[[float], float], values: Sequence[float], width: float) -> str:
    lines = [f'<path class="grid" d="M{LEFT} {at_y(value):.1f}H{width - RIGHT}"/>' for value in values]
    texts = [_text(LEFT - 6, at_y(value) + 4, tick_text(value), "end") for value in values]
    return "".join([*lines, *texts])


def _axis_names(x: str, y: str, width: float) -> str:
    names = f'<text x="{LEFT}" y="{TOP - 12}" class="small">{escape(y)}</text>'
    if x:
        place = f'x="{width - RIGHT:.0f}" y="{HEIGHT - 6}"'
        names += f'<text {place} text-anchor="end" class="small">{escape(x)}</text>'
    return names


def _text(x: float, y: float, text: str, anchor: str) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'
