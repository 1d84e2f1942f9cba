"""The terminal as a person has it: a program behind a pseudo-terminal, keys in, screen out."""

from __future__ import annotations

import os
import re
import select
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from nanochat.chat_ui.terminal import Wrapper

pty = pytest.importorskip("pty", reason="not run: this system has no pseudo-terminals")
PROGRAM = """
import fcntl, signal, sys, termios
fcntl.ioctl(0, termios.TIOCSCTTY, 0)  # so that Ctrl-C comes from this terminal
from pathlib import Path
from helpers.script_model import Script, TOK
from nanochat.engine import Engine
from nanochat.chat_ui.session import COMMANDS, Session
from nanochat.chat_ui.terminal import converse, reader, speaker
model = Script()
session = Session(Engine(model, TOK), temperature=0.0, top_k=0, max_tokens=0, seed=1)
real = session.ask
def ask(text):  # what the model shall say follows from the question
    if text.startswith("short"):
        model.say("begin " + "some words " * 6 + "end", delay_seconds=0.02)
    elif text.startswith("slow"):
        model.say("begin " + "never ending words " * 30, delay_seconds=0.1)
    else:
        model.say("you said: " + text)
    return real(text)
session.ask = ask
signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where the tests run in the background
converse(session, reader(Path(sys.argv[1]), COMMANDS), speaker())
print("GONE", len(session.messages))
"""

READY = "{a prompt}"  # stands for what prompt_toolkit sends as each begins


class Screen:
    """A child behind a pseudo-terminal of 60 columns."""

    def __init__(self, history: Path) -> None:
        here = Path(__file__).parents[1]
        self.place, end = pty.openpty()
        import fcntl
        import struct
        import termios

        fcntl.ioctl(end, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 60, 0, 0))
        environment = {**os.environ, "PYTHONPATH": f"{here.parent}:{here}", "TERM": "xterm"}
        words = [sys.executable, "-c", PROGRAM, str(history)]
        self.child = subprocess.Popen(
            words, stdin=end, stdout=end, stderr=end, env=environment, start_new_session=True
        )
        os.close(end)
        self.shown = ""

    def type(self, keys: str) -> None:
        os.write(self.place, keys.encode())

    def until(self, pattern: str, seconds: float = 120.0) -> str:
        """What was shown up to a match of `pattern` (which counts as seen), control sequences left out."""
        end = time.monotonic() + seconds
        while not (match := re.search(pattern, self.shown)):
            assert time.monotonic() < end, (pattern, self.shown[-500:])
            if select.select([self.place], [], [], 0.1)[0]:
                try:
                    data = os.read(self.place, 65_536).decode(errors="replace")
                except OSError:  # the child is gone
                    data = ""
                    assert self.child.poll() is None or re.search(pattern, self.shown), (pattern, self.shown)
                if "\x1b[6n" in data:  # where is the cursor?
                    self.type("\x1b[1;1R")
                data = data.replace("\x1b[?2004h", READY)
                self.shown += re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]|\x1b[()=>][0-9A-B]?|\r", "", data)
        found, self.shown = self.shown[: match.end()], self.shown[match.end() :]
        return found


@pytest.fixture(scope="module")
def screen(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Screen]:
    found = Screen(tmp_path_factory.mktemp("history") / "history")
    found.until(READY)
    yield found
    found.child.kill()
    found.child.wait()
    os.close(found.place)


@pytest.mark.slow
def test_a_person_at_a_terminal(screen: Screen) -> None:
    """Streaming, Ctrl-C for the answer alone, typing ahead, arrows, Tab, several lines, and out."""
    screen.type("hello\r")
    screen.until("you said: hello")
    screen.until(READY)
    screen.type("short one\r")
    screen.until("begin some")
    screen.type("typed ahead")  # is not shown in the middle of the answer, but at the next prompt
    assert "typed" not in screen.until("some words end")
    assert "typed" not in screen.until(READY)
    screen.until("typed ahead")
    screen.type("\r")
    screen.until("you said: typed ahead")
    screen.until(READY)
    screen.type("slow one\r")
    screen.until("ending words never")
    screen.type("\x03")
    assert "Traceback" not in screen.until(r"\(stopped\)")
    screen.until(READY)
    screen.type("\x1b[A\x1b[A\x1b[A")  # up, up, up
    screen.until("short one")
    screen.type("\x15fast\r")  # Ctrl-U rubs it out
    screen.until("you said: fast")
    screen.until(READY)
    screen.type("/tok\t")
    screen.until("/tok.*ens")
    screen.type("\r")
    screen.until("the conversation has .* tokens")
    screen.until(READY)
    screen.type("one\x1b\rtwo\\\rthree\r")
    screen.until("you said: one\ntwo\nthree")
    screen.until(READY)
    screen.type("\x03")
    screen.until("Ctrl-C again leaves")
    screen.until(READY)
    screen.type("\x04")
    screen.until("GONE 12")
    assert screen.child.wait(60) == 0


def wrapped(text: str, width: int, size: int) -> str:
    wrapper = Wrapper(lambda: width)
    pieces = [wrapper.push(text[i : i + size]) for i in range(0, len(text), size)]
    return "".join(pieces) + wrapper.flush()


@pytest.mark.parametrize("size", [1, 3, 1000])
def test_lines_are_broken_between_words(size: int) -> None:
    """However the text is cut into pieces."""
    text = "the quick brown fox jumps over the lazy dog and sleeps\n\n* one\n"
    shown = wrapped(text, 16, size)
    assert shown == "the quick brown \nfox jumps over \nthe lazy dog and \nsleeps\n\n* one\n"
    assert all(len(line.rstrip()) <= 16 for line in shown.split("\n"))
    code = "```\nx = 1 + 2 + 3 + 4 + 5 + 6 + 7\n```\n    indented = code + that + is + long\n"
    assert wrapped(code, 16, size) == code
    assert wrapped("你好你好你好你好你好", 8, size) == "你好你好\n你好你好\n你好"
    assert wrapped("a " + "x" * 90, 20, size).replace("\n", "") == "a " + "x" * 90


def test_a_word_is_shown_when_it_is_whole() -> None:
    wrapper = Wrapper(lambda: 10)
    assert [wrapper.push(piece) for piece in ("to", "mor", "row ", "你", "x")] == [
        "",
        "",
        "tomorrow ",
        "\n你",
        "",
    ]
    assert wrapper.flush() == "x"
