"""Mid-training: the base model learns the chat format, multiple choice and tools, on every token.

python -m scripts.mid_train --preset=cpu-demo
"""

from __future__ import annotations

from dataclasses import dataclass

from nanochat import config, errors, runtime
from nanochat.config import setting
from nanochat.home import Home
from nanochat.optim.schedule import linear_to_zero, post_training_momentum
from nanochat.train.finetune import Recipe, tune
from nanochat.train.loop import Rates
from tasks.mixtures import mixture
from tasks.train_tasks import open_chosen


@dataclass(frozen=True)
class Settings:
    home: str | None = setting(None, "directory of all runs (default: NANOCHAT_HOME, else the user's cache)")
    tag: str = setting("main", "name of the run")
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
    device: str | None = setting(None, "cpu, cuda or mps (default: what there is)")
    dtype: str | None = setting(None, "float32, bfloat16 or float16 (default: bfloat16 where fast)")
    eval_every: int = setting(150, "optimizer steps between validations (0: never)")
    sample_every: int = setting(0, "optimizer steps between samples (0: never)")
    save_every: int = setting(1000, "optimizer steps between checkpoints (0: only the last)")
    keep: int = setting(2, "newest checkpoints to keep")
    resume: str = setting("auto", "auto, never, or a step")
    wandb: str = setting("off", "off, offline or online")


PRESETS = {
    "smoke": Settings(mixture="smoke", device_batch=4, eval_every=5, save_every=5),
    "cpu-demo": Settings(
        mixture="cpu-demo", device_batch=8, save_every=250, eval_every=250, loss_on="assistant"
    ),
    "single-gpu": Settings(mixture="single-gpu"),
    "speedrun": Settings(mixture="speedrun", device_batch=8),
}
RATES = {"wte_lr": 0.2, "lm_head_lr": 0.004, "matrix_lr": 0.02}


def schedule(step: int, num_steps: int) -> Rates:
    """Constant for 80 % of the steps, then linear to zero."""
    return Rates(linear_to_zero(step, num_steps, 0.2), post_training_momentum(step, num_steps))


def main(argv: list[str] | None = None) -> None:
    cfg = config.parse(Settings, PRESETS, argv, __doc__)
    if cfg.loss_on not in ("all", "assistant"):
        raise errors.UserError(
            f"--loss-on must be all or assistant, found {cfg.loss_on!r}", "leave it out for all"
        )
    rt = runtime.start(cfg.device, cfg.dtype)
    try:
        recipe = Recipe("mid", ("base",), cfg.loss_on, warm_optimizer=False, schedule=schedule, rates=RATES)
        home = Home.find(cfg.home)
        chosen = open_chosen(cfg.tasks, home, cfg.seed) if cfg.tasks else None
        tune(recipe, cfg, rt, chosen or mixture("mid", cfg.mixture, cfg.seed, home=home))
    finally:
        runtime.close(rt)


if __name__ == "__main__":
    raise SystemExit(errors.run(main))
