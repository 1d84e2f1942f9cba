"""Matrix products with fp32 master weights: cast (or quantised) once per change of a weight, not once per
use.

Letters: I and O sizes of a layer, ... any leading axes.
"""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nanochat import fp8


class Linear(nn.Linear):
    """Without bias; the fp32 master weight is cast to the activations' dtype once per change, not per use."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__(in_features, out_features, bias=False)
        self.is_float8 = False  # nanochat.fp8.convert sets it
        self._kept: tuple[Any, ...] = ()

    def forward(self, x: Tensor) -> Tensor:
        if self.is_float8 and self.training:
            return fp8.linear(x, self.weight, *self.cast(fp8.FORWARD))
        if x.dtype == self.weight.dtype:
            return F.linear(x, self.weight)
        return CastLinear.apply(x, self.weight, self.cast(x.dtype)[0])

    def train(self, mode: bool = True) -> Linear:
        self._kept = ()
        return super().train(mode)

    def cast(self, dtype: torch.dtype) -> tuple[Tensor, ...]:
        """(weight in `dtype`,), for 8 bits with its scale; made anew only after the weight has changed."""
        weight = self.weight
        if torch.compiler.is_compiling() or weight.is_inference():
            return self._cast(dtype)
        key = weight._version, weight.data_ptr(), dtype, weight.device
        # torch's fused optimizers leave the version as it is: a step that begins (no gradient yet) casts
        # anyway
        begins = weight.grad is None and weight.requires_grad and self.training and torch.is_grad_enabled()
        if begins or not self._kept or self._kept[0] != key:
            with torch.inference_mode(False), torch.no_grad():
                self._kept = key, self._cast(dtype)
        return cast("tuple[Tensor, ...]", self._kept[1])

    def _cast(self, dtype: torch.dtype) -> tuple[Tensor, ...]:
        if dtype == fp8.FORWARD:
            return fp8.quantize(self.weight, dtype)
        return (self.weight.detach().to(dtype),)

    def reset_parameters(self) -> None:
        """Left to GPT.init_weights."""


class CastLinear(torch.autograd.Function):
    """x (..., I) @ cast^T, where cast (O, I) is `weight` in the dtype of x; the gradient goes to `weight`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, cast: Tensor) -> Tensor:
        ctx.save_for_backward(x, cast)
        ctx.dtype = weight.dtype
        return F.linear(x, cast)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, cast = ctx.saved_tensors
        dx = grad @ cast if ctx.needs_input_grad[0] else None
        dw = None
        if ctx.needs_input_grad[1]:
            dw = (grad.reshape(-1, grad.shape[-1]).T @ x.reshape(-1, x.shape[-1])).to(ctx.dtype)
        return dx, dw, None


class Embedding(nn.Embedding):
    def reset_parameters(self) -> None:
        """Left to GPT.init_weights; torch's own, on meta, imports its compiler for a second."""
