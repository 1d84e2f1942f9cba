"""Supervised fine-tuning: assistant tokens only, whole conversations packed without seeing each other.

python -m scripts.chat_sft --preset=cpu-demo
python -m scripts.chat_sft --data=mine.jsonl --parent=imported:sft --tag=mine --batch-tokens=16384
python -m scripts.chat_sft --preset=single-gpu --tasks=4xgsm8k,arc_easy,hf:HuggingFaceTB/smoltalk:all
"""

from __future__ import annotations

from dataclasses import dataclass

from nanochat import config, errors, runtime
from nanochat.config import StageSettings, setting
from nanochat.home import Home
from nanochat.optim.schedule import linear_to_zero, post_training_momentum
from nanochat.train.finetune import Finetuning, find_parent, finetune, parse_parent
from nanochat.train.loop import Rates
from tasks.base import Task
from tasks.custom import CustomJSON
from tasks.mixtures import mixture
from tasks.train_tasks import open_chosen


@dataclass(frozen=True)
class Settings(StageSettings):
    seed: int = setting(1, "seed of the mixture and its order")
    mixture: str = setting("speedrun", "which mixture: smoke, cpu-demo, single-gpu or speedrun")
    tasks: str | None = setting(
        None, "tasks for the mixture, such as 4xgsm8k,arc_easy (tasks/train_tasks.py)"
    )
    data: str | None = setting(None, "your own conversations (JSONL, see tasks/custom.py) for the mixture")
    parent: str | None = setting(
        None, "STAGE or TAG:STAGE to start from (default: this run's mid, else base)"
    )
    lora_rank: int = setting(0, "train adapters of this rank only, for a small GPU (0: all weights)")
    lora_lr: float = setting(0.001, "learning rate of adapters")
    epochs: float = setting(1.0, "passes over the mixture")
    batch_tokens: int | None = setting(None, "tokens per optimizer step (default: the base run's)")
    device_batch: int = setting(32, "rows per forward pass on one device")
    lr_scale: float = setting(0.8, "factor on every learning rate")
    fresh_optimizer: bool = setting(False, "start with empty moments instead of the parent's")
    borders: bool = setting(True, "conversations packed into one row do not see each other")


PRESETS = {
    "smoke": Settings(mixture="smoke", device_batch=4, eval_every=5, save_every=5),
    "cpu-demo": Settings(mixture="cpu-demo", device_batch=8, save_every=250, eval_every=250),
    "single-gpu": Settings(mixture="single-gpu"),
    "speedrun": Settings(mixture="speedrun", device_batch=8),
}


def schedule(step: int, num_steps: int) -> Rates:
    """Constant for half of the steps, then linear to zero."""
    return Rates(linear_to_zero(step, num_steps, 0.5), post_training_momentum(step, num_steps))


def main(argv: list[str] | None = None) -> None:
    cfg = config.parse(Settings, PRESETS, argv, __doc__)
    if cfg.parent == "sft":
        raise errors.UserError("a stage cannot be its own parent", "name another run: --parent=TAG:sft")
    if cfg.data and cfg.tasks:
        raise errors.UserError("--data and --tasks exclude each other", "name the file among the --tasks")
    rt = runtime.start(cfg.device, cfg.dtype)
    try:
        home = Home.find(cfg.home)
        plan = Finetuning(
            stage="sft",
            loss_on="assistant",
            schedule=schedule,
            rates={},
            epochs=cfg.epochs,
            batch_tokens=cfg.batch_tokens,
            device_batch=cfg.device_batch,
            lr_scale=cfg.lr_scale,
            seed=cfg.seed,
            keep_moments=not cfg.fresh_optimizer,
            borders=cfg.borders,
            lora_rank=cfg.lora_rank,
            lora_lr=cfg.lora_lr,
        )
        parent = find_parent(home, *parse_parent(cfg.parent, cfg.tag, ["mid", "base"]))
        finetune(plan, cfg, rt, parent, open_conversations(cfg, home))
    finally:
        runtime.close(rt)


def open_conversations(cfg: Settings, home: Home) -> Task:
    if cfg.data:
        return CustomJSON(cfg.data)
    if cfg.tasks:
        return open_chosen(cfg.tasks, home, cfg.seed)
    return mixture("sft", cfg.mixture, cfg.seed, home=home)


if __name__ == "__main__":
    raise SystemExit(errors.run(main))
