"""Train the tokenizer on the first characters of the training text.

python -m scripts.tok_train --preset=cpu-demo
python -m scripts.tok_train --data=text:novel.txt --vocab-size=4096
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from nanochat import config, errors, scaling
from nanochat.config import HubSettings, setting
from nanochat.data.sources import Source, open_source
from nanochat.home import Home
from nanochat.progress import Bar
from nanochat.run_dir import open_stage
from nanochat.runtime import Runtime
from nanochat.tokenizer import FILE_NAME, RustBPETokenizer

CHECK_CHARS = 1_000_000  # of validation text, on which compression is measured


@dataclass(frozen=True)
class Settings(HubSettings):
    seed: int = setting(1, "seed of the document order")
    data: str = setting("synthetic", "source: synthetic, parquet:DIR, jsonl:FILE, text:PATH, hub:OWNER/NAME")
    vocab_size: int = setting(32768, "tokens, the nine special ones included")
    max_chars: int = setting(2_000_000_000, "characters to train on")
    doc_cap: int = setting(10_000, "characters taken from one document at most")
    shards: int | None = setting(None, "training shards to have (hub only; default: all)")


_hub = Settings(data="hub:karpathy/climbmix-400b-shuffle", shards=8)
PRESETS = {
    "smoke": Settings(vocab_size=scaling.RUNS["smoke"]["vocab_size"], max_chars=200_000),
    "cpu-demo": Settings(vocab_size=scaling.RUNS["cpu-demo"]["vocab_size"], max_chars=20_000_000),
    "single-gpu": _hub,
    "speedrun": _hub,
}


class Feed:
    """The texts to train on, each cut at `doc_cap`, up to `max_chars` or one pass; it counts them."""

    def __init__(self, source: Source, cfg: Settings) -> None:
        self.source, self.cfg = source, cfg
        self.documents = self.chars = self.bytes = 0

    def __iter__(self) -> Iterator[Any]:
        """Arrow arrays of strings."""
        bar = Bar("counting", self.cfg.max_chars)
        try:
            for block in self.source.blocks("train"):
                epoch = block.cursor(0).get("at", [0])[0]  # only finite sources have epochs
                if self.chars >= self.cfg.max_chars or epoch > 0:
                    break
                if block.dtype is not None:
                    raise errors.UserError(f"{self.cfg.data} holds tokens, not text", "give their source")
                yield self.counted(block.array)
                share = f"{self.chars / 1e6:.1f} of at most {self.cfg.max_chars / 1e6:g} M characters"
                bar.show(self.chars, f"{share}, {self.bytes / 1e6 / bar.seconds():.1f} MB/s")
        finally:
            bar.close()

    def counted(self, array: Any) -> Any:
        """The part of `array` that is within the limits."""
        import pyarrow as pa
        import pyarrow.compute as pc

        array = pc.utf8_slice_codeunits(array, 0, self.cfg.doc_cap)
        ends = self.chars + np.cumsum(pc.utf8_length(array).to_numpy(zero_copy_only=False))
        within = int(np.searchsorted(ends, self.cfg.max_chars, side="right"))
        if within < len(array):  # the first document beyond the limit is cut
            room = self.cfg.max_chars - (int(ends[within - 1]) if within else self.chars)
            last = pc.utf8_slice_codeunits(array[within : within + min(room, 1)], 0, room)
            array, ends[-1] = pa.concat_arrays([array[:within], last]), self.cfg.max_chars
        self.documents, self.chars = self.documents + len(array), int(ends[-1])
        self.bytes += int(pc.sum(pc.binary_length(array)).as_py())
        return array


def main(argv: list[str] | None = None) -> None:
    cfg = config.parse(Settings, PRESETS, argv, __doc__)
    if min(cfg.max_chars, cfg.doc_cap) < 1 or not 265 <= cfg.vocab_size <= 1 << 24:
        raise errors.UserError(
            "--max-chars and --doc-cap must be positive and --vocab-size from 265 to 2^24",
            f"found {cfg.max_chars}, {cfg.doc_cap} and {cfg.vocab_size}",
        )
    home = Home.find(cfg.home)
    source = open_source(
        cfg.data, home=home, seed=cfg.seed, num_shards=cfg.shards, mirror=cfg.mirror, offline=cfg.offline
    )
    rt = Runtime(torch.device("cpu"), torch.float32)
    path = home.tokenizer_dir / FILE_NAME
    with open_stage("tok_train", cfg, rt, {"source": source.fingerprint()}) as stage:
        earlier = fingerprint_at(home.tokenizer_dir)
        if stage.finished and stage.finished["tokenizer"] == earlier:
            print(f"tok_train: already finished, {stage.finished['vocab_size']:,} tokens in {path}")
            return
        start, feed = time.monotonic(), Feed(source, cfg)
        merging = Bar("merging", cfg.vocab_size)
        tok = RustBPETokenizer.train_from_iterator(
            feed, cfg.vocab_size, progress=lambda done, of: merging.show(done, f"{done:,} of {of:,} merges")
        )
        merging.close()
        seconds = time.monotonic() - start
        if earlier is not None and earlier != tok.fingerprint():
            kept = path.with_name(f"tokenizer-{earlier[:12]}.json")
            path.replace(kept)
            print(f"the tokenizer that was here is kept as {kept.name}")
        tok.save(home.tokenizer_dir)
        if tok.get_vocab_size() < cfg.vocab_size:
            print(f"the text has no more pairs: {tok.get_vocab_size()} tokens instead of {cfg.vocab_size}")
        texts = list(itertools.islice((text for text, _ in source.documents("val")), 1000))
        check = "\n".join(texts)[:CHECK_CHARS]
        ratio = len(check.encode("utf-8", "replace")) / len(tok.encode(check))
        print(f"{tok.get_vocab_size():,} tokens in {seconds:.1f} s, {ratio:.3f} bytes per token: {path}")
        facts = {
            "documents": feed.documents,
            "chars": feed.chars,
            "bytes": feed.bytes,
            "bytes_per_token": ratio,
        }
        facts |= {"vocab_size": tok.get_vocab_size(), "seconds": round(seconds, 2)}
        stage.finish(tokenizer=tok.fingerprint(), **facts)


def fingerprint_at(directory: Path) -> str | None:
    """The fingerprint of the tokenizer that is there; None if there is none, or a damaged one."""
    try:
        return RustBPETokenizer.from_directory(directory).fingerprint()
    except errors.UserError:
        return None


if __name__ == "__main__":
    raise SystemExit(errors.run(main))
