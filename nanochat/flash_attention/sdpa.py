"""The tier that runs everywhere: torch's scaled_dot_product_attention on CPU, CUDA and MPS.

Full causal attention is one fused call without a mask. A window is cut into chunks of queries, each against the
keys that it can see, so that it costs O(T * (chunk + left)) in time and memory and no T x T mask exists.
Packed documents use the same chunks with a mask per row. What it leaves out: fp8, and skipping masked blocks
inside a chunk (flex does that).

Letters: B rows, T queries, S keys, H query heads, K key/value heads, E head size, C queries in a chunk.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from nanochat.flash_attention.cache import Cache
from nanochat.flash_attention.intervals import intervals, keep

CHUNK = 128  # benchmarks/bench_attention.py --chunks: flat from 128 to 256, slower outside


def why_not(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why this tier cannot run, or None: it runs wherever torch does."""
    return None


def attend(
    q_BTHE: Tensor,
    k_BSKE: Tensor,
    v_BSKE: Tensor,
    left: int | None,
    right: int | None,
    doc_start_BT: Tensor | None = None,
) -> Tensor:
    """softmax(q k^T / sqrt(E)) v over the visible keys, (B, T, H, E); queries aligned with the end of the keys."""
    num_queries, num_keys = q_BTHE.shape[1], k_BSKE.shape[1]
    left = num_keys if left is None else left
    right = num_keys if right is None else right
    past = num_keys - num_queries  # position of the first query
    if doc_start_BT is None and _whole(num_queries, num_keys, past, left, right):
        return _fused(q_BTHE, k_BSKE, v_BSKE, num_keys, past, left, right)
    is_training = torch.is_grad_enabled() and (
        q_BTHE.requires_grad or k_BSKE.requires_grad or v_BSKE.requires_grad
    )
    chunk = min(CHUNK, num_queries)
    # split and cat have cheap gradients; slices of k would each write a gradient as long as k itself
    blocks = (k_BSKE.split(chunk, 1), v_BSKE.split(chunk, 1)) if is_training else None
    outputs, masks = [], {}
    for start, q_chunk in zip(range(0, num_queries, chunk), q_BTHE.split(chunk, 1)):
        first, size = past + start, q_chunk.shape[1]  # the chunk's queries stand at first .. first + size - 1
        lo, hi = max(0, first - left), min(num_keys, first + size + right)
        if blocks:
            b_lo, b_hi = lo // chunk, -(-hi // chunk)
            lo, hi = b_lo * chunk, min(num_keys, b_hi * chunk)
            keys, values = (b[b_lo] if b_hi - b_lo == 1 else torch.cat(b[b_lo:b_hi], 1) for b in blocks)
        else:
            keys, values = k_BSKE[:, lo:hi], v_BSKE[:, lo:hi]
        if doc_start_BT is None and _whole(size, hi - lo, first - lo, left, right):
            outputs.append(_fused(q_chunk, keys, values, hi - lo, first - lo, left, right))
            continue
        shape = (size, hi - lo, first - lo)
        if shape not in masks:
            masks[shape] = _band(*shape, left, right, q_BTHE.device)  # all chunks in the middle share one
        mask = masks[shape]
        if doc_start_BT is not None:
            seen_from = doc_start_BT[:, start : start + size, None] - lo
            mask = mask & (torch.arange(hi - lo, device=q_BTHE.device) >= seen_from).unsqueeze(1)
        outputs.append(_call(q_chunk, keys, values, mask))
    return torch.cat(outputs, 1)


def attend_cache(q_BTHE: Tensor, cache: Cache, left: int | None, right: int | None) -> Tensor:
    """Attention of the newest T positions of each row over its cached keys (already appended)."""
    if cache.host is None:
        return attend_ragged(q_BTHE, *cache.whole(), cache.starts_B, left, right)
    lengths = cache.host
    if cache.page_table is None and min(lengths) == max(lengths):
        return attend(q_BTHE, cache.k[:, : lengths[0]], cache.v[:, : lengths[0]], left, right)
    # On a CPU row by row: no mask, no work on the padding, and each row's result is the one that it has alone.
    rows = [attend(q_BTHE[b : b + 1], *cache.row(b), left, right) for b in range(len(lengths))]
    return torch.cat(rows, 0)


def attend_ragged(
    q_BTHE: Tensor, k_BSKE: Tensor, v_BSKE: Tensor, lengths_B: Tensor, left: int | None, right: int | None
) -> Tensor:
    """Rows of different lengths in one call, with a mask per chunk of queries and nothing read back from the GPU.

    It looks at all S keys; a caller that knows a bound passes k_cache[:, :bound], a view that is written in place.
    """
    low_BT, high_BT = intervals(q_BTHE.shape[1], lengths_B, left, right)
    outputs = [
        _call(q_chunk, k_BSKE, v_BSKE, keep(low_chunk, high_chunk, 0, k_BSKE.shape[1]))
        for q_chunk, low_chunk, high_chunk in zip(
            q_BTHE.split(CHUNK, 1), low_BT.split(CHUNK, 1), high_BT.split(CHUNK, 1)
        )
    ]
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs, 1)


def _whole(num_queries: int, num_keys: int, past: int, left: int, right: int) -> bool:
    """Whether one call without a mask tensor does it: every key visible, or plain causal from the first key on."""
    sees_first = past + num_queries - 1 <= left
    sees_last = num_keys - 1 <= past + right
    return sees_first and (sees_last or (past == 0 and right == 0 and num_keys == num_queries))


def _fused(q: Tensor, k: Tensor, v: Tensor, num_keys: int, past: int, left: int, right: int) -> Tensor:
    return _call(q, k, v, None, is_causal=num_keys - 1 > past + right)


def _band(num_queries: int, num_keys: int, past: int, left: int, right: int, device: torch.device) -> Tensor:
    """(num_queries, num_keys), True where key s is at most `left` before and `right` after query past + t."""
    distance = (
        past + torch.arange(num_queries, device=device)[:, None] - torch.arange(num_keys, device=device)
    )
    return (distance <= left) & (distance >= -right)


def _call(
    q_BTHE: Tensor, k_BSKE: Tensor, v_BSKE: Tensor, mask: Tensor | None, is_causal: bool = False
) -> Tensor:
    """One SDPA call on transposed views; torch's fused kernels read the strides, so nothing is copied."""
    groups = q_BTHE.shape[2] // k_BSKE.shape[2]
    device, dtype = q_BTHE.device.type, q_BTHE.dtype
    # The CPU kernel and CUDA's flash kernel share k and v among query heads; the others need them repeated.
    is_native = device == "cpu" or (
        device == "cuda" and mask is None and dtype in (torch.bfloat16, torch.float16)
    )
    if groups > 1 and not is_native:
        k_BSKE, v_BSKE = (x.repeat_interleave(groups, 2) for x in (k_BSKE, v_BSKE))
    y_BHTE = F.scaled_dot_product_attention(
        q_BTHE.transpose(1, 2),
        k_BSKE.transpose(1, 2),
        v_BSKE.transpose(1, 2),
        attn_mask=mask,
        is_causal=is_causal,
        enable_gqa=groups > 1 and is_native,
    )
    return y_BHTE.transpose(1, 2)
