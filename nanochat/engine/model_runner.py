"""A network and the paged cache its sequences live in: chunks of tokens in, logits of their last ones out.

Tokens of all chunks go through the matrices together, flat; attention takes them chunk by chunk. It neither
schedules nor samples. Letters: N tokens, H query heads, K key/value heads, E head size, V vocabulary.
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
from nanochat.engine.kv_cache import PagedCache
from nanochat.engine.network import FusedNetwork, Network
from nanochat.engine.sampling import Draws
from nanochat.engine.scheduler import Chunk
from nanochat.flash_attention.cache import attend_kept
from nanochat.flash_attention.select import pick
from nanochat.kernels.decode import NativeStep, kv_dtype, library

BLOCK_SIZE = 16
CALL_BYTES = 400_000  # keys and values that a CPU reads in the time that a call of attention takes (20 us)


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


def numbers_of(chunks: Sequence[Chunk]) -> tuple[list[int], list[int], list[int]]:
    """(ids, the token before each or -1, positions) of the chunks' tokens, chunk after chunk."""
    ids, prev, positions = list[int](), list[int](), list[int]()
    for chunk in chunks:
        tokens = chunk.generation.tokens(max(0, chunk.start - 1), chunk.stop)
        if chunk.start == 0:
            tokens = [-1, *tokens]
        prev += tokens[:-1]
        ids += tokens[1:]
        positions += range(chunk.start, chunk.stop)
    return ids, prev, positions


class Runner:
    """Runs steps. On a CPU keys and values are fp32 unless decode.c takes bf16: SDPA over 1,024 keys of 10
    heads took 2.8 ms in bf16 and 0.38 in fp32 (one core of an AMD EPYC with AVX512-BF16, torch 2.15).
    """

    def __init__(self, network: Network, config: Any, pools: Sequence[Pool], device: torch.device) -> None:
        self.network, self.config, self.device = network, config, device
        self.num_kv_heads, self.head_dim = config.n_kv_head, config.n_embd // config.n_head
        self.is_paged = device.type != "cpu"  # kernels that follow block tables themselves
        dtype = kv_dtype(network) if device.type == "cpu" else network.dtype
        groups = groups_of(config)
        self.cache = PagedCache(
            [len(layers) for _, layers in groups], [pool.num_blocks for pool in pools],
            BLOCK_SIZE, self.num_kv_heads, self.head_dim, device, dtype,
        )  # fmt: skip
        self._place = {
            layer: (group, i) for group, (_, layers) in enumerate(groups) for i, layer in enumerate(layers)
        }
        self._windows = [-1 if window is None else window for window, _ in groups]
        self._pools = pools
        self.static: StaticSteps | None = None
        self._last: tuple[Tensor, Tensor] | None = None  # hidden states and logits of a graph
        if device.type == "cuda" and isinstance(network, FusedNetwork):
            self.static = StaticSteps(
                network, self.cache, self._place, self._windows, self.num_kv_heads, device
            )
        stores = [self.cache.kv[group][i] for group, i in (self._place[n] for n in range(config.n_layer))]
        groups_by_layer = [self._place[n][0] for n in range(config.n_layer)]
        windows = [self._windows[group] for group in groups_by_layer]
        self.native = (
            NativeStep.of(network, stores, windows, groups_by_layer, len(pools), BLOCK_SIZE)
            if device.type == "cpu"
            else None
        )

    @torch.no_grad()
    def run(self, chunks: Sequence[Chunk], copies: Sequence[Copy] = ()) -> Tensor:
        """Compute the chunks and write their keys and values -> hidden states (N, D), chunk after chunk.

        no_grad and not inference_mode: masks and tables that are made here and kept may serve training later.
        """
        self.cache.copy_blocks(copies)
        ids, prev, positions = numbers_of(chunks)
        if self.native is not None and len(ids) <= self.native.most and library() is not None:
            rows = [n for n, chunk in enumerate(chunks) for _ in range(chunk.start, chunk.stop)]
            tables = [
                [chunk.generation.tables[group] for chunk in chunks] for group in range(len(self._pools))
            ]
            return self.native(ids, prev, positions, rows, tables)
        if self.static is not None:
            self._last = self.static(chunks, ids, prev, positions)
            if self._last is not None:
                return self._last[0]
        numbers_3N = torch.tensor([ids, prev, positions], device=self.device)
        attend = self._attend_paged(chunks) if self.is_paged else self._attend_views(chunks)
        lengths = [chunk.stop - chunk.start for chunk in chunks]
        return self.network.hidden(numbers_3N[0], numbers_3N[1], numbers_3N[2], attend, lengths)

    @property
    def has_graphs(self) -> bool:
        return self.static is not None and self.static.problem is None

    @property
    def vocab(self) -> int:
        return int(self.config.vocab_size)

    @torch.no_grad()
    def ahead(
        self, chunks: Sequence[Chunk], copies: Sequence[Copy], draws: Draws, steps: int
    ) -> list[list[int]] | None:
        """The next `steps` tokens of rows, each chunk its last known token; None where no graph is had."""
        if self.static is None:
            return None
        self.cache.copy_blocks(copies)
        return self.static.ahead(chunks, *numbers_of(chunks), draws, steps)

    @torch.no_grad()
    def logits(self, hidden_ND: Tensor) -> Tensor:
        """fp32 logits (N, V)."""
        if self._last is not None and hidden_ND is self._last[0]:
            return self._last[1]
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
        """Views of the cache: no padding is written, nothing is gathered where blocks lie side by side.

        Short single tokens go together under a mask, everything else chunk by chunk.
        """
        tier = pick(fa._override_impl, self.device, self.cache.dtype)
        K, kept = self.num_kv_heads, self.cache.dtype
        slots = [self._slots(chunks, group) for group in range(len(self._pools))]
        spans, first = [], 0
        for chunk in chunks:
            spans.append((first, first + chunk.stop - chunk.start))
            first = spans[-1][1]
        teams = [self._team(chunks, spans, group) for group in range(len(self._pools))]
        plans = []
        for group, team in enumerate(teams):
            rest = [n for n in range(len(chunks)) if team is None or n not in team.members]
            plans.append([(*spans[n], self._runs(chunks[n], group)) for n in rest])

        def attend(layer: int, q_NHE: Tensor, kv_N2KE: Tensor) -> Tensor:
            group, i = self._place[layer]
            store_S2KE = self.cache.kv[group][i]
            store_S2KE.index_copy_(0, slots[group], kv_N2KE.to(kept))
            q_NHE, dtype, window = q_NHE.to(kept), q_NHE.dtype, self._windows[group]
            team, left = teams[group], None if window < 0 else window
            if team is not None and not plans[group]:
                return team.attend(q_NHE, store_S2KE, K).to(dtype)
            outputs = []
            for first, stop, runs in plans[group]:
                stretches = [store_S2KE[a:b] for a, b in runs]
                seen = stretches[0] if len(runs) == 1 else torch.cat(stretches)
                k, v = seen[None, :, :K], seen[None, :, K:]
                outputs.append(tier.attend(q_NHE[None, first:stop], k, v, left, 0)[0])
            if team is None:
                return (outputs[0] if len(outputs) == 1 else torch.cat(outputs)).to(dtype)
            y_NHE = torch.empty_like(q_NHE)
            y_NHE[team.tokens] = team.attend(q_NHE, store_S2KE, K)
            for (first, stop, _), output in zip(plans[group], outputs, strict=True):
                y_NHE[first:stop] = output
            return y_NHE.to(dtype)

        return attend

    def _runs(self, chunk: Chunk, group: int) -> list[tuple[int, int]]:
        """The stretches of slots that a chunk reads."""
        live = self._pools[group].live_from(chunk.start, BLOCK_SIZE)
        num_blocks = -(-chunk.stop // BLOCK_SIZE)
        blocks = chunk.generation.tables[group][live:num_blocks]
        runs, start, last = list[tuple[int, int]](), blocks[0], blocks[0]
        for block in blocks[1:]:
            if block != last + 1:
                runs.append((start * BLOCK_SIZE, (last + 1) * BLOCK_SIZE))
                start = block
            last = block
        unfilled = num_blocks * BLOCK_SIZE - chunk.stop
        runs.append((start * BLOCK_SIZE, (last + 1) * BLOCK_SIZE - unfilled))
        return runs

    def _team(self, chunks: Sequence[Chunk], spans: Sequence[tuple[int, int]], group: int) -> _Team | None:
        """The single tokens whose rows lie at home, if one masked call costs less than a call a row.

        A single row counts when its window has come round: its ring is read as it lies, not put together.
        """
        pool = self._pools[group]
        members = {
            n: chunk
            for n, chunk in enumerate(chunks)
            if chunk.stop - chunk.start == 1
            and chunk.generation.strays[group] < pool.live_from(chunk.start, BLOCK_SIZE)
        }
        lone = next(iter(members.values())) if len(members) == 1 else None
        if not members or (lone is not None and len(self._runs(lone, group)) == 1):
            return None
        ring = pool.row_blocks * BLOCK_SIZE
        rows = {chunk.generation.row: n for n, chunk in members.items()}
        first, last = min(rows), max(rows)
        width = min(ring, max(chunk.stop for chunk in members.values()))
        start = (1 + first * pool.row_blocks) * BLOCK_SIZE
        if start + (last - first) * ring + width > pool.num_blocks * BLOCK_SIZE:
            return None
        reach = ring if pool.window is None else pool.window
        lone_slots = sum(min(chunk.stop, reach + 1) for chunk in members.values())
        slot_bytes = 2 * self.num_kv_heads * self.head_dim * self.cache.dtype.itemsize
        extra_slots = (last - first + 1) * width - lone_slots
        if extra_slots * slot_bytes > len(members) * CALL_BYTES:
            return None
        filler = next(iter(members))
        asked = [rows.get(row, filler) for row in range(first, last + 1)]
        ends = torch.tensor([chunks[n].start for n in asked])[:, None]
        back = (ends - torch.arange(width)) % ring
        bias_BS = torch.zeros(back.shape, dtype=self.cache.dtype)
        bias_BS.masked_fill_(back > ends.clamp(max=reach), -torch.inf)
        order = sorted(members)
        return _Team(
            frozenset(members),
            torch.tensor([spans[n][0] for n in order]),
            torch.tensor([spans[n][0] for n in asked]),
            torch.tensor([chunks[n].generation.row - first for n in order]),
            bias_BS, start, ring,
        )  # fmt: skip

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


@dataclass(frozen=True)
class _Team:
    """Rows r of one stretch of the pool, each a ring of `ring` slots, that attend in one call."""

    members: frozenset[int]  # chunks
    tokens: Tensor  # their places among the N tokens
    asked: Tensor  # for each row of the stretch the token whose query it answers
    rows: Tensor  # for each of `tokens` its row in the stretch
    bias_BS: Tensor
    start: int
    ring: int

    def attend(self, q_NHE: Tensor, store_S2KE: Tensor, num_kv_heads: int) -> Tensor:
        """(len(tokens), H, E)."""
        slot, head, _ = store_S2KE.stride()
        shape = (*self.bias_BS.shape, num_kv_heads, store_S2KE.shape[2])
        strides = (self.ring * slot, slot, head, 1)
        offset = store_S2KE.storage_offset() + self.start * slot
        k, v = (torch.as_strided(store_S2KE, shape, strides, offset + at * head) for at in (0, num_kv_heads))
        return attend_kept(q_NHE[self.asked], k, v, self.bias_BS)[self.rows]
