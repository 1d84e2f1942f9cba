"""Which kernel attends: the first tier of TIERS that is here, fits the device, and agrees with the reference on it.

A tier is a module of this package with `why_not`, `attend` and `attend_cache`; one that is not part of this version
counts as missing, so that a new kernel is a new file. A choice is made once per (device, dtype), kept with its
reason, and printed where there is a GPU to be surprised about.
"""

from __future__ import annotations

import importlib
import sys
from typing import Protocol

import torch
from torch import Tensor

from nanochat.errors import UserError
from nanochat.flash_attention.cache import Cache

TIERS = ("fa3", "fa4", "flex", "sdpa", "reference")  # fastest first
CUDA_TIERS = ("fa3", "fa4", "flex")
TOLERANCES = {
    torch.float64: 1e-9,
    torch.float32: 2e-3,
    torch.float16: 2e-2,
    torch.bfloat16: 6e-2,
}  # fp32: TF32
PROBE_SHAPE = (2, 40, 4, 2, 64)  # B T H K E
PROBE_WINDOW = 9

_verdicts: dict[tuple[str, torch.device, torch.dtype], str | None] = {}
_choices: dict[tuple[torch.device, torch.dtype], str] = {}


class Tier(Protocol):
    """What a module of this package offers to be a tier. left, right: None = no limit."""

    def why_not(self, device: torch.device, dtype: torch.dtype) -> str | None: ...

    def attend(
        self,
        q_BTHE: Tensor,
        k_BSKE: Tensor,
        v_BSKE: Tensor,
        left: int | None,
        right: int | None,
        doc_start_BT: Tensor | None = None,
    ) -> Tensor: ...

    def attend_cache(self, q_BTHE: Tensor, cache: Cache, left: int | None, right: int | None) -> Tensor: ...


def pick(override: str | None, device: torch.device, dtype: torch.dtype) -> Tier:
    """The tier to use now; UserError if `override` names one that cannot run here, with the reason."""
    if override is None:
        return load(_choices[device, dtype] if (device, dtype) in _choices else choose(device, dtype))
    if override not in TIERS:
        raise UserError(
            f"there is no attention kernel {override!r}", f"choose one of {', '.join(TIERS)}, or None"
        )
    if (reason := verdict(override, device, dtype)) is not None:
        hint = f"leave _override_impl at None to take {choose(device, dtype)!r} here"
        raise UserError(
            f"attention kernel {override!r} cannot run on {device} in {_short(dtype)}: {reason}", hint
        )
    return load(override)


def choose(device: torch.device, dtype: torch.dtype) -> str:
    """Name of the first tier without an objection; decided, and on a GPU printed, once per device and dtype."""
    if (device, dtype) not in _choices:
        _choices[device, dtype] = next(name for name in TIERS if verdict(name, device, dtype) is None)
        if device.type != "cpu" and not device.index:
            print(f"attention: {explain(device, dtype)}", file=sys.stderr)
    return _choices[device, dtype]


def explain(device: torch.device, dtype: torch.dtype) -> str:
    """One line for a log: "sdpa on cpu in float32, because fa3: needs a CUDA device; ..."."""
    chosen = choose(device, dtype)
    skipped = [f"{name}: {verdict(name, device, dtype)}" for name in TIERS[: TIERS.index(chosen)]]
    return f"{chosen} on {device} in {_short(dtype)}" + (", because " + "; ".join(skipped) if skipped else "")


def verdict(name: str, device: torch.device, dtype: torch.dtype) -> str | None:
    """None if the tier runs and is right on this device, otherwise the reason against it; probed once."""
    key = (name, device, dtype)
    if key not in _verdicts:
        _verdicts[key] = _examine(name, device, dtype)
    return _verdicts[key]


def load(name: str) -> Tier:
    """The tier's module (a tier's own packages are loaded by its first call, never by this import)."""
    return importlib.import_module(f"nanochat.flash_attention.{name}")  # type: ignore[return-value]


def has_fa3() -> bool:
    """Whether the FA3 kernel is present and has run on this GPU."""
    if not torch.cuda.is_available():
        return False
    return verdict("fa3", torch.device("cuda", torch.cuda.current_device()), torch.bfloat16) is None


def _examine(name: str, device: torch.device, dtype: torch.dtype) -> str | None:
    if name in CUDA_TIERS and device.type != "cuda":
        return "needs a CUDA GPU"
    try:
        tier = load(name)
    except ModuleNotFoundError as error:
        if error.name != f"nanochat.flash_attention.{name}":
            raise
        return "not part of this version of nanochat"
    if (reason := tier.why_not(device, dtype)) is not None:
        return reason
    if name == "reference" or device.type == "meta":  # the yardstick itself; no numbers to compare
        return None
    try:
        error_size = probe(tier, device, dtype)
    except Exception as error:  # whatever a foreign kernel raises is its reason, and is reported
        return f"failed its probe with {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    if not error_size <= TOLERANCES[dtype]:  # NaN is no agreement either
        return f"disagrees with the reference by {error_size:.1e} (at most {TOLERANCES[dtype]:.0e} allowed)"
    return None


def probe(tier: Tier, device: torch.device, dtype: torch.dtype) -> float:
    """Largest error of outputs and gradients against the reference, relative to the largest entry of each."""
    rows, time, heads, kv_heads, size = PROBE_SHAPE
    source = torch.Generator().manual_seed(0)  # on the CPU, and not the global one: a probe changes no run
    reference, worst = load("reference"), 0.0
    with torch.inference_mode(False), torch.enable_grad():
        shapes = ((rows, time, heads, size), (rows, time, kv_heads, size), (rows, time, kv_heads, size))
        inputs = [torch.randn(shape, generator=source).to(device, dtype) for shape in shapes]
        dy = torch.randn(shapes[0], generator=source).to(device, dtype)
        for left in (None, PROBE_WINDOW):
            results = []
            for which in (tier, reference):
                leaves = [x.clone().requires_grad_() for x in inputs]
                y = which.attend(*leaves, left, 0)
                results.append([y.detach(), *torch.autograd.grad(y, leaves, dy)])
            for ours, oracle in zip(*results):
                worst = max(worst, float((ours - oracle).abs().max() / oracle.abs().max()))
    return worst


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
