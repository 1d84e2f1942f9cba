"""Training on one GPU: tokens/s, MFU by both counts, peak memory, the optimizer's time, against the sum of
its kernels.

    python -m benchmarks.bench_gpu --depth=12 --speed=compile --csv=FILE

A step is what fit() does: accumulated micro-batches from pinned memory, reduce, update. MFU is against the
peak of the dtype in
use and, for fp8, also as bf16-equivalent; "usual" counts windows as if not causal (6 P + 12 D sum of
windows),
"causal" counts the keys that are seen. --device=cpu with --depth=2 --width-per-layer=16 tries the script
itself.
"""

from __future__ import annotations

import argparse
import csv
import time
from typing import Any

import torch

from nanochat import hardware, runtime, scaling
from nanochat import load as models
from nanochat.flash_attention import explain
from nanochat.train import speed


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--depth", type=int, default=12)
    parser.add_argument("--width-per-layer", type=int, default=64)
    parser.add_argument("--sequence-len", type=int, default=2048)
    parser.add_argument("--device-batch", type=int, default=32)
    parser.add_argument("--batch-tokens", type=int, help="tokens a step (default: the plan's, at most 2^19)")
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--speed", default="compile", help="as --speed of base_train")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--csv")
    args = parser.parse_args()
    row = measure(args)
    for key, value in row.items():
        print(f"{key:>28}  {value}")
    if args.csv:
        with open(args.csv, "w", newline="") as file:
            writer = csv.DictWriter(file, row)
            writer.writeheader()
            writer.writerow(row)


def measure(args: argparse.Namespace) -> dict[str, Any]:
    begin = time.perf_counter()
    rt = runtime.start(args.device, None)
    one = args.device_batch * args.sequence_len
    batch = args.batch_tokens or max(one, min(2**19, scaling.plan(args.depth).batch_tokens))
    plan = scaling.plan(
        args.depth, aspect=args.width_per_layer, sequence_len=args.sequence_len,
        device_batch=args.device_batch, batch_tokens=batch // one * one, num_steps=1000,
    )  # fmt: skip
    model = models.build(plan.config, rt, seed=1)
    optimizer = model.setup_optimizer(batch_tokens=plan.batch_tokens, weight_decay=plan.weight_decay)
    speed.apply(model, args.speed, rt)
    print(explain(rt.device, rt.dtype))
    on_gpu = rt.device.type == "cuda"
    shape = plan.accum, args.device_batch, args.sequence_len + 1
    ids = torch.randint(0, plan.vocab_size, shape, generator=torch.Generator().manual_seed(0))
    ids = ids.pin_memory() if on_gpu else ids
    weights = torch.full((), 1 / plan.batch_tokens, device=rt.device).expand(
        args.device_batch, args.sequence_len
    )

    def now() -> float:
        if on_gpu:
            torch.cuda.synchronize()
        return time.perf_counter()

    def step() -> tuple[float, float]:
        """Seconds in all, and of the optimizer."""
        start = now()
        for rows in ids:
            rows = rows.to(rt.device, non_blocking=True)
            model.weighted_nll(model.hidden(rows[:, :-1]), rows[:, 1:], weights).backward()
        middle = now()
        float(optimizer.reduce())
        optimizer.update()
        optimizer.zero_grad()
        return now() - start, now() - middle

    step()
    first = time.perf_counter() - begin
    step()
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    times, optimizer_times = zip(*(step() for _ in range(args.steps)))
    seconds, tokens = sorted(times)[len(times) // 2], plan.batch_tokens
    per_second = tokens / seconds
    peak = hardware.peak_flops(rt.device, rt.dtype) or float("nan")
    own = hardware.peak_flops(rt.device, torch.float8_e4m3fn) if "fp8" in args.speed else peak
    memory = scaling.memory_bytes(plan, on_cpu=not on_gpu)
    return {
        "device": torch.cuda.get_device_name() if on_gpu else hardware.cpu_name(),
        "torch": torch.__version__,
        "depth": args.depth,
        "speed": args.speed,
        "dtype": str(rt.dtype).removeprefix("torch."),
        "device_batch": args.device_batch,
        "batch_tokens": tokens,
        "tokens_per_second": round(per_second),
        "step_seconds": round(seconds, 4),
        "best_step_seconds": round(min(times), 4),
        "optimizer_seconds": round(min(optimizer_times), 4),
        "kernel_seconds": round(kernel_seconds(step), 4) if on_gpu else "",
        "mfu_usual": round(per_second * model.estimate_flops() / peak, 4),
        "mfu_causal": round(per_second * model.estimate_flops(causal=True) / peak, 4),
        "mfu_of_fp8_peak": round(per_second * model.estimate_flops() / own, 4) if own else "",
        "peak_memory_gb": round(torch.cuda.max_memory_allocated() / 1e9, 2) if on_gpu else "",
        "predicted_memory_gb": round(scaling.peak_bytes(memory) / 1e9, 2),
        "first_step_seconds": round(first, 1),
    }


def kernel_seconds(step: Any) -> float:
    """What the kernels of one step take by themselves, summed; the rest of a step's time is waiting."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as trace:
        step()
    return sum(event.self_device_time_total for event in trace.key_averages()) / 1e6


if __name__ == "__main__":
    main()
