"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const $ = id => document.getElementById(id);
const S = data.size, N = data.columns, past = data.segments * S;
const shadeColors = {attention: "213, 94, 0", trace: "0, 114, 178", rank: "204, 121, 167"};
// The colours of cividis, which the colour-blind can read, at equal distances.
const scale = ["#00224e", "#123570", "#3b496c", "#575d6d", "#707173", "#8a8678", "#a59c74", "#c3b369",
  "#e1cc55", "#fee838"].map(c => [1, 3, 5].map(i => parseInt(c.slice(i, i + 2), 16)));
let decoded = null, state = {}, tokenSpans = new Map(), memorySpans = new Map(), drawn = null, painting = 0;

const element = (tag, properties = {}, ...children) => {
  const made = Object.assign(document.createElement(tag), properties);
  made.append(...children);
  return made;
};
const text = place => place ? data.texts[place - 1] : "·";
const share = weight => weight >= .995 ? "1.00" : weight >= .1 ? weight.toFixed(2)
  : weight >= .001 ? weight.toFixed(3) : weight === 0 ? "0" : "< 0.001";
const isKept = block => data.kept.includes(block);
const tokenText = (block, slot) => text(decoded.ids[decoded.place.get(block)][slot]);
const known = (block, slot) => decoded.place.has(block) && decoded.ids[decoded.place.get(block)][slot] > 0;
const headName = head => head === "mean" ? "mean over heads" : `head ${head}`;
const plural = (n, what) => `${n.toLocaleString("en")} ${what}${n === 1 ? "" : "s"}`;

function about() {
  const cut = data.blocks.length < data.lastBlock - data.firstBlock + 1;
  const kept = data.kept.length === data.blocks.length ? "" :
    ` Maps were kept of ${data.kept.length === 1 ? "block" : "blocks"} ${data.kept.join(", ")} (underlined); other`
    + " blocks have predictions and the memory's updates.";
  return `${plural(data.tokens, "token")} in ${plural(data.lastBlock - data.firstBlock + 1, "block")} of ${S} tokens,`
    + ` ${plural(data.modelLayers, "layer")}, ${N ? plural(N, "memory token") + " in each" : "no memory that tokens see"}.`
    + kept + (cut ? ` This page holds ${plural(data.blocks.length, "block")} of the text.` : "");
}

// ------------------------------------------------------------------ the text

function makeText() {
  const pane = $("text");
  let before = null;
  for (const block of data.blocks) {
    const i = decoded.place.get(block), [first, end] = data.slots[i];
    const group = element("div", {className: `block${isKept(block) ? " kept" : ""}`, id: `block${block}`});
    if (before !== null && before < block - 1) {
      pane.append(element("p", {className: "name"}, `… blocks ${before + 1} to ${block - 1} are not on this page …`));
    }
    before = block;
    const incomplete = end < S;
    let name = `Block ${block}`;
    if (first > 0) name += ` from slot ${first} on: the tokens before were read earlier.`;
    if (incomplete) {
      name += ` is incomplete: it has ${end} of ${S} tokens.`;
      if (N) name += " The memory is updated only when a block is full, so nothing of this block is in the memory.";
    }
    const head = element("div", {className: "head"}, element("span", {className: `name${incomplete ? " incomplete" : ""}`}, name));
    group.append(head);
    if (N) {
      const row = element("span", {className: "memory"});
      for (let n = 0; n < N; n++) {
        const span = element("span", {title: `memory token F${n} that block ${block} reads`}, `F${n}`);
        span.style.borderColor = data.colors.memory;
        Object.assign(span.dataset, {block, memory: n});
        memorySpans.set(`${block}/${n}`, span);
        row.append(span);
      }
      head.append(row);
    }
    const tokens = element("div", {className: "tokens"});
    for (let slot = first; slot < end; slot++) {
      const word = tokenText(block, slot), span = element("span", {title: `${block}:${slot}`}, word);
      Object.assign(span.dataset, {block, slot});
      tokenSpans.set(`${block}/${slot}`, span);
      tokens.append(span);
      if (word.includes("↵")) tokens.append(element("br"));
    }
    group.append(tokens);
    pane.append(group);
  }
  const target = event => event.target.closest("[data-block]");
  pane.addEventListener("click", event => {
    const span = target(event);
    if (span) select(span.dataset);
  });
  pane.addEventListener("mouseover", event => {
    const span = target(event);
    if (span && span.dataset.slot !== undefined) $("cell").textContent = prediction(+span.dataset.block, +span.dataset.slot);
  });
  pane.addEventListener("mouseleave", () => { $("cell").textContent = ""; });
}

function paint(weights, memory, mode) {
  const largest = map => [...map.values()].reduce((a, b) => Math.max(a, b), 0);
  const top = mode === "rank" ? 1 : Math.max(largest(weights), largest(memory)) || 1;
  const color = (span, weight) => {
    const strength = weight === undefined ? 0 : Math.sqrt(Math.max(weight, 0) / top);
    span.style.background = strength > .02 ? `rgba(${shadeColors[mode]}, ${(strength * .85).toFixed(3)})` : "";
  };
  for (const [key, span] of tokenSpans) color(span, weights.get(key));
  for (const [key, span] of memorySpans) color(span, memory.get(key));
}

// ------------------------------------------------------------------ the selection

function select(change) {
  const next = {...state};
  for (const [name, value] of Object.entries(change)) next[name] = name === "head" || name === "mode" ? value : +value;
  if ("slot" in change) next.memory = null;
  if ("memory" in change) next.slot = null;
  state = next;
  update();
}

// The block whose map has the selected query: that of the token, or the one that the memory token was made of.
const mapBlock = () => state.memory === null || state.memory === undefined ? state.block : state.block - 1;

function address() {
  const names = ["block", "slot", "memory", "layer", "head", "mode"].filter(name => state[name] !== null);
  const hash = "#" + names.map(name => `${name}=${state[name]}`).join("&");
  try { history.replaceState(null, "", hash); } catch { /* inside a frame without an address */ }
}

function fromAddress() {
  const wanted = new URLSearchParams(location.hash.slice(1));
  const number = (name, allowed, otherwise) => {
    const value = wanted.has(name) ? Number(wanted.get(name)) : NaN;
    return allowed(value) ? value : otherwise;
  };
  const block = number("block", b => decoded.place.has(b), data.kept[data.kept.length - 1]);
  const [first, end] = data.slots[decoded.place.get(block)];
  const memory = number("memory", n => Number.isInteger(n) && n >= 0 && n < N, null);
  const slot = memory !== null ? null : number("slot", s => known(block, s) && s >= first && s < end, end - 1);
  const head = data.heads.map(String).includes(wanted.get("head")) ? wanted.get("head") : String(data.heads[data.heads.length - 1]);
  const mode = wanted.get("mode") in shadeColors ? wanted.get("mode") : "attention";
  state = {block, slot, memory, layer: number("layer", l => data.layers.includes(l), data.layers[0]), head, mode};
}

async function update() {
  const mine = ++painting;
  address();
  for (const input of document.querySelectorAll("input[name=mode]")) input.checked = input.value === state.mode;
  document.querySelectorAll("span.selected").forEach(span => span.classList.remove("selected"));
  const isMemory = state.memory !== null;
  const selected = (isMemory ? memorySpans : tokenSpans).get(`${state.block}/${isMemory ? state.memory : state.slot}`);
  if (selected) selected.classList.add("selected");
  const view = isMemory ? await viewOfMemory() : await viewOfToken();
  if (mine !== painting) return;  // another selection came in between
  if (state.mode === "rank") paint(ranks(), new Map(), "rank");
  else paint(view.weights, view.memory, state.mode);
  $("detail").replaceChildren(...view.lines.filter(Boolean));
  showSources(view);
  await showMaps(mine);
  document.body.dataset.ready = "yes";
}

const line = (className, ...parts) => element("p", {className}, ...parts);

function prediction(block, slot) {
  const i = decoded.place.get(block), rank = decoded.rank[i][slot];
  const [first, end] = data.slots[i];
  if (slot < first || slot >= end) return "";
  const best = `After “${tokenText(block, slot)}” (${block}:${slot}) the model expects “${text(decoded.predicted[i][slot])}”`
    + ` (probability ${share(decoded.probability[i][slot])})`;
  if (!rank) return `${best}. The text ends here.`;
  const [nextBlock, nextSlot] = slot + 1 < S ? [block, slot + 1] : [block + 1, 0];
  const next = known(nextBlock, nextSlot) ? ` “${tokenText(nextBlock, nextSlot)}”` : "";
  return `${best}; what follows,${next}, has rank ${rank.toLocaleString("en")} (probability ${share(decoded.nextProbability[i][slot])}).`;
}

function ranks() {
  const out = new Map();
  data.blocks.forEach((block, i) => {
    for (let slot = data.slots[i][0]; slot < data.slots[i][1]; slot++) {
      // The square root in `paint` is undone.
      const rank = decoded.rank[i][slot];
      out.set(`${block}/${slot}`, rank ? Math.min(1, Math.log10(rank) / 3) ** 2 : 0);
    }
  });
  return out;
}

// Weights of a row of a map, by place, and `sums` of memory, past blocks and own block. A row that holds all
// keys is made to add up to 1, which rounding to a byte has changed.
function spread(row, block, complete) {
  const weights = new Map(), memory = new Map(), sums = {memory: 0, past: 0, own: 0};
  const total = complete && row.reduce((a, b) => a + b, 0) || 1;
  row.forEach((rounded, column) => {
    const weight = rounded / total;
    if (column < N) {
      memory.set(`${block}/${column}`, weight);
      sums.memory += weight;
      return;
    }
    const token = column - N - past, back = Math.floor(token / S);
    weights.set(`${block + back}/${token - back * S}`, weight);
    sums[back < 0 ? "past" : "own"] += weight;
  });
  return {weights, memory, sums};
}

const mapsMissing = block => line("note", `The maps of block ${block} were not kept: add it to --blocks, or`
  + " choose a block that is underlined.");

async function viewOfToken() {
  const {block, slot} = state;
  const lines = [line("what", `Token ${block}:${slot} “${tokenText(block, slot)}”`), line("", prediction(block, slot))];
  if (!isKept(block)) return {weights: new Map(), memory: new Map(), lines: [...lines, mapsMissing(block)]};
  if (state.mode === "trace") {
    const trace = traceToken(data, decoded, block, slot);
    return {...traceView(trace), lines: [...lines, traceLine(trace, block)]};
  }
  const rows = await decoded.map(`${block}/${state.layer}/${state.head}`);
  const found = spread(rows.row(data.rows + slot), block, rows.complete);
  const {memory, past: before, own} = found.sums;
  lines.push(line("", `Its attention in layer ${state.layer}, ${headName(state.head)}: ${share(memory)} on the memory, `
    + (past ? `${share(before)} on past blocks, ` : "") + `${share(own)} on its own block.`));
  if (!rows.complete) lines.push(line("", "To keep this page small it holds only the strongest keys of each query."));
  return {...found, lines};
}

async function viewOfMemory() {
  const {block, memory: n, layer} = state, source = block - 1;
  const lines = [line("what", `Memory token F${n} of layer ${layer}, as block ${block} reads it`)];
  if (!data.rows) {
    lines.push(line("", "This kind of memory is not made by attention, so maps do not show what wrote it."));
    return {weights: new Map(), memory: new Map(), lines};
  }
  if (block === data.firstBlock) {
    lines.push(line("", "No block of this text wrote it: it is the memory from which the reading starts."));
    return {weights: new Map(), memory: new Map(), lines};
  }
  if (!decoded.place.has(source)) {
    lines.push(line("note", `Block ${source}, which wrote it, is not on this page.`));
    return {weights: new Map(), memory: new Map(), lines};
  }
  const i = decoded.place.get(source), cell = layer * data.rows + n, part = decoded.shares[i][cell];
  lines.push(line("", part === 0
    ? `The update after block ${source} wrote nothing into it: it is what F${n} was before. The trace shows which block wrote it.`
    : `Written by the update after block ${source}: ${share(part)} of it comes from what the update attended to,`
      + ` ${share(1 - part)} is what F${n} was before.`));
  if (state.mode === "trace") {
    const trace = traceMemory(data, decoded, block, layer, n);
    return {...traceView(trace), lines: [...lines, traceLine(trace, block)]};
  }
  let row = new Float32Array(N + past + S), of = headName(state.head), complete = decoded.updates[i].complete;
  if (isKept(source)) {
    const rows = await decoded.map(`${source}/${layer}/${state.head}`);
    [row, complete] = [rows.row(n), rows.complete];
  } else {
    decoded.updates[i].each(cell, (key, weight) => { row[key < N ? key : key + past] = weight; });
    of = "mean over heads";
  }
  const found = spread(row, source, complete);
  lines.push(line("", `Attention of this update, ${of}: ${share(found.sums.memory)} on the memory before,`
    + ` ${share(found.sums.own)} on the tokens of block ${source}.`));
  return {...found, lines};
}

function traceView(trace) {
  const weights = new Map(), memory = new Map(), blocks = new Map();
  for (const [block, of] of trace.weights) {
    of.forEach((weight, slot) => weights.set(`${block}/${slot}`, weight));
    blocks.set(block, of.reduce((a, b) => a + b, 0));
  }
  for (const [block, of] of trace.passed) {
    for (let n = 0; n < N; n++) memory.set(`${block}/${n}`, of[state.layer * N + n]);
  }
  return {weights, memory, blocks};
}

function traceLine(trace, block) {
  const start = trace.start.reduce((a, b) => a + b, 0);
  let sum = start;
  for (const of of trace.weights.values()) sum += of.reduce((a, b) => a + b, 0);
  let sentence = `Traced back from block ${block} to block ${Math.min(...trace.weights.keys(), block)}.`;
  if (start > .0005) {
    sentence += trace.first === data.firstBlock ? ` ${share(start)} is left on the memory from which the reading starts.`
      : ` ${share(start)} is left on the memory before block ${trace.first}, whose updates are not on this page.`;
  }
  if (1 - sum > .01) sentence += ` ${share(1 - sum)} was not followed: the page holds only the strongest weights.`;
  return line("", sentence + ` The memory is shaded for layer ${state.layer}.`);
}

function showSources(view) {
  const places = [...view.weights.entries()].filter(([, weight]) => weight > 0).map(([key, weight]) => {
    const [block, slot] = key.split("/").map(Number);
    return {block, slot, weight};
  }).sort((a, b) => b.weight - a.weight);
  const cells = [...view.memory.entries()].filter(([, weight]) => weight > 0).map(([key, weight]) => {
    const [block, memory] = key.split("/").map(Number);
    return {block, memory, weight};
  }).sort((a, b) => b.weight - a.weight);
  const table = (caption, rows) => element("table", {}, element("caption", {}, caption), ...rows);
  const row = (name, what, weight, target) => {
    const made = element("tr", {className: "link"}, element("td", {}, name), element("td", {}, what),
      element("td", {className: "weight"}, share(weight)));
    made.addEventListener("click", () => { select(target); reveal(); });
    return made;
  };
  const lists = element("div", {className: "lists"});
  if (places.length) {
    lists.append(table("strongest tokens", places.slice(0, 8).map(({block, slot, weight}) => row(`${block}:${slot}`,
      known(block, slot) ? tokenText(block, slot) : "·", weight, {block, slot}))));
  }
  if (state.mode !== "trace" && cells.length) {
    lists.append(table("strongest memory tokens", cells.slice(0, 8).map(({block, memory, weight}) => row(
      `before block ${block}`, `F${memory}`, weight, {block, memory}))));
  }
  const parts = [lists];
  if (view.blocks) {
    const order = [...view.blocks.entries()].sort((a, b) => b[1] - a[1]);
    lists.append(table("strongest blocks", order.slice(0, 8).map(([block, weight]) => {
      const made = element("tr", {className: "link"}, element("td", {}, `block ${block}`), element("td", {className: "weight"}, share(weight)));
      made.addEventListener("click", () => document.getElementById(`block${block}`)?.scrollIntoView({block: "center"}));
      return made;
    })));
    parts.unshift(strip(view.blocks));
  }
  $("sources").replaceChildren(...parts);
}

// Weight of every block of a trace, as bars from the first block to the last.
function strip(blocks) {
  const canvas = element("canvas", {id: "strip", title: "weight of each block, square root; click to see the block"});
  const numbers = [...blocks.keys()].sort((a, b) => a - b), ratio = window.devicePixelRatio || 1;
  const width = canvas.width = Math.max(200, $("right").clientWidth - 32) * ratio, height = canvas.height = 46 * ratio;
  const context = canvas.getContext("2d"), base = height - 14 * ratio, each = width / numbers.length;
  const top = Math.max(...blocks.values()) || 1;
  context.font = `${10 * ratio}px sans-serif`;
  const every = Math.ceil(34 * ratio / each);
  numbers.forEach((block, i) => {
    const high = Math.sqrt(Math.max(blocks.get(block), 0) / top) * base;
    context.fillStyle = "#0072B2";
    context.fillRect(i * each, base - high, Math.max(each - ratio, each * .8), high);
    context.fillStyle = "#555";
    if (i % every === 0 && i * each + 24 * ratio < width) context.fillText(block, i * each + 1, height - 3 * ratio);
  });
  canvas.addEventListener("click", event => {
    const i = Math.floor(event.offsetX / canvas.clientWidth * numbers.length);
    document.getElementById(`block${numbers[i]}`)?.scrollIntoView({block: "center"});
  });
  return canvas;
}

function reveal() {
  document.querySelector("#text span.selected")?.scrollIntoView({block: "center"});
}

// ------------------------------------------------------------------ the maps

// Rows and columns of the picture of a block as in the paper's Fig. 11, as queries and columns of its rows.
function layout(block) {
  const [first, end] = data.slots[decoded.place.get(block)], queries = [], columns = [];
  if (end === S) for (let n = 0; n < data.rows; n++) queries.push(n);
  for (let slot = first; slot < end; slot++) queries.push(data.rows + slot);
  const missing = Math.max(data.segments - block, 0) * S;
  for (let i = missing; i < past; i++) columns.push(N + i);
  for (let n = 0; n < N; n++) columns.push(n);
  for (let slot = 0; slot < end; slot++) columns.push(N + past + slot);
  return {block, queries, columns};
}

const colored = share => {
  const at = Math.min(Math.max(share, 0), 1) * (scale.length - 1), low = Math.min(Math.floor(at), scale.length - 2);
  return scale[low].map((c, i) => Math.round(c + (scale[low + 1][i] - c) * (at - low)));
};
const palette = Array.from({length: 256}, (_, i) => colored(i / 255));

const canSee = ({block}, query, column) => query < data.rows ? column < N || column >= N + past
  : sees(data, block, query - data.rows, column);

// Draws a map of at most `limit` cells a side, each the largest of its neighbours.
function drawCells(canvas, rows, picture, limit) {
  const {queries, columns} = picture;
  const down = Math.ceil(queries.length / limit), across = Math.ceil(columns.length / limit);
  const height = canvas.height = Math.ceil(queries.length / down), width = canvas.width = Math.ceil(columns.length / across);
  const largest = new Float32Array(width * height).fill(-1);
  let top = 0;
  queries.forEach((query, i) => {
    const row = rows.row(query);
    columns.forEach((column, j) => {
      if (!canSee(picture, query, column)) return;
      const cell = Math.floor(i / down) * width + Math.floor(j / across);
      if (row[column] > largest[cell]) largest[cell] = row[column];
      if (row[column] > top) top = row[column];
    });
  });
  const context = canvas.getContext("2d"), image = context.createImageData(width, height);
  const unseen = [1, 3, 5].map(i => parseInt(data.colors.unseen.slice(i, i + 2), 16));
  largest.forEach((weight, cell) => {
    const color = weight < 0 ? unseen : palette[Math.round(Math.sqrt(weight / (top || 1)) * 255)];
    image.data.set([...color, 255], 4 * cell);
  });
  context.putImageData(image, 0, 0);
  return top;
}

async function showMaps(mine) {
  const block = mapBlock();
  if (!isKept(block)) {
    $("mapsTitle").textContent = block < data.firstBlock ? "" : `No maps of block ${block} were kept`;
    $("thumbs").replaceChildren();
    $("map").hidden = true;
    for (const id of ["mapName", "legend", "cell"]) $(id).replaceChildren();
    drawn = null;
    return;
  }
  const picture = layout(block);
  $("mapsTitle").textContent = `All layers and heads of block ${block}`;
  if (!drawn || drawn.block !== block) {
    const grid = $("thumbs"), size = Math.max(34, Math.min(96, ($("right").clientWidth - 90) / data.heads.length - 4));
    grid.style.gridTemplateColumns = `max-content repeat(${data.heads.length}, ${size}px)`;
    const children = [element("span", {className: "side"}, "head"), ...data.heads.map(head => element("span", {className: "top"}, `${head}`))];
    const jobs = [];
    for (const layer of data.layers) {
      children.push(element("span", {className: "side"}, `layer ${layer}`));
      for (const head of data.heads) {
        const canvas = element("canvas", {title: `layer ${layer}, ${headName(head)}`});
        Object.assign(canvas.dataset, {layer, head});
        canvas.addEventListener("click", () => select({layer, head: String(head)}));
        children.push(canvas);
        jobs.push([canvas, `${block}/${layer}/${head}`]);
      }
    }
    grid.replaceChildren(...children);
    drawn = {block, layer: null};
    for (const [canvas, name] of jobs) {
      drawCells(canvas, await decoded.map(name), picture, 2 * size);
      if (mine !== painting && drawn.block !== block) return;
    }
  }
  for (const canvas of document.querySelectorAll("#thumbs canvas")) {
    canvas.classList.toggle("chosen", +canvas.dataset.layer === state.layer && canvas.dataset.head === state.head);
  }
  const rows = await decoded.map(`${block}/${state.layer}/${state.head}`);
  if (mine === painting) drawMap(rows, picture);
}

const kindOf = (column, picture) => column < N ? "memory" : column < N + past ? "past" : "own";

function drawMap(rows, picture) {
  const canvas = $("map"), {queries, columns, block} = picture, margin = 8;
  canvas.hidden = false;
  $("mapName").textContent = `Block ${block}, layer ${state.layer}, ${headName(state.head)}`
    + (picture.queries[0] < data.rows ? "; upper rows: the memory while it compresses the block" : "");
  const cells = document.createElement("canvas"), top = drawCells(cells, rows, picture, 1000);
  const room = $("right").clientWidth - 40, cell = Math.min(14, (room - margin) / columns.length, 560 / queries.length);
  const ratio = window.devicePixelRatio || 1, wide = cell * columns.length, high = cell * queries.length;
  canvas.style.width = `${wide + margin}px`;
  canvas.style.height = `${high + margin}px`;
  canvas.width = (wide + margin) * ratio;
  canvas.height = (high + margin) * ratio;
  const context = canvas.getContext("2d");
  context.scale(ratio, ratio);
  context.imageSmoothingEnabled = false;
  context.drawImage(cells, margin, margin, wide, high);
  columns.forEach((column, j) => {
    context.fillStyle = data.colors[kindOf(column)];
    context.fillRect(margin + j * cell, 0, Math.ceil(cell), margin - 2);
  });
  const chosen = state.memory === null ? data.rows + state.slot : state.memory;
  queries.forEach((query, i) => {
    context.fillStyle = data.colors[query < data.rows ? "memory" : "own"];
    context.fillRect(0, margin + i * cell, margin - 2, Math.ceil(cell));
    if (query === chosen) {
      context.strokeStyle = "#D55E00";
      context.lineWidth = 1.5;
      context.strokeRect(margin, margin + i * cell, wide, Math.max(cell, 2));
    }
  });
  const at = event => [Math.floor((event.offsetY - margin) / cell), Math.floor((event.offsetX - margin) / cell)];
  const name = (column, asQuery) => {
    if (asQuery ? column < data.rows : column < N) return `F${column}`;
    const token = asQuery ? column - data.rows : column - N - past, back = Math.floor(token / S);
    const word = asQuery || back === 0 ? tokenText(block, token) : text(decoded.past[block][column - N]);
    return `${block + back}:${token - back * S} “${word}”`;
  };
  canvas.onmousemove = event => {
    const [i, j] = at(event);
    if (!(i >= 0 && j >= 0 && i < queries.length && j < columns.length)) return;
    const weight = rows.row(queries[i])[columns[j]];
    $("cell").textContent = `query ${name(queries[i], true)}, key ${name(columns[j], false)}: `
      + (canSee(picture, queries[i], columns[j]) ? share(weight) : "not seen");
  };
  canvas.onmouseleave = () => { $("cell").textContent = ""; };
  canvas.onclick = event => {
    const query = queries[at(event)[0]];
    if (query === undefined) return;
    if (query < data.rows) {
      // What block b wrote is what block b + 1 reads; after the last block nothing reads it.
      if (decoded.place.has(block + 1)) select({block: block + 1, memory: query});
    } else select({block, slot: query - data.rows});
    reveal();
  };
  const stops = scale.map(c => `rgb(${c})`).join(", ");
  const bar = element("span", {className: "scale"});
  bar.style.background = `linear-gradient(to right, ${stops})`;
  const keys = [["memory", "memory (F0, F1, …)"], ["past", "past blocks"], ["own", `block ${block}`], ["unseen", "not seen by the query"]]
    .filter(([kind]) => (kind !== "memory" || N) && (kind !== "past" || past)).flatMap(([kind, what]) => {
      const key = element("span", {className: "key"});
      key.style.background = data.colors[kind];
      return [key, what];
    });
  $("legend").replaceChildren(...keys, element("br"), "attention 0", bar, `${share(top)} (square root)`);
}

// ------------------------------------------------------------------ start

document.addEventListener("keydown", event => {
  const step = {ArrowRight: 1, ArrowLeft: -1}[event.key];
  if (!step || event.target.tagName === "INPUT") return;
  const isMemory = state.memory !== null, keys = [...(isMemory ? memorySpans : tokenSpans).values()];
  const i = keys.findIndex(span => span.classList.contains("selected")) + step;
  if (keys[i]) {
    select(keys[i].dataset);
    event.preventDefault();
  }
});
for (const input of document.querySelectorAll("input[name=mode]")) {
  input.addEventListener("change", () => select({mode: input.value}));
}
window.addEventListener("hashchange", () => { fromAddress(); update().then(reveal); });
window.addEventListener("resize", () => { drawn = null; if (decoded) update(); });

(async () => {
  if (typeof DecompressionStream === "undefined") {
    $("about").textContent = "This page needs a browser of 2023 or later (DecompressionStream).";
    return;
  }
  decoded = await unpackData(data);
  $("about").textContent = about();
  makeText();
  fromAddress();
  await update();
  reveal();
})();
