"""Two checkouts of this project, step by step in turns: what a change has cost or gained.

    git worktree add ../before COMMIT
    python benchmarks/bench_commits.py ../before --csv=auto

Each checkout has a process of its own for each piece of work. The two processes take turns, a step each, so
that other work on the machine slows both alike. A ratio is the seconds of the other checkout over the
seconds of this one: above 1, this one is faster. Only interfaces that both checkouts have are used: GPT,
GPTConfig, setup_optimizer, Engine. Weights are random, because speed does not depend on them.

train: one optimizer step of 16 rows of 512 tokens (V = 4,096, width 64 a layer, heads of 64 channels).
decode: 64 tokens after a prompt of 16 at batch 1. mixed: 32 prompts of 8 to 128 tokens at once, 32 tokens
each.
"""

from __future__ import annotations

import argparse
import csv
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

ROOT = Path(__file__).resolve().parent.parent
VOCAB = 4096
SEQUENCE_LEN = 512
ROWS = 16


class Bytes:
    """The least tokenizer that Engine takes: no text is encoded here."""

    def encode_special(self, text: str) -> int:
        return VOCAB - 1

    def get_bos_token_id(self) -> int:
        return VOCAB - 2

    def encode(self, text: str) -> list[int]:
        return [len(text)]

    def decode(self, ids: list[int]) -> str:
        return ""


def work_of(name: str, depth: int, dtype_name: str) -> Callable[[], None]:
    """The function that does one step of a piece of work, in the checkout that this process runs in."""
    import torch

    from nanochat.gpt import GPT, GPTConfig

    heads = depth
    config = GPTConfig(
        sequence_len=SEQUENCE_LEN,
        vocab_size=VOCAB,
        n_layer=depth,
        n_head=heads,
        n_kv_head=heads,
        n_embd=64 * depth,
        window_pattern="L",
    )
    model = GPT(config, getattr(torch, dtype_name))
    model.init_weights(1)
    rng = torch.Generator().manual_seed(0)
    if name == "train":
        optimizer = model.setup_optimizer(batch_tokens=ROWS * SEQUENCE_LEN)
        ids = torch.randint(0, VOCAB, (ROWS, SEQUENCE_LEN + 1), generator=rng)

        def train() -> None:
            model(ids[:, :-1], ids[:, 1:]).backward()
            optimizer.step()
            optimizer.zero_grad()

        return train

    from nanochat.engine import Engine

    with torch.no_grad():
        # Fresh projections are zero. Any other values make the sampled tokens differ, as in a real model.
        for parameter in model.parameters():
            parameter.uniform_(-0.05, 0.05, generator=rng)
    engine = Engine(model.eval(), Bytes())
    if name == "decode":
        prompt = torch.randint(0, VOCAB - 2, (16,), generator=rng).tolist()

        def decode() -> None:
            for _ in engine.generate(prompt, max_tokens=64, temperature=0.0):
                pass

        return decode
    lengths = torch.randint(8, 128, (32,), generator=rng).tolist()
    prompts = [torch.randint(0, VOCAB - 2, (length,), generator=rng).tolist() for length in lengths]

    def mixed() -> None:
        engine.complete(prompts, max_tokens=32, temperature=0.0)

    return mixed


def answer_steps(name: str, depth: int, dtype_name: str, threads: int) -> None:
    """Do one step for each line on stdin; print its seconds."""
    import torch

    torch.set_num_threads(threads)
    step = work_of(name, depth, dtype_name)
    for _ in sys.stdin:
        begin = time.perf_counter()
        step()
        print(time.perf_counter() - begin, flush=True)


def ask(process: subprocess.Popen[str]) -> float:
    assert process.stdin is not None and process.stdout is not None
    print("step", file=process.stdin, flush=True)
    line = process.stdout.readline()
    if not line:
        raise SystemExit(f"a process ended with code {process.wait()}; its message stands above")
    return float(line)


def take_turns(other: Path, words: list[str], turns: int) -> dict[str, float]:
    """Best and median seconds of a step in both checkouts, after a first step that is not counted."""
    processes: dict[str, subprocess.Popen[str]] = {}
    seconds: dict[str, list[float]] = {"this": [], "other": []}
    try:
        for which, folder in (("this", ROOT), ("other", other)):
            processes[which] = subprocess.Popen(
                [sys.executable, __file__, str(other), "--work", *words],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                cwd=folder,
                env=os.environ | {"PYTHONPATH": str(folder)},
            )
            ask(processes[which])
        for turn in range(turns):
            order = ("this", "other") if turn % 2 == 0 else ("other", "this")
            for which in order:
                seconds[which].append(ask(processes[which]))
    finally:
        for process in processes.values():
            process.kill()
    pairs = zip(seconds["other"], seconds["this"], strict=True)
    return {
        "this_best_seconds": min(seconds["this"]),
        "other_best_seconds": min(seconds["other"]),
        "best_ratio": min(seconds["other"]) / min(seconds["this"]),
        "median_ratio": median(seconds["other"]) / median(seconds["this"]),
        "median_of_ratios": median(other / this for other, this in pairs),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("other", type=Path, help="folder of the other checkout")
    parser.add_argument("--only", default="train,decode,mixed", help="pieces of work, with commas between")
    parser.add_argument("--depths", default="4,6")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--turns", type=int, default=8, help="steps of each checkout")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--csv", help="file to write, or auto for benchmarks/record/MACHINE/DATE-commits.csv")
    parser.add_argument("--work", nargs=4, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.work:
        name, depth, dtype_name, threads = args.work
        answer_steps(name, int(depth), dtype_name, int(threads))
        return
    rows = []
    for name in args.only.split(","):
        for depth in args.depths.split(","):
            found = take_turns(args.other.resolve(), [name, depth, args.dtype, str(args.threads)], args.turns)
            row = {"work": name, "depth": depth, "dtype": args.dtype, "threads": args.threads}
            rows.append(row | {key: f"{value:.4g}" for key, value in found.items()})
            print("  ".join(f"{key} {value}" for key, value in rows[-1].items()), flush=True)
    if args.csv:
        from bench_train import record_path

        path = record_path("commits") if args.csv == "auto" else Path(args.csv)
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "w", newline="") as file:
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows(rows)


if __name__ == "__main__":
    main()
