"""Shared by the tests that import it: cases first written for tests/train/test_rollout.py."""

from __future__ import annotations

from typing import Any

import torch
from helpers.small_home import TOK

from nanochat.gpt import GPT, GPTConfig
from nanochat.runtime import Runtime

RT = Runtime(torch.device("cpu"), torch.float32)


V = TOK.get_vocab_size()


def small_model(seed: int = 3) -> GPT:
    model = GPT(GPTConfig(64, V, n_layer=1, n_head=1, n_kv_head=1, n_embd=32, window_pattern="L"))
    model.init_weights(seed)
    with torch.no_grad():  # something else than a flat distribution
        model.lm_head.weight.normal_(0, 1, generator=torch.Generator().manual_seed(seed))
    return model


class Checksums:
    """Rewards by a checksum of the answer; question `same` rewards all answers alike."""

    def __init__(self, size: int = 6, same: int | None = None) -> None:
        self.size, self.same = size, same

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, i: int) -> dict[str, Any]:
        asked, reply = {"role": "user", "content": "the " * (i + 1)}, {"role": "assistant", "content": "blue"}
        return {"messages": [asked, reply], "number": i}

    def reward(self, conversation: dict[str, Any], answer: str) -> float:
        return 0.5 if conversation["number"] == self.same else float(sum(map(ord, answer)) % 7)
