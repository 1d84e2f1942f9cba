"""Softcapped cross entropy on a GPU: raw logits in, their gradient out in the same memory, one Triton
program a row.

Reads a row twice and writes it once; fp32 inside, bf16, fp16 or fp32 outside. kernels.c holds the same
function for
CPUs, with the formulas. Under TRITON_INTERPRET=1 it runs on a CPU, slowly, for tests. Imported where it is
used; without Triton `why_not` says so.
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

BLOCK = 4096


@functools.cache
def why_not(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why the kernel cannot serve tensors of this device, or None; found by comparing it with PyTorch."""
    if triton is None:
        return "Triton is not installed"
    if device.type != "cuda":
        return f"Triton runs on CUDA GPUs, not on {device.type}"
    try:
        error = probe(device, dtype)
    except Exception as problem:  # whatever a compiler raises is its reason, and is shown
        return f"its probe raised {type(problem).__name__}: {str(problem).partition(chr(10))[0]}"
    return (
        None if error < (1e-5 if dtype == torch.float32 else 2e-2) else f"its probe is wrong by {error:.1e}"
    )


def probe(device: torch.device, dtype: torch.dtype) -> float:
    """Largest error of loss and gradient on 3 rows of 70 logits, relative to PyTorch's."""
    source = torch.Generator().manual_seed(0)
    logits = (20 * torch.randn(3, 70, generator=source)).to(device, dtype)
    targets = torch.tensor([69, -1, 5], device=device)
    with torch.inference_mode(False), torch.enable_grad():
        exact = logits.detach().float().requires_grad_()
        capped = 15.0 * torch.tanh(exact / 15.0)
        oracle = torch.nn.functional.cross_entropy(capped, targets, ignore_index=-1, reduction="none")
        (gradient,) = torch.autograd.grad(oracle.sum(), exact)
    ours = logits.detach().clone()
    nll = in_place(ours, targets, 15.0, True)
    return float(((nll - oracle).abs().max() / oracle.max() + (ours - gradient).abs().max()).detach())


def in_place(logits_NV: Tensor, targets_N: Tensor, cap: float, wants_gradient: bool) -> Tensor:
    """nll (N,) fp32 of cap tanh(logits / cap); logits become d nll / d logits.

    Both are 0 where the target is -1 and NaN where it is below -1 or beyond the vocabulary: a check on the
    host would synchronise, and a NaN loss is noticed. Nothing outside the tensors is read or written.
    """
    rows, vocab = logits_NV.shape
    nll_N = torch.empty(rows, device=logits_NV.device, dtype=torch.float32)
    block = min(BLOCK, triton.next_power_of_2(vocab))
    _kernel[(rows,)](
        logits_NV, targets_N, nll_N, logits_NV.stride(0), vocab, cap, wants_gradient, block, num_warps=8
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
        is_known = (y >= 0) & (y < vocab)
        no_loss = tl.where(y == -1, 0.0, float("nan"))  # a wrong target is not read, and shows in the loss
        own = tl.load(logits + y, mask=is_known, other=0.0).to(tl.float32)
        own_s = 1.0 / (1.0 + tl.exp(own * (-2.0 / CAP)))
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
        if WANTS:
            for start in range(0, vocab, BLOCK):
                at = start + lanes
                inside = at < vocab
                z = tl.load(logits + at, mask=inside, other=0.0).to(tl.float32)
                s = 1.0 / (1.0 + tl.exp(z * (-2.0 / CAP)))
                p = tl.exp(2.0 * CAP * (s - 0.5)) / total - tl.where(at == y, 1.0, 0.0)
                d = tl.where(is_known, 4.0 * p * s * (1.0 - s), no_loss)
                tl.store(logits + at, d.to(logits.dtype.element_ty), mask=inside)
