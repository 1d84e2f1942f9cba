"""The depth dial: one number, depth, decides shape, batch, horizon and rates. Pure arithmetic, no torch.

The rules, fitted at d12: batch ~ horizon^0.383, decay ~ sqrt(batch) / horizon, rates ~ sqrt(batch).
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from nanochat.gpt_config import GPTConfig

REF_PARAMS = 110_100_912  # transformer matrices and head of the reference, d12
REF_BATCH = 2**19
REF_DECAY = 0.28
BATCH_EXPONENT = 0.383
MATRIX_LR = 0.02  # Muon's, as in nanochat.optim.groups (a test holds them equal)
MOST_DECAY = 0.1  # of a weight in one step: the rule alone would exceed 1 in runs of a few steps
DEFAULT_RATIO = 12.0  # training tokens per scaling parameter
SHARD_TOKENS = 50_000_000  # of ClimbMix: 250M characters, 5 a token with a vocabulary of 32,768
CROP_KEPT_FRAC = 0.65  # share of the tokens that cutting and discarding leaves (docs/data.md: 33 % lost)


@dataclass(frozen=True)
class Plan:
    """Every derived number of a base run."""

    depth: int
    model_dim: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    sequence_len: int
    vocab_size: int
    window_pattern: str
    params_total: int
    params_scaling: int
    flops_per_token: float
    horizon_tokens: int
    batch_tokens: int
    num_steps: int
    weight_decay: float
    lr_factor: float
    device_batch: int
    accum: int
    world_size: int
    model: dict[str, Any] = field(default_factory=dict)  # further fields of GPTConfig

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @property
    def total_flops(self) -> float:
        return self.flops_per_token * self.num_steps * self.batch_tokens

    @property
    def config(self) -> GPTConfig:
        """The model."""
        return GPTConfig(
            sequence_len=self.sequence_len,
            vocab_size=self.vocab_size,
            n_layer=self.depth,
            n_head=self.num_heads,
            n_kv_head=self.num_kv_heads,
            n_embd=self.model_dim,
            window_pattern=self.window_pattern,
            **self.model,
        )


def shape(depth: int, aspect: int = 64, head_dim: int = 128) -> tuple[int, int]:
    """(width, heads): depth * aspect rounded up to whole heads."""
    heads = -(-depth * aspect // head_dim)
    return heads * head_dim, heads


def best_batch(horizon_tokens: float, ref_horizon: float) -> int:
    """The batch in tokens: a power of two near 2^19 (horizon / reference horizon)^0.383."""
    return 2 ** round(math.log2(REF_BATCH * (horizon_tokens / ref_horizon) ** BATCH_EXPONENT))


def plan(
    depth: int,
    *,
    aspect: int = 64,
    head_dim: int = 128,
    num_kv_heads: int | None = None,
    sequence_len: int = 2048,
    vocab_size: int = 32768,
    window_pattern: str = "SSSL",
    ratio: float = DEFAULT_RATIO,
    target_flops: float | None = None,
    num_steps: int | None = None,
    batch_tokens: int | None = None,
    device_batch: int = 32,
    world_size: int = 1,
    **model: Any,
) -> Plan:
    """The plan of a base run. Horizon: num_steps * batch if given, else target_flops / F, else ratio * N.

    model: further fields of GPTConfig, such as bigram_rows.
    Raises ValueError for sizes that cannot be, and for a batch that ranks * device_batch * T does not divide.
    """
    for name, value in list(locals().items()):
        if isinstance(value, (int, float)) and not 0 < value < math.inf:
            raise ValueError(f"{name} must be above 0, found {value}")
    if head_dim % 2:
        raise ValueError(f"head_dim must be even, found {head_dim}")
    width, heads = shape(depth, aspect, head_dim)
    kv_heads = num_kv_heads or heads
    if heads % kv_heads:
        fits = ", ".join(str(k) for k in range(1, heads + 1) if heads % k == 0)
        raise ValueError(f"num_kv_heads must divide the {heads} heads, found {kv_heads}; these do: {fits}")
    config = GPTConfig(sequence_len, vocab_size, depth, heads, kv_heads, width, window_pattern, **model)
    counts = config.count_params()
    flops = config.flops_per_token()
    ref_horizon = ratio * REF_PARAMS
    horizon = ratio * counts["scaling"] if target_flops is None else target_flops / flops
    step_rows_tokens = device_batch * sequence_len * world_size
    if batch_tokens is not None:
        if batch_tokens % step_rows_tokens:
            below = max(batch_tokens // step_rows_tokens, 1) * step_rows_tokens
            raise ValueError(
                f"the batch must be a multiple of ranks * device batch * T = {step_rows_tokens} tokens, "
                f"found {batch_tokens}; {below} and {below + step_rows_tokens} work"
            )
        batch = batch_tokens
    else:
        if num_steps is not None:
            scale = REF_BATCH * ref_horizon**-BATCH_EXPONENT
            horizon = (num_steps * scale) ** (1 / (1 - BATCH_EXPONENT))
        wanted = best_batch(horizon, ref_horizon)
        batch = max(1, round(wanted / step_rows_tokens)) * step_rows_tokens
    steps = num_steps if num_steps is not None else max(1, int(horizon // batch))
    horizon_tokens = steps * batch
    b = math.sqrt(batch / REF_BATCH)
    return Plan(
        depth=depth,
        model_dim=width,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        sequence_len=sequence_len,
        vocab_size=vocab_size,
        window_pattern=window_pattern,
        params_total=counts["total"],
        params_scaling=counts["scaling"],
        flops_per_token=flops,
        horizon_tokens=horizon_tokens,
        batch_tokens=batch,
        num_steps=steps,
        weight_decay=min(REF_DECAY * b * ref_horizon / horizon_tokens, MOST_DECAY / (MATRIX_LR * b)),
        lr_factor=b,
        device_batch=device_batch,
        accum=batch // step_rows_tokens,
        world_size=world_size,
        model=model,
    )


# The base runs of the presets: arguments of plan(). scripts.base_train and scripts.plan read them here.
RUNS: dict[str, dict[str, Any]] = {
    "smoke": {"depth": 2, "aspect": 32, "head_dim": 32, "sequence_len": 128, "window_pattern": "L",
              "num_steps": 10, "batch_tokens": 1024, "device_batch": 4, "vocab_size": 512},
    "cpu-demo": {"depth": 4, "aspect": 32, "head_dim": 32, "sequence_len": 256, "window_pattern": "L",
                 "num_steps": 1500, "batch_tokens": 2048, "device_batch": 8, "vocab_size": 4096},
    "single-gpu": {"depth": 12},
    "speedrun": {"depth": 24, "ratio": 8.0, "device_batch": 8},
}  # fmt: skip


def num_shards(horizon_tokens: int, packing: str = "split") -> int:
    """Shards of ClimbMix that hold a horizon once, and one to spare."""
    used = SHARD_TOKENS * (CROP_KEPT_FRAC if packing == "crop" else 1.0)
    return math.ceil(horizon_tokens / used) + 1


def memory_bytes(
    p: Plan,
    bytes_per_value: int = 2,
    *,
    is_checkpointed: bool = False,
    on_cpu: bool = False,
    keeps_scores: bool | None = None,
) -> dict[str, float]:
    """Bytes of one device in training, by use; `peak_bytes` says what of it is needed at once.

    activations: what eager layers keep for their backward pass, counted by value and token. keeps_scores: of
    attention, as a CPU does in fp32 (the default) and where it has no tiles for bf16
    (native.has("attention")). With is_checkpointed only each layer's input, and one layer.
    """
    keeps_scores = on_cpu and bytes_per_value == 4 if keeps_scores is None else keeps_scores
    tokens, width, kv = p.device_batch * p.sequence_len, p.model_dim, p.config.kv_dim
    counts = p.config.count_params()
    matrices, linears = counts["transformer_matrices"], counts["scaling"]
    largest = max(4 * width * width * p.depth, 4.0 * width * width)  # of a stack that Muon updates at once
    # Per token: input of mix, two norms, q, attention's output, relu^2 (4), and k, v, half of a value
    # embedding
    layer = (9 * width + 2.5 * kv) * bytes_per_value + 4.0 * (2 + p.num_heads + p.num_kv_heads + p.num_heads)
    if keeps_scores:  # copies of q, k, v by head, and the weights of attention
        layer += (width + 2 * kv + 0.6 * p.num_heads * p.sequence_len) * bytes_per_value
    ends = (4 * width) * bytes_per_value * tokens  # embeddings, smear, half-way state, the last norm
    kept = (
        (width * bytes_per_value * tokens * p.depth + layer * tokens)
        if is_checkpointed
        else layer * tokens * p.depth
    )
    chunk = 2.0**22 if on_cpu else 2.0**27  # logits at once, see kernels/loss.py
    logits = min(chunk, tokens * p.vocab_size) * bytes_per_value
    return {
        "weights": 4.0 * p.params_total,
        "casts": float(bytes_per_value * linears) if bytes_per_value < 4 else 0.0,
        "optimizer": (4.0 * matrices + 8.0 * (p.params_total - matrices)) / p.world_size,
        "communication": 4.0 * p.params_total if p.world_size > 1 else 0.0,
        "activations": kept + ends,
        "loss": logits + 2 * tokens * width * bytes_per_value + 4.0 * p.vocab_size * width,
        "gradients": 4.0 * p.params_total,
        "muon": 3 * 4.0 * largest / p.world_size,
    }


def peak_bytes(memory: dict[str, float]) -> float:
    """What is needed at once: always the first four, then the larger of the loss's moment and the
    update's."""
    always = sum(memory[name] for name in ("weights", "casts", "optimizer", "communication"))
    return always + max(memory["activations"] + memory["loss"], memory["gradients"] + memory["muon"])


def largest_device_batch(p: Plan, device_bytes: float, is_checkpointed: bool = False) -> int:
    """The largest power of two of rows (at most 64) whose peak fits 92 % of a device; 0 if one row does
    not."""
    rows = 64
    while rows and peak_bytes(
        memory_bytes(replace(p, device_batch=rows), is_checkpointed=is_checkpointed)
    ) > (0.92 * device_bytes):
        rows //= 2
    return rows
