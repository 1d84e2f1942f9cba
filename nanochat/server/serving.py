"""Running an app on a socket until it is told to stop: the first signal drains it, the second ends it.

Draining: what runs may finish, new completions are told to go elsewhere (503), /health says so too.
Connections come through the door (door.py), which answers /health while the loop is busy.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import socket
import sys
import time
from types import FrameType
from typing import Any

from nanochat.server.door import Door
from nanochat.server.middleware import MAX_HEADER_BYTES

SWITCH_SECONDS = 0.001  # of the interpreter between threads: the door's must not wait for the engine's
STUCK_SECONDS = 10.0  # without a turn of the event loop


def settle() -> None:
    """Call once, when all is loaded. What is there now stays; the garbage collector need not look at it.

    torch and the rest are 200,000 objects; a full collection over them stops every thread for 0.14 s.
    """
    gc.collect()
    gc.freeze()


def make_server(app: Any, drain_seconds: float, door: Door | None = None) -> Any:
    """A uvicorn server around `app` (made by create_app) that drains at the first SIGINT or SIGTERM.

    run() serves the connections of `door`; without one, run(sockets=[listener]) opens it there.
    """
    import uvicorn

    class Server(uvicorn.Server):
        draining: asyncio.Task | None = None
        ticked = 0.0

        def handle_exit(self, sig: int, frame: FrameType | None) -> None:
            if self.draining is None and self.started:
                app.state.is_draining = True
                self.loop.call_soon_threadsafe(self.begin_draining)
            else:
                self.should_exit = True

        async def startup(self, sockets: list[socket.socket] | None = None) -> None:
            self.loop = asyncio.get_running_loop()
            self.adopting = set[asyncio.Task]()
            self.is_taking = False
            sys.setswitchinterval(min(SWITCH_SECONDS, sys.getswitchinterval()))
            self.ticked = time.monotonic()
            self.door = door or Door((sockets or [])[0], app.state.hosts)
            self.door.open(self.knock, self.health)
            await super().startup([])  # no sockets of its own

        async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
            await asyncio.to_thread(self.door.close)
            await super().shutdown(sockets)

        async def on_tick(self, counter: int) -> bool:
            self.ticked = time.monotonic()
            return await super().on_tick(counter)

        def health(self) -> str:
            """How the server is; from any thread."""
            if not self.started:
                return "loading"
            return "stuck" if time.monotonic() - self.ticked > STUCK_SECONDS else app.state.health()

        def knock(self) -> None:
            """Connections wait in the door; from any thread."""
            if not self.is_taking:
                self.is_taking = True
                with contextlib.suppress(RuntimeError):  # the loop has ended
                    self.loop.call_soon_threadsafe(self.take)

        def take(self) -> None:
            """Take some connections; the rest in later turns, so that answers go on between them."""
            if not self.started:
                self.loop.call_later(0.01, self.take)
                return
            self.is_taking = False  # before looking: who knocks from now on is heard
            found = self.door.take()
            for line in found:
                task = self.loop.create_task(self.adopt(line))
                self.adopting.add(task)
                task.add_done_callback(self.adopting.discard)
            if found and not self.is_taking:
                self.is_taking = True
                self.loop.call_soon(self.take)

        async def adopt(self, line: socket.socket) -> None:
            def protocol() -> asyncio.Protocol:
                return config.http_protocol_class(  # type: ignore[call-arg]
                    config=config, server_state=self.server_state, app_state=self.lifespan.state
                )

            try:
                await self.loop.connect_accepted_socket(protocol, line)
            except OSError:
                line.close()

        def begin_draining(self) -> None:
            self.draining = self.loop.create_task(self.drain())

        async def drain(self) -> None:
            group, end = app.state.group, self.loop.time() + drain_seconds
            while (group.num_running or group.num_waiting) and self.loop.time() < end:
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
