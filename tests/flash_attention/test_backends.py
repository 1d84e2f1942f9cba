"""The GPU backends' logic that needs no GPU: flex's block masks, fa3's pin, the reasons for refusing; kernels
stand-ins."""

from __future__ import annotations

import json
import sys
from types import SimpleNamespace

import pytest
import torch
from helpers.attention_cases import inputs, plain, visible

from nanochat.errors import UserError
from nanochat.flash_attention import fa3, fa4, flex, sdpa, select

CPU = torch.device("cpu")


@pytest.mark.parametrize("left", [None, 0, 5, 40, 200])
@pytest.mark.parametrize("has_documents", [True, False])
def test_flex_sees_what_the_mask_says(left, has_documents):
    """The rule, evaluated at every (query, key), and the blocks that are skipped hold no visible key."""
    T, S = 150, 300
    docs = (torch.arange(T) // 50 * 50 + S - T).expand(2, -1).contiguous() if has_documents else None
    rule = flex.visible(S - T, left, 0, docs)
    t, s = torch.arange(T)[:, None], torch.arange(S)[None]
    for row in range(2):
        ours = rule(torch.tensor(row), torch.tensor(0), t, s)
        oracle = visible(T, S, left, 0, docs)
        assert torch.equal(ours, oracle[row if has_documents else 0, 0])
    block_mask = flex._block_mask(T, S, left, 0, CPU, docs)
    assert block_mask.shape[-2:] == (T, S)
    dense = block_mask.to_dense()[0, 0].bool()  # which blocks are computed
    for i in range(dense.shape[0]):
        for j in range(dense.shape[1]):
            block = visible(T, S, left, 0, docs)[0, 0, 128 * i : 128 * i + 128, 128 * j : 128 * j + 128]
            assert bool(dense[i, j]) == bool(block.any())


def test_flex_skips_most_blocks_of_a_window():
    mask = flex.band(2048, 2048, 512, 0, CPU)
    assert mask.to_dense().float().mean() < 0.35
    assert flex.band(2048, 2048, 512, 0, CPU) is mask


def test_flex_makes_one_mask_a_batch_of_documents(monkeypatch):
    made = []
    monkeypatch.setattr(flex, "_block_mask", lambda *a: made.append(a) or len(made))
    monkeypatch.setattr(flex, "_documents", {})
    docs = torch.zeros(2, 10, dtype=torch.int32)
    assert [flex.documents(docs, 10, None, 0) for _ in range(3)] == [1, 1, 1]
    docs[:, 5:] = 5
    assert flex.documents(docs, 10, None, 0) == 2, "changed in place: another mask"
    for _ in range(20):
        flex.documents(torch.zeros(2, 10, dtype=torch.int32), 10, 3, 0)
    assert len(flex._documents) <= flex.MASKS


def test_flex_attends_with_a_stand_in_for_the_compiled_kernel(monkeypatch):
    """Layouts, GQA and alignment, through torch's uncompiled FlexAttention; gradients on a CPU it does not
    have."""
    from torch.nn.attention.flex_attention import flex_attention

    monkeypatch.setattr(flex, "compiled", lambda: flex_attention)
    q, k, v, _ = inputs(2, 70, 4, 2, 16, torch.float32)
    docs = torch.tensor([[0] * 20 + [20] * 50, [0] * 70], dtype=torch.int32)
    import warnings

    for left, doc_start in ((9, None), (None, docs), (9, docs)):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            y = flex.attend(q, k, v, left, 0, doc_start)
        oracle = plain(*(x.double() for x in (q, k, v)), visible(70, 70, left, 0, doc_start))
        torch.testing.assert_close(y.double(), oracle, rtol=1e-4, atol=1e-5)
    assert torch.equal(flex.attend(q, k, v, None, 0), sdpa.attend(q, k, v, None, 0))


def test_fa4_says_what_is_missing(monkeypatch):
    assert "not installed" in fa4.unsupported_reason(CPU, torch.bfloat16)
    assert "bf16" in fa4.unsupported_reason(CPU, torch.float32)
    monkeypatch.setattr(fa4.metadata, "version", lambda name: "4.0.0b1")
    assert "4.0.0b1" in fa4.unsupported_reason(CPU, torch.bfloat16) and fa4.VERSION in fa4.unsupported_reason(
        CPU, torch.bfloat16
    )
    monkeypatch.setattr(fa4.metadata, "version", lambda name: fa4.VERSION)
    assert fa4.unsupported_reason(CPU, torch.bfloat16) is None


def test_fa4_arguments(monkeypatch):
    calls = []
    monkeypatch.setattr(fa4, "kernel", lambda: lambda q, k, v, **how: (calls.append(how), (q, None))[1])
    q = torch.zeros(1, 8, 2, 64)
    for left in (None, 5):
        assert fa4.attend(q, q, q, left, 0) is q
    assert calls == [
        {"causal": True, "window_size": (None, None)}, {"causal": False, "window_size": (5, 0)},
    ]  # fmt: skip
    small = torch.zeros(1, 8, 2, 32)
    assert fa4.attend(small, small, small, None, 0).shape == small.shape and len(calls) == 2


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A stand-in for the kernel hub, with one revision, and no pin."""
    folder = tmp_path / "kernel"
    (folder / "build").mkdir(parents=True)
    (folder / "build" / "attention.so").write_bytes(b"machine code")
    seen = []

    def attention(q, k, v, **how):
        seen.append(how)
        return q, None

    module = SimpleNamespace(
        install_kernel=lambda repository, revision: folder,
        get_kernel=lambda repository, revision: SimpleNamespace(
            flash_attn_func=attention, flash_attn_with_kvcache=attention
        ),
    )
    monkeypatch.setitem(sys.modules, "kernels", module)
    monkeypatch.setattr(fa3, "PIN", tmp_path / "fa3.json")
    fa3.kernel.cache_clear()
    yield SimpleNamespace(folder=folder, seen=seen)
    fa3.kernel.cache_clear()


def test_fa3_runs_only_what_is_pinned(hub):
    reason = fa3.unsupported_reason(CPU, torch.bfloat16)
    assert "no revision is pinned" in reason and fa3.COMMAND in reason
    with pytest.raises(UserError, match="40 hex digits"):
        fa3.record("main")
    fa3.record("a" * 40)
    assert json.loads(fa3.PIN.read_text())["revision"] == "a" * 40
    assert fa3.unsupported_reason(CPU, torch.bfloat16) is None
    q = torch.zeros(1, 8, 2, 64)
    assert fa3.attend(q, q, q, 5, 0) is q and hub.seen[-1] == {"causal": True, "window_size": (5, 0)}
    fa3.kernel.cache_clear()
    (hub.folder / "build" / "attention.so").write_bytes(b"other code")
    assert "the pin says" in fa3.unsupported_reason(CPU, torch.bfloat16)


def test_fa3_digest_knows_names_and_bytes(hub):
    before = fa3.digest(hub.folder)
    (hub.folder / "build" / "attention.so").rename(hub.folder / "build" / "b.so")
    assert fa3.digest(hub.folder) != before


def test_without_a_gpu_the_choice_is_sdpa_with_reasons():
    assert select.verdict("flex", CPU, torch.float32) == "needs a CUDA GPU"
    assert select.name_of(None, CPU, torch.float32).endswith(".sdpa")
