"""What the machine can do: peak FLOP/s and bytes/s by device (None when unknown), the CPU's dtype probe."""

from __future__ import annotations

import os
import platform
import time
from functools import cache

import torch

# Dense peaks from the makers' data sheets: (name, {dtype: TFLOP/s}, TB/s). First match wins.
GPUS: list[tuple[str, dict[torch.dtype, float], float]] = [
    ("B300", {torch.bfloat16: 2250, torch.float16: 2250, torch.float32: 75}, 8.0),
    ("B200", {torch.bfloat16: 2250, torch.float16: 2250, torch.float32: 75}, 8.0),
    ("H200", {torch.bfloat16: 989, torch.float16: 989, torch.float32: 67}, 4.8),
    ("H100 PCIe", {torch.bfloat16: 756, torch.float16: 756, torch.float32: 51}, 2.0),
    ("H100 NVL", {torch.bfloat16: 835, torch.float16: 835, torch.float32: 60}, 3.9),
    ("H100", {torch.bfloat16: 989, torch.float16: 989, torch.float32: 67}, 3.35),
    ("A100", {torch.bfloat16: 312, torch.float16: 312, torch.float32: 19.5}, 2.0),
    ("L40S", {torch.bfloat16: 362, torch.float16: 362, torch.float32: 91.6}, 0.864),
    ("L4", {torch.bfloat16: 121, torch.float16: 121, torch.float32: 30.3}, 0.3),
    ("A10", {torch.bfloat16: 125, torch.float16: 125, torch.float32: 31.2}, 0.6),
    ("RTX 5090", {torch.bfloat16: 209.5, torch.float16: 209.5, torch.float32: 104.8}, 1.79),
    ("RTX 4090", {torch.bfloat16: 165.2, torch.float16: 165.2, torch.float32: 82.6}, 1.01),
    ("RTX 3090", {torch.bfloat16: 71, torch.float16: 71, torch.float32: 35.6}, 0.936),
]


FP8_FACTOR = 2  # dense fp8 products to bf16's, on every GPU of the table that has them (sm_89 and later)


def peak_flops(device: torch.device, dtype: torch.dtype) -> float | None:
    """Dense FLOP/s of one device in `dtype`: a GPU's by its data sheet, a CPU's measured, None if unknown."""
    if device.type == "cuda":
        if dtype in (torch.float8_e4m3fn, torch.float8_e5m2):
            bf16 = peak_flops(device, torch.bfloat16)
            has_it = torch.cuda.get_device_capability(device) >= (8, 9)
            return FP8_FACTOR * bf16 if bf16 and has_it else None
        name = torch.cuda.get_device_name(device)
        for key, rates, _ in GPUS:
            if key in name:
                return rates[dtype] * 1e12 if dtype in rates else None
        return None
    return matmul_rate(dtype) if device.type == "cpu" else None


@cache
def matmul_rate(dtype: torch.dtype, seconds: float = 0.1) -> float:
    """FLOP/s of (2048 x 512) @ (512 x 512) products on this CPU at the present thread count, best of many."""
    a, b = torch.ones(2048, 512, dtype=dtype), torch.ones(512, 512, dtype=dtype)
    best, until = float("inf"), time.perf_counter() + seconds
    for _ in range(2):
        a @ b  # the first calls build the kernel
    while time.perf_counter() < until or best == float("inf"):
        start = time.perf_counter()
        a @ b
        best = min(best, time.perf_counter() - start)
    return 2 * 2048 * 512 * 512 / best


def cpu_prefers_bf16() -> bool:
    """Whether bf16 matrix products clearly beat fp32 on this CPU (AMX, AVX512-BF16): a 0.2-second probe."""
    return matmul_rate(torch.bfloat16) > 1.3 * matmul_rate(torch.float32)


def cpu_name() -> str:
    """The processor's model name."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            for line in file:
                if line.startswith("model name"):
                    return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def cpu_features() -> list[str]:
    """Which of amx, avx512_bf16, avx512 and avx2 the processor has (Linux; else empty)."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            flags = next((line for line in file if line.startswith("flags")), "").split()
    except OSError:
        return []
    named = {"amx": "amx_bf16", "avx512_bf16": "avx512_bf16", "avx512": "avx512f", "avx2": "avx2"}
    return [name for name, flag in named.items() if flag in flags]


def describe() -> dict[str, object]:
    """Facts about the machine for result.json and the report: names no host and no user."""
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "cpu": cpu_name(),
        "cpu_features": cpu_features(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpus": gpus,
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def pick_preset() -> str:
    """The preset for this machine: speedrun from 8 GPUs, single-gpu from one, else cpu-demo."""
    count = torch.cuda.device_count()
    return "speedrun" if count >= 8 else "single-gpu" if count else "cpu-demo"
