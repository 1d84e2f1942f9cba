"""The KV cache as every backend sees it: append new keys and values in place, read rows back, check the room.

A cache is (B, T_max, K, E), or paged: (num_pages, page_size, K, E) with page_table (B, max_pages): position p
of row b lies in page page_table[b, p // page_size] at p % page_size (PagedAttention, Kwon et al. 2023).
Memory must start finite (allocate with zeros): an unseen key has weight 0, but 0 * NaN is NaN.

Letters: B rows, T new positions, S cached positions, K key/value heads, E head size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class Cache:
    """One layer's cache and how many keys its rows hold: starts_B, and `host`, the same as plain numbers.

    host is None where reading it would make the host wait for the GPU once per layer.
    """

    k: Tensor
    v: Tensor
    starts_B: Tensor  # int64
    host: list[int] | None
    page_table: Tensor | None = None

    @property
    def capacity(self) -> int:
        return self.k.shape[1] * (1 if self.page_table is None else self.page_table.shape[1])

    def append(self, k_BTKE: Tensor, v_BTKE: Tensor) -> Cache:
        """Write k, v behind each row's keys; the result counts them. ValueError before any write."""
        num_new, host = k_BTKE.shape[1], self.host
        if host is None:
            has_room = ((self.starts_B >= 0) & (self.starts_B + num_new <= self.capacity)).all()
            torch._assert_async(has_room, "a row of the KV cache is full (see flash_attention.check_room)")
        else:
            check_room(host, num_new, self.capacity)
            self._check_pages([length + num_new for length in host])
        if host is not None and self.page_table is None and min(host) == max(host):
            self.k[:, host[0] : host[0] + num_new] = k_BTKE
            self.v[:, host[0] : host[0] + num_new] = v_BTKE
        else:
            where = self._where(num_new)
            self.k[where], self.v[where] = k_BTKE, v_BTKE
        return replace(self, starts_B=self.starts_B + num_new, host=host and [n + num_new for n in host])

    def row(self, b: int, length: int) -> tuple[Tensor, Tensor]:
        """The first `length` keys and values of row b, (1, length, K, E): views, or copies if paged."""
        if self.page_table is None:
            return self.k[b : b + 1, :length], self.v[b : b + 1, :length]
        pages = self.page_table[b, : -(-length // self.k.shape[1])].long()
        return self.k[pages].flatten(0, 1)[None, :length], self.v[pages].flatten(0, 1)[None, :length]

    def whole(self) -> tuple[Tensor, Tensor]:
        """Keys and values of all rows, (B, capacity, K, E); what lies past a row's length is noise."""
        if self.page_table is None:
            return self.k, self.v
        pages = self.page_table.long().clamp(0, len(self.k) - 1)  # unused entries may hold anything
        return self.k[pages].flatten(1, 2), self.v[pages].flatten(1, 2)

    def _where(self, num_new: int) -> tuple[Tensor, Tensor]:
        position_BT = self.starts_B[:, None] + torch.arange(num_new, device=self.k.device)
        if self.page_table is None:
            return torch.arange(len(position_BT), device=self.k.device)[:, None], position_BT
        page_size = self.k.shape[1]
        return self.page_table.long().gather(1, position_BT // page_size), position_BT % page_size

    def _check_pages(self, lengths: Sequence[int]) -> None:
        table = [] if self.page_table is None else self.page_table.tolist()
        for row, pages in enumerate(table):
            used = pages[: -(-lengths[row] // self.k.shape[1])]
            if any(not 0 <= page < len(self.k) for page in used):
                raise ValueError(f"page_table row {row} must name pages 0 to {len(self.k) - 1}, got {used}")


def check_room(lengths: Sequence[int], num_new: int, capacity: int) -> None:
    """ValueError naming the first row that cannot take num_new more positions.

    On a CPU every append calls it. On a GPU the lengths are not on the host: there a caller who counts along
    calls it once per step for this message, and an assertion inside the GPU stops whoever does not.
    """
    for row, length in enumerate(lengths):
        if length < 0 or length + num_new > capacity:
            raise ValueError(
                f"row {row} of the cache holds {length} of {capacity} positions, {num_new} more do not fit: "
                "make the cache longer or drop the row's oldest positions"
            )
