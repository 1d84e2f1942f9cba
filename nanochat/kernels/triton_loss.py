"""Softcapped cross entropy on a GPU: raw logits in, their gradient out in the same memory.

One Triton program per row reads it twice and writes it once; fp32 inside, bf16, fp16 or fp32 outside. The
formulas are those of loss.py. Under TRITON_INTERPRET=1 it runs on a CPU, slowly, for tests. This module is
imported where it is used; without Triton `unsupported_reason` says so.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:  # CPU builds of torch
    triton = None

BLOCK = 4096  # logits of a row that are in registers at once
ALLOWED_ERROR_FP32 = 1e-5  # of the probe
ALLOWED_ERROR_NARROW = 2e-2  # bf16 and fp16 round the gradient


@functools.cache
def unsupported_reason(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why the kernel cannot serve tensors of this device, or None; found by comparing it with PyTorch."""
    if triton is None:
        return "Triton is not installed"
    if device.type != "cuda":
        return f"Triton runs on CUDA GPUs, not on {device.type}"
    try:
        error = probe(device, dtype)
    except Exception as problem:  # whatever a compiler raises is its reason, and is shown
        return f"its probe raised {type(problem).__name__}: {str(problem).partition(chr(10))[0]}"
    allowed = ALLOWED_ERROR_FP32 if dtype == torch.float32 else ALLOWED_ERROR_NARROW
    return None if error < allowed else f"its probe is wrong by {error:.1e}"


def probe(device: torch.device, dtype: torch.dtype) -> float:
    """Largest error of loss and gradient on 3 rows of 70 logits, relative to PyTorch's."""
    source = torch.Generator().manual_seed(0)
    logits_NV = (20 * torch.randn(3, 70, generator=source)).to(device, dtype)
    targets_N = torch.tensor([69, -1, 5], device=device)
    with torch.inference_mode(False), torch.enable_grad():
        exact_NV = logits_NV.detach().float().requires_grad_()
        capped_NV = 15.0 * torch.tanh(exact_NV / 15.0)
        oracle_N = torch.nn.functional.cross_entropy(capped_NV, targets_N, ignore_index=-1, reduction="none")
        (gradient_NV,) = torch.autograd.grad(oracle_N.sum(), exact_NV)
    found_NV = logits_NV.detach().clone()
    nll_N = in_place(found_NV, targets_N, 15.0, True)
    loss_error = (nll_N - oracle_N).abs().max() / oracle_N.max()
    return float((loss_error + (found_NV - gradient_NV).abs().max()).detach())


def in_place(logits_NV: Tensor, targets_N: Tensor, softcap: float, wants_gradient: bool) -> Tensor:
    """nll (N,) fp32 of softcap * tanh(logits / softcap); the logits become d nll / d logits if wanted.

    Both are 0 where the target is -1 and NaN where it is below -1 or beyond the vocabulary: a check on the
    host would synchronise, and a NaN loss is noticed. Nothing outside the tensors is read or written.
    """
    N, V = logits_NV.shape
    nll_N = torch.empty(N, device=logits_NV.device, dtype=torch.float32)
    block = min(BLOCK, triton.next_power_of_2(V))
    _kernel[(N,)](
        logits_NV, targets_N, nll_N, logits_NV.stride(0), V, softcap, wants_gradient, block, num_warps=8
    )
    return nll_N


if triton is not None:

    @triton.jit
    def _kernel(
        logits, targets, nll, stride, vocab, CAP: tl.constexpr, WANTS: tl.constexpr, BLOCK: tl.constexpr
    ):  # fmt: skip
        row = tl.program_id(0).to(tl.int64)
        logits += row * stride
        y = tl.load(targets + row)

        # A wrong target is not read; it shows in the loss as NaN.
        is_known = (y >= 0) & (y < vocab)
        no_loss = tl.where(y == -1, 0.0, float("nan"))
        own = tl.load(logits + y, mask=is_known, other=0.0).to(tl.float32)
        own_s = 1.0 / (1.0 + tl.exp(own * (-2.0 / CAP)))

        # First pass: the sum of exp(2 cap s), without the factor e^cap, which cancels.
        lanes = tl.arange(0, BLOCK)
        sums = tl.zeros((BLOCK,), dtype=tl.float32)
        for start in range(0, vocab, BLOCK):
            inside = start + lanes < vocab
            z = tl.load(logits + start + lanes, mask=inside, other=0.0).to(tl.float32)
            s = 1.0 / (1.0 + tl.exp(z * (-2.0 / CAP)))
            sums += tl.where(inside, tl.exp(2.0 * CAP * (s - 0.5)), 0.0)
        total = tl.sum(sums, axis=0)
        loss = tl.log(total) - 2.0 * CAP * (own_s - 0.5)
        tl.store(nll + row, tl.where(is_known, loss, no_loss))

        # Second pass: (softmax - onehot) times the derivative of the capped logit.
        if WANTS:
            for start in range(0, vocab, BLOCK):
                at = start + lanes
                inside = at < vocab
                z = tl.load(logits + at, mask=inside, other=0.0).to(tl.float32)
                s = 1.0 / (1.0 + tl.exp(z * (-2.0 / CAP)))
                p = tl.exp(2.0 * CAP * (s - 0.5)) / total - tl.where(at == y, 1.0, 0.0)
                d = tl.where(is_known, 4.0 * p * s * (1.0 - s), no_loss)
                tl.store(logits + at, d.to(logits.dtype.element_ty), mask=inside)
