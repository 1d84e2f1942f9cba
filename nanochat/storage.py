"""Files that survive a kill or a power cut: written, hashed, synced, renamed, deleted; and sealed JSON.

Standard library only. Every system call that changes the disk is made here, through `os`, so that the fault
tests can fail or kill each one in turn. What a checkpoint is, and when it counts: checkpoint.py.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import stat
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

CHUNK_BYTES = 1 << 22


class Damaged(Exception):
    """A file's bytes are not what was written: `Damaged(path, what)`."""

    def __str__(self) -> str:
        return "{}: {}".format(*self.args)


def write_file(path: Path, data: bytes) -> dict[str, Any]:
    """Write a new file and sync it; its size and sha256. A failed sync is final, never tried again."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    try:
        rest = memoryview(data)
        while len(rest):
            rest = rest[os.write(descriptor, rest[:CHUNK_BYTES]) :]  # a write may be short
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    return {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}


def sync_dir(path: Path) -> None:
    """Make the names inside a directory durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def make_dirs(path: Path) -> None:
    """Like mkdir -p, every new name synced."""
    if not path.is_dir():
        make_dirs(path.parent)
        try:
            os.mkdir(path)
        except FileExistsError:
            if not path.is_dir():
                raise
        sync_dir(path.parent)


def rename(old: Path, new: Path) -> None:
    """Rename inside one directory, durably."""
    os.rename(old, new)
    sync_dir(new.parent)


def replace_file(path: Path, data: bytes) -> None:
    """Give `path` new content in one step: temporary name, sync, rename, sync of the directory."""
    temporary = path.with_name(f"tmp-{path.name}-{os.getpid()}-{time.monotonic_ns()}")
    try:
        write_file(temporary, data)
        rename(temporary, path)
    except OSError:
        remove(temporary)
        raise


def remove(path: Path) -> None:
    """Delete a file or a directory with what is in it; what is already gone is fine."""
    try:
        if path.is_dir() and not path.is_symlink():
            for entry in list(path.iterdir()):
                remove(entry)
            os.rmdir(path)
        else:
            os.unlink(path)
    except FileNotFoundError:
        return


@contextmanager
def lock(path: Path, wait_seconds: float = 0.0) -> Iterator[bool]:
    """Hold an exclusive lock file; yields whether it was got in time. A killed holder frees it at once."""
    import fcntl

    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    deadline, held = time.monotonic() + wait_seconds, False
    try:
        while not held:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                held = True
            except BlockingIOError:
                if time.monotonic() >= deadline:
                    break
                time.sleep(0.02)
        yield held
    finally:
        os.close(descriptor)


def require_space(directory: Path, num_bytes: int) -> None:
    """OSError ENOSPC unless the disk under `directory` has `num_bytes` free."""
    disk = os.statvfs(directory)
    free = disk.f_bavail * disk.f_frsize
    if free < num_bytes:
        what = f"{num_bytes / 1e6:.0f} MB must be free, found {free / 1e6:.0f} MB"
        raise OSError(errno.ENOSPC, what, str(directory))


@contextmanager
def _reading(path: Path) -> Iterator[Any]:
    """An open regular file; Damaged when there is none. Other errors of the disk stay OSError."""
    try:
        if not stat.S_ISREG(path.lstat().st_mode):
            raise Damaged(path, "is not a regular file")
        file = open(path, "rb")
    except (FileNotFoundError, NotADirectoryError) as error:
        raise Damaged(path, "is missing") from error
    with file:
        yield file


def read_bytes(path: Path) -> bytes:
    """A file's bytes; Damaged when there is no such file."""
    with _reading(path) as file:
        return file.read()


def verify_file(path: Path, record: Mapping[str, Any]) -> None:
    """Damaged unless the file has the recorded size and sha256."""
    digest = hashlib.sha256()
    with _reading(path) as file:
        size = os.fstat(file.fileno()).st_size
        if size != record["size"]:
            raise Damaged(path, f"must hold {record['size']} bytes, found {size}")
        while chunk := file.read(CHUNK_BYTES):
            digest.update(chunk)
    if digest.hexdigest() != record["sha256"]:
        raise Damaged(path, "its sha256 is not the recorded one")


def strict_json(value: Any) -> bytes:
    """Canonical JSON: the same value gives the same bytes. ValueError on NaN, TypeError on other types."""
    return json.dumps(value, sort_keys=True, allow_nan=False, separators=(",", ":")).encode()


def sealed(body: dict[str, Any]) -> bytes:
    """`body` as JSON that carries the sha256 of itself."""
    return strict_json({**body, "body_sha256": hashlib.sha256(strict_json(body)).hexdigest()})


def read_sealed(path: Path) -> dict[str, Any]:
    """The body written by `sealed`; Damaged when a byte of it has changed or the file is gone."""
    data = read_bytes(path)
    try:
        body = json.loads(data)
        del body["body_sha256"]
        intact = data == sealed(body)
    except (ValueError, KeyError, TypeError, RecursionError):
        intact = False
    if not intact:
        raise Damaged(path, "is not what was written")
    return body
