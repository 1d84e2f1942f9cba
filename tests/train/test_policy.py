"""Policy gradients as weights: every weight is the gradient of the objective written out, by autograd."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nanochat.gpt import GPT, GPTConfig
from nanochat.train.policy import advantages, kl_estimate, log_probs, token_weights


def test_advantages_by_hand() -> None:
    assert advantages([1.0, 0.0, 0.0, 0.0]) == [0.75, -0.25, -0.25, -0.25]
    assert advantages([1.0, 0.0], by_std=True) == [1.0, -1.0]
    assert advantages([1.0, 1.0, 1.0]) is None and advantages([0.0, 0.0]) is None


@given(st.lists(st.floats(-5, 5), min_size=2, max_size=9))
def test_advantages_sum_to_zero(rewards: list[float]) -> None:
    for by_std in (False, True):
        found = advantages(rewards, by_std)
        if found is not None:
            assert sum(found) == pytest.approx(0, abs=1e-4)
            if by_std:
                assert sum(x * x for x in found) / len(found) == pytest.approx(1, rel=1e-4)


@pytest.mark.parametrize(("clip", "kl"), [(0.0, 0.0), (0.2, 0.0), (0.0, 0.5), (0.2, 0.5)])
def test_weights_are_the_gradient_of_the_objective(clip: float, kl: float) -> None:
    """sum(weights * nll) must have minus the gradient that autograd finds for the objective itself."""
    rng = torch.Generator().manual_seed(1)
    draw = lambda: torch.randn(5, 40, generator=rng)  # noqa: E731
    advantage, old, reference = draw(), draw() - 3, draw() - 3
    new = (old + 0.3 * draw()).requires_grad_()
    ratio = (new - old).exp()
    objective = advantage * ratio
    if clip:
        objective = torch.minimum(objective, advantage * ratio.clamp(1 - clip, 1 + clip))
    objective = objective - kl / 2 * (new - reference) ** 2
    (wanted,) = torch.autograd.grad(objective.sum(), new)
    weights, is_clipped = token_weights(advantage, new.detach(), old, reference, clip, kl)
    torch.testing.assert_close(weights, wanted)
    assert bool(is_clipped.any()) == (clip > 0)
    assert clip == 0 or not bool(is_clipped.all())


def test_first_update_of_a_round_is_reinforce() -> None:
    old = torch.full((2, 3), -1.5)
    advantage = torch.tensor([[0.5], [-0.5]]).expand(2, 3)
    weights, is_clipped = token_weights(advantage, old, old, old, clip=0.1, kl=3.0)
    assert torch.equal(weights, advantage) and not is_clipped.any()


def test_the_kl_penalty_moves_along_the_gradient_of_the_kl() -> None:
    """Over all tokens: sum_x p(x) log(p/q)(x) dlog p(x) is the gradient of KL(p || q), by autograd."""
    logits = torch.randn(7, generator=torch.Generator().manual_seed(2), dtype=torch.float64).requires_grad_()
    q = torch.randn(7, generator=torch.Generator().manual_seed(3), dtype=torch.float64).log_softmax(0)
    log_p = logits.log_softmax(0)
    (wanted,) = torch.autograd.grad((log_p.exp() * (log_p - q)).sum(), logits, retain_graph=True)
    new = log_p.detach()
    weights, _ = token_weights(torch.zeros(7), new, new, q, kl=1.0)  # on nll = -log p
    (found,) = torch.autograd.grad((new.exp() * weights * -log_p).sum(), logits)
    torch.testing.assert_close(found, wanted)
    assert float((new.exp() * kl_estimate(new, q)).sum()) == pytest.approx(
        float((new.exp() * (new - q)).sum())
    )
    assert bool((kl_estimate(new, q) >= 0).all())


def test_log_probs_are_those_of_the_whole_logits() -> None:
    model = GPT(GPTConfig(16, 50, n_layer=2, n_head=2, n_kv_head=1, n_embd=32, window_pattern="L"))
    model.init_weights(4)
    ids = torch.randint(50, (3, 12), generator=torch.Generator().manual_seed(5))
    targets = ids[:, 1:].clone()
    targets[0, :4] = -1
    found = log_probs(model, ids[:, :-1], targets)
    whole = model(ids[:, :-1]).detach().double().log_softmax(-1)
    wanted = whole.gather(2, targets.clamp(min=0).unsqueeze(2)).squeeze(2) * (targets >= 0)
    torch.testing.assert_close(found.double(), wanted, rtol=0, atol=1e-5)
    assert found[0, :4].tolist() == [0] * 4 and not math.isclose(float(found[0, 5]), 0)
