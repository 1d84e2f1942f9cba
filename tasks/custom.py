"""Your own conversations: a JSONL file, one conversation a line, for training only.

A line is {"messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}, ...]} or
the list of messages alone. A content is a text, or for the assistant a list of
{"type": "text" | "python" | "python_output", "text": "..."}.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from nanochat.errors import UserError
from tasks.base import Conversation, Task

PARTS = ("text", "given", "python", "python_output")


def check_messages(messages: Any) -> str | None:
    """What is wrong with a list of messages; None if nothing is."""
    if not isinstance(messages, list) or not all(isinstance(m, dict) for m in messages):
        return "messages must be a list of objects with role and content"
    roles = [m.get("role") for m in messages]
    turns = roles[1:] if roles[:1] == ["system"] else roles
    if not turns or len(turns) % 2 or turns != ["user", "assistant"] * (len(turns) // 2):
        return f"user and assistant must alternate and the assistant have the last word; found {roles}"
    for number, message in enumerate(messages, start=1):
        content = message.get("content")
        if isinstance(content, str):
            continue
        if message["role"] != "assistant" or not isinstance(content, list) or not all(map(_is_part, content)):
            return f"message {number}: content must be text, or for the assistant a list of parts"
    return None


def _is_part(part: Any) -> bool:
    return isinstance(part, dict) and part.get("type") in PARTS and isinstance(part.get("text"), str)


def read_lines(path: Path) -> Iterator[tuple[int, Any]]:
    """(line number, JSON value) of each line that is not empty. UserError names the first bad one."""
    try:
        text = path.read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        bad = error.object[: error.start].count(b"\n") + 1
        raise UserError(f"{path} line {bad} is not UTF-8", "save the file as UTF-8") from error
    except OSError as error:
        raise UserError(
            f"{path} cannot be read: {error.strerror}", "give the path of a JSONL file"
        ) from error
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            try:
                yield number, json.loads(line)
            except (json.JSONDecodeError, RecursionError) as error:
                raise UserError(
                    f"{path} line {number}: not JSON ({error})", "write one JSON value a line"
                ) from error


def read_conversations(path: Path) -> list[Conversation]:
    """The conversations of a JSONL file; empty lines are skipped. UserError names the first bad line."""
    made = []
    for number, value in read_lines(path):
        found = value if isinstance(value, dict) else {"messages": value}
        if problem := check_messages(found.get("messages")):
            raise UserError(
                f"{path} line {number}: {problem}", "see the top of tasks/custom.py for the format"
            )
        made.append(found)
    if not made:
        raise UserError(f"{path} has no conversations", "write one JSON object a line")
    return made


class CustomJSON(Task):
    """The conversations of a JSONL file, read when the task is made; `fingerprint` changes with them."""

    name = "custom"

    def __init__(self, path: str | Path, **slice_: Any):
        super().__init__(**slice_)
        self._conversations = read_conversations(Path(path))
        self.fingerprint = hashlib.sha256(json.dumps(self._conversations).encode()).hexdigest()[:16]

    def num_examples(self) -> int:
        return len(self._conversations)

    def get_example(self, index: int) -> Conversation:
        return self._conversations[index]
