// Elements from plain values. Text of others is only ever text: it is never read as HTML.

export const $ = (selector, root = document) => root.querySelector(selector);

export function h(tag, given = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(given)) {
    if (value === undefined || value === null || value === false) continue;
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (name === "class") element.className = value;
    else element.setAttribute(name, value === true ? "" : value);
  }
  element.append(...children.flat().filter((child) => child !== undefined && child !== null && child !== false));
  return element;
}

const SVG = "http://www.w3.org/2000/svg";

export function svg(tag, given = {}, ...children) {
  const element = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(given)) element.setAttribute(name, value);
  element.append(...children);
  return element;
}

// Control characters are shown, direction stays inside, and what is long is cut.
const MOST = 400;
export function shown(value, most = MOST) {
  const whole = String(value ?? "");
  const cut = whole.length > most ? whole.slice(0, most) + "…" : whole;
  const visible = cut.replace(/[\u0000-\u0008\u000b-\u001f\u007f-\u009f]/g, (c) =>
    c < " " ? String.fromCharCode(0x2400 + c.charCodeAt(0)) : "\ufffd",
  );
  return h("bdi", whole.length > most ? { title: `${whole.length} characters` } : {}, visible);
}

export function filled(element, width) {
  element.style.width = `${Math.max(0, Math.min(100, width))}%`;
  return element;
}

export const percent = (part, digits = 1) => `${(100 * part).toFixed(digits)} %`;

export function figure(value) {
  if (Array.isArray(value)) return value.slice(0, 4).map(figure).join(", ") + (value.length > 4 ? ", …" : "");
  if (typeof value !== "number") return String(value ?? "–");
  return Math.abs(value) >= 1e5 || (value !== 0 && Math.abs(value) < 1e-3) ? value.toExponential(2) : String(+value.toPrecision(4));
}

export const loading = (text, progress) =>
  h("div", { class: "loading", role: "status" }, text, progress ? h("progress", { value: progress, max: 1 }) : null);

export const failed = (error) =>
  h("div", { class: "error", role: "alert" }, h("strong", {}, error.message), error.remedy ? h("div", {}, error.remedy) : null);

export const empty = (title, text) => h("div", { class: "empty" }, h("h2", {}, title), h("p", {}, text));

let hiding;
export function toast(text) {
  const place = $("#toast");
  place.replaceChildren(text);
  place.classList.add("shown");
  clearTimeout(hiding);
  hiding = setTimeout(() => place.classList.remove("shown"), 4000);
}

export function confirmed(text) {
  const dialog = $("#confirm");
  $("#confirm-text").replaceChildren(text);
  dialog.returnValue = "no";
  dialog.showModal();
  return new Promise((done) =>
    dialog.addEventListener("close", () => done(dialog.returnValue === "yes"), { once: true }),
  );
}
