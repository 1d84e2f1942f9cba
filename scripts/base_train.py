"""Pretrain the base model on documents.

python -m scripts.base_train --preset=cpu-demo
torchrun --standalone --nproc_per_node=8 -m scripts.base_train --preset=speedrun
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

from nanochat import config, errors, runtime, scaling
from nanochat import load as models
from nanochat.config import setting
from nanochat.data.loader import DocumentBatches, validation_batches
from nanochat.data.sources import open_source
from nanochat.data.warmup import Primed
from nanochat.eval.bpb import evaluate_bpb
from nanochat.gpt import GPTConfig
from nanochat.home import Home
from nanochat.optim.groups import LM_HEAD_EPS
from nanochat.run_dir import open_stage
from nanochat.tokenizer import RustBPETokenizer
from nanochat.train.hooks import evaluation, samples
from nanochat.train.loop import pretraining_rates
from nanochat.train.stages import run_stage
from tasks.mixtures import primer


@dataclass(frozen=True)
class Settings:
    home: str | None = setting(None, "directory of all runs (default: NANOCHAT_HOME, else the user's cache)")
    tag: str = setting("main", "name of the run")
    seed: int = setting(1, "seed of weights and data order")
    data: str = setting("synthetic", "synthetic, parquet:, jsonl:, text:, hub: or tokens: (docs/data.md)")
    depth: int = setting(12, "layers; every other size follows from it")
    aspect: int = setting(64, "width per layer (channels)")
    head_dim: int = setting(128, "channels per attention head")
    num_kv_heads: int | None = setting(None, "key/value heads (default: as many as query heads)")
    sequence_len: int = setting(2048, "tokens per row")
    window_pattern: str = setting("SSSL", "S: short window, L: full attention, tiled over the layers")
    ratio: float = setting(12.0, "training tokens per scaling parameter")
    target_flops: float | None = setting(None, "horizon by compute (FLOPs) instead of the ratio")
    num_steps: int | None = setting(None, "horizon by optimizer steps instead of the ratio")
    batch_tokens: int | None = setting(None, "tokens per optimizer step (default: from the plan)")
    device_batch: int = setting(32, "rows per forward pass on one device")
    lr_scale: float = setting(1.0, "factor on the learning rates that follow the batch")
    smear: float = setting(0.0, "what the scalar of smear begins with")
    smear_lr: float = setting(0.2, "learning rate of the scalars of smear and backout")
    lm_head_eps: float = setting(LM_HEAD_EPS, "Adam's epsilon for lm_head (rare tokens: about 0.02/batch)")
    decay_scale: float = setting(1.0, "factor on the planned weight decay")
    warmup: int = setting(40, "warm-up steps")
    warmdown: float = setting(0.65, "share of the steps in the linear warm-down")
    bigram_rows: int = setting(0, "rows of a hashed table of token pairs (0: none)")
    speed: str = setting("", "any of compile, checkpoint, fp8, gather, with commas")
    primer: str | None = setting(None, "lessons before the embedded corpus: smoke or cpu-demo")
    packing: str = setting("carry", "carry (split and carry) or peer (cut and discard)")
    device: str | None = setting(None, "cpu, cuda or mps (default: what there is)")
    dtype: str | None = setting(None, "float32, bfloat16 or float16 (default: bfloat16 where fast)")
    eval_every: int = setting(250, "optimizer steps between validations (0: never)")
    eval_tokens: int = setting(80 * 524288, "validation tokens")
    sample_every: int = setting(2000, "optimizer steps between samples (0: never)")
    save_every: int = setting(1000, "optimizer steps between checkpoints (0: only the last)")
    keep: int = setting(2, "newest checkpoints to keep")
    resume: str = setting("auto", "auto, never, or a step")
    wandb: str = setting("off", "off, offline or online")
    offline: bool = setting(False, "open no connection")
    mirror: str | None = setting(None, "directory or URL that replaces the hub (default: NANOCHAT_MIRROR)")
    disk_gb: float | None = setting(None, "GB of training shards to keep (hub only; default: no bound)")
    damaged: str = setting("stop", "stop or skip at a part of a file that cannot be read as it was written")


def _preset(name: str, **more: Any) -> Settings:
    shape = {key: value for key, value in scaling.RUNS[name].items() if key != "vocab_size"}
    return Settings(**shape, **more)


RECIPE = ("lr_scale", "smear_lr", "lm_head_eps")  # what later stages need to know
FAST = {"lr_scale": 7.0, "lm_head_eps": 1e-5, "decay_scale": 0.3, "smear": 3.0, "smear_lr": 0.01}
HUB = "hub:karpathy/climbmix-400b-shuffle"
PRESETS = {
    "smoke": _preset("smoke", lr_scale=4.0, primer="smoke", eval_every=5, eval_tokens=4096, save_every=5,
                     warmup=2, sample_every=10),
    "cpu-demo": _preset("cpu-demo", primer="cpu-demo", eval_tokens=65536, save_every=250, **FAST),
    "single-gpu": _preset("single-gpu", data=HUB),
    "speedrun": _preset("speedrun", data=HUB),
}  # fmt: skip
PROMPTS = ("The capital of France is", "Once upon a time", "If yesterday was Friday, then tomorrow will be",
           "The opposite of hot is")  # fmt: skip


def main(argv: list[str] | None = None) -> None:
    cfg = config.parse(Settings, PRESETS, argv, __doc__)
    rt = runtime.start(cfg.device, cfg.dtype)
    try:
        train(cfg, rt)
    finally:
        runtime.close(rt)


def train(cfg: Settings, rt: runtime.Runtime) -> None:
    home = Home.find(cfg.home)
    tok = RustBPETokenizer.from_directory(home.tokenizer_dir)
    try:
        plan = scaling.plan(
            cfg.depth, aspect=cfg.aspect, head_dim=cfg.head_dim, num_kv_heads=cfg.num_kv_heads,
            sequence_len=cfg.sequence_len, vocab_size=tok.get_vocab_size(), window_pattern=cfg.window_pattern,
            ratio=cfg.ratio, target_flops=cfg.target_flops, num_steps=cfg.num_steps,
            batch_tokens=cfg.batch_tokens, device_batch=cfg.device_batch, world_size=rt.world_size,
            bigram_rows=cfg.bigram_rows,
        )  # fmt: skip
        shape = GPTConfig(**plan.config())
    except ValueError as error:
        raise errors.UserError(str(error), "change that flag; see python -m scripts.plan") from error
    whole_hub = cfg.data.split("@")[0] == HUB and cfg.data.count(":") == 1  # no pattern that chooses shards
    num_shards = scaling.num_shards(plan.horizon_tokens, cfg.packing) if whole_hub else None
    source = open_source(
        cfg.data, home=home, seed=cfg.seed, num_shards=num_shards, mirror=cfg.mirror, offline=cfg.offline,
        disk_gb=cfg.disk_gb, damaged=cfg.damaged, quiet=not rt.is_main,
    )  # fmt: skip
    lessons = primer(cfg.primer, cfg.seed) if cfg.primer and cfg.data == "synthetic" else None
    with open_stage("base", cfg, rt, {"tokenizer": tok.fingerprint(), "data": source.fingerprint()}) as stage:
        if stage.finished:
            rt.say(f"base: already finished, bits per byte {stage.finished.get('val_bpb')}")
            return
        rt.say(f"base: settings\n{config.describe(cfg)}\nbase: plan\n{config.describe(plan)}")
        model = models.build(shape, rt, cfg.seed, cfg.smear)
        optimizer = model.setup_optimizer(
            batch_tokens=plan.batch_tokens, lr_scale=cfg.lr_scale, smear_backout_lr=cfg.smear_lr,
            weight_decay=plan.weight_decay * cfg.decay_scale / cfg.lr_scale, lm_head_eps=cfg.lm_head_eps,
        )  # fmt: skip
        T, N, A, held = cfg.sequence_len, plan.num_steps, plan.accum, cfg.eval_tokens // cfg.sequence_len or 1
        how: Any = {"sequence_len": T, "device_batch": cfg.device_batch, "rt": rt}
        batches = partial(DocumentBatches, source, tok, policy=cfg.packing, accum=A, **how)
        rows = Primed(lessons, batches, tok, seed=cfg.seed, accum=A, **how)
        rt.say(f"base: {rows.num_primer_steps} steps of lessons, then {N} of documents")
        fixed = validation_batches(source, tok, num_rows=held, **how) if cfg.eval_every else ()
        run_stage(
            stage, cfg, model, optimizer, rows.batches, num_steps=rows.num_primer_steps + N, accum=A,
            schedule=partial(pretraining_rates, rows.num_primer_steps, N, cfg.warmup, cfg.warmdown),
            evaluate=evaluation("val_bpb", lambda: evaluate_bpb(model, fixed, tok.token_bytes(), rt), rt),
            sample=samples(model, tok, PROMPTS, rt), flops_per_token=model.estimate_flops(),
            recipe={"batch_tokens": plan.batch_tokens} | {name: getattr(cfg, name) for name in RECIPE},
            result={"plan": plan.to_dict(), "params": model.num_scaling_params()},
        )  # fmt: skip


if __name__ == "__main__":
    raise SystemExit(errors.run(main))
