"""Linear layers and embeddings with fp32 weights that compute in the dtype of the activations.

Weights are fp32; a bf16 (or fp8) copy is cached and refreshed after each optimizer step.
Letters: I and O sizes of a layer, V rows and D width of a table, ... any leading axes.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nanochat.kernels import build, fp8, matmul


class Linear(nn.Linear):
    """y = x W^T without a bias, in the dtype of x; the gradient of the weight is fp32."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__(in_features, out_features, bias=False)
        self.is_float8 = False  # nanochat.kernels.fp8.convert sets it
        self._cast_key: tuple[Any, ...] | None = None
        self._cast_weight: tuple[Tensor, ...] = ()

    def forward(self, x: Tensor) -> Tensor:
        if self.is_float8 and self.training:
            return fp8.linear(x, self.weight, *self.cast(fp8.FORWARD))
        if x.dtype == self.weight.dtype:
            return F.linear(x, self.weight)
        return CastLinear.apply(x, None, self.weight, self.cast(x.dtype)[0])

    def train(self, mode: bool = True) -> Linear:
        self._cast_key = None
        return super().train(mode)

    def cast(self, dtype: torch.dtype) -> tuple[Tensor, ...]:
        """(the weight in `dtype`,), for 8 bits (weight, scale); cached until the weight changes."""
        weight = self.weight
        if torch.compiler.is_compiling() or weight.is_inference():
            return self._make_cast(dtype)
        key = weight._version, weight.data_ptr(), dtype, weight.device
        # torch's fused optimizers change a weight without a new version. The first forward pass of a step,
        # when there is no gradient yet, therefore always casts.
        begins_step = (
            weight.grad is None and weight.requires_grad and self.training and torch.is_grad_enabled()
        )
        if begins_step or self._cast_key != key:
            with torch.inference_mode(False), torch.no_grad():
                self._cast_weight = self._make_cast(dtype)
            self._cast_key = key
        return self._cast_weight

    def _make_cast(self, dtype: torch.dtype) -> tuple[Tensor, ...]:
        if dtype == fp8.FORWARD:
            return fp8.quantize(self.weight, dtype)
        return (self.weight.detach().to(dtype),)

    def reset_parameters(self) -> None:
        """Left to GPT.init_weights."""


class CastLinear(torch.autograd.Function):
    """plus + x (..., I) @ cast^T, for each cast (O, I) of a weight, which gets the gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, plus: Tensor | None, *weights_and_casts: Tensor) -> Any:
        num_layers = len(weights_and_casts) // 2
        casts = weights_and_casts[num_layers:]
        ctx.save_for_backward(x, *casts)
        ctx.weight_dtype = weights_and_casts[0].dtype
        ctx.has_plus = plus is not None
        products = tuple(_product(x, cast_OI, plus) for cast_OI in casts)
        return products if num_layers > 1 else products[0]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, *casts = ctx.saved_tensors
        wants_x, _, *wants_weights = ctx.needs_input_grad[: 2 + len(casts)]
        d_x = None
        if wants_x:
            for grad, cast_OI in zip(grads, casts, strict=True):
                d_x = _gradient_of_input(grad, cast_OI, add_to=d_x)
        d_weights = [
            gradient_of_weight(grad, x, ctx.weight_dtype) if is_wanted else None
            for grad, is_wanted in zip(grads, wants_weights, strict=True)
        ]
        d_plus = grads[0] if ctx.has_plus else None
        return d_x, d_plus, *d_weights, *[None] * len(casts)


def _product(x: Tensor, cast_OI: Tensor, plus: Tensor | None) -> Tensor:
    if matmul.is_fast(x, cast_OI):
        return matmul.forward(x, cast_OI, plus)
    y = F.linear(x, cast_OI)
    return y if plus is None else plus + y


def _gradient_of_input(grad: Tensor, cast_OI: Tensor, add_to: Tensor | None) -> Tensor:
    if matmul.is_fast(grad, cast_OI):
        return matmul.gradient_of_input(grad, cast_OI, add_to)
    d_x = grad @ cast_OI
    return d_x if add_to is None else add_to.add_(d_x)


def gradient_of_weight(grad: Tensor, x: Tensor, dtype: torch.dtype) -> Tensor:
    """grad (..., O)^T @ x (..., I) -> (O, I) in `dtype`."""
    if matmul.is_fast(grad, x):
        return matmul.gradient_of_weight(grad, x).to(dtype)
    return (grad.flatten(0, -2).T @ x.flatten(0, -2)).to(dtype)


class Embedding(nn.Embedding):
    """A table (V, D) of fp32 rows. Raises IndexError for ids outside 0 .. V - 1 (on a CPU)."""

    def forward(self, ids: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """ids (...) -> (..., D) in `dtype`."""
        # On a CPU rows are rounded to bf16 while they are read.
        is_cast = dtype == torch.bfloat16 and self.weight.dtype == torch.float32
        if is_cast and ids.numel() and build.ready(self.weight):
            build.check_indices("token ids", ids, 0, self.num_embeddings)
            return CastEmbedding.apply(ids.long().contiguous(), self.weight)
        return super().forward(ids).to(dtype)

    def reset_parameters(self) -> None:
        """Left to GPT.init_weights; torch's own, on meta, imports its compiler for a second."""


class CastEmbedding(torch.autograd.Function):
    """Rows of an fp32 table (V, D) in bf16; the gradients of a row are summed in fp32, in order."""

    @staticmethod
    def forward(ctx: Any, ids: Tensor, table_VD: Tensor) -> Tensor:
        ctx.save_for_backward(ids)
        ctx.table_shape = table_VD.shape
        D = table_VD.shape[1]
        y = torch.empty(*ids.shape, D, dtype=torch.bfloat16)
        build.call("embedding_forward", table_VD, ids, y, ids.numel(), D)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor]:
        (ids,) = ctx.saved_tensors
        d_table_VD = torch.empty(ctx.table_shape, dtype=torch.float32)
        build.call("embedding_backward", grad.contiguous(), ids, d_table_VD, ids.numel(), *ctx.table_shape)
        return None, d_table_VD
