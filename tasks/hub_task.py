"""Rows of a data set on the hub, read by `datasets` from verified local files in a fixed random order."""

from __future__ import annotations

import os
from functools import cached_property
from pathlib import Path
from typing import Any

from nanochat.errors import UserError
from nanochat.home import Home
from tasks.base import Task


def column_names(path: Path) -> list[str]:
    """The columns of a parquet file. UserError if it is none."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        return list(pq.read_schema(path).names)
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{path} cannot be read: {error}", "delete the file and run again") from error


def read_rows(files: list[Path], columns: tuple[str, ...], cache: Path) -> Any:
    """The columns of every file as one datasets.Dataset, mapped from an Arrow copy in `cache`, not loaded.

    UserError if a file is damaged or lacks a column.
    """
    for path in files:
        if missing := set(columns) - set(column_names(path)):
            raise UserError(
                f"{path} must have the columns {', '.join(columns)}; it lacks {', '.join(sorted(missing))}",
                "delete the file and run again, or check the address of the mirror",
            )
    import datasets
    import pyarrow as pa

    try:
        return datasets.Dataset.from_parquet(
            [os.fspath(path) for path in files], columns=list(columns), cache_dir=os.fspath(cache)
        )
    except (datasets.exceptions.DatasetGenerationError, pa.ArrowException, OSError) as error:
        where = ", ".join(path.name for path in files)
        problem = f"{where} cannot be read: {' '.join(str(error.__cause__ or error).split())}"
        raise UserError(problem, "delete the files and run again") from error


class HubTask(Task):
    """Rows of the files of a repository whose path matches a pattern, permuted by NumPy default_rng(42)."""

    def __init__(
        self, repo: str, pattern: str, columns: tuple[str, ...], home: Home | None = None, **slice_: Any
    ):
        super().__init__(**slice_)
        self.repo, self.pattern, self.columns, self.home = repo, pattern, columns, home

    @cached_property
    def _rows(self) -> Any:
        from nanochat.data.download.hub import dataset_files

        files = dataset_files(self.repo, self.pattern, home=self.home, rehash=True)
        rows = read_rows(files, self.columns, (self.home or Home.find()).data_dir / "arrow")
        if not len(rows):
            raise UserError(f"{self.repo} has no rows in {self.pattern}", "check the address of the mirror")
        return rows

    @cached_property
    def _order(self) -> Any:
        import numpy as np

        return np.random.default_rng(42).permutation(len(self._rows))

    def num_examples(self) -> int:
        return len(self._rows)

    def row(self, index: int) -> dict[str, Any]:
        """Row `index` in the permuted order, as Python values."""
        found: dict[str, Any] = self._rows[int(self._order[index])]
        return found
