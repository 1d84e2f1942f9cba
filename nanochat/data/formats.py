"""Reading files in chunks: parquet row groups, JSON lines, plain text. A chunk becomes one Arrow array."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import Any

from nanochat.data.documents import to_arrow
from nanochat.data.download.manifest import parquet_metadata
from nanochat.data.files import DamagedPart, FilePart
from nanochat.errors import UserError

CHUNK_BYTES = 1 << 20


# parquet


def parquet_chunks(path: Path, column: str = "text") -> tuple[list[FilePart], str]:
    """(a chunk for every row group that holds rows, an identity: the size and a hash of the footer)."""
    metadata = parquet_metadata(path)
    columns = metadata.schema.to_arrow_schema().names
    if column not in columns:
        raise UserError(
            f"{path} has no column {column!r}, only {', '.join(columns)}", "give files with that column"
        )
    with path.open("rb") as raw:
        size = raw.seek(-8, 2) + 8
        raw.seek(-8 - int.from_bytes(raw.read(4), "little"), 2)
        footer = hashlib.sha256(raw.read()).hexdigest()
    groups = [group for group in range(metadata.num_row_groups) if metadata.row_group(group).num_rows]
    return [FilePart(path, group) for group in groups], f"{size} {footer}"


def read_group(chunk: FilePart, column: str = "text") -> Any:
    """One column of a row group, page checksums and UTF-8 verified. DamagedPart names file and group."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(chunk.path, page_checksum_verification=True) as file:
            table = file.read_row_group(chunk.start, columns=[column], use_threads=False)
        found = table.column(0)
        fits, large = (
            (pa.string(), pa.large_string()) if column == "text" else (pa.binary(), pa.large_binary())
        )
        if found.type != fits or found.nbytes > 1 << 30:  # 32-bit offsets end at 2 GB
            found = found.cast(large)
        array = found.combine_chunks()
        array.validate(full=True)
        return array
    except (OSError, pa.ArrowException, UnicodeDecodeError) as error:
        problem = f"{chunk.path} is damaged in row group {chunk.start}: {' '.join(str(error).split())}"
        raise DamagedPart(
            problem, "delete it and fetch it again (python -m scripts.data --verify)"
        ) from error


# text and jsonl


def scan(path: Path, *, whole: bool, blank_lines: bool) -> tuple[list[FilePart], str]:
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
            chunks.append(FilePart(path, start, len(block)))
            start += len(block)
    return chunks, digest.hexdigest()


def read_file(chunk: FilePart) -> Any:
    return to_arrow([_content(chunk)])


def read_blocks(chunk: FilePart) -> Any:
    return to_arrow(split_blocks(chunk))


def read_lines(chunk: FilePart) -> Any:
    return to_arrow(split_json(chunk))


def _content(chunk: FilePart) -> str:
    with chunk.path.open("rb") as file:
        file.seek(chunk.start)
        data = file.read(chunk.size)
    try:
        return data.decode("utf-8-sig" if chunk.start == 0 else "utf-8").replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        raise UserError(f"{chunk.path} has changed while in use", "leave it alone during a run") from error


def split_blocks(chunk: FilePart) -> list[str]:
    """The texts between blank lines."""
    return [text.strip("\n") for text in re.split(r"(?:^|\n)(?:[ \t]*\n)+", _content(chunk))]


def split_json(chunk: FilePart) -> list[str]:
    """The field `text` of every line. UserError names a line that has none."""
    texts = []
    for number, line in enumerate(_content(chunk).split("\n")):
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
