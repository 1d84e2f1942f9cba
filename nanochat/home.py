"""Every file name of the project, once. No torch, no work at import."""

from __future__ import annotations

import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nanochat.errors import UserError
from nanochat.storage import replace_file


@dataclass(frozen=True)
class Home:
    """Where tokenizers, data and runs live: --home, else NANOCHAT_HOME, else the user's cache directory."""

    root: Path

    @classmethod
    def find(cls, override: str | None = None) -> Home:
        """The home named by `override`, the environment or the platform's habit; nothing is created."""
        chosen = override or os.environ.get("NANOCHAT_HOME")
        if chosen:
            return cls(Path(chosen).expanduser().absolute())
        if sys.platform == "darwin":
            cache = Path.home() / "Library" / "Caches"
        else:
            cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        return cls(cache / "nanochat")

    @property
    def tokenizer_dir(self) -> Path:
        return self.root / "tokenizer"

    @property
    def data_dir(self) -> Path:
        return self.root / "data"

    @property
    def eval_bundle_dir(self) -> Path:
        return self.root / "eval_bundle"

    def stage_dir(self, tag: str, stage: str) -> Path:
        """Everything one stage of the run `tag` writes."""
        for part in (tag, stage):
            if not part or part.startswith(".") or not all(c.isalnum() or c in "._-" for c in part):
                raise UserError(
                    f"a run's name may hold letters, digits, '.', '_' and '-', found {part!r}",
                    "choose another --tag",
                )
        return self.root / "runs" / tag / stage

    def checkpoints(self, tag: str, stage: str) -> Path:
        return self.stage_dir(tag, stage) / "ckpt"

    def settings_file(self, tag: str, stage: str) -> Path:
        return self.stage_dir(tag, stage) / "settings.json"

    def metrics_file(self, tag: str, stage: str) -> Path:
        return self.stage_dir(tag, stage) / "metrics.jsonl"

    def result_file(self, tag: str, stage: str) -> Path:
        return self.stage_dir(tag, stage) / "result.json"

    def exit_file(self, tag: str, stage: str) -> Path:
        return self.stage_dir(tag, stage) / "exit.json"

    def report_dir(self, tag: str) -> Path:
        return self.stage_dir(tag, "report")


def write_text(path: Path, text: str) -> None:
    """Replace `path` by `text` at once (storage.replace_file). UserError when the disk refuses."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_file(path, text.encode("utf-8"))
    except OSError as error:
        problem = f"cannot write {path}: {error.strerror}"
        raise UserError(problem, "free space or choose another --home") from error


def write_json(path: Path, value: Any) -> None:
    """Write `value` as strict JSON (no NaN), atomically."""
    write_text(path, json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False) + "\n")


def read_json(path: Path) -> Any:
    """The value in a JSON file; UserError if it is missing or not JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(f"{path} does not exist", "run the stage that writes it first") from error
    except (OSError, ValueError) as error:
        raise UserError(
            f"{path} cannot be read as JSON: {error}", "delete it and run its stage again"
        ) from error
