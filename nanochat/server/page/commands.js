// The keyboard, and the commands that can be typed instead of a message.

import { $, h } from "./dom.js";

const isApple = /Mac|iPhone|iPad/.test(navigator.platform);
const MAIN = isApple ? "⌘" : "Ctrl";

// [shown keys, what it does, the event it answers to]; `main` is Ctrl, or the command key of Apple's keyboards.
const KEYS = [
  [`${MAIN} Shift O`, "New conversation", { main: true, shift: true, code: "KeyO", does: "create" }],
  [`${MAIN} K`, "Search conversations", { main: true, code: "KeyK", does: "search" }],
  [`${MAIN} B`, "Show or hide conversations", { main: true, code: "KeyB", does: "side" }],
  [`${MAIN} .`, "Settings", { main: true, code: "Period", does: "settings" }],
  [`${MAIN} /`, "This help", { main: true, code: "Slash", does: "help" }],
  [`${MAIN} Shift C`, "Copy the last answer", { main: true, shift: true, code: "KeyC", does: "copyAnswer" }],
  [`${MAIN} Shift ;`, "Copy the last code", { main: true, shift: true, code: "Semicolon", does: "copyCode" }],
  ["Esc", "Stop the answer", { code: "Escape", does: "stop" }],
  ["Shift Esc", "Go to the message box", { shift: true, code: "Escape", does: "focus" }],
  ["↑", "Edit the last message (in the empty message box)", null],
  ["Enter", "Send (Shift Enter begins a new line)", null],
];

const COMMANDS = {
  "/temperature X": "0 is always the likeliest token",
  "/topk N": "draw from the N likeliest tokens (0: all)",
  "/system TEXT": "what the model shall keep in mind (nothing: forget it)",
  "/clear": "begin a new conversation",
  "/help": "show this",
};

export function setUpKeys(act) {
  document.addEventListener("keydown", (event) => {
    if (event.isComposing || event.altKey) return;
    const main = isApple ? event.metaKey : event.ctrlKey;
    const match = KEYS.find(([, , key]) => key && key.code === event.code && Boolean(key.main) === main && Boolean(key.shift) === event.shiftKey);
    if (!match || (document.querySelector("dialog[open]") && match[2].does !== "help")) return;
    if (match[2].does !== "stop") event.preventDefault();
    act[match[2].does]();
  });
  $("keys").replaceChildren(...KEYS.flatMap(([keys, text]) => {
    const caps = keys.split(" ").flatMap((key) => [" ", h("kbd", {}, key)]).slice(1);
    return [h("dt", {}, ...caps), h("dd", {}, text)];
  }));
  $("commands").replaceChildren(...Object.entries(COMMANDS).flatMap(([name, text]) => [h("dt", {}, name), h("dd", {}, text)]));
}

/** Obey a line that begins with a slash; returns what to tell the person, null if the line is no command. */
export function obey(line, { settings, act }) {
  const match = /^\/([a-z]+)(?:\s+([\s\S]*))?$/i.exec(line);
  if (!match) return null;
  const rest = (match[2] ?? "").trim();
  switch (match[1].toLowerCase()) {
    case "temperature":
      return settings.setNumber("temperature", rest) ?? `Temperature ${settings.shown("temperature")}.`;
    case "topk":
      return settings.setNumber("top_k", rest) ?? `Top-k ${settings.shown("top_k") || "off"}.`;
    case "system":
      act.system(rest);
      return rest ? `Keeping in mind: ${rest}` : "Nothing to keep in mind.";
    case "clear":
      act.create();
      return "";
    case "help":
      act.help();
      return "";
    default:
      return `There is no command /${match[1]}. ${Object.keys(COMMANDS).join(", ")}`;
  }
}
