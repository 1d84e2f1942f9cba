"""The directory of one stage of a run: its lock, its settings, its metrics and its result.

A stage is finished when result.json holds the key of the same settings and inputs (tokenizer, parent
checkpoint, data). If the key differs, the old directory is kept under a new name and the stage starts again.
Nothing is deleted.
"""

from __future__ import annotations

import hashlib
import json
import time
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nanochat import config, hardware
from nanochat.errors import UserError
from nanochat.home import Home, read_json, write_json
from nanochat.runtime import Runtime
from nanochat.storage import lock


def settings_key(key_values: dict[str, Any], inputs: dict[str, Any]) -> str:
    """A short hash of what decides a stage's outcome."""
    return hashlib.sha256(json.dumps([key_values, inputs], sort_keys=True).encode()).hexdigest()[:16]


@dataclass
class Stage:
    """An opened stage, to be used in a `with` statement, which gives the lock back.

    `finished` holds the result of an earlier run with the same key, else None.
    """

    name: str
    home: Home
    tag: str
    rt: Runtime
    settings: dict[str, Any]
    inputs: dict[str, Any]
    key: str
    finished: dict[str, Any] | None = None
    _lock: ExitStack = field(default_factory=ExitStack, repr=False)

    @property
    def directory(self) -> Path:
        return self.home.stage_dir(self.tag, self.name)

    @property
    def checkpoints(self) -> Path:
        return self.home.checkpoints(self.tag, self.name)

    @property
    def metrics_file(self) -> Path | None:
        """Where rank 0 writes its metrics; None on other ranks."""
        return self.home.metrics_file(self.tag, self.name) if self.rt.is_main else None

    def meta(self) -> dict[str, Any]:
        """What every checkpoint of this stage records about where it comes from."""
        return {
            "stage": self.name,
            "settings": self.settings,
            "key": self.key,
            "inputs": self.inputs,
            "machine": hardware.describe(),
        }

    def __enter__(self) -> Stage:
        return self

    def __exit__(self, *_: object) -> None:
        self._lock.close()

    def finish(self, **results: Any) -> None:
        """Write result.json, which marks the stage as finished, and exit.json with code 0."""
        if self.rt.is_main:
            origin = {
                "stage": self.name,
                "key": self.key,
                "inputs": self.inputs,
                "machine": hardware.describe(),
                "finished": time.strftime("%Y-%m-%d"),
            }
            write_json(self.home.result_file(self.tag, self.name), origin | results)
            self.record_exit(0)
        self.rt.barrier()

    def record_exit(self, code: int, **details: Any) -> None:
        """Write exit.json: how the process ended."""
        if self.rt.is_main:
            write_json(self.home.exit_file(self.tag, self.name), {"code": code} | details)


def open_stage(name: str, settings: config.RunSettings, rt: Runtime, inputs: dict[str, Any]) -> Stage:
    """Lock and prepare the directory of the stage `name`. Every rank calls it; rank 0 does the work.

    Raises UserError if another process works in the directory or if it cannot be written.
    """
    key = settings_key(config.key_values(settings), inputs)
    values = config.to_dict(settings)
    stage = Stage(name, Home.find(settings.home), settings.tag, rt, values, inputs, key)
    problem: str | None = None
    if rt.is_main:
        try:
            problem = _prepare(stage)
        except OSError as error:
            problem = f"cannot write to {stage.directory}: {error.strerror}"
    problem, stage.finished = rt.gather((problem, stage.finished))[0]
    if problem is not None:
        raise UserError(problem, "wait for it to end, or choose another --tag or --home")
    return stage


def _prepare(stage: Stage) -> str | None:
    """Take the lock, keep a run with another key aside, find an earlier result; the problem, or None."""
    directory = stage.directory
    directory.mkdir(parents=True, exist_ok=True)
    if not _take_lock(stage):
        return f"another process is working in {directory}"
    key_file = directory / "key.json"
    result_file = stage.home.result_file(stage.tag, stage.name)
    if key_file.exists() and read_json(key_file)["key"] != stage.key:
        number = 1
        while (kept := directory.with_name(f"{directory.name}-old-{number}")).exists():
            number += 1
        directory.rename(kept)
        stage.rt.say(f"{stage.name}: settings or inputs have changed; the earlier run is kept in {kept.name}")
        # The lock moved away with the old directory; the new one needs its own.
        stage._lock.close()
        directory.mkdir()
        _take_lock(stage)
    elif result_file.exists():
        stage.finished = read_json(result_file)
        stage._lock.close()
        return None
    write_json(key_file, {"key": stage.key})
    write_json(stage.home.settings_file(stage.tag, stage.name), stage.settings)
    return None


def _take_lock(stage: Stage) -> bool:
    return stage._lock.enter_context(lock(stage.directory / "lock"))


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The records of a metrics.jsonl; an incomplete last line, left by a killed run, is not read."""
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        try:
            rows.append(json.loads(line))
        except ValueError:
            break
    return rows


def clock(seconds: float) -> str:
    """90 -> '1:30', 4000 -> '1:06:40'."""
    whole = int(max(seconds, 0))
    hours, minutes = divmod(whole // 60, 60)
    return f"{hours}:{minutes:02d}:{whole % 60:02d}" if hours else f"{minutes}:{whole % 60:02d}"
