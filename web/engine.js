// The GPT of model.py in JavaScript: runs in a browser's Worker and in Node.
//
// Letters in the shapes: C n_embd, V vocab_size, nh heads, nkv key/value heads, hs head size, T tokens read.
// Activations are float32, as in PyTorch.
"use strict";

const Engine = (() => {

// ---- weights ----------------------------------------------------------------------------------------------

/** Write IEEE half-precision bits (Uint16Array) into a Float32Array. */
function fromFloat16(values, bits) {
  for (let i = 0; i < bits.length; i++) {
    const sign = bits[i] & 0x8000 ? -1 : 1;
    const exponent = (bits[i] >> 10) & 31;
    const fraction = bits[i] & 1023;
    if (exponent === 0) values[i] = sign * fraction * 2 ** -24;
    else values[i] = sign * (1 + fraction / 1024) * 2 ** (exponent - 15);  // the file has no infinities
  }
}

/** The memory that holds weights and activations, in WebAssembly's where there is one. */
class Memory {
  constructor(size) {
    this.kernel = makeKernel(size);
    this.buffer = this.kernel ? this.kernel.buffer : new ArrayBuffer(size);
    this.used = 0;
  }

  static size(n, bytes) {
    return Math.ceil(n * bytes / 16) * 16;
  }

  take(Type, n) {
    const array = new Type(this.buffer, this.used, n);
    this.used += Memory.size(n, Type.BYTES_PER_ELEMENT);
    return array;
  }
}

/** A tensor of the file: {data, rows, columns, scales}; the scales are null unless the type is int8. */
function openTensor(entry, bytes, memory) {
  const rows = entry.shape[0];
  const columns = entry.shape[1] || 1;
  const size = rows * columns;
  const data = memory.take(entry.type === "int8" ? Int8Array : Float32Array, size);
  let scales = null;
  if (entry.type === "int8") {
    data.set(new Int8Array(bytes, entry.offset, size));
    scales = new Float32Array(bytes.slice(entry.scales, entry.scales + 4 * rows));
  } else if (entry.type === "float16") {
    fromFloat16(data, new Uint16Array(bytes, entry.offset, size));
  } else {
    data.set(new Float32Array(bytes, entry.offset, size));
  }
  return {data, rows, columns, scales};
}

/** Bytes of memory that a tensor takes. */
function sizeOf(entry) {
  return Memory.size(entry.shape[0] * (entry.shape[1] || 1), entry.type === "int8" ? 1 : 4);
}

/** out (rows) = tensor (rows, columns) times x (columns), plus bias (rows) or null; arrays of one Memory. */
function multiply(kernel, out, tensor, x, bias) {
  const {data, rows, columns, scales} = tensor;
  if (kernel && columns % 8 === 0) {
    const product = scales ? kernel.int8 : kernel.float32;
    product(out.byteOffset, data.byteOffset, x.byteOffset, rows, columns);
  } else {
    multiplyInLoops(out, tensor, x);
  }
  if (scales) for (let i = 0; i < rows; i++) out[i] *= scales[i];
  if (bias) for (let i = 0; i < rows; i++) out[i] += bias.data[i];
}

function multiplyInLoops(out, {data, rows, columns}, x) {
  // Four rows at a time: each x[j] is loaded once for four products.
  let i = 0;
  for (; i + 4 <= rows; i += 4) {
    let sum0 = 0, sum1 = 0, sum2 = 0, sum3 = 0;
    const a = i * columns;
    const b = a + columns;
    const c = b + columns;
    const d = c + columns;
    for (let j = 0; j < columns; j++) {
      const value = x[j];
      sum0 += data[a + j] * value;
      sum1 += data[b + j] * value;
      sum2 += data[c + j] * value;
      sum3 += data[d + j] * value;
    }
    out[i] = sum0;
    out[i + 1] = sum1;
    out[i + 2] = sum2;
    out[i + 3] = sum3;
  }
  for (; i < rows; i++) {
    let sum = 0;
    for (let j = 0; j < columns; j++) sum += data[i * columns + j] * x[j];
    out[i] = sum;
  }
}

/** x (columns) += row `row` of an embedding table. */
function addRow(x, tensor, row) {
  const scale = tensor.scales ? tensor.scales[row] : 1;
  const start = row * tensor.columns;
  for (let j = 0; j < tensor.columns; j++) x[j] += tensor.data[start + j] * scale;
}

// ---- layers -----------------------------------------------------------------------------------------------

/** out = x over its root mean square, times weight (null: one), for n numbers from `start` on. */
function rmsNorm(out, x, start, n, weight, eps) {
  let squares = 0;
  for (let i = 0; i < n; i++) squares += x[start + i] ** 2;
  const factor = 1 / Math.sqrt(squares / n + eps);
  for (let i = 0; i < n; i++) out[start + i] = x[start + i] * factor * (weight ? weight.data[i] : 1);
}

function layerNorm(out, x, n, weight, eps) {
  let mean = 0;
  for (let i = 0; i < n; i++) mean += x[i] / n;
  let variance = 0;
  for (let i = 0; i < n; i++) variance += (x[i] - mean) ** 2 / n;
  const factor = 1 / Math.sqrt(variance + eps);
  for (let i = 0; i < n; i++) out[i] = (x[i] - mean) * factor * weight.data[i];
}

/** erf to 1.2e-7, by the Chebyshev fit of erfc in Numerical Recipes (Press et al. 1992, section 6.2). */
function erf(x) {
  const t = 1 / (1 + Math.abs(x) / 2);
  const fit = [0.17087277, -0.82215223, 1.48851587, -1.13520398, 0.27886807, -0.18628806, 0.09678418,
    0.37409196, 1.00002368, -1.26551223].reduce((sum, coefficient) => sum * t + coefficient);
  const erfc = t * Math.exp(-x * x + fit);
  return x >= 0 ? 1 - erfc : erfc - 1;
}

const ACTIVATIONS = {
  gelu: x => x / 2 * (1 + erf(x / Math.SQRT2)),
  relu2: x => x > 0 ? x * x : 0,
  swiglu: x => x / (1 + Math.exp(-x)),
};

/** A causal GPT with its cache of keys and values. `read` takes one token and keeps what it has read. */
class Model {
  /** file: {config, tensors}, as exports/html.py writes it; buffer: the bytes of all tensors. */
  constructor(file, buffer) {
    const c = this.config = file.config;
    const entries = Object.entries(file.tensors);
    const hidden = file.tensors["transformer.h.0.mlp.c_fc.weight"].shape[0];
    const kvWidth = (c.n_kv_head || c.n_head) * c.n_embd / c.n_head;
    const widths = [c.n_embd, c.n_embd, c.n_embd, c.n_embd + 2 * kvWidth, hidden, c.vocab_size];
    const memory = new Memory(entries.reduce((sum, [, entry]) => sum + sizeOf(entry), 0)
      + widths.reduce((sum, n) => sum + Memory.size(n, 4), 0));
    this.kernel = memory.kernel;
    [this.x, this.normed, this.mixed, this.qkv, this.hidden, this.logits] =
      widths.map(n => memory.take(Float32Array, n));
    this.tensors = {};
    for (const [name, entry] of entries) this.tensors[name] = openTensor(entry, buffer, memory);
    this.nKvHead = c.n_kv_head || c.n_head;
    this.headSize = c.n_embd / c.n_head;
    this.kvWidth = kvWidth;
    const get = name => this.tensors[`transformer.${name}`] || null;
    this.wte = get("wte.weight");
    this.wpe = get("wpe.weight");
    this.prev = Array.from({length: c.n_prev}, (_, i) => get(`prev.${i}.weight`));
    this.lnF = get("ln_f.weight");
    this.layers = Array.from({length: c.n_layer}, (_, i) => ({
      ln1: get(`h.${i}.ln_1.weight`),
      ln2: get(`h.${i}.ln_2.weight`),
      attn: get(`h.${i}.attn.c_attn.weight`),
      attnBias: get(`h.${i}.attn.c_attn.bias`),
      proj: get(`h.${i}.attn.c_proj.weight`),
      projBias: get(`h.${i}.attn.c_proj.bias`),
      fc: get(`h.${i}.mlp.c_fc.weight`),
      fcBias: get(`h.${i}.mlp.c_fc.bias`),
      out: get(`h.${i}.mlp.c_proj.weight`),
      outBias: get(`h.${i}.mlp.c_proj.bias`),
      keys: new Float32Array(c.block_size * this.kvWidth),  // (T, nkv, hs)
      values: new Float32Array(c.block_size * this.kvWidth),
    }));
    this.ids = [];  // the tokens in the cache
    this.cos = new Float64Array(this.headSize / 2 | 0);  // of the token being read
    this.sin = new Float64Array(this.headSize / 2 | 0);
    this.scores = new Float64Array(c.block_size);
  }

  /** Keep only what the cache and `ids` begin with alike; at least the last of `ids` is left to read. */
  rewind(ids) {
    let n = 0;
    while (n < ids.length - 1 && this.ids[n] === ids[n]) n++;
    this.ids.length = Math.min(this.ids.length, n);
  }

  /** Read one token; with `wantLogits`, return the logits (V) after it, valid until the next call. */
  read(token, wantLogits) {
    const c = this.config;
    const position = this.ids.length;
    this.x.fill(0);
    addRow(this.x, this.wte, token);
    this.prev.forEach((table, i) => {
      if (position > i) addRow(this.x, table, this.ids[position - 1 - i]);
    });
    if (this.wpe) addRow(this.x, this.wpe, position);
    this.setAngles(position);
    for (const layer of this.layers) {
      rmsNorm(this.normed, this.x, 0, c.n_embd, layer.ln1, c.norm_eps);
      this.attend(layer, position);
      rmsNorm(this.normed, this.x, 0, c.n_embd, layer.ln2, c.norm_eps);
      this.mlp(layer);
    }
    this.ids.push(token);
    if (!wantLogits) return null;
    if (c.final_norm === "layernorm") layerNorm(this.normed, this.x, c.n_embd, this.lnF, 1e-5);
    else rmsNorm(this.normed, this.x, 0, c.n_embd, this.lnF, c.norm_eps);
    multiply(this.kernel, this.logits, this.wte, this.normed, null);
    return this.logits;
  }

  /** x += attention of `normed` to all tokens so far. */
  attend(layer, position) {
    const c = this.config;
    const hs = this.headSize;
    const width = this.kvWidth;
    const {qkv, scores, mixed} = this;
    multiply(this.kernel, qkv, layer.attn, this.normed, layer.attnBias);
    for (let start = 0; start < c.n_embd + width; start += hs) {  // the query heads, then the key heads
      if (c.use_rope) this.rotate(start);
      if (c.qk_norm) rmsNorm(qkv, qkv, start, hs, null, c.norm_eps);
    }
    layer.keys.set(qkv.subarray(c.n_embd, c.n_embd + width), position * width);
    layer.values.set(qkv.subarray(c.n_embd + width), position * width);
    const scale = 1 / Math.sqrt(hs);
    for (let head = 0; head < c.n_head; head++) {
      const q = head * hs;
      const kv = Math.floor(head * this.nKvHead / c.n_head) * hs;
      let largest = -Infinity;
      for (let t = 0; t <= position; t++) {
        const key = t * width + kv;
        let sum = 0;
        for (let i = 0; i < hs; i++) sum += qkv[q + i] * layer.keys[key + i];
        scores[t] = sum * scale;
        if (scores[t] > largest) largest = scores[t];
      }
      let total = 0;
      for (let t = 0; t <= position; t++) total += scores[t] = Math.exp(scores[t] - largest);
      mixed.fill(0, q, q + hs);
      for (let t = 0; t <= position; t++) {
        const weight = scores[t] / total;
        const value = t * width + kv;
        for (let i = 0; i < hs; i++) mixed[q + i] += weight * layer.values[value + i];
      }
    }
    multiply(this.kernel, this.normed, layer.proj, mixed, layer.projBias);
    for (let i = 0; i < c.n_embd; i++) this.x[i] += this.normed[i];
  }

  /** cos and sin of the rotation angles of a position. */
  setAngles(position) {
    for (let i = 0; i < this.cos.length; i++) {
      const angle = position * this.config.rope_theta ** (-2 * i / this.headSize);
      this.cos[i] = Math.cos(angle);
      this.sin[i] = Math.sin(angle);
    }
  }

  /** Rotate the adjacent pairs of the head that begins at `start` in qkv (RoPE; Su et al. 2021). */
  rotate(start) {
    for (let i = 0; i < this.cos.length; i++) {
      const at = start + 2 * i;
      const even = this.qkv[at];
      const odd = this.qkv[at + 1];
      this.qkv[at] = even * this.cos[i] - odd * this.sin[i];
      this.qkv[at + 1] = even * this.sin[i] + odd * this.cos[i];
    }
  }

  /** x += MLP of `normed`. */
  mlp(layer) {
    const {hidden} = this;
    const activation = ACTIVATIONS[this.config.activation];
    multiply(this.kernel, hidden, layer.fc, this.normed, layer.fcBias);
    const width = layer.out.columns;
    if (this.config.activation === "swiglu") {
      for (let i = 0; i < width; i++) hidden[i] = activation(hidden[i]) * hidden[width + i];
    } else {
      for (let i = 0; i < width; i++) hidden[i] = activation(hidden[i]);
    }
    multiply(this.kernel, this.normed, layer.out, hidden, layer.outBias);
    for (let i = 0; i < this.config.n_embd; i++) this.x[i] += this.normed[i];
  }
}

return {Model};
})();
