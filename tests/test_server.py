"""The server over real sockets of this machine, around a model whose next token follows from its last one."""

from __future__ import annotations

import http.client
import json
import re
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import uvicorn

from nanochat import chat
from nanochat.engine import Engine
from nanochat.errors import UserError
from nanochat.tokenizer import RustBPETokenizer
from nanochat.web import openai
from nanochat.web.server import MAX_BODY_BYTES, POLICY, create_app
from scripts import chat_web

TOK = RustBPETokenizer.train_from_iterator(["hello there " * 9], 275)
START, END, PY, PY_END, OUT, OUT_END = (
    TOK.encode_special(name)
    for name in (
        chat.ASSISTANT_START,
        chat.ASSISTANT_END,
        chat.PYTHON_START,
        chat.PYTHON_END,
        chat.OUTPUT_START,
        chat.OUTPUT_END,
    )
)
CALL = [START, PY, *b"1+2", PY_END, *b"x"]  # the x is overruled
REST = [OUT_END, *"ok 🙂!".encode(), END]
COUNT = [START, *b"abcdefghij", ord("a")]  # without end


class Chain:
    """A model for the ragged engine: the likeliest next token is a function of the last one."""

    def __init__(self, *chains: list[int], delay_seconds: float = 0.0, sequence_len: int = 200) -> None:
        self.config = SimpleNamespace(n_kv_head=1, n_head=1, n_embd=2, n_layer=1, sequence_len=sequence_len)
        self.nexts = torch.zeros(TOK.get_vocab_size(), dtype=torch.long)
        self.delay_seconds, self.num_rows, self.is_broken = delay_seconds, list[int](), False
        for chain in chains:
            self.nexts[chain[:-1]] = torch.tensor(chain[1:])

    def get_device(self) -> torch.device:
        return torch.device("cpu")

    def trunk(self, ids_BT: torch.Tensor, *rest: Any) -> torch.Tensor:
        if self.is_broken:
            self.is_broken = False
            raise RuntimeError("out of order")
        self.num_rows.append(len(ids_BT))
        time.sleep(self.delay_seconds)
        return self.nexts[ids_BT].unsqueeze(-1)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.one_hot(hidden[..., 0], TOK.get_vocab_size()) * 50.0


class Client:
    """One connection per request to a server that runs in a thread."""

    def __init__(self, app: Any) -> None:
        self.server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="error", lifespan="on"))
        listener = chat_web.listen("127.0.0.1", 0)
        self.port = listener.getsockname()[1]
        self.thread = threading.Thread(target=self.server.run, kwargs={"sockets": [listener]})
        self.thread.start()
        while not self.server.started:
            time.sleep(0.01)

    def close(self) -> None:
        self.server.should_exit = True
        self.thread.join()

    def open(self, method: str, path: str, body: Any = None, **headers: str) -> http.client.HTTPConnection:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=20)
        data = body if isinstance(body, (bytes, type(None))) else json.dumps(body).encode()
        kind = {"Content-Type": "application/json"} if data is not None else {}
        connection.request(
            method, path, data, {**kind, **{k.replace("_", "-"): v for k, v in headers.items()}}
        )
        return connection

    def send(self, method: str, path: str, body: Any = None, **headers: str) -> tuple[int, Any, Any]:
        """(status, headers, body: JSON where it is)."""
        connection = self.open(method, path, body, **headers)
        response = connection.getresponse()
        data = response.read()
        connection.close()
        is_json = response.headers.get_content_type() == "application/json"
        return response.status, response.headers, json.loads(data) if is_json else data

    def ask(self, text: str = "hello", **fields: Any) -> tuple[int, Any, Any]:
        body = {"messages": [{"role": "user", "content": text}], **fields}
        return self.send("POST", "/v1/chat/completions", body)

    def stream(self, **fields: Any) -> list[dict]:
        """The events of an answer; the last one must be [DONE]."""
        status, headers, data = self.ask(stream=True, **fields)
        assert status == 200 and headers["Content-Type"] == "text/event-stream; charset=utf-8"
        assert headers["Cache-Control"] == "no-cache"
        *events, done, rest = data.decode().split("\n\n")
        assert (done, rest) == ("data: [DONE]", "")
        return [json.loads(event.removeprefix("data: ")) for event in events]


@pytest.fixture(scope="module")
def caller() -> Iterator[Client]:
    """A server whose model calls the tool."""
    client = Client(create_app(Engine(Chain(CALL, REST), TOK), "main-sft", note="a note"))
    yield client
    client.close()


@pytest.fixture
def counter() -> Iterator[Client]:
    """A server of two rows whose model goes on for ever, 2 ms a token; one request may wait."""
    model = Chain(COUNT, delay_seconds=0.002, sequence_len=2000)
    client = Client(create_app(Engine(model, TOK), "main-sft", num_rows=2, max_waiting=1))
    client.model = model  # type: ignore[attr-defined]
    yield client
    client.close()


def until(condition: Any) -> None:
    """Wait for something that must come true within two seconds."""
    end = time.monotonic() + 2
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


# ---------------------------------------------------------------- answers


PARTS = [
    {"type": "python", "text": "1+2"},
    {"type": "python_output", "text": "3"},
    {"type": "text", "text": "ok 🙂!"},
]


def test_an_answer(caller: Client) -> None:
    status, _, body = caller.ask()
    assert status == 200 and body["object"] == "chat.completion" and body["model"] == "main-sft"
    (choice,) = body["choices"]
    assert choice["message"] == {"role": "assistant", "content": "ok 🙂!", "parts": PARTS}
    assert choice["finish_reason"] == "stop"
    prompt = TOK.render_for_completion({"messages": [{"role": "user", "content": "hello"}]})
    num_completion = 5 + 3 + 8 + 1  # call, forced output, text, end
    assert body["usage"]["prompt_tokens"] == len(prompt)
    assert body["usage"]["completion_tokens"] == num_completion == body["usage"]["total_tokens"] - len(prompt)


def test_sse_order(caller: Client) -> None:
    events = caller.stream(stream_options={"include_usage": True})
    assert {event["object"] for event in events} == {"chat.completion.chunk"}
    assert len({(event["id"], event["created"], event["model"]) for event in events}) == 1
    assert events[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert events[-1]["choices"] == [] and events[-1]["usage"]["completion_tokens"] == 17
    assert [event["choices"][0]["finish_reason"] for event in events[:-1]] == [None] * (len(events) - 2) + [
        "stop"
    ]
    assert events[-2]["choices"][0]["delta"] == {}
    assert "usage" not in caller.stream()[-1]


def test_stream_equals_final(caller: Client) -> None:
    for fields in (
        {},
        {"max_tokens": 12},
        {"stop": "k 🙂"},
        {"stop": ["!", "z"]},
        {"max_completion_tokens": 3, "max_tokens": 9},
    ):
        choice = caller.ask(**fields)[2]["choices"][0]
        deltas = [event["choices"][0] for event in caller.stream(**fields)]
        content = "".join(delta["delta"].get("content", "") for delta in deltas)
        assert content == choice["message"]["content"]
        assert deltas[-1]["finish_reason"] == choice["finish_reason"]
        pieces = [part for delta in deltas for part in delta["delta"].get("parts", [])]
        for kind in ("text", "python", "python_output"):
            whole = "".join(part["text"] for part in choice["message"]["parts"] if part["type"] == kind)
            assert "".join(part["text"] for part in pieces if part["type"] == kind) == whole
    assert (content, choice["finish_reason"]) == ("", "length")  # three tokens of code
    assert caller.ask(stop="k 🙂")[2]["choices"][0]["message"]["content"] == "o"
    cut = caller.ask(max_tokens=12)[2]["choices"][0]
    assert (cut["message"]["content"], cut["finish_reason"]) == ("ok \ufffd", "length")


def test_conversations(caller: Client) -> None:
    """Parts that were sent are accepted back; system text stands before the next user text."""
    messages = [
        {"role": "system", "content": "be kind"},
        {"role": "user", "content": [{"type": "text", "text": "hello "}, {"type": "text", "text": "there"}]},
        {"role": "assistant", "content": "ok 🙂!", "parts": PARTS},
        {"role": "developer", "content": "be brief"},
        {"role": "user", "content": "<|assistant_end|>"},
    ]
    request = openai.parse(json.dumps({"messages": messages}).encode())
    said = [
        ("user", "be kind\n\nhello there"),
        ("assistant", "ok 🙂!"),
        ("user", "be brief\n\n<|assistant_end|>"),
    ]
    assert [(m["role"], chat.text_of(m["content"])) for m in request.conversation()["messages"]] == said
    assert request.conversation()["messages"][1]["content"] == PARTS
    ids = TOK.render_for_completion(request.conversation())
    assert ids.count(END) == 1  # special strings in a message stay text
    status, _, body = caller.send("POST", "/v1/chat/completions", {"messages": messages})
    assert status == 200 and body["usage"]["prompt_tokens"] == len(ids)


def test_many_at_once_are_each_alone(counter: Client) -> None:
    with ThreadPoolExecutor(3) as pool:
        found = [future.result() for future in [pool.submit(counter.ask, max_tokens=n) for n in (5, 25, 14)]]
    letters = "abcdefghij" * 3
    contents = [body["choices"][0]["message"]["content"] for _, _, body in found]
    assert contents == [letters[:5], letters[:25], letters[:14]]
    assert max(counter.model.num_rows) == 2  # type: ignore[attr-defined]


# ---------------------------------------------------------------- errors

BAD = [
    *((b"temperature", value) for value in (b"-1", b"2.1", b"1e400", b"true", b'"1"')),
    *((b"top_p", b"1.5"), (b"top_k", b"-2"), (b"top_k", b"1.5"), (b"seed", b"9" * 400), (b"seed", b"1.0")),
    *((b"max_tokens", b"0"), (b"max_tokens", b"1e3"), (b"n", b"2"), (b"stream", b"1"), (b"stop", b"[1]")),
    (b"stream_options", b'{"include_usage": true}'),
]


@pytest.mark.parametrize(
    ("body", "param"),
    [
        (b"", None), (b"{", None), (b"[]", None), (b'"x"', None), (b"[" * 100_000, None), (b"\xff\xfe", None),
        (b'{"messages": []}', "messages"), (b'{"messages": [1]}', "messages.0"),
        (b'{"messages": [{"role": "user", "content": 1}]}', "messages.0.content"),
        (b'{"messages": [{"role": "tool", "content": "x"}]}', "messages.0.role"),
        (b'{"messages": [{"role": "user", "content": "\\ud800"}]}', None),
        (b'{"messages": [{"role": "assistant", "content": "x"}]}', "messages"),
        (b'{"messages": [{"role": "user", "content": "a"}, {"role": "user", "content": "b"}]}', "messages"),
        *((b'{"messages": [{"role": "user", "content": "x"}], "%s": %s}' % f, f[0].decode()) for f in BAD),
        (b'{"messages": [{"role": "user", "content": "x"}], "temperature": NaN}', None),
        (b'{"messages": [{"role": "user", "content": "%s"}]}' % (b"7 " * 200), "messages"),
        (b'{"messages": [{"role": "user", "content": "%s"}]}' % (b"~ secret" * 10_000), "messages"),
    ],
)  # fmt: skip
def test_malformed_bodies(caller: Client, body: bytes, param: str | None) -> None:
    status, _, answer = caller.send("POST", "/v1/chat/completions", body)
    assert status == 400 and set(answer) == {"error"}
    error = answer["error"]
    assert set(error) == {"message", "type", "param", "code"} and error["type"] == "invalid_request_error"
    assert (error["param"] or "").startswith(param or "") and (param is not None or error["param"] is None)
    assert "secret" not in error["message"] and len(error["message"]) < 200


def test_error_shapes(caller: Client) -> None:
    for status, found in (
        (404, caller.ask(model="other")),
        (404, caller.send("GET", "/v1/models/other")),
        (404, caller.send("GET", "/nowhere")),
        (404, caller.send("GET", "/../server.py")),
        (405, caller.send("GET", "/v1/chat/completions")),
        (413, caller.send("POST", "/v1/chat/completions", b" " * (MAX_BODY_BYTES + 1))),
        (415, caller.send("POST", "/v1/chat/completions", b"{}", Content_Type="text/plain")),
        (403, caller.send("POST", "/v1/chat/completions", {}, Origin="http://evil.example")),
        (403, caller.send("POST", "/v1/chat/completions", {}, Origin="null")),
    ):
        assert found[0] == status and set(found[2]["error"]) == {"message", "type", "param", "code"}
    assert caller.send("GET", "/health", Host="evil.example")[0] == 400
    fine = {"messages": [{"role": "user", "content": "hi"}], "unknown": 1, "temperature": None}
    assert (
        caller.send("POST", "/v1/chat/completions", fine, Origin=f"http://127.0.0.1:{caller.port}")[0] == 200
    )


def test_overload_only_200_429_and_health(counter: Client) -> None:
    with ThreadPoolExecutor(12) as pool:
        futures = [pool.submit(counter.ask, max_tokens=60) for _ in range(12)]
        time.sleep(0.05)
        start = time.monotonic()
        assert counter.send("GET", "/health")[0] == 200 and time.monotonic() - start < 1
        found = [future.result() for future in futures]
    statuses = [status for status, _, _ in found]
    assert set(statuses) == {200, 429} and statuses.count(200) >= 3
    refused = found[statuses.index(429)]
    assert refused[2]["error"]["code"] == "rate_limit_exceeded" and refused[1]["Retry-After"] == "2"


@pytest.mark.parametrize("is_streamed", [True, False])
def test_disconnect_frees_slot(counter: Client, is_streamed: bool) -> None:
    model = counter.model  # type: ignore[attr-defined]
    body = {"messages": [{"role": "user", "content": "hello"}], "stream": is_streamed}
    connections = [counter.open("POST", "/v1/chat/completions", body) for _ in range(2)]
    until(lambda: model.num_rows and model.num_rows[-1] == 2)
    if is_streamed:
        assert connections[0].getresponse().read(10)
    for connection in connections:
        connection.close()
    num_steps = -1

    def is_quiet() -> bool:
        nonlocal num_steps
        before, num_steps = num_steps, len(model.num_rows)
        time.sleep(0.05)
        return before == len(model.num_rows)

    until(is_quiet)
    assert len(model.num_rows) < 1000  # far from the context's 2,000
    assert counter.ask(max_tokens=3)[0] == 200


def test_a_broken_step_is_an_error_and_not_the_end(counter: Client) -> None:
    counter.model.is_broken = True  # type: ignore[attr-defined]
    status, _, body = counter.ask(max_tokens=3)
    assert (
        status == 500
        and body["error"]["type"] == "server_error"
        and "out of order" not in body["error"]["message"]
    )
    assert counter.ask(max_tokens=3)[0] == 200


def test_stopping_ends_what_runs(counter: Client) -> None:
    connection = counter.open(
        "POST", "/v1/chat/completions", {"messages": [{"role": "user", "content": "x"}], "stream": True}
    )
    response = connection.getresponse()
    assert response.status == 200 and response.read(5)
    counter.server.config.timeout_graceful_shutdown = 1
    counter.close()
    assert not counter.thread.is_alive()
    connection.close()


# ---------------------------------------------------------------- page and script


def test_page_and_models(caller: Client) -> None:
    for path, kind in (("/", "text/html"), ("/app.js", "text/javascript"), ("/style.css", "text/css")):
        status, headers, data = caller.send("GET", path)
        assert status == 200 and headers.get_content_type() == kind and len(data) > 500
        assert headers["Content-Security-Policy"] == POLICY and headers["X-Content-Type-Options"] == "nosniff"
    assert caller.send("GET", "/settings")[2] == {
        "model": "main-sft",
        "temperature": 0.6,
        "top_k": 50,
        "note": "a note",
    }
    (model,) = caller.send("GET", "/v1/models")[2]["data"]
    assert model == caller.send("GET", "/v1/models/main-sft")[2] and model["id"] == "main-sft"


def test_no_inner_html() -> None:
    page = Path(__file__).parents[1] / "nanochat/web/page"
    text = "".join(path.read_text(encoding="utf-8") for path in page.iterdir())
    assert not re.search(
        r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(|\bon\w+=|style=|<script>|https?://",
        text,
    )


def test_addresses(caller: Client) -> None:
    for words in (["--host=0.0.0.0"], [f"--port={caller.port}"], ["--port=99999"]):
        with pytest.raises(UserError):
            chat_web.main(words)
