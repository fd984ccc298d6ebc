"use strict";
// D: the run as columns (see report_html.py). Everything shown is one leg of it: `view`.
const D = JSON.parse(document.getElementById("data").textContent);
const R = D.rows, S = D.strings;
const $ = id => document.getElementById(id);
const view = {};
const browse = { editor: -1, probe: -1, failed: false, text: "", cases: [], at: 0 };

function node(tag, attributes = {}, ...children) {
  const svg = ["svg", "g", "path", "line", "text", "circle", "rect"].includes(tag);
  const made = svg ? document.createElementNS("http://www.w3.org/2000/svg", tag) : document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) made.addEventListener(name.slice(2), value);
    else if (value !== null && value !== false) made.setAttribute(name, value);
  }
  made.append(...children.filter(child => child !== null && child !== undefined));
  return made;
}
const percent = (value, places = 1) => value === null || value === undefined ? "–" : (100 * value).toFixed(places);
const color = editor => `var(--c${editor % 8})`;
const probeOf = index => D.probes[index];
const legKey = leg => [leg.model, leg.protocol, leg.evaluated_at, leg.gap, leg.scorer].join("|");

// ------------------------------------------------------------------ marks and tips
const SHAPES = [
  r => `M${-r} 0a${r} ${r} 0 1 0 ${2 * r} 0a${r} ${r} 0 1 0 ${-2 * r} 0`,
  r => `M${-r} ${-r}h${2 * r}v${2 * r}h${-2 * r}z`,
  r => `M0 ${-1.25 * r}L${1.15 * r} ${0.85 * r}H${-1.15 * r}z`,
  r => `M0 ${-1.35 * r}L${1.35 * r} 0L0 ${1.35 * r}L${-1.35 * r} 0z`,
];
function mark(editor, x, y, { hollow = false, r = 6, tip = "" } = {}) {
  const shape = SHAPES[(editor + Math.floor(editor / 8)) % 4](r);
  return hover(node("path", {
    d: shape, transform: `translate(${x} ${y})`, stroke: hollow ? color(editor) : "var(--card)",
    "stroke-width": hollow ? 2 : 1.5, fill: hollow ? "var(--card)" : color(editor),
  }), tip);
}
function hover(made, tip) {
  if (!tip) return made;
  made.addEventListener("pointermove", event => {
    const box = $("tip");
    box.textContent = tip;
    box.hidden = false;
    box.style.left = Math.min(event.clientX + 14, innerWidth - box.offsetWidth - 8) + "px";
    box.style.top = event.clientY + 16 + "px";
  });
  made.addEventListener("pointerleave", () => { $("tip").hidden = true; });
  return made;
}
function key(editor) {
  const svg = node("svg", { class: "key", viewBox: "-8 -8 16 16" }, mark(editor, 0, 0));
  svg.style.width = svg.style.height = "12px";
  svg.style.display = "inline-block";
  return svg;
}
const range = score => score && score.count ? `${percent(score.mean)}  [${percent(score.low)}, ${percent(score.high)}]  n=${score.count}` : "not asked";

// ------------------------------------------------------------------ the leg in view
function leg() { return D.legs.find(one => legKey(one) === legKey(view)); }
function lines() { return leg() ? leg().editors : []; }
function meanOf(line, names) {
  const found = names.map(name => line.probes[name]).filter(cell => cell && cell.score.count);
  if (!found.length) return null;
  const mean = part => found.reduce((sum, cell) => sum + cell.score[part], 0) / found.length;
  return { mean: mean("mean"), low: mean("low"), high: mean("high"), count: found[0].score.count };
}
const FAMILIES = {
  reliability: name => ["reliability", "text_reliability", "image_reliability"].includes(name),
  generality: name => name === "rephrase" || name === "image_rephrase",
  locality: name => name.includes("locality"),
};
const family = (line, which) => meanOf(line, Object.keys(line.probes).filter(FAMILIES[which]));

function controls() {
  const fields = [
    ["model", () => "Model", one => one], ["protocol", () => "Protocol", one => one],
    ["evaluated_at", () => "Asked", (one, row) => ({ after_edit: "right after the edit", end: "after all edits", after_length: "after so many edits" }[one] || one)],
    ["gap", () => view.evaluated_at === "after_length" ? "Edits made" : "Edits later", one => one], ["scorer", () => "Scorer", one => one],
  ];
  const bar = $("controls");
  bar.replaceChildren();
  let left = D.legs;
  for (const [field, title, show] of fields) {
    const values = [...new Set(left.map(one => one[field]))];
    if (!values.includes(view[field])) view[field] = values.includes("end") ? "end" : view.evaluated_at === "after_length" ? values.at(-1) : values[0];
    left = left.filter(one => one[field] === view[field]);
    if (values.length < 2) continue;
    const menu = node("select", { onchange: event => { view[field] = values[event.target.selectedIndex]; draw(); } },
      ...values.map(value => node("option", { selected: value === view[field] ? "" : null }, String(show(value)))));
    bar.append(node("label", {}, title(), menu));
  }
  bar.hidden = !bar.children.length;
  const counts = [...new Set(lines().map(line => line.cases))];
  $("facts").textContent = [view.model, view.protocol, `scorer ${view.scorer}`, `${counts.join("–")} cases`, ...D.facts].join("  ·  ");
}

// ------------------------------------------------------------------ charts
function frame(width, height, pad, x, y, titles) {
  const svg = node("svg", { viewBox: `0 0 ${width} ${height}`, role: "img" });
  const px = v => pad.left + (v - x.min) / (x.max - x.min || 1) * (width - pad.left - pad.right);
  const py = v => height - pad.bottom - (v - y.min) / (y.max - y.min || 1) * (height - pad.top - pad.bottom);
  for (const v of x.ticks) svg.append(
    node("line", { class: "grid", x1: px(v), x2: px(v), y1: pad.top, y2: height - pad.bottom }),
    node("text", { x: px(v), y: height - pad.bottom + 17, "text-anchor": "middle" }, x.show(v)));
  for (const v of y.ticks) svg.append(
    node("line", { class: "grid", x1: pad.left, x2: width - pad.right, y1: py(v), y2: py(v) }),
    node("text", { x: pad.left - 8, y: py(v) + 4, "text-anchor": "end" }, y.show(v)));
  if (titles.x) svg.append(node("text", { x: width - pad.right, y: height - 4, "text-anchor": "end" }, titles.x));
  if (titles.y) svg.append(node("text", { x: pad.left - 34, y: pad.top - 12 }, titles.y));
  return { svg, px, py };
}
const share = low => ({ min: low, max: 1, ticks: [0, .2, .4, .6, .8, 1].filter(v => v >= low - 1e-9), show: v => String(Math.round(100 * v)) });

function tradeoff() {
  const points = lines().map(line => ({
    line, editor: D.editors.indexOf(line.editor),
    x: family(line, "locality"), y: family(line, "reliability"), z: family(line, "generality"),
  })).filter(point => point.x && (point.y || point.z));
  const plot = $("tradeoff").querySelector(".plot");
  if (!points.length) return plot.replaceChildren(node("p", { class: "none" }, "No locality was asked."));
  const lowest = Math.min(...points.map(point => point.x.low));
  const left = lowest > .82 ? .8 : lowest > .62 ? .6 : lowest > .42 ? .4 : 0;
  const { svg, px, py } = frame(620, 470, { left: 44, right: 64, top: 30, bottom: 42 }, share(left), share(0),
    { x: "Locality, % unchanged →", y: "↑ Success, %" });
  const labels = [];
  for (const { line, editor, x, y, z } of points) {
    const at = px(x.mean), both = [y, z].filter(Boolean);
    const strokes = { stroke: color(editor), "stroke-width": 1.5, opacity: .55 };
    svg.append(node("line", { ...strokes, x1: at, x2: at, y1: py(both[0].mean), y2: py(both.at(-1).mean), "stroke-dasharray": "2 3" }));
    svg.append(node("line", { ...strokes, x1: px(Math.max(left, x.low)), x2: px(x.high), y1: py(both[0].mean), y2: py(both[0].mean) }));
    for (const score of both) svg.append(node("line", { ...strokes, x1: at, x2: at, y1: py(score.low), y2: py(score.high) }));
    const tip = `${line.editor}\nreliability ${range(y)}\ngenerality ${range(z)}\nlocality ${range(x)}`;
    if (z) svg.append(mark(editor, at, py(z.mean), { hollow: true, tip }));
    if (y) svg.append(mark(editor, at, py(y.mean), { tip }));
    labels.push({ x: at, y: py(both[0].mean), text: line.editor });
  }
  spread(labels, 30, 428);
  for (const label of labels) {
    const end = label.x > 500;
    svg.append(node("text", { class: "name", x: label.x + (end ? -11 : 11), y: label.y + 4, "text-anchor": end ? "end" : "start" }, label.text));
  }
  plot.replaceChildren(svg);
}
// Labels that would lie on one another are pushed apart, in reading order, inside [top, bottom].
function spread(labels, top, bottom) {
  labels.sort((one, two) => one.y - two.y);
  const near = (one, two) => Math.abs(one.x - two.x) < 90;
  for (let i = 0; i < labels.length; i++) {
    labels[i].y = Math.max(labels[i].y, top);
    for (let j = 0; j < i; j++) if (near(labels[i], labels[j])) labels[i].y = Math.max(labels[i].y, labels[j].y + 15);
  }
  for (let i = labels.length - 1; i >= 0; i--) {
    labels[i].y = Math.min(labels[i].y, bottom);
    for (let j = i + 1; j < labels.length; j++) if (near(labels[i], labels[j])) labels[i].y = Math.min(labels[i].y, labels[j].y - 15);
  }
}

function profile() {
  const names = D.probes.map(one => one.key).filter(name => lines().some(line => line.probes[name]));
  const editors = lines().map(line => D.editors.indexOf(line.editor));
  const step = Math.max(34, 11 * editors.length + 14), height = 40 + step * names.length + 30;
  const { svg, px } = frame(620, height, { left: 150, right: 20, top: 14, bottom: 34 }, share(0),
    { min: 0, max: 1, ticks: [], show: String }, { x: "%", y: "" });
  names.forEach((name, row) => {
    const top = 18 + row * step, middle = top + step / 2 - 4;
    if (row) svg.append(node("line", { class: "grid", x1: 0, x2: 600, y1: top - 4, y2: top - 4 }));
    svg.append(node("text", { class: "name", x: 0, y: middle + 4 }, D.probes.find(one => one.key === name).title));
    const base = lines().map(line => line.probes[name]).find(Boolean);
    if (base && base.base && !name.includes("locality"))
      svg.append(hover(node("line", { x1: px(base.base.mean), x2: px(base.base.mean), y1: top, y2: top + step - 10, stroke: "var(--mute)", "stroke-width": 2 }), `unedited model: ${range(base.base)}`));
    lines().forEach((line, place) => {
      const cell = line.probes[name];
      if (!cell || !cell.score.count) return;
      const y = top + 4 + (step - 14) * (place + .5) / editors.length, editor = editors[place];
      svg.append(node("line", { x1: px(cell.score.low), x2: px(cell.score.high), y1: y, y2: y, stroke: color(editor), "stroke-width": 2, opacity: .5 }));
      svg.append(mark(editor, px(cell.score.mean), y, { r: 4.5, tip: `${line.editor}, ${name}\n${range(cell.score)}` }));
    });
  });
  const legend = node("p", { class: "hint" });
  lines().forEach((line, place) => legend.append(key(editors[place]), `${line.editor}  `));
  $("profile").querySelector(".plot").replaceChildren(legend, svg);
}

const AXES = {
  length: ["edits made; these are asked", " after so many edits"],
  position: ["edits made, asked right after each", ", right after each edit"],
  age: ["edits made since", ", as later edits come"],
};

function lifelong() {
  const mine = D.curves.filter(one => one.model === view.model && one.protocol === view.protocol && one.scorer === view.scorer);
  $("lifelong").hidden = !mine.length;
  const box = $("lifelong").querySelector(".curves");
  box.replaceChildren();
  for (const axis of ["length", "position", "age"]) for (const which of ["reliability", "generality", "locality", "portability"]) {
    const chosen = mine.filter(one => one.axis === axis && one.family === which);
    if (!chosen.length) continue;
    const xs = chosen.flatMap(one => one.points.map(point => point[0]));
    const most = Math.max(...xs, 1), least = Math.min(...xs);
    const log = axis === "length" && most > 20, at = log ? Math.log10 : Number;
    const ticks = axis === "length" ? [...new Set(xs)] : [...new Set([least, Math.round((least + most) / 2), most])];
    const x = { min: at(least), max: at(most), ticks: ticks.map(at), show: value => String(log ? Math.round(10 ** value) : value) };
    const { svg, px, py } = frame(400, 240, { left: 36, right: 78, top: 12, bottom: 40 }, x, share(0),
      { x: AXES[axis][0], y: "" });
    const labels = [];
    for (const curve of chosen) {
      const editor = D.editors.indexOf(curve.editor), pts = curve.points;
      const band = [...pts.map(p => `${px(at(p[0]))} ${py(p[3])}`), ...[...pts].reverse().map(p => `${px(at(p[0]))} ${py(p[2])}`)];
      if (chosen.length < 5) svg.append(node("path", { d: `M${band.join("L")}z`, fill: color(editor), opacity: .12 }));
      svg.append(node("path", { d: `M${pts.map(p => `${px(at(p[0]))} ${py(p[1])}`).join("L")}`, fill: "none", stroke: color(editor), "stroke-width": 2 }));
      for (const p of pts) svg.append(mark(editor, px(at(p[0])), py(p[1]), { r: 3.5, tip: `${curve.editor}\n${p[0]} edits: ${percent(p[1])} [${percent(p[2])}, ${percent(p[3])}]  n=${p[4]}` }));
      labels.push({ x: 0, y: py(pts.at(-1)[1]), text: curve.editor });
    }
    spread(labels, 14, 198);
    for (const label of labels) svg.append(node("text", { class: "name", x: 329, y: label.y + 4 }, label.text));
    const title = which[0].toUpperCase() + which.slice(1) + AXES[axis][1];
    box.append(node("div", {}, node("h3", {}, title), svg));
  }
}

// ------------------------------------------------------------------ numbers
function numbers() {
  const names = D.probes.map(one => one.key).filter(name => lines().some(line => line.probes[name]));
  const table = $("numbers").querySelector("table");
  const short = name => D.probes.find(one => one.key === name).column;
  const row = (kind, first, cells) => node("tr", { class: kind }, node("td", {}, ...[].concat(first)), ...cells);
  const body = [node("tr", {}, node("th", {}, ""), ...names.map(name => hover(node("th", {}, short(name)), name)))];
  const cells = name => lines().map(line => line.probes[name]).filter(Boolean);
  body.push(row("base", "unedited", names.map(name =>
    name.includes("locality") ? node("td", {}, "100.0") : hover(node("td", {}, cells(name)[0].base ? percent(cells(name)[0].base.mean) : "–"), range(cells(name)[0].base)))));
  const best = Object.fromEntries(names.map(name => [name, Math.max(...cells(name).map(cell => cell.score.count ? cell.score.mean : -1))]));
  for (const line of lines()) {
    const editor = D.editors.indexOf(line.editor);
    body.push(row("", [key(editor), line.editor], names.map(name => {
      const cell = line.probes[name];
      if (!cell || !cell.score.count) return node("td", {}, "–");
      const half = (cell.score.high - cell.score.low) / 2;
      return hover(node("td", { class: lines().length > 1 && cell.score.mean === best[name] ? "best" : "" }, percent(cell.score.mean), node("small", {}, `±${percent(half)}`)), range(cell.score));
    })));
    const plain = (value, places) => value.toFixed(places);
    for (const [label, field, show] of [
      ["all tokens right", "exact_match", percent],
      [names.every(name => name.includes("locality")) ? "says the same, generating freely" : "says it (locality: the same), generating freely", "generation_match", percent],
      ["KL(unedited || edited), nats", "kl", value => plain(value, 3)], ["perplexity of the answer", "ppl", value => plain(value, 2)],
      ["PPL_r", "ppl_r", value => plain(value, 2)], ["fluency, ×100", "fluency", percent],
    ])
      if (names.some(name => line.probes[name] && line.probes[name][field]))
        body.push(row("more", label, names.map(name => {
          const found = line.probes[name] && line.probes[name][field];
          if (!found) return node("td", {}, "");
          return hover(node("td", {}, show(found.mean)), `[${show(found.low)}, ${show(found.high)}]  n=${found.count}`);
        })));
  }
  const costs = D.costs.filter(one => one.model === view.model && one.protocol === view.protocol);
  if (costs.length) {
    body[0].append(node("th", {}, "s / edit"), node("th", {}, "peak MB"));
    for (const tr of body.slice(1)) {
      const one = tr.className === "" && costs.find(cost => tr.firstChild.textContent === cost.editor);
      const spent = node("td", {}, one && one.seconds !== null ? one.seconds.toFixed(2) : "");
      tr.append(one && one.where ? hover(spent, one.where) : spent, node("td", {}, one ? Math.round(one.peak / 1e6) : ""));
    }
  }
  const quoted = D.published.filter(one => one.scorer === view.scorer && one.protocol === view.protocol && one.here === view.model);
  for (const one of quoted) body.push(row("quoted", `${one.method}, quoted: ${one.source}`, names.map(name =>
    node("td", {}, one.values[name] === undefined ? "–" : (one.exact_match[name] === undefined ? "" : one.exact_match[name].toFixed(2) + " / ") + one.values[name].toFixed(2)))));
  table.replaceChildren(...body);
  const elsewhere = [...new Set(D.published.filter(one => one.here === view.model).map(one => one.scorer))].filter(one => one !== view.scorer);
  $("numbers-hint").textContent = "Percent, mean over cases ± half its 95% bootstrap interval." + (lines().length > 1 ? " The best of a column is bold. " : " ")
    + (quoted.length ? "Lines in italics are quoted from the paper named (exact match / accuracy), not run here. " : "")
    + (!quoted.length && elsewhere.length ? `Published numbers of this setting are under scorer ${elsewhere.join(", ")}.` : "");
}

// ------------------------------------------------------------------ cases
const failed = i => D.probes[R.probe[i]].kind === "locality" ? score(i) !== null && score(i) < 1 - 1e-6 : !R.aexact[i];
const score = i => { const v = R.scores[i][D.scorers.indexOf(view.scorer)]; return v === null || v === undefined ? null : v / 10000; };
function rowsInView() {
  const found = new Map();
  const [model, protocol, evaluatedAt] = [D.models.indexOf(view.model), D.protocols.indexOf(view.protocol), D.evaluated_at_values.indexOf(view.evaluated_at)];
  for (let i = 0; i < R.case.length; i++) {
    if (R.model[i] !== model || R.protocol[i] !== protocol || R.evaluated_at[i] !== evaluatedAt) continue;
    if (["after_gap", "after_length"].includes(view.evaluated_at) && R.gap[i] !== view.gap) continue;
    const list = found.get(R.case[i]);
    if (list) list.push(i); else found.set(R.case[i], [i]);
  }
  return found;
}
let inView = new Map();
function filters() {
  const all = (title, values, now, pick) => node("label", {}, title, node("select", { onchange: event => { pick(event.target.selectedIndex - 1); refill(); } },
    node("option", {}, "any"), ...values.map((value, i) => node("option", { selected: i === now ? "" : null }, value))));
  const box = node("input", { type: "checkbox", onchange: event => { browse.failed = event.target.checked; refill(); } });
  box.checked = browse.failed;
  const words = node("input", { type: "search", placeholder: "Search questions and answers", value: browse.text, oninput: event => { browse.text = event.target.value.toLowerCase(); refill(); } });
  $("filters").replaceChildren(words, node("label", {}, box, "only failures"),
    all("of", D.editors, browse.editor, i => { browse.editor = i; }),
    all("on", D.probes.map(one => one.title), browse.probe, i => { browse.probe = i; }), node("output", { id: "found" }));
}
function refill() {
  const wanted = i => (browse.editor < 0 || R.editor[i] === browse.editor) && (browse.probe < 0 || R.probe[i] === browse.probe);
  const spoken = i => `${D.cases[R.case[i]]} ${S[R.prompt[i]]} ${S[R.target[i]]} ${S[R.atext[i]]}`.toLowerCase().includes(browse.text);
  browse.cases = [...inView.keys()].filter(one => {
    const rows = inView.get(one);
    return rows.some(i => wanted(i) && (!browse.failed || failed(i))) && (!browse.text || rows.some(spoken));
  });
  $("found").textContent = `${browse.cases.length} of ${inView.size} cases`;
  $("spacer").style.height = browse.cases.length * 52 + "px";
  browse.at = Math.max(0, Math.min(browse.at, browse.cases.length - 1));
  $("list").scrollTop = Math.min($("list").scrollTop, browse.cases.length * 52);
  listed();
  detail();
}
const asked = (rows, name) => rows.filter(i => D.probes[R.probe[i]].key === name);
function headline(rows) {
  for (const name of ["reliability", "image_reliability", "text_reliability"]) { const found = asked(rows, name); if (found.length) return found; }
  return rows.slice(0, 1);
}
// Only the items inside the scrolled window are in the document.
function listed() {
  const list = $("list"), first = Math.max(0, Math.floor(list.scrollTop / 52) - 4), last = Math.min(browse.cases.length, first + Math.ceil(list.clientHeight / 52) + 9);
  list.querySelectorAll(".item, .none").forEach(one => one.remove());
  if (!browse.cases.length) list.append(node("p", { class: "none" }, "No case like that."));
  for (let at = first; at < last; at++) {
    const rows = inView.get(browse.cases[at]), top = headline(rows), one = top[0];
    const marks = node("span", { class: "marks" });
    for (const line of lines()) {
      const editor = D.editors.indexOf(line.editor), i = top.find(row => R.editor[row] === editor);
      if (i !== undefined) marks.append(node("span", { class: failed(i) ? "no" : "yes", title: line.editor }, failed(i) ? "✕" : "✓"));
    }
    const item = node("div", { class: "item", role: "option", "aria-selected": String(at === browse.at), onclick: () => { browse.at = at; listed(); detail(); } },
      node("div", { class: "line" }, node("span", {}, S[R.prompt[one]]), marks),
      node("div", { class: "sub" }, `${S[R.btext[one]]} → ${S[R.target[one]]}  ·  ${D.cases[R.case[one]]}`));
    item.style.top = at * 52 + "px";
    list.append(item);
  }
}
function picture(index, size) {
  const data = D.images[index];
  return data ? node("img", { src: data, alt: "", loading: "lazy", class: size }) : null;
}
function detail() {
  const rows = inView.get(browse.cases[browse.at]) || [], box = $("detail");
  if (!rows.length) return box.replaceChildren();
  const one = headline(rows)[0], shown = R.images[one].map(index => picture(index)).filter(Boolean);
  const without = R.images[one].length && !shown.length ? node("p", { class: "hint" }, "Its picture was not kept: raise `num_thumbnails` in the settings.") : null;
  const top = node("div", { class: "request" }, ...shown.slice(0, 4),
    node("div", {}, node("div", { class: "hint" }, D.cases[R.case[one]]), node("div", { class: "said" }, S[R.prompt[one]]),
      node("div", {}, node("s", { class: "want" }, S[R.btext[one]]), node("span", { class: "to" }, "→"), node("strong", {}, S[R.target[one]])), without));
  const editors = [...new Set(rows.map(i => R.editor[i]))].sort((a, b) => a - b);
  const head = node("tr", {}, node("th", {}, "asked"), node("th", {}, "before"), ...editors.map(editor => node("th", {}, key(editor), D.editors[editor])));
  const questions = new Map();
  for (const i of rows) {
    const name = [R.probe[i], R.index[i], R.seed[i], R.gap[i]].join();
    if (!questions.has(name)) questions.set(name, []);
    questions.get(name).push(i);
  }
  let last = -1;
  const body = [...questions.values()].sort((a, b) => R.probe[a[0]] - R.probe[b[0]] || R.index[a[0]] - R.index[b[0]]).map(group => {
    const i = group[0], probe = D.probes[R.probe[i]], fresh = R.probe[i] !== last;
    last = R.probe[i];
    const pictures = R.images[i].filter(index => !R.images[one].includes(index)).map(index => picture(index)).filter(Boolean);
    const first = node("td", {}, fresh ? node("div", { class: "probe" }, probe.title) : null, S[R.prompt[i]],
      node("div", { class: "want" }, "→ ", S[R.target[i]]), pictures.length ? node("div", { class: "pics" }, ...pictures) : null);
    const spoken = (text, said, kind, tip) => node("td", {}, hover(node("span", { class: "answer " + kind }, S[text] || "∅"), S[text].length > 60 ? `${S[text]}\n${tip}` : tip),
      said >= 0 ? node("div", { class: "gen" }, "says “", S[said], "”") : null);
    return node("tr", { class: fresh ? "first" : "" }, first, spoken(R.btext[i], R.bsaid[i], "", "the unedited model's likeliest tokens at the answer"),
      ...editors.map(editor => {
        const row = group.find(j => R.editor[j] === editor);
        if (row === undefined) return node("td", {}, "");
        const bad = failed(row), value = score(row);
        return spoken(R.atext[row], R.asaid[row], bad ? "no" : "yes", `${probe.kind === "locality" ? "agrees with the unedited model" : "success"}: ${percent(value)}%`);
      }));
  });
  box.replaceChildren(top, node("table", { class: "asked" }, head, ...body));
  box.scrollTop = 0;
}

// ------------------------------------------------------------------ all of it
function draw() {
  controls(); tradeoff(); profile(); numbers(); lifelong();
  inView = rowsInView();
  filters(); refill();
}
$("list").addEventListener("scroll", listed);
$("list").addEventListener("keydown", event => {
  const by = { ArrowDown: 1, ArrowUp: -1, PageDown: 10, PageUp: -10 }[event.key];
  if (!by) return;
  event.preventDefault();
  browse.at = Math.max(0, Math.min(browse.cases.length - 1, browse.at + by));
  const top = browse.at * 52, list = $("list");
  if (top < list.scrollTop) list.scrollTop = top;
  if (top + 52 > list.scrollTop + list.clientHeight) list.scrollTop = top + 52 - list.clientHeight;
  listed(); detail();
});
$("theme").addEventListener("click", () => {
  const root = document.documentElement, dark = root.dataset.theme ? root.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
  root.dataset.theme = dark ? "light" : "dark";
});
$("footer").textContent = D.footer;
draw();
