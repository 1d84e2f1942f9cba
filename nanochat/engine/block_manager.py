"""Which block of the cache holds which tokens: free lists, reference counts, the index of known prefixes.

Imports no torch. The layers of a model fall into groups that see equally far back; each group has a pool of
blocks and each sequence a table a group: entry i names the block of positions i * block_size and on. Block 0
of a pool is a dummy that stands where nothing is needed (any more). What a block holds is a function of the
ids up to its end, so a full block can serve every sequence that begins with them.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field

from nanochat.engine.sequence import Generation

DUMMY = 0
Copy = tuple[int, int, int]  # group, from block, to block


@dataclass(eq=False)
class Node:
    """One full block's worth of ids after a known prefix, and the block of each group that holds it."""

    key: tuple[str | int, tuple[int, ...]]  # (parent's serial, or the salt at the root; ids)
    serial: int
    blocks: list[int | None]


@dataclass
class Pool:
    """The blocks of one group of layers. window: how far back they see, None for everything.

    Row r would like to have block i at 1 + r * row_blocks + i % row_blocks: blocks that lie side by side are
    read without a copy.
    """

    num_blocks: int
    window: int | None = None
    row_blocks: int = 1
    refs: list[int] = field(init=False)
    free: OrderedDict[int, None] = field(init=False)  # least recently used first
    node_of: dict[int, Node] = field(init=False, default_factory=dict)
    freed_at: list[int] = field(init=False)
    clock: int = field(init=False, default=0)

    def __post_init__(self) -> None:
        self.refs = [1] + [0] * (self.num_blocks - 1)
        self.free = OrderedDict.fromkeys(range(1, self.num_blocks))
        self.freed_at = [0] * self.num_blocks

    def home(self, row: int, index: int) -> int:
        """The block that entry `index` of a row's table would like to be."""
        return 1 + row * self.row_blocks + index % self.row_blocks

    def choose(self, row: int, index: int) -> int:
        """A free block for entry `index` of a row's table: its home, unless that holds a prefix of the more
        recent half; else the least recently used.
        """
        wanted = self.home(row, index)
        oldest = next(iter(self.free))
        if wanted in self.free and (
            wanted not in self.node_of or 2 * self.freed_at[wanted] <= self.freed_at[oldest] + self.clock
        ):
            return wanted
        return oldest

    def take(self, block: int) -> None:
        """One more reference."""
        if self.refs[block] == 0:
            del self.free[block]
        self.refs[block] += 1

    def drop(self, block: int) -> None:
        """One reference less; a block without any is free, and keeps what it holds until it is needed."""
        if block == DUMMY:
            return
        assert self.refs[block] > 0, f"block {block} is free already"
        self.refs[block] -= 1
        if self.refs[block] == 0:
            self.clock += 1
            self.freed_at[block] = self.clock
            self.free[block] = None

    def live_from(self, num_computed: int, block_size: int) -> int:
        """First entry of a table that later positions still see."""
        return 0 if self.window is None else max(0, num_computed - self.window) // block_size


class BlockManager:
    """The tables of all sequences. Group 0 sees everything; the others are windows."""

    def __init__(self, pools: Sequence[Pool], block_size: int) -> None:
        assert pools[0].window is None
        self.pools, self.block_size = list(pools), block_size
        self._index: dict[tuple[str | int, tuple[int, ...]], Node] = {}
        self._num_serials = 0
        self.num_queried = self.num_hit = 0  # tokens, for the metrics

    def blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_size)

    def fits(self, num_tokens: int) -> bool:
        """Whether a sequence of so many tokens has room when it is alone."""
        return self.blocks_for(num_tokens) < self.pools[0].num_blocks

    def clear(self) -> None:
        """Forget all prefixes (the weights have changed)."""
        self._index.clear()
        for pool in self.pools:
            pool.node_of.clear()

    # ------------------------------------------------------------------ a sequence's life

    def attach(self, sequence: Generation) -> None:
        """Give a sequence without blocks the longest known prefix; at least one token is left to compute."""
        nodes = self._match(sequence) if sequence.prompt_top_logprobs is None else []
        sequence.nodes, sequence.num_computed = nodes, len(nodes) * self.block_size
        sequence.tables = []
        for group, pool in enumerate(self.pools):
            first = pool.live_from(sequence.num_computed, self.block_size)
            table = [DUMMY] * first + [node.blocks[group] or DUMMY for node in nodes[first:]]
            assert DUMMY not in table[first:]
            for block in table[first:]:
                pool.take(block)
            sequence.tables.append(table)
        sequence.live_from = [pool.live_from(sequence.num_computed, self.block_size) for pool in self.pools]
        self.num_queried += sequence.num_tokens
        self.num_hit += sequence.num_computed
        sequence.num_cached = max(sequence.num_cached, min(sequence.num_computed, len(sequence.prompt)))

    def has_room(self, sequence: Generation, stop: int, kept_frac: float) -> bool:
        """Whether its known tokens (in windows: those before `stop`) fit beside a share that stays free."""
        return all(
            len(pool.free) - self._missing(sequence, sequence.num_tokens if group == 0 else stop, group)
            >= int(kept_frac * pool.num_blocks)
            for group, pool in enumerate(self.pools)
        )

    def reserve(self, sequence: Generation, stop: int, copies: list[Copy]) -> bool:
        """Blocks of its own for positions num_computed .. stop - 1; False, and nothing done, if they lack.

        A partial block that others read too is replaced: `copies` says which to copy before the step.
        """
        if any(
            self._missing(sequence, stop, group) > len(pool.free) for group, pool in enumerate(self.pools)
        ):
            return False
        tail = sequence.num_computed // self.block_size
        for group, pool in enumerate(self.pools):
            table = sequence.tables[group]
            if tail < len(table) and pool.refs[table[tail]] > 1:
                block = self._new(group, sequence.row, tail)
                copies.append((group, table[tail], block))
                pool.drop(table[tail])
                table[tail] = block
            while len(table) < self.blocks_for(stop):
                table.append(self._new(group, sequence.row, len(table)))
        self._note_strays(sequence, tail if sequence.strays else 0)
        return True

    def _note_strays(self, sequence: Generation, first: int) -> None:
        """strays[group]: the last entry that is not at home, -1 for none; `first`: where the news begin."""
        sequence.strays = sequence.strays or [-1] * len(self.pools)
        for group, pool in enumerate(self.pools):
            table, row = sequence.tables[group], sequence.row
            away = [i for i in range(first, len(table)) if table[i] != pool.home(row, i)]
            known = sequence.strays[group] if sequence.strays[group] < first else -1
            sequence.strays[group] = max([known, *away])

    def computed(self, sequence: Generation) -> None:
        """Register the blocks that are full now, and let go of those that no window reaches any more."""
        size = self.block_size
        for i in range(len(sequence.nodes), sequence.num_computed // size):
            parent = sequence.nodes[-1].serial if sequence.nodes else sequence.salt
            key = parent, tuple(sequence.tokens(i * size, (i + 1) * size))
            node = self._index.get(key)
            if node is None:
                self._num_serials += 1
                node = self._index[key] = Node(key, self._num_serials, [None] * len(self.pools))
            for group, pool in enumerate(self.pools):
                block = sequence.tables[group][i]
                if node.blocks[group] is None and block != DUMMY and block not in pool.node_of:
                    node.blocks[group], pool.node_of[block] = block, node
            sequence.nodes.append(node)
        for group, pool in enumerate(self.pools):
            live, table = pool.live_from(sequence.num_computed, size), sequence.tables[group]
            for i in reversed(range(sequence.live_from[group], live)):
                pool.drop(table[i])
                table[i] = DUMMY
            sequence.live_from[group] = live

    def release(self, sequence: Generation) -> None:
        """Take all blocks back, the tail first, so that the ends of prefixes are the first to be reused."""
        for pool, table in zip(self.pools, sequence.tables, strict=bool(sequence.tables)):
            for block in reversed(table):
                pool.drop(block)
        sequence.tables, sequence.nodes, sequence.live_from, sequence.strays = [], [], [], []
        sequence.num_computed = 0

    def fork(self, source: Generation, target: Generation) -> None:
        """Let `target`, which has the same tokens, share all of the source's blocks, the partial one too."""
        target.tables = [list(table) for table in source.tables]
        target.nodes, target.live_from = list(source.nodes), list(source.live_from)
        target.num_computed = source.num_computed
        for pool, table in zip(self.pools, target.tables, strict=True):
            for block in table:
                if block != DUMMY:
                    pool.take(block)

    # ------------------------------------------------------------------ inside

    def _missing(self, sequence: Generation, stop: int, group: int) -> int:
        table, tail = sequence.tables[group], sequence.num_computed // self.block_size
        is_shared = tail < len(table) and self.pools[group].refs[table[tail]] > 1
        return max(0, self.blocks_for(stop) - len(table)) + is_shared

    def _new(self, group: int, row: int, index: int) -> int:
        pool = self.pools[group]
        block = pool.choose(row, index)
        node = pool.node_of.pop(block, None)
        if node is not None:
            node.blocks[group] = None
            if not any(node.blocks) and self._index.get(node.key) is node:
                del self._index[node.key]
        pool.take(block)
        return block

    def _match(self, sequence: Generation) -> list[Node]:
        """The longest chain of known blocks, each group holding what the next position will see."""
        size, nodes, usable = self.block_size, list[Node](), 0
        parent: str | int = sequence.salt
        tokens = sequence.tokens(0, sequence.num_tokens)
        held = [0] * len(self.pools)  # how many of the last nodes each group has without a gap
        for i in range((len(tokens) - 1) // size):
            node = self._index.get((parent, tuple(tokens[i * size : (i + 1) * size])))
            if node is None or node.blocks[0] is None:
                break
            nodes.append(node)
            parent = node.serial
            held = [n + 1 if node.blocks[group] else 0 for group, n in enumerate(held)]
            wanted = [i + 1 - pool.live_from((i + 1) * size, size) for pool in self.pools]
            if all(n >= w for n, w in zip(held, wanted, strict=True)):
                usable = i + 1
        return nodes[:usable]
