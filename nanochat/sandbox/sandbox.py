"""Programs and solutions, run behind walls that have been tried first.

A `Sandbox` refuses to exist where a wall is missing or one of the attacks of attacks.py gets through, unless
it is told to be unsafe; then it says what is missing. The rules are in docs/evaluation.md.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from nanochat.errors import UserError
from nanochat.sandbox import wire
from nanochat.sandbox.attacks import PROBE
from nanochat.sandbox.process import Child, Limits, wait

LAYERS = frozenset({"rlimits", "user", "prctl", "landlock", "seccomp"})
FLAG = "--unsafe-no-sandbox"


@dataclass(frozen=True)
class Outcome:
    """How a program ended: "done", "failed" (exit code), "killed" (signal), "timeout" or "flood".

    code is negative for a signal; output is cut at 64 KiB and decoded with replacement.
    """

    how: str
    code: int
    out: str
    err: str
    seconds: float


@dataclass(frozen=True)
class Verdict:
    """Whether a solution passed its tests, and if not, why."""

    passed: bool
    why: str


@dataclass(frozen=True)
class Job:
    """A solution to be graded: its code, the function that is called, what the tests need, the tests."""

    code: str
    entry: str
    helpers: str
    tests: str


class Sandbox:
    """Runs and grades foreign Python. Raises UserError where it cannot do so safely (and unsafe is False)."""

    def __init__(
        self, limits: Limits | None = None, *, unsafe: bool = False, say: Any = lambda line: None
    ) -> None:
        self.limits = limits or Limits()
        self.skip: frozenset[str] = frozenset()
        problem = self.probe()
        if problem is not None and not unsafe:
            raise UserError(
                f"model-written code cannot be run safely here: {problem}",
                f"run it on Linux 5.13 or later (x86-64 or aarch64), or at your own risk with {FLAG}",
            )
        if problem is not None:
            self.skip = LAYERS
            say(f"warning: model-written code runs without a sound sandbox: {problem}")

    def probe(self) -> str | None:
        """Try the walls; what is missing, or None."""
        if not sys.platform.startswith("linux"):
            return f"there is no sandbox for {sys.platform}"
        with tempfile.TemporaryDirectory(prefix="nanochat-probe-") as directory:
            os.chmod(directory, 0o777)  # so that only the walls protect it
            secret = os.path.join(directory, "secret")
            with open(secret, "w", encoding="utf-8") as file:
                file.write("secret")
            os.chmod(secret, 0o666)
            before = _facts_of(secret)
            names = {"SECRET": secret, "DIRECTORY": directory, "PARENT": os.getpid()}
            code = "".join(f"{name} = {value!r}\n" for name, value in names.items()) + PROBE
            found = self.run(code, Limits(max(20.0, self.limits.wall_seconds)))
            if found.err.find('"gap"') >= 0:
                return str(json.loads(found.err[found.err.index("{") :])["gap"])
            try:
                breaches = json.loads(found.out)
            except ValueError:
                return f"the trial ended {found.how} with code {found.code}: {found.err[-300:].strip()}"
            if os.listdir(directory) != ["secret"] or _facts_of(secret) != before:
                breaches.append("a file was changed")
            return f"these attacks got through: {', '.join(breaches)}" if breaches else None

    def run(self, code: str, limits: Limits | None = None) -> Outcome:
        """Run a program with no input; never raises for what it does."""
        limits = limits or self.limits
        begun = time.monotonic()
        child = Child.start({"role": "run", "code": code}, limits, self.skip)
        how = None
        while not child.has_ended():
            if not wait([child], begun + limits.wall_seconds):
                how = "timeout"
                break
            if child.flooded:
                how = "flood"
                break
            if not child.unsent:
                child.close_input()
        moved = -1  # what is still in the pipes; whoever holds them longer is somebody else
        while how is None and child.fds() and moved != (moved := child.moved()):
            wait([child], min(time.monotonic() + 0.2, begun + limits.wall_seconds + 1))
            if child.flooded:
                how = "flood"
        code_ = child.end()
        how = how or ("done" if code_ == 0 else "killed" if code_ < 0 else "failed")
        out, err = (text[: 1 << 16].decode("utf-8", "replace") for text in (child.out, child.err))
        return Outcome(how, code_, out, err, time.monotonic() - begun)

    def grade(self, job: Job, limits: Limits | None = None) -> Verdict:
        """Run the tests of one job against its solution, each in a process of its own."""
        limits = limits or self.limits
        deadline = time.monotonic() + limits.wall_seconds
        theirs = Child.start({"role": "candidate", "code": job.code, "entry": job.entry}, limits, self.skip)
        orders = {"role": "tests", "code": job.tests, "helpers": job.helpers, "entry": job.entry}
        ours = Child.start(orders, limits, self.skip)
        try:
            return _relay(theirs, ours, deadline)
        finally:
            theirs.end()
            ours.end()

    def grade_all(self, jobs: Sequence[Job], workers: int | None = None) -> list[Verdict]:
        """Many at a time, in order; children belong to threads that outlive them."""
        with ThreadPoolExecutor(workers or os.cpu_count() or 1) as pool:
            return list(pool.map(self.grade, jobs))


def _facts_of(path: str) -> tuple[int, ...]:
    facts = os.stat(path)
    return facts.st_mode, facts.st_mtime_ns, facts.st_size


def _relay(theirs: Child, ours: Child, deadline: float) -> Verdict:
    """Pass calls from the tests to the solution and answers back, until the tests say the verdict.

    The solution's process can say nothing but an answer to a call; its end before the verdict is a failure.
    """
    is_ready = is_asked = False
    call: dict[str, Any] | None = None
    while True:
        if not wait([theirs, ours], deadline):
            return Verdict(False, "timeout")
        if theirs.flooded or ours.flooded:
            return Verdict(False, "flood")
        try:
            said, ours.out = wire.split(ours.out)
            answer, theirs.out = wire.split(theirs.out)
        except ValueError as error:
            return Verdict(False, f"broken message: {error}")
        for message in (said, answer):
            if message is not None and "gap" in message:
                raise UserError(f"the sandbox cannot be built: {message['gap']}", f"see {FLAG}")
        if said is not None and "verdict" in said:
            if is_asked or call is not None:
                return Verdict(False, "the tests ended without the last answer")
            return Verdict(said["verdict"]["passed"] is True, str(said["verdict"]["why"]))
        if said is not None:
            call = said
        if answer is not None:
            if "failed" in answer and not is_ready:
                return Verdict(False, str(answer["failed"]))
            if not is_ready:
                is_ready = True
            elif is_asked:
                is_asked = False
                ours.unsent += wire.frame(answer)
            else:
                return Verdict(False, "the solution answered without being asked")
        if call is not None and is_ready and not is_asked:
            theirs.unsent += wire.frame({"arguments": call.get("arguments"), "named": call.get("named")})
            call, is_asked = None, True
        if theirs.has_ended() and "out" in theirs.closed and (is_asked or not is_ready):
            return Verdict(False, "the solution ended before its last answer")
        if ours.has_ended() and "out" in ours.closed and said is None:
            return Verdict(False, f"the tests ended without a verdict: {ours.err[-200:]!r}")
