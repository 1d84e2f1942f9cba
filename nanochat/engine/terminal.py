"""A conversation in a terminal: lines in, answers as they come, Ctrl-C for the answer and not the program."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

from nanochat import errors
from nanochat.engine.session import Session
from nanochat.engine.text import for_terminal

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
        with closing(pieces):  # type: ignore[type-var]
            for text, is_tool in for_terminal(pieces):
                say(text, is_tool)
        say("\n", False)
    except KeyboardInterrupt:
        say(" (stopped)\n", True)
        if errors_end:
            raise


def speaker() -> Say:
    """Writes to the terminal, asides dim; plainly where the output is none."""
    from rich.console import Console
    from rich.text import Text

    console = Console(highlight=False, soft_wrap=True)

    def say(text: str, is_aside: bool) -> None:
        console.print(Text(text, "dim" if is_aside else ""), end="")
        console.file.flush()

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
