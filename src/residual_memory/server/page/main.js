// The page: its views, its keys, dark and light.

import { get } from "./api.js";
import { $, failed, shown } from "./dom.js";
import { Explain } from "./explain.js";
import { Map2D } from "./map.js";
import * as panels from "./panels.js";

let TABS = [...document.querySelectorAll("nav [role=tab]")];
const SURVEYED = ["tab-roses", "tab-labels", "tab-reliability"]; // what there is for classes alone
const THEME = "residual-memory theme";

let info;
let explain;
let map;

function open(name, focus = false) {
  for (const tab of TABS) {
    const chosen = tab.id === `tab-${name}`;
    tab.setAttribute("aria-selected", String(chosen));
    tab.tabIndex = chosen ? 0 : -1;
    $(`#${tab.getAttribute("aria-controls")}`).hidden = !chosen;
    if (chosen && focus) tab.focus();
  }
  if (location.hash !== `#${name}`) history.replaceState(null, "", `#${name}`);
  if (!info) return;
  const place = $(`#view-${name}`);
  if (name === "map") map.open();
  else panels[name]?.(place, info, { ask });
}

function ask(id) {
  open("explain");
  explain.askRow(id);
  scrollTo({ top: 0 });
}

async function tell() {
  info = await get("/info");
  for (const tab of TABS) tab.hidden = !info.surveyed && SURVEYED.includes(tab.id);
  TABS = TABS.filter((tab) => !tab.hidden);
  info.uploads = info.inputs?.kind === "arrays" && info.pictures;
  const count = (n, one, many) => `${n.toLocaleString("en")} ${n === 1 ? one : many}`;
  $("#memory-name").replaceChildren(shown(info.memory ?? "a memory in RAM", 80));
  const kind = info.task === "regression" ? ["target", "targets"] : info.inputs?.kind === "text" ? ["token", "tokens"] : ["class", "classes"];
  const facts = [count(info.rows, "memory", "memories"), `${info.dim} numbers a key`, count(info.n_outputs, ...kind), `version ${info.version}`];
  if (!info.writable) facts.push("read-only");
  $("#facts").replaceChildren(facts.join(" · "));
}

async function changed() {
  panels.forgetSurvey();
  map.stale();
  await tell();
  Object.assign(explain.info, info);
}

function theme(next) {
  const root = document.documentElement;
  const dark = matchMedia("(prefers-color-scheme: dark)").matches;
  const now = root.dataset.theme ?? (dark ? "dark" : "light");
  const chosen = next ?? (now === "dark" ? "light" : "dark");
  root.dataset.theme = chosen;
  localStorage.setItem(THEME, chosen);
  if (map?.map) {
    map.recolour();
    map.draw();
  }
}

function keys(event) {
  if (event.ctrlKey || event.metaKey || event.altKey || event.target.matches("input, textarea, select") || $("dialog[open]")) return;
  const number = Number(event.key);
  if (number >= 1 && number <= TABS.length) open(TABS[number - 1].id.slice(4), true);
  else if (event.key === "/") {
    open("explain");
    const field = $(".inputs input, .inputs textarea");
    field?.focus();
    field?.select();
  } else if (event.key === "t") theme();
  else if (event.key === "?") $("#help").showModal();
  else return;
  event.preventDefault();
}

const kept = localStorage.getItem(THEME);
if (kept) document.documentElement.dataset.theme = kept;
$("#theme").addEventListener("click", () => theme());
$("#help-button").addEventListener("click", () => $("#help").showModal());
document.addEventListener("keydown", keys);
for (const tab of TABS) {
  tab.addEventListener("click", () => open(tab.id.slice(4)));
  tab.addEventListener("keydown", (event) => {
    const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (step) open(TABS[(TABS.indexOf(tab) + step + TABS.length) % TABS.length].id.slice(4), true);
  });
}

try {
  await tell();
  explain = new Explain(info, changed);
  map = new Map2D($("#view-map"), info, { ask, changed });
  const wanted = location.hash.slice(1);
  open(TABS.some((tab) => tab.id === `tab-${wanted}`) ? wanted : "explain");
} catch (error) {
  $("#answer").replaceChildren(failed(error));
}
