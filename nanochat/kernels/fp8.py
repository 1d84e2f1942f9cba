"""Linear layers in 8-bit floating point: a scale per tensor, e4m3 forward, e5m2 gradients (arXiv 2209.05433).

    fp8.convert(model)      # before training; evaluation stays in the compute dtype

A tensor is stored as round(x * f / amax) with f = 448 (e4m3) or 57,344 (e5m2). Products are summed in fp32
and multiplied by amax_x amax_w / f^2. Weights are quantised once per optimizer step (kernels.linear), inputs
and gradients at each product. torch._scaled_mm runs the products on GPUs from sm_89 on; elsewhere the same
rounding is emulated, slowly, for tests. It pays from about depth 20.

Letters: N tokens; I and O sizes of a layer; M, K, N of a product.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from nanochat.errors import UserError

FORWARD = torch.float8_e4m3fn
BACKWARD = torch.float8_e5m2
MULTIPLE = 16  # _scaled_mm takes only sizes that it divides
SMALLEST = 128  # smaller layers gain nothing


def unsupported_reason(device: torch.device) -> str | None:
    """Why fp8 products do not run in hardware on this device, or None; found by running one."""
    if device.type != "cuda":
        return f"{device.type} has no fp8 products"
    major, minor = torch.cuda.get_device_capability(device)
    if (major, minor) < (8, 9):
        return f"sm_{major}{minor} has no fp8 unit (sm_89 does)"
    try:
        one = torch.eye(32, device=device)
        product = _product(*quantize(one, FORWARD), *quantize(one, FORWARD), torch.bfloat16, True)
        return None if torch.equal(product.float(), one) else "the probe's product was wrong"
    except RuntimeError as error:
        return f"the probe raised: {str(error).splitlines()[0]}"


def quantize(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(x in 8 bits, fp32 scale that gives it back): the largest entry becomes the dtype's largest."""
    largest = torch.finfo(dtype).max
    scale = largest / x.detach().abs().amax().float().clamp(min=1e-12)
    return (x.float() * scale).clamp(-largest, largest).to(dtype), 1 / scale


def linear(x: Tensor, weight: Tensor, w8_OI: Tensor, w_scale: Tensor) -> Tensor:
    """x (..., I) @ weight (O, I)^T through quantize(weight, FORWARD); the gradient goes to `weight`."""
    y_NO = Float8Linear.apply(x.reshape(-1, x.shape[-1]), weight, w8_OI, w_scale)
    return y_NO.view(*x.shape[:-1], -1)


class Float8Linear(torch.autograd.Function):
    """x W^T of 8-bit factors; so are both products of the backward pass."""

    @staticmethod
    def forward(ctx: Any, x_NI: Tensor, weight_OI: Tensor, w8_OI: Tensor, w_scale: Tensor) -> Tensor:
        x8_NI, x_scale = quantize(x_NI, FORWARD)
        ctx.save_for_backward(x8_NI, x_scale, w8_OI, w_scale)
        ctx.dtype = x_NI.dtype
        ctx.weight_dtype = weight_OI.dtype
        return _product(x8_NI, x_scale, w8_OI, w_scale, x_NI.dtype, True)

    @staticmethod
    def backward(ctx: Any, grad_NO: Tensor) -> tuple[Tensor | None, ...]:
        x8_NI, x_scale, w8_OI, w_scale = ctx.saved_tensors
        g8_NO, g_scale = quantize(grad_NO, BACKWARD)
        dx_NI = _product(g8_NO, g_scale, w8_OI.T.contiguous(), w_scale, ctx.dtype, False)
        dw_OI = _product(g8_NO.T.contiguous(), g_scale, x8_NI.T.contiguous(), x_scale, ctx.dtype, False)
        return dx_NI, dw_OI.to(ctx.weight_dtype), None, None


def _product(
    a_MK: Tensor, a_scale: Tensor, b_NK: Tensor, b_scale: Tensor, out: torch.dtype, fast: bool
) -> Tensor:
    """a @ b^T of 8-bit tensors, (M, N) in `out`; `fast` keeps fewer bits while summing (forward only)."""
    if a_MK.device.type != "cuda":
        return ((a_MK.float() @ b_NK.float().T) * (a_scale * b_scale)).to(out)
    # The number of tokens need not divide by 16: zeros fill up, and the extra rows of y are dropped.
    M, K = a_MK.shape
    if M % MULTIPLE or K % MULTIPLE:
        a_MK = _pad(a_MK, -M % MULTIPLE, -K % MULTIPLE)
        b_NK = _pad(b_NK, 0, -K % MULTIPLE)
    y_MN = torch._scaled_mm(
        a_MK, b_NK.T, scale_a=a_scale, scale_b=b_scale, out_dtype=out, use_fast_accum=fast
    )
    return y_MN[:M]


def _pad(x: Tensor, rows: int, columns: int) -> Tensor:
    padded = x.new_zeros(x.shape[0] + rows, x.shape[1] + columns)
    padded[: x.shape[0], : x.shape[1]] = x
    return padded


def supports(linear: nn.Linear) -> bool:
    """Whether both sizes of a layer are large enough and divide by 16."""
    sizes = linear.weight.shape
    return min(sizes) >= SMALLEST and not any(size % MULTIPLE for size in sizes)


def convert(model: nn.Module, *, emulate: bool = False) -> int:
    """Let every supported Linear of the blocks train in fp8 (the head stays); returns how many.

    emulate: also where no hardware does it, rounding as it would. Else UserError with the reason.
    """
    reason = unsupported_reason(next(model.parameters()).device)
    if reason is not None and not emulate:
        raise UserError(f"fp8 training cannot run here: {reason}", "leave fp8 out; bfloat16 is the default")
    num_converted = 0
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and name.startswith("transformer.h") and supports(module):
            module.is_float8 = True  # type: ignore[assignment]  # read by kernels.linear.Linear
            num_converted += 1
    return num_converted
