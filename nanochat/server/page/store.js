// Conversations kept in this browser (IndexedDB); in memory alone where the browser allows no more.

const NAME = "nanochat";
const TABLE = "conversations";

function promise(request) {
  return new Promise((resolve, reject) => {
    request.onsuccess = () => resolve(request.result);
    request.onerror = () => reject(request.error);
  });
}

export class Store {
  #db = null;
  #channel = null;

  /** Open the database; isKept says whether conversations outlive the page. */
  static async open(onChange = () => {}) {
    const store = new Store();
    try {
      const request = indexedDB.open(NAME, 1);
      request.onupgradeneeded = () => request.result.createObjectStore(TABLE, { keyPath: "id" });
      store.#db = await promise(request);
      store.#db.onversionchange = () => store.#db.close();
      store.#channel = new BroadcastChannel(NAME); // other tabs of this page
      store.#channel.onmessage = ({ data }) => onChange(data);
    } catch {
      store.#db = null;
    }
    return store;
  }

  get isKept() {
    return this.#db !== null;
  }

  #table(mode) {
    return this.#db.transaction(TABLE, mode).objectStore(TABLE);
  }

  /** All conversations, in no order. */
  async all() {
    return this.#db ? promise(this.#table("readonly").getAll()) : [];
  }

  async one(id) {
    return this.#db ? promise(this.#table("readonly").get(id)) : undefined;
  }

  async save(tree) {
    if (!this.#db) return;
    await promise(this.#table("readwrite").put(tree));
    this.#channel?.postMessage(tree.id);
  }

  async remove(id) {
    if (!this.#db) return;
    await promise(this.#table("readwrite").delete(id));
    this.#channel?.postMessage(id);
  }
}
