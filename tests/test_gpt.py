"""The network: shapes and counts from the table, gradients of the fused chains, and its identities."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, replace

import pytest
import torch
import torch.nn.functional as F

from nanochat import scaling
from nanochat.context import row_context
from nanochat.engine.inference import InferenceGPT
from nanochat.gpt import GPT, Block, GPTConfig, rope_tables, softcap
from nanochat.gpt_config import experiment
from nanochat.kernels import decode
from nanochat.kernels import elementwise as fused
from nanochat.kernels.layer import fused_block
from nanochat.kernels.loss import weighted_nll

CONFIG = GPTConfig(
    sequence_len=64, vocab_size=300, n_layer=3, n_head=4, n_kv_head=2, n_embd=64, window_pattern="SL"
)


@pytest.fixture(scope="module")
def model() -> GPT:
    net = GPT(CONFIG)
    net.init_weights(1)
    with torch.no_grad():  # zero projections would hide most of the network
        for block in net.blocks:
            block.attn.c_proj.weight.normal_(0, 0.1, generator=torch.Generator().manual_seed(2))
            block.mlp.c_proj.weight.normal_(0, 0.1, generator=torch.Generator().manual_seed(3))
        net.smear_lambda.fill_(0.5)
        net.lm_head.weight.mul_(100)
    return net


def ids(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, CONFIG.vocab_size, shape, generator=torch.Generator().manual_seed(seed))


# ---------------------------------------------------------------- fused chains


def plain_norm(x: torch.Tensor) -> torch.Tensor:
    return x / (x.square().mean(-1, keepdim=True) + 2**-23).sqrt()


def plain_rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    x1, x2 = x.chunk(2, -1)
    return torch.cat((x1 * cos + x2 * sin, -x1 * sin + x2 * cos), -1)


def test_fused_chains_equal_their_plain_forms() -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 5, 3, 8, dtype=torch.float64, requires_grad=True)
    x0 = torch.randn_like(x, requires_grad=True)
    a, b = (torch.tensor(v, dtype=torch.float64, requires_grad=True) for v in (1.1, 0.2))
    cos, sin = rope_tables(torch.arange(5), 8, 1e5, torch.float64)
    pairs = [
        (fused.norm(x), plain_norm(x)),
        (fused.rotate_norm(x, cos, sin, 1.2), 1.2 * plain_norm(plain_rotate(x, cos, sin))),
        (fused.relu_squared(x), F.relu(x).square()),
        (fused.mix(x, x0, a, b), a * x + b * x0),
    ]
    for ours, plain in pairs:
        torch.testing.assert_close(ours, plain, rtol=1e-6, atol=1e-7)  # RoPE tables are made in fp32
        weight = torch.randn_like(plain)
        inputs = (x, x0, a, b)
        got = torch.autograd.grad((ours * weight).sum(), inputs, allow_unused=True)
        want = torch.autograd.grad((plain * weight).sum(), inputs, allow_unused=True)
        for g, w in zip(got, want, strict=True):
            assert (g is None) == (w is None)
            if g is not None:
                torch.testing.assert_close(g, w, rtol=1e-6, atol=1e-7)


def test_loss_equals_the_plain_softmax() -> None:
    torch.manual_seed(0)
    h = torch.randn(37, 16, dtype=torch.float64, requires_grad=True)
    w = (3 * torch.randn(320, 16, dtype=torch.float64)).requires_grad_()
    y, weights = torch.randint(-1, 300, (37,)), torch.randn(37, dtype=torch.float64)
    ours = weighted_nll(h, w, y, weights, 300, 15.0)
    logp = softcap((h @ w.T)[:, :300], 15.0).log_softmax(-1)
    plain = -(logp.gather(1, y.clamp(min=0).unsqueeze(1)).squeeze(1) * weights * (y >= 0)).sum()
    torch.testing.assert_close(ours, plain, rtol=1e-10, atol=1e-10)
    for got, want in zip(torch.autograd.grad(ours, (h, w)), torch.autograd.grad(plain, (h, w)), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-10)
    assert softcap(torch.tensor(1e9), 15.0) == 15


# ---------------------------------------------------------------- shapes and counts


def test_parameters_follow_the_table(model: GPT) -> None:
    state = model.state_dict()
    assert state["transformer.wte.weight"].shape == (320, 64)
    assert state["transformer.h.1.attn.c_k.weight"].shape == (32, 64)
    assert (
        "transformer.h.0.attn.ve_gate.weight" in state and "transformer.h.1.attn.ve_gate.weight" not in state
    )
    assert {k for k in state if k.startswith("value_embeds")} == {
        "value_embeds.0.weight",
        "value_embeds.2.weight",
    }
    counts = model.num_scaling_params()
    assert counts["total"] == sum(p.numel() for p in model.parameters())
    assert counts["scalars"] == 2 * CONFIG.n_layer + 26


@pytest.mark.parametrize(
    ("depth", "steps", "batch", "decay"),
    [(12, 2520, 2**19, 0.28), (4, 528, 2**18, 1.890), (18, 3712, 2**20, 0.134)],
)
def test_plan_reproduces_the_reference_table(depth: int, steps: int, batch: int, decay: float) -> None:
    p = scaling.plan(depth)
    assert (p.num_steps, p.batch_tokens) == (steps, batch)
    assert p.weight_decay == pytest.approx(decay, abs=2e-3)
    with torch.device("meta"):
        net = GPT(p.config)
    assert net.num_scaling_params()["total"] == p.params_total
    assert net.estimate_flops() == p.flops_per_token


def test_plan_constants_agree_with_the_optimizer_and_the_config() -> None:
    from nanochat.optim.groups import RULES

    assert next(rule.lr for rule in RULES if rule.rate == "matrix_lr") == scaling.MATRIX_LR
    assert GPTConfig(700, n_layer=5, window_pattern="SSL").windows == [256, 256, 700, 256, 700]


def test_bad_sizes_are_refused() -> None:
    for wrong in (
        {"n_kv_head": 4},
        {"n_embd": 770},
        {"window_pattern": "X"},
        {"n_layer": 0},
        {"n_embd": 12, "n_head": 2},
    ):
        with pytest.raises(ValueError):
            GPTConfig(**wrong)
    with pytest.raises(ValueError, match="multiple of"):
        scaling.plan(4, batch_tokens=1000)


def test_init_is_the_same_from_meta_and_leaves_the_first_loss_uniform() -> None:
    with torch.device("meta"):
        net = GPT(CONFIG)
    net.to_empty(device="cpu")
    net.init_weights(5)
    other = GPT(CONFIG)
    other.init_weights(5)
    for (name, p), q in zip(net.state_dict().items(), other.state_dict().values(), strict=True):
        assert torch.equal(p, q), name
    loss = net(ids(2, 32), ids(2, 32, seed=1))
    assert loss.item() == pytest.approx(math.log(CONFIG.vocab_size), abs=0.02)


def test_an_experiment_is_computed_by_the_plain_lines(model: GPT, monkeypatch: pytest.MonkeyPatch) -> None:
    """A field that the kernels do not know switches them off, in training and in the engine's steps."""

    @dataclass(frozen=True)
    class Experiment(GPTConfig):
        novelty: float = experiment(0.0)

    plain, novel = (Experiment(**asdict(CONFIG), novelty=value) for value in (0.0, 0.5))
    assert plain.has_kernels and not novel.has_kernels and CONFIG.has_kernels
    seen = []
    monkeypatch.setattr(
        Block, "forward", lambda self, x, *rest: seen.append(fused_block(self, x, *rest)) or x
    )
    for config in (plain, novel):
        net = GPT(config)
        net.init_weights(1)
        net.hidden(ids(1, 8))
        assert decode.supports(InferenceGPT(net, torch.float32)) == (config is plain and has_compiler())
    assert [fused is None for fused in seen] == [False] * 3 + [True] * 3


def has_compiler() -> bool:
    return decode.library() is not None


# ---------------------------------------------------------------- identities


def test_no_position_sees_its_future(model: GPT) -> None:
    row = ids(1, 40)
    changed = row.clone()
    changed[0, 25] = (changed[0, 25] + 1) % CONFIG.vocab_size
    before, after = model(row), model(changed)
    torch.testing.assert_close(before[:, :25], after[:, :25], rtol=0, atol=1e-6)
    assert (before[:, 25] - after[:, 25]).abs().max() > 1e-3


def test_packed_documents_equal_the_same_documents_alone(model: GPT) -> None:
    first, second = ids(1, 20, seed=1), ids(1, 30, seed=2)
    starts = torch.tensor([[0] * 20 + [20] * 30], dtype=torch.int32)
    packed = model(torch.cat((first, second), 1), doc_start=starts)
    torch.testing.assert_close(packed[:, :20], model(first), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(packed[:, 20:], model(second), rtol=1e-4, atol=1e-4)


def test_the_network_accepts_previous_ids_in_place_of_the_row(model: GPT) -> None:
    row = ids(2, 16)
    previous = torch.cat((torch.full((2, 1), -1), row[:, :-1]), 1)

    context = row_context(16, row.device)
    hidden = model.forward_hidden(row, replace(context, prev_ids_BT=previous))
    torch.testing.assert_close(hidden, model.hidden(row), rtol=1e-5, atol=1e-5)


def test_reductions_agree(model: GPT) -> None:
    x, y = ids(2, 30), ids(2, 30, seed=9)
    y[0, :5] = -1
    each = model(x, y, loss_reduction="none")
    assert each.shape == (60,) and int((each == 0).sum()) == 5
    torch.testing.assert_close(model(x, y, loss_reduction="sum"), each.sum())
    torch.testing.assert_close(model(x, y), each.sum() / 55)
    with pytest.raises(ValueError, match="loss_reduction"):
        model(x, y, loss_reduction="median")
    with pytest.raises(ValueError, match="a row may hold"):
        model(ids(1, 65))


def test_generate_is_greedy_recomputation(model: GPT) -> None:
    prompt = ids(1, 5)[0].tolist()
    out = list(model.generate(prompt, 6, temperature=0))
    for n in range(6):
        assert out[n] == int(model(torch.tensor([prompt + out[:n]]))[0, -1].argmax())
    assert list(model.generate(prompt, 6, seed=3)) == list(model.generate(prompt, 6, seed=3))


def test_bf16_activations_stay_close(model: GPT) -> None:
    half = GPT(CONFIG, torch.bfloat16)
    half.load_state_dict(model.state_dict())
    x, y = ids(2, 40), ids(2, 40, seed=4)
    assert abs(half(x, y).item() - model(x, y).item()) < 0.05
    half(x, y).backward()
    assert half.lm_head.weight.grad is not None and half.lm_head.weight.grad.dtype == torch.float32
