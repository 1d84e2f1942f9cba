"""Talking in the terminal: a scripted model through the session and its commands, a real one through main."""

from __future__ import annotations

import io
import itertools
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from nanochat import chat_format as chat
from nanochat import checkpoint
from nanochat.chat_ui import terminal
from nanochat.chat_ui.session import COMMANDS, Session, open_engine
from nanochat.engine import Engine
from nanochat.errors import UserError
from nanochat.gpt import GPT, GPTConfig
from nanochat.home import Home
from nanochat.tokenizer import RustBPETokenizer
from scripts import chat_cli

TOK = RustBPETokenizer.train_from_iterator(["hello there, 12 + 34 = 46 héllo 你好 " * 4], 290)


class Script:
    """A model that says its answers in turn, whatever it is asked; each new prompt begins the next one."""

    def __init__(self, *answers: list[int], sequence_len: int = 400) -> None:
        self.answers, self.turn, self.prompts = answers, -1, list[list[int]]()
        self.config = SimpleNamespace(n_kv_head=1, n_head=1, n_embd=2, n_layer=1, sequence_len=sequence_len)

    def get_device(self) -> torch.device:
        return torch.device("cpu")

    def forward(self, ids: torch.Tensor, kv_cache) -> torch.Tensor:
        if kv_cache.get_pos() == 0:
            self.turn += 1
            self.prompts.append(ids[0].tolist())
        kv_cache.advance(ids.shape[1])
        said = kv_cache.get_pos() - len(self.prompts[-1])
        answer = self.answers[self.turn % len(self.answers)]
        logits = torch.zeros(1, ids.shape[1], TOK.get_vocab_size())
        logits[0, -1, answer[min(said, len(answer) - 1)]] = 99.0
        return logits


def script(text: str, code: str | None = None, rest: str = "") -> list[int]:
    special = TOK.encode_special
    ids = TOK.encode(text)
    if code is not None:
        # two tokens that the tool's output overrules; "46" is two tokens here or fewer
        forced = 2 + len(TOK.encode("46"))
        ids += [special(chat.PYTHON_START), *TOK.encode(code), special(chat.PYTHON_END), *[0] * forced]
    return [*ids, *TOK.encode(rest), special(chat.ASSISTANT_END)]


def session_of(*answers: list[int], **kwargs: int) -> Session:
    return Session(Engine(Script(*answers, **kwargs), TOK), temperature=0.0, top_k=0, max_tokens=99, seed=1)


def talk(session: Session, *lines: str | type[BaseException]) -> str:
    """What a conversation shows, asides in (); an exception among the lines is raised instead of read."""
    said: list[tuple[bool, str]] = []
    waiting = list(lines)

    def read() -> str:
        if not waiting:
            raise EOFError
        line = waiting.pop(0)
        if not isinstance(line, str):
            raise line
        return line

    chat_cli.converse(session, read, lambda text, is_aside: said.append((is_aside, text)))
    groups = (
        (aside, "".join(text for _, text in run)) for aside, run in itertools.groupby(said, lambda s: s[0])
    )
    return "".join(f"({text})" if aside else text for aside, text in groups)


# ---------------------------------------------------------------- sessions and commands


def test_answers_turns_and_tool_calls() -> None:
    session = session_of(script("so ", "12 + 34", "."), script("héllo 你好 🙂"))
    shown = talk(session, "what is 12 + 34?", "", "hello", "/quit", "never read")
    assert shown == "so ([12 + 34 = 46] ).\nhéllo 你好 🙂\n"
    parts = [("text", "so "), ("python", "12 + 34"), ("python_output", "46"), ("text", ".")]
    assert session.messages[1]["content"] == [{"type": kind, "text": text} for kind, text in parts]
    assert [m["role"] for m in session.messages] == ["user", "assistant"] * 2
    # the second prompt holds the first turn, tool call and all
    model = session.engine.model
    assert model.prompts[1] == TOK.render_for_completion({"messages": session.messages})


def test_commands(tmp_path: Path) -> None:
    session = session_of(script("one"), script("two"))
    file = tmp_path / "talk.json"
    talk(
        session,
        "/system be kind",
        "/temperature 0.5",
        "/topk 7",
        "hello",
        "/retry",
        f"/save {file}",
        "/clear",
    )
    shown = talk(session, "/help", "/regen", "/topk x", "/temperature nan", "/nonsense", "/load")
    shown += talk(session, f"/load {tmp_path}/none.json", f"/load {file}")
    for expected in (
        "/retry ",
        "there is no command /nonsense",
        "found 'x'",
        "found 'nan'",
        "none.json does not exist",
    ):
        assert expected in shown
    assert "needs the name of a file" in shown and "there is no answer to repeat" in shown
    assert (session.system, session.temperature, session.top_k) == ("be kind", 0.5, 7)
    assert [chat.text_of(m["content"]) for m in session.messages] == ["hello", "two"]
    assert json.loads(file.read_text())["messages"][0] == {"role": "system", "content": "be kind"}
    assert TOK.decode(session.engine.model.prompts[0]).count("be kind\n\nhello") == 1
    file.write_text('{"messages": [{"role": "assistant", "content": "x"}]}')
    assert "holds no conversation" in talk(session, f"/load {file}")


def test_interrupt_stops_the_answer_and_not_the_program(monkeypatch: pytest.MonkeyPatch) -> None:
    session = session_of(script("a long answer that never comes to its end"), script("fine"))
    real = Script.forward
    calls = []

    def forward(self: Script, ids: torch.Tensor, kv_cache) -> torch.Tensor:
        calls.append(1)
        if len(calls) == 6:
            raise KeyboardInterrupt
        return real(self, ids, kv_cache)

    monkeypatch.setattr(Script, "forward", forward)
    shown = talk(
        session, "hello", KeyboardInterrupt, "again", KeyboardInterrupt, KeyboardInterrupt, "never read"
    )
    assert "( (stopped)\nCtrl-C again leaves\n)fine\n(Ctrl-C again leaves\n)" in shown
    begun = chat.text_of(session.messages[1]["content"])
    assert begun and "a long answer".startswith(begun[:13]) and len(session.messages) == 4
    with pytest.raises(KeyboardInterrupt):
        calls.clear()
        chat_cli.answer(session, session.ask("hello"), lambda *_: None, errors_end=True)


def test_context_drops_the_oldest_turns() -> None:
    session = session_of(script("ok"), sequence_len=120)
    session.system = "be kind"
    shown = talk(session, *["hello there"] * 12)
    assert "(the oldest 2 messages do not fit any more and are left out)" in shown.replace("\n", "")
    prompts = session.engine.model.prompts
    assert all(len(ids) + 30 <= 120 for ids in prompts) and len(session.messages) == 24
    assert all(TOK.decode(ids).count("be kind") == 1 for ids in prompts)
    before = list(session.messages)
    assert "the message is too long" in talk(session, "hello there " * 200)
    assert session.messages == before


def test_each_reply_draws_anew() -> None:
    class Even(Script):
        def forward(self, ids: torch.Tensor, kv_cache) -> torch.Tensor:
            logits = torch.zeros_like(super().forward(ids, kv_cache))
            logits[..., TOK.get_vocab_size() - 9 :] = -99.0
            return logits

    def said(seed: int) -> list:
        session = Session(Engine(Even([0]), TOK), temperature=1.0, top_k=0, max_tokens=9, seed=seed)
        talk(session, "hello", "/regen", "/regen")
        return [list(session.ask_again()) for _ in range(2)]

    assert said(1) == said(1) and said(1)[0] != said(1)[1] and said(1) != said(2)


def small(sequence_len: int = 300) -> GPT:
    """A random model that never ends its answers by itself."""
    model = GPT(GPTConfig(sequence_len, TOK.get_vocab_size(), 2, 2, 1, 32, "SL"))
    rng = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=rng) * 0.3)
    return model


def test_later_turns_compute_only_what_is_new() -> None:
    """And say what a session without a past would."""
    how = {"temperature": 0.8, "top_k": 0, "max_tokens": 30, "seed": 1}
    session = Session(Engine(small(), TOK), **how, repetition_penalty=1.2)
    talk(session, "hello there " * 12, "hello again")
    assert session.last is not None and session.last.num_cached >= 16
    fresh = Session(Engine(small(), TOK), **how, repetition_penalty=1.2)
    fresh.messages, fresh._num_replies = session.messages[:2], 1
    pieces = list(fresh.ask("hello again"))
    assert fresh.last is not None and fresh.last.num_cached == 0
    assert fresh.last.output == session.last.output and pieces
    last = session.last
    shown = talk(session, "/tokens", "/clear", "/tokens")
    assert "of 300 tokens; the last answer: 30 in" in shown and shown.count("the last answer") == 1
    assert f"{last.num_cached} of {len(last.prompt)} before it known already" in shown
    assert "the conversation has 0 of 300" in shown and session.last is None


def test_an_interrupted_turn_leaves_a_working_session(monkeypatch: pytest.MonkeyPatch) -> None:
    session = Session(Engine(small(), TOK), temperature=0.8, top_k=0, max_tokens=20, seed=1)
    pieces = session.ask("hello")
    next(pieces)
    pieces.close()  # the reader has had enough
    assert session.last is not None and session.last.finish_reason == "abort"
    assert len(session.last.output) < 20 and len(list(session.ask("hello again"))) > 1
    assert [m["role"] for m in session.messages] == ["user", "assistant"] * 2
    network = session.engine.network()
    monkeypatch.setattr(network, "logits", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    assert "(stopped)" in talk(session, "hello")
    monkeypatch.undo()
    assert "(stopped)" not in talk(session, "hello")


def test_no_limit_goes_to_the_end_of_the_context() -> None:
    session = Session(Engine(small(120), TOK), temperature=0.0, top_k=0, max_tokens=0, seed=1)
    talk(session, "hello")
    assert session.last is not None
    assert len(session.last.prompt) + len(session.last.output) == 120 or session.last.finish_reason == "stop"


def test_a_cut_answer_says_so() -> None:
    session = session_of(script("a long answer that never ends"))
    session.max_tokens = 6
    assert "(cut after 6 tokens, see --max-tokens)" in talk(session, "hello").replace("( (", "(")
    session = session_of(script("on and on " * 90), sequence_len=120)
    session.max_tokens = 120
    assert "context is full" in talk(session, "hello")
    assert "cut" not in talk(session_of(script("whole.")), "hello")


def typed(keys: str, history: Path | None, times: int = 1) -> list[str]:
    """What the reader returns when a person types these keys."""
    from prompt_toolkit.input import create_pipe_input
    from prompt_toolkit.output import DummyOutput

    with create_pipe_input() as pipe:
        pipe.send_text(keys)
        read = terminal.reader(history, COMMANDS, input=pipe, output=DummyOutput())
        return [read() for _ in range(times)]


def test_arrow_keys_and_several_lines(tmp_path: Path) -> None:
    up, left, alt_enter = "\x1b[A", "\x1b[D", "\x1b\r"
    file = terminal.history_file(tmp_path / "home")
    assert file is not None and file.stat().st_mode & 0o777 == 0o600
    assert typed(f"first\rsecnd{left}{left}o\r", file, 2) == ["first", "second"]
    assert typed(f"{up}\r", file) == ["second"]  # another day
    assert typed(f"{up}x\r", None) == ["x"]
    assert typed(f"one{alt_enter}two\\\rthree\r", None) == ["one\ntwo\nthree"]
    assert {"/temperature", "/retry", "/tokens", "/quit"} <= set(COMMANDS)  # what Tab completes
    (tmp_path / "file").touch()
    assert terminal.history_file(tmp_path / "file") is None


# ---------------------------------------------------------------- a trained model, through main


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A home with a tokenizer and checkpoints of a base and a fine-tuned model."""
    root = tmp_path_factory.mktemp("home")
    found = Home(root)
    TOK.save(found.tokenizer_dir)
    config = GPTConfig(
        64, TOK.get_vocab_size(), n_layer=1, n_head=1, n_kv_head=1, n_embd=32, window_pattern="L"
    )
    meta = {"model": config.__dict__, "inputs": {"tokenizer": TOK.fingerprint()}}
    for seed, stage in enumerate(("base", "sft")):
        model = GPT(config)
        model.init_weights(seed)
        arrays = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
        checkpoint.save(found.checkpoints("main", stage), 7, {"model": arrays}, {}, meta=meta)
    return root


def run(capsys: pytest.CaptureFixture, *words: str) -> tuple[str, str]:
    chat_cli.main([*words, "--max-tokens=12", "--device=cpu"])
    captured = capsys.readouterr()
    return captured.out, captured.err


def test_one_prompt(home: Path, capsys: pytest.CaptureFixture) -> None:
    how = (f"--home={home}", "--temperature=1")
    out, err = run(capsys, *how, "-p", "hello", "--seed=3")
    assert out.endswith("\n") and len(out) > 1 and err == ""
    assert run(capsys, *how, "-p", "hello", "--seed=3") == (out, err)
    assert run(capsys, *how, "-p=hello", "--seed=4")[0] != out
    assert len({run(capsys, *how, "-p", "hello")[0] for _ in range(3)}) > 1  # another seed each time
    assert "base model" in run(capsys, *how, "-p", "hello", "--stage=base")[1]


def test_stage_and_precision(home: Path) -> None:
    opened = open_engine(Home(home), "main", None, None)
    assert (opened.stage, opened.step, opened.warning) == ("sft", 7, None)
    assert opened.engine.model.compute_dtype == torch.float32 or torch.cuda.is_available()
    with pytest.raises(UserError, match="no checkpoint"):
        open_engine(Home(home), "other", None, None)
    with pytest.raises(UserError):
        open_engine(Home(home), "main", "sft", 8)


def test_bad_words(home: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    for words in (
        ["-p"],
        ["--tempreture=1"],
        [f"--home={home}", "-p", "  "],
        [f"--home={home / 'none'}", "-p", "x"],
        [f"--home={home}", "-p", "x", "--top-p=2"],
        [f"--home={home}", "-p", "x", "--repetition-penalty=0"],
    ):
        with pytest.raises(UserError):
            chat_cli.main(words)
    monkeypatch.setattr(sys, "stdin", io.StringIO("hello\n"))
    assert (
        run(capsys, f"--home={home}", "--seed=1")[0]
        == run(capsys, f"--home={home}", "--seed=1", "-p", "hello")[0]
    )


def test_pipe_mode_and_utf8_output(home: Path) -> None:
    """As a person would type it, in a terminal that claims to know ASCII alone."""
    environment = {**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "scripts.chat_cli",
            f"--home={home}",
            "--max-tokens=30",
            "--temperature=1",
            "--seed=5",
        ],
        input="héllo 你好 🙂\n".encode(),
        capture_output=True,
        env=environment,
        cwd=Path(__file__).parents[2],
    )
    assert done.returncode == 0, done.stderr.decode()
    assert done.stdout.decode("utf-8").endswith("\n") and b"\x1b" not in done.stdout
