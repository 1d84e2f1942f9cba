"""Write the report of a run, report.html and report.md with plots, from the facts its stages have left.

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
from nanochat.report import answers, page, plots
from nanochat.report.compare import compare, difference_table, summary_csv
from nanochat.report.facts import Facts, read_facts
from nanochat.report.html import html


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
    facts, directory = read_facts(home, cfg.tag), home.report_dir(cfg.tag)
    tasks, left_out = answers.collect(home, cfg.tag, facts)
    if tasks:
        write_text(directory / ANSWERS, answers.html(tasks, left_out, cfg.tag))
    write_text(directory / "report.md", page.page(facts, cfg.tag, draw(facts, home, cfg.tag), cfg.price))
    write_text(directory / "report.html", html(facts, cfg.tag, cfg.price, ANSWERS if tasks else None))
    write_text(directory / "summary.csv", summary_csv(facts))
    print(page.plain(page.summary(facts)))
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
    text, whole = compare(a, b, names)
    directory = places[0][0].report_dir(places[0][1])
    write_text(directory / "compare.md", text)
    write_text(directory / "compare.html", whole)
    print(page.plain(difference_table(a, b, names)))
    print(f"\ncomparison: {directory / 'compare.html'}")


def draw(facts: Facts, home: Home, tag: str) -> list[str]:
    """The names of the plots; none, and a line that says so, without matplotlib."""
    directory = home.report_dir(tag)
    directory.mkdir(parents=True, exist_ok=True)
    try:
        return plots.draw(facts, directory)
    except ImportError:
        print("plots not drawn: matplotlib is not installed (pip install matplotlib)")
        return []


if __name__ == "__main__":
    raise SystemExit(errors.run(main))
