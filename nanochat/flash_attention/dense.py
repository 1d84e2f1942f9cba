"""Training attention on a CPU: chunks of queries as three plain matrix products around kernels.c's softmax.

torch's fused CPU kernel spends most of its time outside the matrix unit. Here a chunk of queries
multiplies all keys that
it can see in one batched product, the softmax is one pass in place, and the weights P are kept for the
backward pass
where they are small (KEEP_BYTES), else made again. A window or a document is a pair of numbers for each
query, never
a mask. Scores are rounded to the dtype of q, as in any unfused attention. The sdpa tier calls this; bf16
goes on to tiles.py where the processor suits it.

Letters: B rows, T queries, S keys, H query heads, K key/value heads, G = H / K, C queries of a chunk, E
head size.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from nanochat.flash_attention import tiles
from nanochat.flash_attention.intervals import Docs
from nanochat.kernels import build as native

CHUNK = 128  # queries
KEEP_BYTES = 64 << 20  # of P in one call


def suits(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether this path serves: a CPU with the compiled kernels, more than one query, gradients wanted or
    tiles here (their forward pass alone is faster than torch's, too)."""
    wants = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
    has_kernels = q.shape[1] > 1 and native.ready(q[:1, :1, :1, :1].contiguous())
    return has_kernels and (wants or tiles.suits(q))


def attend(q: Tensor, k: Tensor, v: Tensor, left: int, right: int, doc_start_BT: Docs) -> Tensor:
    """softmax(q k^T / sqrt(E)) v over the visible keys, (B, T, H, E); queries aligned with the last keys.

    Every query must see a key: doc_start is at most its own position.
    """
    path = tiles.Tiles if tiles.suits(q) else Dense
    return path.apply(q, k, v, left, right, doc_start_BT)


class Dense(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, left: int, right: int, doc_start_BT: Docs
    ) -> Tensor:
        B, T, H, E = q.shape
        S, K = k.shape[1:3]
        starts = None if doc_start_BT is None else doc_start_BT.to(torch.int32).contiguous()
        # G query heads over one key head are rows of one matrix
        q_BKGTE = q.view(B, T, K, H // K, E).permute(0, 2, 3, 1, 4).contiguous()
        k_NSE, v_NSE = (x.transpose(1, 2).reshape(B * K, S, E) for x in (k, v))
        y_BTHE, kept = torch.empty_like(q, memory_format=torch.contiguous_format), []
        keeps = B * H * T * min(S, CHUNK + left + right) * q.element_size() <= KEEP_BYTES
        for queries, keys, past in _chunks(T, S, left, right):
            scores = torch.bmm(q_BKGTE[:, :, :, queries].reshape(B * K, -1, E), k_NSE[:, keys].mT)
            limits = queries.stop - queries.start, past, left, right, _starts(starts, queries, keys)
            p = _softmax(scores, B, E, limits)
            _put(y_BTHE, queries, torch.bmm(p, v_NSE[:, keys]), K)
            if keeps:
                kept.append(p)
        ctx.save_for_backward(q_BKGTE, k_NSE, v_NSE, starts, *kept)
        ctx.limits = left, right
        return y_BTHE

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_BTHE: Tensor) -> tuple[Tensor | None, ...]:
        q_BKGTE, k_NSE, v_NSE, starts, *kept = ctx.saved_tensors
        B, K, G, T, E = q_BKGTE.shape
        S = k_NSE.shape[1]
        dy_BKGTE = dy_BTHE.reshape(B, T, K, G, E).permute(0, 2, 3, 1, 4)
        dq_BTHE = dy_BTHE.new_empty(B, T, K * G, E)
        dk_NSE, dv_NSE = torch.zeros_like(k_NSE), torch.zeros_like(v_NSE)
        for i, (queries, keys, past) in enumerate(_chunks(T, S, *ctx.limits)):
            limits = queries.stop - queries.start, past, *ctx.limits, _starts(starts, queries, keys)
            q, dy = (x[:, :, :, queries].reshape(B * K, -1, E) for x in (q_BKGTE, dy_BKGTE))
            p = kept[i] if kept else _softmax(torch.bmm(q, k_NSE[:, keys].mT), B, E, limits)
            dv_NSE[:, keys] += torch.bmm(p.mT, dy)
            ds = _softmax(torch.bmm(dy, v_NSE[:, keys].mT), B, E, limits, p)
            _put(dq_BTHE, queries, torch.bmm(ds, k_NSE[:, keys]), K)
            dk_NSE[:, keys] += torch.bmm(ds.mT, q)
        dk, dv = (x.view(B, K, S, E).transpose(1, 2) for x in (dk_NSE, dv_NSE))
        return dq_BTHE, dk, dv, None, None, None


def _chunks(T: int, S: int, left: int, right: int) -> Iterator[tuple[slice, slice, int]]:
    """(queries, the keys that any of them sees, place of the first query among those keys)."""
    for start in range(0, T, CHUNK):
        stop = min(start + CHUNK, T)
        first = S - T + start
        lo, hi = max(0, first - left), min(S, S - T + stop + right)
        yield slice(start, stop), slice(lo, hi), first - lo


def _starts(starts_BT: Docs, queries: slice, keys: slice) -> Docs:
    """First visible key of each query of a chunk, counted from the chunk's first key."""
    return None if starts_BT is None else (starts_BT[:, queries] - keys.start).contiguous()


def _softmax(x: Tensor, B: int, E: int, limits: tuple[Any, ...], p: Tensor | None = None) -> Tensor:
    """Scores (B * K, G * C, keys) -> P; with P given, the gradient of P -> that of the scores. In place."""
    C, past, left, right, starts_BC = limits
    rows, num_keys = x.shape[0] * x.shape[1], x.shape[2]
    where = (rows, C, rows // B, num_keys, past, left, right, starts_BC, C, E**-0.5, native.is_bf16(x))
    if p is None:
        native.call("softmax_forward", x, *where)
    else:
        native.call("softmax_backward", p, x, *where)
    return x


def _put(out_BTHE: Tensor, queries: slice, rows_NRE: Tensor, K: int) -> None:
    """Write (B * K, G * C, E) where it belongs."""
    B, _, H, E = out_BTHE.shape
    out = out_BTHE[:, queries].unflatten(2, (K, H // K))
    out.copy_(rows_NRE.view(B, K, H // K, -1, E).permute(0, 3, 1, 2, 4))
