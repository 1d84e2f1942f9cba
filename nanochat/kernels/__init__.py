"""Faster versions of the network's mathematics, each checked against the plain PyTorch lines.

gpt.py asks here in two places: `block` for one layer, `weighted_nll` for the loss. They answer None where the
plain lines shall run: inside `disabled()`, and a layer under torch.compile, which fuses the plain lines.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from torch import Tensor

from nanochat.kernels import build, loss
from nanochat.kernels.layer import fused_block
from nanochat.kernels.linear import Linear

if TYPE_CHECKING:
    from nanochat.context import LayerContext
    from nanochat.gpt import Block

_is_enabled = True


@contextmanager
def disabled() -> Iterator[None]:
    """Inside, forward and backward passes take the plain lines: the oracle, and the rival of benchmarks."""
    global _is_enabled
    before = _is_enabled, build._override
    _is_enabled = build._override = False
    try:
        yield
    finally:
        _is_enabled, build._override = before


def block(
    layer: Block,
    x_BTD: Tensor,
    x0_BTD: Tensor,
    resid_lambda: Tensor,
    x0_lambda: Tensor,
    value_embed_BTC: Tensor | None,
    context: LayerContext,
) -> Tensor | None:
    """gpt.Block.forward for these arguments, or None."""
    if not _is_enabled:
        return None
    return fused_block(layer, x_BTD, x0_BTD, resid_lambda, x0_lambda, value_embed_BTC, context)


def weighted_nll(
    hidden: Tensor, head: Linear, targets: Tensor, weights: Tensor, vocab_size: int, softcap: float
) -> Tensor | None:
    """sum(weights * nll) of the targets that are not -1 without holding all logits, or None.

    hidden (..., D); targets, weights (...).
    """
    if not _is_enabled:
        return None
    (head_cast_VD,) = head.cast(hidden.dtype)
    return loss.weighted_nll(hidden, head.weight, targets, weights, vocab_size, softcap, head_cast_VD)
