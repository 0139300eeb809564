// The files of a plain export (dpbitfit_fx.export_onnx) and of its results: manifest, hashes, safetensors.

const text = new TextEncoder();
const GRAPHS = ["grad_step.onnx", "update_step.onnx"];

/** What went wrong, in words for the user. Never quotes a record. */
export class ExportError extends Error {}

/**
 * The checked contents of an export: { manifest, budget, initial, tokenizer, external }.
 *
 * files: { read(name) -> Uint8Array, sha256(name) -> hex } of the export's folder, both async.
 * external: the names of the files that hold the graphs' large frozen weights.
 */
export async function openExport(files) {
  const manifest = json(await files.read("manifest.json"), "manifest.json");
  if (manifest.format !== "dpbitfit_fx.onnx.v1" || manifest.target !== "onnx") {
    throw new ExportError("This is not a plain ONNX export that this program can read. Export with --format onnx.");
  }
  for (const name of [...GRAPHS, "initial.safetensors", "budget.json"]) {
    if (!(name in manifest.files)) {
      const how = name === "budget.json" ? "Run `dpbitfit ort-budget` on the export first." : "Export again.";
      throw new ExportError(`The manifest does not list ${name}. ${how}`);
    }
  }
  for (const [name, digest] of Object.entries(manifest.files)) {
    if (!/^[A-Za-z0-9_][A-Za-z0-9_.-]*$/.test(name)) throw new ExportError("The manifest lists a file outside the export.");
    if ((await files.sha256(name)) !== digest) {
      throw new ExportError(`${name} was changed after the export, so it is not what was proved private. Export again.`);
    }
  }
  const budget = json(await files.read("budget.json"), "budget.json");
  checkBudget(budget, manifest);
  return {
    manifest,
    budget,
    initial: flatten(readSafetensors(await files.read("initial.safetensors")), manifest),
    tokenizer: manifest.text ? json(await files.read(manifest.text.tokenizer), manifest.text.tokenizer) : null,
    external: Object.keys(manifest.files).filter((name) => !/\.(onnx|json|safetensors)$/.test(name)),
  };
}

function json(bytes, name) {
  try {
    return JSON.parse(new TextDecoder().decode(bytes));
  } catch {
    throw new ExportError(`${name} is damaged. Export again.`);
  }
}

/** The table belongs to these graphs: noise and denominator are theirs, epsilon never falls and keeps to its target. */
function checkBudget(budget, manifest) {
  const table = budget.epsilon_by_step;
  const sound =
    budget.format === "dpbitfit_fx.budget.v1" &&
    budget.noise_multiplier === manifest.noise_multiplier &&
    budget.statement.graph_hash === manifest.graph_hash &&
    Math.abs(budget.expected_batch_size / manifest.expected_batch_size - 1) < 1e-9 &&
    budget.sample_rate > 0 &&
    budget.sample_rate <= 1 &&
    table.length === budget.steps + 1 &&
    table.every((epsilon, i) => Number.isFinite(epsilon) && (i === 0 || epsilon >= table[i - 1])) &&
    table[budget.steps] <= budget.target_epsilon;
  if (!sound) throw new ExportError("budget.json does not belong to this export. Run `dpbitfit ort-budget` again.");
}

export async function sha256(bytes) {
  const digest = new Uint8Array(await crypto.subtle.digest("SHA-256", bytes));
  return Array.from(digest, (byte) => byte.toString(16).padStart(2, "0")).join("");
}

/** { name: { shape, data: Float32Array } } of a safetensors file of float32. */
export function readSafetensors(bytes) {
  const view = new DataView(bytes.buffer, bytes.byteOffset, bytes.byteLength);
  const length = Number(view.getBigUint64(0, true));
  const header = JSON.parse(new TextDecoder().decode(bytes.subarray(8, 8 + length)));
  const tensors = {};
  for (const [name, { dtype, shape, data_offsets: [begin, end] }] of Object.entries(header)) {
    if (name === "__metadata__") continue;
    if (dtype !== "F32") throw new ExportError(`${name} is of type ${dtype}; float32 was expected.`);
    tensors[name] = { shape, data: floats(bytes.subarray(8 + length + begin, 8 + length + end)) };
  }
  return tensors;
}

/** A copy, for alignment: Node's Buffer.slice makes none. */
const floats = (bytes) => new Float32Array(Uint8Array.from(bytes).buffer);

function flatten(tensors, manifest) {
  const flat = new Float32Array(manifest.num_trainable);
  for (const { name, offset, numel } of manifest.parameters) {
    if (tensors[name]?.data.length !== numel) throw new ExportError(`initial.safetensors lacks ${name}. Export again.`);
    flat.set(tensors[name].data, offset);
  }
  return flat;
}

/** biases.safetensors of the flat parameters, for `dpbitfit_fx.load_biases` on the PyTorch model. */
export function writeBiases(flat, manifest, about) {
  if (!flat.every(Number.isFinite)) {
    throw new ExportError("The biases are not finite: training diverged. Lower the learning rate.");
  }
  const fingerprints = Object.fromEntries(Object.entries(manifest.fingerprints).map(([k, v]) => [k, String(v)]));
  const header = { __metadata__: { ...about, ...fingerprints, format: "dpbitfit_fx.biases.v1" } };
  for (const { name, shape, offset, numel } of manifest.parameters) {
    header[name] = { dtype: "F32", shape, data_offsets: [4 * offset, 4 * (offset + numel)] };
  }
  const encoded = text.encode(JSON.stringify(header));
  const padded = new Uint8Array(8 * Math.ceil(encoded.length / 8)).fill(0x20);
  padded.set(encoded);
  const bytes = new Uint8Array(8 + padded.length + 4 * flat.length);
  const view = new DataView(bytes.buffer);
  view.setBigUint64(0, BigInt(padded.length), true);
  bytes.set(padded, 8);
  flat.forEach((value, i) => view.setFloat32(8 + padded.length + 4 * i, value, true));
  return bytes;
}
