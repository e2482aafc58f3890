// A memory as a card: what it was made of, its label, and what it did.

import { figure, filled, h, percent, shown } from "./dom.js";

export const picture = (id, alt = "") =>
  h("img", { src: `/picture?id=${encodeURIComponent(id)}`, alt, loading: "lazy", decoding: "async" });

// Text around a token: what came before it, the token itself, what came after it.
export const context = (told) =>
  h("bdi", { class: "context" }, shown(told.before), h("mark", {}, shown(told.token)), shown(told.after));

export function made(row) {
  if (!row) return null;
  if (row.picture) return picture(row.id);
  if (row.context) return h("div", { class: "snippet" }, context(row.context));
  if (row.snippet) return h("div", { class: "snippet" }, shown(row.snippet));
  if (row.cells) {
    const cells = Object.entries(row.cells).slice(0, 6);
    return h("dl", {}, cells.flatMap(([name, value]) => [h("dt", {}, shown(name, 40)), h("dd", {}, shown(figure(value), 60))]));
  }
  return null;
}

export const label = (entry) => shown(entry.name ?? figure(entry.label), 120);

// A neighbour of a query; `acts` are {ask, without, forget}, each absent where it cannot be done.
export function neighbor(entry, row, { off = false, ask, without, forget }) {
  const card = h(
    "article",
    { class: off ? "card off" : "card", tabindex: "-1", "data-id": String(entry.id), "aria-label": `memory ${entry.id}` },
    made(row),
    h("div", { class: "label" }, label(entry)),
    entry.share === undefined
      ? null
      : h("div", { class: "share", title: "Share of the correction" }, filled(h("i"), 100 * entry.share)),
    h(
      "dl",
      {},
      entry.share === undefined ? [] : [h("dt", {}, "share"), h("dd", {}, percent(entry.share))],
      entry.distance === undefined ? [] : [h("dt", {}, "distance"), h("dd", {}, figure(entry.distance))],
      entry.weight === undefined ? [] : [h("dt", {}, "weight"), h("dd", {}, figure(entry.weight))],
      h("dt", {}, "memory"),
      h("dd", {}, shown(entry.id, 40)),
      row?.owner ? [h("dt", {}, "owner"), h("dd", {}, shown(row.owner, 40))] : [],
    ),
    h(
      "div",
      { class: "actions" },
      without && h("button", { type: "button", class: "plain", "aria-pressed": String(off), title: off ? "Count it again (x)" : "See the answer without it (x)", onclick: without }, off ? "On" : "Off"),
      ask && h("button", { type: "button", class: "plain", title: "Ask about this memory (e)", onclick: ask }, "Ask"),
      forget && h("button", { type: "button", class: "plain", title: "Take it out of use (f)", onclick: forget }, "Forget"),
    ),
  );
  card.acts = { x: without, e: ask, f: forget };
  return card;
}

// Arrows go from card to card, letters do what its buttons do.
export function movable(cards) {
  const list = [...cards.children];
  if (list[0]) list[0].tabIndex = 0;
  cards.addEventListener("keydown", (event) => {
    const card = event.target.closest(".card");
    if (!card || event.ctrlKey || event.metaKey || event.altKey) return;
    const steps = { ArrowRight: 1, ArrowLeft: -1, ArrowDown: 1, ArrowUp: -1 };
    if (event.key in steps) {
      const all = [...cards.children];
      const next = all[all.indexOf(card) + steps[event.key]];
      if (next) {
        card.tabIndex = -1;
        next.tabIndex = 0;
        next.focus();
      }
      event.preventDefault();
    } else if (event.target === card && card.acts[event.key]) {
      card.acts[event.key]();
      event.preventDefault();
    }
  });
  return cards;
}
