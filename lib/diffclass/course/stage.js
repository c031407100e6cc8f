// The stage draws what figures.py describes: panels of curves, bars, tiles, planes, radius axes, lamps and heat maps, as SVG and canvas.
// It holds no mathematics. Three traits go back to Python: `point` (dragged), `cursor` (dragged), `picked` (clicked).
// Below the panels: how rows of them fill the width (`arranged`), and how one hero fills the whole screen (`projector`).

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
// A canvas inside a drawing that has a name of its own.
function hidden() { const canvas = document.createElement("canvas"); canvas.setAttribute("aria-hidden", "true"); return canvas; }
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
  constructor(stage) {
    this.stage = stage;
    this.box = document.createElement("figure");
    this.box.className = "dc-panel";
    this.head = document.createElement("figcaption");
    this.head.className = "dc-head";
    this.box.append(this.head);
    this.body = this.surfaceOf(this.box);
    this.make();
  }
  surfaceOf(box) { return this.svg = node("svg", { role: "img" }, box); }
  make() {}
  // The size in the drawing's own units; an elastic panel is redrawn in the one that its row gives it.
  size(w, h) {
    this.given = { w, h };
    this.update(this.told);
  }
  update(told) {
    this.told = told;
    const spec = this.spec = { ...told, ...this.given };
    if (this.head.textContent !== spec.title) this.head.textContent = spec.title || "";
    set(this.svg, { viewBox: `0 0 ${spec.w} ${spec.h}`, "aria-label": spec.alt || spec.title || "" });
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
    this.names = node("g", { class: "dc-small dc-halo" }, this.svg); this.samples = node("g", {}, this.svg);
    this.bar = node("line", { stroke: INK, "stroke-width": 1.5, "stroke-dasharray": "4 3" }, this.svg);
    this.knob = node("circle", { r: 5, fill: INK }, this.svg);
    this.surface = node("rect", { fill: "transparent" }, this.svg);
    this.draggable(this.surface, ([px]) => { if (this.spec.cursor !== undefined && this.spec.cursor !== null) this.stage.send("cursor", Math.min(this.spec.xrange[1], Math.max(this.spec.xrange[0], this.x.back(px)))); });
  }
  draw(s) {
    const xt = ticks(s.xrange, s.xlog), yt = ticks(s.yrange, s.ylog);
    const left = Math.max(52, 30 + 7.4 * Math.max(...yt.map(v => pretty(v).length))), right = s.w - 18, top = 8, bottom = s.h - 42;
    const x = this.x = scale(s.xrange, [left, right], s.xlog), y = scale(s.yrange, [bottom, top], s.ylog);
    const key = JSON.stringify([s.xrange, s.yrange, s.xlabel, s.ylabel, s.w, s.h]);
    if (key !== this.key) {
      this.key = key;
      this.frame.replaceChildren();
      for (const v of yt) { node("line", { x1: left, x2: right, y1: y(v), y2: y(v), stroke: FAINT, "stroke-width": 0.7 }, this.frame);
        node("text", { class: "dc-small", x: left - 5, y: y(v) + 4.5, "text-anchor": "end", text: pretty(v) }, this.frame); }
      for (const v of xt) { node("line", { x1: x(v), x2: x(v), y1: bottom, y2: bottom + 4, stroke: MUTED }, this.frame);
        node("text", { class: "dc-small", x: x(v), y: bottom + 17, "text-anchor": "middle", text: pretty(v) }, this.frame); }
      node("line", { x1: left, x2: right, y1: bottom, y2: bottom, stroke: MUTED }, this.frame);
      node("text", { class: "dc-small", x: (left + right) / 2, y: s.h - 6, "text-anchor": "middle", text: s.xlabel || "" }, this.frame);
      node("text", { class: "dc-small", transform: `translate(13,${(top + bottom) / 2}) rotate(-90)`, "text-anchor": "middle", text: s.ylabel || "" }, this.frame);
    }
    const inside = v => Math.min(bottom + 2, Math.max(top - 2, v));
    const shapes = pool(this.bands, "path", s.series.filter(c => c.fill).length);
    s.series.filter(c => c.fill).forEach((c, i) => { const xs = c.x || s.x; set(shapes[i], { fill: c.color, opacity: 0.18, d:
      "M" + xs.map((v, j) => `${x(v).toFixed(1)} ${inside(y(c.y[j])).toFixed(1)}`).join("L") + `L${x(xs[xs.length - 1])} ${inside(y(c.base))}L${x(xs[0])} ${inside(y(c.base))}Z` }); });
    const paths = pool(this.lines, "path", s.series.length), labelled = s.series.filter(c => c.label);
    s.series.forEach((c, i) => { const xs = c.x || s.x; set(paths[i], { stroke: c.color, "stroke-width": c.width || 1.5, opacity: c.opacity ?? 1,
      "stroke-dasharray": c.dash || null, d: "M" + c.y.map((v, j) => `${x(xs[j]).toFixed(1)} ${inside(y(v)).toFixed(1)}`).join("L") }); });
    const texts = pool(this.names, "text", labelled.length), samples = pool(this.samples, "line", labelled.length);
    const first = s.legend === "bottom" ? bottom - 10 - 18 * (labelled.length - 1) : top + 12;
    labelled.forEach((c, i) => {
      const y = first + 18 * i;
      set(texts[i], { x: right - 26, y, "text-anchor": "end", text: c.label });
      set(samples[i], { x1: right - 20, x2: right - 2, y1: y - 4.5, y2: y - 4.5, stroke: c.color, "stroke-width": Math.max(2, c.width || 0), "stroke-dasharray": c.dash || null });
    });
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
    const n = s.values.length, left = 8, right = s.w - 8, top = 20, bottom = s.h - (s.xlabel ? 42 : 24), step = (right - left) / n;
    const letters = Math.max(...s.labels.map(label => label.length)), fits = step / (0.6 * (letters + 0.5));
    const every = fits < 10 ? Math.ceil(10 / fits) : 1;  // where there are too many for their names, every second, third, ...
    const y = scale(s.range, [bottom, top], false), zero = y(Math.max(s.range[0], Math.min(s.range[1], 0)));
    const rects = pool(this.rects, "rect", n), names = pool(this.names, "text", n), values = pool(this.values, "text", n);
    s.values.forEach((v, i) => {
      const at = Math.min(bottom, Math.max(top, y(v))), mid = left + step * (i + 0.5);
      set(rects[i], { x: mid - step * 0.36, width: step * 0.72, y: Math.min(at, zero), height: Math.max(0.5, Math.abs(at - zero)), fill: s.colors[i] });
      set(names[i], { x: mid, y: bottom + 17, text: i % every ? "" : s.labels[i], style: every === 1 && fits < 13 ? `font-size:${fits.toFixed(1)}px` : null });
      set(values[i], { x: mid, y: Math.min(at, zero) - 5, text: i % every ? "" : s.texts ? s.texts[i] : pretty(v) });
    });
    const marks = pool(this.marks, "line", s.marks ? n : 0);
    if (s.marks) s.marks.forEach((v, i) => { const mid = left + step * (i + 0.5), at = Math.min(bottom, Math.max(top, y(v)));
      set(marks[i], { x1: mid - step * 0.45, x2: mid + step * 0.45, y1: at, y2: at }); });
    set(this.base, { x1: left, x2: right, y1: zero, y2: zero });
    set(this.caption, { x: s.w / 2, y: s.h - 6, text: s.xlabel || "" });
  }
}

class Tiles extends Panel {
  // In fewer columns than told, where the view is narrow.
  fold(columns) {
    if (this.columns !== columns) { this.columns = columns; this.update(this.told); }
  }
  surfaceOf(box) { const grid = document.createElement("div"); grid.className = "dc-tiles"; box.append(grid); box.setAttribute("role", "group"); return grid; }
  update(s) {
    this.told = s;
    set(this.box, { "aria-label": s.alt || s.title || "" });
    if (this.head.textContent !== s.title) this.head.textContent = s.title || "";
    set(this.body, { style: `--dc-columns:${this.columns || s.columns};--dc-tile:${s.size}px` });
    while (this.body.childNodes.length > s.images.length) this.body.lastChild.remove();
    while (this.body.childNodes.length < s.images.length) {
      const cell = document.createElement(s.pick ? "button" : "div"), index = this.body.childNodes.length;
      cell.className = "dc-tile";
      cell.append(document.createElement("canvas"), document.createElement("span"));
      if (s.pick) cell.addEventListener("click", () => this.stage.send("picked", index));
      this.body.append(cell);
    }
    s.images.forEach((image, i) => {
      const [canvas, span] = this.body.childNodes[i].childNodes, caption = s.captions ? s.captions[i] : "";
      paint(canvas, image);
      set(canvas, { role: "img", "aria-label": caption || s.title, style: `outline:${s.borders && s.borders[i] ? `3px solid ${s.borders[i]}` : `1px solid ${FAINT}`}` });
      if (span.textContent !== caption) span.textContent = caption;
    });
  }
}

class Plane extends Panel {
  make() {
    this.holder = node("foreignObject", {}, this.svg); this.canvas = hidden(); this.holder.append(this.canvas);
    this.dots = node("g", { class: "dc-dots" }, this.svg); this.lines = node("g", { "stroke-linecap": "round" }, this.svg); this.ring = node("circle", { fill: "none", stroke: INK, "stroke-dasharray": "3 3" }, this.svg);
    this.edge = node("rect", { fill: "none", stroke: MUTED }, this.svg);
    this.surface = node("rect", { fill: "transparent" }, this.svg);
    this.handle = node("circle", { r: 8, fill: "white", stroke: "black", "stroke-width": 2.5, tabindex: 0, role: "slider", "aria-label": "the point; arrow keys move it", style: "cursor:grab" }, this.svg);
    this.stars = node("g", { "pointer-events": "none" }, this.svg); this.names = node("g", { class: "dc-small dc-halo", "pointer-events": "none" }, this.svg);
    const move = ([px, py]) => this.go(this.x.back(px), this.y.back(py));
    this.draggable(this.surface, move); this.draggable(this.handle, move);
    this.handle.addEventListener("keydown", event => { const d = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, 1], ArrowDown: [0, -1] }[event.key];
      if (d) { this.go(this.spec.handle[0] + 0.02 * d[0], this.spec.handle[1] + 0.02 * d[1]); event.preventDefault(); event.stopPropagation(); } });
  }
  go(a, b) { const edge = v => Math.min(this.spec.limit ?? 1, Math.max(-(this.spec.limit ?? 1), v)); if (this.spec.handle) this.stage.send("point", [edge(a), edge(b)]); }
  draw(s) {
    const side = s.h - 8, left = 4, top = 4, limit = s.limit ?? 1;
    set(this.svg, { role: s.handle ? "group" : "img" });
    const x = this.x = scale([-limit, limit], [left, left + side], false), y = this.y = scale([-limit, limit], [top + side, top], false);
    for (const item of [this.holder, this.edge, this.surface]) set(item, { x: left, y: top, width: side, height: side });
    const backdrop = s.backdrop && this.stage.backdrop(s.backdrop);
    if (backdrop && this.shown !== s.backdrop) { paint(this.canvas, backdrop); this.shown = s.backdrop; }
    this.canvas.style.cssText = `width:${side}px;height:${side}px;display:${backdrop ? "block" : "none"}`;
    const dots = pool(this.dots, "circle", (s.dots || []).length);
    (s.dots || []).forEach((d, i) => set(dots[i], { cx: x(d[0]).toFixed(1), cy: y(d[1]).toFixed(1), r: 2.2, fill: d[2], opacity: 0.85 }));
    const lines = pool(this.lines, "line", (s.lines || []).length);
    (s.lines || []).forEach((l, i) => set(lines[i], { x1: x(l[0]), y1: y(l[1]), x2: x(l[2]), y2: y(l[3]), stroke: l[4], "stroke-width": l[5] || 2 }));
    const stars = pool(this.stars, "circle", (s.markers || []).length), names = pool(this.names, "text", (s.markers || []).length);
    (s.markers || []).forEach((m, i) => { set(stars[i], { cx: x(m[0]), cy: y(m[1]), r: m[4] || 6, fill: m[2], stroke: "white", "stroke-width": 1.5 });
      set(names[i], { x: x(m[0]) + 9, y: y(m[1]) + 4, text: m[3] || "" }); });
    set(this.ring, { visibility: s.ring ? "visible" : "hidden" });
    if (s.ring) set(this.ring, { cx: x(s.ring[0]), cy: y(s.ring[1]), r: Math.abs(x(s.ring[2]) - x(0)) });
    set(this.handle, { visibility: s.handle ? "visible" : "hidden" });
    if (s.handle) set(this.handle, { cx: x(s.handle[0]), cy: y(s.handle[1]), "aria-valuenow": s.handle[0], "aria-valuemin": -limit, "aria-valuemax": limit, "aria-valuetext": s.handle.map(v => v.toFixed(2)).join(", ") });
  }
}

class Radius extends Panel {
  make() { this.axis = node("g", {}, this.svg); this.spans = node("g", {}, this.svg); this.texts = node("g", { class: "dc-small" }, this.svg); this.marks = node("g", { stroke: INK, "stroke-width": 3 }, this.svg); }
  draw(s) {
    const left = 150, right = s.w - 20, top = 22, height = 26, gap = 46, x = scale(s.range, [left, right], false), bottom = top + gap * s.rows.length;
    this.axis.replaceChildren();
    for (const v of ticks(s.range, false, 8)) { node("line", { x1: x(v), x2: x(v), y1: top - 4, y2: bottom - 8, stroke: FAINT }, this.axis);
      node("text", { class: "dc-small", x: x(v), y: bottom + 8, "text-anchor": "middle", text: pretty(v) }, this.axis); }
    node("text", { class: "dc-small", x: (left + right) / 2, y: bottom + 25, "text-anchor": "middle", text: s.xlabel || "" }, this.axis);
    s.rows.forEach((row, r) => node("text", { class: "dc-small", x: left - 8, y: top + gap * r + 17, "text-anchor": "end", text: row.label }, this.axis));
    const spans = s.rows.flatMap((row, r) => row.segments.map(g => [r, g])), marks = s.rows.flatMap((row, r) => row.marks.map(m => [r, m]));
    const rects = pool(this.spans, "rect", spans.length), texts = pool(this.texts, "text", spans.length + marks.length);
    spans.forEach(([r, g], i) => { const a = x(Math.max(s.range[0], g.from)), b = x(Math.min(s.range[1], g.to));
      set(rects[i], { x: a, y: top + gap * r, width: Math.max(0, b - a), height, fill: g.color, opacity: g.opacity ?? 1 });
      set(texts[i], { x: (a + b) / 2, y: top + gap * r + 17, "text-anchor": "middle", fill: g.ink || INK, text: b - a > 7.5 * g.text.length ? g.text : "" }); });
    const lines = pool(this.marks, "line", marks.length);
    marks.forEach(([r, m], i) => { set(lines[i], { x1: x(m.at), x2: x(m.at), y1: top + gap * r - 3, y2: top + gap * r + height + 3, stroke: m.color || INK });
      const near = marks.find(([q, other]) => q === r && other !== m && Math.abs(x(other.at) - x(m.at)) < 36);  // then their numbers stand apart
      const anchor = !near ? "middle" : near[1].at > m.at || (near[1].at === m.at && marks.indexOf(near) > i) ? "end" : "start";
      set(texts[spans.length + i], { x: x(m.at), y: top + gap * r - 7, "text-anchor": anchor, fill: INK, text: m.text }); });
  }
}

class Lamps extends Panel {
  make() {
    set(this.svg, { role: "group" });
    this.labels = node("g", { class: "dc-small" }, this.svg); this.discs = node("g", {}, this.svg);
    this.signs = node("g", { class: "dc-sign", "text-anchor": "middle", "pointer-events": "none" }, this.svg);
    this.names = node("g", { class: "dc-tiny", "text-anchor": "middle" }, this.svg);
    this.ring = node("circle", { r: 15, fill: "none", stroke: INK, "stroke-width": 3, "pointer-events": "none" }, this.svg);
  }
  draw(s) {
    const left = 120, top = 18, step = (s.w - left) / Math.max(...s.rows.map(row => row.lamps.length)), gap = (s.h - 6) / s.rows.length;
    const all = s.rows.flatMap((row, r) => row.lamps.map((lamp, c) => [left + step * (c + 0.5), top + gap * r, ...lamp]));
    const labels = pool(this.labels, "text", s.rows.length), discs = pool(this.discs, "circle", all.length);
    const signs = pool(this.signs, "text", all.length), names = pool(this.names, "text", all.length);
    s.rows.forEach((row, r) => set(labels[r], { x: 4, y: top + gap * r + 4, text: row.label }));
    all.forEach(([x, y, name, sign, fill], i) => {
      set(discs[i], { cx: x, cy: y, r: 12, fill, tabindex: 0, role: "button", "aria-label": `${name} ${sign}`, style: "cursor:pointer" });
      set(signs[i], { x, y: y + 5, text: sign });
      set(names[i], { x, y: y + 25, text: name });
      discs[i].onclick = () => this.stage.send("picked", i);
      discs[i].onkeydown = event => { if (event.key === "Enter" || event.key === " ") { this.stage.send("picked", i); event.preventDefault(); event.stopPropagation(); } };
    });
    const on = all[s.chosen ?? -1];
    set(this.ring, { visibility: on ? "visible" : "hidden", cx: on ? on[0] : 0, cy: on ? on[1] : 0 });
  }
}

class Heat extends Panel {
  make() {
    this.holder = node("foreignObject", {}, this.svg); this.canvas = hidden(); this.holder.append(this.canvas);
    this.edge = node("rect", { fill: "none", stroke: MUTED }, this.svg);
    this.names = node("g", { class: "dc-tiny", "text-anchor": "end" }, this.svg); this.marks = node("g", {}, this.svg);
    this.places = node("g", { class: "dc-small", "text-anchor": "middle" }, this.svg);
    this.caption = node("text", { class: "dc-small", "text-anchor": "middle" }, this.svg);
  }
  draw(s) {
    const left = 26 + 6.4 * Math.max(...s.labels.map(label => label.length)), right = s.w - 20, top = 6, bottom = s.h - 42, width = right - left, height = bottom - top, step = height / s.labels.length;
    for (const item of [this.holder, this.edge]) set(item, { x: left, y: top, width, height });
    paint(this.canvas, s.image);
    this.canvas.style.cssText = `width:${width}px;height:${height}px;display:block;image-rendering:pixelated`;
    const names = pool(this.names, "text", s.labels.length), marks = pool(this.marks, "rect", s.labels.length), places = pool(this.places, "text", s.ticks.length);
    s.labels.forEach((label, k) => {
      set(names[k], { x: left - 17, y: top + step * (k + 0.5) + 4, text: label });
      set(marks[k], { x: left - 12, y: top + step * (k + 0.5) - 4, width: 8, height: 8, fill: s.colors[k] });
    });
    s.ticks.forEach(([at, text], i) => set(places[i], { x: left + at * width, y: bottom + 17, text }));
    set(this.caption, { x: (left + right) / 2, y: s.h - 6, text: s.xlabel || "" });
  }
}

// A sentence where a figure would be.
class Words extends Panel {
  make() { this.holder = node("foreignObject", {}, this.svg); this.text = document.createElement("div"); this.text.className = "dc-words"; this.holder.append(this.text); }
  draw(s) {
    set(this.holder, { x: 2, y: 2, width: s.w - 4, height: s.h - 4 });
    if (this.text.textContent !== s.text) this.text.textContent = s.text;
  }
}

const KINDS = { curves: Curves, bars: Bars, tiles: Tiles, plane: Plane, radius: Radius, lamps: Lamps, heat: Heat, words: Words };

// ---------------------------------------------------------------------------------------------------------------------
// The arrangement: rows of panels that fill the width, in one size of type.
//
// Each row's panels share its width in proportion to their natural widths. Tiles and planes keep their shape; the others
// are elastic: they take the width that is left, and the height of the tallest panel of their row.

const RIGID = ["tiles", "plane"];
const PAGE = 1000, GAP = 18, LEAST = 0.84, SMALLEST = 0.78, MOST = 1.5, NOTE = 62, COLUMNS = 6, SHRUNK = 0.75;

const wide = row => row.reduce((sum, cell) => sum + cell.w, GAP * (row.length - 1));
const natural = (spec, columns = spec.columns) => spec.kind === "tiles" ? columns * (spec.size + 4) : spec.w;

// A row in the fewest parts that fit into `room`, where possible with something elastic in each, and of like widths.
function broken(row, room) {
  const least = part => part.reduce((sum, cell) => sum + (cell.elastic ? SHRUNK : 1) * cell.w, GAP * (part.length - 1));
  let best = null;
  function deal(i, parts) {
    if (i === row.length) {
      const stiff = parts.filter(part => part.every(cell => !cell.elastic)).length;
      const cost = 4 * room * parts.length + room * stiff + Math.max(...parts.map(wide));
      if (!best || cost < best.cost) best = { cost, parts };
      return;
    }
    parts.forEach((part, k) => { if (least([...part, row[i]]) <= room) deal(i + 1, parts.map((one, m) => m === k ? [...one, row[i]] : one)); });
    deal(i + 1, [...parts, [row[i]]]);
  }
  deal(0, []);
  return best.parts;
}
function fitted(row, width, size, taller) {
  const spare = width / size - wide(row), elastic = row.filter(cell => cell.elastic), total = elastic.reduce((sum, cell) => sum + cell.w, 0);
  const share = row.map(cell => cell.w + (cell.elastic ? spare * cell.w / total : 0));
  row[0].panel.box.parentNode.style.gridTemplateColumns = share.map(w => `minmax(0, ${w.toFixed(2)}fr)`).join(" ");
  const tall = Math.max(...row.map(cell => cell.elastic ? taller * cell.spec.h : cell.panel.body.getBoundingClientRect().height / size));
  row.forEach((cell, i) => { if (cell.elastic) cell.panel.size(+share[i].toFixed(1), +tall.toFixed(1)); });
}
// The size of a drawing unit in pixels: the panels fill `width`, and are no taller than `height` where they can help it.
function arranged(root, panels, counts, width, height, most) {
  const cells = panels.map(panel => ({ panel, spec: panel.told, w: natural(panel.told), elastic: !RIGID.includes(panel.kind) }));
  let rows = counts.map(count => cells.splice(0, count)).filter(row => row.length);
  if (!rows.length) { root.replaceChildren(); return 1; }
  let size = Math.min(most, width / Math.max(PAGE, ...rows.map(wide)));
  const narrow = size < LEAST;
  for (const { panel, spec } of rows.flat()) if (spec.kind === "tiles") panel.fold(narrow && spec.columns > COLUMNS ? Math.ceil(spec.columns / 2) : spec.columns);
  if (narrow) {
    for (const cell of rows.flat()) if (!cell.elastic) cell.w = natural(cell.spec, cell.panel.columns);
    size = Math.min(1, ...rows.flat().map(cell => cell.elastic ? 1 : width / cell.w));
    for (const cell of rows.flat()) cell.w = Math.min(cell.w, width / size);
    rows = rows.flatMap(row => broken(row, width / size));
  }
  root.replaceChildren(...rows.map(row => {
    const line = document.createElement("div");
    line.className = "dc-row";
    line.append(...row.map(cell => cell.panel.box));
    return line;
  }));
  for (let pass = 0; pass < 4; pass++) {
    root.style.setProperty("--dc-size", size);
    for (const row of rows) fitted(row, width, size, 1);
    const over = root.offsetHeight / height;
    if (most > MOST && over < 1) for (const row of rows) fitted(row, width, size, Math.min(1.3, 1 / over));
    if (narrow || over <= 1 || size <= SMALLEST) break;
    size = Math.max(SMALLEST, size / over);
  }
  return size;
}

// ---------------------------------------------------------------------------------------------------------------------
// The projector: one hero alone on the whole screen, above everything else.

function projector(hero, button, changed) {
  const on = () => hero.classList.contains("dc-projector");
  function enter() {
    hero.classList.add("dc-projector");
    button.setAttribute("aria-pressed", "true");
    const asked = hero.requestFullscreen ? hero.requestFullscreen() : Promise.reject();
    asked.then(
      () => { if (!on()) document.exitFullscreen(); },
      () => { if (on() && hero.showPopover) { hero.popover = "manual"; hero.showPopover(); } },
    ).finally(changed);
  }
  function leave() {
    hero.classList.remove("dc-projector");
    button.setAttribute("aria-pressed", "false");
    if (document.fullscreenElement === hero) document.exitFullscreen();
    if (hero.popover) { hero.hidePopover(); hero.removeAttribute("popover"); }
    changed();
  }
  const typing = target => target.isContentEditable || ["INPUT", "SELECT", "TEXTAREA"].includes(target.tagName);
  function key(event) {
    const inside = hero.contains(event.target) && !typing(event.target) && !(event.ctrlKey || event.metaKey || event.altKey);
    if (event.key === "Escape" && on()) leave();
    else if (event.key === "p" && inside) on() ? leave() : enter();
    else if (!inside || event.key.length > 1 || event.key === " ") return;
    // What is typed here is not the notebook's: x would cut the cell. A hero may hold several stages, and each listens.
    event.preventDefault();
    event.stopImmediatePropagation();
  }
  const left = () => { if (on() && !document.fullscreenElement && !hero.popover) leave(); };
  button.addEventListener("click", () => on() ? leave() : enter());
  window.addEventListener("keydown", key, true); // before JupyterLab, which listens on the document
  document.addEventListener("fullscreenchange", left);
  return { on, off() { window.removeEventListener("keydown", key, true); document.removeEventListener("fullscreenchange", left); } };
}
// ipywidgets labels a slider for the eye alone; a screen reader needs the name on the handle and on the number beside it.
// The buttons of its player have signs only.
function named(hero) {
  // JupyterLab asks the element with the focus alone whether its arrows and Delete are its own.
  hero.dataset.lmSuppressShortcuts = "true";
  for (const one of hero.querySelectorAll(":is(button, input, select, [tabindex]):not([data-lm-suppress-shortcuts])")) one.dataset.lmSuppressShortcuts = "true";
  for (const player of hero.querySelectorAll(".widget-play"))
    player.querySelectorAll("button").forEach((button, i) => { const name = ["Play", "Stop", "Repeat"][i]; set(button, { "aria-label": `${name} the film`, title: name }); });
  for (const control of hero.querySelectorAll(":has(> .widget-label)")) {
    const label = control.querySelector(".widget-label").textContent;
    const handles = control.querySelectorAll(".noUi-handle");
    handles.forEach((handle, i) => set(handle, { "aria-label": handles.length > 1 ? `${label}, ${i ? "to" : "from"}` : label }));
    for (const number of control.querySelectorAll(".widget-readout[contenteditable=true]")) set(number, { role: "textbox", "aria-label": label });
  }
}

// ---------------------------------------------------------------------------------------------------------------------
// The figure as a picture: the browser draws a copy of it into a canvas, twice as large.

async function picture(el) {
  const copy = el.cloneNode(true), drawn = el.querySelectorAll("canvas");
  copy.querySelectorAll("canvas").forEach((canvas, i) => {
    const image = document.createElement("img");
    image.src = drawn[i].toDataURL();
    image.style.cssText = `${canvas.style.cssText};display:block;width:100%;image-rendering:pixelated`;
    canvas.replaceWith(image);
  });
  copy.querySelectorAll("button:not(.dc-tile)").forEach(button => button.remove());
  const rules = [...document.styleSheets].flatMap(sheet => { try { return [...sheet.cssRules]; } catch { return []; } });
  const own = rules.map(rule => rule.cssText).filter(text => text.includes(".dc-"));
  const seen = getComputedStyle(el), names = new Set(own.join(" ").match(/--jp-[a-z0-9-]+/g));
  const values = [...names].map(name => `${name}:${seen.getPropertyValue(name)}`).join(";");
  const { width, height } = el.getBoundingClientRect(), style = document.createElement("style"), page = document.createElement("div");
  style.textContent = own.join("\n");
  page.style.cssText = `${values};background:${seen.getPropertyValue("--jp-layout-color0") || "white"};width:${width}px;padding:8px;box-sizing:border-box`;
  page.append(style, copy);
  const text = new XMLSerializer().serializeToString(page);
  const whole = `<svg xmlns="${NS}" width="${width}" height="${height + 16}"><foreignObject width="100%" height="100%">${text}</foreignObject></svg>`;
  const image = new Image();
  image.src = `data:image/svg+xml;charset=utf-8,${encodeURIComponent(whole)}`;
  await image.decode();
  const canvas = document.createElement("canvas");
  canvas.width = 2 * width;
  canvas.height = 2 * (height + 16);
  canvas.getContext("2d").drawImage(image, 0, 0, canvas.width, canvas.height);
  return canvas.toDataURL("image/png");
}
async function save(el, note) {
  const link = document.createElement("a");
  try { link.href = await picture(el); }
  catch (reason) { note.textContent = `This browser cannot turn the figure into a picture (${reason.message}); take a screenshot instead.`; return; }
  link.download = "figure.png";
  link.click();
}

function render({ model, el }) {
  const root = document.createElement("div"), foot = document.createElement("div"), note = document.createElement("div"), button = document.createElement("button");
  root.className = "dc-stage"; foot.className = "dc-foot";
  note.className = "dc-note"; note.setAttribute("aria-live", "polite");
  button.className = "dc-project";
  node("path", { d: "M1 6V1h5M12 1h5v5M17 12v5h-5M6 17H1v-5", fill: "none", stroke: "currentColor", "stroke-width": 1.6 }, node("svg", { viewBox: "0 0 18 18", width: 16, height: 16, "aria-hidden": "true" }, button));
  set(button, { type: "button", "aria-label": "Show this figure alone on the whole screen", "aria-pressed": "false", title: "whole screen (p); Escape leaves" });
  const keep = document.createElement("button");
  keep.className = "dc-project";
  node("path", { d: "M9 1v10M5 7.5l4 4 4-4M1 16h16", fill: "none", stroke: "currentColor", "stroke-width": 1.6 }, node("svg", { viewBox: "0 0 18 18", width: 16, height: 16, "aria-hidden": "true" }, keep));
  set(keep, { type: "button", "aria-label": "Save this figure as a picture", title: "save as a picture" });
  keep.addEventListener("click", () => save(el, note));
  foot.append(note, keep, button);
  el.append(root, foot);
  el.classList.add("dc-view");
  const waiting = {}, panels = [];
  let hero = null, screen = null, shape = "", place = "", across = 0;
  const stage = {
    backdrop: name => model.get("backdrops")[name],
    // At most one message a frame and trait: the last position wins, none queues up behind a slow kernel.
    send(name, value) {
      if (!(name in waiting)) requestAnimationFrame(() => { const v = waiting[name]; delete waiting[name]; model.set(name, v); model.save_changes(); });
      waiting[name] = value;
    },
  };
  function draw() {
    const { panels: specs = [], rows = [], note: text = "" } = model.get("frame");
    specs.forEach((spec, i) => {
      if (!panels[i] || panels[i].kind !== spec.kind) {
        const made = new KINDS[spec.kind](stage);
        made.kind = spec.kind;
        if (panels[i]) panels[i].box.remove();
        panels[i] = made;
      }
      // A panel that says what it said before is left alone: most sliders move some of them.
      const said = JSON.stringify(spec);
      if (panels[i].said !== said) { panels[i].said = said; panels[i].update(spec); }
    });
    while (panels.length > specs.length) panels.pop().box.remove();
    if (note.innerHTML !== text) note.innerHTML = text;
    const now = JSON.stringify([rows, specs.map(spec => [spec.kind, natural(spec), spec.h, spec.images?.length, spec.images?.[0].shape])]);
    if (now !== shape) { shape = now; place = ""; arrange(); }
  }
  // Anew only where the panels, the width or the height of the window are others: not at every frame.
  function arrange() {
    const width = root.clientWidth || 1000, view = el.closest(".jp-WindowedPanel-outer");
    const whole = screen?.on(), height = whole || !view ? window.innerHeight : view.clientHeight;
    const above = hero ? el.getBoundingClientRect().top - (hero === el ? el : hero.firstElementChild).getBoundingClientRect().top : 0;
    // What stands below, such as folded tabs, is to be seen too; what is unfolded there may need a scroll.
    const below = hero ? Math.min(90, hero.getBoundingClientRect().bottom - el.getBoundingClientRect().bottom) : 0;
    const now = [width, height, Math.round(above), Math.round(below), whole].join();
    if (now === place) return;
    place = now;
    const size = arranged(root, panels, model.get("frame").rows || [], width, height - above - below - NOTE - (whole ? 60 : 24), whole ? 3 : MOST);
    el.style.setProperty("--dc-size", size);
  }
  const watch = new ResizeObserver(() => {
    if (!hero && el.isConnected) {
      hero = el.closest(".dc-hero") || el;
      screen = projector(hero, button, arrange);
      // A click on the figure gives it the focus, and what is typed there is not the notebook's: x would cut the cell.
      hero.tabIndex = -1;
      const focus = event => { if (!hero.contains(document.activeElement)) (event.target.closest(".noUi-handle") ?? hero).focus({ preventScroll: true }); };
      for (const moment of ["pointerdown", "pointerup", "mouseup"]) hero.addEventListener(moment, focus, true);
      hero.dataset.lmSuppressShortcuts = "true";
      watch.observe(hero);
    }
    if (hero) named(hero);
    // Plotly asks for its width only when the window changes, not when a sidebar does.
    if (hero?.clientWidth !== across && hero?.querySelector(".js-plotly-plot")) { across = hero.clientWidth; window.dispatchEvent(new Event("resize")); }
    arrange();
  });
  watch.observe(root);
  window.addEventListener("resize", arrange);
  model.on("change:frame", draw);
  model.on("change:backdrops", () => { for (const p of panels) p.shown = p.said = null; draw(); });
  draw();
  return () => { model.off("change:frame", draw); watch.disconnect(); window.removeEventListener("resize", arrange); screen?.off(); };
}
export default { render };
