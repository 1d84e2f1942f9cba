"""Reinforcement learning from a parent checkpoint: the stage, its metrics and its evaluation."""

from __future__ import annotations

import time
from typing import Any

from nanochat.engine import Engine
from nanochat.errors import UserError
from nanochat.eval.chat import evaluate_task
from nanochat.gpt import GPTConfig
from nanochat.load import build
from nanochat.optim.schedule import linear_to_zero
from nanochat.run_dir import open_stage
from nanochat.runtime import Runtime
from nanochat.train.checkpointing import load_model_arrays
from nanochat.train.finetune import next_optimizer, parent_arrays, start_from
from nanochat.train.hooks import samples
from nanochat.train.loop import Rates, TrainState
from nanochat.train.rollout import Rewarded, Rollouts, RoundPlan
from nanochat.train.stages import run_stage

RATES = {"wte_lr": 0.2, "lm_head_lr": 0.004, "matrix_lr": 0.02}  # mid-training's
MOMENTUM = 0.95
LAST_ROUNDS = 10  # whose mean reward result.json holds


def plan_of(cfg: Any) -> RoundPlan:
    """The round that the settings ask for. Raises UserError for counts that make none."""
    try:
        return RoundPlan(
            cfg.questions, cfg.samples, cfg.max_tokens, cfg.device_batch, cfg.updates, cfg.clip, cfg.kl,
            cfg.by_std, cfg.refill, cfg.engine_batch, cfg.seed,
        )  # fmt: skip
    except ValueError as error:
        raise UserError(str(error), "see --help") from error


def reinforce(cfg: Any, rt: Runtime, task: Rewarded, held_out: dict[str, Any]) -> None:
    """Train the stage "rl" on `task` from the newest SFT (or mid) checkpoint; measure it on `held_out`."""
    plan = plan_of(cfg)
    tok, parent, inputs = start_from(cfg, ("dpo", "sft", "mid"))
    with open_stage("rl", cfg, rt, inputs) as stage:
        if stage.finished:
            rt.say(f"rl: already finished, accuracy {stage.finished.get('accuracy')}")
            return
        base, shape = parent.meta["recipe"], GPTConfig(**parent.meta["model"])
        model, reference = build(shape, rt), build(shape, rt) if cfg.reference or cfg.kl > 0 else None
        for each in (model, reference):
            if each is not None:
                load_model_arrays(each, parent_arrays(parent))
        optimizer = next_optimizer(model, base, cfg.lr_scale, smear_scale=cfg.lr_scale, **RATES)
        engine = Engine(model, tok)
        per_step = cfg.questions / cfg.updates
        num_steps = cfg.steps or max(1, round(len(task) * cfg.epochs / per_step))
        current: list[Rollouts] = []

        def batches(cursor: dict[str, Any] | None) -> Rollouts:
            current[:] = [Rollouts(engine, task, plan, rt, reference=reference, cursor=cursor)]
            return current[0]

        begun = time.perf_counter()
        before = measure(cfg, engine, held_out, rt) if cfg.eval_every else {}
        rt.say(f"rl: {len(task):,} questions, {num_steps} steps of {cfg.questions} x {cfg.samples} answers")
        rt.say(f"rl: before {before} ({time.perf_counter() - begun:.1f} s)")

        result = {"parent": inputs["parent"], "before": before, "num_questions": len(task)}

        def record(state: TrainState) -> None:
            if state.step == 1 and before:
                state.metrics.write(step=0, eval_seconds=round(time.perf_counter() - begun, 3), **before)
            facts = {key: round(value, 6) for key, value in current[0].facts.items()}
            state.metrics.write(step=state.step, **facts)
            if state.step == num_steps and rt.is_main:
                rewards = [row["reward"] for row in state.metrics.rows if "reward" in row][-LAST_ROUNDS:]
                result["reward"] = sum(rewards) / max(len(rewards), 1)

        def evaluate(state: TrainState) -> None:
            start = time.perf_counter()
            found = measure(cfg, engine, held_out, rt)
            state.value = 1.0 - found["accuracy"]
            state.best = state.value if state.best is None else min(state.best, state.value)
            state.metrics.write(step=state.step, eval_seconds=round(time.perf_counter() - start, 3), **found)
            facts = current[0].facts if current else {}
            rt.say(f"step {state.step}: {found}, reward {facts.get('reward', float('nan')):.3f}, "
                   f"KL {facts.get('kl', float('nan')):.4f}")  # fmt: skip

        run_stage(
            stage, cfg, model, optimizer, batches, num_steps=num_steps, accum=plan.accum(rt.world_size),
            schedule=lambda step: Rates(linear_to_zero(step, num_steps), MOMENTUM),
            evaluate=evaluate, sample=samples(model, tok, (), rt), flops_per_token=model.estimate_flops(),
            recipe=base, allow_empty=True, first=[record],
            result=result,
        )  # fmt: skip


def measure(cfg: Any, engine: Engine, held_out: dict[str, Any], rt: Runtime) -> dict[str, float]:
    """Greedy accuracy on each held-out task and their mean; pass@k of sampled answers."""
    found: dict[str, float] = {}
    for name, task in held_out.items():
        how: dict[str, Any] = {"max_problems": cfg.eval_problems, "max_tokens": cfg.max_tokens}
        how |= {"batch_size": cfg.engine_batch, "seed": cfg.seed}
        found[f"accuracy_{name}"] = evaluate_task(task, engine, rt, **how)[0]["accuracy"]
        if cfg.eval_samples > 1:
            facts, _ = evaluate_task(task, engine, rt, temperature=1.0, num_samples=cfg.eval_samples, **how)
            found |= {f"pass_at_{k}_{name}": share for k, share in facts["pass_at"].items()}
    mean = sum(found[f"accuracy_{name}"] for name in held_out) / len(held_out)
    return {"accuracy": mean} | {key: round(value, 6) for key, value in found.items()}
