"""From logits to a token: pure functions, no state, no generator.

A draw uses one uniform number hashed from (seed, position of the token), so neither the batch a row is in nor
the order of the steps can change it. Rows whose settings differ are filtered apart, so that the arithmetic of
a row does not depend on its neighbours either. Letters: B rows, V vocabulary, N candidates left by a filter.
"""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch

from nanochat.splitmix import MASK64, splitmix64


@dataclass(frozen=True)
class Sampling:
    """How one sequence draws its tokens; raises ValueError for settings outside their ranges.

    temperature 0 takes the likeliest token; top_k None or 0 and top_p 1 and min_p 0 keep every token; tokens
    in `banned` are never drawn. logit_bias {id: nats} is added to the logits. repetition_penalty r divides
    the positive logits of tokens that occur in prompt or output by r and multiplies the negative ones;
    presence_penalty is taken once, frequency_penalty as often as it occurs, from each token of the output.
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int = 42
    banned: tuple[int, ...] = ()
    logit_bias: Mapping[int, float] = field(default_factory=dict, hash=False)
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0

    def __post_init__(self) -> None:
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise ValueError(f"temperature must be a finite number of at least 0, got {self.temperature}")
        if self.top_k is not None and self.top_k < 0:
            raise ValueError(f"top_k must be at least 0 (0 or None: no limit), got {self.top_k}")
        for name, value in (("top_p", self.top_p), ("min_p", self.min_p)):
            if not 0 <= value <= 1:
                raise ValueError(f"{name} must lie between 0 and 1, got {value}")
        if not 0 < self.repetition_penalty < math.inf:
            raise ValueError(f"repetition_penalty must be finite and above 0, got {self.repetition_penalty}")
        for name in ("presence_penalty", "frequency_penalty"):
            if not math.isfinite(getattr(self, name)):
                raise ValueError(f"{name} must be finite, got {getattr(self, name)}")
        if not all(math.isfinite(bias) for bias in self.logit_bias.values()):
            raise ValueError("logit_bias must hold finite numbers")

    @property
    def has_penalties(self) -> bool:
        return (self.repetition_penalty, self.presence_penalty, self.frequency_penalty) != (1.0, 0.0, 0.0)


def uniform(seed: int, position: int) -> float:
    """A number in [0, 1) that depends on its arguments alone, with 24 random bits (exact in float32).

    Two rounds of SplitMix64 over seed and position.
    """
    mixed = splitmix64(splitmix64(seed & MASK64) + position * 0x9E3779B97F4A7C15)
    return (mixed >> 40) * 2.0**-24


History = tuple[Sequence[int], Sequence[int]]  # ids of the prompt, ids of the output


def sample(
    logits_BV: torch.Tensor,
    settings: Sequence[Sampling],
    positions: Sequence[int],
    histories: Sequence[History] | None = None,
    bans: Sequence[Sequence[int]] | None = None,
) -> list[int]:
    """One token per row; positions[b] is the index that row b's new token will have in its sequence.

    histories are needed by rows with penalties; bans[b] are ids that row b must not draw this time.
    """
    rows_BV = list[torch.Tensor]()
    for row, s in enumerate(settings):
        banned = (*s.banned, *(bans[row] if bans else ()))
        if banned or s.logit_bias or s.has_penalties:
            rows_BV = rows_BV or list(logits_BV.unbind())
            rows_BV[row] = adjust(rows_BV[row], s, histories[row] if histories else ((), ()), banned)
    if rows_BV:
        logits_BV = torch.stack(rows_BV)
    return Draws(settings, positions, 1, logits_BV.device)(logits_BV, 0).tolist()  # the host waits here


class Draws:
    """The next `steps` draws of each row, made ready: a call reads nothing from the device and copies nothing
    to it. Rows with the same settings are drawn together. vocab: of logits whose biases and bans are applied
    here; 0 where the caller has done it. Penalties depend on what was drawn and are the caller's.
    """

    def __init__(
        self,
        settings: Sequence[Sampling],
        positions: Sequence[int],
        steps: int,
        device: torch.device,
        vocab: int = 0,
    ) -> None:
        biases = [
            (r, i, x) for r, s in enumerate(settings) for i, x in s.logit_bias.items() if 0 <= i < vocab
        ]
        bans = [(r, i) for r, s in enumerate(settings) for i in s.banned if 0 <= i < vocab]
        self._biases_2N = torch.tensor([pair[:2] for pair in biases], device=device).t()
        self._values_N = torch.tensor([value for *_, value in biases], device=device)
        self._bans_2N = torch.tensor(bans, device=device).t()
        groups: dict[tuple, list[int]] = {}
        for row, s in enumerate(settings):
            groups.setdefault((s.temperature, s.top_k, s.top_p, s.min_p), []).append(row)
        self._parts: list[tuple[tuple, torch.Tensor | None, torch.Tensor | None]] = []
        for how, rows in groups.items():
            index_N = None if len(groups) == 1 else torch.tensor(rows, device=device)
            draws_SN = None
            if how[0] > 0:
                numbers = [[uniform(settings[r].seed, positions[r] + s) for r in rows] for s in range(steps)]
                draws_SN = torch.tensor(numbers, device=device)
            self._parts.append((how, index_N, draws_SN))

    def __call__(self, logits_BV: torch.Tensor, step: int) -> torch.Tensor:
        """Token ids (B,) of step 0, 1, ..."""
        if self._biases_2N.numel() or self._bans_2N.numel():
            logits_BV = logits_BV.float().clone()
        if self._biases_2N.numel():
            logits_BV[self._biases_2N[0], self._biases_2N[1]] += self._values_N
        if self._bans_2N.numel():
            logits_BV[self._bans_2N[0], self._bans_2N[1]] = -math.inf
        found_B = torch.empty(len(logits_BV), dtype=torch.int64, device=logits_BV.device)
        for (temperature, top_k, top_p, min_p), index_N, draws_SN in self._parts:
            part_NV = logits_BV if index_N is None else logits_BV[index_N]
            if draws_SN is None:
                ids_N = part_NV.argmax(dim=1)
            else:
                ids_N = draw(part_NV, draws_SN[step], temperature, top_k, top_p, min_p)
            if index_N is None:
                return ids_N
            found_B[index_N] = ids_N
        return found_B


def adjust(logits_V: torch.Tensor, s: Sampling, history: History, banned: Sequence[int] = ()) -> torch.Tensor:
    """A row's logits after logit_bias, repetition, presence and frequency penalties and bans, in this order.

    Ids outside the vocabulary are ignored.
    """
    logits_V = logits_V.float().clone()
    vocab = logits_V.numel()

    def index(ids: Sequence[int]) -> torch.Tensor:
        return torch.tensor(ids, dtype=torch.int64, device=logits_V.device)

    if bias := {i: value for i, value in s.logit_bias.items() if 0 <= i < vocab}:
        logits_V[index(list(bias))] += torch.tensor(list(bias.values()), device=logits_V.device)
    prompt, output = history
    if s.repetition_penalty != 1.0 and (seen := {*prompt, *output}):
        ids_N = index(sorted(seen))
        values_N = logits_V[ids_N]
        logits_V[ids_N] = torch.where(
            values_N > 0, values_N / s.repetition_penalty, values_N * s.repetition_penalty
        )
    if (s.presence_penalty or s.frequency_penalty) and (counts := Counter(output)):
        penalties = [s.presence_penalty + s.frequency_penalty * count for count in counts.values()]
        logits_V[index(list(counts))] -= torch.tensor(penalties, device=logits_V.device)
    if inside := [i for i in banned if 0 <= i < vocab]:
        logits_V[index(inside)] = -math.inf
    return logits_V


def top_logprobs(
    logits_NV: torch.Tensor, tokens: Sequence[int], counts: Sequence[int]
) -> list[tuple[float, list[tuple[int, float]]]]:
    """For each row: the log-probability of its token, and its counts[n] likeliest (id, log-probability).

    Of the raw logits, in nats; the likeliest first, so that a token equals the maximum iff it is one.
    """
    logprobs_NV = logits_NV.float().log_softmax(dim=1)
    tokens_N1 = torch.tensor(tokens, device=logits_NV.device)[:, None]
    own = logprobs_NV.gather(1, tokens_N1)[:, 0].tolist()
    values_NK, ids_NK = logprobs_NV.topk(min(max(counts, default=0), logits_NV.size(1)), dim=1)
    likeliest = zip(ids_NK.tolist(), values_NK.tolist(), strict=True)
    return [
        (mine, list(zip(ids[:count], values[:count], strict=True)))
        for mine, (ids, values), count in zip(own, likeliest, counts, strict=True)
    ]


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
