"""Measure CORE on GPT-2's public weights and lay the figures beside the published ones: is our CORE right?

python -m scripts.core_gpt2 --weights=DIR --max-per-task=200

DIR holds config.json, model.safetensors and vocab.json (default: NANOCHAT_GPT2, else the hub's cache).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from nanochat import config, errors, runtime
from nanochat.config import setting
from nanochat.eval import core, gpt2
from nanochat.home import Home


@dataclass(frozen=True)
class Settings:
    weights: str | None = setting(
        None, "folder of the public files (default: NANOCHAT_GPT2 or the hub's cache)"
    )
    home: str | None = setting(None, "directory of all runs, for the CORE bundle (default: NANOCHAT_HOME)")
    max_per_task: int | None = setting(None, "examples per task (default: all)")
    device: str | None = setting(None, "cpu, cuda or mps (default: what there is)")
    dtype: str | None = setting(None, "float32 or bfloat16 (default: bfloat16 where fast)")
    offline: bool = setting(False, "open no connection")
    mirror: str | None = setting(None, "directory or URL that replaces the hub (default: NANOCHAT_MIRROR)")


def main(argv: list[str] | None = None) -> None:
    cfg = config.parse(Settings, {}, argv, __doc__)
    directory = Path(cfg.weights) if cfg.weights else gpt2.find()
    if directory is None:
        raise errors.UserError("GPT-2's weights are not on this machine", "name their folder: --weights=DIR")
    rt = runtime.start(cfg.device, cfg.dtype)
    try:
        measure(cfg, directory, rt)
    finally:
        runtime.close(rt)


def measure(cfg: Settings, directory: Path, rt: runtime.Runtime) -> None:
    home = Home.find(cfg.home)
    tasks, missing, note = core.find_tasks(
        home, rt, max_per_task=cfg.max_per_task, mirror=cfg.mirror, offline=cfg.offline
    )
    if not tasks:
        raise errors.UserError(f"CORE cannot be measured: {note}", "fetch the bundle or name a --mirror")
    model, tok = gpt2.load(directory, rt.device, rt.dtype)
    facts = core.evaluate_core(tasks, model, tok, rt, max_per_task=cfg.max_per_task, say=rt.say)
    name = model.config.name
    published = core.references(home.eval_bundle_dir).get(name or "", {})
    rows = gpt2.beside(facts["tasks"], published)
    rt.say(f"{name}: {'task':<34}{'accuracy':>9}   99.9 % interval    published inside")
    for task, accuracy, low, high, inside in rows:
        rt.say(f"{name}: {task:<34}{accuracy:>9.4f}   {low:.4f} - {high:.4f}    {'yes' if inside else 'NO'}")
    both = [published[task] for task, *_ in rows]
    rt.say(f"{name}: CORE {facts['core']:.4f}, published {sum(both) / max(1, len(both)):.4f} over the same"
           f" {len(both)} tasks{f' (without {chr(44).join(missing)})' if missing else ''}")  # fmt: skip


if __name__ == "__main__":
    raise SystemExit(errors.run(main))
