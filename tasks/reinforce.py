"""Tasks to practise by reward: for each name the questions to learn from and the held-out ones to measure.

arithmetic, letters and numbers (both) are made from the embedded corpus and need no data; gsm8k is read from
the hub.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from nanochat.data.synthetic import conversation
from nanochat.errors import UserError
from nanochat.paths import Home
from tasks.base import Conversation, Task, reference
from tasks.gsm8k import GSM8K
from tasks.synthetic import Arithmetic, LetterCounting, last_number

NUMBERS = {"arithmetic": ("arithmetic",), "letters": ("letters",), "numbers": ("arithmetic", "letters")}
NAMES = (*NUMBERS, "gsm8k")
OWN_SEED = 7_000_000  # mid-training and SFT draw their conversations with smaller seeds


class Practice(Task):
    """`size` made-up questions of several kinds by turns; right if the last number of the answer is."""

    name = "practice"

    def __init__(self, kinds: Sequence[str], size: int, seed: int = 1, **slice_: Any):
        super().__init__(**slice_)
        self.kinds, self.size, self.seed = list(kinds), size, OWN_SEED + seed

    def num_examples(self) -> int:
        return self.size

    def get_example(self, index: int) -> Conversation:
        return conversation(self.kinds[index % len(self.kinds)], self.seed, index)

    def evaluate(self, conversation: Conversation, answer: str) -> bool:
        found = last_number(answer)
        return found is not None and found == last_number(reference(conversation))


@dataclass(frozen=True)
class Goal:
    """What RL learns from, and what it is measured on (by name)."""

    train: Task
    held_out: dict[str, Task]


def goal(name: str, *, size: int, seed: int = 1, home: Home | None = None) -> Goal:
    """The goal of that name; `size` is the number of made-up questions. UserError for an unknown one."""
    if name == "gsm8k":
        return Goal(GSM8K("train", home), {"gsm8k": GSM8K("test", home)})
    if name not in NUMBERS:
        raise UserError(f"there is no task {name!r} with a reward", f"choose from: {', '.join(NAMES)}")
    held_out: dict[str, Task] = {"arithmetic": Arithmetic(), "letters": LetterCounting()}
    return Goal(Practice(NUMBERS[name], size, seed), {kind: held_out[kind] for kind in NUMBERS[name]})
