// A conversation as a tree of messages: editing and answering again grow branches, nothing is overwritten.
// Pure data, no document: {id, title, system, created, updated, leaf, nodes: {id: node}} with nodes
// {id, parent, role, parts: [{type, text}], created, state, error, stats}.

const ROLES = ["user", "assistant"];
const PARTS = ["text", "python", "python_output"];
export const FORMAT = "nanochat-conversations-1";

export function newId() {
  const bytes = crypto.getRandomValues(new Uint8Array(12));
  return Array.from(bytes, (byte) => byte.toString(16).padStart(2, "0")).join("");
}

export function create(system = "") {
  const now = Date.now();
  return { id: newId(), title: "", system, created: now, updated: now, leaf: null, nodes: {} };
}

/** Append a message after `parent` and show it; returns its node. */
export function add(tree, role, parts, parent = tree.leaf) {
  const node = { id: newId(), parent, role, parts, created: Date.now(), state: "done", error: null, stats: null };
  tree.nodes[node.id] = node;
  tree.leaf = node.id;
  tree.updated = node.created;
  return node;
}

/** The shown messages from the first to the leaf. */
export function path(tree, leaf = tree.leaf) {
  const found = [];
  for (let id = leaf; id; id = tree.nodes[id].parent) found.push(tree.nodes[id]);
  return found.reverse();
}

/** All messages that follow the same one as `node` does, the oldest first. */
export function siblings(tree, node) {
  return Object.values(tree.nodes)
    .filter((other) => other.parent === node.parent)
    .sort((a, b) => a.created - b.created || (a.id < b.id ? -1 : 1));
}

/** Show the branch through `id`, down to its newest end. */
export function show(tree, id) {
  const children = new Map();
  for (const node of Object.values(tree.nodes)) {
    const newest = children.get(node.parent);
    if (!newest || node.created >= newest.created) children.set(node.parent, node);
  }
  let leaf = id;
  while (children.has(leaf)) leaf = children.get(leaf).id;
  tree.leaf = leaf;
}

export function textOf(node) {
  return node.parts.filter((part) => part.type === "text").map((part) => part.text).join("");
}

/** The whole of an answer as text, calls of the tool as [12 + 34 = 46]. */
export function plainText(node) {
  let text = "";
  let last = "text";
  for (const part of node.parts) {
    if (part.type === "python") text += `${last === "text" ? "" : "]"}[${part.text}`;
    else if (part.type === "python_output") text += ` = ${part.text}`;
    else text += (last === "text" ? "" : "] ") + part.text;
    last = part.type;
  }
  return last === "text" ? text : `${text}]`;
}

/** The request's messages for the path that ends at node `leaf`. */
export function messages(tree, leaf) {
  const said = path(tree, leaf).map((node) => {
    if (node.role === "user") return { role: "user", content: textOf(node) };
    return { role: "assistant", content: textOf(node), parts: node.parts };
  });
  return tree.system.trim() ? [{ role: "system", content: tree.system }, ...said] : said;
}

export function titleOf(tree) {
  if (tree.title) return tree.title;
  const first = Object.values(tree.nodes).find((node) => node.role === "user" && node.parent === null);
  const line = first ? textOf(first).trim().split("\n")[0] : "";
  if (!line) return "New conversation";
  const letters = Array.from(line);
  return letters.length > 60 ? `${letters.slice(0, 59).join("")}…` : line;
}

/** Whether a conversation holds all words of a search, in its title or in any message. */
export function matches(tree, query) {
  const words = query.toLowerCase().split(/\s+/).filter(Boolean);
  if (!words.length) return true;
  const text = [titleOf(tree), ...Object.values(tree.nodes).map(textOf)].join("\n").toLowerCase();
  return words.every((word) => text.includes(word));
}

export function toMarkdown(tree) {
  const lines = [`# ${titleOf(tree)}`, ""];
  if (tree.system.trim()) lines.push(`> ${tree.system.trim().replaceAll("\n", "\n> ")}`, "");
  for (const node of path(tree)) lines.push(`## ${node.role === "user" ? "You" : "nanochat"}`, "", plainText(node), "");
  return lines.join("\n");
}

export function toJson(trees) {
  return JSON.stringify({ format: FORMAT, conversations: trees }, null, 1);
}

/** Conversations from the text of a file: our own export, or {"messages": [{role, content}]}. Throws Error. */
export function fromJson(text) {
  let value;
  try {
    value = JSON.parse(text);
  } catch {
    throw new Error("The file is not JSON.");
  }
  if (Array.isArray(value?.messages)) return [fromMessages(value.messages)];
  if (value?.format !== FORMAT || !Array.isArray(value.conversations)) {
    throw new Error("The file holds no conversations of nanochat.");
  }
  return value.conversations.map(checked);
}

function fromMessages(said) {
  const tree = create();
  for (const message of said) {
    const parts = typeof message?.content === "string" ? [{ type: "text", text: message.content }] : message?.content;
    if (message?.role === "system") tree.system = checkedParts(parts)[0]?.text ?? "";
    else if (ROLES.includes(message?.role)) add(tree, message.role, checkedParts(parts));
    else throw new Error("A message of the file has an unknown role.");
  }
  return tree;
}

function checkedParts(parts) {
  const isPart = (part) => PARTS.includes(part?.type) && typeof part.text === "string";
  if (!Array.isArray(parts) || !parts.every(isPart)) throw new Error("A message of the file has no text.");
  return parts.map(({ type, text }) => ({ type, text }));
}

/** A copy of a conversation from a file with nothing in it but what we know, under new ids. */
function checked(given) {
  const tree = create(typeof given?.system === "string" ? given.system : "");
  if (typeof given?.title === "string") tree.title = given.title.slice(0, 200);
  for (const key of ["created", "updated"]) if (Number.isFinite(given?.[key])) tree[key] = given[key];
  const nodes = Object.values(given?.nodes ?? {});
  const renamed = new Map(nodes.map((node) => [node?.id, newId()]));
  for (const node of nodes) {
    if (!ROLES.includes(node?.role)) throw new Error("A message of the file has an unknown role.");
    const parent = node.parent === null ? null : renamed.get(node.parent);
    if (parent === undefined) throw new Error("A message of the file follows one that is not there.");
    const id = renamed.get(node.id);
    const created = Number.isFinite(node.created) ? node.created : 0;
    tree.nodes[id] = { id, parent, role: node.role, parts: checkedParts(node.parts), created, state: "done", error: null, stats: null };
  }
  for (const id of Object.keys(tree.nodes)) {
    const seen = new Set();
    for (let at = id; at; at = tree.nodes[at].parent) {
      if (seen.has(at)) throw new Error("The messages of the file follow each other in a circle.");
      seen.add(at);
    }
  }
  if (renamed.has(given?.leaf)) tree.leaf = renamed.get(given.leaf);
  else show(tree, null);
  return tree;
}
