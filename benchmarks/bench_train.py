"""Training speed on this machine, beside its floor.

    python benchmarks/bench_train.py --depths=4,6 --dtypes=float32,bfloat16 --csv=auto

The shape is fixed so that figures compare: V = 4,096, pattern L, heads of 64 channels, rows of 512 tokens,
16 rows a step, width 64 a layer. The floor is FLOPs per token over the matrix rate that this machine reaches
at these sizes, measured in the same process. Each configuration runs in a process of its own, so that the
time to the first step is real.
"""

from __future__ import annotations

import argparse
import csv
import json
import re
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VOCAB, HEAD_DIM, SEQUENCE_LEN, ROWS, ASPECT = 4096, 64, 512, 16, 64


def measure(depth: int, dtype_name: str, steps: int) -> dict[str, float | int | str]:
    """One configuration in this process: seconds to the first step, the best and the median step after it."""
    start = time.perf_counter()
    import torch

    from nanochat import hardware, scaling
    from nanochat.gpt import GPT, GPTConfig

    dtype = getattr(torch, dtype_name)
    plan = scaling.plan(
        depth, aspect=ASPECT, head_dim=HEAD_DIM, sequence_len=SEQUENCE_LEN, vocab_size=VOCAB,
        window_pattern="L", num_steps=100, batch_tokens=ROWS * SEQUENCE_LEN, device_batch=ROWS,
    )  # fmt: skip
    model = GPT(GPTConfig(**plan.config()), dtype)
    model.init_weights(1)
    optimizer = model.setup_optimizer(batch_tokens=plan.batch_tokens, weight_decay=plan.weight_decay)
    ids = torch.randint(0, VOCAB, (ROWS, SEQUENCE_LEN + 1), generator=torch.Generator().manual_seed(0))
    weights = torch.full((ROWS, SEQUENCE_LEN), 1 / (ROWS * SEQUENCE_LEN))
    times, optimizer_times = [], []
    for _ in range(steps + 1):
        begin = time.perf_counter()
        model.weighted_nll(model.hidden(ids[:, :-1]), ids[:, 1:], weights).backward()
        middle = time.perf_counter()
        optimizer.reduce()
        optimizer.update()
        optimizer.zero_grad()
        times.append(time.perf_counter() - begin)
        optimizer_times.append(time.perf_counter() - middle)
        if len(times) == 1:
            first = time.perf_counter() - start
    best = min(times[1:])
    tokens = ROWS * SEQUENCE_LEN
    flops, rate = model.estimate_flops(causal=True), hardware.matmul_rate(dtype, 1.0)
    return {
        "depth": depth,
        "width": plan.model_dim,
        "dtype": dtype_name,
        "threads": torch.get_num_threads(),
        "tokens_per_second": round(tokens / best),
        "median_tokens_per_second": round(tokens / sorted(times[1:])[steps // 2]),
        "first_step_seconds": round(first, 2),
        "optimizer_frac": round(min(optimizer_times[1:]) / best, 3),
        "matmul_gflops": round(rate / 1e9, 1),
        "floor_tokens_per_second": round(rate / flops),
        "fraction_of_floor": round(tokens / best * flops / rate, 3),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--depths", default="4,6")
    parser.add_argument("--dtypes", default="float32,bfloat16")
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--csv", help="file to write, or auto for benchmarks/record/MACHINE/DATE-train.csv")
    parser.add_argument("--one", nargs=2, metavar=("DEPTH", "DTYPE"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print(json.dumps(measure(int(args.one[0]), args.one[1], args.steps)))
        return
    rows = []
    for depth in args.depths.split(","):
        for dtype in args.dtypes.split(","):
            command = [sys.executable, __file__, "--one", depth, dtype, f"--steps={args.steps}"]
            done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
            rows.append(json.loads(done.stdout.splitlines()[-1]))
            print("  ".join(f"{key} {value}" for key, value in rows[-1].items()), flush=True)
    if args.csv:
        path = Path(args.csv) if args.csv != "auto" else record_path("train")
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "w", newline="") as file:
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows(rows)


def record_path(name: str) -> Path:
    """benchmarks/record/<processor>-<cores>/<date>-<name>.csv"""
    import os

    from nanochat import hardware

    machine = re.sub(r"[^a-z0-9]+", "-", f"{hardware.cpu_name()} {os.cpu_count()} cores".lower()).strip("-")
    return ROOT / "benchmarks" / "record" / machine / f"{time.strftime('%Y-%m-%d')}-{name}.csv"


if __name__ == "__main__":
    main()
