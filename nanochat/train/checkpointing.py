"""Saving and resuming a training run: weights, optimizer, random state, data cursor and loop state.

A resumed run computes the same bits as one that was never stopped. What a verified checkpoint on disk is:
nanochat.checkpoint.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import torch

from nanochat import checkpoint
from nanochat.errors import UserError
from nanochat.gpt import GPT
from nanochat.optim import MuonAdamW
from nanochat.run_dir import Stage
from nanochat.runtime import Runtime
from nanochat.train.loop import TrainState

MAX_FAILED_SAVES = 3  # in a row, before the run stops


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
    root: Path, model: GPT, optimizer: MuonAdamW, state: TrainState, rt: Runtime, meta: dict[str, Any]
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
    found: checkpoint.Checkpoint, model: GPT, optimizer: MuonAdamW, state: TrainState, rt: Runtime
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


# ---------------------------------------------------------------- resuming


def resume(stage: Stage, how: str, model: GPT, optimizer: MuonAdamW, state: TrainState) -> int | None:
    """Load a checkpoint of this stage into model, optimizer and state; the step resumed from, or None.

    how: "auto" takes the newest good checkpoint, a number that step, "never" none.
    Raises UserError for another value, for a missing step, and if checkpoints exist but none is good.
    """
    if how not in ("auto", "never") and not how.isdigit():
        raise UserError(
            f"--resume must be auto, never or a step, found {how!r}",
            "leave it out to continue where the run stopped",
        )
    if how == "never":
        if checkpoint.list_steps(stage.checkpoints):
            problem = f"--resume=never, and {stage.checkpoints} already holds checkpoints"
            raise UserError(problem, "choose another --tag")
        return None
    step = _agree_on_step(stage, int(how) if how.isdigit() else None)
    if step is None:
        return None
    found = checkpoint.load(stage.checkpoints, step, repair=False)
    assert found is not None
    load_state(found, model, optimizer, state, stage.rt)
    stage.rt.say(f"{stage.name}: continuing from step {state.step}")
    return state.step


def _agree_on_step(stage: Stage, wanted: int | None) -> int | None:
    """Rank 0 looks for a good checkpoint and moves damaged ones aside; all ranks learn its step or error."""
    step, error = None, None
    if stage.rt.is_main:
        try:
            found = checkpoint.load(stage.checkpoints, wanted, repair=True)
            step = None if found is None else found.step
        except UserError as problem:
            error = (problem.problem, problem.hint)
    step, error = stage.rt.gather((step, error))[0]
    if error is not None:
        raise UserError(*error)
    return step


# ---------------------------------------------------------------- saving


class Saver:
    """A hook: save every `save_every` steps, after the last one, and when the run is asked to stop.

    A failed save is only a warning while later ones may still succeed. Keeps the newest `keep` checkpoints,
    the best one and the one that the run was resumed from.
    """

    reads_weights = False  # state_dict() waits for weights that are still under way

    def __init__(
        self,
        stage: Stage,
        model: GPT,
        optimizer: MuonAdamW,
        *,
        save_every: int,
        keep: int,
        resumed_from: int | None,
        meta: dict[str, Any],
    ) -> None:
        self.stage = stage
        self.model = model
        self.optimizer = optimizer
        self.save_every = save_every
        self.keep = keep
        self.protect = () if resumed_from is None else (resumed_from,)
        self.meta = stage.meta() | meta
        self.num_failures = 0

    def __call__(self, state: TrainState) -> None:
        is_last = state.step == state.num_steps or state.stopping
        if not is_last and (self.save_every == 0 or state.step % self.save_every != 0):
            return
        try:
            save_state(self.stage.checkpoints, self.model, self.optimizer, state, self.stage.rt, self.meta)
        except checkpoint.SaveFailed as error:
            self.num_failures += 1
            if is_last or self.num_failures >= MAX_FAILED_SAVES:
                problem = f"step {state.step} could not be saved: {error}"
                raise UserError(problem, "free some space and run the same command again") from error
            self.stage.rt.say(f"warning: step {state.step} not saved ({error}); training goes on")
            return
        self.num_failures = 0
        if self.stage.rt.is_main:
            checkpoint.prune(self.stage.checkpoints, keep=self.keep, protect=self.protect)
