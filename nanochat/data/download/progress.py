"""How far a download is: a live bar on a terminal, else a plain line every few seconds."""

from __future__ import annotations

import sys
import threading
import time
from typing import Any

PLAIN_SECONDS = 5.0


class Progress:
    """Counts files and bytes from any thread. total_bytes is None while a size is not known."""

    def __init__(self, label: str, num_files: int, total_bytes: int | None, quiet: bool = False) -> None:
        self.label, self.num_files, self.total_bytes, self.quiet = label, num_files, total_bytes, quiet
        self.files = self.bytes = 0
        self._lock, self._bar = threading.Lock(), None
        self._start = self._shown = time.monotonic()
        if not quiet and sys.stdout.isatty():
            self._bar = _bar(label, total_bytes)

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def advance(self, num_bytes: int) -> None:
        """More bytes have arrived; a negative number takes bytes back."""
        with self._lock:
            self.bytes += num_bytes
            self._show()

    def file_done(self) -> None:
        with self._lock:
            self.files += 1
            self._show(force=self.files == self.num_files)

    def line(self) -> str:
        """For example: 3 of 8 files, 210.4 of 800.0 MB, 12.1 MB/s."""
        total = "" if self.total_bytes is None else f" of {self.total_bytes / 1e6:.1f}"
        speed = self.bytes / 1e6 / max(time.monotonic() - self._start, 1e-3)
        return f"{self.files} of {self.num_files} files, {self.bytes / 1e6:.1f}{total} MB, {speed:.1f} MB/s"

    def _show(self, force: bool = False) -> None:
        if self._bar is not None:
            text = f"{self.files} of {self.num_files} files"
            self._bar.update(self._bar.task_ids[0], completed=self.bytes, files=text)
        elif not self.quiet and (force or time.monotonic() - self._shown > PLAIN_SECONDS):
            self._shown = time.monotonic()
            print(f"{self.label}: {self.line()}", flush=True)


def _bar(label: str, total: int | None) -> Any:
    from rich import progress

    columns = (progress.TextColumn("{task.description}"), progress.BarColumn(), progress.DownloadColumn())
    more = (progress.TransferSpeedColumn(), progress.TimeRemainingColumn())
    bar = progress.Progress(*columns, *more, progress.TextColumn("{task.fields[files]}"))
    bar.add_task(label, total=total, files="")
    bar.start()
    return bar
