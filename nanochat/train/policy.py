"""Policy gradients as weights on tokens: advantages of a group, clipping, distance from a reference.

The loop minimises sum(weight * nll) / num_targets. With nll = -log p the gradient of "maximise f(log p)" is
had by weight = f'(log p), detached. So REINFORCE, PPO's clip and a KL penalty are all weights, made here from
the log-probabilities of a scoring pass. Letters: B rows, T time.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from nanochat.gpt import GPT

SAME_REWARD = 1e-9  # rewards that differ by less are equal


def advantages(rewards: Sequence[float], by_std: bool = False) -> list[float] | None:
    """r - mean(r) of one question's answers, over their standard deviation if asked; None if all are equal.

    >>> advantages([1.0, 0.0, 0.0, 1.0])
    [0.5, -0.5, -0.5, 0.5]
    """
    if max(rewards) - min(rewards) < SAME_REWARD:
        # Without a difference there is nothing to learn from this question.
        return None
    mean = sum(rewards) / len(rewards)
    centred = [reward - mean for reward in rewards]
    scale = (sum(x * x for x in centred) / len(centred)) ** 0.5 if by_std else 1.0
    return [x / scale for x in centred]


@torch.no_grad()
def log_probs(model: GPT, inputs_BT: torch.Tensor, targets_BT: torch.Tensor) -> torch.Tensor:
    """log p of each target (fp32), 0 where the target is -1. The distribution is that of temperature 1."""
    hidden_BTD = model.hidden(inputs_BT, None)
    nll_N = model.token_nll(hidden_BTD.reshape(-1, hidden_BTD.shape[-1]), targets_BT.reshape(-1))
    return -nll_N.view(targets_BT.shape)


def token_weights(
    advantage_BT: torch.Tensor,
    new_BT: torch.Tensor,
    old_BT: torch.Tensor,
    reference_BT: torch.Tensor | None = None,
    clip: float = 0.0,
    kl: float = 0.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(weights, is_clipped) (B, T) from log p under the present policy, the sampling one and a reference.

    The objective per token is min(A r, A clamp(r, 1 - clip, 1 + clip)) - kl/2 (new - reference)^2 with
    r = exp(new - old) (clip 0: no clamp). Where the clamped branch is the smaller one, its gradient is 0. The
    square has the gradient of KL(policy || reference) when the tokens are the policy's own.
    """
    ratio_BT = (new_BT - old_BT).exp()
    weights_BT = advantage_BT * ratio_BT
    is_clipped_BT = torch.zeros_like(ratio_BT, dtype=torch.bool)
    # PPO: beyond the limit, in the direction that the advantage pushes, the clamped branch has no gradient.
    if clip > 0:
        too_far = (advantage_BT > 0) & (ratio_BT > 1 + clip)
        is_clipped_BT = too_far | ((advantage_BT < 0) & (ratio_BT < 1 - clip))
        weights_BT = weights_BT.masked_fill(is_clipped_BT, 0.0)
    # The derivative of -kl/2 (new - reference)^2 by log p.
    if kl > 0 and reference_BT is not None:
        weights_BT = weights_BT - kl * (new_BT - reference_BT)
    return weights_BT, is_clipped_BT


def kl_estimate(new_BT: torch.Tensor, reference_BT: torch.Tensor) -> torch.Tensor:
    """exp(d) - 1 - d with d = reference - new (B, T): never negative, its mean over own samples is the KL."""
    d_BT = reference_BT - new_BT
    return d_BT.exp() - 1 - d_BT
