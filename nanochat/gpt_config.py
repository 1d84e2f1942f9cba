"""What a model is: every number that decides what the weights of a checkpoint mean. No torch."""

from __future__ import annotations

import dataclasses
from dataclasses import asdict, dataclass
from typing import Any

VOCAB_MULTIPLE = 64  # rows of the tables; matrix products are faster with such sizes


def experiment(default: Any) -> Any:
    """A field that the fused kernels do not know: at another value than the default gpt.py's lines run."""
    return dataclasses.field(default=default, metadata={"is_experiment": True})


@dataclass(frozen=True)
class GPTConfig:
    """The shape and the constants of a model. Saved with every checkpoint.

    Checkpoints of earlier versions lack some of the fields; their values are the defaults.
    Raises ValueError for sizes that do not fit together.
    """

    # The shape.
    sequence_len: int = 2048
    vocab_size: int = 32768
    n_layer: int = 12
    n_head: int = 6
    n_kv_head: int = 6
    n_embd: int = 768
    # One letter per layer, repeated: L sees the whole row, S a short window. The last layer is always L.
    window_pattern: str = "SSSL"
    # A short window is sequence_len / short_window_divisor keys, rounded up to a multiple of the next field.
    short_window_divisor: int = 4
    short_window_multiple: int = 128
    # Rows of the hashed table of token pairs (nanochat.bigram); 0 means that there is none.
    bigram_rows: int = 0
    # The slowest rotation of RoPE has a period of about 2 pi * rope_base tokens.
    rope_base: float = 100_000.0
    # Queries and keys have an RMS of qk_scale: scores are sharper than with unit vectors.
    qk_scale: float = 1.2
    # Logits stay within +-softcap.
    softcap: float = 15.0
    # The number of leading channels of the stream that the two kinds of gates read.
    smear_channels: int = 24
    ve_gate_channels: int = 12

    def __post_init__(self) -> None:
        sizes = (self.sequence_len, self.vocab_size, self.n_layer, self.n_head, self.n_kv_head)
        if min(sizes) < 1:
            raise ValueError(f"every size of a model must be at least 1, found {asdict(self)}")
        if self.bigram_rows < 0:
            raise ValueError(f"bigram_rows must be at least 0, found {self.bigram_rows}")
        if self.n_embd % self.n_head or self.head_dim % 2:
            found = f"{self.n_embd} and {self.n_head}"
            raise ValueError(f"n_embd must be an even multiple of n_head, found {found}")
        widest_gate = max(self.smear_channels, self.ve_gate_channels)
        if self.n_embd < widest_gate:
            raise ValueError(f"n_embd must be at least {widest_gate}, what gates read, found {self.n_embd}")
        if self.n_head % self.n_kv_head:
            raise ValueError(f"n_kv_head must divide n_head, found {self.n_kv_head} and {self.n_head}")
        if not self.window_pattern or set(self.window_pattern.upper()) - set("SL"):
            raise ValueError(f"window_pattern must be made of S and L, found {self.window_pattern!r}")

    @property
    def has_kernels(self) -> bool:
        """Whether the fused kernels compute this model: every field marked `experiment` is at its default."""
        fields = [field for field in dataclasses.fields(self) if field.metadata.get("is_experiment")]
        return all(getattr(self, field.name) == field.default for field in fields)

    @property
    def head_dim(self) -> int:
        return self.n_embd // self.n_head

    @property
    def kv_dim(self) -> int:
        return self.n_kv_head * self.head_dim

    @property
    def padded_vocab(self) -> int:
        """Rows of the embedding tables and of the head; the logits are cut back to vocab_size."""
        return -(-self.vocab_size // VOCAB_MULTIPLE) * VOCAB_MULTIPLE

    @property
    def windows(self) -> list[int]:
        """By layer, how many keys to the left of itself a query sees."""
        unit = self.short_window_multiple
        short = unit * -(-self.sequence_len // (self.short_window_divisor * unit))
        short = min(short, self.sequence_len)
        pattern = self.window_pattern.upper()
        letters = [pattern[layer % len(pattern)] for layer in range(self.n_layer - 1)] + ["L"]
        return [self.sequence_len if letter == "L" else short for letter in letters]

    def has_value_embedding(self, layer: int) -> bool:
        """Every second layer has value embeddings, counted so that the last one does."""
        return layer % 2 == (self.n_layer - 1) % 2

    def count_params(self) -> dict[str, int]:
        """Parameters by group; "total" is all of them, "scaling" those that the amount of data follows."""
        D, V, L = self.n_embd, self.padded_vocab, self.n_layer
        num_tables = sum(map(self.has_value_embedding, range(L)))
        attention = 2 * D * D + 2 * D * self.kv_dim
        mlp = 8 * D * D
        gates = num_tables * self.ve_gate_channels * self.n_kv_head
        counts = {
            "wte": V * D,
            "value_embeds": num_tables * V * self.kv_dim,
            "lm_head": V * D,
            "transformer_matrices": L * (attention + mlp) + gates,
            # Two lambdas per layer, the gate of smear, and one lambda each of smear and backout.
            "scalars": 2 * L + self.smear_channels + 2,
        }
        if self.bigram_rows:
            counts["bigram_embeds"] = self.bigram_rows * D
        counts["total"] = sum(counts.values())
        counts["scaling"] = counts["transformer_matrices"] + counts["lm_head"]
        return counts

    def flops_per_token(self, causal: bool = False) -> float:
        """FLOPs of one token, forward and backward: 6 per matrix parameter, 12 D per key that a query sees.

        causal: count the keys to the left exactly; else, as is usual, the whole window for every query.
        """
        matrices = self.count_params()["scaling"] + self.smear_channels
        keys = 0.0
        for window in self.windows:
            if causal:
                # A query at position t sees min(t + 1, window + 1) keys; this is the mean over the row.
                seen = min(window + 1, self.sequence_len)
                keys += seen - seen * (seen - 1) / (2 * self.sequence_len)
            else:
                keys += min(window, self.sequence_len)
        return 6 * matrices + 12 * self.n_embd * keys
