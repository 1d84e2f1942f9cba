"""Rollouts: what is a target, which groups are kept, and that neither ranks nor a stop change the batches."""

from __future__ import annotations

from itertools import islice
from typing import Any

import pytest
import torch
from helpers.rollout_cases import RT, Checksums, V, small_model
from helpers.small_home import TOK

from nanochat import chat_format as chat
from nanochat.engine import Completion, Engine
from nanochat.gpt import GPTConfig
from nanochat.runtime import Runtime
from nanochat.train.checkpointing import join_arrays, split_arrays
from nanochat.train.policy import log_probs
from nanochat.train.rollout import Rollouts, RoundPlan, Row, ask, make_batch, row_of, shuffled_index

PLAN = RoundPlan(questions=2, samples=4, max_tokens=6, device_batch=3, engine_batch=5)


def rollouts(plan: RoundPlan = PLAN, rt: Any = RT, task: Any = None, **more: Any) -> Rollouts:
    return Rollouts(Engine(small_model(), TOK), task or Checksums(), plan, rt, **more)


def test_forced_tokens_are_no_targets_and_the_stop_token_is_one() -> None:
    """Prompt 1 2; sampled 3, forced 4 5, sampled 6, stop 7: targets are 3, 6 and 7 with the advantage."""
    row = row_of([1, 2], Completion([3, 4, 5, 6], [1, 0, 0, 1], "stop", 7), -0.25)
    assert row == Row([1, 2, 3, 4, 5, 6, 7], [0, 0, 1, 0, 0, 1, 1], -0.25)
    cut = row_of([1], Completion([3, 4], [1, 1], "length"), 0.75)
    batch, advantage = make_batch([row, cut], RT.device)
    assert batch.inputs_BT.tolist() == [[1, 2, 3, 4, 5, 6], [1, 3, 0, 0, 0, 0]]
    assert batch.targets_BT.tolist() == [[-1, 3, -1, -1, 6, 7], [3, 4, -1, -1, -1, -1]]
    assert batch.num_targets == 5 and advantage[:, 0].tolist() == [-0.25, 0.75]


def test_the_tool_answers_within_a_rollout() -> None:
    """A model that always calls 1+2: the engine's answer 3 is in the row and no target."""
    special, say = TOK.encode_special, TOK.encode
    call = [special(chat.PYTHON_START), *say("1+2"), special(chat.PYTHON_END)]
    forced = [special(chat.OUTPUT_START), *say("3"), special(chat.OUTPUT_END)]
    script = [*call, *forced, special(chat.ASSISTANT_END)]

    class Always:
        config = GPTConfig(64, V, n_layer=1, n_head=1, n_kv_head=1, n_embd=32, window_pattern="L")
        compute_dtype, given = torch.float32, 0

        def get_device(self) -> torch.device:
            return RT.device

        def forward_hidden(self, ids_BT: torch.Tensor, context: Any) -> torch.Tensor:
            self.given = self.given or int(ids_BT.shape[1])
            at = context.positions.expand(ids_BT.shape) - (self.given - 1)
            return at.unsqueeze(-1).float()

        def logits(self, hidden: torch.Tensor) -> torch.Tensor:
            out = torch.full((*hidden.shape[:-1], V), -1e9)
            for b, at in enumerate(hidden[..., 0].long().tolist()):
                out[b, script[min(max(at, 0), len(script) - 1)]] = 0.0
            return out

    model: Any = Always()
    (group,) = ask(Engine(model, TOK), Checksums(1), [0], RoundPlan(1, 2, 20, 2))
    row = row_of(group.prompt, group.answers[0], 1.0)
    assert row.ids[len(group.prompt) :] == script
    assert row.mask == [0] * len(group.prompt) + [1] * len(call) + [0] * len(forced) + [1]


def test_sampled_from_the_distribution_that_is_scored() -> None:
    """Over all draws the mean log-probability that the scoring pass gives equals minus the entropy there."""
    engine, plan = Engine(small_model(), TOK), RoundPlan(1, 1500, 1, 500, engine_batch=1500)
    (group,) = ask(engine, Checksums(1), [0], plan)
    batch, _ = make_batch([row_of(group.prompt, a, 1.0) for a in group.answers], RT.device)
    scored = log_probs(engine.model, batch.inputs_BT, batch.targets_BT).sum(1).double()
    whole = engine.model(torch.tensor([group.prompt]))[0, -1].detach().double().log_softmax(-1)
    entropy, spread = (
        -(whole.exp() * whole).sum(),
        (whole.exp() * whole**2).sum() - (whole.exp() * whole).sum() ** 2,
    )
    assert abs(float(scored.mean() + entropy)) < 4 * float((spread / 1500) ** 0.5)
    ids = [a.stop_id if a.stop_id is not None else a.ids[0] for a in group.answers]
    counts = torch.bincount(torch.tensor(ids), minlength=V) / 1500
    assert float((counts - whole.exp()).abs().max()) < 0.05


def test_groups_of_equal_rewards_are_dropped_counted_and_replaced() -> None:
    flat = rollouts(task=Checksums(1, same=0))
    batches = list(islice(flat, 3))
    assert [b.num_targets for b in batches] == [0, 0, 0] and flat.results["same_frac"] == 1.0
    seen = [shuffled_index(p, 6, 1) for p in range(4)]
    some = rollouts(task=Checksums(6, same=seen[0]))
    list(islice(some, 3))
    assert some.results["same_frac"] == 0.5 and some.results["groups"] == 1 and some.position == 2
    more = rollouts(RoundPlan(2, 4, 6, 3, refill=3), task=Checksums(6, same=seen[0]))
    list(islice(more, 3))
    assert more.results["groups"] == 2 and more.position == 4 and more.results["questions"] == 4


def test_questions_are_all_asked_once_a_pass() -> None:
    passes = [[shuffled_index(p, 5, 1) for p in range(e * 5, e * 5 + 5)] for e in range(3)]
    assert all(sorted(order) == list(range(5)) for order in passes) and passes[0] != passes[1]


def flat_rows(batches: list[Any]) -> list[Any]:
    """Every row of the batches as (inputs, targets, rounded weights) without padding, sorted."""
    rows = []
    for batch in batches:
        for ids, targets, weights in zip(batch.inputs_BT, batch.targets_BT, batch.weights_BT, strict=True):
            keep = (targets != -1).nonzero().flatten().tolist()
            if keep:
                end = keep[-1] + 1
                values = [round(w, 4) for w in (weights * (targets != -1))[:end].tolist()]
                rows.append((ids[:end].tolist(), targets[:end].tolist(), values))
    return sorted(rows)


def test_two_ranks_make_the_rows_of_one() -> None:
    alone = list(islice(rollouts(), PLAN.accum(1)))
    engine, task = Engine(small_model(), TOK), Checksums()
    parts = [ask(engine, task, range(2)[rank::2], PLAN) for rank in range(2)]
    together: list[Any] = []
    for rank in range(2):
        rt = Runtime(RT.device, RT.dtype, rank, 2)
        object.__setattr__(rt, "gather", lambda value: parts)  # what both ranks bring
        batches = list(islice(rollouts(rt=rt), PLAN.accum(2)))
        assert len(batches) == 2 == PLAN.accum(2)
        together += batches
    assert flat_rows(together) == flat_rows(alone) and len(flat_rows(alone)) == 8
    assert sum(b.num_targets for b in together) == sum(b.num_targets for b in alone)


def test_a_cursor_inside_a_round_goes_on_with_its_answers() -> None:
    """Two updates a round; between them the weights change. Saved after the first, the second is the same."""
    plan = RoundPlan(2, 4, 6, 3, updates=2, clip=0.1, kl=0.1)
    reference = small_model(8)

    def moved(source: Rollouts) -> None:
        with torch.no_grad():
            for p in source.engine.model.parameters():
                p.mul_(1.02)

    straight = rollouts(plan, reference=reference)
    rows = iter(straight)
    first = list(islice(rows, 3))
    assert first[-1].cursor["update"] == 1 and straight.results["clip_frac"] == 0.0
    arrays: dict[str, Any] = {}
    saved = split_arrays(first[-1].cursor, arrays)
    moved(straight)
    second = list(islice(rows, 3))
    assert straight.results["clip_frac"] > 0 and straight.results["kl"] > 0
    again = rollouts(plan, reference=reference, cursor=join_arrays(saved, arrays))
    moved(again)
    resumed = list(islice(again, 3))
    assert flat_rows(resumed) == flat_rows(second) != flat_rows(first)
    assert again.position == straight.position and second[-1].cursor["update"] == 0
    assert len(second[-1].cursor["rows"]["ids"]) == 0


@pytest.mark.parametrize("wrong", [{"samples": 1}, {"questions": 0}, {"clip": -0.1}, {"updates": 0}])
def test_a_round_that_cannot_be(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="a round needs"):
        RoundPlan(**({"questions": 1, "samples": 2, "max_tokens": 1, "device_batch": 1} | wrong))
