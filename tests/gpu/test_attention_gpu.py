"""Every attention kernel on the GPU that is here, against plain attention in fp64; or why it is not."""

from __future__ import annotations

import pytest
import torch
from helpers.attention_cases import CACHE_STORIES, HEADS, WINDOWS, check_cache, check_training, inputs

import nanochat.flash_attention as fa
from nanochat.flash_attention import flash_attn, sdpa, select

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
DTYPES = [torch.float32, torch.bfloat16]


@pytest.fixture(autouse=True)
def _no_override(monkeypatch):
    monkeypatch.setattr(fa, "_override_impl", None)
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", False)


def gpu_for(backend, dtype):
    device = torch.device("cuda", 0)
    if (reason := select.verdict(backend, device, dtype)) is not None:
        pytest.skip(f"{backend} in {dtype}: {reason}")
    return device


@pytest.mark.parametrize("heads", HEADS, ids=["mha", "gqa", "mqa"])
@pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "bf16"])
@pytest.mark.parametrize("backend", select.BACKENDS)
def test_training_matrix(backend, dtype, heads):
    device = gpu_for(backend, dtype)
    for left in WINDOWS:
        for time, size in ((1, 64), (141, 64), (300, 128)):
            check_training(backend, device, dtype, heads, left, time=time, size=size)
    doc_start = torch.tensor([0] * 20 + [20] * 50, dtype=torch.int32).expand(2, -1).contiguous()
    check_training(backend, device, dtype, heads, None, time=70, size=64, doc_start=doc_start)


@pytest.mark.parametrize("is_paged", [False, True], ids=["flat", "paged"])
@pytest.mark.parametrize("story", CACHE_STORIES)
@pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "bf16"])
@pytest.mark.parametrize("backend", select.BACKENDS)
def test_cache_matrix(backend, dtype, story, is_paged):
    device = gpu_for(backend, dtype)
    for heads in HEADS:
        for left in (None, 0, 31):
            check_cache(backend, device, dtype, heads, left, CACHE_STORIES[story], is_paged=is_paged, size=64)


def test_the_choice_has_a_reason():
    device = torch.device("cuda", 0)
    chosen = select.pick(None, device, torch.bfloat16).__name__.rpartition(".")[2]
    line = fa.explain(device, torch.bfloat16)
    assert line.startswith(f"attention: {chosen} on cuda:0, bfloat16")
    assert all(f"{name}: " in line for name in select.BACKENDS[: select.BACKENDS.index(chosen)])
    assert fa.HAS_FA3 is (select.verdict("fa3", device, torch.bfloat16) is None)


def test_decoding_reads_nothing_back_from_the_gpu():
    q, k, v, _ = inputs(2, 1, 4, 2, 64, torch.bfloat16, "cuda")
    _, k_cache, v_cache, _ = inputs(2, 64, 4, 2, 64, torch.bfloat16, "cuda")
    seqlens = torch.tensor([5, 63], dtype=torch.int32, device="cuda")
    flash_attn.flash_attn_with_kvcache(q, k_cache, v_cache, k, v, seqlens, causal=True)  # probes and warms up
    torch.cuda.set_sync_debug_mode("error")
    try:
        flash_attn.flash_attn_with_kvcache(q, k_cache, v_cache, k, v, seqlens, causal=True)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_window_takes_less_memory_than_full_attention_with_a_mask():
    peaks = {}
    for name in ("window", "masked"):
        q, k, v = (x.requires_grad_() for x in inputs(2, 2048, 6, 6, 64, torch.bfloat16, "cuda")[:3])
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        if name == "window":
            y = sdpa.attend(q, k, v, 512, 0)
        else:
            y = sdpa._call(q, k, v, sdpa._band(2048, 2048, 0, 512, 0, q.device))
        y.sum().backward()
        peaks[name] = torch.cuda.max_memory_allocated() - before
    assert peaks["window"] < peaks["masked"]
