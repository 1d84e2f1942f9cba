"""What a later stage takes over from the base run."""

from __future__ import annotations

from typing import Any

import pytest

from nanochat.gpt import GPT, GPTConfig
from nanochat.train.tune import next_optimizer

SHAPE = GPTConfig(n_layer=2, n_embd=32, n_head=2, n_kv_head=2, sequence_len=16, vocab_size=64)


def groups_of(base: dict[str, Any], **more: float) -> dict[str, dict[str, Any]]:
    optimizer = next_optimizer(GPT(SHAPE), {"batch_tokens": 2048, "lr_scale": 7.0} | base, 0.5, **more)
    return {name: group for group in optimizer.param_groups for name in group["param_names"]}


def test_the_recipe_of_the_base_run_is_inherited() -> None:
    given = groups_of({"smear_lr": 0.01, "lm_head_eps": 1e-5}, smear_scale=0.5)
    assert (given["lm_head.weight"]["eps"], given["smear_lambda"]["lr"]) == (1e-5, pytest.approx(0.005))
    plain = groups_of({})
    assert (plain["lm_head.weight"]["eps"], plain["smear_lambda"]["lr"]) == (1e-10, 0.2)
    assert plain["transformer.wte.weight"]["eps"] == given["transformer.wte.weight"]["eps"] == 1e-10
    whole = GPT(SHAPE).setup_optimizer(batch_tokens=2048, weight_decay=0.0, lr_scale=3.5)
    rates = {name: group["lr"] for group in whole.param_groups for name in group["param_names"]}
    assert plain["lm_head.weight"]["lr"] == pytest.approx(rates["lm_head.weight"])
    assert all(group["weight_decay"] == 0 for group in plain.values() if group["kind"] == "muon")
