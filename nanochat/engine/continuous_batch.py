"""Sequences that are generated together: they join whenever there is room and leave as they finish.

A step has two halves, so that a token can be shown before the next one is computed: `emit` chooses a token
for every row whose logits are ready, `compute` runs the model. What a row draws depends on its own tokens,
seed and settings alone. Letters: B rows, N tokens, D width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from nanochat.engine.block_manager import BlockManager, Copy
from nanochat.engine.kv_cache import KVCache
from nanochat.engine.model_runner import BLOCK_SIZE, Runner, pools_for
from nanochat.engine.network import Network, network_of
from nanochat.engine.sampling import Draws, sample, top_logprobs
from nanochat.engine.scheduler import TOKEN_BUDGET, Chunk, Scheduler
from nanochat.engine.sequence import Generation

AHEAD = 8  # a stop wastes 3.5 tokens of its row on average, and newcomers wait for so many at most
SCORED_AT_ONCE = 128  # tokens of a prompt: their logits take 16 MB with 32,768 ids


class Batch:
    """Up to num_rows sequences of up to `context` tokens of a model with GPT's `forward_hidden`.

    network: the model made ready by somebody who keeps it (else it is made here, weights cast once).
    token_budget: tokens computed in a step at most. num_blocks: of the cache, 16 tokens each (default: enough
    for all rows at their longest); with fewer, sequences that do not fit wait, the newest are computed anew.
    in_bursts: forced text, and guesses that were right, appear in one emit, not a token an emit.
    speculate: tokens guessed at most a step and row (nanochat.engine.speculate), 0 for none. What is
    drawn does
    not depend on it: a guess is kept where it is the token drawn anyway.
    ahead: tokens of every row drawn at most before the host reads them, where steps are graphs (GPUs).
    """

    def __init__(
        self,
        model: Any,
        num_rows: int,
        context: int,
        *,
        network: Network | None = None,
        token_budget: int = TOKEN_BUDGET,
        num_blocks: int | None = None,
        in_bursts: bool = False,
        speculate: int = 0,
        ahead: int = AHEAD,
    ) -> None:
        if speculate < 0:
            raise ValueError(f"speculate must be at least 0 tokens, found {speculate}")
        self.num_rows, self.in_bursts, self.speculate, self.ahead = num_rows, in_bursts, speculate, ahead
        pools = pools_for(model.config, num_rows, context, token_budget, num_blocks, BLOCK_SIZE)
        self.blocks = BlockManager(pools, BLOCK_SIZE)
        self.scheduler = Scheduler(self.blocks, num_rows, token_budget)
        self.runner = Runner(network or network_of(model), model.config, pools, model.get_device())
        self._ready: dict[
            Generation, list[torch.Tensor]
        ] = {}  # logits (V,) of rows that can draw, one a draw
        self._stacked_BV: torch.Tensor | None = None  # the same as one tensor, while it is

    @property
    def rows(self) -> list[Generation]:
        """Sequences that have not ended, waiting ones too."""
        everyone = [*self.scheduler.running, *self.scheduler.waiting]
        return [row for row in everyone if row.finish_reason is None]

    @property
    def room(self) -> int:
        """How many more sequences could run at once."""
        return max(0, self.num_rows - len(self.rows))

    @property
    def is_running(self) -> bool:
        return bool(self.rows)

    def admit(self, generations: Sequence[Generation]) -> None:
        """Queue sequences; more than there is room for wait. Equal prompts are computed once.

        Raises ValueError for a prompt that could never fit into the cache.
        """
        leaders: dict[tuple, Generation] = {}
        for generation in generations:
            self.scheduler.add(generation)
            if generation.prompt_top_logprobs is None:
                leader = leaders.setdefault((generation.salt, tuple(generation.prompt)), generation)
                generation.leader = None if leader is generation else leader

    def emit(self) -> list[Generation]:
        """Give a token to every row that can have one; returns those rows.

        A row leaves when it has ended, or somebody else has set its finish_reason.
        """
        running = [row for row in self.scheduler.running if row.finish_reason is None]
        forced = [row for row in running if row.forced]
        drawing = [row for row in self._ready if row.finish_reason is None and not row.forced]
        known = [row for row in running if row.ahead and not row.forced]
        for row in forced:
            row.take(-1)
        for row in known:
            self._take_ahead(row)
        still = self._draw(drawing)
        if self.in_bursts:
            while still:
                still = self._draw(still)
            for row in [*drawing, *known]:
                while row.ahead:
                    self._take_ahead(row)
                while row.forced and row.finish_reason is None:
                    row.take(-1)
        self.scheduler.sweep()
        return [*forced, *known, *drawing]

    def _take_ahead(self, row: Generation) -> None:
        row.take_ahead()
        self.blocks.computed(row)

    def _draw(self, rows: list[Generation]) -> list[Generation]:
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
        if any(row.ahead and row.finish_reason is None for row in self.scheduler.running):
            return  # what is known ahead is shown first
        if self.speculate:
            for row in self.scheduler.running:
                if row not in self._ready:
                    row.propose(self.speculate)
        chunks, copies = self.scheduler.schedule()
        self._ready = {row: logits for row, logits in self._ready.items() if row.row >= 0}
        if not chunks or self._goes_ahead(chunks, copies):
            return
        hidden_ND = self.runner.run(chunks, copies)
        ends, at = (
            list[tuple[Generation, int]](),
            0,
        )  # one entry a draw: the row, its place among the N tokens
        for chunk in chunks:
            if chunk.generation.prompt_logprobs is not None:
                self._score_prompt(chunk, hidden_ND[at : at + chunk.stop - chunk.start])
            at += chunk.stop - chunk.start
            if chunk.stop - chunk.num_drafted == chunk.generation.num_tokens:
                ends += [(chunk.generation, n) for n in range(at - 1 - chunk.num_drafted, at)]
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

    def _goes_ahead(self, chunks: list[Chunk], copies: list[Copy]) -> bool:
        """Draw several tokens of every row without reading them in between, where a graph of the step is had,
        nobody waits and no row needs the host before its next token.
        """
        rows = [chunk.generation for chunk in chunks]
        steps = min(self.ahead, *(row.limit - len(row.output) for row in rows))
        is_plain = all(
            chunk.stop - chunk.start == 1 and chunk.stop == row.num_tokens and row.output and row.is_plain
            for chunk, row in zip(chunks, rows, strict=True)
        )
        if steps < 2 or not is_plain or self._ready or self.scheduler.waiting:
            return False
        if not self.runner.has_graphs or not self.scheduler.reserve_ahead(chunks, steps, copies):
            return False
        positions = [row.num_tokens for row in rows]
        settings = [row.sampling for row in rows]
        draws = Draws(settings, positions, steps, self.runner.device, self.runner.vocab)
        found = self.runner.ahead(chunks, copies, draws, steps)
        if found is None:
            return False
        copies.clear()
        self.scheduler.computed(chunks)
        for row, tokens in zip(rows, found, strict=True):
            row.ahead.extend(tokens)
        return True

    def forget(self) -> None:
        """Drop all known prefixes: the weights have changed."""
        self.blocks.clear()

    def _score_prompt(self, chunk: Chunk, hidden_ND: torch.Tensor) -> None:
        """Log-probabilities of the prompt's tokens that follow the chunk's, some rows of logits at a time."""
        row = chunk.generation
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


def choose(rows: Sequence[Generation], logits_BV: torch.Tensor) -> None:
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
    """Batch for a model that has only `forward(ids, kv_cache=...)`: samples of one prompt, all in step.

    A dense cache with one position; a row that has ended goes on with its last token until all have.
    """

    def __init__(self, model: Any, num_rows: int, context: int) -> None:
        self.model, self.num_rows, self.context = model, num_rows, context
        self.rows: list[Generation] = []
        self._cache = self._new_cache(1)
        self._logits_BV: torch.Tensor | None = None

    @property
    def is_running(self) -> bool:
        return any(row.finish_reason is None for row in self.rows)

    @torch.no_grad()
    def admit(self, generations: Sequence[Generation]) -> None:
        """Compute the prompt, which all share, and copy its cache to every row. Once only."""
        assert not self.rows and len({tuple(g.prompt) for g in generations}) == 1
        self.rows = list(generations)
        self._forward([generations[0].prompt])
        if len(self.rows) > 1:
            prefilled, self._cache = self._cache, self._new_cache(len(self.rows))
            self._cache.prefill(prefilled)
            assert self._logits_BV is not None
            self._logits_BV = self._logits_BV.expand(len(self.rows), -1)

    def emit(self) -> list[Generation]:
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
