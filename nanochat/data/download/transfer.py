"""One URL to one file: resumable, and never a wrong byte under the final name. Standard library."""

from __future__ import annotations

import contextlib
import email.utils
import hashlib
import http.client
import os
import random
import re
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from nanochat.errors import UserError

RETRIED_STATUS = (408, 416, 425, 429, 500, 502, 503, 504)
MAX_WAIT_SECONDS = 60.0
MIN_BYTES_PER_SECOND = 1000  # slower than this over a stall period, and the connection is opened anew


class _Mismatch(OSError):
    """The whole file arrived and has another hash."""


class Stopped(Exception):
    """The caller asked to stop; what has arrived is kept for the next call."""


def fetch_url(
    url: str, dest: Path, sha256: str | None = None, *, git_blob: str | None = None,
    headers: dict[str, str] | None = None, on_bytes: Callable[[int], None] | None = None,
    stop: threading.Event | None = None, num_tries: int = 6, wait_seconds: float = 1.0,
    stall_seconds: float = 30.0, total_seconds: float = 7200.0,
) -> Path:  # fmt: skip
    """Download `url` to `dest` and return it: .part file, resumed by Range and If-Range, hash, fsync, rename.

    Retries with jitter and Retry-After. Without `sha256` or `git_blob` (git's hash of a file) the answer must
    say how long it is. `headers` go to the host of `url` only, also when it redirects. on_bytes gets the
    number of bytes that arrived, negative when they are thrown away. UserError after num_tries failures,
    total_seconds, a second wrong hash, or an answer that no retry can change; Stopped once `stop` is set.
    """
    dest.parent.mkdir(parents=True, exist_ok=True)
    part = dest.with_name(dest.name + ".part")
    deadline = time.monotonic() + total_seconds
    mismatches, stop = 0, stop or threading.Event()
    transfer = _Transfer(url, part, headers or {}, on_bytes or (lambda _: None), stop)
    with locked(part):
        if part.exists() and (sha256 or git_blob) and agrees(part, sha256, git_blob):
            transfer.report(part.stat().st_size)  # a process was stopped before it could publish
            transfer.publish(dest)
            return dest
        for attempt in range(num_tries):
            wait = min(MAX_WAIT_SECONDS, wait_seconds * 2**attempt) * random.uniform(0.5, 1.0)
            try:
                transfer.run(sha256 is not None or git_blob is not None, stall_seconds, deadline)
                if not agrees(part, sha256, git_blob):
                    transfer.forget()
                    raise _Mismatch(f"the file does not have the hash {(sha256 or git_blob or '')[:12]}...")
                transfer.publish(dest)
                return dest
            except urllib.error.HTTPError as error:
                error.close()
                if error.code not in RETRIED_STATUS:
                    raise UserError(
                        f"{url} answered {error.code} {error.reason}", "check the address"
                    ) from error
                if error.code == 416:  # our part is longer than the file: it belongs to another version
                    transfer.forget()
                wait = retry_after(error.headers.get("Retry-After", ""), wait)
                last: Exception = error
            except (OSError, http.client.HTTPException) as error:
                mismatches += isinstance(error, _Mismatch)
                last = error
            if mismatches == 2 or attempt == num_tries - 1 or time.monotonic() + wait > deadline:
                break
            if stop.wait(wait):
                raise Stopped
    raise UserError(f"{url} could not be fetched: {last}", "run the same command again; what arrived is kept")


class _Transfer:
    """Tries at one .part file; it knows how many bytes of it have been reported."""

    def __init__(
        self, url: str, part: Path, headers: dict[str, str], on_bytes: Callable[[int], None], stop: Any
    ) -> None:
        self.url, self.part, self.headers, self.on_bytes, self.stop = url, part, headers, on_bytes, stop
        self.etag_file = part.with_name(part.name + ".etag")
        self.reported = 0

    def report(self, have: int) -> None:
        self.on_bytes(have - self.reported)
        self.reported = have

    def publish(self, dest: Path) -> None:
        publish(self.part, dest)
        self.etag_file.unlink(missing_ok=True)  # last: a part without it would be fetched from its beginning

    def forget(self) -> None:
        """Throw away what arrived."""
        self.part.unlink(missing_ok=True)
        self.report(0)

    def run(self, knows_hash: bool, stall_seconds: float, deadline: float) -> None:
        """Complete the part or raise OSError or HTTPException; what may be right stays for the next try."""
        part, etag_file, url = self.part, self.etag_file, self.url
        have = part.stat().st_size if part.exists() and etag_file.exists() else 0
        sent = {"Accept-Encoding": "identity", "User-Agent": "nanochat"}
        request = urllib.request.Request(url, headers=self.headers | sent)
        if have:
            request.add_header("Range", f"bytes={have}-")
            request.add_header("If-Range", etag_file.read_text())
        opener = urllib.request.build_opener(_Redirects)
        with opener.open(request, timeout=stall_seconds) as response:
            headers = response.headers
            if headers.get("Content-Encoding", "identity") != "identity":
                raise OSError(f"the server sent Content-Encoding {headers['Content-Encoding']} unasked")
            length = headers.get("Content-Length")
            if response.status == 206:
                found = re.fullmatch(r"bytes (\d+)-\d+/(?:\d+|\*)", headers.get("Content-Range", ""))
                if not found or int(found[1]) != have:
                    self.forget()
                    raise OSError(f"asked for bytes from {have}, got {headers.get('Content-Range')!r}")
            else:
                have = 0
                etag_file.unlink(missing_ok=True)
                part.write_bytes(b"")
                if headers.get("ETag", "").startswith('"'):  # a weak one (W/) is no promise about bytes
                    etag_file.write_text(headers["ETag"])
            self.report(have)
            end = have + int(length) if length and length.isdigit() else None
            if end is None and not response.chunked and not knows_hash:
                raise UserError(
                    f"{url} does not say how long it is and its hash is not known", "fetch it by hand"
                )
            with part.open("ab") as file:
                window, in_window = time.monotonic(), 0
                while block := response.read1(1 << 16):
                    file.write(block)
                    have += len(block)
                    in_window += len(block)
                    self.report(have)
                    if self.stop.is_set():
                        raise Stopped
                    now = time.monotonic()
                    if now > deadline:
                        raise OSError("the total time limit has passed")
                    if now - window > stall_seconds:
                        if in_window < MIN_BYTES_PER_SECOND * stall_seconds:
                            raise OSError(f"stalled: {in_window} bytes in {stall_seconds:.0f} s")
                        window, in_window = now, 0
            if end is not None and have != end:
                raise OSError(f"cut at {have} of {end} bytes")


class _Redirects(urllib.request.HTTPRedirectHandler):
    """Follows redirects; a token goes to the host it was meant for and no further."""

    def redirect_request(self, req: Any, fp: Any, code: int, msg: str, headers: Any, newurl: str) -> Any:
        new = super().redirect_request(req, fp, code, msg, headers, newurl)
        if new is not None and urlsplit(newurl)[:2] != urlsplit(req.full_url)[:2]:
            new.remove_header("Authorization")
        return new


def retry_after(value: str, otherwise: float) -> float:
    """The seconds a Retry-After header asks for, as a number or as a date; MAX_WAIT_SECONDS at most."""
    if value.isdigit():
        return min(MAX_WAIT_SECONDS, float(value))
    with contextlib.suppress(TypeError, ValueError):
        date = email.utils.parsedate_to_datetime(value).timestamp()
        return min(MAX_WAIT_SECONDS, max(0.0, date - time.time()))
    return otherwise


def agrees(path: Path, sha256: str | None, git_blob: str | None = None) -> bool:
    """Whether a file has the hash that is known of it; true when none is."""
    if sha256:
        return hash_file(path) == sha256
    if git_blob:
        digest = hashlib.sha1(b"blob %d\0" % path.stat().st_size)
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
        return digest.hexdigest() == git_blob
    return True


def hash_file(path: Path) -> str:
    """sha256 in hex."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def locked(path: Path) -> Any:
    """A context in which no other thread or process works on `path`."""
    from filelock import FileLock

    return FileLock(path.with_name(f".{path.name}.lock"))


def publish(temporary: Path, path: Path) -> None:
    """Give a complete file its final name: fsync, rename."""
    with temporary.open("rb+") as file:
        os.fsync(file.fileno())
    temporary.replace(path)
