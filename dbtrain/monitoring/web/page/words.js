"use strict";
// Numbers and colours as people read them, and small helpers for the page. Text only ever becomes text nodes.

const SVG = "http://www.w3.org/2000/svg";

function element(name, properties = {}, ...children) {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(properties)) {
    if (key in made && key !== "list") made[key] = value;
    else made.setAttribute(key, value);
  }
  made.append(...children);
  return made;
}

function drawn(name, attributes = {}, text) {
  const made = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  if (text !== undefined) made.textContent = text;
  return made;
}

function duration(seconds) {
  if (seconds === null || !isFinite(seconds)) return "–";
  const whole = Math.max(0, Math.round(seconds));
  for (const [size, unit, below, small] of [[86400, "d", 3600, "h"], [3600, "h", 60, "m"], [60, "m", 1, "s"]]) {
    if (whole >= size) return `${Math.floor(whole / size)}${unit} ${Math.floor((whole % size) / below)}${small}`;
  }
  return `${whole}s`;
}

function scaled(value, unit, digits = 3) {
  if (value === null || !isFinite(value)) return "–";
  const names = ["", "k", "M", "G", "T", "P", "E"];
  let index = 0;
  while (Math.abs(value) >= 999.5 && index < names.length - 1) { value /= 1000; index += 1; }
  const text = Math.abs(value) >= 100 ? value.toFixed(0) : String(Number(value.toPrecision(digits)));
  const name = names[index] + unit;
  return name ? `${text}\u202f${name}` : text;
}

function plain(value, digits = 4) {
  if (value === null || value === undefined || !isFinite(value)) return "–";
  const size = Math.abs(value);
  if (size !== 0 && (size < 1e-3 || size >= 1e5)) return value.toExponential(2);
  return String(Number(value.toPrecision(digits)));
}

function fixed(value) {
  // A loss: as many places at every poll, so that the column stands still.
  if (value === null || !isFinite(value)) return "–";
  const size = Math.abs(value);
  return size >= 1e4 || (size > 0 && size < 1e-3) ? value.toExponential(2) : value.toFixed(size >= 100 ? 1 : 4);
}

function count(value) { return value.toLocaleString("en"); }

function clock(seconds) {
  return new Date(seconds * 1000).toLocaleTimeString("en-GB");
}

// From high noise to low noise: darker to lighter on white, and apart for all kinds of colour vision.
const PALETTES = {
  light: [[74, 42, 145], [31, 104, 176], [18, 140, 128], [88, 138, 22], [176, 112, 0]],
  dark: [[164, 132, 240], [92, 160, 240], [60, 196, 178], [150, 205, 84], [245, 196, 84]],
};

function colourOf(index, blocks, theme) {
  const stops = PALETTES[theme];
  const at = blocks === 1 ? 1 : (index / (blocks - 1)) * (stops.length - 1);
  const low = Math.min(Math.floor(at), stops.length - 2);
  const mixed = stops[low].map((from, part) => Math.round(from + (stops[low + 1][part] - from) * (at - low)));
  return `rgb(${mixed.join(" ")})`;
}

function ticks(low, high, wanted) {
  const rough = (high - low) / Math.max(1, wanted);
  const power = 10 ** Math.floor(Math.log10(rough));
  const size = [1, 2, 5, 10].find((factor) => factor * power >= rough) * power;
  const found = [];
  for (let n = Math.ceil(low / size - 1e-9); n * size <= high + size * 1e-9; n += 1) found.push(n * size + 0);
  return found;
}

function logTicks(low, high, wanted) {
  const found = [];
  for (let power = Math.floor(Math.log10(low)); power <= Math.ceil(Math.log10(high)); power += 1) {
    for (const factor of [1, 2, 5]) {
      const value = factor * 10 ** power;
      if (value >= low * 0.999 && value <= high * 1.001) found.push(value);
    }
  }
  if (found.length < 2) return ticks(low, high, wanted);  // between 2.1 and 4.5 there is neither 2 nor 5
  const decades = found.filter((value) => Math.abs(Math.log10(value) % 1) < 1e-6);
  const usable = found.length <= wanted * 1.5 || decades.length < 2 ? found : decades;
  const every = Math.ceil(usable.length / wanted);
  return usable.filter((_, index) => index % every === 0);
}
