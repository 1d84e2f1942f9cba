"""Every answer of every stage -> answers.html: one page to look through them, wrong ones first.

Answers of several stages to one question stand together. The page holds its data and needs nothing else; what
a model wrote becomes text in it, never markup. Left out: figures (the report has them).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from html import escape
from typing import Any

from nanochat.errors import UserError
from nanochat.home import Home
from nanochat.report.facts import TRAINED, Facts
from nanochat.report.html import STYLE, without_marks

MOST = 1000  # questions of a task on the page
Tasks = dict[str, list[dict[str, Any]]]  # task -> [{"index", "question", "reference", "answers"}]


def collect(home: Home, tag: str, facts: Facts) -> tuple[Tasks, dict[str, int]]:
    """(questions by task with {stage: [[right, text, ended], ...]} each, how many were left out of a task).

    What the newest stage has wrong comes first; beyond MOST questions the last ones are left out.
    Raises UserError for a file of answers that cannot be read.
    """
    found: dict[str, dict[tuple[int, str], dict[str, Any]]] = {}
    for stage in TRAINED:
        name = f"chat_eval_{stage}"
        for task in (facts[name].get("tasks") or {}) if name in facts else {}:
            path = home.stage_dir(tag, name) / f"{task}.jsonl"
            try:
                records = [json.loads(line) for line in path.read_text("utf-8").split("\n") if line]
                for r in records:
                    blank = {"index": r["index"], "question": r["question"], "reference": r["reference"]}
                    one = found.setdefault(task, {}).setdefault(
                        (r["index"], r["question"]), blank | {"answers": {}}
                    )
                    said = without_marks(r.get("full") or r["answer"])
                    one["answers"].setdefault(stage, []).append([bool(r["right"]), said, r["ended"]])
            except FileNotFoundError:
                continue
            except (OSError, ValueError, KeyError, TypeError) as error:
                raise UserError(
                    f"{path} cannot be read: {error!r}", "delete it and run chat_eval again"
                ) from error
    tasks, left_out = {}, {}
    for task, questions in found.items():
        ordered = sorted(questions.values(), key=lambda q: (_is_right(q), q["index"]))
        tasks[task] = ordered[:MOST]
        if len(ordered) > MOST:
            left_out[task] = len(ordered) - MOST
    return tasks, left_out


def _is_right(question: Mapping[str, Any]) -> bool:
    """Whether the newest stage has every answer to it right."""
    newest = next(stage for stage in reversed(TRAINED) if stage in question["answers"])
    return all(right for right, *_ in question["answers"][newest])


def html(tasks: Tasks, left_out: Mapping[str, int], tag: str) -> str:
    """The page."""
    stages = [s for s in TRAINED if any(s in q["answers"] for part in tasks.values() for q in part)]
    data = {"tasks": tasks, "stages": stages, "leftOut": dict(left_out)}
    packed = json.dumps(data, ensure_ascii=False).replace("<", "\\u003c")  # no tag can end the element
    title = escape(f"Answers of the run {tag}")
    return (
        PAGE.replace("STYLE", STYLE + MORE_STYLE).replace("SCRIPT", SCRIPT)
        .replace("TITLE", title).replace("DATA", packed)
    )  # fmt: skip


MORE_STYLE = """
form{position:sticky;top:0;z-index:1;display:flex;flex-wrap:wrap;gap:.5rem .8rem;align-items:end;
  padding:.7rem 0;background:var(--paper);border-bottom:1px solid var(--line)}
label{display:grid;gap:.15rem;font-size:.8rem;color:var(--soft)}
label.wide{flex:1;min-width:10rem}
select,input,button{font:inherit;color:var(--ink);background:var(--card);border:1px solid var(--line);
  border-radius:7px;padding:.35rem .6rem;min-width:0}
button{cursor:pointer}
.q{margin:1.1rem 0;padding:.8rem 1rem;background:var(--card);border-radius:10px}
.q>p{margin:0 0 .5rem;white-space:pre-wrap;overflow-wrap:anywhere}
.q .talk p:first-child{font-size:.8rem}
.q .talk p+p{color:var(--ink)}
.q .now{border-left-width:6px;padding-left:calc(.9rem - 3px)}
.reference{color:var(--soft)}
@media(max-width:560px){form{position:static}}
"""

PAGE = """<!doctype html><html lang="en"><head><meta charset="utf-8"><title>TITLE</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'">
<style>STYLE</style></head><body>
<h1>TITLE</h1>
<form>
<label>task<select id="task"></select></label>
<label>model<select id="stage"></select></label>
<label>show<select id="show"><option value="wrong">wrong answers</option>
<option value="right">right answers</option><option value="lost">wrong, right one stage before</option>
<option value="won">right, wrong one stage before</option><option value="all">all</option></select></label>
<label class="wide">with the words<input id="words" type="search"></label>
</form>
<p class="note" id="count" role="status"></p>
<main id="list"></main>
<button id="more" hidden>show more</button>
<script type="application/json" id="data">DATA</script>
<script>SCRIPT</script></body></html>
"""

SCRIPT = """
"use strict";
const PER_PAGE = 50;
const data = JSON.parse(document.getElementById("data").textContent);
const $ = (id) => document.getElementById(id);
let shown = PER_PAGE;

function element(kind, name, text) {
  const made = document.createElement(kind);
  made.className = name;
  made.textContent = text;
  return made;
}

function options(select, names) {
  for (const name of names) select.append(new Option(name, name));
}

const right = (question, stage) => (question.answers[stage] || []).every((answer) => answer[0]);

function before(question, stage) {
  const earlier = data.stages.slice(0, data.stages.indexOf(stage)).filter((s) => s in question.answers);
  return earlier.length ? right(question, earlier[earlier.length - 1]) : null;
}

function wanted(question, stage, show) {
  const now = right(question, stage), then = before(question, stage);
  if (show === "wrong") return !now;
  if (show === "right") return now;
  if (show === "lost") return !now && then === true;
  if (show === "won") return now && then === false;
  return true;
}

function card(question, stage, task) {
  const box = element("article", "q", "");
  box.append(element("p", "", question.question));
  box.append(element("p", "reference", "expected: " + question.reference));
  for (const name of data.stages) {
    for (const [isRight, text, ended] of question.answers[name] || []) {
      const talk = element("div", `talk ${isRight ? "right" : "wrong"}${name === stage ? " now" : ""}`, "");
      const why = ended === "stop" ? "" : ", ended by: " + ended;
      talk.append(element("p", "", name + ", " + (isRight ? "right" : "wrong") + why));
      talk.append(element("p", "", text || "(nothing)"));
      box.append(talk);
    }
  }
  box.append(element("p", "note", task + ", question " + question.index));
  return box;
}

function draw() {
  const task = $("task").value, stage = $("stage").value, show = $("show").value;
  const words = $("words").value.toLowerCase().split(" ").filter(Boolean);
  const hits = [];
  let total = 0, wrong = 0;
  for (const [name, questions] of Object.entries(data.tasks)) {
    if (task !== "all tasks" && name !== task) continue;
    for (const question of questions) {
      if (!(stage in question.answers)) continue;
      total += 1;
      wrong += !right(question, stage);
      const text = JSON.stringify(question).toLowerCase();
      if (wanted(question, stage, show) && words.every((w) => text.includes(w))) hits.push([question, name]);
    }
  }
  $("list").replaceChildren(...hits.slice(0, shown).map(([question, name]) => card(question, stage, name)));
  $("more").hidden = hits.length <= shown;
  const missing = Object.entries(data.leftOut).filter(([name]) => task === "all tasks" || name === task);
  const note = missing.map(([name, count]) => ` ${count} more questions of ${name} are not on this page.`);
  $("count").textContent = `${hits.length} of ${total} questions. ${stage}: ${total - wrong} right, `
    + `${wrong} wrong.` + note.join("");
  const state = new URLSearchParams({ task, stage, show, words: $("words").value });
  history.replaceState(null, "", "#" + state);
}

options($("task"), ["all tasks", ...Object.keys(data.tasks)]);
options($("stage"), data.stages);
$("stage").value = data.stages[data.stages.length - 1];
for (const [name, value] of new URLSearchParams(location.hash.slice(1))) {
  const field = ["task", "stage", "show", "words"].includes(name) ? $(name) : null;
  if (field && (field.tagName === "INPUT" || [...field.options].some((o) => o.value === value))) {
    field.value = value;
  }
}
for (const name of ["task", "stage", "show", "words"]) {
  $(name).addEventListener("input", () => { shown = PER_PAGE; draw(); });
}
$("more").addEventListener("click", () => { shown += PER_PAGE; draw(); });
document.querySelector("form").addEventListener("submit", (event) => event.preventDefault());
draw();
"""
