"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const $ = (id) => document.getElementById(id);
const KINDS = ["same", "changed", "removed", "added"];
const MARKS = [" ", "~", "-", "+"];
function make(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [key, value] of Object.entries(attributes)) {
    if (key.startsWith("on")) element.addEventListener(key.slice(2), value);
    else element.setAttribute(key, value);
  }
  element.append(...children);
  return element;
}
function picture(svg) {
  const box = make("div");
  box.innerHTML = svg;
  return box;
}
const groupOf = (layer) => (layer.match(/^(.*?\.\d+)(?:\.|$)/) || [null, ""])[1];

// Names count up from layer to layer; numbers that are values stay.
const unnumbered = (text) => text.replace(/\b([A-Za-z_]\w*?)(_\d+)+\b/g, "$1");

function head() {
  document.querySelector("h1").textContent = data.model;
  const verdict = $("verdict");
  verdict.className = data.failure ? "bad" : "ok";
  verdict.textContent = data.failure ? "refused" : `converted: ${data.type}, ${data.sites.length} attention sites`;
  if (data.failure) {
    $("failure").hidden = false;
    $("failure").append(make("pre", {}, data.failure));
  }
}

function timeline() {
  const longest = Math.max(...data.passes.map((p) => p.ms || 0), 0.001);
  data.passes.forEach((pass, i) => {
    const bar = make("i");
    bar.style.width = `${(100 * (pass.ms || 0)) / longest}%`;
    const counts = pass.failed ? "failed" :
      `${pass.ms.toFixed(1)} ms · ${pass.matches} matches · ${pass.before} → ${pass.after} nodes`;
    $("timeline").append(make("button", { class: pass.failed ? "bar failed" : "bar", onclick: () => openPass(i) },
      make("span", {}, pass.name), make("span", {}, bar), make("span", { class: "dim" }, counts)));
  });
}

function sites() {
  if (!data.sites) return;
  const heads = ["#", "module", "heads/KV", "dims", "mask", "bias", "softcap", "sinks", "positions", "KV bytes/token"];
  const rows = data.sites.map((s) => [s.index, s.module, `${s.heads}/${s.kv_heads}`, `${s.key_dim}/${s.value_dim}`, s.mask,
    s.bias || "-", s.softcap || "-", s.sinks ? "yes" : "-", s.positions || "-", s.bytes_per_token]);
  const table = make("table", { class: "sites" }, make("tr", {}, ...heads.map((h) => make("th", {}, h))));
  rows.forEach((row, i) => table.append(make("tr", { title: data.sites[i].source }, ...row.map((c) => make("td", {}, String(c))))));
  const signature = make("table", { class: "sites" });
  data.signature.forEach((row) => signature.append(make("tr", {}, ...row.map((c) => make("td", {}, c)))));
  $("sites").append(make("h2", {}, "Attention sites"), make("div", { class: "scroll" }, table),
    make("p", { class: "dim" }, `${data.bytes_per_token} bytes of KV cache per token; context: ${data.context}; ` +
      `${data.local_values} values proved token-local`),
    make("p", { class: "dim" }, `compared with the eager model, run op by op: ${data.compared}`),
    make("details", {}, make("summary", {}, "signature of the tree program"), signature));
}

function masks() {
  if (!data.masks) return;
  const all = data.masks.map((mask) => {
    const scale = mask.step > 1 ? `, a cell is ${mask.step} tokens` : "";
    const figures = [make("figure", {}, picture(mask.svg), make("figcaption", {}, make("code", {}, mask.formula), scale))];
    if (mask.tree) figures.push(make("figure", {}, picture(mask.tree),
      make("figcaption", {}, "the same on a tree: prefix (light), then ancestors")));
    return make("div", { class: "masks" }, ...figures);
  });
  $("masks").append(make("h2", {}, "Masks"), ...all);
}

function tree() {
  if (!data.tree) return;
  const info = make("div", { id: "node-info" }, "Click a node: its path, and what the model expects next.");
  const drawing = picture(data.tree.svg);
  const show = (index) => {
    const node = data.tree.nodes[index];
    drawing.querySelectorAll(".tree-node").forEach((g) => g.classList.toggle("on", node.path.includes(Number(g.dataset.node))));
    const next = node.next.map(([token, p]) => `${token} (${(100 * p).toFixed(1)} %)`).join(", ");
    const path = node.path.map((n) => data.tree.nodes[n].token).join(" → ");
    info.replaceChildren(make("p", {}, make("b", {}, `node ${index}`), `: token ${node.token}, depth ${node.depth}`),
      make("p", {}, `position: ${data.tree.prefix.length} + ${node.depth}`), make("p", {}, `path: ${path}`),
      make("p", {}, `next: ${next}`),
      make("p", {}, data.tree.accepted.includes(index) ? "accepted by greedy verification" : "not accepted"));
  };
  drawing.querySelectorAll(".tree-node").forEach((g) => {
    g.addEventListener("click", () => show(Number(g.dataset.node)));
    g.addEventListener("keydown", (e) => { if (e.key === "Enter") show(Number(g.dataset.node)); });
  });
  $("tree").append(make("h2", {}, "A token tree"), make("p", { class: "dim" },
    `after the prompt ${data.tree.prefix.join(" ")}, verified by the rewritten graph; accepted nodes are green`),
    make("div", { class: "explore" }, drawing, info));
}

function passes() {
  data.passes.forEach((pass, i) => {
    const counts = pass.failed ? "failed" : pass.changed ?
      `+${pass.added} −${pass.removed} ~${pass.rewired}` : "graph unchanged";
    const body = make("div", { class: "body" });
    const box = make("details", { class: "pass", id: `pass-${i}`, ontoggle: () => {
      if (box.open && !body.childElementCount) fill(body, i);
    } }, make("summary", {}, make("b", {}, pass.name), make("span", {}, counts),
      make("span", { class: pass.failed ? "bad" : "ok" }, pass.failed ? "✗" : "✓"),
      make("span", { class: "dim" }, pass.checks)), body);
    $("passes").append(box);
  });
}

function fill(body, i) {
  const pass = data.passes[i];
  body.append(make("p", {}, make("span", { class: "dim" }, "takes "), pass.takes),
    make("p", {}, make("span", { class: "dim" }, "leaves "), pass.leaves, make("span", { class: "dim" }, ` (source ${pass.hash})`)));
  if (pass.failed) { body.append(make("pre", {}, pass.failed)); return; }
  const side = make("select", { "aria-label": "side" }, ...["both", "before", "after"].map((v) => make("option", {}, v)));
  const only = make("input", { type: "checkbox" });
  const list = make("div");
  const draw = () => layers(list, pass, side.value, only.checked, i);
  side.addEventListener("change", draw);
  only.addEventListener("change", draw);
  body.append(make("div", { class: "tools" }, side, make("label", {}, only, " changes only")), list);
  draw();
}

function sections(pass) {
  const found = [];
  for (const row of pass.rows) {
    const group = groupOf(data.nodes[row[2] >= 0 ? row[2] : row[1]][1]);
    if (!found.length || found[found.length - 1].group !== group) found.push({ group, rows: [] });
    found[found.length - 1].rows.push(row);
  }
  return found;
}

function layers(list, pass, side, only, i) {
  list.replaceChildren();
  const seen = new Map();
  for (const section of sections(pass)) {
    const changes = section.rows.filter((r) => r[0]).length;
    if (only && !changes) continue;
    const shape = section.rows.map(([kind, a, b]) => kind + unnumbered(data.nodes[b >= 0 ? b : a][0])).join("\n");
    const like = section.group ? seen.get(shape) : undefined;
    if (section.group && like === undefined) seen.set(shape, section.group);
    const note = changes ? `${changes} of ${section.rows.length} nodes changed` : `${section.rows.length} nodes, none changed`;
    const rows = make("div", { class: "rows" });
    const box = make("details", { class: "layer", ontoggle: () => {
      if (box.open && !rows.childElementCount) rows.append(...nodes(section.rows, side, only));
    } }, make("summary", {}, make("code", {}, section.group || "outside the layers"),
      make("span", { class: "dim" }, ` ${note}${like ? `, as in ${like}` : ""}`)), rows);
    box.dataset.group = section.group;
    if (changes && like === undefined) box.open = true;
    list.append(box);
  }
}

function nodes(rows, side, only) {
  const made = [];
  for (const [kind, before, after] of rows) {
    if (only && !kind) continue;
    if (side !== "after" && kind === 1 && side === "both" && data.nodes[before][0] !== data.nodes[after][0]) {
      made.push(node(before, 2), node(after, 3));
      continue;
    }
    if (side === "before" ? before < 0 : side === "after" && after < 0) continue;
    made.push(node(side === "before" || after < 0 ? before : after, kind));
  }
  return made;
}

function node(index, kind) {
  return make("div", { class: `row ${KINDS[kind]}`, "data-index": index, onclick: (e) => select(index, e.currentTarget) },
    `${MARKS[kind]} ${data.nodes[index][0]}`);
}

function select(index, element) {
  document.querySelectorAll(".row.on").forEach((r) => r.classList.remove("on"));
  element.classList.add("on");
  const [text, layer, source, name] = data.nodes[index];
  const panel = $("panel");
  panel.hidden = false;
  panel.replaceChildren(make("button", { onclick: () => { panel.hidden = true; } }, "close"), make("b", {}, name),
    make("pre", { class: "text" }, text), make("p", { class: "dim" }, layer || "outside any module"));
  const touched = data.passes.filter((p) => p.rows.some(([kind, a, b]) => kind && (a === index || b === index)));
  panel.append(make("p", {}, touched.length ? `touched by ${touched.map((p) => p.name).join(", ")}` : "touched by no pass"));
  if (source >= 0) {
    const at = data.sources[source];
    const snippet = make("pre", {});
    for (const [line, code] of at.text) {
      const words = `${String(line).padStart(5)}  ${code}\n`;
      snippet.append(line === at.line ? make("mark", {}, words) : words);
    }
    panel.append(make("p", { class: "source" }, `${at.file}:${at.line}, in ${at.in}`), snippet);
  }
}

function openPass(i) {
  const box = $(`pass-${i}`);
  box.open = true;
  box.scrollIntoView({ behavior: "instant", block: "start" });
}

function search(words) {
  const results = $("results");
  const terms = words.toLowerCase().split(/\s+/).filter(Boolean);
  results.hidden = !terms.length;
  results.replaceChildren();
  if (!terms.length) return;
  const found = [];
  data.nodes.forEach(([text, layer, source], index) => {
    const at = source >= 0 ? `${data.sources[source].file}:${data.sources[source].line}` : "";
    const all = `${text} ${layer} ${at}`.toLowerCase();
    if (terms.every((t) => all.includes(t))) found.push(index);
  });
  results.append(make("h2", {}, `${found.length} nodes`));
  for (const index of found.slice(0, 200)) {
    const row = node(index, 0);
    row.append(make("span", { class: "dim" }, `   ${data.nodes[index][1]}`));
    results.append(row);
  }
  if (found.length > 200) results.append(make("div", { class: "row gap" }, `… and ${found.length - 200} more`));
}

head(); timeline(); sites(); masks(); tree(); passes();
$("search").addEventListener("input", (e) => search(e.target.value));
document.addEventListener("keydown", (e) => {
  if (e.key === "/" && document.activeElement !== $("search")) { e.preventDefault(); $("search").focus(); }
  if (e.key === "Escape") { $("panel").hidden = true; }
});
document.body.dataset.ready = "yes";
