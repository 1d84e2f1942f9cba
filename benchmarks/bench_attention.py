"""Attention on this machine: windows against full and masked attention, packed documents, decoding.

    OMP_NUM_THREADS=1 python -m benchmarks.bench_attention --csv=auto
    python -m benchmarks.bench_attention --only=chunks      # why sdpa.CHUNK is what it is

Rivals are timed in turns in one process, and the fastest of --repeats counts. On a CPU that is CPU time, so
that other programs disturb little (use one thread); on a GPU it is wall time between synchronisations. Peak
memory is what one forward and backward pass adds to a fresh process (CPU) or to the allocator (GPU).
"""

from __future__ import annotations

import argparse
import csv
import multiprocessing
import os
import re
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path

import torch

from nanochat import hardware
from nanochat.flash_attention import flash_attn, sdpa

SHAPES = (
    (1, 2048, 6, 64, 512),
    (4, 2048, 4, 64, 512),
    (4, 1024, 4, 64, 256),
    (16, 512, 4, 64, 128),
)  # B T H E left
DOCUMENTS = (16, 512, 4, 64)
DECODE = (8, 1024, 12, 64)  # rows, cached positions, query heads, head size


def best_ms(rivals: dict[str, Callable[[], object]], device: str, repeats: int) -> dict[str, float]:
    """Milliseconds of each, the least over the rounds; every round runs all of them."""

    def clock() -> float:
        if device == "cpu":
            return time.process_time()
        torch.cuda.synchronize()
        return time.perf_counter()

    best = dict.fromkeys(rivals, float("inf"))
    for repeat in range(repeats + 1):
        for name, run in rivals.items():
            start = clock()
            run()
            if repeat:  # the first round warms up
                best[name] = min(best[name], 1e3 * (clock() - start))
    return best


def make(device: str, dtype: torch.dtype, rows: int, time_: int, heads: int, size: int) -> list[torch.Tensor]:
    source = torch.Generator().manual_seed(0)
    shape = rows, time_, heads, size
    return [torch.randn(shape, generator=source).to(device, dtype).requires_grad_() for _ in range(3)]


def variants(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, left: int
) -> dict[str, Callable[[], torch.Tensor]]:
    mask = sdpa._band(q.shape[1], q.shape[1], 0, left, 0, q.device)
    return {
        "full": lambda: sdpa.attend(q, k, v, None, 0),
        "window": lambda: sdpa.attend(q, k, v, left, 0),
        "masked": lambda: sdpa._call(q, k, v, mask),
    }


def both(run: Callable[[], torch.Tensor], leaves: list[torch.Tensor]) -> Callable[[], object]:
    dy = torch.ones_like(leaves[0])
    return lambda: torch.autograd.grad(run(), leaves, dy)


def peak_mb(name: str, device: str, dtype: torch.dtype, shape: tuple[int, ...], pipe=None) -> float:
    """What a forward and backward pass adds to the memory in use, in MB."""
    leaves = make(device, dtype, *shape[:4])
    run = both(variants(*leaves, shape[4])[name], leaves)
    if device != "cpu":
        run()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    small = make(device, dtype, 1, 8, *shape[2:4])
    both(variants(*small, 2)[name], small)()  # loads what a first call loads
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts again here
    before = _status_mb("VmRSS")
    run()
    peak = _status_mb("VmHWM") - before
    if pipe is not None:
        pipe.send(peak)
    return peak


def _status_mb(field: str) -> float:
    found = re.search(rf"{field}:\s+(\d+)", Path("/proc/self/status").read_text())
    return int(found.group(1)) / 1024 if found else float("nan")


def fresh_peak_mb(name: str, device: str, dtype: torch.dtype, shape: tuple[int, ...]) -> float:
    if device != "cpu":
        return peak_mb(name, device, dtype, shape)
    os.environ["MALLOC_MMAP_THRESHOLD_"] = "65536"  # for the child: freed tensors leave the process at once
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    child = context.Process(target=peak_mb, args=(name, device, dtype, shape, theirs))
    child.start()
    peak = ours.recv()
    child.join()
    return peak


def windows(device: str, dtype: torch.dtype, repeats: int, has_memory: bool) -> list[dict]:
    rows = []
    for shape in SHAPES:
        leaves = make(device, dtype, *shape[:4])
        runs = variants(*leaves, shape[4])
        with torch.no_grad():
            forward = best_ms(runs, device, repeats)
        total = best_ms({name: both(run, leaves) for name, run in runs.items()}, device, repeats)
        for name in runs:
            rows.append(
                {
                    "what": "window", "shape": "B{} T{} H{} E{} left={}".format(*shape), "variant": name,
                    "forward_ms": forward[name], "forward_backward_ms": total[name],
                    "times_window": total[name] / total["window"],
                    "peak_mb": fresh_peak_mb(name, device, dtype, shape) if has_memory else "",
                }
            )  # fmt: skip
    return rows


def documents(device: str, dtype: torch.dtype, repeats: int) -> list[dict]:
    rows = []
    for mean in (20, 80, 200):
        leaves = make(device, dtype, *DOCUMENTS)
        doc_start, source = torch.zeros(DOCUMENTS[:2], dtype=torch.int32), torch.Generator().manual_seed(1)
        for row in doc_start:
            position = 0
            while position < len(row):
                row[position:] = position
                position += int(torch.randint(mean // 3, 2 * mean - mean // 3, (1,), generator=source))
        doc_start = doc_start.to(device)
        runs = {
            "full": lambda leaves=leaves: sdpa.attend(*leaves, None, 0),
            "documents": lambda leaves=leaves, d=doc_start: sdpa.attend(*leaves, None, 0, d),
            "mask per chunk": lambda leaves=leaves, d=doc_start: sdpa.Chunked.apply(
                *leaves, DOCUMENTS[1], 0, d
            ),
        }
        total = best_ms({name: both(run, leaves) for name, run in runs.items()}, device, repeats)
        for name in runs:
            rows.append(
                {
                    "what": "packed", "shape": f"B16 T512 H4 E64, documents of {mean}", "variant": name,
                    "forward_backward_ms": total[name], "times_window": total[name] / total["documents"],
                }
            )  # fmt: skip
    return rows


def decoding(device: str, dtype: torch.dtype, repeats: int) -> list[dict]:
    """One token for each row of a full cache: multi-head, grouped and multi-query attention."""
    num_rows, length, heads, size = DECODE
    runs, cache_mb = {}, {}
    for kv_heads in (12, 6, 1):
        q = torch.randn(num_rows, 1, heads, size, dtype=dtype, device=device)
        k, v = (torch.randn(num_rows, 1, kv_heads, size, dtype=dtype, device=device) for _ in range(2))
        shape = num_rows, length, kv_heads, size
        caches = [torch.randn(shape, dtype=dtype, device=device) for _ in range(2)]
        lengths = torch.full((num_rows,), length - 1, dtype=torch.int32, device=device)
        name = f"K={kv_heads}"
        cache_mb[name] = 2 * caches[0].numel() * caches[0].element_size() / 2**20
        runs[name] = lambda a=(q, *caches, k, v, lengths): flash_attn.flash_attn_with_kvcache(*a, causal=True)
    times = best_ms(runs, device, 10 * repeats)
    return [
        {"what": "decode", "shape": "B{} S{} H{} E{}".format(*DECODE), "variant": name,
         "forward_ms": times[name], "peak_mb": cache_mb[name], "times_window": times[name] / times["K=1"]}
        for name in runs
    ]  # fmt: skip


def chunks(device: str, dtype: torch.dtype, repeats: int) -> list[dict]:
    rows, default = [], sdpa.CHUNK
    for shape in SHAPES[1:]:
        leaves = make(device, dtype, *shape[:4])

        def attend(size: int, leaves=leaves, left=shape[4]) -> torch.Tensor:
            sdpa.CHUNK = size
            return sdpa.attend(*leaves, left, 0)

        def with_chunk(size: int, attend=attend, leaves=leaves) -> Callable[[], object]:
            return both(lambda: attend(size), leaves)

        times = best_ms({str(n): with_chunk(n) for n in (64, 128, 192, 256, 384)}, device, repeats)
        for name, value in times.items():
            rows.append(
                {"what": "chunk", "shape": "B{} T{} H{} E{} left={}".format(*shape), "variant": name,
                 "forward_backward_ms": value, "times_window": value / times["128"]}
            )  # fmt: skip
    sdpa.CHUNK = default
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtypes", default="float32,bfloat16")
    parser.add_argument("--repeats", type=int, default=5, help="rounds, of which the fastest counts")
    parser.add_argument("--only", default="windows,documents,decoding", help="which parts; also: chunks")
    parser.add_argument("--no-memory", action="store_true", help="leave out the peak memory")
    parser.add_argument(
        "--csv", default="", help="file to write; auto = benchmarks/record/<machine>/<date>-attention.csv"
    )
    args = parser.parse_args()
    torch.set_num_threads(1 if args.device == "cpu" else torch.get_num_threads())
    rows: list[dict] = []
    for name in args.dtypes.split(","):
        dtype, parts = getattr(torch, name), args.only.split(",")
        found = [row for part, make_rows in {
            "windows": lambda d: windows(args.device, d, args.repeats, not args.no_memory),
            "documents": lambda d: documents(args.device, d, args.repeats),
            "decoding": lambda d: decoding(args.device, d, args.repeats),
            "chunks": lambda d: chunks(args.device, d, args.repeats),
        }.items() if part in parts for row in make_rows(dtype)]  # fmt: skip
        for row in found:
            rounded = {key: round(x, 3) if isinstance(x, float) else x for key, x in row.items()}
            rows.append({"device": args.device, "dtype": name, "torch": torch.__version__} | rounded)
            print(*(f"{key}={value}" for key, value in rows[-1].items() if value != ""), flush=True)
    if args.csv:
        write(rows, args.csv, args.device)


def write(rows: list[dict], path: str, device: str) -> None:
    if path == "auto":
        name = (
            torch.cuda.get_device_name()
            if device == "cuda"
            else f"{hardware.cpu_name()} {os.cpu_count()} cores"
        )
        folder = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
        where = Path(__file__).resolve().parent / "record" / folder
        where.mkdir(parents=True, exist_ok=True)
        path = str(where / f"{date.today()}-attention.csv")
    names = ["device", "dtype", "torch", "what", "shape", "variant", "forward_ms", "forward_backward_ms",
             "times_window", "peak_mb"]  # fmt: skip
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, names, restval="")
        writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    main()
