"""kernels.c against PyTorch in fp64, on fp32 and bf16 tensors; building it, and doing without it."""

from __future__ import annotations

import pytest
import torch
from helpers.kernel_builds import bf16_pairs

from nanochat.flash_attention import dense, tiles
from nanochat.gpt import rope_tables, softcap
from nanochat.kernels import build as native
from nanochat.kernels import elementwise as fused
from nanochat.kernels.loss import weighted_nll

pytestmark = pytest.mark.skipif(native.library() is None, reason="no C compiler here")
DTYPES = [torch.float32, torch.bfloat16]
WORST = {torch.float32: 2e-6, torch.bfloat16: 1.2e-2}


@pytest.fixture(autouse=True)
def _no_override(monkeypatch):
    monkeypatch.setattr(native, "_override", None)


@pytest.fixture
def with_tiles():
    with bf16_pairs():
        yield


def random(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def worst(ours, exact):
    return float((ours.double() - exact).abs().max() / exact.abs().max().clamp(min=1e-3))


def plain_rotate(x, cos, sin):
    x1, x2 = x.chunk(2, -1)
    return torch.cat((x1 * cos + x2 * sin, x2 * cos - x1 * sin), -1)


def plain_norm(x):
    return x / (x.square().mean(-1, keepdim=True) + fused.NORM_EPS).sqrt()


COS_SIN = [t.double() for t in rope_tables(torch.arange(7), 24, 1e5, torch.float32)]
CHAINS = {  # ours, and the same by its definition
    "norm": (fused.norm, plain_norm),
    "rotate_norm": (
        lambda x: fused.rotate_norm(x, *(t.to(x.dtype) for t in COS_SIN), 1.2),
        lambda x: 1.2 * plain_norm(plain_rotate(x, *COS_SIN)),
    ),
    "relu_squared": (fused.relu_squared, lambda x: x.clamp(min=0).square()),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", CHAINS)
def test_chains_and_their_gradients(name, dtype, monkeypatch):
    ours, plain = CHAINS[name]
    x, dy = random(3, 7, 2, 24, dtype=dtype), random(3, 7, 2, 24, seed=1, dtype=dtype)
    calls = []
    real = native.call
    monkeypatch.setattr(native, "call", lambda which, *a: (calls.append(which), real(which, *a))[1])
    leaf, exact = x.clone().requires_grad_(), x.double().requires_grad_()
    y, oracle = ours(leaf), plain(exact)
    assert y.dtype == dtype and worst(y.detach(), oracle.detach()) < WORST[dtype]
    grad, oracle_grad = (
        torch.autograd.grad(y, leaf, dy)[0],
        torch.autograd.grad(oracle, exact, dy.double())[0],
    )
    assert worst(grad, oracle_grad) < 2 * WORST[dtype]
    assert calls == [f"{name}_forward", f"{name}_backward"]


@pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "bf16"])
def test_mix(dtype):
    x, x0, dy = (random(5, 9, 32, seed=s, dtype=dtype) for s in range(3))
    a, b = torch.tensor(1.1), torch.tensor(-0.3)
    ours = [t.clone().requires_grad_() for t in (x, x0, a, b)]
    exact = [t.double().requires_grad_() for t in (x, x0, a, b)]
    y, oracle = fused.mix(*ours), exact[2] * exact[0] + exact[3] * exact[1]
    assert worst(y.detach(), oracle.detach()) < WORST[dtype]
    for got, want in zip(torch.autograd.grad(y, ours, dy), torch.autograd.grad(oracle, exact, dy.double())):
        assert worst(got, want) < WORST[dtype]


def test_what_does_not_fit_is_not_given_to_c():
    """Another shape is refused; angles for other rows or sizes are PyTorch's to broadcast or to refuse."""
    with pytest.raises(ValueError, match="equal shapes"):
        fused.mix(random(5, 8), random(5, 9), torch.tensor(1.0), torch.tensor(1.0))
    x = random(2, 7, 3, 8)
    angles = random(2, 7, 1, 4)
    assert (
        worst(
            fused.rotate_norm(x, angles.cos(), angles.sin(), 1.0),
            plain_norm(plain_rotate(x.double(), angles.double().cos(), angles.double().sin())),
        )
        < 1e-6
    )
    with pytest.raises(RuntimeError):
        fused.rotate_norm(x, *(random(6, 1, 4) for _ in range(2)), 1.0)


@pytest.mark.parametrize("is_uniform", [True, False])
@pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "bf16"])
def test_cross_entropy_with_ignored_targets_and_signed_weights(dtype, is_uniform):
    h, head = random(37, 16, dtype=dtype), 3 * random(320, 16, seed=1)
    y = torch.randint(0 if is_uniform else -1, 300, (37,), generator=torch.Generator().manual_seed(2))
    weights = torch.full((), 0.013).expand(37) if is_uniform else random(37, seed=3)
    ours = [h.clone().requires_grad_(), head.clone().requires_grad_()]
    exact = [h.double().requires_grad_(), head.to(dtype).double().requires_grad_()]
    loss = weighted_nll(*ours, y, weights, 300, 15.0)
    logp = softcap((exact[0] @ exact[1].T)[:, :300], 15.0).log_softmax(-1)
    oracle = -(logp.gather(1, y.clamp(min=0)[:, None])[:, 0] * weights.double() * (y >= 0)).sum()
    assert abs(loss.item() - oracle.item()) < (2e-5 if dtype == torch.float32 else 5e-2) * abs(weights).sum()
    for got, want in zip(torch.autograd.grad(loss, ours), torch.autograd.grad(oracle, exact)):
        assert worst(got, want) < (5e-6 if dtype == torch.float32 else 3e-2)


def test_extreme_logits_stay_finite_and_nan_stays_nan():
    h, head = torch.tensor([[1e4], [-1e4], [0.0]]), torch.tensor([[1.0], [-1.0]] * 32)
    y, weights = torch.tensor([0, 0, 1]), torch.ones(3)
    loss = weighted_nll(h, head, y, weights, 64, 15.0)
    plain = -softcap(h @ head.T, 15.0).log_softmax(-1).gather(1, y[:, None]).sum()
    torch.testing.assert_close(loss, plain)
    h[2] = float("nan")
    assert torch.isnan(weighted_nll(h, head, y, weights, 64, 15.0))
    assert torch.isnan(fused.norm(torch.full((1, 4), float("nan")))).all()
    half = fused.relu_squared(torch.tensor([[float("nan"), float("inf"), -1.0, 2.0]], dtype=torch.bfloat16))
    assert torch.isnan(half[0, 0]) and half[0, 1:].tolist() == [float("inf"), 0.0, 4.0]


@pytest.mark.parametrize("left", [None, 0, 5, 40])
@pytest.mark.parametrize("is_kept", [True, False])
def test_dense_attention_in_chunks_with_documents(left, is_kept, monkeypatch):
    from helpers.attention_cases import inputs, plain, visible

    monkeypatch.setattr(dense, "CHUNK", 16)
    if not is_kept:
        monkeypatch.setattr(dense, "KEEP_BYTES", 0)
    *qkv, dy = inputs(2, 53, 4, 2, 16, torch.float32)
    doc_start = torch.tensor([[0] * 20 + [20] * 33, [0] * 53])
    assert not dense.suits(*qkv)  # no gradients wanted
    for docs in (None, doc_start):
        ours = [x.clone().requires_grad_() for x in qkv]
        exact = [x.double().requires_grad_() for x in qkv]
        assert dense.suits(*ours)
        y = dense.attend(*ours, 53 if left is None else left, 0, docs)
        oracle = plain(*exact, visible(53, 53, left, 0, docs))
        assert worst(y.detach(), oracle.detach()) < 1e-6
        grads = torch.autograd.grad(y, ours, dy)
        for got, want in zip(grads, torch.autograd.grad(oracle, exact, dy.double())):
            assert worst(got, want) < 2e-6


def test_more_keys_than_queries():
    from helpers.attention_cases import inputs, plain, visible

    q, k, v, _ = inputs(1, 40, 2, 2, 16, torch.float32)
    y = dense.attend(q[:, 30:], k, v, 12, 0, None)
    oracle = plain(*(x.double() for x in (q, k, v)), visible(40, 40, 12))[:, 30:]
    assert worst(y, oracle) < 1e-6


@pytest.mark.usefixtures("with_tiles")
@pytest.mark.parametrize("shape", [(2, 53, 53, 4, 2, 32), (1, 200, 200, 4, 1, 64), (1, 40, 190, 3, 3, 128)])
@pytest.mark.parametrize("left", [None, 0, 70])
def test_attention_in_tiles(shape, left):
    """Odd lengths, groups, windows, packed documents, keys before the queries; at least as exact as dense."""
    from helpers.attention_cases import inputs, plain, visible

    B, T, S, H, K, E = shape
    q, k, v, dy = inputs(B, S, H, K, E, torch.bfloat16)
    q, dy = q[:, S - T :].contiguous(), dy[:, S - T :].contiguous()
    doc_start = torch.tensor([[0] * 20 + [20] * (T - 20)] * B)
    for docs in (None, doc_start) if S == T else (None,):
        assert tiles.suits(q) and not tiles.suits(q.float()) and not tiles.suits(q[..., :24])
        exact = [x.double().requires_grad_() for x in (q, k, v)]
        mask = visible(T, S, left, 0, docs)
        oracle = plain(*exact, mask)
        results = oracle, *torch.autograd.grad(oracle, exact, dy.double())
        errors = []
        for path in (tiles.Tiles, dense.Dense):
            ours = [x.clone().requires_grad_() for x in (q, k, v)]
            y = path.apply(*ours, S if left is None else left, 0, docs)
            got = y, *torch.autograd.grad(y, ours, dy)
            errors.append([float((a.double() - b).detach().norm()) for a, b in zip(got, results)])
        size = [float(x.detach().norm()) + 1e-3 * float(dy.double().norm()) for x in results]
        assert all(error < 1e-2 * n for error, n in zip(errors[0], size)), (errors, size)
        if left != 0:  # else gradients of q and k are zero, and all of their error is rounding of y
            assert sum(errors[0]) < 1.1 * sum(errors[1])


@pytest.mark.usefixtures("with_tiles")
def test_tiles_keep_nan_and_hide_the_future():
    from helpers.attention_cases import inputs

    q, k, v, _ = inputs(1, 150, 2, 2, 32, torch.bfloat16)
    before = tiles.Tiles.apply(q, k, v, 150, 0, None)
    k[:, 100:], v[:, 100:] = 3.0, -7.0
    after = tiles.Tiles.apply(q, k, v, 150, 0, None)
    assert torch.equal(before[:, :100], after[:, :100]) and not torch.equal(before[:, 100:], after[:, 100:])
    q[0, 5, 1, 3] = float("nan")
    y = tiles.Tiles.apply(q, k, v, 150, 0, None)
    assert torch.isnan(y[0, 5, 1]).all() and not torch.isnan(y[0, 5, 0]).any()
    assert not torch.isnan(y[0, 6:]).any() and not torch.isnan(y[0, :5]).any()


def test_without_a_compiler_the_reason_is_said_and_pytorch_serves(monkeypatch, capsys):
    x = random(4, 8)
    expected = fused.norm(x)
    monkeypatch.setenv("CC", "no-such-compiler")
    native._build.cache_clear()
    try:
        assert native.library() is None and not native.ready(x)
        said = capsys.readouterr().err
        assert said.startswith("CPU kernels: PyTorch's own, because no-such-compiler failed")
        assert native.explain() in said
        torch.testing.assert_close(fused.norm(x), expected)
    finally:
        native._build.cache_clear()


def test_what_does_not_suit_is_left_to_pytorch():
    x = random(4, 8)
    assert native.ready(x) and native.ready(x, x.clone())
    assert not native.ready(x.double()) and not native.ready(x.T) and not native.ready(x, x.bfloat16())
    assert not native.ready(torch.empty(0, 8)) and not native.ready(torch.empty(2, 8, device="meta"))
