"""Random numbers that are the same on every platform and Python version.

Integer arithmetic modulo 2**64 only: `mix` turns a few integers into a seed (SplitMix64),
`Rng` is a 64-bit linear congruential generator read from its upper half (Knuth's MMIX constants).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

from nanochat.splitmix import MASK64, splitmix64

T = TypeVar("T")


def mix(*values: int) -> int:
    """One well-mixed 64-bit integer from several integers."""
    h = 0x243F6A8885A308D3
    for value in values:
        h = splitmix64(h ^ (value & MASK64))
    return h


def mix_text(text: str) -> int:
    """The same for a string, over its UTF-8 bytes."""
    return mix(*text.encode())


class Rng:
    """A stream of draws fixed by the integers it is made from."""

    __slots__ = ("state",)

    def __init__(self, *values: int):
        self.state = mix(*values)

    def below(self, n: int) -> int:
        """A uniform integer in [0, n), for n up to 2**32."""
        self.state = state = (self.state * 6364136223846793005 + 1442695040888963407) & MASK64
        return ((state >> 32) * n) >> 32

    def between(self, low: int, high: int) -> int:
        """A uniform integer in [low, high], both included."""
        return low + self.below(high - low + 1)

    def chance(self, percent: int) -> bool:
        return self.below(100) < percent

    def pick(self, items: Sequence[T]) -> T:
        return items[self.below(len(items))]

    def sample(self, items: Sequence[T], count: int) -> list[T]:
        """`count` items from different places of `items`, in random order; all of them if there are fewer."""
        pool = list(items)
        count = min(count, len(pool))
        for i in range(count):
            j = i + self.below(len(pool) - i)
            pool[i], pool[j] = pool[j], pool[i]
        return pool[:count]

    def weighted(self, weights: dict[str, int]) -> str:
        """A key, drawn in proportion to its weight."""
        left = self.below(sum(weights.values()))
        for key, weight in weights.items():
            left -= weight
            if left < 0:
                return key
        raise AssertionError("the weights must be positive")
