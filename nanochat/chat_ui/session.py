"""A conversation of one person with a model: what has been said, and the next answer as it comes.

It knows no terminal and no server. A prompt is the whole conversation; what no longer fits into the context
is left out of it from the oldest turn on, never from what can be saved.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from nanochat import chat_format as chat
from nanochat import load as models
from nanochat import runtime
from nanochat.engine.continuous_batch import ContinuousBatch, PlainBatch
from nanochat.engine.detokenizer import PartDecoder, parts_of
from nanochat.engine.engine import Engine, columns, is_ragged
from nanochat.engine.inference import cpu_dtype
from nanochat.engine.sampling import Sampling
from nanochat.engine.sequence import Sequence
from nanochat.errors import UserError
from nanochat.home import Home, read_json, write_json


@dataclass(frozen=True)
class Opened:
    """A trained model that is ready to answer, and the stage and step it comes from."""

    engine: Engine
    stage: str
    step: int

    @property
    def warning(self) -> str | None:
        """What a person should know before the first answer."""
        if self.stage == "base":
            return "this is a base model: it continues text, nobody has taught it to answer yet"
        return None


def open_engine(
    home: Home,
    tag: str,
    stage: str | None,
    step: int | None,
    device: str | None = None,
    dtype: str | None = None,
    speculate: int = 0,
) -> Opened:
    """The engine of a stage (None: the most trained one that has a checkpoint). Raises UserError without one.

    dtype None is bfloat16 on a GPU; on a CPU see cpu_dtype. int8 is for the matrices alone.
    speculate: draft tokens per step at most (engine.speculate).
    """
    if speculate < 0:
        raise UserError(f"--speculate must be at least 0, found {speculate}", "0 guesses nothing")
    is_int8 = dtype == "int8"
    dtype = None if is_int8 else dtype
    stage = stage or models.newest_stage(home, tag)
    has_gpu = device == "cuda" or (device is None and torch.cuda.is_available())
    rt = runtime.start(device, dtype or (None if has_gpu else "float32"))
    model, tok, found = models.load_model(home, tag, stage, rt=rt, step=step)
    if dtype is None and model.get_device().type == "cpu":
        model.compute_dtype = cpu_dtype(model)
    return Opened(Engine(model, tok, torch.int8 if is_int8 else None, speculate=speculate), stage, found.step)


HELP = """\
/system TEXT      what the model shall keep in mind (nothing: forget it)
/temperature X    0 is always the likeliest token
/topk N           draw from the N likeliest tokens (0: all)
/retry            answer the last message again (also /regen)
/tokens           how long the conversation is, how fast the last answer came
/clear            begin a new conversation
/save FILE        write the conversation as JSON; /load FILE goes on with it
/help             this list
/quit             leave, as Ctrl-D does
Ctrl-C stops an answer; Alt-Enter, or a backslash at the end, begins a new line;
the arrow keys bring back what was said before."""
COMMANDS = re.findall(r"/[a-z]+", HELP)


class Session:
    """Messages, the sampling settings, and `ask`. Reply n draws with seed + n, so that each differs.

    max_tokens 0 is the rest of the context. `more`: other fields of Sampling. What the conversation shares
    with the last prompt is not computed again. Raises ValueError for settings outside their ranges.
    """

    def __init__(
        self,
        engine: Engine,
        *,
        temperature: float,
        top_k: int,
        max_tokens: int,
        seed: int,
        system: str | None = None,
        **more: Any,
    ) -> None:
        self.engine, self.tok = engine, engine.tokenizer
        self.temperature, self.top_k, self.seed, self.more = temperature, top_k, seed, more
        self.max_tokens = max_tokens or engine.context
        self.system = system
        self.messages: list[dict[str, Any]] = []
        self.num_left_out = 0  # oldest messages that the last prompt had no room for
        self.last: Sequence | None = None
        self.last_seconds = 0.0
        self._num_replies = 0
        self._batch: ContinuousBatch | None = None
        self._sampling()

    @property
    def conversation(self) -> chat.Conversation:
        return {"messages": self._with_system(self.messages)}

    def ask(self, text: str) -> Iterator[tuple[str, str]]:
        """Say `text` and yield the answer as (part type, text) pieces.

        What has come so far becomes the answer if the iterator is closed or interrupted. Raises UserError for
        a message that does not fit into the context by itself.
        """
        self.messages.append({"role": "user", "content": text})
        try:
            prompt = self._prompt()
        except UserError:
            self.messages.pop()
            raise
        return self._answer(prompt)

    def ask_again(self) -> Iterator[tuple[str, str]]:
        """Another answer to the last message. Raises UserError when nothing has been said."""
        if not self.messages:
            raise UserError("there is no answer to repeat", "say something first")
        last = len(self.messages) - (2 if self.messages[-1]["role"] == "assistant" else 1)
        text = self.messages[last]["content"]
        del self.messages[last:]
        return self.ask(chat.text_of(text))

    def _answer(self, prompt: list[int]) -> Iterator[tuple[str, str]]:
        room = min(self.max_tokens, self.engine.context - len(prompt))
        row = self.engine.start(prompt, self._sampling(), room)
        self._num_replies += 1
        begin = time.perf_counter()
        decoder = PartDecoder(self.tok)
        try:
            for column, _ in columns(self._open(len(prompt) + room), [row]):
                yield from decoder.push(column[0])
            yield from decoder.flush()
        except KeyboardInterrupt:
            self._batch = None  # a step may have been cut in two
            raise
        finally:
            row.finish_reason = row.finish_reason or "abort"
            self.last, self.last_seconds = row, time.perf_counter() - begin
            self.messages.append({"role": "assistant", "content": parts_of(row.output, self.tok)})

    def _sampling(self) -> Sampling:
        special = self.tok.encode_special
        return Sampling(
            self.temperature,
            self.top_k,
            seed=self.seed + self._num_replies,
            banned=(special(chat.OUTPUT_START), special(chat.OUTPUT_END)),  # only the tool says these
            **self.more,
        )

    def _open(self, length: int) -> ContinuousBatch | PlainBatch:
        """The batch whose cache still holds the conversation; a new one for a model that cannot share."""
        if not is_ragged(self.engine.model):
            return self.engine.open_batch(1, length)
        if self._batch is None or self._batch.runner.model is not self.engine.network():
            opened = self.engine.open_batch(1, self.engine.context)
            assert isinstance(opened, ContinuousBatch)
            self._batch = opened
        return self._batch

    def _prompt(self) -> list[int]:
        """The ids to continue, with room for the answer: its limit, or a quarter of the context if that is
        less.
        """
        room = min(self.max_tokens, self.engine.context // 4)
        for first in range(0, len(self.messages), 2):
            kept = {"messages": self._with_system(self.messages[first:])}
            ids = chat.render_for_completion(kept, self.tok)
            if len(ids) + room <= self.engine.context:
                self.num_left_out = first
                return ids
        raise UserError(
            f"the message is too long: {len(ids)} tokens, and the model reads {self.engine.context - room}",
            "cut it into pieces",
        )

    def _counts(self) -> str:
        whole = len(self.tok.render_conversation(self.conversation)[0]) if self.messages else 0
        said = f"the conversation has {whole:,} of {self.engine.context:,} tokens"
        if self.last is None or not self.last.output:
            return said
        count, seconds = len(self.last.output), max(self.last_seconds, 1e-9)
        return (
            f"{said}; the last answer: {count} in {seconds:.2f} s, {count / seconds:.1f} a second, "
            f"{self.last.num_cached} of {len(self.last.prompt)} before it known already"
        )

    def _with_system(self, messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return [*([{"role": "system", "content": self.system}] if self.system else []), *messages]

    def save(self, path: Path) -> None:
        """Write the conversation as JSON."""
        write_json(path, self.conversation)

    def load(self, path: Path) -> None:
        """Go on with a conversation that `save` wrote. Raises UserError for anything else."""
        conversation = read_json(path)
        try:
            chat.turns(conversation)
        except ValueError as error:
            raise UserError(
                f"{path} holds no conversation: {error}", "give a file that /save has written"
            ) from error
        messages = list(conversation["messages"])
        self.system = chat.text_of(messages.pop(0)["content"]) if messages[0]["role"] == "system" else None
        self.messages = messages[: len(messages) // 2 * 2]  # an unanswered last message is dropped

    def obey(self, line: str) -> str:
        """Carry out a /command that needs no answer; returns what to tell. Raises UserError if it makes no
        sense.
        """
        command, _, rest = line.partition(" ")
        rest = rest.strip()
        if command == "/help":
            return HELP
        if command == "/clear":
            self.messages.clear()
            self.last = None
            return "a new conversation"
        if command == "/tokens":
            return self._counts()
        if command == "/system":
            self.system = rest or None
            return f"keeping in mind: {rest}" if rest else "nothing to keep in mind"
        if command == "/temperature":
            self.temperature = _number(rest, float)
            return f"temperature {self.temperature:g}"
        if command == "/topk":
            self.top_k = int(_number(rest, int))
            return f"top-k {self.top_k}"
        if command in ("/save", "/load"):
            if not rest:
                raise UserError(f"{command} needs the name of a file", f"write {command} FILE")
            (self.save if command == "/save" else self.load)(Path(rest).expanduser())
            return f"{len(self.messages)} messages {'written' if command == '/save' else 'read'}"
        raise UserError(f"there is no command {command}", "see /help")


def _number(text: str, kind: type[int] | type[float]) -> float:
    try:
        value = kind(text)
    except ValueError:
        value = -1
    if not 0 <= value < float("inf"):
        raise UserError(f"expected a number of at least 0, found {text!r}", "see /help")
    return value
