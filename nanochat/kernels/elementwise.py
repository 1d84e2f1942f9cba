"""The elementwise chains of the network with hand-written gradients: fewer passes over memory.

On a CPU half of an eager step goes into such chains. Each function here equals the plain expression in its
docstring (tests compare values and gradients in fp64). On a CPU with a compiler each is one pass of kernels.c
(nanochat/kernels/build.py); the PyTorch lines serve everything else. Letters: E head size, ... any leading
axes.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from nanochat.kernels import build as native

NORM_EPS = 2.0**-23


def norm(x: Tensor) -> Tensor:
    """x / sqrt(mean(x^2) + 2^-23) over the last axis (RMSNorm, arXiv 1910.07467), in at least fp32."""
    if torch.compiler.is_compiling():  # a compiler fuses the plain lines, and derives their gradient
        return x * inverse_rms(x).to(x.dtype)
    return Norm.apply(x)


def rotate_norm(x: Tensor, cos: Tensor, sin: Tensor, scale: float) -> Tensor:
    """scale * norm(rotate(x)): RoPE by halves, then QK-norm; cos and sin (..., E/2) broadcast."""
    if torch.compiler.is_compiling():
        x1, x2 = x.chunk(2, -1)
        return torch.cat((x1 * cos + x2 * sin, x2 * cos - x1 * sin), -1) * (scale * inverse_rms(x)).to(
            x.dtype
        )
    return RotateNorm.apply(x, cos, sin, scale)


def relu_squared(x: Tensor) -> Tensor:
    """relu(x)^2 (Primer, arXiv 2109.08668); keeps only its output, whose root is relu(x)."""
    return x.clamp(min=0).square() if torch.compiler.is_compiling() else ReluSquared.apply(x)


def mix(x: Tensor, x0: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """a * x + b * x0 with learnt scalars a, b (0-dim, fp32)."""
    if torch.compiler.is_compiling():
        return a.to(x.dtype) * x + b.to(x.dtype) * x0
    return Mix.apply(x, x0, a, b)


def inverse_rms(x: Tensor) -> Tensor:
    """1 / sqrt(mean(x^2) + 2^-23) over the last axis, kept as size 1; fp32 for narrower types."""
    wide = torch.float32 if x.dtype in (torch.bfloat16, torch.float16) else x.dtype
    if torch.compiler.is_compiling():
        return (x.to(wide).square().mean(-1, keepdim=True) + NORM_EPS).rsqrt()
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


def _rows(x: Tensor) -> tuple[int, int]:
    """(rows, size of the last axis)."""
    return x.numel() // x.shape[-1], x.shape[-1]


class Norm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        if native.ready(x):
            y, inverse = torch.empty_like(x), x.new_empty((*x.shape[:-1], 1), dtype=torch.float32)
            native.call("norm_forward", x, y, inverse, *_rows(x), NORM_EPS, native.is_half(x))
        else:
            inverse = inverse_rms(x)
            y = x * inverse.to(x.dtype)
        ctx.save_for_backward(y, inverse)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        y, inverse = ctx.saved_tensors
        if not native.ready(grad, y):
            return _norm_backward(grad, y, inverse)
        dx = torch.empty_like(y)
        native.call("norm_backward", grad, y, inverse, dx, *_rows(y), native.is_half(y))
        return dx


class RotateNorm(torch.autograd.Function):
    """A rotation keeps the length, so the norm is taken before it and applied after."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor, scale: float) -> Tensor:
        # kernels.c wants (B, T, H, E) and fp32 tables (T, 1, E/2), the same for all rows
        ctx.table = None
        if cos.dim() == 3 and x.dim() == 4 and native.ready(x):
            y, inverse = torch.empty_like(x), x.new_empty((*x.shape[:-1], 1), dtype=torch.float32)
            cos, sin = cos.float().contiguous(), sin.float().contiguous()
            rows, size = _rows(x)
            ctx.table = x.shape[2], size, x.shape[1], scale
            native.call(
                "rotate_norm_forward", x, cos, sin, y, inverse, rows, *ctx.table, NORM_EPS, native.is_half(x)
            )
        else:
            inverse = inverse_rms(x)
            y = _rotate(x, cos, sin, 1).mul_((scale * inverse).to(x.dtype))
        ctx.save_for_backward(y, inverse, cos, sin)
        ctx.scale = scale
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        y, inverse, cos, sin = ctx.saved_tensors
        if ctx.table is not None:
            grad, dx = grad.contiguous(), torch.empty_like(y)
            native.call(
                "rotate_norm_backward",
                grad,
                y,
                inverse,
                cos,
                sin,
                dx,
                _rows(y)[0],
                *ctx.table,
                native.is_half(y),
            )
            return dx, None, None, None
        along = (grad * y).mean(-1, keepdim=True).div_(ctx.scale**2)
        turned = torch.addcmul(grad, y, along, value=-1).mul_((ctx.scale * inverse).to(grad.dtype))
        return _rotate(turned, cos, sin, -1), None, None, None


class ReluSquared(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        if native.ready(x):
            y = torch.empty_like(x)
            native.call("relu_squared_forward", x, y, *_rows(x), native.is_half(x))
        else:
            y = x.clamp(min=0).square_()
        ctx.save_for_backward(y)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (y,) = ctx.saved_tensors
        if not native.ready(grad, y):
            return (y.sqrt() * grad).mul_(2)
        dx = torch.empty_like(y)
        native.call("relu_squared_backward", grad, y, dx, *_rows(y), native.is_half(y))
        return dx


class Mix(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, x0: Tensor, a: Tensor, b: Tensor) -> Tensor:
        ctx.save_for_backward(x, x0, a, b)
        if not native.ready(x, x0):
            return torch.addcmul(x * a.to(x.dtype), x0, b.to(x.dtype))
        y = torch.empty_like(x)
        native.call("mix_forward", x, x0, y, a.item(), b.item(), *_rows(x), native.is_half(x))
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
        x, x0, a, b = ctx.saved_tensors
        if not native.ready(grad, x, x0):
            dots = _dot(grad, x).to(a.dtype), _dot(grad, x0).to(b.dtype)
            return grad * a.to(grad.dtype), grad * b.to(grad.dtype), *dots
        dx, dx0, (rows, size) = torch.empty_like(x), torch.empty_like(x0), _rows(x)
        dots_R2 = x.new_empty(rows, 2, dtype=torch.float32)
        scalars = a.item(), b.item()
        native.call("mix_backward", grad, x, x0, dx, dx0, dots_R2, *scalars, rows, size, native.is_half(x))
        if (
            x.dtype == torch.float32
        ):  # often a sum of noise that AdamW scales up: the same rounding everywhere
            return dx, dx0, _dot(grad, x).to(a.dtype), _dot(grad, x0).to(b.dtype)
        da, db = dots_R2.sum(0)
        return dx, dx0, da.to(a.dtype), db.to(b.dtype)


def _dot(x: Tensor, y: Tensor) -> Tensor:
    """sum(x * y), accumulated in at least fp32."""
    if x.dtype in (torch.float32, torch.float64) and x.device.type == "cpu":
        return torch.dot(x.reshape(-1), y.reshape(-1))
    return (x * y).sum(dtype=torch.float32)
