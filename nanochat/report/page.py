"""Facts -> the summary table and the page. A value that nobody has measured is a dash."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from nanochat.report.facts import TRAINED, Facts
from nanochat.run_dir import clock

DASH = "–"
Table = list[list[str]]  # the first row is the header


def summary(facts: Facts) -> Table:
    """Metric by stage."""
    columns = [stage for stage in TRAINED if stage in facts]
    measured = {stage: facts.get(f"chat_eval_{stage}") for stage in columns}
    chat = {stage: (found.get("tasks") or {}) if found else {} for stage, found in measured.items()}
    base, base_eval = facts["base"], facts["base_eval"]
    bpb = base_eval.get("val_bpb") or base.get("val_bpb")
    core, tasks = base_eval.get("core"), base_eval.get("core_tasks") or {}
    rows = [["", *columns]]
    rows.append(["bits per byte (validation)", *(number(bpb) if s == "base" else DASH for s in columns)])
    rows.append(["validation loss (nats)", *(number(facts[s].get("val_loss")) for s in columns)])
    title = f"CORE ({len(tasks)} tasks)" if tasks else "CORE"
    rows.append([title, *(number(core) if s == "base" else DASH for s in columns)])
    for task in dict.fromkeys(name for found in chat.values() for name in found):
        rows.append([task, *(percent(chat[s].get(task, {}).get("accuracy")) for s in columns)])
    means = [found.get("chatcore") if found else None for found in measured.values()]
    return rows + [["ChatCORE", *map(number, means)]]


def cost(facts: Facts, seconds: float | None, price: float | None) -> float | None:
    """Dollars of so many seconds of all devices of the run; None where price or seconds are not known."""
    devices = (facts["base"].get("plan") or {}).get("world_size", 1)
    return None if price is None or seconds is None else seconds / 3600 * devices * price


def stages(facts: Facts, price: float | None = None) -> Table:
    """Status, time and speed of every stage, and with dollars per device and hour what it cost."""
    rows = [["stage", "status", "time", "steps", "tokens", "tokens/s", "of the peak", "memory"]]
    rows[0] += [] if price is None else ["cost"]
    for name, stage in facts.items():
        peak, memory = stage.get("peak_frac"), stage.get("peak_memory_bytes")
        time = DASH if stage.seconds is None else clock(stage.seconds)
        size = DASH if memory is None else f"{memory / 1e9:.2f} GB"
        counts = [count(stage.get(key)) for key in ("steps", "tokens", "tokens_per_second")]
        paid = [] if price is None else [dollars(cost(facts, stage.seconds, price))]
        rows.append([name, stage.status, time, *counts, percent(peak), size, *paid])
    known = sum(stage.seconds for stage in facts.values() if stage.seconds is not None)
    paid = [] if price is None else [dollars(cost(facts, known, price))]
    return rows + [["together", "", clock(known), *[""] * 5, *paid]]


def core_tasks(facts: Facts) -> Table:
    tasks = facts["base_eval"].get("core_tasks") or {}
    rows = [["task", "accuracy", "centred", "chance", "examples", "longer than T"]]
    for name, f in tasks.items():
        texts = [percent(f["accuracy"]), number(f["centred"]), percent(f["chance"])]
        rows.append([name, *texts, count(f["total"]), count(f["num_long"])])
    return rows if tasks else []


def chat_tasks(facts: Facts) -> Table:
    rows = [["model", "task", "accuracy", "95 % interval", "right", "of", "chance"]]
    for stage in TRAINED:
        found = facts.get(f"chat_eval_{stage}")
        for name, f in ((found.get("tasks") or {}) if found else {}).items():
            interval = f"{percent(f['low'])} to {percent(f['high'])}"
            counts = [count(f["right"]), count(f["total"])]
            rows.append([stage, name, percent(f["accuracy"]), interval, *counts, percent(f["chance"])])
    return rows if len(rows) > 1 else []


def page(facts: Facts, tag: str, plots: Sequence[str] = (), price: float | None = None) -> str:
    """The whole report as markdown; `plots` are files beside it, `price` dollars per device and hour."""
    missing = [name for name, stage in facts.items() if stage.status != "finished"]
    parts = [f"# The run {tag}", markdown(summary(facts)), f"{DASH}: not measured."]
    if missing:
        parts.append("Not finished: " + ", ".join(f"{name} ({facts[name].status})" for name in missing) + ".")
    parts += [
        "## Time",
        markdown(stages(facts, price)),
        "Training stages: without start, evaluation and saving.",
    ]
    parts += [f"![{name}]({name})" for name in plots]
    parts += ["## Chat tasks", markdown(chat_tasks(facts)), "## CORE", markdown(core_tasks(facts))]
    parts.append(facts["base_eval"].get("core_note") or "")
    samples = facts["base_eval"].get("samples") or []
    parts += ["## Samples of the base model", verbatim([prompt + text for prompt, text in samples])]
    parts += ["## Answers", *_answers(facts)]
    tok = {k: v for name in ("tok_train", "tok_eval") for k, v in (facts[name].result or {}).items()}
    parts += [
        "## Tokenizer",
        markdown(_pairs(tok)),
        "## Plan",
        markdown(_pairs(facts["base"].get("plan") or {})),
    ]
    machines = {json.dumps(s.get("machine")): s.get("machine") for s in facts.values() if s.get("machine")}
    parts += ["## Environment", *(markdown(_pairs(machine)) for machine in machines.values())]
    parts.append("## Settings")
    for name, stage in facts.items():
        if stage.settings is not None:
            words = [f"{k}={v}" for k, v in stage.settings.items() if k != "home"]
            parts += [f"### {name}", verbatim(["\n".join(words)])]
    return "\n\n".join(_with_content(parts)) + "\n"


def _with_content(parts: Sequence[str]) -> list[str]:
    """Without empty parts; a section in which nothing stands says so."""
    kept: list[str] = []
    for part in (*filter(None, parts), "## "):
        if part.startswith("## ") and kept and kept[-1].startswith("## "):
            kept.append("Nothing was recorded.")
        kept.append(part)
    return kept[:-1]


def _answers(facts: Facts) -> list[str]:
    found = [facts[f"chat_eval_{stage}"] for stage in reversed(TRAINED) if f"chat_eval_{stage}" in facts]
    newest = next((stage for stage in found if stage.get("examples")), None)
    if newest is None:
        return []
    lines = [
        f"[{'right' if r['right'] else 'wrong'}] {r['question']}\n  -> {r['answer']}"
        for records in newest.get("examples").values()
        for r in records
    ]
    return [f"The first of each task, {newest.name}:", verbatim(lines)]


def _pairs(values: dict[str, Any]) -> Table:
    """The scalars of a mapping, and lists of them, that are not the stage's own book-keeping."""
    shown = {
        k: v for k, v in values.items() if k not in ("stage", "key", "inputs") and not isinstance(v, dict)
    }
    text = {k: ", ".join(map(str, v)) if isinstance(v, list) else count(v) for k, v in shown.items()}
    return [["", ""], *([k, v or DASH] for k, v in text.items())] if text else []


def number(value: float | None) -> str:
    return DASH if value is None else f"{value:.4f}"


def dollars(value: float | None) -> str:
    if value is None:
        return DASH
    return f"${value:,.2f}" if value >= 0.1 or value == 0 else f"${value:.2g}"


def percent(value: float | None) -> str:
    return DASH if value is None else f"{100 * value:.1f} %"


def count(value: Any) -> str:
    """A whole number with commas, another one with six digits, text as it is."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return DASH if value is None else str(value)
    return (
        f"{value:,}" if isinstance(value, int) else f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.6g}"
    )


def markdown(table: Table) -> str:
    """A markdown table; nothing for no rows."""
    if not table:
        return ""
    lines = [
        "| " + " | ".join(" ".join(cell.replace("|", "\\|").split()) for cell in row) + " |" for row in table
    ]
    return "\n".join([lines[0], "|" + " --- |" * len(table[0]), *lines[1:]])


def plain(table: Table) -> str:
    """The table with aligned columns, for the console."""
    widths = [max(map(len, column)) for column in zip(*table)]
    lines = ["  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in table]
    return "\n".join(line.rstrip() for line in lines)


def verbatim(texts: Sequence[str]) -> str:
    """Texts that a model or a person wrote, as an indented block, in which nothing is markup."""
    return "\n\n".join(
        "\n".join("    " + line for line in text.splitlines()) for text in texts if text.strip()
    )
