"""Pretrain the base model on documents.

python -m scripts.base_train --preset=cpu-demo
torchrun --standalone --nproc_per_node=8 -m scripts.base_train --preset=speedrun
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

from nanochat import config, errors, load, runtime, scaling
from nanochat.config import HubSettings, StageSettings, setting
from nanochat.data.loader import DocumentBatches, validation_batches
from nanochat.data.sources import Source, open_source
from nanochat.data.warmup import WithWarmup
from nanochat.eval.bpb import evaluate_bpb
from nanochat.home import Home
from nanochat.optim.groups import LM_HEAD_EPS
from nanochat.tokenizer import RustBPETokenizer
from nanochat.train.loop import pretraining_rates
from nanochat.train.stages import Training, run_stage
from tasks.mixtures import primer


@dataclass(frozen=True)
class Settings(HubSettings, StageSettings):
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
    primer: str | None = setting(None, "warm-up curriculum before the embedded corpus: smoke or cpu-demo")
    packing: str = setting("split", "a document longer than a row: split it, or crop (discard the rest)",
                           old_words={"split": "carry", "crop": "peer"})  # fmt: skip
    eval_every: int = setting(250, "optimizer steps between evaluations (0: never)", in_key=False)
    eval_tokens: int = setting(80 * 524288, "validation tokens")
    sample_every: int = setting(2000, "optimizer steps between samples (0: never)", in_key=False)
    disk_gb: float | None = setting(None, "GB of shards to keep (hub only; default: all)", in_key=False)
    damaged: str = setting("stop", "stop or skip at damaged parts of a data file", in_key=False)


def _preset(name: str, **more: Any) -> Settings:
    shape = {key: value for key, value in scaling.RUNS[name].items() if key != "vocab_size"}
    return Settings(**shape, **more)


PLAN_FLAGS = ("depth", "aspect", "head_dim", "num_kv_heads", "sequence_len", "window_pattern", "ratio",
              "target_flops", "num_steps", "batch_tokens", "device_batch", "bigram_rows")  # fmt: skip
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
    plan = make_plan(cfg, tok.get_vocab_size(), rt.world_size)
    source = open_documents(cfg, home, plan, rt)
    inputs = {"tokenizer": tok.fingerprint(), "data": source.fingerprint()}

    def prepare() -> Training:
        rt.say(f"base: settings\n{config.describe(cfg)}\nbase: plan\n{config.describe(plan)}")
        return prepare_training(cfg, rt, tok, plan, source)

    run_stage("base", cfg, rt, inputs, prepare, result_shown="val_bpb")


def make_plan(cfg: Settings, vocab_size: int, world_size: int) -> scaling.Plan:
    flags = {name: getattr(cfg, name) for name in PLAN_FLAGS}
    try:
        return scaling.plan(**flags, vocab_size=vocab_size, world_size=world_size)
    except ValueError as error:
        raise errors.UserError(str(error), "change that flag; see python -m scripts.plan") from error


def open_documents(cfg: Settings, home: Home, plan: scaling.Plan, rt: runtime.Runtime) -> Source:
    # Of the whole hub only as many shards are fetched as the run will read; a pattern chooses them itself.
    is_whole_hub = cfg.data.split("@")[0] == HUB and cfg.data.count(":") == 1
    return open_source(
        cfg.data,
        home=home,
        seed=cfg.seed,
        num_shards=scaling.num_shards(plan.horizon_tokens, cfg.packing) if is_whole_hub else None,
        mirror=cfg.mirror,
        offline=cfg.offline,
        disk_gb=cfg.disk_gb,
        damaged=cfg.damaged,
        quiet=not rt.is_main,
    )


def prepare_training(
    cfg: Settings,
    rt: runtime.Runtime,
    tok: RustBPETokenizer,
    plan: scaling.Plan,
    source: Source,
) -> Training:
    model = load.build(plan.config, rt, cfg.seed, cfg.smear)
    optimizer = model.setup_optimizer(
        batch_tokens=plan.batch_tokens,
        # The rule of the decay assumes the planned rates.
        weight_decay=plan.weight_decay * cfg.decay_scale / cfg.lr_scale,
        lr_scale=cfg.lr_scale,
        smear_backout_lr=cfg.smear_lr,
        lm_head_eps=cfg.lm_head_eps,
    )
    row_options: Any = {"sequence_len": cfg.sequence_len, "device_batch": cfg.device_batch, "rt": rt}
    documents = partial(DocumentBatches, source, tok, policy=cfg.packing, accum=plan.accum, **row_options)
    curriculum = primer(cfg.primer, cfg.seed) if cfg.primer and cfg.data == "synthetic" else None
    rows = WithWarmup(curriculum, documents, tok, seed=cfg.seed, accum=plan.accum, **row_options)
    num_first_steps = rows.num_curriculum_steps
    rt.say(f"base: {num_first_steps} steps of warm-up curriculum, then {plan.num_steps} of documents")
    num_rows = max(1, cfg.eval_tokens // cfg.sequence_len)
    val_rows = validation_batches(source, tok, num_rows=num_rows, **row_options) if cfg.eval_every else ()

    def evaluate() -> tuple[float, dict[str, float]]:
        val_bpb = evaluate_bpb(model, val_rows, tok.token_bytes(), rt)
        return val_bpb, {"val_bpb": val_bpb}

    return Training(
        model=model,
        tok=tok,
        optimizer=optimizer,
        batches=rows.batches,
        num_steps=num_first_steps + plan.num_steps,
        accum=plan.accum,
        schedule=partial(pretraining_rates, num_first_steps, plan.num_steps, cfg.warmup, cfg.warmdown),
        evaluate=evaluate,
        recipe={"batch_tokens": plan.batch_tokens} | {name: getattr(cfg, name) for name in RECIPE},
        results={"plan": plan.to_dict(), "params": model.num_scaling_params()},
        prompts=PROMPTS,
        speed=cfg.speed,
    )


if __name__ == "__main__":
    raise SystemExit(errors.run(main))
