"""The report: what is there is shown, what is not is said to be missing, nothing else appears."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from nanochat.errors import UserError
from nanochat.home import Home, write_json
from nanochat.report import answers, pages, tables
from nanochat.report.charts import Bars, Chart, Line, bar_chart, line_chart, smooth, thin, tick_text, ticks
from nanochat.report.facts import read_facts
from scripts import report


def write_stage(
    home: Home, name: str, result: dict[str, Any] | None, metrics: Sequence[dict[str, Any]] = ()
) -> None:
    write_json(home.settings_file("main", name), {"home": "/somewhere", "tag": "main", "depth": 4})
    if result is not None:
        write_json(home.result_file("main", name), result)
    lines = "".join(json.dumps(row) + "\n" for row in metrics)
    home.metrics_file("main", name).write_text(lines, encoding="utf-8")


def accuracy(right: int, total: int, chance: float = 0.0) -> dict[str, Any]:
    share = right / total
    return {
        "accuracy": share, "low": share - 0.03, "high": share + 0.02, "right": right, "total": total,
        "chance": chance,
    }  # fmt: skip


def losses(n: int) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = [{"step": i, "loss": 5 / i} for i in range(1, n + 1)]
    rows.insert(3, {"step": 3, "eval_seconds": 0.1, "val_bpb": 1.25, "val_loss": 2.5})
    return rows + [{"step": n, "loss": None, "skipped": "a spike"}]


@pytest.fixture
def full(home: Path) -> Home:
    where = Home(home)
    machine = {"cpu": "a | processor", "gpus": [], "cores": 2}
    write_stage(where, "tok_train", {"vocab_size": 2048, "seconds": 4.0, "bytes_per_token": 4.123456789})
    write_stage(
        where, "base",
        {"train_seconds": 3725.0, "steps": 600, "tokens": 4915200, "tokens_per_second": 12345.6,
         "val_bpb": 0.9, "peak_memory_bytes": 1_500_000_000, "peak_frac": 0.31, "machine": machine,
         "plan": {"depth": 4}},
        losses(9),
    )  # fmt: skip
    core = {"accuracy": 0.5, "centred": -0.3158, "chance": 0.62, "total": 20, "num_long": 3}
    write_stage(
        where, "base_eval",
        {"val_bpb": 0.8765, "core": 0.0123, "core_tasks": {"boolq": core, "copa": core},
         "core_note": "a note", "samples": [["The sky is", " *blue*\n# green"]],
         "seconds": 5.0, "machine": machine},
    )  # fmt: skip
    write_stage(where, "mid", {"train_seconds": 60.0, "val_loss": 0.7}, losses(5))
    write_stage(
        where, "chat_eval_mid",
        {"tasks": {"facts": accuracy(120, 200), "choice": accuracy(50, 200, 0.25)},
         "chatcore": 0.3, "seconds": 7.0},
    )  # fmt: skip
    write_stage(where, "sft", None, losses(4))
    return where


def cells(table: tables.Table, title: str) -> list[str]:
    (found,) = [row[1:] for row in table if row[0].startswith(title)]
    return found


def test_summary_shows_what_was_measured_and_no_more(full: Home) -> None:
    table = tables.summary(read_facts(full, "main"))
    assert table[0] == ["", "base", "mid", "sft"]  # rl has not been run and is optional
    assert cells(table, "bits per byte") == ["0.8765", "–", "–"]  # base_eval's, not training's
    assert cells(table, "validation loss") == ["–", "0.7000", "–"]
    assert cells(table, "CORE (2 tasks)") == ["0.0123", "–", "–"]
    assert cells(table, "facts") == ["–", "60.0 %", "–"]
    assert cells(table, "ChatCORE") == ["–", "0.3000", "–"]
    full.result_file("main", "base_eval").unlink()
    table = tables.summary(read_facts(full, "main"))
    assert cells(table, "bits per byte")[0] == "0.9000" and cells(table, "CORE") == ["–"] * 3


def test_stages_table(full: Home) -> None:
    rows = {row[0]: row[1:] for row in tables.stages(read_facts(full, "main"))}
    assert rows["base"] == ["finished", "1:02:05", "600", "4,915,200", "12,346", "31.0 %", "1.50 GB"]
    assert rows["sft"][:2] == ["unfinished, step 4", "–"] and rows["tok_eval"][:2] == ["not run", "–"]
    assert rows["together"][1] == "1:03:21"  # 4 + 3725 + 5 + 60 + 7 seconds


def test_page_and_plots(full: Home, capsys: pytest.CaptureFixture) -> None:
    report.main(["--tag=main", "--preset=cpu-demo", "--seed=3"])
    out = capsys.readouterr().out
    assert "0.8765" in out and "sft: unfinished, step 4" in out and "chat_eval_sft: not run" in out
    directory = full.report_dir("main")
    text = (directory / "report.md").read_text(encoding="utf-8")
    assert {p.name for p in directory.iterdir()} == {
        "report.html",
        "report.md",
        "summary.csv",
        "loss-base.svg",
        "loss-mid.svg",
        "loss-sft.svg",
        "bpb.svg",
        "accuracy.svg",
    }
    drawn = re.findall(r"\(([\w-]+\.svg)\)", text)
    assert len(drawn) == 5
    for name in drawn:
        assert ElementTree.parse(directory / name).getroot().tag == "{http://www.w3.org/2000/svg}svg"
    assert "| mid | facts | 60.0 % | 57.0 % to 62.0 % | 120 | 200 | 0.0 % |" in text
    assert "| boolq | 50.0 % | -0.3158 | 62.0 % | 20 | 3 |" in text and "a note" in text
    assert "    The sky is *blue*\n    # green" in text  # a model's words are no markup
    assert "| cpu | a \\| processor |" in text and text.count("| cores | 2 |") == 1  # one machine, shown once
    assert "| bytes_per_token | 4.12346 |" in text and "| vocab_size | 2,048 |" in text
    assert "/somewhere" not in text and "    depth=4" in text
    assert "Not finished: tok_eval (not run), sft (unfinished, step 4), chat_eval_sft (not run)." in text
    assert "## Answers\n\nNothing was recorded." in text
    assert len({line.count("|") for line in text.split("## Time")[1].split("\n\n")[1].splitlines()}) == 1


def test_only_a_tokenizer_so_far(home: Path, capsys: pytest.CaptureFixture) -> None:
    write_stage(Home(home), "tok_train", {"vocab_size": 512, "seconds": 1.0})
    report.main([])
    assert "base: not run" in capsys.readouterr().out
    directory = Home(home).report_dir("main")
    text = (directory / "report.md").read_text(encoding="utf-8")
    assert text.count("Nothing was recorded.") == 6  # all sections but the tokenizer's and the settings
    assert {p.name for p in directory.iterdir()} == {"report.html", "report.md", "summary.csv"}


def test_nothing_to_report(home: Path) -> None:
    with pytest.raises(UserError, match="no facts"):
        report.main(["--tag=other"])
    write_stage(Home(home), "base", {})
    Home(home).result_file("main", "base").write_text("{", encoding="utf-8")
    with pytest.raises(UserError, match="cannot be read"):
        report.main([])


def test_small_parts() -> None:
    assert [tables.count(v) for v in (None, 1234, 0.123456789, 123456.7, "text", True)] == [
        "–", "1,234", "0.123457", "123,457", "text", "True",
    ]  # fmt: skip
    assert tables.plain([["", "a"], ["long", "1"], ["b", "–"]]) == "      a\nlong  1\nb     –"
    assert smooth([3.0, 3.0, 3.0]) == pytest.approx([3.0] * 3)
    assert smooth([0.0, 1.0])[1] == pytest.approx(1 / 1.9)


# ---------------------------------------------------------------- the page of its own


def test_the_html_needs_nothing_else_and_shows_all(full: Home) -> None:
    """One file without links to others; every stage's curve, every interval, escaped text."""
    write_stage(
        full, "rl", {"train_seconds": 5.0, "steps": 9},
        [{"step": 0, "eval_seconds": 1, "accuracy_arithmetic": 0.5},
         *({"step": i, "reward": i / 10, "kl": 0.01 * i, "answer_tokens": 20 + i} for i in range(1, 10)),
         {"step": 9, "eval_seconds": 1, "accuracy_arithmetic": 0.75}],
    )  # fmt: skip
    facts = read_facts(full, "main")
    text = pages.html(facts, "main")
    assert not re.findall(r'(?:src|href)="(?!#)', text) and "@import" not in text and "url(" not in text
    assert text.count("<svg") == text.count("</svg>") >= 6
    for title in (
        "base: loss",
        "reward of sampled answers",
        "held-out accuracy, greedy",
        "(KL)",
        "length of answers",
    ):
        assert f"<figcaption>{title}" in text or title in text, title
    assert "arithmetic 9: 0.75" in text and "a | processor" in text
    assert 'class="whisker"' in text and 'class="mark"' in text
    assert "nan" not in text.lower().replace("nanochat", "").replace("nanny", "")
    parser = Balanced()
    parser.feed(text)
    assert not parser.open and not parser.wrong


class Balanced(HTMLParser):
    """Knows whether every element is closed in order."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.wrong: list[str] = []

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        if tag not in ("meta", "input"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: Any) -> None:
        pass

    def handle_endtag(self, tag: str) -> None:
        if not self.open or self.open.pop() != tag:
            self.wrong.append(tag)


def test_what_a_model_wrote_is_never_markup(full: Home) -> None:
    evil = "<script>alert(1)</script><img src=x>"
    record = {"question": evil, "answer": evil, "full": "<|python_start|>1 + 2<|python_end|>", "right": True}
    tasks = {evil: accuracy(3, 4)}
    write_stage(full, "chat_eval_sft", {"tasks": tasks, "chatcore": 0.5, "examples": {evil: [record]}})
    text = pages.html(read_facts(full, "main"), "main")
    assert "<script" not in text and "<img" not in text and "&lt;script&gt;" in text
    assert "[1 + 2]" in text


def test_a_run_with_one_stage_has_a_page_too(home: Path) -> None:
    write_stage(Home(home), "tok_train", {"vocab_size": 2048, "seconds": 4.0})
    text = pages.html(read_facts(Home(home), "main"), "main")
    assert "not finished" in text and "base (not run)" in text and "<svg" not in text


def test_core_stands_beside_known_models(full: Home) -> None:
    """The weakest first, with means over the tasks that were measured; names that do not fit are tilted."""
    result = json.loads(full.result_file("main", "base_eval").read_text())
    known = {
        "large": {"boolq": 0.3, "copa": 0.5, "CORE": 0.4},
        "gpt2": {"boolq": 0.1, "copa": 0.2, "CORE": 1},
    }
    known["part"] = {"boolq": 0.2}
    write_json(full.result_file("main", "base_eval"), result | {"core_references": known})
    text = pages.html(read_facts(full, "main"), "main")
    assert "A note; over the same tasks: gpt2 0.1500, large 0.4000." in text
    (chart,) = re.findall(r"<figure class=\"wide\"><figcaption>centred.*?</figure>", text, re.S)
    assert re.findall(r"</i>([^<]+)</span>", chart) == ["this model", "part", "gpt2", "large"]
    assert (
        "rotate" not in chart
        and svg_of(bar_chart("t", ["a", "b" * 99], [Bars("m", [1, 2], "red")], "y")).count("rotate(-25") == 2
    )
    write_json(full.result_file("main", "base_eval"), {"core": None, "core_note": "no bundle here"})
    assert "Not measured: no bundle here." in pages.html(read_facts(full, "main"), "main")


def svg_of(chart: Chart | None) -> str:
    assert chart is not None
    return chart.svg()


def test_ticks_are_round_and_inside() -> None:
    assert ticks(0, 1) == [0, 0.2, 0.4, 0.6, 0.8, 1.0]
    assert ticks(-3.2, 11) == [0, 5, 10] and ticks(2, 2) == [2]
    assert [tick_text(v) for v in (0.25, 1500, 3_200_000, 12)] == ["0.25", "1.5k", "3.2M", "12"]
    thinned = thin(range(1000), [1.0] * 1000)
    assert len(thinned) <= 300 and thinned[0] == (1.5, 1.0) and {y for _, y in thinned} == {1.0}


def test_a_curve_stands_where_its_numbers_say() -> None:
    """The first and last of three points lie at the ends of the axis, the middle one in between."""
    text = svg_of(line_chart("t", [Line("a", [0, 5, 10], [0, 1, 2], "red")], "x", "y"))
    (points,) = re.findall(r'points="([^"]*)"', text)
    (x0, y0), (x1, y1), (x2, y2) = ([float(v) for v in p.split(",")] for p in points.split())
    assert (
        (x0, x2) == (52, 448)
        and x1 == pytest.approx(250)
        and y0 > y1 > y2
        and y0 - y1 == pytest.approx(y1 - y2)
    )
    assert line_chart("t", [Line("a", [], [], "red")], "x", "y") is None
    bars = svg_of(bar_chart("t", ["a", "b"], [Bars("m", [50, None], "red")], "y", top=100))
    assert bars.count("<rect") == 1 and 'height="90.0"' in bars  # half of 250 - 30 - 40


def test_two_runs_side_by_side(full: Home, home: Path, capsys: pytest.CaptureFixture) -> None:
    source = full.stage_dir("main", "base").parent
    shutil.copytree(source, source.with_name("other"))
    result = json.loads(full.result_file("other", "base_eval").read_text())
    write_json(full.result_file("other", "base_eval"), result | {"val_bpb": result["val_bpb"] + 0.25})
    write_json(full.settings_file("other", "base"), {"home": "/x", "tag": "other", "depth": 6})
    report.main(["main", "other"])
    out = capsys.readouterr().out
    assert re.search(r"base +bits per byte .* \+0\.2500\n", out)
    text = (full.report_dir("main") / "compare.md").read_text()
    assert "| base | depth | 4 | 6 |" in text and "/x" not in text
    whole = (full.report_dir("main") / "compare.html").read_text()
    assert whole.count("<polyline") >= 2 and "main and other" in whole
    report.main([f"{home}:main", "main"])
    assert "A" in capsys.readouterr().out
    for wrong in (["main", "nobody"], ["main"], ["a", "b", "c"]):
        with pytest.raises(UserError):
            report.main(wrong)


# ---------------------------------------------------------------- cost, csv, answers


def test_cost_is_shown_when_the_price_is_known(full: Home, capsys: pytest.CaptureFixture) -> None:
    """An hour of two devices at $3 is $6; without a price no dollar appears, and no heading of cost."""
    result = read_facts(full, "main")["base"].result or {}
    plan = {"depth": 4, "world_size": 2}
    write_stage(full, "base", result | {"train_seconds": 3600.0, "plan": plan}, losses(9))
    report.main(["--price=3"])
    directory = full.report_dir("main")
    assert "Time and cost" in (directory / "report.html").read_text()
    rows = {row[0]: row[-1] for row in tables.stages(read_facts(full, "main"), 3.0)}
    assert rows["stage"] == "cost" and rows["base"] == "$6.00" and rows["sft"] == "–"
    assert rows["together"] == "$6.13" and rows["base_eval"] == "$0.0083"  # 3676 s; 5 s
    assert "| $6.00 |" in (directory / "report.md").read_text()
    assert "<b>$6.13</b><span>cost</span>" in (directory / "report.html").read_text()
    report.main([])
    assert "$" not in (directory / "report.html").read_text()
    assert "cost" not in (directory / "report.html").read_text()


def test_summary_as_csv(full: Home, capsys: pytest.CaptureFixture) -> None:
    report.main([])
    rows = (full.report_dir("main") / "summary.csv").read_text().splitlines()
    assert rows[0] == "stage,metric,value,low,high" and "base,bits per byte,0.8765,," in rows
    assert [row for row in rows if row.startswith("mid,facts")] == ["mid,facts,0.6,0.57,0.62"]


def write_answers(home: Home, stage: str, task: str, rights: Sequence[bool], text: str = "said") -> None:
    tasks = {task: accuracy(sum(rights), len(rights))}
    write_stage(home, f"chat_eval_{stage}", {"tasks": tasks, "chatcore": 0.5})
    lines = [
        json.dumps({"index": i, "question": f"q{i}", "reference": "r", "answer": text, "full": text,
                    "ended": "stop", "right": right})
        for i, right in enumerate(rights)
    ]  # fmt: skip
    path = home.stage_dir("main", f"chat_eval_{stage}") / f"{task}.jsonl"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def test_answers_of_all_stages_stand_together(full: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the newest stage has wrong comes first; several samples stay apart; the rest is counted."""
    write_answers(full, "mid", "facts", [False, True, True, True], "<|python_start|>1 + 2<|python_end|>")
    write_answers(full, "sft", "facts", [True, True, False, True])
    tasks, left_out = answers.collect(full, "main", read_facts(full, "main"))
    assert [q["index"] for q in tasks["facts"]] == [2, 0, 1, 3] and left_out == {}
    assert tasks["facts"][0] == {
        "index": 2, "question": "q2", "reference": "r",
        "answers": {"mid": [[True, "[1 + 2] ", "stop"]], "sft": [[False, "said", "stop"]]},
    }  # fmt: skip
    monkeypatch.setattr(answers, "MAX_QUESTIONS", 3)
    tasks, left_out = answers.collect(full, "main", read_facts(full, "main"))
    assert len(tasks["facts"]) == 3 and left_out == {"facts": 1}
    path = full.stage_dir("main", "chat_eval_sft") / "facts.jsonl"
    path.write_text(path.read_text() + '{"index": 0, "question": "q0", "reference": "r", "answer": "b", '
                    '"ended": "length", "right": false}\n')  # fmt: skip
    tasks, _ = answers.collect(full, "main", read_facts(full, "main"))
    assert len(tasks["facts"][0]["answers"]["sft"]) == 2 and tasks["facts"][0]["index"] == 0
    path.write_text("{")
    with pytest.raises(UserError, match="cannot be read"):
        answers.collect(full, "main", read_facts(full, "main"))
    path.unlink()
    tasks, _ = answers.collect(full, "main", read_facts(full, "main"))
    assert all(list(q["answers"]) == ["mid"] for q in tasks["facts"])


def test_the_page_of_answers_holds_data_and_no_markup(full: Home, capsys: pytest.CaptureFixture) -> None:
    """The report links to it; the data is one element that no answer can end; the script sets text."""
    evil = "</script><script>alert(1)</script><!--"
    write_answers(full, "sft", "facts", [False], evil)
    report.main([])
    directory = full.report_dir("main")
    assert 'href="answers.html"' in (directory / "report.html").read_text()
    text = (directory / "answers.html").read_text()
    assert text.count("<script") == text.count("</script>") == 2 and "<!--" not in text
    (data,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', text, re.S)
    assert json.loads(data)["tasks"]["facts"][0]["answers"]["sft"][0][1] == evil
    assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(", text)
    assert "default-src 'none'" in text and not re.findall(r'(?:src|href)="', text)
    parser = Balanced()
    parser.feed(text)
    assert not parser.open and not parser.wrong
