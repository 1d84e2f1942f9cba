"""A whole layer of the network without a compiler: the lines of gpt.Block with fewer passes over memory.

In eager mode half of a training step goes into operations that only move memory, and autograd keeps every
intermediate result. Here each elementwise chain is one function with a hand-written gradient that keeps only
its output: on a CPU one pass of C. Where bf16 products run in matmul.c, what follows a product is done before
its result leaves the cache. Letters: as in gpt.py.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from nanochat.kernels import matmul
from nanochat.kernels.elementwise import mix, norm, relu_squared, rotate_norm
from nanochat.kernels.linear import CastLinear, Linear, gradient_of_weight

if TYPE_CHECKING:
    from nanochat.context import LayerContext
    from nanochat.gpt import Block


def fused_block(
    block: Block,
    x_BTD: Tensor,
    x0_BTD: Tensor,
    resid_lambda: Tensor,
    x0_lambda: Tensor,
    value_embed_BTC: Tensor | None,
    context: LayerContext,
) -> Tensor | None:
    """gpt.Block.forward in eager mode; None where gpt.py's lines must run.

    That is under torch.compile, which fuses them itself, and in an experiment (GPTConfig.has_kernels).
    """
    if torch.compiler.is_compiling() or not block.attn.config.has_kernels:
        return None
    attn, mlp = block.attn, block.mlp
    B, T, D = x_BTD.shape
    E = attn.config.head_dim

    x_BTD = mix(x_BTD, x0_BTD, resid_lambda, x0_lambda)
    normed_BTD = norm(x_BTD)
    q_BTD, k_BTC, v_BTC = linears(normed_BTD, attn.c_q, attn.c_k, attn.c_v)
    v_BTKE = v_BTC.view(B, T, -1, E)
    if attn.ve_gate is not None and value_embed_BTC is not None:
        gate_BTK = 3 * torch.sigmoid(attn.ve_gate(normed_BTD[..., : attn.config.ve_gate_channels]))
        v_BTKE = torch.addcmul(v_BTKE, gate_BTK.unsqueeze(-1), value_embed_BTC.view_as(v_BTKE))
    q_BTHE = rotate_norm(q_BTD.view(B, T, -1, E), context.cos, context.sin, attn.config.qk_scale)
    k_BTKE = rotate_norm(k_BTC.view(B, T, -1, E), context.cos, context.sin, attn.config.qk_scale)
    y_BTHE = context.attend(q_BTHE, k_BTKE, v_BTKE)
    x_BTD = linear_plus(y_BTHE.reshape(B, T, D), attn.c_proj, x_BTD)
    return mlp_plus(norm(x_BTD), mlp.c_fc, mlp.c_proj, x_BTD)


def linears(x: Tensor, *layers: Linear) -> tuple[Tensor, ...]:
    """Several layers of one input; as one node the parts of its gradient are summed on the way."""
    casts = _casts_for_one_node(x, *layers)
    if casts is None:
        return tuple(layer(x) for layer in layers)
    weights = [layer.weight for layer in layers]
    return cast("tuple[Tensor, ...]", CastLinear.apply(x, None, *weights, *casts))


def linear_plus(x: Tensor, layer: Linear, plus: Tensor) -> Tensor:
    """plus + layer(x); as one node the sum is rounded once."""
    casts = _casts_for_one_node(x, layer)
    if casts is None:
        return plus + layer(x)
    return CastLinear.apply(x, plus, layer.weight, *casts)


def mlp_plus(x: Tensor, inner: Linear, outer: Linear, plus: Tensor) -> Tensor:
    """plus + outer(relu(inner(x))^2); as one node squares and their gradient are made with the products."""
    casts = _casts_for_one_node(x, inner, outer)
    if casts is None:
        return plus + outer(relu_squared(inner(x)))
    return CastMLP.apply(x, plus, inner.weight, casts[0], outer.weight, casts[1])


def _casts_for_one_node(x: Tensor, *layers: Linear) -> list[Tensor] | None:
    """The weights in the dtype of x, if matmul.c serves all of these layers; else None."""
    if not matmul.is_fast(x):
        return None
    # Subclasses (adapters, inference layers), fp8 and fp32 layers compute something else than x W^T in bf16.
    if any(type(layer) is not Linear or layer.is_float8 or layer.weight.dtype == x.dtype for layer in layers):
        return None
    casts = [layer.cast(x.dtype)[0] for layer in layers]
    # The gradient of the input is a sum over the outputs, and matmul.c sums over even axes only.
    is_even = all(len(cast_OI) % 2 == 0 for cast_OI in casts)
    return casts if is_even and matmul.is_fast(*casts) else None


class CastMLP(torch.autograd.Function):
    """plus + relu(x @ a^T)^2 @ b^T for casts a (H, I), b (O, H) of two weights; keeps x and the squares."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, plus: Tensor, inner: Tensor, a_HI: Tensor, outer: Tensor, b_OH: Tensor
    ) -> Tensor:
        squares = matmul.forward(x, a_HI, is_squared=True)
        ctx.save_for_backward(x, a_HI, squares, b_OH)
        ctx.inner_dtype = inner.dtype
        ctx.outer_dtype = outer.dtype
        return matmul.forward(squares, b_OH, plus)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, a_HI, squares, b_OH = ctx.saved_tensors
        wants_x, _, wants_inner, _, wants_outer, _ = ctx.needs_input_grad
        dy = grad.contiguous()
        d_x = d_inner = d_outer = None
        if wants_outer:
            d_outer = gradient_of_weight(dy, squares, ctx.outer_dtype)
        if wants_x or wants_inner:
            # The gradient before the square: that of the squares times 2 relu(.), which is 2 sqrt(squares).
            d_inside = matmul.gradient_of_input(dy, b_OH, squared=squares)
            if wants_x:
                d_x = matmul.gradient_of_input(d_inside, a_HI)
            if wants_inner:
                d_inner = gradient_of_weight(d_inside, x, ctx.inner_dtype)
        return d_x, grad, d_inner, None, d_outer, None
