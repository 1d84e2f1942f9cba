"""Cross entropy of softcapped logits without ever holding all of them.

Letters: N tokens, D width, V vocabulary (the head's table may be padded beyond it).
"""

from __future__ import annotations

from typing import Any

import torch

SOFTCAP = 15.0
CHUNK_LOGITS = 1 << 22  # logits held at once: 16 MB in fp32


def weighted_nll(
    hidden: torch.Tensor, head_VD: torch.Tensor, targets: torch.Tensor, weights: torch.Tensor, vocab: int
) -> torch.Tensor:
    """sum(weights * nll) over the targets that are not -1 (fp32 scalar); the gradient is made with the value.

    hidden (..., D); targets, weights (...).
    """
    hidden_ND = hidden.reshape(-1, hidden.shape[-1])
    targets_N, weights_N = targets.reshape(-1), weights.reshape(-1).float()
    if hidden.device.type == "cpu" and bool(
        (targets_N < 0).any()
    ):  # free here; a GPU would have to synchronise
        keep = (targets_N >= 0).nonzero().squeeze(1)
        hidden_ND, targets_N, weights_N = hidden_ND[keep], targets_N[keep], weights_N[keep]
    return WeightedNLL.apply(hidden_ND, head_VD, targets_N, weights_N, vocab)  # type: ignore[no-any-return]


def softcap(logits: torch.Tensor) -> torch.Tensor:
    """15 tanh(z / 15): logits stay within +-15 (Gemma 2, arXiv 2408.00118)."""
    return SOFTCAP * torch.tanh(logits / SOFTCAP)


class WeightedNLL(torch.autograd.Function):
    """sum_n w_n * nll_n of softcapped logits, and its gradient, made together in chunks of tokens.

    With c = softcap(h W^T): d nll / d logit = (softmax(c) - onehot) * (1 - (c/15)^2). fp32 arithmetic between
    the two matrix products, which run in the dtype of h; the gradient of W is summed in fp32.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden_ND: torch.Tensor,
        weight_VD: torch.Tensor,
        targets_N: torch.Tensor,
        weights_N: torch.Tensor,
        vocab: int,
    ) -> torch.Tensor:  # type: ignore[override]
        w_VD = weight_VD[:vocab].to(hidden_ND.dtype)
        wants = ctx.needs_input_grad[0] or ctx.needs_input_grad[1]
        total = torch.zeros((), device=hidden_ND.device, dtype=torch.float32)
        grad_h = torch.empty_like(hidden_ND) if wants else None
        grad_w = torch.zeros_like(weight_VD, dtype=torch.float32) if wants else None
        rows = max(1, CHUNK_LOGITS // vocab)
        for i in range(0, hidden_ND.shape[0], rows):
            h, t = hidden_ND[i : i + rows], targets_N[i : i + rows]
            w = weights_N[i : i + rows].masked_fill(t < 0, 0.0)
            t = t.clamp(min=0).unsqueeze(1)
            tanh = (h @ w_VD.T).float().div_(SOFTCAP).tanh_()
            scores = tanh * SOFTCAP
            log_z = scores.logsumexp(1, keepdim=True)
            total += ((log_z - scores.gather(1, t)).squeeze(1) * w).sum()
            if grad_h is not None and grad_w is not None:
                d = scores.sub_(log_z).exp_()  # the softmax
                d.scatter_add_(1, t, torch.full_like(log_z, -1.0))
                d.mul_(tanh.square_().neg_().add_(1.0)).mul_(w.unsqueeze(1))
                d = d.to(h.dtype)
                grad_h[i : i + rows] = d @ w_VD
                grad_w[:vocab] += (d.T @ h).float()
        if grad_h is not None:
            ctx.save_for_backward(grad_h, grad_w)
        return total

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # type: ignore[override]
        grad_h, grad_w = ctx.saved_tensors
        return grad_h * grad.to(grad_h.dtype), grad_w * grad, None, None, None
