"use strict";
// The noise axis: which block owns which range, in the colour of its curve, filled as far as it is trained.

function drawNoise(box, state, theme) {
  const blocks = state.blocks.filter((block) => block.noise !== null);
  const width = Math.max(240, box.clientWidth);
  const masked = state.run.noise === "mask";
  const edges = blocks.flatMap((block) => block.noise);
  const low = Math.min(...edges), high = Math.max(...edges);
  // Noise falls from left to right, as inference walks.
  const along = masked
    ? (value) => (high - value) / (high - low)
    : (value) => (Math.log(high) - Math.log(value)) / (Math.log(high) - Math.log(low));
  const left = 4, right = width - 4, top = 20, tall = 30, bottom = top + tall;
  const x = (value) => left + along(value) * (right - left);
  const svg = drawn("svg", { viewBox: `0 0 ${width} 88`, height: 88, role: "img" });
  svg.append(drawn("title", {}, noiseInWords(blocks, masked)));
  for (const block of blocks) {
    const from = x(block.noise[1]), to = x(block.noise[0]);
    const colour = colourOf(block.index, state.blocks.length, theme);
    const inner = Math.max(0, to - from - 2), done = block.step / block.total;
    const place = { x: from + 1, y: top, height: tall };
    svg.append(drawn("rect", { ...place, width: inner, fill: colour, opacity: 0.22 }));
    svg.append(drawn("rect", { ...place, width: inner * done, fill: colour }));
    if (!["running", "finished"].includes(block.state)) {
      svg.append(drawn("rect", { ...place, width: inner, fill: "none", stroke: colour, "stroke-dasharray": "4 3" }));
    }
    const middle = (from + to) / 2;
    if (inner > 14) svg.append(drawn("text", { x: middle, y: 13, "text-anchor": "middle", class: "strong" }, String(block.index)));
    const words = inner > 120 ? `${block.state}, ${Math.floor(100 * done)} %` : inner > 34 ? `${Math.floor(100 * done)} %` : "";
    svg.append(drawn("text", { x: middle, y: bottom + 34, "text-anchor": "middle" }, words));
  }
  let free = -Infinity;
  const bounds = [...new Set(edges)].sort((a, b) => b - a);
  bounds.forEach((value, index) => {
    const at = x(value), text = plain(value, 3), half = text.length * 3.4;
    const last = index === bounds.length - 1;
    const anchor = index === 0 ? "start" : last ? "end" : "middle";
    const start = anchor === "start" ? at : anchor === "end" ? at - 2 * half : at - half;
    svg.append(drawn("line", { x1: at, x2: at, y1: bottom, y2: bottom + 5, class: "axis" }));
    const crowded = start < free || (!last && index > 0 && at + half > right - 45);
    if (crowded) return;
    free = start + 2 * half + 8;
    svg.append(drawn("text", { x: at, y: bottom + 18, "text-anchor": anchor }, text));
  });
  box.replaceChildren(svg);
}

function noiseInWords(blocks, masked) {
  const parts = blocks.map(
    (block) => `block ${block.index} from ${plain(block.noise[1], 3)} to ${plain(block.noise[0], 3)}, ${block.state}`,
  );
  return `${masked ? "Mask levels" : "Noise levels"}: ${parts.join("; ")}`;
}
