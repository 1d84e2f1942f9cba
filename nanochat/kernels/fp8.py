"""Linear layers in 8-bit floating point: one scale a tensor, e4m3 forward, e5m2 gradients (arXiv 2209.05433).

    fp8.convert(model)      # before training; evaluation stays in the compute dtype

q = round(x * f / amax), f = 448 (e4m3) or 57,344 (e5m2), product in fp32, times amax_x amax_w / f^2.
Weights are
quantised once per optimizer step (gpt.Linear), inputs and gradients at each product. Products run in
torch._scaled_mm on
GPUs from sm_89; elsewhere the same rounding is emulated, which is exact and slow, for tests. Pays from
about depth 20. Letters: N tokens, I and O sizes of a layer.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from nanochat.errors import UserError

FORWARD, BACKWARD = torch.float8_e4m3fn, torch.float8_e5m2
MULTIPLE, SMALLEST = 16, 128  # of a layer's sizes: what _scaled_mm takes, and what pays


def why_not(device: torch.device) -> str | None:
    """Why fp8 products do not run in hardware on this device, or None; found by running one."""
    if device.type != "cuda":
        return f"{device.type} has no fp8 products"
    capability = torch.cuda.get_device_capability(device)
    if capability < (8, 9):
        return f"sm_{capability[0]}{capability[1]} has no fp8 unit (sm_89 does)"
    try:
        one = torch.eye(32, device=device)
        product = _product(*quantize(one, FORWARD), *quantize(one, FORWARD), torch.bfloat16, True)
        return None if torch.equal(product.float(), one) else "the probe's product was wrong"
    except RuntimeError as error:
        return f"the probe raised: {str(error).splitlines()[0]}"


def quantize(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(x in 8 bits, fp32 scale that gives it back): the largest entry becomes the dtype's largest."""
    amax = x.detach().abs().amax().float().clamp(min=1e-12)
    scale = torch.finfo(dtype).max / amax
    return (x.float() * scale).clamp(-torch.finfo(dtype).max, torch.finfo(dtype).max).to(dtype), 1 / scale


def linear(x: Tensor, weight: Tensor, w8_OI: Tensor, w_scale: Tensor) -> Tensor:
    """x (..., I) @ weight (O, I)^T through quantize(weight, FORWARD); the gradient goes to `weight`."""
    y_NO = Float8Linear.apply(x.reshape(-1, x.shape[-1]), weight, w8_OI, w_scale)
    return y_NO.view(*x.shape[:-1], -1)


class Float8Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_NI: Tensor, weight_OI: Tensor, w8_OI: Tensor, w_scale: Tensor) -> Tensor:
        x8_NI, x_scale = quantize(x_NI, FORWARD)
        ctx.save_for_backward(x8_NI, x_scale, w8_OI, w_scale)
        ctx.dtype, ctx.weight_dtype = x_NI.dtype, weight_OI.dtype
        return _product(x8_NI, x_scale, w8_OI, w_scale, x_NI.dtype, True)

    @staticmethod
    def backward(ctx: Any, grad_NO: Tensor) -> tuple[Tensor | None, ...]:
        x8_NI, x_scale, w8_OI, w_scale = ctx.saved_tensors
        g8_NO, g_scale = quantize(grad_NO, BACKWARD)
        dx = _product(g8_NO, g_scale, w8_OI.T.contiguous(), w_scale, ctx.dtype, False)
        dw = _product(g8_NO.T.contiguous(), g_scale, x8_NI.T.contiguous(), x_scale, ctx.dtype, False)
        return dx, dw.to(ctx.weight_dtype), None, None


def _product(
    a_MK: Tensor, a_scale: Tensor, b_NK: Tensor, b_scale: Tensor, out: torch.dtype, fast: bool
) -> Tensor:
    """a @ b^T of 8-bit tensors, (M, N) in `out`; `fast` keeps fewer bits while summing (forward only)."""
    if a_MK.device.type != "cuda":
        return ((a_MK.float() @ b_NK.float().T) * (a_scale * b_scale)).to(out)
    pad = -len(a_MK) % MULTIPLE  # rows of tokens need not divide by 16
    if pad or a_MK.shape[1] % MULTIPLE:
        wide = -a_MK.shape[1] % MULTIPLE
        a_MK, b_NK = (_padded(t, rows, wide) for t, rows in ((a_MK, pad), (b_NK, 0)))
    y = torch._scaled_mm(a_MK, b_NK.T, scale_a=a_scale, scale_b=b_scale, out_dtype=out, use_fast_accum=fast)
    return y[: len(y) - pad]


def _padded(x: Tensor, rows: int, columns: int) -> Tensor:
    out = x.new_zeros(x.shape[0] + rows, x.shape[1] + columns)
    out[: x.shape[0], : x.shape[1]] = x
    return out


def suits(linear: nn.Linear) -> bool:
    sizes = linear.weight.shape
    return min(sizes) >= SMALLEST and not any(size % MULTIPLE for size in sizes)


def convert(model: nn.Module, *, emulate: bool = False) -> int:
    """Let every suitable Linear of the blocks train in fp8 (the head stays); how many. UserError with the
    reason.

    emulate: also where no hardware does it, rounding as it would.
    """
    reason = why_not(next(model.parameters()).device)
    if reason is not None and not emulate:
        raise UserError(f"fp8 training cannot run here: {reason}", "leave fp8 out; bfloat16 is the default")
    chosen = [
        module for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and name.startswith("transformer.h") and suits(module)
    ]  # fmt: skip
    for module in chosen:
        module.is_float8 = True  # type: ignore[assignment]  # read by gpt.Linear
    return len(chosen)
