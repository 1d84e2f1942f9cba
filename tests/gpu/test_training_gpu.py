"""Kernels of a training step on the GPU that is here: the loss in Triton, fp8 products, compiled layers,
memory."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from nanochat import scaling
from nanochat.gpt import GPT, GPTConfig, softcap
from nanochat.kernels import fp8, triton_loss
from nanochat.kernels.linear import Linear
from nanochat.kernels.loss import weighted_nll
from nanochat.runtime import Runtime
from nanochat.train import speed

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
    pytest.mark.filterwarnings("ignore"),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_loss_equals_the_plain_softmax(dtype, monkeypatch):
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", False)
    if (reason := triton_loss.unsupported_reason(torch.device("cuda", 0), dtype)) is not None:
        pytest.fail(reason)
    gen = torch.Generator().manual_seed(0)
    h = torch.randn(999, 64, generator=gen).to("cuda", dtype)
    head = torch.randn(5056, 64, generator=gen).cuda()
    y = torch.randint(-1, 5000, (999,), generator=gen).cuda()
    weights = torch.randn(999, generator=gen).cuda()
    leaves = [h.clone().requires_grad_(), head.clone().requires_grad_()]
    exact = [h.double().requires_grad_(), head.to(dtype).double().requires_grad_()]
    loss = weighted_nll(*leaves, y, weights, 5000, 15.0)
    nll = F.cross_entropy(
        softcap((exact[0] @ exact[1].T)[:, :5000], 15.0), y, ignore_index=-1, reduction="none"
    )
    oracle = (nll * weights.double()).sum()
    allowed = 1e-5 if dtype == torch.float32 else 3e-2
    assert abs(loss.item() - oracle.item()) < allowed * float(weights.abs().sum())
    for got, want in zip(torch.autograd.grad(loss, leaves), torch.autograd.grad(oracle, exact)):
        assert float((got.double() - want).abs().max() / want.abs().max()) < allowed


def test_fp8_products_equal_their_emulation():
    device = torch.device("cuda", 0)
    if (reason := fp8.unsupported_reason(device)) is not None:
        pytest.skip(reason)
    gen = torch.Generator().manual_seed(0)
    layers = [Linear(256, 384), Linear(256, 384)]
    with torch.no_grad():
        layers[0].weight.copy_(torch.randn(384, 256, generator=gen) / 16)
        layers[1].weight.copy_(layers[0].weight)
    x, dy = torch.randn(77, 256, generator=gen), torch.randn(77, 384, generator=gen)
    results = []
    for layer, place in zip(layers, ("cuda", "cpu")):
        layer.to(place).is_float8 = True
        leaf = x.to(place, torch.bfloat16).requires_grad_()
        y = layer(leaf)
        results.append(
            [t.float().cpu() for t in (y.detach(), *torch.autograd.grad(y, (leaf, layer.weight), dy.to(y)))]
        )
    for gpu, cpu in zip(*results):
        assert float((gpu - cpu).abs().max() / cpu.abs().max()) < 2e-2


@pytest.mark.parametrize("how", ["", "checkpoint", "compile", "compile,fp8"])
def test_ways_of_training_agree(how):
    if "fp8" in how and (reason := fp8.unsupported_reason(torch.device("cuda", 0))) is not None:
        pytest.skip(reason)
    rt = Runtime(torch.device("cuda", 0), torch.bfloat16)
    config = GPTConfig(sequence_len=256, vocab_size=512, n_layer=4, n_head=2, n_kv_head=2, n_embd=256)
    ids = torch.randint(0, 512, (4, 257), generator=torch.Generator().manual_seed(0))
    losses = {}
    for name, device, ways in (("cpu", "cpu", ""), ("gpu", "cuda", how)):
        model = GPT(config, torch.float32 if name == "cpu" else torch.bfloat16)
        model.init_weights(1)
        model.to(device)
        if ways:
            speed.apply(model, ways, rt)
        optimizer = model.setup_optimizer(batch_tokens=2**16, weight_decay=0.0)
        losses[name] = []
        for _ in range(6):
            loss = model(ids[:, :-1].to(device), ids[:, 1:].to(device))
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses[name].append(loss.item())
    assert losses["gpu"] == pytest.approx(losses["cpu"], abs=0.08 if "fp8" in how else 0.04)


def test_predicted_memory_within_15_percent():
    plan = scaling.plan(8, device_batch=8, num_steps=10, batch_tokens=8 * 2048)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    with torch.device("cuda"):
        model = GPT(plan.config, torch.bfloat16)
    model.init_weights(1)
    optimizer = model.setup_optimizer(batch_tokens=plan.batch_tokens, weight_decay=0.0)
    ids = torch.randint(0, plan.vocab_size, (8, 2049), device="cuda")
    for _ in range(2):
        model(ids[:, :-1], ids[:, 1:]).backward()
        optimizer.step()
        optimizer.zero_grad()
    measured = torch.cuda.max_memory_allocated() - before
    assert scaling.peak_bytes(scaling.memory_bytes(plan)) == pytest.approx(measured, rel=0.15)
