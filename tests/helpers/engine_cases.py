"""Shared by the tests that import it: cases first written for tests/engine/test_engine.py."""

from types import SimpleNamespace

import torch

from nanochat.engine import KVCache
from nanochat.gpt import GPT, GPTConfig

SPECIALS = [
    "<|python_start|>",
    "<|python_end|>",
    "<|output_start|>",
    "<|output_end|>",
    "<|assistant_end|>",
    "<|bos|>",
]


PY, PY_END, OUT, OUT_END, END, BOS = range(256, 262)


class Bytes:
    """A tokenizer of one token per byte."""

    def encode_special(self, name: str) -> int:
        return 256 + SPECIALS.index(name)  # ValueError for any other: generate must not ask

    def get_bos_token_id(self) -> int:
        return BOS

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def decode(self, ids: list[int]) -> str:
        return bytes(i for i in ids if i < 256).decode(errors="replace")


def tiny(vocab_size: int = 262, sequence_len: int = 640) -> GPT:
    """Two windows (S sees 256 keys), grouped heads, smear on, and no weight at zero."""
    config = GPTConfig(
        sequence_len, vocab_size, n_layer=3, n_head=4, n_kv_head=2, n_embd=32, window_pattern="SL"
    )
    model = GPT(config)
    rng = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=rng) * 0.3)
    return model.eval()


def prompt(num_tokens: int) -> list[int]:
    return torch.randint(256, (num_tokens,), generator=torch.Generator().manual_seed(num_tokens)).tolist()


class Script:
    """Says SCRIPT[row] whatever it reads; counts positions in the cache as a real model would."""

    def __init__(self, *rows: list[int], start: int) -> None:
        self.rows, self.start = rows, start
        self.config = SimpleNamespace(n_kv_head=2, n_head=4, n_embd=32, n_layer=2, sequence_len=64)

    def get_device(self) -> torch.device:
        return torch.device("cpu")

    def forward(self, ids: torch.Tensor, kv_cache: KVCache) -> torch.Tensor:
        B, T = ids.shape
        assert kv_cache.k_cache.shape == (2, B, kv_cache.max_seq_len, 2, 8)
        kv_cache.advance(T)
        logits_BTV = torch.full((B, T, 262), -20.0)
        for row in range(B):
            script = self.rows[row % len(self.rows)]
            said = kv_cache.get_pos() - self.start
            logits_BTV[row, -1, script[min(said, len(script) - 1)]] = 20.0
        return logits_BTV
