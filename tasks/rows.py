"""Rows of a data set on the hub, read from its local parquet files in a fixed random order."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Any

from nanochat.errors import UserError
from nanochat.paths import Home
from tasks.base import Task


def read_table(files: list[Path], columns: tuple[str, ...]) -> Any:
    """One pyarrow table of the columns from every file. UserError if a file is damaged or lacks a column."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    tables = []
    for path in files:
        try:
            missing = set(columns) - set(pq.read_schema(path).names)
            if not missing:
                tables.append(pq.read_table(path, columns=list(columns)).replace_schema_metadata(None))
        except (pa.ArrowException, OSError) as error:
            raise UserError(f"{path} cannot be read: {error}", "delete the file and run again") from error
        if missing:
            raise UserError(
                f"{path} must have the columns {', '.join(columns)}; it lacks {', '.join(sorted(missing))}",
                "delete the file and run again, or check the address of the mirror",
            )
    return pa.concat_tables(tables)


class HubTask(Task):
    """Rows of the files of a repository whose path matches a pattern, permuted by NumPy default_rng(42)."""

    def __init__(
        self, repo: str, pattern: str, columns: tuple[str, ...], home: Home | None = None, **slice_: Any
    ):
        super().__init__(**slice_)
        self.repo, self.pattern, self.columns, self.home = repo, pattern, columns, home

    @cached_property
    def _table(self) -> Any:
        from nanochat.data.hub import dataset_files

        table = read_table(dataset_files(self.repo, self.pattern, home=self.home), self.columns)
        if not table.num_rows:
            raise UserError(f"{self.repo} has no rows in {self.pattern}", "check the address of the mirror")
        return table

    @cached_property
    def _order(self) -> Any:
        import numpy as np

        return np.random.default_rng(42).permutation(self._table.num_rows)

    def num_examples(self) -> int:
        return int(self._table.num_rows)

    def row(self, index: int) -> dict[str, Any]:
        """Row `index` in the permuted order, as Python values."""
        found: dict[str, Any] = self._table.slice(int(self._order[index]), 1).to_pylist()[0]
        return found
