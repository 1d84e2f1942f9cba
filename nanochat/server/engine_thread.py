"""The engine's threads: requests of many people in one batch, their tokens handed to the event loop.

The event loop never waits for a model: each step's tokens arrive there in one call. A request is cancelled by
giving its sequences a finish_reason; their rows are free one step later. A Fleet is several workers, one
per GPU.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import threading
import time
from collections import deque
from itertools import islice
from typing import Any

import torch

from nanochat.engine.engine import Engine, Sequence

News = tuple["Job", int, list[int]]  # a job, the index of its sequence, its new tokens (none: it has ended)


class Busy(Exception):
    """The queue is full; retry_after is a guess in seconds."""

    def __init__(self, retry_after: int) -> None:
        super().__init__(retry_after)
        self.retry_after = retry_after


class Job:
    """One request: its sequences, and news of them: (index, new tokens; none at the end of that one).

    What waits is bounded by the sequences' own limits. `error` is (status, message) if it ended early.
    put and get are for the event loop alone.
    """

    def __init__(self, sequences: list[Sequence]) -> None:
        self.sequences = sequences
        self._news: deque[tuple[int, list[int]]] = deque()
        self._waiter: asyncio.Future[None] | None = None
        self.error: tuple[int, str] | None = None
        self.loop = asyncio.get_running_loop()
        self.since = time.monotonic()
        self.num_left = len(sequences)

    def put(self, index: int, tokens: list[int]) -> None:
        self._news.append((index, tokens))
        self._wake()

    async def get(self, seconds: float) -> tuple[int, list[int]]:
        """The oldest news. Raises asyncio.TimeoutError when none come; unlike wait_for it makes no task."""
        if not self._news:
            self._waiter = self.loop.create_future()
            alarm = self.loop.call_later(seconds, self._wake)
            try:
                await self._waiter
            finally:
                alarm.cancel()
                self._waiter = None
            if not self._news:
                raise asyncio.TimeoutError
        return self._news.popleft()

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def cancel(self) -> None:
        """Give the rows back; nothing happens to sequences that have ended."""
        for sequence in self.sequences:
            sequence.finish_reason = sequence.finish_reason or "abort"

    @property
    def is_over(self) -> bool:
        return all(sequence.finish_reason is not None for sequence in self.sequences)


class Worker:
    """Runs up to num_rows sequences of one engine at once and lets max_waiting requests wait."""

    def __init__(
        self, engine: Engine, num_rows: int, max_waiting: int, max_wait_seconds: float = 60.0
    ) -> None:
        self.engine, self._num_rows, self._max_waiting = engine, num_rows, max_waiting
        self._max_wait_seconds = max_wait_seconds
        self._waiting: deque[tuple[Job, int]] = deque()
        self._running: dict[int, tuple[Job, int, int]] = {}  # id of a sequence -> job, index, tokens told
        self._wake = threading.Condition()
        self._is_stopping = False
        self.batch: Any = None
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """End the thread after the current step; unfinished requests end with an error."""
        with self._wake:
            self._is_stopping = True
            self._wake.notify()
        if self._thread.is_alive():
            self._thread.join()

    @property
    def is_alive(self) -> bool:
        return self._thread.is_alive() and not self._is_stopping

    @property
    def num_running(self) -> int:
        return len(self._running)

    @property
    def num_waiting(self) -> int:
        """Requests none of whose rows has been admitted."""
        with self._wake:
            return len({id(job) for job, index in self._waiting if index == 0 and not job.is_over})

    def submit(self, job: Job) -> None:
        """Queue a request. Raises Busy when too many wait already, or when the engine is stopping."""
        with self._wake:
            if seconds := self._full_for():
                raise Busy(seconds)
            self._waiting.extend((job, index) for index in range(len(job.sequences)))
            self._wake.notify()

    def full_for(self) -> int:
        """0 while requests are taken, else a guess how many seconds it will take until they are."""
        with self._wake:
            return self._full_for()

    def _full_for(self) -> int:
        num_free = self._num_rows - len(self._running)
        if len(self._waiting) < num_free and not self._is_stopping:
            return 0
        queued = islice(self._waiting, max(0, num_free), None)  # the others are about to enter
        num_queued = sum(index == 0 and not job.is_over for job, index in queued)
        is_full = num_queued >= self._max_waiting or self._is_stopping
        return 1 + 2 * math.ceil(num_queued / self._num_rows) if is_full else 0

    def _run(self) -> None:
        device = self.engine.model.get_device()
        with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
            self._serve()

    def _serve(self) -> None:
        self.batch = self._new_batch()
        while True:
            with self._wake:
                while not (self._waiting or self._running or self._is_stopping):
                    self._wake.wait()
                if self._is_stopping:
                    break
                joining = self._joining()
            try:
                self._step(joining)
            except (
                Exception
            ) as error:  # one bad step must not silence the server: tell everybody, start afresh
                self._end_all((500, f"the engine failed: {type(error).__name__}"))
                self.batch = self._new_batch()
        with self._wake:
            self._running |= {id(job.sequences[i]): (job, i, 0) for job, i in self._waiting}
            self._waiting.clear()
        self._end_all((503, "the server is stopping"))

    def _new_batch(self) -> Any:
        how = {"in_bursts": True} if self.engine.speculate else {}
        return self.engine.open_batch(self._num_rows, self.engine.context, **how)

    def _joining(self) -> list[tuple[Job, int]]:
        """Those who enter now, in the order of their arrival; who has waited too long is sent away."""
        late = time.monotonic() - self._max_wait_seconds
        news: list[News] = []
        for job, index in list(self._waiting):
            if job.since < late and index == 0 and not job.is_over:
                job.error = (503, "the request has waited too long")
                job.cancel()
        for job, index in [entry for entry in self._waiting if entry[0].is_over]:
            self._waiting.remove((job, index))
            news.append((job, index, []))
        self._tell(news)
        room = min(self.batch.room, len(self._waiting))
        return [self._waiting.popleft() for _ in range(room)]

    def _step(self, joining: list[tuple[Job, int]]) -> None:
        for job, index in joining:
            self._running[id(job.sequences[index])] = (job, index, 0)
        fresh = [job.sequences[i] for job, i in joining if job.sequences[i].finish_reason is None]
        if fresh:
            self.batch.admit(fresh)
        if self.batch.rows:
            self.batch.emit()
        news: list[News] = []
        for key, (job, index, told) in list(self._running.items()):
            sequence = job.sequences[index]
            is_over = sequence.finish_reason is not None  # read before the tokens: they cannot come after it
            if new := sequence.output[told:]:
                news.append((job, index, new))
                self._running[key] = (job, index, told + len(new))
            if is_over:
                del self._running[key]
                news.append((job, index, []))
        self._tell(news)
        self.batch.compute()

    def _end_all(self, error: tuple[int, str]) -> None:
        ended = list(self._running.values())
        self._running.clear()
        for job, _, _ in ended:
            job.error = job.error or error
            job.cancel()
        self._tell([(job, index, []) for job, index, _ in ended])

    def _tell(self, news: list[News]) -> None:
        by_loop: dict[asyncio.AbstractEventLoop, list[News]] = {}
        for item in news:
            by_loop.setdefault(item[0].loop, []).append(item)
        for loop, items in by_loop.items():
            with contextlib.suppress(RuntimeError):  # the loop has closed: nobody is waiting there
                loop.call_soon_threadsafe(_deliver, items)


def _deliver(items: list[News]) -> None:
    for job, index, tokens in items:
        job.put(index, tokens)


class Fleet:
    """One worker per engine. All engines hold the same model; a request goes to the least busy one."""

    def __init__(
        self, engines: list[Engine], num_rows: int, max_waiting: int, max_wait_seconds: float = 60.0
    ) -> None:
        each = max(1, max_waiting // len(engines))
        self.workers = [Worker(engine, num_rows, each, max_wait_seconds) for engine in engines]
        self.engine = engines[0]

    def start(self) -> None:
        for worker in self.workers:
            worker.start()

    def stop(self) -> None:
        for worker in self.workers:
            worker.stop()

    @property
    def is_alive(self) -> bool:
        return all(worker.is_alive for worker in self.workers)

    @property
    def num_running(self) -> int:
        return sum(worker.num_running for worker in self.workers)

    @property
    def num_waiting(self) -> int:
        return sum(worker.num_waiting for worker in self.workers)

    def full_for(self) -> int:
        """0 while a worker takes requests, else a guess in seconds."""
        return min(worker.full_for() for worker in self.workers)

    def submit(self, job: Job) -> None:
        """Queue a request with the least busy worker; among equals, who shares a beginning stays together."""
        start = hash(tuple(job.sequences[0].prompt[:64])) % len(self.workers)
        turned = self.workers[start:] + self.workers[:start]
        min(turned, key=lambda worker: worker.num_running + worker.num_waiting).submit(job)
