// Markdown as data: parseBlocks(text) -> blocks, parseInline(text) -> pieces. No document, no HTML: a tag in the
// text is text. Made for text that is still being written: an open fence reaches to the end, an open ** stays text.

const MAX_DEPTH = 12;

const FENCE = /^ {0,3}(`{3,}|~{3,})[ \t]*([^`]*)$/;
const HEADING = /^ {0,3}(#{1,6})(?:[ \t]+(.*?))?(?:[ \t]+#+)?[ \t]*$/;
const RULE = /^ {0,3}([-*_])(?:[ \t]*\1){2,}[ \t]*$/;
const QUOTE = /^ {0,3}> ?/;
const ITEM = /^( {0,3})([-*+]|\d{1,9}[.)])(?:([ \t]+)(?=\S)|[ \t]*$)/;
const DELIMITER_ROW = /^ {0,3}\|?[ \t]*:?-+:?[ \t]*(?:\|[ \t]*:?-+:?[ \t]*)*\|?[ \t]*$/;
const INDENTED = /^(?: {4}|\t)/;

const isBlank = (line) => line.trim() === "";
const indentOf = (line) => line.replaceAll("\t", "    ").search(/\S|$/);

/** The blocks of a text; each of the outermost carries its `source`, by which an unchanged one is known. */
export function parseBlocks(text) {
  return blocks(text.split(/\r\n|\n|\r/), 0);
}

function blocks(lines, depth) {
  const found = [];
  let at = 0;
  while (at < lines.length) {
    if (isBlank(lines[at])) {
      at += 1;
      continue;
    }
    const [block, end] = readBlock(lines, at, depth);
    block.source = lines.slice(at, end).join("\n");
    found.push(block);
    at = end;
  }
  return found;
}

function readBlock(lines, at, depth) {
  const line = lines[at];
  let match;
  if ((match = FENCE.exec(line))) return fence(lines, at, match);
  if ((match = HEADING.exec(line))) return [{ type: "heading", level: match[1].length, text: match[2] ?? "" }, at + 1];
  if (RULE.test(line)) return [{ type: "rule" }, at + 1];
  if (INDENTED.test(line)) return indented(lines, at);
  if (depth < MAX_DEPTH) {
    if (QUOTE.test(line)) return quote(lines, at, depth);
    if (ITEM.test(line)) return list(lines, at, depth);
  }
  if (isTable(lines, at)) return table(lines, at);
  return paragraph(lines, at, depth);
}

function fence(lines, at, [, marks, info]) {
  const close = new RegExp(`^ {0,3}${marks[0] === "~" ? "~" : "`"}{${marks.length},}[ \t]*$`);
  let end = at + 1;
  while (end < lines.length && !close.test(lines[end])) end += 1;
  const lang = (info.trim().split(/\s+/)[0] ?? "").toLowerCase();
  return [{ type: "code", lang, text: lines.slice(at + 1, end).join("\n") }, Math.min(end + 1, lines.length)];
}

function indented(lines, at) {
  let end = at;
  while (end < lines.length && (isBlank(lines[end]) || INDENTED.test(lines[end]))) end += 1;
  while (isBlank(lines[end - 1])) end -= 1;
  return [{ type: "code", lang: "", text: lines.slice(at, end).map((line) => line.replace(INDENTED, "")).join("\n") }, end];
}

/** Whether a line begins something that ends a paragraph. */
function interrupts(lines, at) {
  const line = lines[at];
  if (isBlank(line) || FENCE.test(line) || HEADING.test(line) || RULE.test(line) || QUOTE.test(line)) return true;
  const item = ITEM.exec(line);
  return Boolean(item && item[3] && /^(?:[-*+]|1[.)])$/.test(item[2])) || isTable(lines, at);
}

function quote(lines, at, depth) {
  const inner = [];
  let end = at;
  for (; end < lines.length; end += 1) {
    if (QUOTE.test(lines[end])) inner.push(lines[end].replace(QUOTE, ""));
    else if (!interrupts(lines, end) && !isBlank(inner.at(-1))) inner.push(lines[end]);
    else break;
  }
  return [{ type: "quote", blocks: blocks(inner, depth + 1) }, end];
}

function list(lines, at, depth) {
  const first = ITEM.exec(lines[at]);
  const kind = first[2].at(-1);
  const isOrdered = kind === "." || kind === ")";
  const items = [];
  let end = at;
  let isLoose = false;
  while (end < lines.length) {
    const match = ITEM.exec(lines[end]);
    if (!match || match[2].at(-1) !== kind || RULE.test(lines[end])) break;
    const indent = match[3] && match[3].length < 5 ? match[0].length : match[1].length + match[2].length + 1;
    const inner = [lines[end].slice(indent)];
    let next = end + 1;
    for (; next < lines.length; next += 1) {
      const line = lines[next];
      if (isBlank(line)) inner.push("");
      else if (indentOf(line) >= indent) inner.push(line.replaceAll("\t", "    ").slice(indent));
      else if (!isBlank(lines[next - 1]) && !interrupts(lines, next) && !ITEM.test(line)) inner.push(line.trimStart());
      else break;
    }
    let blanks = 0;
    while (inner.length > 1 && isBlank(inner.at(-1))) {
      inner.pop();
      blanks += 1;
    }
    end = next;
    const task = /^\[([ xX])\][ \t]+/.exec(inner[0]);
    if (task) inner[0] = inner[0].slice(task[0].length);
    const inside = blocks(inner, depth + 1);
    const follows = end < lines.length && ITEM.exec(lines[end])?.[2].at(-1) === kind;
    if (blanks && !follows) end -= blanks;
    isLoose ||= Boolean(blanks && follows) || inside.filter((block) => block.type === "paragraph").length > 1;
    items.push({ blocks: inside, task: task ? task[1] !== " " : null });
  }
  return [{ type: "list", isOrdered, start: isOrdered ? Number.parseInt(first[2], 10) : 1, isLoose, items }, end];
}

function isTable(lines, at) {
  const next = lines[at + 1];
  if (!lines[at].includes("|") || next === undefined || !/[|]/.test(next) || !DELIMITER_ROW.test(next)) return false;
  return cells(lines[at]).length === cells(next).length;
}

function cells(line) {
  const trimmed = line.trim().replace(/^\|/, "").replace(/(?<!\\)\|$/, "");
  return trimmed.split(/(?<!\\)\|/).map((cell) => cell.trim().replaceAll("\\|", "|"));
}

function table(lines, at) {
  const head = cells(lines[at]);
  const align = cells(lines[at + 1]).map((cell) => {
    if (cell.endsWith(":")) return cell.startsWith(":") ? "center" : "right";
    return "left";
  });
  const rows = [];
  let end = at + 2;
  for (; end < lines.length && !isBlank(lines[end]) && lines[end].includes("|"); end += 1) {
    const row = cells(lines[end]);
    rows.push(head.map((_, column) => row[column] ?? ""));
  }
  return [{ type: "table", head, align, rows }, end];
}

function paragraph(lines, at) {
  let end = at + 1;
  while (end < lines.length && !interrupts(lines, end)) end += 1;
  return [{ type: "paragraph", text: lines.slice(at, end).map((line) => line.trimStart()).join("\n").trimEnd() }, end];
}

// ---------------------------------------------------------------- inside a line

const ESCAPED = /^\\[!-/:-@[-`{-~]/;
const ADDRESS = /^https?:\/\/[^\s<>"'`]+/i;
const SPACE = /^[\s\u00a0]?$/u;
const PUNCTUATION = /^[\p{P}\p{S}]$/u;

/** The pieces of a text: {type: text | code | break | em | strong | del | link, text | children, href}. */
export function parseInline(text) {
  const out = [];
  const open = []; // indices in `out` of [ that may begin a link
  const ticks = new Map(); // length of a run of backticks -> where the last one begins
  for (const run of text.matchAll(/`+/g)) ticks.set(run[0].length, run.index);
  let at = 0;
  let plain = "";
  const flush = () => {
    if (plain) out.push({ type: "text", text: plain, depth: 0 });
    plain = "";
  };
  const push = (piece) => {
    flush();
    out.push(piece);
  };
  while (at < text.length) {
    const char = text[at];
    if (char === "\\") {
      if (ESCAPED.test(text.slice(at, at + 2))) plain += text[at + 1];
      else if (text[at + 1] === "\n") push({ type: "break", depth: 0 });
      else plain += char;
      at += ESCAPED.test(text.slice(at, at + 2)) || text[at + 1] === "\n" ? 2 : 1;
    } else if (char === "\n") {
      if (plain.endsWith("  ")) push({ type: "break", depth: 0 });
      else plain += "\n";
      at += 1;
    } else if (char === "`") {
      const marks = /^`+/.exec(text.slice(at))[0];
      const end = (ticks.get(marks.length) ?? -1) > at ? closing(text, marks, at + marks.length) : -1;
      if (end < 0) plain += marks;
      else push({ type: "code", text: code(text.slice(at + marks.length, end)), depth: 0 });
      at = end < 0 ? at + marks.length : end + marks.length;
    } else if (char === "*" || char === "_" || (char === "~" && text[at + 1] === "~")) {
      const run = new RegExp(`^\\${char}+`).exec(text.slice(at))[0];
      push(delimiter(text, at, run));
      at += run.length;
    } else if (char === "[" || (char === "!" && text[at + 1] === "[")) {
      const mark = char === "[" ? "[" : "![";
      push({ type: "bracket", text: mark, depth: 0 });
      open.push(out.length - 1);
      at += mark.length;
    } else if (char === "]" && open.length) {
      flush();
      const start = open.pop();
      const target = /^\]\([ \t]*(?:<([^<>\n]*)>|((?:[^\s()\\]|\\.|\([^\s()]*\))*))(?:[ \t]+(?:"[^"]*"|'[^']*'))?[ \t]*\)/.exec(text.slice(at, at + 2100));
      const inside = target ? emphasis(out.slice(start + 1)) : [];
      const depth = 1 + Math.max(0, ...inside.map((piece) => piece.depth));
      if (target && depth <= MAX_DEPTH) {
        const isImage = out[start].text === "![";
        out.splice(start, out.length, { type: "link", href: target[1] ?? target[2], children: inside, isImage, depth });
        if (!isImage) open.length = 0; // a link holds no links
        at += target[0].length;
      } else {
        plain += "]";
        at += 1;
      }
    } else if (char === "<" && /^<https?:\/\/[^\s<>]+>/i.test(text.slice(at, at + 2100))) {
      const end = text.indexOf(">", at);
      const href = text.slice(at + 1, end);
      push({ type: "link", href, children: [{ type: "text", text: href, depth: 0 }], depth: 1 });
      at = end + 1;
    } else if ((char === "h" || char === "H") && !/\w$/.test(plain) && ADDRESS.test(text.slice(at, at + 2100))) {
      let href = ADDRESS.exec(text.slice(at, at + 2100))[0].replace(/[.,:;!?*_~\]]+$/, "");
      while (href.endsWith(")") && href.split(")").length > href.split("(").length) href = href.slice(0, -1);
      push({ type: "link", href, children: [{ type: "text", text: href, depth: 0 }], depth: 1 });
      at += href.length;
    } else {
      plain += char;
      at += 1;
    }
  }
  flush();
  return emphasis(out);
}

function closing(text, marks, from) {
  for (let at = text.indexOf(marks, from); at >= 0; ) {
    const run = /^`+/.exec(text.slice(at))[0].length;
    if (run === marks.length) return at;
    at = text.indexOf(marks, at + run);
  }
  return -1;
}

function code(text) {
  const line = text.replaceAll("\n", " ");
  return line.length > 2 && line.startsWith(" ") && line.endsWith(" ") && line.trim() ? line.slice(1, -1) : line;
}

function delimiter(text, at, run) {
  const before = Array.from(text.slice(Math.max(0, at - 2), at)).pop() ?? "";
  const after = Array.from(text.slice(at + run.length, at + run.length + 2))[0] ?? "";
  const isOpening = !SPACE.test(after) && (!PUNCTUATION.test(after) || SPACE.test(before) || PUNCTUATION.test(before));
  const isClosing = !SPACE.test(before) && (!PUNCTUATION.test(before) || SPACE.test(after) || PUNCTUATION.test(after));
  const isWord = run[0] === "_";
  const opens = isOpening && (!isWord || !isClosing || PUNCTUATION.test(before));
  const closes = isClosing && (!isWord || !isOpening || PUNCTUATION.test(after));
  return { type: "run", char: run[0], count: run.length, opens, closes, both: opens && closes, depth: 0 };
}

/** Pair the runs of * _ ~ (CommonMark's procedure); what finds no partner is text. */
function emphasis(pieces) {
  const out = [];
  const waiting = []; // indices in `out` of runs that may open
  for (const piece of pieces) {
    if (piece.type === "bracket") {
      out.push({ type: "text", text: piece.text, depth: 0 });
      continue;
    }
    out.push(piece);
    if (piece.type !== "run") continue;
    while (piece.closes && piece.count) {
      const found = waiting.findLastIndex((index) => pairs(out[index], piece));
      if (found < 0) break;
      const start = waiting[found];
      const opener = out[start];
      const width = piece.char === "~" ? 2 : Math.min(2, opener.count, piece.count);
      const children = out.slice(start + 1, -1).map(asText);
      const depth = 1 + Math.max(0, ...children.map((child) => child.depth));
      if (depth > MAX_DEPTH) break;
      opener.count -= width;
      piece.count -= width;
      const type = piece.char === "~" ? "del" : width === 2 ? "strong" : "em";
      out.splice(start + 1, out.length, { type, children, depth }, piece);
      waiting.length = found + (opener.count ? 1 : 0);
    }
    if (piece.opens && piece.count) {
      waiting.push(out.length - 1);
      if (waiting.length > 64) waiting.shift(); // keeps hostile texts linear
    }
  }
  return out.map(asText).filter((piece) => piece.type !== "text" || piece.text);
}

function pairs(opener, closer) {
  if (opener.char !== closer.char || !opener.count) return false;
  if (closer.char === "~") return opener.count >= 2 && closer.count >= 2;
  return !((opener.both || closer.both) && (opener.count + closer.count) % 3 === 0 && (opener.count % 3 || closer.count % 3));
}

function asText(piece) {
  return piece.type === "run" ? { type: "text", text: piece.char.repeat(piece.count), depth: 0 } : piece;
}
