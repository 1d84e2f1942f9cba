"""The oracle: attention in plain PyTorch, in fp32 or fp64, with gradients written out. Slow, and meant to be read.

`naive` is the definition. `tiled` is FlashAttention-2 (Dao 2023, algorithms 1 and 2): it never holds more than a
block of the T x S matrix, and recomputes it in the backward pass. docs/attention.md walks through both.

    S = scale Q K^T      P = softmax(S)      O = P V
    dV = P^T dO      dP = dO V^T      dS = P * (dP - rowsum(dO * O))      dQ = scale dS K      dK = scale dS^T Q

Letters: B rows, T queries, S keys, H heads, K key/value heads, E head size. `delta` is rowsum(dO * O).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from nanochat.flash_attention.cache import Cache
from nanochat.flash_attention.intervals import intervals, keep

BLOCK = 64
NAIVE_SCORES = 1024 * 1024  # up to this many scores a head the tier takes the naive path, then the tiled one


class Naive(torch.autograd.Function):
    """Attention by its definition; keeps the (T, S) weights P for the backward pass."""

    @staticmethod
    def forward(
        ctx: Any, q_BHTE: Tensor, k_BHSE: Tensor, v_BHSE: Tensor, low_BT: Tensor, high_BT: Tensor
    ) -> Tensor:
        ctx.scale = q_BHTE.shape[-1] ** -0.5
        scores = ctx.scale * q_BHTE @ k_BHSE.mT
        scores = scores.masked_fill(~keep(low_BT, high_BT, 0, k_BHSE.shape[2]), -torch.inf)
        largest = scores.amax(-1, keepdim=True).clamp(
            min=_floor(q_BHTE)
        )  # a query that sees nothing: weights 0
        weights = torch.exp(scores - largest)
        weights = weights / weights.sum(-1, keepdim=True).clamp(min=_tiny(q_BHTE))
        y_BHTE = weights @ v_BHSE
        ctx.save_for_backward(q_BHTE, k_BHSE, v_BHSE, weights, y_BHTE)
        return y_BHTE

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, weights, y = ctx.saved_tensors
        dv = weights.mT @ dy
        dweights = dy @ v.mT
        dscores = weights * (dweights - (dy * y).sum(-1, keepdim=True))
        return ctx.scale * dscores @ k, ctx.scale * dscores.mT @ q, dv, None, None


class Tiled(torch.autograd.Function):
    """FlashAttention-2: an online softmax over key blocks; keeps only O and L = m + log(l), one number a query."""

    @staticmethod
    def forward(
        ctx: Any, q_BHTE: Tensor, k_BHSE: Tensor, v_BHSE: Tensor, low_BT: Tensor, high_BT: Tensor, block: int
    ) -> Tensor:
        ctx.scale, ctx.block = q_BHTE.shape[-1] ** -0.5, block
        y_BHTE, logsum_BHT1 = torch.empty_like(q_BHTE), torch.empty_like(q_BHTE[..., :1])
        for t in _blocks(q_BHTE, block):
            q = q_BHTE[:, :, t]
            m = torch.full_like(q[..., :1], _floor(q))  # running maximum of the scores
            l = torch.zeros_like(m)  # running sum of exp(score - m)  # noqa: E741
            acc = torch.zeros_like(q)  # running sum of exp(score - m) * value
            for s in _blocks(k_BHSE, block):
                if (scores := _scores(ctx.scale, q, k_BHSE[:, :, s], low_BT[:, t], high_BT[:, t], s)) is None:
                    continue
                m_new = torch.maximum(m, scores.amax(-1, keepdim=True))
                p = torch.exp(scores - m_new)
                rescale = torch.exp(m - m_new)
                l = rescale * l + p.sum(-1, keepdim=True)  # noqa: E741
                acc = rescale * acc + p @ v_BHSE[:, :, s]
                m = m_new
            l = l.clamp(min=_tiny(q))  # noqa: E741
            y_BHTE[:, :, t] = acc / l
            logsum_BHT1[:, :, t] = m + torch.log(l)
        ctx.save_for_backward(q_BHTE, k_BHSE, v_BHSE, low_BT, high_BT, y_BHTE, logsum_BHT1)
        return y_BHTE

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_BHTE: Tensor) -> tuple[Tensor | None, ...]:
        q_BHTE, k_BHSE, v_BHSE, low_BT, high_BT, y_BHTE, logsum_BHT1 = ctx.saved_tensors
        dq, dk, dv = torch.zeros_like(q_BHTE), torch.zeros_like(k_BHSE), torch.zeros_like(v_BHSE)
        delta_BHT1 = (dy_BHTE * y_BHTE).sum(-1, keepdim=True)
        for s in _blocks(
            k_BHSE, ctx.block
        ):  # as FA2 does: a worker owns a key block, so that dk, dv stay local
            k, v = k_BHSE[:, :, s], v_BHSE[:, :, s]
            for t in _blocks(q_BHTE, ctx.block):
                q, dy = q_BHTE[:, :, t], dy_BHTE[:, :, t]
                if (scores := _scores(ctx.scale, q, k, low_BT[:, t], high_BT[:, t], s)) is None:
                    continue
                p = torch.exp(scores - logsum_BHT1[:, :, t])
                dv[:, :, s] += p.mT @ dy
                dscores = p * (dy @ v.mT - delta_BHT1[:, :, t])
                dq[:, :, t] += ctx.scale * dscores @ k
                dk[:, :, s] += ctx.scale * dscores.mT @ q
        return dq, dk, dv, None, None, None


def naive(q_BHTE: Tensor, k_BHSE: Tensor, v_BHSE: Tensor, low_BT: Tensor, high_BT: Tensor) -> Tensor:
    """Attention over the keys low .. high of each query, by the definition."""
    return Naive.apply(q_BHTE, k_BHSE, v_BHSE, low_BT, high_BT)  # type: ignore[no-any-return]


def tiled(
    q_BHTE: Tensor, k_BHSE: Tensor, v_BHSE: Tensor, low_BT: Tensor, high_BT: Tensor, block: int = BLOCK
) -> Tensor:
    """The same numbers as `naive`, a block of queries and a block of keys at a time."""
    return Tiled.apply(q_BHTE, k_BHSE, v_BHSE, low_BT, high_BT, block)  # type: ignore[no-any-return]


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
    """The tier's training call, (B, T, H, E): fp64 stays fp64, everything else is computed in fp32."""
    lengths_B = torch.full((len(q_BTHE),), k_BSKE.shape[1], device=q_BTHE.device)
    return _attend(q_BTHE, k_BSKE, v_BSKE, lengths_B, left, right, doc_start_BT)


def attend_cache(q_BTHE: Tensor, cache: Cache, left: int | None, right: int | None) -> Tensor:
    """Attention of the newest T positions of each row over its cached keys (already appended)."""
    return _attend(q_BTHE, *cache.whole(), cache.starts_B, left, right, None)


def _attend(
    q_BTHE: Tensor,
    k_BSKE: Tensor,
    v_BSKE: Tensor,
    lengths_B: Tensor,
    left: int | None,
    right: int | None,
    doc_start_BT: Tensor | None,
) -> Tensor:
    low_BT, high_BT = intervals(q_BTHE.shape[1], lengths_B, left, right, doc_start_BT)
    dtype = torch.float64 if q_BTHE.dtype == torch.float64 else torch.float32
    groups = q_BTHE.shape[2] // k_BSKE.shape[2]  # GQA: query heads j * groups .. share key/value head j
    q, k, v = (
        x.to(dtype).repeat_interleave(n, 2).transpose(1, 2)
        for x, n in ((q_BTHE, 1), (k_BSKE, groups), (v_BSKE, groups))
    )
    attention = naive if q.shape[2] * k.shape[2] <= NAIVE_SCORES else tiled
    return attention(q, k, v, low_BT, high_BT).transpose(1, 2).to(q_BTHE.dtype)


def _blocks(x_BHTE: Tensor, block: int) -> list[slice]:
    return [slice(i, min(i + block, x_BHTE.shape[2])) for i in range(0, x_BHTE.shape[2], block)]


def _scores(scale: float, q: Tensor, k: Tensor, low: Tensor, high: Tensor, s: slice) -> Tensor | None:
    """Masked scores of one block, None where every key lies outside of every query's interval."""
    if int(high.max()) < s.start or int(low.min()) >= s.stop:
        return None
    return (scale * q @ k.mT).masked_fill(~keep(low, high, s.start, s.stop), -torch.inf)


def _floor(x: Tensor) -> float:
    return torch.finfo(x.dtype).min  # finite, so that exp(floor - floor) is 1 and not NaN


def _tiny(x: Tensor) -> float:
    return torch.finfo(x.dtype).tiny
