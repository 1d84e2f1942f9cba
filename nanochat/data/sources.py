"""Documents from anywhere, named by one URI.

    synthetic                           the embedded corpus: seeded, endless, no files
    parquet:DIR_OR_GLOB                 column `text`; a shards.json there names the validation shard
    jsonl:FILE_OR_GLOB                  one object a line, field `text`
    text:FILE_OR_DIR                    a file is split at blank lines; in a directory each .txt or .md is one
    hub:OWNER/NAME[@revision][:glob]    parquet files of a data set, fetched and verified while they are used
    tokens:DIR                          what scripts.tok_shards made of one of the others

A source hands out blocks of documents; a cursor is JSON and resumes right after its document. Training never
ends: every epoch has an order drawn from (seed, epoch). Memory holds one chunk. No rank is known here: the
order is global.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from nanochat.data.documents import Cursor, DocumentBlock, in_blocks
from nanochat.data.download import hub
from nanochat.data.download.manifest import MANIFEST, Entry, read_manifest, verified
from nanochat.data.download.stream import ShardStream
from nanochat.data.files import FilePart, FileSource, LocalShards, check_cursor, digest
from nanochat.data.formats import parquet_chunks, read_blocks, read_file, read_group, read_lines, scan
from nanochat.data.tokens import read_facts
from nanochat.errors import UserError
from nanochat.home import Home

NUM_SYNTHETIC_VAL = 1 << 16  # indices below are validation, all others training
TEXT_SUFFIXES = (".txt", ".md")
FORMS = (
    "synthetic, parquet:DIR_OR_GLOB, jsonl:FILE_OR_GLOB, text:FILE_OR_DIR, hub:OWNER/NAME[@revision][:glob], "
    "tokens:DIR"
)


class Source(Protocol):
    """What the loader needs: a name, an identity, and documents with cursors, in blocks or one by one."""

    name: str
    tokenizer: str | None  # the fingerprint of the one that made the tokens, if these are tokens

    def fingerprint(self) -> str:
        """Changes with the documents and their order; a cursor is good for one fingerprint."""

    def blocks(self, split: str, cursor: Cursor | None = None) -> Iterator[DocumentBlock]:
        """The documents after `cursor`; split "train" never ends, "val" does."""

    def documents(self, split: str, cursor: Cursor | None = None) -> Iterator[tuple[str, Cursor]]:
        """The same as (text, cursor) pairs."""

    def close(self) -> None:
        """End what is going on: blocks that wait for a shard raise."""


def open_source(
    uri: str, *, home: Home, seed: int, num_shards: int | None = None, mirror: str | None = None,
    offline: bool = False, disk_gb: float | None = None, damaged: str = "stop", quiet: bool = False,
) -> Source:  # fmt: skip
    """The source named by `uri`. num_shards (None: all), mirror, offline and disk_gb concern `hub:` only.

    disk_gb bounds the training shards on disk (None: no bound); damaged says what a chunk does that cannot be
    read as it was written: "stop" or "skip". quiet: no word about what is fetched.
    """
    kind, _, rest = uri.partition(":")
    if kind == "synthetic" and not rest:
        return SyntheticSource(seed)
    if not rest or kind not in ("parquet", "jsonl", "text", "hub", "tokens"):
        raise UserError(f"there is no data source {uri!r}", f"use one of {FORMS}")
    if kind == "hub":
        return _open_hub(uri, rest, home, seed, num_shards, mirror, offline, disk_gb, damaged, quiet)
    if kind == "parquet":
        return _open_parquet(uri, rest, seed, damaged)
    if kind == "tokens":
        return _open_tokens(uri, Path(rest).expanduser(), seed, damaged)
    return _open_lines(kind, rest, seed)


class SyntheticSource:
    """The embedded corpus. Document i is a function of (seed, i): training and validation cannot meet."""

    name = "synthetic"
    tokenizer: str | None = None

    def __init__(self, seed: int) -> None:
        from nanochat.corpus import document

        self._document = lambda index: document(seed, index)
        # of the first documents too, so that a change of the generator is noticed
        self._fingerprint = digest("synthetic", seed, [self._document(index) for index in range(16)])

    def fingerprint(self) -> str:
        return self._fingerprint

    def close(self) -> None:
        pass

    def blocks(self, split: str, cursor: Cursor | None = None) -> Iterator[DocumentBlock]:
        return in_blocks(self.documents(split, cursor))

    def documents(self, split: str, cursor: Cursor | None = None) -> Iterator[tuple[str, Cursor]]:
        check_cursor(cursor, self, split)
        return self._after(split, cursor["next"] if cursor else 0 if split == "val" else NUM_SYNTHETIC_VAL)

    def _after(self, split: str, index: int) -> Iterator[tuple[str, Cursor]]:
        while split == "train" or index < NUM_SYNTHETIC_VAL:
            index += 1
            yield self._document(index - 1), {"source": self._fingerprint, "split": split, "next": index}


def _open_hub(
    uri: str, spec: str, home: Home, seed: int, num_shards: int | None, mirror: str | None, offline: bool,
    disk_gb: float | None, damaged: str, quiet: bool,
) -> FileSource:  # fmt: skip
    """Validation is fetched here, and training shards whose hash is not known; offline, all must be there."""
    repo, entries = hub.list_shards(spec, home, num_shards, mirror, offline)
    roles = {role: [entry for entry in entries if entry["role"] == role] for role in ("train", "val")}
    first = [entry["name"] for entry in roles["train"] if offline or entry["sha256"] is None]
    there = {entry["name"]: entry for entry in hub.fetch(repo, first, quiet)}
    roles["train"] = [there.get(entry["name"], entry) for entry in roles["train"]]
    val = None
    if roles["val"]:
        roles["val"] = hub.fetch(repo, [entry["name"] for entry in roles["val"]], quiet)
        paths = [repo.directory / entry["name"] for entry in roles["val"]]
        val = LocalShards([chunk for path in paths for chunk in parquet_chunks(path)[0]])
    identity = ["by file", *([e["name"], e["role"], e["sha256"]] for e in roles["train"] + roles["val"])]
    keep_bytes = None if disk_gb is None or offline else int(disk_gb * 1e9)
    shards = ShardStream(repo, roles["train"], keep_bytes)
    return FileSource(uri, shards, read_group, identity, seed, val=val, damaged=damaged)


def _open_parquet(uri: str, where: str, seed: int, damaged: str) -> FileSource:
    path = Path(where).expanduser()
    if (path / MANIFEST).exists():
        return _parquet_source(uri, path, verified(read_manifest(path)["shards"], path), seed, damaged)
    root, names = _matching(path, "*.parquet")
    if not names:
        raise UserError(
            f"there is no parquet file at {where}", "give a directory, a file or a glob of .parquet files"
        )
    return _parquet_source(uri, root, [{"name": name, "role": "train"} for name in names], seed, damaged)


def _matching(path: Path, pattern: str) -> tuple[Path, list[str]]:
    """(a directory, names of files below it): of a directory by `pattern`, of a glob, or one file."""
    if path.is_dir():
        root = path
    else:  # everything before the first part with a wildcard is the root
        fixed = next((n for n, part in enumerate(path.parts) if set(part) & set("*?[")), len(path.parts) - 1)
        root, pattern = Path(*path.parts[:fixed]), str(Path(*path.parts[fixed:]))
    return root, sorted(file.relative_to(root).as_posix() for file in root.glob(pattern) if file.is_file())


def _parquet_source(
    uri: str, directory: Path, entries: list[Entry], seed: int, damaged: str, column: str = "text",
    **options: Any,
) -> FileSource:  # fmt: skip
    chunks: dict[str, list[FilePart]] = {"train": []}
    identity = []
    for entry in entries:
        found, footer = parquet_chunks(directory / entry["name"], column)
        chunks.setdefault(entry["role"], []).extend(found)
        identity.append([entry["name"], entry["role"], entry.get("sha256") or footer])
    for role, some in chunks.items():
        if not some:
            raise UserError(
                f"{uri} has no {role} shard with rows", "fetch shards: python -m scripts.data --help"
            )
    # tokens were split when they were made: without a shard for validation there is none
    val = LocalShards(chunks.get("val", [])) if "val" in chunks or column == "tokens" else None
    read = partial(read_group, column=column)
    train = LocalShards(chunks["train"])
    return FileSource(uri, train, read, identity, seed, val=val, damaged=damaged, **options)


def _open_tokens(uri: str, path: Path, seed: int, damaged: str) -> FileSource:
    facts = read_facts(path)
    dtype, tokenizer = np.dtype(facts["dtype"]), facts["tokenizer"]
    shards = facts["shards"]
    return _parquet_source(uri, path, shards, seed, damaged, "tokens", dtype=dtype, tokenizer=tokenizer)


def _open_lines(kind: str, where: str, seed: int) -> FileSource:
    path = Path(where).expanduser()
    is_dir = kind == "text" and path.is_dir()
    if is_dir:
        files = sorted(file for file in path.rglob("*") if file.suffix in TEXT_SUFFIXES and file.is_file())
    else:
        root, names = _matching(path, "*.jsonl") if kind == "jsonl" else (path.parent, [path.name])
        files = [root / name for name in names if (root / name).is_file()]
    if not files:
        takes = "a file, or a directory with .txt or .md files" if kind == "text" else "a file or a glob"
        raise UserError(f"there is nothing to read at {path}", f"{kind}: takes {takes}")
    scans = [scan(file, whole=is_dir, blank_lines=kind == "text") for file in files]
    content = [kind, [[file.name, found] for file, (_, found) in zip(files, scans)]]
    read = read_lines if kind == "jsonl" else read_file if is_dir else read_blocks
    chunks = LocalShards([chunk for chunks, _ in scans for chunk in chunks])
    return FileSource(f"{kind}:{path}", chunks, read, content, seed)
