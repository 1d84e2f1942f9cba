"""HumanEval (openai/openai_humaneval): 164 functions to complete (Chen et al. 2021, arXiv 2107.03374)."""

from __future__ import annotations

import re
from typing import Any

from nanochat.home import Home
from nanochat.sandbox.sandbox import Job
from tasks.base import Conversation
from tasks.code import CodeTask, code_of

COLUMNS = ("task_id", "prompt", "canonical_solution", "test", "entry_point")


class HumanEval(CodeTask):
    """Right if the function passes the tests. The imports and helpers of the prompt need not be repeated."""

    name = "humaneval"

    def __init__(self, home: Home | None = None, **more: Any):
        super().__init__("openai/openai_humaneval", "openai_humaneval/test-*.parquet", COLUMNS, home, **more)

    def get_example(self, index: int) -> Conversation:
        row = self.row(index)
        whole = f"```python\n{row['prompt']}{row['canonical_solution'].rstrip()}\n```"
        return {
            "messages": [
                {"role": "user", "content": row["prompt"]},
                {"role": "assistant", "content": whole},
            ],
            "entry": row["entry_point"],
            "tests": row["test"],
        }

    def job(self, conversation: Conversation, answer: str) -> Job:
        entry, prompt = conversation["entry"], conversation["messages"][0]["content"]
        helpers = before_function(prompt, entry)
        tests = f"{conversation['tests']}\ncheck({entry})\n"
        return Job(f"{helpers}\n{code_of(answer)}\n", entry, helpers, tests)


def before_function(prompt: str, entry: str) -> str:
    """What stands in the prompt before the function: imports and helpers."""
    match = re.search(rf"^def {re.escape(entry)}\b", prompt, re.M)
    return prompt[: match.start()] if match else ""
