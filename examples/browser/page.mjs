// The page: loads and checks the export, cuts its own connections, then trains on what the user gives it.

import { Tokenizer } from "/npm/tokenizers.mjs";
import * as ort from "/npm/onnxruntime-web/ort.wasm.min.mjs";
import { ExportError, openExport, sha256 } from "/javascript/artifacts.mjs";
import { SecretKey } from "/javascript/randomness.mjs";
import { RecordsError, columnsOf, readRecords, tokenizerOf } from "/javascript/records.mjs";
import { PrivateTraining, formatEpsilon } from "/javascript/training.mjs";

const $ = (id) => document.getElementById(id);
const asked = new URLSearchParams(location.search);
// For tests only: with a known seed there is NO PRIVACY, and the page and privacy.json say so.
const insecureSeed = asked.get("insecure-seed-for-tests");

const state = (name) => (document.body.dataset.state = name);

function fail(error) {
  const ours = error instanceof ExportError || error instanceof RecordsError;
  $("problem").textContent = ours ? error.message : "Something went wrong in the browser. Nothing was released. Reload the page.";
  $("problem").hidden = false;
  if (!ours) console.error(error.name); // not its message, which may hold a record
}

/** One download of every file of the export: hashed, then handed to ONNX Runtime from memory. */
function downloads() {
  const kept = new Map();
  const read = async (name) => {
    if (!kept.has(name)) {
      const answer = await fetch(`/export/${name}`);
      if (!answer.ok) throw new ExportError(`The export lacks ${name}. Copy the whole folder, or export again.`);
      kept.set(name, new Uint8Array(await answer.arrayBuffer()));
    }
    return kept.get(name);
  };
  return { read, sha256: async (name) => sha256(await read(name)) };
}

async function load() {
  ort.env.wasm.numThreads = crossOriginIsolated ? Number(asked.get("threads") ?? Math.min(4, navigator.hardwareConcurrency)) : 1;
  const files = downloads();
  const exported = await openExport(files);
  $("check-hashes").className = "ok";
  const externalData = [];
  for (const name of exported.external) externalData.push({ path: name, data: await files.read(name) });
  const options = { executionProviders: ["wasm"], graphOptimizationLevel: "all", logSeverityLevel: 4 };
  const graphs = {
    grad: await ort.InferenceSession.create(await files.read("grad_step.onnx"), { ...options, externalData }),
    update: await ort.InferenceSession.create(await files.read("update_step.onnx"), options),
  };
  return { exported, graphs, tokenize: tokenizerOf(Tokenizer, exported) };
}

/** Policies add up, and none can be taken back: from here on the browser refuses every request of this page. */
async function cutConnections() {
  const policy = document.createElement("meta");
  policy.httpEquiv = "Content-Security-Policy";
  policy.content = "default-src 'none'";
  document.head.append(policy);
  const refused = new Promise((resolve) => {
    const told = (event) => resolve(event.effectiveDirective === "connect-src" && event.disposition === "enforce");
    document.addEventListener("securitypolicyviolation", told, { once: true });
    setTimeout(resolve, 5000, false);
  });
  fetch("/export/manifest.json").catch(() => {}); // a try, that the browser has to refuse
  if (!(await refused)) throw new ExportError("This browser does not let the page cut its connections. Use a current browser.");
  $("check-closed").className = "ok";
}

function describe({ exported }) {
  const { manifest, budget } = exported;
  const n = (value) => value.toLocaleString("en");
  $("model").textContent =
    `${n(manifest.num_trainable)} of the model's ${n(manifest.num_parameters)} numbers are trained. ` +
    `Prepared for about ${n(budget.dataset_size)} records.`;
  const columns = columnsOf(exported);
  $("columns").textContent = manifest.text
    ? `The first line is text,label; the labels are ${manifest.text.labels.join(" and ")}.`
    : `The first line names the columns: ${columns.join(",")}.`;
  $("table").placeholder = manifest.text
    ? ["text,label", ...manifest.text.labels.slice(0, 3).map((label) => `"A text of yours",${label}`)].join("\n")
    : `${columns.join(",")}\n${columns.map(() => "0").join(",")}`;
  $("rate").value = manifest.optimizer.lr;
  $("steps").textContent = n(budget.steps);
  $("target").textContent = budget.target_epsilon;
  $("delta").textContent = budget.target_delta;
  $("sample-rate").textContent = `${(100 * budget.sample_rate).toPrecision(3)} %`;
  showProgress(exported, 0);
}

function showProgress({ budget }, done) {
  $("step").textContent = done;
  $("step-bar").value = done / budget.steps;
  $("epsilon").textContent = formatEpsilon(budget.epsilon_by_step[done]);
  $("epsilon-bar").value = budget.epsilon_by_step[done] / budget.target_epsilon;
}

/** The records in the table, or null with the reason shown. */
function recordsOf({ exported, tokenize }) {
  const table = $("table").value;
  $("problem").hidden = true;
  try {
    const records = table.trim() ? readRecords(exported, table, window.Papa.parse, tokenize) : null;
    $("count").textContent = records ? `${records.size} records.` : "No records yet.";
    return records;
  } catch (error) {
    $("count").textContent = "Not a table of records yet.";
    fail(error);
    return null;
  }
}

async function train(loaded, records) {
  const { exported, graphs } = loaded;
  const key = insecureSeed === null ? await SecretKey.generate() : await SecretKey.insecureForTests(insecureSeed);
  const training = new PrivateTraining(ort, graphs, exported, records, key, {
    learningRate: Number($("rate").value),
    physicalBatchSize: Number($("rows").value),
  });
  for (const id of ["table", "file", "start", "rate", "rows"]) $(id).disabled = true;
  $("table").value = ""; // the training holds its own copy
  state("training");
  let stopped = false;
  $("stop").disabled = false;
  $("stop").onclick = () => {
    stopped = true;
    $("stop").disabled = true;
  };
  const repaint = () => new Promise((resolve) => setTimeout(resolve, 0));
  while (training.done < training.steps && !stopped) {
    await training.step(repaint);
    showProgress(exported, training.done);
  }
  $("stop").disabled = true;
  offer(exported, training);
  state("done");
}

function offer({ manifest, budget }, training) {
  const versions = { "onnxruntime-web": ort.env.versions.web, browser: navigator.userAgent };
  const statement = training.statement(`onnxruntime-web ${ort.env.versions.web}`, versions);
  const link = (id, content, type) => {
    $(id).href = URL.createObjectURL(new Blob([content], { type }));
    $(id).classList.remove("off");
  };
  link("biases", training.biases(), "application/octet-stream");
  link("privacy", JSON.stringify(statement, null, 2) + "\n", "application/json");
  $("result").textContent = training.insecure
    ? "The noise came from a known seed: there is no privacy at all."
    : `${manifest.num_trainable.toLocaleString("en")} numbers, private with epsilon = ${formatEpsilon(training.epsilon)} at delta = ` +
      `${budget.target_delta}, after ${training.done} steps.`;
}

try {
  $("insecure").hidden = insecureSeed === null;
  const loaded = await load();
  await cutConnections();
  describe(loaded);
  let records = null;
  const refresh = () => {
    records = recordsOf(loaded);
    $("start").disabled = !records;
  };
  $("table").oninput = refresh;
  $("file").onchange = async () => {
    const [file] = $("file").files;
    if (!file) return;
    $("table").value = await file.text();
    refresh();
  };
  $("start").onclick = () =>
    train(loaded, records).catch((error) => {
      fail(error);
      state("failed");
    });
  $("table").disabled = $("file").disabled = false;
  state("ready");
} catch (error) {
  fail(error);
  state("failed");
}
