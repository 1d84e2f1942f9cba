"""The server: the page at /, OpenAI's API under /v1 (and without it), /health, /metrics.

Every request passes the access checks (middleware.py); a completion becomes sequences (requests.py), runs in
the engine's thread (engine_thread.py), and comes back as text (streaming.py) in OpenAI's shapes (replies.py).
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Collection, Sequence
from importlib import resources
from typing import Any, TypeVar

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, PlainTextResponse, Response

from nanochat.engine import Engine
from nanochat.server import middleware as gate
from nanochat.server import schemas as openai
from nanochat.server.door import RETRY_SECONDS, health_body
from nanochat.server.engine_thread import EngineGroup, EngineRequest, QueueFull
from nanochat.server.metrics import ServerMetrics
from nanochat.server.middleware import AccessMiddleware, EventStream, Log
from nanochat.server.replies import ChatReply, TextReply, TokenNames
from nanochat.server.requests import Defaults, Prepared, Prompts
from nanochat.server.schemas import (
    ApiError,
    ChatRequest,
    Common,
    CompletionRequest,
    DetokenizeRequest,
    TokenizeRequest,
)
from nanochat.server.streaming import Answer

KINDS = {".html": "text/html", ".js": "text/javascript", ".css": "text/css", ".svg": "image/svg+xml"}
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self' data:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'; "
    "trusted-types nanochat"
)
PAGE_HEADERS = {
    "Content-Security-Policy": POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cache-Control": "no-cache",
}
MAX_SECONDS = 600.0  # of one request
LONG = 20_000  # bytes of a request: a millisecond of parsing and tokenizing

R = TypeVar("R", bound=openai.Shape)
C = TypeVar("C", bound=Common)
T = TypeVar("T")


def page_files() -> dict[str, tuple[str, str]]:
    """Path -> (text, content type) of everything the browser may fetch without a key."""
    found = {}
    for file in (resources.files("nanochat.server") / "page").iterdir():
        kind = KINDS.get(file.name[file.name.rfind(".") :])
        if kind:
            found[f"/{file.name}"] = (file.read_text(encoding="utf-8"), kind)
    return {"/": found["/index.html"], **found}


def create_app(
    engines: Engine | Sequence[Engine],
    name: str,
    *,
    temperature: float = 0.6,
    top_k: int = 50,
    num_rows: int = 8,
    max_waiting: int = 64,
    max_wait_seconds: float = 60.0,
    max_per_key: int = 0,
    keys: Collection[str] = (),
    hosts: Collection[str] = (),
    origins: Collection[str] = (),
    log: Log | None = None,
    note: str | None = None,
) -> FastAPI:
    """The application around one engine, or several that hold the same model.

    `name` is the model's id, temperature and top_k its defaults; num_rows is per engine; max_per_key 0 is no
    limit. While app.state.is_draining, new completions and /health answer 503.
    """
    group = EngineGroup(
        [engines] if isinstance(engines, Engine) else list(engines), num_rows, max_waiting, max_wait_seconds
    )
    tok, context = group.engine.tokenizer, group.engine.context
    prompts, names, metrics = (
        Prompts(group.engine, Defaults(temperature, top_k)),
        TokenNames(tok),
        ServerMetrics(),
    )
    files = page_files()
    per_key: Counter[str] = Counter()
    told: set[str] = set()
    model = {"id": name, "object": "model", "created": int(time.time()), "owned_by": "nanochat"}

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        group.start()
        yield
        group.stop()

    app = FastAPI(title="nanochat", lifespan=lifespan, docs_url=None, redoc_url=None)
    app.state.is_draining = False
    app.state.group = group
    app.state.hosts = hosts
    app.state.health = lambda: "draining" if app.state.is_draining else "ok" if group.is_alive else "dead"
    completion_paths = {
        prefix + path for prefix in ("/v1/", "/") for path in ("chat/completions", "completions")
    }

    def refusal_before_routing(scope: Any) -> ApiError | None:
        """Why a completion cannot be taken at this moment, told before it costs more."""
        if scope["method"] != "POST" or scope["path"] not in completion_paths:
            return None
        if app.state.is_draining:
            error = ApiError(503, "the server is stopping", retry_after=10)
        elif wait := group.seconds_until_free():
            error = too_many(wait)
        elif max_per_key and per_key[scope["key"]] >= max_per_key:
            error = ApiError(
                429, "too many requests of this key are running", "rate_limit_exceeded", retry_after=5
            )
        else:
            return None
        metrics.count("requests_rejected_total", label=f'status="{error.status}"')
        return error

    app.add_middleware(
        AccessMiddleware,
        hosts=hosts,
        origins=origins,
        keys=keys,
        public={"/health", *files},
        log=log,
        reject=refusal_before_routing,
    )

    @app.exception_handler(ApiError)
    async def refuse(_: Request, error: ApiError) -> JSONResponse:
        metrics.count("requests_rejected_total", label=f'status="{error.status}"')
        return JSONResponse(error.body, error.status, error.headers)

    @app.exception_handler(404)
    @app.exception_handler(405)
    async def not_found(_: Request, error: Exception) -> JSONResponse:
        status = getattr(error, "status_code", 404)
        headers = getattr(error, "headers", None)
        return JSONResponse(
            ApiError(status, "there is no such route, or not with this method").body, status, headers
        )

    @app.get("/health")
    async def health() -> JSONResponse:
        status, body = health_body(app.state.health())
        return JSONResponse(body, status, {"Retry-After": str(RETRY_SECONDS)} if status == 503 else None)

    @app.get("/metrics")
    async def show_metrics() -> PlainTextResponse:
        return PlainTextResponse(metrics.text(gauges(group)), media_type="text/plain; version=0.0.4")

    @app.get("/settings")
    async def settings() -> dict[str, Any]:
        return {"model": name, "temperature": temperature, "top_k": top_k, "note": note, "context": context}

    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [model]}

    async def one_model(model_id: str) -> dict[str, Any]:
        check_model(model_id)
        return model

    def check_model(asked: str | None) -> None:
        if asked not in (None, name):
            raise ApiError(404, "there is no such model", "model_not_found", "model")

    def too_many(retry_after: int) -> ApiError:
        return ApiError(429, "too many requests are waiting", "rate_limit_exceeded", retry_after=retry_after)

    async def chat_completions(request: Request) -> Response:
        asked = await parsed(request, ChatRequest)
        return await complete(request, asked, prompts.of_chat, ChatReply(name, names))

    async def completions(request: Request) -> Response:
        asked = await parsed(request, CompletionRequest)
        return await complete(request, asked, prompts.of_text, TextReply(name, names))

    async def parsed(request: Request, shape: type[R]) -> R:
        body = await gate.read_body(request)
        return await run_in_thread(len(body), openai.parse, body, shape)

    async def complete(
        request: Request,
        asked: C,
        prepare: Callable[[C, str], Prepared],
        reply: ChatReply | TextReply,
    ) -> Response:
        check_model(asked.model)
        if log and (new := openai.unknown_fields(asked) - told) and len(told) < 100:
            told.update(new)
            log({"event": "unknown fields", "fields": sorted(field[:40] for field in new)})
        key = request.scope["key"]
        prepared = await run_in_thread(int(request.headers.get("content-length", LONG)), prepare, asked, key)
        engine_request = EngineRequest(prepared.sequences)
        try:
            group.submit(engine_request)
        except QueueFull as full:
            raise too_many(full.retry_after) from None
        per_key[key] += 1
        request.scope["facts"] |= {
            "id": reply.id,
            "stream": bool(asked.stream),
            **({"key": key} if key else {}),
        }
        answer = Answer(
            engine_request,
            prepared.choices,
            reply,
            num_prompt=prepared.num_prompt,
            has_logprobs=prepared.has_logprobs,
            max_seconds=MAX_SECONDS,
            on_end=lambda ended: note_end(request, ended),
        )
        if asked.stream:
            return EventStream(answer.events(asked.wants_usage), answer.end)
        try:
            body = await gate.unless_gone(request, answer.whole())
        finally:
            answer.end()
        return JSONResponse(body) if body is not None else Response(status_code=499)

    def note_end(request: Request, answer: Answer) -> None:
        per_key[request.scope["key"]] -= 1
        reasons = {
            c.finish_reason if c.is_over else "error" if answer.error else "abort" for c in answer.choices
        }
        reason = "+".join(sorted(reasons))
        metrics.count("requests_finished_total", label=f'reason="{reason}"')
        metrics.count("tokens_in_total", answer.num_prompt)
        metrics.count("tokens_out_total", answer.num_output)
        metrics.count("prefix_tokens_queried_total", sum(len(c.sequence.prompt) for c in answer.choices))
        metrics.count("prefix_tokens_hit_total", answer.num_cached)
        seconds, first = answer.seconds or 0.0, answer.first_seconds
        metrics.observe("request_seconds", seconds)
        if first is not None:
            metrics.observe("first_token_seconds", first)
            if answer.num_output > 1:
                metrics.observe("token_seconds", (seconds - first) / (answer.num_output - 1))
        facts = {"prompt_tokens": answer.num_prompt, "completion_tokens": answer.num_output, "finish": reason}
        request.scope["facts"] |= {**facts, "first_token_seconds": None if first is None else round(first, 4)}

    async def tokenize(request: Request) -> dict[str, Any]:
        asked = await parsed(request, TokenizeRequest)
        return {"tokens": await run_in_thread(len(asked.prompt), prompts.tokenize, asked.prompt)}

    async def detokenize(request: Request) -> dict[str, Any]:
        asked = await parsed(request, DetokenizeRequest)
        return {"prompt": await run_in_thread(len(asked.tokens), prompts.detokenize, asked.tokens)}

    async def tokenizer_info() -> dict[str, Any]:
        return prompts.tokenizer_info()

    def body_of(shape: type[openai.Shape]) -> dict[str, Any]:
        schema = {"$ref": f"#/components/schemas/{shape.__name__}"}
        return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}

    posts = (
        ("chat/completions", ChatRequest, chat_completions),
        ("completions", CompletionRequest, completions),
        ("tokenize", TokenizeRequest, tokenize),
        ("detokenize", DetokenizeRequest, detokenize),
    )
    gets = (("models", models), ("models/{model_id:path}", one_model), ("tokenizer_info", tokenizer_info))
    for prefix in ("/v1/", "/"):
        for path, shape, work in posts:
            add = app.post(prefix + path, openapi_extra=body_of(shape), include_in_schema=prefix == "/v1/")
            add(work)
        for path, look in gets:
            app.get(prefix + path, include_in_schema=prefix == "/v1/")(look)

    async def page(request: Request) -> Response:
        text, kind = files[request.scope["path"]]
        return Response(text, media_type=kind, headers=PAGE_HEADERS)

    for path in files:
        app.get(path, include_in_schema=False)(page)
    _describe(app)
    return app


async def run_in_thread(num_bytes: int, work: Callable[..., T], *arguments: Any) -> T:
    """work(*arguments); for a long request in a thread, so that the event loop goes on with other answers."""
    return await asyncio.to_thread(work, *arguments) if num_bytes >= LONG else work(*arguments)


def gauges(group: EngineGroup) -> dict[str, tuple[str, float]]:
    """What is so at this moment; figures of the cache where the engine tells them."""
    found: dict[str, tuple[str, float]] = {
        "requests_running": ("Sequences that are computed now.", group.num_running),
        "requests_waiting": ("Requests that wait for a row.", group.num_waiting),
    }
    batches = [thread.batch for thread in group.threads if hasattr(thread.batch, "scheduler")]
    pools = [pool for batch in batches for pool in batch.blocks.pools]
    if batches:
        used = sum(sum(count > 0 for count in pool.refs[1:]) for pool in pools)  # block 0 is padding
        found["blocks_used"] = ("Blocks of the cache that sequences hold.", used)
        found["blocks_total"] = ("Blocks of the cache.", sum(pool.num_blocks - 1 for pool in pools))
        preempted = sum(batch.scheduler.num_preempted for batch in batches)
        found["preemptions"] = ("Sequences that had to give their blocks back, since the start.", preempted)
    return found


def _describe(app: FastAPI) -> None:
    """Put the shapes of the bodies, which we read ourselves, into the OpenAPI document."""
    plain = app.openapi

    def document() -> dict[str, Any]:
        found = plain()
        schemas = found.setdefault("components", {}).setdefault("schemas", {})
        for shape in (ChatRequest, CompletionRequest, TokenizeRequest, DetokenizeRequest):
            schema = shape.model_json_schema(ref_template="#/components/schemas/{model}")
            schemas.update(schema.pop("$defs", {}))
            schemas[shape.__name__] = schema
        return found

    app.openapi = document  # type: ignore[method-assign]
