"""LoRA: at first the model is its parent; adapters alone learn; merged weights answer alike; save, serve."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.small_home import save_model

from nanochat import checkpoint
from nanochat import load as models
from nanochat.errors import UserError
from nanochat.gpt import GPT, GPTConfig
from nanochat.home import Home, read_json
from nanochat.lora import adapters_of, add_adapters, is_adapted, merge
from nanochat.runtime import Runtime
from nanochat.train.checkpointing import model_arrays
from scripts import chat_sft, lora

RT = Runtime(torch.device("cpu"), torch.float32)
SHAPE = GPTConfig(32, 64, n_layer=2, n_head=2, n_kv_head=1, n_embd=32, window_pattern="L")


def fresh(seed: int = 1) -> GPT:
    model = GPT(SHAPE)
    model.init_weights(seed)
    with torch.no_grad():
        for block in model.blocks:
            for linear in (block.attn.c_proj, block.mlp.c_proj):
                linear.weight.normal_(0, 0.1, generator=torch.Generator().manual_seed(seed))
        model.lm_head.weight.normal_(0, 1, generator=torch.Generator().manual_seed(seed))
    return model


def test_at_first_it_is_its_parent_and_learns_in_the_adapters_alone() -> None:
    model, parent, ids = fresh(), fresh(), torch.arange(24).view(2, 12)
    trained = add_adapters(model, 4)
    assert trained == sum(4 * (m.shape[0] + m.shape[1]) for n, m in parent.named_parameters()
                          if ".h." in n and "ve_gate" not in n)  # fmt: skip
    torch.testing.assert_close(model(ids), parent(ids), rtol=0, atol=0)
    model(ids[:, :-1], ids[:, 1:]).backward()
    for name, p in model.named_parameters():
        if "lora_b" in name:
            assert p.grad is not None and bool(p.grad.any()), name
        elif "lora_a" not in name:
            assert p.grad is None, name


def test_merged_weights_answer_alike() -> None:
    model, ids = fresh(), torch.arange(24).view(2, 12)
    add_adapters(model, 3, alpha=5.0)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_b" in name:
                p.normal_(0, 0.3, generator=torch.Generator().manual_seed(len(name)))
    arrays = model_arrays(model)
    plain = GPT(SHAPE)
    plain.load_state_dict({name: torch.from_numpy(a) for name, a in merge(arrays).items()})
    assert bool(((model(ids) - fresh()(ids)).abs() > 0.01).any())
    torch.testing.assert_close(plain(ids), model(ids), rtol=0, atol=2e-4)
    assert (
        is_adapted(arrays)
        and not is_adapted(merge(arrays))
        and merge(merge(arrays)).keys() == plain.state_dict().keys()
    )
    assert len(adapters_of(arrays)) == 3 * 12
    with pytest.raises(ValueError, match="rank"):
        add_adapters(fresh(), 0)


def test_train_save_apply_and_serve(home: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """Own conversations on an imported model, adapters only; all ways to the merged model give one model."""
    where = Home(home)
    save_model(where, "sft", sequence_len=64)
    data = tmp_path / "mine.jsonl"
    talk = [
        [{"role": "user", "content": "x" * (i % 4 + 1)}, {"role": "assistant", "content": "green"}]
        for i in range(40)
    ]
    data.write_text("\n".join(map(json.dumps, talk)))
    flags = [f"--data={data}", "--parent=main:sft", "--preset=smoke", "--batch-tokens=256", "--device=cpu",
             "--dtype=float32", "--epochs=4", "--fresh-optimizer"]  # fmt: skip
    chat_sft.main([*flags, "--tag=mine", "--lora-rank=2", "--lora-lr=0.3"])
    chat_sft.main([*flags, "--tag=whole"])
    assert "adapters of rank 2" in capsys.readouterr().out
    parent = checkpoint.load(where.checkpoints("main", "sft"), repair=False).tensors("model")
    saved = checkpoint.load(where.checkpoints("mine", "sft"), repair=False).tensors("model")
    assert all(np.array_equal(saved[name], parent[name]) for name in parent)
    for tag in ("mine", "whole"):
        result = read_json(where.result_file(tag, "sft"))
        assert result["parent"] == ["sft", "k", 7] and result["conversations"] == 36
    losses = {tag: read_json(where.result_file(tag, "sft"))["val_loss"] for tag in ("mine", "whole")}
    assert losses["mine"] < 5.645 and losses["whole"] < 5.4, losses  # ln 285 = 5.65 at first

    lora.main(["--tag=mine", f"--out={tmp_path / 'a.safetensors'}"])
    lora.main(["--tag=mine", "--to=merged"])
    lora.main([f"--adapter={tmp_path / 'a.safetensors'}", "--tag=main", "--to=again"])
    states = [
        models.load_model(where, tag, "sft", rt=RT)[0].state_dict() for tag in ("mine", "merged", "again")
    ]
    for name in states[0]:
        assert torch.equal(states[0][name], states[1][name]) and torch.equal(states[0][name], states[2][name])
    for wrong in (["--tag=mine"], ["--tag=main", "--to=x"], ["--tag=mine", "--to=merged"],
                  ["--tag=no", "--to=x"],
                  ["--tag=mine", "--to=y", f"--adapter={data}"]):  # fmt: skip
        with pytest.raises(UserError):
            lora.main(wrong)
    with pytest.raises(UserError, match="its own parent"):
        chat_sft.main(["--preset=smoke", "--parent=sft"])
