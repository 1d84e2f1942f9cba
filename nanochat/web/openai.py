"""The shapes of OpenAI's chat API: what a request may say, what an answer and its events look like.

Unknown fields are ignored, null means absent, booleans are not numbers. Errors never repeat the input.
"""

from __future__ import annotations

import json
import secrets
import time
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from nanochat import chat

MAX_MESSAGES = 500


class ApiError(Exception):
    """An answer of another status than 200, in OpenAI's shape."""

    def __init__(self, status: int, message: str, code: str | None = None, param: str | None = None) -> None:
        super().__init__(message)
        self.status, self.code = status, code
        kind = {404: "not_found_error", 429: "rate_limit_error"}.get(status, "invalid_request_error")
        kind = "server_error" if status >= 500 else kind
        self.body = {"error": {"message": message, "type": kind, "param": param, "code": code}}


class _Shape(BaseModel):
    model_config = ConfigDict(strict=True, extra="ignore", allow_inf_nan=False)


class Part(_Shape):
    type: Literal["text", "python", "python_output"]
    text: str


class Message(_Shape):
    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[Part] | None = None
    parts: list[Part] | None = None  # our extension: an assistant's tool calls, as we sent them


class StreamOptions(_Shape):
    include_usage: bool | None = None


class ChatRequest(_Shape):
    """A body of POST /v1/chat/completions."""

    messages: Annotated[list[Message], Field(min_length=1, max_length=MAX_MESSAGES)]
    model: str | None = None
    max_tokens: Annotated[int | None, Field(ge=1, le=2**31)] = None
    max_completion_tokens: Annotated[int | None, Field(ge=1, le=2**31)] = None
    temperature: Annotated[float | None, Field(ge=0, le=2)] = None
    top_p: Annotated[float | None, Field(ge=0, le=1)] = None
    min_p: Annotated[float | None, Field(ge=0, le=1)] = None
    top_k: Annotated[int | None, Field(ge=-1, le=2**31)] = None
    seed: Annotated[int | None, Field(ge=-(2**63), lt=2**63)] = None
    stop: str | Annotated[list[str], Field(max_length=16)] | None = None
    n: Annotated[int | None, Field(ge=1, le=1)] = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None

    @property
    def stops(self) -> list[str]:
        return [self.stop] if isinstance(self.stop, str) else self.stop or []

    def conversation(self) -> chat.Conversation:
        """The messages as nanochat.chat has them: system text goes before the next user text."""
        messages: list[dict[str, Any]] = []
        system: list[str] = []
        for message in self.messages:
            content = (
                message.parts if message.role == "assistant" and message.parts else message.content or ""
            )
            parts = (
                [{"type": "text", "text": content}]
                if isinstance(content, str)
                else [p.model_dump() for p in content]
            )
            if message.role in ("system", "developer"):
                system.append(chat.text_of(parts))
                continue
            if message.role == "user":
                parts = [{"type": "text", "text": "\n\n".join([*system, chat.text_of(parts)])}]
                system = []
            messages.append({"role": message.role, "content": parts})
        return {"messages": messages}


def parse(body: bytes) -> ChatRequest:
    """The request in a body. Raises ApiError 400 that names the field."""
    try:
        value = json.loads(body, parse_constant=_no_constant)
        json.dumps(value, ensure_ascii=False).encode()  # half a surrogate pair is no text
    except (ValueError, RecursionError):
        raise ApiError(400, "the body must be a JSON object") from None
    try:
        request = ChatRequest.model_validate(value)
    except ValidationError as error:
        first = error.errors(include_input=False, include_url=False, include_context=False)[0]
        param = ".".join(str(step) for step in first["loc"][:3]) or None
        raise ApiError(400, f"{param or 'the body'}: {first['msg']}", param=param) from None
    if request.stream_options and not request.stream:
        raise ApiError(400, "stream_options needs stream: true", param="stream_options")
    return request


def _no_constant(name: str) -> None:
    raise ValueError(name)


class Reply:
    """The bodies of one answer: they share id, time and model."""

    def __init__(self, model: str) -> None:
        self._head = {"id": f"chatcmpl-{secrets.token_hex(12)}", "created": int(time.time()), "model": model}

    def whole(self, parts: list[dict[str, str]], finish_reason: str, usage: dict[str, Any]) -> dict[str, Any]:
        message = {"role": "assistant", "content": chat.text_of(parts), "parts": parts}
        choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": finish_reason}
        return {**self._head, "object": "chat.completion", "choices": [choice], "usage": usage}

    def chunk(self, delta: dict[str, Any], finish_reason: str | None = None) -> str:
        return self._event([{"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish_reason}])

    def piece(self, part: str, text: str) -> str:
        """An event with some text of the answer; a tool's code and output are in `parts` alone."""
        delta: dict[str, Any] = {"parts": [{"type": part, "text": text}]}
        return self.chunk({"content": text, **delta} if part == "text" else delta)

    def usage(self, usage: dict[str, Any]) -> str:
        return self._event([], usage=usage)

    def _event(self, choices: list[dict[str, Any]], **more: Any) -> str:
        return event({**self._head, "object": "chat.completion.chunk", "choices": choices, **more})


def event(value: dict[str, Any]) -> str:
    """One server-sent event."""
    return f"data: {json.dumps(value, ensure_ascii=False)}\n\n"


def usage(num_prompt: int, num_completion: int) -> dict[str, Any]:
    """Token counts; forced tokens count as completion."""
    return {
        "prompt_tokens": num_prompt,
        "completion_tokens": num_completion,
        "total_tokens": num_prompt + num_completion,
        "prompt_tokens_details": {"cached_tokens": 0},
    }
