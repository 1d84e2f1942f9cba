"""Talk to a trained model in the terminal.

python -m scripts.chat_cli                      a conversation; /help lists its commands
python -m scripts.chat_cli -p "Who are you?"    one answer
echo "Who are you?" | python -m scripts.chat_cli
"""

from __future__ import annotations

import io
import secrets
import sys
from dataclasses import dataclass

from nanochat import config, errors
from nanochat.chat_ui.session import COMMANDS, Session, open_engine
from nanochat.chat_ui.terminal import answer, converse, history_file, reader, speaker
from nanochat.config import DeviceSettings, setting
from nanochat.home import Home


@dataclass(frozen=True)
class Settings(DeviceSettings):
    stage: str | None = setting(None, "rl, sft, mid or base (default: the most trained one)")
    step: int | None = setting(None, "optimizer step of the checkpoint (default: the newest)")
    prompt: str | None = setting(None, "say this, print the answer and leave (also -p)")
    temperature: float = setting(0.6, "0: always the likeliest token; 1: as the model has learnt")
    top_k: int = setting(50, "draw from this many likeliest tokens (0: all)")
    top_p: float = setting(1.0, "draw from the likeliest tokens that together reach this probability")
    min_p: float = setting(0.0, "leave out tokens less likely than this times the likeliest")
    repetition_penalty: float = setting(1.0, "above 1: tokens that have occurred become less likely")
    presence_penalty: float = setting(0.0, "nats taken from each token that the answer holds already")
    frequency_penalty: float = setting(0.0, "nats taken for each time that it does")
    max_tokens: int = setting(256, "longest answer in tokens (0: to the end of the context)")
    system: str | None = setting(None, "what the model shall keep in mind")
    history: bool = setting(True, "keep what was typed for the arrow keys, in the home directory")
    seed: int | None = setting(None, "seed of the answers (default: another one each time)")
    dtype: str | None = setting(None, "float32, bfloat16 or int8 (default: see docs/engine.md)")
    speculate: int = setting(0, "tokens guessed at most a step; answers stay the same (0: none)")


PRESETS = {name: Settings() for name in ("smoke", "cpu-demo", "single-gpu", "speedrun")}


def main(argv: list[str] | None = None) -> None:
    words = sys.argv[1:] if argv is None else argv
    words = ["--prompt" + word[2:] if word == "-p" or word.startswith("-p=") else word for word in words]
    settings = config.parse(Settings, PRESETS, words, __doc__)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(encoding="utf-8", errors="replace")
    say = speaker()
    opened = open_engine(
        Home.find(settings.home), settings.tag, settings.stage, settings.step, settings.device,
        settings.dtype, settings.speculate,
    )  # fmt: skip
    if opened.warning:
        print(f"note: {opened.warning}", file=sys.stderr)
    seed = secrets.randbelow(2**31) if settings.seed is None else settings.seed
    try:
        session = Session(
            opened.engine,
            temperature=settings.temperature,
            top_k=settings.top_k,
            max_tokens=settings.max_tokens,
            seed=seed,
            system=settings.system,
            top_p=settings.top_p,
            min_p=settings.min_p,
            repetition_penalty=settings.repetition_penalty,
            presence_penalty=settings.presence_penalty,
            frequency_penalty=settings.frequency_penalty,
        )
    except ValueError as error:
        raise errors.UserError(str(error), "see --help") from None
    prompt = settings.prompt
    if prompt is None and not sys.stdin.isatty():
        prompt = sys.stdin.read()
    if prompt is None:
        say(f"{settings.tag}/{opened.stage}, step {opened.step}, seed {seed}; /help for help\n", True)
        past = history_file(Home.find(settings.home).root) if settings.history else None
        converse(session, reader(past, COMMANDS), say)
        return
    if not prompt.strip():
        raise errors.UserError("the prompt is empty", "write it after -p, or into standard input")
    answer(session, session.ask(prompt.strip()), say, errors_end=True)


if __name__ == "__main__":
    raise SystemExit(errors.run(main))
