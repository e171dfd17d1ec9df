// How a program without Python takes part: node tests/conformance/example.js FOLDER
// computes the cases of three operations and writes FOLDER/results.safetensors, which
// python -m tests.conformance.check FOLDER compares. Nothing but node is needed.

const fs = require("fs");
const path = require("path");

// --- the safetensors format: header length, header, bytes ---------------------------------------

const KINDS = { F64: Float64Array, F32: Float32Array, I8: Int8Array, I32: Int32Array, I64: BigInt64Array };

function fromHalf(h) {
  const sign = h >> 15 ? -1 : 1, exponent = (h >> 10) & 31, fraction = h & 1023;
  if (exponent === 31) return fraction ? NaN : sign * Infinity;
  return sign * (exponent ? 2 ** (exponent - 25) * (1024 + fraction) : 2 ** -24 * fraction);
}

function fromBfloat(h) {
  return new Float32Array(new Uint32Array([h << 16]).buffer)[0];
}

function read(file) {
  const bytes = fs.readFileSync(file);
  const start = 8 + Number(bytes.readBigUInt64LE(0));
  const header = JSON.parse(bytes.subarray(8, start).toString());
  return (name) => {
    const { dtype, shape, data_offsets } = header[name];
    const [begin, end] = data_offsets.map((offset) => start + offset);
    const copy = new Uint8Array(bytes.subarray(begin, end)).buffer; // aligned
    const wide = { F16: fromHalf, BF16: fromBfloat }[dtype];
    const data = wide ? Float32Array.from(new Uint16Array(copy), wide) : new KINDS[dtype](copy);
    return { shape, data };
  };
}

function write(file, tensors) {
  const header = {}, parts = [];
  let begin = 0;
  for (const [name, { shape, data }] of Object.entries(tensors)) {
    const dtype = Object.keys(KINDS).find((kind) => data instanceof KINDS[kind]);
    const end = begin + data.byteLength;
    header[name] = { dtype, shape, data_offsets: [begin, end] };
    parts.push(Buffer.from(data.buffer));
    begin = end;
  }
  const text = Buffer.from(JSON.stringify(header));
  const length = Buffer.alloc(8);
  length.writeBigUInt64LE(BigInt(text.length));
  fs.writeFileSync(file, Buffer.concat([length, text, ...parts]));
}

// --- tensors that are not in the file, but made by a recipe --------------------------------------

function mixed(x) {
  x = Math.imul(x ^ (x >>> 16), 0x7feb352d);
  x = Math.imul(x ^ (x >>> 15), 0x846ca68b);
  return (x ^ (x >>> 16)) >>> 0;
}

const VALUES = { // of a number z, and how far along the last axis but one it stands, from 0 to 1
  bell: (z) => z, positive: Math.abs, negative: (z) => -Math.abs(z), heavy: (z) => z * z * z,
  levels: Math.floor, equal: () => 1, zero: () => 0,
  rising: (z, step) => z + 8 * step, falling: (z, step) => z - 8 * step,
  sink: (z, step) => z / 16 + (step === 0 ? 5 : 0),
};

function made({ values, seed, size, shape }) { // float32, or words in int32
  const count = shape.reduce((a, b) => a * b, 1), first = mixed(seed);
  const word = (i) => mixed((first + i) >>> 0);
  if (values === "words") return { shape, data: Int32Array.from({ length: count }, (_, i) => word(i)) };
  const [rows, width] = shape.slice(-2);
  const data = Float32Array.from({ length: count }, (_, i) => {
    const w = word(2 * i), bytes = (w & 255) + ((w >>> 8) & 255) + ((w >>> 16) & 255) + (w >>> 24);
    const z = (bytes - 510 + word(2 * i + 1) / 2 ** 32) / 128;
    return size * VALUES[values](z, (Math.floor(i / width) % rows) / rows);
  });
  return { shape, data };
}

// --- the implementation under test --------------------------------------------------------------

const operations = {
  attention_lse({ q, k }, { causal = false, scale }) {
    const [B, H, M, D] = q.shape, [G, N] = k.shape.slice(1), lse = new Float32Array(B * H * M);
    for (let row = 0; row < lse.length; row++) {
      const i = row % M, h = Math.floor(row / M) % H, b = Math.floor(row / M / H);
      const keys = (b * G + Math.floor(h / (H / G))) * N, seen = causal ? N - M + i + 1 : N;
      const scores = [];
      for (let j = 0; j < seen; j++) {
        let sum = 0;
        for (let d = 0; d < D; d++) sum += q.data[row * D + d] * k.data[(keys + j) * D + d];
        scores.push(sum * (scale ?? D ** -0.5));
      }
      const top = scores.reduce((a, x) => Math.max(a, x), -Infinity);
      const total = scores.reduce((a, x) => a + Math.exp(x - top), 0);
      lse[row] = top === -Infinity ? top : top + Math.log(total);
    }
    return { lse: { shape: [B, H, M], data: lse } };
  },
  select_tokens({ scores }, { keep }) {
    const n = scores.shape.at(-1), data = [];
    for (let start = 0; start < scores.data.length; start += n) {
      const row = scores.data.subarray(start, start + n), order = [...row.keys()];
      // Ties go to the lower index; no difference, for that of two infinities is NaN.
      order.sort((i, j) => (row[i] < row[j]) - (row[i] > row[j]) || i - j);
      data.push(...order.slice(0, keep).sort((i, j) => i - j));
    }
    return { index: { shape: [...scores.shape.slice(0, -1), keep], data: BigInt64Array.from(data, BigInt) } };
  },
  unpack({ packed }) {
    const [rows, words] = packed.shape;
    const codes = new Int8Array(rows * words * 8);
    const columns = [0, 2, 4, 6, 1, 3, 5, 7]; // of the nibble at bits 4 i
    packed.data.forEach((word, at) =>
      columns.forEach((column, i) => (codes[8 * at + column] = (word >> (4 * i)) & 15)));
    return { codes: { shape: [rows, 8 * words], data: codes } };
  },
};

// --- all cases of these operations --------------------------------------------------------------

const golden = path.join(__dirname, "..", "golden", "conformance");
const tensor = read(path.join(golden, "vectors.safetensors"));
const results = {};
for (const it of JSON.parse(fs.readFileSync(path.join(golden, "manifest.json"))).cases) {
  if (!(it.operation in operations)) continue;
  const inputs = {};
  for (const name in it.inputs) {
    const { tensor: stored, ...recipe } = it.inputs[name];
    inputs[name] = stored ? tensor(stored) : made(recipe);
  }
  const outputs = operations[it.operation](inputs, it.parameters);
  for (const name in it.outputs) results[it.outputs[name].tensor] = outputs[name];
}
const folder = process.argv[2];
fs.mkdirSync(folder, { recursive: true });
write(path.join(folder, "results.safetensors"), results);
