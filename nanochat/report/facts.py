"""The facts of a run: settings.json, metrics.jsonl and result.json of its stages."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from nanochat.errors import UserError
from nanochat.home import Home, read_json
from nanochat.run_dir import read_metrics

TRAINED = ("base", "mid", "sft", "dpo", "rl")  # columns of the summary
STAGES = (
    "tok_train", "tok_eval", "base", "base_eval", "mid", "chat_eval_mid", "sft", "chat_eval_sft",
    "dpo", "chat_eval_dpo", "rl", "chat_eval_rl",
)  # fmt: skip
OPTIONAL = STAGES[-4:]  # left out where there are none; others are shown as not run


@dataclass(frozen=True)
class StageFacts:
    """What one stage has written; None or empty where it has not."""

    name: str
    settings: dict[str, Any] | None
    result: dict[str, Any] | None
    metrics: list[dict[str, Any]]

    @property
    def status(self) -> str:
        """ "finished", "not run", or how far it has come."""
        if self.result is not None:
            return "finished"
        if self.settings is None:
            return "not run"
        steps = [row["step"] for row in self.metrics]
        return f"unfinished, step {max(steps)}" if steps else "unfinished"

    @property
    def seconds(self) -> float | None:
        """Seconds of training, or of the whole stage where it is no training."""
        result = self.result or {}
        return result.get("train_seconds", result.get("seconds"))

    def get(self, key: str) -> Any:
        """A value of result.json, None without one."""
        return (self.result or {}).get(key)

    def series(self, key: str) -> tuple[list[int], list[float]]:
        """(steps, values) of a metric, where it was recorded and finite."""
        rows = [row for row in self.metrics if row.get(key) is not None]
        return [row["step"] for row in rows], [row[key] for row in rows]


Facts = dict[str, StageFacts]


def read_facts(home: Home, tag: str) -> Facts:
    """The facts of every stage of a run. Raises UserError if there are none at all, or a file is damaged."""
    facts = {}
    for name in STAGES:
        settings, result = home.settings_file(tag, name), home.result_file(tag, name)
        found = StageFacts(
            name,
            read_json(settings) if settings.exists() else None,
            read_json(result) if result.exists() else None,
            read_metrics(home.metrics_file(tag, name)),
        )
        if name not in OPTIONAL or found.status != "not run":
            facts[name] = found
    if all(stage.status == "not run" for stage in facts.values()):
        raise UserError(
            f"the run {tag!r} in {home.root} has no facts to report", "train first: bash speedrun.sh"
        )
    return facts
