"""The only door to attention: one interface, many kernels; model code never asks which GPU it is on.

    from nanochat.flash_attention import flash_attn, HAS_FA3
    y_BTHE = flash_attn.flash_attn_func(q_BTHE, k_BTKE, v_BTKE, causal=True, window_size=(512, 0))

The kernel is the first of fa3, fa4, flex, sdpa, reference that runs here and agrees with the reference (select.py).
`_override_impl` names one by hand, and is read at every call. Importing this touches no GPU and no network.

Letters: B rows, T time, S cached time, H query heads, K key/value heads (K divides H), E head size.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from nanochat.flash_attention import select
from nanochat.flash_attention.cache import Cache, check_room

__all__ = ["HAS_FA3", "check_room", "explain", "flash_attn", "flash_attn_func", "flash_attn_with_kvcache"]

_override_impl: str | None = None  # "fa3" "fa4" "flex" "sdpa" "reference", or None: the best that works here

explain = select.explain


def flash_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    doc_start: Tensor | None = None,
) -> Tensor:
    """Attention of T queries over T keys: q (B, T, H, E), k and v (B, T, K, E) -> (B, T, H, E); differentiable.

    window_size (left, right): a query sees `left` keys before itself and `right` after it, -1 = no limit; causal
    means right = 0, so (N, 0) is the last N + 1 positions, self included.
    doc_start int32 (B, T): keys before the query's doc_start (at most its own position) are not seen.
    """
    _check(q, k, v)
    if q.shape[1] != k.shape[1]:
        raise ValueError(
            f"q and k must have the same length, got {q.shape[1]} and {k.shape[1]}: "
            "use flash_attn_with_kvcache for new queries over old keys"
        )
    if doc_start is not None and (doc_start.shape != q.shape[:2] or doc_start.is_floating_point()):
        raise ValueError(
            f"doc_start must be integers of shape {tuple(q.shape[:2])}, one first visible position a query, "
            f"got {doc_start.dtype} of shape {tuple(doc_start.shape)}"
        )
    left, right = _window(window_size, causal)
    return select.pick(_override_impl, q.device, q.dtype).attend(q, k, v, left, right, doc_start)


@torch.no_grad()
def flash_attn_with_kvcache(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor | None = None,
    v: Tensor | None = None,
    cache_seqlens: Tensor | int | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    page_table: Tensor | None = None,
) -> Tensor:
    """Append k, v (B, T, K, E) to each row of the cache, in place, then let q (B, T, H, E) see the cached keys.

    k_cache, v_cache (B, T_max, K, E), or with page_table int32 (B, max_pages): (num_pages, page_size, K, E).
    cache_seqlens int32 (B,) counts the keys of each row before this call; rows may differ; the caller advances it.
    Without k, v nothing is written and the queries are the newest positions of the row; then no cache_seqlens means
    a full cache. A query at position p sees positions <= p (causal) and > p - left - 1. No gradients.
    ValueError, before anything is written, when a row would pass T_max (on a GPU: see `check_room`).
    """
    _check(q, k_cache, v_cache)
    if (k is None) != (v is None):
        raise ValueError("k and v must be given together, or neither")
    if k is not None and v is not None:
        _check(q, k, v)
        if k.shape[:2] != q.shape[:2] or k.shape[2:] != k_cache.shape[2:]:
            raise ValueError(
                f"k must be (B, T, K, E) like q and the cache, got {tuple(k.shape)} for {tuple(q.shape)}"
            )
        if cache_seqlens is None:
            raise ValueError(
                "writing k and v needs cache_seqlens, the number of keys that each row holds already"
            )
    rows = len(q)
    if rows != len(k_cache if page_table is None else page_table):
        raise ValueError(
            f"q has {rows} rows, {'the cache' if page_table is None else 'page_table'} has another number"
        )
    cache = Cache(k_cache, v_cache, *_lengths(cache_seqlens, rows, k_cache, page_table), page_table)
    num_queries = q.shape[1]
    if k is not None and v is not None:
        cache = cache.append(k, v)
    elif cache.host is not None:
        check_room(cache.host, 0, cache.capacity)
        if min(cache.host) < num_queries:
            raise ValueError(f"{num_queries} queries need as many keys in each row, got {min(cache.host)}")
    left, right = _window(window_size, causal)
    return select.pick(_override_impl, q.device, q.dtype).attend_cache(q, cache, left, right)


flash_attn = SimpleNamespace(flash_attn_func=flash_attn_func, flash_attn_with_kvcache=flash_attn_with_kvcache)


def __getattr__(name: str) -> Any:
    if name != "HAS_FA3":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()["HAS_FA3"] = select.has_fa3()  # looked up once; Python finds it here from now on
    return globals()["HAS_FA3"]


def _lengths(
    lengths: Tensor | int | None, rows: int, k_cache: Tensor, page_table: Tensor | None
) -> tuple[Tensor, list[int] | None]:
    """(starts_B int64 on the cache's device, the same as a list where the host knows it without waiting)."""
    if lengths is None:
        lengths = k_cache.shape[1] * (1 if page_table is None else page_table.shape[1])
    if isinstance(lengths, int):
        return torch.full((rows,), lengths, device=k_cache.device), [lengths] * rows
    if lengths.shape != (rows,) or lengths.is_floating_point():
        raise ValueError(
            f"cache_seqlens must be {rows} integers, got {lengths.dtype} of shape {tuple(lengths.shape)}"
        )
    host = lengths.tolist() if lengths.device.type == "cpu" else None
    return lengths.to(k_cache.device, torch.int64), host


def _window(window_size: tuple[int, int], causal: bool) -> tuple[int | None, int | None]:
    left, right = window_size
    if left < -1 or right < -1:
        raise ValueError(f"window_size must hold -1 (no limit) or a number of positions, got {window_size}")
    return (None if left == -1 else left), (0 if causal else None if right == -1 else right)


def _check(q: Tensor, k: Tensor, v: Tensor) -> None:
    if q.dim() != 4 or k.dim() != 4 or k.shape != v.shape or q.shape[3] != k.shape[3]:
        raise ValueError(
            "q must be (B, T, H, E), k and v (B, S, K, E), "
            f"got {tuple(q.shape)}, {tuple(k.shape)}, {tuple(v.shape)}"
        )
    if k.shape[2] == 0 or q.shape[2] % k.shape[2]:
        raise ValueError(f"key/value heads must divide the query heads, got {k.shape[2]} and {q.shape[2]}")
    if not (q.dtype == k.dtype == v.dtype and q.device == k.device == v.device):
        raise ValueError(
            "q, k and v must share dtype and device, "
            f"got {q.dtype} {k.dtype} {v.dtype} on {q.device}, {k.device}, {v.device}"
        )
