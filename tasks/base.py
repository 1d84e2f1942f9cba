"""Task: a sliced sequence of conversations, with a way to grade answers.

Mixture: several tasks, shuffled. Curriculum: several, in order.
"""

from __future__ import annotations

import random
from abc import ABC, abstractmethod
from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate

from nanochat.chat_format import Conversation, text_of
from nanochat.corpus.choices import render_multiple_choice

__all__ = ["Conversation", "Curriculum", "Mixture", "Task", "render_multiple_choice"]


class Task(ABC):
    """Conversations whose last message is the assistant's reference answer.

    `kind` says how a model answers: "categorical" (one of the conversation's "letters", by comparing their
    scores) or "generative" (free text). `start`, `stop`, `step` select a part, as in a slice.
    """

    name = "task"
    kind = "generative"

    def __init__(self, start: int = 0, stop: int | None = None, step: int = 1):
        if start < 0 or (stop is not None and stop < start) or step < 1:
            raise ValueError(
                f"a slice must have 0 <= start <= stop and step >= 1, found {start}:{stop}:{step}"
            )
        self.start, self.stop, self.step = start, stop, step

    @abstractmethod
    def num_examples(self) -> int:
        """Examples before slicing."""

    @abstractmethod
    def get_example(self, index: int) -> Conversation:
        """Example `index` before slicing."""

    def _indices(self) -> range:
        n = self.num_examples()
        return range(self.start, n if self.stop is None else min(self.stop, n), self.step)

    def __len__(self) -> int:
        return len(self._indices())

    def __getitem__(self, index: int) -> Conversation:
        return self.get_example(self._indices()[index])

    def evaluate(self, conversation: Conversation, answer: str) -> bool:
        """Whether `answer` (the text parts of the assistant's message) is right."""
        if self.kind == "categorical":
            return answer.strip() == reference(conversation)
        raise ValueError(f"{self.name} is a training set without a rule for right answers")

    def reward(self, conversation: Conversation, answer: str) -> float:
        """1.0 for a right answer, 0.0 for a wrong one."""
        return float(self.evaluate(conversation, answer))


def reference(conversation: Conversation) -> str:
    """The text of the reference answer."""
    return text_of(conversation["messages"][-1]["content"]).strip()


class Curriculum(Task):
    """Tasks one after another. `ends` are the numbers of examples up to the end of each, for the loader."""

    name = "curriculum"

    def __init__(self, tasks: Sequence[Task]):
        super().__init__()
        self.tasks = list(tasks)
        self.ends = list(accumulate(len(task) for task in self.tasks))

    def num_examples(self) -> int:
        return self.ends[-1] if self.ends else 0

    def get_example(self, index: int) -> Conversation:
        which = bisect_right(self.ends, index)
        return self.tasks[which][index - (self.ends[which] - len(self.tasks[which]))]


class Mixture(Task):
    """All examples of several tasks in one fixed random order; `(task, 3)` takes a task three times."""

    name = "mixture"

    def __init__(self, tasks: Sequence[Task | tuple[Task, int]], seed: int = 42):
        super().__init__()
        pairs = [task if isinstance(task, tuple) else (task, 1) for task in tasks]
        self.tasks = [task for task, count in pairs for _ in range(count)]
        self._first = [next(i for i, other in enumerate(self.tasks) if other is task) for task in self.tasks]
        self._ends = list(accumulate(len(task) for task in self.tasks))
        self._order = list(range(self._ends[-1] if self._ends else 0))
        random.Random(seed).shuffle(self._order)

    def num_examples(self) -> int:
        return len(self._order)

    def _place(self, index: int) -> tuple[int, int]:
        """(number of the task, number of its example)."""
        flat = self._order[index]
        which = bisect_right(self._ends, flat)
        return which, flat - (self._ends[which] - len(self.tasks[which]))

    def get_example(self, index: int) -> Conversation:
        which, inside = self._place(index)
        return self.tasks[which][inside]

    def origin(self, index: int) -> tuple[int, int]:
        """The same for all repetitions of an example, different for all others."""
        which, inside = self._place(index)
        return self._first[which], inside
