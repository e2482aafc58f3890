// What a survey of the memory's own rows found: roses, doubtful labels, reliability; and the log.

import { get, patiently, post } from "./api.js";
import { label as labelOf, picture } from "./cards.js";
import { empty, failed, h, loading, percent, shown, svg } from "./dom.js";

const BEHIND = 6; // memories that are shown with a rose

let survey = null;

export const forgetSurvey = () => (survey = null);

async function surveyed(place) {
  if (survey) return survey;
  const wait = (progress) => place.replaceChildren(loading("Asking each memory without itself …", progress));
  wait(0);
  survey = await patiently("/survey", wait);
  return survey;
}

const guarded = (show) => async (place, info, acts) => {
  try {
    await show(place, info, acts);
  } catch (error) {
    place.replaceChildren(failed(error));
  }
};

// The memories that put a rose right, with the pictures that they were made of.
async function behind(roses, places) {
  const ids = roses.map((rose) => rose.id);
  const { queries } = await post("/explain", { ids, neighbors: BEHIND, outputs: 1 });
  queries.forEach(({ neighbors }, i) => places[i].replaceChildren(...neighbors.map((entry) => h("figure", { title: `memory ${entry.id}` }, picture(entry.id, ""), labelOf(entry)))));
}

const link = (id, ask) => h("button", { type: "button", class: "plain", onclick: () => ask(id) }, "memory ", shown(id, 40));

export const roses = guarded(async (place, info, { ask }) => {
  const { roses: found, rows } = await surveyed(place);
  if (!found.length) return place.replaceChildren(empty("No roses", "The memory puts none of these rows right that the base has wrong."));
  const places = found.map(() => h("div", { class: "behind" }));
  place.replaceChildren(
    h("div", { class: "heading" }, h("h2", {}, "What the base has wrong and the memory right"), h("span", { class: "soft small" }, `of ${rows.toLocaleString("en")} memories, each asked without itself`)),
    h(
      "div",
      { class: "gallery" },
      found.map((rose, i) =>
        h(
          "button",
          { type: "button", class: "panel rose", title: `Ask about memory ${rose.id}`, onclick: () => ask(rose.id) },
          info.pictures ? picture(rose.id, "") : h("span"),
          h(
            "div",
            {},
            h("div", { class: "said" }, h("del", {}, shown(rose.said, 80)), " → ", shown(rose.label, 80)),
            h("p", { class: "soft small number" }, `${percent(rose.base)} → ${percent(rose.corrected)}`),
            h("p", { class: "soft small" }, `${percent(rose.agreement, 0)} of the neighbours agree`),
          ),
          info.pictures ? places[i] : null,
        ),
      ),
    ),
  );
  if (info.pictures) await behind(found, places);
});

export const labels = guarded(async (place, info, { ask }) => {
  const { issues, rows } = await surveyed(place);
  if (!issues.length) return place.replaceChildren(empty("No doubtful label", "Base and neighbours agree with all of them."));
  place.replaceChildren(
    h("div", { class: "heading" }, h("h2", {}, "Labels that base and neighbours contradict"), h("span", { class: "soft small" }, `the first ${issues.length} of ${rows.toLocaleString("en")} memories`)),
    h(
      "div",
      { class: "scroll" },
      h(
        "table",
        {},
        h("thead", {}, h("tr", {}, info.pictures ? h("th") : null, ["memory", "label", "they say"].map((name) => h("th", {}, name)), ["doubt", "neighbours with the label"].map((name) => h("th", { class: "number" }, name)))),
        h(
          "tbody",
          {},
          issues.map((issue) =>
            h(
              "tr",
              {},
              info.pictures ? h("td", {}, picture(issue.id, "")) : null,
              h("td", {}, link(issue.id, ask)),
              h("td", {}, shown(issue.label, 80)),
              h("td", {}, shown(issue.suggestion, 80)),
              h("td", { class: "number" }, percent(issue.doubt)),
              h("td", { class: "number" }, percent(issue.agreement)),
            ),
          ),
        ),
      ),
    ),
  );
});

export const reliability = guarded(async (place, info) => {
  const { reliability: bins, accuracy, rows } = await surveyed(place);
  const [side, edge] = [420, 44];
  const at = (part) => edge + part * (side - 2 * edge);
  const chart = svg("svg", { viewBox: `0 0 ${side} ${side}`, role: "img", "aria-label": "Accuracy against confidence, of the base and with the memory" });
  for (const part of [0, 0.25, 0.5, 0.75, 1]) {
    chart.append(svg("line", { class: "axis", x1: at(part), x2: at(part), y1: at(0), y2: at(1) }), svg("line", { class: "axis", y1: at(part), y2: at(part), x1: at(0), x2: at(1) }));
    chart.append(svg("text", { x: at(part), y: side - edge + 18, "text-anchor": "middle" }, String(part)), svg("text", { x: edge - 8, y: side - at(part) + 4, "text-anchor": "end" }, String(part)));
  }
  chart.append(svg("line", { class: "even", x1: at(0), y1: side - at(0), x2: at(1), y2: side - at(1) }));
  chart.append(svg("text", { x: side / 2, y: side - 6, "text-anchor": "middle" }, "confidence"), svg("text", { transform: `translate(12 ${side / 2}) rotate(-90)`, "text-anchor": "middle" }, "accuracy"));
  for (const name of ["base", "corrected"]) {
    const points = bins[name].map((bin) => [at(bin.confidence), side - at(bin.accuracy)]);
    chart.append(svg("polyline", { class: name, points: points.map((point) => point.join()).join(" "), "stroke-width": 2 }));
    for (const [x, y] of points) chart.append(svg("circle", { class: name, cx: x, cy: y, r: 3.5 }));
  }
  const off = (name) => bins[name].reduce((sum, bin) => sum + bin.n * Math.abs(bin.confidence - bin.accuracy), 0) / rows;
  place.replaceChildren(
    h(
      "div",
      { class: "reliability" },
      h("div", { class: "panel" }, chart, h("div", { class: "legend" }, h("span", {}, h("i", { class: "stone" }), "base"), h("span", {}, h("i", { class: "rose" }), "with the memory"))),
      h(
        "div",
        { class: "side" },
        h("h2", {}, "How sure, and how often right"),
        h("table", {}, h("thead", {}, h("tr", {}, h("th"), h("th", { class: "number" }, "base"), h("th", { class: "number" }, "with the memory"))), h("tbody", {}, [["accuracy", (name) => accuracy[name]], ["calibration error", off]].map(([title, of]) => h("tr", {}, h("td", {}, title), h("td", { class: "number" }, percent(of("base"))), h("td", { class: "number" }, percent(of("corrected"))))))),
        h("p", { class: "note" }, `These are ${rows.toLocaleString("en")} of the memory's own rows, each asked without itself. The base was trained on them, so it is righter and surer here than on others: how good the memory is, resmem evaluate says on held-out rows.${info.setting?.gate ? "" : " The setting has no gate, so corrected probabilities are less sure than they could be; resmem tune --gate fits one."}`),
      ),
    ),
  );
});

const CHANGES = { append: "added", forget: "forgot", compact: "erased", setting: "new setting", source: "new source" };

export const log = guarded(async (place) => {
  const { changes } = await get("/log");
  if (!changes.length) return place.replaceChildren(empty("Nothing has changed yet", "What is added and forgotten will be listed here."));
  place.replaceChildren(
    h("div", { class: "heading" }, h("h2", {}, "Changes"), h("span", { class: "soft small" }, `the last ${changes.length}`)),
    h(
      "div",
      { class: "scroll" },
      h(
        "table",
        {},
        h("thead", {}, h("tr", {}, h("th", {}, "version"), h("th", {}, "when"), h("th", {}, "what"), h("th", { class: "number" }, "rows"))),
        h("tbody", {}, changes.map((change) => h("tr", {}, h("td", { class: "number" }, String(change.version)), h("td", {}, new Date(change.at).toLocaleString()), h("td", {}, CHANGES[change.what] ?? shown(change.what)), h("td", { class: "number" }, change.rows ? change.rows.toLocaleString("en") : "–")))),
      ),
    ),
  );
});
