"""Documents from anywhere, named by one URI.

    synthetic                              the embedded corpus: seeded, endless, no files
    parquet:DIR_OR_GLOB                    column `text`; shards.json names the validation shard if it is there
    jsonl:FILE                             one object a line, field `text`
    text:FILE_OR_DIR                       a file is split at blank lines; in a directory each .txt or .md file is one
    hub:OWNER/NAME[@revision][:glob]       parquet files of a data set, fetched and verified by nanochat.data.hub

A source hands out (text, cursor) pairs; a cursor is JSON and resumes right after its document. Training text is
endless: every epoch reads the chunks (row groups, or about a megabyte of lines) and the documents of a chunk in
an order drawn from (seed, epoch). Memory holds one chunk. Nothing here knows a rank: the order is global.
"""

from __future__ import annotations

import glob
import hashlib
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from nanochat.data import hub
from nanochat.errors import UserError
from nanochat.paths import Home

CHUNK_BYTES = 1 << 20
VAL_PERCENT = 1  # share of documents whose hash puts them into validation where no shard is named for it
NUM_SYNTHETIC_VAL = (
    1 << 16
)  # the first indices of the synthetic corpus are validation, all later ones training
SPLITS = ("train", "val")

Cursor = dict[str, Any]


class Source(Protocol):
    """What the loader needs: a name, an identity, and documents with cursors."""

    name: str

    def fingerprint(self) -> str:
        """Changes when the documents or their order change; a cursor is only good for the same fingerprint."""

    def documents(self, split: str, cursor: Cursor | None = None) -> Iterator[tuple[str, Cursor]]:
        """(text, cursor) pairs after `cursor`; split "train" never ends, "val" does."""


def open_source(
    uri: str,
    *,
    home: Home,
    seed: int,
    num_shards: int | None = None,
    mirror: str | None = None,
    offline: bool = False,
) -> Source:
    """The source named by `uri`. num_shards, mirror, offline: only for `hub:` (None: all training shards)."""
    kind, _, rest = uri.partition(":")
    if kind == "synthetic" and not rest:
        return SyntheticSource(seed)
    if not rest or kind not in ("parquet", "jsonl", "text", "hub"):
        raise UserError(
            f"there is no data source {uri!r}",
            "use synthetic, parquet:DIR_OR_GLOB, jsonl:FILE, text:FILE_OR_DIR or hub:OWNER/NAME[@revision][:glob]",
        )
    if kind == "parquet":
        return _open_parquet(rest, seed)
    if kind == "hub":
        directory, shards = hub.fetch_shards(
            rest, home=home, num_shards=num_shards, mirror=mirror, offline=offline
        )
        return _parquet_source(f"hub:{rest}", directory, shards, seed, by_file=True)
    return _open_lines(kind, Path(rest).expanduser(), seed)


class SyntheticSource:
    """The embedded corpus: document i is a pure function of (seed, i), so training and validation cannot meet."""

    name = "synthetic"

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self._fingerprint = ""

    def fingerprint(self) -> str:
        """Of the seed and the first documents, so that a change of the generator is noticed."""
        from nanochat.data import synthetic

        if not self._fingerprint:
            texts = [synthetic.document(self.seed, index) for index in range(16)]
            self._fingerprint = _digest("synthetic", self.seed, texts)
        return self._fingerprint

    def documents(self, split: str, cursor: Cursor | None = None) -> Iterator[tuple[str, Cursor]]:
        check_cursor(cursor, self.fingerprint(), split, self.name)
        first = 0 if split == "val" else NUM_SYNTHETIC_VAL
        return self._documents(split, cursor["next"] if cursor else first)

    def _documents(self, split: str, index: int) -> Iterator[tuple[str, Cursor]]:
        from nanochat.data import synthetic

        while split == "train" or index < NUM_SYNTHETIC_VAL:
            index += 1
            cursor = {"source": self._fingerprint, "split": split, "next": index}
            yield synthetic.document(self.seed, index - 1), cursor


@dataclass(frozen=True)
class Chunk:
    """A part of a file that is read at once: row group `start` of a parquet file, or `size` bytes from `start`."""

    path: Path
    start: int
    size: int = 0


class FileSource:
    """Documents in chunks of files. Without val_chunks, a fixed hash of each text decides its split."""

    def __init__(
        self,
        name: str,
        chunks: list[Chunk],
        read: Callable[[Chunk], list[str]],
        content: str,
        seed: int,
        *,
        val_chunks: list[Chunk] | None = None,
        by_file: bool = False,
    ) -> None:
        self.name, self.seed, self.by_file = name, seed, by_file
        self._chunks, self._val_chunks, self._read = chunks, val_chunks, read
        self._fingerprint = _digest(content, seed)

    def fingerprint(self) -> str:
        return self._fingerprint

    def documents(self, split: str, cursor: Cursor | None = None) -> Iterator[tuple[str, Cursor]]:
        check_cursor(cursor, self._fingerprint, split, self.name)
        return self._documents(split, *(cursor["at"] if cursor else (0, 0, 0)))

    def _documents(
        self, split: str, epoch: int, position: int, document: int
    ) -> Iterator[tuple[str, Cursor]]:
        is_complete = (position, document) == (0, 0)  # this pass started at the beginning
        chunks = self._chunks if split == "train" or self._val_chunks is None else self._val_chunks
        num_found = 0
        while True:
            order = self._order(epoch) if split == "train" else range(len(chunks))
            for place in range(position, len(chunks)):
                texts = self._texts(chunks[order[place]], split)
                num_found += len(texts)
                inside = range(len(texts))
                if split == "train":
                    inside = _permutation(len(texts), self.seed, epoch, order[place])
                for number in range(document, len(texts)):
                    at = [epoch, place, number + 1]
                    yield texts[inside[number]], {"source": self._fingerprint, "split": split, "at": at}
                document = 0
            if is_complete and not num_found:
                raise UserError(
                    f"{self.name} holds no document for {'training' if split == 'train' else 'validation'}",
                    f"give more documents (about {VAL_PERCENT} % of them, chosen by a hash of the text, are validation)",
                )
            if split == "val":
                return
            epoch, position, is_complete = epoch + 1, 0, True

    def _texts(self, chunk: Chunk, split: str) -> list[str]:
        texts = [text for text in self._read(chunk) if text and not text.isspace()]
        if self._val_chunks is None:
            texts = [text for text in texts if is_validation(text) == (split == "val")]
        return texts

    def _order(self, epoch: int) -> list[int]:
        """Chunk numbers of an epoch. by_file keeps a file's chunks together, so that shards can arrive one by one."""
        order = _permutation(len(self._chunks), self.seed, epoch)
        if self.by_file:
            paths = list(dict.fromkeys(chunk.path for chunk in self._chunks))
            rank = dict(zip(paths, _permutation(len(paths), self.seed, epoch, -1)))
            order.sort(key=lambda number: rank[self._chunks[number].path])
        return order


def is_validation(text: str) -> bool:
    """The fixed rule for sources without a validation shard: a hash of the text, about 1 %, the same everywhere."""
    digest = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "big") % 100 < VAL_PERCENT


def check_cursor(cursor: Cursor | None, fingerprint: str, split: str, name: str) -> None:
    """Refuse a cursor of other data, and a split that does not exist."""
    if split not in SPLITS:
        raise ValueError(f"split must be one of {SPLITS}, got {split!r}")
    if cursor is not None and (cursor["source"], cursor["split"]) != (fingerprint, split):
        raise UserError(
            f"the saved position belongs to other data (or another seed) than {name} holds now",
            "resume with the data, --source and --seed that the run was started with, or start a new run",
        )


def _permutation(size: int, *key: int) -> list[int]:
    return np.random.default_rng([part + 1 for part in key]).permutation(size).tolist()


def _digest(*parts: Any) -> str:
    return hashlib.sha256(json.dumps(parts, ensure_ascii=True).encode()).hexdigest()


# parquet


def _open_parquet(where: str, seed: int) -> FileSource:
    path = Path(where).expanduser()
    shards: list[dict[str, Any]] | None = None
    if any(sign in where for sign in "*?["):
        files = sorted(Path(name) for name in glob.glob(str(path), recursive=True))
        directory = path.parent
    elif path.is_dir():
        directory, files = path, sorted(path.glob("*.parquet"))
        shards = hub.read_manifest(path)["shards"] if (path / hub.MANIFEST).exists() else None
    else:
        directory, files = path.parent, [path] if path.exists() else []
    if shards is not None:
        return _parquet_source(f"parquet:{where}", directory, hub.verified(shards, directory), seed)
    if not files:
        raise UserError(
            f"there is no parquet file at {where}", "give a directory, a file or a glob of .parquet files"
        )
    shards = [
        {"name": str(file.relative_to(directory) if file.is_relative_to(directory) else file)}
        for file in files
    ]
    return _parquet_source(f"parquet:{where}", directory, shards, seed)


def _parquet_source(
    name: str, directory: Path, shards: list[dict[str, Any]], seed: int, by_file: bool = False
) -> FileSource:
    chunks: dict[str, list[Chunk]] = {"train": [], "val": []}
    identity = []
    for shard in shards:
        path = directory / shard["name"]
        groups, footer = _footer(path)
        chunks[shard.get("role", "train")] += [Chunk(path, group) for group in range(groups)]
        identity.append([shard["name"], shard.get("role", "train"), shard.get("sha256") or footer])
    has_val = any(shard.get("role") == "val" for shard in shards)
    for split in SPLITS if has_val else SPLITS[:1]:
        if not chunks[split]:
            raise UserError(
                f"{name} has no {split} shard with rows", "fetch more shards: python -m scripts.data --help"
            )
    val = chunks["val"] if has_val else None
    return FileSource(
        name, chunks["train"], _read_group, _digest(identity), seed, val_chunks=val, by_file=by_file
    )


def _footer(path: Path) -> tuple[int, str]:
    """(row groups, an identity made of the file's size and its footer: offsets, sizes, statistics)."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            groups, columns = file.num_row_groups, file.schema_arrow.names
        with path.open("rb") as raw:
            size = raw.seek(-8, 2) + 8
            length = int.from_bytes(raw.read(4), "little")
            raw.seek(size - 8 - length)
            footer = hashlib.sha256(raw.read(length)).hexdigest()
    except (OSError, pa.ArrowException) as error:
        raise UserError(
            f"{path} cannot be read as parquet: {error}", "delete it and fetch it again"
        ) from error
    if "text" not in columns:
        raise UserError(
            f"{path} has no column 'text' (it has {', '.join(columns)})", "give files with a text column"
        )
    return groups, f"{size}-{footer}"


def _read_group(chunk: Chunk) -> list[str]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(chunk.path, page_checksum_verification=True) as file:
            column = file.read_row_group(chunk.start, columns=["text"], use_threads=False).column(0)
        return [text for text in column.to_pylist() if text is not None]
    except (OSError, pa.ArrowException, UnicodeDecodeError) as error:
        raise UserError(
            f"{chunk.path} is damaged in row group {chunk.start}: {error}",
            "delete it and fetch it again (python -m scripts.data --verify finds such files)",
        ) from error


# text and jsonl


def _open_lines(kind: str, path: Path, seed: int) -> FileSource:
    files = [path] if path.is_file() else []
    if kind == "text" and path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.suffix in (".txt", ".md") and file.is_file())
    if not files:
        what = "a .txt or .md file" if path.is_dir() else "a file"
        raise UserError(f"{kind}:{path} names no {what}", f"check the path; {kind}: takes " + _TAKES[kind])
    chunks, identity = [], []
    for file in files:
        found, digest = _scan(file, whole=path.is_dir(), blank_lines=kind == "text")
        chunks += found
        identity.append([file.name, digest])
    if path.is_dir():
        read = _read_whole
    else:
        read = _read_blocks if kind == "text" else _read_json
    return FileSource(f"{kind}:{path}", chunks, read, _digest(kind, identity), seed)


_TAKES = {"text": "a text file or a directory of them", "jsonl": "one file with a JSON object a line"}


def _scan(path: Path, *, whole: bool, blank_lines: bool) -> tuple[list[Chunk], str]:
    """(chunks of about a megabyte that end at a line, or a blank line; sha256). Raises UserError at a byte not UTF-8."""
    chunks, digest, start = [], hashlib.sha256(), 0
    with path.open("rb") as file:
        while block := bytearray(file.read(-1 if whole else CHUNK_BYTES)):
            block += file.readline()  # the rest of the line
            while blank_lines and (line := file.readline()):
                block += line
                if not line.strip():
                    break
            try:
                block.decode("utf-8")
            except UnicodeDecodeError as error:
                raise UserError(
                    f"{path} is not UTF-8: byte {block[error.start]:#04x} at offset {start + error.start}",
                    f"convert it first, for example: iconv -f latin1 -t utf-8 {path.name}",
                ) from error
            digest.update(block)
            chunks.append(Chunk(path, start, len(block)))
            start += len(block)
    return chunks, digest.hexdigest()


def _read_whole(chunk: Chunk) -> list[str]:
    with chunk.path.open("rb") as file:
        file.seek(chunk.start)
        data = file.read(chunk.size)
    try:
        return [data.decode("utf-8-sig" if chunk.start == 0 else "utf-8").replace("\r\n", "\n")]
    except UnicodeDecodeError as error:
        raise UserError(
            f"{chunk.path} has changed while it was in use", "leave the file alone during a run"
        ) from error


def _read_blocks(chunk: Chunk) -> list[str]:
    return [text.strip("\n") for text in re.split(r"\n(?:[ \t]*\n)+", _read_whole(chunk)[0])]


def _read_json(chunk: Chunk) -> list[str]:
    texts = []
    for number, line in enumerate(_read_whole(chunk)[0].split("\n")):
        if not line.strip():
            continue
        try:
            texts.append(json.loads(line)["text"])
            if not isinstance(texts[-1], str):
                raise TypeError
        except (ValueError, KeyError, TypeError) as error:
            with chunk.path.open("rb") as file:
                number += file.read(chunk.start).count(b"\n") + 1
            raise UserError(
                f'{chunk.path}, line {number}: must be an object with a string "text", found {line[:60]!r}',
                "repair or remove this line",
            ) from error
    return texts
