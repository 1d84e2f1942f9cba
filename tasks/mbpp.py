"""MBPP (google-research-datasets/mbpp): small programs from a sentence and three tests (arXiv 2108.07732)."""

from __future__ import annotations

import ast
from typing import Any

from nanochat.home import Home
from nanochat.sandbox.sandbox import Job
from tasks.base import Conversation
from tasks.code import CodeTask, code_of

SPLITS = ("train", "test", "validation", "prompt")
COLUMNS = ("text", "code", "test_list", "test_setup_code")


class MBPP(CodeTask):
    """Right if the function that the tests call passes all of them."""

    name = "mbpp"

    def __init__(self, split: str, home: Home | None = None, **more: Any):
        if split not in SPLITS:
            raise ValueError(f"split must be one of {SPLITS}, found {split!r}")
        super().__init__("google-research-datasets/mbpp", f"full/{split}-*.parquet", COLUMNS, home, **more)

    def get_example(self, index: int) -> Conversation:
        row = self.row(index)
        tests = list(row["test_list"])
        asked = f"{row['text']}\nYour code should pass these tests:\n\n" + "\n".join(tests)
        solution = row["code"].replace("\r\n", "\n").strip()
        return {
            "messages": [
                {"role": "user", "content": asked},
                {"role": "assistant", "content": f"```python\n{solution}\n```"},
            ],
            "tests": tests,
            "setup": row["test_setup_code"],
            "entry": entry_of(solution, tests),
        }

    def job(self, conversation: Conversation, answer: str) -> Job:
        tests = "\n".join(conversation["tests"])
        return Job(code_of(answer), conversation["entry"], conversation["setup"], tests)


def entry_of(solution: str, tests: list[str]) -> str:
    """The function of the solution that the tests call first. Raises ValueError if they call none.

    >>> entry_of("def f(x): return g(x)\\ndef g(x): return x", ["assert sum(f([1])) == 1"])
    'f'
    """
    defined = {
        node.name for node in ast.parse(solution).body if isinstance(node, (ast.FunctionDef, ast.ClassDef))
    }
    for test in tests:
        for node in ast.walk(ast.parse(test)):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in defined:
                return node.func.id
    raise ValueError(f"the tests call none of {sorted(defined)}")
