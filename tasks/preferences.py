"""Preference pairs from a JSONL file, one a line, for DPO.

{"messages": [{"role": "user", "content": "..."}], "chosen": "...", "rejected": "..."}, or "prompt": "..." in
the place of messages. An answer is a text or a list of parts, as in tasks/custom.py.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from nanochat.errors import UserError
from tasks.custom import check_messages, read_lines


def check_pair(value: Any) -> str | None:
    """What is wrong with a record; None if nothing is."""
    if not isinstance(value, dict) or not {"chosen", "rejected"} <= value.keys():
        return "a pair must be an object with chosen, rejected, and messages or prompt"
    if not isinstance(value.get("messages"), list):
        return "messages must be a list that ends with the user's, or prompt a text"
    for name in ("chosen", "rejected"):
        problem = check_messages([*value["messages"], {"role": "assistant", "content": value[name]}])
        if problem:
            return f"{name}: {problem}"
    return "chosen and rejected are the same" if value["chosen"] == value["rejected"] else None


def read_pairs(path: Path) -> list[dict[str, Any]]:
    """The pairs of a file; empty lines are skipped. UserError names the first bad line."""
    made = []
    for number, value in read_lines(path):
        if isinstance(value, dict) and isinstance(value.get("prompt"), str):
            value["messages"] = [{"role": "user", "content": value["prompt"]}]
        if problem := check_pair(value):
            raise UserError(
                f"{path} line {number}: {problem}", "see the top of tasks/preferences.py for the format"
            )
        made.append({key: value[key] for key in ("messages", "chosen", "rejected")})
    if not made:
        raise UserError(f"{path} has no pairs", "write one JSON object a line")
    return made
