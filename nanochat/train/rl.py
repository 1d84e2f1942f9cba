"""Reinforcement learning from a parent checkpoint: the stage, its metrics and its evaluation."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from nanochat.config import StageSettings
from nanochat.engine import Engine
from nanochat.eval.chat import evaluate_task
from nanochat.optim.schedule import linear_to_zero
from nanochat.runtime import Runtime
from nanochat.train.finetune import MID_RATES, Parent
from nanochat.train.loop import Rates, TrainState
from nanochat.train.rollout import Rewarded, Rollouts, RoundPlan
from nanochat.train.stages import Training, run_stage

MOMENTUM = 0.95
LAST_ROUNDS = 10  # whose mean reward result.json holds


@dataclass(frozen=True)
class Reinforcement:
    """How the stage "rl" trains.

    Args:
        round_plan: what a round of answers is.
        num_steps: optimizer steps; None follows from the epochs over the questions.
        keep_reference: keep the parent's weights and record the distance from them.
        eval_problems, eval_samples: held-out questions per task, and sampled answers to each for pass@k.
    """

    round_plan: RoundPlan
    num_steps: int | None
    epochs: float
    lr_scale: float
    keep_reference: bool
    eval_problems: int
    eval_samples: int


def reinforce(
    plan: Reinforcement,
    settings: StageSettings,
    rt: Runtime,
    parent: Parent,
    task: Rewarded,
    held_out: Mapping[str, Any],
) -> None:
    """Train the stage "rl" on `task`; measure it on `held_out`. settings: see stages.run_stage."""

    def prepare() -> Training:
        return prepare_reinforcement(plan, settings.eval_every > 0, rt, parent, task, held_out)

    run_stage("rl", settings, rt, parent.inputs, prepare, result_shown="accuracy")


def prepare_reinforcement(
    plan: Reinforcement,
    has_evaluation: bool,
    rt: Runtime,
    parent: Parent,
    task: Rewarded,
    held_out: Mapping[str, Any],
) -> Training:
    """Model, optimizer, rollouts and evaluation of the stage."""
    round_plan = plan.round_plan
    model = parent.build_model(rt)
    reference = parent.build_model(rt) if plan.keep_reference or round_plan.kl > 0 else None
    engine = Engine(model, parent.tok)
    questions_per_step = round_plan.questions / round_plan.updates
    num_steps = plan.num_steps or max(1, round(len(task) * plan.epochs / questions_per_step))

    start = time.perf_counter()
    before = measure(plan, engine, held_out, rt) if has_evaluation else {}
    seconds = round(time.perf_counter() - start, 3)
    answers = f"{round_plan.questions} x {round_plan.samples} answers"
    rt.say(f"rl: {len(task):,} questions, {num_steps} steps of {answers}")
    rt.say(f"rl: before {before} ({seconds:.1f} s)")
    results: dict[str, Any] = {"parent": parent.name, "before": before, "num_questions": len(task)}

    # The rollouts of the run, made by `batches` and read by the hook.
    rollouts: list[Rollouts] = []

    def batches(cursor: dict[str, Any] | None) -> Rollouts:
        rollouts[:] = [Rollouts(engine, task, round_plan, rt, reference=reference, cursor=cursor)]
        return rollouts[0]

    def record(state: TrainState) -> None:
        """Write the results of the round; after the last step, the mean reward of the last rounds."""
        if state.step == 1 and before:
            state.metrics.write(step=0, eval_seconds=seconds, **before)
        state.metrics.write(
            step=state.step, **{name: rounded(value) for name, value in rollouts[0].results.items()}
        )
        if state.step == num_steps and rt.is_main:
            rewards = [row["reward"] for row in state.metrics.rows if "reward" in row][-LAST_ROUNDS:]
            results["reward"] = sum(rewards) / max(len(rewards), 1)

    def evaluate() -> tuple[float, dict[str, float]]:
        found = measure(plan, engine, held_out, rt)
        return 1.0 - found["accuracy"], found

    return Training(
        model=model,
        tok=parent.tok,
        optimizer=parent.build_optimizer(model, plan.lr_scale, smear_scale=plan.lr_scale, **MID_RATES),
        batches=batches,
        num_steps=num_steps,
        accum=round_plan.accum(rt.world_size),
        schedule=lambda step: Rates(linear_to_zero(step, num_steps), MOMENTUM),
        evaluate=evaluate,
        recipe=parent.recipe,
        results=results,
        allow_empty=True,
        first_hooks=[record],
    )


def measure(
    plan: Reinforcement, engine: Engine, held_out: Mapping[str, Any], rt: Runtime
) -> dict[str, float]:
    """Greedy accuracy on each held-out task and their mean; pass@k of sampled answers."""
    options: dict[str, Any] = {
        "max_problems": plan.eval_problems,
        "max_tokens": plan.round_plan.max_tokens,
        "batch_size": plan.round_plan.engine_batch,
        "seed": plan.round_plan.seed,
    }
    found: dict[str, float] = {}
    for name, task in held_out.items():
        greedy, _ = evaluate_task(task, engine, rt, **options)
        found[f"accuracy_{name}"] = greedy["accuracy"]
        if plan.eval_samples > 1:
            sampled, _ = evaluate_task(
                task, engine, rt, temperature=1.0, num_samples=plan.eval_samples, **options
            )
            for k, share in sampled["pass_at"].items():
                found[f"pass_at_{k}_{name}"] = share
    mean = sum(found[f"accuracy_{name}"] for name in held_out) / len(held_out)
    return {"accuracy": mean} | {name: rounded(value) for name, value in found.items()}


def rounded(value: float) -> float:
    """To the six digits that metrics.jsonl holds."""
    return round(value, 6)
