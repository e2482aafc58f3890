// Ask, see what the memory changed, and change the memory.

import { get, post, send } from "./api.js";
import { context, made, movable, neighbor, picture } from "./cards.js";
import { $, confirmed, empty, failed, figure, filled, h, loading, percent, shown, toast } from "./dom.js";

const NEIGHBORS = 24;
const OUTPUTS = 6;
const ORDERS = [["share", "largest share first"], ["distance", "nearest first"], ["answer", "with the answer first"]];

export class Explain {
  constructor(info, changed) {
    this.info = info;
    this.changed = changed; // called when rows come or go
    this.without = new Set();
    this.query = null; // what the server is asked, less what is left out
    this.source = null; // what is shown of it
    this.order = info.inputs?.kind === "text" ? "answer" : "share"; // of the memories
    this.answer = $("#answer");
    this.number = 0; // of the last question: answers to earlier ones are dropped
    this.build();
  }

  build() {
    const { info } = this;
    const ways = [["row", "A memory"]];
    if (info.inputs?.kind === "text") ways.unshift(["text", "Text"]);
    if (info.uploads) ways.push(["upload", "An image"]);
    if (info.inputs?.kind === "table") ways.push(["paste", "A table row"]);
    else if (info.inputs?.kind !== "text") ways.push(["paste", "Numbers"]);
    const choose = (way, focus = true) => {
      for (const button of $(".ways").children) button.setAttribute("aria-checked", String(button.value === way));
      $(".inputs").replaceChildren(...this.inputs(way));
      if (focus) $(".inputs input, .inputs textarea")?.focus();
    };
    $(".ways").replaceChildren(
      ...ways.map(([way, text]) => h("button", { type: "button", role: "radio", value: way, "aria-checked": "false", onclick: () => choose(way) }, text)),
    );
    $("#query").addEventListener("submit", (event) => {
      event.preventDefault();
      this.submit?.();
    });
    document.addEventListener("paste", (event) => {
      const file = [...(event.clipboardData?.files ?? [])].find((found) => found.type.startsWith("image/"));
      if (file && info.uploads) this.upload(file);
    });
    choose(ways[0][0], false);
    if (!info.rows) this.answer.replaceChildren(empty("The memory is empty", "Add examples, and ask about them here."));
    else this.random();
  }

  inputs(way) {
    const go = h("button", { class: "strong" }, "Explain");
    if (way === "row") {
      const field = h("input", { id: "row", placeholder: "id of a memory", "aria-label": "Id of a memory", inputmode: this.info.id_kind === "string" ? "text" : "numeric" });
      this.submit = () => this.askRow(field.value.trim());
      return [h("div", { class: "line" }, field, go, h("button", { type: "button", onclick: () => this.random() }, "Any"))];
    }
    if (way === "upload") {
      const field = h("input", { type: "file", accept: "image/*", "aria-label": "Image", onchange: () => field.files[0] && this.upload(field.files[0]) });
      const drop = h("div", { class: "drop" }, "Drop an image here, paste one, or choose: ", field);
      for (const kind of ["dragenter", "dragover"])
        drop.addEventListener(kind, (event) => (event.preventDefault(), drop.classList.add("over")));
      drop.addEventListener("dragleave", () => drop.classList.remove("over"));
      drop.addEventListener("drop", (event) => {
        event.preventDefault();
        drop.classList.remove("over");
        if (event.dataTransfer.files[0]) this.upload(event.dataTransfer.files[0]);
      });
      this.submit = () => field.files[0] && this.upload(field.files[0]);
      return [drop];
    }
    const hint = {
      text: "Once upon a time",
      paste: this.info.inputs?.kind === "table" ? '{"column": 1.5, …} or [1.5, …]' : '{"keys": [[…]], "predictions": [[…]]}',
    }[way];
    const field = h("textarea", { "aria-label": way === "text" ? "Text" : "JSON", placeholder: hint, spellcheck: "false" });
    field.addEventListener("keydown", (event) => event.key === "Enter" && (event.ctrlKey || event.metaKey) && this.submit());
    this.submit = () => (way === "text" ? this.askText(field.value) : this.askPasted(field.value));
    return [field, h("div", { class: "line" }, go, h("span", { class: "soft small" }, "Ctrl + Enter"))];
  }

  async random() {
    try {
      const { ids } = await get("/sample?n=1");
      if (ids.length) this.askRow(ids[0]);
    } catch (error) {
      this.answer.replaceChildren(failed(error));
    }
  }

  askRow(id) {
    if (id === "") return;
    const name = this.info.id_kind === "string" ? String(id) : Number(id);
    if (Number.isNaN(name)) return this.answer.replaceChildren(failed(new Error(`The ids of this memory are numbers, and ${id} is none`)));
    if ($("#row")) $("#row").value = String(name);
    this.ask({ ids: [name] }, { id: name });
  }

  askText(text) {
    if (text) this.ask({ inputs: [text] }, { text });
  }

  askPasted(text) {
    let given;
    try {
      given = JSON.parse(text);
    } catch (error) {
      return this.answer.replaceChildren(failed(new Error(`That is no JSON: ${error.message}`)));
    }
    const query = given?.keys || given?.inputs ? given : { inputs: [given] };
    this.ask(query, { pasted: true });
  }

  async upload(file) {
    const mine = ++this.number;
    this.answer.replaceChildren(loading("The model looks at the image …"));
    try {
      const seen = await send("/observe", file);
      if (mine === this.number) this.ask({ keys: seen.keys, predictions: seen.predictions }, { url: URL.createObjectURL(file) });
    } catch (error) {
      if (mine === this.number) this.answer.replaceChildren(failed(error));
    }
  }

  ask(query, source) {
    this.query = query;
    this.source = source;
    this.without.clear();
    return this.refresh(true);
  }

  async refresh(fresh = false) {
    if (!this.query) return;
    const mine = ++this.number;
    if (fresh) this.answer.replaceChildren(loading("Looking for memories …"));
    try {
      const body = { ...this.query, without: [...this.without], neighbors: NEIGHBORS, outputs: OUTPUTS, order: this.order };
      const { queries } = await post("/explain", body);
      const ids = [...queries[0].neighbors.map((entry) => entry.id), ...this.without, ...(this.source.id === undefined ? [] : [this.source.id])];
      const { rows } = ids.length ? await post("/rows", { ids }) : { rows: [] };
      if (mine === this.number) this.show(queries[0], new Map(rows.map((row) => [row.id, row])));
    } catch (error) {
      if (mine === this.number) this.answer.replaceChildren(failed(error));
    }
  }

  show(told, rows) {
    const focused = document.activeElement?.closest?.(".card")?.dataset.id;
    const cards = told.neighbors.map((entry) => this.card(entry, rows.get(entry.id)));
    for (const id of this.without) {
      const row = rows.get(id) ?? { id, label: "forgotten" };
      cards.push(this.card({ id, name: row.name, label: row.label }, row));
    }
    const wide = [...rows.values()].some((row) => row.context || row.snippet || row.cells);
    const classes = this.info.task === "classification";
    const choice = h(
      "select",
      { "aria-label": "Order", onchange: () => ((this.order = choice.value), this.refresh()) },
      ORDERS.filter(([value]) => classes || value !== "answer").map(([value, text]) => h("option", { value, selected: value === this.order }, text)),
    );
    const more = told.n_more ? `and ${told.n_more.toLocaleString("en")} more with ${percent(told.share_of_more)} of the correction` : "";
    this.answer.replaceChildren(
      h(
        "div",
        { class: "answer" },
        this.panel(told, rows),
        h(
          "div",
          {},
          h("div", { class: "heading" }, h("h2", {}, "The memories behind it"), h("span", { class: "soft small" }, more), choice),
          cards.length ? movable(h("div", { class: wide ? "cards wide" : "cards" }, cards)) : empty("No memory is near", "The base stands alone."),
        ),
      ),
    );
    if (focused) this.answer.querySelector(`.card[data-id="${CSS.escape(focused)}"]`)?.focus();
  }

  card(entry, row) {
    const off = this.without.has(entry.id);
    return neighbor(entry, row, {
      off,
      without: () => {
        if (!this.without.delete(entry.id)) this.without.add(entry.id);
        this.refresh();
      },
      ask: row && (() => this.askRow(entry.id)),
      forget: this.info.writable && row && (() => this.forget(entry.id)),
    });
  }

  async forget(id) {
    if (!(await confirmed(`Forget memory ${String(id).slice(0, 80)}? It is out of use at once, and compact erases it.`))) return;
    try {
      const { rows } = await post("/forget", { ids: [id] });
      this.without.delete(id);
      toast(`Forgotten. ${rows.toLocaleString("en")} memories are left.`);
      this.changed();
      if (this.source.id === id) this.answer.replaceChildren(empty("This memory is forgotten", "Ask about another one."));
      else await this.refresh();
    } catch (error) {
      toast(`${error.message} ${error.remedy ?? ""}`);
    }
  }

  async add(example) {
    try {
      const { ids } = await post("/add", example);
      toast(ids.length === 1 ? `Remembered as memory ${ids[0]}.` : `Remembered as ${ids.length.toLocaleString("en")} memories.`);
      this.changed();
      await this.refresh();
    } catch (error) {
      toast(`${error.message} ${error.remedy ?? ""}`);
    }
  }

  panel(told, rows) {
    const classes = this.info.task === "classification";
    const asked = this.source.id === undefined ? null : rows.get(this.source.id);
    const seen = this.source.url ? h("img", { src: this.source.url, alt: "the image that was asked about" }) : asked?.picture ? picture(asked.id, "the image of this memory") : h("span");
    const by = (name) => told.outputs.reduce((a, b) => (b[name] > a[name] ? b : a), told.outputs[0]);
    const [before, after] = [by("base"), by("corrected")];
    const verdict = !classes
      ? null
      : before.output === after.output
        ? h("div", { class: "said" }, shown(after.name, 120))
        : h("div", { class: "said" }, h("del", {}, shown(before.name, 120)), " → ", shown(after.name, 120));
    const about = [
      asked && classes ? h("p", { class: "soft small" }, "labelled ", shown(asked.name, 120), ", asked without itself") : null,
      asked && !asked.picture ? made(asked) : null,
      told.context ? h("div", { class: "snippet" }, context(told.context)) : null,
    ];
    return h(
      "div",
      { class: "panel" },
      h("div", { class: "verdict" }, seen, h("div", {}, verdict, about)),
      h("div", { class: "bars" }, told.outputs.map((output) => (classes ? this.bar(output) : this.value(output)))),
      classes ? h("div", { class: "legend" }, h("span", {}, h("i", { class: "stone" }), "base"), h("span", {}, h("i", { class: "rose" }), "with the memory")) : null,
      this.info.writable && this.source.id === undefined ? this.adding() : null,
    );
  }

  bar({ name, base, corrected }) {
    const change = corrected - base;
    const way = Math.abs(change) < 5e-4 ? "soft" : change > 0 ? "up" : "down";
    return h(
      "div",
      { class: "bar" },
      h("div", { class: "name" }, shown(name, 120), h("span", { class: "number" }, `${percent(base)} → ${percent(corrected)} `, h("span", { class: way }, `${change < 0 ? "−" : "+"}${Math.abs(100 * change).toFixed(1)}`))),
      h("div", { class: "track base" }, filled(h("i"), 100 * base)),
      h("div", { class: "track corrected" }, filled(h("i"), 100 * corrected)),
    );
  }

  value({ name, base, corrected }) {
    return h("div", { class: "name line number" }, h("span", { class: "soft" }, "output ", shown(name)), h("span", {}, `${figure(base)} → `, h("strong", {}, figure(corrected))));
  }

  // Under its true label: a class, a value, or for a text how it goes on.
  adding() {
    const { info, source } = this;
    const text = source.text !== undefined;
    const asked = text ? "How it goes on" : info.task === "classification" ? "True label" : "True value";
    const names = text ? [] : info.class_names ?? [];
    const list = names.length ? h("datalist", { id: "classes" }, names.map((name) => h("option", { value: name }))) : null;
    const field = h("input", { placeholder: asked.toLowerCase(), list: list ? "classes" : null, "aria-label": asked });
    const example = (given) => {
      if (text) return { inputs: [source.text + given] };
      const named = info.task === "classification" && info.class_names;
      const values = given.split(/[\s,;]+/).filter(Boolean).map(Number);
      return { ...this.query, labels: [named ? given.trim() : info.task === "regression" ? values : values[0]] };
    };
    const add = () => field.value.trim() && this.add(example(field.value));
    field.addEventListener("keydown", (event) => event.key === "Enter" && (event.preventDefault(), add()));
    return h("div", {}, h("h3", {}, "Remember it"), h("div", { class: "line" }, field, list, h("button", { type: "button", onclick: add }, "Add")));
  }
}
