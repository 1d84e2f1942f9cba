"""Documents from anywhere, named by one URI.

    synthetic                           the embedded corpus: seeded, endless, no files
    parquet:DIR_OR_GLOB                 column `text`; a shards.json there names the validation shard
    jsonl:FILE                          one object a line, field `text`
    text:FILE_OR_DIR                    a file is split at blank lines; in a directory each .txt or .md is one
    hub:OWNER/NAME[@revision][:glob]    parquet files of a data set, fetched and verified by nanochat.data.hub

A source hands out (text, cursor); a cursor is JSON and resumes right after its document. Training never ends:
every epoch takes the chunks (row groups, or about a megabyte of lines), and the documents of a chunk, in an
order drawn from (seed, epoch). Memory holds one chunk. No rank is known here: the order is global.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from nanochat.data import hub
from nanochat.data.manifest import MANIFEST, parquet_metadata, read_manifest, verified
from nanochat.errors import UserError
from nanochat.paths import Home

CHUNK_BYTES = 1 << 20
VAL_PERCENT = 1  # of the documents, by a hash of the text, where no shard is named for validation
NUM_SYNTHETIC_VAL = 1 << 16  # indices below are validation, all others training
TEXT_SUFFIXES = (".txt", ".md")

Cursor = dict[str, Any]
Documents = Iterator[tuple[str, Cursor]]


class Source(Protocol):
    """What the loader needs: a name, an identity, and documents with cursors."""

    name: str

    def fingerprint(self) -> str:
        """Changes with the documents and their order; a cursor is good for one fingerprint."""

    def documents(self, split: str, cursor: Cursor | None = None) -> Documents:
        """(text, cursor) pairs after `cursor`; split "train" never ends, "val" does."""


def open_source(
    uri: str, *, home: Home, seed: int, num_shards: int | None = None, mirror: str | None = None,
    offline: bool = False,
) -> Source:  # fmt: skip
    """The source named by `uri`. num_shards (None: all), mirror and offline concern `hub:` only."""
    kind, _, rest = uri.partition(":")
    if kind == "synthetic" and not rest:
        return SyntheticSource(seed)
    if not rest or kind not in ("parquet", "jsonl", "text", "hub"):
        forms = (
            "synthetic, parquet:DIR_OR_GLOB, jsonl:FILE, text:FILE_OR_DIR, hub:OWNER/NAME[@revision][:glob]"
        )
        raise UserError(f"there is no data source {uri!r}", f"use one of {forms}")
    if kind == "hub":
        directory, shards = hub.fetch_shards(rest, home, num_shards, mirror, offline)
        return _parquet_source(uri, directory, shards, seed, by_file=True)
    return (
        _open_parquet(uri, rest, seed)
        if kind == "parquet"
        else _open_lines(kind, Path(rest).expanduser(), seed)
    )


class SyntheticSource:
    """The embedded corpus. Document i is a function of (seed, i): training and validation cannot meet."""

    name = "synthetic"

    def __init__(self, seed: int) -> None:
        from nanochat.data.synthetic import document

        self._document = lambda index: document(seed, index)
        # of the first documents too, so that a change of the generator is noticed
        self._fingerprint = _digest("synthetic", seed, [self._document(index) for index in range(16)])

    def fingerprint(self) -> str:
        return self._fingerprint

    def documents(self, split: str, cursor: Cursor | None = None) -> Documents:
        _check(cursor, self, split)
        return self._after(split, cursor["next"] if cursor else 0 if split == "val" else NUM_SYNTHETIC_VAL)

    def _after(self, split: str, index: int) -> Documents:
        while split == "train" or index < NUM_SYNTHETIC_VAL:
            index += 1
            yield self._document(index - 1), {"source": self._fingerprint, "split": split, "next": index}


@dataclass(frozen=True)
class Chunk:
    """What is read at once: row group `start` of a parquet file, or `size` bytes from `start` of a text."""

    path: Path
    start: int
    size: int = 0


class FileSource:
    """Documents in chunks of files. Without val_chunks, `is_validation` decides where a document belongs.

    by_file keeps the chunks of a file together, so that shards could arrive one by one.
    """

    def __init__(
        self, name: str, chunks: list[Chunk], read: Callable[[Chunk], list[str]], content: Any, seed: int,
        *, val_chunks: list[Chunk] | None = None, by_file: bool = False,
    ) -> None:  # fmt: skip
        self.name, self._seed, self._by_file = name, seed, by_file
        self._chunks, self._val_chunks, self._read = chunks, val_chunks, read
        self._fingerprint = _digest(content, seed)

    def fingerprint(self) -> str:
        return self._fingerprint

    def documents(self, split: str, cursor: Cursor | None = None) -> Documents:
        _check(cursor, self, split)
        return self._after(split, *(cursor["at"] if cursor else (0, 0, 0)))

    def _after(self, split: str, epoch: int, place: int, number: int) -> Documents:
        is_train = split == "train"
        chunks = self._chunks if is_train or self._val_chunks is None else self._val_chunks
        num_found = place + number  # a cursor inside an epoch has found some
        while True:
            order = self._order(epoch) if is_train else list(range(len(chunks)))
            while place < len(chunks):
                texts = self._texts(chunks[order[place]], split)
                inside = (
                    _permutation(len(texts), self._seed, epoch, order[place])
                    if is_train
                    else range(len(texts))
                )
                num_found += len(texts)
                while number < len(texts):
                    number += 1
                    cursor = {"source": self._fingerprint, "split": split, "at": [epoch, place, number]}
                    yield texts[inside[number - 1]], cursor
                place, number = place + 1, 0
            if not num_found:
                what = (
                    "training" if is_train else f"validation ({VAL_PERCENT} % of them, by a hash of the text)"
                )
                raise UserError(f"{self.name} holds no document for {what}", "give more documents")
            if not is_train:
                return
            epoch, place = epoch + 1, 0

    def num_documents(self, split: str) -> int:
        """Read everything, page checksums included, and count. UserError names what is damaged."""
        chunks = self._val_chunks if split == "val" and self._val_chunks is not None else self._chunks
        return sum(len(self._texts(chunk, split)) for chunk in chunks)

    def _texts(self, chunk: Chunk, split: str) -> list[str]:
        texts = [text for text in self._read(chunk) if text and not text.isspace()]
        if self._val_chunks is None:
            return [text for text in texts if is_validation(text) == (split == "val")]
        return texts

    def _order(self, epoch: int) -> list[int]:
        order = _permutation(len(self._chunks), self._seed, epoch)
        if self._by_file:
            paths = list(dict.fromkeys(chunk.path for chunk in self._chunks))
            turn = dict(zip(paths, _permutation(len(paths), self._seed, epoch, -1)))
            order.sort(key=lambda index: turn[self._chunks[index].path])
        return order


def is_validation(text: str) -> bool:
    """The rule where no validation shard is named: a hash of the text, the same everywhere and always."""
    digest = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "big") % 100 < VAL_PERCENT


def _check(cursor: Cursor | None, source: Source, split: str) -> None:
    if split not in ("train", "val"):
        raise ValueError(f'split must be "train" or "val", got {split!r}')
    if cursor is not None and (cursor["source"], cursor["split"]) != (source.fingerprint(), split):
        raise UserError(
            f"the saved position belongs to other data, or another seed, than {source.name} now",
            "resume with the data and seed the run was started with, or start a new run",
        )


def _permutation(size: int, *key: int) -> list[int]:
    return np.random.default_rng([part + 1 for part in key]).permutation(size).tolist()


def _digest(*parts: Any) -> str:
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


# parquet


def _open_parquet(uri: str, where: str, seed: int) -> FileSource:
    path = Path(where).expanduser()
    if (path / MANIFEST).exists():
        shards = verified(read_manifest(path)["shards"], path)
        return _parquet_source(uri, path, shards, seed)
    if path.is_dir():
        root, pattern = path, "*.parquet"
    else:  # everything before the first part with a wildcard is the root
        fixed = next((n for n, part in enumerate(path.parts) if set(part) & set("*?[")), len(path.parts) - 1)
        root, pattern = Path(*path.parts[:fixed]), str(Path(*path.parts[fixed:]))
    names = sorted(file.relative_to(root).as_posix() for file in root.glob(pattern) if file.is_file())
    if not names:
        raise UserError(
            f"there is no parquet file at {where}", "give a directory, a file or a glob of .parquet files"
        )
    return _parquet_source(uri, root, [{"name": name, "role": "train"} for name in names], seed)


def _parquet_source(
    uri: str, directory: Path, shards: list[dict[str, Any]], seed: int, by_file: bool = False
) -> FileSource:
    chunks: dict[str, list[Chunk]] = {"train": []}
    identity = []
    for shard in shards:
        path = directory / shard["name"]
        groups, footer = _footer(path)
        chunks.setdefault(shard["role"], []).extend(Chunk(path, group) for group in groups)
        identity.append([shard["name"], shard["role"], shard.get("sha256") or footer])
    for role, found in chunks.items():
        if not found:
            raise UserError(
                f"{uri} has no {role} shard with rows", "fetch shards: python -m scripts.data --help"
            )
    return FileSource(
        uri, chunks["train"], _read_group, identity, seed, val_chunks=chunks.get("val"), by_file=by_file
    )


def _footer(path: Path) -> tuple[list[int], str]:
    """(row groups that hold rows, an identity: the file's size and a hash of its footer)."""
    metadata = parquet_metadata(path)
    columns = metadata.schema.to_arrow_schema().names
    if "text" not in columns:
        raise UserError(
            f"{path} has no column 'text', only {', '.join(columns)}", "give files with that column"
        )
    with path.open("rb") as raw:
        size = raw.seek(-8, 2) + 8
        raw.seek(-8 - int.from_bytes(raw.read(4), "little"), 2)
        footer = hashlib.sha256(raw.read()).hexdigest()
    groups = [group for group in range(metadata.num_row_groups) if metadata.row_group(group).num_rows]
    return groups, f"{size} {footer}"


def _read_group(chunk: Chunk) -> list[str]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(chunk.path, page_checksum_verification=True) as file:
            return file.read_row_group(chunk.start, columns=["text"], use_threads=False).column(0).to_pylist()
    except (OSError, pa.ArrowException, UnicodeDecodeError) as error:
        problem = f"{chunk.path} is damaged in row group {chunk.start}: {' '.join(str(error).split())}"
        raise UserError(problem, "delete it and fetch it again (python -m scripts.data --verify)") from error


# text and jsonl


def _open_lines(kind: str, path: Path, seed: int) -> FileSource:
    files, is_dir = [path] if path.is_file() else [], kind == "text" and path.is_dir()
    if is_dir:
        files = sorted(file for file in path.rglob("*") if file.suffix in TEXT_SUFFIXES and file.is_file())
    if not files:
        takes = "a file, or a directory with .txt or .md files" if kind == "text" else "one file"
        raise UserError(f"there is nothing to read at {path}", f"{kind}: takes {takes}")
    scans = [_scan(file, whole=is_dir, blank_lines=kind == "text") for file in files]
    content = [kind, [[file.name, digest] for file, (_, digest) in zip(files, scans)]]
    read = _read_json if kind == "jsonl" else _read_file if is_dir else _read_blocks
    return FileSource(
        f"{kind}:{path}", [chunk for chunks, _ in scans for chunk in chunks], read, content, seed
    )


def _scan(path: Path, *, whole: bool, blank_lines: bool) -> tuple[list[Chunk], str]:
    """(chunks that end at a line, or at a blank one; sha256). UserError at a byte that is not UTF-8."""
    chunks, digest, start = [], hashlib.sha256(), 0
    with path.open("rb") as file:
        while block := bytearray(file.read(-1 if whole else CHUNK_BYTES)):
            block += file.readline()  # the rest of the line
            while blank_lines and (line := file.readline()):
                block += line
                if not line.strip():
                    break
            try:
                block.decode()
            except UnicodeDecodeError as error:
                raise UserError(
                    f"{path} is not UTF-8: byte {block[error.start]:#04x} at offset {start + error.start}",
                    f"convert it first, for example: iconv -f latin1 -t utf-8 {path.name}",
                ) from error
            digest.update(block)
            chunks.append(Chunk(path, start, len(block)))
            start += len(block)
    return chunks, digest.hexdigest()


def _read_file(chunk: Chunk) -> list[str]:
    """The chunk as one text."""
    with chunk.path.open("rb") as file:
        file.seek(chunk.start)
        data = file.read(chunk.size)
    try:
        return [data.decode("utf-8-sig" if chunk.start == 0 else "utf-8").replace("\r\n", "\n")]
    except UnicodeDecodeError as error:
        raise UserError(f"{chunk.path} has changed while in use", "leave it alone during a run") from error


def _read_blocks(chunk: Chunk) -> list[str]:
    return [text.strip("\n") for text in re.split(r"(?:^|\n)(?:[ \t]*\n)+", _read_file(chunk)[0])]


def _read_json(chunk: Chunk) -> list[str]:
    texts = []
    for number, line in enumerate(_read_file(chunk)[0].split("\n")):
        try:
            texts.append(json.loads(line)["text"] if line.strip() else "")
            if not isinstance(texts[-1], str):
                raise TypeError
        except (ValueError, KeyError, TypeError) as error:
            with chunk.path.open("rb") as file:
                number += file.read(chunk.start).count(b"\n") + 1
            problem = (
                f'{chunk.path}, line {number}: must be an object with a string "text", found {line[:60]!r}'
            )
            raise UserError(problem, "repair or remove this line") from error
    return texts
