"""The engine's threads: the requests of many people in one batch.

The event loop never waits for a model: all tokens of a step reach it in one call. A request is cancelled by
giving its sequences a finish_reason; their rows are free one step later. An EngineGroup is several threads,
one per GPU.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import threading
import time
from collections import deque
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch

from nanochat.engine.engine import Engine, Sequence


class QueueFull(Exception):
    """No more requests can wait; retry_after is a guess in seconds."""

    def __init__(self, retry_after: int) -> None:
        super().__init__(retry_after)
        self.retry_after = retry_after


@dataclass(frozen=True)
class NewTokens:
    """New tokens of one sequence of a request; no tokens: the sequence has ended."""

    index: int
    tokens: list[int]

    @property
    def is_end(self) -> bool:
        return not self.tokens


class EngineRequest:
    """The sequences of one HTTP request, and the queue through which their tokens reach the event loop.

    Call it from the event loop, except `fail` and `cancel`, which any thread may call. The queue is bounded
    by the sequences' own limits. `error` is (status, message) if the request ended early.
    """

    def __init__(self, sequences: list[Sequence]) -> None:
        self.sequences = sequences
        self.error: tuple[int, str] | None = None
        self.queued_at = time.monotonic()
        self.loop = asyncio.get_running_loop()
        self._arrived: deque[NewTokens] = deque()
        self._waiter: asyncio.Future[None] | None = None

    def put(self, new: NewTokens) -> None:
        self._arrived.append(new)
        self._wake()

    async def get(self, seconds: float) -> NewTokens:
        """The oldest tokens that were not taken. Raises asyncio.TimeoutError if none come in time."""
        if not self._arrived:
            # asyncio.wait_for would make a task for every token.
            self._waiter = self.loop.create_future()
            alarm = self.loop.call_later(seconds, self._wake)
            try:
                await self._waiter
            finally:
                alarm.cancel()
                self._waiter = None
            if not self._arrived:
                raise asyncio.TimeoutError
        return self._arrived.popleft()

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def cancel(self) -> None:
        """Give the rows back; sequences that have ended stay as they are."""
        for sequence in self.sequences:
            sequence.finish_reason = sequence.finish_reason or "abort"

    def fail(self, status: int, message: str) -> None:
        """End the request with an error, unless it has one."""
        self.error = self.error or (status, message)
        self.cancel()

    @property
    def is_over(self) -> bool:
        return all(sequence.finish_reason is not None for sequence in self.sequences)


@dataclass
class QueuedSequence:
    """One sequence of a request, waiting or running. num_sent: tokens that the event loop has been told."""

    request: EngineRequest
    index: int
    num_sent: int = 0

    @property
    def sequence(self) -> Sequence:
        return self.request.sequences[self.index]

    @property
    def is_first(self) -> bool:
        """Each request is counted once, by its first sequence."""
        return self.index == 0


class EngineThread:
    """Runs up to num_rows sequences of one engine at once; up to max_waiting requests may wait."""

    def __init__(
        self, engine: Engine, num_rows: int, max_waiting: int, max_wait_seconds: float = 60.0
    ) -> None:
        self.engine = engine
        self.batch: Any = None
        self._num_rows = num_rows
        self._max_waiting = max_waiting
        self._max_wait_seconds = max_wait_seconds
        self._queue: deque[QueuedSequence] = deque()
        self._running: list[QueuedSequence] = []
        self._changed = threading.Condition()
        self._is_stopping = False
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """End the thread after the current step; unfinished requests end with an error."""
        with self._changed:
            self._is_stopping = True
            self._changed.notify()
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
        """Requests none of whose sequences runs."""
        with self._changed:
            return sum(entry.is_first and not entry.request.is_over for entry in self._queue)

    def submit(self, request: EngineRequest) -> None:
        """Queue a request. Raises QueueFull if too many wait already, and when the engine is stopping."""
        with self._changed:
            if seconds := self._seconds_until_free():
                raise QueueFull(seconds)
            self._queue.extend(QueuedSequence(request, index) for index in range(len(request.sequences)))
            self._changed.notify()

    def seconds_until_free(self) -> int:
        """0 while requests are accepted, else a guess how many seconds it will take."""
        with self._changed:
            return self._seconds_until_free()

    def _seconds_until_free(self) -> int:
        num_free_rows = self._num_rows - len(self._running)
        if len(self._queue) < num_free_rows and not self._is_stopping:
            return 0
        # The sequences that fit into free rows are admitted in the next step and do not count as waiting.
        waiting = islice(self._queue, max(0, num_free_rows), None)
        num_waiting = sum(entry.is_first and not entry.request.is_over for entry in waiting)
        is_full = num_waiting >= self._max_waiting or self._is_stopping
        return 1 + 2 * math.ceil(num_waiting / self._num_rows) if is_full else 0

    # ---------------------------------------------------------------- the thread

    def _run(self) -> None:
        device = self.engine.model.get_device()
        with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
            self._serve()

    def _serve(self) -> None:
        self.batch = self._new_batch()
        while True:
            with self._changed:
                while not (self._queue or self._running or self._is_stopping):
                    self._changed.wait()
                if self._is_stopping:
                    break
                admitted = self._admit()
            try:
                self._step(admitted)
            except Exception as error:
                # One failed step must not end the server: fail the requests and start with a fresh batch.
                self._fail_running(500, f"the engine failed: {type(error).__name__}")
                self.batch = self._new_batch()
        with self._changed:
            self._running.extend(self._queue)
            self._queue.clear()
        self._fail_running(503, "the server is stopping")

    def _new_batch(self) -> Any:
        options = {"in_bursts": True} if self.engine.speculate else {}
        return self.engine.open_batch(self._num_rows, self.engine.context, **options)

    def _admit(self) -> list[QueuedSequence]:
        """Remove from the queue, first come first served, the sequences that fit into the running batch."""
        self._fail_expired_requests()
        self._drop_finished_requests()
        num_admitted = min(self.batch.num_free_rows, len(self._queue))
        return [self._queue.popleft() for _ in range(num_admitted)]

    def _fail_expired_requests(self) -> None:
        """Answer 503 to requests that were queued longer than max_wait_seconds and have not started."""
        deadline = time.monotonic() - self._max_wait_seconds
        for entry in self._queue:
            request = entry.request
            if entry.is_first and request.queued_at < deadline and not request.is_over:
                request.fail(503, "the request has waited too long")

    def _drop_finished_requests(self) -> None:
        """Take requests that have ended while they waited out of the queue, and tell the event loop."""
        finished = [entry for entry in self._queue if entry.request.is_over]
        for entry in finished:
            self._queue.remove(entry)
        self._send([(entry, NewTokens(entry.index, [])) for entry in finished])

    def _step(self, admitted: list[QueuedSequence]) -> None:
        """Give every row a token, send the new tokens, compute what the next tokens need."""
        self._running.extend(admitted)
        fresh = [entry.sequence for entry in admitted if entry.sequence.finish_reason is None]
        if fresh:
            self.batch.admit(fresh)
        if self.batch.rows:
            self.batch.emit()
        news: list[tuple[QueuedSequence, NewTokens]] = []
        still_running = []
        for entry in self._running:
            # Read before the tokens: no token can come after the end.
            has_ended = entry.sequence.finish_reason is not None
            tokens = entry.sequence.output[entry.num_sent :]
            if tokens:
                entry.num_sent += len(tokens)
                news.append((entry, NewTokens(entry.index, tokens)))
            if has_ended:
                news.append((entry, NewTokens(entry.index, [])))
            else:
                still_running.append(entry)
        self._running = still_running
        self._send(news)
        self.batch.compute()

    def _fail_running(self, status: int, message: str) -> None:
        ended, self._running = self._running, []
        for entry in ended:
            entry.request.fail(status, message)
        self._send([(entry, NewTokens(entry.index, [])) for entry in ended])

    def _send(self, news: list[tuple[QueuedSequence, NewTokens]]) -> None:
        """Hand tokens to the event loop of each request, in one call for each loop."""
        by_loop: dict[asyncio.AbstractEventLoop, list[tuple[QueuedSequence, NewTokens]]] = {}
        for entry, new in news:
            by_loop.setdefault(entry.request.loop, []).append((entry, new))
        for loop, items in by_loop.items():
            # A loop that has closed: nobody is waiting there.
            with contextlib.suppress(RuntimeError):
                loop.call_soon_threadsafe(_deliver, items)


def _deliver(items: list[tuple[QueuedSequence, NewTokens]]) -> None:
    for entry, new in items:
        entry.request.put(new)


class EngineGroup:
    """One thread per engine. All engines hold the same model; a request goes to the least busy one."""

    def __init__(
        self, engines: list[Engine], num_rows: int, max_waiting: int, max_wait_seconds: float = 60.0
    ) -> None:
        max_waiting_each = max(1, max_waiting // len(engines))
        self.threads = [
            EngineThread(engine, num_rows, max_waiting_each, max_wait_seconds) for engine in engines
        ]
        self.engine = engines[0]

    def start(self) -> None:
        for thread in self.threads:
            thread.start()

    def stop(self) -> None:
        for thread in self.threads:
            thread.stop()

    @property
    def is_alive(self) -> bool:
        return all(thread.is_alive for thread in self.threads)

    @property
    def num_running(self) -> int:
        return sum(thread.num_running for thread in self.threads)

    @property
    def num_waiting(self) -> int:
        return sum(thread.num_waiting for thread in self.threads)

    def seconds_until_free(self) -> int:
        """0 while a thread accepts requests, else a guess in seconds."""
        return min(thread.seconds_until_free() for thread in self.threads)

    def submit(self, request: EngineRequest) -> None:
        """Queue a request with the least busy thread; among equals, equal beginnings stay together."""
        first = hash(tuple(request.sequences[0].prompt[:64])) % len(self.threads)
        rotated = self.threads[first:] + self.threads[:first]
        min(rotated, key=lambda thread: thread.num_running + thread.num_waiting).submit(request)
