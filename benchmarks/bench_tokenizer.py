"""Tokenizers against each other on the same text: training, encoding, hard cases, memory.

    pip install --target peers --no-deps rustbpe==0.1.0 tokenizers==0.23.3 bpeasy==0.1.6
    python benchmarks/bench_tokenizer.py --data='shards/*.parquet' --peers=peers --csv=auto

`--data` names parquet files with a column `text`. Every measurement runs in a process of its own, so that its
peak memory is its own; the peers take turns, and the best of `--repeats` rounds counts (tokenizers and bpeasy
train once). Ratios within one run compare; bare times depend on what else the machine does, processor seconds
less so. Without --peers only ours and tiktoken run.
"""

from __future__ import annotations

import argparse
import csv
import glob
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
VOCAB, SLOW_MB = 32_768 - 9, 20  # the slow encoders see only so much text
SLOW = ("tokenizers", "bpeasy")  # trained once
TRAINERS = ("ours", "ours-arrow", "rustbpe-0.1.0", "tokenizers", "bpeasy")
ENCODERS = (
    "ours-1", "ours-2", "ours-list-1", "tiktoken-1", "tiktoken-2", "tokenizers-1", "tokenizers-2",
)  # fmt: skip


def load(pattern: str, mb: float) -> list[Any]:
    """Arrow arrays of `mb` megabytes of text, the files over again if they have less."""
    import pyarrow.parquet as pq

    arrays, left = [], mb * 1e6
    files = sorted(glob.glob(pattern))
    assert files, f"no file matches {pattern}"
    while left > 0:
        for file in files:
            for chunk in pq.read_table(file, columns=["text"])["text"].chunks:
                mean = chunk.nbytes / max(len(chunk), 1)
                arrays.append(chunk.slice(0, max(1, int(left / mean))))
                left -= arrays[-1].nbytes
                if left <= 0:
                    return arrays
    return arrays


def peak_mb() -> float:
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def timed(work: Callable[[], Any]) -> tuple[float, float]:
    """Seconds on the clock, and of all threads together on processors."""
    start, cpu = time.perf_counter(), time.process_time()
    work()
    return time.perf_counter() - start, time.process_time() - cpu


def texts_of(arrays: list[Any]) -> list[str]:
    return [text for array in arrays for text in array.to_pylist()]


def hf_tokenizer(pattern: str) -> tuple[Any, Any]:
    """Byte-level BPE of Hugging Face with our split pattern, and its trainer."""
    import tokenizers as hf
    from tokenizers import decoders, models, pre_tokenizers, trainers

    tok = hf.Tokenizer(models.BPE())
    split = pre_tokenizers.Split(hf.Regex(pattern), behavior="isolated")
    tok.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(False, use_regex=False)])
    tok.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    return tok, trainers.BpeTrainer(vocab_size=VOCAB, initial_alphabet=alphabet, show_progress=False)


def train(name: str, data: str, mb: float) -> dict[str, Any]:
    """Seconds and peak memory of one training, the texts given as the trainer likes them best."""
    from nanochat.tokenizer import SPLIT_PATTERN

    arrays = load(data, mb)
    num_bytes = sum(array.nbytes for array in arrays)
    if name == "ours-arrow":
        source: Any = arrays
    else:
        source = texts_of(arrays)
        del arrays
    before = peak_mb()
    work: Callable[[], Any]
    if name in ("ours", "ours-arrow", "rustbpe-0.1.0"):
        import rustbpe

        tok = rustbpe.Tokenizer()
        work = lambda: tok.train_from_iterator(iter(source), VOCAB, pattern=SPLIT_PATTERN)  # noqa: E731
    elif name == "tokenizers":
        hf_tok, trainer = hf_tokenizer(SPLIT_PATTERN)
        work = lambda: hf_tok.train_from_iterator(iter(source), trainer)  # noqa: E731
    else:
        import bpeasy

        possessive = SPLIT_PATTERN.replace("?+", "?").replace("++", "+")  # the same pieces, for its engine
        work = lambda: bpeasy.train_bpe(iter(source), possessive, 128, VOCAB)  # noqa: E731
    seconds, cpu = timed(work)
    facts = {
        "mb": num_bytes / 1e6,
        "seconds": seconds,
        "cpu_seconds": cpu,
        "peak_mb": peak_mb(),
        "added_mb": peak_mb() - before,
    }
    if name in ("ours", "ours-arrow", "rustbpe-0.1.0"):
        import hashlib

        ranks = repr([(bytes(token), rank) for token, rank in tok.get_mergeable_ranks()])
        facts["result"] = hashlib.sha256(ranks.encode()).hexdigest()[:12]
    return facts


def encode(names: str, data: str, mb: float) -> dict[str, Any]:
    """[seconds, cpu_seconds, MB] of each encoder on the same ranks, the best of three interleaved rounds."""
    import pyarrow as pa
    import tiktoken

    import rustbpe
    from nanochat.tokenizer import SPLIT_PATTERN

    arrays = load(data, mb)
    tok = rustbpe.Tokenizer()
    tok.train_from_iterator(iter(arrays), VOCAB, pattern=SPLIT_PATTERN)
    array = pa.chunked_array(arrays)
    few = texts_of(load(data, min(SLOW_MB, mb)))
    few_mb = sum(len(text.encode()) for text in few) / 1e6
    ranks = {bytes(token): rank for token, rank in tok.get_mergeable_ranks()}
    other = tiktoken.Encoding("", pat_str=SPLIT_PATTERN, mergeable_ranks=ranks, special_tokens={})
    expected = [other.encode_ordinary(text) for text in few]
    assert tok.batch_encode(few) == expected, "ours and tiktoken differ"
    work: dict[str, tuple[float, Callable[[], Any]]] = {
        "ours-1": (array.nbytes / 1e6, lambda: tok.encode_arrow(array, num_threads=1)),
        "ours-2": (array.nbytes / 1e6, lambda: tok.encode_arrow(array, num_threads=2)),
        "ours-list-1": (few_mb, lambda: tok.batch_encode(few, num_threads=1)),
        "tiktoken-1": (few_mb, lambda: [other.encode_ordinary(text) for text in few]),
        "tiktoken-2": (few_mb, lambda: other.encode_ordinary_batch(few, num_threads=2)),
    }
    if "tokenizers-1" in names:
        hf_tok, trainer = hf_tokenizer(SPLIT_PATTERN)
        hf_tok.train_from_iterator(iter(few), trainer)

        def with_threads(parallel: str) -> None:
            os.environ["TOKENIZERS_PARALLELISM"] = parallel
            hf_tok.encode_batch_fast(few, add_special_tokens=False)

        work["tokenizers-1"] = (few_mb, lambda: with_threads("false"))
        work["tokenizers-2"] = (few_mb, lambda: with_threads("true"))
    best: dict[str, Any] = {}
    for _ in range(3):
        for name, (size, run) in work.items():
            best[name] = min(best.get(name, [1e9]), [*timed(run), size])
    return best


def hard(data: str) -> dict[str, Any]:
    """[seconds, cpu_seconds] for a megabyte of one letter and the like, with the ranks of ordinary text."""
    import rustbpe
    from nanochat.tokenizer import SPLIT_PATTERN

    tok = rustbpe.Tokenizer()
    tok.train_from_iterator(iter(load(data, 10)), VOCAB, pattern=SPLIT_PATTERN)
    cases = {"a": "a", "space": " ", "emoji": "🎈", "letters": "qzjxkvbpygfwmucl", "chinese": "河边的老桥已"}
    seconds = {}
    for name, text in cases.items():
        text *= 1_000_000 // len(text.encode())
        seconds[name] = timed(lambda text=text: tok.encode(text))
        assert tok.decode(tok.encode(text)) == text
    return seconds


def stream(data: str, mb: float) -> dict[str, Any]:
    """Training on a stream of `mb` megabytes that never lies in memory, with new words in every document."""
    import random

    import rustbpe
    from nanochat.tokenizer import SPLIT_PATTERN

    arrays, number = load(data, min(mb, 100)), random.Random(1)
    count = 0

    def texts() -> Iterator[str]:
        nonlocal count
        while True:
            for array in arrays:
                for text in array.to_pylist():
                    word = "".join(number.choices("abcdefghijklmnopqrstuvwxyz", k=8))
                    yield f"{text} {word}"
                    count += len(text.encode()) + 9
                    if count >= mb * 1e6:
                        return

    tok = rustbpe.Tokenizer()
    seconds, cpu = timed(lambda: tok.train_from_iterator(texts(), VOCAB, pattern=SPLIT_PATTERN))
    return {"mb": count / 1e6, "seconds": seconds, "cpu_seconds": cpu, "peak_mb": peak_mb()}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", required=True, help="parquet files with a column text (quote the pattern)")
    parser.add_argument("--mb", type=float, default=100, help="megabytes of text")
    parser.add_argument("--peers", help="directory of pip install --target with the packages to compare with")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--stream-mb", type=float, default=0, help="also train on a stream of this size")
    parser.add_argument(
        "--csv", help="file to write, or auto for benchmarks/record/MACHINE/DATE-tokenizer.csv"
    )
    parser.add_argument("--one", nargs=2, metavar=("WHAT", "NAME"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        what, name = args.one
        sys.path.insert(0, str(ROOT))
        if args.peers:  # their rustbpe shadows ours only where it is measured
            sys.path.insert(0 if name == "rustbpe-0.1.0" else len(sys.path), args.peers)
        doing = {
            "train": lambda: train(name, args.data, args.mb),
            "encode": lambda: encode(name, args.data, args.mb),
            "hard": lambda: hard(args.data),
            "stream": lambda: stream(args.data, args.stream_mb),
        }
        print(json.dumps(doing[what]()))
        return
    rows: list[dict[str, Any]] = []

    def record(what: str, name: str, mb: float, seconds: float, cpu: float, **more: Any) -> None:
        row = {"what": what, "name": name, "result": more.get("result", ""), "text_mb": round(mb, 1)}
        row |= {"seconds": round(seconds, 3), "cpu_seconds": round(cpu, 3)}
        row |= {"mb_per_second": round(mb / seconds, 1), "mb_per_cpu_second": round(mb / cpu, 1)}
        rows.append(row | {key: round(more[key]) if key in more else "" for key in ("peak_mb", "added_mb")})
        print("  ".join(f"{key} {value}" for key, value in rows[-1].items() if value != ""), flush=True)

    names = TRAINERS if args.peers else TRAINERS[:2]
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    for i in range(args.repeats):
        for name in names if i == 0 else [name for name in names if name not in SLOW]:
            found[name].append(child(args, "train", name))
    for name, runs in found.items():
        best = min(runs, key=lambda run: run["seconds"])
        best["cpu"] = min(run.pop("cpu_seconds") for run in runs)
        record("train", name, **best)
    wanted = [name for name in ENCODERS if args.peers or not name.startswith("tokenizers")]
    for name, (seconds, cpu, mb) in child(args, "encode", ",".join(wanted)).items():
        record("encode", name, mb, seconds, cpu)
    for name, (seconds, cpu) in child(args, "hard", "").items():
        record("hard", name, 1, seconds, cpu)
    if args.stream_mb:
        run = child(args, "stream", "")
        record("stream", "ours", run["mb"], run["seconds"], run["cpu_seconds"], peak_mb=run["peak_mb"])
    if args.csv:
        path = Path(args.csv) if args.csv != "auto" else record_path("tokenizer")
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "w", newline="") as file:
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows(rows)


def child(args: argparse.Namespace, what: str, name: str) -> dict[str, Any]:
    """One measurement in a process of its own."""
    options = [f"--data={os.path.abspath(args.data)}", f"--mb={args.mb}", f"--stream-mb={args.stream_mb}"]
    options += [f"--peers={os.path.abspath(args.peers)}"] if args.peers else []
    command = [sys.executable, __file__, "--one", what, name, *options]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def record_path(name: str) -> Path:
    """benchmarks/record/<processor>-<cores>/<date>-<name>.csv"""
    sys.path.insert(0, str(ROOT))
    from nanochat import hardware

    machine = re.sub(r"[^a-z0-9]+", "-", f"{hardware.cpu_name()} {os.cpu_count()} cores".lower()).strip("-")
    return ROOT / "benchmarks" / "record" / machine / f"{time.strftime('%Y-%m-%d')}-{name}.csv"


if __name__ == "__main__":
    main()
