"""Facts -> report.html, report.md, answers.html and the comparison of two runs, by the templates.

A page needs no other file, and is light or dark as the reader's system is.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import jinja2
from markupsafe import Markup

from nanochat import chat_format as chat
from nanochat.report import figures, tables
from nanochat.report.charts import Chart
from nanochat.report.facts import TRAINED, Facts
from nanochat.report.tables import Table
from nanochat.run_dir import clock

MARKS = {
    chat.PYTHON_END + chat.OUTPUT_START: " = ", chat.PYTHON_START: "[", chat.PYTHON_END: "] ",
    chat.OUTPUT_START: "[", chat.OUTPUT_END: "] ",
}  # fmt: skip
SECTIONS = {
    "summary": "Summary",
    "learning": "Learning",
    "reinforcement": "Reinforcement",
    "chat_tasks": "Chat tasks",
    "core": "CORE",
    "tokenizer": "Tokenizer",
    "answers": "Answers",
    "samples": "Samples of the base model",
    "time": "Time",
    "plan": "Plan",
    "environment": "Environment",
    "settings": "Settings",
}


def html(facts: Facts, tag: str, price: float | None = None, all_answers: str | None = None) -> str:
    """The whole report of one run as HTML.

    price: dollars per device and hour; all_answers: a page to link to.
    """
    values = contents(facts, price) | {
        "all_answers": all_answers,
        "learning": figures.learning(facts),
        "reinforcement": figures.reinforcement(facts),
        "accuracies": figures.drawn(figures.accuracies(facts)),
        "core_charts": figures.drawn(figures.core(facts)),
        "core_note": figures.core_note(facts),
        "tokenizer_charts": figures.drawn(figures.tokenizer(facts)),
    }
    titles = SECTIONS | ({} if price is None else {"time": "Time and cost"})
    module = templates().get_template("sections.html.j2").make_module(values)
    sections = []
    for name, title in titles.items():
        content = getattr(module, f"section_{name}")().strip()
        if content:
            sections.append((title, Markup(content)))
    return page(f"The run {tag}", [subtitle(facts)], cards(facts, price), sections)


def markdown(facts: Facts, tag: str, charts: Sequence[str] = (), price: float | None = None) -> str:
    """The whole report as markdown; `charts` are files beside it, `price` dollars per device and hour."""
    values = contents(facts, price)
    answers = [
        f"[{'right' if record['right'] else 'wrong'}] {record['question']}\n  -> {record['answer']}"
        for records in values["examples"].values()
        for record in records
    ]
    unfinished = [f"{name} ({stage.status})" for name, stage in facts.items() if stage.status != "finished"]
    return templates().get_template("report.md.j2").render(
        values,
        tag=tag,
        charts=charts,
        unfinished=unfinished,
        core_remark=facts["base_eval"].get("core_note"),
        sample_texts=[prompt + text for prompt, text in values["samples"]],
        answer_texts=answers,
    ).rstrip() + "\n"  # fmt: skip


def contents(facts: Facts, price: float | None) -> dict[str, Any]:
    """What both forms of the report show."""
    newest = [found for found in tables.chat_results(facts).values() if found.get("examples")][-1:]
    return {
        "price": price,
        "summary": tables.summary(facts),
        "chat_tasks": tables.chat_tasks(facts),
        "core_tasks": tables.core_tasks(facts),
        "tokenizer": tables.tokenizer(facts),
        "examples": newest[0].get("examples") if newest else {},
        "examples_stage": newest[0].name if newest else None,
        "samples": facts["base_eval"].get("samples") or [],
        "stages": tables.stages(facts, price),
        "plan": tables.pairs(facts["base"].get("plan") or {}),
        "machines": tables.machines(facts),
        "settings": {name: tables.settings(stage) for name, stage in facts.items() if stage.settings},
    }


def chart_files(facts: Facts) -> dict[str, Chart]:
    """The charts that stand beside report.md, by file name."""
    found = {f"loss-{name}.svg": chart for name, chart in figures.losses(facts).items()}
    found |= {"bpb.svg": figures.bits_per_byte(facts), "accuracy.svg": figures.accuracies(facts)}
    return {name: chart for name, chart in found.items() if chart is not None}


def compare(a: Facts, b: Facts, names: tuple[str, str]) -> tuple[str, str]:
    """(markdown, HTML) of two runs."""
    title = f"{names[0]} and {names[1]}"
    differences = tables.differences(a, b, names)
    settings = tables.changed_settings(a, b, names)
    text = templates().get_template("compare.md.j2").render(
        title=title, differences=differences, settings=settings
    )  # fmt: skip
    macros = templates().get_template("macros.html.j2").module
    parts = {
        "Measured": macros.table(differences),  # type: ignore[attr-defined]
        "Learning": macros.figures(figures.learning_of_two(a, b, names)),  # type: ignore[attr-defined]
        "Chat tasks": macros.figures(figures.accuracies_of_two(a, b, names)),  # type: ignore[attr-defined]
        "Settings that differ": macros.table(settings) if settings else macros.note("None."),  # type: ignore[attr-defined]
    }
    subtitles = [subtitle(a), subtitle(b)]
    if subtitles[0] == subtitles[1]:
        subtitles = subtitles[:1]
    else:
        subtitles = [f"{name}: {line}" for name, line in zip(names, subtitles, strict=True)]
    sections = [(name, Markup(part)) for name, part in parts.items() if part.strip()]
    return text.rstrip() + "\n", page(title, subtitles, [], sections)


def answers(tasks: dict[str, list[dict[str, Any]]], left_out: Mapping[str, int], tag: str) -> str:
    """The page of all answers; see answers.collect."""
    stages = [s for s in TRAINED if any(s in q["answers"] for part in tasks.values() for q in part)]
    data = {"tasks": tasks, "stages": stages, "leftOut": dict(left_out)}
    # Without "<" no text in the data can end the element that holds it.
    packed = json.dumps(data, ensure_ascii=False).replace("<", "\\u003c")
    return templates().get_template("answers.html.j2").render(title=f"Answers of the run {tag}", data=packed)


def page(
    title: str, subtitles: list[str], cards: list[tuple[str, str]], sections: list[tuple[str, Markup]]
) -> str:
    template = templates().get_template("page.html.j2")
    return template.render(title=title, subtitles=subtitles, cards=cards, sections=sections) + "\n"


def subtitle(facts: Facts) -> str:
    """Dates, machine, and what is not finished."""
    dates = sorted({date for stage in facts.values() if (date := stage.get("finished"))})
    machine: dict[str, Any] = next((m for stage in facts.values() if (m := stage.get("machine"))), {})
    gpus = machine.get("gpus") or []
    unfinished = [f"{name} ({stage.status})" for name, stage in facts.items() if stage.status != "finished"]
    parts = [
        " to ".join(dict.fromkeys([dates[0], dates[-1]])) if dates else "",
        f"{len(gpus)} x {gpus[0]}" if gpus else str(machine.get("cpu") or ""),
        f"not finished: {', '.join(unfinished)}" if unfinished else "",
    ]
    return " · ".join(filter(None, parts))


def cards(facts: Facts, price: float | None) -> list[tuple[str, str]]:
    """The figures that stand at the top: (name, value)."""
    means = [found.get("chatcore") for found in tables.chat_results(facts).values()]
    seconds = sum(stage.seconds for stage in facts.values() if stage.seconds is not None)
    tokens = sum(facts[stage].get("tokens") or 0 for stage in TRAINED if stage in facts)
    num_params = (facts["base"].get("plan") or {}).get("params_total")
    values = {
        "ChatCORE": tables.number(([None] + [mean for mean in means if mean is not None])[-1]),
        "CORE": tables.number(facts["base_eval"].get("core")),
        "bits per byte": tables.number(tables.bits_per_byte(facts)),
        "time": clock(seconds) if seconds else tables.DASH,
        "tokens learned from": tables.count(tokens or None),
        "parameters": tables.count(num_params),
        "cost": tables.dollars(tables.cost(facts, seconds, price)),
    }
    return [(name, value) for name, value in values.items() if value != tables.DASH]


# ---------------------------------------------------------------- the templates and their filters


def templates() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("nanochat.report"),
        autoescape=lambda name: name is not None and ".html" in name,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters |= {
        "anchor": lambda title: title.lower().replace(" ", "-"),
        "markdown": tables.markdown,
        "recorded": recorded,
        "text_columns": text_columns,
        "verbatim": verbatim,
        "without_marks": without_marks,
    }
    return environment


def recorded(text: str, remark: str | None = None) -> str:
    """A section's text and a remark; a section in which nothing stands says so."""
    return "\n\n".join(filter(None, [text, remark])) or "Nothing was recorded."


def text_columns(table: Table) -> list[Markup]:
    """The attribute of each column's cells: columns of texts are aligned to the left, as the first one is."""
    marks = []
    for column in range(len(table[0])):
        cells = [row[column] for row in table[1:]]
        is_numeric = any(char.isdigit() for cell in cells for char in cell) or set(cells) == {tables.DASH}
        marks.append(Markup("" if is_numeric or column == 0 else " class=t"))
    return marks


def verbatim(texts: Sequence[str]) -> str:
    """Texts that a model or a person wrote, as an indented block, in which nothing is markup."""
    blocks = ["\n".join("    " + line for line in text.splitlines()) for text in texts if text.strip()]
    return "\n\n".join(blocks)


def without_marks(text: str) -> str:
    """Calls of the tool as people read them.

    >>> without_marks("<|python_start|>1 + 2<|python_end|><|output_start|>3<|output_end|>It is 3.")
    '[1 + 2 = 3] It is 3.'
    """
    for mark, shown in MARKS.items():
        text = text.replace(mark, shown)
    return text
