// The page: a conversation kept in memory, answers streamed from /v1/chat/completions.
// Text enters the document through textContent alone.

const $ = (id) => document.getElementById(id);
const log = $("log");
let messages = []; // {role, content} for a user, {role, parts} for the model
let running = null; // the AbortController of the answer that is being written

/** Append the pieces that come to a message's element; a call of the tool is one box: 12 + 34 = 46. */
function writer(element) {
  const parts = [];
  let node = null;
  const write = ({ type, text }) => {
    const last = parts.at(-1);
    if (last?.type === type) last.text += text;
    else parts.push({ type, text });
    if (!node || (last?.type !== type && !(last?.type === "python" && type === "python_output"))) {
      node = document.createElement("span");
      if (type !== "text") node.className = "tool";
      element.append(node);
    } else if (last?.type !== type) {
      node.append(" = ");
    }
    node.append(text);
  };
  return { parts, write };
}

function show(role) {
  const element = document.createElement("div");
  element.className = `message ${role}`;
  log.append(element);
  return element;
}

/** Scroll along only for people who are reading the end. */
function follow(change) {
  const isAtEnd = log.scrollHeight - log.scrollTop - log.clientHeight < 40;
  change();
  if (isAtEnd) log.scrollTop = log.scrollHeight;
}

/** The events of a response; network chunks may cut them anywhere. */
async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const pieces = (rest + value).split("\n\n");
    rest = pieces.pop();
    for (const piece of pieces) {
      if (piece === "data: [DONE]") return;
      if (piece.startsWith("data: ")) yield JSON.parse(piece.slice(6));
    }
  }
}

async function answer() {
  const controller = (running = new AbortController());
  const asked = messages; // "New chat" may replace them meanwhile
  const { parts, write } = writer(show("assistant"));
  log.setAttribute("aria-busy", "true");
  update();
  try {
    const response = await fetch("v1/chat/completions", {
      method: "POST",
      headers: { "Content-Type": "application/json" },
      body: JSON.stringify({ messages: asked, stream: true, temperature: Number($("temperature").value) }),
      signal: controller.signal,
    });
    if (!response.ok) throw new Error((await response.json()).error.message);
    for await (const event of events(response)) {
      if (event.error) throw new Error(event.error.message);
      for (const part of event.choices[0]?.delta.parts ?? []) follow(() => write(part));
    }
  } catch (error) {
    if (error.name !== "AbortError") {
      const text = error instanceof TypeError ? "The server does not answer." : error.message;
      follow(() => (show("error").textContent = text));
    }
  }
  asked.push({ role: "assistant", parts: parts.length ? parts : [{ type: "text", text: "" }] });
  if (running !== controller) return;
  running = null;
  log.removeAttribute("aria-busy");
  update();
  $("input").focus();
}

function update() {
  $("send").textContent = running ? "Stop" : "Send";
  $("again").disabled = Boolean(running) || messages.length === 0;
}

function say() {
  const text = $("input").value.trim();
  if (!text || running) return;
  $("input").value = "";
  grow();
  messages.push({ role: "user", content: text });
  show("user").textContent = text;
  log.scrollTop = log.scrollHeight;
  answer();
}

function grow() {
  const input = $("input");
  input.style.height = "auto";
  input.style.height = `${input.scrollHeight + 2}px`;
}

function startAnew() {
  running?.abort();
  running = null;
  messages = [];
  log.replaceChildren();
  update();
  $("input").focus();
}

$("form").addEventListener("submit", (event) => {
  event.preventDefault();
  if (running) running.abort();
  else say();
});
$("input").addEventListener("input", grow);
$("input").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    say();
  }
});
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape") running?.abort();
});
$("new").addEventListener("click", startAnew);
$("again").addEventListener("click", () => {
  messages.pop();
  while (log.lastChild && !log.lastChild.classList.contains("user")) log.lastChild.remove();
  answer();
});

try {
  const settings = await (await fetch("settings")).json();
  $("model").textContent = settings.model;
  $("temperature").value = settings.temperature;
  $("note").hidden = !settings.note;
  $("note").textContent = settings.note ?? "";
} catch {
  show("error").textContent = "The server does not answer.";
}
