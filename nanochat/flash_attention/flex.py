"""The backend for any CUDA GPU with Triton: torch's FlexAttention, compiled, which skips blocks outside a
window.

Windows and packed documents are block masks: of a row of 2,048 queries with a window of 512 it computes
about a third of
the blocks and masks only those on the border. Full causal attention without documents is sdpa's fused call
already, and decoding is left to sdpa: both would only add a compilation.

Letters: B rows, T queries, S keys, H query heads, K key/value heads, E head size.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from nanochat.flash_attention import sdpa
from nanochat.flash_attention.intervals import Docs, Limit

MASKS = 8  # block masks of documents kept: every layer of a step asks for the same one or two
attend_cache = sdpa.attend_cache


def unsupported_reason(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why this backend cannot run, or None."""
    if dtype == torch.float64:
        return "FlexAttention has no fp64"
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < (7, 0):
        return "Triton needs sm_70"
    try:
        import triton  # noqa: F401
    except ImportError:
        return "Triton is not installed"
    return None


def attend(
    q_BTHE: Tensor, k_BSKE: Tensor, v_BSKE: Tensor, left: Limit, right: Limit, doc_start_BT: Docs = None
) -> Tensor:
    """softmax(q k^T / sqrt(E)) v over the visible keys, (B, T, H, E); queries aligned with the last keys."""
    num_queries, num_keys = q_BTHE.shape[1], k_BSKE.shape[1]
    wide = left is None or left >= num_keys - 1
    if (wide and doc_start_BT is None) or num_queries < 2:
        return sdpa.attend(q_BTHE, k_BSKE, v_BSKE, left, right, doc_start_BT)
    if doc_start_BT is None:
        mask = band(num_queries, num_keys, left, right, q_BTHE.device)
    else:
        mask = documents(doc_start_BT, num_keys, left, right)
    q, k, v = (x.transpose(1, 2) for x in (q_BTHE, k_BSKE, v_BSKE))
    y = compiled()(q, k, v, block_mask=mask, enable_gqa=q.shape[1] != k.shape[1])
    return y.transpose(1, 2)


@functools.cache
def compiled() -> Callable[..., Any]:
    """FlexAttention as one fused kernel; without compilation it would build the whole T x S matrix."""
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False)


def visible(past: int, left: Limit, right: Limit, doc_start_BT: Docs) -> Callable[..., Tensor]:
    """The mask as FlexAttention asks for it: (row, head, query, key) -> may attend; query 0 stands at
    `past`."""

    def may_attend(b: Tensor, h: Tensor, t: Tensor, s: Tensor) -> Tensor:
        seen = t >= 0
        if left is not None:
            seen = seen & (s >= t + past - left)
        if right is not None:
            seen = seen & (s <= t + past + right)
        return seen if doc_start_BT is None else seen & (s >= doc_start_BT[b, t])

    return may_attend


@functools.lru_cache(64)
def band(num_queries: int, num_keys: int, left: Limit, right: Limit, device: torch.device) -> Any:
    """The block mask of a window, the same for all rows and heads."""
    return _block_mask(num_queries, num_keys, left, right, device, None)


_documents: dict[tuple[Any, ...], tuple[Tensor, Any]] = {}


def documents(doc_start_BT: Tensor, num_keys: int, left: Limit, right: Limit) -> Any:
    """The block mask of packed documents; made once a batch, since every layer passes the same tensor."""
    key = doc_start_BT.data_ptr(), doc_start_BT._version, tuple(doc_start_BT.shape), num_keys, left, right
    if key not in _documents:
        while len(_documents) >= MASKS:
            del _documents[next(iter(_documents))]
        mask = _block_mask(doc_start_BT.shape[1], num_keys, left, right, doc_start_BT.device, doc_start_BT)
        _documents[key] = doc_start_BT, mask  # the tensor is held, so that its address stays its own
    return _documents[key][1]


def _block_mask(
    num_queries: int, num_keys: int, left: Limit, right: Limit, device: torch.device, doc_start_BT: Docs
) -> Any:
    from torch.nn.attention.flex_attention import create_block_mask

    rows = None if doc_start_BT is None else len(doc_start_BT)
    rule = visible(num_keys - num_queries, left, right, doc_start_BT)
    return create_block_mask(rule, rows, None, num_queries, num_keys, device=device)
