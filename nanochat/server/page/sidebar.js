// The list of conversations: grouped by day, searched, renamed, deleted.

import { $, h, iconButton } from "./dom.js";
import { matches, titleOf } from "./tree.js";

const DAY = 86_400_000;

/** The heading under which a conversation of that time stands. */
export function groupOf(time, now = Date.now()) {
  const today = new Date(now).setHours(0, 0, 0, 0);
  if (time >= today) return "Today";
  if (time >= today - DAY) return "Yesterday";
  if (time >= today - 7 * DAY) return "This week";
  return new Date(time).toLocaleDateString(undefined, { month: "long", year: "numeric" });
}

/** Draw the list. act: open(tree), rename(tree), remove(tree); running: ids of those that are being answered. */
export function drawList(trees, current, running, act) {
  const query = $("search").value;
  const found = [...trees].filter((tree) => tree.leaf && matches(tree, query)).sort((a, b) => b.updated - a.updated);
  const focused = document.activeElement?.closest?.(".entry")?.dataset.id;
  const nodes = [];
  let group = "";
  for (const tree of found) {
    if (groupOf(tree.updated) !== group) {
      group = groupOf(tree.updated);
      nodes.push(h("h2", {}, group));
    }
    const title = titleOf(tree);
    const isCurrent = tree.id === current.id;
    const open = h("button", { type: "button", class: "open", title, "aria-current": isCurrent ? "page" : null, onclick: () => act.open(tree) }, title);
    const classes = ["entry", isCurrent ? "current" : "", running.has(tree.id) ? "busy" : ""].join(" ").trim();
    const rename = iconButton("edit", `Rename ${title}`, () => act.rename(tree));
    const remove = iconButton("trash", `Delete ${title}`, () => act.remove(tree));
    nodes.push(h("div", { class: classes, "data-id": tree.id }, open, rename, remove));
  }
  if (!nodes.length) nodes.push(h("p", {}, query ? "Nothing found." : "Conversations will appear here. They stay in this browser."));
  $("list").replaceChildren(...nodes);
  if (focused) $("list").querySelector(`[data-id="${focused}"] .open`)?.focus();
}

const isNarrow = () => matchMedia("(max-width: 50rem)").matches;

export function toggleSide(isShown = document.body.classList.contains("no-side")) {
  document.body.classList.toggle("no-side", !isShown);
  if (!isNarrow()) localStorage.setItem("nanochat.side", isShown ? "1" : "0");
  $("side-open").setAttribute("aria-expanded", String(isShown));
  if (isShown && isNarrow()) $("side-close").focus();
}

/** On a phone the list covers the conversation; a choice closes it. */
export function leaveSide() {
  if (isNarrow()) toggleSide(false);
}

export function setUpSide() {
  document.body.classList.toggle("no-side", isNarrow() || localStorage.getItem("nanochat.side") === "0");
  $("side-open").addEventListener("click", () => toggleSide(true));
  $("side-close").addEventListener("click", () => {
    toggleSide(false);
    $("side-open").focus();
  });
  $("scrim").addEventListener("click", () => toggleSide(false));
  matchMedia("(max-width: 50rem)").addEventListener("change", ({ matches: narrow }) => {
    document.body.classList.toggle("no-side", narrow || localStorage.getItem("nanochat.side") === "0");
  });
}
