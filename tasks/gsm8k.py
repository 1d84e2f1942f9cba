"""GSM8K (openai/gsm8k): word problems; <<expr=result>> in the solutions becomes a call of the calculator."""

from __future__ import annotations

import re
from typing import Any

from nanochat.home import Home
from tasks.base import Conversation
from tasks.hub_task import HubTask

CALL = re.compile(r"<<([^<>]*)>>")
ANSWER = re.compile(r"#### (-?[0-9.,]+)")


def solution_parts(solution: str) -> list[dict[str, str]]:
    """A solution as message parts: text, python and python_output, each call split at its last "="."""
    parts = []
    for i, piece in enumerate(CALL.split(solution)):
        if i % 2:
            code, _, output = piece.rpartition("=")
            parts += [{"type": "python", "text": code}, {"type": "python_output", "text": output}]
        elif piece:
            parts.append({"type": "text", "text": piece})
    return parts


def final_answer(text: str) -> str | None:
    """The number after the first "#### ", without commas."""
    match = ANSWER.search(text)
    return match.group(1).replace(",", "") if match else None


class GSM8K(HubTask):
    """Right if the number after "####" equals the reference's as a string."""

    name = "gsm8k"

    def __init__(self, split: str, home: Home | None = None, **slice_: Any):
        if split not in ("train", "test"):
            raise ValueError(f"split must be train or test, found {split!r}")
        super().__init__("openai/gsm8k", f"main/{split}-*.parquet", ("question", "answer"), home, **slice_)

    def get_example(self, index: int) -> Conversation:
        row = self.row(index)
        return {
            "messages": [
                {"role": "user", "content": row["question"]},
                {"role": "assistant", "content": solution_parts(row["answer"])},
            ]
        }

    def evaluate(self, conversation: Conversation, answer: str) -> bool:
        wanted = "".join(p["text"] for p in conversation["messages"][-1]["content"] if p["type"] == "text")
        found = final_answer(answer)
        return found is not None and found == final_answer(wanted)
