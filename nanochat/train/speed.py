"""Ways to trade set-up time, memory or rounding for speed: --speed=compile,checkpoint,fp8,gather.

    compile     each layer through torch.compile (two to four graphs, not one per layer); pays on GPUs
    checkpoint  a layer's activations are computed again in the backward: a third more work, far less memory
    fp8         linear layers in 8 bits (sm_89 and later); pays from about depth 20
    gather      several ranks: new weights travel under the next forward pass, each layer waits for its own

What cannot be had here is said with its reason: compile falls back to eager, fp8 is an error, since it is
asked for by name and changes results.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from nanochat.errors import UserError
from nanochat.gpt import GPT
from nanochat.kernels import fp8
from nanochat.runtime import Runtime

KINDS = ("compile", "checkpoint", "fp8", "gather")


def apply(model: GPT, speed: str, rt: Runtime, backend: str = "inductor") -> None:
    """Prepare `model` for training.

    speed: names of KINDS with commas, "" for none. Raises UserError for other names.
    """
    chosen = [name for name in speed.split(",") if name]
    if wrong := sorted(set(chosen) - set(KINDS)):
        raise UserError(
            f"--speed knows {', '.join(KINDS)}, found {', '.join(wrong)}", "leave --speed out for none"
        )
    if "checkpoint" in chosen:
        checkpoint_layers(model)
    if "fp8" in chosen:
        rt.say(f"speed: {fp8.convert(model)} linear layers train in fp8")
    if "compile" in chosen:
        reason = why_not_compile(rt.device) if backend == "inductor" else None
        if reason is not None:
            rt.say(f"speed: not compiled, because {reason}")
            return
        start = time.perf_counter()
        # Blocks share one forward, and so one cache of graphs: it must hold every kind of layer.
        torch._dynamo.config.cache_size_limit = max(torch._dynamo.config.cache_size_limit, 16)
        for block in model.blocks:
            block.compile(dynamic=False, backend=backend)
        rt.say(f"speed: layers are compiled at their first use ({time.perf_counter() - start:.1f} s to load)")


def overlaps_gathers(speed: str) -> bool:
    """Whether new weights shall travel under the next forward pass (nanochat.optim.gathers)."""
    return "gather" in speed.split(",")


def checkpoint_layers(model: GPT) -> None:
    """Keep only the input of each layer for the backward pass, which computes the layer again."""
    for block in model.blocks:
        block.forward = partial(_checkpointed, block, block.forward)  # type: ignore[method-assign]


def _checkpointed(block: nn.Module, forward: Callable[..., Tensor], *arguments: Any) -> Tensor:
    if not block.training or not torch.is_grad_enabled():
        return forward(*arguments)
    return checkpoint(forward, *arguments, use_reentrant=True, preserve_rng_state=False)


def is_compiled(model: GPT) -> bool:
    """Whether `apply` has compiled the layers."""
    return any(getattr(block, "_compiled_call_impl", None) is not None for block in model.blocks)


def why_not_compile(device: torch.device) -> str | None:
    """Why torch.compile cannot work for this device, or None."""
    if device.type == "cuda":
        try:
            import triton  # noqa: F401
        except ImportError:
            return "Triton is not installed"
        return None
    if device.type != "cpu":
        return f"torch has no compiler for {device.type}"
    return None if any(map(shutil.which, ("g++", "clang++"))) else "there is no C++ compiler (g++ or clang++)"
