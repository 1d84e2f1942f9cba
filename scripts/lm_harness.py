"""Run tasks of EleutherAI's lm-evaluation-harness on one of our models, in this process.

pip install "lm-eval>=0.4.9"
python -m scripts.lm_harness --stage=base --tasks=lambada_openai,piqa
python -m scripts.lm_harness --tasks=mine --include=DIR       tasks of your own, YAML files in DIR
"""

from __future__ import annotations

import importlib
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nanochat import config, errors, runtime
from nanochat import load as models
from nanochat.config import DeviceSettings, setting
from nanochat.errors import UserError
from nanochat.eval.harness import make_lm
from nanochat.home import Home, write_text


@dataclass(frozen=True)
class Settings(DeviceSettings):
    tasks: str = setting("", "comma-separated names of tasks")
    include: str | None = setting(None, "directory of task files (YAML) of your own")
    stage: str | None = setting(None, "base, mid, sft, dpo or rl (default: the most trained)")
    step: int | None = setting(None, "checkpoint to measure (default: the newest)")
    shots: int | None = setting(None, "examples shown before each question (default: the task's)")
    limit: int | None = setting(None, "examples per task (default: all)")


def main(argv: list[str] | None = None) -> None:
    cfg = config.parse(Settings, {}, argv, __doc__)
    if not cfg.tasks:
        raise UserError("no task is named", "for example --tasks=lambada_openai,piqa")
    here = Path(__file__).resolve().parent  # as a program, this file would be found in the package's place
    sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != here]
    try:
        harness: Any = importlib.import_module("lm_eval")
        loader: Any = importlib.import_module("lm_eval.tasks")
        evaluator: Any = importlib.import_module("lm_eval.evaluator")
    except ImportError as error:
        raise UserError("the package lm-eval is not installed", 'pip install "lm-eval>=0.4.9"') from error
    evaluator.add_env_info = lambda _: None  # it runs pip and a dozen other programs; nothing of it is kept
    home, rt = Home.find(cfg.home), runtime.start(cfg.device, cfg.dtype)
    stage = cfg.stage or models.newest_stage(home, cfg.tag)
    model, tok, found = models.load_model(home, cfg.tag, stage, rt=rt, step=cfg.step)
    try:
        done = harness.simple_evaluate(
            model=make_lm(model, tok), tasks=[name.strip() for name in cfg.tasks.split(",")],
            num_fewshot=cfg.shots, limit=cfg.limit, task_manager=loader.TaskManager(include_path=cfg.include),
        )  # fmt: skip
    except (KeyError, ValueError) as error:
        raise UserError(f"the harness refuses: {error}", "see its list: lm-eval ls tasks") from error
    facts = {"stage": stage, "step": found.step, "results": done["results"]}
    path = home.stage_dir(cfg.tag, f"lm_eval_{stage}") / "results.json"
    write_text(path, json.dumps(facts, indent=1, default=str) + "\n")
    for name, values in done["results"].items():
        print(name, {k: round(float(v), 4) for k, v in values.items() if isinstance(v, float)})
    print(f"written to {path}")


if __name__ == "__main__":
    raise SystemExit(errors.run(main))
