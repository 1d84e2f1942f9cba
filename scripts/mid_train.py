"""Mid-training: the base model learns the chat format, multiple choice and tools, on every token.

python -m scripts.mid_train --preset=cpu-demo
"""

from __future__ import annotations

from dataclasses import dataclass

from nanochat import config, errors, runtime
from nanochat.config import StageSettings, setting
from nanochat.home import Home
from nanochat.optim.schedule import linear_to_zero, post_training_momentum
from nanochat.train.finetune import MID_RATES, Finetuning, find_parent, finetune
from nanochat.train.loop import Rates
from tasks.mixtures import mixture
from tasks.train_tasks import open_chosen


@dataclass(frozen=True)
class Settings(StageSettings):
    seed: int = setting(1, "seed of the mixture and its order")
    mixture: str = setting("speedrun", "which mixture: smoke, cpu-demo, single-gpu or speedrun")
    tasks: str | None = setting(
        None, "tasks for the mixture, such as 4xgsm8k,arc_easy (tasks/train_tasks.py)"
    )
    epochs: float = setting(1.0, "passes over the mixture")
    batch_tokens: int | None = setting(None, "tokens per optimizer step (default: the base run's)")
    device_batch: int = setting(32, "rows per forward pass on one device")
    lr_scale: float = setting(1.0, "factor on every learning rate")
    loss_on: str = setting("all", "all: every real token; assistant: assistant tokens only")
    borders: bool = setting(True, "conversations packed into one row do not see each other")


PRESETS = {
    "smoke": Settings(mixture="smoke", device_batch=4, eval_every=5, save_every=5),
    "cpu-demo": Settings(
        mixture="cpu-demo", device_batch=8, save_every=250, eval_every=250, loss_on="assistant"
    ),
    "single-gpu": Settings(mixture="single-gpu"),
    "speedrun": Settings(mixture="speedrun", device_batch=8),
}


def schedule(step: int, num_steps: int) -> Rates:
    """Constant for 80 % of the steps, then linear to zero."""
    return Rates(linear_to_zero(step, num_steps, 0.2), post_training_momentum(step, num_steps))


def main(argv: list[str] | None = None) -> None:
    cfg = config.parse(Settings, PRESETS, argv, __doc__)
    if cfg.loss_on not in ("all", "assistant"):
        problem = f"--loss-on must be all or assistant, found {cfg.loss_on!r}"
        raise errors.UserError(problem, "leave it out for all")
    rt = runtime.start(cfg.device, cfg.dtype)
    try:
        home = Home.find(cfg.home)
        plan = Finetuning(
            stage="mid",
            loss_on=cfg.loss_on,
            schedule=schedule,
            rates=MID_RATES,
            epochs=cfg.epochs,
            batch_tokens=cfg.batch_tokens,
            device_batch=cfg.device_batch,
            lr_scale=cfg.lr_scale,
            seed=cfg.seed,
            borders=cfg.borders,
        )
        chosen = open_chosen(cfg.tasks, home, cfg.seed) if cfg.tasks else None
        task = chosen or mixture("mid", cfg.mixture, cfg.seed, home=home)
        finetune(plan, cfg, rt, find_parent(home, cfg.tag, ["base"]), task)
    finally:
        runtime.close(rt)


if __name__ == "__main__":
    raise SystemExit(errors.run(main))
