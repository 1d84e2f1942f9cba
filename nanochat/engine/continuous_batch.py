"""Sequences that are generated together: they join whenever there is room and leave as they finish.

A step has two halves, so that a token can be shown before the next one is computed: `emit` chooses a token
for every row whose logits are ready, `compute` runs the model. What a row draws depends on its own tokens,
seed and settings alone. Letters: B rows, N tokens, D width, V vocabulary.
"""

from __future__ import annotations

from collections import abc
from typing import Any

import torch

from nanochat.engine.block_manager import BlockManager, Copy
from nanochat.engine.inference import prepare
from nanochat.engine.kv_cache import KVCache
from nanochat.engine.model_runner import BLOCK_SIZE, ModelRunner, make_pools
from nanochat.engine.sampling import Draws, sample, top_logprobs
from nanochat.engine.scheduler import TOKEN_BUDGET, Chunk, Scheduler
from nanochat.engine.sequence import Sequence
from nanochat.protocols import Model

# Multi-step decoding: up to 8 steps per host synchronisation. A stop wastes 3.5 tokens of its row on average,
# and a new sequence waits for 8 steps at most.
MAX_STEPS = 8
# Tokens of a prompt that are scored at a time: their logits take 16 MB with 32,768 ids.
SCORED_AT_ONCE = 128


class ContinuousBatch:
    """Continuous batching for a model with GPT's `forward_hidden`.

    Args:
        num_rows, context: up to this many sequences of up to `context` tokens run at once.
        network: the model prepared for inference (inference.prepare), if the caller keeps it.
        token_budget: tokens computed in a step at most.
        num_blocks: blocks of 16 tokens in the cache (default: enough for all rows at their longest). With
            fewer, sequences that do not fit wait, and the newest are preempted and computed again.
        in_bursts: forced text and accepted draft tokens appear in one `emit`, not one token per `emit`.
        speculate: draft tokens per step and row at most (nanochat.engine.speculate). The output does not
            depend on it: a draft token is accepted if it is the token that is drawn anyway.
        max_steps: steps per host synchronisation at most, where steps are graphs (GPUs).
    """

    def __init__(
        self,
        model: Model,
        num_rows: int,
        context: int,
        *,
        network: Any = None,
        token_budget: int = TOKEN_BUDGET,
        num_blocks: int | None = None,
        in_bursts: bool = False,
        speculate: int = 0,
        max_steps: int = MAX_STEPS,
    ) -> None:
        if speculate < 0:
            raise ValueError(f"speculate must be at least 0 tokens, found {speculate}")
        self.num_rows = num_rows
        self.in_bursts = in_bursts
        self.speculate = speculate
        self.max_steps = max_steps
        pools = make_pools(model.config, num_rows, context, token_budget, num_blocks)
        self.blocks = BlockManager(pools, BLOCK_SIZE)
        self.scheduler = Scheduler(self.blocks, num_rows, token_budget)
        self.runner = ModelRunner(network or prepare(model), pools, model.get_device())
        # Logits (V,) of rows that can draw, one for each draw.
        self._ready: dict[Sequence, list[torch.Tensor]] = {}
        # The same as one tensor, as long as no row has left or joined.
        self._stacked_BV: torch.Tensor | None = None

    @property
    def rows(self) -> list[Sequence]:
        """Sequences that have not ended, waiting ones too."""
        everyone = [*self.scheduler.running, *self.scheduler.waiting]
        return [row for row in everyone if row.finish_reason is None]

    @property
    def num_free_rows(self) -> int:
        """How many more sequences could run at once."""
        return max(0, self.num_rows - len(self.rows))

    @property
    def is_running(self) -> bool:
        return bool(self.rows)

    def admit(self, sequences: abc.Sequence[Sequence]) -> None:
        """Queue sequences; more than there is room for wait. Equal prompts are computed once.

        Raises ValueError for a prompt that could never fit into the cache.
        """
        leaders: dict[tuple, Sequence] = {}
        for sequence in sequences:
            self.scheduler.add(sequence)
            if sequence.prompt_top_logprobs is None:
                leader = leaders.setdefault((sequence.cache_namespace, tuple(sequence.prompt)), sequence)
                sequence.leader = None if leader is sequence else leader

    def emit(self) -> list[Sequence]:
        """Give a token to every row that can have one; returns those rows.

        A row leaves when it has ended, or somebody else has set its finish_reason.
        """
        running = [row for row in self.scheduler.running if row.finish_reason is None]
        forced = [row for row in running if row.forced]
        drawing = [row for row in self._ready if row.finish_reason is None and not row.forced]
        known = [row for row in running if row.pending and not row.forced]
        for row in forced:
            row.take(-1)
        for row in known:
            self._take_pending(row)
        still = self._draw(drawing)
        if self.in_bursts:
            while still:
                still = self._draw(still)
            for row in [*drawing, *known]:
                while row.pending:
                    self._take_pending(row)
                while row.forced and row.finish_reason is None:
                    row.take(-1)
        self.scheduler.sweep()
        return [*forced, *known, *drawing]

    def _take_pending(self, row: Sequence) -> None:
        row.take_pending()
        self.blocks.computed(row)

    def _draw(self, rows: list[Sequence]) -> list[Sequence]:
        """A token for each of these rows; returns those that can draw the next one at once."""
        if rows:
            if self._stacked_BV is None or len(self._stacked_BV) != len(rows):
                self._stacked_BV = torch.stack([self._ready[row][0] for row in rows])
            choose(rows, self._stacked_BV)
        still = []
        for row in rows:
            if row.check_draft():
                self.blocks.computed(row)
                del self._ready[row][0]
                still.append(row)
            else:
                del self._ready[row]
        self._stacked_BV = None
        return still

    def compute(self) -> None:
        """Run the model on what is known and not computed: next tokens, prompts, forced text."""
        if any(row.pending and row.finish_reason is None for row in self.scheduler.running):
            return  # pending tokens are shown first
        if self.speculate:
            for row in self.scheduler.running:
                if row not in self._ready:
                    row.propose(self.speculate)
        chunks, copies = self.scheduler.schedule()
        self._ready = {row: logits for row, logits in self._ready.items() if row.row >= 0}
        if not chunks or self._decode_several_steps(chunks, copies):
            return
        hidden_ND = self.runner.run(chunks, copies)
        # One entry for each draw: the row, and the place of its last token among the N tokens.
        ends = list[tuple[Sequence, int]]()
        at = 0
        for chunk in chunks:
            if chunk.sequence.prompt_logprobs is not None:
                self._score_prompt(chunk, hidden_ND[at : at + chunk.stop - chunk.start])
            at += chunk.stop - chunk.start
            if chunk.stop - chunk.num_drafted == chunk.sequence.num_tokens:
                ends += [(chunk.sequence, n) for n in range(at - 1 - chunk.num_drafted, at)]
        forks = self.scheduler.computed(chunks)
        self.scheduler.sweep()  # a prompt that was only to be scored
        ends = [(row, n) for row, n in ends if row.finish_reason is None]
        if not ends:
            return
        last_BD = hidden_ND if len(ends) == len(hidden_ND) else hidden_ND[[n for _, n in ends]]
        logits_BV = self.runner.logits(last_BD)
        is_all = not self._ready and not forks
        for (row, _), logits_V in zip(ends, logits_BV.unbind(), strict=True):
            self._ready.setdefault(row, []).append(logits_V)
        self._ready |= {follower: list(self._ready[leader]) for leader, follower in forks}
        self._stacked_BV = logits_BV if is_all and len(self._ready) == len(ends) else None

    def _decode_several_steps(self, chunks: list[Chunk], copies: list[Copy]) -> bool:
        """Multi-step decoding: draw several tokens of every row without reading them in between.

        Possible where the step is a graph, no sequence waits and no row needs the host before its next token.
        """
        rows = [chunk.sequence for chunk in chunks]
        steps = min(self.max_steps, *(row.limit - len(row.output) for row in rows))
        is_plain = all(
            chunk.stop - chunk.start == 1 and chunk.stop == row.num_tokens and row.output and row.is_plain
            for chunk, row in zip(chunks, rows, strict=True)
        )
        if steps < 2 or not is_plain or self._ready or self.scheduler.waiting:
            return False
        if not self.runner.has_graphs or not self.scheduler.reserve_steps(chunks, steps, copies):
            return False
        positions = [row.num_tokens for row in rows]
        settings = [row.sampling for row in rows]
        draws = Draws(settings, positions, steps, self.runner.device, self.runner.vocab_size)
        found = self.runner.draw_steps(chunks, copies, draws, steps)
        if found is None:
            return False
        copies.clear()
        self.scheduler.computed(chunks)
        for row, tokens in zip(rows, found, strict=True):
            row.pending.extend(tokens)
        return True

    def forget(self) -> None:
        """Drop all known prefixes: the weights have changed."""
        self.blocks.clear()

    def _score_prompt(self, chunk: Chunk, hidden_ND: torch.Tensor) -> None:
        """Log-probabilities of the prompt's tokens that follow the chunk's, some rows of logits at a time."""
        row = chunk.sequence
        assert row.prompt_logprobs is not None
        stop = min(chunk.stop, len(row.prompt) - 1)
        for position in range(len(row.prompt_logprobs) - 1, stop, SCORED_AT_ONCE):
            until = min(stop, position + SCORED_AT_ONCE)
            logits_NV = self.runner.logits(hidden_ND[position - chunk.start : until - chunk.start])
            targets = row.prompt[position + 1 : until + 1]
            row.prompt_logprobs += top_logprobs(
                logits_NV, targets, [row.prompt_top_logprobs or 0] * len(targets)
            )
        if row.limit < 1 and chunk.stop >= len(row.prompt):
            row.finish_reason = "length"


def choose(rows: abc.Sequence[Sequence], logits_BV: torch.Tensor) -> None:
    """Give each row a token drawn from its logits; forced tokens come first where they wait."""
    tokens = sample(
        logits_BV,
        [row.sampling for row in rows],
        [len(row.prompt) + len(row.output) for row in rows],
        [(row.prompt, row.output) for row in rows],
        [row.banned_now for row in rows],
    )
    asking = [b for b, row in enumerate(rows) if row.top_logprobs is not None]
    found: dict[int, Any] = {}
    if asking:
        counts = [rows[b].top_logprobs or 0 for b in asking]
        scores = top_logprobs(logits_BV[asking], [tokens[b] for b in asking], counts)
        found = dict(zip(asking, scores, strict=True))
    for b, (row, token) in enumerate(zip(rows, tokens, strict=True)):
        row.take(token, found.get(b))


class PlainBatch:
    """A batch for a model that has only `forward(ids, kv_cache=...)`: samples of one prompt, all in step.

    A dense cache with one position; a row that has ended goes on with its last token until all have.
    """

    def __init__(self, model: Any, num_rows: int, context: int) -> None:
        self.model, self.num_rows, self.context = model, num_rows, context
        self.rows: list[Sequence] = []
        self._cache = self._new_cache(1)
        self._logits_BV: torch.Tensor | None = None

    @property
    def is_running(self) -> bool:
        return any(row.finish_reason is None for row in self.rows)

    @torch.no_grad()
    def admit(self, sequences: abc.Sequence[Sequence]) -> None:
        """Compute the prompt, which all share, and copy its cache to every row. Once only."""
        assert not self.rows and len({tuple(g.prompt) for g in sequences}) == 1
        self.rows = list(sequences)
        self._forward([sequences[0].prompt])
        if len(self.rows) > 1:
            prefilled, self._cache = self._cache, self._new_cache(len(self.rows))
            self._cache.prefill(prefilled)
            assert self._logits_BV is not None
            self._logits_BV = self._logits_BV.expand(len(self.rows), -1)

    def emit(self) -> list[Sequence]:
        """Give every row that runs its next token; returns those rows."""
        assert self._logits_BV is not None
        running = [b for b, row in enumerate(self.rows) if row.finish_reason is None]
        choose([self.rows[b] for b in running], self._logits_BV[running])
        return [self.rows[b] for b in running]

    @torch.no_grad()
    def compute(self) -> None:
        """Run the model on the last token of every row."""
        if self.is_running:
            self._forward([[row.output[-1]] for row in self.rows])

    def _forward(self, rows: list[list[int]]) -> None:
        ids_BT = torch.tensor(rows, device=self.model.get_device())
        self._logits_BV = self.model.forward(ids_BT, kv_cache=self._cache)[:, -1]

    def _new_cache(self, num_rows: int) -> KVCache:
        cfg, dtype = self.model.config, getattr(self.model, "compute_dtype", torch.float32)
        shape = (num_rows, cfg.n_kv_head, self.context, cfg.n_embd // cfg.n_head, cfg.n_layer)
        return KVCache(*shape, self.model.get_device(), dtype)
