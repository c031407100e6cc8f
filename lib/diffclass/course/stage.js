// The stage draws what figures.py describes: panels of curves, bars, tiles, planes, radius axes, lamps and heat maps, as SVG and canvas.
// It holds no mathematics. Three traits go back to Python: `point` (dragged), `cursor` (dragged), `picked` (clicked).

const NS = "http://www.w3.org/2000/svg";
const INK = "var(--jp-ui-font-color1, #222)", FAINT = "var(--jp-border-color2, #ccc)", MUTED = "var(--jp-ui-font-color2, #555)";

function node(tag, attributes = {}, parent = null) {
  const made = document.createElementNS(NS, tag);
  set(made, attributes);
  if (parent) parent.appendChild(made);
  return made;
}
function set(target, attributes) {
  for (const [name, value] of Object.entries(attributes)) {
    if (name === "text") { if (target.textContent !== value) target.textContent = value; }
    else if (value === null || value === undefined) target.removeAttribute(name);
    else if (target.getAttribute(name) !== String(value)) target.setAttribute(name, value);
  }
}
// Keeps exactly `count` children of one kind in a group, so that a frame updates nodes instead of making them.
function pool(group, tag, count) {
  while (group.childNodes.length > count) group.lastChild.remove();
  while (group.childNodes.length < count) node(tag, {}, group);
  return group.childNodes;
}
function bytes(base64) {
  const raw = atob(base64), out = new Uint8ClampedArray(raw.length);
  for (let i = 0; i < raw.length; i++) out[i] = raw.charCodeAt(i);
  return out;
}
function paint(canvas, image) {
  const data = bytes(image.data), [h, w, c] = image.shape;
  if (canvas.width !== w || canvas.height !== h) { canvas.width = w; canvas.height = h; }
  const out = new ImageData(w, h);
  for (let i = 0; i < w * h; i++) for (let k = 0; k < 4; k++)
    out.data[4 * i + k] = k === 3 ? (c === 4 ? data[4 * i + 3] : 255) : data[c * i + (c === 1 ? 0 : k)];
  canvas.getContext("2d").putImageData(out, 0, 0);
}
function pretty(v) {
  const a = Math.abs(v);
  if (v === 0) return "0";
  if (a >= 1e4 || a < 1e-3) return v.toExponential(0).replace("e+", "e");
  return String(+v.toPrecision(3));
}
function ticks([low, high], log, most = 5) {
  if (log) {
    const out = [], from = Math.ceil(Math.log10(low) - 1e-9), to = Math.floor(Math.log10(high) + 1e-9);
    const every = Math.max(1, Math.ceil((to - from + 1) / 7));
    for (let e = from; e <= to; e += every) out.push(10 ** e);
    if (out.length < 3) for (let e = from - 1; e <= to; e++) for (const m of [2, 5]) out.push(m * 10 ** e);
    return out.filter(v => v >= low * 0.999 && v <= high * 1.001);
  }
  const raw = (high - low) / most, power = 10 ** Math.floor(Math.log10(raw));
  const step = [1, 2, 5, 10].map(m => m * power).find(s => s >= raw) || raw, out = [];
  for (let v = Math.ceil(low / step - 1e-9) * step; v <= high + 1e-9 * step; v += step) out.push(Math.abs(v) < step * 1e-6 ? 0 : v);
  return out;
}
function scale([low, high], [a, b], log) {
  const f = log ? Math.log : v => v;
  const span = f(high) - f(low) || 1;
  const to = v => a + (b - a) * (f(v) - f(low)) / span;
  to.back = p => { const v = f(low) + (p - a) / (b - a) * span; return log ? Math.exp(v) : v; };
  return to;
}

class Panel {
  constructor(stage, spec) {
    this.stage = stage;
    this.box = document.createElement("figure");
    this.box.className = "dc-panel";
    this.svg = node("svg", { role: "img" }, this.box);
    this.title = node("text", { class: "dc-title" }, this.svg);
    this.make(spec);
  }
  make() {}
  update(spec) {
    this.spec = spec;
    set(this.svg, { viewBox: `0 0 ${spec.w} ${spec.h}`, width: spec.w, height: spec.h, "aria-label": spec.alt || spec.title || "" });
    set(this.title, { x: 4, y: 15, text: spec.title || "" });
    this.draw(spec);
  }
  // Where a pointer is, in the units of the drawing.
  at(event) {
    const r = this.svg.getBoundingClientRect();
    return [(event.clientX - r.left) * this.spec.w / r.width, (event.clientY - r.top) * this.spec.h / r.height];
  }
  draggable(target, move) {
    target.style.touchAction = "none";
    target.addEventListener("pointerdown", event => { target.setPointerCapture(event.pointerId); this.held = true; move(this.at(event)); event.preventDefault(); });
    target.addEventListener("pointermove", event => { if (this.held) move(this.at(event)); });
    for (const end of ["pointerup", "pointercancel"]) target.addEventListener(end, () => { this.held = false; });
  }
}

class Curves extends Panel {
  make() {
    this.frame = node("g", {}, this.svg);
    this.bands = node("g", {}, this.svg);
    this.lines = node("g", { fill: "none", "stroke-linejoin": "round" }, this.svg);
    this.names = node("g", { class: "dc-small" }, this.svg);
    this.bar = node("line", { stroke: INK, "stroke-width": 1.5, "stroke-dasharray": "4 3" }, this.svg);
    this.knob = node("circle", { r: 5, fill: INK }, this.svg);
    this.surface = node("rect", { fill: "transparent" }, this.svg);
    this.draggable(this.surface, ([px]) => { if (this.spec.cursor !== undefined && this.spec.cursor !== null) this.stage.send("cursor", Math.min(this.spec.xrange[1], Math.max(this.spec.xrange[0], this.x.back(px)))); });
  }
  draw(s) {
    const left = 52, right = s.w - 14, top = 24, bottom = s.h - 34;
    const x = this.x = scale(s.xrange, [left, right], s.xlog), y = scale(s.yrange, [bottom, top], s.ylog);
    const xt = ticks(s.xrange, s.xlog), yt = ticks(s.yrange, s.ylog);
    const key = JSON.stringify([s.xrange, s.yrange, s.xlabel, s.ylabel, s.w, s.h]);
    if (key !== this.key) {
      this.key = key;
      this.frame.replaceChildren();
      for (const v of yt) { node("line", { x1: left, x2: right, y1: y(v), y2: y(v), stroke: FAINT, "stroke-width": 0.7 }, this.frame);
        node("text", { class: "dc-small", x: left - 5, y: y(v) + 3.5, "text-anchor": "end", text: pretty(v) }, this.frame); }
      for (const v of xt) { node("line", { x1: x(v), x2: x(v), y1: bottom, y2: bottom + 4, stroke: MUTED }, this.frame);
        node("text", { class: "dc-small", x: x(v), y: bottom + 15, "text-anchor": "middle", text: pretty(v) }, this.frame); }
      node("line", { x1: left, x2: right, y1: bottom, y2: bottom, stroke: MUTED }, this.frame);
      node("text", { class: "dc-small", x: (left + right) / 2, y: s.h - 4, "text-anchor": "middle", text: s.xlabel || "" }, this.frame);
      node("text", { class: "dc-small", transform: `translate(${left - 36},${(top + bottom) / 2}) rotate(-90)`, "text-anchor": "middle", text: s.ylabel || "" }, this.frame);
    }
    const inside = v => Math.min(bottom + 2, Math.max(top - 2, v));
    const shapes = pool(this.bands, "path", s.series.filter(c => c.fill).length);
    s.series.filter(c => c.fill).forEach((c, i) => set(shapes[i], { fill: c.color, opacity: 0.18, d:
      "M" + s.x.map((v, j) => `${x(v).toFixed(1)} ${inside(y(c.y[j])).toFixed(1)}`).join("L") + `L${x(s.x[s.x.length - 1])} ${inside(y(c.base))}L${x(s.x[0])} ${inside(y(c.base))}Z` }));
    const paths = pool(this.lines, "path", s.series.length), labelled = s.series.filter(c => c.label);
    s.series.forEach((c, i) => { const xs = c.x || s.x; set(paths[i], { stroke: c.color, "stroke-width": c.width || 1.5, opacity: c.opacity ?? 1,
      "stroke-dasharray": c.dash || null, d: "M" + c.y.map((v, j) => `${x(xs[j]).toFixed(1)} ${inside(y(v)).toFixed(1)}`).join("L") }); });
    const texts = pool(this.names, "text", labelled.length);
    const first = s.legend === "bottom" ? bottom - 8 - 13 * (labelled.length - 1) : top + 10;
    labelled.forEach((c, i) => set(texts[i], { x: right - 2, y: first + 13 * i, "text-anchor": "end", fill: c.color, text: c.label }));
    const on = s.cursor !== undefined && s.cursor !== null, cx = on ? x(s.cursor) : 0;
    for (const item of [this.bar, this.knob]) set(item, { visibility: on ? "visible" : "hidden" });
    set(this.bar, { x1: cx, x2: cx, y1: top, y2: bottom });
    set(this.knob, { cx, cy: bottom });
    set(this.surface, { x: left, y: top, width: right - left, height: bottom - top + 12, style: `cursor:${on ? "ew-resize" : "default"}` });
  }
}

class Bars extends Panel {
  make() { this.rects = node("g", {}, this.svg); this.marks = node("g", { stroke: INK, "stroke-width": 2 }, this.svg);
    this.names = node("g", { class: "dc-small", "text-anchor": "middle" }, this.svg); this.values = node("g", { class: "dc-tiny", "text-anchor": "middle" }, this.svg);
    this.base = node("line", { stroke: MUTED }, this.svg); this.caption = node("text", { class: "dc-small", "text-anchor": "middle" }, this.svg); }
  draw(s) {
    const n = s.values.length, left = 8, right = s.w - 8, top = 34, bottom = s.h - 34, step = (right - left) / n;
    const y = scale(s.range, [bottom, top], false), zero = y(Math.max(s.range[0], Math.min(s.range[1], 0)));
    const rects = pool(this.rects, "rect", n), names = pool(this.names, "text", n), values = pool(this.values, "text", n);
    s.values.forEach((v, i) => {
      const at = Math.min(bottom, Math.max(top, y(v))), mid = left + step * (i + 0.5);
      set(rects[i], { x: mid - step * 0.36, width: step * 0.72, y: Math.min(at, zero), height: Math.max(0.5, Math.abs(at - zero)), fill: s.colors[i] });
      set(names[i], { x: mid, y: bottom + 15, text: s.labels[i] });
      set(values[i], { x: mid, y: Math.min(at, zero) - 4, text: s.texts ? s.texts[i] : pretty(v) });
    });
    const marks = pool(this.marks, "line", s.marks ? n : 0);
    if (s.marks) s.marks.forEach((v, i) => { const mid = left + step * (i + 0.5), at = Math.min(bottom, Math.max(top, y(v)));
      set(marks[i], { x1: mid - step * 0.45, x2: mid + step * 0.45, y1: at, y2: at }); });
    set(this.base, { x1: left, x2: right, y1: zero, y2: zero });
    set(this.caption, { x: s.w / 2, y: s.h - 4, text: s.xlabel || "" });
  }
}

class Tiles extends Panel {
  make() { this.grid = document.createElement("div"); this.grid.className = "dc-tiles"; this.svg.remove();
    this.head = document.createElement("figcaption"); this.head.className = "dc-head"; this.box.append(this.head, this.grid); }
  update(s) {
    this.spec = s;
    this.box.setAttribute("role", "group"); this.box.setAttribute("aria-label", s.alt || s.title || "");
    if (this.head.textContent !== s.title) this.head.textContent = s.title || "";
    this.grid.style.gridTemplateColumns = `repeat(${s.columns}, ${s.size}px)`;
    while (this.grid.childNodes.length > s.images.length) this.grid.lastChild.remove();
    while (this.grid.childNodes.length < s.images.length) {
      const cell = document.createElement(s.pick ? "button" : "div"), index = this.grid.childNodes.length;
      cell.className = "dc-tile";
      cell.append(document.createElement("canvas"), document.createElement("span"));
      if (s.pick) cell.addEventListener("click", () => this.stage.send("picked", index));
      this.grid.append(cell);
    }
    s.images.forEach((image, i) => {
      const [canvas, span] = this.grid.childNodes[i].childNodes;
      canvas.style.width = `${s.size - 6}px`; canvas.style.height = `${(s.size - 6) * image.shape[0] / image.shape[1]}px`;
      paint(canvas, image);
      canvas.style.outline = s.borders && s.borders[i] ? `3px solid ${s.borders[i]}` : `1px solid ${FAINT}`;
      const caption = s.captions ? s.captions[i] : "";
      if (span.textContent !== caption) span.textContent = caption;
    });
  }
}

class Plane extends Panel {
  make() {
    this.holder = node("foreignObject", {}, this.svg); this.canvas = document.createElement("canvas"); this.holder.append(this.canvas);
    this.dots = node("g", {}, this.svg); this.lines = node("g", { "stroke-linecap": "round" }, this.svg); this.ring = node("circle", { fill: "none", stroke: INK, "stroke-dasharray": "3 3" }, this.svg);
    this.edge = node("rect", { fill: "none", stroke: MUTED }, this.svg);
    this.surface = node("rect", { fill: "transparent" }, this.svg);
    this.handle = node("circle", { r: 8, fill: "white", stroke: "black", "stroke-width": 2.5, tabindex: 0, role: "slider", "aria-label": "the point; arrow keys move it", style: "cursor:grab" }, this.svg);
    this.stars = node("g", { "pointer-events": "none" }, this.svg); this.names = node("g", { class: "dc-small", "pointer-events": "none" }, this.svg);
    const move = ([px, py]) => this.go(this.x.back(px), this.y.back(py));
    this.draggable(this.surface, move); this.draggable(this.handle, move);
    this.handle.addEventListener("keydown", event => { const d = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, 1], ArrowDown: [0, -1] }[event.key];
      if (d) { this.go(this.spec.handle[0] + 0.02 * d[0], this.spec.handle[1] + 0.02 * d[1]); event.preventDefault(); event.stopPropagation(); } });
  }
  go(a, b) { const edge = v => Math.min(this.spec.limit ?? 1, Math.max(-(this.spec.limit ?? 1), v)); if (this.spec.handle) this.stage.send("point", [edge(a), edge(b)]); }
  draw(s) {
    const side = s.h - 26, left = 6, top = 22, limit = s.limit ?? 1;
    const x = this.x = scale([-limit, limit], [left, left + side], false), y = this.y = scale([-limit, limit], [top + side, top], false);
    for (const item of [this.holder, this.edge, this.surface]) set(item, { x: left, y: top, width: side, height: side });
    const backdrop = s.backdrop && this.stage.backdrop(s.backdrop);
    if (backdrop && this.shown !== s.backdrop) { paint(this.canvas, backdrop); this.shown = s.backdrop; }
    this.canvas.style.cssText = `width:${side}px;height:${side}px;display:${backdrop ? "block" : "none"}`;
    const dots = pool(this.dots, "circle", (s.dots || []).length);
    (s.dots || []).forEach((d, i) => set(dots[i], { cx: x(d[0]).toFixed(1), cy: y(d[1]).toFixed(1), r: 2.2, fill: d[2], opacity: 0.75 }));
    const lines = pool(this.lines, "line", (s.lines || []).length);
    (s.lines || []).forEach((l, i) => set(lines[i], { x1: x(l[0]), y1: y(l[1]), x2: x(l[2]), y2: y(l[3]), stroke: l[4], "stroke-width": l[5] || 2 }));
    const stars = pool(this.stars, "circle", (s.markers || []).length), names = pool(this.names, "text", (s.markers || []).length);
    (s.markers || []).forEach((m, i) => { set(stars[i], { cx: x(m[0]), cy: y(m[1]), r: m[4] || 6, fill: m[2], stroke: "white", "stroke-width": 1.5 });
      set(names[i], { x: x(m[0]) + 9, y: y(m[1]) + 4, text: m[3] || "" }); });
    set(this.ring, { visibility: s.ring ? "visible" : "hidden" });
    if (s.ring) set(this.ring, { cx: x(s.ring[0]), cy: y(s.ring[1]), r: Math.abs(x(s.ring[2]) - x(0)) });
    set(this.handle, { visibility: s.handle ? "visible" : "hidden" });
    if (s.handle) set(this.handle, { cx: x(s.handle[0]), cy: y(s.handle[1]), "aria-valuetext": s.handle.map(v => v.toFixed(2)).join(", ") });
  }
}

class Radius extends Panel {
  make() { this.axis = node("g", {}, this.svg); this.spans = node("g", {}, this.svg); this.texts = node("g", { class: "dc-small" }, this.svg); this.marks = node("g", { stroke: INK, "stroke-width": 3 }, this.svg); }
  draw(s) {
    const left = 150, right = s.w - 20, top = 42, height = 26, gap = 44, x = scale(s.range, [left, right], false), bottom = top + gap * s.rows.length;
    this.axis.replaceChildren();
    for (const v of ticks(s.range, false, 8)) { node("line", { x1: x(v), x2: x(v), y1: top - 4, y2: bottom - 8, stroke: FAINT }, this.axis);
      node("text", { class: "dc-small", x: x(v), y: bottom + 6, "text-anchor": "middle", text: pretty(v) }, this.axis); }
    node("text", { class: "dc-small", x: (left + right) / 2, y: bottom + 22, "text-anchor": "middle", text: s.xlabel || "" }, this.axis);
    s.rows.forEach((row, r) => node("text", { class: "dc-small", x: left - 8, y: top + gap * r + 17, "text-anchor": "end", text: row.label }, this.axis));
    const spans = s.rows.flatMap((row, r) => row.segments.map(g => [r, g])), marks = s.rows.flatMap((row, r) => row.marks.map(m => [r, m]));
    const rects = pool(this.spans, "rect", spans.length), texts = pool(this.texts, "text", spans.length + marks.length);
    spans.forEach(([r, g], i) => { const a = x(Math.max(s.range[0], g.from)), b = x(Math.min(s.range[1], g.to));
      set(rects[i], { x: a, y: top + gap * r, width: Math.max(0, b - a), height, fill: g.color, opacity: g.opacity ?? 1 });
      set(texts[i], { x: (a + b) / 2, y: top + gap * r + 17, "text-anchor": "middle", fill: g.ink || INK, text: b - a > 7 * g.text.length ? g.text : "" }); });
    const lines = pool(this.marks, "line", marks.length);
    marks.forEach(([r, m], i) => { set(lines[i], { x1: x(m.at), x2: x(m.at), y1: top + gap * r - 3, y2: top + gap * r + height + 3, stroke: m.color || INK });
      set(texts[spans.length + i], { x: x(m.at), y: top + gap * r - 6, "text-anchor": "middle", fill: INK, text: m.text }); });
  }
}

class Lamps extends Panel {
  make() {
    this.labels = node("g", { class: "dc-small" }, this.svg); this.discs = node("g", {}, this.svg);
    this.signs = node("g", { class: "dc-sign", "text-anchor": "middle", "pointer-events": "none" }, this.svg);
    this.names = node("g", { class: "dc-tiny", "text-anchor": "middle" }, this.svg);
    this.ring = node("circle", { r: 15, fill: "none", stroke: INK, "stroke-width": 3, "pointer-events": "none" }, this.svg);
  }
  draw(s) {
    const left = 110, top = 42, step = (s.w - left) / Math.max(...s.rows.map(row => row.lamps.length)), gap = 44;
    const all = s.rows.flatMap((row, r) => row.lamps.map((lamp, c) => [left + step * (c + 0.5), top + gap * r, ...lamp]));
    const labels = pool(this.labels, "text", s.rows.length), discs = pool(this.discs, "circle", all.length);
    const signs = pool(this.signs, "text", all.length), names = pool(this.names, "text", all.length);
    s.rows.forEach((row, r) => set(labels[r], { x: 4, y: top + gap * r + 4, text: row.label }));
    all.forEach(([x, y, name, sign, fill], i) => {
      set(discs[i], { cx: x, cy: y, r: 12, fill, tabindex: 0, role: "button", "aria-label": `${name} ${sign}`, style: "cursor:pointer" });
      set(signs[i], { x, y: y + 5, text: sign });
      set(names[i], { x, y: y + 24, text: name });
      discs[i].onclick = () => this.stage.send("picked", i);
      discs[i].onkeydown = event => { if (event.key === "Enter" || event.key === " ") { this.stage.send("picked", i); event.preventDefault(); event.stopPropagation(); } };
    });
    const on = all[s.chosen ?? -1];
    set(this.ring, { visibility: on ? "visible" : "hidden", cx: on ? on[0] : 0, cy: on ? on[1] : 0 });
  }
}

class Heat extends Panel {
  make() {
    this.holder = node("foreignObject", {}, this.svg); this.canvas = document.createElement("canvas"); this.holder.append(this.canvas);
    this.edge = node("rect", { fill: "none", stroke: MUTED }, this.svg);
    this.names = node("g", { class: "dc-tiny", "text-anchor": "end" }, this.svg);
    this.places = node("g", { class: "dc-small", "text-anchor": "middle" }, this.svg);
    this.caption = node("text", { class: "dc-small", "text-anchor": "middle" }, this.svg);
  }
  draw(s) {
    const left = 120, right = s.w - 12, top = 24, bottom = s.h - 34, width = right - left, height = bottom - top, step = height / s.labels.length;
    for (const item of [this.holder, this.edge]) set(item, { x: left, y: top, width, height });
    paint(this.canvas, s.image);
    this.canvas.style.cssText = `width:${width}px;height:${height}px;display:block;image-rendering:pixelated`;
    const names = pool(this.names, "text", s.labels.length), places = pool(this.places, "text", s.ticks.length);
    s.labels.forEach((label, k) => set(names[k], { x: left - 5, y: top + step * (k + 0.5) + 3.5, text: label, fill: s.colors[k] }));
    s.ticks.forEach(([at, text], i) => set(places[i], { x: left + at * width, y: bottom + 15, text }));
    set(this.caption, { x: (left + right) / 2, y: s.h - 4, text: s.xlabel || "" });
  }
}

// A sentence where a figure would be.
class Words extends Panel {
  make() { this.holder = node("foreignObject", {}, this.svg); this.text = document.createElement("div"); this.text.className = "dc-words"; this.holder.append(this.text); }
  draw(s) {
    set(this.holder, { x: 4, y: 26, width: s.w - 8, height: s.h - 34 });
    if (this.text.textContent !== s.text) this.text.textContent = s.text;
  }
}

const KINDS = { curves: Curves, bars: Bars, tiles: Tiles, plane: Plane, radius: Radius, lamps: Lamps, heat: Heat, words: Words };

function render({ model, el }) {
  const root = document.createElement("div"), note = document.createElement("div");
  root.className = "dc-stage"; note.className = "dc-note"; note.setAttribute("aria-live", "polite");
  el.append(root, note);
  const waiting = {}, panels = [];
  const stage = {
    backdrop: name => model.get("backdrops")[name],
    // At most one message a frame and trait: the last position wins, none queues up behind a slow kernel.
    send(name, value) {
      if (!(name in waiting)) requestAnimationFrame(() => { const v = waiting[name]; delete waiting[name]; model.set(name, v); model.save_changes(); });
      waiting[name] = value;
    },
  };
  function draw() {
    const { panels: specs = [], note: text = "" } = model.get("frame");
    specs.forEach((spec, i) => {
      if (!panels[i] || panels[i].kind !== spec.kind) {
        const made = new KINDS[spec.kind](stage, spec);
        made.kind = spec.kind;
        if (panels[i]) panels[i].box.replaceWith(made.box); else root.append(made.box);
        panels[i] = made;
      }
      panels[i].update(spec);
    });
    while (panels.length > specs.length) panels.pop().box.remove();
    if (note.innerHTML !== text) note.innerHTML = text;
  }
  model.on("change:frame", draw);
  model.on("change:backdrops", () => { for (const p of panels) p.shown = null; draw(); });
  draw();
  return () => model.off("change:frame", draw);
}
export default { render };
