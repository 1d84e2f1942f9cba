"""The door before the event loop: answers while the model loads and while the loop is busy, few at a time."""

from __future__ import annotations

import gc
import http.client
import json
import socket
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from helpers.chain_server import Client, counter_app, until
from helpers.small_home import save_model

from nanochat.home import Home
from nanochat.server import door, serving
from nanochat.server.door import Door, listen
from scripts import chat_web

ASK = {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 2}


def send(port: int, method: str, path: str, body: Any = None, **headers: str) -> tuple[int, Any, bytes]:
    """(status, headers, body) of one request."""
    line = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    kind = {"Content-Type": "application/json"} if body is not None else {}
    data = body if isinstance(body, (bytes, type(None))) else json.dumps(body).encode()
    line.request(method, path, data, {**kind, **headers})
    response = line.getresponse()
    found = response.status, response.headers, response.read()
    line.close()
    return found


def test_while_the_model_loads() -> None:
    """Everybody is told to come back; who has said nothing yet is served once it is loaded."""
    with listen("127.0.0.1", 0) as listener, Door(listener) as waiting:
        port = listener.getsockname()[1]
        status, headers, body = send(port, "GET", "/health")
        assert (status, json.loads(body)) == (503, {"status": "loading"}) and headers["Retry-After"] == "2"
        for large in (ASK, b'{"messages": "' + b"x" * 3_000_000):  # the second is answered in mid-sending
            try:
                status, headers, body = send(port, "POST", "/v1/chat/completions", large)
            except (BrokenPipeError, ConnectionResetError):
                assert large is not ASK
                continue
            error = json.loads(body)["error"]
            assert status == 503 and error["code"] == "loading" and headers["Retry-After"] == "2"
            assert set(error) == {"message", "type", "param", "code"}
        status, headers, body = send(port, "GET", "/", Accept="text/html,*/*")
        assert status == 503 and headers.get_content_type() == "text/html" and b'"refresh"' in body
        assert send(port, "GET", "/health", Host="evil.example")[0] == 503
        early = socket.create_connection(("127.0.0.1", port))
        server = serving.make_server(counter_app(), 5, waiting)
        thread = threading.Thread(target=server.run, daemon=True)
        thread.start()
        until(lambda: server.started)
        early.sendall(b"GET /v1/models HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
        assert b"200 OK" in early.makefile("rb").readline()
        early.close()
        assert json.loads(send(port, "GET", "/health")[2]) == {"status": "ok"}
        assert send(port, "POST", "/v1/chat/completions", ASK)[0] == 200
        server.should_exit = True
        thread.join()
    with pytest.raises(ConnectionRefusedError):
        send(port, "GET", "/health")


def test_chat_web_opens_its_port_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The script itself: loading, then answering, then gone."""
    from nanochat.chat_ui import session

    may_load, servers = threading.Event(), []
    real_open, real_make = session.open_engine, serving.make_server

    def slow_open(*words: Any) -> Any:
        may_load.wait(60)
        return real_open(*words)

    def make(*words: Any) -> Any:
        servers.append(real_make(*words))
        return servers[0]

    monkeypatch.setattr(session, "open_engine", slow_open)
    monkeypatch.setattr(serving, "make_server", make)
    save_model(Home(tmp_path), "sft")
    with listen("127.0.0.1", 0) as found:
        port = found.getsockname()[1]
    words = [f"--home={tmp_path}", f"--port={port}", "--device=cpu", "--no-log"]
    thread = threading.Thread(target=chat_web.main, args=(words,), daemon=True)
    thread.start()

    def status() -> int:
        try:
            return send(port, "GET", "/health")[0]
        except ConnectionRefusedError:
            return 0

    until(lambda: status() == 503)
    assert send(port, "POST", "/v1/completions", {"prompt": "the sky"})[0] == 503
    assert thread.is_alive() and not servers
    may_load.set()
    until(lambda: status() == 200, seconds=60)
    assert gc.get_freeze_count() > 1000  # a full collection over all that is loaded would stop every thread
    gc.unfreeze()
    answer = send(port, "POST", "/v1/completions", {"prompt": "the sky", "max_tokens": 3})
    assert answer[0] == 200 and json.loads(answer[2])["model"] == "main-sft"
    servers[0].should_exit = True
    thread.join(20)
    assert not thread.is_alive() and status() == 0


@pytest.fixture
def server() -> Any:
    client = Client(counter_app(max_waiting=400))
    yield client
    client.close()


def block(server: Client) -> threading.Event:
    """Keep the event loop from running until the event is set."""
    is_blocked, may_go = threading.Event(), threading.Event()

    def sleep() -> None:
        is_blocked.set()
        may_go.wait(60)

    server.server.loop.call_soon_threadsafe(sleep)
    assert is_blocked.wait(30)
    return may_go


def test_health_does_not_wait_for_the_loop(server: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a control, a request that does; and a loop that never comes back is no health."""
    may_go = block(server)
    with ThreadPoolExecutor(1) as pool:
        waits = pool.submit(server.send, "GET", "/v1/models")
        for _ in range(20):
            assert server.send("GET", "/health")[2] == {"status": "ok"}
        assert not waits.done()
        monkeypatch.setattr(serving, "STUCK_SECONDS", 0.0)
        status, headers, body = server.send("GET", "/health")
        assert (status, body) == (503, {"status": "stuck"}) and "Retry-After" in headers
        monkeypatch.setattr(serving, "STUCK_SECONDS", 60.0)
        may_go.set()
        assert waits.result()[0] == 200


def test_a_crowd_enters_a_few_at_a_time(server: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    """All of it is answered, and the loop has turns of its own between the groups."""
    sizes, turns, loop, real = [], [], server.server.loop, server.server.door.take

    def take() -> list[socket.socket]:
        found = real()
        sizes.append(len(found))
        loop.call_soon(lambda: turns.append(len(sizes)))
        return found

    monkeypatch.setattr(server.server.door, "take", take)
    may_go = block(server)
    lines = [server.open("GET", "/v1/models") for _ in range(100)]
    until(lambda: len(server.server.door._waiting) == 100)
    may_go.set()
    assert [line.getresponse().status for line in lines] == [200] * 100
    for line in lines:
        line.close()
    assert sum(sizes) == 100 and max(sizes) == door.PER_TURN
    assert len(set(turns)) >= 100 // door.PER_TURN


def test_health_in_odd_shapes(server: Client) -> None:
    """What the door does not know it leaves to the loop, whole."""
    for pieces in (
        (b"GET /hea", b"lth HTTP/1.1\r\nHost: localhost\r\n\r\n"),
        (b"GET /health HTTP/1.1\r\nHost: localhost\r\n", b"\r\n"),
        (b"GET /health?x=1 HTTP/1.1\r\nHost: localhost\r\n\r\n",),
        (b"GET /health HTTP/1.1\r\nHost: LOCALHOST:80\r\nX-Api-Key: none\r\n\r\n",),
        (b"GET /health HTTP/1.0\r\nHost: [::1]:80\r\n\r\n",),
    ):
        with socket.create_connection(("127.0.0.1", server.port)) as line:
            line.settimeout(30)
            for piece in pieces:
                line.sendall(piece)
                until(lambda: not server.server.door._waiting)
            reply = b""
            while b'"status"' not in reply and (part := line.recv(4000)):
                reply += part
            assert reply.startswith(b"HTTP/1.1 200 OK\r\n") and reply.endswith(b"}"), pieces
    for head, status in (
        (b"GET /health HTTP/1.1\r\n\r\n", b" 400 "),
        (b"GET /health HTTP/1.1\r\nHost: evil.example\r\n\r\n", b" 403 "),
        (b"GET /health HTTP/1.1\r\nHost: localhost\r\nHost: evil.example\r\n\r\n", b" 400 "),
        (b"POST /health HTTP/1.1\r\nHost: localhost\r\nContent-Length: 0\r\n\r\n", b" 405 "),
    ):
        with socket.create_connection(("127.0.0.1", server.port)) as line:
            line.settimeout(30)
            line.sendall(head)
            assert status in line.recv(4000).split(b"\r\n")[0], head


def test_silent_callers_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """The oldest makes room for the next one; nobody stays for ever."""
    monkeypatch.setattr(door, "MAX_SILENT", 3)
    with listen("127.0.0.1", 0) as listener, Door(listener) as closed:
        address = listener.getsockname()
        lines = [socket.create_connection(address, timeout=30) for _ in range(5)]
        assert [line.recv(1) for line in lines[:2]] == [b"", b""]
        lines[4].sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert b"503" in lines[4].recv(4000)
        closed.close()
        assert lines[2].recv(1) == b""
        for line in lines:
            line.close()
    monkeypatch.setattr(door, "SILENT_SECONDS", 0.0)
    with (
        listen("127.0.0.1", 0) as listener,
        Door(listener),
        socket.create_connection(listener.getsockname(), timeout=30) as late,
    ):
        assert late.recv(1) == b""
