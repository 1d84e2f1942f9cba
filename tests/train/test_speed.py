"""--speed: compiled and checkpointed layers equal the plain ones; no graph breaks, few graphs; the
fallback."""

from __future__ import annotations

import pytest
import torch

from nanochat.errors import UserError
from nanochat.gpt import GPT, GPTConfig
from nanochat.kernels import build as native
from nanochat.runtime import Runtime
from nanochat.train import speed

CONFIG = GPTConfig(
    sequence_len=64, vocab_size=128, n_layer=4, n_head=2, n_kv_head=1, n_embd=32, window_pattern="SL"
)
RT = Runtime(torch.device("cpu"), torch.float32)


def make() -> GPT:
    model = GPT(CONFIG)
    model.init_weights(1)
    with torch.no_grad():
        for block in model.blocks:
            block.attn.c_proj.weight.normal_(0, 0.1, generator=torch.Generator().manual_seed(2))
            block.mlp.c_proj.weight.normal_(0, 0.1, generator=torch.Generator().manual_seed(3))
    return model


def gradients(model: GPT) -> tuple[float, dict[str, torch.Tensor]]:
    ids = torch.randint(0, 128, (2, 49), generator=torch.Generator().manual_seed(0))
    loss = model(ids[:, :-1], ids[:, 1:])
    loss.backward()
    return loss.item(), {name: p.grad for name, p in model.named_parameters()}


def same(ours: GPT, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "_override", False)
    (loss, grads), (want_loss, want_grads) = gradients(ours), gradients(make())
    assert loss == pytest.approx(want_loss, rel=1e-5)
    for name, want in want_grads.items():
        torch.testing.assert_close(grads[name], want, rtol=2e-3, atol=1e-6, msg=name)


def test_checkpointing_changes_no_gradient_and_keeps_less(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make()
    speed.apply(model, "checkpoint", RT)
    same(model, monkeypatch)
    kept = {}
    for is_on in (False, True):
        model, sizes = make(), []
        if is_on:
            speed.checkpoint_layers(model)
        with torch.autograd.graph.saved_tensors_hooks(
            lambda x, s=sizes: (s.append(x.numel()), x)[1], lambda x: x
        ):
            model(torch.zeros(2, 48, dtype=torch.long), torch.zeros(2, 48, dtype=torch.long))
        kept[is_on] = sum(sizes)
    assert kept[True] < kept[False] / 2


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_compiled_layers_equal_plain_ones_in_few_graphs(monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    model = make()
    speed.apply(model, "compile", RT, backend="aot_eager")
    assert "layers are compiled at their first use" in capsys.readouterr().out
    same(model, monkeypatch)
    counters = torch._dynamo.utils.counters
    assert not counters["graph_break"], dict(counters["graph_break"])
    assert counters["stats"]["unique_graphs"] <= 4
    assert {name for name, _ in model.named_parameters()} == {name for name, _ in make().named_parameters()}


def test_what_cannot_be_had_is_said(monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    with pytest.raises(UserError, match="found quick"):
        speed.apply(make(), "compile,quick", RT)
    with pytest.raises(UserError, match="cpu has no fp8"):
        speed.apply(make(), "fp8", RT)
    monkeypatch.setattr(speed.shutil, "which", lambda name: None)
    model = make()
    speed.apply(model, "compile", RT)
    assert (
        not speed.is_compiled(model)
        and "not compiled, because there is no C++ compiler" in capsys.readouterr().out
    )
