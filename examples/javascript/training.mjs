// A private run on the plain pair grad_step.onnx and update_step.onnx, in any JavaScript that has ONNX Runtime.
//
// One logical step: draw every record with probability sample_rate; sum the clipped gradients of the drawn ones over
// micro-batches of a fixed size, padded and masked; add noise once; update. An empty draw takes the same noisy step.
// The sum before noise and the size of a draw are private: they stay in this class.

import { ExportError, writeBiases } from "./artifacts.mjs";

const ARRAYS = { float32: Float32Array, int64: BigInt64Array, int32: Int32Array, uint8: Uint8Array, bool: Uint8Array };

/** A zeroed typed array for `size` rows of a batch entry of the manifest. */
export function emptyRows(entry, size) {
  return new ARRAYS[entry.dtype](size * entry.shape.reduce((product, n) => product * n, 1));
}

export class PrivateTraining {
  #ort;
  #graphs;
  #exported;
  #records;
  #key;
  #options;
  #state;
  #steps = 0;
  #busy = false;
  #runId = Array.from(crypto.getRandomValues(new Uint8Array(16)), (b) => b.toString(16).padStart(2, "0")).join("");

  /**
   * ort: onnxruntime-node or onnxruntime-web. graphs: { grad, update }, their sessions. exported: from openExport.
   * records: from readRecords. key: a SecretKey. options: { learningRate, physicalBatchSize }, both public.
   */
  constructor(ort, graphs, exported, records, key, options = {}) {
    const { manifest, budget, initial } = exported;
    const { learningRate = manifest.optimizer.lr, physicalBatchSize = 8 } = options;
    if (!(learningRate > 0 && Number.isFinite(learningRate))) throw new ExportError("The learning rate must be above 0.");
    if (!(Number.isInteger(physicalBatchSize) && physicalBatchSize > 0)) {
      throw new ExportError("The physical batch size must be a whole number above 0.");
    }
    if (records.size * budget.target_delta >= 1) {
      throw new ExportError(`For ${records.size} records, delta = ${budget.target_delta} is not below 1/N. Prepare a smaller one.`);
    }
    Object.assign(this, { steps: budget.steps });
    this.#ort = ort;
    this.#graphs = graphs;
    this.#exported = exported;
    this.#records = records;
    this.#key = key;
    this.#options = { learningRate, physicalBatchSize };
    const size = manifest.num_trainable;
    this.#state = { theta: this.#floats(initial.slice()) };
    if (manifest.optimizer.type === "AdamW") {
      const t = new ort.Tensor("int64", new BigInt64Array(1), [1]);
      Object.assign(this.#state, { m: this.#floats(new Float32Array(size)), v: this.#floats(new Float32Array(size)), t });
    }
  }

  /** Logical steps taken. `steps` is how many the budget allows. */
  get done() {
    return this.#steps;
  }

  /** Epsilon of everything so far, earlier runs included; looked up in the export's table, never computed here. */
  get epsilon() {
    return this.#exported.budget.epsilon_by_step[this.#steps];
  }

  get insecure() {
    return this.#key.insecure;
  }

  /** One private logical step. `pause` is awaited between micro-batches, so that a page can stay alive. */
  async step(pause = async () => {}) {
    if (this.#steps >= this.steps) throw new ExportError("The budget has no steps left.");
    if (this.#busy) throw new ExportError("A step is already under way.");
    this.#busy = true;
    try {
      const size = this.#exported.manifest.num_trainable;
      const noise = this.#floats(Float32Array.from(await this.#key.normal("noise", this.#steps, size)));
      const sum = await this.#clippedSum(await this.#draw(), pause);
      const learning_rate = this.#floats(new Float32Array([this.#options.learningRate]));
      const results = await this.#run(this.#graphs.update, { ...this.#state, accumulator: sum, noise, learning_rate });
      this.#state = Object.fromEntries(Object.keys(this.#state).map((name) => [name, results[`${name}_out`]]));
      this.#steps += 1;
    } finally {
      this.#busy = false;
    }
  }

  /** The Poisson draw of this step: row numbers, maybe none. PRIVATE. */
  async #draw() {
    const numbers = await this.#key.uniform("poisson sample", this.#steps, this.#records.size);
    const rate = this.#exported.budget.sample_rate;
    return Array.from(numbers.keys()).filter((row) => numbers[row] < rate);
  }

  /** The accumulator after every micro-batch of the draw, at least one. SECRET: only the update may read it. */
  async #clippedSum(rows, pause) {
    const { batch_inputs: entries, num_trainable: size } = this.#exported.manifest;
    const physical = this.#options.physicalBatchSize;
    let accumulator = this.#floats(new Float32Array(size));
    for (let start = 0; start < Math.max(1, rows.length); start += physical) {
      const chosen = rows.slice(start, start + physical);
      const mask = new Float32Array(physical).fill(1, 0, chosen.length);
      const feeds = { theta: this.#state.theta, accumulator, sample_mask: this.#floats(mask) };
      for (const entry of entries) {
        const block = emptyRows(entry, physical);
        const width = block.length / physical;
        const column = this.#records.columns[entry.name];
        chosen.forEach((row, i) => block.set(column.subarray(row * width, (row + 1) * width), i * width));
        feeds[entry.name] = new this.#ort.Tensor(entry.dtype, block, [physical, ...entry.shape]);
      }
      accumulator = (await this.#run(this.#graphs.grad, feeds)).accumulator_out;
      await pause();
    }
    return accumulator;
  }

  async #run(session, feeds) {
    const given = Object.fromEntries(session.inputNames.map((name) => [name, feeds[name]]));
    try {
      return await session.run(given);
    } catch {
      // Not its own words: ONNX Runtime quotes the value that it stumbled over, which is somebody's.
      throw new ExportError(
        `ONNX Runtime could not compute step ${this.#steps}; nothing of it was released. The usual cause is a record with ` +
          "an index that the model does not have: a label beyond its classes, or a token of another tokenizer.",
      );
    }
  }

  #floats(values) {
    return new this.#ort.Tensor("float32", values, [values.length]);
  }

  /** The trained parameters as one vector, in the manifest's order. */
  get parameters() {
    return Float32Array.from(this.#state.theta.data);
  }

  /** The bytes of biases.safetensors. */
  biases() {
    const about = { graph_hash: this.#exported.manifest.graph_hash, run_id: this.#runId };
    return writeBiases(this.parameters, this.#exported.manifest, about);
  }

  /** What privacy.json says of a run that stops here; `backend` and `versions` say what ran it. */
  statement(backend, versions) {
    const { statement, insecure_caveat } = this.#exported.budget;
    const { learningRate: learning_rate, physicalBatchSize: physical_batch_size } = this.#options;
    return {
      ...statement,
      epsilon: this.epsilon,
      steps: this.#steps,
      run_id: this.#runId,
      insecure: this.insecure,
      numeric_caveats: [...(this.insecure ? [insecure_caveat] : []), ...statement.numeric_caveats],
      backend,
      library_versions: { ...statement.library_versions, ...versions },
      public_declarations: { ...statement.public_declarations, learning_rate, physical_batch_size },
    };
  }
}

/** `value` rounded up, so that a printed epsilon is never below the one computed. */
export function formatEpsilon(value, decimals = 4) {
  const scale = 10 ** decimals;
  const rounded = Math.ceil(value * scale) / scale;
  return (rounded < value ? (Math.ceil(value * scale) + 1) / scale : rounded).toFixed(decimals);
}
