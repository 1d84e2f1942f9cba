"""Learn from preference pairs (a JSONL file; tasks/preferences.py shows a line) by DPO.

python -m scripts.chat_dpo --data=pairs.jsonl --preset=cpu-demo
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from nanochat import config, errors, runtime
from nanochat.config import StageSettings, setting
from nanochat.home import Home
from nanochat.train.dpo import Preference, prefer
from nanochat.train.finetune import find_parent
from tasks.preferences import read_pairs


@dataclass(frozen=True)
class Settings(StageSettings):
    data: str = setting("", "JSONL file of pairs")
    seed: int = setting(1, "seed of the order of pairs")
    epochs: float = setting(1.0, "passes over the pairs")
    pairs: int = setting(32, "pairs per optimizer step, over all devices")
    device_batch: int = setting(16, "rows (two a pair) per forward pass on one device")
    beta: float = setting(0.1, "how strongly the parent is held on to")
    lr_scale: float = setting(0.02, "factor on every learning rate of mid-training")
    eval_every: int = setting(100, "optimizer steps between evaluations (0: never)", in_key=False)
    save_every: int = setting(500, "optimizer steps between checkpoints (0: only the last)", in_key=False)


PRESETS = {
    "smoke": Settings(pairs=2, device_batch=4, eval_every=2, save_every=2),
    "cpu-demo": Settings(device_batch=32),
    "single-gpu": Settings(device_batch=32),
    "speedrun": Settings(pairs=128),
}


def main(argv: list[str] | None = None) -> None:
    cfg = config.parse(Settings, PRESETS, argv, __doc__)
    if not cfg.data:
        raise errors.UserError("there are no pairs to learn from", "name the file: --data=pairs.jsonl")
    if cfg.beta <= 0 or cfg.pairs < 1 or cfg.device_batch < 2:
        raise errors.UserError(
            "--beta must be positive, --pairs at least 1 and --device-batch at least 2", "see --help"
        )
    records = read_pairs(Path(cfg.data))
    rt = runtime.start(cfg.device, cfg.dtype)
    try:
        plan = Preference(
            epochs=cfg.epochs,
            pairs_per_step=cfg.pairs,
            device_batch=cfg.device_batch,
            beta=cfg.beta,
            lr_scale=cfg.lr_scale,
            seed=cfg.seed,
        )
        parent = find_parent(Home.find(cfg.home), cfg.tag, ["sft", "mid"])
        prefer(plan, cfg, rt, parent, records)
    finally:
        runtime.close(rt)


if __name__ == "__main__":
    raise SystemExit(errors.run(main))
