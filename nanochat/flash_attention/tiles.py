"""Training attention by attention.c: tiles of 64 queries and keys that never leave the cache.

For bf16 on CPUs that multiply bf16 pairs in AVX512 and have no AMX (native.has("attention")). Scores stay
fp32 and nothing of size T x S is kept: backward makes the weights again from L (B, H, T), one number a query.
dense.py calls it where it suits, and serves everything else.

Letters: B rows, T queries, S keys, H query heads, K key/value heads, E head size.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from nanochat.flash_attention.intervals import Docs, intervals
from nanochat.kernels import build as native


def suits(q: Tensor) -> bool:
    """Whether attention.c takes these heads; q is on a CPU and native.ready."""
    return q.dtype == torch.bfloat16 and q.shape[-1] % 32 == 0 and native.has("attention")


class Tiles(torch.autograd.Function):
    """As dense.attend."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, left: int, right: int, doc_start_BT: Docs
    ) -> Tensor:
        (B, T, H, E), (S, K) = q.shape, k.shape[1:3]
        q, k, v = (x.contiguous() for x in (q, k, v))
        seen = intervals(T, torch.full((B,), S), left, right, doc_start_BT)
        first_BT, last_BT = (limit.to(torch.int32).contiguous() for limit in seen)
        y, lse_BHT = torch.empty_like(q), q.new_empty(B, H, T, dtype=torch.float32)
        ctx.sizes = B, T, S, H, K, E, E**-0.5
        native.call("attention_forward", q, k, v, y, lse_BHT, first_BT, last_BT, *ctx.sizes)
        ctx.save_for_backward(q, k, v, y, lse_BHT, first_BT, last_BT)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, y, lse_BHT, first_BT, last_BT = ctx.saved_tensors
        grads = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
        native.call(
            "attention_backward", q, k, v, y, dy.contiguous(), lse_BHT, first_BT, last_BT, *grads, *ctx.sizes
        )
        return *grads, None, None, None
