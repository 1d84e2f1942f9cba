"""Blocks and scheduler against a cache that stores, in each slot, the very tokens that it stands for.

What a slot must hold is a function of the ids up to its position, so every sequence can be checked at every
step: whatever was shared, forked, copied, preempted or forgotten, it has to read its own past.
"""

from __future__ import annotations

import random
import subprocess
import sys

import pytest
from helpers.block_cases import SIZE, WINDOW, World, new
from hypothesis import given, settings
from hypothesis import strategies as st

from nanochat.engine.block_manager import DUMMY, Pool
from nanochat.engine.sequence import Sequence

# ---------------------------------------------------------------- everything at once


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**9), st.sampled_from([9, 14, 40]), st.sampled_from([1, 3, 16]))
def test_every_sequence_reads_its_own_past(seed: int, num_blocks: int, budget: int) -> None:
    """Arrivals, forks, forced text, aborts and forgotten weights in random order, in tight pools too."""
    rng = random.Random(seed)
    world = World(num_blocks, rows=rng.randint(1, 5), budget=budget)
    everyone: list[Sequence] = []
    for _ in range(60):
        if rng.random() < 0.3:
            prompt = [rng.randrange(2) for _ in range(rng.choice([1, 4, 5, 9, 17]))]
            group = [new(prompt, rng.randint(1, 12)) for _ in range(rng.choice([1, 1, 2, 3]))]
            for g in group:
                world.scheduler.add(g)
                g.leader = None if g is group[0] else group[0]
            everyone += group
        if everyone and rng.random() < 0.1:
            g = rng.choice(everyone)
            g.finish_reason = g.finish_reason or "abort"
        world.step()
        for g in list(world.scheduler.running):
            if g.lag == 0 or (g.forced and g.num_computed >= len(g.prompt)):
                g.take(rng.randrange(2))
                if g.finish_reason is None and not g.forced and rng.random() < 0.1:
                    g.forced.extend([1, 0, 1, 1, 0])
    while world.scheduler.running or world.scheduler.waiting:
        world.step()
        world.answer(lambda g: rng.randrange(2))
    world.scheduler.sweep()
    assert all(g.finish_reason is not None for g in everyone)
    assert all(len(pool.free) == pool.num_blocks - 1 for pool in world.blocks.pools)


def test_the_world_notices_a_wrong_block() -> None:
    """The control: a table that names another block is seen at once."""
    world = World()
    world.scheduler.add(new([1, 0, 1, 1, 0, 1], 9))
    world.step()
    world.answer(lambda g: 1)
    (g,) = world.scheduler.running
    g.tables[0][0], g.tables[0][1] = g.tables[0][1], g.tables[0][0]
    with pytest.raises(AssertionError):
        world.step()


# ---------------------------------------------------------------- prefixes


def test_prefix_is_found_again() -> None:
    world = World()
    prompt = [1, 2, 3, 4, 5, 6, 7, 8, 9]
    world.scheduler.add(new(prompt))
    world.run()
    again, other, salted = new([*prompt, 1]), new([9, *prompt]), new(prompt, cache_namespace="key")
    for g in (again, other, salted):
        world.scheduler.add(g)
    world.step()
    assert [g.num_cached for g in (again, other, salted)] == [8, 0, 0]
    world.run()


def test_full_hit_leaves_one_token() -> None:
    world = World()
    prompt = [1, 2, 3, 4, 5, 6, 7, 8]
    world.scheduler.add(new(prompt))
    world.run()
    world.scheduler.add(new(prompt))
    (chunk,) = world.step()
    assert (chunk.start, chunk.stop) == (4, 8)


def test_hit_compares_ids() -> None:
    """Equal hashes are no hit: Python's -1 and -2 have the same."""
    assert hash(-1) == hash(-2)
    world = World()
    world.scheduler.add(new([-1] * 9))
    world.run()
    world.scheduler.add(new([-2] * 9))
    world.step()
    assert world.chunks[0].start == 0


def test_no_hit_on_inflight_block() -> None:
    """Blocks count as known only after the step that computes them."""
    world = World(budget=64)
    first, second = new([1] * 9), new([1] * 9 + [2])
    world.scheduler.add(first)
    world.scheduler.add(second)
    assert [(c.start, c.stop) for c in world.step()] == [(0, 9), (0, 10)]
    world.run()


def test_preempted_rehits_own_blocks() -> None:
    world = World(num_blocks=9, rows=2, budget=64)
    old, young = new([1, 2, 3, 4, 5, 6], 22), new([7, 8, 9, 10, 11, 12], 22)
    world.scheduler.add(old)
    world.scheduler.add(young)
    world.run()
    assert world.scheduler.num_preempted >= 1
    assert len(old.output) == len(young.output) == 22
    assert world.num_computed < 2 * 28 + 28  # it was not computed from the start


def test_lru_order() -> None:
    """What was used last stays; of one prefix the end goes first."""
    world = World(num_blocks=13, rows=1, budget=64)
    for prompt in ([1] * 9, [2] * 9, [1] * 9, [3] * 17):
        world.scheduler.add(new(prompt, 1))
        world.run()
    world.scheduler.add(used := new([1] * 9, 1))
    world.run()
    assert used.num_cached == 8
    pool = world.blocks.pools[0]
    chain = [node.serial for node in pool.node_of.values() if node.key[1] == (1,) * 4]
    known = [pool.node_of[block].serial for block in pool.free if block in pool.node_of]
    assert [serial for serial in known if serial in chain] == sorted(chain, reverse=True)


def test_forgotten_weights_forget_prefixes() -> None:
    world = World()
    world.scheduler.add(new([1] * 9))
    world.run()
    world.blocks.clear()
    world.scheduler.add(new([1] * 9))
    world.step()
    assert world.chunks[0].start == 0
    world.run()


def test_no_double_free() -> None:
    pool = Pool(4)
    pool.take(2)
    pool.drop(2)
    with pytest.raises(AssertionError, match="free already"):
        pool.drop(2)


# ---------------------------------------------------------------- windows


def test_window_group_bounded() -> None:
    world = World(num_blocks=64, rows=1, budget=8)
    world.scheduler.add(new([1] * 40, 60))
    most = 0
    while world.scheduler.running or world.scheduler.waiting:
        chunks = world.step()
        for chunk in chunks:
            live = sum(block != DUMMY for block in chunk.sequence.tables[1])
            most = max(most, live)
        world.answer(lambda g: 1)
        world.scheduler.sweep()
    assert most <= -(-(WINDOW + 8) // SIZE) + 1


def test_a_hit_needs_the_window_too() -> None:
    """The long group still knows the prefix, the window's blocks are gone: no hit beyond what both know."""
    world = World(num_blocks=64, rows=1, budget=64, window_blocks=20)
    world.scheduler.add(new([1] * 25, 1))
    world.run()
    pool = world.blocks.pools[1]
    for block in list(pool.node_of):
        node = pool.node_of[block]
        if node.serial >= 5:
            del pool.node_of[block]
            node.blocks[1] = None
    world.scheduler.add(g := new([1] * 25, 1))
    world.run()
    assert g.num_cached == 16


# ---------------------------------------------------------------- the scheduler


def test_catch_up_in_chunks() -> None:
    world = World(num_blocks=80, rows=3, budget=10)
    long, short = new([1] * 25, 3), new([2] * 3, 3)
    world.scheduler.add(long)
    world.scheduler.add(short)
    seen = []
    for _ in range(4):
        seen.append([(c.sequence is long, c.start, c.stop) for c in world.step()])
        world.answer(lambda g: 0)
    assert seen == [
        [(True, 0, 10)],
        [(True, 10, 20)],
        [(True, 20, 25), (False, 0, 3)],
        [(True, 25, 26), (False, 3, 4)],
    ]


def test_forced_output_is_one_chunk() -> None:
    world = World()
    world.scheduler.add(g := new([1, 2], 20))
    world.step()
    g.take(3)
    g.forced.extend([4, 5, 6, 7])
    assert [(c.start, c.stop) for c in world.step()] == [(2, 7)]
    for n in range(4):
        assert world.step() == []
        g.take(99)
        assert g.output[-1] == 4 + n
    g.take(8)
    assert [(c.start, c.stop) for c in world.step()] == [(7, 8)]


def test_fork_copies_only_the_partial_block() -> None:
    world = World()
    group = [new([1] * 6, 4) for _ in range(3)]
    for g in group:
        world.scheduler.add(g)
        g.leader = None if g is group[0] else group[0]
    assert len(world.step()) == 1 and len(world.forks) == 2
    full, partial = group[0].tables[0]
    assert [world.blocks.pools[0].refs[b] for b in (full, partial)] == [3, 3]
    world.answer(lambda g: 2)
    world.step()
    assert world.blocks.pools[0].refs[full] == 3
    assert len({g.tables[0][1] for g in group}) == 3
    assert group[1].num_cached == 6


def test_no_admission_after_preempt() -> None:
    world = World(num_blocks=7, rows=3, budget=64)
    for n in (1, 2, 3):
        world.scheduler.add(new([n] * 7, 12))
    admitted: list[int] = []
    while world.scheduler.running or world.scheduler.waiting:
        before, known = world.scheduler.num_preempted, set(map(id, world.scheduler.running))
        chunks = world.step()
        if world.scheduler.num_preempted > before:
            assert {id(c.sequence) for c in chunks} <= known
            admitted.append(1)
        world.answer(lambda g: 0)
        world.scheduler.sweep()
    assert admitted


def test_lone_sequence_ends_with_length() -> None:
    world = World(num_blocks=4, rows=2, budget=64)
    world.scheduler.add(g := new([1] * 5, 50))
    world.run()
    assert g.finish_reason == "length" and len(g.output) == 12 - 5 + 1  # the last token needs no slot


def test_oversized_prompt_refused() -> None:
    world = World(num_blocks=4)
    world.scheduler.add(new([1] * 11))
    with pytest.raises(ValueError, match="cache of 12 tokens, found 12"):
        world.scheduler.add(new([1] * 12))


def test_abort_in_every_state() -> None:
    world = World(num_blocks=40, rows=1, budget=4)
    running, waiting = new([1] * 12), new([2] * 12)
    world.scheduler.add(running)
    world.scheduler.add(waiting)
    world.step()
    for g in (running, waiting):
        g.finish_reason = "abort"
    assert world.step() == []
    assert not world.scheduler.running and not world.scheduler.waiting
    assert all(len(pool.free) == 39 for pool in world.blocks.pools)


def test_it_needs_no_torch() -> None:
    program = "import sys, importlib.util as u, types\n" + "\n".join(
        [
            "for package in ('nanochat', 'nanochat.engine'):",
            "    module = types.ModuleType(package); sys.modules[package] = module",
            "    module.__path__ = [package.replace('.', '/')]",
            "import nanochat.engine.scheduler",
            "assert 'torch' not in sys.modules",
        ]
    )
    subprocess.run([sys.executable, "-c", program], check=True, cwd=__file__.rsplit("/tests/", 1)[0])
