"use strict";
// The live page. Nothing of a run is ever parsed as markup: elements are made with textContent only.
const $ = (id) => document.getElementById(id);
const USUAL = ["rollout/reward", "rollout/response_length", "rollout/truncated_ratio", "train/entropy", "train/grad_norm", "train/loss", "perf/step_s"];
const COLOURS = ["#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#8c6bb1", "#999999"]; // Okabe and Ito, for colour-blind eyes
const EVERY = 4000; // milliseconds between two looks
const TABS = ["charts", "samples", "events"];
const state = { runs: [], metrics: [], axis: "step", tab: "charts" };
let rows = [], known = [], drawn = new Map(), shownSamples = null;

function el(tag, properties, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(properties || {})) name in node ? (node[name] = value) : node.setAttribute(name, value);
  node.append(...children.filter((child) => child !== null && child !== undefined));
  return node;
}

async function get(path) {
  const answer = await fetch(path);
  if (!answer.ok) throw new Error(await answer.text());
  return answer.json();
}

// What is chosen stands in the address, so that a link shows the same.
function remember() {
  const kept = new URLSearchParams();
  for (const run of state.runs) kept.append("run", run);
  for (const metric of state.metrics) kept.append("metric", metric);
  kept.set("axis", state.axis);
  kept.set("tab", state.tab);
  history.replaceState(null, "", "#" + kept);
}

function restore() {
  const kept = new URLSearchParams(location.hash.slice(1));
  state.runs = kept.getAll("run");
  state.metrics = kept.getAll("metric");
  if (["step", "tokens", "gpu_hours"].includes(kept.get("axis"))) state.axis = kept.get("axis");
  if (TABS.includes(kept.get("tab"))) state.tab = kept.get("tab");
}

function duration(seconds) {
  if (seconds === null) return "–";
  const units = [[86400, "d"], [3600, "h"], [60, "min"], [1, "s"]], at = units.findIndex(([size]) => seconds >= size);
  if (at < 0) return "0 s";
  const [size, unit] = units[at], whole = Math.floor(seconds / size), rest = at < 2 ? Math.floor((seconds - whole * size) / units[at + 1][0]) : 0;
  return `${whole} ${unit}` + (rest ? ` ${rest} ${units[at + 1][1]}` : "");
}

const number = (value) => (value === null || value === undefined ? "–" : String(Number(value.toPrecision(3))).replaceAll("-", "−"));
const colour = (name) => COLOURS[state.runs.indexOf(name) % COLOURS.length];

function choose(name, only) {
  if (only) state.runs = [name];
  else state.runs = state.runs.includes(name) ? state.runs.filter((each) => each !== name) : [...state.runs, name];
  remember();
  drawBoard();
  drawView();
}

function drawBoard() {
  const wanted = $("filter").value.toLowerCase(), now = Date.now() / 1000;
  const shown = rows.filter((row) => (row.name + " " + row.state).toLowerCase().includes(wanted));
  const focused = document.activeElement && document.activeElement.dataset ? document.activeElement.dataset.key : null;
  $("runs").replaceChildren(...shown.map((row) => {
    const on = state.runs.includes(row.name), box = el("input", { type: "checkbox", checked: on, onchange: () => choose(row.name, false) });
    box.setAttribute("aria-label", "draw " + row.name);
    box.dataset.key = "box " + row.name;
    if (on) box.style.accentColor = colour(row.name);
    const open = el("button", { onclick: () => choose(row.name, true), title: row.name }, row.name);
    open.dataset.key = "open " + row.name;
    const bar = row.num_rollout ? el("span", { className: "bar" }, el("i", {})) : null;
    if (bar) bar.firstChild.style.width = Math.min(100, (100 * row.step) / row.num_rollout) + "%";
    const steps = el("td", { className: "n" }, row.step + (row.num_rollout ? ` of ${row.num_rollout}` : ""), bar);
    return el("tr", { className: on ? "on" : "" }, el("td", {}, box), el("td", { className: "name" }, open), el("td", { className: "state " + row.state.replace(/[^a-z]/g, "") }, row.state), steps,
      el("td", { className: "n" }, number(row.reward)), el("td", { className: "n" }, duration(row.eta)), el("td", { className: "n wide" }, String(row.attempts)), el("td", { className: "n wide" }, duration(Math.max(0, now - row.updated)) + " ago"));
  }));
  if (!shown.length) $("runs").append(el("tr", {}, el("td", { colSpan: 8, className: "empty" }, rows.length ? "No run fits the filter." : "No runs yet.")));
  if (focused) for (const node of document.querySelectorAll("[data-key]")) if (node.dataset.key === focused) node.focus();
}

function drawTabs() {
  for (const button of document.querySelectorAll("[role=tab]")) {
    const on = button.dataset.tab === state.tab;
    button.setAttribute("aria-selected", String(on));
    button.tabIndex = on ? 0 : -1;
    $(button.dataset.tab).hidden = !on;
  }
  $("of").textContent = state.runs.length ? state.runs.join(", ") : "";
}

function drawView() {
  drawTabs();
  return { charts: drawCharts, samples: drawSamples, events: drawEvents }[state.tab]();
}

function layout(marks) {
  const style = getComputedStyle(document.documentElement), of = (name) => style.getPropertyValue(name).trim();
  const axis = { gridcolor: of("--line"), zerolinecolor: of("--line"), linecolor: of("--line"), automargin: true };
  const names = { step: "step", tokens: "tokens", gpu_hours: "GPU-hours" };
  return {
    margin: { l: 44, r: 8, t: 6, b: 34 }, paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", font: { color: of("--ink"), size: 11 },
    xaxis: { ...axis, title: { text: names[state.axis], standoff: 4 } }, yaxis: axis, showlegend: state.runs.length > 1, legend: { orientation: "h", y: 1.12, x: 0 },
    hovermode: "x unified", hoverlabel: { bgcolor: of("--soft"), bordercolor: of("--line"), font: { color: of("--ink") } }, uirevision: state.axis,
    shapes: marks.map((x) => ({ type: "line", x0: x, x1: x, yref: "paper", y0: 0, y1: 1, line: { color: of("--muted"), width: 1, dash: "dot" } })),
  };
}

let turn = 0;
async function drawCharts() {
  const mine = ++turn;
  if (!state.runs.length) { $("grid").replaceChildren(el("div", { className: "empty" }, "Choose a run.")); drawn = new Map(); return; }
  const query = new URLSearchParams({ axis: state.axis });
  for (const run of state.runs) query.append("run", run);
  for (const metric of state.metrics.length ? state.metrics : USUAL) query.append("metric", metric);
  const answer = await get("/api/lines?" + query);
  if (mine !== turn) return;
  const evals = answer.metrics.filter((name) => /^eval\/[^/]+$/.test(name));
  known = answer.metrics;
  $("metrics").replaceChildren(...known.map((name) => el("option", { value: name })));
  $("problems").textContent = answer.problems.join(" ");
  if (!state.metrics.length) { // the usual ones that these runs have, and their evaluations
    state.metrics = [...USUAL.slice(0, 1), ...evals, ...USUAL.slice(1)].filter((name) => known.includes(name));
    if (state.metrics.length) { remember(); return drawCharts(); }
  }
  for (const name of drawn.keys()) if (!state.metrics.includes(name)) { drawn.get(name).remove(); drawn.delete(name); }
  for (const child of [...$("grid").children]) if (![...drawn.values()].includes(child)) child.remove();
  for (const metric of state.metrics) drawChart(metric, answer);
  if (!state.metrics.length) $("grid").replaceChildren(el("div", { className: "empty" }, "No metrics yet."));
}

function drawChart(metric, answer) {
  if (!drawn.has(metric)) {
    const close = el("button", { onclick: () => { state.metrics = state.metrics.filter((each) => each !== metric); remember(); drawCharts(); } }, "×");
    close.setAttribute("aria-label", "remove " + metric);
    const plot = el("div", { className: "plot" });
    plot.setAttribute("role", "img");
    const card = el("div", { className: "card" }, el("div", {}, el("h2", {}, metric), close), plot);
    drawn.set(metric, card);
    $("grid").append(card);
  }
  const plot = drawn.get(metric).querySelector(".plot"), traces = [];
  for (const run of state.runs) {
    const line = (answer.lines[run] || {})[metric];
    if (line) traces.push({ ...line, name: run.replaceAll("<", "‹").replaceAll("&", "＆"), mode: line.x.length < 40 ? "lines+markers" : "lines", line: { color: colour(run), width: 1.8 }, marker: { size: 4 }, hovertemplate: "%{y:.5g}" });
  }
  const last = traces.map((trace) => `${trace.name}: ${number(trace.y[trace.y.length - 1])} at the end`);
  plot.setAttribute("aria-label", `${metric} by ${state.axis}. ${last.join(". ") || "No values."}`);
  const marks = state.axis === "step" && state.runs.length === 1 ? (answer.restarts[state.runs[0]] || []).map((each) => each.step) : [];
  Plotly.react(plot, traces, layout(marks), { displayModeBar: false, responsive: true });
}

function drawSamples() {
  const run = state.runs[state.runs.length - 1];
  if (!run) { $("samples").replaceChildren(el("div", { className: "empty" }, "Choose a run.")); shownSamples = null; return; }
  const row = rows.find((each) => each.name === run), step = row ? row.step : 0;
  if (shownSamples && shownSamples.run === run) {
    if (step > shownSamples.step && !document.querySelector(".fresh")) {
      const more = el("button", { className: "fresh", onclick: () => { shownSamples = null; drawSamples(); } }, "There are new samples: show them");
      $("samples").prepend(more);
    }
    return;
  }
  shownSamples = { run, step };
  $("samples").replaceChildren(el("iframe", { src: `/runs/${encodeURIComponent(run)}/samples`, title: "Samples of " + run }));
}

async function drawEvents() {
  const run = state.runs[state.runs.length - 1];
  if (!run) { $("events").replaceChildren(el("div", { className: "empty" }, "Choose a run.")); return; }
  const events = await get(`/runs/${encodeURIComponent(run)}/events`);
  if (state.tab !== "events") return;
  const own = ["time", "attempt", "kind", "role", "index"];
  $("events").replaceChildren(...events.map((event) => {
    const role = event.role ? event.role + (event.index === null || event.index === undefined ? "" : "-" + event.index) : "";
    const rest = Object.entries(event).filter(([name, value]) => !own.includes(name) && value !== null).map(([name, value]) => `${name} ${typeof value === "object" ? JSON.stringify(value) : value}`);
    return el("div", { className: "event" + (/died|failed|lost/.test(event.kind) ? " bad" : "") }, el("time", {}, String(event.time).replace("T", " ").slice(0, 19)), el("span", {}, `attempt ${event.attempt ?? "–"}`),
      el("span", { className: "k" }, event.kind), el("span", {}, [role, ...rest].filter(Boolean).join("  ·  ")));
  }));
  if (!events.length) $("events").append(el("div", { className: "empty" }, "No events yet."));
}

async function look() {
  try {
    const board = await get("/api/runs");
    rows = board.runs;
    $("directory").textContent = board.directory;
    $("news").textContent = "";
    if (!state.runs.length && rows.length) { state.runs = [rows[0].name]; remember(); }
    state.runs = state.runs.filter((name) => rows.some((row) => row.name === name));
    drawBoard();
    await drawView();
  } catch (error) {
    $("news").textContent = "Not up to date: " + error.message;
  }
}

async function start() {
  restore();
  $("axis").value = state.axis;
  $("filter").addEventListener("input", drawBoard);
  $("axis").addEventListener("change", () => { state.axis = $("axis").value; remember(); drawCharts(); });
  $("reset").addEventListener("click", () => { state.metrics = []; drawCharts(); });
  $("metric").addEventListener("change", () => {
    const name = $("metric").value;
    if (known.includes(name) && !state.metrics.includes(name)) { state.metrics = [...state.metrics, name]; $("metric").value = ""; remember(); drawCharts(); }
  });
  $("tabs").addEventListener("click", (event) => { if (event.target.dataset.tab) { state.tab = event.target.dataset.tab; remember(); drawView(); } });
  $("tabs").addEventListener("keydown", (event) => {
    const by = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (!by) return;
    state.tab = TABS[(TABS.indexOf(state.tab) + by + TABS.length) % TABS.length];
    remember();
    drawView();
    $("tab-" + state.tab).focus();
  });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => drawView());
  await look();
  document.body.dataset.ready = "yes";
  for (;;) {
    await new Promise((resolve) => setTimeout(resolve, EVERY));
    if (!document.hidden) await look();
  }
}

start();
