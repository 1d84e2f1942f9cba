"""FileSource: documents in chunks of files, in an order drawn anew every epoch, resumable after each.

An epoch is a sequence of shards, a shard of chunks (row groups, or about a megabyte of lines), a chunk of
documents; each is permuted by (seed, epoch). Local files are one shard, so that their chunks mix freely. On
the hub a shard is a file, whose order depends on no other file: it can be trained on while others arrive.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from nanochat.data.documents import VAL_PERCENT, Cursor, DocumentBlock, raw, runs, validation_mask, written
from nanochat.errors import UserError

DAMAGED = ("stop", "skip")

Turn = tuple[int, int, int]  # epoch, place of the shard in it, number of the shard


@dataclass(frozen=True)
class FilePart:
    """What is read at once: row group `start` of a parquet file, or `size` bytes from `start` of a text."""

    path: Path
    start: int
    size: int = 0


class DamagedPart(UserError):
    """A chunk cannot be read as it was written."""


class Shards(Protocol):
    """The training shards of a source."""

    num: int

    def iterate(self, turns: Iterator[Turn]) -> Iterator[tuple[Turn, list[FilePart]]]:
        """Each turn with the chunks of its shard, which are there to be read until the next turn is taken."""

    def repair(self, chunk: FilePart) -> bool:
        """Bring the file of a damaged chunk anew, if it can be had."""

    def close(self) -> None:
        """End all iterations."""


class LocalShards:
    """Files that are there: one shard."""

    num = 1

    def __init__(self, chunks: list[FilePart]) -> None:
        self.chunks = chunks

    def iterate(self, turns: Iterator[Turn]) -> Iterator[tuple[Turn, list[FilePart]]]:
        return ((turn, self.chunks) for turn in turns)

    def repair(self, chunk: FilePart) -> bool:
        return False

    def close(self) -> None:
        pass


class FileSource:
    """Documents of files. Without `val`, a hash of the text decides where a document belongs.

    damaged: "stop" raises at a chunk that cannot be read as written; "skip" says so and goes on behind it.
    tokenizer: the fingerprint of the tokenizer that made the tokens, where the files hold tokens, not text.
    """

    def __init__(
        self, name: str, train: Shards, read: Callable[[FilePart], Any], content: Any, seed: int, *,
        val: LocalShards | None = None, damaged: str = "stop", dtype: np.dtype | None = None,
        tokenizer: str | None = None,
    ) -> None:  # fmt: skip
        if damaged not in DAMAGED:
            raise UserError(f"--damaged must be one of {', '.join(DAMAGED)}, found {damaged!r}", "choose one")
        self.name, self.tokenizer = name, tokenizer
        self._train, self._val, self._read, self._seed = train, val, read, seed
        self._damaged, self._dtype, self._told = damaged, dtype, set[FilePart]()
        self._fingerprint = digest(content, seed)

    def fingerprint(self) -> str:
        return self._fingerprint

    def close(self) -> None:
        """End what is going on: blocks that wait for a shard raise."""
        self._train.close()

    def documents(self, split: str, cursor: Cursor | None = None) -> Iterator[tuple[str, Cursor]]:
        """(text, cursor) pairs: the blocks, one document at a time."""
        if self.tokenizer is not None:
            raise UserError(f"{self.name} holds tokens, not text", "give the source they were made from")
        blocks = self.blocks(split, cursor)
        return ((text, b.cursor(i)) for b in blocks for i, text in enumerate(b.array.to_pylist()))

    def blocks(self, split: str, cursor: Cursor | None = None) -> Iterator[DocumentBlock]:
        check_cursor(cursor, self, split)
        return self._after(split, *(cursor["at"] if cursor else (0, 0, 0)))

    def _after(
        self, split: str, epoch: int, place: int, number: int, turn: int = 0
    ) -> Iterator[DocumentBlock]:
        is_train = split == "train"
        shards = self._train if is_train or self._val is None else self._val
        found = place + number + turn  # a cursor inside an epoch has found some
        turns = self._turns(shards.num, is_train, epoch, turn)
        for (epoch, turn, shard), chunks in shards.iterate(turns):
            key = (self._seed, epoch) if shards.num == 1 else (self._seed, epoch, shard)
            order = permutation(len(chunks), *key, *(() if shards.num == 1 else (-1,)))
            for place in range(place, len(chunks)):  # noqa: B020
                index = int(order[place]) if is_train else place
                array, kept = self._load(chunks[index], split, shards)
                found += len(kept)
                inside = kept[permutation(len(kept), *key, index)] if is_train else kept
                at = partial(self._cursor, split, epoch, turn, place)
                for start, end in runs(np.diff(raw(array)[0])[inside], number):
                    yield DocumentBlock(small(array.take(inside[start:end])), partial(at, start), self._dtype)
                number = 0
            place = 0
            if turn == shards.num - 1 and not found:
                by_hash = f"validation ({VAL_PERCENT} % of them, by a hash of the text)"
                problem = f"{self.name} holds no document for {'training' if is_train else by_hash}"
                raise UserError(problem, "give more documents")

    def _cursor(self, split: str, epoch: int, turn: int, place: int, start: int, i: int) -> Cursor:
        at = [epoch, place, start + i + 1] + ([turn] if turn else [])
        return {"source": self._fingerprint, "split": split, "at": at}

    def _turns(self, num: int, is_train: bool, epoch: int, turn: int) -> Iterator[Turn]:
        for epoch in count(epoch) if is_train else (0,):  # noqa: B020
            order = permutation(num, self._seed, epoch, -1).tolist() if is_train else list(range(num))
            for turn in range(turn, num):  # noqa: B020
                yield epoch, turn, order[turn]
            turn = 0

    def num_documents(self, split: str) -> int:
        """Read everything, page checksums included, and count. UserError names what is damaged."""
        return sum(map(len, self.in_order(split)))

    def in_order(self, split: str) -> Iterator[Any]:
        """Every document of a split once, as the files have them: an Arrow array for each chunk."""
        shards = self._val if split == "val" and self._val is not None else self._train
        turns = ((0, shard, shard) for shard in range(shards.num))
        for _, chunks in shards.iterate(turns):
            for chunk in chunks:
                array, kept = self._load(chunk, split, shards)
                yield array if len(kept) == len(array) else array.take(kept)

    def _load(self, chunk: FilePart, split: str, shards: Shards) -> tuple[Any, np.ndarray]:
        """(all documents of a chunk, the numbers of those of the split)."""
        try:
            try:
                array = self._read(chunk)
            except DamagedPart as error:
                if not shards.repair(chunk):
                    raise
                print(f"{error.problem}; fetched anew", file=sys.stderr)
                array = self._read(chunk)
        except DamagedPart as error:
            if self._damaged == "stop":
                raise
            if chunk not in self._told:
                print(f"warning: skipped, {error.problem}", file=sys.stderr, flush=True)
                self._told.add(chunk)
            return empty_array(), np.empty(0, np.int64)
        if self._dtype is not None:
            return array, np.arange(len(array))
        kept = written(array)
        if self._val is None:
            kept = kept[validation_mask(array)[kept] == (split == "val")]
        return array, kept


def check_cursor(cursor: Cursor | None, source: Any, split: str) -> None:
    """ValueError for an unknown split, UserError for a cursor that another source or split has made."""
    if split not in ("train", "val"):
        raise ValueError(f'split must be "train" or "val", got {split!r}')
    if cursor is not None and (cursor["source"], cursor["split"]) != (source.fingerprint(), split):
        raise UserError(
            f"the saved position belongs to other data, or another seed, than {source.name} now",
            "resume with the data and seed the run was started with, or start a new run",
        )


def permutation(size: int, *key: int) -> np.ndarray:
    """The numbers below `size` in an order that `key` (each part from -1) decides."""
    return np.random.default_rng([part + 1 for part in key]).permutation(size)


def digest(*parts: Any) -> str:
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def empty_array() -> Any:
    import pyarrow as pa

    return pa.array([], pa.string())


def small(array: Any) -> Any:
    """The array with 32-bit offsets: a block is far below 2 GB."""
    import pyarrow as pa

    if pa.types.is_large_string(array.type):
        return array.cast(pa.string())
    return array.cast(pa.binary()) if pa.types.is_large_binary(array.type) else array
