"""Real clients against the server: openai-python, curl, schemathesis, lm-eval. Absent ones are skipped."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from helpers.chain_server import CALL, REST, TOK, Chain, Client, counter_app, until

from nanochat.engine import Engine
from nanochat.server.app import create_app

KEY = "long-secret"
USER = [{"role": "user", "content": "hello"}]


@pytest.fixture(scope="module")
def caller() -> Iterator[Client]:
    client = Client(create_app(Engine(Chain(CALL, REST), TOK), "main-sft", keys=[KEY]))
    yield client
    client.close()


@pytest.fixture(scope="module")
def counter() -> Iterator[Client]:
    client = Client(counter_app(keys=[KEY]))
    yield client
    client.close()


def openai_client(server: Client, **options: Any) -> Any:
    openai = pytest.importorskip("openai", reason="not run: the package openai is not installed")
    options = {"api_key": KEY, "max_retries": 0, "timeout": 60, **options}
    return openai.OpenAI(base_url=f"http://127.0.0.1:{server.port}/v1", **options)


def test_openai_client_matrix(caller: Client) -> None:
    with openai_client(caller) as client:
        assert [model.id for model in client.models.list()] == ["main-sft"]
        assert client.models.retrieve("main-sft").owned_by == "nanochat"
        for n in (1, 2):
            for fields in (
                {},
                {"stop": "k"},
                {"seed": 7, "temperature": 1.5},
                {"max_tokens": 9},
                {"logprobs": True},
            ):
                ask = {"model": "main-sft", "messages": USER, "n": n, **fields}
                whole = client.chat.completions.create(**ask)
                texts = [choice.message.content for choice in whole.choices]
                assert len(texts) == n and whole.usage.total_tokens > whole.usage.prompt_tokens
                if not fields:
                    assert texts == ["ok 🙂!"] * n
                streamed, reasons = [""] * n, {}
                options = {"include_usage": True}
                for chunk in client.chat.completions.create(stream=True, stream_options=options, **ask):
                    for choice in chunk.choices:
                        streamed[choice.index] += choice.delta.content or ""
                        reasons[choice.index] = choice.finish_reason
                    usage = chunk.usage
                assert streamed == texts and usage.total_tokens == whole.usage.total_tokens
                assert [reasons[i] for i in range(n)] == [choice.finish_reason for choice in whole.choices]
        scored = client.chat.completions.create(
            model="main-sft", messages=USER, logprobs=True, top_logprobs=2
        )
        entries = scored.choices[0].logprobs.content
        assert entries[0].token == "o" and len(entries[0].top_logprobs) == 2
        text = client.completions.create(model="main-sft", prompt="o", logprobs=1, echo=True, temperature=0)
        assert text.choices[0].text == "ok 🙂!" and text.choices[0].logprobs.tokens[0] == "o"


def test_openai_client_errors(caller: Client) -> None:
    openai = pytest.importorskip("openai", reason="not run: the package openai is not installed")
    with openai_client(caller) as client, openai_client(caller, api_key="wrong-secret") as stranger:
        with pytest.raises(openai.NotFoundError) as missing:
            client.chat.completions.create(model="other", messages=USER)
        assert missing.value.code == "model_not_found"
        with pytest.raises(openai.BadRequestError) as bad:
            client.chat.completions.create(model="main-sft", messages=USER, temperature=3)
        assert bad.value.param == "temperature"
        with pytest.raises(openai.BadRequestError) as long:
            client.chat.completions.create(
                model="main-sft", messages=[{"role": "user", "content": "7 " * 300}]
            )
        assert long.value.code == "context_length_exceeded"
        with pytest.raises(openai.AuthenticationError):
            stranger.models.list()


@pytest.mark.slow
def test_openai_client_retries(counter: Client) -> None:
    """A full queue is 429 with Retry-After; the client comes back by itself."""
    openai = pytest.importorskip("openai", reason="not run: the package openai is not installed")
    body = {"messages": USER, "stream": True}
    holders = [counter.open("POST", "/v1/chat/completions", body, X_Api_Key=KEY) for _ in range(3)]
    assert holders[0].getresponse().read(5)
    with openai_client(counter) as client, pytest.raises(openai.RateLimitError):
        client.chat.completions.create(model="main-sft", messages=USER, max_tokens=3)
    with openai_client(counter, max_retries=4) as client, ThreadPoolExecutor(1) as pool:
        answer = pool.submit(client.chat.completions.create, model="main-sft", messages=USER, max_tokens=3)
        refused = 'requests_rejected_total{status="429"} '
        until(lambda: f"{refused}2" in counter.send("GET", "/metrics", X_Api_Key=KEY)[2].decode(), seconds=30)
        for holder in holders:
            holder.close()
        assert answer.result().choices[0].message.content == "abc"


def test_curl(caller: Client) -> None:
    if not shutil.which("curl"):
        pytest.skip("not run: no curl on this machine")
    url = f"http://127.0.0.1:{caller.port}/v1/chat/completions"
    words = ["curl", "-sSN", "--max-time", "60", url, "-H", f"Authorization: Bearer {KEY}"]
    words += ["-H", "Content-Type: application/json", "-d"]

    def curl(body: dict) -> str:
        done = subprocess.run([*words, json.dumps(body)], capture_output=True, text=True, timeout=90)
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert json.loads(curl({"messages": USER}))["choices"][0]["message"]["content"] == "ok 🙂!"
    events = curl({"messages": USER, "stream": True}).split("\n\n")
    assert events[-2:] == ["data: [DONE]", ""] and events[0].startswith("data: {")


@pytest.mark.slow
def test_schemathesis_finds_no_5xx(caller: Client) -> None:
    """Requests made up from the OpenAPI document, right and wrong ones: never a server error."""
    schemathesis = pytest.importorskip("schemathesis", reason="not run: schemathesis is not installed")
    from hypothesis import HealthCheck, Phase, given, settings
    from hypothesis.errors import Unsatisfiable

    headers = {"Authorization": f"Bearer {KEY}"}
    url = f"http://127.0.0.1:{caller.port}"
    schema = schemathesis.openapi.from_url(f"{url}/openapi.json", headers=headers)
    from schemathesis.generation import GenerationMode

    statuses: set[int] = set()
    operations = [result.ok() for result in schema.get_all_operations()]
    assert len(operations) >= 9
    for operation in operations:
        for mode in GenerationMode:

            @given(case=operation.as_strategy(generation_mode=mode))
            @settings(
                max_examples=25,
                phases=[Phase.generate],
                deadline=None,
                suppress_health_check=list(HealthCheck),
                database=None,
            )
            def one(case: Any) -> None:
                response = case.call(base_url=url, headers=headers, timeout=60)
                statuses.add(response.status_code)
                assert response.status_code < 500, (case.method, case.path, response.text[:200])

            try:
                one()
            except Unsatisfiable:  # nothing can be wrong about a request that takes nothing
                assert operation.method == "get" and mode == GenerationMode.NEGATIVE
    assert {200, 400} <= statuses


LM_EVAL = """
import json, sys
import lm_eval, lm_eval.evaluator
from lm_eval.models.openai_completions import LocalCompletionsAPI
from lm_eval.api.instance import Instance
from lm_eval.tasks import TaskManager
lm_eval.evaluator.add_env_info = lambda _: None  # it runs pip
model = LocalCompletionsAPI(
    model="main-sft", base_url=sys.argv[1] + "/v1/completions", tokenizer_backend="remote", max_length=190,
    num_concurrent=1, max_retries=1, tokenized_requests=True,
    auth_token=sys.argv[2], header={"Authorization": "Bearer " + sys.argv[2]},
)
def instance(kind, arguments, i):
    return Instance(request_type=kind, doc={}, arguments=arguments, idx=i)
pairs = [("o", "k "), ("o", "z")]
scores = model.loglikelihood([instance("loglikelihood", pair, i) for i, pair in enumerate(pairs)])
texts = model.generate_until([instance("generate_until", ("o", {"until": ["!"], "max_gen_toks": 20}), 0)])
tasks = TaskManager(include_path=sys.argv[3])
done = lm_eval.simple_evaluate(model=model, tasks=["own_choice", "own_text"], task_manager=tasks)
whole = [done["results"]["own_choice"]["acc,none"], done["results"]["own_text"]["exact_match,none"]]
print("RESULT" + json.dumps([scores, texts, list(map(float, whole))]))
"""
TASKS = {
    "own_choice": """
task: own_choice
dataset_path: json
dataset_kwargs: {data_files: {test: FOLDER/choice.jsonl}}
test_split: test
output_type: multiple_choice
doc_to_text: '{{q}}'
doc_to_choice: '{{c}}'
doc_to_target: '{{a}}'
target_delimiter: ''
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
""",
    "own_text": """
task: own_text
dataset_path: json
dataset_kwargs: {data_files: {test: FOLDER/text.jsonl}}
test_split: test
output_type: generate_until
doc_to_text: '{{q}}'
doc_to_target: '{{a}}'
target_delimiter: ''
generation_kwargs: {until: ['!'], max_gen_toks: 20}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
""",
}
CHOICES = [
    {"q": "o", "c": ["k ", "z"], "a": 0},
    {"q": "xo", "c": ["zz", "k 🙂"], "a": 1},
    {"q": "k", "c": ["o", " "], "a": 0},
]
TEXTS = [{"q": "o", "a": "k 🙂"}, {"q": "xo", "a": "nothing"}]


@pytest.mark.slow
def test_lm_eval_end_to_end(caller: Client, tmp_path: Path) -> None:
    """lm-eval's own client with the remote tokenizer: log-likelihoods, greedy or not, generation; whole tasks
    of two of its kinds, one of them with an answer that the model gets wrong.
    """
    found = subprocess.run(
        [sys.executable, "-c", "import lm_eval.models.openai_completions"], capture_output=True
    )
    if found.returncode != 0:
        pytest.skip("not run: lm-eval with its api extra is not installed")
    url = f"http://127.0.0.1:{caller.port}"
    for name, text in TASKS.items():
        (tmp_path / f"{name}.yaml").write_text(text.replace("FOLDER", str(tmp_path)))
    for name, rows in (("choice", CHOICES), ("text", TEXTS)):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    words = [sys.executable, "-c", LM_EVAL, url, KEY, str(tmp_path)]
    done = subprocess.run(words, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-3000:]
    line = next(line for line in done.stdout.splitlines() if line.startswith("RESULT"))
    scores, texts, whole = json.loads(line.removeprefix("RESULT"))
    assert scores[0][0] == pytest.approx(0, abs=1e-3) and scores[0][1] is True
    assert scores[1][0] < -10 and scores[1][1] is False
    assert texts == ["k 🙂"]
    assert whole == [pytest.approx(2 / 3), 0.5]
