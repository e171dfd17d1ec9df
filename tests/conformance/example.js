// How a program without Python takes part: node tests/conformance/example.js FOLDER
// computes the cases of two operations and writes FOLDER/results.safetensors, which
// python -m tests.conformance.check FOLDER compares. Nothing but node is needed.

const fs = require("fs");
const path = require("path");

// --- the safetensors format: header length, header, bytes ---------------------------------------

const KINDS = { F32: Float32Array, I8: Int8Array, I32: Int32Array, I64: BigInt64Array };

function read(file) {
  const bytes = fs.readFileSync(file);
  const start = 8 + Number(bytes.readBigUInt64LE(0));
  const header = JSON.parse(bytes.subarray(8, start).toString());
  return (name) => {
    const { dtype, shape, data_offsets } = header[name];
    const [begin, end] = data_offsets.map((offset) => start + offset);
    const copy = new Uint8Array(bytes.subarray(begin, end)); // aligned
    return { shape, data: new KINDS[dtype](copy.buffer) };
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

// --- the implementation under test --------------------------------------------------------------

const operations = {
  select_tokens({ scores }, { keep }) {
    const order = [...scores.data.keys()];
    order.sort((i, j) => scores.data[j] - scores.data[i] || i - j); // ties to the lower index
    const chosen = order.slice(0, keep).sort((i, j) => i - j);
    return { index: { shape: [keep], data: BigInt64Array.from(chosen, BigInt) } };
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
for (const it of JSON.parse(fs.readFileSync(path.join(golden, "manifest.json")))) {
  if (!(it.operation in operations)) continue;
  const inputs = {};
  for (const name in it.inputs) inputs[name] = tensor(it.inputs[name].tensor);
  const outputs = operations[it.operation](inputs, it.parameters);
  for (const name in it.outputs) results[it.outputs[name].tensor] = outputs[name];
}
const folder = process.argv[2];
fs.mkdirSync(folder, { recursive: true });
write(path.join(folder, "results.safetensors"), results);
