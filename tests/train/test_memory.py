"""The memory that scripts.plan predicts, against what a step keeps, and against torch's own peak."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks import plain_loop
from nanochat import scaling
from nanochat.gpt import GPT
from nanochat.kernels import build as native
from nanochat.train.speed import checkpoint_layers


def saved_bytes(plan: scaling.Plan, dtype: torch.dtype) -> tuple[int, int]:
    """(bytes that forward keeps for backward without parameters and casts, bytes of weights)."""
    model = GPT(plan.config, dtype)
    model.init_weights(1)
    ids = torch.randint(0, plan.vocab_size, (plan.device_batch, plan.sequence_len))
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, int] = {}

    def note(x: torch.Tensor) -> torch.Tensor:
        storage = x.untyped_storage()
        if storage.data_ptr() not in own and not (x.dim() == 2 and x.shape in shapes):
            kept[storage.data_ptr()] = storage.nbytes()
        return x

    shapes = {p.shape for p in model.parameters() if p.dim() == 2}
    with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
        hidden = model.hidden(ids)
    assert hidden.requires_grad
    return sum(kept.values()), sum(p.numel() * 4 for p in model.parameters())


def keeps_scores(dtype: torch.dtype) -> bool:
    """Whether attention on this CPU keeps its weights."""
    if native._override is False or native.library() is None:
        return False
    return dtype == torch.float32 or not native.has("attention")


def peak(work: Callable[[], None]) -> int:
    """The most bytes that torch had allocated at once beyond those at the start, by its own count."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as trace:
        work()
    assert trace.profiler is not None and trace.profiler.kineto_results is not None
    events = [e for e in trace.profiler.kineto_results.events() if e.name() == "[memory]"]
    now = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    return most


def train(
    plan: scaling.Plan, dtype: torch.dtype, is_checkpointed: bool = False, is_plain: bool = False
) -> None:
    """Two steps from nothing, ours or the plain loop's."""
    model = GPT(plan.config, dtype)
    model.init_weights(1)
    if is_checkpointed:
        checkpoint_layers(model)
    optimizer = model.setup_optimizer(batch_tokens=plan.batch_tokens, weight_decay=0.1)
    shape = plan.device_batch, plan.sequence_len
    ids, targets = torch.randint(0, plan.vocab_size, (2, *shape))
    rival = plain_loop.PlainOptimizer(optimizer.param_groups, dtype) if is_plain else None
    for _ in range(2):
        if rival is not None:
            plain_loop.forward_backward(model, ids, targets)
            rival.step()
            continue
        weights = torch.full((), 1 / targets.numel()).expand(shape)
        model.weighted_nll(model.hidden(ids), targets, weights).backward()
        optimizer.step()
        optimizer.zero_grad()


SIZES = {  # depth, width a layer, key/value heads, T, V, rows: layers, Muon or the tables dominate
    "layers": (4, 64, None, 256, 4096, 8),
    "matrices": (6, 64, 2, 128, 512, 2),
    "tables": (2, 64, None, 256, 16384, 4),
}


def plan_of(name: str) -> scaling.Plan:
    depth, aspect, kv_heads, length, vocab, rows = SIZES[name]
    return scaling.plan(
        depth, aspect=aspect, head_dim=64, num_kv_heads=kv_heads, sequence_len=length, vocab_size=vocab,
        window_pattern="L", num_steps=10, device_batch=rows, batch_tokens=rows * length,
    )  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", SIZES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_the_whole_peak_within_15_percent(name, dtype) -> None:
    """Weights, casts, moments, gradients, activations, loss and Muon's scratch of real steps."""
    plan = plan_of(name)
    memory = scaling.memory_bytes(
        plan, torch.finfo(dtype).bits // 8, on_cpu=True, keeps_scores=keeps_scores(dtype)
    )
    assert scaling.peak_bytes(memory) == pytest.approx(peak(lambda: train(plan, dtype)), rel=0.15)


@pytest.mark.slow
def test_the_peak_with_checkpointed_layers_within_15_percent() -> None:
    plan = plan_of("layers")
    memory = scaling.memory_bytes(
        plan, 4, on_cpu=True, is_checkpointed=True, keeps_scores=keeps_scores(torch.float32)
    )
    measured = peak(lambda: train(plan, torch.float32, is_checkpointed=True))
    assert scaling.peak_bytes(memory) == pytest.approx(measured, rel=0.15)
    assert measured < 0.8 * peak(lambda: train(plan, torch.float32))


@pytest.mark.slow
def test_a_step_takes_at_most_half_of_the_plain_loop() -> None:
    """Measured, with logits large beside the weights, as at depth 12 with 32 rows of 2,048."""
    plan = scaling.plan(
        2, aspect=32, head_dim=64, sequence_len=512, vocab_size=8192, window_pattern="L", num_steps=10,
        device_batch=8, batch_tokens=4096,
    )  # fmt: skip
    ours, plain = (peak(lambda f=flag: train(plan, torch.bfloat16, is_plain=f)) for flag in (False, True))
    assert ours < plain / 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(("depth", "kv_heads", "on_cpu"), [(4, None, False), (6, 2, False), (4, None, True)])
def test_activations_within_15_percent(depth, kv_heads, on_cpu, dtype, monkeypatch) -> None:
    """Without the compiled kernels a CPU keeps what a GPU does: the fused attention's inputs and outputs."""
    if on_cpu and native.library() is None:
        pytest.skip("no C compiler here")
    monkeypatch.setattr(native, "_override", None if on_cpu else False)
    plan = scaling.plan(
        depth, head_dim=64, num_kv_heads=kv_heads, sequence_len=256, vocab_size=512, window_pattern="L",
        num_steps=10, device_batch=4, batch_tokens=1024,
    )  # fmt: skip
    measured, weights = saved_bytes(plan, dtype)
    size = torch.finfo(dtype).bits // 8
    memory = scaling.memory_bytes(plan, size, on_cpu=on_cpu, keeps_scores=keeps_scores(dtype))
    assert memory["weights"] == weights
    assert memory["activations"] == pytest.approx(measured, rel=0.15)


def test_the_peak_is_of_one_moment_and_falls_with_ranks_and_checkpointing() -> None:
    plan = scaling.plan(12)
    memory = scaling.memory_bytes(plan)
    assert sum(memory.values()) > scaling.peak_bytes(memory) > memory["activations"]
    assert (
        scaling.peak_bytes(scaling.memory_bytes(plan, is_checkpointed=True)) < scaling.peak_bytes(memory) / 2
    )
    eight = scaling.memory_bytes(replace(plan, world_size=8))
    assert eight["optimizer"] == memory["optimizer"] / 8 and eight["communication"] > 0


def test_a_d12_step_takes_at_most_half_of_the_plain_logits() -> None:
    """B = 32, T = 2,048: a plain step holds three fp32 arrays of N x V besides; computed."""
    memory = scaling.memory_bytes(scaling.plan(12))
    plain_logits = 3 * 4.0 * 32 * 2048 * 32768
    plain = scaling.peak_bytes(memory | {"loss": memory["loss"] + plain_logits})
    assert scaling.peak_bytes(memory) < plain / 2


def test_the_device_batch_that_fits() -> None:
    plan = scaling.plan(12)
    rows = [scaling.largest_device_batch(plan, gigabytes * 1e9) for gigabytes in (1, 24, 80, 141)]
    assert rows[0] == 0 and rows == sorted(rows) and 8 <= rows[2] <= 64
    fits = replace(plan, device_batch=rows[2])
    assert scaling.peak_bytes(scaling.memory_bytes(fits)) < 80e9
    assert scaling.largest_device_batch(plan, 80e9, is_checkpointed=True) >= rows[2]
