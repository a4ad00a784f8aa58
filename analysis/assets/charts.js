"use strict";
// Small line charts as SVG, of series {label, colour, x, y, dots}.
function svg(tag, attributes, text) {
  const node = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  if (text !== undefined) node.textContent = text;
  return node;
}

function chart(title, series) {
  const points = series.flatMap((s) => s.x.map((x, i) => [x, s.y[i]]));
  if (!points.length) return null;
  const width = 420, height = 150, left = 40, right = 8, top = 8, bottom = 20;
  const xs = points.map((p) => p[0]), ys = points.map((p) => p[1]);
  const x0 = Math.min(...xs), x1 = Math.max(...xs, x0 + 1), y0 = Math.min(0, ...ys), y1 = Math.max(...ys, y0 + 1e-9);
  const px = (x) => left + ((x - x0) / (x1 - x0)) * (width - left - right);
  const py = (y) => height - bottom - ((y - y0) / (y1 - y0)) * (height - top - bottom);
  const picture = svg("svg", { viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": title });
  for (const y of [y0, (y0 + y1) / 2, y1]) {
    picture.append(svg("line", { x1: left, x2: width - right, y1: py(y), y2: py(y), stroke: "#e2e6ec" }));
    picture.append(svg("text", { x: left - 5, y: py(y) + 3, "text-anchor": "end" }, num(y)));
  }
  for (const x of [x0, x1]) {
    picture.append(svg("text", { x: px(x), y: height - 6, "text-anchor": x === x0 ? "start" : "end" }, `step ${x}`));
  }
  for (const s of series) {
    const path = s.x.map((x, i) => `${i ? "L" : "M"}${px(x).toFixed(1)},${py(s.y[i]).toFixed(1)}`).join("");
    picture.append(svg("path", { d: path, fill: "none", stroke: s.colour, "stroke-width": 1.8 }));
    if (s.dots) s.x.forEach((x, i) => picture.append(svg("circle", { cx: px(x), cy: py(s.y[i]), r: 3, fill: s.colour })));
  }
  const names = series.map((s) => { const b = el("span", "", "— " + s.label + "  "); b.style.color = s.colour; b.style.fontWeight = 400; return b; });
  return el("div", "chart", el("h2", "", title + "  ", ...names), picture);
}
