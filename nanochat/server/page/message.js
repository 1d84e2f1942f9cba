// One message in the conversation: what was said, and what can be done with it.

import { copyFrom, h, icon, iconButton } from "./dom.js";
import { AnswerView } from "./render.js";
import { plainText, textOf } from "./tree.js";

const MARK = () => {
  const mark = icon("mark");
  mark.setAttribute("class", "mark");
  return mark;
};

/** 12 tokens · 48.1 tokens/s · first after 0.12 s: facts that are never broken; phones leave the last one out. */
function statsLine(stats) {
  const facts = [];
  if (stats) facts.push(h("span", {}, `${stats.tokens} token${stats.tokens === 1 ? "" : "s"}`));
  if (stats?.rate) facts.push(h("span", {}, `${stats.rate.toFixed(1)} tokens/s`));
  if (stats?.reason === "length") facts.push(h("span", {}, "cut at the limit"));
  if (stats && stats.first !== null) facts.push(h("span", { class: "aside" }, `first after ${stats.first.toFixed(2)} s`));
  return h("div", { class: "stats" }, ...facts);
}

function branchButtons(node, others, act) {
  if (others.length < 2) return null;
  const at = others.findIndex((other) => other.id === node.id);
  const to = (offset, name, label) =>
    iconButton(name, label, () => act.branch(others[at + offset]), { disabled: !others[at + offset] });
  const count = h("span", { "aria-label": `Version ${at + 1} of ${others.length}` }, `${at + 1}/${others.length}`);
  return h("span", { class: "branch" }, to(-1, "left", "Earlier version"), count, to(1, "right", "Later version"));
}

/** The element of a person's message. */
export function userMessage(node, others, act) {
  const element = h("article", { class: "message user", "data-id": node.id, "aria-label": "You" });
  const copy = iconButton("copy", "Copy message", () => copyFrom(copy, textOf(node)));
  const edit = iconButton("edit", "Edit message", () => editInPlace(element, node, act));
  edit.classList.add("edit");
  const actions = h("div", { class: "actions" }, copy, edit, branchButtons(node, others, act));
  element.append(h("div", { class: "bubble" }, textOf(node)), actions);
  return element;
}

function editInPlace(element, node, act) {
  const before = [...element.childNodes];
  const area = h("textarea", { "aria-label": "Edit message", rows: "3" });
  area.value = textOf(node);
  const cancel = () => {
    element.replaceChildren(...before);
    element.querySelector(".edit").focus();
  };
  const save = () => (area.value.trim() ? act.edit(node, area.value.trim()) : cancel());
  area.addEventListener("keydown", (event) => {
    if (event.key === "Escape") {
      event.stopPropagation();
      cancel();
    } else if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
      event.preventDefault();
      save();
    }
  });
  const buttons = h(
    "div",
    {},
    h("button", { type: "button", class: "plain", onclick: cancel }, "Cancel"),
    h("button", { type: "button", class: "primary", onclick: save }, "Send"),
  );
  element.replaceChildren(h("div", { class: "editor" }, area, buttons));
  area.focus();
  area.setSelectionRange(area.value.length, area.value.length);
}

/** An answer on the page: update() after its node has changed, finish() when nothing more will come. */
export class Answer {
  #hasText = false;

  constructor(node, others, act) {
    this.node = node;
    this.others = others;
    this.act = act;
    this.body = h("div", { class: "answer" });
    this.foot = h("div", {});
    this.element = h("article", { class: "message assistant", "data-id": node.id, "aria-label": "nanochat" }, MARK(), this.body, this.foot);
    this.view = new AnswerView(this.body);
    if (node.state === "streaming") this.update();
    else this.finish();
  }

  update() {
    const hasText = this.node.parts.some((part) => part.text);
    if (hasText) {
      if (!this.#hasText) this.body.replaceChildren();
      this.view.update(this.node.parts);
    } else if (!this.body.firstChild) {
      this.body.append(h("div", { class: "thinking", role: "img", "aria-label": "Waiting for the answer" }, h("i"), h("i"), h("i")));
    }
    this.#hasText ||= hasText;
  }

  finish() {
    const { node, act } = this;
    this.body.querySelector(".thinking")?.remove();
    if (node.parts.some((part) => part.text)) this.update();
    const copy = iconButton("copy", "Copy answer", () => copyFrom(copy, plainText(node)));
    copy.classList.add("copy-answer");
    const actions = h(
      "div",
      { class: "actions" },
      branchButtons(node, this.others, act),
      copy,
      iconButton("again", "Answer again", () => act.again(node)),
      node.state !== "done" || node.stats?.reason === "length" ? iconButton("more", "Continue this answer", () => act.extend(node)) : null,
      node.tokens?.length ? iconButton("chart", "How sure was it?", () => this.#toggleTokens()) : null,
      statsLine(node.stats),
    );
    this.foot.replaceChildren(...[this.#trouble(), actions].filter(Boolean));
  }

  #trouble() {
    const { node, act } = this;
    const again = h("button", { type: "button", onclick: () => act.again(node) }, "Try again");
    if (node.error) return h("div", { class: "trouble", role: "alert" }, h("span", {}, node.error), again);
    if (node.state === "interrupted") return h("div", { class: "trouble mild" }, "The page was left before this answer was complete.");
    if (node.state === "stopped") return h("div", { class: "trouble mild" }, "Stopped.");
    if (!node.parts.some((part) => part.text)) return h("div", { class: "trouble mild" }, h("span", {}, "The model said nothing."), again);
    return null;
  }

  #toggleTokens() {
    const shown = this.body.querySelector(".tokens");
    if (shown) {
      this.body.replaceChildren();
      this.view = new AnswerView(this.body);
      this.view.update(this.node.parts);
      return;
    }
    const spans = this.node.tokens.map((token) => {
      const span = h("span", { class: "tok", tabindex: "0", role: "button" }, token.token);
      span.style.setProperty("--sure", Math.exp(token.logprob).toFixed(3));
      const open = () => showAlternatives(span, token);
      span.addEventListener("click", open);
      span.addEventListener("keydown", (event) => event.key === "Enter" && open());
      return span;
    });
    this.body.replaceChildren(h("div", { class: "tokens" }, ...spans));
  }
}

function showAlternatives(anchor, token) {
  document.getElementById("alternatives-box")?.remove();
  const rows = token.top.map(([text, logprob]) => {
    const share = `${(100 * Math.exp(logprob)).toFixed(1)} %`;
    const chosen = text === token.token ? "chosen" : null;
    return h("tr", { class: chosen }, h("td", {}, text.replaceAll("\n", "↵") || "(nothing)"), h("td", { class: "at-right" }, share));
  });
  const box = h("dialog", { id: "alternatives-box", "aria-label": "What it might have said" }, h("table", {}, h("tbody", {}, ...rows)));
  document.body.append(box);
  const place = anchor.getBoundingClientRect();
  box.style.left = `${Math.max(8, Math.min(place.left, innerWidth - 260))}px`;
  box.style.top = `${Math.min(place.bottom + 6, innerHeight - 40 - 30 * rows.length)}px`;
  box.addEventListener("click", () => box.close());
  box.addEventListener("close", () => {
    box.remove();
    anchor.focus();
  });
  box.showModal();
}
