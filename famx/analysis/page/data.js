"use strict";
// Decoding of the page's data, and traces; needs no page, so that tests can run it.

async function inflate(text) {
  const bytes = Uint8Array.from(atob(text), c => c.charCodeAt(0));
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate"));
  return new Uint8Array(await new Response(stream).arrayBuffer());
}

// Unsigned integers of `size` bytes, of which all first bytes come first, then all second ones.
async function unpack(text, size) {
  const planes = await inflate(text), count = planes.length / size, values = new Uint32Array(count);
  for (let plane = 0; plane < size; plane++) {
    for (let i = 0; i < count; i++) values[i] += planes[plane * count + i] * 2 ** (8 * plane);
  }
  return values;
}

// Rows of weights; `row(r)` is a Float32Array of all columns, 0 where a weight was left out.
async function unpackRows(packed) {
  const {rows, columns, keys, scale} = packed;
  const codes = await unpack(packed.codes, scale === 255 ? 1 : 2);
  const steps = packed.steps ? await unpack(packed.steps, 4) : null;
  const weight = code => scale === 255 ? (code / scale) ** 2 : code / scale;
  const each = (r, visit) => {
    for (let i = 0, key = 0; i < keys; i++) {
      key = steps ? key + steps[r * keys + i] : i;
      visit(key, weight(codes[r * keys + i]));
    }
  };
  const row = r => {
    const values = new Float32Array(columns);
    each(r, (key, weight) => { values[key] = weight; });
    return values;
  };
  return {rows, columns, each, row, complete: !steps};
}

// What all of the page uses; maps are decoded when they are asked for.
async function unpackData(data) {
  const cut = (values, length) => data.blocks.map((_, i) => values.subarray(i * length, (i + 1) * length));
  const perBlock = async (name, size) => {
    const values = await unpack(data[name], size);
    return cut(values, values.length / data.blocks.length);
  };
  const scaled = blocks => blocks.map(values => Float32Array.from(values, x => x / 65535));
  const out = {
    place: new Map(data.blocks.map((block, i) => [block, i])),
    ids: await perBlock("ids", 4), predicted: await perBlock("predicted", 4), rank: await perBlock("rank", 4),
    probability: scaled(await perBlock("probability", 2)),
    nextProbability: scaled(await perBlock("nextProbability", 2)),
    shares: scaled(await perBlock("shares", 2)),
    updates: await Promise.all(data.updates.map(unpackRows)), rollout: {}, past: {},
  };
  for (const block of data.kept) {
    out.rollout[block] = await unpackRows(data.rollout[block]);
    out.past[block] = await unpack(data.past[block], 4);
  }
  const maps = new Map();
  out.map = name => {
    if (!maps.has(name)) maps.set(name, unpackRows(data.maps[name]));
    return maps.get(name);
  };
  return out;
}

const isComplete = (data, decoded, block) =>
  decoded.place.has(block) && data.slots[decoded.place.get(block)][1] === data.size;

// Trace of weights `memory` (of all layers' memory tokens) that block `block` reads, back through the
// updates; see famx/analysis/tracing.py. Adds to `weights`, a Map from block to Float64Array.
function traceBack(data, decoded, block, memory, weights) {
  const {rows: count, size} = data, passed = new Map([[block, memory]]);
  while (count && isComplete(data, decoded, block - 1)) {
    block -= 1;
    const i = decoded.place.get(block), update = decoded.updates[i], shares = decoded.shares[i];
    const written = weights.get(block) || new Float64Array(size), before = new Float64Array(memory.length);
    memory.forEach((weight, cell) => {
      if (!weight) return;
      const attended = weight * shares[cell], layer = cell - cell % count;
      before[cell] += weight - attended;
      update.each(cell, (key, p) => {
        if (key < count) before[layer + key] += attended * p;
        else written[key - count] += attended * p;
      });
    });
    weights.set(block, written);
    memory = before;
    passed.set(block, memory);
  }
  // Weight left out because the page holds only the largest: what is missing from 1.
  return {weights, start: memory, passed, first: block};
}

function traceToken(data, decoded, block, slot) {
  const {size, segments, columns, modelLayers} = data, row = decoded.rollout[block].row(slot);
  const cells = modelLayers * columns, weights = new Map();
  for (let back = 0; back <= Math.min(segments, block); back++) {
    const from = cells + (segments - back) * size;
    weights.set(block - back, Float64Array.from(row.subarray(from, from + size)));
  }
  return traceBack(data, decoded, block, Float64Array.from(row.subarray(0, cells)), weights);
}

function traceMemory(data, decoded, block, layer, number) {
  const memory = new Float64Array(data.modelLayers * data.rows);
  memory[layer * data.rows + number] = 1;
  return traceBack(data, decoded, block, memory, new Map());
}

// Whether the token in `slot` of a block sees a column of its window (famx.modules.attention.visible).
function sees(data, block, slot, column) {
  if (column < data.columns) return true;
  const past = data.segments * data.size, token = column - data.columns - past;
  const missing = Math.max(data.segments - block, 0);
  return token <= slot && token + past >= missing * data.size && !(data.windowMask && token < slot - past);
}

if (typeof module !== "undefined") module.exports = {unpackData, traceToken, traceMemory, sees};
