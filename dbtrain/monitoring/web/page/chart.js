"use strict";
// Curves of all blocks over steps, with marks where something happened, and what they say under the pointer.

class Chart {
  constructor(box) {
    this.box = box;
    this.curve = "losses";
    this.scale = "log";
    this.hidden = new Set();
    this.at = null;  // step under the cursor
    this.readout = element("div", { className: "readout", hidden: true });
    box.tabIndex = 0;
    box.setAttribute("role", "group");
    box.setAttribute("aria-label", "Curves; arrow keys move the reading");
    this.readout.setAttribute("role", "status");
    box.addEventListener("pointermove", (event) => this.point(event.clientX - box.getBoundingClientRect().left));
    box.addEventListener("pointerdown", (event) => this.point(event.clientX - box.getBoundingClientRect().left));
    box.addEventListener("pointerleave", (event) => { if (event.pointerType === "mouse") this.point(null); });
    box.addEventListener("blur", () => this.point(null));
    box.addEventListener("keydown", (event) => this.key(event));
  }

  show(state, theme) {
    this.state = state;
    this.theme = theme;
    this.draw();
  }

  key(event) {
    const moves = { ArrowLeft: -1, ArrowRight: 1, PageUp: -10, PageDown: 10, Home: -Infinity, End: Infinity };
    if (event.key === "Escape") { this.at = null; this.draw(); }
    if (!(event.key in moves) || !this.steps || this.steps.length === 0) return;
    event.preventDefault();
    const now = this.at === null ? this.steps.length - 1 : nearest(this.steps, this.at) + moves[event.key];
    this.at = this.steps[Math.min(this.steps.length - 1, Math.max(0, now))];
    this.draw();
  }

  point(px) {
    if (px === null || !this.unscale) this.at = null;
    else this.at = this.unscale(px);
    this.draw();
  }

  series() {
    const usable = (value) => value !== null && (this.scale === "linear" || value > 0);
    return this.state.blocks.filter((block) => !this.hidden.has(block.index)).map((block) => {
      const steps = [], values = [];
      block[this.curve].steps.forEach((step, index) => {
        const value = block[this.curve].values[index];
        if (usable(value)) { steps.push(step); values.push(value); }
      });
      return { block, steps, values, colour: colourOf(block.index, this.state.blocks.length, this.theme) };
    });
  }

  draw() {
    const width = Math.max(260, this.box.clientWidth), height = width < 500 ? 230 : 320;
    const left = 46, right = width - 22, top = 10, bottom = height - 34;
    const svg = drawn("svg", { viewBox: `0 0 ${width} ${height}`, height, "aria-hidden": "true" });
    const all = this.series(), told = all.filter((one) => one.steps.length > 0);
    this.steps = [...new Set(told.flatMap((one) => one.steps))].sort((a, b) => a - b);
    this.unscale = null;
    if (told.length === 0) {
      svg.append(drawn("text", { x: width / 2, y: height / 2, "text-anchor": "middle" }, this.nothing()));
      this.readout.hidden = true;
      this.box.replaceChildren(svg, this.readout);
      return;
    }
    const log = this.scale === "log";
    const [low, high] = bounds(told.flatMap((one) => one.values), log, this.curve === "rates");
    const last = Math.max(...this.state.blocks.map((block) => block.total));
    // The time to come is shown once half of it is over; before, the curves would be too small to read.
    const reached = Math.max(...told.map((one) => one.steps[one.steps.length - 1]));
    const end = reached > last / 2 ? last : Math.max(reached * 1.15, 1);
    const x = (step) => left + (step / end) * (right - left);
    const f = log ? Math.log : (value) => value;
    const y = (value) => bottom - ((f(value) - f(low)) / (f(high) - f(low))) * (bottom - top);
    this.unscale = (px) => Math.min(end, Math.max(0, ((px - left) / (right - left)) * end));
    this.axes(svg, { low, high, end, x, y, left, right, top, bottom, log });
    for (const one of told) {
      const path = one.steps.map((step, index) => `${index ? "L" : "M"}${x(step).toFixed(1)} ${clamp(y(one.values[index]), top - 4, bottom + 4).toFixed(1)}`);
      svg.append(drawn("path", { d: path.join(""), class: "curve", stroke: one.colour }));
    }
    this.names(svg, told, x, y, top, bottom);
    for (const one of all) {
      for (const mark of one.block.marks) {
        if (mark.step > end) continue;
        const near = one.steps.length ? y(one.values[nearest(one.steps, mark.step)]) : bottom;
        const sign = drawn("path", { d: signOf(mark.kind, x(mark.step), clamp(near, top + 6, bottom - 6)), fill: one.colour, class: `mark ${mark.kind}` });
        sign.append(drawn("title", {}, `block ${one.block.index}, ${mark.kind} at step ${mark.step}: ${mark.text}`));
        svg.append(sign);
      }
    }
    this.read(svg, told, x, y, { left, right, top, bottom, width });
    this.box.replaceChildren(svg, this.readout);
  }

  nothing() {
    const some = this.state.blocks.some((block) => block[this.curve].steps.length > 0);
    return some ? "nothing to draw: no block is chosen, or no value is above zero" : "nothing has been told yet";
  }

  axes(svg, { low, high, end, x, y, left, right, top, bottom, log }) {
    for (const value of log ? logTicks(low, high, 6) : ticks(low, high, 5)) {
      svg.append(drawn("line", { x1: left, x2: right, y1: y(value), y2: y(value), class: "grid" }));
      svg.append(drawn("text", { x: left - 7, y: y(value) + 4, "text-anchor": "end" }, this.curve === "rates" ? scaled(value, "") : plain(value, 3)));
    }
    svg.append(drawn("line", { x1: left, x2: right, y1: bottom, y2: bottom, class: "axis" }));
    for (const step of ticks(0, end, (right - left) / 90).filter(Number.isInteger)) {
      svg.append(drawn("text", { x: x(step), y: bottom + 16, "text-anchor": "middle" }, count(step)));
    }
    svg.append(drawn("text", { x: right, y: bottom + 31, "text-anchor": "end" }, "step"));
  }

  names(svg, told, x, y, top, bottom) {
    // At the end of each curve, and apart from each other; with many blocks the legend has to do.
    if (told.length > 12) return;
    const labels = told.map((one) => ({
      x: x(one.steps[one.steps.length - 1]) + 6, y: clamp(y(one.values[one.values.length - 1]), top + 4, bottom - 4), one,
    }));
    labels.sort((a, b) => a.y - b.y);
    labels.forEach((label, index) => {
      if (index > 0) label.y = Math.max(label.y, labels[index - 1].y + 12);
      svg.append(drawn("text", { x: label.x, y: label.y + 4, class: "strong" }, String(label.one.block.index)));
    });
  }

  read(svg, told, x, y, { left, right, top, bottom, width }) {
    this.readout.hidden = this.at === null;
    if (this.at === null) return;
    const step = this.steps[nearest(this.steps, this.at)];
    svg.append(drawn("line", { x1: x(step), x2: x(step), y1: top, y2: bottom, class: "cursor" }));
    const rows = [element("b", {}, `step ${count(step)}`)];
    for (const one of told.slice(0, 16)) {
      if (step > one.steps[one.steps.length - 1]) continue;
      const index = nearest(one.steps, step), swatch = element("span", { className: "swatch" });
      swatch.style.setProperty("--of", one.colour);
      svg.append(drawn("circle", { cx: x(one.steps[index]), cy: clamp(y(one.values[index]), top, bottom), r: 3.5, fill: one.colour }));
      const value = this.curve === "rates" ? scaled(one.values[index], "") : fixed(one.values[index]);
      rows.push(element("div", {}, element("span", {}, swatch, `block ${one.block.index}`), element("span", {}, value)));
    }
    const near = (right - left) / 60 / ((right - left) / this.unscale(right));
    for (const one of told) {
      const marks = one.block.marks.filter((mark) => Math.abs(mark.step - step) <= near);
      for (const mark of marks.slice(-2)) {
        rows.push(element("div", { className: "happened" }, `block ${one.block.index}: ${mark.kind} at step ${count(mark.step)}`));
      }
    }
    this.readout.replaceChildren(...rows);
    const onRight = x(step) < width / 2;
    this.readout.style.left = onRight ? `${x(step) + 12}px` : "auto";
    this.readout.style.right = onRight ? "auto" : `${width - x(step) + 12}px`;
  }
}

function clamp(value, low, high) { return Math.min(high, Math.max(low, value)); }

function nearest(steps, step) {
  let low = 0, high = steps.length - 1;
  while (low < high) {
    const middle = (low + high) >> 1;
    if (steps[middle] < step) low = middle + 1; else high = middle;
  }
  return low > 0 && step - steps[low - 1] < steps[low] - step ? low - 1 : low;
}

function bounds(values, log, fromZero) {
  let low = Infinity, high = -Infinity;
  for (const value of values) { low = Math.min(low, value); high = Math.max(high, value); }
  if (log) return low === high ? [low / 2, high * 2] : [low / 1.1, high * 1.1];
  if (fromZero) return [0, high > 0 ? high * 1.08 : 1];
  const room = (high - low) * 0.06 || Math.abs(high) * 0.1 || 1;
  return [low >= 0 ? Math.max(0, low - room) : low - room, high + room];
}

function signOf(kind, x, y) {
  const r = 6;
  if (kind === "restart") return `M${x} ${y - r}L${x + r} ${y + r * 0.8}H${x - r}Z`;
  if (kind === "rollback") return `M${x} ${y - r}L${x + r} ${y}L${x} ${y + r}L${x - r} ${y}Z`;
  const thin = 2, wide = r;
  return `M${x - wide} ${y - wide + thin}l${thin} ${-thin}L${x} ${y - thin}l${wide - thin} ${-(wide - thin)}l${thin} ${thin}L${x + thin} ${y}l${wide - thin} ${wide - thin}l${-thin} ${thin}L${x} ${y + thin}l${-(wide - thin)} ${wide - thin}l${-thin} ${-thin}L${x - thin} ${y}Z`;
}
