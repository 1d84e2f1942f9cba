"""The chunked loss against the plain softmax in fp64; the Triton kernel in Triton's interpreter; its
memory."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from nanochat.gpt import softcap
from nanochat.kernels import build as native
from nanochat.kernels import loss as cross_entropy
from nanochat.kernels.loss import weighted_nll

ROOT = Path(__file__).resolve().parents[2]


def case(dtype=torch.float32, num=83, width=16, vocab=300, padded=320):
    gen = torch.Generator().manual_seed(0)
    h = torch.randn(num, width, generator=gen).to(dtype)
    head = 3 * torch.randn(padded, width, generator=gen)
    y = torch.randint(-1, vocab, (num,), generator=gen)
    return h, head, y, torch.randn(num, generator=gen)


@pytest.mark.parametrize("with_kernel", [True, False])
@pytest.mark.parametrize("chunk", [1, 1000, 1 << 20])
def test_any_chunking_equals_the_plain_softmax(chunk, with_kernel, monkeypatch):
    monkeypatch.setattr(native, "_override", None if with_kernel else False)
    monkeypatch.setattr(cross_entropy, "ON_CPU", (chunk, chunk))
    h, head, y, weights = case()
    leaves = [h.clone().requires_grad_(), head.clone().requires_grad_()]
    exact = [h.double().requires_grad_(), head.double().requires_grad_()]
    loss = weighted_nll(*leaves, y, weights, 300, 15.0)
    nll = torch.nn.functional.cross_entropy(
        softcap((exact[0] @ exact[1].T)[:, :300], 15.0), y, ignore_index=-1, reduction="none"
    )
    oracle = (nll * weights.double()).sum()
    torch.testing.assert_close(loss.double(), oracle, rtol=1e-5, atol=1e-4)
    grads, oracle_grads = torch.autograd.grad(loss, leaves), torch.autograd.grad(oracle, exact)
    for got, want in zip(grads, oracle_grads):
        torch.testing.assert_close(got.double(), want, rtol=1e-4, atol=2e-5)
    assert not grads[1][300:].any(), "padding of the table learns nothing"


@pytest.mark.parametrize("with_kernel", [True, False])
def test_no_tensor_holds_all_logits(with_kernel, monkeypatch):
    monkeypatch.setattr(native, "_override", None if with_kernel else False)
    monkeypatch.setattr(cross_entropy, "ON_CPU", (10 * 300, 10 * 300))
    largest = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            largest.extend(x.numel() for x in tree_leaves(out) if isinstance(x, torch.Tensor))
            return out

    h, head, y, weights = case(num=2000)
    leaves = [h.requires_grad_(), head.requires_grad_()]
    with Watch():
        weighted_nll(*leaves, y, weights, 300, 15.0).backward()
    assert max(largest) <= max(h.numel(), head.numel(), 10 * 300) < 2000 * 300 / 8


def test_no_target_at_all_is_zero_and_has_zero_gradients():
    h, head, y, weights = case()
    leaves = [h.requires_grad_(), head.requires_grad_()]
    loss = weighted_nll(*leaves, torch.full_like(y, -1), weights, 300, 15.0)
    loss.backward()
    assert loss.item() == 0 and not leaves[0].grad.any() and not leaves[1].grad.any()


@pytest.mark.parametrize("with_kernel", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("wrong", [300, 10**9, -2, -(10**9)])
def test_a_target_outside_the_vocabulary_is_refused(wrong, dtype, with_kernel, monkeypatch):
    """It would read and write outside the chunk of logits; padded rows of the table are outside, too."""
    monkeypatch.setattr(native, "_override", None if with_kernel else False)
    h, head, y, weights = case(dtype)
    y[40] = wrong
    with pytest.raises(IndexError, match=f"targets must lie between -1 and 299, found {wrong}"):
        weighted_nll(h.requires_grad_(), head.requires_grad_(), y, weights, 300, 15.0)


def test_targets_of_another_shape_are_refused():
    h, head, y, weights = case()
    for targets, factors in ((y[1:], weights), (y, weights[1:]), (y[:, None], weights)):
        with pytest.raises(ValueError, match=r"must have the shape \(83,\)"):
            weighted_nll(h, head, targets, factors, 300, 15.0)


def test_targets_of_any_integer_type():
    h, head, y, weights = case()
    narrow, wide = (weighted_nll(h, head, targets, weights, 300, 15.0) for targets in (y.int(), y))
    assert torch.equal(narrow, wide)


INTERPRETED = """
import torch
from nanochat.kernels import triton_loss
from nanochat.gpt import softcap
triton_loss.BLOCK = 64
for dtype, allowed in ((torch.float32, 2e-6), (torch.bfloat16, 2e-2)):
    logits = (10 * torch.randn(5, 300, generator=torch.Generator().manual_seed(0))).to(dtype)
    logits[3, :2] = torch.tensor([1e4, -1e4]).to(dtype)
    y = torch.tensor([0, 299, -1, 1, 64])
    exact = logits.double().requires_grad_()
    nll = torch.nn.functional.cross_entropy(softcap(exact, 15.0), y, ignore_index=-1, reduction="none")
    (gradient,) = torch.autograd.grad(nll.sum(), exact)
    ours = torch.full((5, 310), 7.0, dtype=dtype)  # rows with a stride of their own
    ours[:, :300] = logits
    for wants in (False, True):
        got = triton_loss.in_place(ours[:, :300], y, 15.0, wants)
        torch.testing.assert_close(got.double(), nll.detach(), rtol=1e-5, atol=1e-5)
        assert torch.equal(ours[:, :300], logits) != wants
    error = (ours[:, :300].double() - gradient).abs().max().item()
    assert error < allowed, error
    assert (ours[:, 300:] == 7).all() and not ours[2, :300].any()
    # Wrong targets touch nothing outside their row, and show as NaN; the other rows are as before.
    ours[:, :300] = logits
    got = triton_loss.in_place(ours[:, :300], torch.tensor([300, 10**9, -2, 1, -(10**9)]), 15.0, True)
    assert got[[0, 1, 2, 4]].isnan().all() and ours[[0, 1, 2, 4], :300].isnan().all()
    assert got[3].isfinite() and ours[3, :300].isfinite().all() and (ours[:, 300:] == 7).all()
print("same")
"""


@pytest.mark.slow
def test_the_triton_kernel_in_the_interpreter():
    pytest.importorskip("triton", reason="Triton is not installed")
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", INTERPRETED], env=environment, cwd=ROOT, capture_output=True,
        text=True, timeout=250,
    )  # fmt: skip
    assert done.returncode == 0 and done.stdout.strip() == "same", done.stderr[-3000:]
