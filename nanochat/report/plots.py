"""Facts -> PNG files: losses, bits per byte, accuracies. Needs matplotlib."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from nanochat.report.facts import TRAINED, Facts

SMOOTHING = 0.9
COLOURS = {"base": "#4c72b0", "mid": "#dd8452", "sft": "#55a868", "dpo": "#8172b3", "rl": "#c44e52"}


def draw(facts: Facts, directory: Path) -> list[str]:
    """Write the plots for which there are facts; their names. Raises ImportError without matplotlib."""
    from matplotlib.figure import Figure

    drawn = []
    for name, plot, width in (("loss", _losses, 10), ("bpb", _bpb, 6), ("accuracy", _accuracies, 8)):
        figure = Figure(figsize=(width, 3.6), layout="constrained")
        if plot(figure, facts):
            temporary = directory / f".{name}.{os.getpid()}.tmp"
            figure.savefig(temporary, dpi=120, format="png")
            os.replace(temporary, directory / f"{name}.png")
            drawn.append(f"{name}.png")
    return drawn


def smooth(values: list[float]) -> list[float]:
    """An exponential average that starts unbiased: weights 0.9^k, normalised."""
    result, total, weight = [], 0.0, 0.0
    for value in values:
        total, weight = SMOOTHING * total + value, SMOOTHING * weight + 1
        result.append(total / weight)
    return result


def _losses(figure: Any, facts: Facts) -> bool:
    shown = [name for name in TRAINED if name in facts and facts[name].series("loss")[0]]
    if not shown:
        return False
    for name, axes in zip(shown, figure.subplots(1, len(shown), squeeze=False)[0], strict=True):
        steps, values = facts[name].series("loss")
        axes.plot(steps, values, color=COLOURS[name], alpha=0.25, linewidth=0.8)
        axes.plot(steps, smooth(values), color=COLOURS[name], label="training")
        checks, losses = facts[name].series("val_loss")
        if checks:
            axes.plot(checks, losses, "o--", color="black", markersize=3, linewidth=0.8, label="validation")
        axes.set(title=name, xlabel="step", ylabel="loss (nats per token)")
        axes.legend(frameon=False)
        axes.grid(alpha=0.3)
    return True


def _bpb(figure: Any, facts: Facts) -> bool:
    steps, values = facts["base"].series("val_bpb")
    if not steps:
        return False
    axes = figure.subplots()
    axes.plot(steps, values, "o-", color=COLOURS["base"], markersize=3)
    axes.annotate(
        f"{values[-1]:.4f}", (steps[-1], values[-1]), (0, 6), textcoords="offset points", ha="right"
    )
    axes.set(title="validation", xlabel="step", ylabel="bits per byte")
    axes.grid(alpha=0.3)
    return True


def _accuracies(figure: Any, facts: Facts) -> bool:
    found = {s: facts[f"chat_eval_{s}"].get("tasks") for s in TRAINED if f"chat_eval_{s}" in facts}
    found = {stage: tasks for stage, tasks in found.items() if tasks}
    names = list(dict.fromkeys(name for tasks in found.values() for name in tasks))
    if not names:
        return False
    axes, width = figure.subplots(), 0.8 / len(found)
    for i, (stage, tasks) in enumerate(found.items()):
        here = [(names.index(name) + (i + 0.5) * width - 0.4, f) for name, f in tasks.items()]
        heights = [100 * f["accuracy"] for _, f in here]
        spread = [[100 * max(0.0, f["accuracy"] - f["low"]) for _, f in here],
                  [100 * max(0.0, f["high"] - f["accuracy"]) for _, f in here]]  # fmt: skip
        places = [place for place, _ in here]
        axes.bar(places, heights, width * 0.92, yerr=spread, capsize=2, color=COLOURS[stage], label=stage)
        for place, f in here:
            if f["chance"]:
                axes.hlines(100 * f["chance"], place - width / 2, place + width / 2, "black", "dotted")
    axes.set(ylabel="accuracy (%)", ylim=(0, 105), title="chat tasks, 95 % intervals; dotted: chance")
    axes.set_xticks(range(len(names)), names)
    axes.legend(frameon=False, loc="upper left", bbox_to_anchor=(1, 1))
    return True
