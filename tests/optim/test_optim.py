"""MuonAdamW against a slow oracle: one matrix at a time, fp64, straight from the formulas."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nanochat.kernels import build as native
from nanochat.optim import MuonAdamW
from nanochat.optim.groups import param_groups
from nanochat.optim.muon import POLAR_EXPRESS, muon_, normalize, orthogonalize, polar

SHAPES = {
    "transformer.wte.weight": (40, 32),
    "transformer.h.0.attn.c_q.weight": (32, 32),
    "transformer.h.0.attn.c_k.weight": (16, 32),
    "transformer.h.0.attn.c_proj.weight": (32, 32),
    "transformer.h.0.attn.ve_gate.weight": (2, 12),
    "transformer.h.0.mlp.c_fc.weight": (128, 32),
    "transformer.h.0.mlp.c_proj.weight": (32, 128),
    "value_embeds.0.weight": (40, 16),
    "lm_head.weight": (40, 32),
    "resid_lambdas": (1,),
    "x0_lambdas": (1,),
    "smear_gate.weight": (1, 24),
    "smear_lambda": (1,),
    "backout_lambda": (1,),
}

HYPER = {"momentum": 0.9, "beta2": 0.9, "ns_steps": 5, "ns_dtype": torch.float32}


def make_params(seed: int = 0) -> dict[str, torch.nn.Parameter]:
    gen = torch.Generator().manual_seed(seed)
    return {
        name: torch.nn.Parameter(0.1 * torch.randn(shape, generator=gen)) for name, shape in SHAPES.items()
    }


def make_optimizer(params: dict[str, torch.nn.Parameter], **options) -> MuonAdamW:
    return MuonAdamW(
        param_groups(params.items(), model_dim=32, batch_tokens=2**12, weight_decay=0.3, **options)
    )


def make_grads(params: dict[str, torch.nn.Parameter], seed: int) -> None:
    gen = torch.Generator().manual_seed(seed)
    for p in params.values():
        p.grad = torch.randn(p.shape, generator=gen)


class MuonOracle:
    """training.md section 2, steps 1 to 8, one matrix."""

    def __init__(self, W: torch.Tensor):
        rows, cols = W.shape
        self.W, self.M = W.double(), torch.zeros(rows, cols, dtype=torch.float64)
        self.S = torch.zeros(rows if rows >= cols else cols, dtype=torch.float64)
        self.clear = torch.ones(rows, cols, dtype=torch.bool)  # sign of U∘W was never within rounding of 0

    def step(self, G: torch.Tensor, lr: float, mu: float, wd: float) -> torch.Tensor:
        R, C = G.shape
        G = G.double()
        self.M = mu * self.M + (1 - mu) * G
        X = (1 - mu) * G + mu * self.M
        norm = X.pow(2).sum().sqrt()
        for r in range(R):
            X[r] = X[r] * (norm / math.sqrt(R)) / max(X[r].pow(2).sum().sqrt().item(), 1e-6)
        X = X / (1.01 * X.pow(2).sum().sqrt() + 1e-6)
        for alpha, beta, gamma in POLAR_EXPRESS:
            if R <= C:
                A = X @ X.T
                X = alpha * X + (beta * A + gamma * A @ A) @ X
            else:
                A = X.T @ X
                X = alpha * X + X @ (beta * A + gamma * A @ A)
        unit = X * math.sqrt(min(R, C)) / max(X.pow(2).sum().sqrt().item(), 1e-6)
        axis = 1 if R >= C else 0
        v, c = unit.pow(2).mean(axis), unit.shape[axis]
        self.S = 0.9 * self.S + 0.1 * v
        s = self.S.clamp(min=1e-10) ** -0.5
        scale = s * math.sqrt(c * v.sum()) / max(math.sqrt((c * v * s**2).sum()), 1e-10)
        U = unit * (scale[:, None] if R >= C else scale[None, :])
        eta = lr * math.sqrt(max(1, R / C))
        agree = (U * self.W >= 0).double()
        self.clear &= (U.abs() > 1e-4) & (self.W.abs() > 1e-6)
        self.W = self.W - eta * U - eta * wd * self.W * agree
        return U


def adamw_oracle(p, g, m, v, t, lr, betas, eps, wd):
    p, g = p * (1 - lr * wd), g.double()
    m, v = betas[0] * m + (1 - betas[0]) * g, betas[1] * v + (1 - betas[1]) * g * g
    m_hat, v_hat = m / (1 - betas[0] ** t), v / (1 - betas[1] ** t)
    return p - lr * m_hat / (v_hat.sqrt() + eps), m, v


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a.double() - b.double()).norm() / b.double().norm().clamp(min=1e-30)).item()


def test_six_steps_equal_the_oracle():
    params = make_params()
    opt = make_optimizer(params)
    before = {name: p.detach().clone() for name, p in params.items()}
    kinds = {name: group for group in opt.param_groups for name in group["param_names"]}
    oracles = {name: MuonOracle(p.detach()) for name, p in params.items() if kinds[name]["kind"] == "muon"}
    adam = {name: (p.detach().double(), 0.0, 0.0) for name, p in params.items() if name not in oracles}
    for step in range(1, 7):
        make_grads(params, step)
        for group in opt.param_groups:
            group["lr"] = group["initial_lr"] * step / 6
            group["momentum"] = 0.8 + 0.02 * step
        for name, p in params.items():
            group = kinds[name]
            if name in oracles:
                oracles[name].step(p.grad, group["lr"], group["momentum"], group["weight_decay"])
            else:
                hyper = [group[key] for key in ("lr", "betas", "eps", "weight_decay")]
                adam[name] = adamw_oracle(adam[name][0], p.grad, adam[name][1], adam[name][2], step, *hyper)
        opt.step()
    for name, p in params.items():
        expected = oracles[name].W if name in oracles else adam[name][0]
        clear = oracles[name].clear if name in oracles else torch.ones_like(p, dtype=torch.bool)
        assert clear.float().mean() > 0.95, name
        assert relative(p[clear], expected[clear]) < 1e-6, name
        assert relative(p, before[name]) > 1e-3, name


@settings(deadline=None, max_examples=25)
@given(st.integers(1, 24), st.integers(1, 24), st.integers(1, 3), st.integers(0, 99))
def test_any_shape_equals_the_oracle(rows, cols, n, seed):
    gen = torch.Generator().manual_seed(seed)
    weights = [torch.randn(rows, cols, generator=gen) for _ in range(n)]
    oracles = [MuonOracle(W) for W in weights]
    momentum, second = torch.zeros(n, rows, cols), torch.zeros(n, max(rows, cols))
    for _ in range(2):
        grads = [torch.randn(rows, cols, generator=gen) for _ in range(n)]
        # Square random matrices can have tiny singular values, which five steps in fp32 amplify: lift them.
        grads = [G + 5 * torch.eye(rows, cols) for G in grads]
        muon_(weights, grads, momentum, second, **HYPER, lr=0.02, weight_decay=0.3)
        for oracle, G in zip(oracles, grads):
            oracle.step(G, lr=0.02, mu=0.9, wd=0.3)
    for W, M, S, oracle in zip(weights, momentum, second, oracles):
        assert relative(W[oracle.clear], oracle.W[oracle.clear]) < 1e-6
        assert relative(M, oracle.M) < 1e-6
        assert relative(S, oracle.S) < 1e-4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(64, 64), (128, 32), (32, 128)])
def test_orthogonalize_flattens_the_spectrum(shape, dtype):
    gen = torch.Generator().manual_seed(1)
    left, _ = torch.linalg.qr(torch.randn(shape[0], min(shape), generator=gen))
    right, _ = torch.linalg.qr(torch.randn(shape[1], min(shape), generator=gen))
    spectrum = 10 ** torch.linspace(0, -1.5, min(shape))
    G = left * spectrum @ right.T
    X = orthogonalize(G[None].clone(), 5, dtype)
    assert X.dtype == dtype
    values = torch.linalg.svdvals(X[0].float())
    assert values.min() > 0.8 and values.max() < 1.25
    assert spectrum.min() / spectrum.max() < 0.05


@pytest.mark.parametrize("shape", [(32, 160), (160, 32), (128, 512)])
def test_two_polar_steps_at_a_time_are_about_as_exact(shape):
    """bf16 against the plain steps in fp64, beside bf16's own; spectra from even to very uneven."""
    gen = torch.Generator().manual_seed(4)
    short = min(shape)
    left, _ = torch.linalg.qr(torch.randn(shape[0], short, generator=gen))
    right, _ = torch.linalg.qr(torch.randn(shape[1], short, generator=gen))
    for smallest in (0.0, -2.0, -4.0):
        X = left * 10 ** torch.linspace(0, smallest, short) @ right.T
        X = (X / (1.01 * X.norm()))[None]
        exact, plain = X.double(), X.bfloat16()
        for alpha, beta, gamma in POLAR_EXPRESS:
            exact, plain = (
                alpha * x + x @ (beta * (x.mT @ x) + gamma * (x.mT @ x) @ (x.mT @ x)) for x in (exact, plain)
            )
        ours = polar(X.bfloat16(), 5)
        assert ours.dtype == torch.bfloat16 and ours.shape == X.shape and ours.is_contiguous()
        # Muon+ sets the length anew, so it does not count
        unit = [x.double() / x.double().norm() for x in (ours, plain, exact)]
        assert (unit[0] - unit[2]).norm() < 1.6 * (unit[1] - unit[2]).norm() + 0.01
        assert (polar(X, 5).double() - exact).norm() < 1e-4 * exact.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(24, 24), (40, 16), (16, 300), (64, 64), (160, 34), (33, 64)])
def test_c_and_pytorch_make_the_same_muon_step(shape, dtype, monkeypatch):
    if native.library() is None:
        pytest.skip("no C compiler here")
    results = []
    for override in (None, False):
        monkeypatch.setattr(native, "_override", override)
        gen = torch.Generator().manual_seed(5)
        weights, momentum = [torch.randn(shape, generator=gen) for _ in range(3)], torch.zeros(3, *shape)
        second, version = torch.zeros(3, max(shape)), weights[0]._version
        for _ in range(3):
            grads = [torch.randn(shape, generator=gen) for _ in range(3)]
            options = HYPER | {"ns_dtype": dtype}
            muon_(weights, grads, momentum, second, **options, lr=0.02, weight_decay=0.3)
        assert weights[0]._version > version
        results.append((torch.stack(weights), momentum, second))
    (W, M, S), (W0, M0, S0) = results
    worst = 1e-5 if dtype == torch.float32 else 5e-3
    assert relative(W, W0) < worst and relative(M, M0) < 1e-6 and relative(S, S0) < 20 * worst


def test_normalize_keeps_the_length_of_muon_plus():
    X = torch.randn(3, 12, 5, generator=torch.Generator().manual_seed(2))
    for stack in (X, X.mT.contiguous()):
        U = normalize(stack, torch.zeros(3, 12), 0.9)
        assert torch.allclose(U.pow(2).sum((1, 2)), torch.full((3,), 5.0), rtol=1e-5)


def test_decay_only_where_the_step_shrinks_the_weight():
    gen = torch.Generator().manual_seed(3)
    start = torch.randn(8, 8, generator=gen)
    G = torch.randn(8, 8, generator=gen)
    moved = {}
    for wd in (0.0, 0.5):
        W = start.clone()
        muon_([W], [G], torch.zeros(1, 8, 8), torch.zeros(1, 8), **HYPER, lr=0.02, weight_decay=wd)
        moved[wd] = W
    agree = (start - moved[0.0]) * start >= 0
    assert 0 < agree.sum() < 64
    assert torch.equal(moved[0.5][~agree], moved[0.0][~agree])
    assert torch.allclose((moved[0.0] - moved[0.5])[agree], 0.02 * 0.5 * start[agree], rtol=1e-4, atol=1e-7)


def test_zero_gradient_moves_no_matrix_without_decay():
    W, G = torch.ones(1, 4, 4), torch.zeros(4, 4)
    muon_([W[0]], [G], torch.zeros(1, 4, 4), torch.zeros(1, 4), **HYPER, lr=1.0, weight_decay=0.0)
    assert torch.equal(W, torch.ones(1, 4, 4))


def test_missing_gradients_are_zero_gradients():
    states = []
    for missing in (True, False):
        params = make_params()
        opt = make_optimizer(params)
        for step in range(3):
            make_grads(params, step)
            for name in ("lm_head.weight", "transformer.h.0.attn.c_q.weight", "x0_lambdas"):
                params[name].grad = None if missing else torch.zeros_like(params[name])
            opt.step()
        states.append((params, opt.state_arrays()))
    assert all(torch.equal(states[0][0][name], states[1][0][name]) for name in SHAPES)
    assert all(np.array_equal(states[0][1][key], states[1][1][key]) for key in states[1][1])


def test_norm_scale_and_non_finite_steps():
    params = make_params()
    opt = make_optimizer(params)
    make_grads(params, 0)
    expected = math.sqrt(sum(p.grad.double().pow(2).sum().item() for p in params.values()))
    norm = opt.reduce(scale=0.5)
    assert norm.shape == () and norm.dtype == torch.float32
    assert norm.item() == pytest.approx(0.5 * expected, rel=1e-5)
    opt.update()
    with pytest.raises(ValueError, match="reduce"):
        opt.update()
    weights = {name: p.detach().clone() for name, p in params.items()}
    state = opt.state_arrays()
    make_grads(params, 1)
    params["resid_lambdas"].grad[0] = float("nan")
    assert not torch.isfinite(opt.step())
    assert all(torch.equal(params[name], weights[name]) for name in SHAPES)
    assert all(np.array_equal(array, state[key]) for key, array in opt.state_arrays().items())


def test_scaled_gradients_give_the_same_step():
    results = []
    for factor in (1.0, 1024.0):  # a power of two: exact
        params = make_params()
        opt = make_optimizer(params)
        make_grads(params, 0)
        for p in params.values():
            p.grad *= factor
        opt.reduce(scale=1 / factor)
        opt.update()
        results.append(params)
    assert all(torch.equal(results[0][name], results[1][name]) for name in SHAPES)


def test_state_survives_exactly():
    params = make_params()
    opt = make_optimizer(params)
    for step in range(2):
        make_grads(params, step)
        opt.step()
    twin = {name: torch.nn.Parameter(p.detach().clone()) for name, p in params.items()}
    twin_opt = make_optimizer(twin)
    twin_opt.load_state_arrays(opt.state_arrays())
    via_dict = {name: torch.nn.Parameter(p.detach().clone()) for name, p in params.items()}
    dict_opt = make_optimizer(via_dict)
    dict_opt.load_state_dict(opt.state_dict())
    for each, optimizer in ((params, opt), (twin, twin_opt), (via_dict, dict_opt)):
        make_grads(each, 9)
        optimizer.step()
    assert all(torch.equal(params[name], twin[name]) for name in SHAPES)
    assert all(torch.equal(params[name], via_dict[name]) for name in SHAPES)
    assert opt.state_arrays()["adamw.step|lm_head.weight"].item() == 3


def test_wrong_state_is_refused_whole():
    params = make_params()
    opt = make_optimizer(params)
    make_grads(params, 0)
    opt.step()
    good = opt.state_arrays()
    fresh = make_optimizer(make_params())
    untouched = fresh.state_arrays()
    lost = "muon.momentum|transformer.h.0.mlp.c_fc.weight"
    slice_of_wte = good["adamw.exp_avg|transformer.wte.weight"].reshape(-1)[:700]
    for bad, named in (
        ({key: array for key, array in good.items() if key != lost}, lost),
        (good | {"muon.momentum|transformer.h.7.attn.c_q.weight": good[lost]}, "h.7.attn.c_q"),
        (good | {"adamw.exp_avg|lm_head.weight": np.zeros((40, 31), np.float32)}, r"\(40, 31\)"),
        (good | {"adamw.exp_avg|transformer.wte.weight|0|40x32": slice_of_wte}, "wte.weight needs elements"),
    ):
        with pytest.raises(ValueError, match=named):
            fresh.load_state_arrays(bad)
    assert all(np.array_equal(array, untouched[key]) for key, array in fresh.state_arrays().items())


def test_groups_follow_the_table():
    params = make_params()
    groups = param_groups(
        params.items(),
        model_dim=192,
        batch_tokens=2**17,
        weight_decay=0.7,
        wte_lr=0.2,
        ns_dtype=torch.bfloat16,
    )
    by_name = {name: group for group in groups for name, _ in group["params"]}
    assert sorted(by_name) == sorted(SHAPES)
    a, b = 2.0, 0.5
    for name, lr, wd in (
        ("lm_head.weight", 0.008 * a * b, 0.01),
        ("transformer.wte.weight", 0.2 * a * b, 0.001),
        ("value_embeds.0.weight", 0.15 * a * b, 0.01),
        ("resid_lambdas", 0.005 * b, 0.05),
        ("x0_lambdas", 0.5 * b, 0.0),
        ("smear_lambda", 0.2, 0.0),
        ("transformer.h.0.attn.ve_gate.weight", 0.02 * b, 0.7),
    ):
        assert by_name[name]["lr"] == by_name[name]["initial_lr"] == pytest.approx(lr)
        assert by_name[name]["weight_decay"] == wd
    assert by_name["transformer.wte.weight"]["betas"] == (0.8, 0.995)
    assert by_name["lm_head.weight"].get("eps", 1e-10) == 1e-10
    assert by_name["x0_lambdas"]["betas"] == (0.96, 0.95)
    muon_group = by_name["transformer.h.0.mlp.c_fc.weight"]
    assert muon_group["kind"] == "muon" and muon_group["ns_dtype"] == torch.bfloat16
    common = {"model_dim": 192, "batch_tokens": 1, "weight_decay": 0.0}
    with pytest.raises(ValueError, match=r"extra\.weight"):
        param_groups([("extra.weight", torch.zeros(2, 2))], **common)
    with pytest.raises(ValueError, match="embed_lr"):
        param_groups(params.items(), embed_lr=0.1, **common)


def test_epsilon_of_lm_head_keeps_rows_of_rare_tokens_where_they_are():
    """A row that is pushed down by 1e-8 at every step sinks at the full rate without it."""
    moved = {}
    for eps in (1e-10, 1e-5):
        params = make_params()
        groups = param_groups(
            params.items(), model_dim=192, batch_tokens=2**17, weight_decay=0.0, lm_head_eps=eps
        )
        assert [g["eps"] for g in groups if "eps" in g] == [eps]
        optimizer, weight = MuonAdamW(groups), params["lm_head.weight"]
        before = weight.detach().clone()
        for _ in range(20):
            weight.grad = torch.full_like(weight, 1e-8)
            optimizer.step()
        (lr,) = (g["lr"] for g in groups if "eps" in g)
        moved[eps] = ((before - weight).abs().max() / lr).item()
    assert moved[1e-10] > 15 and moved[1e-5] < 0.1


def test_bad_groups_are_refused():
    def param(*shape: int, **options) -> torch.nn.Parameter:
        return torch.nn.Parameter(torch.zeros(shape, **options))

    for group, named in (
        ({"kind": "sgd", "params": [param(2)], "lr": 1}, "sgd"),
        ({"kind": "adamw", "params": [param(2)]}, "lr"),
        ({"kind": "adamw", "params": [], "lr": 1}, "no parameters"),
        ({"kind": "muon", "params": [("scale", param(2))], "lr": 1}, "scale"),
        ({"kind": "adamw", "params": [("half", param(2, dtype=torch.float16))], "lr": 1}, "half"),
        ({"kind": "muon", "params": [param(2, 2)], "lr": 1, "ns_dtype": torch.float16}, "float16"),
        ({"kind": "muon", "params": [param(2, 2)], "lr": 1, "ns_steps": 6}, "ns_steps"),
        ({"kind": "adamw", "params": [("twin", param(2)), ("twin", param(2))], "lr": 1}, "twin"),
    ):
        with pytest.raises(ValueError, match=named):
            MuonAdamW([group])
    shared = param(2)
    with pytest.raises(ValueError, match="1/0"):
        MuonAdamW([{"kind": "adamw", "params": [shared], "lr": 1} for _ in range(2)])
    with pytest.raises(ValueError, match="all groups at once"):
        MuonAdamW([{"kind": "adamw", "params": [shared], "lr": 1}]).add_param_group({})


def test_unnamed_parameters_get_names_and_train():
    torch.manual_seed(0)
    weight, bias = torch.nn.Parameter(torch.randn(4, 6)), torch.nn.Parameter(torch.zeros(4))
    groups = [{"kind": "muon", "params": [weight], "lr": 0.1}, {"kind": "adamw", "params": [bias], "lr": 0.1}]
    opt = MuonAdamW(groups)
    inputs, goal = torch.randn(32, 6), torch.randn(32, 4)
    losses = []
    for _ in range(20):
        loss = (inputs @ weight.T + bias - goal).pow(2).mean()
        opt.zero_grad()
        loss.backward()
        opt.step()
        losses.append(loss.item())
    assert losses[-1] < 0.6 * losses[0]
    assert set(opt.state_arrays()) >= {"muon.momentum|0/0", "muon.second|0/0", "adamw.exp_avg|1/0"}
