"""What survives a stop: model, optimizer, RNG, data cursor, loop state, to and from a verified checkpoint."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import torch

from nanochat import checkpoint
from nanochat.runtime import Runtime
from nanochat.train.loop import TrainState


def split_arrays(tree: Any, arrays: dict[str, np.ndarray], path: str = "") -> Any:
    """`tree` with every numpy array replaced by a reference; the arrays go to `arrays` under their paths."""
    if isinstance(tree, np.ndarray):
        arrays[path] = tree
        return {"__array__": path}
    if isinstance(tree, dict):
        return {key: split_arrays(value, arrays, f"{path}/{key}") for key, value in tree.items()}
    if isinstance(tree, (list, tuple)):
        return [split_arrays(value, arrays, f"{path}/{i}") for i, value in enumerate(tree)]
    return tree


def join_arrays(tree: Any, arrays: dict[str, np.ndarray]) -> Any:
    """The inverse of split_arrays (tuples come back as lists)."""
    if isinstance(tree, dict):
        if "__array__" in tree:
            return arrays[tree["__array__"]]
        return {key: join_arrays(value, arrays) for key, value in tree.items()}
    if isinstance(tree, list):
        return [join_arrays(value, arrays) for value in tree]
    return tree


def model_arrays(model: torch.nn.Module) -> dict[str, np.ndarray]:
    """The model's state as fp32 arrays."""
    return {name: tensor.detach().float().cpu().numpy() for name, tensor in model.state_dict().items()}


def save_state(
    root: Path, model: Any, optimizer: Any, state: TrainState, rt: Runtime, meta: dict[str, Any]
) -> Path:
    """Write one checkpoint, all ranks together."""
    me = f"{rt.rank:05d}-of-{rt.world_size:05d}"
    files: dict[str, dict[str, np.ndarray]] = {
        f"optim-{me}": optimizer.state_arrays(),
        f"rng-{me}": _rng_arrays(rt),
    }
    cursor_arrays: dict[str, np.ndarray] = {}
    cursor = split_arrays(state.cursor, cursor_arrays)
    if rt.is_main:
        files["model"] = model_arrays(model)
        if cursor_arrays:
            files["data"] = cursor_arrays
    values = state.to_dict() | {"cursor": cursor, "python_rng": _python_rng(rt)}
    return checkpoint.save(
        root, state.step, files, values, meta=meta, rank=rt.rank, world_size=rt.world_size, gather=rt.gather
    )


def load_state(
    found: checkpoint.Checkpoint, model: Any, optimizer: Any, state: TrainState, rt: Runtime
) -> None:
    """Put a checkpoint back: exactly with the same world size, re-sliced (RNG excepted) with another."""
    load_model_arrays(model, found.tensors("model"))
    optimizer.load_state_arrays(found.tensors("optim-"))
    state.load_dict(found.state)
    cursor = join_arrays(found.state["cursor"], found.tensors("data"))
    state.resume = None if cursor is None else lambda: cursor
    python_rng = found.state["python_rng"]
    if len(python_rng) == rt.world_size:
        version, internal, gauss = python_rng[rt.rank]
        random.setstate((version, tuple(internal), gauss))
        arrays = found.tensors(f"rng-{rt.rank:05d}-of-{rt.world_size:05d}")
        torch.set_rng_state(torch.from_numpy(arrays["cpu"].copy()))
        if rt.device.type == "cuda" and "cuda" in arrays:
            torch.cuda.set_rng_state(torch.from_numpy(arrays["cuda"].copy()), rt.device)


def load_model_arrays(model: torch.nn.Module, arrays: dict[str, np.ndarray]) -> None:
    """Copy arrays into the model's parameters by name. Raises RuntimeError if names or shapes differ."""
    model.load_state_dict(
        {name: torch.from_numpy(np.array(array)) for name, array in arrays.items()}, strict=True
    )


def _rng_arrays(rt: Runtime) -> dict[str, np.ndarray]:
    arrays = {"cpu": torch.get_rng_state().numpy()}
    if rt.device.type == "cuda":
        arrays["cuda"] = torch.cuda.get_rng_state(rt.device).numpy()
    return arrays


def _python_rng(rt: Runtime) -> list[Any]:
    version, internal, gauss = random.getstate()
    return rt.gather([version, list(internal), gauss])
