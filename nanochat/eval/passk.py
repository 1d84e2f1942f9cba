"""Several answers to each question: pass@k without bias, and an interval for accuracies of such samples."""

from __future__ import annotations

from collections.abc import Sequence
from math import comb

import numpy as np

RESAMPLES = 2000
SEED = 1337


def pass_at_k(num_samples: int, num_right: int, k: int) -> float:
    """1 - C(n - c, k) / C(n, k): the chance that k of n answers, c of them right, hold a right one.

    Chen et al. 2021 (arXiv 2107.03374). Raises ValueError unless 0 <= c <= n and 1 <= k <= n.

    >>> round(pass_at_k(5, 2, 2), 4)
    0.7
    """
    if not (0 <= num_right <= num_samples and 1 <= k <= num_samples):
        raise ValueError(
            f"pass@k needs 0 <= right <= samples and 1 <= k <= samples, "
            f"found {num_right} of {num_samples}, k = {k}"
        )
    return 1.0 - comb(num_samples - num_right, k) / comb(num_samples, k)


def powers_up_to(n: int) -> list[int]:
    """1, 2, 4, ... up to n, and n itself.

    >>> powers_up_to(6)
    [1, 2, 4, 6]
    """
    found = [1 << i for i in range(n.bit_length()) if 1 << i <= n]
    return found if found[-1] == n else [*found, n]


def bootstrap(values: Sequence[float]) -> tuple[float, float]:
    """The middle 95 % of the means of 2,000 resamples; (0, 1) for none.

    For means of shares per question, where answers to one question are no independent draws.
    """
    if not values:
        return 0.0, 1.0
    data, rng = np.asarray(values, dtype=np.float64), np.random.default_rng(SEED)
    means = [data[rng.integers(0, len(data), len(data))].mean() for _ in range(RESAMPLES)]
    low, high = np.quantile(means, (0.025, 0.975))
    return min(float(low), float(data.mean())), max(float(high), float(data.mean()))
