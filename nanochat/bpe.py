"""Byte-pair encoding in plain Python: a lesson, and the oracle that the Rust version is tested against.

1. Cut the text into pieces (words with their space, numbers, runs of punctuation) that merges never cross.
2. Begin with 256 tokens, one per byte. Count each pair of neighbours over all pieces.
3. The pair with the highest count becomes a token (of equal counts, the smaller pair of ids). Replace it
   everywhere, count again, and so on until the vocabulary is full.
4. To encode a piece, apply to its bytes the merge that was learned first, then the next, until none applies.

    >>> tokens = train(["aaab", "aab"], 258, "")
    >>> tokens[256:]
    [b'aa', b'ab']
    >>> encode("aaab", tokens, "")
    [256, 257]

It leaves out everything that makes it fast: training rescans all pieces for every merge.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from itertools import pairwise

Pair = tuple[int, int]


def split(text: str, pattern: str) -> list[str]:
    """The pieces of a text; the empty pattern keeps it whole. Text that matches nothing is in no piece."""
    import regex  # type: ignore[import-untyped]

    if not pattern:
        return [text] if text else []
    return [found.group() for found in regex.finditer(pattern, text) if found.group()]


def merge(ids: list[int], pair: Pair, new: int) -> list[int]:
    """`ids` with each occurrence of `pair`, from left to right, replaced by `new`."""
    out: list[int] = []
    i = 0
    while i < len(ids):
        if tuple(ids[i : i + 2]) == pair:
            out.append(new)
            i += 2
        else:
            out.append(ids[i])
            i += 1
    return out


def train(texts: Iterable[str], vocab_size: int, pattern: str) -> list[bytes]:
    """The bytes of each token, in the order of their ids: 256 bytes, then up to vocab_size - 256 merges."""
    pieces = Counter(piece for text in texts for piece in split(text, pattern))
    words = [(list(piece.encode()), count) for piece, count in pieces.items()]
    tokens = [bytes([byte]) for byte in range(256)]
    while len(tokens) < vocab_size:
        pairs: Counter[Pair] = Counter()
        for ids, count in words:
            for pair in pairwise(ids):
                pairs[pair] += count
        if not pairs:
            break
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        words = [(merge(ids, best, len(tokens)), count) for ids, count in words]
        tokens.append(tokens[best[0]] + tokens[best[1]])
    return tokens


def encode(text: str, tokens: list[bytes], pattern: str) -> list[int]:
    """The ids of a text: in each piece, the pair that makes the lowest id is merged first, leftmost first.

    A piece that is a token as a whole is that token, even if no merges lead to it.
    """
    id_of = {token: index for index, token in enumerate(tokens)}
    out: list[int] = []
    for piece in split(text, pattern):
        parts = [bytes([byte]) for byte in piece.encode()]
        if piece.encode() in id_of:
            parts = [piece.encode()]
        while True:
            made = [(id_of[a + b], i) for i, (a, b) in enumerate(pairwise(parts)) if a + b in id_of]
            if not made:
                break
            _, i = min(made)
            parts[i : i + 2] = [parts[i] + parts[i + 1]]
        out.extend(id_of[part] for part in parts)
    return out
