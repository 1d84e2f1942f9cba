"""What a request may say, in the shapes of OpenAI's API, and how it is refused.

Unknown fields are ignored, null means absent, booleans are not numbers. Errors never repeat the input. The
shapes of answers are in replies.py.
"""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from nanochat import chat_format as chat

MAX_MESSAGES = 500
MAX_CHOICES = 256  # of one request: prompts times n
IGNORED = {"tools", "tool_choice", "user", "metadata", "store", "add_special_tokens", "best_of", "suffix"}

_KINDS = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    429: "rate_limit_error",
}


class ApiError(Exception):
    """An answer of another status than 200, in OpenAI's shape. `retry_after` is in seconds."""

    def __init__(
        self,
        status: int,
        message: str,
        code: str | None = None,
        param: str | None = None,
        retry_after: int | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.code = status, code
        kind = "server_error" if status >= 500 else _KINDS.get(status, "invalid_request_error")
        self.body = {"error": {"message": message, "type": kind, "param": param, "code": code}}
        self.headers: dict[str, str] = {}
        if status in (429, 503):
            self.headers["Retry-After"] = str(min(max(retry_after or 2, 1), 120))
        if status == 500:
            self.headers["x-should-retry"] = "false"
        if status == 401:
            self.headers["WWW-Authenticate"] = "Bearer"


class Shape(BaseModel):
    model_config = ConfigDict(strict=True, extra="allow", allow_inf_nan=False)


class Part(Shape):
    type: Literal["text", "python", "python_output"]
    text: str


class Message(Shape):
    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[Part] | None = None
    parts: list[Part] | None = None  # our extension: an assistant's tool calls, as we sent them


class StreamOptions(Shape):
    include_usage: bool | None = None


class ResponseFormat(Shape):
    type: Literal["text"]


Stop = str | Annotated[list[str], Field(max_length=16)]
Count = Annotated[int, Field(ge=1, le=2**31)]
Penalty = Annotated[float, Field(ge=-2, le=2)]


class Common(Shape):
    """Fields that both kinds of completion have."""

    model: str | None = None
    temperature: Annotated[float | None, Field(ge=0, le=2)] = None
    top_p: Annotated[float | None, Field(ge=0, le=1)] = None
    min_p: Annotated[float | None, Field(ge=0, le=1)] = None
    top_k: Annotated[int | None, Field(ge=-1, le=2**31)] = None
    repetition_penalty: Annotated[float | None, Field(gt=0, le=2)] = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    logit_bias: (
        Annotated[dict[str, Annotated[float, Field(ge=-100, le=100)]], Field(max_length=300)] | None
    ) = None
    seed: Annotated[int | None, Field(ge=-(2**63), lt=2**63)] = None
    stop: Stop | None = None
    stop_token_ids: Annotated[list[int], Field(max_length=64)] | None = None
    min_tokens: Annotated[int | None, Field(ge=0, le=2**31)] = None
    ignore_eos: bool | None = None
    n: Annotated[int | None, Field(ge=1, le=16)] = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: str | None = None

    @property
    def stops(self) -> list[str]:
        return [text for text in ([self.stop] if isinstance(self.stop, str) else self.stop or []) if text]

    @property
    def wants_usage(self) -> bool:
        return bool(self.stream_options and self.stream_options.include_usage)


class ChatRequest(Common):
    """A body of POST /v1/chat/completions."""

    messages: Annotated[list[Message], Field(min_length=1, max_length=MAX_MESSAGES)]
    max_tokens: Count | None = None
    max_completion_tokens: Count | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int | None, Field(ge=0, le=20)] = None
    continue_final_message: bool | None = None
    response_format: ResponseFormat | None = None

    @property
    def limit(self) -> int | None:
        return self.max_completion_tokens or self.max_tokens

    def conversation(self) -> chat.Conversation:
        """The messages as nanochat.chat_format has them: system text stands before the next user
        text, or after the
        last.
        """
        messages: list[dict[str, Any]] = []
        system: list[str] = []
        for message in self.messages:
            content = (
                message.parts if message.role == "assistant" and message.parts else message.content or ""
            )
            if isinstance(content, str):
                parts = [{"type": "text", "text": content}]
            else:
                parts = [{"type": part.type, "text": part.text} for part in content]
            if message.role in ("system", "developer"):
                system.append(chat.text_of(parts))
                continue
            if message.role == "user" and all(part["type"] == "text" for part in parts):
                parts = [{"type": "text", "text": "\n\n".join([*system, chat.text_of(parts)])}]
                system = []
            messages.append({"role": message.role, "content": parts})
        if system and messages and messages[-1]["role"] == "user":
            messages[-1]["content"][0]["text"] += "\n\n" + "\n\n".join(system)
        return {"messages": messages}


Ids = Annotated[list[int], Field(max_length=2**20)]


class CompletionRequest(Common):
    """A body of POST /v1/completions: `prompt` is a text, token ids, or a list of either."""

    prompt: str | Ids | Annotated[list[str] | list[Ids], Field(max_length=MAX_CHOICES)]
    max_tokens: Annotated[int | None, Field(ge=0, le=2**31)] = None
    max_completion_tokens: Annotated[int | None, Field(ge=0, le=2**31)] = None
    echo: bool | None = None
    logprobs: Annotated[int | None, Field(ge=0, le=20)] = None

    @property
    def limit(self) -> int | None:
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    @property
    def prompts(self) -> list[str | list[int]]:
        if isinstance(self.prompt, str):
            return [self.prompt]
        if not self.prompt or isinstance(self.prompt[0], int):
            return [self.prompt]  # type: ignore[list-item]
        return list(self.prompt)


class TokenizeRequest(Shape):
    prompt: str


class DetokenizeRequest(Shape):
    tokens: Ids


R = TypeVar("R", bound=Shape)


def parse(body: bytes, shape: type[R]) -> R:
    """The request in a body. Raises ApiError 400 that names the field."""
    try:
        value = json.loads(body, parse_constant=_no_constant)
        json.dumps(value, ensure_ascii=False).encode()  # half a surrogate pair is no text
    except (ValueError, RecursionError):
        raise ApiError(400, "the body must be a JSON object") from None
    try:
        request = shape.model_validate(value)
    except ValidationError as error:
        first = error.errors(include_input=False, include_url=False, include_context=False)[0]
        param = ".".join(map(str, _path(first["loc"]))) or None
        raise ApiError(400, f"{param or 'the body'}: {first['msg'][:150]}", param=param) from None
    if isinstance(request, Common):
        _check(request)
    return request


def unknown_fields(request: Shape) -> set[str]:
    """Names of fields that we have no use for, to be logged once."""
    return set(request.model_extra or ()) - IGNORED


def _path(steps: tuple[int | str, ...]) -> list[int | str]:
    """Where the error is, without the names that pydantic gives to the branches of a union."""
    branches = {"str", "int", "float", "bool", "Part"}
    return [step for step in steps[:4] if isinstance(step, int) or (step not in branches and "[" not in step)]


def _check(request: Common) -> None:
    if request.stream_options and not request.stream:
        raise ApiError(400, "stream_options needs stream: true", param="stream_options")
    choice = (request.model_extra or {}).get("tool_choice")
    if choice == "required" or isinstance(choice, dict):
        raise ApiError(
            400,
            "tool_choice cannot be forced: the model has a calculator and no other tool",
            param="tool_choice",
        )
    if isinstance(request, ChatRequest):
        if request.top_logprobs is not None and not request.logprobs:
            raise ApiError(400, "top_logprobs needs logprobs: true", param="top_logprobs")
        if request.continue_final_message and request.messages[-1].role != "assistant":
            raise ApiError(
                400,
                "continue_final_message needs a last message of the assistant",
                param="continue_final_message",
            )
    elif isinstance(request, CompletionRequest):
        if request.limit == 0 and not request.echo:
            raise ApiError(400, "max_tokens 0 needs echo: true", param="max_tokens")
        if len(request.prompts) * (request.n or 1) > MAX_CHOICES:
            raise ApiError(400, f"prompts times n must be at most {MAX_CHOICES}", param="n")


def _no_constant(name: str) -> None:
    raise ValueError(name)
