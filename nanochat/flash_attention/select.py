"""Choose the attention kernel: the first of BACKENDS that is present, supports the device and is right on it.

A backend is a module of this package with `unsupported_reason`, `attend` and `attend_cache`, as in sdpa.py.
Before it is used it is probed: its outputs and gradients must agree with the reference on this device. The
choice is made once per (device, dtype), and printed where there is a GPU.
"""

from __future__ import annotations

import functools
import importlib
import sys
from types import ModuleType

import torch

from nanochat.errors import UserError

BACKENDS = ("fa3", "fa4", "flex", "sdpa", "reference")  # fastest first
NEEDS_CUDA = ("fa3", "fa4", "flex")
TOLERANCE = {torch.float32: 2e-3, torch.float16: 2e-2, torch.bfloat16: 6e-2}  # fp32 may use TF32 products
PROBE_B, PROBE_T, PROBE_H, PROBE_K, PROBE_E, PROBE_LEFT = 2, 40, 4, 2, 64, 9


def pick(override: str | None, device: torch.device, dtype: torch.dtype) -> ModuleType:
    """The backend to use now; UserError with the reason where `override` names one that cannot run here."""
    return sys.modules[name_of(override, device, dtype)]


def name_of(override: str | None, device: torch.device, dtype: torch.dtype) -> str:
    """Name of the backend's module, which is then loaded."""
    return _pick(override, device, dtype)


# What torch.compiler.assume_constant_result sets: dynamo calls name_of instead of tracing the probe. The
# decorator itself would make this import load the compiler (1.6 s).
name_of._dynamo_marked_constant = True  # type: ignore[attr-defined]


def explain(device: torch.device, dtype: torch.dtype) -> str:
    """One line for a log: "attention: sdpa on cpu, float32 (fa3: needs a CUDA GPU; ...)"."""
    chosen = next(name for name in BACKENDS if verdict(name, device, dtype) is None)
    skipped = [f"{name}: {verdict(name, device, dtype)}" for name in BACKENDS[: BACKENDS.index(chosen)]]
    return f"attention: {chosen} on {_place(device, dtype)} ({'; '.join(skipped) or 'the first choice'})"


@functools.cache
def verdict(name: str, device: torch.device, dtype: torch.dtype) -> str | None:
    """None if the backend runs and is right on this device, else the reason against it. Probed once."""
    if name in NEEDS_CUDA and device.type != "cuda":
        return "needs a CUDA GPU"
    try:
        backend = importlib.import_module(f"{__package__}.{name}")
    except ModuleNotFoundError as error:
        if error.name != f"{__package__}.{name}":
            raise
        return "not part of this version of nanochat"
    if (reason := backend.unsupported_reason(device, dtype)) is not None:
        return str(reason)
    if name == "reference" or device.type == "meta":  # the yardstick itself; nothing to compare
        return None
    try:
        worst = probe(backend, device, dtype)
    except Exception as error:  # whatever a foreign kernel raises is its reason, and is shown
        return f"its probe raised {type(error).__name__}: {str(error).partition(chr(10))[0]}"
    allowed = TOLERANCE.get(dtype, 1e-9)
    return None if worst <= allowed else f"disagrees with the reference by {worst:.1e}, allowed {allowed:.0e}"


def probe(backend: ModuleType, device: torch.device, dtype: torch.dtype) -> float:
    """Largest error of outputs and gradients against the reference, relative to each one's largest entry."""
    reference = importlib.import_module(f"{__package__}.reference")
    source = torch.Generator().manual_seed(0)  # its own: a probe changes no run's random numbers
    errors = []
    with torch.inference_mode(False), torch.enable_grad():
        heads = (PROBE_H, PROBE_K, PROBE_K, PROBE_H)  # of q, k, v, dy
        *inputs, dy = (
            torch.randn(PROBE_B, PROBE_T, n, PROBE_E, generator=source, device="cpu").to(device, dtype)
            for n in heads
        )
        for left in (None, PROBE_LEFT):
            results = []
            for which in (backend, reference):
                leaves = [x.clone().requires_grad_() for x in inputs]
                y = which.attend(*leaves, left, 0)
                results.append([y.detach(), *torch.autograd.grad(y, leaves, dy)])
            for ours, oracle in zip(*results):
                errors.append((ours - oracle).abs().max().float() / oracle.abs().max())
    return float(torch.stack(errors).max())  # NaN if one is


def has_fa3() -> bool:
    """Whether the FA3 kernel is present and has run on this GPU."""
    if not torch.cuda.is_available():
        return False
    return verdict("fa3", torch.device("cuda", torch.cuda.current_device()), torch.bfloat16) is None


@functools.cache
def _pick(override: str | None, device: torch.device, dtype: torch.dtype) -> str:
    name = _choose(device, dtype) if override is None else override
    if name not in BACKENDS:
        raise UserError(f"there is no attention kernel {name!r}", f"choose one of {', '.join(BACKENDS)}")
    if (reason := verdict(name, device, dtype)) is not None:
        hint = f"leave _override_impl at None: that takes {_choose(device, dtype)!r} here"
        raise UserError(f"attention kernel {name!r} cannot run on {_place(device, dtype)}: {reason}", hint)
    return f"{__package__}.{name}"


@functools.cache
def _choose(device: torch.device, dtype: torch.dtype) -> str:
    chosen = next(name for name in BACKENDS if verdict(name, device, dtype) is None)
    if device.type in ("cuda", "mps") and not device.index:  # once per machine, not once per rank
        print(explain(device, dtype), file=sys.stderr)
    return chosen


def _place(device: torch.device, dtype: torch.dtype) -> str:
    return f"{device}, {str(dtype).removeprefix('torch.')}"
