"""Encode a source once, for runs of many epochs or many nodes; then train with --data=tokens:DIR.

python -m scripts.tok_shards --data=parquet:my/texts --out=my/tokens
python -m scripts.base_train --data=tokens:my/tokens
"""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from pathlib import Path

from nanochat import config, errors
from nanochat.config import setting
from nanochat.data.files import FileSource
from nanochat.data.sources import open_source
from nanochat.data.tokens import TOKENS_FILE, read_facts, write_shards
from nanochat.errors import UserError
from nanochat.home import Home
from nanochat.tokenizer import RustBPETokenizer


@dataclass(frozen=True)
class Settings:
    home: str | None = setting(None, "directory of all runs (default: NANOCHAT_HOME, else the user's cache)")
    data: str = setting("", "source: parquet:DIR, jsonl:FILE, text:PATH or hub:OWNER/NAME")
    out: str = setting("", "directory for the shards")
    shard_mb: int = setting(256, "size of a shard (MB of tokens before compression)")
    threads: int | None = setting(None, "threads of the tokenizer (default: all cores)")
    shards: int | None = setting(None, "training shards to take (hub only; default: all)")
    offline: bool = setting(False, "open no connection")
    mirror: str | None = setting(None, "directory or URL that replaces the hub (default: NANOCHAT_MIRROR)")
    disk_gb: float | None = setting(None, "GB of downloaded shards to keep (hub only; default: no bound)")
    damaged: str = setting("stop", "stop or skip at a part of a file that cannot be read as it was written")


_hub = Settings(data="hub:karpathy/climbmix-400b-shuffle")
PRESETS = {
    "smoke": Settings(),
    "cpu-demo": Settings(),
    "single-gpu": replace(_hub, shards=30),
    "speedrun": replace(_hub, shards=170),
}


def main(argv: list[str] | None = None) -> None:
    cfg = config.parse(Settings, PRESETS, argv, __doc__)
    if not cfg.data or not cfg.out:
        raise UserError("--data and --out are needed", "for example --data=parquet:my/texts --out=my/tokens")
    home, out = Home.find(cfg.home), Path(cfg.out).expanduser()
    tok = RustBPETokenizer.from_directory(home.tokenizer_dir)
    source = open_source(
        cfg.data, home=home, seed=0, num_shards=cfg.shards, mirror=cfg.mirror, offline=cfg.offline,
        disk_gb=cfg.disk_gb, damaged=cfg.damaged,
    )  # fmt: skip
    if not isinstance(source, FileSource) or source.tokenizer is not None:
        raise UserError(f"{cfg.data} has no end, or no text", "give parquet:, jsonl:, text: or hub:")
    if (out / TOKENS_FILE).exists():
        facts = read_facts(out)
        if (facts["tokenizer"], facts["source_fingerprint"]) == (tok.fingerprint(), source.fingerprint()):
            print(f"already finished, {facts['tokens']:,} tokens in {out}")
            return
        raise UserError(f"{out} holds the tokens of another source or tokenizer", "choose another --out")
    start = shown = time.monotonic()
    counts: dict[str, int] = {}
    for counts in write_shards(
        source, tok, out, shard_bytes=cfg.shard_mb * 1_000_000, num_threads=cfg.threads
    ):
        if (now := time.monotonic()) - shown > 5:
            shown = now
            show(counts, now - start)
    if not counts:
        raise UserError(f"{cfg.data} holds no document", "give more documents")
    show(counts, time.monotonic() - start)
    print(f"train with --data=tokens:{cfg.out}")


def show(counts: dict[str, int], seconds: float) -> None:
    size = counts["text_bytes"] / 1e6
    print(
        f"{counts['documents']:,} documents, {size:.1f} MB, {counts['tokens']:,} tokens, "
        f"{size / max(seconds, 1e-9):.1f} MB/s",
        flush=True,
    )


if __name__ == "__main__":
    raise SystemExit(errors.run(main))
