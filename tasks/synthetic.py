"""The embedded corpus as tasks: training conversations of any kind and number, and the five held-out sets."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from functools import cached_property
from importlib import resources
from pathlib import Path
from typing import Any, ClassVar

from nanochat.corpus import conversation
from nanochat.corpus.chats import messages
from nanochat.corpus.heldout import as_conversation, heldout_sets
from tasks.base import Conversation, Task

WORD = re.compile(r"[^\W_]+")
NUMBER = re.compile(r"(?<![\w.])-?\d+(?:,\d{3})*(?:\.\d+)?")


class SyntheticChat(Task):
    """`size` training conversations of one kind (nanochat.corpus.KINDS)."""

    def __init__(self, kind: str, size: int, seed: int = 42, **slice_: Any):
        super().__init__(**slice_)
        self.name, self.chat_kind, self.size, self.seed = f"synthetic-{kind}", kind, size, seed

    def num_examples(self) -> int:
        return self.size

    def get_example(self, index: int) -> Conversation:
        return conversation(self.chat_kind, self.seed, index)


class HeldOut(Task):
    """A committed set of questions, tasks/heldout/<file>.jsonl."""

    file = ""

    @cached_property
    def records(self) -> list[dict[str, Any]]:
        path = resources.files("tasks").joinpath("heldout").joinpath(f"{self.file}.jsonl")
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]

    def num_examples(self) -> int:
        return len(self.records)

    def get_example(self, index: int) -> Conversation:
        return as_conversation(self.records[index])


def last_number(text: str) -> str | None:
    """The last number in a text, without commas: "3 + 4 is 1,007." -> "1007"."""
    found = NUMBER.findall(text)
    return found[-1].replace(",", "") if found else None


def words(text: str) -> str:
    """Lower-case letters and digits, single spaces between and around words."""
    return f" {' '.join(WORD.findall(text.lower()))} "


def has_word(text: str, wanted: Iterable[str]) -> bool:
    """Whether one of the wanted words or phrases stands in the text as whole words, in any case."""
    said = words(text)
    return any(words(w) in said for w in wanted)


class Arithmetic(HeldOut):
    """Right if the last number of the answer is the result."""

    name = file = "arithmetic"

    def evaluate(self, conversation: Conversation, answer: str) -> bool:
        return last_number(answer) == conversation["answer"]


class LetterCounting(HeldOut):
    """Right if the last number of the answer is the count."""

    name = file = "letters"

    def evaluate(self, conversation: Conversation, answer: str) -> bool:
        return last_number(answer) == conversation["answer"]


class Facts(HeldOut):
    """Right if the answer contains an accepted one as whole words."""

    name = file = "facts"

    def evaluate(self, conversation: Conversation, answer: str) -> bool:
        return has_word(answer, conversation["accepted"])


class MultipleChoice(HeldOut):
    """Right if the letter is."""

    name = file = "multiple_choice"
    kind = "categorical"


class Identity(HeldOut):
    """Right if, of each group of required words, the answer has one; "nanochat" is always required."""

    name = file = "identity"

    def evaluate(self, conversation: Conversation, answer: str) -> bool:
        return all(has_word(answer, group) for group in conversation["required"])


class Blind(HeldOut):
    """166 questions written by someone who had seen the facts but no training text, nor the other sets.

    Facts, sums, letters and identity, judged as those are. Nothing may be tuned on it: docs/evaluation.md.
    """

    name = file = "blind"
    judges: ClassVar = {
        "facts": Facts,
        "arithmetic": Arithmetic,
        "letters": LetterCounting,
        "identity": Identity,
    }

    def get_example(self, index: int) -> Conversation:
        record = self.records[index]
        reply = record.get("answer") or ", ".join(record.get("accepted", ["nanochat"]))
        return {"messages": messages([(record["question"], reply)]), **record}

    def evaluate(self, conversation: Conversation, answer: str) -> bool:
        return self.judges[conversation["kind"]]().evaluate(conversation, answer)


def heldout_tasks() -> dict[str, Task]:
    """The five held-out sets by name."""
    tasks: list[Task] = [Arithmetic(), LetterCounting(), Facts(), MultipleChoice(), Identity()]
    return {task.name: task for task in tasks}


def heldout_lines() -> dict[str, list[str]]:
    """The lines of the committed files as the generator makes them now."""
    return {
        name: [json.dumps(record, ensure_ascii=False) for record in records]
        for name, records in heldout_sets().items()
    }


def write_heldout(directory: Path) -> None:
    """Make the held-out files again. Only for a change of the sets that docs/decisions.md explains."""
    directory.mkdir(parents=True, exist_ok=True)
    for name, lines in heldout_lines().items():
        (directory / f"{name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
