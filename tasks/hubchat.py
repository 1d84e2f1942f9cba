"""Any data set of the hub or a mirror with a column of messages: hf:OWNER/NAME[@REVISION][:CONFIG[:SPLIT]].

A message is {"role": "system" | "user" | "assistant", "content": "..."}, other fields are ignored. Files are
parquet or JSON lines, fetched and verified like all others. A row that is no conversation is left out and
counted; more than one in a hundred are an error.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from nanochat.errors import UserError
from nanochat.home import Home
from tasks.base import Conversation, Task
from tasks.custom import check_messages, read_lines
from tasks.hub_task import column_names, read_rows

COLUMN = "messages"
SUFFIXES = (".parquet", ".jsonl")  # the first that the data set has files of
MOST_BAD_FRAC = 0.01
AT_ONCE = 1000  # rows turned into Python values at a time


def files_of_split(names: Sequence[str], config: str, split: str) -> list[str]:
    """The files of a split among all of a data set: named after it, in a folder `config` if one is given.

    Raises ValueError, which lists what is there, if none match or if several configurations do.

    >>> files_of_split(["a/train-00000-of-00001.parquet", "a/test-00000-of-00001.parquet"], "", "train")
    ['a/train-00000-of-00001.parquet']
    """
    known = [name for suffix in SUFFIXES for name in names if name.endswith(suffix)]
    known = [name for name in known if name.endswith(known[0].rpartition(".")[2])]
    if not known:
        raise ValueError(f"no file ends with {' or '.join(SUFFIXES)}; found {_some(names)}")
    inside = [name for name in known if not config or config in name.split("/")[:-1]]
    word = re.escape(split)
    for rule in (rf"(^|/){word}([-./]|$)", rf"(^|[-._/]){word}([-._/]|$)"):  # train-00000, then my_train_v2
        found = [name for name in inside if re.search(rule, name)]
        if found:
            break
    else:
        found = inside if split == "train" and len(inside) == 1 else []
    if not found:
        raise ValueError(f"no file is of {config or 'any'}:{split}; found {_some(known)}")
    folders = sorted({_configuration(name, split) for name in found})
    if len(folders) > 1:
        raise ValueError(f"it has several configurations: {_some(folders)}; name one")
    return sorted(found)


def _configuration(name: str, split: str) -> str:
    folders = [part for part in name.split("/")[:-1] if part not in (split, "data")]
    return "/".join(folders)


def _some(names: Sequence[str], most: int = 8) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


class HubChat(Task):
    """The conversations of such an address, permuted by NumPy default_rng(42).

    For training only. `num_left_out` counts rows that are no conversations. UserError if the data set or the
    column is missing, or too many rows are no conversations.
    """

    def __init__(self, spec: str, home: Home | None = None, **slice_: Any):
        super().__init__(**slice_)
        match = re.fullmatch(r"hf:([^:]+?)(?::([^:]*))?(?::([^:]+))?", spec)
        if not match or "/" not in match[1]:
            raise UserError(
                f"a data set is named hf:OWNER/NAME[:CONFIG[:SPLIT]], found {spec!r}",
                "for example hf:HuggingFaceTB/smol-smoltalk::test",
            )
        self.name, self.home = spec, home or Home.find()
        self.repo, self.config, self.split = match[1], match[2] or "", match[3] or "train"

    @cached_property
    def _files(self) -> list[Path]:
        from nanochat.data.download.hub import fetch, list_shards, verify

        repo, entries = list_shards(f"{self.repo}:*", self.home)
        try:
            names = files_of_split([entry["name"] for entry in entries], self.config, self.split)
        except ValueError as error:
            raise UserError(f"{self.name}: {error}", "write hf:OWNER/NAME:CONFIG:SPLIT") from error
        verify(repo, names)
        fetch(repo, names)
        return [repo.directory / name for name in names]

    @cached_property
    def _rows(self) -> Any:
        for path in self._files:
            if path.suffix == ".parquet" and COLUMN not in (names := column_names(path)):
                raise self._no_column(path.name, names)
        if self._files[0].suffix == ".parquet":
            return read_rows(self._files, (COLUMN,), self.home.data_dir / "arrow")
        rows = [row for path in self._files for _, row in read_lines(path)]
        first = rows[0] if rows and isinstance(rows[0], dict) else {}
        if COLUMN not in first:
            raise self._no_column(self._files[0].name, list(first))
        return rows

    def _no_column(self, file: str, names: Sequence[str]) -> UserError:
        return UserError(
            f"{self.name}: {file} has no column {COLUMN!r}; it has {_some(names) or 'none'}",
            "choose another configuration, or write your own conversations (tasks/custom.py)",
        )

    @cached_property
    def _order(self) -> list[int]:
        """Numbers of the rows that are conversations, in random order."""
        import numpy as np

        good, bad = [], []
        for start in range(0, len(self._rows), AT_ONCE):
            part = self._rows[start : start + AT_ONCE]
            values = (
                part[COLUMN]
                if isinstance(part, dict)
                else [row.get(COLUMN) if isinstance(row, dict) else None for row in part]
            )
            for number, messages in enumerate(values, start):
                problem = check_messages(messages)
                if problem is None:
                    good.append(number)
                else:
                    bad.append((number, problem))
        self.num_left_out = len(bad)
        if not good or len(bad) > MOST_BAD_FRAC * len(self._rows):
            what = f"the first is row {bad[0][0]}: {bad[0][1]}" if bad else "it is empty"
            raise UserError(
                f"{self.name}: {len(bad)} of {len(self._rows)} rows are no conversations; {what}",
                "roles must be system (first), user and assistant, by turns, contents text",
            )
        return [good[i] for i in np.random.default_rng(42).permutation(len(good))]

    def num_examples(self) -> int:
        return len(self._order)

    def get_example(self, index: int) -> Conversation:
        messages = self._rows[self._order[index]][COLUMN]
        return {"messages": [{"role": m["role"], "content": m["content"]} for m in messages]}
