"""Tokenizers beside one another: their speed, a table and a plot."""

from __future__ import annotations

import time
from collections.abc import Callable

from nanochat.tokenizer import RustBPETokenizer

ENGINES = ("rustbpe", "tiktoken")
SPEED_BYTES = 1_000_000
MISSING = "not available"


def num_bytes(texts: list[str]) -> int:
    return sum(len(text.encode("utf-8", "replace")) for text in texts)


def speed(tok: RustBPETokenizer, texts: list[str], engine: str) -> float:
    """MB/s of one thread, the best of three; a short text is repeated up to SPEED_BYTES."""
    import pyarrow as pa
    import tiktoken

    texts = _at_most([text.encode("utf-8", "replace").decode() for text in texts], SPEED_BYTES)
    texts *= max(SPEED_BYTES // (num_bytes(texts) + 1), 1)
    if engine == "rustbpe":
        array = pa.array(texts, pa.large_string())
        work: Callable[[], object] = lambda: tok.encode_arrow(array, num_threads=1)  # noqa: E731
    else:
        ranks = dict(tok.get_mergeable_ranks())
        other = tiktoken.Encoding("", pat_str=tok.get_pattern(), mergeable_ranks=ranks, special_tokens={})
        work = lambda: [other.encode_ordinary(text) for text in texts]  # noqa: E731
    best = float("inf")
    for _ in range(3):
        start = time.perf_counter()
        work()
        best = min(best, time.perf_counter() - start)
    return num_bytes(texts) / 1e6 / best


def _at_most(texts: list[str], chars: int) -> list[str]:
    kept = []
    for text in texts:
        kept.append(text[:chars])
        chars -= len(kept[-1])
    return [text for text in kept if text]


def table(title: str, values: dict[str, dict[str, float]], sizes: dict[str, int]) -> str:
    """A line a text, a column a tokenizer."""
    widths = {name: max(len(name), len(MISSING)) + 2 for name in values}
    lines = [f"{title:16}{'bytes':>10}" + "".join(f"{name:>{width}}" for name, width in widths.items())]
    for what, size in sizes.items():
        cells = {name: of.get(what) for name, of in values.items()}
        shown = {name: MISSING if cell is None else f"{cell:.3g}" for name, cell in cells.items()}
        lines.append(f"{what:16}{size:>10,}" + "".join(f"{shown[name]:>{widths[name]}}" for name in shown))
    return "\n".join(lines)
