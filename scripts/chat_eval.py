"""Measure the chat models: accuracy on held-out tasks, with 95 % intervals, and their mean centred on chance.

python -m scripts.chat_eval --preset=cpu-demo
python -m scripts.chat_eval --stage=sft --tasks=gsm8k,arc_easy --max-problems=100
python -m scripts.chat_eval --tasks=humaneval --temperature=0.8 --num-samples=10
"""

from __future__ import annotations

import json
import time
from dataclasses import dataclass, replace

import torch

from nanochat import checkpoint, config, errors, runtime
from nanochat import load as models
from nanochat.config import DeviceSettings, setting
from nanochat.engine import Engine
from nanochat.eval.chat import chat_core, evaluate_task
from nanochat.home import Home, write_text
from nanochat.run_dir import open_stage
from tasks.eval_tasks import add_sandbox, open_tasks


@dataclass(frozen=True)
class Settings(DeviceSettings):
    seed: int = setting(1, "seed of the sampler, where the temperature is not 0")
    stage: str | None = setting(None, "mid, sft, dpo or rl (default: each one that has been trained)")
    step: int | None = setting(None, "checkpoint to measure (default: the newest)")
    tasks: str = setting("auto", "comma-separated names; auto: what fits the data the model was trained on")
    max_problems: int | None = setting(None, "examples per task (default: all)")
    max_tokens: int = setting(512, "tokens of an answer at most")
    temperature: float = setting(0.0, "0 is always the likeliest token")
    num_samples: int = setting(1, "answers to a question that is answered freely; more give pass@k")
    unsafe_no_sandbox: bool = setting(False, "run model-written code even where no sandbox can be had")
    batch_size: int = setting(64, "answers written at a time on one device")
    dtype: str | None = setting(None, "float32, bfloat16 or float16 (default: float32 on a CPU)")


PRESETS = {
    "smoke": Settings(max_problems=4, max_tokens=8),
    "cpu-demo": Settings(max_tokens=128, batch_size=256),
    "single-gpu": Settings(),
    "speedrun": Settings(),
}
STAGES = ("mid", "sft", "dpo", "rl")
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


def measure(cfg: Settings, stage_name: str, rt: runtime.Runtime) -> None:
    home, name = Home.find(cfg.home), f"chat_eval_{stage_name}"
    if stage_name not in (*STAGES, "base"):
        raise errors.UserError(f"--stage must be mid, sft, dpo or rl, found {stage_name!r}", "see --help")
    model, tok, found = models.load_model(home, cfg.tag, stage_name, rt=rt, step=cfg.step)
    if cfg.num_samples > 1 and cfg.temperature == 0:
        raise errors.UserError(
            "several samples at temperature 0 are all the same", "add --temperature=0.8, for example"
        )
    tasks = open_tasks(cfg.tasks, found.meta.get("settings", {}), home)
    left_out = add_sandbox(tasks, cfg.tasks == "auto", cfg.unsafe_no_sandbox, rt.say)
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
                num_samples=cfg.num_samples,
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
        stage.finish(
            parent=parent, chatcore=mean, tasks=facts, left_out=left_out, examples=examples, seconds=seconds
        )


if __name__ == "__main__":
    raise SystemExit(errors.run(main))
