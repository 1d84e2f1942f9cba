"""What MuonAdamW is given, checked and completed: parameter groups, and the names of saved state."""

from typing import Any

import numpy as np
import torch

from nanochat.optim import muon


def prepared(group: dict[str, Any], index: int, kinds: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """The group with its defaults, named parameters and initial values; ValueError when it cannot work.

    kinds: the defaults of each kind of group.
    """
    defaults = kinds.get(group.get("kind", ""))
    if defaults is None:
        known = " or ".join(f'"{kind}"' for kind in kinds)
        raise ValueError(f"group {index}: kind must be {known}, got {group.get('kind')!r}")
    if "lr" not in group:
        raise ValueError(f"group {index}: lr is missing")
    given = [group["params"]] if isinstance(group["params"], torch.Tensor) else list(group["params"])
    pairs = [pair if isinstance(pair, tuple) else (f"{index}/{i}", pair) for i, pair in enumerate(given)]
    is_muon = group["kind"] == "muon"
    if not pairs:
        raise ValueError(f"group {index}: no parameters; leave the group out")
    for name, p in pairs:
        if p.dtype != torch.float32 or not p.is_contiguous():
            raise ValueError(f"{name}: weights must be contiguous float32, got {p.dtype}, {p.stride()}")
        if is_muon and p.ndim != 2:
            raise ValueError(f"{name}: Muon needs matrices, got shape {tuple(p.shape)}; use an adamw group")
    names, params = [name for name, _ in pairs], [p for _, p in pairs]
    group = {**defaults, **group, "params": params, "param_names": names}
    group.setdefault("initial_lr", group["lr"])
    group.setdefault("initial_weight_decay", group["weight_decay"])
    most = len(muon.POLAR_EXPRESS)
    if is_muon and group["ns_dtype"] not in (torch.float32, torch.bfloat16):
        raise ValueError(f"group {index}: ns_dtype must be float32 or bfloat16, got {group['ns_dtype']}")
    if is_muon and not 1 <= group["ns_steps"] <= most:
        raise ValueError(f"group {index}: ns_steps must be 1 to {most}, got {group['ns_steps']}")
    return group


def parse(name: str, array: np.ndarray) -> tuple[str, int, tuple[int, ...]]:
    """(key, offset, full shape) of an entry of state_arrays."""
    moment, parameter, *where = name.split("|")
    if not where:
        return name, 0, array.shape
    return f"{moment}|{parameter}", int(where[0]), tuple(int(size) for size in where[1].split("x"))
