"""Reinforcement learning on a task with a reward: answers by the engine, policy gradient within groups.

python -m scripts.chat_rl --preset=cpu-demo
python -m scripts.chat_rl --task=gsm8k --updates=2 --clip=0.2 --kl=0.01
"""

from __future__ import annotations

from dataclasses import dataclass

from nanochat import config, errors, runtime
from nanochat.config import StageSettings, setting
from nanochat.home import Home
from nanochat.train.finetune import find_parent
from nanochat.train.rl import Reinforcement, reinforce
from nanochat.train.rollout import RoundPlan
from tasks.reinforce import goal


@dataclass(frozen=True)
class Settings(StageSettings):
    seed: int = setting(1, "seed of the questions, their order and the answers")
    task: str = setting("gsm8k", "what is rewarded: arithmetic, stories, letters, numbers, gsm8k or mbpp")
    size: int = setting(4000, "questions made for a task of the embedded corpus")
    epochs: float = setting(1.0, "passes over the questions")
    steps: int | None = setting(None, "optimizer steps (default: from the epochs)")
    questions: int = setting(16, "questions per round, over all devices")
    samples: int = setting(16, "answers per question")
    max_tokens: int = setting(256, "tokens of an answer at most")
    device_batch: int = setting(8, "answers per forward and backward pass on one device")
    engine_batch: int = setting(256, "answers written at a time on one device")
    updates: int = setting(1, "optimizer steps per round of answers")
    clip: float = setting(0.0, "limit of the change of a token's probability within a round (0: none)")
    kl: float = setting(0.0, "weight of the distance from the parent, in nats (0: none)")
    reference: bool = setting(True, "keep the parent's weights and record the distance (KL) from them")
    by_std: bool = setting(False, "divide advantages by the group's standard deviation")
    refill: int = setting(0, "rounds of more questions at most, to replace groups of equal rewards")
    lr_scale: float = setting(0.05, "factor on every learning rate of mid-training")
    eval_every: int = setting(60, "optimizer steps between evaluations (0: never)", in_key=False)
    eval_problems: int = setting(400, "held-out questions per evaluation and task")
    eval_samples: int = setting(8, "sampled answers to each of them, for pass@k (0: only the greedy one)")
    save_every: int = setting(60, "optimizer steps between checkpoints (0: only the last)", in_key=False)


PRESETS = {
    "smoke": Settings(task="arithmetic", steps=4, questions=2, samples=4, max_tokens=8, eval_every=2,
                      eval_problems=4, eval_samples=2, save_every=2),
    "cpu-demo": Settings(task="numbers", steps=100, questions=8, max_tokens=40, device_batch=64, lr_scale=0.1,
                         eval_every=50, eval_problems=200, eval_samples=0, save_every=50),
    "single-gpu": Settings(device_batch=32),
    "speedrun": Settings(),
}  # fmt: skip


def main(argv: list[str] | None = None) -> None:
    cfg = config.parse(Settings, PRESETS, argv, __doc__)
    plan = make_plan(cfg)
    rt = runtime.start(cfg.device, cfg.dtype)
    try:
        home = Home.find(cfg.home)
        aim = goal(cfg.task, size=cfg.size, seed=cfg.seed, home=home)
        parent = find_parent(home, cfg.tag, ["dpo", "sft", "mid"])
        reinforce(plan, cfg, rt, parent, aim.train, dict(aim.held_out))
    finally:
        runtime.close(rt)


def make_plan(cfg: Settings) -> Reinforcement:
    try:
        round_plan = RoundPlan(
            questions=cfg.questions,
            samples=cfg.samples,
            max_tokens=cfg.max_tokens,
            device_batch=cfg.device_batch,
            updates=cfg.updates,
            clip=cfg.clip,
            kl=cfg.kl,
            by_std=cfg.by_std,
            refill=cfg.refill,
            engine_batch=cfg.engine_batch,
            seed=cfg.seed,
        )
    except ValueError as error:
        raise errors.UserError(str(error), "see --help") from error
    return Reinforcement(
        round_plan,
        num_steps=cfg.steps,
        epochs=cfg.epochs,
        lr_scale=cfg.lr_scale,
        keep_reference=cfg.reference,
        eval_problems=cfg.eval_problems,
        eval_samples=cfg.eval_samples,
    )


if __name__ == "__main__":
    raise SystemExit(errors.run(main))
