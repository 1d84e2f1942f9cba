"""Blocks: documents that follow each other, as one Arrow array, so that no step touches them one by one."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

BLOCK_DOCUMENTS, BLOCK_BYTES = 256, 1 << 22  # whichever comes first; one call of the tokenizer
VAL_PERCENT = 1  # of the documents, by a hash of the text, where no shard is named for validation

Cursor = dict[str, Any]


@dataclass(frozen=True)
class DocumentBlock:
    """Documents in order. `array` holds texts (Arrow string) or, with a `dtype`, tokens (Arrow binary).

    cursor(i) resumes right after document i.
    """

    array: Any
    cursor: Callable[[int], Cursor]
    dtype: np.dtype | None = None

    def __len__(self) -> int:
        return len(self.array)

    def tokens(self) -> tuple[np.ndarray, np.ndarray]:
        """(tokens of all documents, n + 1 offsets) of a block that holds tokens."""
        offsets, data = raw(self.array)
        kind = np.dtype(self.dtype)
        return data.view(kind), offsets // kind.itemsize


def in_blocks(documents: Iterable[tuple[str, Cursor]]) -> Iterator[DocumentBlock]:
    """Blocks of documents that come one by one."""
    texts: list[str] = []
    cursors: list[Cursor] = []
    size = 0
    for text, cursor in documents:
        texts.append(text)
        cursors.append(cursor)
        size += len(text)
        if len(texts) == BLOCK_DOCUMENTS or size >= BLOCK_BYTES:
            yield DocumentBlock(to_arrow(texts), cursors.__getitem__)
            texts, cursors, size = [], [], 0
    if texts:
        yield DocumentBlock(to_arrow(texts), cursors.__getitem__)


def to_arrow(texts: list[str]) -> Any:
    """An Arrow string array; lone surrogates, which UTF-8 cannot hold, become U+FFFD."""
    import pyarrow as pa

    try:
        return pa.array(texts, pa.string())
    except UnicodeEncodeError:
        return pa.array([well_formed(text) for text in texts], pa.string())


def well_formed(text: str) -> str:
    """`text` with pairs of surrogates joined and lone ones replaced."""
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")


def raw(array: Any) -> tuple[np.ndarray, np.ndarray]:
    """(n + 1 offsets as int64, the bytes between first and last) of an Arrow string or binary array."""
    import pyarrow as pa

    is_large = pa.types.is_large_string(array.type) or pa.types.is_large_binary(array.type)
    _, where, data = array.buffers()
    if len(array) == 0 or where is None:
        return np.zeros(1, np.int64), np.empty(0, np.uint8)
    kind = np.dtype(np.int64 if is_large else np.int32)
    offsets = np.frombuffer(where, kind, len(array) + 1, array.offset * kind.itemsize).astype(np.int64)
    if data is None:
        return offsets - offsets[0], np.empty(0, np.uint8)
    return offsets - offsets[0], np.frombuffer(data, np.uint8)[offsets[0] : offsets[-1]]


def written(array: Any) -> np.ndarray:
    """The numbers of the documents of an Arrow string array that are neither null, empty nor white space."""
    offsets, data = raw(array)
    lengths = np.diff(offsets)
    keep = lengths > 0
    if array.null_count:
        keep &= array.is_valid().to_numpy(zero_copy_only=False)
    first = np.zeros(len(array), np.uint8)
    first[keep] = data[offsets[:-1][keep]]
    # every white space begins with one of these bytes; only the few texts that do are looked at as text
    for index in np.flatnonzero(keep & ((first <= 0x20) | np.isin(first, (0xC2, 0xE1, 0xE2, 0xE3)))).tolist():
        keep[index] = not data[offsets[index] : offsets[index + 1]].tobytes().decode().isspace()
    return np.flatnonzero(keep)


def validation_mask(array: Any) -> np.ndarray:
    """is_validation of every document of an Arrow string array."""
    offsets, data = raw(array)
    view, ends = memoryview(data.data), offsets.tolist()
    return np.fromiter(
        (_is_validation(view[start:end]) for start, end in pairwise(ends)), dtype=bool, count=len(array)
    )


def is_validation(text: str) -> bool:
    """The rule where no validation shard is named: a hash of the text, the same everywhere and always."""
    return _is_validation(memoryview(text.encode("utf-8", "surrogatepass")))


def _is_validation(data: memoryview) -> bool:
    digest = hashlib.blake2b(data, digest_size=8).digest()
    return int.from_bytes(digest, "big") % 100 < VAL_PERCENT


def runs(sizes: np.ndarray, start: int) -> Iterator[tuple[int, int]]:
    """(first, end) of the blocks from `start` on: BLOCK_DOCUMENTS at most; BLOCK_BYTES end one too."""
    ends = np.cumsum(sizes)
    while start < len(sizes):
        before = ends[start] - sizes[start]
        full = int(np.searchsorted(ends, before + BLOCK_BYTES)) + 1
        end = min(full, start + BLOCK_DOCUMENTS, len(sizes))
        yield start, end
        start = end
