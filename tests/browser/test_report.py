"""The report and its page of answers in a real browser: filters, the address, narrow screens."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from nanochat.home import Home, write_json
from scripts import report

playwright = pytest.importorskip(
    "playwright.sync_api", reason="not run: the package playwright is not installed"
)
CHROMIUM = next(
    (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None
)
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="not run: no chromium on this machine"),
]
EVIL = "</script><img src=x onerror=\"document.title='broken'\">"


@pytest.fixture
def page() -> Iterator[Any]:
    with playwright.sync_playwright() as p:
        running = p.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page, errors = running.new_page(viewport={"width": 390, "height": 800}), list[str]()
        page.on("pageerror", lambda error: errors.append(str(error)))
        yield page
        running.close()
        assert not errors


@pytest.fixture
def pages(home: Path) -> Path:
    """Reports of a run with 120 questions: mid has every third right, sft all but every fifth."""
    where = Home(home)
    for stage, rights in (("mid", lambda i: i % 3 == 0), ("sft", lambda i: i % 5 != 0)):
        name = f"chat_eval_{stage}"
        right = sum(map(rights, range(120)))
        f = {"accuracy": right / 120, "low": 0.1, "high": 0.9, "right": right, "total": 120, "chance": 0}
        write_json(where.settings_file("main", name), {"tag": "main"})
        write_json(where.result_file("main", name), {"tasks": {"facts": f}, "chatcore": 0.5})
        lines = [
            {"index": i, "question": f"question {i}", "reference": "r", "answer": EVIL, "full": EVIL,
             "ended": "stop", "right": rights(i)} for i in range(120)
        ]  # fmt: skip
        path = where.stage_dir("main", name) / "facts.jsonl"
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    for stage in ("mid", "sft"):
        path = where.metrics_file("main", stage)
        path.parent.mkdir(parents=True)
        write_json(where.settings_file("main", stage), {"tag": "main"})
        rows = [{"step": i, "loss": 1 / i, "lr_factor": 1.0, "tokens_per_second": 9.0} for i in range(1, 50)]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    report.main([])
    return where.report_dir("main")


def cards(page: Any) -> list[str]:
    return page.locator("article > p:first-child").all_inner_texts()


def test_answers_are_found(page: Any, pages: Path) -> None:
    """Wrong ones at first; the five filters by hand; what is chosen stands in the address."""
    page.goto(f"file://{pages}/report.html")
    page.get_by_role("link", name="All answers of all stages").click()
    assert cards(page) == [f"question {i}" for i in range(0, 120, 5)]
    assert page.locator("#count").inner_text() == "24 of 120 questions. sft: 96 right, 24 wrong."
    assert page.locator(".talk p").nth(1).inner_text() == EVIL and page.locator("img").count() == 0
    page.get_by_label("show").select_option("lost")
    assert cards(page) == [f"question {i}" for i in range(0, 120, 15)]
    page.get_by_label("show").select_option("won")
    assert len(cards(page)) == 50 and page.locator("#count").inner_text().startswith("64 of 120")
    page.get_by_role("button", name="show more").click()
    assert len(cards(page)) == 64 and page.locator("#more").is_hidden()
    page.get_by_label("model").select_option("mid")
    assert cards(page) == []  # nothing came before
    page.get_by_label("show").select_option("all")
    page.get_by_label("with the words").fill("question 11")
    assert sorted(cards(page)) == sorted(f"question {i}" for i in (11, *range(110, 120)))
    page.reload()
    assert page.get_by_label("model").input_value() == "mid" and len(cards(page)) == 11
    assert page.title() == "Answers of the run main"


def test_nothing_is_wider_than_a_phone(page: Any, pages: Path) -> None:
    report.main(["main", "main"])
    for name in ("report", "answers", "compare"):
        page.goto(f"file://{pages}/{name}.html")
        assert page.evaluate("document.documentElement.scrollWidth") == 390, name
        first = page.locator("svg").first
        if name != "answers":
            assert first.evaluate("svg => svg.getBoundingClientRect().right") <= 390
