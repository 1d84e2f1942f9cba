"""decode.c against the PyTorch lines that it stands for, and weights as int8."""

from __future__ import annotations

import pytest
import torch
from test_engine import Bytes, prompt, tiny
from test_engine_paged import MODEL, run, start

from nanochat import native
from nanochat.engine import native_step
from nanochat.engine.batch import Batch
from nanochat.engine.engine import Engine, Sampling
from nanochat.engine.network import FusedNetwork, Matrix, TrunkNetwork, network_of, quantize
from nanochat.engine.sequence import Generation
from nanochat.gpt import GPT, GPTConfig

DTYPES = [torch.float32, torch.bfloat16, torch.int8]
needs_compiler = pytest.mark.skipif(native_step.library() is None, reason="there is no C compiler")


def random(*shape: int, seed: int = 0, size: float = 1.0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * size


# ---------------------------------------------------------------- one matrix


@needs_compiler
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows, cols", [(7, 5), (64, 32), (33, 100), (130, 257)])
def test_products(dtype: torch.dtype, rows: int, cols: int) -> None:
    """Odd shapes too: what was stored times x, in fp32; and the same bits whoever comes along."""
    matrix, x = Matrix(random(rows, cols), dtype), random(9, cols, seed=1)
    stored = matrix.many.double() * (1 if matrix.scale is None else matrix.scale.double()[:, None])
    wanted = x.double() @ stored.T
    for count in range(1, 10):
        assert matrix._native is not None
        y = native_step.multiply(matrix._native, x[:count])
        assert float((y - wanted[:count]).abs().max()) < 2e-5 * cols**0.5
        alone = [native_step.multiply(matrix._native, x[n : n + 1]) for n in range(count)]
        assert torch.equal(y, torch.cat(alone))


@needs_compiler
def test_threads_change_no_bit() -> None:
    matrix, x = Matrix(random(2048, 600), torch.bfloat16), random(3, 600, seed=1)
    found = []
    for threads in (1, 2, 3):
        y = torch.empty(3, 2048)
        lib = native_step.library()
        assert lib is not None
        lib.multiply(native_step.ctypes.addressof(matrix._native), x.data_ptr(), 3, y.data_ptr(), threads)
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


def outputs(model: GPT, network: FusedNetwork, lengths: list[int], limit: int = 12) -> list[list[float]]:
    """Log-probabilities of what a mixed batch says greedily, with its tokens' ids."""
    rows = [start(prompt(n), limit, seed=n, temperature=0.0, top_logprobs=0) for n in lengths]
    run(Batch(model, len(rows), 400, network=network), rows)
    return [[*map(float, row.output), *(entry[0] for entry in row.logprobs or [])] for row in rows]


@needs_compiler
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_step_equals_pytorch(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Windows that come round, grouped heads, value embeddings, smear, rows that join: every logit."""
    network = FusedNetwork(MODEL, dtype)
    network_is_exact = dtype != torch.bfloat16  # PyTorch rounds inputs to bf16, decode.c does not
    for matrix in [network.head, *(m for layer in network.layers for m in layer[2:6])]:
        matrix.wide = torch.float32  # of long prompts, which are PyTorch's either way
    lengths = [3, 262, 17, 250]
    ours = outputs(MODEL, network, lengths)
    monkeypatch.setattr(native, "_override", False)
    theirs = outputs(MODEL, network, lengths)
    if network_is_exact:
        for a, b in zip(ours, theirs, strict=True):
            assert a == pytest.approx(b, abs=2e-4)
    else:
        firsts = [abs(a[12] - b[12]) for a, b in zip(ours, theirs, strict=True)]
        assert max(firsts) < 0.1


@needs_compiler
def test_steps_go_through_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few tokens do, many do not; nothing does where it is turned off, nor for another network."""
    calls = []
    real = native_step.NativeStep.__call__
    monkeypatch.setattr(native_step.NativeStep, "__call__", lambda *a: (calls.append(len(a[1])), real(*a))[1])
    run(Batch(MODEL, 3, 80), [start(prompt(n), 9) for n in (20, 5, 3)])
    assert calls and max(calls) <= native_step.MOST_SMALL and calls.count(3) == 8
    calls.clear()
    run(Batch(MODEL, 1, 80, network=TrunkNetwork(MODEL)), [start(prompt(4), 3)])
    monkeypatch.setattr(native, "_override", False)
    run(Batch(MODEL, 1, 80), [start(prompt(4), 3)])
    assert not calls


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.int8])
def test_guesses_are_exact_to_the_bit(dtype: torch.dtype) -> None:
    """A token's logits do not depend on what is computed beside it: guessing moves nothing in bf16 either."""
    network, ids = FusedNetwork(MODEL, dtype), prompt(15) * 3
    rows = [start(ids, 60, temperature=0.3, top_logprobs=3) for _ in range(2)]
    run(Batch(MODEL, 1, 110, network=network), rows[:1])
    run(Batch(MODEL, 1, 110, network=network, speculate=8), rows[1:])
    assert rows[0].output == rows[1].output and rows[0].logprobs == rows[1].logprobs
    assert rows[1].lookup is not None and rows[1].lookup.num_kept > 2


@needs_compiler
def test_bad_ids_are_refused_before_memory_is_read() -> None:
    for bad in (-1, 10_000):
        with pytest.raises(IndexError, match="ids must lie"):
            run(Batch(MODEL, 1, 20), [start([3, bad], 2)])


@needs_compiler
def test_tables_in_bf16() -> None:
    model = tiny()
    model.wte.to(torch.bfloat16)
    model.value_embeds.to(torch.bfloat16)
    wide = tiny()
    with torch.no_grad():
        for name, parameter in wide.named_parameters():
            parameter.copy_(model.get_parameter(name))
    assert outputs(model, FusedNetwork(model, torch.float32), [5]) == outputs(
        wide, FusedNetwork(wide, torch.float32), [5]
    )


@needs_compiler
def test_pairs(monkeypatch: pytest.MonkeyPatch) -> None:
    """A table of token pairs at the input."""
    model = GPT(GPTConfig(640, 262, 2, 4, 2, 32, "SL", bigram_rows=50))
    with torch.no_grad():
        for n, parameter in enumerate(model.parameters()):
            parameter.copy_(random(*parameter.shape, seed=n, size=0.3))
    network = FusedNetwork(model, torch.float32)
    ours = outputs(model, network, [5, 9])
    monkeypatch.setattr(native, "_override", False)
    for a, b in zip(ours, outputs(model, network, [5, 9]), strict=True):
        assert a == pytest.approx(b, abs=2e-4)


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
    matrix = Matrix(weight, torch.int8, wide=wide)
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
        run(Batch(MODEL, 1, 50, network=FusedNetwork(MODEL, dtype), token_budget=3), [row])
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
    assert engine.network().head.many.dtype == torch.int8

    class Other(GPT):
        pass

    with pytest.raises(ValueError, match="int8"):
        network_of(Other(GPTConfig(16, 262, 1, 1, 1, 24, "L")), torch.int8)
    row = Generation(ids, 3, Sampling(0.0), frozenset())
    assert len(run(Batch(MODEL, 1, 60, network=engine.network()), [row])[0]) == 3
