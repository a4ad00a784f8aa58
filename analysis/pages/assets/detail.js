"use strict";
// One sample: its conversation, its tokens as a heat map, and its group side by side.
const BLOCK = 64;
let shownTab = "conversation", heat = "logprob", latest = 0;

const textOf = async (i) => (await block("texts-" + Math.floor(i / BLOCK)))[i % BLOCK];
const tokensOf = async (i) => (await block("tokens-" + Math.floor(i / BLOCK)))[i % BLOCK];

async function showSample(i) {
  const turn = ++latest; // a click that comes while a block is unpacked wins
  const [text, found] = await Promise.all([textOf(i), sessionOf(i)]);
  const names = Object.keys(TABS).filter((name) => name !== "session" || found);
  const name = names.includes(shownTab) ? shownTab : names[0], body = await TABS[name](i);
  if (turn !== latest) return;
  const facts = [["step", index.step[i]], ["group", index.group[i]], ["sample", index.index[i]], ["reward", num(index.reward[i], 4)],
    ["advantage", num(index.advantage[i], 4)], ["tokens", index.length[i]], ["status", index.status[i]], ["set", index.dataset[i]],
    ["weights", text.versions.join(", ") || "–"]];
  const tabs = el("div", "tabs", ...names.map((each) => {
    const button = el("button", each === name ? "on" : "", each);
    button.onclick = () => { shownTab = each; remember(); showSample(i); };
    return button;
  }));
  const failure = text.failure ? [el("pre", "failure", ...safeText(text.failure))] : [];
  const noted = (notesOn().get(i) || []).map((note) => noteBlock(note, false));
  $("detail").replaceChildren(el("div", "kv", ...facts.map(([key, value]) => el("span", "", key + " ", el("b", "", String(value))))), ...failure, ...noted, tabs, body);
  $("tip").hidden = true;
}

function message(role, content, note) {
  const known = ["assistant", "tool", "user", "system"].includes(role) ? role : "";
  return el("div", "message " + known, el("b", "", el("span", "", ...safeText(role)), el("span", "", note || "")), textBlock(content));
}

async function conversation(i) {
  const text = await textOf(i);
  const parts = text.messages.map(([role, content, trained]) => message(role, content, role === "assistant" && !trained ? "not trained on" : ""));
  for (const [name, value] of text.extra) parts.push(el("div", "extra", el("b", "", name), textBlock(value)));
  return el("div", "", ...parts);
}

// Each scale: which column, its unit, colour, and how a value becomes 0 to 1.
const SCALES = {
  logprob: { label: "log-prob, engine", column: "engine", colour: "0,114,178", ends: ["0", "−5 nats"], level: (v) => -v / 5 },
  trainer: { label: "log-prob, trainer", column: "trainer", colour: "0,121,90", ends: ["0", "−5 nats"], level: (v) => -v / 5 },
  gap: { label: "gap, trainer − engine", column: "gap", colour: "213,94,0", ends: ["1e-6", "0.1 nats (log)"], level: (v) => (Math.log10(Math.abs(v) + 1e-12) + 6) / 5 },
  entropy: { label: "entropy", column: "entropy", colour: "130,70,170", ends: ["0", "2 nats"], level: (v) => v / 2 },
};
const FEW = 3000; // tokens shown at once

async function tokens(i) {
  const [data, vocabulary] = [await tokensOf(i), await block("vocabulary")];
  if (!data) return el("div", "empty", `This page has the tokens of some samples only. Those of this one: load_run(…).show(${index.index[i]}) in a notebook.`);
  const there = Object.keys(SCALES).filter((name) => data[SCALES[name].column]);
  if (!there.includes(heat) && there.length) heat = there[0];
  const choose = el("select", "", ...there.map((name) => { const o = el("option", "", SCALES[name].label); o.value = name; o.selected = name === heat; return o; }));
  choose.id = "heat";
  choose.onchange = () => { heat = choose.value; remember(); showSample(i); };
  const scale = SCALES[heat], ramp = el("span", "ramp");
  ramp.style.background = `linear-gradient(90deg, rgba(${scale.colour},0), rgba(${scale.colour},.75))`;
  const legend = el("div", "legend", choose, el("span", "", scale.ends[0], ramp, scale.ends[1]), el("span", "", "dim: not trained on (prompt, tools)"));
  const field = el("div", "tokens"), means = el("div", "kv", ...meansOf(data).map(([key, value]) => el("span", "", key + " ", el("b", "", num(value)))));
  const draw = (from, to) => { for (let p = from; p < to; p++) field.append(tokenSpan(data, vocabulary, p, there.length ? scale : null)); };
  draw(0, Math.min(FEW, data.ids.length));
  if (data.ids.length > FEW) {
    const more = el("button", "", `show all ${data.ids.length.toLocaleString("en")} tokens`);
    more.onclick = () => { more.remove(); draw(FEW, data.ids.length); };
    field.append(more);
  }
  field.onmousemove = (event) => tip(event, data, vocabulary);
  field.onmouseleave = () => { $("tip").hidden = true; };
  return el("div", "", legend, means, field);
}

// Means over the tokens that are trained on.
function meansOf(data) {
  const mean = (values, of) => {
    const known = values.filter((v, at) => v !== null && data.mask[at]);
    return known.length ? known.reduce((sum, v) => sum + of(v), 0) / known.length : null;
  };
  const rows = [["mean log-prob", "engine", (v) => v], ["mean |gap|", "gap", Math.abs], ["mean entropy", "entropy", (v) => v]];
  return rows.filter(([, column]) => data[column]).map(([label, column, of]) => [label, mean(data[column], of)]);
}

function tokenSpan(data, vocabulary, p, scale) {
  const at = p - data.start, id = data.ids[p], text = vocabulary[id] ?? `⟨${id}⟩`;
  const span = el("span", "t" + (at < 0 || !data.mask[at] ? " masked" : ""), ...safeText(text.replaceAll("\n", "⏎\n")));
  span.dataset.p = p;
  const value = scale && at >= 0 ? data[scale.column][at] : null;
  if (value !== null && value !== undefined) {
    span.style.backgroundColor = `rgba(${scale.colour},${(0.75 * Math.min(1, Math.max(0, scale.level(value)))).toFixed(3)})`;
  }
  return span;
}

function tip(event, data, vocabulary) {
  const span = event.target.closest(".t"), box = $("tip");
  if (!span) { box.hidden = true; return; }
  const p = Number(span.dataset.p), at = p - data.start;
  const lines = [`token ${p}   id ${data.ids[p]}   ${JSON.stringify(vocabulary[data.ids[p]] ?? null)}`];
  for (const { label, column } of Object.values(SCALES)) if (at >= 0 && data[column]) lines.push(`${label}: ${num(data[column][at], 5)}`);
  if (at >= 0 && data.advantage) lines.push(`advantage: ${num(data.advantage[at], 5)}`);
  lines.push(at < 0 ? "prompt" : data.mask[at] ? "trained on" : "not trained on");
  box.replaceChildren(...safeText(lines.join("\n")));
  box.hidden = false;
  box.style.left = Math.min(event.clientX + 14, innerWidth - box.offsetWidth - 8) + "px";
  box.style.top = Math.min(event.clientY + 18, innerHeight - box.offsetHeight - 8) + "px";
}

async function group(i) {
  const same = index.step.map((_, j) => j).filter((j) => index.group[j] === index.group[i] && index.step[j] === index.step[i] && index.dataset[j] === index.dataset[i]);
  same.sort((a, b) => (index.reward[b] ?? -Infinity) - (index.reward[a] ?? -Infinity));
  const cards = same.slice(0, 64).map(async (j) => {
    const text = await textOf(j), said = text.messages.slice(text.prompt).map(([role, content]) => (role === "assistant" ? "" : `[${role}] `) + content).join("\n");
    const card = el("div", "card" + (j === i ? " on" : ""), el("b", "", badge(index.reward[j]), el("span", "", `advantage ${num(index.advantage[j])} · ${index.length[j]} tokens`)), textBlock(said));
    card.onclick = () => { if (!String(getSelection())) select(j); };
    return card;
  });
  const first = await textOf(i);
  const prompt = first.messages.slice(0, first.prompt).map(([role, content]) => message(role, content));
  return el("div", "", ...prompt, el("div", "group", ...(await Promise.all(cards))));
}

// The samples of one session of an agent are neighbours with the same rollout; the first of them has its record.
function ofSession(i) {
  if (index.rollout[i] === null) return [i];
  const same = (j) => index.rollout[j] === index.rollout[i] && index.step[j] === index.step[i] && index.dataset[j] === index.dataset[i];
  let first = i, last = i;
  while (first > 0 && same(first - 1)) first--;
  while (last + 1 < index.step.length && same(last + 1)) last++;
  return Array.from({ length: last - first + 1 }, (_, k) => first + k);
}

async function sessionOf(i) {
  const members = ofSession(i), own = (await textOf(members[0])).session;
  return own ? { ...own, members } : null;
}

const sessionWords = (session) => (session ? [session.id, ...session.turns.flatMap((turn) => turn[7]), ...session.events.map((event) => event[2])] : []);
const seconds = (value) => (value < 10 ? value.toFixed(2) : value.toFixed(1)) + " s";

async function session(i) {
  const found = await sessionOf(i), whole = Math.max(1e-9, ...found.turns.map((turn) => turn[8] + turn[9]));
  const heads = [["session", found.id], ["turns", found.turns.length], ["samples", found.members.length], ["time", seconds(whole)]];
  const turns = found.turns.map(([number, depth, origin, from, added, sampled, finish, tools, began, took, sample]) => {
    const at = sample === null ? undefined : found.members[sample], bar = el("span", "when", el("i"));
    bar.title = `${seconds(began)} after the start, for ${seconds(took)}`;
    bar.firstChild.style.left = (100 * began) / whole + "%";
    bar.firstChild.style.width = Math.max(1, (100 * took) / whole) + "%";
    const trained = at === undefined ? el("span", "untrained", "not trained on") : at === i ? el("b", "", "this sample") : el("button", "", `sample ${index.index[at]}`);
    if (at !== undefined && at !== i) trained.onclick = () => select(at);
    const item = el("li", "", el("span", "turn", el("b", "", `turn ${number}`), el("span", "tag", ...safeText(from === null ? origin : `${origin} of ${from}`)), ...tools.map((tool) => el("span", "tag call", ...safeText(tool))), trained),
      el("span", "muted", `${added.toLocaleString("en")} tokens added, ${sampled.toLocaleString("en")} sampled, ${seconds(took)}, `, ...safeText(finish)), bar);
    item.style.marginLeft = Math.min(depth, 8) * 18 + "px";
    return item;
  });
  const events = found.events.map(([when, kind, message]) => el("div", "finding warning", el("b", "", ...safeText(kind)), ` at ${when} s: `, ...safeText(message)));
  return el("div", "", el("div", "kv", ...heads.map(([key, value]) => el("span", "", key + " ", el("b", "", ...safeText(String(value)))))), el("ol", "turns", ...turns), ...events);
}

const TABS = { conversation, tokens, group, session };
