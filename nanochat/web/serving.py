"""Running an app on a socket until it is told to stop: the first signal drains it, the second ends it.

Draining: what runs may finish, new completions are told to go elsewhere (503), /health says so too.
"""

from __future__ import annotations

import asyncio
import ipaddress
import socket
from types import FrameType
from typing import Any

from nanochat import errors
from nanochat.web.gate import MAX_HEADER_BYTES


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


def make_server(app: Any, drain_seconds: float) -> Any:
    """A uvicorn server around `app` (made by create_app) that drains at the first SIGINT or SIGTERM."""
    import uvicorn

    class Server(uvicorn.Server):
        draining: asyncio.Task | None = None

        def handle_exit(self, sig: int, frame: FrameType | None) -> None:
            if self.draining is None and self.started:
                app.state.is_draining = True
                self.loop.call_soon_threadsafe(self.begin_draining)
            else:
                self.should_exit = True

        async def startup(self, sockets: list[socket.socket] | None = None) -> None:
            self.loop = asyncio.get_running_loop()
            await super().startup(sockets)

        def begin_draining(self) -> None:
            self.draining = self.loop.create_task(self.drain())

        async def drain(self) -> None:
            fleet, end = app.state.fleet, self.loop.time() + drain_seconds
            while (fleet.num_running or fleet.num_waiting) and self.loop.time() < end:
                await asyncio.sleep(0.05)
            self.should_exit = True

    config = uvicorn.Config(
        app,
        log_level="warning",
        access_log=False,
        http="h11",
        h11_max_incomplete_event_size=2 * MAX_HEADER_BYTES,  # the gate counts what has come whole
        timeout_keep_alive=30,
        timeout_graceful_shutdown=5,
        server_header=False,
    )
    return Server(config)
