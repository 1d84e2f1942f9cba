"""The port: bound before the model is loaded, answered by a thread of its own. Standard library only.

It takes connections, looks at their first bytes without consuming them, answers GET /health itself, and hands
all others to the server's event loop, a few at a time. So a health check waits for nobody, and a thousand
callers at once cost the loop no more in one turn than eight. Until `open` is called everything else is told
to come back (503 with Retry-After).
"""

from __future__ import annotations

import contextlib
import ipaddress
import json
import selectors
import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Collection
from itertools import islice

from nanochat import errors

LOCAL_HOSTS = ("localhost", "127.0.0.1", "[::1]")
BACKLOG = 4096  # connections that the kernel keeps; it may cap this
MAX_HEAD = 16_384
DONT_WAIT = getattr(socket, "MSG_DONTWAIT", 0)
MAX_SILENT = 8192  # connections that have said nothing yet
MAX_FILES = 65_536
SILENT_SECONDS = 30.0
LINGER_SECONDS = 2.0  # after an answer, for what the caller still sends
PER_TURN = 8  # connections that the loop takes in one turn
RETRY_SECONDS = 2
STATUS = {200: "200 OK", 503: "503 Service Unavailable"}
LOADING = {
    "error": {"message": "the model is loading", "type": "server_error", "param": None, "code": "loading"}
}
LOADING_PAGE = (
    '<!doctype html><html lang="en"><meta charset="utf-8"><meta http-equiv="refresh" content="1">'
    '<meta name="color-scheme" content="light dark"><title>nanochat</title>'
    "<h1>nanochat</h1><p>The model is loading. This page comes back by itself.</p></html>"
)


def listen(host: str, port: int, has_key: bool = False) -> socket.socket:
    """A bound socket. Raises UserError for a taken port, or an address of the network without a key."""
    if not has_key and not is_local(host):
        raise errors.UserError(
            f"--host={host} can be reached by others, and the server has no key",
            "set NANOCHAT_API_KEY, or come to 127.0.0.1 by ssh -L 8000:127.0.0.1:8000 THIS-MACHINE",
        )
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
    except (OSError, OverflowError) as error:
        listener.close()
        raise errors.UserError(
            f"cannot listen on {host}, port {port}: {error}", "choose another --port"
        ) from error
    return listener


def is_local(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def host_name(header: str) -> str:
    """The name in a Host header, without its port."""
    host = header.lower()
    return host[: host.index("]") + 1] if host.startswith("[") and "]" in host else host.split(":")[0]


def health_body(state: str) -> tuple[int, dict[str, str]]:
    """(status, body) of /health for "ok", "loading", "draining", "stuck" or "dead"."""
    return (200 if state == "ok" else 503), {"status": state}


class Door:
    """Owns the connections of `listener` until they are handed over; close() ends it and the listener.

    hosts: names in the Host header for which /health is answered here; other requests are for the loop, which
    knows all rules.
    """

    def __init__(self, listener: socket.socket, hosts: Collection[str] = ()) -> None:
        self._listener, self._hosts = listener, {*LOCAL_HOSTS, *(host.lower() for host in hosts)}
        self._hand_over: Callable[[], None] | None = None
        self._state: Callable[[], str] = lambda: "loading"
        self._silent: dict[socket.socket, float] = {}  # -> until when
        self._leaving: dict[socket.socket, float] = {}
        self._waiting: deque[socket.socket] = deque()
        self._is_closing = False
        self._bell, self._knob = socket.socketpair()
        allow_many_files()
        listener.setblocking(False)
        listener.listen(BACKLOG)
        self._thread = threading.Thread(target=self._run, name="door", daemon=True)
        self._thread.start()

    def __enter__(self) -> Door:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def open(self, hand_over: Callable[[], None], state: Callable[[], str]) -> None:
        """From now on connections are for `take`. hand_over is called, here, when there are some; it and
        `state`, which says how the server is, must be safe to call from any thread.
        """
        self._state, self._hand_over = state, hand_over

    def take(self) -> list[socket.socket]:
        """Up to PER_TURN connections, non-blocking, nothing of them read yet; they are the caller's now."""
        found: list[socket.socket] = []
        with contextlib.suppress(IndexError):
            while len(found) < PER_TURN:
                found.append(self._waiting.popleft())
        for line in found:
            line.setblocking(False)
        return found

    def close(self) -> None:
        """Take no more connections and drop those that nobody has taken. May be called twice."""
        self._is_closing = True
        with contextlib.suppress(OSError):
            self._knob.send(b"x")
        self._thread.join()

    def _run(self) -> None:
        with selectors.DefaultSelector() as self._selector:
            self._selector.register(self._listener, selectors.EVENT_READ, self._accept)
            self._selector.register(self._bell, selectors.EVENT_READ, lambda _: None)
            while not self._is_closing:
                for key, _ in self._selector.select(1.0 if self._silent or self._leaving else None):
                    with contextlib.suppress(OSError):  # a caller who has hung up
                        key.data(key.fileobj)
                self._drop_late()
            for line in (*self._silent, *self._leaving, *self._waiting):
                line.close()
        for line in (self._listener, self._bell, self._knob):
            line.close()

    def _accept(self, listener: socket.socket) -> None:
        try:
            line, _ = listener.accept()
        except BlockingIOError:
            return
        except OSError:  # out of file descriptors: who says nothing gives his back
            self._drop_oldest()
            time.sleep(0.01)
            return
        if not DONT_WAIT:  # Windows
            line.setblocking(False)
        if len(self._silent) >= MAX_SILENT:
            self._drop_oldest()
        self._silent[line] = time.monotonic() + SILENT_SECONDS
        self._selector.register(line, selectors.EVENT_READ, self._look)
        self._look(line)  # mostly the request is there already

    def _look(self, line: socket.socket) -> None:
        """The first bytes of a connection, if they have come. Every call of the system gives the interpreter
        away and waits for it again: there are few before the answer.
        """
        try:
            head = line.recv(MAX_HEAD, socket.MSG_PEEK | DONT_WAIT)
        except BlockingIOError:
            return
        except OSError:
            head = b""
        if not head:
            self._forget(line).close()
        elif self._is_health(head):
            status, body = health_body(self._state())
            self._answer(line, status, json.dumps(body), "application/json")
        elif self._hand_over is None:
            wants_page = head.startswith(b"GET ") and b"text/html" in head
            page = (LOADING_PAGE, "text/html; charset=utf-8")
            self._answer(line, 503, *(page if wants_page else (json.dumps(LOADING), "application/json")))
        else:
            self._waiting.append(self._forget(line))
            self._hand_over()

    def _is_health(self, head: bytes) -> bool:
        """Whether this is the whole of a plain GET /health for one of our names."""
        if not head.startswith(b"GET /health HTTP/1.") or not head.endswith(b"\r\n\r\n"):
            return False
        lines = head[:-4].decode("latin-1").split("\r\n")[1:]
        fields = [
            (name.strip().lower(), value.strip()) for name, _, value in (x.partition(":") for x in lines)
        ]
        hosts = [value for name, value in fields if name == "host"]
        is_plain = not any(name in ("origin", "content-length", "transfer-encoding") for name, _ in fields)
        return is_plain and "" not in lines and len(hosts) == 1 and host_name(hosts[0]) in self._hosts

    def _answer(self, line: socket.socket, status: int, body: str, kind: str) -> None:
        """Answer, and hang up once the caller has: a close with bytes unread could destroy the answer."""
        retry = f"Retry-After: {RETRY_SECONDS}\r\n" if status == 503 else ""
        fields = (
            f"Content-Type: {kind}\r\nCache-Control: no-store\r\nX-Content-Type-Options: nosniff\r\n{retry}"
        )
        length = f"Content-Length: {len(body)}\r\nConnection: close\r\n\r\n"
        line.send(f"HTTP/1.1 {STATUS[status]}\r\n{fields}{length}{body}".encode(), DONT_WAIT)
        line.shutdown(socket.SHUT_WR)
        self._forget(line)
        self._leaving[line] = time.monotonic() + LINGER_SECONDS
        self._selector.register(line, selectors.EVENT_READ, self._discard)

    def _discard(self, line: socket.socket) -> None:
        try:
            if line.recv(65_536, DONT_WAIT):
                return
        except BlockingIOError:
            return
        except OSError:
            pass
        self._forget(line).close()

    def _forget(self, line: socket.socket) -> socket.socket:
        self._selector.unregister(line)
        self._silent.pop(line, None)
        self._leaving.pop(line, None)
        return line

    def _drop_oldest(self) -> None:
        for line in list(islice(self._silent, 1)):
            self._forget(line).close()

    def _drop_late(self) -> None:
        """Close what has had its time: both are in the order of their ends."""
        now = time.monotonic()
        for lines in (self._silent, self._leaving):
            while lines and next(iter(lines.values())) < now:
                self._forget(next(iter(lines))).close()


def allow_many_files() -> None:
    """Raise the limit of open files, which is also that of connections, as far as this user may."""
    try:
        import resource
    except ImportError:  # not on Windows
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = MAX_FILES if hard == resource.RLIM_INFINITY else min(hard, MAX_FILES)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
