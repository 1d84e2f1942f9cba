"""Compression and speed of the tokenizer on samples and validation text, beside those of GPT-2 and GPT-4.

python -m scripts.tok_eval

Prints two tables and draws them. Speed is that of one thread, by rustbpe and by tiktoken on the same
ranks; samples are short and repeated, so the speed on validation text says more.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from nanochat import config, errors
from nanochat.config import HubSettings, setting
from nanochat.data.sources import open_source
from nanochat.eval.tokenizers import ENGINES, num_bytes, speed, table
from nanochat.home import Home, write_text
from nanochat.report.charts import Bars, bar_chart
from nanochat.run_dir import open_stage
from nanochat.runtime import Runtime
from nanochat.tokenizer import RustBPETokenizer

OTHERS = ("gpt2", "cl100k_base")
SAMPLES = {
    "English": "The ferry left at dawn. Nobody on deck spoke, because everyone was listening to the fog: it "
    "carried the bell of the lighthouse, twice a minute, and between two strokes you could hear the island.",
    "code": "def median(numbers):\n    ordered = sorted(numbers)\n    half = len(ordered) // 2\n"
    "    if len(ordered) % 2:\n        return ordered[half]\n    return sum(ordered[half - 1 :][:2]) / 2\n",
    "maths": r"Let $a_0 = 1$ and $a_{n+1} = \frac{a_n}{2} + \frac{1}{a_n}$. Then $a_n^2 > 2$ for $n \geq 1$, "
    r"and $|a_n - \sqrt{2}| \leq 2^{-n}$; for example $a_3 = \frac{577}{408} \approx 1.414216$.",
    "Korean": "할머니는 매일 아침 마당의 감나무에 물을 주셨다. 가을이 되면 우리는 잘 익은 감을 땄다.",
    "Chinese": "河边的老桥已经有三百年了。每到春天,孩子们都会在桥上放风筝,老人们喝茶聊天。",
    "Russian": "Зимой река замерзала, и мы ходили в школу прямо по льду. Дед говорил: лёд помнит каждый шаг.",
    "emoji": "Good morning ☀️🐓! Breakfast 🥐☕, then a walk 🚶🌳, then 🎉🎂 at six 🕕 with all of us 👵👦❤️.",
}


@dataclass(frozen=True)
class Settings(HubSettings):
    seed: int = setting(1, "seed of the data source")
    data: str = setting("synthetic", "source: synthetic, parquet:DIR, jsonl:FILE, text:PATH, hub:OWNER/NAME")
    max_chars: int = setting(2_000_000, "characters of validation text (0: none)")
    wait: float = setting(10.0, "seconds to wait for an encoding that has to be fetched")
    shards: int | None = setting(None, "training shards to have (hub only; default: all)")


_hub = Settings(data="hub:karpathy/climbmix-400b-shuffle", shards=8)
PRESETS = {
    "smoke": Settings(max_chars=50_000, wait=1.0),
    "cpu-demo": Settings(),
    "single-gpu": _hub,
    "speedrun": _hub,
}


def main(argv: list[str] | None = None) -> None:
    cfg = config.parse(Settings, PRESETS, argv, __doc__)
    home = Home.find(cfg.home)
    tok = RustBPETokenizer.from_directory(home.tokenizer_dir)
    source = open_source(
        cfg.data, home=home, seed=cfg.seed, num_shards=cfg.shards, mirror=cfg.mirror, offline=cfg.offline
    )
    inputs = {"tokenizer": tok.fingerprint(), "source": source.fingerprint()}
    with open_stage("tok_eval", cfg, Runtime(torch.device("cpu"), torch.float32), inputs) as stage:
        if stage.finished:
            print(table("bytes per token", stage.finished["bytes_per_token"], stage.finished["bytes"]))
            print(table("MB/s, one thread", stage.finished["mb_per_second"], stage.finished["bytes"]))
            return
        texts = {name: [text] for name, text in SAMPLES.items()}
        if cfg.max_chars > 0:
            texts["validation"] = first(source.documents("val"), cfg.max_chars)
        sizes = {name: num_bytes(text) for name, text in texts.items()}
        ratios: dict[str, dict[str, float]] = {}
        speeds: dict[str, dict[str, float]] = {}
        for name in ("ours", *OTHERS):
            one = tok if name == "ours" else load(name, cfg.wait)
            counts = {what: sum(map(len, one.encode(texts[what]))) for what in texts} if one else {}
            ratios[name] = {what: sizes[what] / counts[what] for what in counts}
            for engine in ENGINES:
                rates = {what: speed(one, texts[what], engine) for what in texts} if one else {}
                speeds[f"{name} {engine}"] = rates
        print(table("bytes per token", ratios, sizes))
        print(table("MB/s, one thread", speeds, sizes))
        plot(home.stage_dir(cfg.tag, "tok_eval"), ratios, speeds)
        stage.finish(
            bytes_per_token=ratios, mb_per_second=speeds, bytes=sizes, vocab_size=tok.get_vocab_size()
        )


def plot(directory: Path, ratios: dict[str, dict[str, float]], speeds: dict[str, dict[str, float]]) -> None:
    """Bars of both tables, one group for each text."""
    colours = ("#4c72b0", "#8a8f98", "#937ac2", "#dd8452", "#55a868", "#c44e52", "#64b5cd", "#ccb974")
    for name, title, values in (
        ("bytes_per_token", "bytes per token (more is better)", ratios),
        ("speed", "MB/s, one thread", speeds),
    ):
        texts = list(ratios["ours"])
        series = [
            Bars(who, [found.get(text) for text in texts], colours[i % len(colours)])
            for i, (who, found) in enumerate(values.items())
            if found
        ]
        chart = bar_chart(title, texts, series, title, is_wide=True)
        if chart is not None:
            write_text(directory / f"{name}.svg", chart.file())
            print(f"plot: {directory / f'{name}.svg'}")


def first(documents: Iterable[tuple[str, Any]], max_chars: int) -> list[str]:
    """The first `max_chars` characters of documents."""
    texts: list[str] = []
    for text, _ in documents:
        texts.append(text[:max_chars])
        max_chars -= len(text)
        if max_chars <= 0:
            break
    return texts


def load(name: str, wait: float) -> RustBPETokenizer | None:
    """One of tiktoken's encodings, or None (said on the console) when it cannot be had."""
    try:
        return RustBPETokenizer.from_pretrained(name, timeout_seconds=wait)
    except errors.UserError as error:
        print(f"{name}: not available ({error.problem})")
        return None


if __name__ == "__main__":
    raise SystemExit(errors.run(main))
