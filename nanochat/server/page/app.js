// The page: conversations of this browser, answered by the server it came from. This file holds the state and
// connects the parts; each of them is a file of its own.

import { Run } from "./answering.js";
import { ApiError, get, isWell } from "./api.js";
import { obey, setUpKeys } from "./commands.js";
import { $, confirmed, copyText, download, h, icon, say } from "./dom.js";
import { Answer, userMessage } from "./message.js";
import { Settings } from "./settings.js";
import { drawList, leaveSide, setUpSide, toggleSide } from "./sidebar.js";
import { Store } from "./store.js";
import * as tree from "./tree.js";

const IDEAS = [
  ["Calculate", "What is 47 + 85?"],
  ["Count letters", "How many r are in 'strawberry'?"],
  ["Ask for a fact", "What is the capital of France?"],
  ["Get to know it", "Who are you?"],
];
const BOTTOM = 40; // pixels from the end within which the page scrolls along
const SAVE_EVERY = 1000; // milliseconds between two saves of an answer that is being written

const settings = new Settings(() => drawSettings());
const trees = new Map();
const runs = new Map(); // id of a conversation -> the Run that answers in it
const answers = new Map(); // id of a node -> its Answer on the page
let current = tree.create(settings.get("system") ?? "");
let store = null;

// ---------------------------------------------------------------- drawing

function drawSettings() {
  $("sampling").textContent = settings.summary();
}

function drawSide() {
  drawList(trees.values(), current, runs, { open, rename, remove });
}

function drawForm() {
  const isRunning = runs.has(current.id);
  const button = $("send");
  button.replaceChildren(icon(isRunning ? "stop" : "send"));
  button.setAttribute("aria-label", isRunning ? "Stop the answer" : "Send");
  button.title = isRunning ? "Stop (Esc)" : "Send (Enter)";
  button.disabled = !isRunning && !$("input").value.trim();
  if (!isRunning) $("speed").textContent = "";
  $("log").setAttribute("aria-busy", String(isRunning));
  $("title").textContent = tree.titleOf(current);
  document.title = current.leaf ? `${tree.titleOf(current)} · nanochat` : "nanochat";
  $("export").hidden = !current.leaf;
}

const act = {
  edit: (node, text) => ask(text, node.parent),
  again: (node) => answer(node.parent),
  extend: (node) => answer(node.parent, node),
  branch(node) {
    tree.show(current, node.id);
    keep(current);
    const top = $("scroll").scrollTop;
    draw();
    $("scroll").scrollTop = top;
    document.querySelector(`[data-id="${node.id}"] .branch button:not(:disabled)`)?.focus();
  },
};

/** Draw the whole conversation. */
function draw() {
  answers.clear();
  const nodes = tree.path(current).map((node) => {
    const others = tree.siblings(current, node);
    if (node.role === "user") return userMessage(node, others, act);
    answers.set(node.id, new Answer(node, others, act));
    return answers.get(node.id).element;
  });
  $("log").replaceChildren(...nodes);
  $("empty").hidden = nodes.length > 0;
  $("log").hidden = nodes.length === 0;
  drawForm();
  drawSide();
  drawJump();
}

function isAtEnd() {
  const box = $("scroll");
  return box.scrollHeight - box.scrollTop - box.clientHeight < BOTTOM;
}

function toEnd() {
  $("scroll").scrollTop = $("scroll").scrollHeight;
}

function drawJump() {
  $("jump").hidden = isAtEnd();
}

/** Change the page and scroll along, but only for people who are reading the end. */
function follow(change) {
  const wasAtEnd = isAtEnd();
  change();
  if (wasAtEnd) toEnd();
  drawJump();
}

function notice(text) {
  $("empty").hidden = true;
  $("log").hidden = false;
  $("log").append(h("p", { class: "notice" }, text));
  toEnd();
}

// ---------------------------------------------------------------- conversations

async function keep(one) {
  one.updated = Date.now();
  trees.set(one.id, one);
  try {
    await store?.save(one);
  } catch {
    banner("This browser has no room left: new messages are lost when the page is closed.");
  }
}

function open(one) {
  current = one;
  sessionStorage.setItem("nanochat.current", one.id);
  draw();
  toEnd();
  leaveSide();
  if (!matchMedia("(hover: none)").matches) $("input").focus();
}

function create() {
  open(tree.create(settings.get("system") ?? ""));
}

function rename(one) {
  const dialog = $("rename");
  $("rename-text").value = tree.titleOf(one);
  dialog.returnValue = "";
  dialog.showModal();
  $("rename-text").select();
  dialog.onclose = () => {
    if (dialog.returnValue !== "yes") return;
    one.title = $("rename-text").value.trim();
    store?.save(one);
    draw();
  };
}

async function remove(one) {
  if (!(await confirmed(`Delete “${tree.titleOf(one)}”? This cannot be undone.`, "Delete"))) return;
  runs.get(one.id)?.stop();
  trees.delete(one.id);
  await store?.remove(one.id);
  if (one === current) create();
  else drawSide();
  say("Deleted");
}

async function removeAll() {
  if (!(await confirmed(`Delete all ${trees.size} conversations? This cannot be undone.`, "Delete all"))) return;
  for (const run of runs.values()) run.stop();
  for (const id of trees.keys()) await store?.remove(id);
  trees.clear();
  $("settings").close();
  create();
}

function fileName(one, ending) {
  const words = tree.titleOf(one).normalize("NFKD").replace(/[^\w]+/g, "-").replace(/^-|-$/g, "").toLowerCase();
  return `${words.slice(0, 40) || "conversation"}.${ending}`;
}

async function importFile(file) {
  try {
    const found = tree.fromJson(await file.text());
    for (const one of found) {
      trees.set(one.id, one);
      await store?.save(one);
    }
    $("settings").close();
    if (found.length) open(found[0]);
    say(`${found.length} conversation${found.length === 1 ? "" : "s"} imported`);
  } catch (error) {
    say(error.message);
  }
}

// ---------------------------------------------------------------- asking and answering

function send() {
  const text = $("input").value.trim();
  if (!text || runs.has(current.id)) return;
  const reply = obey(text, { settings, act: { create, help: () => $("help").showModal(), system: setSystem } });
  $("input").value = "";
  sessionStorage.removeItem("nanochat.draft");
  resize();
  if (reply === null) ask(text, current.leaf);
  else if (reply) notice(reply);
  drawForm();
}

function setSystem(text) {
  current.system = text;
  if (current.leaf) keep(current);
}

function ask(text, parent) {
  const node = tree.add(current, "user", [{ type: "text", text }], parent);
  answer(node.id);
}

/** Answer the message `parent`; with `extended`, go on with that answer instead. */
function answer(parent, extended = null) {
  const one = current;
  if (runs.has(one.id)) return;
  const node = extended ?? tree.add(one, "assistant", [], parent);
  Object.assign(node, { state: "streaming", error: null, model: $("model").textContent });
  let frame = 0;
  let saved = performance.now();
  const paint = () => {
    frame = 0;
    const shown = answers.get(node.id);
    if (shown && one === current) follow(() => shown.update());
    if (one === current) $("speed").textContent = run.rate ? `${run.rate.toFixed(1)} tokens/s` : "";
  };
  const onGrow = () => {
    frame ||= requestAnimationFrame(paint);
    if (performance.now() - saved > SAVE_EVERY) {
      saved = performance.now();
      keep(one);
    }
  };
  const onEnd = () => {
    cancelAnimationFrame(frame);
    runs.delete(one.id);
    if (trees.has(one.id)) keep(one);
    if (one === current) follow(() => answers.get(node.id)?.finish());
    drawForm();
    drawSide();
    if (run.failure) explain(run.failure);
  };
  const run = new Run(one, node, settings, { onGrow, onEnd });
  runs.set(one.id, run);
  sessionStorage.setItem("nanochat.current", one.id);
  keep(one);
  draw();
  toEnd();
  run.go(extended !== null);
}

function stop() {
  runs.get(current.id)?.stop();
}

// ---------------------------------------------------------------- the server, there or not

function banner(text, action = null, onclick = null) {
  const button = action ? h("button", { type: "button", onclick }, action) : null;
  $("banner").hidden = !text;
  $("banner").replaceChildren(...[text, button].filter(Boolean));
}

function openSettings() {
  settings.open(current.system, setSystem);
}

/** Tell what went wrong and, if the server has gone, watch for its return. */
function explain(error) {
  if (!(error instanceof ApiError)) return;
  if (error.status === 401) banner("The server asks for an API key.", "Enter it", openSettings);
  else if (error.status === 0 || error.status === 503) watch();
}

let watching = false;

async function watch() {
  if (watching) return;
  watching = true;
  banner("The server does not answer. Your conversations can be read; this page notices when it is back.");
  for (let wait = 1000; !(await isWell()); wait = Math.min(wait * 1.5, 10_000)) {
    await new Promise((resolve) => setTimeout(resolve, wait));
  }
  watching = false;
  say("The server is back");
  connect();
}

async function connect() {
  try {
    const server = await get("settings", settings.get("key"));
    settings.learn(server);
    $("model").textContent = server.model;
    $("empty-text").textContent = server.note
      ? `${server.model} is a base model: it continues text, nobody has taught it to answer yet.`
      : `${server.model} reads ${server.context ?? "its"} tokens at a time and runs on your own machine. Ask it something.`;
    banner("");
  } catch (error) {
    explain(error);
  }
}

// ---------------------------------------------------------------- the start

function resize() {
  const input = $("input");
  input.style.height = "auto";
  input.style.height = `${input.scrollHeight}px`;
}

function setUpForm() {
  $("form").addEventListener("submit", (event) => {
    event.preventDefault();
    if (runs.has(current.id)) stop();
    else send();
  });
  $("input").addEventListener("input", () => {
    sessionStorage.setItem("nanochat.draft", $("input").value);
    resize();
    drawForm();
  });
  $("input").addEventListener("keydown", (event) => {
    if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
      event.preventDefault();
      send();
    } else if (event.key === "ArrowUp" && !$("input").value) {
      const last = [...document.querySelectorAll(".user .edit")].at(-1);
      if (last) {
        event.preventDefault();
        last.click();
      }
    }
  });
  $("form").addEventListener("click", (event) => event.target === $("form") && $("input").focus());
  $("scroll").addEventListener("scroll", drawJump, { passive: true });
  $("jump").addEventListener("click", toEnd);
  $("ideas").replaceChildren(
    ...IDEAS.map(([title, text]) => h("button", { type: "button", onclick: () => ask(text, current.leaf) }, h("small", {}, title), text)),
  );
}

function setUpButtons() {
  for (const id of ["new", "bar-new"]) $(id).addEventListener("click", create);
  $("search").addEventListener("input", drawSide);
  for (const id of ["open-settings", "sampling"]) $(id).addEventListener("click", openSettings);
  $("open-help").addEventListener("click", () => $("help").showModal());
  $("export").addEventListener("click", () => $("export-dialog").showModal());
  $("export-dialog").addEventListener("close", () => {
    const kind = $("export-dialog").returnValue;
    if (kind === "json") download(fileName(current, "json"), "application/json", tree.toJson([current]));
    if (kind === "markdown") download(fileName(current, "md"), "text/markdown", tree.toMarkdown(current));
    $("export-dialog").returnValue = "";
  });
  $("export-all").addEventListener("click", () => download("nanochat.json", "application/json", tree.toJson([...trees.values()])));
  $("import").addEventListener("click", () => $("file").click());
  $("file").addEventListener("change", () => {
    if ($("file").files[0]) importFile($("file").files[0]);
    $("file").value = "";
  });
  $("remove-all").addEventListener("click", removeAll);
  $("rename-cancel").addEventListener("click", () => $("rename").close());
  for (const dialog of document.querySelectorAll("dialog")) {
    dialog.addEventListener("click", (event) => event.target === dialog && dialog.close());
  }
  const copy = async (selector, text) => {
    const last = [...document.querySelectorAll(selector)].at(-1);
    if (last) say((await copyText(text(last))) ? "Copied" : "Copying failed");
  };
  setUpKeys({
    create,
    stop,
    search() {
      toggleSide(true);
      $("search").focus();
    },
    side: () => toggleSide(),
    settings: openSettings,
    help: () => ($("help").open ? $("help").close() : $("help").showModal()),
    copyAnswer: () => copy(".assistant", (element) => tree.plainText(current.nodes[element.dataset.id])),
    copyCode: () => copy(".code pre", (element) => element.textContent),
    focus: () => $("input").focus(),
  });
}

/** Another tab has changed a conversation. */
async function refresh(id) {
  if (runs.has(id)) return;
  const found = await store.one(id);
  if (found) trees.set(id, found);
  else trees.delete(id);
  if (current.id === id && found) {
    current = found;
    draw();
  } else drawSide();
}

async function start() {
  setUpSide();
  setUpForm();
  setUpButtons();
  settings.setUp(connect);
  drawSettings();
  store = await Store.open(refresh);
  for (const one of await store.all()) {
    trees.set(one.id, one);
    for (const node of Object.values(one.nodes)) if (node.state === "streaming") node.state = "interrupted";
  }
  current = trees.get(sessionStorage.getItem("nanochat.current")) ?? current;
  $("input").value = sessionStorage.getItem("nanochat.draft") ?? "";
  draw();
  resize();
  toEnd();
  addEventListener("pagehide", () => runs.forEach((run) => store.save(run.tree)));
  addEventListener("storage", drawSettings);
  await connect();
  if (!store.isKept) banner("This browser keeps nothing: conversations end with the page.");
  offline();
}

/** Keep the page's own files, so that it opens without the server. */
function offline() {
  if (!("serviceWorker" in navigator)) return;
  const policy = globalThis.trustedTypes?.createPolicy("nanochat", { createScriptURL: (name) => (name === "sw.js" ? name : "") });
  navigator.serviceWorker.register(policy ? policy.createScriptURL("sw.js") : "sw.js").catch(() => {});
}

start();
