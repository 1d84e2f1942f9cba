"""Rows of different lengths through a model together, and the scores of how they end.

Letters: B rows, T time, D width, V vocabulary, N scored tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F

from nanochat.context import row_context
from nanochat.protocols import Model

CHUNK_LOGITS = 1 << 24  # logits held at once: 64 MB in fp32

Row = tuple[list[int], int]  # ids, and where the scored ending starts
Score = tuple[float, bool]  # mean nll in nats, whether every token is the argmax


def batch_tokens_for(device: torch.device) -> int:
    """Tokens of one forward pass, padding counted: enough to fill the device."""
    return 65536 if device.type == "cuda" else 8192


def padded_batches(
    rows: Sequence[Sequence[int]], batch_tokens: int
) -> Iterator[tuple[list[int], torch.Tensor]]:
    """(indices into rows, ids_BT): like lengths together, the longest first, at most batch_tokens or one row.

    Padding stands on the right, where a causal model cannot see it.
    """
    order = sorted(range(len(rows)), key=lambda i: -len(rows[i]))
    while order:
        T = len(rows[order[0]])
        count = max(1, batch_tokens // T)
        chosen, order = order[:count], order[count:]
        yield chosen, torch.tensor([[*rows[i], *[0] * (T - len(rows[i]))] for i in chosen])


def hidden_states(model: Model, ids_BT: torch.Tensor) -> torch.Tensor:
    """(B, T, D) of whole rows. Rows may be longer than those the model was trained on; windows stay."""
    return model.forward_hidden(ids_BT, row_context(ids_BT.shape[1], ids_BT.device))


@torch.no_grad()
def score_endings(model: Model, rows: Sequence[Row], batch_tokens: int) -> list[Score]:
    """For each (ids, start): the mean nll in nats of ids[start:], and whether each of them is the argmax.

    `start` must lie in 1 .. len(ids) - 1: something is predicted, from something.
    """
    if not all(0 < start < len(ids) for ids, start in rows):
        raise ValueError("an ending must have a token before it and hold at least one")
    scores: list[Score] = [(0.0, False)] * len(rows)
    for chosen, ids_BT in padded_batches([ids for ids, _ in rows], batch_tokens):
        ids_BT = ids_BT.to(model.get_device())
        hidden_BTD = hidden_states(model, ids_BT)
        sizes = [len(rows[i][0]) - rows[i][1] for i in chosen]
        b_N = torch.tensor([b for b, size in enumerate(sizes) for _ in range(size)], device=ids_BT.device)
        t_N = torch.tensor(
            [t for i in chosen for t in range(rows[i][1], len(rows[i][0]))], device=ids_BT.device
        )
        found = ending_scores(model, hidden_BTD[b_N, t_N - 1], ids_BT[b_N, t_N], sizes)
        for i, score in zip(chosen, found, strict=True):
            scores[i] = score
    return scores


def ending_scores(
    model: Model, hidden_ND: torch.Tensor, targets_N: torch.Tensor, sizes: Sequence[int]
) -> list[Score]:
    """The scores of endings of `sizes` tokens that lie behind one another in hidden states and targets."""
    rows, parts = max(1, CHUNK_LOGITS // model.config.vocab_size), []
    for h_ND, y_N in zip(hidden_ND.split(rows), targets_N.split(rows), strict=True):
        logits_NV = model.logits(h_ND)
        nll_N = F.cross_entropy(logits_NV, y_N, reduction="none")
        parts.append(torch.stack((nll_N, (logits_NV.argmax(-1) == y_N).to(nll_N.dtype))))
    endings = torch.cat(parts, dim=1).cpu().split(list(sizes), dim=1)
    return [(float(part_2N[0].double().mean()), bool(part_2N[1].all())) for part_2N in endings]


@torch.no_grad()
def last_logits(
    model: Model, rows: Sequence[list[int]], batch_tokens: int
) -> Iterator[tuple[list[int], torch.Tensor]]:
    """(indices, logits_BV on the CPU) of the token that follows each row, in batches."""
    for chosen, ids_BT in padded_batches(rows, batch_tokens):
        ids_BT = ids_BT.to(model.get_device())
        last_B = torch.tensor([len(rows[i]) - 1 for i in chosen], device=ids_BT.device)
        hidden_BD = hidden_states(model, ids_BT)[torch.arange(len(chosen), device=ids_BT.device), last_B]
        yield chosen, model.logits(hidden_BD).cpu()
