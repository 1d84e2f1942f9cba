"""A network and the paged cache its sequences live in: chunks of tokens in, logits of their last ones out.

Tokens of all chunks go through the matrices together, flat; attention takes them chunk by chunk. It neither
schedules nor samples. Letters: N tokens, H query heads, K key/value heads, E head size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

import nanochat.flash_attention as fa
from nanochat.engine.blocks import Copy, Pool
from nanochat.engine.kv_cache import PagedCache
from nanochat.engine.network import Network
from nanochat.engine.scheduler import Chunk
from nanochat.flash_attention.select import pick

BLOCK_SIZE = 16


def groups_of(config: Any) -> list[tuple[int | None, list[int]]]:
    """(window, layers) of the groups that see equally far; None, everything, comes first."""
    windows = getattr(config, "windows", [config.sequence_len] * config.n_layer)
    seen: dict[int | None, list[int]] = {None: []}
    for layer, window in enumerate(windows):
        seen.setdefault(None if window >= config.sequence_len else window, []).append(layer)
    return list(seen.items())


def pools_for(
    config: Any, num_rows: int, context: int, token_budget: int, num_blocks: int | None, size: int
) -> list[Pool]:
    """A pool a group, by default large enough for num_rows sequences of `context` tokens at once.

    num_blocks: of the group that sees everything. Windows need no more than they reach and a step's tokens.
    """
    row_blocks = -(-context // size)
    whole = num_blocks or 2 + num_rows * row_blocks + num_rows * row_blocks // 50
    pools = []
    for window, _ in groups_of(config):
        if window is None:
            pools.append(Pool(whole, None, row_blocks))
            continue
        reach = -(-window // size) + 2
        enough = 2 + num_rows * reach + -(-token_budget // size) + num_rows
        pools.append(Pool(min(whole, enough), window, min(reach, row_blocks)))
    return pools


class Runner:
    """Runs steps. On a CPU keys and values are fp32 whatever the weights are: its narrow attention is slow
    (docs/serving.md has the figures), and they are few beside the weights.
    """

    def __init__(self, network: Network, config: Any, pools: Sequence[Pool], device: torch.device) -> None:
        self.network, self.config, self.device = network, config, device
        self.num_kv_heads, self.head_dim = config.n_kv_head, config.n_embd // config.n_head
        self.is_paged = device.type != "cpu"  # kernels that follow block tables themselves
        kv_dtype = torch.float32 if device.type == "cpu" else network.dtype
        groups = groups_of(config)
        self.cache = PagedCache(
            [len(layers) for _, layers in groups], [pool.num_blocks for pool in pools],
            BLOCK_SIZE, self.num_kv_heads, self.head_dim, device, kv_dtype,
        )  # fmt: skip
        self._place = {
            layer: (group, i) for group, (_, layers) in enumerate(groups) for i, layer in enumerate(layers)
        }
        self._windows = [-1 if window is None else window for window, _ in groups]
        self._pools = pools

    @torch.no_grad()
    def run(self, chunks: Sequence[Chunk], copies: Sequence[Copy] = ()) -> Tensor:
        """Compute the chunks and write their keys and values -> hidden states (N, D), chunk after chunk.

        no_grad and not inference_mode: masks and tables that are made here and kept may serve training later.
        """
        self.cache.copy_blocks(copies)
        ids, prev, positions = list[int](), list[int](), list[int]()
        for chunk in chunks:
            tokens = chunk.generation.tokens(max(0, chunk.start - 1), chunk.stop)
            if chunk.start == 0:
                tokens = [-1, *tokens]
            prev += tokens[:-1]
            ids += tokens[1:]
            positions += range(chunk.start, chunk.stop)
        numbers_3N = torch.tensor([ids, prev, positions], device=self.device)
        attend = self._attend_paged(chunks) if self.is_paged else self._attend_views(chunks)
        lengths = [chunk.stop - chunk.start for chunk in chunks]
        return self.network.hidden(numbers_3N[0], numbers_3N[1], numbers_3N[2], attend, lengths)

    @torch.no_grad()
    def logits(self, hidden_ND: Tensor) -> Tensor:
        """fp32 logits (N, V)."""
        return self.network.logits(hidden_ND)

    # ------------------------------------------------------------------ attention

    def _slots(self, chunks: Sequence[Chunk], group: int) -> Tensor:
        """Where in the group's pool each token's keys and values go."""
        slots = list[int]()
        for chunk in chunks:
            table = chunk.generation.tables[group]
            slots += [
                table[p // BLOCK_SIZE] * BLOCK_SIZE + p % BLOCK_SIZE for p in range(chunk.start, chunk.stop)
            ]
        return torch.tensor(slots, device=self.device)

    def _attend_views(self, chunks: Sequence[Chunk]) -> Any:
        """Sequence by sequence over views of the cache: no mask, no padding, and a row's result is the one
        that it has alone. Blocks that do not lie side by side are gathered first.
        """
        tier = pick(fa._override_impl, self.device, self.cache.dtype)
        K, kv_dtype = self.num_kv_heads, self.cache.dtype
        slots = [self._slots(chunks, group) for group in range(len(self._pools))]
        plans = [self._plan(chunks, group) for group in range(len(self._pools))]

        def attend(layer: int, q_NHE: Tensor, kv_N2KE: Tensor) -> Tensor:
            group, i = self._place[layer]
            store_S2KE = self.cache.kv[group][i]
            store_S2KE.index_copy_(0, slots[group], kv_N2KE.to(kv_dtype))
            q, window = q_NHE.to(kv_dtype), self._windows[group]
            left = None if window < 0 else window
            outputs = []
            for first, stop, runs in plans[group]:
                if len(runs) == 1:
                    seen = store_S2KE[runs[0][0] : runs[0][1]]
                else:
                    seen = torch.cat([store_S2KE[a:b] for a, b in runs])
                k, v = seen[None, :, :K], seen[None, :, K:]
                outputs.append(tier.attend(q[None, first:stop], k, v, left, 0)[0])
            y_NHE = outputs[0] if len(outputs) == 1 else torch.cat(outputs)
            return y_NHE.to(q_NHE.dtype)

        return attend

    def _plan(self, chunks: Sequence[Chunk], group: int) -> list[tuple[int, int, list[tuple[int, int]]]]:
        """Per chunk: its first and last token + 1 among the N, and the stretches of slots that it reads."""
        plan, first = [], 0
        for chunk in chunks:
            live = self._pools[group].live_from(chunk.start, BLOCK_SIZE)
            num_blocks = -(-chunk.stop // BLOCK_SIZE)
            blocks = chunk.generation.tables[group][live:num_blocks]
            runs = list[tuple[int, int]]()
            start = last = blocks[0]
            for block in blocks[1:]:
                if block != last + 1:
                    runs.append((start * BLOCK_SIZE, (last + 1) * BLOCK_SIZE))
                    start = block
                last = block
            unfilled = num_blocks * BLOCK_SIZE - chunk.stop
            runs.append((start * BLOCK_SIZE, (last + 1) * BLOCK_SIZE - unfilled))
            count = chunk.stop - chunk.start
            plan.append((first, first + count, runs))
            first += count
        return plan

    def _attend_paged(self, chunks: Sequence[Chunk]) -> Any:
        """By the interface's page tables: all single tokens in one call, each longer chunk in its own."""
        singles = [n for n, chunk in enumerate(chunks) if chunk.stop - chunk.start == 1]
        calls = [singles] if singles else []
        calls += [[n] for n, chunk in enumerate(chunks) if chunk.stop - chunk.start > 1]
        firsts = [0]
        for chunk in chunks:
            firsts.append(firsts[-1] + chunk.stop - chunk.start)
        K, size, device = self.num_kv_heads, BLOCK_SIZE, self.device
        plans = []
        for members in calls:
            starts = torch.tensor([chunks[n].start for n in members], dtype=torch.int32, device=device)
            tables = []
            for group in range(len(self._pools)):
                rows = [chunks[n].generation.tables[group] for n in members]
                longest = max(map(len, rows))
                padded = [row + [0] * (longest - len(row)) for row in rows]
                tables.append(torch.tensor(padded, dtype=torch.int32, device=device))
            where = torch.tensor(
                [range(firsts[n], firsts[n] + chunks[n].stop - chunks[n].start) for n in members],
                device=device,
            )
            plans.append((where, starts, tables))

        def attend(layer: int, q_NHE: Tensor, kv_N2KE: Tensor) -> Tensor:
            group, i = self._place[layer]
            store_PS2KE = self.cache.kv[group][i].unflatten(0, (-1, size))
            k_cache, v_cache = store_PS2KE[:, :, :K], store_PS2KE[:, :, K:]
            dtype = self.cache.dtype
            q, kv = q_NHE.to(dtype), kv_N2KE.to(dtype)
            y_NHE = torch.empty_like(q_NHE)
            for where_BT, starts_B, tables in plans:
                y_NHE[where_BT] = fa.flash_attn.flash_attn_with_kvcache(
                    q[where_BT], k_cache, v_cache, k=kv[where_BT][:, :, :K], v=kv[where_BT][:, :, K:],
                    cache_seqlens=starts_B, causal=True, window_size=(self._windows[group], 0),
                    page_table=tables[group],
                ).to(q_NHE.dtype)  # fmt: skip
            return y_NHE

        return attend
