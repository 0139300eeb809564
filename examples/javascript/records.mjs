// The user's records, from a table of strings to arrays of the export's fixed, public shapes.
//
// A record's padding and cutting depend on that record alone. Messages name a row by its number and never quote it.

import { emptyRows } from "./training.mjs";

export class RecordsError extends Error {}

const leaf = (entry) => entry.path.replace(/^\/+|\/+$/g, "").split("/").at(-1);
const width = (entry) => entry.shape.reduce((product, n) => product * n, 1);

/** The names of the columns that a table for this export must have. */
export function columnsOf({ manifest }) {
  if (manifest.text) return ["text", "label"];
  return manifest.batch_inputs.flatMap((entry) =>
    entry.shape.length ? Array.from({ length: width(entry) }, (_, i) => `${leaf(entry)}_${i}`) : [leaf(entry)],
  );
}

/**
 * { size, columns: { entry: typed array of all rows } } of a table with a header.
 *
 * parse: papaparse's Papa.parse. tokenize: for an export of texts, from tokenizerOf.
 */
export function readRecords(exported, table, parse, tokenize) {
  const { data, errors, meta } = parse(table, { header: true, skipEmptyLines: "greedy" });
  const bad = errors.find((e) => e.code !== "UndetectableDelimiter");
  if (bad) throw new RecordsError(`Row ${(bad.row ?? 0) + 1} is not a regular row of the table: check its commas and quotes.`);
  const missing = columnsOf(exported).filter((name) => !meta.fields?.includes(name));
  if (missing.length) {
    const some = missing.slice(0, 3).join(", ") + (missing.length > 3 ? ", ..." : "");
    throw new RecordsError(`The first line must name the columns; these are missing: ${some}.`);
  }
  if (!data.length) throw new RecordsError("There are no records.");
  const { batch_inputs: entries, text } = exported.manifest;
  const columns = Object.fromEntries(entries.map((entry) => [entry.name, emptyRows(entry, data.length)]));
  data.forEach((row, i) => {
    const values = text ? textValues(row, i, entries, text, tokenize) : null;
    for (const entry of entries) {
      const size = width(entry);
      const found = values ? values[leaf(entry)] : numbers(row, i, entry, size);
      columns[entry.name].set(found, i * size);
    }
  });
  return { size: data.length, columns };
}

function numbers(row, i, entry, size) {
  const names = entry.shape.length ? Array.from({ length: size }, (_, j) => `${leaf(entry)}_${j}`) : [leaf(entry)];
  return names.map((name) => {
    const cell = row[name].trim();
    if (entry.dtype === "float32") {
      if (cell !== "" && Number.isFinite(Math.fround(Number(cell)))) return Number(cell);
    } else if (/^[+-]?\d{1,9}$/.test(cell) && inRange(Number(cell), entry.dtype)) {
      return entry.dtype === "int64" ? BigInt(Number(cell)) : Number(cell);
    }
    throw new RecordsError(`Row ${i + 1}: ${name} is not a number that the model takes (${entry.dtype}).`);
  });
}

function inRange(value, dtype) {
  const [low, high] = { bool: [0, 1], uint8: [0, 255] }[dtype] ?? [-Infinity, Infinity];
  return value >= low && value <= high;
}

function textValues(row, i, entries, { labels, pad_id }, tokenize) {
  const length = entries.find((entry) => leaf(entry) === "input_ids").shape[0];
  const label = labels.indexOf(row.label.trim());
  if (label < 0) throw new RecordsError(`Row ${i + 1}: its label is not one of ${labels.join(", ")}.`);
  const ids = tokenize(row.text, length);
  if (!ids.length) throw new RecordsError(`Row ${i + 1}: the tokenizer finds no token in the text.`);
  const padded = (values, fill) => Array.from({ length }, (_, j) => BigInt(j < ids.length ? values(j) : fill));
  return {
    input_ids: padded((j) => ids[j], pad_id),
    attention_mask: padded(() => 1, 0),
    labels: [BigInt(label)],
  };
}

/** (text, length) -> token ids, cut to `length` with the special tokens kept, by @huggingface/tokenizers' Tokenizer. */
export function tokenizerOf(Tokenizer, { tokenizer, manifest }) {
  if (!tokenizer) return null;
  const parts = manifest.batch_inputs.map(leaf);
  if (!parts.includes("input_ids") || parts.some((p) => !["input_ids", "attention_mask", "labels"].includes(p))) {
    throw new RecordsError(`The export takes ${parts.join(", ")}: not token ids with one label per record.`);
  }
  const made = new Tokenizer(tokenizer, {});
  return (text, length) => {
    const whole = made.encode(text).ids;
    if (whole.length <= length) return whole;
    const bare = made.encode(text, { add_special_tokens: false }).ids;
    const special = whole.length - bare.length;
    const before = Array.from({ length: special + 1 }, (_, n) => n).find((n) => bare.every((id, j) => whole[n + j] === id));
    return [...whole.slice(0, before), ...bare.slice(0, length - special), ...whole.slice(before + bare.length)];
  };
}
