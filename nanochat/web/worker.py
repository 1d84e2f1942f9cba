"""The engine's thread: requests of many people in one batch, their tokens handed to the event loop.

The event loop never waits for the model: each step's tokens arrive there in one call. A request is cancelled
by giving its generation a finish_reason; its row is free one step later.
"""

from __future__ import annotations

import asyncio
import threading
from collections import deque

from nanochat.engine.engine import Batch, Engine, Generation


class Busy(Exception):
    """The queue is full."""


class Job:
    """One request in the engine. `tokens` yields its tokens, then None; `error` says why it ended early."""

    def __init__(self, generation: Generation) -> None:
        self.generation = generation
        self.tokens: asyncio.Queue[int | None] = asyncio.Queue()
        self.error: str | None = None
        self.loop = asyncio.get_running_loop()

    def cancel(self) -> None:
        """Give the row back; nothing happens if the generation has ended."""
        self.generation.finish_reason = self.generation.finish_reason or "abort"


class Worker:
    """Runs up to num_rows generations at once and lets max_waiting more wait."""

    def __init__(self, engine: Engine, num_rows: int, max_waiting: int) -> None:
        self.engine, self._num_rows, self._max_waiting = engine, num_rows, max_waiting
        self._waiting: deque[Job] = deque()
        self._jobs: dict[int, Job] = {}  # by the id of their generation, once admitted
        self._wake = threading.Condition()
        self._is_stopping = False
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

    def submit(self, job: Job) -> None:
        """Queue a request. Raises Busy when too many wait already, or when the engine is stopping."""
        with self._wake:
            self._waiting = deque(j for j in self._waiting if j.generation.finish_reason is None)
            num_held = len(self._jobs) + len(self._waiting)
            if num_held >= self._num_rows + self._max_waiting or self._is_stopping:
                raise Busy
            self._waiting.append(job)
            self._wake.notify()

    def _run(self) -> None:
        batch = Batch(self.engine.model, self._num_rows, self.engine.context)
        while True:
            with self._wake:
                while not (self._waiting or batch.rows or self._is_stopping):
                    self._wake.wait()
                joining = [self._waiting.popleft() for _ in range(min(batch.room, len(self._waiting)))]
                self._jobs |= {id(job.generation): job for job in joining}
                is_stopping = self._is_stopping
            try:
                if is_stopping:
                    break
                self._step(batch, [job.generation for job in joining])
            except (
                Exception
            ) as error:  # one bad step must not silence the server: tell everybody, start afresh
                self._end_all(f"the engine failed: {type(error).__name__}")
                batch = Batch(self.engine.model, self._num_rows, self.engine.context)
        with self._wake:
            self._jobs |= {id(job.generation): job for job in self._waiting}
            self._waiting.clear()
        self._end_all("the server is stopping")

    def _step(self, batch: Batch, joining: list[Generation]) -> None:
        joining = [generation for generation in joining if generation.finish_reason is None]
        if joining:
            batch.admit(joining)
        said = [(self._jobs[id(g)], g.output[-1]) for g in batch.emit()] if batch.rows else []
        ended = [job for job in self._jobs.values() if job.generation.finish_reason is not None]
        for job in ended:
            del self._jobs[id(job.generation)]
        self._tell([*said, *((job, None) for job in ended)])
        batch.compute()

    def _end_all(self, reason: str) -> None:
        jobs = list(self._jobs.values())
        self._jobs.clear()
        for job in jobs:
            job.error = reason
            job.cancel()
        self._tell([(job, None) for job in jobs])

    def _tell(self, news: list[tuple[Job, int | None]]) -> None:
        by_loop: dict[asyncio.AbstractEventLoop, list[tuple[Job, int | None]]] = {}
        for job, token in news:
            by_loop.setdefault(job.loop, []).append((job, token))
        for loop, items in by_loop.items():
            if not loop.is_closed():
                loop.call_soon_threadsafe(_deliver, items)


def _deliver(items: list[tuple[Job, int | None]]) -> None:
    for job, token in items:
        job.tokens.put_nowait(token)
