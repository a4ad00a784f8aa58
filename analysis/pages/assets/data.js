"use strict";
// Data lies in the page as gzip in base64, so no text of a model is ever parsed as markup. Read block by block.
// The page of a server has none of it: there a block is fetched, of the moment that `mark` names.
let mark;
const $ = (id) => document.getElementById(id);

async function unpack(id) {
  if (!$(id)) {
    const answer = await fetch("blocks/" + id + (mark ? "?mark=" + mark : ""));
    if (!answer.ok) throw new Error(await answer.text());
    return answer.json();
  }
  const raw = atob($(id).textContent), bytes = new Uint8Array(raw.length);
  for (let i = 0; i < raw.length; i++) bytes[i] = raw.charCodeAt(i);
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
  return JSON.parse(await new Response(stream).text());
}

const blocks = new Map();
function block(id) {
  if (!blocks.has(id)) blocks.set(id, unpack(id));
  return blocks.get(id);
}

// Elements are made with textContent only: el("b", "class", "text", child, …).
function el(tag, className, ...children) {
  const node = document.createElement(tag);
  if (className) node.className = className;
  node.append(...children.filter((child) => child !== null && child !== undefined));
  return node;
}

// Characters that cannot be seen or that reorder the text around them, and halves of characters.
const CONTROL = /[\u0000-\u0008\u000b-\u001f\u007f-\u009f\u00ad\u061c\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff]|[\ud800-\udbff](?![\udc00-\udfff])|(?<![\ud800-\udbff])[\udc00-\udfff]/g;

function safeText(text) {
  const parts = [];
  let last = 0;
  for (const match of text.matchAll(CONTROL)) {
    if (match.index > last) parts.push(text.slice(last, match.index));
    const code = match[0].codePointAt(0).toString(16).toUpperCase().padStart(4, "0");
    parts.push(el("span", "ctl", "U+" + code));
    last = match.index + match[0].length;
  }
  if (last < text.length) parts.push(text.slice(last));
  return parts;
}

const LONG = 20000; // characters: more in one go makes a browser slow
function textBlock(text) {
  const pre = el("pre", "", ...safeText(text.slice(0, LONG)));
  if (text.length > LONG) {
    const more = el("button", "", `show all ${text.length.toLocaleString("en")} characters`);
    more.onclick = () => pre.replaceChildren(...safeText(text));
    pre.append(el("br"), more);
  }
  return pre;
}

function num(value, digits = 3) {
  if (value === null || value === undefined) return "–";
  const far = value !== 0 && (Math.abs(value) < 1e-3 || Math.abs(value) >= 1e5);
  return (far ? value.toExponential(1) : String(Number(value.toPrecision(digits)))).replaceAll("-", "−");
}
