"""How far a piece of work is: a live bar on a terminal, now and then a plain line elsewhere."""

from __future__ import annotations

import sys
import time
from typing import Any

PLAIN_SECONDS = 2.0  # between two plain lines
BAR_SECONDS = 0.1  # between two looks of the bar


class Bar:
    """Shown from the first `show` to `close`. A text may say more than the numbers, such as a speed.

    total: None while it is not known.
    """

    def __init__(self, name: str, total: int | None) -> None:
        self.name = name
        self.total = total
        self.start = time.monotonic()
        self._bar: Any = None
        self._is_live = sys.stdout.isatty()
        self._shown: float | None = None

    def show(self, done: int, text: str, is_last: bool = False) -> None:
        """`done` of `total`. Calls that come too soon after one another are dropped, but not the last one."""
        now = time.monotonic()
        wait = BAR_SECONDS if self._is_live else PLAIN_SECONDS
        is_last = is_last or (self.total is not None and done >= self.total)
        if self._shown is not None and now - self._shown < wait and not is_last:
            return
        self._shown = now
        if self._is_live:
            if self._bar is None:
                self._bar = _bar(self.name, self.total)
            self._bar.update(self._bar.task_ids[0], completed=done, text=text)
        else:
            print(f"{self.name}: {text}", flush=True)

    def seconds(self) -> float:
        """Since the bar was made; never 0, so that a speed can be told."""
        return max(time.monotonic() - self.start, 1e-9)

    def close(self) -> None:
        """Leaves the last look of a live bar on the screen."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None


def _bar(name: str, total: int | None) -> Any:
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn

    columns = (TextColumn("[bold]{task.description}"), BarColumn(), TaskProgressColumn())
    progress = Progress(*columns, TextColumn("{task.fields[text]}"))
    progress.add_task(name, total=total, text="")
    progress.start()
    return progress
