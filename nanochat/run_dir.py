"""One stage of a run on disk: its settings, its lock, whether it is finished, where it resumes.

A stage is finished when result.json holds the same settings and inputs (tokenizer, parent checkpoint).
If they differ, the old directory is kept under a new name and the stage starts again; nothing is deleted.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nanochat import checkpoint, hardware
from nanochat.config import to_dict
from nanochat.errors import UserError
from nanochat.home import Home, read_json, write_json
from nanochat.runtime import Runtime
from nanochat.train.checkpointing import load_state, save_state
from nanochat.train.loop import TrainState

# settings that may change between two calls of the same run
FREE = {
    "home",
    "tag",
    "device",
    "wandb",
    "save_every",
    "eval_every",
    "sample_every",
    "resume",
    "keep",
    "preset",
    "offline",
    "mirror",
    "disk_gb",
    "damaged",
}


def settings_key(settings: dict[str, Any], inputs: dict[str, Any]) -> str:
    """A short hash of what decides a stage's outcome."""
    chosen = {key: value for key, value in settings.items() if key not in FREE}
    return hashlib.sha256(json.dumps([chosen, inputs], sort_keys=True).encode()).hexdigest()[:16]


@dataclass
class Stage:
    """An opened stage; `finished` holds the result of an earlier, equal run."""

    home: Home
    tag: str
    name: str
    rt: Runtime
    settings: dict[str, Any]
    inputs: dict[str, Any]
    key: str
    finished: dict[str, Any] | None = None
    lock: int | None = field(default=None, repr=False)

    @property
    def checkpoints(self) -> Path:
        return self.home.checkpoints(self.tag, self.name)

    @property
    def metrics_file(self) -> Path | None:
        return self.home.metrics_file(self.tag, self.name) if self.rt.is_main else None

    def meta(self) -> dict[str, Any]:
        """What every checkpoint of this stage records about where it comes from."""
        facts = hardware.describe()
        return {
            "stage": self.name,
            "settings": self.settings,
            "key": self.key,
            "inputs": self.inputs,
            "machine": facts,
        }

    def __enter__(self) -> Stage:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Give the lock back."""
        if self.lock is not None:
            os.close(self.lock)
            self.lock = None

    def finish(self, **result: Any) -> None:
        """Write result.json, which marks the stage as finished, and exit.json with code 0."""
        if self.rt.is_main:
            facts = {
                "stage": self.name,
                "key": self.key,
                "inputs": self.inputs,
                "machine": hardware.describe(),
                "finished": time.strftime("%Y-%m-%d"),
            }
            write_json(self.home.result_file(self.tag, self.name), facts | result)
            write_json(self.home.exit_file(self.tag, self.name), {"code": 0})
        self.rt.barrier()


def open_stage(name: str, settings: Any, rt: Runtime, inputs: dict[str, Any]) -> Stage:
    """Lock and prepare the stage's directory. Raises UserError if another process works in it."""
    home, values = Home.find(settings.home), to_dict(settings)
    key = settings_key(values, inputs)
    stage = Stage(home, settings.tag, name, rt, values, inputs, key)
    directory = home.stage_dir(settings.tag, name)
    problem: str | None = None
    if rt.is_main:
        try:
            problem = _prepare(stage, directory)
        except OSError as error:
            problem = f"cannot write to {directory}: {error.strerror}"
    problem, stage.finished = rt.gather((problem, stage.finished))[0]
    if problem is not None:
        raise UserError(problem, "wait for it to end, or choose another --tag or --home")
    return stage


def _lock(stage: Stage, directory: Path) -> bool:
    stage.lock = os.open(directory / "lock", os.O_WRONLY | os.O_CREAT, 0o644)
    try:
        fcntl.flock(stage.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        stage.close()
        return False
    return True


def _prepare(stage: Stage, directory: Path) -> str | None:
    directory.mkdir(parents=True, exist_ok=True)
    if not _lock(stage, directory):
        return f"another process is working in {directory}"
    key_file, result_file = directory / "key.json", stage.home.result_file(stage.tag, stage.name)
    if key_file.exists() and read_json(key_file)["key"] != stage.key:
        number = 1
        while (old := directory.with_name(f"{directory.name}-old-{number}")).exists():
            number += 1
        directory.rename(old)
        stage.rt.say(f"{stage.name}: settings or inputs have changed; the earlier run is kept in {old.name}")
        directory.mkdir()
        stage.close()
        _lock(stage, directory)
    elif result_file.exists():
        stage.finished = read_json(result_file)
        stage.close()
        return None
    write_json(key_file, {"key": stage.key})
    write_json(stage.home.settings_file(stage.tag, stage.name), stage.settings)
    return None


def resume(stage: Stage, how: str, model: Any, optimizer: Any, state: TrainState) -> int | None:
    """Load the newest good checkpoint (how = "auto"), step N ("N") or none ("never"); the step resumed from.

    Raises UserError for a bad value of --resume, a missing step, or when no checkpoint is good.
    """
    if how != "auto" and how != "never" and not how.isdigit():
        raise UserError(
            f"--resume must be auto, never or a step, found {how!r}",
            "leave it out to continue where the run stopped",
        )
    if how == "never":
        if checkpoint.list_steps(stage.checkpoints):
            raise UserError(
                f"--resume=never, and {stage.checkpoints} already holds checkpoints", "choose another --tag"
            )
        return None
    step = int(how) if how.isdigit() else None
    found, error = None, None
    if stage.rt.is_main:
        try:
            found = checkpoint.load(stage.checkpoints, step, repair=True)
        except UserError as problem:
            error = (problem.problem, problem.hint)
    chosen, error = stage.rt.gather((None if found is None else found.step, error))[0]
    if error is not None:
        raise UserError(*error)
    if chosen is None:
        return None
    found = found or checkpoint.load(stage.checkpoints, chosen, repair=False)
    assert found is not None
    load_state(found, model, optimizer, state, stage.rt)
    stage.rt.say(f"{stage.name}: continuing from step {state.step}")
    return state.step


class Saver:
    """A hook: a checkpoint every n steps, after the last one, and when the run is asked to stop."""

    def __init__(
        self,
        stage: Stage,
        n: int,
        model: Any,
        optimizer: Any,
        *,
        keep: int = 2,
        resumed_from: int | None = None,
        meta: dict[str, Any],
    ) -> None:
        self.stage, self.n, self.model, self.optimizer, self.keep = stage, n, model, optimizer, keep
        self.resumed_from, self.meta, self.failures = resumed_from, stage.meta() | meta, 0

    reads_weights = False  # other than by state_dict()

    def __call__(self, state: TrainState) -> None:
        last = state.step == state.num_steps
        if not (last or state.stopping or (self.n > 0 and state.step % self.n == 0)):
            return
        try:
            save_state(self.stage.checkpoints, self.model, self.optimizer, state, self.stage.rt, self.meta)
            self.failures = 0
        except checkpoint.SaveFailed as error:
            self.failures += 1
            if last or state.stopping or self.failures >= 3:
                raise UserError(
                    f"step {state.step} could not be saved: {error}",
                    "free some space and run the same command again",
                ) from error
            self.stage.rt.say(f"warning: step {state.step} not saved ({error}); training goes on")
            return
        if self.stage.rt.is_main:
            protect = () if self.resumed_from is None else (self.resumed_from,)
            checkpoint.prune(self.stage.checkpoints, keep=self.keep, protect=protect)
