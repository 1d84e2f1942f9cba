"""Shared by the tests that import it: cases first written for tests/tasks/test_tasks.py."""

from __future__ import annotations

from typing import Any

from tasks.base import Conversation, Task, reference


class Numbers(Task):
    """Example i is the number first + i."""

    def __init__(self, count: int, first: int = 0, **slice_: Any):
        super().__init__(**slice_)
        self.count, self.first = count, first

    def num_examples(self) -> int:
        return self.count

    def get_example(self, index: int) -> Conversation:
        said = str(self.first + index)
        return {"messages": [{"role": "user", "content": "?"}, {"role": "assistant", "content": said}]}


def said(task: Task) -> list[int]:
    return [int(reference(conv)) for conv in task]
