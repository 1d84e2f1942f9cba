"""MMLU (cais/mmlu): four-choice questions over 57 subjects."""

from __future__ import annotations

from typing import Any

from nanochat.home import Home
from tasks.base import Conversation, render_multiple_choice
from tasks.hub_task import HubTask

LETTERS = ["A", "B", "C", "D"]


SPLITS = ("auxiliary_train", "test", "validation", "dev")


class MMLU(HubTask):
    """A split of the configuration "all"; auxiliary_train is the large one, for training."""

    name = "mmlu"
    kind = "categorical"

    def __init__(self, split: str, home: Home | None = None, **slice_: Any):
        if split not in SPLITS:
            raise ValueError(f"split must be one of {SPLITS}, found {split!r}")
        columns = ("question", "subject", "choices", "answer")
        super().__init__("cais/mmlu", f"all/{split}-*.parquet", columns, home, **slice_)

    def get_example(self, index: int) -> Conversation:
        row = self.row(index)
        text = render_multiple_choice(row["question"], LETTERS, row["choices"])
        return {
            "messages": [
                {"role": "user", "content": text},
                {"role": "assistant", "content": LETTERS[row["answer"]]},
            ],
            "subject": row["subject"],
            "letters": LETTERS[: len(row["choices"])],
        }
