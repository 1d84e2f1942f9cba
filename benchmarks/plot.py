"""Charts of the records, as SVG beside them: training speed and attention.

    python -m benchmarks.plot benchmarks/record/amd-epyc-2-cores

Takes the newest *-train.csv and *-attention.csv of the folder; prints the files that it writes. Drawn by
nanochat.report.charts, without any package.
"""

from __future__ import annotations

import argparse
import csv
import re
from collections.abc import Sequence
from pathlib import Path

from nanochat.report.charts import Bars, Chart, bar_chart

COLOURS = ("#4c72b0", "#dd8452", "#55a868", "#8172b3", "#c44e52")


def training(rows: Sequence[dict[str, str]]) -> Chart | None:
    """Tokens/s of each variant by depth and dtype; dotted: the floor that matrix products set to ours."""
    rows = [
        {"variant": "ours"} | row for row in rows
    ]  # records of before plain loops were measured beside it
    groups = list(dict.fromkeys((row["depth"], row["width"], row["dtype"]) for row in rows))
    variants = list(dict.fromkeys(row["variant"] for row in rows))
    found = {(r["depth"], r["width"], r["dtype"], r["variant"]): r for r in rows}

    def values(variant: str, column: str) -> list[float | None]:
        cells = (found.get((*group, variant), {}).get(column) for group in groups)
        return [float(cell) if cell else None for cell in cells]

    series = [
        Bars(name, values(name, "tokens_per_second"), COLOURS[i % 5]) for i, name in enumerate(variants)
    ]
    floors = values("ours", "floor_tokens_per_second")
    top = 1.08 * max(v for bars in (*series, Bars("", floors, "")) for v in bars.values if v is not None)
    names = [f"depth {depth}, width {width}, {dtype}" for depth, width, dtype in groups]
    return bar_chart("Training speed", names, series, "tokens/s (dotted: floor)", floors, top, is_wide=True)


def attention(rows: Sequence[dict[str, str]]) -> Chart | None:
    """Forward and backward of full, windowed and masked attention as multiples of the windowed one."""
    rows = [row for row in rows if row["what"] == "window"]
    groups = list(dict.fromkeys((row["shape"], row["dtype"]) for row in rows))
    variants = list(dict.fromkeys(row["variant"] for row in rows))
    found = {(r["shape"], r["dtype"], r["variant"]): float(r["times_window"]) for r in rows}
    series = [
        Bars(name, [found.get((*group, name)) for group in groups], COLOURS[i % 5])
        for i, name in enumerate(variants)
    ]
    sizes = (re.match(r"(B\d+ T\d+)", shape) for shape, _ in groups)
    names = [f"{size[1] if size else ''} {dtype}" for size, (_, dtype) in zip(sizes, groups, strict=True)]
    return bar_chart("Attention, forward and backward", names, series, "time, windowed = 1", is_wide=True)


KINDS = {"train": training, "attention": attention}


def draw(folder: Path) -> list[Path]:
    """Write the charts of a folder of records; their paths."""
    written = []
    for kind, chart in KINDS.items():
        records = sorted(folder.glob(f"*-{kind}.csv"))
        if not records:
            continue
        with open(records[-1], newline="", encoding="utf-8") as file:
            drawn = chart(list(csv.DictReader(file)))
        if drawn is not None:
            written.append(records[-1].with_suffix(".svg"))
            written[-1].write_text(drawn.file(), encoding="utf-8")
    return written


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="benchmarks/record/MACHINE")
    for path in draw(parser.parse_args().folder):
        print(path)


if __name__ == "__main__":
    main()
