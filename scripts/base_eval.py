"""Measure the base model: bits per byte on the validation split, samples, and CORE where its data is present.

python -m scripts.base_eval --preset=cpu-demo
torchrun --standalone --nproc_per_node=8 -m scripts.base_eval --preset=speedrun
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from nanochat import config, errors, runtime
from nanochat import load as models
from nanochat.config import DeviceSettings, HubSettings, setting
from nanochat.data.loader import validation_batches
from nanochat.data.sources import open_source
from nanochat.engine import Engine
from nanochat.engine.detokenizer import answer_of
from nanochat.eval import core
from nanochat.eval.bpb import evaluate_bpb
from nanochat.home import Home
from nanochat.progress import Bar
from nanochat.protocols import Model, Tokenizer
from nanochat.run_dir import open_stage


@dataclass(frozen=True)
class Settings(HubSettings, DeviceSettings):
    seed: int | None = setting(None, "seed of the validation documents (default: the base run's)")
    step: int | None = setting(None, "checkpoint to measure (default: the newest)")
    data: str | None = setting(None, "source of the validation documents (default: the base run's)")
    eval_tokens: int = setting(80 * 524288, "validation tokens")
    device_batch: int = setting(32, "rows per forward pass on one device")
    max_per_task: int | None = setting(None, "CORE: examples per task (default: all; 0: no CORE)")
    sample_tokens: int = setting(48, "tokens of each sample (0: no samples)")


PRESETS = {
    "smoke": Settings(eval_tokens=4096, device_batch=8, max_per_task=0, sample_tokens=8, offline=True),
    "cpu-demo": Settings(eval_tokens=262144, max_per_task=20, offline=True),
    "single-gpu": Settings(),
    "speedrun": Settings(device_batch=8),
}
PROMPTS = (
    "The capital of France is",
    "The chemical symbol of gold is",
    "If yesterday was Friday, then tomorrow will be",
    "The opposite of hot is",
    "The planets of the solar system are:",
    "My favourite colour is",
    "Once upon a time",
    "12 + 30 =",
)


def main(argv: list[str] | None = None) -> None:
    cfg = config.parse(Settings, PRESETS, argv, __doc__)
    rt = runtime.start(cfg.device, cfg.dtype)
    try:
        measure(cfg, rt)
    finally:
        runtime.close(rt)


def measure(cfg: Settings, rt: runtime.Runtime) -> None:
    home = Home.find(cfg.home)
    model, tok, found = models.load_model(home, cfg.tag, "base", rt=rt, step=cfg.step)
    trained: dict[str, Any] = found.meta.get("settings", {})
    data = cfg.data or trained.get("data")
    if data is None:
        raise errors.UserError(
            "the checkpoint does not say which data it was trained on", "name the validation data: --data=..."
        )
    seed = cfg.seed if cfg.seed is not None else trained.get("seed", 1)
    source = open_source(
        data, home=home, seed=seed, mirror=cfg.mirror or trained.get("mirror"), offline=cfg.offline
    )
    tasks, missing, note = core.find_tasks(
        home, rt, max_per_task=cfg.max_per_task, mirror=cfg.mirror, offline=cfg.offline
    )
    parent = ["base", found.meta.get("key"), found.step]
    inputs: dict[str, Any] = {"tokenizer": tok.fingerprint(), "parent": parent, "data": source.fingerprint()}
    inputs["core"] = core.fingerprint(tasks) if tasks else None
    with open_stage("base_eval", cfg, rt, inputs) as stage:
        if stage.finished:
            rt.say(f"base_eval: already finished, bits per byte {stage.finished['val_bpb']}")
            return
        begun, T = time.perf_counter(), model.config.sequence_len
        num_rows = max(1, cfg.eval_tokens // T)
        rows = validation_batches(
            source, tok, sequence_len=T, device_batch=cfg.device_batch, rt=rt, num_rows=num_rows
        )
        bpb = evaluate_bpb(model, rows, tok.token_bytes(), rt)
        rt.say(f"base_eval: bits per byte {bpb:.5f} on {rows.num_rows:,} validation rows of {T} tokens")
        samples = continuations(model, tok, cfg.sample_tokens) if rt.is_main and cfg.sample_tokens else []
        rt.say("\n".join(f"  | {prompt}{text}" for prompt, text in samples))
        facts: dict[str, Any] = {"core": None, "tasks": {}}
        if tasks:
            cache = core.cache_file(home, found.records, tok, rt.dtype)
            how: dict[str, Any] = {"max_per_task": cfg.max_per_task, "say": rt.say, "cache": cache}
            facts = core.evaluate_core(tasks, model, tok, rt, progress=bars(rt), **how)
            rt.say(
                f"base_eval: CORE {facts['core']:.4f} over {len(tasks)} tasks{f'; {note}' if note else ''}"
            )
        else:
            rt.say(f"CORE not run: {note}")
        stage.finish(
            parent=parent, val_bpb=bpb if math.isfinite(bpb) else None, val_rows=rows.num_rows,
            samples=samples, core=facts["core"], core_note=note, core_tasks=facts["tasks"],
            core_missing=missing, core_references=core.references(home.eval_bundle_dir) if tasks else {},
            seconds=round(time.perf_counter() - begun, 2),
        )  # fmt: skip


def bars(rt: runtime.Runtime) -> Callable[[str, int, int], None]:
    """A live bar for each task on a terminal; elsewhere the line of each task must do."""
    shown: dict[str, Bar] = {}

    def show(name: str, done: int, of: int) -> None:
        if rt.is_main and sys.stdout.isatty():
            shown.setdefault(name, Bar(name, of)).show(done, f"{done:,} of {of:,}")
            if done >= of:
                shown[name].close()

    return show


def continuations(model: Model, tok: Tokenizer, num_tokens: int) -> list[tuple[str, str]]:
    """(prompt, greedy continuation) of PROMPTS."""
    ids = [tok.encode(prompt, prepend=tok.get_bos_token_id()) for prompt in PROMPTS]
    room = [i for i, row in enumerate(ids) if len(row) < model.config.sequence_len]
    done = Engine(model, tok).complete([ids[i] for i in room], max_tokens=num_tokens, temperature=0.0)
    return [(PROMPTS[i], answer_of(one.ids, tok)) for i, one in zip(room, done, strict=True)]


if __name__ == "__main__":
    raise SystemExit(errors.run(main))
