// Keeps the page's own files, so that conversations can be read while the server is away. The server comes first
// whenever it answers; nothing else is ever kept.

const CACHE = "nanochat-page-1";
const FILES = [
  "./", "app.js", "answering.js", "api.js", "commands.js", "dom.js", "highlight.js", "markdown.js", "message.js", "render.js",
  "settings.js", "sidebar.js", "store.js", "tree.js", "style.css", "message.css", "icon.svg",
];
const ours = new Set(FILES.map((name) => new URL(name, self.registration.scope).href));

self.addEventListener("install", (event) => {
  event.waitUntil(caches.open(CACHE).then((cache) => cache.addAll(FILES)).then(() => self.skipWaiting()));
});

self.addEventListener("activate", (event) => {
  const old = caches.keys().then((names) => Promise.all(names.filter((name) => name !== CACHE).map((name) => caches.delete(name))));
  event.waitUntil(old.then(() => self.clients.claim()));
});

self.addEventListener("fetch", (event) => {
  if (event.request.method !== "GET" || !ours.has(event.request.url)) return;
  event.respondWith(serve(event.request));
});

async function serve(request) {
  const cache = await caches.open(CACHE);
  try {
    const fresh = await fetch(request);
    if (fresh.ok) await cache.put(request, fresh.clone());
    if (fresh.status < 500) return fresh;
    return (await cache.match(request)) ?? fresh; // it is still loading: what is kept can be read meanwhile
  } catch (error) {
    const kept = await cache.match(request);
    if (kept) return kept;
    throw error;
  }
}
