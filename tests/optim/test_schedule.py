"""The schedules against their formulas, their limits and their edges."""

import math
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nanochat.optim.schedule import (
    constant,
    linear_to_zero,
    lr_factor,
    muon_momentum,
    post_training_momentum,
    weight_decay_factor,
)

ALL = [lr_factor, linear_to_zero, constant, muon_momentum, post_training_momentum, weight_decay_factor]


def test_long_run_follows_the_formulas():
    N = 2520
    num_warmdown = 1638
    for k in range(N):
        fall = 0.05 + 0.95 * (N - k) / num_warmdown
        assert lr_factor(k, N) == pytest.approx(min((k + 1) / 40, 1, fall))
        fall = 0.97 - 0.07 * (k - N + num_warmdown) / num_warmdown
        assert muon_momentum(k, N) == pytest.approx(min(0.85 + 0.12 * k / 400, 0.97, fall))
        assert weight_decay_factor(k, N) == pytest.approx((1 + math.cos(math.pi * k / N)) / 2)
    assert lr_factor(0, N) == 1 / 40 and lr_factor(N, N) == pytest.approx(0.05)
    assert muon_momentum(N, N) == pytest.approx(0.90)
    assert weight_decay_factor(0, N) == 1 and weight_decay_factor(N, N) == pytest.approx(0)


def test_post_training():
    assert [linear_to_zero(k, 10, 0.5) for k in (0, 4, 5, 6, 9, 10)] == pytest.approx([1, 1, 1, 0.8, 0.2, 0])
    assert linear_to_zero(0, 467) == 1 and linear_to_zero(466, 467) == pytest.approx(1 / 467)
    assert linear_to_zero(7, 10, 0) == constant(7, 10) == 1
    assert post_training_momentum(0, 1000) == 0.85
    assert post_training_momentum(150, 1000) == pytest.approx(0.90)
    assert post_training_momentum(300, 1000) == post_training_momentum(999, 1000) == pytest.approx(0.95)


@given(st.integers(1, 5000), st.data())
def test_values_stay_in_range(N, data):
    k = data.draw(st.integers(0, N))
    for schedule in ALL:
        assert 0 <= schedule(k, N) <= 1
    assert lr_factor(k, N, warmup=0, warmdown_frac=0) == 1
    if k < N:
        assert lr_factor(k, N) > 0


@given(st.integers(2, 3000))
def test_no_jumps_after_warmup(N):
    """The largest change from step to step is the slope of one of the straight pieces."""
    slope = max(0.12 / 400, 0.07 / max(1, round(0.65 * N))) + 1e-12
    values = [muon_momentum(k, N) for k in range(N + 1)]
    assert all(abs(a - b) <= slope for a, b in pairwise(values))


@pytest.mark.parametrize("schedule", ALL)
@pytest.mark.parametrize(("k", "N"), [(-1, 10), (11, 10), (0, 0), (0, -5)])
def test_nonsense_steps_are_refused(schedule, k, N):
    with pytest.raises(ValueError, match="0 <= k <= N"):
        schedule(k, N)


def test_nonsense_fractions_are_refused():
    for call in (
        lambda: lr_factor(0, 10, warmdown_frac=1.5),
        lambda: lr_factor(0, 10, final_frac=-0.1),
        lambda: linear_to_zero(0, 10, last_frac=2),
        lambda: muon_momentum(0, 10, peak=1.2),
    ):
        with pytest.raises(ValueError, match=r"\[0, 1\]"):
            call()
    with pytest.raises(ValueError, match="warmup"):
        lr_factor(0, 10, warmup=-1)
