"""Fetch, verify and measure training text, before a run needs it.

python -m scripts.data --source=hub:karpathy/climbmix-400b-shuffle --shards=8
python -m scripts.data --source=parquet:my/texts --verify
python -m scripts.data --source=text:novel.txt --measure=20
"""

from __future__ import annotations

import itertools
import time
from dataclasses import dataclass, replace

import numpy as np

from nanochat import config, errors
from nanochat.config import setting
from nanochat.data.download import hub
from nanochat.data.pack import POLICIES, CropPacker
from nanochat.data.sources import FileSource, Source, open_source
from nanochat.errors import UserError
from nanochat.home import Home
from nanochat.tokenizer import RustBPETokenizer


@dataclass(frozen=True)
class Settings:
    home: str | None = setting(
        None, "directory of all data and runs (default: NANOCHAT_HOME, else the cache)"
    )
    source: str = setting("synthetic", "synthetic, parquet:, jsonl:, text:, hub: or tokens: (docs/data.md)")
    shards: int | None = setting(None, "training shards to have (hub only; default: all)")
    mirror: str | None = setting(None, "directory or URL that replaces the hub (default: NANOCHAT_MIRROR)")
    offline: bool = setting(False, "open no connection")
    verify: bool = setting(False, "hash or read everything that is there; fetch damaged shards again")
    measure: int = setting(0, "megabytes of text to encode and pack, for speed and waste (0: none)")
    sequence_len: int = setting(2048, "tokens per row, for --measure")
    seed: int = setting(1, "seed of the document order")
    damaged: str = setting("stop", "stop or skip at a part of a file that cannot be read as it was written")


_hub = Settings(source="hub:karpathy/climbmix-400b-shuffle")
PRESETS = {
    "smoke": Settings(),
    "cpu-demo": Settings(),
    "single-gpu": replace(_hub, shards=30),
    "speedrun": replace(_hub, shards=170),
}


def main(argv: list[str] | None = None) -> None:
    cfg = config.parse(Settings, PRESETS, argv, __doc__)
    home = Home.find(cfg.home)
    kind, _, rest = cfg.source.partition(":")
    if kind == "hub":
        name, _, revision = rest.partition(":")[0].partition("@")
        repo = hub.open_repo(name, home, cfg.mirror, cfg.offline, revision)
        if cfg.verify and (repo.directory / hub.MANIFEST).exists():
            bad = hub.verify(repo)
            print(f"verified {repo.directory}: {len(bad)} damaged or missing {' '.join(bad)}")
        directory, entries = hub.fetch_shards(rest, home, cfg.shards, cfg.mirror, cfg.offline)
        size, rows = sum(entry["size"] for entry in entries), sum(entry["rows"] for entry in entries)
        print(f"{len(entries)} shards, {size / 1e6:.1f} MB, {rows:,} documents: {directory}")
    source = open_source(
        cfg.source, home=home, seed=cfg.seed, num_shards=cfg.shards, mirror=cfg.mirror, offline=cfg.offline,
        damaged=cfg.damaged,
    )  # fmt: skip
    print(f"{source.name}: fingerprint {source.fingerprint()[:16]}")
    if cfg.verify and isinstance(source, FileSource):
        for split in ("train", "val"):
            print(f"{split}: {source.num_documents(split):,} documents")
    if cfg.measure:
        measure(source, RustBPETokenizer.from_directory(home.tokenizer_dir), cfg)


def measure(source: Source, tok: RustBPETokenizer, cfg: Settings) -> None:
    """Print the speed of reading, encoding and packing on one core, and what each packing policy discards."""
    blocks, size = [], 0
    endless = source.blocks("train")
    next(endless)  # the first one imports and opens
    start = time.process_time()
    for block in endless:
        blocks.append(block)
        size += block.array.nbytes
        if size >= cfg.measure * 1e6:
            break
    read = time.process_time() - start
    bos = tok.get_bos_token_id()
    start = time.process_time()
    encoded = [
        tok.encode_arrow(b.array, prepend=bos, num_threads=1) if b.dtype is None else b.tokens()
        for b in blocks
    ]
    encode = time.process_time() - start
    num_tokens = sum(len(tokens) for tokens, _ in encoded)
    what = "text" if source.tokenizer is None else "tokens"
    print(f"{sum(map(len, blocks)):,} documents, {size / 1e6:.1f} MB of {what}, {num_tokens:,} tokens")
    print(f"read    {size / 1e6 / read:7.1f} MB/s of one core")
    if source.tokenizer is None:
        speed = num_tokens / 1e6 / encode
        print(f"encode  {size / 1e6 / encode:7.1f} MB/s, {speed:.2f}M tokens/s of one core")
    for policy in POLICIES:
        packer = CropPacker(cfg.sequence_len + 1, bos, policy=policy)
        row = np.empty(packer.row_tokens, dtype=np.int32)
        start = time.process_time()
        for tokens, offsets in encoded:
            for first, end in itertools.pairwise(offsets.tolist()):
                packer.add(tokens[first:end])
                while not packer.wants_more:
                    packer.fill(row)
        packed = time.process_time() - start
        count = packer.counts
        if not count["rows"]:
            raise UserError(f"{cfg.measure} MB fill no row", "raise --measure")
        lost = count["tokens_dropped"] / (count["tokens_out"] + count["tokens_dropped"])
        speed = num_tokens / 1e6 / packed
        print(f"{policy:6}  {speed:7.1f}M tokens/s, {lost:.3%} of tokens discarded at T = {cfg.sequence_len}")


if __name__ == "__main__":
    raise SystemExit(errors.run(main))
