"""Shared by the tests that import it: cases first written for tests/engine/test_continuous_batch.py."""

from __future__ import annotations

import pytest
import torch
from helpers.engine_cases import END, Bytes, tiny

from nanochat.engine.continuous_batch import ContinuousBatch
from nanochat.engine.engine import Sampling
from nanochat.engine.sequence import Sequence
from nanochat.gpt import GPT

MODEL = tiny()


NO_END = frozenset[int]()


def texts(count: int, longest: int = 60) -> list[list[int]]:
    """Prompts of mixed lengths, every fourth beginning like the one before it."""
    rng = torch.Generator().manual_seed(count)
    found: list[list[int]] = []
    for i in range(count):
        ids = torch.randint(
            256, (int(torch.randint(1, longest, (1,), generator=rng)),), generator=rng
        ).tolist()
        found.append(found[-1][:40] + ids[:7] if i % 4 == 3 else ids)
    return found


def start(ids: list[int], limit: int = 12, seed: int = 1, temperature: float = 1.0, **more) -> Sequence:
    return Sequence(ids, limit, Sampling(temperature, seed=seed), NO_END, **more)


def run(batch: ContinuousBatch, group: list[Sequence]) -> list[list[int]]:
    batch.admit(group)
    while batch.is_running:
        batch.emit()
        batch.compute()
    for pool in batch.blocks.pools:
        assert len(pool.free) == pool.num_blocks - 1
    return [g.output for g in group]


def alone(ids: list[int], limit: int = 12, **more) -> list[int]:
    return run(ContinuousBatch(MODEL, 1, len(ids) + limit), [start(ids, limit, **more)])[0]


def count_tokens(batch: ContinuousBatch, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Tokens of each forward pass."""
    counts: list[int] = []
    real = batch.runner.run
    monkeypatch.setattr(
        batch.runner,
        "run",
        lambda chunks, *rest: (counts.append(sum(c.stop - c.start for c in chunks)), real(chunks, *rest))[1],
    )
    return counts


class Letters(Bytes):
    def get_special_tokens(self) -> set[str]:
        return {"<|python_start|>", "<|python_end|>", "<|output_start|>", "<|output_end|>", "<|bos|>"}

    def decode_bytes(self, ids: list[int]) -> bytes:
        return bytes(97 + i % 26 for i in ids)


class Caller(GPT):
    """Calls the tool whatever it reads: the next token is a function of the last."""

    nexts: dict[int, int]

    def forward_hidden(self, ids, context):
        hidden = super().forward_hidden(ids, context)
        self.fed = [*getattr(self, "fed", []), ids.flatten().tolist()]
        follow = torch.tensor([self.nexts.get(i, END) for i in ids.flatten().tolist()])
        return torch.cat((hidden, follow.view(*ids.shape, 1).float()), dim=2)

    def logits(self, hidden):
        return torch.nn.functional.one_hot(hidden[..., -1].long(), 262) * 9.0
