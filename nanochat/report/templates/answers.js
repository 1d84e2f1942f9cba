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
