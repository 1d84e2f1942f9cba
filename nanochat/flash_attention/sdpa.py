"""The backend that runs everywhere: torch's scaled_dot_product_attention on CPU, CUDA and MPS.

Full causal attention is one fused call without a mask. A window is cut into chunks of queries, each against
the keys that it can see, so that it costs O(T * (chunk + left)) in time and memory and no T x T mask exists.
Packed documents are separate calls on a CPU, chunks with a mask per row elsewhere. It leaves out skipping the
masked part of a chunk: flex does that. Training on a CPU goes through dense.py where a C compiler exists.

Letters: B rows, T queries, S keys, H query heads, K key/value heads, E head size.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from nanochat.flash_attention import dense
from nanochat.flash_attention.cache import Cache
from nanochat.flash_attention.intervals import Docs, Limit, intervals, keep

CHUNK = 192  # queries; torch's CPU kernel takes 64 at a time from 192 on, fewer below (bench: --only=chunks)
MIN_DOCUMENT = 8  # mean tokens from which a call per document is cheaper than masks (CPU, measured)


def unsupported_reason(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why this backend cannot run, or None: it runs wherever torch does."""
    return None


def attend(
    q_BTHE: Tensor, k_BSKE: Tensor, v_BSKE: Tensor, left: Limit, right: Limit, doc_start_BT: Docs = None
) -> Tensor:
    """softmax(q k^T / sqrt(E)) v over the visible keys, (B, T, H, E); queries aligned with the last keys."""
    num_queries, num_keys = q_BTHE.shape[1], k_BSKE.shape[1]
    left = num_keys if left is None else left
    right = num_keys if right is None else right
    if dense.suits(q_BTHE, k_BSKE, v_BSKE):
        return dense.attend(q_BTHE, k_BSKE, v_BSKE, left, right, doc_start_BT)
    if doc_start_BT is None:
        unseen = max(0, num_keys - num_queries - left)  # old keys, out of every query's window
        if unseen:
            k_BSKE, v_BSKE, num_keys = k_BSKE[:, unseen:], v_BSKE[:, unseen:], num_keys - unseen
        is_causal = _causal_flag(num_queries, num_keys, num_keys - num_queries, left, right)
        if is_causal is not None:
            return _call(q_BTHE, k_BSKE, v_BSKE, is_causal)
    elif right == 0 and q_BTHE.device.type == "cpu" and not torch.compiler.is_compiling():
        lengths = _document_lengths(doc_start_BT)
        if lengths is not None:
            parts = zip(*(x.flatten(0, 1).split(lengths) for x in (q_BTHE, k_BSKE, v_BSKE)))
            outputs = [attend(q[None], k[None], v[None], left, right)[0] for q, k, v in parts]
            return torch.cat(outputs).view_as(q_BTHE)
    return Chunked.apply(q_BTHE, k_BSKE, v_BSKE, left, right, doc_start_BT)


def attend_cache(q_BTHE: Tensor, cache: Cache, left: Limit, right: Limit) -> Tensor:
    """Attention of the newest T positions of each row over its cached keys (already appended)."""
    if cache.host is None:
        return attend_ragged(q_BTHE, *cache.whole(), cache.starts_B, left, right)
    if cache.page_table is None and min(cache.host) == max(cache.host):
        return attend(q_BTHE, cache.k[:, : cache.host[0]], cache.v[:, : cache.host[0]], left, right)
    # Row by row: no mask, no work on padding, and a row's result is bit for bit the one that it has alone.
    rows = [attend(q_BTHE[b : b + 1], *cache.row(b, n), left, right) for b, n in enumerate(cache.host)]
    return torch.cat(rows)


def attend_ragged(
    q_BTHE: Tensor, k_BSKE: Tensor, v_BSKE: Tensor, lengths_B: Tensor, left: Limit, right: Limit
) -> Tensor:
    """Rows of different lengths in one call per chunk of queries, with nothing read back from the GPU.

    It looks at all S keys: a caller that knows a bound passes k_cache[:, :bound], a view, written in place.
    """
    low_BT, high_BT = intervals(q_BTHE.shape[1], lengths_B, left, right)
    chunks = zip(q_BTHE.split(CHUNK, 1), low_BT.split(CHUNK, 1), high_BT.split(CHUNK, 1))
    return torch.cat([_call(q, k_BSKE, v_BSKE, keep(lo, hi, 0, k_BSKE.shape[1])) for q, lo, hi in chunks], 1)


class Chunked(torch.autograd.Function):
    """Chunks of queries, each over a slice of the keys. Keeps q, k, v and y; dk and dv are added up in place.

    Autograd by itself would keep a copy of the keys for each chunk, or write gradients as long as all of k.
    """

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, left: int, right: int, doc_start_BT: Docs
    ) -> Tensor:
        y, logsums = torch.empty_like(q), []
        for queries, keys, mask in _chunks(q, k, left, right, doc_start_BT):
            y[:, queries], logsum = _forward(q[:, queries], k[:, keys], v[:, keys], mask)
            logsums.append(logsum)
        ctx.save_for_backward(q, k, v, y, doc_start_BT, *logsums)
        ctx.limits = left, right
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, y, doc_start_BT, *logsums = ctx.saved_tensors
        left, right = ctx.limits
        dq, dk, dv = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
        for (queries, keys, mask), logsum in zip(_chunks(q, k, left, right, doc_start_BT), logsums):
            chunk = dy[:, queries], q[:, queries], k[:, keys], v[:, keys], y[:, queries]
            dq[:, queries], dk_chunk, dv_chunk = _backward(*chunk, logsum, mask)
            dk[:, keys] += dk_chunk
            dv[:, keys] += dv_chunk
            del dk_chunk, dv_chunk  # before the next chunk's are made
        return dq, dk, dv, None, None, None


def _chunks(
    q: Tensor, k: Tensor, left: int, right: int, doc_start_BT: Docs
) -> Iterator[tuple[slice, slice, Tensor | bool]]:
    """(queries, their keys, mask or is_causal) of each chunk."""
    num_queries, num_keys = q.shape[1], k.shape[1]
    bands: dict[tuple[int, int, int], Tensor] = {}
    for start in range(0, num_queries, CHUNK):
        stop = min(start + CHUNK, num_queries)
        first = num_keys - num_queries + start  # position of the first query
        lo, hi = max(0, first - left), min(num_keys, first + stop - start + right)
        shape = stop - start, hi - lo, first - lo
        mask: Tensor | bool | None = _causal_flag(*shape, left, right)
        if mask is None or doc_start_BT is not None:
            if shape not in bands:  # all full chunks share one
                bands[shape] = _band(*shape, left, right, q.device)
            mask = bands[shape]
        if doc_start_BT is not None:
            keys_S = torch.arange(lo, hi, device=q.device)
            mask = mask & (keys_S >= doc_start_BT[:, None, start:stop, None])
        yield slice(start, stop), slice(lo, hi), mask


def _document_lengths(doc_start_BT: Tensor) -> list[int] | None:
    """Lengths of the documents along the flattened rows; None if it is no such cut, or too fine."""
    position_T = torch.arange(doc_start_BT.shape[1], dtype=doc_start_BT.dtype)
    is_first = (doc_start_BT == position_T) | (position_T == 0)
    if not torch.equal((is_first * position_T).cummax(1).values.to(doc_start_BT.dtype), doc_start_BT):
        return None
    cuts = is_first.flatten().nonzero().flatten()
    if len(cuts) * MIN_DOCUMENT > doc_start_BT.numel():
        return None
    return torch.diff(cuts, append=cuts.new_tensor([doc_start_BT.numel()])).tolist()


def _causal_flag(num_queries: int, num_keys: int, past: int, left: int, right: int) -> bool | None:
    """is_causal for a call without a mask tensor; None where only a mask does it."""
    if past + num_queries - 1 > left:
        return None
    if num_keys - 1 <= past + right:
        return False  # every key is visible
    return True if past == right == 0 and num_keys == num_queries else None


def _band(num_queries: int, num_keys: int, past: int, left: int, right: int, device: torch.device) -> Tensor:
    """(num_queries, num_keys), True where key s is at most `left` before and `right` after query past + t."""
    back = past + torch.arange(num_queries, device=device)[:, None] - torch.arange(num_keys, device=device)
    return (back <= left) & (back >= -right)


def _forward(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | bool) -> tuple[Tensor, Tensor | None]:
    """One chunk's output and, on a CPU, what its backward kernel needs."""
    if q.device.type != "cpu":
        return _call(q, k, v, mask), None
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    is_causal, bias = _cpu_mask(mask, q.dtype)
    y, logsum = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        q, k, v, 0.0, is_causal, attn_mask=bias
    )
    return y.transpose(1, 2), logsum


def _backward(
    dy: Tensor, q: Tensor, k: Tensor, v: Tensor, y: Tensor, logsum: Tensor | None, mask: Tensor | bool
) -> Sequence[Tensor]:
    """One chunk's dq, dk, dv: the CPU kernel's own backward; elsewhere the chunk is computed again."""
    if logsum is None:
        q, k, v = (x.detach().requires_grad_() for x in (q, k, v))
        with torch.enable_grad():
            return torch.autograd.grad(_call(q, k, v, mask), (q, k, v), dy)
    dy, q, k, v, y = (x.transpose(1, 2) for x in (dy, q, k, v, y))
    is_causal, bias = _cpu_mask(mask, q.dtype)
    backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
    grads = backward(dy, q, k, v, y, logsum, 0.0, is_causal, attn_mask=bias)
    return [x.transpose(1, 2) for x in grads]


def _cpu_mask(mask: Tensor | bool, dtype: torch.dtype) -> tuple[bool, Tensor | None]:
    """(is_causal, additive mask) as the CPU kernel wants them."""
    if isinstance(mask, bool):
        return mask, None
    return False, torch.zeros(mask.shape, dtype=dtype).masked_fill_(~mask, -torch.inf)


def _call(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | bool) -> Tensor:
    """One SDPA call with a mask or is_causal; its fused kernels read strides, so nothing is copied."""
    groups = q.shape[2] // k.shape[2]
    is_half, bias = q.dtype in (torch.bfloat16, torch.float16), None if isinstance(mask, bool) else mask
    # The CPU kernel and CUDA's flash kernel share k and v among query heads; the others need them repeated.
    shares_heads = q.device.type == "cpu" or (q.device.type == "cuda" and bias is None and is_half)
    if groups > 1 and not shares_heads:
        k, v = k.repeat_interleave(groups, 2), v.repeat_interleave(groups, 2)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    enable_gqa = groups > 1 and shares_heads
    y = F.scaled_dot_product_attention(q, k, v, bias, is_causal=mask is True, enable_gqa=enable_gqa)
    return y.transpose(1, 2)
