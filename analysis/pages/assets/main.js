"use strict";
// Start: unpack, draw, and keep what is chosen in the address, so that a link shows the same.
const FIELDS = ["search", "dataset", "status", "low", "high", "from", "to"];
let meta, notes, restoring = true;

function remember() {
  if (restoring) return;
  const state = new URLSearchParams();
  for (const id of FIELDS) if ($(id).value) state.set(id, $(id).value);
  state.set("sort", (descending ? "-" : "") + sortKey);
  if (selected >= 0) state.set("sample", selected);
  state.set("tab", shownTab);
  state.set("heat", heat);
  try { history.replaceState(null, "", "#" + state); } catch { /* a frame without an address */ }
}

function restore() {
  const state = new URLSearchParams(location.hash.slice(1));
  for (const id of FIELDS) if (state.get(id)) $(id).value = state.get(id);
  const sort = state.get("sort") || "step";
  if (HEADS.some(([key]) => key === sort.replace("-", ""))) { descending = sort.startsWith("-"); sortKey = sort.replace("-", ""); }
  if (Object.hasOwn(TABS, state.get("tab") || "")) shownTab = state.get("tab");
  if (Object.hasOwn(SCALES, state.get("heat") || "")) heat = state.get("heat");
  const sample = Number(state.get("sample") ?? 0);
  return sample >= 0 && sample < index.step.length ? sample : 0;
}

// The samples that a finding is about: its filters in place of those that are set.
function showThem(filters) {
  const button = el("button", "", "show these samples");
  button.onclick = async () => {
    const wanted = new URLSearchParams(filters), sort = wanted.get("sort") || "step";
    for (const id of FIELDS) $(id).value = wanted.get(id) || "";
    descending = sort.startsWith("-");
    sortKey = sort.replace("-", "");
    drawHeads();
    await apply();
    if (visible.length) select(visible[0]);
    $("scroll").scrollIntoView({ block: "nearest" });
  };
  return button;
}

// A note that somebody made on a sample; the way to that sample, where it is not the one that is shown.
function noteBlock(note, isElsewhere) {
  const about = [note.author, note.time].filter(Boolean).join(", "), node = el("div", "note", el("span", "", ...safeText(note.text)));
  for (const tag of note.tags) node.append(el("span", "tag", ...safeText(tag)));
  node.append(el("small", "", ...safeText(about)));
  if (!isElsewhere) return node;
  const place = `step ${note.step}, sample ${note.index}` + (note.dataset === "train" ? "" : ` of ${note.dataset}`);
  if (note.sample === null) node.append(el("small", "", `${place} is not in this page`));
  else {
    const button = el("button", "", place);
    button.onclick = async () => {
      for (const id of FIELDS) $(id).value = "";
      await apply();
      select(note.sample);
      $("scroll").scrollTop = Math.max(0, (visible.indexOf(note.sample) - 3) * ROW);
      $("detail").scrollIntoView({ block: "nearest" });
    };
    node.append(button);
  }
  return node;
}

function drawTop() {
  $("facts").replaceChildren(...meta.facts.map(([key, value]) => el("span", "", key + " ", el("b", "", value))), ...meta.notes.map((note) => el("span", "", note)));
  const findings = meta.findings.map((f) => el("div", "finding " + f.severity, el("b", "", f.name), ": " + f.evidence, el("small", "", f.advice), f.samples ? showThem(f.samples) : null));
  const noted = notes.map((note) => noteBlock(note, true));
  const box = meta.overview ? el("div", "findings", el("h2", "", findings.length ? `Findings (${findings.length})` : "Findings: none"), ...findings) : null;
  const said = noted.length && meta.overview ? el("div", "findings notes", el("h2", "", `Notes (${noted.length})`), ...noted) : null;
  $("top").replaceChildren(...[...meta.charts.map(([title, series]) => chart(title, series, meta.marks)), box, said].filter(Boolean));
}

function options(id, values) {
  for (const value of [...new Set(values)].sort()) { const option = el("option", "", value); option.value = value; $(id).append(option); }
}

async function start() {
  meta = await block("meta");
  mark = meta.mark;
  [index, notes] = await Promise.all([block("index"), block("notes")]);
  document.body.classList.toggle("single", !meta.overview);
  drawTop();
  options("dataset", index.dataset);
  options("status", index.status);
  const sample = restore();
  drawHeads();
  await apply();
  let wait;
  for (const id of FIELDS) $(id).addEventListener("input", () => { clearTimeout(wait); wait = setTimeout(apply, 120); });
  $("scroll").addEventListener("scroll", () => requestAnimationFrame(drawRows));
  addEventListener("resize", drawRows);
  addEventListener("keydown", (event) => {
    if (["INPUT", "SELECT"].includes(event.target.tagName)) return;
    const by = { ArrowDown: 1, j: 1, ArrowUp: -1, k: -1 }[event.key];
    if (by) { event.preventDefault(); move(by); }
  });
  if (index.step.length) {
    $("scroll").scrollTop = Math.max(0, (visible.indexOf(sample) - 3) * ROW);
    await select(sample);
  }
  restoring = false;
  setTimeout(haystack, 100); // the first search finds it ready
  document.body.dataset.ready = "yes";
  if (mark) followNotes();
}

// On the page of a server, notes appear while it is open.
const EVERY = 5000; // milliseconds
async function followNotes() {
  for (;;) {
    await new Promise((resolve) => setTimeout(resolve, EVERY));
    if (document.hidden) continue;
    const now = await unpack("notes").catch(() => notes); // the server may have ended
    if (JSON.stringify(now) === JSON.stringify(notes)) continue;
    notes = now;
    said = undefined; // they are searched, too
    drawTop();
    drawRows();
    if (selected >= 0) showSample(selected);
  }
}

// A sample that can't be had any more, as the server of an open page has begun anew.
addEventListener("unhandledrejection", (event) => {
  $("detail").replaceChildren(el("div", "empty", String(event.reason?.message ?? event.reason)));
});

start().catch((error) => {
  document.body.prepend(el("div", "empty", "This page could not be drawn: " + error + ". It needs a browser of 2023 or newer."));
  throw error;
});
