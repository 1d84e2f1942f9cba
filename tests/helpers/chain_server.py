"""A model whose next token follows from its last one, a server around it on a real socket, and its client."""

from __future__ import annotations

import http.client
import json
import socket
import threading
import time
from types import SimpleNamespace
from typing import Any

import torch

from nanochat import chat_format as chat
from nanochat.engine import Engine
from nanochat.server.app import create_app
from nanochat.server.door import listen
from nanochat.server.serving import make_server
from nanochat.tokenizer import RustBPETokenizer

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

    def forward_hidden(self, ids_BT: torch.Tensor, context: Any) -> torch.Tensor:
        if self.is_broken:
            self.is_broken = False
            raise RuntimeError("out of order")
        # Tokens of a row lie side by side at positions that follow one another.
        self.num_rows.append(1 + int((context.positions.diff() != 1).sum()))
        time.sleep(self.delay_seconds)
        return self.nexts[ids_BT].unsqueeze(-1)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.one_hot(hidden[..., 0], TOK.get_vocab_size()) * 50.0


class Client:
    """One connection per request to a server that runs in a thread."""

    def __init__(self, app: Any, port: int = 0, send_bytes: int = 0) -> None:
        self.app, self.server = app, make_server(app, drain_seconds=5)
        listener = listen("127.0.0.1", port)
        if send_bytes:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, send_bytes)
        self.port = listener.getsockname()[1]
        self.thread = threading.Thread(target=self.server.run, kwargs={"sockets": [listener]}, daemon=True)
        self.thread.start()
        while not self.server.started:
            time.sleep(0.01)

    @property
    def model(self) -> Any:
        return self.app.state.group.engine.model

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


def until(condition: Any, seconds: float = 30.0) -> None:
    """Wait for something that must come true."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def counter_app(**options: Any) -> Any:
    """An app of two rows whose model goes on for ever, 2 ms a token; one request may wait."""
    model = Chain(COUNT, delay_seconds=0.002, sequence_len=2000)
    return create_app(Engine(model, TOK), "main-sft", **{"num_rows": 2, "max_waiting": 1, **options})
