"""The optimizer's step: ours against one that visits each matrix by itself, and its products' share.

    OMP_NUM_THREADS=1 python -m benchmarks.bench_optim --depths=4,6 --csv=auto

Both update the parameters of the same model with random gradients, in turns in one process; the best of
--repeats counts. The floor
is the FLOPs of Muon's products over the matrix rate of the machine in the dtype they run in.
"""

from __future__ import annotations

import argparse
import time

import torch

from benchmarks.bench_train import write_rows
from benchmarks.plain_loop import PlainOptimizer
from nanochat import hardware, runtime, scaling
from nanochat.gpt import GPT
from nanochat.optim.muon import POLAR_EXPRESS


def muon_flops(model: GPT) -> float:
    """Of the Polar Express products of one step: per step X X^T, A^2 and (..) X, with the smaller side s."""
    total = 0.0
    for p in model.transformer["h"].parameters():
        small, large = sorted(p.shape)
        total += len(POLAR_EXPRESS) * 2.0 * (2 * small * small * large + small**3)
    return total


def measure(
    depth: int, aspect: int, device: str, dtype: torch.dtype, repeats: int
) -> list[dict[str, object]]:
    plan = scaling.plan(depth, aspect=aspect, head_dim=min(64, aspect), vocab_size=4096, num_steps=10,
                        device_batch=1)  # fmt: skip
    steppers = {}
    for name in ("ours", "plain"):
        model = GPT(plan.config, dtype).to(device)
        model.init_weights(1)
        optimizer = model.setup_optimizer(batch_tokens=plan.batch_tokens, weight_decay=0.1)
        stepper = optimizer if name == "ours" else PlainOptimizer(optimizer.param_groups, dtype)
        steppers[name] = model, stepper
    best = dict.fromkeys(steppers, float("inf"))
    source = torch.Generator().manual_seed(0)
    for repeat in range(repeats + 1):
        for name, (model, stepper) in steppers.items():
            for p in model.parameters():
                p.grad = torch.randn(p.shape, generator=source).to(device)
            if device == "cuda":
                torch.cuda.synchronize()
            start = time.perf_counter()
            stepper.step()
            if device == "cuda":
                torch.cuda.synchronize()
            if repeat:
                best[name] = min(best[name], time.perf_counter() - start)
    rate = hardware.peak_flops(torch.device(device), dtype)
    floor = muon_flops(model) / rate if rate else float("nan")
    return [
        {"device": device, "depth": depth, "width": plan.model_dim,
         "dtype": str(dtype).removeprefix("torch."),
         "variant": name, "threads": torch.get_num_threads(), "step_ms": round(1e3 * seconds, 2),
         "floor_ms": round(1e3 * floor, 2), "times_plain": round(best["plain"] / seconds, 2)}
        for name, seconds in best.items()
    ]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--depths", default="4,6")
    parser.add_argument("--aspect", type=int, default=64, help="width per layer")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--repeats", type=int, default=8)
    parser.add_argument("--csv", help="file to write, or auto for benchmarks/record/MACHINE/DATE-optim.csv")
    args = parser.parse_args()
    runtime.start(args.device, args.dtype)
    rows = [
        row for depth in args.depths.split(",")
        for row in measure(int(depth), args.aspect, args.device, getattr(torch, args.dtype), args.repeats)
    ]  # fmt: skip
    for row in rows:
        print("  ".join(f"{key} {value}" for key, value in row.items()))
    if args.csv:
        write_rows(rows, args.csv, "optim")


if __name__ == "__main__":
    main()
