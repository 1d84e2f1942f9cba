"""Guessed tokens change nothing but the number of steps: what is drawn is what is drawn without them."""

from __future__ import annotations

import itertools
import random
from functools import cache

import pytest
import torch
from helpers.batch_cases import (
    MODEL,
    NO_END,
    Caller,
    Letters,
    alone,
    count_tokens,
    run,
    start,
    texts,
)
from helpers.block_cases import World, new
from helpers.engine_cases import BOS, END, OUT, OUT_END, PY, PY_END, Bytes, Script, prompt
from hypothesis import given
from hypothesis import strategies as st

from nanochat.engine.calculator import ToolState
from nanochat.engine.continuous_batch import ContinuousBatch
from nanochat.engine.engine import Engine, Sampling
from nanochat.engine.sequence import Sequence
from nanochat.engine.speculate import FIRST_SIZE, NGRAMS, Lookup
from nanochat.gpt import GPTConfig

# ---------------------------------------------------------------- the guess


def naive_guess(ids: list[int], wanted: int) -> list[int]:
    """What followed the latest earlier occurrence of the longest known n-gram at the end."""
    for n in NGRAMS:
        for at in range(len(ids) - 1, n - 1, -1):
            if ids[at - n : at] == ids[-n:]:
                grown = list(ids)
                while len(grown) < len(ids) + wanted:
                    grown.append(grown[at + len(grown) - len(ids)])
                return grown[len(ids) :]
    return []


@given(st.lists(st.integers(0, 2), max_size=60), st.integers(1, 9), st.integers(0, 10**6))
def test_lookup_equals_naive_search(ids: list[int], most: int, seed: int) -> None:
    rng, lookup, at = random.Random(seed), Lookup(most), 0
    while at < len(ids):
        stop = min(len(ids), at + rng.randint(1, 5))
        found = lookup.propose(ids[at:stop], room := rng.randint(0, 9))
        assert found == naive_guess(ids[:stop], min(lookup.size, room)) and lookup.num_seen == stop
        lookup.judge(len(found), rng.randint(0, len(found)))
        assert 1 <= lookup.size <= most
        at = stop


def test_size_follows_success() -> None:
    lookup = Lookup(10)
    sizes = [lookup.size]
    for proposed, kept in ((2, 2), (4, 4), (8, 8), (10, 3), (10, 0), (5, 0)):
        lookup.judge(proposed, kept)
        sizes.append(lookup.size)
    assert sizes == [FIRST_SIZE, 4, 8, 10, 10, 5, 2]
    assert (lookup.num_proposed, lookup.num_kept) == (39, 17)
    with pytest.raises(ValueError, match="at least 1"):
        Lookup(0)
    with pytest.raises(ValueError, match="speculate"):
        ContinuousBatch(MODEL, 1, 20, speculate=-1)


# ---------------------------------------------------------------- the same tokens

SETTINGS = [
    Sampling(0.0),
    Sampling(0.0, repetition_penalty=1.3, presence_penalty=0.2, frequency_penalty=0.1, banned=(7, 9)),
    Sampling(0.3, top_k=5, logit_bias={65: 2.0, 66: -3.0}),
    Sampling(1.0, top_p=0.8, min_p=0.02),
]


def group(prompts: list[list[int]], limit: int = 20, **more) -> list[Sequence]:
    return [
        Sequence(ids, limit + i % 7, SETTINGS[i % len(SETTINGS)], NO_END, **more)
        for i, ids in enumerate(prompts)
    ]


@cache
def one_by_one(count: int) -> list[list[int]]:
    return [run(ContinuousBatch(MODEL, 1, 120), [row])[0] for row in group(repetitive(count))]


def kept(rows: list[Sequence]) -> int:
    return sum(row.lookup.num_kept for row in rows if row.lookup is not None)


def repetitive(count: int) -> list[list[int]]:
    """Prompts that say the same again and again, so that there is something to look up."""
    return [(ids[:9] * 6)[: 20 + 5 * i] for i, ids in enumerate(texts(count))]


@pytest.mark.parametrize("in_bursts", [True, False])
@pytest.mark.parametrize("how", [{}, {"token_budget": 11}, {"num_blocks": 11}, {"speculate": 1}])
def test_guessing_changes_no_token(in_bursts: bool, how: dict) -> None:
    """Mixed lengths and settings, small budgets (guesses are cut), preempted sequences, small rooms."""
    prompts = repetitive(6)
    rows = group(prompts)
    batch = ContinuousBatch(MODEL, 5, 120, in_bursts=in_bursts, **{"speculate": 6, **how})
    assert run(batch, rows) == one_by_one(len(prompts))
    assert kept(rows) > 5 and ("num_blocks" not in how or batch.scheduler.num_preempted > 0)


def test_fewer_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """A text that repeats itself takes a fraction of the steps, one emit a token or several."""
    ids = prompt(20) * 3
    plain = alone(ids, 60, temperature=0.0)
    for in_bursts in (True, False):
        batch = ContinuousBatch(MODEL, 1, 130, speculate=8, in_bursts=in_bursts)
        counts = count_tokens(batch, monkeypatch)
        row = start(ids, 60, temperature=0.0)
        assert run(batch, [row]) == [plain]
        assert row.lookup is not None and len(counts) < 30 and max(counts[1:]) == 9
        assert sum(counts) - len(ids) - (len(counts) - 1) == row.lookup.num_proposed


def test_through_page_tables(monkeypatch: pytest.MonkeyPatch) -> None:
    """The way of GPUs: proposals are longer chunks there."""
    prompts = repetitive(6)[:4]
    batch = ContinuousBatch(MODEL, 4, 120, speculate=5)
    batch.runner.is_paged = True
    assert run(batch, group(prompts)) == one_by_one(6)[:4]


def test_forks_and_second_turns() -> None:
    """Forks of one prompt; then a prompt that goes on where a guessing row has stopped, past the window."""
    ids = prompt(30) * 9
    batch = ContinuousBatch(MODEL, 3, 420, speculate=7)
    rows = [start(ids, 40, seed=i, temperature=0.4) for i in range(3)]
    assert run(batch, rows) == [alone(ids, 40, seed=i, temperature=0.4) for i in range(3)]
    later = [*ids, *rows[0].output, 5, 6]
    warm = start(later, 30, temperature=0.0)
    assert run(batch, [warm]) == [alone(later, 30, temperature=0.0)]
    assert warm.num_cached >= len(ids) + 16


def test_logprobs_stay() -> None:
    ids = prompt(15) * 3
    rows = [start(ids, 40, temperature=0.2, top_logprobs=2, prompt_top_logprobs=1) for _ in range(2)]
    run(ContinuousBatch(MODEL, 1, 90), rows[:1])
    run(ContinuousBatch(MODEL, 1, 90, speculate=6), rows[1:])
    assert rows[0].output == rows[1].output and kept(rows[1:]) > 5
    for plain, guessed in ((rows[0].logprobs, rows[1].logprobs),):
        assert plain is not None and guessed is not None and len(plain) == len(guessed) == 40
        for (a, likely_a), (b, likely_b) in zip(plain, guessed, strict=True):
            assert a == pytest.approx(b, abs=1e-4) and [i for i, _ in likely_a] == [i for i, _ in likely_b]


def test_ends() -> None:
    """End tokens, min_tokens and stop strings inside a proposal end the answer where they do without."""
    engine = Engine(MODEL, Letters())
    ids = prompt(12) * 4
    free = engine.start(ids, Sampling(0.0, banned=tuple(range(256, 262))), 40)
    run(engine.open_batch(1, 120), [free])
    text, num_kept = Letters().decode_bytes(free.output).decode(), 0
    for more in (
        {"stop": [text[35:38]]},
        {"stop_ids": {free.output[37]}},
        {"stop_ids": {free.output[25]}, "min_tokens": 33},
    ):
        rows = [engine.start(ids, free.sampling, 40, **more) for _ in range(2)]
        for row, how in zip(rows, ({}, {"speculate": 8, "in_bursts": True}), strict=True):
            run(ContinuousBatch(MODEL, 1, 120, **how), [row])
        assert (rows[0].output, rows[0].finish_reason) == (rows[1].output, rows[1].finish_reason)
        num_kept += kept(rows[1:])
    assert num_kept > 0


@pytest.mark.parametrize("in_bursts", [True, False])
def test_the_tool_is_called_inside_a_guess(in_bursts: bool) -> None:
    """A model that calls the same tool for ever: the proposal runs over the call, its output and on."""
    model = Caller(GPTConfig(256, 262, 1, 1, 1, 24, "L"))
    model.init_weights(0)
    model.nexts = dict(itertools.pairwise([BOS, PY, *b"1+29", PY_END])) | {OUT_END: PY}
    rows = []
    for speculate in (0, 16):
        batch = ContinuousBatch(model, 1, 200, in_bursts=in_bursts, speculate=speculate)
        rows.append(Sequence([BOS], 120, Sampling(0.0), frozenset([END]), ToolState(Bytes())))
        model.fed = []
        run(batch, rows[-1:])
    assert rows[0].output == rows[1].output and rows[0].mask == rows[1].mask
    assert rows[1].output[:10] == [PY, *b"1+29", PY_END, OUT, *b"30", OUT_END] and kept(rows[1:]) > 20


def test_surface() -> None:
    """generate, complete and columns of several samples, by the engine's flag; a plain model ignores it."""
    ids = prompt(10) * 3
    plain, quick = Engine(MODEL, Bytes()), Engine(MODEL, Bytes(), speculate=6)
    for how in ({"temperature": 0.0}, {"temperature": 0.5, "num_samples": 3}):
        assert list(plain.generate(ids, max_tokens=40, **how)) == list(
            quick.generate(ids, max_tokens=40, **how)
        )
    assert plain.complete([ids] * 2, max_tokens=30) == quick.complete([ids] * 2, max_tokens=30)
    script = Engine(Script([65], start=4), Bytes(), speculate=4)
    assert len(list(script.generate([1, 2, 3, 4]))) == 60


# ---------------------------------------------------------------- blocks


@pytest.mark.parametrize("seed", range(12))
def test_guesses_never_spoil_the_cache(seed: int) -> None:
    """Random proposals, some of them right, in tight pools with aborts and forced text: every chunk reads its
    own past, rejected tokens are never known as a prefix."""
    rng = random.Random(seed)
    world = World(rng.choice([9, 14, 40]), rows=rng.randint(1, 4), budget=rng.choice([3, 16]))
    everyone: list[Sequence] = []
    num_kept = 0
    for step in range(400):
        if step < 60 and rng.random() < 0.3:
            everyone.append(new([rng.randrange(2) for _ in range(rng.choice([1, 4, 9]))], rng.randint(1, 20)))
            world.scheduler.add(everyone[-1])
        for g in world.scheduler.running:
            if g.output and g.lag == 1 and not g.forced:
                g.draft = [
                    rng.randrange(2) for _ in range(min(rng.randrange(5), g.limit - len(g.output) - 1))
                ]
        world.step()
        for g in list(world.scheduler.running):
            going = g.lag == 0
            while going:
                g.take(rng.randrange(2))
                going = g.check_draft()
                num_kept += going
                if going:
                    world.blocks.computed(g)
            if g.forced:
                g.take(-1)
            elif g.finish_reason is None and rng.random() < 0.05:
                g.forced.extend([1, 0, 1])
        world.scheduler.sweep()
    assert all(g.finish_reason for g in everyone) and num_kept > 5
    assert all(len(pool.free) == pool.num_blocks - 1 for pool in world.blocks.pools)


def test_the_draft_follows_the_known_tokens() -> None:
    g = new([1, 2, 3], 9)
    g.take(4)
    g.draft = [5, 6]
    assert (g.num_tokens, g.tokens(2, 6), g.tokens(1, 3)) == (4, [3, 4, 5, 6], [2, 3])
    g.num_computed = 4
    g.keep_draft(5)
    assert g.draft == [5]
    g.take(5)
    assert g.check_draft() and (g.num_computed, g.draft) == (5, [])
    g.take(8)
    assert not g.check_draft() and g.lag == 1
    assert torch.equal(torch.tensor(g.tokens(0, 6)), torch.tensor([1, 2, 3, 4, 5, 8]))
