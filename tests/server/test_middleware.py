"""Who may enter, how the server ends, what it tells about itself; several engines behind one port."""

from __future__ import annotations

import asyncio
import json
import re
import signal
import socket
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from helpers.chain_server import CALL, COUNT, REST, TOK, Chain, Client, counter_app, until

from nanochat.engine import Engine
from nanochat.server import middleware as gate
from nanochat.server.app import create_app

KEYS = ["first-secret", "second-secret"]
RECORDS: list[dict[str, Any]] = []


@pytest.fixture(scope="module")
def guarded() -> Iterator[Client]:
    """A server with keys, another name, and one web page that may call it."""
    app = create_app(
        Engine(Chain(CALL, REST), TOK),
        "main-sft",
        keys=KEYS,
        hosts=["gpu7.example.org"],
        origins=["https://chat.example.org"],
        log=RECORDS.append,
    )
    client = Client(app)
    yield client
    client.close()


ASK = {"messages": [{"role": "user", "content": "a private matter"}]}


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({}, 401),
        ({"Authorization": "Bearer first-secret"}, 200),
        ({"Authorization": "bearer second-secret"}, 200),
        ({"X_Api_Key": "first-secret"}, 200),
        ({"Authorization": "Bearer first-secre"}, 401),
        ({"Authorization": "Bearer first-secret2"}, 401),
        ({"Authorization": "Basic first-secret"}, 401),
        ({"Authorization": "Bearer "}, 401),
        ({"Authorization": "Bearer \xe9"}, 401),
        ({"Authorization": "Bearer first-secret", "Host": "gpu7.example.org:8000"}, 200),
        ({"Authorization": "Bearer first-secret", "Host": "GPU7.example.org"}, 200),
        ({"Authorization": "Bearer first-secret", "Host": "[::1]:80"}, 200),
        ({"Authorization": "Bearer first-secret", "Host": "evil.example"}, 403),
        ({"Authorization": "Bearer first-secret", "Host": "localhost.evil.example"}, 403),
        ({"Authorization": "Bearer first-secret", "Origin": "https://evil.example"}, 403),
        ({"Authorization": "Bearer first-secret", "Origin": "null"}, 403),
        ({"Authorization": "Bearer first-secret", "Origin": "https://chat.example.org"}, 200),
        ({"Authorization": "Bearer first-secret", "Origin": "http://chat.example.org"}, 403),
        ({"X_Api_Key": "first-secret", "Origin": "http://gpu7.example.org", "Host": "gpu7.example.org"}, 200),
    ],
)  # fmt: skip
def test_auth_host_origin_matrix(guarded: Client, headers: dict[str, str], status: int) -> None:
    found = guarded.send("POST", "/v1/chat/completions", ASK, **headers)
    assert found[0] == status, found[2]
    if status != 200:
        assert set(found[2]["error"]) == {"message", "type", "param", "code"}
    if status == 401:
        assert found[2]["error"]["code"] == "invalid_api_key" and found[1]["WWW-Authenticate"] == "Bearer"


SECRET = ["/v1/models", "/models", "/metrics", "/settings", "/openapi.json", "/tokenizer_info"]
SECRET += ["/nowhere", "//health", "/health/", "/%2e%2e/health"]


@pytest.mark.parametrize("path", SECRET)
def test_everything_else_needs_a_key(guarded: Client, path: str) -> None:
    assert guarded.send("GET", path)[0] == 401
    if "health" not in path and path != "/nowhere":
        assert guarded.send("GET", path, Authorization="Bearer first-secret")[0] == 200


def test_public_paths(guarded: Client) -> None:
    for path in ("/", "/health", "/app.js", "/style.css"):
        assert guarded.send("GET", path)[0] == 200
    assert guarded.send("GET", "/", Host="evil.example")[0] == 403


def test_cors_for_the_named_page_alone(guarded: Client) -> None:
    origin = "https://chat.example.org"
    status, headers, _ = guarded.send("OPTIONS", "/v1/chat/completions", Origin=origin)
    assert status == 204 and headers["Access-Control-Allow-Origin"] == origin
    allowed = guarded.send("POST", "/v1/chat/completions", ASK, Origin=origin, X_Api_Key=KEYS[0])
    assert allowed[1]["Access-Control-Allow-Origin"] == origin
    status, headers, _ = guarded.send("OPTIONS", "/v1/chat/completions", Origin="https://evil.example")
    assert status != 204 and "Access-Control-Allow-Origin" not in headers


def test_the_log_holds_no_text(guarded: Client) -> None:
    RECORDS.clear()
    body = {**ASK, "stream": True, "strange_field": 1}
    assert guarded.send("POST", "/v1/chat/completions", body, X_Api_Key=KEYS[0])[0] == 200
    assert guarded.send("POST", "/v1/chat/completions", body, X_Api_Key=KEYS[0])[0] == 200
    until(lambda: sum("finish" in record for record in RECORDS) == 2)
    assert [r["fields"] for r in RECORDS if r.get("event") == "unknown fields"] == [["strange_field"]]
    record = next(record for record in RECORDS if "finish" in record)
    assert record["path"] == "/v1/chat/completions" and record["status"] == 200 and record["finish"] == "stop"
    assert record["completion_tokens"] == 17 and record["first_token_seconds"] > 0 and record["stream"]
    assert "private" not in json.dumps(RECORDS) and "ok 🙂" not in json.dumps(RECORDS, ensure_ascii=False)
    assert not any(key in json.dumps(RECORDS) for key in KEYS)


def test_an_error_of_ours_is_logged_without_text(guarded: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise KeyError("a private matter")

    RECORDS.clear()
    monkeypatch.setattr("nanochat.chat_format.render_for_completion", fail)
    status, headers, body = guarded.send("POST", "/v1/chat/completions", ASK, X_Api_Key=KEYS[0])
    assert status in (400, 500) and "private" not in json.dumps(body)
    monkeypatch.setattr("nanochat.server.schemas.parse", fail)
    status, headers, body = guarded.send("POST", "/v1/chat/completions", ASK, X_Api_Key=KEYS[0])
    assert status == 500 and body["error"]["type"] == "server_error" and headers["x-should-retry"] == "false"
    until(lambda: any(record.get("error") == "KeyError" for record in RECORDS))
    assert "private" not in json.dumps(RECORDS)


SAMPLE = re.compile(r'nanochat_[a-z_]+(\{[a-z_]+="[^"]*"\})? [0-9.e+-]+|# (HELP|TYPE) nanochat_[a-z_]+ .+')


def test_metrics_parse(guarded: Client) -> None:
    guarded.send("POST", "/v1/chat/completions", ASK, X_Api_Key=KEYS[0])
    guarded.send("POST", "/v1/chat/completions", {}, X_Api_Key=KEYS[0])
    _, headers, data = guarded.send("GET", "/metrics", X_Api_Key=KEYS[0])
    assert headers["Content-Type"].startswith("text/plain; version=0.0.4")
    lines = data.decode().splitlines()
    assert all(SAMPLE.fullmatch(line) for line in lines), [x for x in lines if not SAMPLE.fullmatch(x)]
    values = dict(line.rsplit(" ", 1) for line in lines if not line.startswith("#"))
    assert float(values['nanochat_requests_finished_total{reason="stop"}']) >= 1
    assert float(values['nanochat_requests_rejected_total{status="400"}']) >= 1
    assert float(values["nanochat_tokens_out_total"]) >= 17 and values["nanochat_requests_running"] == "0"
    assert (
        values["nanochat_first_token_seconds_count"]
        == values['nanochat_first_token_seconds_bucket{le="+Inf"}']
    )
    assert float(values["nanochat_blocks_total"]) > 0


def test_slow_and_large_requests(guarded: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gate, "BODY_SECONDS", 0.2)
    head = "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nX-Api-Key: first-secret\r\n"
    head += "Content-Type: application/json\r\nContent-Length: 100\r\n"
    for more, status in (("\r\n{", b" 408 "), (f"X: {'x' * 20_000}\r\n\r\n", b" 431 ")):
        with socket.create_connection(("127.0.0.1", guarded.port)) as line:
            line.settimeout(20)
            line.sendall((head + more).encode())
            assert status in line.recv(1000).split(b"\r\n")[0]


def test_a_key_has_a_limit() -> None:
    client = Client(counter_app(num_rows=4, keys=KEYS, max_per_key=1))
    first = client.open("POST", "/v1/chat/completions", {**ASK, "stream": True}, X_Api_Key=KEYS[0])
    assert first.getresponse().read(10)
    short = {**ASK, "max_tokens": 2}
    status, headers, _ = client.send("POST", "/v1/chat/completions", short, X_Api_Key=KEYS[0])
    assert status == 429 and "Retry-After" in headers
    assert client.send("POST", "/v1/chat/completions", short, X_Api_Key=KEYS[1])[0] == 200
    first.close()
    until(lambda: client.send("POST", "/v1/chat/completions", short, X_Api_Key=KEYS[0])[0] == 200)
    client.close()


def test_waiting_has_an_end() -> None:
    client = Client(counter_app(num_rows=1, max_waiting=5, max_wait_seconds=0.3))
    first = client.open("POST", "/v1/chat/completions", {**ASK, "stream": True})
    assert first.getresponse().read(10)
    status, headers, body = client.ask(max_tokens=2)
    assert status == 503 and "Retry-After" in headers and body["error"]["type"] == "server_error"
    first.close()
    client.close()


def test_drain_503() -> None:
    """The first signal: what runs is finished, what comes is sent away, and then the server ends."""
    client = Client(counter_app())
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(client.ask, max_tokens=150)
        until(lambda: client.app.state.group.num_running == 1)
        client.server.handle_exit(signal.SIGTERM, None)
        until(lambda: client.app.state.is_draining)
        status, headers, _ = client.ask(max_tokens=2)
        assert status == 503 and 1 <= int(headers["Retry-After"]) <= 120
        assert client.send("GET", "/health")[0] == 503
        status, _, body = running.result()
        assert status == 200 and body["usage"]["completion_tokens"] == 150
    client.thread.join(10)
    assert not client.thread.is_alive()


def test_the_second_signal_ends_it() -> None:
    client = Client(counter_app())
    first = client.open("POST", "/v1/chat/completions", {**ASK, "stream": True})
    assert first.getresponse().read(10)
    client.server.handle_exit(signal.SIGTERM, None)
    until(lambda: client.server.draining)
    client.server.config.timeout_graceful_shutdown = 0
    client.server.handle_exit(signal.SIGTERM, None)
    client.thread.join(10)
    assert not client.thread.is_alive()
    first.close()


def test_replicas_share_the_work() -> None:
    engines = [Engine(Chain(COUNT, delay_seconds=0.002, sequence_len=2000), TOK) for _ in range(2)]
    client = Client(create_app(engines, "main-sft", num_rows=2, max_waiting=4))
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda n: client.ask(max_tokens=n), (40, 41, 42, 43)))
    assert [body["usage"]["completion_tokens"] for _, _, body in found] == [40, 41, 42, 43]
    assert all(engine.model.num_rows for engine in engines)
    assert client.send("GET", "/health")[0] == 200
    client.close()


def test_a_stalled_reader_is_let_go(monkeypatch: pytest.MonkeyPatch) -> None:
    """Who reads nothing blocks nobody: the stream ends and the row comes back."""
    monkeypatch.setattr(gate, "STALL_SECONDS", 0.3)
    app = create_app(Engine(Chain(COUNT, sequence_len=20_000), TOK), "main-sft", num_rows=1)
    client = Client(app, send_bytes=4096)
    line = socket.socket()
    line.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
    line.connect(("127.0.0.1", client.port))
    body = json.dumps({**ASK, "stream": True}).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n"
    line.sendall(f"{head}Content-Type: application/json\r\n\r\n".encode() + body)
    until(lambda: client.app.state.group.num_running == 1)
    until(lambda: client.app.state.group.num_running == 0, seconds=60)
    assert len(client.model.num_rows) < 15_000
    line.close()
    client.close()


def test_pings_keep_a_waiting_stream_alive(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nanochat.server.streaming.PING_SECONDS", 0.05)
    model = Chain(COUNT, delay_seconds=0.2, sequence_len=2000)
    client = Client(create_app(Engine(model, TOK), "main-sft"))
    data = client.ask(stream=True, max_tokens=3)[2]
    assert b": ping\n\n" in data and data.endswith(b"data: [DONE]\n\n")
    client.close()


def test_who_leaves_before_the_first_event_frees_the_row() -> None:
    """Cancelled before it has begun, a generator's own `finally` never runs."""
    closed: list[bool] = []

    async def events() -> AsyncIterator[str]:
        raise AssertionError("nobody asks for an event")
        yield ""

    async def receive() -> dict[str, str]:
        return {"type": "http.disconnect"}

    async def send(_: Any) -> None:
        await asyncio.sleep(60)

    stream = gate.EventStream(events(), lambda: closed.append(True))
    asyncio.run(stream({"type": "http"}, receive, send))
    assert closed == [True]
