"""Generation on this machine: against recomputing, against a plain loop, and against its memory.

    python benchmarks/bench_engine.py --csv=auto
    python benchmarks/bench_engine.py --only=bandwidth --depth=20 --csv=auto
    python benchmarks/bench_engine.py --only=load --depth=4 --head-dim=32 --vocab=4096 --csv=auto
    python benchmarks/bench_engine.py --only=guess --csv=auto
    python benchmarks/bench_engine.py --device=cuda --only=decode,load --tokens=200 --csv=auto

decode: one sequence. mixed: 32 requests of mixed lengths at once, as tokens a second of them all. Both
against `model.generate`, which computes the whole row for every token, and against a plain loop with a KV
cache, one prompt at a time, which casts the fp32 weights at every step (compute dtype bfloat16) or has none
to cast (float32). bandwidth: one sequence of a model too large for any cache; bytes a step has to move
(matrices as they are stored, keys and values, rows of tables) over what this machine reads meanwhile.
load: --requests at once on --rows rows, as tokens a second of all, and how long each waits for its first.
guess: --speculate tokens guessed a step against none, for a model that says a given text: one sequence that
copies its prompt with every 25th word changed, and one that goes on with a chat of the embedded corpus. The
texts stand for a trained model's; the words that fit the guesses are those of the texts, the time is real.

--clock=cpu counts the process's own seconds, for machines with other work; the other work still takes its
share of the memory. Weights are random: speed does not depend on them.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import re
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))
from bench_train import record_path

import nanochat.engine.continuous_batch as batch_module
from nanochat import chat_format as chat
from nanochat import scaling
from nanochat.corpus import chats
from nanochat.corpus import documents as synthetic
from nanochat.engine.continuous_batch import MAX_STEPS, ContinuousBatch
from nanochat.engine.engine import Sampling
from nanochat.engine.inference import InferenceGPT, cpu_dtype
from nanochat.engine.kv_cache import KVCache
from nanochat.engine.sequence import Sequence
from nanochat.gpt import GPT
from nanochat.kernels.decode import kv_dtype

FLOORS = {"decode": 3.0, "mixed": 15.0, "bandwidth": 0.55}  # times the plain loop that casts; share
NUM_REQUESTS = 32


def model_of(depth: int, vocab: int, context: int, head_dim: int) -> GPT:
    """Random matrices; tables of value embeddings stay zero, for memory that nobody touches costs nothing."""
    plan = scaling.plan(depth, head_dim=head_dim, sequence_len=context, vocab_size=vocab, num_steps=1)
    with torch.device("meta"):
        model = GPT(plan.config)
    model.to_empty(device="cpu")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "value_embeds" in name:
                parameter.data = torch.zeros(parameter.shape)
            else:
                parameter.uniform_(-0.03, 0.03)
    return model.eval()


def plain_loop(model: GPT, prompt: list[int], num_tokens: int) -> Iterator[int]:
    """A dense cache, one token at a time, nothing prepared: greedy."""
    cfg = model.config
    cache = KVCache(
        1, cfg.n_kv_head, len(prompt) + num_tokens, cfg.n_embd // cfg.n_head, cfg.n_layer,
        model.get_device(), model.compute_dtype,
    )  # fmt: skip
    ids = prompt
    with torch.inference_mode():
        for _ in range(num_tokens):
            ids = [int(model(torch.tensor([ids], device=model.get_device()), kv_cache=cache)[0, -1].argmax())]
            yield ids[0]


def step_seconds(tokens: Iterator[int], clock: Callable[[], float], device: str) -> float:
    """Median time of a token after the first; of MAX_STEPS at once where they may come at once (GPUs)."""
    next(tokens)
    times = [clock()]
    for _ in tokens:
        times.append(clock())
    across = MAX_STEPS if device != "cpu" and len(times) > 2 * MAX_STEPS else 1
    gaps = sorted(b - a for a, b in zip(times, times[across:], strict=False))
    return gaps[len(gaps) // 2] / across


def engine_tokens(batch: ContinuousBatch, prompt: list[int], num_tokens: int) -> Iterator[int]:
    row = Sequence(prompt, num_tokens, Sampling(0.0), frozenset())
    batch.admit([row])
    while batch.is_running:
        if batch.emit():
            yield row.output[-1]
        batch.compute()


def prompt_of(length: int, vocab: int) -> list[int]:
    return torch.randint(vocab, (length,), generator=torch.Generator().manual_seed(length)).tolist()


def mixed_requests(vocab: int, context: int, count: int = NUM_REQUESTS) -> list[tuple[list[int], int]]:
    """(prompt, tokens to write): prompts of 1/32 to 1/4 of the context, answers of 1/16 to 1/4."""
    rng = torch.Generator().manual_seed(1)

    def number(low: int, high: int) -> int:
        return int(torch.randint(low, high, (1,), generator=rng))

    return [
        (prompt_of(number(context // 32, context // 4), vocab), number(context // 16, context // 4))
        for _ in range(count)
    ]


def run_mixed(
    batch: ContinuousBatch, requests: list[tuple[list[int], int]], clock: Callable[[], float]
) -> float:
    """Tokens a second, prompts' time included."""
    begin = clock()
    batch.admit([Sequence(p, n, Sampling(0.0), frozenset()) for p, n in requests])
    while batch.is_running:
        batch.emit()
        batch.compute()
    return sum(n for _, n in requests) / (clock() - begin)


def first_token_waits(
    batch: ContinuousBatch, requests: list[tuple[list[int], int]], clock: Callable[[], float]
) -> tuple[float, list[float]]:
    """(tokens a second of all, seconds until the first token of each, shortest first)."""
    rows = [Sequence(p, n, Sampling(0.0), frozenset()) for p, n in requests]
    begin, waits = clock(), dict[int, float]()
    batch.admit(rows)
    while batch.is_running:
        for row in batch.emit():
            waits.setdefault(id(row), clock() - begin)
        batch.compute()
    return sum(n for _, n in requests) / (clock() - begin), sorted(waits.values())


def words_of(text: str, ids: dict[str, int]) -> list[int]:
    """A word with the space before it is a token, as for a tokenizer that knows them all."""
    return [ids.setdefault(word, len(ids)) for word in re.findall(r"\s?\w+|\W", text)]


def told_texts(vocab: int, context: int) -> dict[str, tuple[list[int], list[int]]]:
    """(prompt, answer) of a copy with changes and of a chat."""
    ids: dict[str, int] = {}
    story = list[int]()
    for n in itertools.count():
        story += words_of(synthetic.document(1, n), ids)
        if len(story) >= context // 2 - 8:
            break
    story = story[: context // 2 - 8]
    copied = [len(ids) if n % 25 == 24 else token for n, token in enumerate(story)]
    said = list[int]()
    for n in itertools.count():
        for message in chats.conversation("mixed", 1, n)["messages"]:
            said += words_of(chat.text_of(message["content"]) + "\n", ids)
        if len(said) >= context - 8:
            break
    start = context // 8
    texts = {"copy": (story, copied), "chat": (said[:start], said[start : context - 8])}
    return {name: tuple([i % vocab for i in part] for part in pair) for name, pair in texts.items()}


def tell(
    batch: ContinuousBatch, prompt: list[int], answer: list[int], clock: Callable[[], float]
) -> tuple[float, float]:
    """(tokens a second, tokens a forward pass) of a model that answers so: its draws cost what they cost, the
    text decides what comes of them."""
    row, num_steps = Sequence(prompt, len(answer), Sampling(0.0), frozenset()), 0
    real = batch_module.sample

    def sample(logits: torch.Tensor, settings: object, positions: list[int], *rest: object) -> list[int]:
        real(logits, settings, positions, *rest)
        return [answer[position - len(prompt)] for position in positions]

    batch_module.sample = sample
    try:
        batch.admit([row])
        batch.compute()
        begin = clock()
        while batch.is_running:
            batch.emit()
            batch.compute()
            num_steps += 1
        seconds = clock() - begin
    finally:
        batch_module.sample = real
    assert row.output == answer
    return len(answer) / seconds, len(answer) / num_steps


def bandwidth(
    tokens: Iterator[int], clock: Callable[[], float], device: str, data_bytes: int = 200 << 20
) -> tuple[float, float]:
    """(median seconds of a token, median bytes/s of summing 200 MB or, on a GPU, 4 GB), in turn: both see the
    same load.
    """
    data_bytes *= 1 if device == "cpu" else 20
    data = torch.ones(data_bytes // 4, device=device)
    next(tokens)
    steps, reads = list[float](), list[float]()
    while True:
        begin = clock()
        if next(tokens, None) is None:
            break
        middle = clock()
        data.sum().item()
        steps.append(middle - begin)
        reads.append(clock() - middle)
    return sorted(steps)[len(steps) // 2], data_bytes / sorted(reads)[len(reads) // 2]


def bytes_per_step(model: GPT, dtype: torch.dtype, context: int, kv_bytes: int) -> int:
    """What one token has to move at `context` cached tokens."""
    cfg, counts = model.config, model.num_scaling_params()
    kv_dim = cfg.n_kv_head * (cfg.n_embd // cfg.n_head)
    seen = sum(min(context, window + 1) for window in cfg.windows)
    tables = 2 * cfg.n_embd + len(model.value_embeds) * kv_dim
    keys_and_values = 2 * kv_dim * kv_bytes * (seen + cfg.n_layer)
    return counts["scaling"] * dtype.itemsize + keys_and_values + 4 * tables


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", default="decode,mixed", help="of decode, mixed, bandwidth, load, guess")
    parser.add_argument("--depth", type=int, default=12)
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--vocab", type=int, default=32768)
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument(
        "--dtype", help="of the engine's matrices: float32, bfloat16, int8 (default: by cpu_dtype)"
    )
    parser.add_argument("--requests", default="64,256", help="of load")
    parser.add_argument("--rows", type=int, default=64, help="that run at once, of load")
    parser.add_argument("--speculate", default="3,8", help="tokens guessed at most, of guess")
    parser.add_argument("--tokens", type=int, default=24, help="per measurement of one sequence")
    parser.add_argument("--plain-requests", type=int, default=3, help="of the 32, given to the plain loop")
    parser.add_argument("--device", default="cpu", help="cpu, or cuda")
    parser.add_argument("--clock", choices=("wall", "cpu"), default="wall")
    parser.add_argument("--threads", type=int, help="default: torch's")
    parser.add_argument("--csv", help="file to write, or auto for benchmarks/record/MACHINE/DATE-engine.csv")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    clock = time.perf_counter if args.clock == "wall" else time.process_time
    model = model_of(args.depth, args.vocab, args.context, args.head_dim).to(args.device)
    on_cpu = args.device == "cpu"
    model.compute_dtype = torch.float32 if on_cpu else torch.bfloat16
    dtype = getattr(torch, args.dtype) if args.dtype else cpu_dtype(model) if on_cpu else torch.bfloat16
    network = InferenceGPT(model, dtype)
    rows: list[dict[str, object]] = []

    def note(what: str, how: str, **found: object) -> None:
        row = {
            "benchmark": what, "how": how, "depth": args.depth, "width": model.config.n_embd,
            "device": args.device, "vocab": args.vocab, "context_tokens": args.context,
            "dtype": str(dtype).removeprefix("torch."),
            "threads": torch.get_num_threads(), "clock": args.clock,
            "step_seconds": "", "tokens_per_second": "", "ratio": "", "floor": "", "bytes_per_step": "",
            "read_bytes_per_second": "", "first_token_p50_seconds": "", "first_token_p99_seconds": "",
            "tokens_per_pass": "",
        }  # fmt: skip
        rows.append({**row, **found})
        print("  ".join(f"{key} {value}" for key, value in rows[-1].items() if value != ""), flush=True)

    def batch_of(num_rows: int, **how: Any) -> ContinuousBatch:
        return ContinuousBatch(model, num_rows, args.context, network=network, **how)

    wide, narrow = torch.float32, torch.bfloat16
    if "decode" in args.only:
        prompt = prompt_of(args.context // 4, args.vocab)
        ours = step_seconds(engine_tokens(batch_of(1), prompt, args.tokens), clock, args.device)
        note("decode", "engine", step_seconds=round(ours, 6), tokens_per_second=round(1 / ours, 2))
        for how, compute in (("plain, casts", narrow), ("plain, fp32", wide), ("model.generate", wide)):
            model.compute_dtype = compute
            is_naive = how == "model.generate"
            tokens = model.generate(prompt, 3, 0) if is_naive else plain_loop(model, prompt, args.tokens // 2)
            theirs = step_seconds(tokens, clock, args.device)
            floor = FLOORS["decode"] if how != "plain, fp32" else ""
            note(
                "decode", how, step_seconds=round(theirs, 6), tokens_per_second=round(1 / theirs, 2),
                ratio=round(theirs / ours, 2), floor=floor,
            )  # fmt: skip
    if "mixed" in args.only:
        requests = mixed_requests(args.vocab, args.context)
        ours = run_mixed(batch_of(NUM_REQUESTS), requests, clock)
        note("mixed", "engine", tokens_per_second=round(ours, 2))
        for how, compute in (("plain, casts", narrow), ("plain, fp32", wide)):
            model.compute_dtype = compute
            begin, some = clock(), requests[: args.plain_requests]
            for prompt, count in some:
                assert len(list(plain_loop(model, prompt, count))) == count
            theirs = sum(count for _, count in some) / (clock() - begin)
            floor = FLOORS["mixed"] if compute == narrow else ""
            note("mixed", how, tokens_per_second=round(theirs, 2), ratio=round(ours / theirs, 2), floor=floor)
    if "bandwidth" in args.only:
        prompt = prompt_of(args.context // 4, args.vocab)
        tokens = engine_tokens(batch_of(1, max_steps=1), prompt, args.tokens)
        ours, rate = bandwidth(tokens, clock, args.device)
        kept = kv_dtype(network) if on_cpu else network.compute_dtype
        moved = bytes_per_step(model, dtype, len(prompt) + args.tokens // 2, kept.itemsize)
        note(
            "bandwidth", "engine", step_seconds=round(ours, 6), tokens_per_second=round(1 / ours, 2),
            ratio=round(moved / ours / rate, 3), floor=FLOORS["bandwidth"], bytes_per_step=moved,
            read_bytes_per_second=round(rate),
        )  # fmt: skip
    for count in map(int, args.requests.split(",")) if "load" in args.only else ():
        requests = mixed_requests(args.vocab, args.context, count)
        rate, waits = first_token_waits(batch_of(args.rows), requests, clock)
        note(
            f"load {count}", f"engine, {args.rows} rows", tokens_per_second=round(rate, 1),
            first_token_p50_seconds=round(waits[len(waits) // 2], 4),
            first_token_p99_seconds=round(waits[len(waits) * 99 // 100], 4),
        )  # fmt: skip
    for name, (prompt, answer) in (
        told_texts(args.vocab, args.context).items() if "guess" in args.only else ()
    ):
        plain = 0.0
        for most in (0, *map(int, args.speculate.split(","))):
            rate, per_pass = tell(batch_of(1, speculate=most, in_bursts=True), prompt, answer, clock)
            plain = plain or rate
            note(
                f"guess {name}", f"at most {most}", tokens_per_second=round(rate, 2),
                ratio=round(rate / plain, 2), tokens_per_pass=round(per_pass, 2),
            )  # fmt: skip
    if args.csv:
        path = Path(args.csv) if args.csv != "auto" else record_path("engine")
        path.parent.mkdir(parents=True, exist_ok=True)
        older = list(csv.DictReader(path.open(newline=""))) if path.exists() else []
        with open(path, "w", newline="") as file:  # rows of before may lack columns of today
            writer = csv.DictWriter(file, list(rows[0]), restval="")
            writer.writeheader()
            writer.writerows([*older, *rows])


if __name__ == "__main__":
    main()
