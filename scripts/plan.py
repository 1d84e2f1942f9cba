"""Print every number that follows from the depth dial, with its rule; memory, time and price. Touches no GPU.

python -m scripts.plan --depth=24 --gpus=8 --ratio=8
python -m scripts.plan --preset=cpu-demo
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

from nanochat import config, errors, scaling
from nanochat.config import setting


@dataclass(frozen=True)
class Settings:
    run: str = setting("custom", "the preset this plan belongs to")
    depth: int = setting(12, "layers; every other size follows from it")
    gpus: int = setting(1, "devices that share the batch (1 for a CPU)")
    aspect: int = setting(64, "width per layer (channels)")
    head_dim: int = setting(128, "channels per attention head")
    num_kv_heads: int | None = setting(None, "key/value heads (default: as many as query heads)")
    sequence_len: int = setting(2048, "tokens per row")
    vocab_size: int = setting(32768, "tokens of the vocabulary")
    window_pattern: str = setting("SSSL", "S: short window, L: full attention, tiled over the layers")
    bigram_rows: int = setting(0, "rows of a hashed table of token pairs (0: none)")
    ratio: float = setting(12.0, "training tokens per scaling parameter")
    target_flops: float | None = setting(None, "horizon by compute (FLOPs) instead of the ratio")
    num_steps: int | None = setting(None, "horizon by optimizer steps instead of the ratio")
    batch_tokens: int | None = setting(None, "tokens per optimizer step (default: from the plan)")
    device_batch: int = setting(32, "rows per forward pass on one device")
    flops_rate: float | None = setting(
        None, "FLOP/s one device reaches (default: 0.45 of an H100's bf16 peak; CPU: 6e10)"
    )
    price: float = setting(3.0, "dollars per device and hour")


PRESETS = {name: replace(Settings(run=name), **values) for name, values in scaling.RUNS.items()}
PRESETS["speedrun"] = replace(PRESETS["speedrun"], gpus=8)
STORY = {
    "smoke": "a few steps on the embedded corpus, to see that everything works; nothing is learnt",
    "cpu-demo": "offline, on the embedded corpus: base, mid, SFT and RL on this CPU; about 0.2 GB of disk",
    "single-gpu": "ClimbMix from the hub, SmolTalk mixture",
    "speedrun": "ClimbMix from the hub, SmolTalk mixture",
}
H100_BF16, CPU_RATE = 0.45 * 989e12, 6e10


def main(argv: list[str] | None = None) -> None:
    cfg = config.parse(Settings, PRESETS, argv, __doc__)
    names = {field.name for field in fields(Settings)} - {"run", "gpus", "flops_rate", "price"}
    try:
        p = scaling.plan(world_size=cfg.gpus, **{name: getattr(cfg, name) for name in names})
    except ValueError as error:
        raise errors.UserError(str(error), "change that flag") from error
    on_cpu = cfg.run in ("smoke", "cpu-demo")
    memory = scaling.memory_bytes(p, 4 if on_cpu else 2, on_cpu=on_cpu)
    rate = cfg.flops_rate or (CPU_RATE if on_cpu else H100_BF16)
    hours = p.total_flops / (rate * cfg.gpus) / 3600
    lines = [
        ("run", cfg.run, STORY.get(cfg.run, "")),
        ("depth", p.depth, "the dial"),
        ("width", p.model_dim, "depth * aspect, rounded up to whole heads"),
        ("heads", f"{p.num_heads} ({p.num_kv_heads} key/value)", f"of {p.head_dim} channels"),
        ("row", p.sequence_len, "tokens"),
        ("vocabulary", p.vocab_size, "tokens"),
        ("pairs", p.config.bigram_rows, "rows of the hashed table of token pairs"),
        (
            "parameters",
            f"{p.params_total:,}",
            f"of which {p.params_scaling:,} count for scaling (matrices and head)",
        ),
        ("tokens", f"{p.horizon_tokens:,}", "steps * batch"),
        ("batch", f"{p.batch_tokens:,}", "tokens: 2^19 (horizon / reference)^0.383, or as given"),
        ("steps", f"{p.num_steps:,}", f"each {p.accum} x {p.device_batch} rows x {p.world_size} devices"),
        ("rate factor", f"{p.lr_factor:.4g}", "sqrt(batch / 2^19)"),
        ("weight decay", f"{p.weight_decay:.4g}", "0.28 * rate factor * reference horizon / horizon"),
        ("FLOPs", f"{p.total_flops:.3g}", f"{p.flops_per_token:.3g} per token: 6 P + 12 D sum(window)"),
        (
            "memory",
            f"{scaling.peak_bytes(memory) / 2**30:.1f} GiB",
            "per device, at its peak: " + ", ".join(f"{k} {v / 2**30:.2f}" for k, v in memory.items()),
        ),
        (
            "time",
            f"{hours * 60:.0f} min" if hours < 3 else f"{hours:.1f} h",
            f"base training at {rate * cfg.gpus:.3g} FLOP/s",
        ),
        ("price", "your electricity" if on_cpu else f"${hours * cfg.gpus * cfg.price:,.0f}", "base training"),
    ]
    if not on_cpu:
        fits = []
        for gigabytes in (24, 80, 141):
            rows = scaling.largest_device_batch(p, gigabytes * 1e9)
            saving = scaling.largest_device_batch(p, gigabytes * 1e9, is_checkpointed=True)
            fits.append(f"{gigabytes} GB: {rows or 'none'} (checkpointed: {saving or 'none'})")
        lines.append(("rows", "that fit", "of a device with " + ", ".join(fits)))
        if not scaling.largest_device_batch(p, 80e9, is_checkpointed=True):
            lines.append(
                ("limit", "too large", "weights are whole on each device here; see docs/multinode.md")
            )
        shards = scaling.num_shards(p.horizon_tokens)
        lines.append(("shards", shards, f"of ClimbMix, read once: about {shards / 10:.0f} GB of disk"))
    width = max(len(str(value)) for _, value, _ in lines[1:])
    for name, value, rule in lines:
        print(f"{name:>13}  {value!s:<{width}}  {rule}")


if __name__ == "__main__":
    raise SystemExit(errors.run(main))
