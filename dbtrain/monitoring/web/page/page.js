"use strict";
// Asks for the state of the run once a second while it is watched, and shows it.

const ASK_MS = 1000, ASK_ENDED_MS = 5000, PATIENCE_MS = 15000, SILENT_S = 60;
const TROUBLE = new Set(["block_restarting", "block_rolled_back", "run_interrupted", "block_stopped"]);
const token = new URLSearchParams(location.search).get("token");
const byId = (id) => document.getElementById(id);
const chart = new Chart(byId("chart"));
let state = null, heard = 0, shownSamples = -1, timer = 0;

function theme() {
  const chosen = remembered();
  return chosen || (matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light");
}

function remembered() {
  try { return localStorage.getItem("dbtrain-theme"); } catch { return null; }
}

function applyTheme() {
  document.documentElement.dataset.theme = theme();
  const chosen = remembered();
  byId("theme").textContent = chosen === "dark" ? "☾" : chosen === "light" ? "☀" : "◐";
  byId("theme").setAttribute("aria-label", `Colours: ${chosen || "as the system"}; press to change`);
  if (state) show();
}

byId("theme").addEventListener("click", () => {
  const next = { null: theme() === "dark" ? "light" : "dark", dark: "light", light: "dark" }[remembered()];
  const system = matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light";
  try {
    // What the system has anyway is followed, not pinned.
    if (next === system) localStorage.removeItem("dbtrain-theme"); else localStorage.setItem("dbtrain-theme", next);
  } catch { /* without storage the system decides */ }
  applyTheme();
});
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", applyTheme);

for (const button of document.querySelectorAll("[data-curve], [data-scale]")) {
  button.addEventListener("click", () => {
    const kind = "curve" in button.dataset ? "curve" : "scale";
    chart[kind] = button.dataset[kind];
    for (const other of document.querySelectorAll(`[data-${kind}]`)) other.setAttribute("aria-pressed", String(other === button));
    if (state) chart.show(state, theme());
  });
}

async function ask() {
  clearTimeout(timer);
  if (document.hidden) return;
  try {
    const answer = await fetch(`state?token=${encodeURIComponent(token)}`, { signal: AbortSignal.timeout(PATIENCE_MS) });
    if (answer.status === 403) {
      complain("The token is no longer right: the monitor was started again. Open the address that it printed.");
      return;
    }
    if (!answer.ok) throw new Error(answer.statusText);
    state = await answer.json();
    heard = Date.now();
    show();
    complain(state.problem === null ? null : `The run directory cannot be read: ${state.problem}. What is shown is from before.`);
  } catch {
    complain(`The monitor does not answer.${heard ? ` What is shown is from ${new Date(heard).toLocaleTimeString("en-GB")}.` : ""}`);
  }
  const ended = state !== null && state.run.state !== "running" && state.run.state !== "new";
  timer = setTimeout(ask, ended ? ASK_ENDED_MS : ASK_MS);
}

document.addEventListener("visibilitychange", ask);

function complain(text) {
  byId("problem").hidden = text === null;
  byId("problem").textContent = text || "";
}

function show() {
  showHeader();
  const noise = state.blocks.some((block) => block.noise !== null);
  byId("noise-section").hidden = !noise;
  if (noise) {
    byId("noise-unit").textContent = state.run.noise === "mask" ? "masked share t, most masked on the left" : "log σ, most noise on the left";
    drawNoise(byId("noise"), state, theme());
  }
  showBlocks();
  showLegend();
  chart.show(state, theme());
  showSamples();
  showNotices();
}

function showHeader() {
  const run = state.run;
  document.title = `${run.name} · ${run.state}`;
  byId("name").textContent = run.name;
  setState(byId("run-state"), run.state);
  const kind = run.kind === "blocks" ? `${state.blocks.length} block${state.blocks.length === 1 ? "" : "s"}` : "end to end";
  byId("about").textContent = [`${run.family}, ${kind}`, `driver: ${run.driver}`, run.uri].join(" · ");
  const nodes = Object.keys(run.nodes).length;
  const end = run.ended_at === null ? state.now : run.ended_at;
  const bar = element("progress", { max: 1, value: run.fraction });
  bar.setAttribute("aria-label", "progress of the run");
  const finished = state.blocks.filter((block) => block.state === "finished").length;
  const live = run.state === "running";
  const tiles = [
    ["elapsed", duration(run.started_at === null ? null : end - run.started_at), run.starts > 1 ? `start ${run.starts} of the run` : `${run.backend} backend`],
    ["progress", `${(100 * run.fraction).toFixed(1)} %`, bar],
    ["ETA", live ? duration(run.seconds_left) : "–", `${finished} of ${state.blocks.length} finished`],
    ["speed", live ? `${scaled(run.samples_per_second, "")} /s` : "–", "samples, all blocks"],
    ["compute", live ? scaled(run.flops_per_second, "FLOP/s") : "–", nodes ? `${run.slots} slot${run.slots === 1 ? "" : "s"} on ${nodes} node${nodes === 1 ? "" : "s"}` : `${run.slots} slot${run.slots === 1 ? "" : "s"}`],
    ["restarts", count(run.restarts), run.rollbacks ? `${run.rollbacks} roll-back${run.rollbacks === 1 ? "" : "s"}` : "no roll-backs"],
  ];
  byId("tiles").replaceChildren(...tiles.map(([name, value, note]) => element(
    "div", {}, element("dt", {}, name), element("dd", { title: value }, value), element("div", { className: "note" }, note),
  )));
}

function setState(where, name) {
  where.className = `state ${name}`;
  if (where.textContent !== name) where.textContent = name;
}

function showBlocks() {
  const body = byId("blocks").tBodies[0];
  body.replaceChildren(...state.blocks.map(rowOf));
}

function rowOf(block) {
  const row = element("tr");
  row.dataset.block = block.index;
  row.style.setProperty("--of", colourOf(block.index, state.blocks.length, theme()));
  const [first, last] = block.layers;
  const cell = (label, className, ...content) => {
    const made = element("td", { className });
    made.dataset.label = label;
    made.append(...content);
    row.append(made);
  };
  const note = (text) => element("span", { className: "note" }, text);
  const name = element("strong", {}, element("span", { className: "swatch" }), String(block.index));
  cell("block", "", name, note(first === last ? `layer ${first}` : `layers ${first}–${last}`));
  const badge = element("span");
  setState(badge, block.state);
  cell("state", "is", badge, ...(block.replicas > 1 ? [` × ${block.replicas}`] : []));
  const silent = state.now - (block.heard_at || state.now);
  if (block.state === "running" && silent > SILENT_S) row.lastChild.append(note(`last told ${duration(silent)} ago`));
  if (block.reason !== null && block.state !== "finished") {
    row.lastChild.append(element("span", { className: "reason", title: block.reason }, block.reason));
  }
  const where = block.node === null ? ["–"] : [block.node, note([block.device, block.pid === null ? null : `process ${block.pid}`].filter(Boolean).join(" · "))];
  cell("worker", "where", ...where);
  const bar = element("progress", { max: block.total, value: block.step });
  bar.setAttribute("aria-label", `progress of block ${block.index}`);
  cell("progress", "progress", `${count(block.step)} / ${count(block.total)}`, bar);
  cell("loss", "n", fixed(block.loss));
  cell("samples/s", "n", block.samples_per_second === null ? "–" : scaled(block.samples_per_second, ""));
  cell("FLOP/s", "n", scaled(block.flops_per_second, ""));
  cell("memory", "n", block.peak_memory === null ? "–" : scaled(block.peak_memory, "B"));
  cell("restarts", "n", String(block.restarts), ...(block.rollbacks ? [note(`${block.rollbacks} rolled back`)] : []));
  const age = block.checkpoint_at === null ? "–" : block.state === "running" ? `${duration(state.now - block.checkpoint_at)} ago` : clock(block.checkpoint_at);
  cell("checkpoint", "n", age, ...(block.checkpoint_step ? [note(`step ${count(block.checkpoint_step)}`)] : []));
  cell("ETA", "n eta", block.state === "finished" ? "done" : duration(block.seconds_left));
  return row;
}

function showLegend() {
  const box = byId("legend");
  if (box.childElementCount !== state.blocks.length) {
    box.replaceChildren(...state.blocks.map((block) => {
      const button = element("button", { type: "button" }, element("span", { className: "swatch" }), `block ${block.index}`);
      button.addEventListener("click", () => {
        if (!chart.hidden.delete(block.index)) chart.hidden.add(block.index);
        showLegend();
        chart.show(state, theme());
      });
      return button;
    }));
  }
  [...box.children].forEach((button, index) => {
    button.setAttribute("aria-pressed", String(!chart.hidden.has(index)));
    button.style.setProperty("--of", colourOf(index, state.blocks.length, theme()));
  });
}

function showSamples() {
  const samples = state.samples;
  const makes = state.run.family !== "vit" || samples.status !== "off";
  byId("samples-section").hidden = !makes;
  byId("samples-about").textContent = samplesInWords(samples);
  const image = byId("samples-image");
  if (samples.version !== shownSamples) {
    shownSamples = samples.version;
    image.hidden = !samples.picture;
    if (samples.picture) image.src = `samples.png?token=${encodeURIComponent(token)}&version=${samples.version}`;
  }
  byId("samples-texts").replaceChildren(...(samples.texts || []).map(
    ([prompt, text]) => element("pre", {}, ...(prompt ? [element("b", {}, prompt)] : []), text),
  ));
}

function samplesInWords(samples) {
  const every = `at most every ${duration(samples.every || 0)}`;
  const from = samples.steps ? `Drawn ${duration(state.now - samples.at)} ago from the blocks at step ${samples.steps.map(count).join(", ")} (${samples.weights} weights).` : "";
  switch (samples.status) {
    case "off": return "None are drawn. Start the monitor with --samples 60 to draw some from the newest checkpoints, at most every minute.";
    case "kept": return "As dbtrain sample left them in the run directory.";
    case "waiting": return `Drawn ${every}, once every block has saved a checkpoint.`;
    case "drawing": return `${from} Newer ones are being drawn.`.trim();
    case "failed": return `${from} They could not be drawn: ${samples.problem}`.trim();
    default: return samples.about || from;
  }
}

function showNotices() {
  const list = byId("notices"), newest = [...state.notices].reverse();
  list.replaceChildren(...newest.map((notice) => {
    const line = element("li", { className: notice.kind === "block_failed" ? "worse" : TROUBLE.has(notice.kind) ? "trouble" : "" });
    const when = element("time", { dateTime: new Date(notice.time * 1000).toISOString() }, clock(notice.time));
    line.append(when, element("span", {}, notice.block === null ? "run" : `block ${notice.block}`), element("span", {}, notice.text));
    return line;
  }));
}

new ResizeObserver(() => { if (state) { drawNoiseAgain(); chart.draw(); } }).observe(document.body);

function drawNoiseAgain() {
  if (!byId("noise-section").hidden) drawNoise(byId("noise"), state, theme());
}

applyTheme();
ask();
