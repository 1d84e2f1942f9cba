"""Cross entropy of softcapped logits that never holds all of them.

Tokens come in chunks. The logits of a chunk become their own gradient in place: in C on a CPU
(elementwise.c), in Triton on a GPU (triton_loss.py), else by the PyTorch lines of `_in_place_by_pytorch`,
which are the oracle; tests hold all three to fp64.

Letters: N tokens, D width, V vocabulary (the head's table may be padded beyond it).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from nanochat.kernels import build, matmul

CHUNK_LOGITS = 1 << 24  # logits held at once on a GPU: 64 MB in fp32
# Logits of a chunk in PyTorch and in a kernel. A CPU's fp32 copies should stay in its cache; a GPU's products
# want many rows, and the head's gradient few chunks.
ON_CPU = (1 << 20, 1 << 22)
ON_GPU = (CHUNK_LOGITS, 1 << 27)

# (logits (N, V), targets (N,), softcap, wants gradient) -> nll (N,), 0 where the target is -1; with
# wants gradient the logits are overwritten by d nll / d logits
InPlace = Callable[[Tensor, Tensor, float, bool], Tensor]


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
        smallest, largest = (int(target) for target in targets_N.aminmax())
        build.check_range("targets", smallest, largest, -1, vocab)
        # Tokens without a target cost nothing.
        if smallest < 0:
            kept = (targets_N >= 0).nonzero().squeeze(1)
            hidden_ND, targets_N, weights_N = hidden_ND[kept], targets_N[kept], weights_N[kept]
    return WeightedNLL.apply(hidden_ND, head_VD, targets_N, weights_N, vocab, softcap, cast_VD)


class WeightedNLL(torch.autograd.Function):
    """sum_n w_n * nll_n and its gradient in one pass; fp32 between products and in the head's gradient."""

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
        grad_ND = torch.empty_like(hidden_ND) if wants else None
        grad_VD = torch.zeros_like(head_VD, dtype=wide) if wants else None
        # One weight for all tokens is a factor at the end.
        is_uniform = len(weights_N) > 0 and weights_N.stride(0) == 0
        ctx.factor = weights_N[0].to(wide) if is_uniform else None

        in_place = _kernel(hidden_ND) or _in_place_by_pytorch
        chunks = ON_CPU if hidden_ND.device.type == "cpu" else ON_GPU
        rows = max(1, chunks[in_place is not _in_place_by_pytorch] // vocab)
        for i in range(0, len(hidden_ND), rows):
            h = hidden_ND[i : i + rows]
            w_N = weights_N[i : i + rows].to(wide)
            is_fast = vocab % 2 == 0 and matmul.is_fast(h, w_VD)
            d = matmul.forward(h, w_VD) if is_fast else h @ w_VD.T
            total += (in_place(d, targets_N[i : i + rows].contiguous(), softcap, wants) * w_N).sum()
            if grad_ND is None or grad_VD is None:
                continue

            # d is the gradient of the logits now, without the weights.
            dh = grad_ND[i : i + rows]
            if is_fast:
                matmul.gradient_of_input(d, w_VD, out=dh)
            else:
                torch.mm(d, w_VD, out=dh)
            if not is_uniform:
                dh.mul_(w_N.unsqueeze(1))
                h = h * w_N.unsqueeze(1).to(h.dtype)
            if is_fast:
                matmul.gradient_of_weight(d, h, add_to=grad_VD[:vocab])
            else:
                grad_VD[:vocab] += _wide_mm(d.T, h)
        if wants:
            ctx.save_for_backward(grad_ND, grad_VD)
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        grad_ND, grad_VD = ctx.saved_tensors
        if ctx.factor is not None:
            grad = grad * ctx.factor
        return grad_ND * grad.to(grad_ND.dtype), grad_VD * grad, None, None, None, None, None


def _kernel(hidden: Tensor) -> InPlace | None:
    """The C or Triton kernel for this device and dtype, or None."""
    if build.ready(hidden):
        return _in_place_by_c
    if hidden.device.type != "cuda" or torch.compiler.is_compiling():
        return None
    from nanochat.kernels import triton_loss

    is_supported = triton_loss.unsupported_reason(hidden.device, hidden.dtype) is None
    return triton_loss.in_place if is_supported else None


def _in_place_by_pytorch(
    logits_NV: Tensor, targets_N: Tensor, softcap: float, wants_gradient: bool
) -> Tensor:
    """See InPlace.

    With s = sigmoid(2 z / cap) a capped logit is cap tanh(z / cap) = 2 cap s - cap, and the cap at its end
    cancels in the softmax. So Z = sum(exp(2 cap s)), nll = log Z - 2 cap s_y and
    d nll / dz = (exp(2 cap s) / Z - onehot(y)) * 4 s (1 - s). Capped logits need no maximum subtracted:
    Z < V e^30. Sigmoid, because a CPU's tanh takes six times as long.
    """
    V = logits_NV.shape[1]
    no_target_N = targets_N == -1
    is_wrong_N = (targets_N < -1) | (targets_N >= V)  # only on a GPU, which cannot be asked
    y_N1 = targets_N.clamp(0, V - 1).unsqueeze(1)
    s_NV = torch.sigmoid(logits_NV.to(torch.promote_types(logits_NV.dtype, torch.float32)) * (2 / softcap))
    d_NV = (s_NV * (2 * softcap)).exp_()
    z_N1 = d_NV.sum(1, keepdim=True)
    nll_N = (z_N1.log() - 2 * softcap * s_NV.gather(1, y_N1)).squeeze(1)
    if wants_gradient:
        scale_N = (
            torch.full_like(nll_N, 4.0).masked_fill_(no_target_N, 0.0).masked_fill_(is_wrong_N, torch.nan)
        )
        d_NV.div_(z_N1).scatter_add_(1, y_N1, torch.full_like(z_N1, -1.0)).mul_(scale_N.unsqueeze(1))
        logits_NV.copy_(d_NV.mul_(s_NV).addcmul_(d_NV, s_NV, value=-1))
    return nll_N.masked_fill_(no_target_N, 0.0).masked_fill_(is_wrong_N, torch.nan)


def _in_place_by_c(logits_NV: Tensor, targets_N: Tensor, softcap: float, wants_gradient: bool) -> Tensor:
    nll_N = torch.empty(len(logits_NV), dtype=torch.float32)
    flags = int(wants_gradient), build.is_bf16(logits_NV)
    build.call("cross_entropy", logits_NV, targets_N, nll_N, *logits_NV.shape, softcap, *flags)
    return nll_N


def _wide_mm(a: Tensor, b: Tensor) -> Tensor:
    """a @ b, summed and returned in at least fp32 where the device offers it."""
    if a.device.type == "cuda" and a.dtype in (torch.bfloat16, torch.float16):
        return torch.mm(a, b, out_dtype=torch.float32)
    return (a @ b).to(torch.promote_types(a.dtype, torch.float32))
