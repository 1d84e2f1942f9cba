"""The KV cache as every tier sees it: appending new keys and values in place, reading rows back, and the checks.

A cache is (B, T_max, K, E), or paged: (num_pages, page_size, K, E) with page_table (B, max_pages), where position p
of row b lies in page page_table[b, p // page_size] at offset p % page_size (PagedAttention, Kwon et al. 2023).
Memory that no row has written yet must be finite (allocate with zeros): a masked key has weight 0, and 0 * NaN
is NaN. Letters: B rows, T new positions, S cached positions, K key/value heads, E head size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Cache:
    """One layer's cache and where its rows stand. `host` repeats starts_B as plain numbers where that is free."""

    k: Tensor
    v: Tensor
    starts_B: Tensor  # int64, keys in each row before this call
    host: list[int] | None  # None on a GPU: reading it would stall the queue once per layer
    page_table: Tensor | None = None

    @property
    def capacity(self) -> int:
        return self.k.shape[1] * (1 if self.page_table is None else self.page_table.shape[1])

    def append(self, k_BTKE: Tensor, v_BTKE: Tensor) -> Cache:
        """Write k, v behind each row's keys; the Cache returned counts them. ValueError before anything is written."""
        num_new = k_BTKE.shape[1]
        if self.host is not None:
            check_room(self.host, num_new, self.capacity)
            self._check_pages(num_new)
        else:
            room = ((self.starts_B >= 0) & (self.starts_B + num_new <= self.capacity)).all()
            torch._assert_async(room, "a row of the KV cache is full (see flash_attention.check_room)")
        for store, new in ((self.k, k_BTKE), (self.v, v_BTKE)):
            if self.host and self.page_table is None and min(self.host) == max(self.host):
                store[:, self.host[0] : self.host[0] + num_new].copy_(new)
            else:
                store[self._where(num_new)] = new.to(store.dtype)
        host = None if self.host is None else [n + num_new for n in self.host]
        return Cache(self.k, self.v, self.starts_B + num_new, host, self.page_table)

    def _where(self, num_new: int) -> tuple[Tensor, Tensor]:
        position_BT = self.starts_B[:, None] + torch.arange(num_new, device=self.k.device)
        if self.page_table is None:
            return torch.arange(len(position_BT), device=self.k.device)[:, None], position_BT
        page_size = self.k.shape[1]
        return self.page_table.long().gather(1, position_BT // page_size), position_BT % page_size

    def _check_pages(self, num_new: int) -> None:
        if self.page_table is None or self.host is None:
            return
        for row, (pages, start) in enumerate(zip(self.page_table.tolist(), self.host)):
            used = pages[: -(-(start + num_new) // self.k.shape[1])]
            if any(not 0 <= page < len(self.k) for page in used):
                raise ValueError(f"page_table row {row} must name pages 0 to {len(self.k) - 1}, got {used}")

    def row(self, b: int) -> tuple[Tensor, Tensor]:
        """Keys and values of row b alone, (1, S_b, K, E): a view, or a copy where the row is paged."""
        assert self.host is not None
        length = self.host[b]
        if self.page_table is None:
            return self.k[b : b + 1, :length], self.v[b : b + 1, :length]
        pages = self.page_table[b, : -(-length // self.k.shape[1])].long()
        return tuple(store[pages].flatten(0, 1)[None, :length] for store in (self.k, self.v))  # type: ignore[return-value]

    def whole(self) -> tuple[Tensor, Tensor]:
        """Keys and values of all rows up to the capacity, (B, S, K, E); what lies past a row's length is noise."""
        if self.page_table is None:
            return self.k, self.v
        pages = self.page_table.long().clamp(0, len(self.k) - 1)  # unused entries may hold anything
        return self.k[pages].flatten(1, 2), self.v[pages].flatten(1, 2)


def check_room(lengths: Sequence[int], num_new: int, capacity: int) -> None:
    """ValueError naming the first row that cannot take num_new more keys.

    On a CPU every append calls it. On a GPU the lengths are not on the host, so the kernel itself stops with an
    assertion; a caller that counts on the host (the engine does) calls this once per step for the clear message.
    """
    for row, length in enumerate(lengths):
        if length < 0 or length + num_new > capacity:
            raise ValueError(
                f"row {row} of the KV cache holds {length} positions of {capacity}, {num_new} more do not fit: "
                "make the cache longer, or drop the row's oldest positions"
            )
