// Markdown and the model's parts as document nodes. One renderer for answers that are being written and finished
// ones; a block whose source has not changed keeps its nodes, so that only the open one is redrawn.

import { copyFrom, h, iconButton } from "./dom.js";
import { highlight } from "./highlight.js";
import { parseBlocks, parseInline } from "./markdown.js";

/** An address that may be opened, or null: http and https alone. */
export function safeAddress(text) {
  try {
    const address = new URL(text);
    return address.protocol === "https:" || address.protocol === "http:" ? address.href : null;
  } catch {
    return null;
  }
}

function inline(text) {
  return pieces(parseInline(text));
}

function pieces(list) {
  return list.map((piece) => {
    if (piece.type === "text") return document.createTextNode(piece.text);
    if (piece.type === "code") return h("code", {}, piece.text);
    if (piece.type === "break") return h("br");
    if (piece.type !== "link") return h(piece.type, {}, ...pieces(piece.children));
    const href = safeAddress(piece.href);
    const children = pieces(piece.children);
    if (!href) return h("span", { class: "dead-link" }, ...children);
    if (piece.isImage && !children.length) children.push(document.createTextNode(href)); // remote images are not loaded
    return h("a", { href, target: "_blank", rel: "noopener noreferrer nofollow" }, ...children);
  });
}

function codeSpans(text, lang) {
  return highlight(text, lang).map(([kind, piece]) => (kind ? h("span", { class: `t-${kind}` }, piece) : document.createTextNode(piece)));
}

function codeBlock({ text, lang }) {
  const code = h("code", {}, ...codeSpans(text, lang));
  const copy = iconButton("copy", "Copy code", () => copyFrom(copy, code.textContent));
  copy.classList.add("copy-code");
  const bar = h("div", { class: "code-bar" }, h("span", { class: "lang" }, lang || "text"), copy);
  return h("div", { class: "code", "data-lang": lang }, bar, h("pre", { tabindex: "0" }, code));
}

function item({ blocks, task }, isLoose) {
  const box = task === null ? null : h("input", { type: "checkbox", disabled: true, checked: task, "aria-label": task ? "done" : "to do" });
  const inner = blocks.flatMap((block) => (block.type === "paragraph" && !isLoose ? inline(block.text) : [node(block)]));
  return h("li", { class: task === null ? null : "task" }, box, ...inner);
}

function tableNode({ head, align, rows }) {
  const row = (tag, cells) => h("tr", {}, ...cells.map((cell, i) => h(tag, { class: `at-${align[i]}` }, ...inline(cell))));
  const table = h("table", {}, h("thead", {}, row("th", head)), h("tbody", {}, ...rows.map((cells) => row("td", cells))));
  return h("div", { class: "table", tabindex: "0", role: "region", "aria-label": "Table" }, table);
}

function node(block) {
  if (block.type === "code") return codeBlock(block);
  if (block.type === "heading") return h(`h${Math.min(6, block.level + 2)}`, { class: `level-${block.level}` }, ...inline(block.text));
  if (block.type === "rule") return h("hr");
  if (block.type === "quote") return h("blockquote", {}, ...block.blocks.map(node));
  if (block.type === "table") return tableNode(block);
  if (block.type === "paragraph") return h("p", {}, ...inline(block.text));
  const items = block.items.map((one) => item(one, block.isLoose));
  return h(block.isOrdered ? "ol" : "ul", { start: block.isOrdered && block.start !== 1 ? block.start : null }, ...items);
}

/** Shows a text in an element, and again when it has grown. */
export class MarkdownView {
  #shown = []; // {block, node}

  constructor(element) {
    this.element = element;
  }

  update(text) {
    const blocks = parseBlocks(text);
    let same = 0;
    while (same < blocks.length && this.#shown[same]?.block.source === blocks[same].source) same += 1;
    const next = this.#shown[same];
    if (next?.block.type === "code" && blocks[same]?.type === "code" && next.block.lang === blocks[same].lang) {
      next.node.querySelector("pre > code").replaceChildren(...codeSpans(blocks[same].text, blocks[same].lang));
      next.block = blocks[same];
      same += 1;
    }
    for (const { node: old } of this.#shown.splice(same)) old.remove();
    for (const block of blocks.slice(same)) {
      this.#shown.push({ block, node: node(block) });
      this.element.append(this.#shown.at(-1).node);
    }
  }
}

/** What the parts of an answer show: texts, and each call of the tool with its result. */
export function segments(parts) {
  const found = [];
  for (const { type, text } of parts) {
    const last = found.at(-1);
    if (type === "text") {
      if (last?.kind === "text") last.text += text;
      else found.push({ kind: "text", text });
    } else if (type === "python") {
      found.push({ kind: "tool", code: text, output: null });
    } else if (last?.kind === "tool" && last.output === null) {
      last.output = text;
    } else {
      found.push({ kind: "tool", code: "", output: text });
    }
  }
  return found;
}

/** A call of the tool: the expression on the left, the result on the right, like a line of an adding machine. */
class ToolView {
  #code = h("code", { class: "tape-code" });
  #output = h("output", { class: "tape-output" });

  constructor(element) {
    const label = h("span", { class: "tape-label" }, "calculator");
    element.classList.add("tape");
    element.setAttribute("role", "group");
    element.setAttribute("aria-label", "Calculation");
    element.append(label, this.#code, h("span", { class: "tape-equals", "aria-label": "equals" }, "="), this.#output);
  }

  update({ code, output }) {
    this.#code.textContent = code;
    this.#output.textContent = output ?? "…";
    this.#output.classList.toggle("pending", output === null);
  }
}

/** Shows the parts of an answer in an element, and again when they have grown. */
export class AnswerView {
  #views = []; // {kind, view, element}

  constructor(element) {
    this.element = element;
  }

  update(parts) {
    const wanted = segments(parts);
    let same = 0;
    while (same < wanted.length && this.#views[same]?.kind === wanted[same].kind) same += 1;
    for (const { element } of this.#views.splice(same)) element.remove();
    wanted.forEach((segment, index) => {
      if (!this.#views[index]) {
        const element = h("div", { class: segment.kind });
        const view = segment.kind === "text" ? new MarkdownView(element) : new ToolView(element);
        this.#views.push({ kind: segment.kind, view, element });
        this.element.append(element);
      }
      this.#views[index].view.update(segment.kind === "text" ? segment.text : segment);
    });
  }
}
