"use strict";
// Small line charts as SVG, of series {label, colour, x, y, dots}.
function svg(tag, attributes, text) {
  const node = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  if (text !== undefined) node.textContent = text;
  return node;
}

// Round numbers from `low` or less to `high` or more, three to five of them.
function niceTicks(low, high) {
  const span = high - low || 1, power = 10 ** Math.floor(Math.log10(span / 2));
  const step = [1, 2, 5, 10].map((m) => m * power).find((s) => span / s <= 4);
  const first = Math.floor(low / step), last = Math.max(Math.ceil(high / step - 1e-9), first + 1);
  return Array.from({ length: last - first + 1 }, (_, i) => Number(((first + i) * step).toPrecision(12)));
}

function chart(title, series, marks) {
  const points = series.flatMap((s) => s.x.map((x, i) => [x, s.y[i]]));
  if (!points.length) return null;
  const width = 420, height = 150, left = 40, right = 8, top = 8, bottom = 20;
  const ends = (k) => points.reduce(([low, high], p) => [Math.min(low, p[k]), Math.max(high, p[k])], [Infinity, -Infinity]);
  const [x0, xLast] = ends(0), [low, high] = ends(1), x1 = Math.max(xLast, x0 + 1), ticks = niceTicks(Math.min(0, low), high);
  const y0 = ticks[0], y1 = ticks[ticks.length - 1];
  const px = (x) => left + ((x - x0) / (x1 - x0)) * (width - left - right);
  const py = (y) => height - bottom - ((y - y0) / (y1 - y0)) * (height - top - bottom);
  const picture = svg("svg", { viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": title });
  for (const y of ticks) {
    picture.append(svg("line", { x1: left, x2: width - right, y1: py(y), y2: py(y), class: "grid" }));
    picture.append(svg("text", { x: left - 5, y: py(y) + 3, "text-anchor": "end" }, num(y)));
  }
  for (const x of [x0, x1]) {
    picture.append(svg("text", { x: px(x), y: height - 6, "text-anchor": x === x0 ? "start" : "end" }, `step ${x}`));
  }
  for (const mark of marks) {
    picture.append(svg("line", { x1: px(mark.x), x2: px(mark.x), y1: top, y2: height - bottom, class: "mark", "stroke-dasharray": "2 3" }));
    picture.append(svg("text", { x: px(mark.x) + 4, y: top + 8 }, mark.label));
  }
  for (const s of series) {
    const path = s.x.map((x, i) => `${i ? "L" : "M"}${px(x).toFixed(1)},${py(s.y[i]).toFixed(1)}`).join("");
    picture.append(svg("path", { d: path, fill: "none", stroke: s.colour, "stroke-width": 1.8 }));
    if (s.dots) s.x.forEach((x, i) => picture.append(svg("circle", { cx: px(x), cy: py(s.y[i]), r: 3, fill: s.colour })));
  }
  const names = series.map((s) => { const b = el("span", "", "— " + s.label + "  "); b.style.color = s.colour; b.style.fontWeight = 400; return b; });
  return el("div", "chart", el("h2", "", title + "  ", ...names), picture);
}
