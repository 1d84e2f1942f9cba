"""ARC (allenai/ai2_arc): school science questions with three to five choices."""

from __future__ import annotations

from typing import Any

from nanochat.home import Home
from tasks.base import Conversation, render_multiple_choice
from tasks.hub_task import HubTask

LETTERS = ["A", "B", "C", "D", "E"]


class ARC(HubTask):
    """`subset` "ARC-Easy" or "ARC-Challenge". Rows label choices by letters or digits; we by letters."""

    kind = "categorical"

    def __init__(self, subset: str, split: str, home: Home | None = None, **slice_: Any):
        if subset not in ("ARC-Easy", "ARC-Challenge") or split not in ("train", "validation", "test"):
            raise ValueError(
                f"ARC-Easy or ARC-Challenge, train, validation or test; found {subset!r}, {split!r}"
            )
        columns = ("question", "choices", "answerKey")
        super().__init__("allenai/ai2_arc", f"{subset}/{split}-*.parquet", columns, home, **slice_)
        self.name = subset.lower()

    def get_example(self, index: int) -> Conversation:
        row = self.row(index)
        choices, labels = row["choices"]["text"], row["choices"]["label"]
        letters = LETTERS[: len(choices)]
        return {
            "messages": [
                {"role": "user", "content": render_multiple_choice(row["question"], letters, choices)},
                {"role": "assistant", "content": letters[labels.index(row["answerKey"])]},
            ],
            "letters": letters,
        }
