"""Who computes what in the next step. Imports no torch.

There are no phases: a step gives tokens to sequences so that what is computed catches up with what is known.
A new prompt lags by many tokens, a sequence that decodes by one, forced output of the tool by a few.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from nanochat.engine.block_manager import BlockManager, Copy
from nanochat.engine.sequence import Generation

TOKEN_BUDGET = 2048
FREE_FRAC = 0.01  # of the blocks, kept back when a sequence is admitted


@dataclass(frozen=True)
class Chunk:
    """Tokens start .. stop - 1 of a sequence are computed in this step; the last num_drafted are guesses."""

    generation: Generation
    start: int
    stop: int
    num_drafted: int = 0


class Scheduler:
    """Running sequences in the order of their admission, waiting ones in that of their arrival."""

    def __init__(self, blocks: BlockManager, max_rows: int, token_budget: int = TOKEN_BUDGET) -> None:
        self.blocks, self.token_budget = blocks, token_budget
        self.running: list[Generation] = []
        self.waiting: deque[Generation] = deque()
        self.num_preempted = 0
        self._rows = deque(range(max_rows))  # the row that has been free for the longest time first

    def add(self, generation: Generation) -> None:
        """Queue a sequence. Raises ValueError for a prompt that could never be computed."""
        if not self.blocks.fits(len(generation.prompt) + 1):
            held = (self.blocks.pools[0].num_blocks - 1) * self.blocks.block_size
            raise ValueError(
                f"the prompt must leave room in a cache of {held} tokens, "
                f"found {len(generation.prompt)}; cut it"
            )
        if generation.finish_reason is None:
            self.waiting.append(generation)

    def schedule(self) -> tuple[list[Chunk], list[Copy]]:
        """The chunks of the next step and the blocks to copy before it. Ended sequences lose theirs here."""
        self.sweep()
        chunks, copies, budget = list[Chunk](), list[Copy](), self.token_budget
        has_preempted = False
        spare = budget - sum(min(generation.lag, budget) for generation in self.running)  # for guesses
        for generation in list(self.running):
            count = min(generation.lag, budget)
            if count == 0 or generation.row < 0:  # waits until forced tokens are shown; was preempted
                continue
            stop = generation.num_computed + count
            num_drafted = min(len(generation.draft), max(0, spare))
            if num_drafted and self.blocks.reserve(generation, stop + num_drafted, copies):
                chunks.append(Chunk(generation, stop - count, stop + num_drafted, num_drafted))
                budget -= count + num_drafted
                spare -= num_drafted
                generation.keep_draft(stop + num_drafted)
                continue
            generation.draft = []  # nobody is preempted for a guess
            while generation.row >= 0 and not self.blocks.reserve(generation, stop, copies):
                has_preempted = True
                if self.running == [generation]:
                    generation.finish_reason = "length"  # it has outgrown the whole pool
                    self.sweep()
                else:
                    self._preempt(self.running[-1])
            if generation.row >= 0:
                chunks.append(Chunk(generation, generation.num_computed, stop))
                budget -= count
        if not has_preempted:
            self._admit(chunks, copies, budget)
        return chunks, copies

    def reserve_ahead(self, chunks: Sequence[Chunk], steps: int, copies: list[Copy]) -> bool:
        """Blocks for steps - 1 tokens that will follow each of these chunks; nobody is preempted for them."""
        return all(self.blocks.reserve(chunk.generation, chunk.stop + steps - 1, copies) for chunk in chunks)

    def computed(self, chunks: Sequence[Chunk]) -> list[tuple[Generation, Generation]]:
        """Count a step's tokens as computed -> (leader, follower) for each sequence that starts as a fork."""
        forks = []
        for chunk in chunks:
            generation = chunk.generation
            generation.num_computed = chunk.stop - chunk.num_drafted
            self.blocks.computed(generation)
            if generation.num_computed != len(generation.prompt) or generation.output:
                continue
            for follower in [f for f in self.waiting if f.leader is generation]:
                follower.leader = None
                if self._rows and follower.finish_reason is None:
                    self.waiting.remove(follower)
                    self.blocks.fork(generation, follower)
                    follower.num_cached = len(follower.prompt)
                    follower.row = self._rows[0]
                    self._start(follower)
                    forks.append((generation, follower))
        return forks

    def sweep(self) -> None:
        """Forget sequences that have ended, and take their blocks back."""
        for generation in [g for g in self.running if g.finish_reason is not None]:
            self._stop(generation)
        if any(g.finish_reason is not None for g in self.waiting):
            self.waiting = deque(g for g in self.waiting if g.finish_reason is None)

    # ------------------------------------------------------------------ inside

    def _admit(self, chunks: list[Chunk], copies: list[Copy], budget: int) -> None:
        for generation in list(self.waiting):
            if not self._rows or budget == 0:
                return
            leader = generation.leader
            if leader is not None and leader.row >= 0 and leader.num_computed < len(leader.prompt):
                continue  # its prompt is being computed: fork then
            generation.leader = None
            self.blocks.attach(generation)
            generation.row = self._rows[0]
            count = min(generation.lag, budget)
            stop = generation.num_computed + count
            has_room = not self.running or self.blocks.has_room(generation, stop, FREE_FRAC)
            if not has_room or not self.blocks.reserve(generation, stop, copies):
                self.blocks.release(generation)
                generation.row = -1
                return
            self.waiting.remove(generation)
            self._start(generation)
            chunks.append(Chunk(generation, generation.num_computed, stop))
            budget -= count

    def _start(self, generation: Generation) -> None:
        self._rows.remove(generation.row)
        self.running.append(generation)

    def _stop(self, generation: Generation) -> None:
        self.running.remove(generation)
        self.blocks.release(generation)
        self._rows.append(generation.row)
        generation.row, generation.draft, generation.num_drafted = -1, [], 0
        generation.ahead.clear()

    def _preempt(self, generation: Generation) -> None:
        self._stop(generation)
        self.waiting.appendleft(generation)
        self.num_preempted += 1
