"""A model and the cache its rows live in: token ids in, the logits of each row's next token out.

Two runners with one interface. `Runner` is for models with GPT's `trunk`: rows stand at different positions,
and rows that are not in use cost nothing. `PlainRunner` is for anything with `.config`, `get_device()` and
`forward(ids, kv_cache=...)`: all rows share one position. Neither chooses tokens. Letters: B rows in use, T
time, K key/value heads, E head size, D width, V vocabulary.
"""

from collections.abc import Callable
from typing import Any

import torch

from nanochat.engine.kv_cache import KVCache
from nanochat.flash_attention import flash_attn

PREFILL_TOKENS = 4096  # tokens of one forward pass at most (a single longer row goes alone)


def new_cache(model: Any, num_rows: int, seq_len: int) -> KVCache:
    """An empty cache that fits the model."""
    cfg = model.config
    dtype = getattr(model, "compute_dtype", torch.float32)
    head_dim = cfg.n_embd // cfg.n_head
    return KVCache(num_rows, cfg.n_kv_head, seq_len, head_dim, cfg.n_layer, model.get_device(), dtype)


class Runner:
    """Rows 0 .. len(lengths) - 1 are in use; lengths[b] tokens of row b are in the cache.

    no_grad and not inference_mode: masks and tables that are made here and kept may serve training later.
    """

    can_drop = True

    def __init__(self, model: Any, num_rows: int, seq_len: int) -> None:
        self.model, self.cache = model, new_cache(model, num_rows, seq_len)
        self.lengths: list[int] = []

    @torch.no_grad()
    def prefill(self, prompts: list[list[int]]) -> torch.Tensor:
        """Add a row per prompt -> logits (len(prompts), V) after each one's last token.

        Shorter prompts are padded on the right: no token sees what stands after it, and the next tokens of a
        row overwrite its padding.
        """
        done = []
        while prompts:
            longest, count = 0, 0
            while count < len(prompts) and (count + 1) * max(longest, len(prompts[count])) <= PREFILL_TOKENS:
                longest, count = max(longest, len(prompts[count])), count + 1
            count = max(count, 1)
            done.append(self._prefill_together(prompts[:count]))
            prompts = prompts[count:]
        return torch.cat(done)

    def _prefill_together(self, prompts: list[list[int]]) -> torch.Tensor:
        device, lengths = self.model.get_device(), [len(prompt) for prompt in prompts]
        T, first = max(lengths), len(self.lengths)
        rows = slice(first, first + len(prompts))
        ids_BT = torch.tensor([prompt + [0] * (T - len(prompt)) for prompt in prompts], device=device)
        lengths_B = torch.tensor(lengths, device=device)
        last_B1 = lengths_B[:, None] - 1
        self.cache.cache_seqlens[rows] = 0
        hidden_BTD = self.model.trunk(ids_BT, None, torch.arange(T, device=device), self._attend(rows, T))
        self.cache.cache_seqlens[rows] = lengths_B.int()
        self.cache.prev_ids[rows] = ids_BT.gather(1, last_B1)[:, 0]
        self.lengths += lengths
        last_BD = hidden_BTD.gather(1, last_B1[..., None].expand(-1, -1, hidden_BTD.size(2)))[:, 0]
        logits_BV: torch.Tensor = self.model.logits(last_BD)
        return logits_BV

    @torch.no_grad()
    def decode(self, tokens: list[int]) -> torch.Tensor:
        """Append tokens[b] to row b -> logits (B, V)."""
        rows = slice(0, len(tokens))
        ids_B = torch.tensor(tokens, device=self.model.get_device())
        attend = self._attend(rows, max(self.lengths) + 1)
        prev_B1 = self.cache.prev_ids[rows, None].clone()
        positions_B1 = self.cache.cache_seqlens[rows, None].long()
        hidden_B1D = self.model.trunk(ids_B[:, None], prev_B1, positions_B1, attend)
        self.cache.cache_seqlens[rows] += 1
        self.cache.prev_ids[rows] = ids_B
        self.lengths = [length + 1 for length in self.lengths]
        logits_BV: torch.Tensor = self.model.logits(hidden_B1D[:, 0])
        return logits_BV

    @torch.no_grad()
    def copy(self, sources: list[int]) -> None:
        """Add a row per source, equal to that row."""
        for source in sources:
            self.cache.copy_row(source, len(self.lengths), self.lengths[source])
            self.lengths.append(self.lengths[source])

    @torch.no_grad()
    def drop(self, row: int) -> None:
        """Remove a row; the last one takes its place."""
        last = len(self.lengths) - 1
        if row != last:
            self.cache.copy_row(last, row, self.lengths[last])
        self.lengths[row] = self.lengths[last]
        self.lengths.pop()

    def _attend(self, rows: slice, stop: int) -> Callable[..., torch.Tensor]:
        """Attention over the first `stop` cached positions of some rows; writes the new keys and values
        there.
        """
        cache, context = self.cache, self.model.config.sequence_len
        seqlens_B = cache.cache_seqlens[rows]

        def attend(
            layer: int, q_BTHE: torch.Tensor, k_BTKE: torch.Tensor, v_BTKE: torch.Tensor, window: int
        ) -> torch.Tensor:
            return flash_attn.flash_attn_with_kvcache(
                q_BTHE,
                cache.k_cache[layer, rows, :stop],
                cache.v_cache[layer, rows, :stop],
                k=k_BTKE,
                v=v_BTKE,
                cache_seqlens=seqlens_B,
                causal=True,
                window_size=(-1 if window >= context else window, 0),
            )

        return attend


class PlainRunner:
    """All rows continue one prompt in step; a row that has ended goes on with its last token."""

    can_drop = False

    def __init__(self, model: Any, num_rows: int, seq_len: int) -> None:
        self.model, self.num_rows, self.seq_len = model, num_rows, seq_len
        self.cache = new_cache(model, 1, seq_len)

    @torch.no_grad()
    def prefill(self, prompts: list[list[int]]) -> torch.Tensor:
        """Logits (1, V) after the prompt, of which there is one."""
        (prompt,) = prompts
        return self._forward([prompt])

    @torch.no_grad()
    def decode(self, tokens: list[int]) -> torch.Tensor:
        """Append tokens[b] to row b -> logits (B, V)."""
        return self._forward([[token] for token in tokens])

    @torch.no_grad()
    def copy(self, sources: list[int]) -> None:
        """Add a row per source: all are copies of the one row that was prefilled."""
        prefilled, self.cache = self.cache, new_cache(self.model, 1 + len(sources), self.seq_len)
        self.cache.prefill(prefilled)

    def drop(self, row: int) -> None:
        """Never called: see can_drop."""
        raise NotImplementedError("rows of a plain model stay until all have ended")

    def _forward(self, rows: list[list[int]]) -> torch.Tensor:
        ids_BT = torch.tensor(rows, device=self.model.get_device())
        logits_BV: torch.Tensor = self.model.forward(ids_BT, kv_cache=self.cache)[:, -1]
        return logits_BV
