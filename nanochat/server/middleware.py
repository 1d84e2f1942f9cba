"""What every request passes first: Host, Origin, key; and the log line it leaves. Plain ASGI.

Everything is refused but what is listed: only the paths in `public` do without a key.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import json
import sys
import time
import traceback
from collections.abc import AsyncIterator, Callable, Collection
from typing import Any
from urllib.parse import urlsplit

from fastapi import Request
from fastapi.responses import JSONResponse, Response

from nanochat.server.door import LOCAL_HOSTS, host_name
from nanochat.server.schemas import ApiError

MAX_BODY_BYTES = 1 << 20
MAX_HEADER_BYTES = 16_384
BODY_SECONDS = 10.0
STALL_SECONDS = 30.0
STREAM_HEADERS = {
    "Content-Type": "text/event-stream; charset=utf-8",
    "Cache-Control": "no-cache",
    "X-Accel-Buffering": "no",
}

Log = Callable[[dict[str, Any]], None]


def log_line(record: dict[str, Any]) -> None:
    """One line of JSON on stderr."""
    print(json.dumps(record, ensure_ascii=False), file=sys.stderr, flush=True)


class AccessMiddleware:
    """Check the Host header, the Origin header and the API key of every request; log it when it ends.

    Args:
        hosts: host names accepted besides loopback names; any other Host gets 403.
        origins: origins accepted besides the server's own; any other Origin gets 403.
        keys: valid API keys. If empty, no key is required.
        public: paths that need no key.
        log: called with a record of each request. It never contains text of a conversation.
        reject: called with the ASGI scope before routing. If it returns an error, the request body is read
            first (a client that is still sending would otherwise miss the answer), then the error is sent.
    """

    def __init__(
        self,
        app: Any,
        *,
        hosts: Collection[str],
        origins: Collection[str],
        keys: Collection[str],
        public: Collection[str],
        log: Log | None,
        reject: Callable[[Any], ApiError | None] = lambda scope: None,
    ) -> None:
        self._app = app
        self._public = frozenset(public)
        self._log = log
        self._reject = reject
        self._hosts = {*LOCAL_HOSTS, *(host.lower() for host in hosts)}
        self._origins = {origin.lower().rstrip("/") for origin in origins}
        self._digests = [hashlib.sha256(key.encode()).digest() for key in keys]

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            if scope["type"] == "lifespan":
                await self._app(scope, receive, send)
            return
        start = time.monotonic()
        facts: dict[str, Any] = {"status": 0}
        scope["facts"] = facts
        headers = {name: value.decode("latin-1") for name, value in scope["headers"]}
        origin = headers.get(b"origin", "").lower()

        async def watched(message: Any) -> None:
            if message["type"] == "http.response.start":
                facts["status"] = message["status"]
                if origin in self._origins:
                    message["headers"] = [*message["headers"], *_cors(origin)]
            await send(message)

        try:
            if scope["method"] == "OPTIONS" and origin in self._origins:
                await Response(status_code=204)(scope, receive, watched)
            else:
                self._check(scope, headers)
                if refusal := self._reject(scope):
                    await read_body(Request(scope, receive))
                    raise refusal
                await self._app(scope, receive, watched)
        except ApiError as error:
            await JSONResponse(error.body, error.status, error.headers)(scope, receive, watched)
        except Exception as error:
            # The message of an exception may contain text of a conversation: only its type is logged.
            facts["error"] = type(error).__name__
            facts["where"] = [f"{f.name}:{f.lineno}" for f in traceback.extract_tb(error.__traceback__)[-3:]]
            if not facts["status"]:
                body = ApiError(500, "the server failed")
                await JSONResponse(body.body, 500, body.headers)(scope, receive, watched)
        finally:
            if self._log:
                record = {
                    "time": round(time.time(), 3),
                    "method": scope["method"],
                    "path": scope["path"][:200],
                }
                self._log({**record, "seconds": round(time.monotonic() - start, 4), **facts})

    def _check(self, scope: Any, headers: dict[bytes, str]) -> None:
        if sum(len(name) + len(value) for name, value in scope["headers"]) > MAX_HEADER_BYTES:
            raise ApiError(431, f"the headers must be at most {MAX_HEADER_BYTES} bytes")
        host = headers.get(b"host", "").lower()
        if host_name(host) not in self._hosts:
            raise ApiError(403, "this name is not one of the server's: see --allow-host")
        origin = headers.get(b"origin")
        if origin is not None and scope["method"] not in ("GET", "HEAD"):
            is_own = urlsplit(origin).netloc.lower() == host and origin.lower() != "null"
            if not is_own and origin.lower() not in self._origins:
                raise ApiError(403, "requests of other web pages are refused")
        scope["key"] = ""
        if self._digests and scope["path"] not in self._public:
            scope["key"] = self._key(headers)

    def _key(self, headers: dict[bytes, str]) -> str:
        """A name for the request's key. Raises ApiError 401; takes the same time for every wrong key."""
        kind, _, bearer = headers.get(b"authorization", "").partition(" ")
        given = bearer.strip() if kind.lower() == "bearer" else headers.get(b"x-api-key", "")
        digest = hashlib.sha256(given.encode("latin-1", "replace")).digest()
        found = [hmac.compare_digest(digest, known) for known in self._digests]
        if not any(found):
            raise ApiError(401, "the API key is missing or wrong", "invalid_api_key")
        return digest.hex()[:12]


def _cors(origin: str) -> list[tuple[bytes, bytes]]:
    return [
        (b"access-control-allow-origin", origin.encode("latin-1")),
        (b"access-control-allow-headers", b"authorization, content-type, x-api-key"),
        (b"access-control-allow-methods", b"GET, POST"),
        (b"vary", b"origin"),
    ]


async def read_body(request: Request) -> bytes:
    """The body, counted as it is read. Raises ApiError 408 (10 s), 413 (1 MB), 415 (not JSON)."""
    if request.headers.get("content-type", "").split(";")[0].strip().lower() != "application/json":
        raise ApiError(415, "the content type must be application/json")

    loop, task, is_late = asyncio.get_running_loop(), asyncio.current_task(), False
    assert task is not None

    def late() -> None:
        nonlocal is_late
        is_late = True
        task.cancel()

    alarm = loop.call_later(BODY_SECONDS, late)
    body = bytearray()
    try:
        async for chunk in request.stream():
            body += chunk
            if len(body) > MAX_BODY_BYTES:
                raise ApiError(413, f"the body must be at most {MAX_BODY_BYTES} bytes")
    except asyncio.CancelledError:
        if not is_late:
            raise
        if hasattr(task, "uncancel"):  # Python 3.11
            task.uncancel()
        raise ApiError(408, "the body did not come in time") from None
    finally:
        alarm.cancel()
    return bytes(body)


async def gone(receive: Any) -> None:
    """Return when the caller has hung up."""
    while (await receive())["type"] != "http.disconnect":
        pass


async def unless_gone(request: Request, work: Any) -> Any:
    """The result of `work`, or None (and `work` cancelled) when the caller hangs up first."""
    task, leaving = asyncio.ensure_future(work), asyncio.ensure_future(gone(request.receive))
    try:
        await asyncio.wait({task, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        return None
    finally:
        leaving.cancel()
        if not task.done():
            task.cancel()
            await asyncio.wait({task})


class EventStream(Response):
    """Sends events as they come; stops when the caller hangs up or reads nothing for STALL_SECONDS.

    close is called in the end, also when not one event was asked for (a generator's own `finally` is not).
    """

    def __init__(self, events: AsyncIterator[str], close: Callable[[], None]) -> None:
        super().__init__()
        self._events, self._close = events, close

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        request = Request(scope, receive)
        try:
            await unless_gone(request, self._write(send))
        finally:
            self._close()

    async def _write(self, send: Any) -> None:
        loop, task = asyncio.get_running_loop(), asyncio.current_task()
        assert task is not None
        headers = [(name.lower().encode(), value.encode()) for name, value in STREAM_HEADERS.items()]
        since = 0.0  # when the send that has not come back was begun; 0: none
        alarm: asyncio.TimerHandle | None = None

        def look() -> None:  # one clock for all events: a timer for each would cost as much as the event
            nonlocal alarm
            if since and loop.time() - since >= STALL_SECONDS:
                task.cancel()
            else:
                alarm = loop.call_later(STALL_SECONDS / 4, look)

        look()
        try:
            await send({"type": "http.response.start", "status": 200, "headers": headers})
            async for event in self._events:
                since = loop.time()
                await send({"type": "http.response.body", "body": event.encode(), "more_body": True})
                since = 0.0
            await send({"type": "http.response.body", "body": b"", "more_body": False})
        finally:
            if alarm is not None:
                alarm.cancel()
            await self._events.aclose()  # type: ignore[attr-defined]
