"""The engine's identities, on a tiny random model in fp32, and its surface, on a model that is no network."""

import pytest
import torch
from helpers.engine_cases import BOS, END, OUT, OUT_END, PY, PY_END, Bytes, Script, prompt, tiny
from hypothesis import given, settings
from hypothesis import strategies as st

import nanochat.engine.engine as engine_module
from nanochat.engine import Engine, KVCache

MODEL = tiny()
ENGINE = Engine(MODEL, Bytes())
PROMPTS = [[BOS, *(i * 37 % 256 for i in range(n))] for n in (3, 0, 17, 5, 300, 17, 1)] + [[BOS, 1, 2, 3]] * 2


# ---------------------------------------------------------------- cache == full forward


@settings(max_examples=12, deadline=None)
@given(st.lists(st.sampled_from([1, 1, 2, 7, 64, 150]), min_size=1, max_size=6))
def test_any_chunking(chunks: list[int]) -> None:
    total = sum(chunks)
    ids_BT = torch.tensor([prompt(total), prompt(total)[::-1]])
    cache = KVCache(2, 2, total, 8, 3, "cpu", torch.float32)
    with torch.no_grad():
        whole_BTV = MODEL(ids_BT)
        pieces = [MODEL(chunk, kv_cache=cache) for chunk in ids_BT.split(chunks, dim=1)]
    torch.testing.assert_close(torch.cat(pieces, dim=1), whole_BTV, atol=1e-4, rtol=0)
    assert cache.cache_seqlens.tolist() == [total, total] and cache.get_pos() == total


# ---------------------------------------------------------------- greedy == naive, batch == one by one


def test_greedy_equals_naive() -> None:
    for text in PROMPTS[:5]:
        naive = list(MODEL.generate(text, 12, temperature=0))
        found = [column[0] for column, _ in ENGINE.generate(text, max_tokens=12, temperature=0)]
        assert found == naive[: len(found)] and (len(found) == 12 or found[-1] in (END, BOS))


@pytest.mark.parametrize(
    "how",
    [{"temperature": 0.0}, {"temperature": 1.0, "top_k": 20, "seed": 7}, {"temperature": 0.8, "top_p": 0.9}],
)
@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_batch_equals_single(how: dict, batch_size: int) -> None:
    together = ENGINE.complete(PROMPTS, max_tokens=10, batch_size=batch_size, **how)
    alone = [ENGINE.complete([text], max_tokens=10, **how)[0] for text in PROMPTS]
    assert together == alone
    assert all(len(c.ids) == len(c.mask) <= 10 for c in together)


def test_complete_equals_generate() -> None:
    completion = ENGINE.complete([PROMPTS[2]], max_tokens=20, temperature=1.0, seed=3)[0]
    results, masks = ENGINE.generate_batch(PROMPTS[2], max_tokens=20, temperature=1.0, seed=3)
    assert results == [PROMPTS[2] + completion.ids]
    assert masks == [[0] * len(PROMPTS[2]) + completion.mask]


def test_fork_equals_separate() -> None:
    results, _ = ENGINE.generate_batch(PROMPTS[3], num_samples=4, max_tokens=12, temperature=1.2, seed=5)
    assert len({tuple(result) for result in results}) == 4
    for i, result in enumerate(results):
        assert ENGINE.generate_batch(PROMPTS[3], max_tokens=12, temperature=1.2, seed=5 + i)[0] == [result]
    forks = ENGINE.complete([PROMPTS[3]] * 4, max_tokens=12, temperature=1.2, seed=[5, 6, 7, 8], batch_size=4)
    assert [PROMPTS[3] + fork.ids for fork in forks] == results


# ---------------------------------------------------------------- limits


def test_max_tokens_and_context() -> None:
    model = tiny(sequence_len=24)
    engine = Engine(model, Bytes())
    text = prompt(10)
    assert len(list(engine.generate(text, temperature=0))) <= 14
    assert list(engine.generate(text, max_tokens=0)) == [] == list(engine.generate(prompt(24)))
    assert engine.generate_batch(text, 2, max_tokens=0) == ([text, text], [[0] * 10] * 2)
    completion = engine.complete([text], max_tokens=None)[0]
    assert (completion.finish_reason, len(completion.ids)) == (
        "length",
        14,
    ) or completion.finish_reason == "stop"
    assert engine.complete([text], max_tokens=0)[0].ids == []
    assert engine.complete([], max_tokens=3) == []


def test_errors() -> None:
    for call, message in (
        (lambda: ENGINE.generate([]), "at least one token"),
        (lambda: ENGINE.generate([1], num_samples=0), "num_samples"),
        (lambda: ENGINE.generate([1], max_tokens=-1), "max_tokens"),
        (lambda: ENGINE.generate([1], temperature=-1), "temperature"),
        (lambda: ENGINE.complete([prompt(640)], max_tokens=1), "shorter than 640"),
        (lambda: ENGINE.complete([[1]], max_tokens=1, seed=[1, 2]), "seed per prompt"),
        (lambda: ENGINE.complete([[1]], max_tokens=1, batch_size=0), "batch_size"),
    ):
        with pytest.raises(ValueError, match=message):
            call()


def test_nothing_made_here_is_an_inference_tensor() -> None:
    """Training goes on after sampling: what either keeps must work in a backward pass."""
    ENGINE.complete([prompt(400)], max_tokens=2)
    model = tiny()
    model(torch.tensor([prompt(600)]), torch.tensor([prompt(600)])).backward()
    assert all(p.grad is not None for p in model.parameters())


# ---------------------------------------------------------------- a model that is no network


def test_tool_forces_its_output() -> None:
    said = [*b"x", PY, *b"12+34", PY_END, 0, 0, 0, 0, *b"!", END]  # the four zeros are overruled
    wanted = [*b"x", PY, *b"12+34", PY_END, OUT, *b"46", OUT_END, *b"!"]
    engine = Engine(Script(said, start=3), Bytes())
    results, masks = engine.generate_batch([BOS, 1, 2], max_tokens=40)
    assert results == [[BOS, 1, 2, *wanted]]
    assert masks == [[0, 0, 0, *[1] * 8, *[0] * 4, 1]]
    completion = engine.complete([[BOS, 1, 2]], max_tokens=40)[0]
    assert (completion.ids, completion.finish_reason, completion.stop_id) == (wanted, "stop", END)
    assert completion.mask == masks[0][3:]
    columns = list(engine.generate([BOS, 1, 2], max_tokens=9))  # forced tokens count
    assert [column[0] for column, _ in columns] == wanted[:9]


def test_refused_code_forces_nothing() -> None:
    said = [PY, *b"1/0", PY_END, *b"oh", END]
    results, masks = Engine(Script(said, start=1), Bytes()).generate_batch([BOS], max_tokens=40)
    assert results == [[BOS, *said[:-1]]] and masks == [[0] + [1] * 7]


def test_columns() -> None:
    """Rows end apart: the ending token is yielded with mask 1, then repeated with mask 0."""
    engine = Engine(Script([*b"ab", END, *b"zzz"], [*b"acdef", BOS], start=1), Bytes())
    columns = list(engine.generate([BOS], num_samples=2))
    assert [column[0] for column, _ in columns] == [*b"ab", END, END, END, END]
    assert [column[1] for column, _ in columns] == [*b"acdef", BOS]
    assert [masks for _, masks in columns] == [[1, 1], [1, 1], [1, 1], [0, 1], [0, 1], [0, 1]]
    assert engine.generate_batch([BOS], 2)[0] == [[BOS, *b"ab"], [BOS, *b"acdef"]]


def test_minimal_model_stops_at_the_context() -> None:
    engine = Engine(Script([65], start=4), Bytes())
    assert len(list(engine.generate([1, 2, 3, 4]))) == 60
    assert (
        len(list(engine.generate([1, 2, 3, 4], max_tokens=100))) == 100
    )  # asked for: as far as the model goes
    assert [len(c.ids) for c in engine.complete([[1, 2, 3, 4]] * 3, max_tokens=5)] == [5, 5, 5]


def test_samples_differ_and_repeat() -> None:
    class Even(Script):
        def forward(self, ids: torch.Tensor, kv_cache: KVCache) -> torch.Tensor:
            return torch.zeros_like(super().forward(ids, kv_cache))

    engine = Engine(Even([0], start=1), Bytes())
    first = next(engine.generate([BOS], num_samples=16, max_tokens=1))[0]
    assert len(set(first)) > 12
    assert engine.generate_batch([BOS], 2, max_tokens=9, seed=1) == engine.generate_batch(
        [BOS], 2, max_tokens=9, seed=1
    )
    assert engine.generate_batch([BOS], max_tokens=9, seed=1) != engine.generate_batch(
        [BOS], max_tokens=9, seed=2
    )


# ---------------------------------------------------------------- the cache by itself


def test_kv_cache_surface() -> None:
    cache = KVCache(
        batch_size=2, num_heads=3, seq_len=8, head_dim=4, num_layers=5, device="cpu", dtype=torch.float32
    )
    assert cache.k_cache.shape == cache.v_cache.shape == (5, 2, 8, 3, 4) and not cache.k_cache.any()
    assert (cache.n_layers, cache.max_seq_len, cache.prev_embedding, cache.get_pos()) == (5, 8, None, 0)
    assert cache.cache_seqlens.dtype == torch.int32 and cache.prev_ids.tolist() == [-1, -1]
    cache.advance(3)
    assert cache.get_pos() == 3 and cache.cache_seqlens.tolist() == [3, 3]
    keys, values = cache.get_layer_cache(1)
    keys[0, 0], values[1, 2] = 1.0, 2.0
    assert cache.k_cache[1, 0, 0].eq(1).all() and cache.v_cache[1, 1, 2].eq(2).all()
    cache.reset()
    assert cache.get_pos() == 0


def test_kv_cache_prefill() -> None:
    def new(rows: int = 1, length: int = 6, heads: int = 1) -> KVCache:
        return KVCache(rows, heads, length, 2, 2, "cpu", torch.float32)

    source = new()
    source.k_cache.normal_()
    source.v_cache.normal_()
    source.advance(4)
    source.prev_ids[0] = 9
    source.prev_embedding = torch.ones(1, 1, 5)
    target = new(rows=3, length=8)
    target.prefill(source)
    assert target.cache_seqlens.tolist() == [4, 4, 4] and target.prev_ids.tolist() == [9, 9, 9]
    assert target.prev_embedding is not None and target.prev_embedding.shape == (3, 1, 5)
    for row in range(3):
        assert torch.equal(target.k_cache[:, row, :4], source.k_cache[:, 0, :4])
        assert torch.equal(target.v_cache[:, row, :4], source.v_cache[:, 0, :4])
    assert not target.k_cache[:, :, 4:].any()
    for bad, message in ((target, "empty"), (new(length=5), "must hold"), (new(heads=2, length=8), "agree")):
        with pytest.raises(ValueError, match=message):
            bad.prefill(source)


def test_ended_by_somebody_else() -> None:
    batch = engine_module.ContinuousBatch(MODEL, 2, 50)
    rows = [ENGINE.start(prompt(n), engine_module.Sampling(0.0), 20) for n in (4, 6)]
    batch.admit(rows)
    assert batch.emit() == [] and batch.num_free_rows == 0  # nothing is computed yet
    batch.compute()
    assert batch.emit() == rows
    rows[0].finish_reason = "abort"
    batch.compute()
    assert batch.emit() == [rows[1]] and batch.rows == [rows[1]] and batch.num_free_rows == 1
    batch.compute()
    while batch.is_running:
        batch.emit()
        batch.compute()
    assert (
        rows[1].output[:20] == ENGINE.complete([prompt(6)], max_tokens=20)[0].ids and len(rows[0].output) == 1
    )
