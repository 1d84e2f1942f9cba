"""Who stopped answering: each rank notes its step where all can read it; a failed collective then has a name.

A rank that dies or hangs shows on the others as a broken connection or a timeout (Runtime's, 300 s) in
whatever they were
waiting for, which names nobody. So every rank writes what it is about to do into the store of the process
group, and one that sees a collective fail reads who is behind. Nothing happens in a world of one.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from nanochat.errors import UserError
from nanochat.runtime import Runtime

READ_SECONDS = 2.0  # for all marks, after a failure


PHASES = ("waiting for data", "computing", "exchanging gradients")


class Watch:
    def __init__(self, rt: Runtime) -> None:
        self.rt, self.now = rt, (0, 0)
        self.store: Any = dist.distributed_c10d._get_default_store() if rt.world_size > 1 else None

    def mark(self, step: int, phase: int) -> None:
        """This rank begins a phase (of PHASES) of a step."""
        self.now = step, phase
        if self.store is not None:
            mark = f"{step} {phase} {socket.gethostname()} {os.getpid()}"
            self.store.set(f"nanochat/step/{self.rt.rank}", mark)

    @contextmanager
    def step(self, number: int) -> Iterator[None]:
        """Run one step; a RuntimeError of a collective becomes a UserError that names the ranks behind."""
        self.mark(number, 0)
        try:
            yield
        except RuntimeError as error:
            if self.store is None:
                raise
            problem = f"step {number}: {self.behind()}"
            if self.rt.is_main:
                time.sleep(READ_SECONDS)  # the store may live in this process: others still read it
            raise UserError(problem, f"look at its output; here: {str(error).splitlines()[0]}") from error

    def behind(self) -> str:
        """A sentence about the ranks that have not come as far as this one, as far as their marks can be
        read."""
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
