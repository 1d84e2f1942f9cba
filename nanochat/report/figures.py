"""The charts of a report, from the facts of one run or of two."""

from __future__ import annotations

from typing import Any

from nanochat.report.charts import Bars, Chart, Line, bar_chart, line_chart, smooth
from nanochat.report.facts import TRAINED, Facts, StageFacts
from nanochat.report.tables import chat_results, number

COLOURS = {"base": "#4c72b0", "mid": "#dd8452", "sft": "#55a868", "dpo": "#8172b3", "rl": "#c44e52"}
GREY, OTHER = "#8a8f98", "#937ac2"
GREYS = ("#c9cdd4", "#aab0b9", "#8a909b", "#6b727d")
FIRST, SECOND = "#3867b8", "#d9822b"  # of two runs
Charts = list[Chart]


def drawn(*charts: Chart | None) -> Charts:
    """Those that have something to show."""
    return [chart for chart in charts if chart is not None]


def losses(facts: Facts) -> dict[str, Chart | None]:
    """Training and validation loss of each stage."""
    charts = {}
    for name in TRAINED:
        if name in facts and name != "rl":
            steps, values = facts[name].series("loss")
            lines = [
                Line("", steps, values, COLOURS[name], faint=True),
                Line("training", steps, smooth(values), COLOURS[name]),
                Line("validation", *facts[name].series("val_loss"), GREY, dashed=True, dots=True),
            ]
            charts[name] = line_chart(f"{name}: loss", lines, "step", "nats per token")
    return charts


def bits_per_byte(facts: Facts) -> Chart | None:
    line = Line("validation", *facts["base"].series("val_bpb"), COLOURS["base"], dots=True)
    return line_chart("base: bits per byte", [line], "step", "bits per byte")


def learning(facts: Facts) -> Charts:
    """Losses, bits per byte, learning rates, speed and use of the hardware."""
    charts = [*losses(facts).values(), bits_per_byte(facts)]
    for key, title, unit in (
        ("lr_factor", "learning rate", "factor"),
        ("tokens_per_second", "tokens per second", "smoothed"),
        ("peak_frac", "use of the hardware", "share of its peak, smoothed"),
    ):
        lines = []
        for name in TRAINED:
            if name in facts:
                xs, ys = by_share_of_steps(facts[name], key)
                lines.append(Line(name, xs, ys if key == "lr_factor" else smooth(ys), COLOURS[name]))
        charts.append(line_chart(title, lines, "share of the stage", unit, True))
    return drawn(*charts)


def by_share_of_steps(stage: StageFacts, key: str) -> tuple[list[float], list[float]]:
    """A metric over the share of the stage's steps, so that stages of any length lie side by side."""
    steps, values = stage.series(key)
    last = max(steps, default=1)
    return [step / last for step in steps], values


def reinforcement(facts: Facts) -> Charts:
    """Rewards, held-out accuracy and what else RL records."""
    if "rl" not in facts:
        return []
    rl, colour = facts["rl"], COLOURS["rl"]
    steps, rewards = rl.series("reward")
    reward_lines = [
        Line("", steps, rewards, colour, faint=True),
        Line("smoothed", steps, smooth(rewards), colour),
    ]
    names = sorted({key for row in rl.metrics for key in row if key.startswith("accuracy_")})
    colours = [COLOURS["base"], COLOURS["sft"], OTHER, COLOURS["mid"]]
    held_out = [
        Line(name.removeprefix("accuracy_"), *rl.series(name), colours[i % len(colours)], dots=True)
        for i, name in enumerate(names)
    ]
    charts = [
        line_chart("reward of sampled answers", reward_lines, "step", "mean reward", True),
        line_chart("held-out accuracy, greedy", held_out, "step", "share", True),
    ]
    for key, title, unit in (
        ("kl", "distance from the parent (KL)", "nats"),
        ("answer_tokens", "length of answers", "tokens"),
        ("same_frac", "groups of equal rewards", "share"),
        ("clip_frac", "clipped tokens", "share"),
    ):
        if any(rl.series(key)[1]):
            charts.append(line_chart(title, [Line("", *rl.series(key), colour)], "step", unit, True))
    return drawn(*charts)


def accuracies(facts: Facts) -> Chart | None:
    """Accuracy of each chat task by stage, and their mean above chance."""
    found: dict[str, dict[str, Any]] = {}
    for stage, chat in chat_results(facts).items():
        tasks = dict(chat.get("tasks") or {})
        mean = chat.get("chatcore")
        if mean is not None and len(tasks) > 1:
            tasks["ChatCORE"] = {"accuracy": mean, "low": mean, "high": mean, "chance": 0}
        if tasks:
            found[stage] = tasks
    names = list(dict.fromkeys(name for tasks in found.values() for name in tasks))
    names.sort(key=lambda name: name == "ChatCORE")
    series = [accuracy_bars(stage, tasks, names, COLOURS[stage]) for stage, tasks in found.items()]
    chance = [
        next(100 * tasks[name]["chance"] for tasks in found.values() if name in tasks) for name in names
    ]
    title = "accuracy with 95 % intervals; dotted: chance"
    return bar_chart(title, names, series, "per cent", chance, 105, is_wide=True)


def accuracy_bars(label: str, tasks: dict[str, Any], names: list[str], colour: str) -> Bars:
    """Accuracies in per cent with their intervals."""
    shown = [tasks.get(name) for name in names]
    return Bars(
        label,
        [None if f is None else 100 * f["accuracy"] for f in shown],
        colour,
        [None if f is None else (100 * f["low"], 100 * f["high"]) for f in shown],
    )


def core(facts: Facts) -> Chart | None:
    """Centred accuracy of each task, beside the reference models that the bundle brings."""
    tasks = facts["base_eval"].get("core_tasks") or {}
    names = list(tasks)
    series = [Bars("this model", [tasks[name]["centred"] for name in names], COLOURS["base"])]
    for (model, values), colour in zip(known_models(facts).items(), GREYS, strict=False):
        series.append(Bars(model, [values.get(name) for name in names], colour))
    title = "centred accuracy (0 is chance, 1 is perfect)"
    return bar_chart(title, names, series, "centred", is_wide=True)


def known_models(facts: Facts) -> dict[str, dict[str, float]]:
    """Centred accuracies of the models in the bundle, the weakest on the measured tasks first."""
    found = facts["base_eval"].get("core_references") or {}
    tasks = facts["base_eval"].get("core_tasks") or {}
    return dict(sorted(found.items(), key=lambda item: sum(item[1].get(name, 0) for name in tasks)))


def core_note(facts: Facts) -> str:
    """What was measured, and the means of the bundle's models over the same tasks."""
    remark = facts["base_eval"].get("core_note") or ""
    if facts["base_eval"].get("core") is None:
        return f"Not measured: {remark}." if remark else ""
    tasks = facts["base_eval"].get("core_tasks") or {}
    means = [
        f"{model} {number(sum(values[name] for name in tasks) / len(tasks))}"
        for model, values in known_models(facts).items()
        if tasks.keys() <= values.keys()
    ]
    parts = [remark] if remark else []
    if means:
        parts.append(f"over the same tasks: {', '.join(means)}")
    text = "; ".join(parts)
    return f"{text[:1].upper()}{text[1:]}." if text else ""


def tokenizer(facts: Facts) -> Chart | None:
    ratios = facts["tok_eval"].get("bytes_per_token")
    if not isinstance(ratios, dict):
        return None
    names = list(next((values for values in ratios.values() if values), {}))
    colours = (COLOURS["base"], GREY, OTHER, COLOURS["mid"])
    series = [
        Bars(who, [values.get(name) for name in names], colour)
        for (who, values), colour in zip(ratios.items(), colours, strict=False)
        if values
    ]
    return bar_chart("bytes per token (more is better)", names, series, "bytes", is_wide=True)


def learning_of_two(a: Facts, b: Facts, names: tuple[str, str]) -> Charts:
    charts = []
    for stage in TRAINED:
        for key, title, unit in (
            ("loss", "training loss", "nats, smoothed"),
            ("val_bpb", "validation", "bits per byte"),
            ("val_loss", "validation loss", "nats"),
            ("reward", "reward", "mean, smoothed"),
        ):
            if key == "loss" and stage == "rl":
                continue
            is_check = key.startswith("val")
            lines = []
            for facts, name, colour in ((a, names[0], FIRST), (b, names[1], SECOND)):
                if stage in facts:
                    steps, ys = facts[stage].series(key)
                    lines.append(Line(name, steps, ys if is_check else smooth(ys), colour, dots=is_check))
            charts.append(line_chart(f"{stage}: {title}", lines, "step", unit))
    return drawn(*charts)


def accuracies_of_two(a: Facts, b: Facts, names: tuple[str, str]) -> Charts:
    chats = [chat_results(facts) for facts in (a, b)]
    charts = []
    for stage in TRAINED:
        found = [(chat[stage].get("tasks") or {}) if stage in chat else {} for chat in chats]
        tasks = list(dict.fromkeys(name for part in found for name in part))
        series = [
            accuracy_bars(name, part, tasks, colour)
            for name, part, colour in zip(names, found, (FIRST, SECOND), strict=True)
        ]
        title = f"{stage}: accuracy, 95 % intervals"
        charts.append(bar_chart(title, tasks, series, "per cent", top=105))
    return drawn(*charts)
