"""How long it takes to measure a model: CORE, written answers, and one checkpoint on every offline task.

    python benchmarks/bench_eval.py --home=HOME --bundle=eval_bundle.zip --csv=auto

HOME holds a trained run, such as that of `bash speedrun.sh` on a CPU; it is not written to. --bundle is the
CORE bundle's zip file (left out: no CORE).

core: some examples of each task as candidates whose shared beginnings are computed once (what base_eval
does), as whole rows in batches, and one row at a time; how far their scores lie apart. --depth replaces the
run's network by random weights of that depth.
generate: the answers of the generative tasks by the batched engine, by the same engine one prompt at a time,
and by a plain loop with a KV cache, one prompt at a time, which writes as many tokens (fewer prompts there).
whole: base_eval and chat_eval as speedrun.sh calls them, start of Python included, on a copy of the run.

--clock=cpu counts the process's own seconds (not for whole), for machines with other work.
"""

from __future__ import annotations

import argparse
import csv
import os
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))
from bench_engine import model_of, plain_loop
from bench_train import record_path

from nanochat import load as models
from nanochat.engine import Engine
from nanochat.eval import core
from nanochat.eval.branches import score_examples
from nanochat.eval.chat import write_answers
from nanochat.eval.rows import score_endings
from nanochat.home import Home
from nanochat.runtime import Runtime
from tasks.eval_tasks import open_tasks

ROOT = Path(__file__).resolve().parent.parent
CLAIMS = {"generate": 10.0, "whole": 120.0}  # times one prompt at a time; seconds at most
BATCH_TOKENS = 8192
CLOCKS = [time.perf_counter]  # the last one counts


def seconds(work: Callable[[], Any], clock: Callable[[], float] | None = None) -> tuple[float, Any]:
    clock = clock or CLOCKS[-1]
    begin = clock()
    found = work()
    return clock() - begin, found


def measure_core(model: Any, tok: Any, bundle: Path, num_examples: int, note: Callable[..., None]) -> None:
    """Rows "core": a line for each type of task, and one for all together."""
    tasks, _ = core.load_tasks(bundle)
    times: dict[str, list[float]] = {}
    apart, counts = 0.0, dict[str, int]()
    for task in tasks:
        records = core.read_records(task, num_examples)
        examples = []
        for i in range(len(records)):
            encoded = tok.encode(core.prompts(task, records, i), prepend=tok.get_bos_token_id())
            examples.append(core.scored_rows(task, encoded))
        rows = [row for example in examples for row in example]
        score_examples(model, examples[:1], BATCH_TOKENS)  # warm
        shared, found = seconds(lambda examples=examples: score_examples(model, examples, BATCH_TOKENS))
        whole, batched = seconds(lambda rows=rows: score_endings(model, rows, BATCH_TOKENS))
        single, wanted = seconds(lambda rows=rows: [score_endings(model, [row], 1)[0] for row in rows])
        flat = [nll for scores in found for nll, _ in scores]
        apart = max(apart, *(abs(a - b) for a, (b, _) in zip(flat, wanted, strict=True)))
        apart = max(apart, *(abs(a - b) for (a, _), (b, _) in zip(batched, wanted, strict=True)))
        for kind in (task.kind, "all"):
            sums = times.setdefault(kind, [0.0, 0.0, 0.0])
            times[kind] = [a + b for a, b in zip(sums, (shared, whole, single), strict=True)]
            counts[kind] = counts.get(kind, 0) + len(examples)
        print(f"  {task.name}: {shared:.2f} {whole:.2f} {single:.2f} s", flush=True)
    for kind, (shared, whole, single) in times.items():
        for how, taken in (("shared", shared), ("batched rows", whole), ("one row at a time", single)):
            note(
                f"core {kind}", how, examples=counts[kind], seconds=round(taken, 3),
                ratio=round(taken / shared, 2), apart_nats=f"{apart:.1e}",
            )  # fmt: skip


def measure_answers(
    model: Any, tok: Any, home: Home, num_examples: int, num_plain: int, note: Callable[..., None]
) -> None:
    """Rows "generate": prompts a second of the three ways over the generative offline tasks."""
    engine, tasks = Engine(model, tok), open_tasks("auto", {}, home)
    asked = [t[i] for t in tasks.values() if t.kind == "generative" for i in range(min(num_examples, len(t)))]
    few = asked[:: max(1, len(asked) // num_plain)]
    how = {"max_tokens": 128, "temperature": 0.0}
    write_answers(engine, few[:2], [1, 1], **how)
    batched, answers = seconds(lambda: write_answers(engine, asked, [1] * len(asked), batch_size=256, **how))
    single, again = seconds(lambda: [write_answers(engine, [c], [1], batch_size=1, **how)[0] for c in few])
    prompts = [tok.render_for_completion(c) for c in few]
    wanted = [max(1, len(tok.encode(full))) for _, full, _ in again]
    plain, _ = seconds(lambda: [list(plain_loop(model, p, n)) for p, n in zip(prompts, wanted, strict=True)])
    same = sum(a[1] == b[1] for a, b in zip(answers[:: max(1, len(asked) // num_plain)], again, strict=True))
    note("generate", "batched", examples=len(asked), seconds=round(batched, 3))
    for name, taken in (("engine, one prompt at a time", single), ("plain loop, one at a time", plain)):
        ratio = (taken / len(few)) / (batched / len(asked))
        note(
            "generate", name, examples=len(few), seconds=round(taken, 3), ratio=round(ratio, 2),
            claim=CLAIMS["generate"], equal_answers=same,
        )  # fmt: skip


def measure_whole(home: Home, tag: str, bundle: Path | None, note: Callable[..., None]) -> None:
    """Rows "whole": seconds of the two commands in a home of links to the run's checkpoints."""
    total = 0.0
    with tempfile.TemporaryDirectory() as temporary:
        copy = Home(Path(temporary))
        for stage in ("base", "sft"):
            copy.stage_dir(tag, stage).parent.mkdir(parents=True, exist_ok=True)
            copy.stage_dir(tag, stage).symlink_to(home.stage_dir(tag, stage).absolute())
        copy.tokenizer_dir.symlink_to(home.tokenizer_dir.absolute())
        if bundle is not None:
            copy.eval_bundle_dir.symlink_to(bundle.absolute())
        for words in (["scripts.base_eval"], ["scripts.chat_eval", "--stage=sft"]):
            command = [
                sys.executable,
                "-m",
                *words,
                "--preset=cpu-demo",
                f"--home={temporary}",
                f"--tag={tag}",
            ]
            before = sum(os.times()[2:4])
            taken, _ = seconds(
                lambda command=command: subprocess.run(
                    command, check=True, cwd=ROOT, stdout=subprocess.DEVNULL, env=dict(os.environ)
                ),
                time.perf_counter,
            )
            total += taken
            cpu = round(sum(os.times()[2:4]) - before, 2)
            note("whole", " ".join(words), seconds=round(taken, 2), cpu_seconds=cpu)
    note("whole", "together", seconds=round(total, 2), claim=CLAIMS["whole"])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", default="core,generate,whole", help="of core, generate, whole")
    parser.add_argument("--home", help="default: NANOCHAT_HOME")
    parser.add_argument("--tag", default="main")
    parser.add_argument("--bundle", help="eval_bundle.zip (default: no CORE)")
    parser.add_argument("--core-examples", type=int, default=8, help="of each CORE task")
    parser.add_argument("--examples", type=int, default=200, help="of each generative task")
    parser.add_argument("--plain-examples", type=int, default=64, help="answered one at a time")
    parser.add_argument("--depth", type=int, help="random weights of this depth for core")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--clock", choices=("wall", "cpu"), default="wall")
    parser.add_argument("--threads", type=int, help="default: torch's")
    parser.add_argument("--csv", help="file to write, or auto for benchmarks/record/MACHINE/DATE-eval.csv")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    CLOCKS.append(time.perf_counter if args.clock == "wall" else time.process_time)
    home, rt = Home.find(args.home), Runtime(torch.device(args.device), getattr(torch, args.dtype))
    model, tok, _ = models.load_model(home, args.tag, "sft", rt=rt)
    rows: list[dict[str, object]] = []

    def note(what: str, how: str, **found: object) -> None:
        row = {
            "benchmark": what, "how": how, "depth": args.depth if args.depth and "core" in what
            else model.config.n_layer, "device": args.device, "dtype": args.dtype,
            "threads": torch.get_num_threads(),
            "clock": "wall" if what == "whole" else args.clock, "examples": "", "seconds": "",
            "cpu_seconds": "", "ratio": "", "claim": "", "apart_nats": "", "equal_answers": "",
        }  # fmt: skip
        rows.append({**row, **found})
        print("  ".join(f"{key} {value}" for key, value in rows[-1].items() if value != ""), flush=True)

    with tempfile.TemporaryDirectory() as temporary:
        bundle = None
        if args.bundle:
            with zipfile.ZipFile(args.bundle) as packed:
                packed.extractall(temporary)
            bundle = Path(temporary) / "eval_bundle"
        if bundle is not None and "core" in args.only:
            measured = model
            if args.depth:
                measured = model_of(args.depth, tok.get_vocab_size(), 2048, 128).to(rt.device)
                measured.compute_dtype = rt.dtype
            measure_core(measured, tok, bundle, args.core_examples, note)
        if "generate" in args.only:
            measure_answers(model, tok, home, args.examples, args.plain_examples, note)
        if "whole" in args.only:
            measure_whole(home, args.tag, bundle, note)
    if args.csv:
        path = Path(args.csv) if args.csv != "auto" else record_path("eval")
        path.parent.mkdir(parents=True, exist_ok=True)
        is_new = not path.exists()
        with open(path, "a", newline="") as file:
            writer = csv.DictWriter(file, rows[0])
            if is_new:
                writer.writeheader()
            writer.writerows(rows)


if __name__ == "__main__":
    main()
