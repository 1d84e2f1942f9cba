"""Talk to a trained model in the terminal.

python -m scripts.chat_cli                      a conversation; /help lists its commands
python -m scripts.chat_cli -p "Who are you?"    one answer
echo "Who are you?" | python -m scripts.chat_cli
"""

from __future__ import annotations

import io
import secrets
import sys
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass

from nanochat import config, errors
from nanochat.config import setting
from nanochat.engine.session import Session, open_engine
from nanochat.engine.text import for_terminal
from nanochat.paths import Home


@dataclass(frozen=True)
class Settings:
    home: str | None = setting(None, "directory of all runs (default: NANOCHAT_HOME, else the user's cache)")
    tag: str = setting("main", "name of the run")
    stage: str | None = setting(None, "rl, sft, mid or base (default: the most trained one)")
    step: int | None = setting(None, "optimizer step of the checkpoint (default: the newest)")
    prompt: str | None = setting(None, "say this, print the answer and leave (also -p)")
    temperature: float = setting(0.6, "0: always the likeliest token; 1: as the model has learnt")
    top_k: int = setting(50, "draw from this many likeliest tokens (0: all)")
    max_tokens: int = setting(256, "longest answer in tokens")
    seed: int | None = setting(None, "seed of the answers (default: another one each time)")
    device: str | None = setting(None, "cpu, cuda or mps (default: what there is)")
    dtype: str | None = setting(None, "float32 or bfloat16 (default: float32, on a GPU bfloat16)")


PRESETS = {name: Settings() for name in ("smoke", "cpu-demo", "single-gpu", "speedrun")}

Say = Callable[[str, bool], None]  # (text, is_aside): asides are not the model's words


def main(argv: list[str] | None = None) -> None:
    words = sys.argv[1:] if argv is None else argv
    words = ["--prompt" + word[2:] if word == "-p" or word.startswith("-p=") else word for word in words]
    settings = config.parse(Settings, PRESETS, words, __doc__)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(encoding="utf-8", errors="replace")
    say = speaker()
    opened = open_engine(
        Home.find(settings.home), settings.tag, settings.stage, settings.step, settings.device, settings.dtype
    )
    if opened.warning:
        print(f"note: {opened.warning}", file=sys.stderr)
    seed = secrets.randbelow(2**31) if settings.seed is None else settings.seed
    session = Session(
        opened.engine,
        temperature=settings.temperature,
        top_k=settings.top_k,
        max_tokens=settings.max_tokens,
        seed=seed,
    )
    prompt = settings.prompt
    if prompt is None and not sys.stdin.isatty():
        prompt = sys.stdin.read()
    if prompt is None:
        say(f"{settings.tag}/{opened.stage}, step {opened.step}, seed {seed}; /help for help\n", True)
        converse(session, reader(), say)
        return
    if not prompt.strip():
        raise errors.UserError("the prompt is empty", "write it after -p, or into standard input")
    answer(session, session.ask(prompt.strip()), say, errors_end=True)


def converse(session: Session, read: Callable[[], str], say: Say) -> None:
    """Read and answer until /quit, the end of the input, or Ctrl-C twice at the prompt."""
    is_leaving = False
    while True:
        try:
            line = read().strip()
            is_leaving = False
            if line in ("/quit", "/exit"):
                return
            if line == "/regen":
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


def reader() -> Callable[[], str]:
    """Reads lines with editing and a history that is forgotten at the end; Alt-Enter begins a new line."""
    from prompt_toolkit import PromptSession
    from prompt_toolkit.key_binding import KeyBindings
    from prompt_toolkit.key_binding.key_processor import KeyPressEvent

    keys = KeyBindings()

    @keys.add("escape", "enter")
    def _(event: KeyPressEvent) -> None:
        event.current_buffer.insert_text("\n")

    prompt: PromptSession[str] = PromptSession(key_bindings=keys, prompt_continuation="... ")
    return lambda: prompt.prompt("> ")


if __name__ == "__main__":
    raise SystemExit(errors.run(main))
