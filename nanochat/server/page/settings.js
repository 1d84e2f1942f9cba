// What a person has chosen: kept in this browser; what is not chosen, the server decides.

import { $, h } from "./dom.js";

const KEY = "nanochat.settings";

// name -> label, least, most, step; the names are those of the request.
export const FIELDS = {
  temperature: ["Temperature", 0, 2, 0.05],
  top_k: ["Top-k", 0, 100_000, 1],
  top_p: ["Top-p", 0, 1, 0.01],
  min_p: ["Min-p", 0, 1, 0.01],
  repetition_penalty: ["Repetition penalty", 0.1, 2, 0.05],
  max_tokens: ["Most tokens", 1, 1_000_000, 1],
  seed: ["Seed", 0, 2 ** 53 - 1, 1],
};
const DEFAULTS = { temperature: 0.6, top_k: 50, top_p: 1, min_p: 0, repetition_penalty: 1, max_tokens: "all", seed: "random" };

export class Settings {
  #values = {};
  #server = {};

  constructor(onChange) {
    this.onChange = onChange;
    try {
      this.#values = JSON.parse(localStorage.getItem(KEY)) ?? {};
    } catch {
      this.#values = {};
    }
    this.#applyTheme();
  }

  get(name) {
    return this.#values[name] ?? null;
  }

  /** Keep a value; null goes back to the server's. */
  set(name, value) {
    if (value === null) delete this.#values[name];
    else this.#values[name] = value;
    localStorage.setItem(KEY, JSON.stringify(this.#values));
    if (name === "theme") this.#applyTheme();
    this.onChange();
  }

  /** Set a number from text; returns what is wrong with it, or null. */
  setNumber(name, text) {
    const [label, least, most, step] = FIELDS[name];
    if (text.trim() === "") {
      this.set(name, null);
      return null;
    }
    const value = Number(text);
    const isFine = Number.isFinite(value) && value >= least && value <= most && (step < 1 || Number.isInteger(value));
    if (!isFine) return `${label} must be ${step < 1 ? "a number" : "a whole number"} from ${least} to ${most}.`;
    this.set(name, value);
    return null;
  }

  /** What the server told about itself: {model, temperature, top_k, ...}. */
  learn(server) {
    this.#server = server;
    this.onChange();
  }

  shown(name) {
    return this.get(name) ?? this.#server[name] ?? DEFAULTS[name];
  }

  /** The fields of a request that the person has chosen. */
  request() {
    const chosen = Object.keys(FIELDS).map((name) => [name, this.get(name)]);
    const fields = Object.fromEntries(chosen.filter(([, value]) => value !== null));
    return this.get("alternatives") ? { ...fields, logprobs: true, top_logprobs: 5 } : fields;
  }

  /** "temperature 0.6 · top-k 50" */
  summary() {
    return `temperature ${this.shown("temperature")} · top-k ${this.shown("top_k") || "off"}`;
  }

  #applyTheme() {
    const theme = this.get("theme");
    if (theme === "light" || theme === "dark") document.documentElement.dataset.theme = theme;
    else delete document.documentElement.dataset.theme;
  }

  #fill() {
    const rows = Object.entries(FIELDS).map(([name, [label, least, most, step]]) => {
      const input = h("input", { name, type: "text", inputmode: step < 1 ? "decimal" : "numeric", placeholder: this.#server[name] ?? DEFAULTS[name], value: this.get(name) ?? "" });
      input.addEventListener("change", () => {
        const wrong = this.setNumber(name, input.value.replace(",", "."));
        input.setCustomValidity(wrong ?? "");
        if (wrong) input.reportValidity();
      });
      input.addEventListener("input", () => input.setCustomValidity(""));
      return h("label", { title: `${least} to ${most}` }, label, input);
    });
    $("fields").replaceChildren(...rows);
    $("alternatives").checked = Boolean(this.get("alternatives"));
    $("key").value = this.get("key") ?? "";
    for (const radio of document.getElementsByName("theme")) radio.checked = radio.value === (this.get("theme") ?? "auto");
  }

  /** Open the dialog; `system` is the conversation's system prompt, onSystem gets the new one. */
  open(system, onSystem) {
    this.#fill();
    $("system").value = system;
    $("system").onchange = () => {
      this.set("system", $("system").value.trim() || null);
      onSystem($("system").value.trim());
    };
    $("settings").showModal();
  }

  setUp(onKey) {
    $("alternatives").addEventListener("change", () => this.set("alternatives", $("alternatives").checked || null));
    $("key").addEventListener("change", () => {
      this.set("key", $("key").value.trim() || null);
      onKey();
    });
    for (const radio of document.getElementsByName("theme")) {
      radio.addEventListener("change", () => this.set("theme", radio.value === "auto" ? null : radio.value));
    }
    $("reset").addEventListener("click", () => {
      for (const name of [...Object.keys(FIELDS), "alternatives"]) this.set(name, null);
      this.#fill();
    });
  }
}
