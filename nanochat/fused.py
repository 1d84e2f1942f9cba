"""The elementwise chains of the network with hand-written gradients: fewer passes over memory.

On a CPU half of an eager step goes into such chains. Each function here equals the plain expression in its
docstring (tests compare values and gradients in fp64). Letters: E head size, ... any leading axes.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

NORM_EPS = 2.0**-23
ROPE_BASE = 100_000.0


def norm(x: Tensor) -> Tensor:
    """x / sqrt(mean(x^2) + 2^-23) over the last axis (RMSNorm, arXiv 1910.07467), in at least fp32."""
    return Norm.apply(x)


def rope_tables(positions: Tensor, head_dim: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """cos and sin, (..., 1, E/2), of positions (...), in `dtype` from angles in fp32 (arXiv 2104.09864)."""
    exponents = torch.arange(0, head_dim, 2, device=positions.device, dtype=torch.float32) / head_dim
    angles = positions.float().unsqueeze(-1) / ROPE_BASE**exponents
    return angles.cos().unsqueeze(-2).to(dtype), angles.sin().unsqueeze(-2).to(dtype)


def rotate_norm(x: Tensor, cos: Tensor, sin: Tensor, scale: float) -> Tensor:
    """scale * norm(rotate(x)): RoPE by halves, then QK-norm; cos and sin (..., E/2) broadcast."""
    return RotateNorm.apply(x, cos, sin, scale)


def relu_squared(x: Tensor) -> Tensor:
    """relu(x)^2 (Primer, arXiv 2109.08668); keeps only relu(x)."""
    return ReluSquared.apply(x)


def mix(x: Tensor, x0: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """a * x + b * x0 with learnt scalars a, b (0-dim, fp32)."""
    return Mix.apply(x, x0, a, b)


def inverse_rms(x: Tensor) -> Tensor:
    """1 / sqrt(mean(x^2) + 2^-23) over the last axis, kept as size 1; fp32 for narrower types."""
    wide = torch.float32 if x.dtype in (torch.bfloat16, torch.float16) else x.dtype
    size = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=wide)
    return size.square_().div_(x.shape[-1]).add_(NORM_EPS).rsqrt_()


def _norm_backward(grad: Tensor, y: Tensor, inverse: Tensor) -> Tensor:
    """Gradient of x from that of y = x * inverse_rms(x): inverse * (grad - y * mean(grad * y))."""
    along = (grad * y).mean(-1, keepdim=True)
    return torch.addcmul(grad, y, along, value=-1).mul_(inverse.to(grad.dtype))


def _rotate(x: Tensor, cos: Tensor, sin: Tensor, direction: int) -> Tensor:
    """Both halves of the last axis turned by the angles (direction 1) or back (-1)."""
    half = x.shape[-1] // 2
    x1, x2 = x[..., :half], x[..., half:]
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    torch.mul(x1, cos, out=out[..., :half])
    torch.mul(x2, cos, out=out[..., half:])
    out[..., :half].addcmul_(x2, sin, value=direction)
    out[..., half:].addcmul_(x1, sin, value=-direction)
    return out


class Norm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        inverse = inverse_rms(x)
        y = x * inverse.to(x.dtype)
        ctx.save_for_backward(y, inverse)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        y, inverse = ctx.saved_tensors
        return _norm_backward(grad, y, inverse)


class RotateNorm(torch.autograd.Function):
    """A rotation keeps the length, so the norm is taken before it and applied after."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor, scale: float) -> Tensor:
        inverse = inverse_rms(x)
        y = _rotate(x, cos, sin, 1).mul_((scale * inverse).to(x.dtype))
        ctx.save_for_backward(y, inverse, cos, sin)
        ctx.scale = scale
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        y, inverse, cos, sin = ctx.saved_tensors
        along = (grad * y).mean(-1, keepdim=True).div_(ctx.scale**2)
        turned = torch.addcmul(grad, y, along, value=-1).mul_((ctx.scale * inverse).to(grad.dtype))
        return _rotate(turned, cos, sin, -1), None, None, None


class ReluSquared(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        kept = x.clamp(min=0)
        ctx.save_for_backward(kept)
        return kept * kept

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (kept,) = ctx.saved_tensors
        return (grad * kept).mul_(2)


class Mix(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, x0: Tensor, a: Tensor, b: Tensor) -> Tensor:
        ctx.save_for_backward(x, x0, a, b)
        return torch.addcmul(x * a.to(x.dtype), x0, b.to(x.dtype))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
        x, x0, a, b = ctx.saved_tensors
        return (
            grad * a.to(grad.dtype),
            grad * b.to(grad.dtype),
            _dot(grad, x).to(a.dtype),
            _dot(grad, x0).to(b.dtype),
        )


def _dot(x: Tensor, y: Tensor) -> Tensor:
    """sum(x * y), accumulated in at least fp32."""
    if x.dtype in (torch.float32, torch.float64) and x.device.type == "cpu":
        return torch.dot(x.reshape(-1), y.reshape(-1))
    return (x * y).sum(dtype=torch.float32)
