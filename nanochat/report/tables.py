"""The tables of a report. A table is a list of rows of texts, the header first; "–" is not measured."""

from __future__ import annotations

import json
from typing import Any

from nanochat.report.facts import TRAINED, Facts, StageFacts
from nanochat.run_dir import clock

DASH = "–"
Table = list[list[str]]


# ---------------------------------------------------------------- texts of values


def number(value: float | None) -> str:
    return DASH if value is None else f"{value:.4f}"


def percent(value: float | None) -> str:
    return DASH if value is None else f"{100 * value:.1f} %"


def dollars(value: float | None) -> str:
    if value is None:
        return DASH
    return f"${value:,.2f}" if value >= 0.1 or value == 0 else f"${value:.2g}"


def count(value: Any) -> str:
    """A whole number with commas, another one with six digits, text as it is."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return DASH if value is None else str(value)
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.6g}"


def pairs(values: dict[str, Any]) -> Table:
    """Names and values of a mapping, without nested ones and without a stage's own book-keeping."""
    rows = []
    for name, value in values.items():
        if name not in ("stage", "key", "inputs") and not isinstance(value, dict):
            text = ", ".join(map(str, value)) if isinstance(value, list) else count(value)
            rows.append([name, text or DASH])
    return [["", ""], *rows] if rows else []


def plain(table: Table) -> str:
    """The table with aligned columns, for the console."""
    widths = [max(map(len, column)) for column in zip(*table)]
    lines = ["  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in table]
    return "\n".join(line.rstrip() for line in lines)


def markdown(table: Table) -> str:
    """A markdown table; nothing for no rows."""
    if not table:
        return ""
    lines = []
    for row in table:
        cells = [" ".join(cell.replace("|", "\\|").split()) for cell in row]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([lines[0], "|" + " --- |" * len(table[0]), *lines[1:]])


# ---------------------------------------------------------------- one run


def chat_results(facts: Facts) -> dict[str, StageFacts]:
    """The chat evaluation of each trained stage that has one, the least trained stage first."""
    return {stage: facts[f"chat_eval_{stage}"] for stage in TRAINED if f"chat_eval_{stage}" in facts}


def bits_per_byte(facts: Facts) -> float | None:
    return facts["base_eval"].get("val_bpb") or facts["base"].get("val_bpb")


def summary(facts: Facts) -> Table:
    """Metric by stage."""
    columns = [stage for stage in TRAINED if stage in facts]
    chat = chat_results(facts)
    tasks = {stage: found.get("tasks") or {} for stage, found in chat.items()}
    num_core = len(facts["base_eval"].get("core_tasks") or {})

    def of_base(value: float | None) -> list[str]:
        return [number(value) if stage == "base" else DASH for stage in columns]

    rows = [
        ["", *columns],
        ["bits per byte (validation)", *of_base(bits_per_byte(facts))],
        ["validation loss (nats)", *(number(facts[stage].get("val_loss")) for stage in columns)],
        [f"CORE ({num_core} tasks)" if num_core else "CORE", *of_base(facts["base_eval"].get("core"))],
    ]
    for task in dict.fromkeys(name for found in tasks.values() for name in found):
        shares = [tasks.get(stage, {}).get(task, {}).get("accuracy") for stage in columns]
        rows.append([task, *map(percent, shares)])
    means = [chat[stage].get("chatcore") if stage in chat else None for stage in columns]
    return [*rows, ["ChatCORE", *map(number, means)]]


def cost(facts: Facts, seconds: float | None, price: float | None) -> float | None:
    """Dollars for so many seconds of all devices of the run, at `price` dollars per device and hour."""
    if price is None or seconds is None:
        return None
    num_devices = (facts["base"].get("plan") or {}).get("world_size", 1)
    return seconds / 3600 * num_devices * price


def stages(facts: Facts, price: float | None = None) -> Table:
    """Status, time and speed of every stage; with a price what each cost."""
    header = ["stage", "status", "time", "steps", "tokens", "tokens/s", "of the peak", "memory"]
    rows = [header if price is None else [*header, "cost"]]

    def with_cost(row: list[str], seconds: float | None) -> list[str]:
        return row if price is None else [*row, dollars(cost(facts, seconds, price))]

    for name, stage in facts.items():
        memory = stage.get("peak_memory_bytes")
        row = [
            name,
            stage.status,
            DASH if stage.seconds is None else clock(stage.seconds),
            *(count(stage.get(key)) for key in ("steps", "tokens", "tokens_per_second")),
            percent(stage.get("peak_frac")),
            DASH if memory is None else f"{memory / 1e9:.2f} GB",
        ]
        rows.append(with_cost(row, stage.seconds))
    total = sum(stage.seconds for stage in facts.values() if stage.seconds is not None)
    return [*rows, with_cost(["together", "", clock(total), *[""] * 5], total)]


def core_tasks(facts: Facts) -> Table:
    tasks = facts["base_eval"].get("core_tasks") or {}
    rows = [["task", "accuracy", "centred", "chance", "examples", "longer than T"]]
    for name, f in tasks.items():
        shares = [percent(f["accuracy"]), number(f["centred"]), percent(f["chance"])]
        rows.append([name, *shares, count(f["total"]), count(f["num_long"])])
    return rows if tasks else []


def chat_tasks(facts: Facts) -> Table:
    rows = [["model", "task", "accuracy", "95 % interval", "right", "of", "chance"]]
    for stage, found in chat_results(facts).items():
        for name, f in (found.get("tasks") or {}).items():
            interval = f"{percent(f['low'])} to {percent(f['high'])}"
            counts = [count(f["right"]), count(f["total"])]
            rows.append([stage, name, percent(f["accuracy"]), interval, *counts, percent(f["chance"])])
    return rows if len(rows) > 1 else []


def tokenizer(facts: Facts) -> Table:
    both = (facts["tok_train"].result or {}) | (facts["tok_eval"].result or {})
    return pairs({name: value for name, value in both.items() if name not in ("machine", "tokenizer")})


def machines(facts: Facts) -> list[Table]:
    """Every machine that the stages ran on, once."""
    found = [stage.get("machine") for stage in facts.values() if stage.get("machine")]
    return [pairs(machine) for machine in {json.dumps(machine): machine for machine in found}.values()]


def settings(stage: StageFacts) -> Table:
    shown = {name: value for name, value in (stage.settings or {}).items() if name != "home"}
    return [["", ""], *([name, str(value)] for name, value in shown.items())]


# ---------------------------------------------------------------- figures of a run, and two runs


def figures(facts: Facts) -> dict[tuple[str, str], tuple[float, str]]:
    """(stage, metric) -> (value, kind: "number", "percent" or "count"), in the order of the page."""
    found: dict[tuple[str, str], tuple[Any, str]] = {}
    chat = chat_results(facts)
    for stage in (stage for stage in TRAINED if stage in facts):
        if stage == "base":
            found["base", "bits per byte"] = (bits_per_byte(facts), "number")
            found["base", "CORE"] = (facts["base_eval"].get("core"), "number")
        else:
            found[stage, "validation loss"] = (facts[stage].get("val_loss"), "number")
        if stage in chat:
            for name, f in (chat[stage].get("tasks") or {}).items():
                found[stage, name] = (f["accuracy"], "percent")
            found[stage, "ChatCORE"] = (chat[stage].get("chatcore"), "number")
        for key in ("train_seconds", "tokens_per_second"):
            found[stage, key.replace("_", " ")] = (facts[stage].get(key), "count")
    return {key: value for key, value in found.items() if value[0] is not None}


def summary_csv(facts: Facts) -> str:
    """Every figure of a run as csv: stage, metric, value, ends of the 95 % interval where there is one."""
    chat = chat_results(facts)
    lines = ["stage,metric,value,low,high"]
    for (stage, metric), (value, _) in figures(facts).items():
        tasks = (chat[stage].get("tasks") or {}) if stage in chat else {}
        task = tasks.get(metric, {})
        lines.append(f"{stage},{metric},{value},{task.get('low', '')},{task.get('high', '')}")
    return "\n".join(lines) + "\n"


def differences(a: Facts, b: Facts, names: tuple[str, str]) -> Table:
    """Every figure of two runs and its change."""
    write = {"number": number, "percent": percent, "count": count}
    one, two = figures(a), figures(b)
    rows = [["stage", "metric", *names, "change"]]
    for key in dict.fromkeys([*one, *two]):
        kind = (one.get(key) or two[key])[1]
        x = one[key][0] if key in one else None
        y = two[key][0] if key in two else None
        change = DASH
        if x is not None and y is not None:
            size = write[kind](abs(y - x)).replace(" %", " pts")
            change = "=" if x == y else f"{'+' if y > x else '-'}{size}"
        rows.append([*key, write[kind](x), write[kind](y), change])
    return rows


def changed_settings(a: Facts, b: Facts, names: tuple[str, str]) -> Table:
    """The settings that differ, without home and tag, which always do."""
    rows = [["stage", "setting", *names]]
    for stage in dict.fromkeys([*a, *b]):
        one, two = ((facts[stage].settings or {}) if stage in facts else {} for facts in (a, b))
        for key in dict.fromkeys([*one, *two]):
            if key not in ("home", "tag") and one.get(key) != two.get(key):
                rows.append([stage, key, str(one.get(key, DASH)), str(two.get(key, DASH))])
    return rows if len(rows) > 1 else []
