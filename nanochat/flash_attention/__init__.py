"""The only door to attention: one interface, many kernels; model code never asks which GPU it is on.

    from nanochat.flash_attention import flash_attn, HAS_FA3
    y_BTHE = flash_attn.flash_attn_func(q_BTHE, k_BTKE, v_BTKE, causal=True, window_size=(512, 0))

The kernel is the first of fa3, fa4, flex, sdpa, reference that runs here and agrees with the reference.
`_override_impl` names one by hand and is read at every call. Importing this touches no GPU and no network.

Letters: B rows, T time, S cached time, H query heads, K key/value heads (K divides H), E head size.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from nanochat.flash_attention.cache import Cache, check_room
from nanochat.flash_attention.intervals import Limit
from nanochat.flash_attention.select import explain, has_fa3, pick

__all__ = ["HAS_FA3", "check_room", "explain", "flash_attn"]

_override_impl: str | None = None  # "fa3" "fa4" "flex" "sdpa" "reference", or None: the best that works here


def flash_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    doc_start: Tensor | None = None,
) -> Tensor:
    """Attention of T queries to T keys: q (B, T, H, E), k and v (B, T, K, E) -> (B, T, H, E); differentiable.

    window_size (left, right): a query sees so many positions before and after itself, -1 = no limit; causal
    makes right 0, so (N, 0) is the last N + 1 positions, self included.
    doc_start int32 (B, T): keys before the query's doc_start (at most its own position) are not seen.
    """
    _check(q, k, v)
    if q.shape[1] != k.shape[1]:
        raise ValueError(
            f"q and k must be equally long, got {q.shape[1]} and {k.shape[1]}: "
            "flash_attn_with_kvcache is for new queries over old keys"
        )
    if doc_start is not None and (doc_start.shape != q.shape[:2] or doc_start.is_floating_point()):
        raise ValueError(
            "doc_start must hold an integer for each query, shape "
            f"{tuple(q.shape[:2])}, got {doc_start.dtype} of shape {tuple(doc_start.shape)}"
        )
    return pick(_override_impl, q.device, q.dtype).attend(q, k, v, *_limits(window_size, causal), doc_start)


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
    """Append k, v (B, T, K, E) to each row of the cache, in place; then q (B, T, H, E) attends to its row.

    k_cache, v_cache (B, T_max, K, E), or with page_table int32 (B, max_pages): (num_pages, page_size, K, E).
    cache_seqlens int32 (B,): keys in each row before this call; rows may differ; the caller advances it.
    Without k, v nothing is written and the queries are the newest keys' (no cache_seqlens: of a full cache).
    A query at position p sees positions <= p (causal) and > p - left - 1. No gradients.
    ValueError before anything is written if a row would pass T_max (on a GPU: see check_room).
    """
    _check(q, k_cache, v_cache)
    rows, pages = len(q), 1 if page_table is None else page_table.shape[1]
    if rows != len(k_cache if page_table is None else page_table):
        raise ValueError(
            f"q and {'the cache' if page_table is None else 'page_table'} must have as many rows"
        )
    if cache_seqlens is None:
        if k is not None:
            raise ValueError("writing k and v needs cache_seqlens, the number of keys in each row so far")
        cache_seqlens = k_cache.shape[1] * pages
    if isinstance(cache_seqlens, int):
        cache_seqlens = torch.full((rows,), cache_seqlens)
    if cache_seqlens.shape != (rows,) or cache_seqlens.is_floating_point():
        raise ValueError(f"cache_seqlens must be {rows} integers, got {cache_seqlens}")
    host = cache_seqlens.tolist() if cache_seqlens.device.type == "cpu" else None
    cache = Cache(k_cache, v_cache, cache_seqlens.to(q.device, torch.int64), host, page_table)
    if k is not None and v is not None:
        _check(q, k, v)
        if k.shape[:3] != (*q.shape[:2], k_cache.shape[2]):
            raise ValueError(f"k and v must be as long as q, got {tuple(k.shape)} and {tuple(q.shape)}")
        cache = cache.append(k, v)
    elif k is not None or v is not None:
        raise ValueError("k and v must be given together, or neither")
    elif host is not None:
        check_room([n - q.shape[1] for n in host], q.shape[1], cache.capacity)
    return pick(_override_impl, q.device, q.dtype).attend_cache(q, cache, *_limits(window_size, causal))


flash_attn = SimpleNamespace(flash_attn_func=flash_attn_func, flash_attn_with_kvcache=flash_attn_with_kvcache)


def __getattr__(name: str) -> Any:
    if name != "HAS_FA3":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return globals().setdefault("HAS_FA3", has_fa3())  # from now on Python finds it without this function


def _limits(window_size: tuple[int, int], causal: bool) -> tuple[Limit, Limit]:
    if min(window_size) < -1:
        raise ValueError(f"window_size must hold -1 (no limit) or a number of positions, got {window_size}")
    left, right = (None if limit == -1 else limit for limit in window_size)
    return left, 0 if causal else right


def _check(q: Tensor, k: Tensor, v: Tensor) -> None:
    shapes = f"{tuple(q.shape)}, {tuple(k.shape)}, {tuple(v.shape)}"
    if q.dim() != 4 or k.dim() != 4 or k.shape != v.shape or q.shape[3] != k.shape[3]:
        raise ValueError(f"q must be (B, T, H, E), k and v (B, S, K, E), got {shapes}")
    if q.shape[1] == 0 or k.shape[2] == 0 or q.shape[2] % k.shape[2]:
        raise ValueError(f"T must be at least 1 and the key/value heads divide the query heads, got {shapes}")
    if not (q.dtype == k.dtype == v.dtype and q.device == k.device == v.device):
        raise ValueError(
            f"q, k, v must share dtype and device, got {[(x.dtype, x.device) for x in (q, k, v)]}"
        )
