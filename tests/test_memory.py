"""The memory that scripts.plan predicts, against what a step keeps."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from nanochat import native, scaling
from nanochat.gpt import GPT, GPTConfig


def saved_bytes(plan: scaling.Plan, dtype: torch.dtype) -> tuple[int, int]:
    """(bytes that forward keeps for backward without parameters and casts, bytes of weights)."""
    model = GPT(GPTConfig(**plan.config()), dtype)
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
    memory = scaling.memory_bytes(plan, size, on_cpu=on_cpu)
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
