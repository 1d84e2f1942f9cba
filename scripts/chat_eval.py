"""Measure the chat models: accuracy on held-out tasks, with 95 % intervals, and their mean centred on chance.

python -m scripts.chat_eval --preset=cpu-demo
python -m scripts.chat_eval --stage=sft --tasks=gsm8k,arc_easy --max-problems=100
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch

from nanochat import checkpoint, config, errors, models, runtime
from nanochat.config import setting
from nanochat.engine import Engine
from nanochat.eval.chat import chat_core, evaluate_task
from nanochat.paths import Home, write_text
from nanochat.train.stage import open_stage
from tasks.arc import ARC
from tasks.base import Task
from tasks.gsm8k import GSM8K
from tasks.mixtures import EMBEDDED
from tasks.mmlu import MMLU
from tasks.synthetic import heldout_tasks


@dataclass(frozen=True)
class Settings:
    home: str | None = setting(None, "directory of all runs (default: NANOCHAT_HOME, else the user's cache)")
    tag: str = setting("main", "name of the run")
    seed: int = setting(1, "seed of the sampler, where the temperature is not 0")
    stage: str | None = setting(None, "mid, sft or rl (default: each one that has been trained)")
    step: int | None = setting(None, "checkpoint to measure (default: the newest)")
    tasks: str = setting("auto", "comma-separated names; auto: what fits the data the model was trained on")
    max_problems: int | None = setting(None, "examples per task (default: all)")
    max_tokens: int = setting(512, "tokens of an answer at most")
    temperature: float = setting(0.0, "0 is always the likeliest token")
    batch_size: int = setting(64, "answers written at a time on one device")
    device: str | None = setting(None, "cpu, cuda or mps (default: what there is)")
    dtype: str | None = setting(None, "float32, bfloat16 or float16 (default: float32 on a CPU)")


PRESETS = {
    "smoke": Settings(max_problems=4, max_tokens=8),
    "cpu-demo": Settings(max_tokens=128, batch_size=256),
    "single-gpu": Settings(),
    "speedrun": Settings(),
}
STAGES = ("mid", "sft", "rl")
HUB_TASKS: dict[str, Callable[[Home], Task]] = {
    "arc_easy": lambda home: ARC("ARC-Easy", "test", home),
    "arc_challenge": lambda home: ARC("ARC-Challenge", "test", home),
    "mmlu": lambda home: MMLU("test", home),
    "gsm8k": lambda home: GSM8K("test", home),
}
NUM_EXAMPLES = 3  # of each task in result.json


def main(argv: list[str] | None = None) -> None:
    cfg = config.parse(Settings, PRESETS, argv, __doc__)
    has_gpu = cfg.device == "cuda" or (cfg.device is None and torch.cuda.is_available())
    rt = runtime.start(cfg.device, cfg.dtype or (None if has_gpu else "float32"))
    try:
        for stage in [cfg.stage] if cfg.stage else trained_stages(Home.find(cfg.home), cfg.tag):
            measure(replace(cfg, stage=stage), stage, rt)
    finally:
        runtime.close(rt)


def trained_stages(home: Home, tag: str) -> list[str]:
    stages = [stage for stage in STAGES if checkpoint.list_steps(home.checkpoints(tag, stage))]
    if not stages:
        raise errors.UserError(
            f"the run {tag!r} in {home.root} has no chat model", "train one with: bash speedrun.sh"
        )
    return stages


def open_tasks(names: str, trained: dict[str, Any], home: Home) -> dict[str, Task]:
    """The named tasks. auto: the hub's after a hub mixture, else the embedded corpus's held-out sets."""
    known = HUB_TASKS | {name: lambda home, task=task: task for name, task in heldout_tasks().items()}
    is_hub = trained.get("mixture", "cpu-demo") not in EMBEDDED
    auto = list(HUB_TASKS) if is_hub else list(heldout_tasks())
    chosen = auto if names == "auto" else list(dict.fromkeys(name.strip() for name in names.split(",")))
    unknown = [name for name in chosen if name not in known]
    if unknown:
        raise errors.UserError(
            f"there is no task {', '.join(map(repr, unknown))}", f"choose from: {', '.join(known)}"
        )
    return {name: known[name](home) for name in chosen}


def measure(cfg: Settings, stage_name: str, rt: runtime.Runtime) -> None:
    home, name = Home.find(cfg.home), f"chat_eval_{stage_name}"
    if stage_name not in (*STAGES, "base"):
        raise errors.UserError(f"--stage must be mid, sft or rl, found {stage_name!r}", "see --help")
    model, tok, found = models.load_model(home, cfg.tag, stage_name, rt=rt, step=cfg.step)
    tasks = open_tasks(cfg.tasks, found.meta.get("settings", {}), home)
    parent = [stage_name, found.meta.get("key"), found.step]
    inputs = {"tokenizer": tok.fingerprint(), "parent": parent}
    with open_stage(name, replace(cfg, tasks=",".join(tasks)), rt, inputs) as stage:
        if stage.finished:
            rt.say(f"{name}: already finished, ChatCORE {stage.finished['chatcore']:.4f}")
            return
        begun, engine = time.perf_counter(), Engine(model, tok)
        facts, examples = {}, {}
        rt.say(f"{name}: {'task':<16}{'accuracy':>9}   95 % interval    right of total   chance   seconds")
        for task_name, task in tasks.items():
            f, records = evaluate_task(
                task, engine, rt, max_problems=cfg.max_problems, max_tokens=cfg.max_tokens,
                batch_size=cfg.batch_size, temperature=cfg.temperature, seed=cfg.seed,
            )  # fmt: skip
            facts[task_name], examples[task_name] = f, records[:NUM_EXAMPLES]
            if rt.is_main:
                lines = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
                write_text(home.stage_dir(cfg.tag, name) / f"{task_name}.jsonl", lines)
            rt.say(f"{name}: {task_name:<16}{f['accuracy']:>9.1%}  {f['low']:>6.1%} -{f['high']:>6.1%}   "
                   f"{f['right']:>6} of {f['total']:<6}{f['chance']:>8.1%}{f['seconds']:>10.1f}")  # fmt: skip
        mean = chat_core(facts)
        rt.say(f"{name}: ChatCORE {mean:.4f}, mean of (accuracy - chance) / (1 - chance), {len(facts)} tasks")
        seconds = round(time.perf_counter() - begun, 2)
        stage.finish(parent=parent, chatcore=mean, tasks=facts, examples=examples, seconds=seconds)


if __name__ == "__main__":
    raise SystemExit(errors.run(main))
