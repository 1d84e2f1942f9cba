"""The shapes of answers: whole ones, the events of streamed ones, log-probabilities, usage."""

from __future__ import annotations

import json
import secrets
import time
from typing import Any

from nanochat import chat_format as chat
from nanochat.engine.sequence import TokenLogprob
from nanochat.protocols import Tokenizer

LEAST_LOGPROB = -9999.0  # JSON has no minus infinity
PING = ": ping\n\n"
DONE = "data: [DONE]\n\n"

Part = dict[str, str]
Entries = list[tuple[int, TokenLogprob | None]]  # tokens and their log-probabilities


_encode = json.JSONEncoder(ensure_ascii=False).encode  # json.dumps would make an encoder for every event


def event(value: dict[str, Any]) -> str:
    """One server-sent event."""
    return f"data: {_encode(value)}\n\n"


class Head:
    """The fields that all events of an answer share, encoded once."""

    def __init__(self, fields: dict[str, Any]) -> None:
        self._text = _encode(fields)[:-1]

    def event(self, fields: dict[str, Any]) -> str:
        """One event with these fields (at least one) behind the shared ones."""
        return f"data: {self._text}, {_encode(fields)[1:]}\n\n"


def usage(num_prompt: int, num_completion: int, num_cached: int) -> dict[str, Any]:
    """Token counts; forced tokens count as completion."""
    return {
        "prompt_tokens": num_prompt,
        "completion_tokens": num_completion,
        "total_tokens": num_prompt + num_completion,
        "prompt_tokens_details": {"cached_tokens": num_cached},
    }


class TokenNames:
    """Tokens as JSON can hold them: text, and bytes:\\xf0 where the bytes are no UTF-8."""

    def __init__(self, tok: Tokenizer) -> None:
        self._tok = tok

    def bytes(self, token: int) -> bytes:
        data: bytes = self._tok.decode_bytes([token])
        return data

    def name(self, token: int) -> str:
        data = self.bytes(token)
        try:
            return data.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)


def finite(logprob: float) -> float:
    return logprob if logprob > LEAST_LOGPROB else LEAST_LOGPROB


class ChatReply:
    """The bodies of one chat answer: they share id, time and model."""

    chunk_object = "chat.completion.chunk"

    def __init__(self, model: str, names: TokenNames) -> None:
        self._head = {"id": f"chatcmpl-{secrets.token_hex(12)}", "created": int(time.time()), "model": model}
        self._chunks = Head({**self._head, "object": self.chunk_object})
        self._names = names

    @property
    def id(self) -> str:
        return str(self._head["id"])

    def whole(
        self, choices: list[dict[str, Any]], usage: dict[str, Any], timings: dict[str, float]
    ) -> dict[str, Any]:
        return {
            **self._head,
            "object": "chat.completion",
            "choices": choices,
            "usage": usage,
            "timings": timings,
        }

    def choice(
        self, index: int, parts: list[Part], finish_reason: str, logprobs: Entries | None
    ) -> dict[str, Any]:
        message = {"role": "assistant", "content": chat.text_of(parts), "parts": parts}
        return {
            "index": index,
            "message": message,
            "logprobs": self.logprobs(logprobs),
            "finish_reason": finish_reason,
        }

    def logprobs(self, entries: Entries | None) -> dict[str, Any] | None:
        if entries is None:
            return None
        content = []
        for token, scored in entries:
            assert scored is not None  # only a prompt's first token has none
            logprob, likeliest = scored
            top = [self._entry(other, value) for other, value in likeliest]
            content.append({**self._entry(token, logprob), "top_logprobs": top})
        return {"content": content, "refusal": None}

    def _entry(self, token: int, logprob: float) -> dict[str, Any]:
        return {
            "token": self._names.name(token),
            "logprob": finite(logprob),
            "bytes": list(self._names.bytes(token)),
        }

    def first(self, index: int) -> str | None:
        return self._chunk(index, {"role": "assistant", "content": ""})

    def piece(self, index: int, parts: list[Part], logprobs: Entries | None) -> str:
        """An event with some of an answer; a tool's code and output are in `parts` alone."""
        delta: dict[str, Any] = {"parts": parts}
        if text := chat.text_of(parts):
            delta = {"content": text, **delta}
        return self._chunk(index, delta, self.logprobs(logprobs))

    def last(self, index: int, finish_reason: str) -> str:
        return self._chunk(index, {}, None, finish_reason)

    def _chunk(
        self, index: int, delta: dict[str, Any], logprobs: Any = None, finish_reason: str | None = None
    ) -> str:
        return self.event(
            [{"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish_reason}]
        )

    def event(self, choices: list[dict[str, Any]], **more: Any) -> str:
        return self._chunks.event({"choices": choices, **more})


class TextReply:
    """The bodies of one answer of /v1/completions."""

    def __init__(self, model: str, names: TokenNames) -> None:
        self._head = {
            "id": f"cmpl-{secrets.token_hex(12)}",
            "object": "text_completion",
            "created": int(time.time()),
            "model": model,
        }
        self._chunks = Head(self._head)
        self._names = names
        self._offsets: dict[int, int] = {}  # of each choice: characters that its chunks have shown

    @property
    def id(self) -> str:
        return str(self._head["id"])

    def whole(
        self, choices: list[dict[str, Any]], usage: dict[str, Any], timings: dict[str, float]
    ) -> dict[str, Any]:
        return {**self._head, "choices": choices, "usage": usage, "timings": timings}

    def choice(
        self, index: int, parts: list[Part], finish_reason: str, logprobs: Entries | None
    ) -> dict[str, Any]:
        text = "".join(part["text"] for part in parts)
        return {
            "index": index,
            "text": text,
            "logprobs": self.logprobs(logprobs),
            "finish_reason": finish_reason,
        }

    def logprobs(self, entries: Entries | None, offset: int = 0) -> dict[str, Any] | None:
        """tokens, token_logprobs, top_logprobs, text_offset; the entry of a text's first token is null."""
        if entries is None:
            return None
        found: dict[str, list[Any]] = {
            "tokens": [],
            "token_logprobs": [],
            "top_logprobs": [],
            "text_offset": [],
        }
        before = b""
        for token, logprob in entries:
            found["tokens"].append(self._names.name(token))
            found["text_offset"].append(offset + len(before.decode(errors="ignore")))
            before += self._names.bytes(token)
            if logprob is None:
                found["token_logprobs"].append(None)
                found["top_logprobs"].append(None)
                continue
            own, likeliest = logprob
            top = {self._names.name(other): finite(value) for other, value in likeliest}
            found["token_logprobs"].append(finite(own))
            found["top_logprobs"].append(top or {self._names.name(token): finite(own)})
        return found

    def first(self, index: int) -> str | None:
        return None

    def piece(self, index: int, parts: list[Part], logprobs: Entries | None) -> str:
        text = "".join(part["text"] for part in parts)
        offset = self._offsets.get(index, 0)
        self._offsets[index] = offset + len(text)
        return self._chunk(index, text, self.logprobs(logprobs, offset))

    def last(self, index: int, finish_reason: str) -> str:
        return self._chunk(index, "", None, finish_reason)

    def _chunk(self, index: int, text: str, logprobs: Any, finish_reason: str | None = None) -> str:
        return self.event(
            [{"index": index, "text": text, "logprobs": logprobs, "finish_reason": finish_reason}]
        )

    def event(self, choices: list[dict[str, Any]], **more: Any) -> str:
        return self._chunks.event({"choices": choices, **more})


Reply = ChatReply | TextReply
