"""The tasks that chat models are measured on, by name; a sandbox for those whose answers are programs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from nanochat.errors import UserError
from nanochat.home import Home
from nanochat.sandbox import Sandbox
from tasks.arc import ARC
from tasks.base import Task
from tasks.code import LIMITS, CodeTask
from tasks.gsm8k import GSM8K
from tasks.humaneval import HumanEval
from tasks.mbpp import MBPP
from tasks.mixtures import EMBEDDED
from tasks.mmlu import MMLU
from tasks.synthetic import Blind, heldout_tasks
from tasks.train_tasks import split_spec

HUB_TASKS: dict[str, Callable[[Home], Task]] = {
    "arc_easy": lambda home: ARC("ARC-Easy", "test", home),
    "arc_challenge": lambda home: ARC("ARC-Challenge", "test", home),
    "mmlu": lambda home: MMLU("test", home),
    "gsm8k": lambda home: GSM8K("test", home),
    "humaneval": lambda home: HumanEval(home),
    "mbpp": lambda home: MBPP("test", home),
}
OTHERS: dict[str, Callable[[Home], Task]] = {"blind": lambda home: Blind()}  # by name alone
AUTO_HUB = ("arc_easy", "arc_challenge", "mmlu", "gsm8k", "humaneval")  # what ChatCORE is the mean of


def open_tasks(names: str, trained: dict[str, Any], home: Home) -> dict[str, Task]:
    """The named tasks. auto: those it was taught by --tasks, else the hub's or the held-out sets."""
    known = (
        HUB_TASKS | OTHERS | {name: lambda home, task=task: task for name, task in heldout_tasks().items()}
    )
    is_hub = trained.get("mixture", "cpu-demo") not in EMBEDDED
    parts = split_spec(trained.get("tasks") or "")
    taught = [kind for name, _ in parts if (kind := name.partition(":")[0]) in known]
    auto = taught or list(AUTO_HUB if is_hub else heldout_tasks())
    chosen = auto if names == "auto" else list(dict.fromkeys(name.strip() for name in names.split(",")))
    unknown = [name for name in chosen if name not in known]
    if unknown:
        raise UserError(
            f"there is no task {', '.join(map(repr, unknown))}", f"choose from: {', '.join(known)}"
        )
    return {name: known[name](home) for name in chosen}


def add_sandbox(
    tasks: dict[str, Task], is_auto: bool, unsafe: bool, say: Callable[[str], None]
) -> dict[str, str]:
    """Give the code tasks a sandbox. Without one they are left out of "auto" (name -> why), else an error."""
    code = {name: task for name, task in tasks.items() if isinstance(task, CodeTask)}
    if not code:
        return {}
    try:
        sandbox = Sandbox(LIMITS, unsafe=unsafe, say=say)
    except UserError as error:
        if not is_auto:
            raise
        for name in code:
            del tasks[name]
        say(f"warning: {', '.join(code)} left out: {error.problem} ({error.hint})")
        return dict.fromkeys(code, error.problem)
    for task in code.values():
        task.sandbox = sandbox
    return {}
