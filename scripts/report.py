"""Write the report of a run: report.md and plots, from the facts its stages have left; print the summary.

python -m scripts.report --tag=main
"""

from __future__ import annotations

from dataclasses import dataclass

from nanochat import config, errors
from nanochat.config import setting
from nanochat.paths import Home, write_text
from nanochat.report import page, plots
from nanochat.report.facts import Facts, read_facts


@dataclass(frozen=True)
class Settings:
    home: str | None = setting(None, "directory of all runs (default: NANOCHAT_HOME, else the user's cache)")
    tag: str = setting("main", "name of the run")
    seed: int = setting(1, "taken as in every script; a report has nothing random")


PRESETS = {name: Settings() for name in ("smoke", "cpu-demo", "single-gpu", "speedrun")}


def main(argv: list[str] | None = None) -> None:
    cfg = config.parse(Settings, PRESETS, argv, __doc__)
    home = Home.find(cfg.home)
    facts, directory = read_facts(home, cfg.tag), home.report_dir(cfg.tag)
    write_text(directory / "report.md", page.page(facts, cfg.tag, draw(facts, home, cfg.tag)))
    print(page.plain(page.summary(facts)))
    for name, stage in facts.items():
        if stage.status != "finished":
            print(f"{name}: {stage.status}")
    print(f"\nreport: {directory / 'report.md'}")


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
