"""What HumanEval and MBPP share: from an answer to code, and grading many answers in the sandbox."""

from __future__ import annotations

import re
from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

from nanochat.home import Home
from nanochat.sandbox import Sandbox
from nanochat.sandbox.process import Limits
from nanochat.sandbox.sandbox import Job
from tasks.base import Conversation
from tasks.hub_task import HubTask

FENCE = re.compile(r"```[ \t]*(?:python|py)?[ \t]*\n(.*?)(?:\n[ \t]*```|\Z)", re.S | re.I)
LIMITS = Limits(wall_seconds=10.0, cpu_seconds=4)  # a busy machine may take longer than the program


def code_of(answer: str) -> str:
    """The first fenced block of an answer, otherwise all of it.

    >>> code_of("Here it is:\\n```python\\nx = 1\\n```\\nDone.")
    'x = 1'
    """
    match = FENCE.search(answer)
    return match[1] if match else answer


class CodeTask(HubTask):
    """Answers are programs; right if the tests pass in the sandbox. Made without a sandbox, it makes one."""

    def __init__(
        self, repo: str, pattern: str, columns: tuple[str, ...], home: Home | None = None,
        sandbox: Sandbox | None = None, **slice_: Any,
    ):  # fmt: skip
        super().__init__(repo, pattern, columns, home, **slice_)
        self.sandbox = sandbox

    @abstractmethod
    def job(self, conversation: Conversation, answer: str) -> Job:
        """What is to be run for an answer."""

    def evaluate(self, conversation: Conversation, answer: str) -> bool:
        return self.evaluate_many([(conversation, answer)])[0]

    def evaluate_many(self, pairs: Sequence[tuple[Conversation, str]]) -> list[bool]:
        """Verdicts on several answers, graded side by side. UserError where nothing can be run safely."""
        if self.sandbox is None:
            self.sandbox = Sandbox(LIMITS)
        return [verdict.passed for verdict in self.sandbox.grade_all([self.job(*pair) for pair in pairs])]
