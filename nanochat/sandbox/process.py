"""The parent's side: start a child, hear what it says, end it in time."""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import sysconfig
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

MAX_STREAM = 1 << 16  # bytes of each stream that are read; more is a flood
UNUSED_UID = 61_709  # of no account; what a child of root becomes
CHILD = Path(__file__).with_name("child.py")


@dataclass(frozen=True)
class Limits:
    """wall_seconds from start to end; cpu_seconds of the processor (default: a second more)."""

    wall_seconds: float = 3.0
    cpu_seconds: int | None = None
    memory_bytes: int = 256 << 20
    uid: int = UNUSED_UID


def readable_paths() -> list[str]:
    """What foreign code may read: Python's own library and the system's. Existing paths only."""
    prefixes = [sysconfig.get_path(name) for name in ("stdlib", "platstdlib")]
    wanted = [
        *prefixes,
        "/lib",
        "/lib64",
        "/usr/lib",
        "/usr/lib64",
        "/etc/ld.so.cache",
        "/usr/share/zoneinfo",
    ]
    library = sysconfig.get_config_var("LIBDIR")
    if sysconfig.get_config_var("Py_ENABLE_SHARED") and library:
        wanted.append(library)
    return sorted({os.path.realpath(path) for path in wanted if path and os.path.exists(path)})


@dataclass
class Child:
    """A started child and what it has said so far. `flooded`: a stream that went over its limit."""

    process: subprocess.Popen[bytes]
    unsent: bytes
    out: bytes = b""
    err: bytes = b""
    flooded: bool = False
    closed: set[str] = field(default_factory=set)

    @classmethod
    def start(cls, orders: dict[str, Any], limits: Limits, skip: frozenset[str] = frozenset()) -> Child:
        """Start Python afresh: no environment, no descriptors but three, a session of its own.

        This thread must live as long as the child, which dies with it.
        """
        values = {
            "memory_bytes": limits.memory_bytes,
            "cpu_seconds": limits.cpu_seconds or int(limits.wall_seconds) + 1,
            "parent": os.getpid(), "uid": limits.uid,
        }  # fmt: skip
        whole = orders | {"limits": values, "readable": readable_paths(), "skip": sorted(skip)}
        body = json.dumps(whole).encode()
        process = subprocess.Popen(
            [os.path.realpath(sys.executable), "-I", "-S", "-B", os.fspath(CHILD)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            env={}, cwd="/", close_fds=True, start_new_session=True,
        )  # fmt: skip
        assert process.stdin and process.stdout and process.stderr
        for pipe in (process.stdin, process.stdout, process.stderr):
            os.set_blocking(pipe.fileno(), False)
        return cls(process, len(body).to_bytes(4, "little") + body)

    def fds(self) -> dict[int, str]:
        """Descriptors worth waiting for, by what they are."""
        pipes = {"out": self.process.stdout, "err": self.process.stderr}
        found = {p.fileno(): name for name, p in pipes.items() if p and name not in self.closed}
        if self.unsent and self.process.stdin and "in" not in self.closed:
            found[self.process.stdin.fileno()] = "in"
        return found

    def move(self, fd: int, name: str) -> None:
        """Read or write what is possible now."""
        try:
            if name == "in":
                self.unsent = self.unsent[os.write(fd, self.unsent) :]
                return
            piece = os.read(fd, 1 << 14)
        except BlockingIOError:
            return
        except OSError:  # the child has closed its end
            piece, self.unsent = b"", b""
        if not piece:
            self.closed.add(name)
        elif name == "out":
            self.out += piece
        else:
            self.err += piece
        self.flooded = self.flooded or max(len(self.out), len(self.err)) > MAX_STREAM

    def close_input(self) -> None:
        if self.process.stdin and "in" not in self.closed:
            self.closed.add("in")
            self.process.stdin.close()

    def moved(self) -> int:
        """Grows with all that is heard of the child: bytes, and ends of streams."""
        return len(self.out) + len(self.err) + len(self.closed)

    def has_ended(self) -> bool:
        """Whether the child itself is over. It is not reaped yet, so that its number stays its group's."""
        if not hasattr(os, "waitid"):  # macOS before Python 3.13
            return self.process.poll() is not None
        try:
            return os.waitid(os.P_PID, self.process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None
        except ChildProcessError:
            return True

    def end(self) -> int:
        """Kill what is left of its session, reap it, close the pipes; the exit code, of a signal negative."""
        if self.process.returncode is None:
            try:
                os.killpg(self.process.pid, signal.SIGKILL)
            except (ProcessLookupError, PermissionError):
                self.process.kill()
        code = self.process.wait()
        # Of one that had asked to be traced Popen takes the stop for the end.
        with contextlib.suppress(ChildProcessError):
            code = os.waitstatus_to_exitcode(os.waitpid(self.process.pid, 0)[1])
        for pipe in (self.process.stdin, self.process.stdout, self.process.stderr):
            if pipe:
                try:
                    pipe.close()
                except OSError:
                    pass
        return code


def wait(children: list[Child], deadline: float) -> bool:
    """Move bytes of several children once; False when the deadline has passed."""
    left = deadline - time.monotonic()
    if left <= 0:
        return False
    poll, owners = select.poll(), {}
    for child in children:
        for fd, name in child.fds().items():
            owners[fd] = (child, name)
            poll.register(fd, select.POLLOUT if name == "in" else select.POLLIN)
    # Streams end a moment before their process: one that has said all, but lives, is looked at every 20 ms. A
    # process may also end before its streams, where another one holds them.
    is_ending = any(not child.fds() and not child.has_ended() for child in children)
    pause = min(left, 0.02 if is_ending or not owners else 0.25)
    for fd, _ in poll.poll(max(1, int(pause * 1000))):
        child, name = owners[fd]
        child.move(fd, name)
    return True
