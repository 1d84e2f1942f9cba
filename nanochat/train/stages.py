"""A training stage from its parts: resume, log, evaluate, save, fit, result. The scripts bring the parts."""

from __future__ import annotations

import itertools
import math
import resource
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from nanochat import checkpoint, hardware
from nanochat.data.loader import packing_facts
from nanochat.errors import INTERRUPTED_CODE, Interrupted
from nanochat.home import write_json
from nanochat.run_dir import Saver, Stage, resume
from nanochat.train import speed
from nanochat.train.log import Metrics, TrainLog, open_wandb
from nanochat.train.loop import Hook, Rates, TrainState, every, fit


def run_stage(
    stage: Stage,
    cfg: Any,
    model: Any,
    optimizer: Any,
    batches: Callable[[dict[str, Any] | None], Iterable[Any]],
    *,
    num_steps: int,
    accum: int,
    schedule: Callable[[int], Rates],
    evaluate: Hook,
    sample: Hook,
    flops_per_token: float,
    recipe: dict[str, Any],
    allow_empty: bool = False,
    first: Sequence[Hook] = (),
    result: dict[str, Any],
) -> TrainState:
    """Train one stage to its end, continuing where it stopped, and write its facts.

    Order after every step: `first`, log, save, evaluate, sample. An evaluation that a stop swallowed
    is made up for.
    """
    rt, state = stage.rt, TrainState()
    speed.apply(model, getattr(cfg, "speed", ""), rt)
    resumed_from = resume(stage, cfg.resume, model, optimizer, state)
    state.metrics = Metrics(stage.metrics_file, state.step)
    peak = hardware.peak_flops(rt.device, rt.dtype)
    peak_all = None if peak is None else peak * rt.world_size
    wandb = open_wandb(
        cfg.wandb,
        stage.home.stage_dir(stage.tag, stage.name),
        f"{stage.tag}-{stage.name}",
        stage.settings,
        rt.is_main,
    )
    log = TrainLog(
        state.metrics,
        stage.name,
        flops_per_token=flops_per_token,
        peak_flops=peak_all,
        wandb=wandb,
        quiet=not rt.is_main,
    )
    saver = Saver(
        stage,
        cfg.save_every,
        model,
        optimizer,
        keep=cfg.keep,
        resumed_from=resumed_from,
        meta={"model": vars(model.config), "recipe": recipe},
    )

    def validate(state: TrainState) -> None:
        """Evaluate; a step that was saved and is the best so far is marked, and kept from then on."""
        evaluate(state)
        value, root = state.value, stage.checkpoints
        if rt.is_main and math.isfinite(value) and state.step in checkpoint.list_steps(root):
            try:
                checkpoint.mark_best(root, state.step, value)
            except checkpoint.SaveFailed as error:
                rt.say(f"warning: {error}")

    due = resumed_from is not None and cfg.eval_every > 0 and state.step % cfg.eval_every == 0
    state.num_steps = num_steps
    if rt.any(due and rt.is_main and not state.metrics.evaluated(state.step)):
        validate(state)
    rows = batches(state.cursor)
    try:
        fit(
            model, optimizer, rows, num_steps=num_steps, accum=accum, schedule=schedule, rt=rt, state=state,
            hooks=[*first, log, saver, every(cfg.eval_every, validate), every(cfg.sample_every, sample)],
            allow_empty=allow_empty,
        )  # fmt: skip
    except Interrupted:
        if rt.is_main:
            write_json(
                stage.home.exit_file(stage.tag, stage.name), {"code": INTERRUPTED_CODE, "step": state.step}
            )
        raise
    finally:
        log.close()
        if wandb is not None:
            wandb.finish()
        if hasattr(rows, "close"):
            rows.close()
    per_second = round(state.tokens / max(state.seconds, 1e-9), 1)
    facts = {
        "steps": state.step,
        "tokens": state.tokens,
        "train_seconds": round(state.seconds, 2),
        "skipped": state.skipped,
        "tokens_per_second": per_second,
        "peak_memory_bytes": peak_memory_bytes(),
        "peak_frac": None if peak_all is None else per_second * flops_per_token / peak_all,
    }
    facts |= packing_facts(state.cursor) | {"wait_frac": wait_frac(state.metrics.rows)}
    stage.finish(**facts, **state.metrics.last_values(), **result)
    rt.say(f"{stage.name}: finished {state.step} steps, {state.tokens:,} tokens in {state.seconds:.0f} s")
    return state


def wait_frac(rows: list[dict[str, Any]]) -> float | None:
    """The share of the steps' time that was spent waiting for data, the first step of each start left out."""
    waits = [row for row in rows if "wait_seconds" in row]
    pairs = [(b["wait_seconds"], b["seconds"] - a["seconds"]) for a, b in itertools.pairwise(waits)]
    total = sum(seconds for _, seconds in pairs)
    return round(sum(wait for wait, _ in pairs) / total, 6) if total > 0 else None


def peak_memory_bytes() -> int:
    """The largest resident memory this process has had."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
