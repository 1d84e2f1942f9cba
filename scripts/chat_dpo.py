"""Learn from preference pairs (a JSONL file; tasks/preferences.py shows a line) by DPO.

python -m scripts.chat_dpo --data=pairs.jsonl --preset=cpu-demo
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from nanochat import config, errors, runtime
from nanochat.config import setting
from nanochat.train.dpo import prefer
from tasks.preferences import read_pairs


@dataclass(frozen=True)
class Settings:
    data: str = setting("", "JSONL file of pairs")
    home: str | None = setting(None, "directory of all runs (default: NANOCHAT_HOME, else the user's cache)")
    tag: str = setting("main", "name of the run")
    seed: int = setting(1, "seed of the order of pairs")
    epochs: float = setting(1.0, "passes over the pairs")
    pairs: int = setting(32, "pairs per optimizer step, over all devices")
    device_batch: int = setting(16, "rows (two a pair) per forward pass on one device")
    beta: float = setting(0.1, "how strongly the parent is held on to")
    lr_scale: float = setting(0.02, "factor on every learning rate of mid-training")
    device: str | None = setting(None, "cpu, cuda or mps (default: what there is)")
    dtype: str | None = setting(None, "float32, bfloat16 or float16 (default: bfloat16 where fast)")
    eval_every: int = setting(100, "optimizer steps between validations (0: never)")
    sample_every: int = setting(0, "optimizer steps between samples (0: never)")
    save_every: int = setting(500, "optimizer steps between checkpoints (0: only the last)")
    keep: int = setting(2, "newest checkpoints to keep")
    resume: str = setting("auto", "auto, never, or a step")
    wandb: str = setting("off", "off, offline or online")


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
        prefer(cfg, rt, records)
    finally:
        runtime.close(rt)


if __name__ == "__main__":
    raise SystemExit(errors.run(main))
