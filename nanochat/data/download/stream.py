"""Shards of the hub while they arrive: training starts with the first, the next are fetched ahead in threads.

With a bound on disk, shards that have been used are deleted to make room for the next; their hashes stay in
the manifest and are enforced when they are fetched again.
"""

from __future__ import annotations

import sys
import threading
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, wait
from typing import Any

from nanochat.data.download import hub
from nanochat.data.download.manifest import Entry, Repo, is_here, read_manifest
from nanochat.data.files import FilePart, Turn
from nanochat.data.formats import parquet_chunks
from nanochat.errors import UserError

NUM_AHEAD = 4
TOLD_SECONDS = 5.0  # waiting longer than this is told
LEAST_SHARDS = 3  # within a bound: the one in use, the one before (another process may be behind), the next


class ShardStream:
    """Training files in the order in which they are asked for; keep_bytes bounds them on disk."""

    def __init__(self, repo: Repo, entries: list[Entry], keep_bytes: int | None = None) -> None:
        self.repo, self.num, self.keep_bytes = repo, len(entries), keep_bytes
        self._names = [entry["name"] for entry in entries]
        self._repaired: set[str] = set()
        self._walks: set[threading.Event] = set()
        self._check_bound(max((entry["size"] or 0 for entry in entries), default=0))

    def iterate(self, turns: Iterator[Turn]) -> Iterator[tuple[Turn, list[FilePart]]]:
        stop = threading.Event()
        self._walks.add(stop)
        ahead: deque[tuple[Turn, Future[Any]]] = deque()
        used: list[str] = []
        waiting = next(turns, None)
        try:
            while ahead or waiting is not None:
                while waiting is not None and len(ahead) <= NUM_AHEAD:
                    name = self._names[waiting[2]]
                    fits = self._make_room(name, used, [self._names[t[2]] for t, _ in ahead])
                    if ahead and not fits:
                        break
                    ahead.append((waiting, self._start(name, stop)))
                    waiting = next(turns, None)
                turn, job = ahead.popleft()
                name = self._names[turn[2]]
                if not wait([job], TOLD_SECONDS).done:
                    print(f"waiting for {name} of {self.repo.name} to arrive", file=sys.stderr, flush=True)
                job.result()
                if name in used:
                    used.remove(name)
                used.append(name)
                yield turn, self._chunks(name)
        finally:
            stop.set()
            self._walks.discard(stop)

    def close(self) -> None:
        """End all iterations: who waits for a shard gets Stopped, what has arrived of it stays."""
        for stop in tuple(self._walks):
            stop.set()

    def _start(self, name: str, stop: threading.Event) -> Future[Any]:
        """Fetch in a thread of its own; a daemon, so that no download keeps a finished program alive."""
        job: Future[Any] = Future()

        def run() -> None:
            try:
                job.set_result(hub.fetch_one(self.repo, name, stop))
            except BaseException as error:  # it belongs to who waits
                job.set_exception(error)

        threading.Thread(target=run, name="shards", daemon=True).start()
        return job

    def _chunks(self, name: str) -> list[FilePart]:
        path = self.repo.directory / name
        while True:
            try:
                return parquet_chunks(path)[0]
            except UserError:
                if path.exists():
                    raise
                hub.fetch_one(self.repo, name)  # another process has just evicted it

    def repair(self, chunk: FilePart) -> bool:
        """Fetch a damaged shard once more; False where that has been tried, or nothing may be fetched."""
        name = chunk.path.relative_to(self.repo.directory).as_posix()
        if not chunk.path.exists():  # evicted by another process
            hub.fetch_one(self.repo, name)
            return True
        if name in self._repaired or (self.repo.offline and not self.repo.mirror_dir):
            return False
        self._repaired.add(name)
        hub.quarantine(self.repo, name)
        hub.fetch_one(self.repo, name)
        return True

    def _make_room(self, name: str, used: list[str], ahead: list[str]) -> bool:
        """Whether `name` fits on disk beside what is ahead; deletes what is behind, the oldest first."""
        if self.keep_bytes is None:
            return True
        entries = {entry["name"]: entry for entry in read_manifest(self.repo.directory)["shards"]}
        largest = max(entry["size"] or 0 for entry in entries.values())
        self._check_bound(largest)

        def size(one: str) -> int:
            return int(entries[one]["size"] or largest)

        mine = set(self._names)
        here = {one for one in mine if is_here(self.repo, entries[one])}
        needed = sum(size(one) for one in here | {*ahead, name})
        keep = {*ahead, *used[-1:], name}
        old = [one for one in used if one in here - keep]
        old += [one for one in self._names if one in here - keep and one not in used]
        for one in old:
            if needed <= self.keep_bytes:
                break
            hub.evict(self.repo, one)
            needed -= size(one)
        return needed <= self.keep_bytes

    def _check_bound(self, largest: int) -> None:
        if self.keep_bytes is not None and self.keep_bytes < LEAST_SHARDS * largest:
            problem = (
                f"{self.keep_bytes / 1e9:.3g} GB do not hold {LEAST_SHARDS} shards of {largest / 1e9:.3g} GB"
            )
            raise UserError(problem, "raise --disk-gb")
