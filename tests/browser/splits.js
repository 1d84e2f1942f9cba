async (payloads) => {
  const { AnswerView } = await import("/render.js");
  const allowed = new Set(("DIV P H3 H4 H5 H6 CODE PRE STRONG EM DEL A SPAN BR HR UL OL LI BLOCKQUOTE TABLE THEAD TBODY TR TH TD "
    + "INPUT BUTTON SVG USE OUTPUT").split(" "));
  const wrong = [];
  const parts = (text) => [{ type: "text", text }, { type: "python", text }, { type: "python_output", text }];
  const check = (root, where) => {
    for (const element of root.querySelectorAll("*")) {
      if (!allowed.has(element.tagName.toUpperCase())) wrong.push([where, element.tagName]);
      for (const { name, value } of element.attributes) {
        if (name.startsWith("on") || name === "style" || name === "src") wrong.push([where, name]);
        if (name === "href" && !/^(https?:|#i-)/.test(value)) wrong.push([where, value]);
      }
    }
  };
  for (const text of payloads) {
    const whole = document.createElement("div");
    new AnswerView(whole).update(parts(text));
    check(whole, text);
    for (let at = 0; at <= text.length; at += 1) {
      const root = document.createElement("div");
      document.body.append(root);
      const view = new AnswerView(root);
      view.update(parts(text.slice(0, at)));
      check(root, text.slice(0, at));
      view.update(parts(text));
      check(root, text);
      if (root.innerHTML !== whole.innerHTML) wrong.push([text, "differs when cut at", at]);
      root.remove();
    }
  }
  return [wrong.slice(0, 5), window.pwned ?? null];
}
