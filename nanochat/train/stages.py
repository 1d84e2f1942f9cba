"""The runner of every training stage: base, mid, SFT, DPO and RL. The stages bring the parts."""

from __future__ import annotations

import itertools
import math
import resource
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from nanochat import checkpoint, hardware
from nanochat.config import StageSettings
from nanochat.data.loader import packing_facts
from nanochat.errors import INTERRUPTED_CODE, Interrupted
from nanochat.gpt import GPT
from nanochat.optim import MuonAdamW
from nanochat.protocols import Tokenizer
from nanochat.run_dir import Stage, open_stage
from nanochat.runtime import Runtime
from nanochat.train import speed
from nanochat.train.checkpointing import Saver, resume
from nanochat.train.hooks import Evaluate, evaluation, samples
from nanochat.train.log import MetricsLog, TrainLog, open_wandb
from nanochat.train.loop import Hook, Rates, TrainState, every, fit


@dataclass
class Training:
    """What makes one stage differ from another.

    Args:
        batches: the data's cursor (None: from the beginning) -> an iterator of micro-batches.
        accum: micro-batches per optimizer step on each rank.
        evaluate: see hooks.Evaluate.
        recipe: what later stages need to know of the base run; saved with every checkpoint.
        results: values for result.json, read when the stage ends.
        first_hooks: run after every step before everything else.
        prompts: continued whenever samples are due.
        speed: see nanochat.train.speed.
    """

    model: GPT
    tok: Tokenizer
    optimizer: MuonAdamW
    batches: Callable[[dict[str, Any] | None], Iterable[Any]]
    num_steps: int
    accum: int
    schedule: Callable[[int], Rates]
    evaluate: Evaluate
    recipe: dict[str, Any]
    results: dict[str, Any]
    allow_empty: bool = False
    first_hooks: Sequence[Hook] = ()
    prompts: Sequence[str] = ()
    speed: str = ""


def run_stage(
    name: str,
    settings: StageSettings,
    rt: Runtime,
    inputs: dict[str, Any],
    prepare: Callable[[], Training],
    result_shown: str,
) -> None:
    """Train one stage to its end, continuing where it stopped. Nothing is done if it is already finished.

    Args:
        settings: only the flags that all stages share are read; all are recorded.
        inputs: what the stage depends on (tokenizer, parent, data).
        prepare: makes the parts; called once the directory is locked and the stage is not finished.
        result_shown: the entry of result.json that is shown for a finished stage.
    """
    with open_stage(name, settings, rt, inputs) as stage:
        if stage.finished:
            rt.say(f"{name}: already finished, {result_shown} {stage.finished.get(result_shown)}")
            return
        train_stage(stage, settings, prepare())


def train_stage(stage: Stage, settings: StageSettings, parts: Training) -> None:
    """Train an opened stage and write its results.

    Order after every step: first_hooks, log, save, evaluate, sample. On resume, an evaluation that was
    interrupted is run again.
    """
    rt, model, state = stage.rt, parts.model, TrainState(num_steps=parts.num_steps)
    speed.apply(model, parts.speed, rt)
    resumed_from = resume(stage, settings.resume, model, parts.optimizer, state)
    state.num_steps = parts.num_steps
    state.metrics = MetricsLog(stage.metrics_file, state.step)

    flops_per_token = model.estimate_flops()
    peak_flops = hardware.peak_flops(rt.device, rt.dtype)
    if peak_flops is not None:
        peak_flops *= rt.world_size
    run_name = f"{stage.tag}-{stage.name}"
    wandb = open_wandb(settings.wandb, stage.directory, run_name, stage.settings, rt.is_main)
    log = TrainLog(
        state.metrics,
        stage.name,
        flops_per_token=flops_per_token,
        peak_flops=peak_flops,
        wandb=wandb,
        quiet=not rt.is_main,
    )
    saver = Saver(
        stage,
        model,
        parts.optimizer,
        save_every=settings.save_every,
        keep=settings.keep,
        resumed_from=resumed_from,
        meta={"model": vars(model.config), "recipe": parts.recipe},
    )
    validate = marking_the_best(evaluation(parts.evaluate, rt), stage)
    was_due = resumed_from is not None and settings.eval_every > 0 and state.step % settings.eval_every == 0
    if rt.any(was_due and rt.is_main and not state.metrics.evaluated(state.step)):
        validate(state)
    hooks: list[Hook] = [
        *parts.first_hooks,
        log,
        saver,
        every(settings.eval_every, validate),
        every(settings.sample_every, samples(model, parts.tok, parts.prompts, rt)),
    ]
    rows = parts.batches(state.cursor)
    try:
        fit(
            model,
            parts.optimizer,
            rows,
            num_steps=parts.num_steps,
            accum=parts.accum,
            schedule=parts.schedule,
            rt=rt,
            state=state,
            hooks=hooks,
            allow_empty=parts.allow_empty,
            overlap_gathers=speed.overlaps_gathers(parts.speed),
        )
    except Interrupted:
        stage.record_exit(INTERRUPTED_CODE, step=state.step)
        raise
    finally:
        log.close()
        if wandb is not None:
            wandb.finish()
        if hasattr(rows, "close"):
            rows.close()
    stage.finish(**run_results(state, flops_per_token, peak_flops), **parts.results)
    rt.say(f"{stage.name}: finished {state.step} steps, {state.tokens:,} tokens in {state.seconds:.0f} s")


def marking_the_best(validate: Hook, stage: Stage) -> Hook:
    """`validate`, then mark a step that was saved and is the best so far: it is kept from then on."""

    def hook(state: TrainState) -> None:
        validate(state)
        is_saved = stage.rt.is_main and state.step in checkpoint.list_steps(stage.checkpoints)
        if is_saved and math.isfinite(state.value):
            try:
                checkpoint.mark_best(stage.checkpoints, state.step, state.value)
            except checkpoint.SaveFailed as error:
                stage.rt.say(f"warning: {error}")

    return hook


def run_results(state: TrainState, flops_per_token: float, peak_flops: float | None) -> dict[str, Any]:
    """What result.json says about any training stage."""
    per_second = round(state.tokens / max(state.seconds, 1e-9), 1)
    return {
        "steps": state.step,
        "tokens": state.tokens,
        "train_seconds": round(state.seconds, 2),
        "skipped": state.skipped,
        "tokens_per_second": per_second,
        "peak_memory_bytes": peak_memory_bytes(),
        "peak_frac": None if peak_flops is None else per_second * flops_per_token / peak_flops,
        **packing_facts(state.cursor),
        "wait_frac": wait_frac(state.metrics.rows),
        **state.metrics.last_values(),
    }


def wait_frac(rows: list[dict[str, Any]]) -> float | None:
    """The share of the steps' time that was spent waiting for data, the first step of each start left out."""
    steps = [row for row in rows if "wait_seconds" in row]
    waits, totals = 0.0, 0.0
    for before, row in itertools.pairwise(steps):
        waits += row["wait_seconds"]
        totals += row["seconds"] - before["seconds"]
    return round(waits / totals, 6) if totals > 0 else None


def peak_memory_bytes() -> int:
    """The largest resident memory that this process has had."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    # macOS reports bytes, Linux kilobytes.
    return peak if sys.platform == "darwin" else peak * 1024
