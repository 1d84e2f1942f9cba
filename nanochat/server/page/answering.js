// Getting an answer: one request, its events put into the answer's node as they come. Knows no document.

import { chat } from "./api.js";
import { messages } from "./tree.js";

/** Append a piece of a part to a node; an empty piece of python begins another call of the tool. */
export function grow(node, { type, text }) {
  const last = node.parts.at(-1);
  if (last?.type === type && !(type === "python" && text === "" && last.text)) last.text += text;
  else node.parts.push({ type, text });
}

/** An answer on its way into `node`. onGrow is called after every event, onEnd once; stop() ends it. */
export class Run {
  #controller = new AbortController();

  constructor(tree, node, settings, { onGrow, onEnd }) {
    Object.assign(this, { tree, node, settings, onGrow, onEnd });
    this.started = performance.now();
    this.first = null;
    this.count = 0;
  }

  stop() {
    this.#controller.abort();
  }

  get rate() {
    const seconds = (performance.now() - this.started) / 1000 - (this.first ?? 0);
    return this.count > 1 && seconds > 0 ? (this.count - 1) / seconds : 0;
  }

  /** Run to the end. isExtending: go on with what the node holds instead of answering anew. */
  async go(isExtending = false) {
    const { node, tree, settings } = this;
    const said = messages(tree, isExtending ? node.id : node.parent);
    const body = { messages: said, stream: true, stream_options: { include_usage: true }, ...settings.request() };
    if (isExtending) body.continue_final_message = true;
    let end = { reason: null, usage: null };
    try {
      for await (const event of chat(body, settings.get("key"), this.#controller.signal)) {
        end = this.#take(event, end);
        this.onGrow(this);
      }
      node.state = "done";
    } catch (error) {
      if (error.name === "AbortError") node.state = "stopped";
      else {
        node.state = "failed";
        node.error = error.message;
        this.failure = error;
      }
    }
    const tokens = end.usage?.completion_tokens ?? this.count;
    if (tokens) node.stats = { tokens, rate: end.rate ?? this.rate, first: this.first, reason: end.reason };
    this.onEnd(this);
  }

  #take(event, end) {
    const choice = event.choices[0];
    if (choice?.delta) {
      const { delta } = choice;
      const pieces = delta.parts ?? (delta.content ? [{ type: "text", text: delta.content }] : []);
      if (pieces.length) {
        this.first ??= (performance.now() - this.started) / 1000;
        this.count += 1;
      }
      for (const piece of pieces) grow(this.node, piece);
      for (const { token, logprob, top_logprobs } of choice.logprobs?.content ?? []) {
        (this.node.tokens ??= []).push({ token, logprob, top: top_logprobs.map((one) => [one.token, one.logprob]) });
      }
    }
    return {
      reason: choice?.finish_reason ?? end.reason,
      usage: event.usage ?? end.usage,
      rate: event.timings?.tokens_per_second ?? end.rate,
    };
  }
}
