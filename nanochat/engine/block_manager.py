"""Which block of the cache holds which tokens: free lists, reference counts, the index of known prefixes.

Imports no torch. The layers of a model fall into groups that see equally far back; each group has a pool of
blocks and each sequence a table a group: entry i names the block of positions i * block_size and on. Block 0
of a pool is a dummy that stands where nothing is needed (any more). What a block holds is a function of the
ids up to its end, so a full block can serve every sequence that begins with them.
"""

from __future__ import annotations

from collections import OrderedDict, abc
from dataclasses import dataclass, field

from nanochat.engine.sequence import Sequence

DUMMY = 0
Copy = tuple[int, int, int]  # group, from block, to block


@dataclass(eq=False)
class Node:
    """One full block's worth of ids after a known prefix, and the block of each group that holds it."""

    key: tuple[str | int, tuple[int, ...]]  # (parent's serial, or the cache_namespace at the root; ids)
    serial: int
    blocks: list[int | None]


@dataclass
class Pool:
    """The blocks of one group of layers. window: how far back they see, None for everything."""

    num_blocks: int
    window: int | None = None
    refs: list[int] = field(init=False)
    free: OrderedDict[int, None] = field(init=False)  # least recently used first
    node_of: dict[int, Node] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        self.refs = [1] + [0] * (self.num_blocks - 1)
        self.free = OrderedDict.fromkeys(range(1, self.num_blocks))

    def choose(self) -> int:
        """The free block that has not been used for the longest time."""
        return next(iter(self.free))

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
            self.free[block] = None

    def live_from(self, num_computed: int, block_size: int) -> int:
        """First entry of a table that later positions still see."""
        return 0 if self.window is None else max(0, num_computed - self.window) // block_size


class BlockManager:
    """The tables of all sequences. Group 0 sees everything; the others are windows."""

    def __init__(self, pools: abc.Sequence[Pool], block_size: int) -> None:
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

    def attach(self, sequence: Sequence) -> None:
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

    def has_room(self, sequence: Sequence, stop: int, kept_frac: float) -> bool:
        """Whether its known tokens (in windows: those before `stop`) fit beside a share that stays free."""
        return all(
            len(pool.free) - self._missing(sequence, sequence.num_tokens if group == 0 else stop, group)
            >= int(kept_frac * pool.num_blocks)
            for group, pool in enumerate(self.pools)
        )

    def reserve(self, sequence: Sequence, stop: int, copies: list[Copy]) -> bool:
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
                block = self._new(group)
                copies.append((group, table[tail], block))
                pool.drop(table[tail])
                table[tail] = block
            while len(table) < self.blocks_for(stop):
                table.append(self._new(group))
        return True

    def computed(self, sequence: Sequence) -> None:
        """Register the blocks that are full now, and let go of those that no window reaches any more."""
        size = self.block_size
        for i in range(len(sequence.nodes), sequence.num_computed // size):
            parent = sequence.nodes[-1].serial if sequence.nodes else sequence.cache_namespace
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

    def release(self, sequence: Sequence) -> None:
        """Take all blocks back, the tail first, so that the ends of prefixes are the first to be reused."""
        for pool, table in zip(self.pools, sequence.tables, strict=bool(sequence.tables)):
            for block in reversed(table):
                pool.drop(block)
        sequence.tables, sequence.nodes, sequence.live_from = [], [], []
        sequence.num_computed = 0

    def fork(self, source: Sequence, target: Sequence) -> None:
        """Let `target`, which has the same tokens, share all of the source's blocks, the partial one too."""
        target.tables = [list(table) for table in source.tables]
        target.nodes, target.live_from = list(source.nodes), list(source.live_from)
        target.num_computed = source.num_computed
        for pool, table in zip(self.pools, target.tables, strict=True):
            for block in table:
                if block != DUMMY:
                    pool.take(block)

    # ------------------------------------------------------------------ inside

    def _missing(self, sequence: Sequence, stop: int, group: int) -> int:
        table, tail = sequence.tables[group], sequence.num_computed // self.block_size
        is_shared = tail < len(table) and self.pools[group].refs[table[tail]] > 1
        return max(0, self.blocks_for(stop) - len(table)) + is_shared

    def _new(self, group: int) -> int:
        pool = self.pools[group]
        block = pool.choose()
        node = pool.node_of.pop(block, None)
        if node is not None:
            node.blocks[group] = None
            if not any(node.blocks) and self._index.get(node.key) is node:
                del self._index[node.key]
        pool.take(block)
        return block

    def _match(self, sequence: Sequence) -> list[Node]:
        """The longest chain of known blocks, each group holding what the next position will see."""
        size, nodes, usable = self.block_size, list[Node](), 0
        parent: str | int = sequence.cache_namespace
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
