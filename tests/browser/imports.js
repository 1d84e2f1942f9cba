async () => {
  const tree = await import("/tree.js");
  const one = tree.create("sys");
  const q = tree.add(one, "user", [{ type: "text", text: "q" }]);
  tree.add(one, "assistant", [{ type: "python", text: "1" }, { type: "python_output", text: "2" }], q.id);
  tree.add(one, "assistant", [{ type: "text", text: "b" }], q.id);
  const [back] = tree.fromJson(tree.toJson([one]));
  const same = JSON.stringify(tree.messages(back, back.leaf)) === JSON.stringify(tree.messages(one, one.leaf))
    && Object.keys(back.nodes).length === 3 && back.id !== one.id;
  const loop = { format: tree.FORMAT, conversations: [{ nodes: {
    a: { id: "a", parent: "b", role: "user", parts: [] }, b: { id: "b", parent: "a", role: "user", parts: [] } } }] };
  const bad = ["", "{}", "[]", "null", '{"messages": [{"role": "user"}]}', '{"messages": [{"role": "evil", "content": "x"}]}',
    '{"format": "nanochat-conversations-1", "conversations": [{"nodes": {"__proto__": {"id": "x", "parent": "y"}}}]}',
    JSON.stringify(loop)];
  const refused = bad.map((text) => { try { tree.fromJson(text); return text; } catch { return null; } });
  return [same, refused.filter(Boolean), {}.polluted ?? null];
}
