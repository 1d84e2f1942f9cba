"""The oracle: attention in plain PyTorch, in fp32 or fp64, gradients written out. Slow; meant to be read.

`naive` is the definition. `tiled` is FlashAttention-2 (Dao 2023, algorithms 1 and 2): it holds only a block
of the T x S matrix at a time and computes it again in the backward pass. docs/attention.md tells the story.

    S = scale Q K^T    P = softmax(S)    O = P V    delta = rowsum(dO * O)
    dV = P^T dO    dS = P * (dO V^T - delta)    dQ = scale dS K    dK = scale dS^T Q

Letters: B rows, T queries, S keys, H heads (in this file as many for keys as for queries), E head size.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from nanochat.flash_attention.cache import Cache
from nanochat.flash_attention.intervals import Docs, Limit, intervals, keep

BLOCK = 64
MAX_NAIVE = 1024 * 1024  # scores per head up to which the backend takes the naive path, then the tiled one


class Naive(torch.autograd.Function):
    """Attention by its definition; keeps the (T, S) weights P for the backward pass."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, low_BT: Tensor, high_BT: Tensor) -> Tensor:
        ctx.scale = q.shape[-1] ** -0.5
        scores = (ctx.scale * q @ k.mT).masked_fill(~keep(low_BT, high_BT, 0, k.shape[2]), -torch.inf)
        info = torch.finfo(q.dtype)  # its limits make the weights of a query that sees nothing 0, not NaN
        p = torch.exp(scores - scores.amax(-1, keepdim=True).clamp(min=info.min))
        p = p / p.sum(-1, keepdim=True).clamp(min=info.tiny)
        y = p @ v
        ctx.save_for_backward(q, k, v, p, y)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, p, y = ctx.saved_tensors
        ds = p * (dy @ v.mT - (dy * y).sum(-1, keepdim=True))
        return ctx.scale * ds @ k, ctx.scale * ds.mT @ q, p.mT @ dy, None, None


class Tiled(torch.autograd.Function):
    """FlashAttention-2: an online softmax over key blocks; keeps only O and L = m + log(l)."""

    @staticmethod
    def forward(
        ctx: Any, q_BHTE: Tensor, k_BHSE: Tensor, v_BHSE: Tensor, low_BT: Tensor, high_BT: Tensor, block: int
    ) -> Tensor:
        ctx.scale, ctx.block, info = q_BHTE.shape[-1] ** -0.5, block, torch.finfo(q_BHTE.dtype)
        y_BHTE, logsum_BHT1 = torch.empty_like(q_BHTE), torch.empty_like(q_BHTE[..., :1])
        for t in _blocks(q_BHTE, block):
            q = q_BHTE[:, :, t]
            largest = torch.full_like(q[..., :1], info.min)  # m, the running maximum of the scores
            total = torch.zeros_like(largest)  # l, the running sum of exp(score - m)
            acc = torch.zeros_like(q)  # the running sum of exp(score - m) * value
            for s in _blocks(k_BHSE, block):
                if (scores := _scores(ctx.scale, q, k_BHSE[:, :, s], low_BT[:, t], high_BT[:, t], s)) is None:
                    continue
                before, largest = largest, torch.maximum(largest, scores.amax(-1, keepdim=True))
                p, rescale = torch.exp(scores - largest), torch.exp(before - largest)
                total = rescale * total + p.sum(-1, keepdim=True)
                acc = rescale * acc + p @ v_BHSE[:, :, s]
            total = total.clamp(min=info.tiny)
            y_BHTE[:, :, t], logsum_BHT1[:, :, t] = acc / total, largest + torch.log(total)
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
        ):  # keys outside, as in FA2: dk and dv of a block stay in one place
            k, v = k_BHSE[:, :, s], v_BHSE[:, :, s]
            for t in _blocks(q_BHTE, ctx.block):
                q, dy = q_BHTE[:, :, t], dy_BHTE[:, :, t]
                if (scores := _scores(ctx.scale, q, k, low_BT[:, t], high_BT[:, t], s)) is None:
                    continue
                p = torch.exp(scores - logsum_BHT1[:, :, t])
                ds = p * (dy @ v.mT - delta_BHT1[:, :, t])
                dv[:, :, s] += p.mT @ dy
                dq[:, :, t] += ctx.scale * ds @ k
                dk[:, :, s] += ctx.scale * ds.mT @ q
        return dq, dk, dv, None, None, None


naive, tiled = Naive.apply, Tiled.apply  # q_BHTE, k_BHSE, v_BHSE, low_BT, high_BT (, block)


def unsupported_reason(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why this backend cannot run, or None: it runs wherever torch does."""
    return None


def attend(
    q_BTHE: Tensor, k_BSKE: Tensor, v_BSKE: Tensor, left: Limit, right: Limit, doc_start_BT: Docs = None
) -> Tensor:
    """The backend's training call, (B, T, H, E): fp64 stays fp64, everything else is computed in fp32."""
    lengths_B = torch.full((len(q_BTHE),), k_BSKE.shape[1], device=q_BTHE.device)
    return _attend(q_BTHE, k_BSKE, v_BSKE, *intervals(q_BTHE.shape[1], lengths_B, left, right, doc_start_BT))


def attend_cache(q_BTHE: Tensor, cache: Cache, left: Limit, right: Limit) -> Tensor:
    """Attention of the newest T positions of each row over its cached keys (already appended)."""
    return _attend(q_BTHE, *cache.whole(), *intervals(q_BTHE.shape[1], cache.starts_B, left, right))


def _attend(q_BTHE: Tensor, k_BSKE: Tensor, v_BSKE: Tensor, low_BT: Tensor, high_BT: Tensor) -> Tensor:
    dtype = torch.float64 if q_BTHE.dtype == torch.float64 else torch.float32
    groups = q_BTHE.shape[2] // k_BSKE.shape[2]  # query heads j * groups .. share key/value head j
    q = q_BTHE.to(dtype).transpose(1, 2)
    k, v = (x.to(dtype).repeat_interleave(groups, 2).transpose(1, 2) for x in (k_BSKE, v_BSKE))
    is_small = q.shape[2] * k.shape[2] <= MAX_NAIVE
    y_BHTE = naive(q, k, v, low_BT, high_BT) if is_small else tiled(q, k, v, low_BT, high_BT, BLOCK)
    return y_BHTE.transpose(1, 2).to(q_BTHE.dtype)


def _blocks(x_BHTE: Tensor, block: int) -> list[slice]:
    return [slice(i, min(i + block, x_BHTE.shape[2])) for i in range(0, x_BHTE.shape[2], block)]


def _scores(scale: float, q: Tensor, k: Tensor, low: Tensor, high: Tensor, s: slice) -> Tensor | None:
    """Masked scores of one block; None where the block lies wholly outside the mask."""
    if int(high.max()) < s.start or int(low.min()) >= s.stop:
        return None
    return (scale * q @ k.mT).masked_fill(~keep(low, high, s.start, s.stop), -torch.inf)
