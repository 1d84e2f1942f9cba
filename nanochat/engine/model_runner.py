"""Run a model on chunks of tokens over the paged cache their sequences live in.

The tokens of all chunks go through the matrices together, side by side; attention takes them chunk by chunk.
It neither schedules nor samples. Letters: N tokens, H query heads, K key/value heads, E head size, V
vocabulary, S slots of the cache.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import nanochat.flash_attention as fa
from nanochat.engine.block_manager import Copy, Pool
from nanochat.engine.cuda_graphs import StaticSteps
from nanochat.engine.inference import AttendTokens, InferenceGPT, forward_tokens
from nanochat.engine.kv_cache import PagedCache
from nanochat.engine.sampling import Draws
from nanochat.engine.scheduler import Chunk
from nanochat.flash_attention.select import pick
from nanochat.gpt import rope_tables
from nanochat.kernels.decode import NativeStep, kv_dtype, library
from nanochat.protocols import Model

BLOCK_SIZE = 16


@dataclass(frozen=True)
class LayerGroup:
    """Layers that see equally far share block tables. window: keys to the left, None for all."""

    window: int | None
    layers: list[int]


def layer_groups(config: Any) -> list[LayerGroup]:
    """The groups of a model's layers; the one that sees everything comes first, even if it is empty."""
    windows = getattr(config, "windows", [config.sequence_len] * config.n_layer)
    groups = {None: LayerGroup(None, [])}
    for layer, window in enumerate(windows):
        window = None if window >= config.sequence_len else window
        groups.setdefault(window, LayerGroup(window, [])).layers.append(layer)
    return list(groups.values())


def make_pools(
    config: Any, num_rows: int, context: int, token_budget: int, num_blocks: int | None
) -> list[Pool]:
    """A pool of blocks for each group, by default enough for num_rows sequences of `context` tokens at once.

    num_blocks: of the group that sees everything. Windows need no more than they reach and a step's tokens.
    """
    blocks_per_row = -(-context // BLOCK_SIZE)
    # Block 0 is a dummy; 2 % are kept free for prefixes that are worth keeping.
    whole = num_blocks or 2 + num_rows * blocks_per_row + num_rows * blocks_per_row // 50
    pools = []
    for group in layer_groups(config):
        size = whole
        if group.window is not None:
            blocks_seen = -(-group.window // BLOCK_SIZE) + 2
            size = min(whole, 2 + num_rows * blocks_seen + -(-token_budget // BLOCK_SIZE) + num_rows)
        pools.append(Pool(size, group.window))
    return pools


@dataclass(frozen=True)
class TokenNumbers:
    """The tokens of a step: ids, the token before each (-1: none) and positions, chunk after chunk."""

    ids: list[int]
    prev: list[int]
    positions: list[int]

    @classmethod
    def of(cls, chunks: Sequence[Chunk]) -> TokenNumbers:
        ids, prev, positions = list[int](), list[int](), list[int]()
        for chunk in chunks:
            tokens = chunk.sequence.tokens(max(0, chunk.start - 1), chunk.stop)
            if chunk.start == 0:
                tokens = [-1, *tokens]
            prev += tokens[:-1]
            ids += tokens[1:]
            positions += range(chunk.start, chunk.stop)
        return cls(ids, prev, positions)


class ModelRunner:
    """Runs the steps of one model. Which way a step goes is decided here, by the device and its size."""

    def __init__(self, model: Model, pools: Sequence[Pool], device: torch.device) -> None:
        config = model.config
        self.model = model
        self.config = config
        self.device = device
        self.num_kv_heads = config.n_kv_head
        self.head_dim = config.n_embd // config.n_head
        self.is_paged = device.type != "cpu"  # kernels that follow block tables themselves
        groups = layer_groups(config)
        self._pools = pools
        self._windows = [-1 if group.window is None else group.window for group in groups]
        # layer -> (its group, its index within the group)
        self._place = {
            layer: (g, i) for g, group in enumerate(groups) for i, layer in enumerate(group.layers)
        }
        model_dtype = getattr(model, "compute_dtype", torch.float32)
        self.cache = PagedCache(
            [len(group.layers) for group in groups],
            [pool.num_blocks for pool in pools],
            BLOCK_SIZE,
            self.num_kv_heads,
            self.head_dim,
            device,
            model_dtype if self.is_paged else kv_dtype(model),
        )
        self.static: StaticSteps | None = None
        if device.type == "cuda" and isinstance(model, InferenceGPT):
            self.static = StaticSteps(
                model, self.cache, self._place, self._windows, self.num_kv_heads, device
            )
        self.native = None if self.is_paged else self._native_step()
        # Hidden states and logits of the last graph that was replayed.
        self._graph_output: tuple[Tensor, Tensor] | None = None

    def _native_step(self) -> NativeStep | None:
        config = self.config
        places = [self._place[layer] for layer in range(config.n_layer)]

        def tables(positions: Tensor) -> tuple[Tensor, Tensor]:
            return rope_tables(positions, self.head_dim, config.rope_base, torch.float32)

        return NativeStep.of(
            self.model,
            [self.cache.kv[group][i] for group, i in places],
            [self._windows[group] for group, _ in places],
            [group for group, _ in places],
            len(self._pools),
            BLOCK_SIZE,
            tables,
        )

    @torch.no_grad()
    def run(self, chunks: Sequence[Chunk], copies: Sequence[Copy] = ()) -> Tensor:
        """Compute the chunks and write their keys and values -> hidden states (N, D), chunk after chunk.

        no_grad and not inference_mode: masks and tables that are made here and kept may serve training later.
        """
        self.cache.copy_blocks(copies)
        numbers = TokenNumbers.of(chunks)
        if self.native is not None and len(numbers.ids) <= self.native.most and library() is not None:
            rows = [n for n, chunk in enumerate(chunks) for _ in range(chunk.start, chunk.stop)]
            tables = [[chunk.sequence.tables[group] for chunk in chunks] for group in range(len(self._pools))]
            return self.native(numbers.ids, numbers.prev, numbers.positions, rows, tables)
        if self.static is not None:
            self._graph_output = self.static(chunks, numbers.ids, numbers.prev, numbers.positions)
            if self._graph_output is not None:
                return self._graph_output[0]
        numbers_3N = torch.tensor([numbers.ids, numbers.prev, numbers.positions], device=self.device)
        attend = self._paged_attention(chunks) if self.is_paged else self._view_attention(chunks)
        ids_N, prev_N, positions_N = numbers_3N
        return forward_tokens(self.model, ids_N, prev_N, positions_N, attend)

    @property
    def has_graphs(self) -> bool:
        return self.static is not None and self.static.problem is None

    @property
    def vocab_size(self) -> int:
        return int(self.config.vocab_size)

    @torch.no_grad()
    def draw_steps(
        self, chunks: Sequence[Chunk], copies: Sequence[Copy], draws: Draws, num_steps: int
    ) -> list[list[int]] | None:
        """Multi-step decoding: the next `num_steps` tokens of rows, each chunk its last known token.

        None where there is no graph of the step.
        """
        if self.static is None:
            return None
        self.cache.copy_blocks(copies)
        numbers = TokenNumbers.of(chunks)
        return self.static.draw_steps(chunks, numbers.ids, numbers.prev, numbers.positions, draws, num_steps)

    @torch.no_grad()
    def logits(self, hidden_ND: Tensor) -> Tensor:
        """fp32 logits (N, V)."""
        if self._graph_output is not None and hidden_ND is self._graph_output[0]:
            return self._graph_output[1]
        logits_NV: Tensor = self.model.logits(hidden_ND)
        return logits_NV

    # ---------------------------------------------------------------- attention

    def _view_attention(self, chunks: Sequence[Chunk]) -> AttendTokens:
        """Attention on a CPU, chunk by chunk, over views of the cache where its blocks lie side by side."""
        backend = pick(fa._override_impl, self.device, self.cache.dtype)
        K, kv_dtype = self.num_kv_heads, self.cache.dtype
        slots = [self._slots(chunks, group) for group in range(len(self._pools))]
        slot_runs = [[self._slot_runs(chunk, g) for chunk in chunks] for g in range(len(self._pools))]
        sizes = [chunk.stop - chunk.start for chunk in chunks]

        def attend(layer: int, q_NHE: Tensor, kv_N2KE: Tensor) -> Tensor:
            group, i = self._place[layer]
            store_S2KE = self.cache.kv[group][i]
            store_S2KE.index_copy_(0, slots[group], kv_N2KE.to(kv_dtype))
            window = self._pools[group].window
            outputs = []
            for q_THE, runs in zip(q_NHE.to(kv_dtype).split(sizes), slot_runs[group], strict=True):
                seen = [store_S2KE[start:stop] for start, stop in runs]
                kv_S2KE = seen[0] if len(seen) == 1 else torch.cat(seen)
                keys, values = kv_S2KE[None, :, :K], kv_S2KE[None, :, K:]
                outputs.append(backend.attend(q_THE[None], keys, values, window, 0)[0])
            return torch.cat(outputs).to(q_NHE.dtype)

        return attend

    def _slots(self, chunks: Sequence[Chunk], group: int) -> Tensor:
        """Where in the group's pool each token's keys and values go."""
        slots = list[int]()
        for chunk in chunks:
            table = chunk.sequence.tables[group]
            for position in range(chunk.start, chunk.stop):
                slots.append(table[position // BLOCK_SIZE] * BLOCK_SIZE + position % BLOCK_SIZE)
        return torch.tensor(slots, device=self.device)

    def _slot_runs(self, chunk: Chunk, group: int) -> list[tuple[int, int]]:
        """The keys that a chunk sees, as runs [start, stop) of neighbouring slots."""
        first = self._pools[group].live_from(chunk.start, BLOCK_SIZE)
        num_blocks = -(-chunk.stop // BLOCK_SIZE)
        runs = list[list[int]]()
        for block in chunk.sequence.tables[group][first:num_blocks]:
            start = block * BLOCK_SIZE
            if runs and runs[-1][1] == start:
                runs[-1][1] = start + BLOCK_SIZE
            else:
                runs.append([start, start + BLOCK_SIZE])
        # The last block is filled up to the chunk's end.
        runs[-1][1] -= num_blocks * BLOCK_SIZE - chunk.stop
        return [(start, stop) for start, stop in runs]

    def _paged_attention(self, chunks: Sequence[Chunk]) -> AttendTokens:
        """Attention through block tables: all single tokens in one call, each longer chunk in its own."""
        calls = self._paged_calls(chunks)
        K, dtype = self.num_kv_heads, self.cache.dtype

        def attend(layer: int, q_NHE: Tensor, kv_N2KE: Tensor) -> Tensor:
            group, i = self._place[layer]
            store_PS2KE = self.cache.kv[group][i].unflatten(0, (-1, BLOCK_SIZE))
            q, kv = q_NHE.to(dtype), kv_N2KE.to(dtype)
            y_NHE = torch.empty_like(q_NHE)
            for call in calls:
                kv_BT2KE = kv[call.tokens_BT]
                y_NHE[call.tokens_BT] = fa.flash_attn.flash_attn_with_kvcache(
                    q[call.tokens_BT],
                    store_PS2KE[:, :, :K],
                    store_PS2KE[:, :, K:],
                    k=kv_BT2KE[:, :, :K],
                    v=kv_BT2KE[:, :, K:],
                    cache_seqlens=call.starts_B,
                    causal=True,
                    window_size=(self._windows[group], 0),
                    page_table=call.tables[group],
                ).to(q_NHE.dtype)
            return y_NHE

        return attend

    def _paged_calls(self, chunks: Sequence[Chunk]) -> list[PagedCall]:
        singles = [n for n, chunk in enumerate(chunks) if chunk.stop - chunk.start == 1]
        longer = [[n] for n, chunk in enumerate(chunks) if chunk.stop - chunk.start > 1]
        firsts = [0]
        for chunk in chunks:
            firsts.append(firsts[-1] + chunk.stop - chunk.start)
        calls = []
        for members in [singles, *longer] if singles else longer:
            starts_B = torch.tensor([chunks[n].start for n in members], dtype=torch.int32, device=self.device)
            tokens_BT = torch.tensor([range(firsts[n], firsts[n + 1]) for n in members], device=self.device)
            tables = []
            for group in range(len(self._pools)):
                rows = [chunks[n].sequence.tables[group] for n in members]
                longest = max(map(len, rows))
                padded = [row + [0] * (longest - len(row)) for row in rows]
                tables.append(torch.tensor(padded, dtype=torch.int32, device=self.device))
            calls.append(PagedCall(tokens_BT, starts_B, tables))
        return calls


@dataclass(frozen=True)
class PagedCall:
    """Chunks of equal length that one call of attention serves."""

    tokens_BT: Tensor  # their places among the N tokens
    starts_B: Tensor  # keys that each has in the cache
    tables: list[Tensor]  # by group, (B, blocks)
