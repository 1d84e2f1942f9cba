"""Who computes what in the next step. Imports no torch.

There are no phases: a step gives tokens to sequences so that what is computed catches up with what is known.
A new prompt lags by many tokens, a sequence that decodes by one, forced output of the tool by a few.
"""

from __future__ import annotations

from collections import abc, deque
from dataclasses import dataclass

from nanochat.engine.block_manager import BlockManager, Copy
from nanochat.engine.sequence import Sequence

TOKEN_BUDGET = 2048
FREE_FRAC = 0.01  # of the blocks, kept back when a sequence is admitted


@dataclass(frozen=True)
class Chunk:
    """Tokens start .. stop - 1 of a sequence are computed in this step; the last num_drafted are guesses."""

    sequence: Sequence
    start: int
    stop: int
    num_drafted: int = 0


class Scheduler:
    """Running sequences in the order of their admission, waiting ones in that of their arrival."""

    def __init__(self, blocks: BlockManager, max_rows: int, token_budget: int = TOKEN_BUDGET) -> None:
        self.blocks, self.token_budget = blocks, token_budget
        self.running: list[Sequence] = []
        self.waiting: deque[Sequence] = deque()
        self.num_preempted = 0
        self._rows = deque(range(max_rows))  # the row that has been free for the longest time first

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence. Raises ValueError for a prompt that could never be computed."""
        if not self.blocks.fits(len(sequence.prompt) + 1):
            held = (self.blocks.pools[0].num_blocks - 1) * self.blocks.block_size
            raise ValueError(
                f"the prompt must leave room in a cache of {held} tokens, "
                f"found {len(sequence.prompt)}; cut it"
            )
        if sequence.finish_reason is None:
            self.waiting.append(sequence)

    def schedule(self) -> tuple[list[Chunk], list[Copy]]:
        """The chunks of the next step and the blocks to copy before it. Ended sequences lose theirs here."""
        self.sweep()
        chunks, copies, budget = list[Chunk](), list[Copy](), self.token_budget
        has_preempted = False
        spare = budget - sum(min(sequence.lag, budget) for sequence in self.running)  # for guesses
        for sequence in list(self.running):
            count = min(sequence.lag, budget)
            if count == 0 or sequence.row < 0:  # waits until forced tokens are shown; was preempted
                continue
            stop = sequence.num_computed + count
            num_drafted = min(len(sequence.draft), max(0, spare))
            if num_drafted and self.blocks.reserve(sequence, stop + num_drafted, copies):
                chunks.append(Chunk(sequence, stop - count, stop + num_drafted, num_drafted))
                budget -= count + num_drafted
                spare -= num_drafted
                sequence.keep_draft(stop + num_drafted)
                continue
            sequence.draft = []  # nobody is preempted for a guess
            while sequence.row >= 0 and not self.blocks.reserve(sequence, stop, copies):
                has_preempted = True
                if self.running == [sequence]:
                    sequence.finish_reason = "length"  # it has outgrown the whole pool
                    self.sweep()
                else:
                    self._preempt(self.running[-1])
            if sequence.row >= 0:
                chunks.append(Chunk(sequence, sequence.num_computed, stop))
                budget -= count
        if not has_preempted:
            self._admit(chunks, copies, budget)
        return chunks, copies

    def reserve_steps(self, chunks: abc.Sequence[Chunk], steps: int, copies: list[Copy]) -> bool:
        """Blocks for steps - 1 tokens that will follow each of these chunks; nobody is preempted for them."""
        return all(self.blocks.reserve(chunk.sequence, chunk.stop + steps - 1, copies) for chunk in chunks)

    def computed(self, chunks: abc.Sequence[Chunk]) -> list[tuple[Sequence, Sequence]]:
        """Count a step's tokens as computed -> (leader, follower) for each sequence that starts as a fork."""
        forks = []
        for chunk in chunks:
            sequence = chunk.sequence
            sequence.num_computed = chunk.stop - chunk.num_drafted
            self.blocks.computed(sequence)
            if sequence.num_computed != len(sequence.prompt) or sequence.output:
                continue
            for follower in [f for f in self.waiting if f.leader is sequence]:
                follower.leader = None
                if self._rows and follower.finish_reason is None:
                    self.waiting.remove(follower)
                    self.blocks.fork(sequence, follower)
                    follower.num_cached = len(follower.prompt)
                    follower.row = self._rows[0]
                    self._start(follower)
                    forks.append((sequence, follower))
        return forks

    def sweep(self) -> None:
        """Forget sequences that have ended, and take their blocks back."""
        for sequence in [g for g in self.running if g.finish_reason is not None]:
            self._stop(sequence)
        if any(g.finish_reason is not None for g in self.waiting):
            self.waiting = deque(g for g in self.waiting if g.finish_reason is None)

    # ------------------------------------------------------------------ inside

    def _admit(self, chunks: list[Chunk], copies: list[Copy], budget: int) -> None:
        for sequence in list(self.waiting):
            if not self._rows or budget == 0:
                return
            leader = sequence.leader
            if leader is not None and leader.row >= 0 and leader.num_computed < len(leader.prompt):
                continue  # its prompt is being computed: fork then
            sequence.leader = None
            self.blocks.attach(sequence)
            sequence.row = self._rows[0]
            count = min(sequence.lag, budget)
            stop = sequence.num_computed + count
            has_room = not self.running or self.blocks.has_room(sequence, stop, FREE_FRAC)
            if not has_room or not self.blocks.reserve(sequence, stop, copies):
                self.blocks.release(sequence)
                sequence.row = -1
                return
            self.waiting.remove(sequence)
            self._start(sequence)
            chunks.append(Chunk(sequence, sequence.num_computed, stop))
            budget -= count

    def _start(self, sequence: Sequence) -> None:
        self._rows.remove(sequence.row)
        self.running.append(sequence)

    def _stop(self, sequence: Sequence) -> None:
        self.running.remove(sequence)
        self.blocks.release(sequence)
        self._rows.append(sequence.row)
        sequence.row, sequence.draft, sequence.num_drafted = -1, [], 0
        sequence.pending.clear()

    def _preempt(self, sequence: Sequence) -> None:
        self._stop(sequence)
        self.waiting.appendleft(sequence)
        self.num_preempted += 1
