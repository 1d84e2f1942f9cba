"""Schedules: pure functions of the step k (0-based) and the number of steps N, values in [0, 1]."""

import math

WARMDOWN_FRAC = 0.65


def lr_factor(
    k: int, N: int, warmup: int = 40, warmdown_frac: float = WARMDOWN_FRAC, final_frac: float = 0.05
) -> float:
    """min((k+1)/warmup, 1, final + (1-final)·(N-k)/N_w) in [0, 1], with N_w = round(warmdown_frac·N)."""
    _check(k, N, warmdown_frac=warmdown_frac, final_frac=final_frac)
    if warmup < 0:
        raise ValueError(f"warmup must be at least 0 steps, got {warmup}; 0 means no warmup")
    rise = (k + 1) / warmup if warmup else 1.0
    fall = final_frac + (1 - final_frac) * _remaining(k, N, warmdown_frac)
    return _clamp(min(rise, fall))


def linear_to_zero(k: int, N: int, last_frac: float = 1.0) -> float:
    """1 until the last `last_frac` of the run, then straight to 0 at k = N (mid 0.2, SFT 0.5, RL 1)."""
    _check(k, N, last_frac=last_frac)
    return _clamp((N - k) / (last_frac * N)) if last_frac else 1.0


def constant(k: int, N: int) -> float:
    """1 at every step."""
    _check(k, N)
    return 1.0


def muon_momentum(
    k: int,
    N: int,
    *,
    start: float = 0.85,
    peak: float = 0.97,
    final: float = 0.90,
    ramp_slope: float = 0.12 / 400,
    warmdown_frac: float = WARMDOWN_FRAC,
) -> float:
    """μ: start + slope·k up to `peak`, and down to `final` along the learning rate's warmdown."""
    _check(k, N, start=start, peak=peak, final=final, warmdown_frac=warmdown_frac)
    fall = final + (peak - final) * min(1.0, _remaining(k, N, warmdown_frac))
    return _clamp(min(start + ramp_slope * k, peak, fall))


def post_training_momentum(k: int, N: int) -> float:
    """μ of mid-training and SFT: 0.85 to 0.95 in 300 steps, then flat."""
    return muon_momentum(k, N, peak=0.95, final=0.95, ramp_slope=0.10 / 300)


def weight_decay_factor(k: int, N: int) -> float:
    """½(1+cos(πk/N)), for Muon's decay; AdamW's stays constant."""
    _check(k, N)
    return _clamp(0.5 * (1 + math.cos(math.pi * k / N)))


def _remaining(k: int, N: int, warmdown_frac: float) -> float:
    """(N-k)/N_w; 1 when the run is too short for one warmdown step."""
    num_warmdown = round(warmdown_frac * N)
    return (N - k) / num_warmdown if num_warmdown else 1.0


def _clamp(value: float) -> float:
    return min(1.0, max(0.0, value))


def _check(k: int, N: int, **fracs: float) -> None:
    if N < 1 or not 0 <= k <= N:
        raise ValueError(f"a schedule needs 0 <= k <= N and N >= 1, got step k={k} of N={N}")
    for name, frac in fracs.items():
        if not 0 <= frac <= 1:
            raise ValueError(f"{name} must lie in [0, 1], got {frac}")
