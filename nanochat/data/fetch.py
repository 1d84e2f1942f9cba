"""One plain URL to one file: resumable, and never a wrong byte under the final name. Standard library."""

from __future__ import annotations

import hashlib
import http.client
import os
import random
import re
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

from nanochat.errors import UserError

RETRIED_STATUS = (408, 416, 425, 429, 500, 502, 503, 504)
MAX_WAIT_SECONDS = 60.0
MIN_BYTES_PER_SECOND = 1000  # slower than this over a stall period, and the connection is opened anew


class _Mismatch(OSError):
    """The whole file arrived and has another hash."""


def fetch_url(
    url: str, dest: Path, sha256: str | None = None, *, num_tries: int = 6, wait_seconds: float = 1.0,
    stall_seconds: float = 30.0, total_seconds: float = 7200.0,
) -> Path:  # fmt: skip
    """Download `url` to `dest` and return it: .part file, resumed by Range and If-Range, hash, fsync, rename.

    Retries with jitter and Retry-After. Without `sha256` the answer must say how long it is. UserError after
    num_tries failures, total_seconds, a second wrong hash, or an answer that no retry can change.
    """
    dest.parent.mkdir(parents=True, exist_ok=True)
    part = dest.with_name(dest.name + ".part")
    deadline = time.monotonic() + total_seconds
    mismatches = 0
    with locked(part):
        for attempt in range(num_tries):
            wait = min(MAX_WAIT_SECONDS, wait_seconds * 2**attempt) * random.uniform(0.5, 1.0)
            try:
                _transfer(url, part, sha256 is not None, stall_seconds, deadline)
                if sha256 is not None and hash_file(part) != sha256:
                    part.unlink()
                    raise _Mismatch(f"the file does not have the sha256 {sha256[:12]}...")
                publish(part, dest)
                return dest
            except urllib.error.HTTPError as error:
                error.close()
                if error.code not in RETRIED_STATUS:
                    raise UserError(
                        f"{url} answered {error.code} {error.reason}", "check the address"
                    ) from error
                if error.code == 416:  # our part is longer than the file: it belongs to another version
                    part.unlink(missing_ok=True)
                asked = error.headers.get("Retry-After", "")
                wait = min(MAX_WAIT_SECONDS, float(asked)) if asked.isdigit() else wait
                last: Exception = error
            except (OSError, http.client.HTTPException) as error:
                mismatches += isinstance(error, _Mismatch)
                last = error
            if mismatches == 2 or attempt == num_tries - 1 or time.monotonic() + wait > deadline:
                break
            time.sleep(wait)
    raise UserError(f"{url} could not be fetched: {last}", "run the same command again; what arrived is kept")


def _transfer(url: str, part: Path, knows_hash: bool, stall_seconds: float, deadline: float) -> None:
    """Complete `part` or raise OSError or HTTPException; bytes that may be right stay for the next try."""
    etag_file = part.with_name(part.name + ".etag")
    have = part.stat().st_size if part.exists() and etag_file.exists() else 0
    request = urllib.request.Request(url, headers={"Accept-Encoding": "identity", "User-Agent": "nanochat"})
    if have:
        request.add_header("Range", f"bytes={have}-")
        request.add_header("If-Range", etag_file.read_text())
    with urllib.request.urlopen(request, timeout=stall_seconds) as response:
        headers = response.headers
        if headers.get("Content-Encoding", "identity") != "identity":
            raise OSError(f"the server sent Content-Encoding {headers['Content-Encoding']} unasked")
        length = headers.get("Content-Length")
        if response.status == 206:
            found = re.fullmatch(r"bytes (\d+)-\d+/(?:\d+|\*)", headers.get("Content-Range", ""))
            if not found or int(found[1]) != have:
                part.unlink()
                raise OSError(f"asked for bytes from {have}, got {headers.get('Content-Range')!r}")
        else:
            have = 0
            etag_file.unlink(missing_ok=True)
            part.write_bytes(b"")
            if headers.get("ETag", "").startswith('"'):  # a weak one (W/) is no promise about bytes
                etag_file.write_text(headers["ETag"])
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
                now = time.monotonic()
                if now > deadline:
                    raise OSError("the total time limit has passed")
                if now - window > stall_seconds:
                    if in_window < MIN_BYTES_PER_SECOND * stall_seconds:
                        raise OSError(f"stalled: {in_window} bytes in {stall_seconds:.0f} s")
                    window, in_window = now, 0
        if end is not None and have != end:
            raise OSError(f"cut at {have} of {end} bytes")
    etag_file.unlink(missing_ok=True)


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
