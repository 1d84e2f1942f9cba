"""What protects a run from bad updates, from fp16 overflow and from ranks that stop answering."""

from __future__ import annotations

import math
import os
import socket
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from nanochat.errors import UserError
from nanochat.runtime import Runtime

WINDOW = 128
SIGMAS = 6.0
MAX_SKIPS = 20  # in a row, before it is an error
MAX_SPIKES = 3  # in a row, before the guard accepts that losses have become larger
GROW_STEPS = 1000  # good steps before the loss scale is doubled
READ_SECONDS = 2.0  # for the marks of all ranks, after a failure


@dataclass
class SpikeGuard:
    """Reject an update whose loss or gradient norm is not finite or is far above the recent ones.

    The limit is mean + 6 standard deviations of the last 128 accepted values; there is none before that many.
    """

    losses: deque[float] = field(default_factory=lambda: deque(maxlen=WINDOW))
    norms: deque[float] = field(default_factory=lambda: deque(maxlen=WINDOW))
    skips_in_a_row: int = 0

    def reason_to_skip(self, loss: float, norm: float) -> str | None:
        """Why this update must not be applied, or None. Raises UserError after 20 skips in a row."""
        for name, value in (("loss", loss), ("gradient norm", norm)):
            if not math.isfinite(value):
                return self._skip(f"the {name} is {value}")
        for name, value, window in (("loss", loss, self.losses), ("gradient norm", norm, self.norms)):
            limit = self.limit(window)
            if limit is not None and value > limit:
                if self.skips_in_a_row < MAX_SPIKES:
                    return self._skip(f"the {name} is {value:.4g}, above its limit {limit:.4g}")
                # Skipping leaves the weights as they are, so one more spike is not the data's doing: the
                # limits no longer fit.
                self.losses.clear()
                self.norms.clear()
        self.losses.append(loss)
        self.norms.append(norm)
        self.skips_in_a_row = 0
        return None

    def _skip(self, reason: str) -> str:
        self.skips_in_a_row += 1
        if self.skips_in_a_row >= MAX_SKIPS:
            raise UserError(
                f"{MAX_SKIPS} updates in a row were skipped, the last because {reason}",
                "lower the learning rate, or go back to an earlier step with --resume=N",
            )
        return reason

    @staticmethod
    def limit(window: deque[float]) -> float | None:
        """mean + 6 sigma of a full window, None before."""
        if len(window) < WINDOW:
            return None
        mean = sum(window) / WINDOW
        return mean + SIGMAS * math.sqrt(sum((x - mean) ** 2 for x in window) / WINDOW)

    def to_dict(self) -> dict[str, Any]:
        return {"losses": list(self.losses), "norms": list(self.norms), "skips_in_a_row": self.skips_in_a_row}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> SpikeGuard:
        return cls(deque(values["losses"], WINDOW), deque(values["norms"], WINDOW), values["skips_in_a_row"])


@dataclass
class LossScale:
    """Dynamic loss scaling for fp16: halved when a gradient overflows, doubled after 1,000 good steps."""

    value: float = 2.0**16
    good_steps: int = 0

    def update(self, grad_norm: float) -> None:
        if not math.isfinite(grad_norm):
            self.value = max(self.value / 2, 1.0)
            self.good_steps = 0
            return
        self.good_steps += 1
        if self.good_steps == GROW_STEPS:
            self.value = min(self.value * 2, 2.0**24)
            self.good_steps = 0

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


PHASES = ("waiting for data", "computing", "exchanging gradients")


class RankMonitor:
    """Name the rank that stopped answering.

    A rank that dies or hangs shows on the others as a broken connection or a timeout, which names nobody. So
    every rank writes what it is about to do into the store of the process group, and one that sees a
    collective fail reads who is behind. With a single process nothing is written.
    """

    def __init__(self, rt: Runtime) -> None:
        self.rt = rt
        self.now = (0, 0)
        self.store: Any = dist.distributed_c10d._get_default_store() if rt.world_size > 1 else None

    def mark(self, step: int, phase: str) -> None:
        """This rank begins a phase (one of PHASES) of a step."""
        self.now = step, PHASES.index(phase)
        if self.store is not None:
            mark = f"{step} {self.now[1]} {socket.gethostname()} {os.getpid()}"
            self.store.set(f"nanochat/step/{self.rt.rank}", mark)

    @contextmanager
    def step(self, number: int) -> Iterator[None]:
        """Run one step; a RuntimeError of a collective becomes a UserError that names the ranks behind."""
        self.mark(number, "waiting for data")
        try:
            yield
        except RuntimeError as error:
            if self.store is None:
                raise
            problem = f"step {number}: {self.ranks_behind()}"
            # The store may live in the process of rank 0, and others still read it.
            if self.rt.is_main:
                time.sleep(READ_SECONDS)
            raise UserError(problem, f"look at its output; here: {str(error).splitlines()[0]}") from error

    def ranks_behind(self) -> str:
        """A sentence about the ranks that have not come as far as this one."""
        late, unread = [], []
        for rank in range(self.rt.world_size):
            if rank == self.rt.rank:
                continue
            key = f"nanochat/step/{rank}"
            try:
                self.store.wait([key], timedelta(seconds=READ_SECONDS / self.rt.world_size))
                step, phase, host, process = self.store.get(key).decode().split()
            except RuntimeError:
                unread.append(f"rank {rank}")
                continue
            if (int(step), int(phase)) < self.now:
                doing = f"{PHASES[int(phase)]} in step {step}"
                late.append(f"rank {rank} ({host}, process {process}) was last heard of {doing}")
        if late:
            return "; ".join(late) + ", and does not answer"
        if unread:
            return f"nothing is known of {', '.join(unread)}: the store of rank 0 does not answer"
        return "a collective failed, though every rank had come as far"
