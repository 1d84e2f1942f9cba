"""Write the report of a run, report.html and report.md with charts, from the facts its stages have left.

python -m scripts.report --tag=main
python -m scripts.report --tag=main --price=3     with what it cost, at $3 per device and hour
python -m scripts.report A B          compares two runs (TAG, or TAG in another home as HOME:TAG)
"""

from __future__ import annotations

import sys
from dataclasses import dataclass

from nanochat import config, errors
from nanochat.config import RunSettings, setting
from nanochat.home import Home, write_text
from nanochat.report import answers, pages, tables
from nanochat.report.facts import read_facts


@dataclass(frozen=True)
class Settings(RunSettings):
    seed: int = setting(1, "taken as in every script; a report has nothing random")
    price: float | None = setting(None, "dollars per device and hour (default: no cost is shown)")


ANSWERS = "answers.html"
PRESETS = {name: Settings() for name in ("smoke", "cpu-demo", "single-gpu", "speedrun")}


def main(argv: list[str] | None = None) -> None:
    words = list(sys.argv[1:] if argv is None else argv)
    runs: list[str] = []
    while words and not words[0].startswith("-"):
        runs.append(words.pop(0))
    cfg = config.parse(Settings, PRESETS, words, __doc__)
    home = Home.find(cfg.home)
    if runs:
        side_by_side(home, runs)
        return
    facts = read_facts(home, cfg.tag)
    directory = home.report_dir(cfg.tag)
    charts = pages.chart_files(facts)
    for name, chart in charts.items():
        write_text(directory / name, chart.file())
    tasks, left_out = answers.collect(home, cfg.tag, facts)
    if tasks:
        write_text(directory / ANSWERS, pages.answers(tasks, left_out, cfg.tag))
    write_text(directory / "report.md", pages.markdown(facts, cfg.tag, list(charts), cfg.price))
    write_text(directory / "report.html", pages.html(facts, cfg.tag, cfg.price, ANSWERS if tasks else None))
    write_text(directory / "summary.csv", tables.summary_csv(facts))
    print(tables.plain(tables.summary(facts)))
    for name, stage in facts.items():
        if stage.status != "finished":
            print(f"{name}: {stage.status}")
    also = f"report.md, summary.csv{f', {ANSWERS}' if tasks else ''}"
    print(f"\nreport: {directory / 'report.html'} (and {also})")


def side_by_side(home: Home, runs: list[str]) -> None:
    """Write compare.html and compare.md of two runs into the first one's report directory."""
    if len(runs) != 2:
        raise errors.UserError(f"two runs can be compared, found {len(runs)}", "write: report TAG_A TAG_B")
    places = [
        (Home.find(where) if where else home, tag) for where, _, tag in (r.rpartition(":") for r in runs)
    ]
    a, b = (read_facts(place, tag) for place, tag in places)
    names = (places[0][1], places[1][1]) if places[0][1] != places[1][1] else ("A", "B")
    text, page = pages.compare(a, b, names)
    directory = places[0][0].report_dir(places[0][1])
    write_text(directory / "compare.md", text)
    write_text(directory / "compare.html", page)
    print(tables.plain(tables.differences(a, b, names)))
    print(f"\ncomparison: {directory / 'compare.html'}")


if __name__ == "__main__":
    raise SystemExit(errors.run(main))
