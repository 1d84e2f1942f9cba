"""The server over real sockets of this machine, around a model whose next token follows from its last one."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from helpers.chain_server import CALL, END, REST, TOK, Chain, Client, counter_app, until

from nanochat import chat_format as chat
from nanochat.engine import Engine
from nanochat.errors import UserError
from nanochat.gpt import GPT, GPTConfig
from nanochat.server import schemas as openai
from nanochat.server.app import POLICY, create_app
from nanochat.server.middleware import MAX_BODY_BYTES
from nanochat.server.schemas import ChatRequest
from scripts import chat_web


@pytest.fixture(scope="module")
def caller() -> Iterator[Client]:
    """A server whose model calls the tool."""
    client = Client(create_app(Engine(Chain(CALL, REST), TOK), "main-sft", note="a note"))
    yield client
    client.close()


@pytest.fixture
def counter() -> Iterator[Client]:
    """A server of two rows whose model goes on for ever, 2 ms a token; one request may wait."""
    client = Client(counter_app())
    yield client
    client.close()


# ---------------------------------------------------------------- answers


def test_guessing_ahead_changes_no_answer() -> None:
    """A random network that soon repeats itself, so that guesses come true; whole and streamed."""
    said, passes = [], []
    for speculate in (0, 4):
        torch.manual_seed(0)
        model = GPT(GPTConfig(300, TOK.get_vocab_size(), 2, 2, 1, 32, "SL"))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.copy_(torch.randn(parameter.shape) * 0.3)
        engine = Engine(model.eval(), TOK, speculate=speculate)
        opened, counts = engine.open_batch, [0]

        def open_batch(*args: Any, opened: Any = opened, counts: list[int] = counts, **how: Any) -> Any:
            batch = opened(*args, **how)
            compute = batch.compute

            def counted() -> None:
                counts[0] += 1
                compute()

            batch.compute = counted
            return batch

        engine.open_batch = open_batch  # type: ignore[method-assign]
        client = Client(create_app(engine, "main-sft"))
        try:
            fields = {"temperature": 0, "max_tokens": 120}
            _, _, body = client.ask(**fields)
            streamed = client.stream(**fields)
        finally:
            client.close()
        choice = body["choices"][0]
        text = "".join(e["choices"][0]["delta"].get("content") or "" for e in streamed if e["choices"])
        said.append((choice["message"], choice["finish_reason"], body["usage"]["completion_tokens"], text))
        passes.append(counts[0])
    assert said[0] == said[1] and said[0][2] > 60
    assert passes[1] < 0.8 * passes[0]


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
    request = openai.parse(json.dumps({"messages": messages}).encode(), ChatRequest)
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
    assert max(counter.model.num_rows) == 2


# ---------------------------------------------------------------- errors

BAD = [
    *((b"temperature", value) for value in (b"-1", b"2.1", b"1e400", b"true", b'"1"')),
    *((b"top_p", b"1.5"), (b"top_k", b"-2"), (b"top_k", b"1.5"), (b"seed", b"9" * 400), (b"seed", b"1.0")),
    *((b"max_tokens", b"0"), (b"max_tokens", b"1e3"), (b"n", b"17"), (b"stream", b"1"), (b"stop", b"[1]")),
    (b"stream_options", b'{"include_usage": true}'),
    (b"repetition_penalty", b"0"),
    (b"presence_penalty", b"3"),
    (b"logit_bias", b'{"1": 101}'),
    (b"logit_bias", b'{"x": 1}'),
    (b"logit_bias", b'{"99999": 1}'),
    (b"top_logprobs", b"3"),
    (b"response_format", b'{"type": "json_object"}'),
    (b"tool_choice", b'"required"'),
    (b"stop_token_ids", b"[-1]"),
    (b"min_tokens", b"-1"),
    (b"stop", b'["a", 1]'),
    (b"continue_final_message", b"true"),
    (b"max_tokens", b"true"),
    (b"min_p", b"2"),
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
    assert caller.send("GET", "/health", Host="evil.example")[0] == 403
    fine = {"messages": [{"role": "user", "content": "hi"}], "unknown": 1, "temperature": None}
    assert (
        caller.send("POST", "/v1/chat/completions", fine, Origin=f"http://127.0.0.1:{caller.port}")[0] == 200
    )


def test_overload_only_200_429_and_health(counter: Client) -> None:
    with ThreadPoolExecutor(12) as pool:
        futures = [pool.submit(counter.ask, max_tokens=200) for _ in range(12)]
        until(lambda: counter.app.state.group.num_running == 2)
        assert counter.send("GET", "/health")[0] == 200
        assert not all(future.done() for future in futures)  # it did not wait for the answers
        found = [future.result() for future in futures]
    statuses = [status for status, _, _ in found]
    assert set(statuses) == {200, 429} and statuses.count(200) >= 3
    refused = found[statuses.index(429)]
    assert refused[2]["error"]["code"] == "rate_limit_exceeded" and 1 <= int(refused[1]["Retry-After"]) <= 120


@pytest.mark.parametrize("is_streamed", [True, False])
def test_disconnect_frees_slot(counter: Client, is_streamed: bool) -> None:
    model = counter.model
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
    counter.model.is_broken = True
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
    for path, kind in (("/", "text/html"), ("/app.js", "text/javascript"), ("/icon.svg", "image/svg+xml")):
        status, headers, data = caller.send("GET", path)
        assert status == 200 and headers.get_content_type() == kind and len(data) > 300
        assert headers["Content-Security-Policy"] == POLICY and headers["X-Content-Type-Options"] == "nosniff"
    assert caller.send("GET", "/settings")[2] == {
        "model": "main-sft",
        "temperature": 0.6,
        "top_k": 50,
        "note": "a note",
        "context": 200,
    }
    (model,) = caller.send("GET", "/v1/models")[2]["data"]
    assert model == caller.send("GET", "/v1/models/main-sft")[2] and model["id"] == "main-sft"


def test_addresses(caller: Client) -> None:
    for words in (["--host=0.0.0.0"], ["--host=::"], [f"--port={caller.port}"], ["--port=99999"]):
        with pytest.raises(UserError):
            chat_web.main(words)


# ---------------------------------------------------------------- other ways to ask


def test_n_choices(caller: Client) -> None:
    body = caller.ask(n=3)[2]
    assert [choice["index"] for choice in body["choices"]] == [0, 1, 2]
    assert {choice["message"]["content"] for choice in body["choices"]} == {"ok 🙂!"}
    assert body["usage"]["completion_tokens"] == 3 * 17
    deltas = [event["choices"][0] for event in caller.stream(n=3)]
    for index in range(3):
        mine = [delta for delta in deltas if delta["index"] == index]
        assert mine[0]["delta"]["role"] == "assistant" and mine[-1]["finish_reason"] == "stop"
        assert "".join(delta["delta"].get("content", "") for delta in mine) == "ok 🙂!"


def test_continue_final_message(caller: Client) -> None:
    """The answer goes on where the given one ends: after "o" the chain knows k."""
    messages = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "o"}]
    body = {"messages": messages, "continue_final_message": True}
    status, _, answer = caller.send("POST", "/v1/chat/completions", body)
    assert status == 200 and answer["choices"][0]["message"]["content"] == "k 🙂!"


def test_chat_logprobs(caller: Client) -> None:
    whole = caller.ask(logprobs=True, top_logprobs=2)[2]["choices"][0]
    entries = whole["logprobs"]["content"]
    assert b"".join(bytes(entry["bytes"]) for entry in entries).decode() == whole["message"]["content"]
    assert entries[0]["token"] == "o" and entries[3]["token"] == "bytes:\\xf0"
    for entry in entries:
        assert -0.01 < entry["logprob"] <= 0 and len(entry["top_logprobs"]) == 2
        assert entry["top_logprobs"][0] == {key: entry[key] for key in ("token", "logprob", "bytes")}
    streamed = [
        entry
        for event in caller.stream(logprobs=True, top_logprobs=2)
        for entry in ((event["choices"][0]["logprobs"] or {}).get("content") or [])
    ]
    assert streamed == entries


def complete(client: Client, prompt: object, **fields: object) -> dict:
    status, _, body = client.send("POST", "/v1/completions", {"prompt": prompt, **fields})
    assert status == 200, body
    return body


def test_text_completions(caller: Client) -> None:
    body = complete(caller, "o", temperature=0)
    assert body["object"] == "text_completion" and body["choices"][0]["text"] == "k 🙂!"
    assert body["usage"]["prompt_tokens"] == 1
    several = complete(caller, ["o", "k"], n=2, max_tokens=2, echo=True)
    assert [choice["text"] for choice in several["choices"]] == ["ok ", "ok ", "k \ufffd", "k \ufffd"]
    assert [choice["finish_reason"] for choice in several["choices"]] == ["length"] * 4
    assert complete(caller, "o", stop=["🙂"])["choices"][0]["text"] == "k "
    assert complete(caller, "o", stop_token_ids=[ord(" ")])["choices"][0]["finish_reason"] == "stop"
    assert complete(caller, "", max_tokens=1)["usage"]["prompt_tokens"] == 0
    assert caller.send("POST", "/completions", {"prompt": "o"})[0] == 200
    long = complete(caller, "o", ignore_eos=True, max_tokens=30)
    assert long["usage"]["completion_tokens"] == 30
    for wrong in ({"prompt": [10**6]}, {"prompt": "o", "max_tokens": 0}, {"prompt": ["o"] * 200, "n": 2}, {}):
        assert caller.send("POST", "/v1/completions", wrong)[0] == 400


def test_echo_logprobs(caller: Client) -> None:
    """What lm-eval reads: the prompt's log-probabilities, checked against the model's own logits."""
    ids = [*b"xok q"]
    for prompt, hidden in ((ids, True), ([TOK.get_bos_token_id(), *ids], False)):
        body = complete(caller, prompt, echo=True, logprobs=1, max_tokens=1, temperature=0)
        (choice,) = body["choices"]
        found = choice["logprobs"]
        shown = ids if hidden else prompt
        assert body["usage"]["prompt_tokens"] == len(shown)
        assert len(found["tokens"]) == len(shown) + 1 == len(found["text_offset"])
        assert found["token_logprobs"][0] is None and found["top_logprobs"][0] is None
        all_ids = [*shown, caller.model.nexts[shown[-1]].item()]
        logits = caller.model.logits(caller.model.nexts[torch.tensor(all_ids)].unsqueeze(-1))
        expected = logits.log_softmax(-1)
        for i in range(1, len(all_ids)):
            assert found["token_logprobs"][i] == pytest.approx(expected[i - 1, all_ids[i]].item())
            assert max(found["top_logprobs"][i].values()) == pytest.approx(expected[i - 1].max().item())
            is_greedy = found["token_logprobs"][i] == max(found["top_logprobs"][i].values())
            assert is_greedy == (caller.model.nexts[all_ids[i - 1]].item() == all_ids[i])
        assert choice["text"].startswith(TOK.decode(shown))
    scored = complete(caller, ids, echo=True, logprobs=0, max_tokens=0)["choices"][0]
    assert scored["text"] == "xok q" and len(scored["logprobs"]["tokens"]) == 5
    assert all(math.isfinite(value) for value in scored["logprobs"]["token_logprobs"][1:])


def test_text_stream_equals_final(caller: Client) -> None:
    fields = {"prompt": "o", "echo": True, "logprobs": 1, "temperature": 0}
    whole = complete(caller, **fields)["choices"][0]
    status, headers, data = caller.send("POST", "/v1/completions", {**fields, "stream": True})
    assert status == 200 and headers["Content-Type"] == "text/event-stream; charset=utf-8"
    *events, done, _ = data.decode().split("\n\n")
    assert done == "data: [DONE]"
    choices = [json.loads(event.removeprefix("data: "))["choices"][0] for event in events]
    assert "".join(choice["text"] for choice in choices) == whole["text"]
    assert choices[-1]["finish_reason"] == whole["finish_reason"] == "stop"
    for key in ("tokens", "token_logprobs", "top_logprobs"):
        assert [x for c in choices for x in (c["logprobs"] or {}).get(key, [])] == whole["logprobs"][key]


def test_tokenizer_routes(caller: Client) -> None:
    assert caller.send("POST", "/tokenize", {"prompt": "hello 🙂"})[2] == {"tokens": TOK.encode("hello 🙂")}
    assert caller.send("POST", "/tokenize", {"prompt": chat.ASSISTANT_END})[2] == {"tokens": [END]}
    inside = caller.send("POST", "/tokenize", {"prompt": f"a{chat.ASSISTANT_END}"})[2]["tokens"]
    assert END not in inside
    assert caller.send("POST", "/detokenize", {"tokens": TOK.encode("hello")})[2] == {"prompt": "hello"}
    assert caller.send("POST", "/detokenize", {"tokens": [10**7]})[0] == 400
    assert caller.send("GET", "/tokenizer_info")[2]["bos_token"] == chat.BOS


def test_penalties_and_bias(caller: Client) -> None:
    banned = caller.ask(logit_bias={str(ord("!")): -100}, max_tokens=20)[2]["choices"][0]["message"][
        "content"
    ]
    assert "!" not in banned
    assert complete(caller, "o", frequency_penalty=2, presence_penalty=2, repetition_penalty=1.1)["choices"]
    assert complete(caller, "o", min_tokens=12, max_tokens=12)["choices"][0]["finish_reason"] == "length"
