// Talking to the server: plain requests, and answers as a stream of events.

/** An answer that is no success. status 0: the server could not be reached, or went away in the middle. */
export class ApiError extends Error {
  constructor(status, message, code = null) {
    super(message);
    this.status = status;
    this.code = code;
  }
}

/** Cuts a stream of text into server-sent events, however the network has cut it: push(text) -> data strings. */
export class EventSplitter {
  #rest = "";

  push(text) {
    const lines = (this.#rest + text).split(/\r\n|\n|\r(?!$)/);
    this.#rest = lines.pop();
    const found = [];
    for (const line of lines) {
      if (line.startsWith("data:")) this.#data.push(line.slice(line[5] === " " ? 6 : 5));
      else if (line === "" && this.#data.length) found.push(this.#data.splice(0).join("\n"));
    }
    return found;
  }

  #data = [];
}

function headers(key, more = {}) {
  return key ? { Authorization: `Bearer ${key}`, ...more } : more;
}

async function send(path, options) {
  let response;
  try {
    response = await fetch(path, { cache: "no-store", ...options });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ApiError(0, "The server does not answer.");
  }
  if (response.ok) return response;
  const body = await response.json().catch(() => null);
  const message = body?.error?.message ?? `The server answered ${response.status}.`;
  throw new ApiError(response.status, message, body?.error?.code ?? null);
}

/** The JSON at a path of the server. Throws ApiError. */
export async function get(path, key) {
  return (await send(path, { headers: headers(key) })).json();
}

/** Whether the server is there and well. */
export async function isWell() {
  try {
    return (await fetch("health", { cache: "no-store" })).ok;
  } catch {
    return false;
  }
}

/** The events of an answer. Throws ApiError, also when the stream breaks off before it says that it is done. */
export async function* chat(body, key, signal) {
  const options = { method: "POST", headers: headers(key, { "Content-Type": "application/json" }), signal };
  const response = await send("v1/chat/completions", { ...options, body: JSON.stringify(body) });
  const reader = response.body.getReader();
  const decoder = new TextDecoder();
  const splitter = new EventSplitter();
  for (;;) {
    let piece;
    try {
      piece = await reader.read();
    } catch (error) {
      if (error.name === "AbortError") throw error;
      throw new ApiError(0, "The connection to the server was lost.");
    }
    if (piece.done) throw new ApiError(0, "The connection to the server was lost.");
    for (const data of splitter.push(decoder.decode(piece.value, { stream: true }))) {
      if (data === "[DONE]") return;
      const event = JSON.parse(data);
      if (event.error) throw new ApiError(500, event.error.message, event.error.code);
      yield event;
    }
  }
}
