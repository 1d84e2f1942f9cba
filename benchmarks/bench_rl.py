"""Points that RL adds to an under-trained model on sums with the tool and word problems, seed by seed.

    python benchmarks/bench_rl.py --home=HOME --seeds=1,2,3 --csv=auto

HOME holds a base model of the CPU demo (bash speedrun.sh --preset=cpu-demo makes one). For each seed: twelve
steps of SFT from it, with that seed (run rl-bench-SEED); `chat_rl --task=arithmetic` from there, at one rate;
greedy accuracy before and after on 200 sums and 200 word problems whose operands and phrasings neither
training nor RL shows. The 95 % intervals are Wilson's for an accuracy, and the normal one of paired
differences for the points. CPU seconds are those of the stage `rl`, without the evaluations here.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
SFT = ("--preset=cpu-demo", "--parent=main:base", "--eval-every=0")
RL = ("--preset=cpu-demo", "--task=arithmetic", "--eval-every=0", "--save-every=0", "--no-reference")


def answers(home: str, tag: str, stage: str, size: int) -> dict[str, list[bool]]:
    """Whether each held-out question is answered right, by set."""
    from nanochat import load as models
    from nanochat import runtime
    from nanochat.engine import Engine
    from nanochat.eval.chat import evaluate_task
    from nanochat.home import Home
    from tasks.reinforce import HeldOutSums

    rt = runtime.start("cpu", "float32")
    model, tok, _ = models.load_model(Home(Path(home)), tag, stage, rt=rt)
    engine, found = Engine(model, tok), {}
    for stories in (False, True):
        task = HeldOutSums(stories, size)
        _, records = evaluate_task(task, engine, rt, max_tokens=40)
        found[task.name] = [record["right"] for record in records]
    return found | {"both": found["sums"] + found["stories"]}


def row_of(before: list[bool], after: list[bool]) -> dict[str, float]:
    """Accuracies and the points between them in per cent, each with its 95 % interval."""
    from nanochat.eval.chat import wilson

    n, row = len(before), {}
    for name, right in (("before", before), ("after", after)):
        low, high = wilson(sum(right), n)
        row |= {name: sum(right) / n, f"{name}_low": low, f"{name}_high": high}
    gains = [b - a for a, b in zip(before, after, strict=True)]
    mean = sum(gains) / n
    spread = 1.96 * math.sqrt(sum((g - mean) ** 2 for g in gains) / (n - 1) / n)
    row |= {"points": mean, "points_low": mean - spread, "points_high": mean + spread}
    return {f"{key}_percent": round(100 * value, 1) for key, value in row.items()}


def one_seed(args: argparse.Namespace, seed: int) -> list[dict[str, Any]]:
    """SFT, before, RL, after."""
    from scripts import chat_rl, chat_sft

    tag = f"rl-bench-{seed}"
    where = [f"--home={args.home}", f"--tag={tag}", f"--seed={100 + seed}"]
    chat_sft.main([*SFT, *where, f"--epochs={args.sft_epochs}"])
    before = answers(args.home, tag, "sft", args.size)
    wall, cpu = time.perf_counter(), time.process_time()
    chat_rl.main([*RL, *where, f"--steps={args.steps}", f"--lr-scale={args.lr_scale}", *args.more])
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    after = answers(args.home, tag, "rl", args.size)
    facts = {"seed": seed, "steps": args.steps, "lr_scale": args.lr_scale}
    return [
        facts | {"questions": name, "total": len(before[name])} | row_of(before[name], after[name])
        | {"rl_seconds": round(wall, 1), "rl_cpu_seconds": round(cpu, 1)}
        for name in before
    ]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--home", required=True)
    parser.add_argument("--seeds", default="1,2,3")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--lr-scale", type=float, default=0.2)
    parser.add_argument("--sft-epochs", type=float, default=0.03)
    parser.add_argument("--size", type=int, default=200, help="held-out questions of either kind")
    parser.add_argument("--csv", help="file to write, or auto for benchmarks/record/MACHINE/DATE-rl.csv")
    args, args.more = parser.parse_known_args()  # what is left goes to chat_rl
    rows: list[dict[str, Any]] = []
    for seed in map(int, args.seeds.split(",")):
        rows += one_seed(args, seed)
        for row in rows[-3:]:
            print("  ".join(f"{key} {value}" for key, value in row.items()), flush=True)
    if args.csv:
        from bench_train import write_rows

        write_rows(rows, args.csv, "rl")


if __name__ == "__main__":
    main()
