"""Which keys a query sees: always an interval, be it for causality, windows, documents or cache lengths.

Query t of row b sees the keys s with low[b, t] <= s <= high[b, t]. Queries are aligned with the end of the
keys ("lower right"), as decoding needs it: the last query stands at the position of the last key.

Letters: B rows, T queries, S keys.
"""

from __future__ import annotations

import torch
from torch import Tensor

Limit = int | None  # how many positions back (left) or ahead (right) a query sees; None = no limit
Docs = Tensor | None  # doc_start_BT: keys before it are not seen


def intervals(
    num_queries: int, lengths_B: Tensor, left: Limit, right: Limit, doc_start_BT: Docs = None
) -> tuple[Tensor, Tensor]:
    """(low_BT, high_BT), both inclusive; lengths_B counts the keys of each row."""
    end_B1 = lengths_B.long()[:, None]
    position_BT = end_B1 - num_queries + torch.arange(num_queries, device=lengths_B.device)
    low_BT = torch.zeros_like(position_BT) if left is None else (position_BT - left).clamp(min=0)
    high_BT = (end_B1 - 1).expand_as(position_BT)
    if right is not None:
        high_BT = torch.minimum(high_BT, position_BT + right)
    if doc_start_BT is not None:
        low_BT = torch.maximum(low_BT, doc_start_BT.long())
    return low_BT, high_BT


def keep(low_BT: Tensor, high_BT: Tensor, start: int, stop: int) -> Tensor:
    """Boolean mask (B, 1, T, stop - start) over the keys start .. stop; True = may attend, as in SDPA."""
    keys_S = torch.arange(start, stop, device=low_BT.device)
    return ((keys_S >= low_BT[..., None]) & (keys_S <= high_BT[..., None])).unsqueeze(1)
