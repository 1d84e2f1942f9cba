"""Rows that begin alike, with the beginning computed once: [shared | branch | branch | ...].

The choices of a question stand behind the same few-shot examples. Computing each choice's whole row repeats
those; here they are one stretch of a row, and each choice is a branch that sees the stretch and itself. Every
token keeps the position and the token before it that it has in its own row, so the hidden states are the same
(score_endings of nanochat.eval.rows is the oracle). Rows that share nothing are their own stretch.

Letters: B trees, T time, S columns of the shared part, M columns of the branches, H query heads, K key/value
heads, E head size, D width, N scored tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import takewhile

import torch
import torch.nn.functional as F

from nanochat.context import Attend, Context
from nanochat.eval.rows import Row, Score, ending_scores
from nanochat.flash_attention import flash_attn
from nanochat.protocols import Model


@dataclass(frozen=True)
class Tree:
    """Rows shared + branch, and where the scored ending of each starts; no branches: the one row `shared`."""

    shared: list[int]
    branches: list[list[int]]
    starts: list[int]

    @property
    def branch_tokens(self) -> int:
        return sum(map(len, self.branches))


def common_length(rows: Sequence[Sequence[int]]) -> int:
    """How many leading tokens all rows share."""
    return sum(1 for _ in takewhile(lambda column: len(set(column)) == 1, zip(*rows)))


def trees_of(rows: Sequence[Row]) -> list[Tree]:
    """The rows of one example as one tree; as a tree each, in their order, where they share no beginning."""
    size = min(common_length([ids for ids, _ in rows]), min(len(ids) for ids, _ in rows) - 1)
    if len(rows) == 1 or size < 1:
        return [Tree(ids, [], [start]) for ids, start in rows]
    return [Tree(rows[0][0][:size], [ids[size:] for ids, _ in rows], [start for _, start in rows])]


def batches(trees: Sequence[Tree], batch_tokens: int) -> Iterator[list[int]]:
    """Indices into trees: like lengths together, the longest first; batch_tokens with padding or one tree."""
    order = sorted(range(len(trees)), key=lambda i: (-len(trees[i].shared), -trees[i].branch_tokens))
    chosen: list[int] = []
    S = M = 0
    for i in order:
        wider = max(M, trees[i].branch_tokens)
        if chosen and (len(chosen) + 1) * (S + wider) > batch_tokens:
            yield chosen
            chosen, wider = [], trees[i].branch_tokens
        if not chosen:
            S = len(trees[i].shared)
        chosen.append(i)
        M = wider
    if chosen:
        yield chosen


@torch.no_grad()
def score_examples(
    model: Model,
    examples: Sequence[Sequence[Row]],
    batch_tokens: int,
    advance: Callable[[int], None] = lambda rows: None,
) -> list[list[Score]]:
    """For each row (ids, start) of each example: mean nll in nats of ids[start:], whether all are the argmax.

    `start` must lie in 1 .. len(ids) - 1. advance(n) is told of n more rows after each forward pass.
    """
    if not all(0 < start < len(ids) for rows in examples for ids, start in rows):
        raise ValueError("an ending must have a token before it and hold at least one")
    trees = [tree for rows in examples for tree in trees_of(rows)]
    found: list[list[Score]] = [[] for _ in trees]
    for chosen in batches(trees, batch_tokens):
        batch = [trees[i] for i in chosen]
        scores = iter(_score(model, batch))
        for i, tree in zip(chosen, batch, strict=True):
            found[i] = [next(scores) for _ in tree.starts]
        advance(sum(len(tree.starts) for tree in batch))
    flat = iter(score for scores in found for score in scores)
    return [[next(flat) for _ in rows] for rows in examples]


def _score(model: Model, trees: Sequence[Tree]) -> list[Score]:
    """The scores of all rows of some trees, from one forward pass."""
    device = model.get_device()
    S, M = max(len(t.shared) for t in trees), max(t.branch_tokens for t in trees)
    ids_BT = torch.zeros(len(trees), S + M, dtype=torch.long)
    prev_BT, position_BT, branch_BM = ids_BT - 1, ids_BT.clone(), torch.full((len(trees), M), -1)
    rows, columns, targets, sizes = list[int](), list[int](), list[int](), list[int]()
    for b, tree in enumerate(trees):
        size = len(tree.shared)
        ids_BT[b, :size] = torch.tensor(tree.shared)
        prev_BT[b, 1:size] = ids_BT[b, : size - 1]
        position_BT[b, :size] = torch.arange(size)
        at = S
        for r, start in enumerate(tree.starts):
            branch = tree.branches[r] if tree.branches else []
            own = slice(at, at + len(branch))
            if branch:
                ids_BT[b, own] = torch.tensor(branch)
                prev_BT[b, own] = torch.tensor([tree.shared[-1], *branch[:-1]])
                position_BT[b, own] = torch.arange(size, size + len(branch))
                branch_BM[b, at - S : at - S + len(branch)] = r
            whole = [*range(size), *range(at, own.stop)]  # the row's columns
            rows += [b] * (len(whole) - start)
            columns += whole[start - 1 : -1]
            targets += [*tree.shared, *branch][start:]
            sizes.append(len(whole) - start)
            at = own.stop
    sees = Sight(torch.tensor([len(t.shared) for t in trees]), position_BT, branch_BM)
    context = Context(position_BT.to(device), attention(S, sees, device), prev_ids_BT=prev_BT.to(device))
    hidden_BTD = model.forward_hidden(ids_BT.to(device), context)
    hidden_ND = hidden_BTD[torch.tensor(rows, device=device), torch.tensor(columns, device=device)]
    return ending_scores(model, hidden_ND, torch.tensor(targets, device=device), sizes)


@dataclass(frozen=True)
class Sight:
    """What tokens of branches may see: lengths_B of the shared parts, the branch of each (-1: padding)."""

    lengths_B: torch.Tensor
    position_BT: torch.Tensor
    branch_BM: torch.Tensor

    def mask(self, window: int) -> torch.Tensor:
        """(B, 1, M, S + M), True where a branch's token sees a column; window: the most positions back."""
        M = self.branch_BM.shape[1]
        S = self.position_BT.shape[1] - M
        back_BMT = self.position_BT[:, S:, None] - self.position_BT[:, None, :]
        is_shared_BMS = (torch.arange(S) < self.lengths_B[:, None])[:, None, :].expand(-1, M, -1)
        is_own_BMM = (self.branch_BM[:, :, None] == self.branch_BM[:, None, :]) & (back_BMT[:, :, S:] >= 0)
        return (torch.cat((is_shared_BMS, is_own_BMM), dim=2) & (back_BMT <= window))[:, None]


def attention(S: int, sees: Sight, device: torch.device) -> Callable[[int, int], Attend]:
    """gpt.Context's `attention` for rows of S shared columns and branches behind them."""
    T, has_branches = sees.position_BT.shape[1], sees.branch_BM.shape[1] > 0
    masks: dict[int, torch.Tensor] = {}

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, window: int) -> torch.Tensor:
        limits = (-1 if window >= S else window, 0)
        y_BSHE = flash_attn.flash_attn_func(q[:, :S], k[:, :S], v[:, :S], causal=True, window_size=limits)
        if not has_branches:
            return y_BSHE
        window = min(window, T)
        if window not in masks:
            masks[window] = sees.mask(window).to(device)
        groups = q.shape[2] // k.shape[2]
        keys, values = (x.repeat_interleave(groups, 2).transpose(1, 2) for x in (k, v))
        y = F.scaled_dot_product_attention(q[:, S:].transpose(1, 2), keys, values, masks[window])
        return torch.cat((y_BSHE, y.transpose(1, 2)), dim=1)

    return lambda layer, window: partial(attend, window=window)
