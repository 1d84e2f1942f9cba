async () => {
  const { EventSplitter } = await import("/api.js");
  const stream = 'data: {"a": "é🙂"}\n\n: ping\n\ndata: 2\r\n\r\ndata: x\ndata: y\n\nevent: z\ndata:[DONE]\n\n';
  const bytes = new TextEncoder().encode(stream);
  const all = new Set();
  for (let i = 0; i <= bytes.length; i += 1) for (let j = i; j <= bytes.length; j += 7) {
    const splitter = new EventSplitter();
    const decoder = new TextDecoder();
    const events = [[0, i], [i, j], [j, bytes.length]].flatMap(
      ([a, b]) => splitter.push(decoder.decode(bytes.slice(a, b), { stream: true })));
    all.add(JSON.stringify(events));
  }
  return [...all];
}
