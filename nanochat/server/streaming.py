"""One path from tokens to text, streamed or not: parts, whole characters, stop strings, log-probabilities."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

from nanochat import chat_format as chat
from nanochat.engine.detokenizer import PartDecoder, StopFilter
from nanochat.engine.engine import Sequence
from nanochat.protocols import Tokenizer
from nanochat.server import replies
from nanochat.server.engine_thread import EngineRequest, NewTokens
from nanochat.server.replies import Entries, Part, Reply
from nanochat.server.schemas import ApiError

PING_SECONDS = 15.0


class Choice:
    """One sequence as text. is_chat: only words of the answer itself are searched for stop strings and
    listed with log-probabilities, not those of the tool. echo: the prompt's text, which comes first, and how
    many of its tokens are hidden.
    """

    def __init__(
        self,
        sequence: Sequence,
        tok: Tokenizer,
        stops: list[str],
        is_chat: bool,
        echo: tuple[str, int] | None = None,
    ) -> None:
        self.sequence, self._is_chat = sequence, is_chat
        begins = {chat.PYTHON_START: "python", chat.PYTHON_END: "text", chat.OUTPUT_START: "python_output"}
        begins[chat.OUTPUT_END] = "text"
        self._part_after = {tok.encode_special(name): part for name, part in begins.items()}
        self._specials = {tok.encode_special(name) for name in tok.get_special_tokens()}
        self._decoder, self._filter = PartDecoder(tok), StopFilter(stops)
        self._echo, self.num_taken, self._part = echo, 0, "text"
        self.is_over = False

    @property
    def has_hit(self) -> bool:
        return self._filter.is_hit

    def push(self, tokens: list[int]) -> tuple[list[Part], Entries]:
        """What these tokens add: parts (an empty one of python begins a call) and entries."""
        parts, entries = self._echoed()
        for token in tokens:
            position, self.num_taken = self.num_taken, self.num_taken + 1
            self._part = self._part_after.get(token, self._part)
            if self._is_chat and self._part_after.get(token) == "python":
                parts.append({"type": "python", "text": ""})
            for part, text in self._decoder.push(token):
                self._add(parts, part, text)
            if self._filter.is_hit:
                break
            is_text = token not in self._specials and (not self._is_chat or self._part == "text")
            if self.sequence.logprobs is not None and is_text:
                entries.append((token, self.sequence.logprobs[position]))
        return parts, entries

    def flush(self) -> tuple[list[Part], Entries]:
        """What was held back, when the sequence has ended."""
        parts, entries = self._echoed()
        if not self._filter.is_hit:
            for part, text in self._decoder.flush():
                self._add(parts, part, text)
            if held := self._filter.flush():
                parts.append({"type": "text", "text": held})
        return parts, entries

    @property
    def finish_reason(self) -> str:
        return "length" if self.sequence.finish_reason == "length" and not self._filter.is_hit else "stop"

    def _add(self, parts: list[Part], part: str, text: str) -> None:
        if part == "text" or not self._is_chat:
            text = self._filter.push(text)
        elif held := self._filter.flush():  # a stop string does not reach across a call of the tool
            parts.append({"type": "text", "text": held})
        if text:
            parts.append({"type": part, "text": text})

    def _echoed(self) -> tuple[list[Part], Entries]:
        if self._echo is None:
            return [], []
        (text, num_hidden), self._echo = self._echo, None
        entries: Entries = []
        if self.sequence.prompt_logprobs is not None:
            shown = zip(self.sequence.prompt[num_hidden:], self.sequence.prompt_logprobs[num_hidden:])
            entries = [(token, None if i == 0 else logprob) for i, (token, logprob) in enumerate(shown)]
        return ([{"type": "text", "text": text}] if text else []), entries


class Answer:
    """All choices of one request. on_end is called once, when it is over for whatever reason."""

    def __init__(
        self,
        request: EngineRequest,
        choices: list[Choice],
        reply: Reply,
        *,
        num_prompt: int,
        has_logprobs: bool,
        max_seconds: float,
        on_end: Callable[[Answer], None],
    ) -> None:
        self.request = request
        self.choices = choices
        self.reply = reply
        self.num_prompt = num_prompt
        self._has_logprobs = has_logprobs
        self._on_end = on_end
        self._deadline = request.queued_at + max_seconds
        self.first_seconds: float | None = None
        self.seconds: float | None = None  # in all, once it is over
        self.error: ApiError | None = None

    async def whole(self) -> dict[str, Any]:
        """The body of the answer. Raises ApiError when the engine failed or the time is up."""
        parts: list[list[Part]] = [[] for _ in self.choices]
        entries: list[Entries] = [[] for _ in self.choices]
        async for index, new, more in self._pieces():
            entries[index] += more
            for part in new:
                last = parts[index][-1] if parts[index] else None
                if last is None or last["type"] != part["type"] or part == {"type": "python", "text": ""}:
                    parts[index].append(dict(part))
                else:
                    last["text"] += part["text"]
        if self.error:
            raise self.error
        found = [
            self.reply.choice(i, parts[i], choice.finish_reason, entries[i] if self._has_logprobs else None)
            for i, choice in enumerate(self.choices)
        ]
        return self.reply.whole(found, self.usage(), self.timings())

    async def events(self, with_usage: bool) -> AsyncIterator[str]:
        """The events of the answer: a beginning per choice, pieces, ends, usage if asked for, [DONE]."""
        for index in range(len(self.choices)):
            if first := self.reply.first(index):
                yield first
        pieces = self._pieces(PING_SECONDS)
        try:
            async for index, parts, entries in pieces:
                if index < 0:
                    yield replies.PING
                elif parts or entries:
                    yield self.reply.piece(index, parts, entries if self._has_logprobs else None)
        finally:
            await pieces.aclose()  # type: ignore[attr-defined]
        if self.error:
            yield replies.event(self.error.body)
        else:
            for index, choice in enumerate(self.choices):
                is_last = index == len(self.choices) - 1
                last = self.reply.last(index, choice.finish_reason)
                yield last[:-3] + f', "timings": {_json(self.timings())}}}\n\n' if is_last else last
            if with_usage:
                yield self.reply.event([], usage=self.usage())
        yield replies.DONE

    async def _pieces(
        self, ping_seconds: float = float("inf")
    ) -> AsyncIterator[tuple[int, list[Part], Entries]]:
        """(index of the choice, parts, entries) as they come; index -1 when nothing came for a while."""
        num_left = len(self.choices)
        try:
            while num_left:
                try:
                    new = await self._next(ping_seconds)
                except asyncio.TimeoutError:
                    if time.monotonic() >= self._deadline:
                        self.error = ApiError(500, "the answer took too long")
                        return
                    yield -1, [], []
                    continue
                choice = self.choices[new.index]
                if choice.is_over:
                    continue
                if new.tokens and self.first_seconds is None:
                    self.first_seconds = time.monotonic() - self.request.queued_at
                if new.is_end and self.request.error:
                    self.error = ApiError(*self.request.error)
                    return
                parts, entries = choice.flush() if new.is_end else choice.push(new.tokens)
                if new.is_end or choice.has_hit:
                    choice.is_over = True
                    num_left -= 1
                    sequence = choice.sequence
                    sequence.finish_reason = sequence.finish_reason or "abort"
                yield new.index, parts, entries
        finally:
            self.end()

    def end(self) -> None:
        """Give the rows back and tell on_end, once. For callers who have gone before the first piece, too."""
        if self.seconds is None:
            self.seconds = time.monotonic() - self.request.queued_at
            self.request.cancel()
            self._on_end(self)

    async def _next(self, ping_seconds: float) -> NewTokens:
        left = self._deadline - time.monotonic()
        return await self.request.get(max(0.0, min(left, ping_seconds)))

    @property
    def num_output(self) -> int:
        """Tokens up to each end; what the engine computed beyond a stop string does not count."""
        return sum(choice.num_taken for choice in self.choices)

    @property
    def num_cached(self) -> int:
        return sum(getattr(choice.sequence, "num_cached", 0) for choice in self.choices)

    def usage(self) -> dict[str, Any]:
        return replies.usage(self.num_prompt, self.num_output, min(self.num_cached, self.num_prompt))

    def timings(self) -> dict[str, float]:
        first, seconds = self.first_seconds or 0.0, time.monotonic() - self.request.queued_at
        rate = (self.num_output - 1) / (seconds - first) if seconds > first and self.num_output > 1 else 0.0
        return {
            "first_token_seconds": round(first, 4),
            "seconds": round(seconds, 4),
            "tokens_per_second": round(rate, 2),
        }


def _json(value: dict[str, float]) -> str:
    return "{" + ", ".join(f'"{key}": {number}' for key, number in value.items()) + "}"
