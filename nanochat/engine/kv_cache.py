"""The keys and values of the tokens seen so far, dense: one stretch of memory per row.

Every row has its own length. What a model adds for itself (the previous token's id or embedding) travels
along. Letters: L layers, B rows, S cached time, K key/value heads, E head size.
"""

from collections.abc import Sequence

import torch


class KVCache:
    """k_cache, v_cache (L, B, S, K, E), zeros at first; cache_seqlens int32 (B,): how much of each row is
    filled.

    prev_ids int64 (B,) is the last cached token of each row, -1 for none: all that smear needs to continue.
    prev_embedding is for models that would rather keep a vector (B, ...).
    """

    def __init__(
        self,
        batch_size: int,
        num_heads: int,
        seq_len: int,
        head_dim: int,
        num_layers: int,
        device: torch.device | str,
        dtype: torch.dtype,
    ) -> None:
        shape = (num_layers, batch_size, seq_len, num_heads, head_dim)
        self.batch_size, self.max_seq_len, self.n_layers = batch_size, seq_len, num_layers
        self.n_heads, self.head_dim = num_heads, head_dim
        self.k_cache = torch.zeros(shape, device=device, dtype=dtype)
        self.v_cache = torch.zeros(shape, device=device, dtype=dtype)
        self.cache_seqlens = torch.zeros(batch_size, dtype=torch.int32, device=device)
        self.prev_ids = torch.full((batch_size,), -1, dtype=torch.int64, device=device)
        self.prev_embedding: torch.Tensor | None = None

    def get_pos(self) -> int:
        """The length of row 0."""
        return int(self.cache_seqlens[0])

    def advance(self, num_tokens: int) -> None:
        """Count `num_tokens` more in every row, after they have been written."""
        self.cache_seqlens += num_tokens

    def reset(self) -> None:
        """Empty every row."""
        self.cache_seqlens.zero_()
        self.prev_ids.fill_(-1)
        self.prev_embedding = None

    def get_layer_cache(self, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Views (B, S, K, E) of one layer's keys and values."""
        return self.k_cache[layer], self.v_cache[layer]

    def prefill(self, other: "KVCache") -> None:
        """Fill this empty cache with another's rows, or with its only row in every one of ours.

        Raises ValueError unless this cache is empty, no shorter, and of the same layers, heads and head size.
        """
        ours, theirs = ((c.n_layers, c.n_heads, c.head_dim) for c in (self, other))
        filled = int(other.cache_seqlens.max())
        if int(self.cache_seqlens.max()):
            raise ValueError(
                f"prefill needs an empty cache, found {self.get_pos()} tokens; call reset() first"
            )
        if ours != theirs or other.batch_size not in (1, self.batch_size):
            raise ValueError(
                f"caches must agree in layers, heads and head size, found {ours} and {theirs}, "
                f"and in rows unless the other has one, found {self.batch_size} and {other.batch_size}"
            )
        if self.max_seq_len < other.max_seq_len:
            raise ValueError(f"the cache must hold {other.max_seq_len} tokens, it holds {self.max_seq_len}")
        self.k_cache[:, :, :filled] = other.k_cache[:, :, :filled]
        self.v_cache[:, :, :filled] = other.v_cache[:, :, :filled]
        self.cache_seqlens.copy_(other.cache_seqlens.expand(self.batch_size))
        self.prev_ids.copy_(other.prev_ids.expand(self.batch_size))
        if other.prev_embedding is not None:
            shape = (self.batch_size, *other.prev_embedding.shape[1:])
            self.prev_embedding = other.prev_embedding.expand(shape).clone()


class PagedCache:
    """Keys and values in blocks: kv[group] (layers, blocks * block_size, 2K, E), keys first, zeros at first.

    Which block belongs to whom is decided elsewhere (nanochat.engine.block_manager).
    """

    def __init__(
        self,
        num_layers: Sequence[int],
        num_blocks: Sequence[int],
        block_size: int,
        num_heads: int,
        head_dim: int,
        device: torch.device | str,
        dtype: torch.dtype,
    ) -> None:
        self.block_size, self.dtype = block_size, dtype
        self.kv = [
            torch.zeros(layers, blocks * block_size, 2 * num_heads, head_dim, device=device, dtype=dtype)
            for layers, blocks in zip(num_layers, num_blocks, strict=True)
        ]

    def copy_blocks(self, copies: Sequence[tuple[int, int, int]]) -> None:
        """(group, from, to): copy a block in every layer of its group."""
        for group, source, target in copies:
            blocks = self.kv[group].unflatten(1, (-1, self.block_size))
            blocks[:, target] = blocks[:, source]
