"""From text to packed batches on one core, beside the usual way, and how long a training step waits for data.

    python benchmarks/bench_data.py --data=parquet:DIR --megabytes=50 --csv=auto

Pipelines, each in a process of its own, best of three, in seconds of CPU time (a busy machine counts little):

    text       parquet -> Arrow -> our tokenizer -> CropPacker -> tensors
    tokens     the same from pre-tokenized shards (scripts.tok_shards)
    usual      parquet -> Python list -> tiktoken, one thread -> best fit over Python lists -> tensors

Then training steps of a small model through nanochat.train.loop.fit: seconds waited for data over seconds.
Without --data, documents of the embedded corpus are written to a temporary folder first.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
PIPELINES = ("text", "tokens", "usual", "wait")
T, ROWS = 2048, 32


def parquet_groups(directory: Path) -> Any:
    """Every row group's texts as Arrow arrays, endlessly."""
    import pyarrow.parquet as pq

    while True:
        for path in sorted(directory.glob("*.parquet")):
            with pq.ParquetFile(path) as file:
                for group in range(file.num_row_groups):
                    yield file.read_row_group(group, columns=["text"], use_threads=False).column(0)


def usual(directory: Path, tok: Any, num_bytes: int) -> dict[str, float]:
    """The well-known loader, written plainly: nothing is carried, the buffer is searched from end to end."""
    import tiktoken
    import torch

    specials: dict[str, int] = {}
    ranks = dict(tok.get_mergeable_ranks())
    encoding = tiktoken.Encoding(
        "", pat_str=tok.get_pattern(), mergeable_ranks=ranks, special_tokens=specials
    )
    bos, buffer, done, rows, dropped = tok.get_bos_token_id(), [], 0, 0, 0
    groups = parquet_groups(directory)
    next(groups)
    start = time.process_time()
    while done < num_bytes:
        batch = torch.empty((ROWS, T + 1), dtype=torch.long)
        for r in range(ROWS):
            at = 0
            while at <= T:
                while len(buffer) < 1000:
                    texts = next(groups).to_pylist()
                    done += sum(len(text.encode()) for text in texts)
                    buffer += [[bos, *ids] for ids in encoding.encode_ordinary_batch(texts, num_threads=1)]
                room, best = T + 1 - at, -1
                for i, ids in enumerate(buffer):
                    if len(ids) <= room and (best < 0 or len(ids) > len(buffer[best])):
                        best = i
                if best < 0:
                    best = min(range(len(buffer)), key=lambda i: len(buffer[i]))
                ids = buffer.pop(best)
                dropped += max(0, len(ids) - room)
                ids = ids[:room]
                batch[r, at : at + len(ids)] = torch.tensor(ids)
                at += len(ids)
            rows += 1
    seconds = time.process_time() - start
    return measures(done, rows * (T + 1), dropped, seconds)


def ours(uri: str, tok: Any, num_bytes: int) -> dict[str, float]:
    """DocumentBatches without its thread. Bytes of text are those of the documents that came in."""
    import torch

    from nanochat.data.loader import _pack
    from nanochat.data.pack import CropPacker
    from nanochat.data.sources import open_source
    from nanochat.home import Home
    from nanochat.runtime import Runtime

    source = open_source(uri, home=Home.find(), seed=1)
    rt, packer = Runtime(torch.device("cpu"), torch.float32), CropPacker(T + 1, tok.get_bos_token_id())
    batches = _pack(source.blocks("train"), None, tok, packer, ROWS, rt)
    next(batches)
    bytes_per_token = float(tok.bytes_per_token)
    before, start = dict(packer.counts), time.process_time()
    while (packer.counts["tokens_in"] - before["tokens_in"]) * bytes_per_token < num_bytes:
        next(batches)
    seconds = time.process_time() - start
    count = {name: packer.counts[name] - before[name] for name in before}
    done = count["tokens_in"] * bytes_per_token
    return measures(done, count["tokens_out"], count["tokens_dropped"], seconds)


def measures(num_bytes: float, tokens: int, dropped: int, seconds: float) -> dict[str, float]:
    return {
        "megabytes_per_second": round(num_bytes / 1e6 / seconds, 2),
        "tokens_per_second": round(tokens / seconds),
        "dropped_frac": round(dropped / (tokens + dropped), 5),
    }


def wait(uri: str, tok: Any, steps: int) -> dict[str, float]:
    """Steps of depth 4, width 128, T = 512, four batches each: the share of waiting."""

    from nanochat import runtime, scaling
    from nanochat.data.loader import DocumentBatches
    from nanochat.data.sources import open_source
    from nanochat.gpt import GPT
    from nanochat.home import Home
    from nanochat.train.loop import Rates, TrainState, fit

    rt = runtime.start()
    plan = scaling.plan(
        4, aspect=32, head_dim=64, sequence_len=512, vocab_size=tok.get_vocab_size(), window_pattern="L",
        num_steps=100, batch_tokens=2048, device_batch=1,
    )  # fmt: skip
    model = GPT(plan.config, rt.dtype).to(rt.device)
    model.init_weights(1)
    optimizer = model.setup_optimizer(batch_tokens=plan.batch_tokens, weight_decay=plan.weight_decay)
    seen: list[tuple[float, float]] = []  # (waited, whole) seconds of each step
    source = open_source(uri, home=Home.find(), seed=1)
    loader = DocumentBatches(source, tok, sequence_len=512, device_batch=1, rt=rt, accum=plan.accum)
    with loader as batches:
        fit(
            model, optimizer, batches, num_steps=steps + 1, accum=plan.accum, rt=rt, state=TrainState(),
            schedule=lambda _: Rates(1.0, 0.9),
            hooks=[lambda state: seen.append((state.wait_seconds, state.step_seconds))],
        )  # fmt: skip
    waited, total = (sum(column) for column in zip(*seen[1:]))
    facts = {"wait_frac": round(waited / total, 6), "step_seconds": round(total / steps, 4)}
    return facts | {"tokens_per_second": round(2048 * steps / total)}


def prepare(args: argparse.Namespace, folder: Path) -> Path:
    """A folder of parquet files, a tokenizer trained on them, and pre-tokenized shards."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    from nanochat.data.files import FileSource
    from nanochat.data.sources import open_source
    from nanochat.data.tokens import write_shards
    from nanochat.home import Home
    from nanochat.tokenizer import RustBPETokenizer

    directory = (
        Path(args.data.removeprefix("parquet:")).expanduser().resolve() if args.data else folder / "text"
    )
    if not args.data:
        directory.mkdir()
        texts, size = [], 0
        for text, _ in open_source("synthetic", home=Home(folder), seed=1).documents("train"):
            texts.append(text)
            size += len(text)
            if size > args.megabytes * 1e6:
                break
        pq.write_table(pa.table({"text": texts}), directory / "0.parquet", row_group_size=1024)
    source = open_source(f"parquet:{directory}", home=Home(folder), seed=1)
    assert isinstance(source, FileSource)
    some = (text for text, cursor in source.documents("train") if cursor["at"][0] == 0)
    limited = (text for _, text in zip(range(20_000), some))
    tok = RustBPETokenizer.train_from_iterator(limited, args.vocab)
    tok.save(folder)
    *_, counts = write_shards(source, tok, folder / "tokens", shard_bytes=1 << 28, num_threads=1)
    (folder / "bytes_per_token").write_text(str(counts["text_bytes"] / counts["tokens"]))
    return directory


def one(args: argparse.Namespace) -> dict[str, float]:
    from nanochat.tokenizer import RustBPETokenizer

    name, directory, folder = args.one[0], Path(args.one[1]), Path(args.one[2])
    tok = RustBPETokenizer.from_directory(folder)
    tok.bytes_per_token = (folder / "bytes_per_token").read_text()  # type: ignore[attr-defined]
    num_bytes = int(args.megabytes * 1e6)
    if name == "usual":
        return usual(directory, tok, num_bytes // 4)  # it is slow
    if name == "wait":
        return wait(f"parquet:{directory}", tok, args.steps)
    return ours(f"tokens:{folder}/tokens" if name == "tokens" else f"parquet:{directory}", tok, num_bytes)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", help="parquet:DIR (default: the embedded corpus)")
    parser.add_argument("--megabytes", type=float, default=20.0, help="of text a measurement")
    parser.add_argument("--vocab", type=int, default=32768)
    parser.add_argument("--steps", type=int, default=10, help="training steps to watch")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--csv", help="file to write, or auto for benchmarks/record/MACHINE/DATE-data.csv")
    parser.add_argument("--one", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    sys.path.insert(0, str(ROOT))
    if args.one:
        print(json.dumps(one(args)))
        return
    columns = ["pipeline", "vocab", "row_tokens", "megabytes_per_second", "tokens_per_second"]
    columns += ["dropped_frac", "wait_frac", "step_seconds"]
    rows = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        directory = prepare(args, folder)
        for name in PIPELINES:
            found = []
            for _ in range(1 if name == "wait" else args.repeats):
                command = [sys.executable, __file__, "--one", name, str(directory), temporary]
                more = [f"--megabytes={args.megabytes}", f"--steps={args.steps}"]
                one_thread = os.environ | {"OMP_NUM_THREADS": "1", "RAYON_NUM_THREADS": "1"}
                done = subprocess.run(
                    command + more, capture_output=True, text=True, check=True, cwd=ROOT, env=one_thread
                )
                found.append(json.loads(done.stdout.splitlines()[-1]))
            best = max(found, key=lambda row: row["tokens_per_second"])
            size = 512 if name == "wait" else T
            rows.append({"pipeline": name, "vocab": args.vocab, "row_tokens": size} | best)
            print("  ".join(f"{key} {value}" for key, value in rows[-1].items()), flush=True)
    if args.csv:
        from benchmarks.bench_train import record_path

        path = Path(args.csv) if args.csv != "auto" else record_path("data")
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "w", newline="") as file:
            writer = csv.DictWriter(file, columns)
            writer.writeheader()
            writer.writerows(rows)


if __name__ == "__main__":
    main()
