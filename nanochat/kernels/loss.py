"""Cross entropy of softcapped logits without ever holding all of them.

Chunks of tokens; a chunk's logits become their own gradient in place, in kernels.c on a CPU, in Triton on
a GPU (triton_loss.py), else by the PyTorch lines of `WeightedNLL`. Tests hold all three to fp64.

Letters: N tokens, D width, V vocabulary (the head's table may be padded beyond it).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from nanochat.kernels import build as native
from nanochat.kernels import matmul

CHUNK_LOGITS = 1 << 24  # logits held at once on a GPU: 64 MB in fp32
# Logits of a chunk without and with a kernel that works in place: fp32 copies should stay in a CPU's
# cache, while a GPU's products want many rows and the head's gradient few chunks.
ON_CPU, ON_GPU = (1 << 20, 1 << 22), (CHUNK_LOGITS, 1 << 27)


def weighted_nll(
    hidden: Tensor,
    head_VD: Tensor,
    targets: Tensor,
    weights: Tensor,
    vocab: int,
    softcap: float,
    cast_VD: Tensor | None = None,
) -> Tensor:
    """sum(weights * nll) over the targets that are not -1 (fp32 scalar); the gradient is made with the value.

    hidden (..., D); targets, weights (...); cast_VD: the head in the dtype of hidden, if at hand.

    Targets lie between -1 and vocab - 1, else IndexError on a CPU. A GPU would have to synchronise for that;
    there a wrong target makes the loss NaN, and no memory outside the tensors is touched.
    Raises ValueError if targets and weights do not have the shape of hidden.
    """
    if targets.shape != hidden.shape[:-1] or weights.shape != hidden.shape[:-1]:
        raise ValueError(
            f"targets and weights must have the shape {tuple(hidden.shape[:-1])}, "
            f"found {tuple(targets.shape)} and {tuple(weights.shape)}"
        )
    hidden_ND = hidden.reshape(-1, hidden.shape[-1])
    targets_N = targets.reshape(-1).long()
    weights_N = weights.reshape(-1)
    if hidden.device.type == "cpu" and targets_N.numel():
        least, largest = (int(target) for target in targets_N.aminmax())
        native.check_range("targets", least, largest, -1, vocab)
        if least < 0:
            keep = (targets_N >= 0).nonzero().squeeze(1)
            hidden_ND, targets_N, weights_N = hidden_ND[keep], targets_N[keep], weights_N[keep]
    return WeightedNLL.apply(hidden_ND, head_VD, targets_N, weights_N, vocab, softcap, cast_VD)


def _kernel(hidden: Tensor) -> Callable[[Tensor, Tensor, float, bool], Tensor] | None:
    """(logits, targets, cap, wants gradient) -> nll, the logits overwritten by their gradient; None for
    PyTorch."""
    if native.ready(hidden):
        return _native
    if hidden.device.type != "cuda" or torch.compiler.is_compiling():
        return None
    from nanochat.kernels import triton_loss

    return triton_loss.in_place if triton_loss.why_not(hidden.device, hidden.dtype) is None else None


def _native(logits: Tensor, targets: Tensor, cap: float, wants_gradient: bool) -> Tensor:
    nll_N = torch.empty(len(logits), dtype=torch.float32)
    native.call(
        "cross_entropy",
        logits,
        targets,
        nll_N,
        *logits.shape,
        cap,
        int(wants_gradient),
        native.is_bf16(logits),
    )
    return nll_N


def _wide_mm(a: Tensor, b: Tensor) -> Tensor:
    """a @ b, summed and returned in at least fp32 where the device offers it."""
    if a.device.type == "cuda" and a.dtype in (torch.bfloat16, torch.float16):
        return torch.mm(a, b, out_dtype=torch.float32)
    return (a @ b).to(torch.promote_types(a.dtype, torch.float32))


class WeightedNLL(torch.autograd.Function):
    """sum_n w_n * nll_n of softcapped logits, and its gradient, made together in chunks of tokens.

    With s = sigmoid(2/15 h W^T) a logit is 15 tanh(h W^T / 15) = 30 s - 15; the 15 cancels in the softmax.
    So Z = sum(exp(30 s)), nll = log Z - 30 s_y and
    d nll / d (h W^T) = (exp(30 s) / Z - onehot(y)) * 4 s (1 - s).
    Capped scores need no maximum subtracted: Z < V e^30. sigmoid, because a CPU's tanh takes six times as
    long. fp32 between the matrix products, which run in the dtype of h; the head's gradient in fp32.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden_ND: Tensor,
        head_VD: Tensor,
        targets_N: Tensor,
        weights_N: Tensor,
        vocab: int,
        softcap: float,
        cast_VD: Tensor | None,
    ) -> Tensor:
        w_VD = (head_VD if cast_VD is None else cast_VD)[:vocab].to(hidden_ND.dtype)
        wide = torch.promote_types(hidden_ND.dtype, torch.float32)
        wants = ctx.needs_input_grad[0] or ctx.needs_input_grad[1]
        total = torch.zeros((), device=hidden_ND.device, dtype=wide)
        grad_h = torch.empty_like(hidden_ND) if wants else None
        grad_w = torch.zeros_like(head_VD, dtype=wide) if wants else None
        kernel = _kernel(hidden_ND)
        is_uniform = (
            kernel is not None and weights_N.stride(0) == 0
        )  # one weight for all: a factor at the end
        ctx.factor = weights_N[0].to(wide) if is_uniform else None
        small, large = ON_CPU if hidden_ND.device.type == "cpu" else ON_GPU
        rows = max(1, (small if kernel is None else large) // vocab)
        for i in range(0, hidden_ND.shape[0], rows):
            h, y = hidden_ND[i : i + rows], targets_N[i : i + rows]
            if kernel is not None:
                is_fast = vocab % 2 == 0 and matmul.is_fast(h, w_VD)
                d = matmul.forward(h, w_VD) if is_fast else h @ w_VD.T
                w_N = weights_N[i : i + rows].to(wide)
                total += (kernel(d, y.contiguous(), softcap, wants) * w_N).sum()
                if grad_h is not None and grad_w is not None:
                    dh = grad_h[i : i + rows]
                    matmul.gradient_of_input(d, w_VD, out=dh) if is_fast else torch.mm(d, w_VD, out=dh)
                    if not is_uniform:
                        dh.mul_(w_N.unsqueeze(1))
                        h = h * w_N.unsqueeze(1).to(h.dtype)
                    if is_fast:
                        matmul.gradient_of_weight(d, h, add_to=grad_w[:vocab])
                    else:
                        grad_w[:vocab] += _wide_mm(d.T, h)
                continue
            is_wrong = (y < -1) | (y >= vocab)  # only on a GPU
            w_N = weights_N[i : i + rows].masked_fill(y == -1, 0.0).masked_fill(is_wrong, float("nan"))
            w_N1 = w_N.unsqueeze(1).to(wide)
            y_N1 = y.clamp(0, vocab - 1).unsqueeze(1)
            s = ((h * (2 / softcap)) @ w_VD.T).to(wide).sigmoid_()
            probs = (s * (2 * softcap)).exp_()
            z_N1 = probs.sum(1, keepdim=True)
            total += ((z_N1.log() - 2 * softcap * s.gather(1, y_N1)) * w_N1).sum()
            if grad_h is not None and grad_w is not None:
                d = probs.mul_(4 * w_N1 / z_N1)
                d.scatter_add_(1, y_N1, -4 * w_N1)
                d.mul_(s).addcmul_(d, s, value=-1)
                d = d.to(h.dtype)
                torch.mm(d, w_VD, out=grad_h[i : i + rows])
                grad_w[:vocab] += (d.T @ h).to(wide)
        if grad_h is not None:
            ctx.save_for_backward(grad_h, grad_w)
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        grad_h, grad_w = ctx.saved_tensors
        grad = grad if ctx.factor is None else grad * ctx.factor
        return grad_h * grad.to(grad_h.dtype), grad_w * grad, None, None, None, None, None
