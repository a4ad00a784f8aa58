"use strict";
// The list of samples: filter, sort, and only the rows that can be seen are in the page.
const ROW = 40; // pixels, as in the style sheet
let index, visible = [], selected = -1, sortKey = "step", descending = false;
const HEADS = [["step", "step", "n"], ["group", "group", "n"], ["reward", "reward", "n"], ["length", "tokens", "n"], ["status", "status", ""], ["preview", "response", ""]];

function drawHeads() {
  $("heads").replaceChildren(...HEADS.map(([key, label, className]) => {
    const on = key === sortKey, button = el("button", className + (on ? " on" : ""), label + (on ? (descending ? " ↓" : " ↑") : ""));
    button.dataset.key = key;
    button.onclick = () => { descending = key === sortKey ? !descending : key === "reward" || key === "length"; sortKey = key; drawHeads(); apply(); };
    return button;
  }));
}

// All that is said of each sample, in small letters: made once, so that a search is a matter of milliseconds.
let said;
function haystack() {
  said ??= (async () => {
    const count = Math.ceil(index.step.length / BLOCK);
    const parts = await Promise.all(Array.from({ length: count }, (_, k) => block("texts-" + k)));
    const noted = notesOn();
    return parts.flat().map((text, i) => [...(noted.get(i) || []).flatMap((note) => [note.text, ...note.tags]), ...text.messages.map((m) => m[1]), ...text.extra.map((e) => e[1]), text.failure ?? "", ...sessionWords(text.session)].join("\n").toLowerCase());
  })();
  return said;
}

// The notes on each sample of the page that has any.
function notesOn() {
  const found = new Map();
  for (const note of notes) if (note.sample !== null) found.set(note.sample, [...(found.get(note.sample) || []), note]);
  return found;
}

let searched = 0;
async function apply() {
  const turn = ++searched, wanted = $("search").value.toLowerCase();
  const number = (id, fallback) => ($(id).value === "" ? fallback : Number($(id).value));
  const low = number("low", -Infinity), high = number("high", Infinity), from = number("from", -Infinity), to = number("to", Infinity);
  const dataset = $("dataset").value, status = $("status").value, bounded = low > -Infinity || high < Infinity;
  let found = [];
  for (let i = 0; i < index.step.length; i++) {
    const reward = index.reward[i];
    if (dataset && index.dataset[i] !== dataset) continue;
    if (status && index.status[i] !== status) continue;
    if (index.step[i] < from || index.step[i] > to) continue;
    if (bounded && (reward === null || reward < low || reward > high)) continue;
    found.push(i);
  }
  if (wanted) {
    const all = await haystack();
    if (turn !== searched) return;
    found = found.filter((i) => all[i].includes(wanted));
  }
  const column = index[sortKey], sign = descending ? -1 : 1;
  // Missing values go last, whichever the direction.
  found.sort((a, b) => {
    const x = column[a], y = column[b];
    if (x === null || y === null) return (x === null) - (y === null) || a - b;
    return (x < y ? -sign : x > y ? sign : 0) || a - b;
  });
  visible = found;
  $("space").style.height = visible.length * ROW + "px";
  $("scroll").scrollTop = 0;
  $("count").textContent = `${visible.length.toLocaleString("en")} of ${index.step.length.toLocaleString("en")} samples` + (meta.left_out ? ` (of ${meta.total.toLocaleString("en")} in the run)` : "");
  drawRows();
  remember();
}

// A reward on a ground that is the darker the nearer it is to the largest one of the page.
let rewardEnds;
function badge(reward) {
  if (!rewardEnds) rewardEnds = index.reward.reduce(([low, high], r) => (r === null ? [low, high] : [Math.min(low, r), Math.max(high, r)]), [Infinity, -Infinity]);
  const node = el("span", "badge", num(reward)), [low, high] = rewardEnds;
  if (reward !== null && high > low) node.style.backgroundColor = `rgba(0,121,90,${(0.05 + (0.4 * (reward - low)) / (high - low)).toFixed(3)})`;
  return node;
}

function drawRows() {
  const scroll = $("scroll"), first = Math.max(0, Math.floor(scroll.scrollTop / ROW) - 5);
  const last = Math.min(visible.length, Math.ceil((scroll.scrollTop + scroll.clientHeight) / ROW) + 5);
  const rows = [], noted = notesOn();
  for (let k = first; k < last; k++) {
    const i = visible[k];
    const row = el("div", "row" + (i === selected ? " on" : ""),
      el("span", "n", String(index.step[i])), el("span", "n", String(index.group[i])), el("span", "n", badge(index.reward[i])), el("span", "n", String(index.length[i])),
      el("span", "pill " + index.status[i].replace(/[^a-z]/g, ""), index.status[i]), el("span", "preview", noted.has(i) ? el("span", "noted", "noted") : null, ...safeText(index.preview[i])));
    row.onclick = () => select(i);
    rows.push(row);
  }
  if (!visible.length) rows.push(el("div", "empty", "No sample fits the filter."));
  $("rows").style.top = first * ROW + "px";
  $("rows").replaceChildren(...rows);
}

function select(i) {
  selected = i;
  drawRows();
  remember();
  return showSample(i);
}

function move(by) {
  if (!visible.length) return;
  const at = Math.min(visible.length - 1, Math.max(0, visible.indexOf(selected) + by)), scroll = $("scroll");
  if (at * ROW < scroll.scrollTop) scroll.scrollTop = at * ROW;
  if ((at + 1) * ROW > scroll.scrollTop + scroll.clientHeight) scroll.scrollTop = (at + 1) * ROW - scroll.clientHeight;
  select(visible[at]);
}
