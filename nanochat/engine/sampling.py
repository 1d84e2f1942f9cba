"""From logits to a token: pure functions, no state, no generator.

A draw uses one uniform number hashed from (seed, position of the token), so neither the batch a row is in nor
the order of the steps can change it. Rows whose settings differ are filtered apart, so that the arithmetic of
a row does not depend on its neighbours either. Letters: B rows, V vocabulary, N candidates left by a filter.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

_MASK64 = (1 << 64) - 1


@dataclass(frozen=True)
class Sampling:
    """How one sequence draws its tokens; raises ValueError for settings outside their ranges.

    temperature 0 takes the likeliest token; top_k None or 0 and top_p 1 and min_p 0 keep every token; tokens
    in `banned` are never drawn.
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int = 42
    banned: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise ValueError(f"temperature must be a finite number of at least 0, got {self.temperature}")
        if self.top_k is not None and self.top_k < 0:
            raise ValueError(f"top_k must be at least 0 (0 or None: no limit), got {self.top_k}")
        for name, value in (("top_p", self.top_p), ("min_p", self.min_p)):
            if not 0 <= value <= 1:
                raise ValueError(f"{name} must lie between 0 and 1, got {value}")


def uniform(seed: int, position: int) -> float:
    """A number in [0, 1) that depends on its arguments alone, with 24 random bits (exact in float32).

    Two rounds of the SplitMix64 finalizer (Steele, Lea and Flood 2014) over seed and position.
    """
    mixed = _mix((_mix(seed & _MASK64) + position * 0x9E3779B97F4A7C15) & _MASK64)
    return (mixed >> 40) * 2.0**-24


def _mix(x: int) -> int:
    x = (x + 0x9E3779B97F4A7C15) & _MASK64
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _MASK64
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _MASK64
    return x ^ (x >> 31)


def sample(logits_BV: torch.Tensor, settings: Sequence[Sampling], positions: Sequence[int]) -> list[int]:
    """One token per row; positions[b] is the index that row b's new token will have in its sequence."""
    groups: dict[tuple, list[int]] = {}
    for row, s in enumerate(settings):
        groups.setdefault((s.temperature, s.top_k, s.top_p, s.min_p, s.banned), []).append(row)
    tokens = [0] * len(settings)
    for (temperature, top_k, top_p, min_p, banned), rows in groups.items():
        part_BV = logits_BV if len(rows) == len(settings) else logits_BV[rows]
        if banned:
            banned_ids = torch.tensor(banned, device=part_BV.device)
            part_BV = part_BV.index_fill(1, banned_ids, -math.inf)
        if temperature == 0:
            chosen_B = part_BV.argmax(dim=1)
        else:
            draws_B = torch.tensor([uniform(settings[r].seed, positions[r]) for r in rows])
            chosen_B = draw(part_BV, draws_B.to(part_BV.device), temperature, top_k, top_p, min_p)
        for row, token in zip(rows, chosen_B.tolist(), strict=True):
            tokens[row] = token
    return tokens


def draw(
    logits_BV: torch.Tensor,
    uniforms_B: torch.Tensor,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float = 1.0,
    min_p: float = 0.0,
) -> torch.Tensor:
    """Token ids (B,) drawn by inverting the cumulative distribution: temperature, top-k, top-p, min-p, in
    this order.

    top-p keeps the likeliest tokens up to and including the one that reaches top_p; min-p keeps those at
    least min_p times as likely as the likeliest. The likeliest token always stays.
    """
    ids_BN = None
    if top_k and top_k < logits_BV.size(1):
        logits_BN, ids_BN = logits_BV.float().topk(top_k, dim=1)  # sorted, the largest first
    elif top_p < 1:
        logits_BN, ids_BN = logits_BV.float().sort(dim=1, descending=True)
    else:
        logits_BN = logits_BV.float()
    best_B1 = logits_BN[:, :1] if ids_BN is not None else logits_BN.amax(dim=1, keepdim=True)
    # Subtracting first keeps the largest at 0 for any temperature, however small.
    probs_BN = ((logits_BN - best_B1) / temperature).softmax(dim=1)
    if top_p < 1:
        before_BN = probs_BN.cumsum(dim=1) - probs_BN
        probs_BN = probs_BN.masked_fill(before_BN >= max(top_p, 1e-9), 0.0)
    if min_p > 0:
        probs_BN = probs_BN.masked_fill(probs_BN < min_p * probs_BN.amax(dim=1, keepdim=True), 0.0)
    cdf_BN = probs_BN.cumsum(dim=1)
    total_B = cdf_BN[:, -1]
    # Strictly below the total, the first entry above the threshold has a probability above zero.
    threshold_B = torch.minimum(uniforms_B * total_B, torch.nextafter(total_B, torch.zeros_like(total_B)))
    index_B = torch.searchsorted(cdf_BN, threshold_B[:, None], right=True)[:, 0].clamp(max=cdf_BN.size(1) - 1)
    return index_B if ids_BN is None else ids_BN.gather(1, index_B[:, None])[:, 0]
