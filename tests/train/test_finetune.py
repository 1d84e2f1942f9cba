"""What a later stage takes over from the base run."""

from __future__ import annotations

from typing import Any

import pytest
from helpers.number_tasks import Numbers, said

from nanochat.errors import UserError
from nanochat.gpt import GPT, GPTConfig
from nanochat.train.finetune import next_optimizer, split
from tasks.base import Mixture

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


def test_repetitions_of_what_is_held_out_are_not_trained_on() -> None:
    mixed = Mixture([(Numbers(40), 5), Numbers(20, 100)])
    train, held = (said(part) for part in split(mixed))  # type: ignore[arg-type]
    assert len(held) == len(set(held)) == 6 and not set(held) & set(train)
    assert set(held) | set(train) == {*range(40), *range(100, 120)}
    assert len(train) == 220 - sum(5 if number < 40 else 1 for number in held)
    plain = [part.indices for part in split(Numbers(30))]
    assert plain[1] == [9, 19, 29] and sorted(plain[0] + plain[1]) == list(range(30))
    for few in (Numbers(0), Numbers(1), Mixture([(Numbers(1), 4)])):
        with pytest.raises(UserError, match="at least 2 conversations"):
            split(few)
