"""The progress of a download: files and bytes, counted from any thread."""

from __future__ import annotations

import threading

from nanochat.progress import Bar


class Progress:
    """Counts files and bytes from any thread. total_bytes is None while a size is not known."""

    def __init__(self, label: str, num_files: int, total_bytes: int | None, quiet: bool = False) -> None:
        self.num_files = num_files
        self.total_bytes = total_bytes
        self.quiet = quiet
        self.files = 0
        self.bytes = 0
        self._lock = threading.Lock()
        self._bar = Bar(label, total_bytes)

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()

    def advance(self, num_bytes: int) -> None:
        """More bytes have arrived; a negative number takes bytes back."""
        with self._lock:
            self.bytes += num_bytes
            self._show()

    def file_done(self) -> None:
        with self._lock:
            self.files += 1
            self._show(is_last=self.files == self.num_files)

    def line(self) -> str:
        """For example: 3 of 8 files, 210.4 of 800.0 MB, 12.1 MB/s."""
        total = "" if self.total_bytes is None else f" of {self.total_bytes / 1e6:.1f}"
        speed = self.bytes / 1e6 / self._bar.seconds()
        return f"{self.files} of {self.num_files} files, {self.bytes / 1e6:.1f}{total} MB, {speed:.1f} MB/s"

    def _show(self, is_last: bool = False) -> None:
        if not self.quiet:
            self._bar.show(self.bytes, self.line(), is_last)
