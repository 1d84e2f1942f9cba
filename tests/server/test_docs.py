"""The examples of docs/serving.md, as they stand there, against a server."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers.chain_server import CALL, REST, TOK, Chain, Client

from nanochat.engine import Engine
from nanochat.server.app import create_app

PAGE = (Path(__file__).parents[2] / "docs/serving.md").read_text(encoding="utf-8")
ADDRESS = "127.0.0.1:8000"


@pytest.fixture(scope="module")
def server() -> Iterator[Client]:
    client = Client(create_app(Engine(Chain(CALL, REST), TOK), "main-sft"))
    yield client
    client.close()


def blocks(kind: str, word: str, server: Client) -> list[str]:
    """Blocks of code that hold `word`, with the port of this server."""
    found = re.findall(rf"^```{kind}\b[^\n]*\n(.*?)^```", PAGE, flags=re.M | re.S)
    return [text.replace(ADDRESS, f"127.0.0.1:{server.port}") for text in found if word in text]


def test_curl(server: Client) -> None:
    if not shutil.which("curl"):
        pytest.skip("not run: no curl on this machine")
    (text,) = blocks("bash", "curl", server)
    commands = [line for line in text.replace("\\\n", " ").splitlines() if line]
    assert len(commands) >= 5 and all(line.startswith("curl ") for line in commands)
    for command in commands:
        done = subprocess.run(
            ["bash", "-c", f"{command} -sS --fail --max-time 60"], capture_output=True, text=True, timeout=90
        )
        assert done.returncode == 0, (command, done.stderr, done.stdout)
        if '"stream": true' in command:
            assert done.stdout.endswith("data: [DONE]\n\n")
        elif "metrics" in command:
            assert "nanochat_requests_running" in done.stdout
        else:
            assert json.loads(done.stdout)


def test_openai_python(server: Client) -> None:
    pytest.importorskip("openai", reason="not run: the package openai is not installed")
    (code,) = blocks("python", "openai", server)
    shown = io.StringIO()
    names: dict = {}
    with contextlib.redirect_stdout(shown):
        exec(compile(code, "docs/serving.md", "exec"), names)
    names["client"].close()
    assert shown.getvalue() == "ok 🙂!"


@pytest.mark.slow
def test_llm(server: Client, tmp_path: Path) -> None:
    if importlib.util.find_spec("llm") is None:
        pytest.skip("not run: the package llm is not installed")
    (text,) = blocks("yaml", "model_id", server)
    (tmp_path / "extra-openai-models.yaml").write_text(text)
    environment = {**os.environ, "LLM_USER_PATH": str(tmp_path)}

    def llm(*words: str) -> str:
        done = subprocess.run(
            [sys.executable, "-m", "llm", *words],
            capture_output=True,
            text=True,
            env=environment,
            timeout=120,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    llm("keys", "set", "nanochat", "--value", "none")
    assert llm("-m", "nanochat", "Who are you?") == "ok 🙂!"
    assert llm("-m", "nanochat", "--no-stream", "-o", "temperature", "0", "Who are you?") == "ok 🙂!"
    assert llm("-c", "And now?") == "ok 🙂!"
