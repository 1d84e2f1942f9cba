"""MMLU (cais/mmlu): four-choice questions over 57 subjects."""

from __future__ import annotations

from typing import Any

from nanochat.paths import Home
from tasks.base import Conversation, render_multiple_choice
from tasks.rows import HubTask

LETTERS = ["A", "B", "C", "D"]


class MMLU(HubTask):
    """`subset` "all" (splits test, dev, validation) or "auxiliary_train" (split train)."""

    name = "mmlu"
    kind = "categorical"

    def __init__(self, subset: str, split: str, home: Home | None = None, **slice_: Any):
        splits = {"all": ("test", "dev", "validation"), "auxiliary_train": ("train",)}
        if split not in splits.get(subset, ()):
            raise ValueError(f"subset and split must be one of {splits}, found {subset!r}, {split!r}")
        columns = ("question", "subject", "choices", "answer")
        super().__init__("cais/mmlu", f"{subset}/{split}-*.parquet", columns, home, **slice_)

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
