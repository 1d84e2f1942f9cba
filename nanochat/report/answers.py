"""Every answer of every stage to a question, for a page to look through them, wrong ones first."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from nanochat.errors import UserError
from nanochat.home import Home
from nanochat.report.facts import TRAINED, Facts
from nanochat.report.pages import without_marks
from nanochat.report.tables import chat_results

MAX_QUESTIONS = 1000  # of a task on the page
Tasks = dict[str, list[dict[str, Any]]]  # task -> [{"index", "question", "reference", "answers"}]


def collect(home: Home, tag: str, facts: Facts) -> tuple[Tasks, dict[str, int]]:
    """(questions by task with {stage: [[right, text, ended], ...]} each, how many were left out of a task).

    What the newest stage has wrong comes first; beyond MAX_QUESTIONS the last ones are left out.
    Raises UserError for a file of answers that cannot be read.
    """
    found: dict[str, dict[tuple[int, str], dict[str, Any]]] = {}
    for stage, chat in chat_results(facts).items():
        for task in chat.get("tasks") or {}:
            path = home.stage_dir(tag, chat.name) / f"{task}.jsonl"
            try:
                lines = path.read_text("utf-8").split("\n")
                add_answers(found.setdefault(task, {}), stage, [json.loads(line) for line in lines if line])
            except FileNotFoundError:
                continue
            except (OSError, ValueError, KeyError, TypeError) as error:
                problem = f"{path} cannot be read: {error!r}"
                raise UserError(problem, "delete it and run chat_eval again") from error
    tasks, left_out = {}, {}
    for task, questions in found.items():
        if questions:
            ordered = sorted(questions.values(), key=lambda q: (_is_right(q), q["index"]))
            tasks[task] = ordered[:MAX_QUESTIONS]
            if len(ordered) > MAX_QUESTIONS:
                left_out[task] = len(ordered) - MAX_QUESTIONS
    return tasks, left_out


def add_answers(
    questions: dict[tuple[int, str], dict[str, Any]], stage: str, records: list[dict[str, Any]]
) -> None:
    """Add a stage's answers to the questions of one task. Several samples of a question stay apart."""
    for record in records:
        key = record["index"], record["question"]
        blank = {"index": key[0], "question": key[1], "reference": record["reference"], "answers": {}}
        question = questions.setdefault(key, blank)
        text = without_marks(record.get("full") or record["answer"])
        answer = [bool(record["right"]), text, record["ended"]]
        question["answers"].setdefault(stage, []).append(answer)


def _is_right(question: Mapping[str, Any]) -> bool:
    """Whether the newest stage has every answer to it right."""
    newest = next(stage for stage in reversed(TRAINED) if stage in question["answers"])
    return all(right for right, *_ in question["answers"][newest])
