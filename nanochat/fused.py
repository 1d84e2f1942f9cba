"""The elementwise chains of the network with hand-written gradients: fewer passes over memory, same mathematics.

On a CPU half of an eager step goes into such chains. Each function here equals the plain expression in its
docstring (tests compare values and gradients in fp64). Letters: E head size, ... any leading axes.
"""

from __future__ import annotations

from typing import Any

import torch

NORM_EPS = 2.0**-23
ROPE_BASE = 100_000.0


def norm(x: torch.Tensor) -> torch.Tensor:
    """x / sqrt(mean(x^2) + 2^-23) over the last axis (RMSNorm, arXiv 1910.07467), statistics in at least fp32."""
    return Norm.apply(x)  # type: ignore[no-any-return]


def rope_tables(
    positions: torch.Tensor, head_dim: int, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin, (..., 1, E/2), of positions (...): angles in fp32, tables in `dtype` (RoFormer, arXiv 2104.09864)."""
    exponents = torch.arange(0, head_dim, 2, device=positions.device, dtype=torch.float32) / head_dim
    angles = positions.float().unsqueeze(-1) / ROPE_BASE**exponents
    return angles.cos().unsqueeze(-2).to(dtype), angles.sin().unsqueeze(-2).to(dtype)


def rotate_norm(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, scale: float) -> torch.Tensor:
    """scale * norm(rotate(x)): RoPE by halves (arXiv 2104.09864), then QK-norm; cos and sin (..., E/2) broadcast."""
    return RotateNorm.apply(x, cos, sin, scale)  # type: ignore[no-any-return]


def relu_squared(x: torch.Tensor) -> torch.Tensor:
    """relu(x)^2 (Primer, arXiv 2109.08668); keeps only relu(x)."""
    return ReluSquared.apply(x)  # type: ignore[no-any-return]


def mix(x: torch.Tensor, x0: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """a * x + b * x0 with learnt scalars a, b (0-dim, fp32)."""
    return Mix.apply(x, x0, a, b)  # type: ignore[no-any-return]


def inverse_rms(x: torch.Tensor) -> torch.Tensor:
    """1 / sqrt(mean(x^2) + 2^-23) over the last axis, kept as size 1; fp32 for narrower types."""
    wide = torch.float32 if x.dtype in (torch.bfloat16, torch.float16) else x.dtype
    size = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=wide)
    return size.square_().div_(x.shape[-1]).add_(NORM_EPS).rsqrt_()


def _norm_backward(grad: torch.Tensor, y: torch.Tensor, inverse: torch.Tensor) -> torch.Tensor:
    """Gradient of x from that of y = x * inverse_rms(x): inverse * (grad - y * mean(grad * y))."""
    along = (grad * y).mean(-1, keepdim=True)
    return torch.addcmul(grad, y, along, value=-1).mul_(inverse.to(grad.dtype))


def _rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, direction: int) -> torch.Tensor:
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
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        inverse = inverse_rms(x)
        y = x * inverse.to(x.dtype)
        ctx.save_for_backward(y, inverse)
        return y

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        y, inverse = ctx.saved_tensors
        return _norm_backward(grad, y, inverse)


class RotateNorm(torch.autograd.Function):
    """A rotation keeps the length, so the norm is taken before it and applied after."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, scale: float
    ) -> torch.Tensor:
        inverse = inverse_rms(x)
        y = _rotate(x, cos, sin, 1).mul_((scale * inverse).to(x.dtype))
        ctx.save_for_backward(y, inverse, cos, sin)
        ctx.scale = scale
        return y

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # type: ignore[override]
        y, inverse, cos, sin = ctx.saved_tensors
        along = (grad * y).mean(-1, keepdim=True).div_(ctx.scale**2)
        turned = torch.addcmul(grad, y, along, value=-1).mul_((ctx.scale * inverse).to(grad.dtype))
        return _rotate(turned, cos, sin, -1), None, None, None


class ReluSquared(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        kept = x.clamp(min=0)
        ctx.save_for_backward(kept)
        return kept * kept

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        (kept,) = ctx.saved_tensors
        return (grad * kept).mul_(2)


class Mix(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, x0: torch.Tensor, a: torch.Tensor, b: torch.Tensor
    ) -> torch.Tensor:
        ctx.save_for_backward(x, x0, a, b)
        return torch.addcmul(x * a.to(x.dtype), x0, b.to(x.dtype))

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, ...]:  # type: ignore[override]
        x, x0, a, b = ctx.saved_tensors
        return (
            grad * a.to(grad.dtype),
            grad * b.to(grad.dtype),
            _dot(grad, x).to(a.dtype),
            _dot(grad, x0).to(b.dtype),
        )


def _dot(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """sum(x * y), accumulated in at least fp32."""
    if x.dtype in (torch.float32, torch.float64) and x.device.type == "cpu":
        return torch.dot(x.reshape(-1), y.reshape(-1))
    return (x * y).sum(dtype=torch.float32)
