"""Where we run: device, compute dtype, rank. The only reader of torchrun's environment variables."""

from __future__ import annotations

import ctypes
import os
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from nanochat.errors import UserError
from nanochat.hardware import cpu_prefers_bf16

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
TIMEOUT_SECONDS = 300.0
# glibc's M_ARENA_MAX, M_MMAP_THRESHOLD (its largest) and M_TRIM_THRESHOLD, from malloc.h
MALLOC = ((-8, 1), (-3, 32 << 20), (-1, 2**31 - 1))


@dataclass(frozen=True)
class Runtime:
    """A value that says where this process runs; collectives do nothing in a world of one."""

    device: torch.device
    dtype: torch.dtype
    rank: int = 0
    world_size: int = 1
    local_rank: int = 0

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """Add `tensor` over ranks, in place; returned for convenience."""
        if self.world_size > 1:
            dist.all_reduce(tensor)
        return tensor

    def gather(self, value: Any) -> list[Any]:
        """`value` of every rank in rank order, on every rank (which trust each other: values are pickled)."""
        if self.world_size == 1:
            return [value]
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value)
        return values

    def any(self, flag: bool) -> bool:
        """True on every rank if `flag` is true on any."""
        if self.world_size == 1:
            return flag
        return bool(self.sum(torch.tensor(float(flag), device=self.device)).item())

    def barrier(self) -> None:
        if self.world_size > 1:
            dist.barrier()

    def say(self, *parts: object) -> None:
        """Print once, on rank 0."""
        if self.is_main:
            print(*parts, flush=True)


def start(
    device: str | None = None, dtype: str | None = None, *, timeout_seconds: float = TIMEOUT_SECONDS
) -> Runtime:
    """The runtime of this process; joins torchrun's process group (nccl on CUDA, gloo on CPU).

    device: None chooses cuda, else cpu (mps when named). dtype: None chooses bf16 where it is native and
    fast, else fp32.
    """
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    local = int(os.environ.get("LOCAL_RANK", 0))
    kind = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if kind not in ("cpu", "cuda", "mps"):
        raise UserError(
            f"the device must be cpu, cuda or mps, found {kind!r}", "leave --device out to choose"
        )
    if kind == "cuda" and not torch.cuda.is_available():
        raise UserError(
            "--device=cuda was asked for and torch sees no GPU", "leave --device out, or install a CUDA build"
        )
    if kind == "mps" and not torch.backends.mps.is_available():
        raise UserError("--device=mps was asked for and torch sees no Apple GPU", "leave --device out")
    if dtype is not None and dtype not in DTYPES:
        raise UserError(
            f"the dtype must be one of {', '.join(DTYPES)}, found {dtype!r}", "leave --dtype out to choose"
        )
    chosen = torch.device(kind, local) if kind == "cuda" else torch.device(kind)
    if kind == "cuda":
        torch.cuda.set_device(chosen)
        torch.set_float32_matmul_precision("high")
    if kind == "cpu":
        _keep_freed_memory()
    if world > 1 and not dist.is_initialized():
        backend = "nccl" if kind == "cuda" else "gloo"
        dist.init_process_group(
            backend, timeout=timedelta(seconds=timeout_seconds), device_id=chosen if kind == "cuda" else None
        )
    rt = Runtime(chosen, torch.float32, rank, world, local)
    compute = DTYPES[dtype] if dtype else _best_dtype(chosen)
    if world > 1 and dtype is None:  # a probe may fall out differently on equal machines: rank 0 decides
        compute = rt.gather(compute)[0]
    return Runtime(chosen, compute, rank, world, local)


def _best_dtype(device: torch.device) -> torch.dtype:
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.get_device_capability(device) >= (8, 0) else torch.float32
    if device.type == "cpu" and cpu_prefers_bf16():
        return torch.bfloat16
    return torch.float32


def _keep_freed_memory() -> None:
    """Have glibc keep what is freed: a step's large tensors would else be mapped anew each time (11 % of it).

    One arena, since the backward pass frees in its own thread; no effect with another C library.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return
    for parameter, value in MALLOC:
        mallopt(parameter, value)


def close(rt: Runtime) -> None:
    """Leave the process group."""
    if rt.world_size > 1 and dist.is_initialized():
        dist.destroy_process_group()
