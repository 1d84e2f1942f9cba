"""LoRA (Hu et al. 2021, arXiv 2106.09685): a frozen matrix W and a trained product of two thin ones.

y = W x + (alpha / rank) B (A x), with B zero at first. Only A and B have gradients and optimizer state. A
checkpoint of such a training holds them beside the frozen weights; whoever loads a model to use it gets
W + (alpha / rank) B A, which costs nothing more to run.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nanochat.gpt import GPT, Linear

A, B = "lora_a", "lora_b"
SCALE = "lora_scale"
TARGETS = ("attn.c_q", "attn.c_k", "attn.c_v", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")


class Adapted(Linear):
    """A Linear whose own weight is frozen, with an adapter beside it."""

    def __init__(self, frozen: Linear, rank: int, alpha: float, rng: torch.Generator) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = frozen.in_features, frozen.out_features
        self.register_parameter("bias", None)
        self.weight = frozen.weight
        self.weight.requires_grad_(False)
        device = frozen.weight.device
        start = torch.empty(rank, self.in_features).uniform_(-1, 1, generator=rng)
        start /= math.sqrt(self.in_features)
        self.lora_a = nn.Parameter(start.to(device))
        self.lora_b = nn.Parameter(torch.zeros(self.out_features, rank, device=device))
        self.register_buffer(SCALE, torch.tensor([alpha / rank], device=device))

    def forward(self, x: Tensor) -> Tensor:
        thin = F.linear(x, self.lora_a.to(x.dtype))
        scaled = (self.lora_b * self.get_buffer(SCALE)).to(x.dtype)
        return F.linear(x, self.weight.to(x.dtype)) + F.linear(thin, scaled)


def add_adapters(model: GPT, rank: int, alpha: float | None = None, seed: int = 0) -> int:
    """Freeze the model and put adapters on every matrix of its layers; how many numbers are trained.

    alpha: None takes 2 * rank. Raises ValueError for a rank below 1.
    """
    if rank < 1:
        raise ValueError(f"the rank of an adapter must be at least 1, found {rank}")
    model.requires_grad_(False)
    rng, alpha = torch.Generator().manual_seed(seed), 2.0 * rank if alpha is None else alpha
    for block in model.blocks:
        for target in TARGETS:
            part, name = target.split(".")
            owner = getattr(block, part)
            setattr(owner, name, Adapted(getattr(owner, name), rank, alpha, rng))
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def adapter_groups(model: GPT, lr: float) -> list[dict[str, Any]]:
    """The optimizer's groups: AdamW for the adapters alone, without decay."""
    params = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    return [{"kind": "adamw", "params": params, "lr": lr, "initial_lr": lr, "betas": (0.9, 0.99),
             "weight_decay": 0.0}]  # fmt: skip


def is_adapted(arrays: Mapping[str, np.ndarray]) -> bool:
    return any(name.endswith(f".{A}") for name in arrays)


def merge(arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The plain weights of a model with adapters: W + scale B A (fp32), the adapters left out.

    Arrays without adapters come back as they are.
    """
    merged = {name: array for name, array in arrays.items() if name.split(".")[-1] not in (A, B, SCALE)}
    for name in arrays:
        if name.endswith(f".{A}"):
            stem = name.removesuffix(f".{A}")
            product = arrays[f"{stem}.{B}"] @ arrays[name] * arrays[f"{stem}.{SCALE}"].item()
            merged[f"{stem}.weight"] = (merged[f"{stem}.weight"] + product).astype(np.float32)
    return merged


def adapters_of(arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The adapters alone: what is worth sending to somebody who has the parent."""
    return {name: array for name, array in arrays.items() if name.split(".")[-1] in (A, B, SCALE)}
