// The memory in the plane: points drawn pixel by pixel, so that 200,000 of them move as one does.

import { patiently, post } from "./api.js";
import { movable, neighbor } from "./cards.js";
import { confirmed, empty, failed, h, loading, percent, shown, toast } from "./dom.js";

const TYPES = { "<u2": Uint16Array, "<i4": Int32Array, "<i8": BigInt64Array, "|u1": Uint8Array };
const SHOWN = 12;
const GATHERED = 9000; // of 65,535: classes that spread further have no name on the whole map

// Columns of the file that `GET /map` gives.
export function unpacked(buffer) {
  const length = new DataView(buffer).getUint32(0, true);
  const head = JSON.parse(new TextDecoder().decode(new Uint8Array(buffer, 4, length)));
  const columns = {};
  let start = 4 + length;
  for (const { name, type } of head.columns) {
    columns[name] = new TYPES[type](buffer, start, head.n);
    start += Math.ceil(columns[name].byteLength / 8) * 8;
  }
  return { ...head, columns, id: (place) => (head.ids ? head.ids[place] : Number(columns.id[place])) };
}

const mixed = (a, b, t) => a.map((part, i) => Math.round(part + (b[i] - part) * t));

// 256 colours for a scale; place 0 is for what is not known.
function palette(kind, dark) {
  const unknown = dark ? [70, 66, 72] : [205, 200, 196];
  const [low, middle, high] = {
    residual: dark ? [[74, 84, 98], [150, 96, 140], [255, 122, 168]] : [[196, 203, 212], [190, 120, 160], [184, 21, 79]],
    gain: dark ? [[255, 154, 120], [86, 82, 90], [99, 201, 155]] : [[166, 58, 29], [208, 202, 197], [29, 122, 85]],
  }[kind];
  return [unknown, ...Array.from({ length: 255 }, (_, i) => (i < 127 ? mixed(low, middle, i / 127) : mixed(middle, high, (i - 127) / 127)))];
}

function hue(label, dark) {
  const turn = (label * 137.508) % 360;
  const ring = [0.62, 0.48, 0.76][label % 3];
  const [s, l] = [0.55, dark ? ring : ring - 0.12];
  const f = (n) => {
    const k = (n + turn / 30) % 12;
    return Math.round(255 * (l - s * Math.min(l, 1 - l) * Math.max(-1, Math.min(k - 3, 9 - k, 1))));
  };
  return [f(0), f(8), f(4)];
}

export class Map2D {
  constructor(place, info, { ask, changed }) {
    Object.assign(this, { place, info, ask, changed });
    this.view = { x: 0, y: 0, zoom: 1 };
    this.lasso = null;
    this.selected = null;
    this.colour = "residual";
  }

  async open() {
    if (this.map) return this.draw();
    this.place.replaceChildren(loading("Laying out the memory …"));
    try {
      const buffer = await patiently(
        "/map",
        (progress) => this.place.replaceChildren(loading("Laying out the memory …", progress)),
        (response) => response.arrayBuffer(),
      );
      this.map = unpacked(buffer);
      if (!this.map.n) return this.place.replaceChildren(empty("The memory is empty", "There is nothing to lay out."));
      this.build();
    } catch (error) {
      this.place.replaceChildren(failed(error));
    }
  }

  stale() {
    this.map = null;
    this.titled = null;
    this.selected = null;
  }

  build() {
    const { map } = this;
    const kinds = [["residual", "what the base could not learn"], ...(map.columns.gain ? [["gain", "what the memory gains"]] : []), ...(map.columns.label ? [["label", "label"]] : [])];
    this.canvas = h("canvas", { tabindex: "0", role: "img", "aria-label": `Map of ${map.n} memories. Arrows move it, plus and minus zoom.` });
    this.frame = h("div", { class: "canvas" }, this.canvas);
    this.side = h("div", { class: "side" });
    this.legend = h("div", { class: "small soft" });
    const lasso = h("button", { type: "button", "aria-pressed": "false", onclick: () => this.setLasso(!this.frame.classList.contains("lasso")) }, "Lasso");
    this.lassoButton = lasso;
    const choice = h("select", { "aria-label": "Colour", onchange: () => ((this.colour = choice.value), this.recolour(), this.draw()) }, kinds.map(([value, text]) => h("option", { value }, text)));
    this.place.replaceChildren(
      h("div", { class: "tools" }, h("label", { class: "soft" }, "Colour: "), choice, lasso, h("button", { type: "button", onclick: () => this.reset() }, "Whole map"), h("span", { class: "soft small" }, `${map.n.toLocaleString("en")} of ${map.rows.toLocaleString("en")} memories, ${map.method}`)),
      h("div", { class: "mapping" }, this.frame, h("div", {}, this.legend, this.side)),
    );
    this.side.replaceChildren(h("p", { class: "note" }, "Click a point to ask about it. Choose Lasso, or hold Shift, and draw around points to see what they have in common."));
    this.listen();
    new ResizeObserver(() => this.draw()).observe(this.frame);
    this.recolour();
    this.draw();
  }

  get dark() {
    return getComputedStyle(document.documentElement).getPropertyValue("--paper").trim() === "#151316";
  }

  recolour() {
    const { columns, n } = this.map;
    this.rgb = new Uint32Array(n);
    const dark = this.dark;
    const packed = ([r, g, b]) => (255 << 24) | (b << 16) | (g << 8) | r;
    if (this.colour === "label") {
      const known = new Map();
      for (let i = 0; i < n; i++) {
        const label = columns.label[i];
        if (!known.has(label)) known.set(label, packed(hue(label, dark)));
        this.rgb[i] = known.get(label);
      }
      this.legend.replaceChildren(`${known.size} labels, a colour each`);
      return;
    }
    const colours = palette(this.colour, dark).map(packed);
    const values = columns[this.colour];
    for (let i = 0; i < n; i++) this.rgb[i] = colours[values[i]];
    const scale = h("canvas", { class: "scale", width: "255", height: "1", "aria-hidden": "true" });
    const context = scale.getContext("2d");
    const image = context.createImageData(255, 1);
    new Uint32Array(image.data.buffer).set(colours.slice(1));
    context.putImageData(image, 0, 0);
    const [low, high] = this.map.ranges[this.colour];
    const unit = this.colour === "gain" ? " nats" : "";
    this.legend.replaceChildren(scale, h("div", { class: "ends" }, h("span", {}, `${low}${unit}`), h("span", {}, `${+high.toPrecision(3)}${unit}`)));
  }

  draw() {
    if (!this.map || !this.frame?.clientWidth || this.waiting) return;
    this.waiting = requestAnimationFrame(() => {
      this.waiting = null;
      this.paint();
    });
  }

  // Where a point is on the canvas, in its pixels.
  frameOf() {
    const { width, height } = this.canvas;
    const side = Math.min(width, height) * 0.94 * this.view.zoom;
    return { side: side / 65535, left: (width - side) / 2 + this.view.x, top: (height - side) / 2 + this.view.y };
  }

  paint() {
    const ratio = Math.min(devicePixelRatio || 1, 2);
    const [width, height] = [Math.round(this.frame.clientWidth * ratio), Math.round(this.frame.clientHeight * ratio)];
    if (this.canvas.width !== width || this.canvas.height !== height) {
      this.canvas.width = width;
      this.canvas.height = height;
      this.image = null;
    }
    const context = this.canvas.getContext("2d");
    this.image ??= context.createImageData(width, height);
    const pixels = new Uint32Array(this.image.data.buffer);
    pixels.fill(0);
    const { columns, n } = this.map;
    const { side, left, top } = this.frameOf();
    const { x, y } = columns;
    const size = Math.max(1, Math.min(7, Math.round(ratio * (n > 60000 ? 1 : n > 8000 ? 2 : 3) * Math.sqrt(this.view.zoom))));
    const faded = this.selected ? 0x30000000 : 0xff000000;
    for (let i = 0; i < n; i++) {
      const px = (left + x[i] * side) | 0;
      const py = (top + y[i] * side) | 0;
      if (px < 0 || py < 0 || px + size > width || py + size > height) continue;
      const colour = this.selected && !this.selected[i] ? ((this.rgb[i] & 0xffffff) | faded) >>> 0 : this.rgb[i];
      for (let row = py * width; row < (py + size) * width; row += width) for (let place = row + px; place < row + px + size; place++) pixels[place] = colour;
    }
    context.putImageData(this.image, 0, 0);
    this.write(context, ratio);
    if (this.lasso?.length > 1) {
      context.beginPath();
      this.lasso.forEach(([px, py], i) => (i ? context.lineTo(px, py) : context.moveTo(px, py)));
      context.closePath();
      context.strokeStyle = context.fillStyle = getComputedStyle(document.documentElement).getPropertyValue("--rose");
      context.lineWidth = 1.5 * ratio;
      context.stroke();
      context.globalAlpha = 0.08;
      context.fill();
      context.globalAlpha = 1;
    }
  }

  // Where each class is densest: the median of its points, and how far they lie from it.
  titles() {
    if (this.titled || !this.map.columns.label || !this.info.class_names) return this.titled ?? [];
    const { columns, n } = this.map;
    const of = new Map();
    for (let i = 0; i < n; i++) {
      const label = columns.label[i];
      if (!of.has(label)) of.set(label, []);
      of.get(label).push(i);
    }
    const middle = (values) => values.sort((a, b) => a - b)[values.length >> 1];
    this.titled = [...of].map(([label, places]) => {
      const x = middle(places.map((i) => columns.x[i]));
      const y = middle(places.map((i) => columns.y[i]));
      const spread = middle(places.map((i) => Math.hypot(columns.x[i] - x, columns.y[i] - y)));
      return { name: String(this.info.class_names[label] ?? label).slice(0, 24), x, y, spread };
    });
    return this.titled.sort((a, b) => a.spread - b.spread);
  }

  // Names of the classes that keep together, as many as fit.
  write(context, ratio) {
    const { side, left, top } = this.frameOf();
    const style = getComputedStyle(document.documentElement);
    context.font = `600 ${12.5 * ratio}px system-ui, sans-serif`;
    context.textAlign = "center";
    context.lineJoin = "round";
    context.lineWidth = 4 * ratio;
    context.strokeStyle = style.getPropertyValue("--card");
    context.fillStyle = style.getPropertyValue("--ink");
    const taken = [];
    for (const { name, x, y, spread } of this.titles()) {
      if (spread * this.view.zoom ** -0.5 > GATHERED) break;
      const [px, py] = [left + x * side, top + y * side];
      const [wide, high] = [context.measureText(name).width / 2 + 6 * ratio, 9 * ratio];
      if (px - wide < 0 || py - high < 0 || px + wide > this.canvas.width || py + high > this.canvas.height) continue;
      if (taken.some((other) => Math.abs(other[0] - px) < other[2] + wide && Math.abs(other[1] - py) < 2 * high)) continue;
      taken.push([px, py, wide]);
      context.strokeText(name, px, py + 4 * ratio);
      context.fillText(name, px, py + 4 * ratio);
    }
  }

  at(event) {
    const box = this.canvas.getBoundingClientRect();
    const ratio = this.canvas.width / box.width;
    return [(event.clientX - box.left) * ratio, (event.clientY - box.top) * ratio];
  }

  listen() {
    const { canvas } = this;
    const fingers = new Map();
    let from = null;
    let moved = 0;
    canvas.addEventListener("pointerdown", (event) => {
      canvas.setPointerCapture(event.pointerId);
      fingers.set(event.pointerId, this.at(event));
      from = this.at(event);
      moved = 0;
      if (event.shiftKey || this.frame.classList.contains("lasso")) this.lasso = [from];
    });
    canvas.addEventListener("pointermove", (event) => {
      if (!fingers.has(event.pointerId)) return;
      const now = this.at(event);
      const before = fingers.get(event.pointerId);
      if (fingers.size === 2) {
        const other = [...fingers].find(([id]) => id !== event.pointerId)[1];
        this.zoom(Math.hypot(now[0] - other[0], now[1] - other[1]) / (Math.hypot(before[0] - other[0], before[1] - other[1]) || 1), other);
      } else if (this.lasso) {
        this.lasso.push(now);
      } else {
        this.view.x += now[0] - before[0];
        this.view.y += now[1] - before[1];
      }
      moved += Math.hypot(now[0] - before[0], now[1] - before[1]);
      fingers.set(event.pointerId, now);
      this.draw();
    });
    const up = (event) => {
      if (!fingers.delete(event.pointerId)) return;
      if (this.lasso) this.choose();
      else if (moved < 5) this.click(from);
    };
    canvas.addEventListener("pointerup", up);
    canvas.addEventListener("pointercancel", (event) => fingers.delete(event.pointerId));
    canvas.addEventListener("wheel", (event) => {
      event.preventDefault();
      this.zoom(Math.exp(-event.deltaY / 400), this.at(event));
    }, { passive: false });
    canvas.addEventListener("keydown", (event) => {
      const step = 60;
      const moves = { ArrowLeft: [step, 0], ArrowRight: [-step, 0], ArrowUp: [0, step], ArrowDown: [0, -step] };
      if (moves[event.key]) {
        this.view.x += moves[event.key][0];
        this.view.y += moves[event.key][1];
      } else if (event.key === "+" || event.key === "=") this.zoom(1.4);
      else if (event.key === "-") this.zoom(1 / 1.4);
      else if (event.key === "0") this.reset();
      else if (event.key === "Enter") this.click([canvas.width / 2, canvas.height / 2], Infinity);
      else if (event.key === "Escape") this.clear();
      else return;
      event.preventDefault();
      this.draw();
    });
  }

  setLasso(on) {
    this.frame.classList.toggle("lasso", on);
    this.lassoButton.setAttribute("aria-pressed", String(on));
  }

  reset() {
    this.view = { x: 0, y: 0, zoom: 1 };
    this.clear();
  }

  clear() {
    this.selected = null;
    this.lasso = null;
    this.side.replaceChildren();
    this.draw();
  }

  zoom(times, about = [this.canvas.width / 2, this.canvas.height / 2]) {
    const zoom = Math.max(0.5, Math.min(200, this.view.zoom * times));
    const real = zoom / this.view.zoom;
    const [cx, cy] = [this.canvas.width / 2, this.canvas.height / 2];
    this.view.x = about[0] - cx - (about[0] - cx - this.view.x) * real;
    this.view.y = about[1] - cy - (about[1] - cy - this.view.y) * real;
    this.view.zoom = zoom;
    this.draw();
  }

  click([px, py], reach = 14) {
    const { columns, n } = this.map;
    const { side, left, top } = this.frameOf();
    let best = -1;
    let near = reach ** 2;
    for (let i = 0; i < n; i++) {
      const distance = (left + columns.x[i] * side - px) ** 2 + (top + columns.y[i] * side - py) ** 2;
      if (distance < near) [best, near] = [i, distance];
    }
    if (best >= 0) this.ask(this.map.id(best));
  }

  choose() {
    const path = this.lasso;
    this.lasso = null;
    this.setLasso(false);
    if (path.length < 3) return this.clear();
    const { columns, n } = this.map;
    const { side, left, top } = this.frameOf();
    const outline = new Path2D();
    path.forEach(([px, py], i) => (i ? outline.lineTo(px, py) : outline.moveTo(px, py)));
    outline.closePath();
    const xs = path.map(([px]) => px);
    const ys = path.map(([, py]) => py);
    const box = [Math.min(...xs), Math.max(...xs), Math.min(...ys), Math.max(...ys)];
    const context = this.canvas.getContext("2d");
    this.selected = new Uint8Array(n);
    const chosen = [];
    for (let i = 0; i < n; i++) {
      const px = left + columns.x[i] * side;
      const py = top + columns.y[i] * side;
      if (px < box[0] || px > box[1] || py < box[2] || py > box[3] || !context.isPointInPath(outline, px, py)) continue;
      this.selected[i] = 1;
      chosen.push(i);
    }
    if (!chosen.length) return this.clear();
    this.draw();
    this.describe(chosen);
  }

  async describe(chosen) {
    const { columns, ranges } = this.map;
    const real = (name, i) => ranges[name][0] + ((columns[name][i] - 1) / 254) * (ranges[name][1] - ranges[name][0]);
    const known = (name) => chosen.filter((i) => columns[name][i] > 0);
    const mean = (name) => known(name).reduce((sum, i) => sum + real(name, i), 0) / (known(name).length || 1);
    const lines = [h("h2", {}, `${chosen.length.toLocaleString("en")} memories`)];
    const facts = [["mean residual", mean("residual").toFixed(3)]];
    if (columns.gain) facts.push(["mean gain, nats", mean("gain").toFixed(3)]);
    if (columns.label) {
      const counts = new Map();
      for (const i of chosen) counts.set(columns.label[i], (counts.get(columns.label[i]) ?? 0) + 1);
      const most = [...counts].sort((a, b) => b[1] - a[1]).slice(0, 8);
      for (const [label, count] of most) facts.push([this.info.class_names?.[label] ?? String(label), percent(count / chosen.length, 0)]);
    }
    lines.push(h("div", { class: "counts" }, facts.map(([name, value]) => h("div", {}, shown(name, 60), h("span", { class: "number" }, value)))));
    const ids = chosen.map((i) => this.map.id(i));
    if (this.info.writable) lines.push(h("button", { type: "button", onclick: () => this.forget(ids) }, `Forget these ${ids.length.toLocaleString("en")}`));
    this.side.replaceChildren(...lines);
    try {
      const step = Math.max(1, Math.floor(ids.length / SHOWN));
      const { rows } = await post("/rows", { ids: ids.filter((_, i) => i % step === 0).slice(0, SHOWN) });
      this.side.append(movable(h("div", { class: "cards" }, rows.map((row) => neighbor(row, row, { ask: () => this.ask(row.id) })))));
    } catch (error) {
      this.side.append(failed(error));
    }
  }

  async forget(ids) {
    if (!(await confirmed(`Forget ${ids.length.toLocaleString("en")} memories? They are out of use at once, and compact erases them.`))) return;
    try {
      await post("/forget", { ids });
      toast(`${ids.length.toLocaleString("en")} memories are forgotten.`);
      this.changed();
      this.stale();
      await this.open();
    } catch (error) {
      toast(`${error.message} ${error.remedy ?? ""}`);
    }
  }
}
