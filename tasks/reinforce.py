"""Tasks to practise by reward: for each name the questions to learn from and the held-out ones to measure.

arithmetic (sums and word problems), stories (word problems alone), letters, and numbers (arithmetic and
letters) are made from the embedded corpus and need no data; gsm8k and mbpp (programs, graded in the sandbox)
are read from the hub.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from nanochat.corpus import conversation
from nanochat.corpus.heldout import as_conversation
from nanochat.corpus.numbers import question
from nanochat.corpus.rng import Rng, mix_text
from nanochat.errors import UserError
from nanochat.home import Home
from nanochat.sandbox import Sandbox
from tasks.base import Conversation, Task, reference
from tasks.code import LIMITS
from tasks.gsm8k import GSM8K
from tasks.mbpp import MBPP
from tasks.synthetic import Arithmetic, LetterCounting, last_number

NUMBERS = {
    "arithmetic": ("arithmetic",),
    "stories": ("stories",),
    "letters": ("letters",),
    "numbers": ("arithmetic", "letters"),
}
NAMES = (*NUMBERS, "gsm8k", "mbpp")
OWN_SEED = 7_000_000  # mid-training and SFT draw their conversations with smaller seeds
HELD_OUT_SIZE = 200


def is_story(question: str) -> bool:
    """Whether a question of arithmetic is a word problem; the others ask "how much", if anything."""
    return "how many" in question.lower()


class Numbered(Task):
    """Questions whose answer is right if its last number is the reference's."""

    def evaluate(self, conversation: Conversation, answer: str) -> bool:
        found = last_number(answer)
        return found is not None and found == last_number(reference(conversation))


class Practice(Numbered):
    """`size` made-up questions of several kinds by turns, in training's phrasings and operands."""

    name = "practice"

    def __init__(self, kinds: Sequence[str], size: int, seed: int = 1, **slice_: Any):
        super().__init__(**slice_)
        self.kinds, self.size, self.seed = list(kinds), size, OWN_SEED + seed

    def num_examples(self) -> int:
        return self.size

    def get_example(self, index: int) -> Conversation:
        kind = self.kinds[index % len(self.kinds)]
        if kind != "stories":
            return conversation(kind, self.seed, index)
        drawn = (conversation("arithmetic", self.seed, i) for i in itertools.count(index, self.size))
        return next(c for c in drawn if is_story(c["messages"][0]["content"]))


class HeldOutSums(Numbered):
    """Word problems, or sums, in held-out phrasings and operands: more of them than tasks/heldout has.

    `size` of them from a seed, each with an expression of its own, none of the committed ones'.
    """

    def __init__(self, stories: bool, size: int = HELD_OUT_SIZE, seed: int = 1, **slice_: Any):
        super().__init__(**slice_)
        self.name, self.stories, self.size, self.seed = "stories" if stories else "sums", stories, size, seed

    @cached_property
    def _conversations(self) -> list[Conversation]:
        seen = {record["code"] for record in Arithmetic().records}
        rng, made = Rng(mix_text("held out practice"), self.seed, self.stories), list[Conversation]()
        while len(made) < self.size:
            asked, s, reply = question(rng, held_out=True)
            if s.text not in seen and is_story(asked) == self.stories:
                seen.add(s.text)
                record = {"question": asked, "code": s.text, "answer": str(s.value), "reply": reply}
                made.append(as_conversation(record))
        return made

    def num_examples(self) -> int:
        return self.size

    def get_example(self, index: int) -> Conversation:
        return self._conversations[index]


@dataclass(frozen=True)
class Goal:
    """What RL learns from, and what it is measured on (by name)."""

    train: Task
    held_out: dict[str, Task]


def goal(name: str, *, size: int, seed: int = 1, home: Home | None = None) -> Goal:
    """The goal of that name; `size` is the number of made-up questions. UserError for an unknown one."""
    if name == "gsm8k":
        return Goal(GSM8K("train", home), {"gsm8k": GSM8K("test", home)})
    if name == "mbpp":
        sandbox = Sandbox(LIMITS)
        held_out_programs = MBPP("test", home, sandbox=sandbox)
        return Goal(MBPP("train", home, sandbox=sandbox), {"mbpp": held_out_programs})
    if name not in NUMBERS:
        raise UserError(f"there is no task {name!r} with a reward", f"choose from: {', '.join(NAMES)}")
    held_out = {"arithmetic": Arithmetic(), "letters": LetterCounting(), "stories": HeldOutSums(stories=True)}
    return Goal(Practice(NUMBERS[name], size, seed), {kind: held_out[kind] for kind in NUMBERS[name]})
