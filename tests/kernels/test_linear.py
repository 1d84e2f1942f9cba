"""Linear layers: the cast weight follows the master, gradients reach it; fp8 against its definition."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from nanochat.errors import UserError
from nanochat.gpt import GPT, GPTConfig
from nanochat.kernels import fp8
from nanochat.kernels.linear import Linear


def make(rows: int = 128, cols: int = 144) -> tuple[Linear, torch.Tensor]:
    gen = torch.Generator().manual_seed(0)
    layer = Linear(cols, rows)
    with torch.no_grad():
        layer.weight.copy_(torch.randn(rows, cols, generator=gen) / cols**0.5)
    return layer, torch.randn(3, 7, cols, generator=gen)


def test_bf16_equals_a_cast_at_every_use_bit_for_bit() -> None:
    layer, x = make()
    a, b = (x.bfloat16().requires_grad_() for _ in range(2))
    y, plain = layer(a), F.linear(b, layer.weight.bfloat16())
    assert torch.equal(y, plain)
    ours = torch.autograd.grad(y.float().square().sum(), (a, layer.weight))
    theirs = torch.autograd.grad(plain.float().square().sum(), (b, layer.weight))
    assert all(torch.equal(g, w) for g, w in zip(ours, theirs)) and ours[1].dtype == torch.float32


def test_the_weight_is_cast_once_and_again_after_each_change() -> None:
    layer, _ = make()
    layer.weight.grad = torch.zeros_like(layer.weight)  # within a step: some micro-batch has been backward
    first = layer.cast(torch.bfloat16)[0]
    assert layer.cast(torch.bfloat16)[0] is first
    for change in (
        lambda: layer.weight.detach().mul_(2),
        lambda: layer.load_state_dict({"weight": torch.ones_like(layer.weight)}),
        lambda: setattr(layer, "weight", torch.nn.Parameter(torch.zeros_like(layer.weight))),
    ):
        change()
        assert torch.equal(layer.cast(torch.bfloat16)[0], layer.weight.bfloat16())
    assert list(layer.state_dict()) == ["weight"]


@pytest.mark.parametrize("name", ["ours", "fused"])
def test_bf16_training_sees_every_update(name: str) -> None:
    """Optimizers change weights in ways of their own; torch's fused one does not even raise the version."""
    config = GPTConfig(sequence_len=16, vocab_size=64, n_layer=2, n_head=2, n_kv_head=2, n_embd=32)
    model = GPT(config, torch.bfloat16)
    model.init_weights(1)
    if name == "ours":
        optimizer = model.setup_optimizer(batch_tokens=2**14, weight_decay=0.1)
    else:
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, fused=True)
    ids = torch.randint(0, 64, (2, 17), generator=torch.Generator().manual_seed(0))
    losses = []
    for _ in range(3):
        for _ in range(2):
            loss = model(ids[:, :-1], ids[:, 1:])
            loss.backward()
        losses.append(loss.item())
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < losses[0] - 0.01
    model.eval()
    for layer in (m for m in model.modules() if isinstance(m, Linear)):
        assert torch.equal(layer.cast(torch.bfloat16)[0], layer.weight.bfloat16())


def test_a_first_use_in_inference_mode_spoils_no_training() -> None:
    layer, x = make()
    with torch.inference_mode():
        layer(x.bfloat16())
    layer(x.bfloat16().requires_grad_()).sum().backward()
    assert layer.weight.grad is not None


def rounded(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    largest = 448.0 if dtype == torch.float8_e4m3fn else 57344.0
    amax = x.abs().max()
    return (x * (largest / amax)).to(dtype).double() * (amax.double() / largest)


def test_fp8_is_a_product_of_rounded_tensors() -> None:
    layer, x = make()
    layer.is_float8 = True
    x = x.requires_grad_()
    y = layer(x)
    e4, e5 = torch.float8_e4m3fn, torch.float8_e5m2
    w8, x8 = rounded(layer.weight.detach(), e4), rounded(x.detach().view(21, -1), e4)
    torch.testing.assert_close(y.detach().view(21, -1).double(), x8 @ w8.T, rtol=1e-5, atol=1e-5)
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(1))
    dx, dw = torch.autograd.grad(y, (x, layer.weight), dy)
    g8 = rounded(dy.view(21, -1), e5)
    torch.testing.assert_close(dx.view(21, -1).double(), g8 @ w8, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(dw.double(), g8.T @ x8, rtol=1e-5, atol=1e-4)
    y, exact = y.detach(), F.linear(x, layer.weight).detach()
    error = ((y - exact).norm() / exact.norm()).item()
    assert 1e-3 < error < 0.06, "rounding to three bits must show, and stay small"
    layer.eval()
    assert torch.equal(layer(x), exact), "evaluation is in the compute dtype"


def test_fp8_trains_a_model_as_the_plain_one_does() -> None:
    config = GPTConfig(sequence_len=32, vocab_size=128, n_layer=2, n_head=2, n_kv_head=2, n_embd=128)
    ids = torch.randint(0, 128, (4, 33), generator=torch.Generator().manual_seed(0))
    losses = {}
    for kind in ("plain", "fp8"):
        model = GPT(config)
        model.init_weights(1)
        if kind == "fp8":
            assert fp8.convert(model, emulate=True) == 12
        optimizer = model.setup_optimizer(batch_tokens=2**14, weight_decay=0.0)
        losses[kind] = []
        for _ in range(12):
            loss = model(ids[:, :-1], ids[:, 1:])
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses[kind].append(loss.item())
    assert losses["fp8"] != losses["plain"]
    assert losses["plain"][-1] < losses["plain"][0] - 0.3
    assert losses["fp8"][-1] == pytest.approx(losses["plain"][-1], abs=0.1)


def test_fp8_is_refused_where_no_hardware_has_it() -> None:
    layer, _ = make()
    with pytest.raises(UserError, match="cpu has no fp8"):
        fp8.convert(layer)
    zeros, scale = fp8.quantize(torch.zeros(4, 4), fp8.FORWARD)
    assert zeros.float().abs().max() == 0 and torch.isfinite(scale)
