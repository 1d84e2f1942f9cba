"""Curves and bars as SVG text, for a page that needs nothing but itself. Pure functions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape

WIDTH, HEIGHT = 460, 250
WIDE, TILTED = 960, 34  # a chart over the whole page; room for names that do not fit in a line
LEFT, RIGHT, TOP, BOTTOM = 52, 12, 30, 40
MOST_POINTS = 300  # of one line


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
    """One bar a name (None: left out), with the ends of its interval and the value of guessing."""

    label: str
    values: Sequence[float | None]
    colour: str
    intervals: Sequence[tuple[float, float] | None] = field(default_factory=list)


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Round values that lie in [low, high], about `count` of them.

    >>> ticks(0.0, 1.0)
    [0.0, 0.2, 0.4, 0.6, 0.8, 1.0]
    """
    if not high > low:
        return [low]
    rough = (high - low) / count
    unit = 10.0 ** math.floor(math.log10(rough))
    step = next(unit * k for k in (1, 2, 5, 10) if unit * k >= rough * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [round(i * step, 12) for i in range(first, math.floor(high / step + 1e-9) + 1)]


def show(value: float) -> str:
    """A tick's text: 12, 0.25, 1.5k, 3.2M."""
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.3g}{letter}"
    return f"{value:.3g}"


def thin(xs: Sequence[float], ys: Sequence[float]) -> list[tuple[float, float]]:
    """At most MOST_POINTS points, means of equal runs of neighbours."""
    run = -(-len(xs) // MOST_POINTS)
    return [
        (sum(xs[i : i + run]) / len(xs[i : i + run]), sum(ys[i : i + run]) / len(ys[i : i + run]))
        for i in range(0, len(xs), run)
    ]


def line_chart(title: str, lines: Sequence[Line], x: str, y: str, zero: bool = False) -> str:
    """Curves over one axis; nothing where there is no point. `zero`: the y axis holds 0."""
    shown = [(line, thin(line.xs, line.ys)) for line in lines if len(line.xs)]
    points = [point for _, part in shown for point in part]
    if not points:
        return ""
    x0, x1 = min(p[0] for p in points), max(p[0] for p in points)
    y0, y1 = min(p[1] for p in points), max(p[1] for p in points)
    y0 = min(y0, 0.0) if zero else y0
    margin = 0.05 * (y1 - y0) or abs(y1) * 0.1 or 1.0
    y1, y0 = y1 + margin, y0 if zero and y0 == 0 else y0 - margin
    x1 = x1 if x1 > x0 else x0 + 1
    at_x = lambda v: LEFT + (v - x0) / (x1 - x0) * (WIDTH - LEFT - RIGHT)  # noqa: E731
    at_y = lambda v: HEIGHT - BOTTOM - (v - y0) / (y1 - y0) * (HEIGHT - TOP - BOTTOM)  # noqa: E731
    parts = [_grid(at_y, ticks(y0, y1))]
    for v in ticks(x0, x1):
        parts.append(_text(at_x(v), HEIGHT - BOTTOM + 15, show(v), "middle"))
    for line, part in shown:
        path = " ".join(f"{at_x(px):.1f},{at_y(py):.1f}" for px, py in part)
        style = f'stroke="{line.colour}" opacity="{0.3 if line.faint else 1}"'
        style += ' stroke-dasharray="4 3"' if line.dashed else ""
        parts.append(f'<polyline points="{path}" class="line" {style}/>')
        if line.dots or len(part) == 1:
            parts += [
                f'<circle cx="{at_x(px):.1f}" cy="{at_y(py):.1f}" r="3" fill="{line.colour}">'
                f"<title>{escape(line.label)} {show(px)}: {py:.4g}</title></circle>"
                for px, py in part
            ]
    legend = [(line.label, line.colour) for line, _ in shown if line.label]
    return _frame(title, parts, legend, x, y)


def bar_chart(
    title: str,
    names: Sequence[str],
    series: Sequence[Bars],
    y: str,
    marks: Sequence[float | None] = (),
    top: float | None = None,
    wide: bool = False,
) -> str:
    """Groups of bars, one group a name; `marks` are dotted lines, such as chance."""
    values = [v for bars in series for v in bars.values if v is not None]
    if not names or not values:
        return ""
    y0, y1 = min(0.0, *values), top if top is not None else max(*values, 0.0) * 1.08 or 1.0
    width = max(WIDE if wide else WIDTH, LEFT + RIGHT + 9 * len(names) * len(series))
    room = (width - LEFT - RIGHT) / len(names)
    at_y = lambda v: HEIGHT - BOTTOM - (v - y0) / (y1 - y0) * (HEIGHT - TOP - BOTTOM)  # noqa: E731
    parts = [_grid(at_y, ticks(y0, y1), width)]
    each, is_tilted = room * 0.8 / len(series), not all(_fits(name, room) for name in names)
    for i, name in enumerate(names):
        left = LEFT + i * room + room * 0.1
        for k, bars in enumerate(series):
            value = bars.values[i]
            if value is None:
                continue
            place, base = left + k * each, at_y(0.0)
            upper, height = min(at_y(value), base), abs(at_y(value) - base)
            parts.append(
                f'<rect x="{place:.1f}" y="{upper:.1f}" width="{each * 0.9:.1f}" height="{height:.1f}" '
                f'fill="{bars.colour}"><title>{escape(f"{bars.label}, {name}: {value:.4g}")}</title></rect>'
            )
            ends = bars.intervals[i] if i < len(bars.intervals) else None
            if ends:
                middle = place + each * 0.45
                parts.append(
                    f'<path class="whisker" d="M{middle:.1f} {at_y(ends[0]):.1f}V{at_y(ends[1]):.1f}"/>'
                )
        mark = marks[i] if i < len(marks) else None
        if mark:
            path = f"M{left:.1f} {at_y(mark):.1f}h{room * 0.8:.1f}"
            parts.append(f'<path class="mark" d="{path}"><title>chance</title></path>')
        parts.append(_name(LEFT + (i + 0.5) * room, name, is_tilted))
    keys = [(b.label, b.colour) for b in series]
    return _frame(title, parts, keys, "", y, width, TILTED if is_tilted else 0, wide)


def _fits(name: str, room: float) -> bool:
    return len(name) * 6.2 <= room


def _name(x: float, name: str, is_tilted: bool) -> str:
    if not is_tilted:
        return _text(x, HEIGHT - BOTTOM + 15, name, "middle")
    short = name if len(name) <= 20 else name[:19] + "…"
    return (
        f'<text x="{x:.1f}" y="{HEIGHT - BOTTOM + 12}" text-anchor="end" class="small" '
        f'transform="rotate(-25 {x:.1f} {HEIGHT - BOTTOM + 12})">{escape(short)}</text>'
    )


def _grid(at_y: object, values: Sequence[float], width: float = WIDTH) -> str:
    assert callable(at_y)
    return "".join(
        f'<path class="grid" d="M{LEFT} {at_y(v):.1f}H{width - RIGHT}"/>'
        + _text(LEFT - 6, at_y(v) + 4, show(v), "end")
        for v in values
    )


def _text(x: float, y: float, text: str, anchor: str) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'


def _frame(
    title: str,
    parts: Sequence[str],
    legend: Sequence[tuple[str, str]],
    x: str,
    y: str,
    width: float = WIDTH,
    more: float = 0,
    wide: bool = False,
) -> str:
    keys = "".join(
        f'<span><i style="background:{colour}"></i>{escape(label)}</span>' for label, colour in legend
    )
    axis = f'<text x="{LEFT}" y="{TOP - 12}" class="small">{escape(y)}</text>'
    if x:
        place = f'x="{width - RIGHT:.0f}" y="{HEIGHT - 6}"'
        axis += f'<text {place} text-anchor="end" class="small">{escape(x)}</text>'
    left = TILTED if more else 0  # a tilted name begins left of its bar
    return (
        f'<figure{" class=wide" if wide else ""}><figcaption>{escape(title)}</figcaption><div class="scroll">'
        f'<svg viewBox="{-left} 0 {width + left:.0f} {HEIGHT + more}" '
        f'style="min-width:{760 if width > WIDTH else 280}px" '
        f'role="img" aria-label="{escape(title)}">{"".join(parts)}{axis}</svg></div>'
        f'<div class="keys">{keys}</div></figure>'
    )
