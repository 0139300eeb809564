// Private bias tuning in Node.js, from the folder of a plain export (dpbitfit export --format onnx, then dpbitfit ort-budget).
//
//   node examples/node/train.mjs EXPORT RECORDS.csv --output OUT [--steps 3] [--learning-rate 0.01]
//
// Writes OUT/biases.safetensors, for dpbitfit_fx.load_biases on the PyTorch model, and OUT/privacy.json.

import { createHash } from "node:crypto";
import { createReadStream } from "node:fs";
import { mkdir, readFile, writeFile } from "node:fs/promises";
import { basename, join } from "node:path";
import { parseArgs } from "node:util";

import { Tokenizer } from "@huggingface/tokenizers";
import * as ort from "onnxruntime-node";
import Papa from "papaparse";

import { ExportError, openExport } from "../javascript/artifacts.mjs";
import { SecretKey } from "../javascript/randomness.mjs";
import { RecordsError, readRecords, tokenizerOf } from "../javascript/records.mjs";
import { PrivateTraining, formatEpsilon } from "../javascript/training.mjs";

const USAGE = `node ${basename(process.argv[1])} EXPORT RECORDS.csv --output OUT
  --steps N                 fewer steps than the export's budget allows
  --learning-rate X         default: the export's
  --physical-batch-size N   rows per forward and backward pass (8): memory only
  --insecure-seed-for-tests N   a known key: NO PRIVACY, recorded in privacy.json`;

async function main() {
  const { values, positionals } = parseArgs({
    allowPositionals: true,
    options: {
      output: { type: "string" },
      steps: { type: "string" },
      "learning-rate": { type: "string" },
      "physical-batch-size": { type: "string" },
      "insecure-seed-for-tests": { type: "string" },
    },
  });
  if (positionals.length !== 2 || !values.output) throw new ExportError(USAGE);
  const [folder, table] = positionals;

  const exported = await openExport({
    read: (name) => readFile(join(folder, name)),
    sha256: async (name) => {
      const hash = createHash("sha256");
      for await (const chunk of createReadStream(join(folder, name))) hash.update(chunk);
      return hash.digest("hex");
    },
  });
  const options = { graphOptimizationLevel: "all", executionProviders: ["cpu"], logSeverityLevel: 4 };
  const open = (name) => ort.InferenceSession.create(join(folder, name), options);
  const graphs = { grad: await open("grad_step.onnx"), update: await open("update_step.onnx") };
  const tokenize = tokenizerOf(Tokenizer, exported);
  const records = readRecords(exported, await readFile(table, "utf8"), Papa.parse, tokenize);

  const seed = values["insecure-seed-for-tests"];
  const key = seed === undefined ? await SecretKey.generate() : await SecretKey.insecureForTests(seed);
  if (key.insecure) console.error("INSECURE: a known seed makes the noise. The result has NO PRIVACY.");
  const number = (name) => (values[name] === undefined ? undefined : Number(values[name]));
  const training = new PrivateTraining(ort, graphs, exported, records, key, {
    learningRate: number("learning-rate"),
    physicalBatchSize: number("physical-batch-size"),
  });
  const steps = number("steps") ?? training.steps;
  if (!(Number.isInteger(steps) && steps > 0 && steps <= training.steps)) {
    throw new ExportError(`--steps must be between 1 and ${training.steps}, which is what the budget allows.`);
  }
  const { target_epsilon: target, target_delta: delta } = exported.budget;
  while (training.done < steps) {
    await training.step();
    console.log(`step ${training.done} of ${steps}: epsilon ${formatEpsilon(training.epsilon)} of ${target} at delta ${delta}`);
  }

  await mkdir(values.output, { recursive: true });
  const write = (name, data) => writeFile(join(values.output, name), data, { flag: "wx" });
  const versions = { node: process.version, "onnxruntime-node": ort.env.versions.node };
  const statement = training.statement(`onnxruntime-node ${ort.env.versions.node}`, versions);
  await write("privacy.json", JSON.stringify(statement, null, 2) + "\n");
  await write("biases.safetensors", training.biases());
}

main().catch((error) => {
  const ours = error instanceof ExportError || error instanceof RecordsError;
  console.error(ours || error.code ? error.message : error);
  process.exitCode = 2;
});
