"""Shared by the tests that import it: cases first written for tests/engine/test_block_manager.py."""

from __future__ import annotations

from nanochat.engine.block_manager import DUMMY, BlockManager, Pool
from nanochat.engine.scheduler import Chunk, Scheduler
from nanochat.engine.sequence import Sequence

SIZE = 4


WINDOW = 6


class World:
    """A scheduler over pools that hold tokens, and checks after every step."""

    def __init__(
        self, num_blocks: int = 40, rows: int = 4, budget: int = 16, window_blocks: int | None = None
    ) -> None:
        pools = [Pool(num_blocks), Pool(window_blocks or num_blocks, WINDOW)]
        self.blocks = BlockManager(pools, SIZE)
        self.scheduler = Scheduler(self.blocks, rows, budget)
        self.store = [[[None] * SIZE for _ in range(pool.num_blocks)] for pool in pools]
        self.chunks: list[Chunk] = []
        self.num_computed = 0

    def step(self) -> list[Chunk]:
        chunks, copies = self.scheduler.schedule()
        for group, source, target in copies:
            self.store[group][target] = list(self.store[group][source])
        assert sum(chunk.stop - chunk.start for chunk in chunks) <= self.scheduler.token_budget
        for chunk in chunks:
            g = chunk.sequence
            assert g.num_computed == chunk.start < chunk.stop - chunk.num_drafted <= g.num_tokens
            ids = tuple(g.tokens(0, g.num_tokens + len(g.draft)))
            for group, pool in enumerate(self.blocks.pools):
                for p in range(chunk.start, chunk.stop):
                    block = g.tables[group][p // SIZE]
                    assert pool.refs[block] == 1 and block not in pool.node_of and block != DUMMY
                    self.store[group][block][p % SIZE] = ids[: p + 1]
        for chunk in chunks:  # reading comes after all writing, as in a layer
            self.check_reads(chunk.sequence, chunk.start, chunk.stop)
        self.num_computed += sum(chunk.stop - chunk.start for chunk in chunks)
        self.chunks = chunks
        self.forks = self.scheduler.computed(chunks)
        self.check_counts()
        return chunks

    def check_reads(self, g: Sequence, start: int, stop: int) -> None:
        ids = tuple(g.tokens(0, g.num_tokens + len(g.draft)))
        for group, pool in enumerate(self.blocks.pools):
            oldest = 0 if pool.window is None else max(0, start - pool.window)
            for p in range(oldest, stop):
                assert self.store[group][g.tables[group][p // SIZE]][p % SIZE] == ids[: p + 1], (group, p)

    def check_counts(self) -> None:
        for group, pool in enumerate(self.blocks.pools):
            used = [0] * pool.num_blocks
            for g in self.scheduler.running:
                for block in g.tables[group]:
                    used[block] += block != DUMMY
            assert pool.refs[1:] == used[1:]
            assert set(pool.free) == {b for b in range(1, pool.num_blocks) if not used[b]}
            for block, node in pool.node_of.items():
                assert node.blocks[group] == block
        for g in self.scheduler.waiting:
            assert not g.tables and g.row == -1

    def answer(self, draw) -> None:
        """Give each sequence whose known tokens are all computed its next token."""
        for g in list(self.scheduler.running):
            if g.lag == 0:
                g.take(draw(g))

    def run(self, limit: int = 500) -> None:
        while self.scheduler.running or self.scheduler.waiting:
            limit -= 1
            assert limit, "no end in sight"
            self.step()
            self.answer(lambda g: (len(g.output) * 7 + sum(g.prompt)) % 3)
            self.scheduler.sweep()


def new(prompt: list[int], limit: int = 6, **more) -> Sequence:
    return Sequence(prompt, limit, None, frozenset(), **more)
