"""Where the tokens of one forward pass stand, and what they attend to.

The network of nanochat.gpt is the same in training, in scoring and in generation; only the context differs:
whole rows (`row_context`), tokens behind a KV cache (`cache_context`), or the engine's sequences.
Letters: as in gpt.py.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from nanochat.flash_attention import flash_attn

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]  # q_BTHE, k_BTKE, v_BTKE -> y_BTHE


@dataclass(frozen=True)
class LayerContext:
    """What one layer is told about its tokens: the RoPE tables (..., 1, E/2) and how they attend."""

    cos: Tensor
    sin: Tensor
    attend: Attend


@dataclass(frozen=True)
class Context:
    """Where the tokens of one forward pass stand: in rows, behind a KV cache, or in the engine's sequences.

    Args:
        positions: (T,) or (B, T), the place of each token in its sequence, for RoPE.
        attention: (layer, window) -> the causal attention of that layer, of type Attend.
        prev_ids_BT: the token before each token, -1 where there is none. None: the row itself holds them.
        is_first_BT: for rows that hold several documents, True where a document starts.
    """

    positions: Tensor
    attention: Callable[[int, int], Attend]
    prev_ids_BT: Tensor | None = None
    is_first_BT: Tensor | None = None

    def previous_ids(self, ids_BT: Tensor) -> Tensor:
        """The token before each token; -1 where there is none."""
        if self.prev_ids_BT is not None:
            return self.prev_ids_BT
        prev_BT = F.pad(ids_BT[:, :-1], (1, 0), value=-1)
        return prev_BT if self.is_first_BT is None else prev_BT.masked_fill(self.is_first_BT, -1)

    def previous_token(self, x_BTD: Tensor, embed: Callable[[Tensor], Tensor]) -> Tensor:
        """The embedding of the token before each token, 0 where there is none. x_BTD: those of the tokens."""
        if self.prev_ids_BT is not None:
            has_none_BT = self.prev_ids_BT < 0
            return embed(self.prev_ids_BT.clamp(min=0)).masked_fill(has_none_BT.unsqueeze(-1), 0)
        # A shift by one position saves the second look-up.
        prev_BTD = F.pad(x_BTD[:, :-1], (0, 0, 1, 0))
        return (
            prev_BTD if self.is_first_BT is None else prev_BTD.masked_fill(self.is_first_BT.unsqueeze(-1), 0)
        )


def row_attention(q: Tensor, k: Tensor, v: Tensor, *, window: int, doc_start_BT: Tensor | None) -> Tensor:
    """Attention inside rows: causal, `window` keys to the left (-1: all), and inside each document."""
    return flash_attn.flash_attn_func(q, k, v, causal=True, window_size=(window, 0), doc_start=doc_start_BT)


def row_context(num_tokens: int, device: torch.device, doc_start_BT: Tensor | None = None) -> Context:
    """The context of whole rows of num_tokens: training, and scoring without a cache.

    doc_start_BT (B, T) int32: where in the row the document of each token starts.
    """
    positions_T = torch.arange(num_tokens, device=device)
    is_first_BT = None if doc_start_BT is None else positions_T == doc_start_BT

    def attention(layer: int, window: int) -> Attend:
        visible = -1 if window >= num_tokens else window
        return partial(row_attention, window=visible, doc_start_BT=doc_start_BT)

    return Context(positions_T, attention, is_first_BT=is_first_BT)


def cache_context(ids_BT: Tensor, cache: Any, sequence_len: int) -> Context:
    """The context of tokens that continue the rows of a nanochat.engine.KVCache, which takes them in."""
    positions_BT = cache.cache_seqlens.unsqueeze(1) + torch.arange(ids_BT.shape[1], device=ids_BT.device)
    prev_BT = torch.cat((cache.prev_ids.unsqueeze(1), ids_BT[:, :-1]), dim=1)

    def attention(layer: int, window: int) -> Attend:
        keys, values = cache.get_layer_cache(layer)
        visible = -1 if window >= sequence_len else window

        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return flash_attn.flash_attn_with_kvcache(
                q,
                keys,
                values,
                k=k,
                v=v,
                cache_seqlens=cache.cache_seqlens,
                causal=True,
                window_size=(visible, 0),
            )

        return attend

    return Context(positions_BT, attention, prev_ids_BT=prev_BT)
