"""A hashed table of token pairs: what the last two tokens say together, added to the stream at the input.

Letters: R rows of the table, D width, ... any leading axes. Off unless GPTConfig.bigram_rows is set; what it
gives and costs is in docs/log.md.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from nanochat.kernels.linear import Embedding

PRIME = 2**31 - 1
FACTORS = (1_640_531_513, 805_459_861)  # (FACTORS . pair) mod PRIME: one of a universal family of hashes


def slots(ids: Tensor, prev: Tensor, rows: int) -> Tensor:
    """The row of each pair (prev, ids), int64, in [0, rows); `prev` of -1 is taken as 0."""
    pair = prev.clamp(min=0) * FACTORS[0] + ids * FACTORS[1]
    return pair % PRIME % rows


def previous(ids_BT: Tensor, is_first_BT: Tensor | None = None) -> Tensor:
    """The token before each one in its row, -1 for the first column and where is_first_BT is set."""
    prev_BT = F.pad(ids_BT[:, :-1], (1, 0), value=-1)
    return prev_BT if is_first_BT is None else prev_BT.masked_fill(is_first_BT, -1)


class BigramEmbedding(Embedding):
    """A table (R, D) that begins at 0. forward(ids, prev) (...) -> (..., D) fp32, 0 where prev is -1."""

    def forward(self, ids: Tensor, prev: Tensor) -> Tensor:  # type: ignore[override]
        return look_up(ids, prev, self.weight)


def look_up(ids: Tensor, prev: Tensor, table_RD: Tensor) -> Tensor:
    found = F.embedding(slots(ids, prev, len(table_RD)), table_RD)
    return torch.where((prev < 0).unsqueeze(-1), 0.0, found)
