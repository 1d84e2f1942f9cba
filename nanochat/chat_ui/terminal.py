"""A conversation in a terminal: lines in, answers as they come, Ctrl-C for the answer and not the program."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

from nanochat import errors
from nanochat.chat_ui.session import Session
from nanochat.engine.detokenizer import for_terminal

LONGEST_WORD = 40  # characters; a longer one is cut rather than kept back
Say = Callable[[str, bool], None]  # (text, is_aside): asides are not the model's words


def converse(session: Session, read: Callable[[], str], say: Say) -> None:
    """Read and answer until /quit, the end of the input, or Ctrl-C twice at the prompt."""
    is_leaving = False
    while True:
        try:
            line = read().strip()
            is_leaving = False
            if line in ("/quit", "/exit"):
                return
            if line in ("/retry", "/regen"):
                answer(session, session.ask_again(), say)
            elif line.startswith("/"):
                say(session.obey(line) + "\n", True)
            elif line:
                answer(session, session.ask(line), say)
        except EOFError:
            return
        except KeyboardInterrupt:
            if is_leaving:
                return
            is_leaving = True
            say("Ctrl-C again leaves\n", True)
        except errors.UserError as error:
            say(f"{error}\n", True)


def answer(session: Session, pieces: Iterator[tuple[str, str]], say: Say, errors_end: bool = False) -> None:
    """Say an answer as it comes. Ctrl-C ends it, keeps what has come, and goes on unless errors_end."""
    if session.num_left_out:
        say(f"(the oldest {session.num_left_out} messages do not fit any more and are left out)\n", True)
    try:
        with keys_unseen(), closing(pieces):  # type: ignore[type-var]
            for text, is_tool in for_terminal(pieces):
                say(text, is_tool)
        if not errors_end and session.last is not None and session.last.finish_reason == "length":
            say(f" ({why_cut(session)})", True)
        say("\n", False)
    except KeyboardInterrupt:
        say(" (stopped)\n", True)
        if errors_end:
            raise


def why_cut(session: Session) -> str:
    """Why the last answer has no end."""
    assert session.last is not None
    count = len(session.last.output)
    if len(session.last.prompt) + count < session.engine.context:
        return f"cut after {count} tokens, see --max-tokens"
    return "cut: the model's context is full; the oldest turns will make room, /clear begins anew"


@contextlib.contextmanager
def keys_unseen() -> Iterator[None]:
    """What is typed meanwhile is not shown in the middle of an answer; it is there for the next prompt."""
    try:
        import termios
    except ImportError:  # not on Windows
        yield
        return
    try:
        place = sys.stdin.fileno()
        before = termios.tcgetattr(place)
    except (OSError, ValueError, termios.error):  # no terminal
        yield
        return
    silent = [*before[:3], before[3] & ~termios.ECHO, *before[4:]]
    try:
        termios.tcsetattr(place, termios.TCSANOW, silent)
        yield
    finally:
        termios.tcsetattr(place, termios.TCSANOW, before)


class Wrapper:
    """Breaks lines between words, for text that comes in pieces: a word waits until it is whole.

    Wide characters (of Chinese, say) are words of their own. Code, between fences or indented, stays as it
    is. width() is the number of columns now.
    """

    def __init__(self, width: Callable[[], int]) -> None:
        self._width, self._word, self._line, self._column = width, "", "", 0
        self._is_code = False

    def push(self, text: str) -> str:
        """What can be shown now."""
        return "".join(map(self._take, text))

    def flush(self) -> str:
        """The word that may not be whole, with the break before it where it needs one."""
        word, self._word = self._word, ""
        is_code = self._is_code or self._line.startswith("    ")
        is_broken = not is_code and self._column > 0 and self._column + cells(word) > self._width()
        self._line += word
        self._column = cells(word) + (0 if is_broken else self._column)
        return ("\n" if is_broken else "") + word

    def _take(self, char: str) -> str:
        if char == "\n":
            shown = self.flush()
            self._is_code ^= self._line.lstrip().startswith("```")
            self._line, self._column = "", 0
            return shown + "\n"
        is_wide = cells(char) > 1
        shown = self.flush() if char == " " or is_wide or len(self._word) >= LONGEST_WORD else ""
        if char == " ":
            self._line, self._column = self._line + " ", self._column + 1
            return shown + " "
        self._word += char
        return shown + (self.flush() if is_wide else "")


def cells(text: str) -> int:
    """Columns that a text takes."""
    from rich.cells import cell_len

    return cell_len(text)


def speaker() -> Say:
    """Writes to the terminal, asides dim, lines broken between words; plainly where the output is none."""
    from rich.console import Console
    from rich.text import Text

    console = Console(highlight=False, soft_wrap=True)
    wrapper = Wrapper(lambda: console.width) if console.is_terminal else None
    was_aside = False

    def show(text: str, is_aside: bool) -> None:
        if text:
            console.print(Text(text, "dim" if is_aside else ""), end="")
            console.file.flush()

    def say(text: str, is_aside: bool) -> None:
        nonlocal was_aside
        if wrapper is None:
            show(text, is_aside)
            return
        if is_aside != was_aside:  # the style of a word must not come from what follows it
            show(wrapper.flush(), was_aside)
            was_aside = is_aside
        show(wrapper.push(text), is_aside)

    return say


def reader(history: Path | None, commands: list[str], **terminal: Any) -> Callable[[], str]:
    """Reads messages with editing. Arrow keys go through what was said before, kept in the file `history`
    (None: forgotten at the end); Alt-Enter, or a backslash at its end, begins a new line; Tab completes
    commands. `terminal`: prompt_toolkit's input and output, for tests.
    """
    from prompt_toolkit import PromptSession
    from prompt_toolkit.completion import WordCompleter
    from prompt_toolkit.history import FileHistory, History, InMemoryHistory
    from prompt_toolkit.key_binding import KeyBindings
    from prompt_toolkit.key_binding.key_processor import KeyPressEvent

    keys = KeyBindings()

    @keys.add("escape", "enter")
    def _(event: KeyPressEvent) -> None:
        event.current_buffer.insert_text("\n")

    @keys.add("enter")
    def _(event: KeyPressEvent) -> None:
        buffer = event.current_buffer
        if buffer.document.text_before_cursor.endswith("\\"):
            buffer.delete_before_cursor()
            buffer.insert_text("\n")
        else:
            buffer.validate_and_handle()

    past: History = InMemoryHistory() if history is None else FileHistory(str(history))
    prompt: PromptSession[str] = PromptSession(
        history=past,
        key_bindings=keys,
        multiline=True,
        prompt_continuation="... ",
        completer=WordCompleter(commands, sentence=True),
        complete_while_typing=False,
        **terminal,
    )
    return lambda: prompt.prompt("> ")


def history_file(home: Path) -> Path | None:
    """Where the history of a home is kept, readable by its owner alone; None if it cannot be written."""
    file = home / "chat_history"
    try:
        home.mkdir(parents=True, exist_ok=True)
        file.touch(mode=0o600)
        file.chmod(0o600)
    except OSError:
        return None
    return file
