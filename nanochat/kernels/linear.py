"""Matrix products with fp32 master weights: cast (or quantised) once per change of a weight, not once per
use.

Letters: I and O sizes of a layer, ... any leading axes.
"""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nanochat.kernels import build as native
from nanochat.kernels import fp8, matmul
from nanochat.kernels.elementwise import relu_squared


class Linear(nn.Linear):
    """Without bias; the fp32 master weight is cast to the activations' dtype once per change, not per use."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__(in_features, out_features, bias=False)
        self.is_float8 = False  # nanochat.kernels.fp8.convert sets it
        self._kept: tuple[Any, ...] = ()

    def forward(self, x: Tensor) -> Tensor:
        if self.is_float8 and self.training:
            return fp8.linear(x, self.weight, *self.cast(fp8.FORWARD))
        if x.dtype == self.weight.dtype:
            return F.linear(x, self.weight)
        return CastLinear.apply(x, None, self.weight, self.cast(x.dtype)[0])

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
    """plus + x (..., I) @ cast^T, for each cast (O, I) of a weight, which gets the gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, plus: Tensor | None, *weights_and_casts: Tensor) -> Any:
        count = len(weights_and_casts) // 2
        weights, casts = weights_and_casts[:count], weights_and_casts[count:]
        ctx.save_for_backward(x, *casts)
        ctx.dtype, ctx.has_plus = weights[0].dtype, plus is not None
        made = tuple(_product(x, cast, plus) for cast in casts)
        return made if len(made) > 1 else made[0]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (x, *casts), count = ctx.saved_tensors, len(grads)
        dx, wants = None, ctx.needs_input_grad
        if wants[0]:
            for grad, cast in zip(grads, casts, strict=True):
                dx = _gradient_of_input(grad, cast, dx)
        d_weights = [
            _gradient_of_weight(grad, x, ctx.dtype) if wanted else None
            for grad, wanted in zip(grads, wants[2 : 2 + count], strict=True)
        ]
        return dx, grads[0] if ctx.has_plus else None, *d_weights, *[None] * count


def _product(x: Tensor, cast: Tensor, plus: Tensor | None) -> Tensor:
    if matmul.is_fast(x, cast):
        return matmul.forward(x, cast, plus)
    y = F.linear(x, cast)
    return y if plus is None else plus + y


def _gradient_of_input(grad: Tensor, cast: Tensor, add_to: Tensor | None = None) -> Tensor:
    if matmul.is_fast(grad, cast):
        return matmul.gradient_of_input(grad, cast, add_to)
    dx = grad @ cast
    return dx if add_to is None else add_to.add_(dx)


def _gradient_of_weight(grad: Tensor, x: Tensor, dtype: torch.dtype) -> Tensor:
    if matmul.is_fast(grad, x):
        return matmul.gradient_of_weight(grad, x).to(dtype)
    return (grad.reshape(-1, grad.shape[-1]).T @ x.reshape(-1, x.shape[-1])).to(dtype)


def _fused_casts(x: Tensor, *layers: Linear) -> list[Tensor] | None:
    """The weights in the dtype of x if these layers can be one node: all plain, and matmul.c serves them."""
    if torch.compiler.is_compiling() or not matmul.is_fast(x):
        return None
    if any(type(layer) is not Linear or layer.is_float8 or layer.weight.dtype == x.dtype for layer in layers):
        return None
    casts = [layer.cast(x.dtype)[0] for layer in layers]
    is_even = all(len(cast) % 2 == 0 for cast in casts)  # a gradient is summed over the outputs
    return casts if is_even and matmul.is_fast(*casts) else None


def linears(x: Tensor, *layers: Linear) -> tuple[Tensor, ...]:
    """Several layers of one input; as one node the parts of its gradient are summed on the way."""
    casts = _fused_casts(x, *layers)
    if casts is None:
        return tuple(layer(x) for layer in layers)
    return cast("tuple[Tensor, ...]", CastLinear.apply(x, None, *(layer.weight for layer in layers), *casts))


def linear_plus(x: Tensor, layer: Linear, plus: Tensor) -> Tensor:
    """plus + layer(x), rounded once where it is made as one."""
    casts = _fused_casts(x, layer)
    return plus + layer(x) if casts is None else CastLinear.apply(x, plus, layer.weight, *casts)


def mlp_plus(x: Tensor, inner: Linear, outer: Linear, plus: Tensor) -> Tensor:
    """plus + outer(relu(inner(x))^2); as one node squares and their gradient are made with the products."""
    casts = _fused_casts(x, inner, outer)
    if casts is None:
        return plus + outer(relu_squared(inner(x)))
    return CastMLP.apply(x, plus, inner.weight, casts[0], outer.weight, casts[1])


class CastMLP(torch.autograd.Function):
    """plus + relu(x @ a^T)^2 @ b^T for casts a (H, I), b (O, H) of two weights; keeps x and the squares."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, plus: Tensor, inner: Tensor, a: Tensor, outer: Tensor, b: Tensor
    ) -> Tensor:
        squares = matmul.forward(x, a, is_squared=True)
        ctx.save_for_backward(x, a, squares, b)
        ctx.dtypes = inner.dtype, outer.dtype
        return matmul.forward(squares, b, plus)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, a, squares, b = ctx.saved_tensors
        dy, (wants_x, _, wants_a, _, wants_b, _) = grad.contiguous(), ctx.needs_input_grad
        d_outer = _gradient_of_weight(dy, squares, ctx.dtypes[1]) if wants_b else None
        if not wants_x and not wants_a:
            return None, grad, None, None, d_outer, None
        d_inside = matmul.gradient_of_input(dy, b, squared=squares)
        dx = matmul.gradient_of_input(d_inside, a) if wants_x else None
        d_inner = _gradient_of_weight(d_inside, x, ctx.dtypes[0]) if wants_a else None
        return dx, grad, d_inner, None, d_outer, None


class Embedding(nn.Embedding):
    def reset_parameters(self) -> None:
        """Left to GPT.init_weights; torch's own, on meta, imports its compiler for a second."""

    def rows(self, ids: Tensor, dtype: torch.dtype) -> Tensor:
        """The rows of ids (...) -> (..., D) in `dtype`; on a CPU cast while they are read."""
        is_cast = dtype == torch.bfloat16 and self.weight.dtype == torch.float32 and native.ready(self.weight)
        if is_cast and ids.numel() and ids.min() >= 0 and ids.max() < self.num_embeddings:
            return CastEmbedding.apply(ids.long().contiguous(), self.weight)
        return cast("Tensor", self(ids).to(dtype))


class CastEmbedding(torch.autograd.Function):
    """Rows of an fp32 table (V, D) in bf16, by kernels.c; gradients of a row are summed in fp32, in order."""

    @staticmethod
    def forward(ctx: Any, ids: Tensor, table_VD: Tensor) -> Tensor:
        ctx.save_for_backward(ids)
        ctx.shape = table_VD.shape
        y = torch.empty(*ids.shape, table_VD.shape[1], dtype=torch.bfloat16)
        native.call("embedding_forward", table_VD, ids, y, ids.numel(), table_VD.shape[1])
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor]:
        (ids,) = ctx.saved_tensors
        d_table = torch.empty(ctx.shape, dtype=torch.float32)
        native.call("embedding_backward", grad.contiguous(), ids, d_table, ids.numel(), *ctx.shape)
        return None, d_table
