"""shards.json: what a directory of fetched files should hold, and how much of it has been verified.

    {"source": "...", "revision": "<40 hex>" or null, "shards": [{"name": "shard_00000.parquet", "role":
     "train" or "val", "size": 0, "sha256": "...", "rows": 0, "row_groups": 0, "verified": true}, ...]}

What nobody has told us is null, is recorded at the first contact and enforced from then on.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nanochat.data.download.transfer import locked
from nanochat.errors import UserError
from nanochat.home import read_json, write_json

MANIFEST = "shards.json"
UNKNOWN = {"size": None, "sha256": None, "rows": None, "row_groups": None, "verified": False}

Entry = dict[str, Any]


@dataclass(frozen=True)
class Repo:
    """A data set, where it comes from, and the directory that holds its files and manifest."""

    name: str
    revision: str | None
    mirror: str | None
    offline: bool
    directory: Path

    @property
    def mirror_dir(self) -> Path | None:
        return Path(self.mirror) if self.mirror and "://" not in self.mirror else None

    def refuse_offline(self, what: str) -> None:
        """UserError where fetching would need a connection and none may be opened."""
        if self.offline and not self.mirror_dir:
            problem = f"{what} is not here and --offline forbids to fetch it"
            raise UserError(problem, "fetch it first, online")


def read_manifest(directory: Path) -> dict[str, Any]:
    """The manifest of a directory; UserError if it is missing or no manifest."""
    value = read_json(directory / MANIFEST)
    try:
        roles = {entry["role"] if is_inside(entry["name"]) else None for entry in value["shards"]}
    except (TypeError, KeyError):
        roles = {None}
    if not roles <= {"train", "val"}:
        raise UserError(f"{directory / MANIFEST} is not a manifest of shards", "docs/data.md shows its form")
    return value


def record(directory: Path, name: str, facts: Entry) -> Entry:
    """Change one entry of the manifest and return it."""
    with locked(directory / MANIFEST):
        value = read_manifest(directory)
        entry = next(entry for entry in value["shards"] if entry["name"] == name)
        entry.update(facts)
        write_json(directory / MANIFEST, value)
    return entry


def verified(entries: list[Entry], directory: Path) -> list[Entry]:
    """The entries not marked as unverified; UserError when the file of one is missing or has another size."""
    entries = [entry for entry in entries if entry.get("verified", True)]
    for entry in entries:
        path = directory / entry["name"]
        if not path.exists() or entry.get("size") not in (None, path.stat().st_size):
            found = "of another size than" if path.exists() else "missing, but listed in"
            raise UserError(f"{path} is {found} {MANIFEST}", "fetch it again: python -m scripts.data --help")
    return entries


def is_here(repo: Repo, entry: Entry) -> bool:
    """Whether the file of an entry is there as it was verified."""
    path = repo.directory / entry["name"]
    return entry["verified"] and path.exists() and path.stat().st_size == entry["size"]


def is_inside(name: str) -> bool:
    return bool(name) and not Path(name).is_absolute() and ".." not in Path(name).parts


def parquet_metadata(path: Path) -> Any:
    """A parquet file's footer, as pyarrow gives it; UserError if it has none."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        return pq.read_metadata(path)
    except (OSError, pa.ArrowException) as error:
        raise UserError(
            f"{path} cannot be read as parquet: {error}", "delete it and fetch it again"
        ) from error
