"""The server: the page at /, OpenAI's chat API under /v1, /health.

Left out for now: API keys, /v1/completions, logprobs, metrics, several replicas. It answers this machine
alone (scripts/chat_web.py binds 127.0.0.1): other Hosts are refused, and so are requests that other web pages
send.
"""

from __future__ import annotations

import contextlib
import secrets
import time
from collections.abc import AsyncIterator
from importlib import resources
from urllib.parse import urlsplit

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.middleware.trustedhost import TrustedHostMiddleware

from nanochat import chat
from nanochat.engine import Engine, Sampling
from nanochat.engine.text import PartDecoder, StopFilter
from nanochat.web import openai
from nanochat.web.openai import ApiError, ChatRequest, Reply
from nanochat.web.worker import Busy, Job, Worker

HOSTS = ["localhost", "127.0.0.1"]
MAX_BODY_BYTES = 1 << 20
KINDS = {".html": "text/html", ".js": "text/javascript", ".css": "text/css", ".svg": "image/svg+xml"}
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self' data:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'; "
    "trusted-types nanochat"
)
STREAM_HEADERS = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}


def create_app(
    engine: Engine,
    name: str,
    *,
    temperature: float = 0.6,
    top_k: int = 50,
    num_rows: int = 8,
    max_waiting: int = 64,
    note: str | None = None,
) -> FastAPI:
    """The application around one engine; `name` is the model's id, temperature and top_k its defaults."""
    worker = Worker(engine, num_rows, max_waiting)
    most_chars = engine.context * int(engine.tokenizer.token_bytes().max())

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        worker.start()
        yield
        worker.stop()

    app = FastAPI(title="nanochat", lifespan=lifespan, docs_url=None, redoc_url=None)
    app.add_middleware(TrustedHostMiddleware, allowed_hosts=HOSTS, www_redirect=False)
    model = {"id": name, "object": "model", "created": int(time.time()), "owned_by": "nanochat"}

    @app.exception_handler(ApiError)
    async def refuse(_: Request, error: ApiError) -> JSONResponse:
        headers = {"Retry-After": "2"} if error.status in (429, 503) else None
        return JSONResponse(error.body, error.status, headers)

    @app.exception_handler(404)
    @app.exception_handler(405)
    async def nowhere(_: Request, error: Exception) -> JSONResponse:
        status = getattr(error, "status_code", 404)
        return JSONResponse(ApiError(status, "there is no such route, or not with this method").body, status)

    @app.get("/health")
    async def health() -> JSONResponse:
        return JSONResponse({"status": "ok" if worker.is_alive else "dead"}, 200 if worker.is_alive else 503)

    @app.get("/v1/models")
    async def models() -> dict:
        return {"object": "list", "data": [model]}

    @app.get("/v1/models/{model_id:path}")
    async def one_model(model_id: str) -> dict:
        if model_id != name:
            raise ApiError(404, "there is no such model", "model_not_found", "model")
        return model

    @app.post("/v1/chat/completions")
    async def completions(request: Request) -> Response:
        check_origin(request)
        asked = openai.parse(await read_body(request))
        if asked.model not in (None, name):
            raise ApiError(404, "there is no such model", "model_not_found", "model")
        job = Job(engine.start(*prompt_of(asked)))
        try:
            worker.submit(job)
        except Busy:
            raise ApiError(429, "too many requests are waiting", "rate_limit_exceeded") from None
        answer, reply = Answer(job, engine.tokenizer, asked.stops), Reply(name)
        if asked.stream:
            events = stream(answer, reply, bool(asked.stream_options and asked.stream_options.include_usage))
            media_type = "text/event-stream; charset=utf-8"
            return StreamingResponse(events, media_type=media_type, headers=STREAM_HEADERS)
        parts: list[dict[str, str]] = []
        async for part, text in answer.pieces(request):
            if not parts or parts[-1]["type"] != part:
                parts.append({"type": part, "text": ""})
            parts[-1]["text"] += text
        if job.error:
            raise ApiError(500, job.error)
        return JSONResponse(reply.whole(parts, answer.finish_reason, answer.usage()))

    def prompt_of(asked: ChatRequest) -> tuple[list[int], Sampling, int | None]:
        tok = engine.tokenizer
        conversation = asked.conversation()
        num_chars = sum(len(chat.text_of(message["content"])) for message in conversation["messages"])
        if num_chars > most_chars:  # it cannot fit, and long texts make tokenizers slow
            raise ApiError(400, "the messages are too long", "context_length_exceeded", "messages")
        try:
            ids = chat.render_for_completion(conversation, tok)
        except ValueError as error:  # it names the message and what is wrong with its role
            raise ApiError(400, str(error), param="messages") from None
        if len(ids) >= engine.context:
            message = f"the model reads {engine.context} tokens, the messages have {len(ids)}"
            raise ApiError(400, message, "context_length_exceeded", "messages")
        sampling = Sampling(
            temperature if asked.temperature is None else asked.temperature,
            top_k if asked.top_k is None else max(0, asked.top_k),
            1.0 if asked.top_p is None else asked.top_p,
            asked.min_p or 0.0,
            secrets.randbits(63) if asked.seed is None else asked.seed,
            # Only the tool may say these, so that what is shown as its output is real.
            (tok.encode_special(chat.OUTPUT_START), tok.encode_special(chat.OUTPUT_END)),
        )
        return ids, sampling, asked.max_completion_tokens or asked.max_tokens

    @app.get("/settings")
    async def settings() -> dict:
        return {"model": name, "temperature": temperature, "top_k": top_k, "note": note, "context": engine.context}

    @app.get("/{path}")
    @app.get("/")
    async def page(path: str = "") -> Response:
        file = path or "index.html"
        kind = KINDS.get(file[file.rfind(".") :])
        if kind is None or "/" in file or not (resources.files("nanochat.web") / "page" / file).is_file():
            raise ApiError(404, "there is no such page")
        headers = {
            "Content-Security-Policy": POLICY,
            "X-Content-Type-Options": "nosniff",
            "Cache-Control": "no-cache",
        }
        text = (resources.files("nanochat.web") / "page" / file).read_text(encoding="utf-8")
        return Response(text, media_type=kind, headers={**headers, "Referrer-Policy": "no-referrer"})

    return app


class Answer:
    """One path from tokens to text, streamed or not: parts, whole characters, stop strings."""

    def __init__(self, job: Job, tok: object, stops: list[str]) -> None:
        self.job, self._decoder, self._filter = job, PartDecoder(tok), StopFilter(stops)

    async def pieces(self, request: Request | None = None) -> AsyncIterator[tuple[str, str]]:
        """(part type, text) as they come. Leaving early, or a caller that has gone away, frees the row."""
        try:
            while (token := await self.job.tokens.get()) is not None:
                for part, text in self._decoder.push(token):
                    if shown := self._filter.push(text) if part == "text" else text:
                        yield part, shown
                if self._filter.is_hit or (request is not None and await request.is_disconnected()):
                    return
            for _, text in self._decoder.flush():
                if shown := self._filter.push(text):
                    yield "text", shown
            if held := self._filter.flush():
                yield "text", held
        finally:
            self.job.cancel()

    @property
    def finish_reason(self) -> str:
        return (
            "length" if self.job.generation.finish_reason == "length" and not self._filter.is_hit else "stop"
        )

    def usage(self) -> dict:
        generation = self.job.generation
        return openai.usage(len(generation.prompt), len(generation.output))


async def stream(answer: Answer, reply: Reply, with_usage: bool) -> AsyncIterator[str]:
    """The events of an answer: role, content, finish, usage if asked for, [DONE]."""
    yield reply.chunk({"role": "assistant", "content": ""})
    async with contextlib.aclosing(answer.pieces()) as pieces:  # type: ignore[type-var]
        async for part, text in pieces:
            yield reply.piece(part, text)
    if answer.job.error:
        yield openai.event(ApiError(500, answer.job.error).body)
    else:
        yield reply.chunk({}, answer.finish_reason)
        if with_usage:
            yield reply.usage(answer.usage())
    yield "data: [DONE]\n\n"


def check_origin(request: Request) -> None:
    """Raise ApiError 403 for a request that another web page has sent."""
    origin = request.headers.get("origin")
    if origin is not None and urlsplit(origin).netloc != request.headers.get("host"):
        raise ApiError(403, "requests of other web pages are refused")


async def read_body(request: Request) -> bytes:
    """The body, counted as it is read. Raises ApiError 413 beyond MAX_BODY_BYTES, 415 unless it is JSON."""
    if request.headers.get("content-type", "").split(";")[0].strip() != "application/json":
        raise ApiError(415, "the content type must be application/json")
    body = b""
    async for chunk in request.stream():
        body += chunk
        if len(body) > MAX_BODY_BYTES:
            raise ApiError(413, f"the body must be at most {MAX_BODY_BYTES} bytes")
    return body
