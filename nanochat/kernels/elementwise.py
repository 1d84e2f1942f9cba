"""The elementwise chains of a layer with hand-written gradients, for eager mode.

In eager mode on a CPU half of a step only moves memory, and autograd keeps every intermediate result. Each
function here states its plain PyTorch line; it computes the same in one pass and keeps only its output for
the backward pass. On a CPU with a C compiler a pass is one call of elementwise.c; else PyTorch's operations
run. Tests compare both with the plain line in fp64, values and gradients.

Letters: T time, E head size; R rows of D values; ... any leading axes.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from nanochat.kernels import build

NORM_EPS = 2.0**-23


def norm(x: Tensor) -> Tensor:
    """RMSNorm without a weight, over the last axis, in at least fp32 (arXiv 1910.07467).

    Plain: x * (x.square().mean(-1, keepdim=True) + NORM_EPS).rsqrt()
    """
    return Norm.apply(x)


def rotate_norm(x: Tensor, cos: Tensor, sin: Tensor, scale: float) -> Tensor:
    """RoPE by halves, then QK norm: x (..., E), cos and sin (..., E/2) broadcast against it.

    Plain: x1, x2 = x.chunk(2, -1)
           scale * norm(torch.cat((x1 * cos + x2 * sin, x2 * cos - x1 * sin), -1))
    """
    return RotateNorm.apply(x, cos, sin, scale)


def relu_squared(x: Tensor) -> Tensor:
    """Squared ReLU (Primer, arXiv 2109.08668).

    Plain: x.relu().square()
    """
    return ReluSquared.apply(x)


def mix(x: Tensor, x0: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """Sum of two equal shapes with learnt scalars a and b (0-dim, fp32).

    Plain: a * x + b * x0
    """
    return Mix.apply(x, x0, a, b)


class Norm(torch.autograd.Function):
    """With y = x * inverse, dx = inverse * (grad - y * mean(grad * y))."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        if build.ready(x):
            y = torch.empty_like(x)
            inverse = x.new_empty((*x.shape[:-1], 1), dtype=torch.float32)
            build.call("norm_forward", x, y, inverse, *_shape_RD(x), NORM_EPS, build.is_bf16(x))
        else:
            inverse = _inverse_rms(x)
            y = x * inverse.to(x.dtype)
        ctx.save_for_backward(y, inverse)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        y, inverse = ctx.saved_tensors
        if not build.ready(grad, y):
            mean = (grad * y).mean(-1, keepdim=True)
            return torch.addcmul(grad, y, mean, value=-1).mul_(inverse.to(grad.dtype))
        dx = torch.empty_like(y)
        build.call("norm_backward", grad, y, inverse, dx, *_shape_RD(y), build.is_bf16(y))
        return dx


class RotateNorm(torch.autograd.Function):
    """A rotation keeps the length: the norm is taken before it; backward, its gradient is rotated back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor, scale: float) -> Tensor:
        # elementwise.c takes (B, T, H, E) and tables (T, 1, E/2), the same for all rows of a batch.
        E = x.shape[-1]
        has_tables = x.dim() == 4 and cos.shape == sin.shape == (x.shape[1], 1, E // 2)
        ctx.in_c = has_tables and build.ready(x)
        ctx.scale = scale
        if ctx.in_c:
            y = torch.empty_like(x)
            inverse = x.new_empty((*x.shape[:-1], 1), dtype=torch.float32)
            cos = cos.float().contiguous()
            sin = sin.float().contiguous()
            sizes = RotateNorm.sizes(x)
            build.call(
                "rotate_norm_forward", x, cos, sin, y, inverse, *sizes, scale, NORM_EPS, build.is_bf16(x)
            )
        else:
            inverse = _inverse_rms(x)
            y = _rotate(x, cos, sin).mul_((scale * inverse).to(x.dtype))
        ctx.save_for_backward(y, inverse, cos, sin)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        y, inverse, cos, sin = ctx.saved_tensors
        if not ctx.in_c:
            mean = (grad * y).mean(-1, keepdim=True).div_(ctx.scale**2)
            d_rotated = torch.addcmul(grad, y, mean, value=-1).mul_((ctx.scale * inverse).to(grad.dtype))
            return _rotate(d_rotated, cos, -sin), None, None, None
        dx = torch.empty_like(y)
        sizes = RotateNorm.sizes(y)
        build.call(
            "rotate_norm_backward",
            *(grad.contiguous(), y, inverse, cos, sin, dx),
            *(*sizes, ctx.scale, build.is_bf16(y)),
        )
        return dx, None, None, None

    @staticmethod
    def sizes(x_BTHE: Tensor) -> tuple[int, int, int, int]:
        """(number of heads in all, heads of a token, head size, tokens after which the angles repeat)."""
        B, T, H, E = x_BTHE.shape
        return B * T * H, H, E, T


class ReluSquared(torch.autograd.Function):
    """With y = relu(x)^2, dx = 2 grad relu(x), and relu(x) is the root of y."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        if build.ready(x):
            y = torch.empty_like(x)
            build.call("relu_squared_forward", x, y, *_shape_RD(x), build.is_bf16(x))
        else:
            y = x.clamp(min=0).square_()
        ctx.save_for_backward(y)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (y,) = ctx.saved_tensors
        if not build.ready(grad, y):
            return (y.sqrt() * grad).mul_(2)
        dx = torch.empty_like(y)
        build.call("relu_squared_backward", grad, y, dx, *_shape_RD(y), build.is_bf16(y))
        return dx


class Mix(torch.autograd.Function):
    """dx = a * grad, dx0 = b * grad, da = sum(grad * x), db = sum(grad * x0)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, x0: Tensor, a: Tensor, b: Tensor) -> Tensor:
        if x.shape != x0.shape:
            raise ValueError(f"mix needs equal shapes, found {tuple(x.shape)} and {tuple(x0.shape)}")
        ctx.save_for_backward(x, x0, a, b)
        if not build.ready(x, x0):
            return torch.addcmul(x * a.to(x.dtype), x0, b.to(x.dtype))
        y = torch.empty_like(x)
        build.call("mix_forward", x, x0, y, a.item(), b.item(), *_shape_RD(x), build.is_bf16(x))
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
        x, x0, a, b = ctx.saved_tensors
        in_c = build.ready(grad, x, x0)
        if in_c:
            dx = torch.empty_like(x)
            dx0 = torch.empty_like(x0)
            R, D = _shape_RD(x)
            dots_R2 = x.new_empty(R, 2, dtype=torch.float32)
            scalars = a.item(), b.item()
            build.call("mix_backward", grad, x, x0, dx, dx0, dots_R2, *scalars, R, D, build.is_bf16(x))
        else:
            dx = grad * a.to(grad.dtype)
            dx0 = grad * b.to(grad.dtype)
        if in_c and x.dtype != torch.float32:
            da, db = dots_R2.sum(0)
        else:
            # In fp32 these are often sums of noise, which AdamW scales up: the same rounding everywhere.
            da = _dot(grad, x)
            db = _dot(grad, x0)
        return dx, dx0, da.to(a.dtype), db.to(b.dtype)


def _shape_RD(x: Tensor) -> tuple[int, int]:
    """(number of rows, size of the last axis)."""
    return x.numel() // x.shape[-1], x.shape[-1]


def _inverse_rms(x: Tensor) -> Tensor:
    """1 / sqrt(mean(x^2) + NORM_EPS) over the last axis, kept as size 1; fp32 for narrower types."""
    wide = torch.float32 if x.dtype in (torch.bfloat16, torch.float16) else x.dtype
    length = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=wide)
    return length.square_().div_(x.shape[-1]).add_(NORM_EPS).rsqrt_()


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Elements j and j + E/2 turned by the j-th angle; with -sin, turned back."""
    half = x.shape[-1] // 2
    x1, x2 = x[..., :half], x[..., half:]
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    torch.mul(x1, cos, out=y[..., :half])
    torch.mul(x2, cos, out=y[..., half:])
    y[..., :half].addcmul_(x2, sin)
    y[..., half:].addcmul_(x1, sin, value=-1)
    return y


def _dot(x: Tensor, y: Tensor) -> Tensor:
    """sum(x * y), accumulated in at least fp32."""
    if x.dtype in (torch.float32, torch.float64) and x.device.type == "cpu":
        return torch.dot(x.reshape(-1), y.reshape(-1))
    return (x * y).sum(dtype=torch.float32)
