"""Training speed on this machine, beside its floor and beside a plain loop.

    python benchmarks/bench_train.py --depths=4,6 --dtypes=float32,bfloat16 --csv=auto

Variants: `ours`; `torch`, ours without the compiled CPU kernels (what a machine without a C compiler gets);
`plain`, the same network as a usual PyTorch loop (plain_loop.py); `plain-compiled`, that loop under
torch.compile. The shape is fixed so that figures compare: V = 4,096, pattern L, heads of 64 channels, rows of
512 tokens, 16 rows a step, width 64 a layer; `demo` instead of a depth is the CPU demo's (depth 4, width 128,
rows of 256, 8 rows). The floor is FLOPs per token over the matrix rate that this machine reaches at these
sizes, measured in the same process. Each variant has a process of its own; they stay, and take turns step by
step, so that what else happens on the machine happens to all of them, and the best step counts. The time to
the first step is real, compilation included; the others wait meanwhile.
"""

from __future__ import annotations

import argparse
import csv
import json
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
VOCAB = 4096
SHAPE = {"aspect": 64, "head_dim": 64, "sequence_len": 512, "device_batch": 16}
DEMO = {"aspect": 32, "head_dim": 32, "sequence_len": 256, "device_batch": 8}  # as scaling.RUNS["cpu-demo"]
VARIANTS = ("ours", "torch", "plain", "plain-compiled")


def measure(depth: str, dtype_name: str, variant: str) -> dict[str, float | int | str]:
    """One configuration in this process, a step for each line that comes in: seconds to the first step, the
    best and the median step after it."""
    start = time.perf_counter()
    import torch

    from nanochat import hardware, runtime, scaling
    from nanochat.gpt import GPT
    from nanochat.kernels import build as native

    runtime.start("cpu", dtype_name)
    dtype, shape = getattr(torch, dtype_name), DEMO if depth == "demo" else SHAPE
    rows, length = shape["device_batch"], shape["sequence_len"]
    plan = scaling.plan(
        4 if depth == "demo" else int(depth), vocab_size=VOCAB, window_pattern="L", num_steps=100,
        batch_tokens=rows * length, **shape,
    )  # fmt: skip
    model = GPT(plan.config, dtype)
    model.init_weights(1)
    optimizer = model.setup_optimizer(batch_tokens=plan.batch_tokens, weight_decay=plan.weight_decay)
    ids = torch.randint(0, VOCAB, (rows, length + 1), generator=torch.Generator().manual_seed(0))
    weights = torch.full((), 1 / (rows * length)).expand(rows, length)
    if variant == "torch":
        native._override = False
    if variant.startswith("plain"):
        forward_backward, update = plain(model, optimizer, ids, variant == "plain-compiled")
    else:

        def forward_backward() -> torch.Tensor:
            loss = model.weighted_nll(model.hidden(ids[:, :-1]), ids[:, 1:], weights)
            loss.backward()
            return loss

        def update() -> None:
            optimizer.reduce()
            optimizer.update()
            optimizer.zero_grad()

    times, optimizer_times, losses = [], [], []
    for _ in sys.stdin:
        begin = time.perf_counter()
        loss = forward_backward()
        middle = time.perf_counter()
        update()
        losses.append(loss.item())
        times.append(time.perf_counter() - begin)
        optimizer_times.append(time.perf_counter() - middle)
        if len(times) == 1:
            first = time.perf_counter() - start
        print("a step is done", flush=True)
    best = min(times[1:])
    tokens = rows * length
    flops, rate = model.estimate_flops(causal=True), hardware.matmul_rate(dtype, 1.0)
    return {
        "depth": plan.depth,
        "width": plan.model_dim,
        "dtype": dtype_name,
        "variant": variant,
        "threads": torch.get_num_threads(),
        "tokens_per_second": round(tokens / best),
        "median_tokens_per_second": round(tokens / sorted(times[1:])[len(times) // 2 - 1]),
        "first_step_seconds": round(first, 2),
        "optimizer_frac": round(min(optimizer_times[1:]) / best, 3),
        "matmul_gflops": round(rate / 1e9, 1),
        "floor_tokens_per_second": round(rate / flops),
        "fraction_of_floor": round(tokens / best * flops / rate, 3),
        "first_loss": round(losses[0], 5),
        "last_loss": round(losses[-1], 5),
    }


def plain(
    model: Any, optimizer: Any, ids: Any, is_compiled: bool
) -> tuple[Callable[[], Any], Callable[[], None]]:
    """(forward and backward, update) of the rival loop on the same parameters."""
    import torch
    from plain_loop import PlainOptimizer, forward_backward

    loss_of = torch.compile(model) if is_compiled else model
    dtype = torch.bfloat16 if model.compute_dtype == torch.bfloat16 else torch.float32
    update = PlainOptimizer(optimizer.param_groups, dtype).step
    return lambda: forward_backward(model, ids[:, :-1], ids[:, 1:], loss_of), update


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--depths", default="4,6")
    parser.add_argument("--dtypes", default="float32,bfloat16")
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--csv", help="file to write, or auto for benchmarks/record/MACHINE/DATE-train.csv")
    parser.add_argument("--variants", default="ours,plain")
    parser.add_argument("--one", nargs=3, metavar=("DEPTH", "DTYPE", "VARIANT"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        sys.path.insert(0, str(ROOT))
        print(json.dumps(measure(*args.one)))
        return
    rows = []
    for depth in args.depths.split(","):
        for dtype in args.dtypes.split(","):
            found = take_turns(depth, dtype, args.variants.split(","), args.steps)
            slowest = found.get("plain", {}).get("tokens_per_second")
            for row in found.values():
                row["times_plain"] = round(row["tokens_per_second"] / slowest, 2) if slowest else ""
                rows.append(row)
                print("  ".join(f"{key} {value}" for key, value in row.items()), flush=True)
    if args.csv:
        write_rows(rows, args.csv, "train")


def take_turns(depth: str, dtype: str, variants: list[str], steps: int) -> dict[str, dict[str, Any]]:
    """What each variant's process found after a first step and `steps` more, made in turns."""
    found, running = {}, {}
    try:
        for turn in range(steps + 1):
            for variant in variants:
                if turn == 0:
                    running[variant] = subprocess.Popen(
                        [sys.executable, __file__, "--one", depth, dtype, variant], stdin=subprocess.PIPE,
                        stdout=subprocess.PIPE, text=True, cwd=ROOT,
                    )  # fmt: skip
                _ask(running[variant], "step")
        for variant, process in running.items():
            found[variant] = json.loads(process.communicate(timeout=600)[0].splitlines()[-1])
    finally:
        for process in running.values():
            process.kill()
    return found


def _ask(process: subprocess.Popen[str], line: str) -> None:
    assert process.stdin is not None and process.stdout is not None
    print(line, file=process.stdin, flush=True)
    if not process.stdout.readline():
        raise SystemExit(f"a process ended with code {process.wait()}; its message stands above")


def write_rows(rows: list[dict[str, Any]], where: str, name: str) -> None:
    """A csv file of rows with the same keys at `where`, or at record_path(name) for "auto"."""
    path = record_path(name) if where == "auto" else Path(where)
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
