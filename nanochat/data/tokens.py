"""Pre-tokenized shards: a source encoded once, for runs of many epochs or many nodes.

    DIR/train-00000.parquet, val-00000.parquet, ...    column `tokens`: the ids of a document, BOS first
    DIR/tokens.json                                    written last: tokenizer, dtype, counts, hashes

The files are parquet for its page checksums: damage is found when a row group is read, as in text.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from nanochat.data.documents import raw, runs
from nanochat.data.download.manifest import Entry, verified
from nanochat.data.download.transfer import hash_file, publish
from nanochat.data.files import FileSource
from nanochat.errors import UserError
from nanochat.home import read_json, write_json
from nanochat.protocols import Tokenizer

TOKENS_FILE, FORMAT = "tokens.json", 1


def read_facts(directory: Path) -> dict[str, Any]:
    """What tokens.json says, once every file is there at its size; UserError if not."""
    if not (directory / TOKENS_FILE).exists():
        problem = f"there is no {TOKENS_FILE} in {directory}"
        raise UserError(problem, "make it: python -m scripts.tok_shards --help")
    facts = read_json(directory / TOKENS_FILE)
    if facts.get("format") != FORMAT:
        problem = f"{directory / TOKENS_FILE} has format {facts.get('format')}, this program reads {FORMAT}"
        raise UserError(problem, "make the shards again: python -m scripts.tok_shards --help")
    verified(facts["shards"], directory)
    return facts


def write_shards(
    source: FileSource, tok: Tokenizer, directory: Path, *, shard_bytes: int, num_threads: int | None = None
) -> Iterator[dict[str, int]]:
    """Encode `source` into `directory`, each document once; yields running counts, tokens.json comes last."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / TOKENS_FILE).unlink(missing_ok=True)
    dtype = np.dtype("<u2" if tok.get_vocab_size() <= 1 << 16 else "<i4")
    counts = {"documents": 0, "tokens": 0, "text_bytes": 0}
    shards: list[Entry] = []
    for role in ("train", "val"):
        writer: _Writer | None = None
        for array in source.in_order(role):
            if not len(array):
                continue
            if writer is None:
                name = f"{role}-{sum(entry['role'] == role for entry in shards):05d}.parquet"
                writer = _Writer(directory / name, role)
            writer.add(array, tok, dtype, num_threads, counts)
            if writer.size >= shard_bytes:
                shards.append(writer.finish())
                writer = None
            yield counts
        if writer is not None:
            shards.append(writer.finish())
    facts = {"format": FORMAT, "source": source.name, "source_fingerprint": source.fingerprint()}
    facts |= {"tokenizer": tok.fingerprint(), "bos": tok.get_bos_token_id(), "dtype": dtype.str}
    write_json(directory / TOKENS_FILE, facts | counts | {"shards": shards})


class _Writer:
    """One shard under a temporary name; a row group for every chunk of the source."""

    def __init__(self, path: Path, role: str) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        self.path, self.role, self.rows, self.size = path, role, 0, 0
        self.temporary = path.with_name(f".{path.name}.part")
        self._writer = pq.ParquetWriter(
            self.temporary, pa.schema([("tokens", pa.binary())]), compression="zstd", compression_level=1,
            use_dictionary=False, write_statistics=False, write_page_checksum=True,
        )  # fmt: skip

    def add(
        self, texts: Any, tok: Tokenizer, dtype: np.dtype, threads: int | None, counts: dict[str, int]
    ) -> None:
        import pyarrow as pa

        sizes, columns = np.diff(raw(texts)[0]), []
        for start, end in runs(sizes, 0):
            part = texts.slice(start, end - start)
            tokens, offsets = tok.encode_arrow(part, prepend=tok.get_bos_token_id(), num_threads=threads)
            data = np.ascontiguousarray(tokens, dtype=dtype)
            where = (offsets * dtype.itemsize).astype(np.int32)
            buffers = [None, pa.py_buffer(where), pa.py_buffer(data)]
            columns.append(pa.Array.from_buffers(pa.binary(), len(part), buffers))
            counts["tokens"] += len(tokens)
            self.size += data.nbytes
        counts["documents"] += len(texts)
        counts["text_bytes"] += int(sizes.sum())
        self.rows += len(texts)
        column = pa.chunked_array(columns)
        self._writer.write_table(pa.table({"tokens": column}), row_group_size=len(texts))

    def finish(self) -> Entry:
        self._writer.close()
        publish(self.temporary, self.path)
        entry = {"name": self.path.name, "role": self.role, "size": self.path.stat().st_size}
        return entry | {"sha256": hash_file(self.path), "rows": self.rows}
