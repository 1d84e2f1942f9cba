"""The cases that every attention kernel must pass, on any device; test_attention.py and tests/gpu run them.

Each compares a backend, through the public interface, with `plain`: a softmax over an explicit mask in fp64.
"""

from __future__ import annotations

import torch

import nanochat.flash_attention as fa
from nanochat.flash_attention import flash_attn

WINDOWS = (None, 0, 1, 31, 128, 1000)
HEADS = ((4, 4), (4, 2), (4, 1))  # MHA, GQA, MQA
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}


def visible(num_queries, num_keys, left=None, right=0, doc_start=None):
    """The mask by its definition, (1 or B, 1, T, S): queries stand at the last positions."""
    position = torch.arange(num_queries)[:, None] + num_keys - num_queries
    key = torch.arange(num_keys)[None]
    mask = torch.ones(num_queries, num_keys, dtype=torch.bool)
    if left is not None:
        mask &= key >= position - left
    if right is not None:
        mask &= key <= position + right
    mask = mask[None, None]
    return mask if doc_start is None else mask & (key >= doc_start[:, None, :, None])


def plain(q, k, v, mask):
    groups = q.shape[2] // k.shape[2]
    q, k, v = (x.transpose(1, 2) for x in (q, k.repeat_interleave(groups, 2), v.repeat_interleave(groups, 2)))
    scores = (q @ k.mT / q.shape[-1] ** 0.5).masked_fill(~mask, -torch.inf)
    return (scores.softmax(-1) @ v).transpose(1, 2)


def inputs(rows, time, heads, kv_heads, size, dtype=torch.float64, device="cpu", seed=0):
    """q, k, v and dy, random, the same numbers on every device."""
    source = torch.Generator().manual_seed(seed)
    return [
        torch.randn(rows, time, n, size, generator=source, dtype=torch.float64).to(device, dtype)
        for n in (heads, kv_heads, kv_heads, heads)
    ]


def assert_close(ours, oracle, dtype, what):
    worst = float((ours.detach().double().cpu() - oracle).abs().max() / oracle.abs().max().clamp(min=1))
    assert worst <= TOLERANCE[dtype], f"{what}: off by {worst:.1e}, allowed {TOLERANCE[dtype]:.0e}"


def check_training(backend, device, dtype, heads, left, *, time=141, size=16, doc_start=None, rows=2):
    """Outputs and all gradients of flash_attn_func."""
    *qkv, dy = inputs(rows, time, *heads, size, dtype, device)
    ours = [x.requires_grad_() for x in qkv]
    exact = [x.detach().double().cpu().requires_grad_() for x in qkv]
    fa._override_impl = backend
    window = (-1 if left is None else left, 0)
    docs = None if doc_start is None else doc_start.to(device)
    y = flash_attn.flash_attn_func(*ours, causal=True, window_size=window, doc_start=docs)
    assert y.shape == dy.shape and y.dtype == dtype
    oracle = plain(*exact, visible(time, time, left, 0, doc_start))
    grads = torch.autograd.grad(y, ours, dy)
    oracle_grads = torch.autograd.grad(oracle, exact, dy.double().cpu())
    for name, a, b in zip(("y", "dq", "dk", "dv"), (y, *grads), (oracle.detach(), *oracle_grads)):
        assert_close(a, b, dtype, f"{name} of {backend} {dtype} {heads} left={left} T={time}")


def check_cache(backend, device, dtype, heads, left, steps, *, is_paged=False, size=16, capacity=48):
    """Feed a cache; `steps` lists, per call, how many positions each row has before it and how many come.

    A row may go back (its later keys are then overwritten). Every output equals the full forward's.
    """
    rows = len(steps[0][0])
    q, k, v, _ = inputs(rows, capacity, *heads, size, dtype, device)
    oracle = plain(*(x.double().cpu() for x in (q, k, v)), visible(capacity, capacity, left))
    shape, table = (rows, capacity), None
    if is_paged:
        page = 8
        table = torch.randperm(rows * capacity // page + 3, generator=torch.Generator().manual_seed(1))
        shape = (len(table), page)
        table = table[: rows * capacity // page].view(rows, -1).to(device, torch.int32)
    k_cache, v_cache = (torch.zeros(*shape, heads[1], size, dtype=dtype, device=device) for _ in range(2))
    fa._override_impl = backend
    window = (-1 if left is None else left, 0)
    for starts, num_new in steps:
        index = torch.tensor(starts)[:, None] + torch.arange(num_new)
        pick = torch.arange(rows)[:, None], index
        y = flash_attn.flash_attn_with_kvcache(
            *(q[pick], k_cache, v_cache, k[pick], v[pick]),
            cache_seqlens=torch.tensor(starts, dtype=torch.int32, device=device),
            causal=True,
            window_size=window,
            page_table=table,
        )
        what = f"{backend} {dtype} {heads} left={left} starts={starts} new={num_new} paged={is_paged}"
        assert_close(y, oracle[pick], dtype, what)


PREFILL = [((0, 0, 0), 40)]
CHUNKED_PREFILL = [((0, 0, 0), 7), ((7, 7, 7), 20), ((27, 27, 27), 1), ((28, 28, 28), 15)]
SINGLE_TOKENS = [((0, 0, 0), 5)] + [((n, n, n), 1) for n in range(5, 12)]
RAGGED = [((0, 0, 0), 9), ((9, 3, 6), 1), ((10, 4, 7), 3), ((13, 0, 9), 6), ((19, 6, 15), 29)]  # fills row 0
CACHE_STORIES = {
    "prefill": PREFILL,
    "chunked": CHUNKED_PREFILL,
    "single": SINGLE_TOKENS,
    "ragged": RAGGED,
}
