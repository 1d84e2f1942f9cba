"""Two runs side by side: what was measured, how it was learned, and in which settings they differ."""

from __future__ import annotations

from html import escape
from typing import Any

from nanochat.report import html, page
from nanochat.report.charts import Bars, Line, bar_chart, line_chart
from nanochat.report.facts import TRAINED, Facts
from nanochat.report.page import DASH, Table
from nanochat.report.plots import smooth

FIRST, SECOND = "#3867b8", "#d9822b"


def values(facts: Facts) -> dict[tuple[str, str], tuple[float, str]]:
    """(stage, metric) -> (value, how it is written: "number" or "percent"), in the order of the page."""
    found: dict[tuple[str, str], tuple[Any, str]] = {}
    for stage in (s for s in TRAINED if s in facts):
        if stage == "base":
            measured = facts["base_eval"]
            bits = measured.get("val_bpb") or facts["base"].get("val_bpb")
            found["base", "bits per byte"] = (bits, "number")
            found["base", "CORE"] = (measured.get("core"), "number")
        else:
            found[stage, "validation loss"] = (facts[stage].get("val_loss"), "number")
        chat = facts.get(f"chat_eval_{stage}")
        for name, f in ((chat.get("tasks") or {}) if chat else {}).items():
            found[stage, name] = (f["accuracy"], "percent")
        found[stage, "ChatCORE"] = (chat.get("chatcore") if chat else None, "number")
        for key in ("train_seconds", "tokens_per_second"):
            found[stage, key.replace("_", " ")] = (facts[stage].get(key), "count")
    return {key: value for key, value in found.items() if value[0] is not None}


def summary_csv(facts: Facts) -> str:
    """Every value of a run as csv: stage, metric, value, ends of the 95 % interval where there is one."""
    lines = ["stage,metric,value,low,high"]
    for (stage, metric), (value, _) in values(facts).items():
        chat = facts.get(f"chat_eval_{stage}")
        found = ((chat.get("tasks") or {}) if chat else {}).get(metric, {})
        lines.append(f"{stage},{metric},{value},{found.get('low', '')},{found.get('high', '')}")
    return "\n".join(lines) + "\n"


def difference_table(a: Facts, b: Facts, names: tuple[str, str]) -> Table:
    one, two = values(a), values(b)
    rows = [["stage", "metric", *names, "change"]]
    write = {"number": page.number, "percent": page.percent, "count": page.count}
    for key in [*one, *(key for key in two if key not in one)]:
        kind = (one.get(key) or two[key])[1]
        x, y = (found[key][0] if key in found else None for found in (one, two))
        change = DASH
        if x is not None and y is not None:
            size = write[kind](abs(y - x)).replace(" %", " pts")
            change = "=" if x == y else f"{'+' if y > x else '-'}{size}"
        rows.append([*key, write[kind](x), write[kind](y), change])
    return rows


def settings_table(a: Facts, b: Facts, names: tuple[str, str]) -> Table:
    """The settings that differ; home and tag always do."""
    rows = [["stage", "setting", *names]]
    for stage in dict.fromkeys([*a, *b]):
        one, two = ((f[stage].settings or {}) if stage in f else {} for f in (a, b))
        for key in dict.fromkeys([*one, *two]):
            if key not in ("home", "tag") and one.get(key) != two.get(key):
                rows.append([stage, key, str(one.get(key, DASH)), str(two.get(key, DASH))])
    return rows if len(rows) > 1 else []


def compare(a: Facts, b: Facts, names: tuple[str, str]) -> tuple[str, str]:
    """(markdown, HTML) of two runs."""
    title = f"{names[0]} and {names[1]}"
    table, settings = difference_table(a, b, names), settings_table(a, b, names)
    text = "\n\n".join([f"# {title}", page.markdown(table), "## Settings that differ",
                        page.markdown(settings) or "None."]) + "\n"  # fmt: skip
    sections = [
        ("Measured", html.table(table)),
        ("Learning", html.group(_curves(a, b, names))),
        ("Chat tasks", html.group(_bars(a, b, names))),
        ("Settings that differ", html.table(settings) or html.note("None.")),
    ]
    subs = [html.subtitle(facts) for facts in (a, b)]
    sub = (
        subs[0]
        if subs[0] == subs[1]
        else "<br>".join(f"{escape(name)}: {text}" for name, text in zip(names, subs, strict=True))
    )
    return text, html.document(title, sub, "", [(t, body) for t, body in sections if body])


def _curves(a: Facts, b: Facts, names: tuple[str, str]) -> list[str]:
    found = []
    for stage in TRAINED:
        for key, title, unit in (
            ("loss", "training loss", "nats, smoothed"),
            ("val_bpb", "validation", "bits per byte"),
            ("val_loss", "validation loss", "nats"),
            ("reward", "reward", "mean, smoothed"),
        ):
            if key == "loss" and stage == "rl":
                continue
            lines = []
            for facts, name, colour in ((a, names[0], FIRST), (b, names[1], SECOND)):
                if stage in facts:
                    steps, ys = facts[stage].series(key)
                    is_check = key.startswith("val")
                    lines.append(Line(name, steps, ys if is_check else smooth(ys), colour, dots=is_check))
            found.append(line_chart(f"{stage}: {title}", lines, "step", unit))
    return found


def _bars(a: Facts, b: Facts, names: tuple[str, str]) -> list[str]:
    charts = []
    for stage in TRAINED:
        found = [
            (f[f"chat_eval_{stage}"].get("tasks") or {}) if f"chat_eval_{stage}" in f else {} for f in (a, b)
        ]
        tasks = list(dict.fromkeys(name for tasks in found for name in tasks))
        series = [
            Bars(
                name, [100 * part[t]["accuracy"] if t in part else None for t in tasks], colour,
                [(100 * part[t]["low"], 100 * part[t]["high"]) if t in part else None for t in tasks],
            )
            for name, colour, part in zip(names, (FIRST, SECOND), found, strict=True)
        ]  # fmt: skip
        charts.append(bar_chart(f"{stage}: accuracy, 95 % intervals", tasks, series, "per cent", top=105))
    return charts
