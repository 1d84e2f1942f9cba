"""Packing: documents cut and carried into full rows, conversations kept whole. NumPy only.

Two packers, both best fit (the largest piece that fits goes in first):

    CropPacker   an endless stream of documents -> rows without padding (pretraining)
    plan_whole   a known list of lengths -> rows of whole items, the rest of a row is padding (mid, SFT)

docs/data.md gives the rules with their measured waste. Nothing here reads text or knows a rank.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np

MIN_TAIL_TOKENS = 64  # a shorter rest of a cut document teaches less than the BOS and the break cost
POLICIES = ("split", "crop")
OLD_POLICIES = {"carry": "split", "peer": "crop"}  # as checkpoints of earlier versions say it


class CropPacker:
    """Rows of exactly `row_tokens` tokens; every piece in a row starts with BOS.

    split: a document longer than a row is split when it arrives; when no piece fits, the shortest one that
        leaves a tail of at least `min_tail` tokens is cut and its tail, behind a new BOS, goes back.
    crop: documents stay whole until the shortest is cut to fill a row; its tail is discarded.

    Exact at any time: tokens_in + bos_added == tokens_out + tokens_dropped + tokens_buffered.
    """

    def __init__(
        self,
        row_tokens: int,
        bos: int,
        *,
        policy: str = "split",
        buffer_pieces: int = 1000,
        min_tail: int | None = None,
    ) -> None:
        if policy not in POLICIES:
            raise ValueError(f"policy must be one of {POLICIES}, got {policy!r}")
        if row_tokens < 2 or buffer_pieces < 1:
            raise ValueError(
                f"needs row_tokens >= 2 and buffer_pieces >= 1, got {row_tokens}, {buffer_pieces}"
            )
        self.row_tokens, self.bos, self.policy, self.buffer_pieces = row_tokens, bos, policy, buffer_pieces
        # short rows (tests, smoke runs) would lose every tail under the rule made for rows of 512 and more
        self.min_tail = min(MIN_TAIL_TOKENS, row_tokens // 4) if min_tail is None else min_tail
        self.counts = dict.fromkeys(
            ("documents", "rows", "cuts", "tokens_in", "bos_added", "tokens_out", "tokens_dropped"), 0
        )
        # two parallel lists sorted by length, equal lengths in order of arrival; pieces are never written to
        self._lengths: list[int] = []
        self._pieces: list[np.ndarray] = []
        self._bos = np.array([bos], dtype=np.int32)

    @property
    def wants_more(self) -> bool:
        """Whether a document should be added before the next row (the buffer gives best fit its choice)."""
        return len(self._pieces) < self.buffer_pieces

    @property
    def tokens_buffered(self) -> int:
        return sum(self._lengths)

    def add(self, ids: Sequence[int] | np.ndarray) -> None:
        """Take one document, whose first token must be BOS."""
        tokens = np.array(ids, dtype=np.int32)  # a copy: a piece may stay long, what it was cut from must not
        if tokens.ndim != 1 or not tokens.size or tokens[0] != self.bos:
            raise ValueError(f"a document must start with BOS ({self.bos}), got {tokens[:4]}")
        self.counts["documents"] += 1
        self.counts["tokens_in"] += tokens.size
        if self.policy == "crop":
            self._insert(tokens)
            return
        self._insert(tokens[: self.row_tokens])
        step = self.row_tokens - 1
        for at in range(self.row_tokens, tokens.size, step):
            self._add_rest(tokens[at : at + step])

    def fill(self, row: np.ndarray) -> int:
        """Write the next row; return its number of tokens, fewer (BOS follow) when the buffer runs dry."""
        at, size = 0, self.row_tokens
        while at < size and self._pieces:
            room = size - at
            found = bisect_right(self._lengths, room)
            if found:
                piece = self._take(self._lengths[found - 1])
            else:
                piece, rest = np.split(self._take(self._to_cut(room)), [room])
                self.counts["cuts"] += 1
                if self.policy == "crop":
                    self.counts["tokens_dropped"] += rest.size
                else:
                    self._add_rest(rest)
            row[at : at + piece.size] = piece
            at += piece.size
        row[at:size] = self.bos
        self.counts["rows"] += 1
        self.counts["tokens_out"] += at
        return at

    def _to_cut(self, room: int) -> int:
        """The length of the piece to cut when none fits into `room`."""
        if self.policy == "crop":
            return self._lengths[0]
        index = bisect_left(self._lengths, room + self.min_tail)
        return self._lengths[min(index, len(self._lengths) - 1)]

    def _add_rest(self, rest: np.ndarray) -> None:
        if rest.size < self.min_tail:
            self.counts["tokens_dropped"] += rest.size
            return
        self.counts["bos_added"] += 1
        self._insert(np.concatenate((self._bos, rest)))

    def _insert(self, piece: np.ndarray) -> None:
        index = bisect_right(self._lengths, piece.size)
        self._lengths.insert(index, piece.size)
        self._pieces.insert(index, piece)

    def _take(self, length: int) -> np.ndarray:
        """The oldest piece of this length."""
        index = bisect_left(self._lengths, length)
        del self._lengths[index]
        return self._pieces.pop(index)

    def state(self) -> dict[str, Any]:
        """All that the next rows depend on, as JSON values and arrays; a later `fill` does not change it."""
        return self.snapshot()()

    def snapshot(self) -> Callable[[], dict[str, Any]]:
        """What makes the state of now, at any later time. Cheap: no piece is ever written to."""
        return partial(_state, self._rule(), dict(self.counts), self._lengths.copy(), self._pieces.copy())

    def load(self, state: dict[str, Any]) -> None:
        """Continue from `state`, bit for bit. Raises ValueError if it was made under another rule."""
        rule = dict(state["rule"])
        rule["policy"] = OLD_POLICIES.get(rule["policy"], rule["policy"])
        if rule != self._rule():
            raise ValueError(
                f"the packing buffer was filled under {rule}, this packer follows {self._rule()}"
            )
        self.counts = {name: int(value) for name, value in state["counts"].items()}
        self._lengths = [int(length) for length in state["lengths"]]
        tokens = np.asarray(state["tokens"], dtype=np.int32)
        self._pieces = np.split(tokens, np.cumsum(self._lengths)[:-1]) if self._lengths else []

    def _rule(self) -> dict[str, Any]:
        names = ("policy", "row_tokens", "bos", "buffer_pieces", "min_tail")
        return {name: getattr(self, name) for name in names}


def _state(
    rule: dict[str, Any], counts: dict[str, int], lengths: list[int], pieces: list[np.ndarray]
) -> dict[str, Any]:
    tokens = np.concatenate((np.empty(0, np.int32), *pieces))
    return {"rule": rule, "counts": dict(counts), "lengths": np.array(lengths, np.int64), "tokens": tokens}


def plan_whole(
    lengths: Sequence[int] | np.ndarray, row_tokens: int, *, seed: int | Sequence[int] = 0, window: int = 1024
) -> list[list[int]]:
    """Rows of item numbers whose lengths add up to at most `row_tokens`; every item in exactly one row.

    Items arrive shuffled by `seed` into a window from which the largest that fits is taken; rows are shuffled
    at the end, since the last ones of a best fit hold the small items.
    """
    sizes = np.asarray(lengths, dtype=np.int64)
    if sizes.size and not 1 <= sizes.min() <= sizes.max() <= row_tokens:
        raise ValueError(
            f"lengths must lie in 1..{row_tokens}, got {sizes.min()}..{sizes.max()}; cut or drop first"
        )
    rng = np.random.default_rng(seed)
    arrivals = iter(rng.permutation(sizes.size).tolist())
    keys: list[int] = []  # sorted lengths; `items` runs parallel
    items: list[int] = []
    rows: list[list[int]] = []
    for first in arrivals:
        for item in (first, *_take_up_to(arrivals, window - len(keys) - 1)):
            index = bisect_right(keys, int(sizes[item]))
            keys.insert(index, int(sizes[item]))
            items.insert(index, item)
        if len(keys) >= window:
            rows.append(_whole_row(keys, items, row_tokens))
    while keys:
        rows.append(_whole_row(keys, items, row_tokens))
    return [rows[index] for index in rng.permutation(len(rows)).tolist()]


def _take_up_to(iterator: Any, count: int) -> list[int]:
    return [item for _, item in zip(range(count), iterator)]


def _whole_row(keys: list[int], items: list[int], room: int) -> list[int]:
    row = []
    while found := bisect_right(keys, room):
        index = bisect_left(keys, keys[found - 1])
        room -= keys.pop(index)
        row.append(items.pop(index))
    return row


def cut_conversation(ids: Sequence[int], end: int, row_tokens: int) -> int:
    """How many leading tokens of a conversation to keep: all, up to the last `end` that fits, or 0 (drop).

    >>> cut_conversation([0, 5, 9, 6, 9, 7, 9], end=9, row_tokens=6)
    5
    """
    if len(ids) <= row_tokens:
        return len(ids)
    return next((at for at in range(row_tokens, 0, -1) if ids[at - 1] == end), 0)
