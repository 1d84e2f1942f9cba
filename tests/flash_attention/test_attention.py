"""nanochat.flash_attention on a CPU: every backend against plain attention in fp64, and what always holds."""

from __future__ import annotations

import sys
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
from helpers.attention_cases import (
    CACHE_STORIES,
    HEADS,
    WINDOWS,
    check_cache,
    check_training,
    inputs,
    plain,
    visible,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import nanochat.flash_attention as fa
from nanochat.errors import UserError
from nanochat.flash_attention import flash_attn, reference, sdpa, select
from nanochat.flash_attention.intervals import intervals

CPU = torch.device("cpu")
HERE = [name for name in select.BACKENDS if select.verdict(name, CPU, torch.float32) is None]


@pytest.fixture(autouse=True)
def _no_override(monkeypatch):
    monkeypatch.setattr(fa, "_override_impl", None)


def starts_of(lengths, time):
    """doc_start (1, time) of documents of the given lengths; the last one runs to the end."""
    doc_start, position = torch.zeros(1, time, dtype=torch.int32), 0
    for length in lengths:
        doc_start[:, position:] = position
        position += length
        if position >= time:
            break
    return doc_start


# ---------------------------------------------------------------------------------------------- the matrix


@pytest.mark.parametrize("heads", HEADS, ids=["mha", "gqa", "mqa"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("backend", HERE)
def test_training_matrix(backend, dtype, heads):
    for left in WINDOWS:
        check_training(backend, CPU, dtype, heads, left, rows=1)


@pytest.mark.parametrize("time", [1, 2, 33, 400])
@pytest.mark.parametrize("backend", HERE)
def test_lengths_sizes_and_chunk_borders(backend, time):
    for left in (None, 0, 31, 191, 192, 200):
        check_training(backend, CPU, torch.float32, (2, 1), left, time=time, rows=1)
    for size in (16, 64, 128):
        check_training(backend, CPU, torch.float32, (2, 1), 31, time=33, size=size)


def test_sdpa_in_double_and_half():
    for dtype in (torch.float64, torch.float16):
        for left in (None, 20):
            check_training("sdpa", CPU, dtype, (4, 2), left)


@pytest.mark.parametrize("is_paged", [False, True], ids=["flat", "paged"])
@pytest.mark.parametrize("story", CACHE_STORIES)
@pytest.mark.parametrize("backend", HERE)
def test_cache_matrix(backend, story, is_paged):
    for dtype in (torch.float32, torch.bfloat16):
        for heads in HEADS:
            for left in (None, 0, 1, 31, 100):
                check_cache(backend, CPU, dtype, heads, left, CACHE_STORIES[story], is_paged=is_paged)


@pytest.mark.parametrize("backend", HERE)
@pytest.mark.parametrize("left", [None, 0, 5, 40])
def test_packed_documents(backend, left, monkeypatch):
    monkeypatch.setattr(sdpa, "CHUNK", 16)
    packed = torch.cat([starts_of([20, 1, 9, 30], 70), starts_of([70], 70)])
    tiny = starts_of([1] * 69, 70).expand(2, -1)  # too fine for a call per document
    odd = (torch.arange(70, dtype=torch.int32) // 3).expand(2, -1)  # not a cut into documents at all
    for doc_start in (packed, tiny, odd):
        check_training(backend, CPU, torch.float32, (4, 2), left, time=70, doc_start=doc_start)


@pytest.mark.parametrize("window", [(-1, -1), (-1, 3), (4, 2), (0, 5), (4, -1)])
def test_both_sides(window, monkeypatch):
    monkeypatch.setattr(sdpa, "CHUNK", 16)
    q, k, v, _ = inputs(2, 53, 2, 1, 16)
    left, right = (None if n < 0 else n for n in window)
    for backend in HERE:
        fa._override_impl = backend
        y = flash_attn.flash_attn_func(q, k, v, window_size=window)
        assert torch.allclose(y, plain(q, k, v, visible(53, 53, left, right)), atol=1e-12)


def test_rows_of_different_length_in_one_masked_call(monkeypatch):
    """What a GPU does, where the lengths stay on the device, equals what a CPU does row by row."""
    monkeypatch.setattr(sdpa, "CHUNK", 4)
    q, _, _, _ = inputs(3, 6, 4, 2, 16)
    _, k, v, _ = inputs(3, 30, 4, 2, 16, seed=1)
    lengths = torch.tensor([6, 30, 17])
    for left in (None, 0, 3, 50):
        y = sdpa.attend_ragged(q, k, v, lengths, left, 0)
        for b, n in enumerate(lengths.tolist()):
            row = slice(b, b + 1)
            oracle = plain(q[row], k[row, :n], v[row, :n], visible(6, n, left))
            assert torch.allclose(y[row], oracle, atol=1e-12)


def test_queries_over_a_cache_without_new_keys():
    q, _, _, _ = inputs(2, 3, 4, 2, 16)
    _, k, v, _ = inputs(2, 20, 4, 2, 16, seed=1)
    y = flash_attn.flash_attn_with_kvcache(q, k, v, causal=True)
    assert torch.allclose(y, plain(q, k, v, visible(3, 20)), atol=1e-12)
    y = flash_attn.flash_attn_with_kvcache(q, k, v, cache_seqlens=11)  # not causal: all 11
    assert torch.allclose(y, plain(q, k[:, :11], v[:, :11], visible(3, 11, right=None)), atol=1e-12)


# ------------------------------------------------------------------------------------------- the reference


@given(
    time=st.integers(1, 40),
    block=st.integers(1, 17),
    left=st.none() | st.integers(0, 45),
    right=st.none() | st.integers(0, 9),
    lengths=st.none() | st.lists(st.integers(1, 15), min_size=1, max_size=5),
)
@settings(max_examples=20)
def test_tiled_equals_naive_equals_autograd(time, block, left, right, lengths):
    doc_start = None if lengths is None else starts_of(lengths, time)
    *qkv, dy = inputs(1, time, 2, 2, 8)
    mask = visible(time, time, left, right, doc_start)
    oracle_in = [x.requires_grad_() for x in qkv]
    oracle = plain(*oracle_in, mask)
    expected = [oracle, *torch.autograd.grad(oracle, oracle_in, dy)]
    low_high = intervals(time, torch.tensor([time]), left, right, doc_start)
    for run in (reference.naive, lambda *args: reference.tiled(*args, block)):
        leaves = [x.detach().transpose(1, 2).requires_grad_() for x in qkv]
        y = run(*leaves, *low_high)
        for ours, exact in zip([y, *torch.autograd.grad(y, leaves, dy.transpose(1, 2))], expected):
            assert (ours.transpose(1, 2) - exact).abs().max() < 1e-12


def test_gradients_agree_with_finite_differences():
    leaves = [x.transpose(1, 2).requires_grad_() for x in inputs(1, 5, 2, 2, 3)[:3]]
    low_high = intervals(5, torch.tensor([5]), 2, 0)
    assert torch.autograd.gradcheck(lambda *a: reference.naive(*a, *low_high), leaves)
    assert torch.autograd.gradcheck(lambda *a: reference.tiled(*a, *low_high, 2), leaves)


def test_a_query_that_sees_nothing_gives_zero():
    leaves = [x.transpose(1, 2).requires_grad_() for x in inputs(1, 4, 1, 1, 8)[:3]]
    low, high = torch.tensor([[0, 3, 0, 0]]), torch.tensor([[0, 1, 2, 3]])
    for y in (reference.naive(*leaves, low, high), reference.tiled(*leaves, low, high, 2)):
        assert not y[:, :, 1].any() and torch.isfinite(y).all()
        grads = torch.autograd.grad(y.sum(), leaves)
        assert all(torch.isfinite(g).all() for g in grads) and not grads[0][:, :, 1].any()


class LargestTensor(TorchDispatchMode):
    """Remembers the most elements that any operation returned."""

    def __init__(self):
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        sizes = [x.numel() for x in tree_leaves(out) if isinstance(x, torch.Tensor)]
        self.numel = max([self.numel, *sizes])
        return out


def largest(run, time):
    """The most elements of any tensor made in a forward and backward pass of `run` over `time` positions."""
    leaves = [x.requires_grad_() for x in inputs(1, time, 1, 1, 16)[:3]]
    with LargestTensor() as seen:
        run(*leaves).sum().backward()
    return seen.numel


def test_memory_of_the_tiled_path_grows_with_T():
    def run(attention, *more):
        def attend(q, k, v):
            low_high = intervals(q.shape[1], torch.tensor([q.shape[1]]), None, 0)
            return attention(*(x.transpose(1, 2) for x in (q, k, v)), *low_high, *more)

        return attend

    naive, tiled = run(reference.naive), run(reference.tiled, 64)
    assert largest(naive, 320) == 320 * 320 and largest(naive, 640) == 640 * 640
    assert largest(tiled, 320) == 320 * 16 and largest(tiled, 640) == 640 * 16


def test_no_T_by_T_tensor_on_any_path_that_trains():
    """Neither a window nor packed documents make one; the explicit mask does, so the measure works."""
    time, chunk = 1024, sdpa.CHUNK
    docs = starts_of([300, 300], time)
    mask = visible(time, time, 200)[0, 0]
    assert largest(lambda q, k, v: sdpa._call(q, k, v, mask), time) >= time * time
    assert largest(lambda q, k, v: sdpa.attend(q, k, v, None, 0), time) == time * 16
    assert largest(lambda q, k, v: sdpa.attend(q, k, v, 200, 0), time) <= chunk * (200 + 2 * chunk)
    assert largest(lambda q, k, v: sdpa.attend(q, k, v, None, 0, docs), time) == time * 16
    assert largest(lambda q, k, v: sdpa.Chunked.apply(q, k, v, time, 0, docs), time) <= chunk * time


# ---------------------------------------------------------------------------------------------- properties


@pytest.mark.parametrize("backend", HERE)
@given(time=st.integers(2, 300), left=st.none() | st.integers(0, 300), data=st.data())
@settings(max_examples=15)
def test_no_position_sees_its_future_or_past_its_window(backend, time, left, data):
    q, k, v, _ = inputs(1, time, 2, 1, 16, torch.float32)
    fa._override_impl = backend
    window = (-1 if left is None else left, 0)
    before = flash_attn.flash_attn_func(q, k, v, causal=True, window_size=window)
    changed = data.draw(st.integers(0, time - 1), label="changed key")
    k[:, changed] += 1.0
    v[:, changed] -= 1.0
    after = flash_attn.flash_attn_func(q, k, v, causal=True, window_size=window)
    reach = time if left is None else left
    assert torch.equal(before[:, :changed], after[:, :changed])  # bit for bit
    assert torch.equal(before[:, changed + reach + 1 :], after[:, changed + reach + 1 :])
    assert not torch.equal(before[:, changed], after[:, changed])
    if changed + reach < time:  # the last query that still sees it
        assert not torch.equal(before[:, changed + reach], after[:, changed + reach])


@given(chunks=st.lists(st.integers(1, 12), min_size=1, max_size=6), left=st.none() | st.integers(0, 40))
@settings(max_examples=25)
def test_a_cache_filled_in_any_chunking_equals_the_full_forward(chunks, left):
    time = sum(chunks)
    q, k, v, _ = inputs(2, time, 4, 2, 16)
    window = (-1 if left is None else left, 0)
    full = flash_attn.flash_attn_func(q, k, v, causal=True, window_size=window)
    k_cache, v_cache = torch.zeros(2, time, 2, 16).double(), torch.zeros(2, time, 2, 16).double()
    done, parts = 0, []
    for size in chunks:
        new = slice(done, done + size)
        seqlens = torch.tensor([done, done], dtype=torch.int32)
        parts.append(
            flash_attn.flash_attn_with_kvcache(
                *(q[:, new], k_cache, v_cache, k[:, new], v[:, new]),
                cache_seqlens=seqlens,
                causal=True,
                window_size=window,
            )
        )
        assert seqlens.tolist() == [done, done]  # the caller advances it
        done += size
    assert (torch.cat(parts, 1) - full).abs().max() < 1e-12
    assert torch.equal(k_cache, k) and torch.equal(v_cache, v)


@given(
    starts=st.lists(st.integers(0, 30), min_size=1, max_size=4),
    num_new=st.integers(1, 5),
    left=st.integers(-1, 9),
)
@settings(max_examples=25)
def test_a_row_in_a_batch_is_the_row_alone(starts, num_new, left):
    """Bit for bit on a CPU, whatever stands in the other rows and behind the row's own end."""
    rows = len(starts)
    q, k, v, _ = inputs(rows, num_new, 4, 2, 16, torch.float32)
    _, k_cache, v_cache, _ = inputs(rows, 40, 4, 2, 16, torch.float32, seed=1)

    def call(b, lengths):
        mine = slice(b, b + 1) if b is not None else slice(None)
        return flash_attn.flash_attn_with_kvcache(
            *(q[mine], k_cache[mine].clone(), v_cache[mine].clone(), k[mine], v[mine]),
            cache_seqlens=torch.tensor(lengths, dtype=torch.int32),
            causal=True,
            window_size=(left, 0),
        )

    batch = call(None, starts)
    for b, start in enumerate(starts):
        if len(set(starts)) > 1:
            assert torch.equal(batch[b], call(b, [start])[0])
        else:  # one call for all rows
            assert torch.allclose(batch[b], call(b, [start])[0], atol=1e-6)


@given(lengths=st.lists(st.integers(1, 40), min_size=1, max_size=6), left=st.integers(-1, 30))
@settings(max_examples=25)
def test_packed_documents_are_the_documents_alone(lengths, left):
    q, k, v, _ = inputs(1, 64, 2, 1, 16, torch.float32)
    doc_start = starts_of(lengths, 64)
    packed = flash_attn.flash_attn_func(q, k, v, causal=True, window_size=(left, 0), doc_start=doc_start)
    cuts = [*doc_start[0].unique().tolist(), 64]
    for start, stop in pairwise(cuts):
        mine = slice(start, stop)
        alone = flash_attn.flash_attn_func(
            q[:, mine], k[:, mine], v[:, mine], causal=True, window_size=(left, 0)
        )
        assert torch.allclose(packed[:, mine], alone, atol=1e-6)


# ----------------------------------------------------------------------------------------- choosing a backend


@pytest.fixture
def _fresh_choices():
    caches = (select.verdict, select._pick, select._choose)
    for cached in caches:
        cached.cache_clear()
    yield
    for cached in caches:
        cached.cache_clear()


def test_the_choice_on_a_cpu_and_its_reason():
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        assert select.pick(None, CPU, dtype) is sdpa
        assert fa.explain(CPU, dtype).startswith(
            f"attention: sdpa on cpu, {str(dtype)[6:]} (fa3: needs a CUDA GPU"
        )


def test_override_is_read_at_call_time_and_refused_with_a_reason(monkeypatch):
    q, k, v, _ = inputs(1, 4, 1, 1, 16, torch.float32)
    fa._override_impl = "reference"
    assert select.pick(fa._override_impl, CPU, torch.float32) is reference
    calls = []
    monkeypatch.setattr(reference, "attend", lambda *args: calls.append(args))
    flash_attn.flash_attn_func(q, k, v)
    assert len(calls) == 1
    for backend in ("fa3", "fa4", "flex"):
        fa._override_impl = backend
        with pytest.raises(UserError, match=f"'{backend}' cannot run on cpu, float32: needs a CUDA GPU"):
            flash_attn.flash_attn_func(q, k, v)
    fa._override_impl = "turbo"
    with pytest.raises(UserError, match="no attention kernel 'turbo'"):
        flash_attn.flash_attn_func(q, k, v)


@pytest.mark.usefixtures("_fresh_choices")
@pytest.mark.parametrize(
    ("attend", "why", "reason"),
    [
        (sdpa.attend, None, None),
        (sdpa.attend, "needs sm_90, found sm_86", "needs sm_90, found sm_86"),
        (lambda q, k, v, *rest: sdpa.attend(q, k, v, None, 0), None, "disagrees with the reference by"),
        (
            lambda q, k, v, *rest: sdpa.attend(q, k, v, *rest) * float("nan"),
            None,
            "disagrees with the reference by nan",
        ),
        (lambda *args: 1 // 0, None, "its probe raised ZeroDivisionError: "),
    ],
    ids=["works", "declines", "ignores windows", "nan", "raises"],
)
def test_a_tier_is_taken_only_if_it_agrees_with_the_reference(attend, why, reason, monkeypatch):
    kernel = SimpleNamespace(attend=attend, unsupported_reason=lambda device, dtype: why)
    monkeypatch.setitem(sys.modules, "nanochat.flash_attention.flex", kernel)
    monkeypatch.setattr(select, "NEEDS_CUDA", ("fa3", "fa4"))
    verdict = select.verdict("flex", CPU, torch.float32)
    assert verdict is None if reason is None else verdict.startswith(reason)
    assert select.pick(None, CPU, torch.float32) is (kernel if reason is None else sdpa)
    if reason is not None:
        assert f"flex: {reason}" in fa.explain(CPU, torch.float32)


@pytest.mark.usefixtures("_fresh_choices")
def test_probing_leaves_random_numbers_alone_and_happens_once(monkeypatch):
    probes = []
    monkeypatch.setattr(select, "probe", lambda *args: probes.append(args) or 0.0)
    state = torch.get_rng_state()
    q, k, v, _ = inputs(1, 4, 1, 1, 16, torch.float32)
    for _ in range(3):
        flash_attn.flash_attn_func(q, k, v)
    assert len(probes) == 1
    monkeypatch.undo()
    with torch.inference_mode():
        assert select.probe(sdpa, CPU, torch.float32) < 1e-5
    assert torch.equal(torch.get_rng_state(), state)


def test_has_fa3_is_looked_up_once(monkeypatch):
    monkeypatch.delitem(vars(fa), "HAS_FA3", raising=False)
    asked = []
    monkeypatch.setattr(fa, "has_fa3", lambda: asked.append(1) or select.has_fa3())
    assert fa.HAS_FA3 is torch.cuda.is_available() is False and fa.HAS_FA3 is False
    assert len(asked) == 1
    with pytest.raises(AttributeError, match="HAS_FA5"):
        _ = fa.HAS_FA5


@pytest.mark.slow
def test_a_compiler_traces_through_the_door(monkeypatch):
    """No graph break, also where the choice has not been made before."""

    def twice(q, k, v):
        return 2 * flash_attn.flash_attn_func(q, k, v, causal=True, window_size=(9, 0))

    monkeypatch.setattr(sdpa, "CHUNK", 16)
    leaves = [x.requires_grad_() for x in inputs(1, 33, 2, 1, 16, torch.float32)[:3]]
    compiled = torch.compile(twice, fullgraph=True, backend="aot_eager")
    select._pick.cache_clear()
    results = [[y, *torch.autograd.grad(y.sum(), leaves)] for y in (compiled(*leaves), twice(*leaves))]
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(*results))


# ------------------------------------------------------------------------------------------------ bad input


def test_writing_past_the_end_names_the_row_and_writes_nothing():
    q, k, v, _ = inputs(3, 4, 2, 1, 16)
    pages = torch.arange(6, dtype=torch.int32).view(3, 2)
    for table, shape in ((None, (3, 10)), (pages, (6, 5))):
        k_cache, v_cache = torch.zeros(*shape, 1, 16).double(), torch.zeros(*shape, 1, 16).double()
        seqlens = torch.tensor([2, 7, 1], dtype=torch.int32)
        with pytest.raises(ValueError, match="row 1 of the cache holds 7 of 10 positions, 4 more do not fit"):
            flash_attn.flash_attn_with_kvcache(q, k_cache, v_cache, k, v, seqlens, page_table=table)
        assert not k_cache.any() and not v_cache.any()
    with pytest.raises(ValueError, match=r"row 2 must name pages 0 to 5, got .*-1"):
        pages[2, 0] = -1
        flash_attn.flash_attn_with_kvcache(q, k_cache, v_cache, k, v, 0, page_table=pages)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": torch.zeros(1, 4, 16)}, r"q must be \(B, T, H, E\)"),
        ({"k": torch.zeros(1, 4, 3, 16), "v": torch.zeros(1, 4, 3, 16)}, "heads divide the query heads"),
        ({"k": torch.zeros(1, 4, 2, 16).half()}, "share dtype and device"),
        ({"k": torch.zeros(1, 5, 2, 16), "v": torch.zeros(1, 5, 2, 16)}, "equally long, got 4 and 5"),
        ({"window_size": (-2, 0)}, r"window_size .* got \(-2, 0\)"),
        (
            {"doc_start": torch.zeros(1, 5, dtype=torch.int32)},
            r"doc_start .* got torch.int32 of shape \(1, 5\)",
        ),
        ({"doc_start": torch.zeros(1, 4)}, "doc_start .* got torch.float32"),
    ],
)
def test_bad_arguments(change, message):
    good = {name: torch.zeros(1, 4, 2, 16) for name in "qkv"}
    flash_attn.flash_attn_func(**good)
    with pytest.raises(ValueError, match=message):
        flash_attn.flash_attn_func(**(good | change))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"v": None}, "given together"),
        ({"cache_seqlens": None}, "needs cache_seqlens"),
        ({"cache_seqlens": torch.zeros(3, dtype=torch.int32)}, "must be 2 integers"),
        ({"cache_seqlens": torch.tensor([0, -1])}, "row 1 of the cache holds -1"),
        ({"k": None, "v": None, "cache_seqlens": torch.tensor([4, 3])}, "row 1 of the cache holds -1"),
        ({"q": torch.zeros(3, 4, 2, 16)}, "as many rows"),
        ({"k": torch.zeros(2, 3, 2, 16), "v": torch.zeros(2, 3, 2, 16)}, "as long as q"),
    ],
)
def test_bad_cache_arguments(change, message):
    good = {name: torch.zeros(2, 4, 2, 16) for name in "qkv"}
    good |= {"k_cache": torch.zeros(2, 9, 2, 16), "v_cache": torch.zeros(2, 9, 2, 16)}
    good["cache_seqlens"] = torch.tensor([0, 5], dtype=torch.int32)
    flash_attn.flash_attn_with_kvcache(**good)
    with pytest.raises(ValueError, match=message):
        flash_attn.flash_attn_with_kvcache(**(good | change))
