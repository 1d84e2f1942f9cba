"""The server under load on loopback: many users, ten times too many, callers who hang up.

    python benchmarks/bench_server.py --csv=auto
    python benchmarks/bench_server.py --home=my_run --users=200 --rows=32 --csv=auto

The server is its own process (a GPT of --depth with random weights, or the newest model of --home); the load
is this one, so both share the machine's cores. Three parts, each bounded:

    users      --users people ask at once, each once; the queue holds them all: first token, tokens/s
    overload   ten times as many requests as rows and queue hold: only 200 and 429 may come back
    hangups    --hangups callers leave after the first event: no row stays in use, memory is what it was

All the while /health is asked some ten times a second, and so is a bare server that does nothing else: what
that one takes is the machine's. A figure that misses its aim makes the exit code 1.
"""

from __future__ import annotations

import argparse
import asyncio
import csv
import json
import os
import re
import subprocess
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
FIELDS = ["part", "figure", "value", "aim"]

SERVER = """
import sys
from nanochat.engine import Engine
from nanochat.gpt import GPT, GPTConfig
from nanochat.tokenizer import RustBPETokenizer
from nanochat.server.app import create_app
from nanochat.server.door import listen
from nanochat.server.serving import make_server, settle
depth, rows, waiting = map(int, sys.argv[1:4])
tok = RustBPETokenizer.train_from_iterator(["the sky is blue, the grass is green "] * 9, 300)
heads = max(1, depth // 2)
shape = dict(n_layer=depth, n_head=heads, n_kv_head=heads, n_embd=64 * depth, window_pattern="L")
model = GPT(GPTConfig(1024, tok.get_vocab_size(), **shape))
model.init_weights(1)
app = create_app(Engine(model.eval(), tok), "bench", num_rows=rows, max_waiting=waiting, max_wait_seconds=600)
settle()
with listen("127.0.0.1", 0) as listener:
    listener.listen(4096)
    print("PORT", listener.getsockname()[1], flush=True)
    make_server(app, 5).run(sockets=[listener])
"""

# What the machine itself takes: a server that does nothing else.
BARE = """
import socket
listener = socket.create_server(("127.0.0.1", 0), backlog=64)
print(listener.getsockname()[1], flush=True)
while True:
    line, _ = listener.accept()
    line.recv(4096)
    line.sendall(b"HTTP/1.1 200 OK\\r\\nContent-Length: 0\\r\\nConnection: close\\r\\n\\r\\n")
    line.close()
"""

# A process of its own, so that the load's event loop is not what is measured.
WATCH = """
import http.client, sys, time
while True:
    for name, port in zip(("health", "bare"), sys.argv[1:]):
        start = time.perf_counter()
        line = http.client.HTTPConnection("127.0.0.1", int(port), timeout=60)
        line.request("GET", "/health")
        answer = line.getresponse()
        assert answer.status == 200, answer.read()
        line.close()
        print(name, time.perf_counter() - start, flush=True)
    time.sleep(0.05)
"""


def start_server(args: argparse.Namespace, rows: int, waiting: int) -> tuple[subprocess.Popen, int]:
    """A server process and its port."""
    if args.home:
        words = [
            "-m",
            "scripts.chat_web",
            f"--home={args.home}",
            "--port=0",
            f"--rows={rows}",
            f"--waiting={waiting}",
            "--no-log",
        ]
    else:
        words = ["-c", SERVER, str(args.depth), str(rows), str(waiting)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    server = subprocess.Popen(
        [sys.executable, *words], stdout=subprocess.PIPE, text=True, env=environment, cwd=ROOT
    )
    assert server.stdout is not None
    for line in server.stdout:
        if match := re.search(r"PORT (\d+)|http://[\d.]+:(\d+)", line):
            return server, int(match[1] or match[2])
    raise RuntimeError("the server did not start")


def python(program: str, *words: str) -> subprocess.Popen:
    return subprocess.Popen([sys.executable, "-c", program, *words], stdout=subprocess.PIPE, text=True)


def memory_mb(pid: int) -> float:
    """Resident memory of a process (Linux)."""
    return int(re.search(r"VmRSS:\s+(\d+)", Path(f"/proc/{pid}/status").read_text())[1]) / 1024  # type: ignore[index]


async def request(
    port: int, method: str, path: str, body: Any = None
) -> tuple[int, AsyncIterator[bytes], asyncio.StreamWriter]:
    """(status, lines of the answer as they come, the connection)."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    data = json.dumps(body).encode() if body is not None else b""
    head = f"{method} {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n"
    if data:
        head += f"Content-Type: application/json\r\nContent-Length: {len(data)}\r\n"
    writer.write(f"{head}\r\n".encode() + data)
    status = int((await reader.readline()).split()[1])
    while (await reader.readline()).strip():
        pass

    async def lines() -> AsyncIterator[bytes]:
        while line := await reader.readline():
            yield line

    return status, lines(), writer


def question(user: int, max_tokens: int) -> dict[str, Any]:
    messages = [{"role": "user", "content": f"user {user} asks about the sky and the grass"}]
    return {
        "messages": messages,
        "stream": True,
        "max_tokens": max_tokens,
        "ignore_eos": True,
        "temperature": 1.0,
    }


async def ask(port: int, user: int, max_tokens: int, hang_up: bool = False) -> tuple[int, float, int]:
    """(status, seconds to the first token, events with text)."""
    start = time.perf_counter()
    status, lines, writer = await request(port, "POST", "/v1/chat/completions", question(user, max_tokens))
    first, count = 0.0, 0
    try:
        async for line in lines:
            if status == 200 and b'"parts"' in line:
                first = first or time.perf_counter() - start
                count += 1
                if hang_up:
                    break
    finally:
        writer.close()
    return status, first, count


async def metric(port: int, name: str) -> float:
    _, lines, writer = await request(port, "GET", "/metrics")
    text = b"".join([line async for line in lines]).decode()
    writer.close()
    return float(re.search(rf"^nanochat_{name} (\S+)$", text, re.M)[1])  # type: ignore[index]


def quantile(values: list[float], q: float) -> float:
    return sorted(values)[min(len(values) - 1, int(q * len(values)))]


async def users_part(args: argparse.Namespace, port: int, note: Any) -> None:
    start = time.perf_counter()
    found = await asyncio.gather(*(ask(port, user, args.tokens) for user in range(args.users)))
    seconds = time.perf_counter() - start
    firsts = [first for status, first, _ in found if status == 200]
    note("users", "answered", sum(status == 200 for status, *_ in found), args.users)
    note("users", "first_token_p50_seconds", quantile(firsts, 0.5))
    note("users", "first_token_p99_seconds", quantile(firsts, 0.99))
    note("users", "tokens_per_second", args.users * args.tokens / seconds)
    # one person alone, for comparison
    alone = [(await ask(port, user, args.tokens))[1] for user in range(5)]
    note("users", "first_token_alone_seconds", quantile(alone, 0.5))


async def overload_part(args: argparse.Namespace, port: int, note: Any) -> None:
    count = 10 * (args.rows + args.waiting)
    found = await asyncio.gather(*(ask(port, user, args.tokens) for user in range(count)))
    statuses = Counter(status for status, *_ in found)
    waits = [first for status, first, _ in found if status == 200]
    note("overload", "requests", count)
    note("overload", "answered_200", statuses[200])
    note("overload", "refused_429", statuses[429])
    note("overload", "other_statuses", count - statuses[200] - statuses[429], 0)
    note("overload", "longest_wait_seconds", max(waits), 60)


async def hangups_part(args: argparse.Namespace, port: int, pid: int, note: Any) -> None:
    async def many(count: int) -> None:
        gate = asyncio.Semaphore(args.rows)

        async def one(user: int) -> None:
            async with gate:
                await ask(port, user, 900, hang_up=True)

        await asyncio.gather(*(one(user) for user in range(count)))

    await many(args.hangups // 4)  # until buffers have their size
    before = memory_mb(pid)
    await many(args.hangups - args.hangups // 4)
    for _ in range(100):
        if (running := await metric(port, "requests_running")) == 0:
            break
        await asyncio.sleep(0.05)
    note("hangups", "disconnects", args.hangups)
    note("hangups", "rows_still_in_use", running, 0)
    note("hangups", "blocks_still_held", await metric(port, "blocks_used"), 0)
    note("hangups", "memory_growth_mb", memory_mb(pid) - before, 20)


async def run(args: argparse.Namespace, rows: list[dict[str, Any]]) -> None:
    def note(part: str, figure: str, value: float, aim: float | None = None) -> None:
        rows.append(
            {"part": part, "figure": figure, "value": f"{value:.4g}", "aim": "" if aim is None else aim}
        )
        print(f"{part:10}{figure:28}{value:12.4g}{'' if aim is None else f'   aim {aim:g}'}", flush=True)

    for part in args.only.split(","):
        waiting = args.users if part == "users" else args.waiting
        server, port = start_server(args, args.rows, waiting)
        await ask(port, 0, 8)
        bare = python(BARE)
        assert bare.stdout is not None
        watcher = python(WATCH, str(port), bare.stdout.readline().strip())
        try:
            if part == "users":
                await users_part(args, port, note)
            elif part == "overload":
                await overload_part(args, port, note)
            else:
                await hangups_part(args, port, server.pid, note)
            watcher.terminate()
            seen = [line.split() for line in watcher.communicate()[0].splitlines()]
            for name, aim in (("health", 0.05), ("bare", None)):
                seconds = [float(found) for kind, found in seen if kind == name]
                note(part, f"{name}_p50_seconds", quantile(seconds, 0.5))
                note(part, f"{name}_p99_seconds", quantile(seconds, 0.99), aim)
        finally:
            watcher.kill()
            bare.kill()
            server.terminate()
            server.wait(30)


def machine() -> str:
    """What matters about this machine, for the name of the record's directory."""
    model = re.search(r"model name\s*:\s*(.*)", Path("/proc/cpuinfo").read_text())
    words = re.sub(r"[^a-z0-9]+", "-", (model[1] if model else "unknown").lower()).strip("-")
    return f"{words}-{os.cpu_count()}-cores"


def misses(row: dict[str, Any]) -> bool:
    if row["aim"] == "":
        return False
    value, aim = float(row["value"]), float(row["aim"])
    return value < aim if row["figure"] == "answered" else value > aim


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--home", help="a home with a trained model (default: random weights)")
    parser.add_argument("--depth", type=int, default=4, help="of the random model; its width is 64 a layer")
    parser.add_argument("--users", type=int, default=200)
    parser.add_argument("--rows", type=int, default=32, help="answers computed at a time")
    parser.add_argument("--waiting", type=int, default=64, help="queue limit of the overload part")
    parser.add_argument("--tokens", type=int, default=32, help="of each answer")
    parser.add_argument("--hangups", type=int, default=2000)
    parser.add_argument("--only", default="users,overload,hangups")
    parser.add_argument("--csv", help="a file, or auto for benchmarks/record/<machine>/<date>-server.csv")
    args = parser.parse_args()
    rows: list[dict[str, Any]] = []
    asyncio.run(run(args, rows))
    if args.csv:
        name = f"{time.strftime('%Y-%m-%d')}-server.csv"
        path = ROOT / "benchmarks/record" / machine() / name if args.csv == "auto" else Path(args.csv)
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, FIELDS, lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
        print(f"written to {path}")
    return int(any(misses(row) for row in rows))


if __name__ == "__main__":
    raise SystemExit(main())
