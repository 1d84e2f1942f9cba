"""decode.c against the PyTorch lines that it stands for, and weights as int8."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from helpers.batch_cases import MODEL, run, start
from helpers.engine_cases import Bytes, prompt, tiny

from nanochat.engine.continuous_batch import ContinuousBatch
from nanochat.engine.engine import Engine, Sampling
from nanochat.engine.inference import InferenceGPT, InferenceLinear, prepare, quantize
from nanochat.engine.sequence import Sequence
from nanochat.gpt import GPT, GPTConfig, rope_tables
from nanochat.kernels import build as native
from nanochat.kernels import decode as native_step

DTYPES = [torch.float32, torch.bfloat16, torch.int8]
needs_compiler = pytest.mark.skipif(native_step.library() is None, reason="there is no C compiler")


def random(*shape: int, seed: int = 0, size: float = 1.0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * size


def is_tiled(dtype: torch.dtype) -> bool:
    """Whether decode.c has tiles of it here; then x is rounded to bf16 for all but fp32 weights."""
    return bool(native_step.tiled_kinds() >> native_step.KINDS[dtype] & 1)


def takes_any(dtype: torch.dtype) -> bool:
    """Whether decode.c is given any number of tokens; with AMX a few."""
    return native_step.most_tokens(1 << 40, dtype) == native_step.ANY


@pytest.fixture
def without_avx512(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """decode.c as processors without AVX512 run it."""
    monkeypatch.setattr(native, "TUNING", (("-march=native", "-mno-avx512f", "-fopenmp"), ("-fopenmp",)))
    lib = native_step._build.__wrapped__()
    monkeypatch.setattr(native_step, "_build", lambda: lib)
    native_step.tiled_kinds.cache_clear()
    yield
    native_step.tiled_kinds.cache_clear()


# ---------------------------------------------------------------- one matrix


def check_product(dtype: torch.dtype, rows: int, cols: int, counts: list[int]) -> None:
    """What was stored times x; and the same bits whoever comes along."""
    matrix, x = InferenceLinear.of(random(rows, cols), dtype), random(max(counts), cols, seed=1)
    seen = x.bfloat16() if dtype != torch.float32 and is_tiled(dtype) else x
    stored = matrix.weight_OI.double() * (1 if matrix.scale_O is None else matrix.scale_O.double()[:, None])
    wanted = seen.double() @ stored.T
    assert matrix.native is not None
    alone = torch.cat([native_step.multiply(matrix.native, row[None]) for row in x])
    for count in counts:
        y = native_step.multiply(matrix.native, x[:count])
        assert float((y - wanted[:count]).abs().max()) < 2e-5 * cols**0.5
        assert torch.equal(y, alone[:count])


@needs_compiler
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows, cols", [(7, 5), (64, 32), (33, 100), (130, 257), (300, 64)])
def test_products(dtype: torch.dtype, rows: int, cols: int) -> None:
    """Odd shapes too, and every number of rows that tiles of six leave over."""
    check_product(dtype, rows, cols, [*range(1, 14), 33, 70])


@needs_compiler
@pytest.mark.parametrize("dtype", DTYPES)
def test_products_without_avx512(dtype: torch.dtype, without_avx512: None) -> None:
    assert native_step.tiled_kinds() == 0 and native_step.most_tokens(1 << 30, dtype) < 10
    check_product(dtype, 33, 100, [1, 2, 3, 4, 5, 9])


@needs_compiler
@pytest.mark.parametrize("dtype", DTYPES)
def test_threads_change_no_bit(dtype: torch.dtype) -> None:
    matrix, x = InferenceLinear.of(random(2048, 600), dtype), random(40, 600, seed=1)
    lib = native_step.library()
    assert lib is not None
    for count in (3, 40):
        found = []
        for threads in (1, 2, 3):
            y = torch.empty(count, 2048)
            address = native_step.ctypes.addressof(matrix.native)
            lib.multiply(address, x.data_ptr(), count, y.data_ptr(), threads)
            found.append(y)
        assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


@pytest.mark.parametrize("dtype", DTYPES)
def test_copies_in_huge_pages(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """A copy, not the model's own memory, and it lives as long as the tensor."""
    matrix = random(40, 30).mul(50).to(dtype)
    for size in (1, 1 << 40):
        monkeypatch.setattr(native_step, "HUGE_BYTES", size)
        found = native_step.in_huge_pages(matrix.t())
        assert torch.equal(found, matrix.t()) and found.is_contiguous()
        assert found.data_ptr() != matrix.data_ptr()
        found += 1
        assert torch.equal(found, matrix.t() + 1)


# ---------------------------------------------------------------- a whole step


def outputs(model: GPT, network: InferenceGPT, lengths: list[int], limit: int = 12) -> list[list[float]]:
    """Log-probabilities of what a mixed batch says greedily, with its tokens' ids."""
    rows = [start(prompt(n), limit, seed=n, temperature=0.0, top_logprobs=0) for n in lengths]
    run(ContinuousBatch(model, len(rows), 400, network=network), rows)
    return [[*map(float, row.output), *(entry[0] for entry in row.logprobs or [])] for row in rows]


def heads_of(head_dim: int) -> GPT:
    """Random weights, 4 query and 2 key heads, a short window in every other layer."""
    model = GPT(GPTConfig(640, 262, 2, 4, 2, 4 * head_dim, "SL"))
    with torch.no_grad():
        for n, parameter in enumerate(model.parameters()):
            parameter.copy_(random(*parameter.shape, seed=n, size=2.0 * parameter.shape[-1] ** -0.5))
    return model


def tables_of(head_dim: int) -> native_step.RopeTables:
    return lambda positions: rope_tables(positions, head_dim, 1e5, torch.float32)


@needs_compiler
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("model", [MODEL, heads_of(24), heads_of(80)], ids=["model", "24", "80"])
def test_a_step_equals_pytorch(model: GPT, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Windows that come round, grouped heads, value embeddings, smear, rows that join: every logit. Where one
    of the two rounds inputs to bf16, texts soon differ; then the scores of a given text are compared."""
    network = InferenceGPT(model, dtype)
    is_exact = dtype == torch.float32 or (dtype == torch.int8 and not is_tiled(dtype))
    for matrix in network.modules():
        if isinstance(matrix, InferenceLinear):
            matrix.wide = torch.float32  # of long prompts without tiles, which are PyTorch's either way
    lengths = [3, 262, 17, 250]

    def scores() -> torch.Tensor:
        row = start(prompt(300), 0, prompt_top_logprobs=0)
        run(ContinuousBatch(model, 1, 320, network=network, token_budget=7), [row])
        return torch.tensor([entry[0] for entry in row.prompt_logprobs or [] if entry])

    ours = outputs(model, network, lengths), scores()
    monkeypatch.setattr(native, "_override", False)
    theirs = outputs(model, network, lengths), scores()
    if is_exact:
        for a, b in zip(ours[0], theirs[0], strict=True):
            assert a == pytest.approx(b, abs=2e-4)
    near = float((ours[1] - theirs[1]).abs().mean())
    assert len(ours[1]) == 299 and near < (1e-5 if is_exact else 0.02), near


@needs_compiler
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", [8, 32, 80])
def test_company_changes_no_bit(dtype: torch.dtype, head_dim: int) -> None:
    """Hidden states of 300 tokens in chunks of any size, beside another sequence."""
    network, ids = InferenceGPT(heads_of(head_dim), dtype), prompt(300)
    kept = native_step.kv_dtype(network)

    def hidden(sizes: list[int], beside: int = 0) -> torch.Tensor:
        stores = [torch.full((640, 4, head_dim), torch.nan, dtype=kept) for _ in range(2)]
        step = native_step.NativeStep.of(network, stores, [130, -1], [0, 0], 1, 16, tables_of(head_dim))
        assert step is not None
        tables = [[list(range(20)), list(range(20, 40))]]
        found, at = [], 0
        for size in sizes:
            chunk = range(at, at + size)
            given = [*ids[at : at + size], *ids[:beside]]
            before = [-1 if n == 0 else ids[n - 1] for n in (*chunk, *range(beside))]
            rows = [0] * size + [1] * beside
            found.append(step(given, before, [*chunk, *range(beside)], rows, tables)[:size])
            at += size
        return torch.cat(found)

    alone = hidden([1] * 300)
    assert bool(alone.isfinite().all())
    few, many = [[2] * 150, [3] * 100], [[300], [7] * 42 + [6], [131, 1, 168]]
    for sizes in few + many if takes_any(dtype) else few:
        assert torch.equal(hidden(sizes), alone)
        assert torch.equal(hidden(sizes, beside=1 if sizes in few else 40), alone)


@needs_compiler
def test_a_step_without_avx512(without_avx512: None) -> None:
    test_company_changes_no_bit(torch.float32, 8)
    test_company_changes_no_bit(torch.bfloat16, 32)


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.int8])
def test_company_changes_no_answer(dtype: torch.dtype) -> None:
    """Sampled answers of narrow weights, many at once and one by one, prompts whole and in pieces."""
    if not takes_any(dtype):
        pytest.skip("many tokens are PyTorch's here")
    network = InferenceGPT(MODEL, dtype)

    def rows() -> list[Sequence]:
        return [start(prompt(5 + 7 * n), 20, seed=n, temperature=0.8, top_logprobs=2) for n in range(20)]

    together, pieces, alone = rows(), rows(), rows()
    run(ContinuousBatch(MODEL, 20, 300, network=network), together)
    run(ContinuousBatch(MODEL, 20, 300, network=network, token_budget=29), pieces)
    for row in alone:
        run(ContinuousBatch(MODEL, 1, 300, network=network), [row])
    for a, b, c in zip(together, pieces, alone, strict=True):
        assert a.output == b.output == c.output and a.logprobs == b.logprobs == c.logprobs


@needs_compiler
def test_steps_go_through_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """As many tokens as pay; nothing does where it is turned off, nor for another network."""
    calls = []
    real = native_step.NativeStep.__call__
    monkeypatch.setattr(native_step.NativeStep, "__call__", lambda *a: (calls.append(len(a[1])), real(*a))[1])
    run(ContinuousBatch(MODEL, 3, 80), [start(prompt(n), 9) for n in (20, 5, 3)])
    assert calls[:1] == ([28] if takes_any(torch.float32) else [3]) and calls.count(3) == 8
    calls.clear()
    run(ContinuousBatch(MODEL, 1, 80, network=MODEL), [start(prompt(4), 3)])
    monkeypatch.setattr(native, "_override", False)
    run(ContinuousBatch(MODEL, 1, 80), [start(prompt(4), 3)])
    assert not calls


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.int8])
def test_guesses_are_exact_to_the_bit(dtype: torch.dtype) -> None:
    """A token's logits do not depend on what is computed beside it: guessing moves nothing in bf16 either."""
    network, ids = InferenceGPT(MODEL, dtype), prompt(15) * 3
    rows = [start(ids, 60, temperature=0.3, top_logprobs=3) for _ in range(2)]
    run(ContinuousBatch(MODEL, 1, 110, network=network), rows[:1])
    run(ContinuousBatch(MODEL, 1, 110, network=network, speculate=8), rows[1:])
    assert rows[0].output == rows[1].output and rows[0].logprobs == rows[1].logprobs
    assert rows[1].lookup is not None and rows[1].lookup.num_kept > 2


@needs_compiler
def test_bad_ids_are_refused_before_memory_is_read() -> None:
    for bad in (-1, 10_000):
        with pytest.raises(IndexError, match="ids must lie"):
            run(ContinuousBatch(MODEL, 1, 20), [start([3, bad], 2)])


WRONG_INDICES = {  # what is given in place of a good argument, and what is said
    "id below the vocabulary": ({"ids": [3, -1]}, IndexError, "ids must lie between 0 and 319, found -1"),
    "id beyond the vocabulary": ({"ids": [3, 320]}, IndexError, "ids must lie between 0 and 319, found 320"),
    "previous id": ({"prev": [320, 3]}, IndexError, "previous ids must lie between -1 and 319, found 320"),
    "previous id below -1": (
        {"prev": [-2, 3]},
        IndexError,
        "previous ids must lie between -1 and 319, found -2",
    ),
    "row": ({"rows": [0, 2]}, IndexError, "rows must lie between 0 and 1, found 2"),
    "negative row": ({"rows": [-1, -1]}, IndexError, "rows must lie between 0 and 1, found -1"),
    "negative position": ({"positions": [-1, 0]}, IndexError, "positions must .*, found -1"),
    "position beyond the blocks": ({"positions": [31, 32]}, IndexError, "between 0 and 31, found 32"),
    "positions apart": ({"positions": [3, 5]}, IndexError, "must follow one another, found 5 instead of 4"),
    "block beyond the cache": ({"tables": [[[40], [0]]]}, IndexError, "between 0 and 39, found 40"),
    "position without a block": (
        {"positions": [15, 16], "tables": [[[1], [3, 4]]]},
        IndexError,
        "it has none",
    ),
    "negative block": ({"tables": [[[-1], [0]]]}, IndexError, "between 0 and 39, found -1"),
    "missing number": ({"ids": [3]}, ValueError, "must be equally many"),
    "missing group": ({"tables": []}, ValueError, "must be equally many"),
}


@needs_compiler
@pytest.mark.parametrize("name", WRONG_INDICES)
def test_wrong_indices_are_refused_before_memory_is_touched(name: str) -> None:
    stores = [torch.zeros(640, 4, 8) for _ in range(2)]
    step = native_step.NativeStep.of(
        InferenceGPT(heads_of(8), torch.float32), stores, [130, -1], [0, 0], 1, 16, tables_of(8)
    )
    assert step is not None
    good = {"ids": [3, 4], "prev": [-1, 3], "positions": [0, 1], "rows": [0, 0], "tables": [[[1, 2], [3, 4]]]}
    assert bool(step(**good).isfinite().all())
    before = stores[0].clone()
    change, error, message = WRONG_INDICES[name]
    with pytest.raises(error, match=message):
        step(**(good | change))
    assert torch.equal(stores[0], before)


@needs_compiler
def test_a_layer_of_no_group_is_refused() -> None:
    stores = [torch.zeros(640, 4, 8) for _ in range(2)]
    with pytest.raises(IndexError, match="groups of layers must lie between 0 and 0, found 1"):
        native_step.NativeStep.of(
            InferenceGPT(heads_of(8), torch.float32), stores, [130, -1], [0, 1], 1, 16, tables_of(8)
        )


@needs_compiler
def test_tables_in_bf16() -> None:
    model = tiny()
    model.wte.to(torch.bfloat16)
    model.value_embeds.to(torch.bfloat16)
    wide = tiny()
    with torch.no_grad():
        for name, parameter in wide.named_parameters():
            parameter.copy_(model.get_parameter(name))
    assert outputs(model, InferenceGPT(model, torch.float32), [5]) == outputs(
        wide, InferenceGPT(wide, torch.float32), [5]
    )


@needs_compiler
def test_pairs(monkeypatch: pytest.MonkeyPatch) -> None:
    """A table of token pairs at the input."""
    model = GPT(GPTConfig(640, 262, 2, 4, 2, 32, "SL", bigram_rows=50))
    with torch.no_grad():
        for n, parameter in enumerate(model.parameters()):
            parameter.copy_(random(*parameter.shape, seed=n, size=0.3))
    network = InferenceGPT(model, torch.float32)
    ours = outputs(model, network, [5, 9])
    monkeypatch.setattr(native, "_override", False)
    for a, b in zip(ours, outputs(model, network, [5, 9]), strict=True):
        assert a == pytest.approx(b, abs=2e-4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_what_decode_c_does_not_know_is_pytorchs(dtype: torch.dtype) -> None:
    network = InferenceGPT(MODEL, dtype)
    assert native_step.kv_dtype(network) == torch.float32
    rows = [start(prompt(9), 5, temperature=0.0)]
    run(ContinuousBatch(MODEL, 1, 40, network=network), rows)
    assert len(rows[0].output) == 5


@needs_compiler
@pytest.mark.parametrize("dtype", DTYPES)
def test_turned_off_in_mid_run(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """The PyTorch lines go on with the same cache."""
    rows = [start(prompt(9), 12, temperature=0.0) for _ in range(2)]
    run(ContinuousBatch(MODEL, 1, 40, network=InferenceGPT(MODEL, dtype)), rows[:1])
    batch = ContinuousBatch(MODEL, 1, 40, network=InferenceGPT(MODEL, dtype))
    batch.admit(rows[1:])
    while batch.is_running:
        batch.emit()
        batch.compute()
        monkeypatch.setattr(native, "_override", False)
    assert rows[1].output[:1] == rows[0].output[:1] and len(rows[1].output) == 12
    if dtype == torch.float32:
        assert rows[1].output == rows[0].output


# ---------------------------------------------------------------- int8


def test_codes() -> None:
    """Symmetric, by row: half a step at most, zero rows stay zero, a scaled row has the same codes."""
    weight = random(40, 64)
    weight[3] = 0
    weight[5] = 1000 * weight[4]
    codes, scale = quantize(weight)
    assert codes.dtype == torch.int8 and codes.abs().amax(dim=1).tolist() == [127] * 3 + [0] + [127] * 36
    assert bool(((codes * scale[:, None] - weight).abs() <= 0.5001 * scale[:, None]).all())
    assert torch.equal(codes[4], codes[5]) and float(scale[3]) == 1.0


@pytest.mark.parametrize("wide", [torch.float32, torch.bfloat16])
def test_a_products_error_has_a_bound(wide: torch.dtype) -> None:
    """scale / 2 * sum |x|, for one token and for many, which come in pieces (bf16 rounds their inputs)."""
    weight, x = random(50, 90), random(30, 90, seed=1)
    matrix = InferenceLinear.of(weight, torch.int8, wide=wide)
    exact = x.double() @ weight.double().T
    _, scale = quantize(weight)
    bound = 0.5001 * scale * x.abs().sum(dim=1, keepdim=True)
    if wide == torch.bfloat16:
        bound = bound + 2**-7 * (x.abs() @ weight.abs().T)
    found = [matrix(x), torch.cat([matrix(row[None]) for row in x])]
    for y in found:
        assert bool(((y - exact).abs() <= bound).all()) and float((y - exact).abs().max()) > 0


def test_int8_logits_stay_near(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a compiler too. It moves log-probabilities at most ten times as much as bf16 does."""
    ids = prompt(40)

    def scores(dtype: torch.dtype) -> torch.Tensor:
        row = start(ids, 0, prompt_top_logprobs=0)
        run(ContinuousBatch(MODEL, 1, 50, network=InferenceGPT(MODEL, dtype), token_budget=3), [row])
        return torch.tensor([entry[0] for entry in row.prompt_logprobs or [] if entry])

    exact = scores(torch.float32)
    first = scores(torch.int8)
    monkeypatch.setattr(native, "_override", False)
    bf16, second = (scores(dtype) for dtype in (torch.bfloat16, torch.int8))
    for found in (first, second):
        assert 0 < float((found - exact).abs().mean()) < 10 * float((bf16 - exact).abs().mean())


def test_int8_engine() -> None:
    """By the engine's dtype; identities hold among its own answers; other models are refused."""
    engine, ids = Engine(MODEL, Bytes(), torch.int8, speculate=4), prompt(9) * 4
    together = engine.complete([ids, ids[:20]], max_tokens=12)
    assert together == [engine.complete([p], max_tokens=12)[0] for p in (ids, ids[:20])]
    assert engine.network().lm_head.weight_OI.dtype == torch.int8

    class Other(GPT):
        pass

    with pytest.raises(ValueError, match="int8"):
        prepare(Other(GPTConfig(16, 262, 1, 1, 1, 24, "L")), torch.int8)
    row = Sequence(ids, 3, Sampling(0.0), frozenset())
    assert len(run(ContinuousBatch(MODEL, 1, 60, network=engine.network()), [row])[0]) == 3
