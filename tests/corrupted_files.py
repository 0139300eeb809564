"""Every file that the library reads, damaged at random: each read gives the original state, or the library's own error.

`tools/fuzz files --variants 10000` runs many; tests/test_corrupted_files.py a slice. A variant is wrong where the read raises
anything but a DPBitFitError, or gives another state than the original's. Where no hash covers a file (`covered=False`), or
the variant was made with its hash made right again (`forged`), only the first of the two is asked.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from dpbitfit_fx.errors import DPBitFitError

ODD: tuple[Any, ...] = (
    None,
    True,
    -1,
    0,
    1e308,
    10**400,
    float("nan"),
    float("inf"),
    "",
    "x" * 5000,
    "\x00",
    [],
    {},
    [[[]]],
    {"a": 1},
    0.5,
)


@dataclass(frozen=True)
class Case:
    """One file: how it is read, and what of a read has to stay the same.

    cut: also right is the state of the file cut at a line end. sign: makes the hash of an edited JSON right again.
    """

    name: str
    path: Path
    read: Callable[[], Any]
    json: bool = False
    covered: bool = True
    cut: bool = False
    sign: Callable[[Any], Any] | None = None


@dataclass
class Tally:
    counts: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)


# -- damage -----------------------------------------------------------------------------------------------------------


def damaged_bytes(data: bytes, chance: random.Random) -> bytes:
    size = len(data)
    a, b = sorted((chance.randrange(size + 1), chance.randrange(size + 1)))
    b = min(b, a + chance.choice((1, 8, 200, size)))
    kind = chance.randrange(8)
    if kind <= 1:
        out = bytearray(data)
        for _ in range(chance.randint(1, 4)):
            out[chance.randrange(size)] ^= 1 << chance.randrange(8)
        return bytes(out)
    if kind == 2:
        return data[:a]
    if kind == 3:
        return data[:b] + data[a:b] + data[b:]
    if kind == 4:
        return data[:a] + data[b:]
    if kind == 5:
        return data[:a] + bytes(b - a) + data[b:]
    if kind == 6:
        return data[a:b] + data[:a] + data[b:]
    return data[:a] + chance.randbytes(b - a) + data[b:]


def _places(value: Any, here: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    pairs = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [(*here, key) for key, _ in pairs] + [
        place for key, child in pairs for place in _places(child, (*here, key))
    ]


def damaged_json(content: Any, chance: random.Random) -> Any:
    """One value replaced by one of another type or size, removed, exchanged with another, or nudged."""
    content = json.loads(json.dumps(content))
    places = _places(content)

    def parent(place: tuple[Any, ...]) -> Any:
        value = content
        for key in place[:-1]:
            value = value[key]
        return value

    place = chance.choice(places)
    holder, key = parent(place), place[-1]
    kind = chance.randrange(5)
    if kind == 0:
        del holder[key]
    elif kind == 1:
        other = chance.choice(places)
        if other[: len(place)] != place and place[: len(other)] != other:
            holder[key], parent(other)[other[-1]] = parent(other)[other[-1]], holder[key]
    elif kind == 2 and isinstance(holder[key], (int, float)) and not isinstance(holder[key], bool):
        holder[key] = holder[key] + chance.choice((-1, 1, 1e-9, 1e9))
    elif kind == 3 and isinstance(holder, dict):
        holder[chance.choice(("", "x", str(key) + "2"))] = holder.pop(key)
    else:
        holder[key] = chance.choice(ODD)
    return content


def variant(case: Case, data: bytes, chance: random.Random) -> tuple[bytes, bool]:
    """A damaged copy of `data`, and whether its hash was made right again."""
    if case.json and chance.random() < 0.5:
        lines = data.splitlines(keepends=True)
        by_line = len(lines) > 1 and all(line.startswith(b"{") and line.endswith(b"}\n") for line in lines)
        number = chance.randrange(len(lines)) if by_line else 0
        changed = damaged_json(json.loads(lines[number] if by_line else data), chance)
        forged = case.sign is not None and chance.random() < 0.5
        if forged and case.sign is not None:
            changed = case.sign(changed)
        separators = (",", ":") if by_line else None
        text = json.dumps(changed, separators=separators, sort_keys=by_line).encode()
        if by_line:
            return b"".join([*lines[:number], text + b"\n", *lines[number + 1 :]]), forged
        return text, forged
    return damaged_bytes(data, chance), False


# -- the files --------------------------------------------------------------------------------------------------------


def build(folder: Path) -> list[Case]:
    """Makes one of each in the folder, from real runs."""
    return [*_of_runs(folder), *_of_ledger(folder), *_of_exports(folder), *_of_data(folder)]


def _resigned(content: Any) -> Any:
    from dpbitfit_fx.files import json_digest

    if isinstance(content, dict):
        rest = {name: value for name, value in content.items() if name != "sha256"}
        return rest | {"sha256": json_digest(rest)}
    return content


def _of_runs(folder: Path) -> list[Case]:
    import pytest
    from fit_cases import Crash, crash_at, mlp, run, run_phases

    from dpbitfit_fx.biases import load_biases, read_biases
    from dpbitfit_fx.checkpoint import CheckpointStore, encode
    from dpbitfit_fx.cli import RUN_FILE, read_run
    from dpbitfit_fx.privacy_statement import PrivacyStatement
    from dpbitfit_fx.run_statement import statement_of_unfinished

    cases = []
    for kind, go, at in (("one", run, 5), ("phases", run_phases, 7)):
        out = folder / kind
        with pytest.raises(Crash):
            go(out, callbacks=[crash_at(at)])
        store = CheckpointStore(out / "checkpoint")

        def load(store: Any = store) -> Any:
            state, key, pending = store.load()
            tensors: dict[str, Any] = {}
            told = encode(state.optimizer, tensors, "o")
            bits = {n: v.numpy().tobytes() for n, v in {**tensors, **state.trainables}.items()}
            plain = (state.step, state.charged_steps, state.mechanism, state.fingerprint, state.history)
            return json.dumps([plain, told]), bits, key.export_secret(), key.insecure, pending

        def spent(store: Any = store) -> Any:
            statement = statement_of_unfinished(store)
            if store.spent()[3] is None:
                raise DPBitFitError("charged in full")
            return statement.own_runs(), statement.delta

        names = {path.name.split("-")[0].split(".")[0]: path for path in (out / "checkpoint").iterdir()}
        for name in ("checkpoint", "state", "key", "journal"):
            structured = name != "state"
            cases.append(Case(f"{kind}: {name}", names[name], load, structured, cut=name == "journal"))
        cases.append(Case(f"{kind}: checkpoint, what was spent", names["checkpoint"], spent, True))
        cases.append(Case(f"{kind}: journal, what was spent", names["journal"], spent, True, cut=True))
    done = {"one": run(folder / "done"), "phases": run_phases(folder / "done-phases")}
    for kind, result in done.items():
        path = result.output_dir
        assert path is not None
        cases.append(
            Case(
                f"{kind}: privacy.json",
                path / "privacy.json",
                partial(PrivacyStatement.load, path),
                True,
                sign=_resigned,
            )
        )

    def arrays(path: Path = folder / "done" / "biases.safetensors") -> Any:
        known = ("format", "graph_hash", "run_id", "model_fingerprint", "frozen_weights_sha256", "added_biases")
        values, metadata = read_biases(path)
        return {n: (str(v.dtype), v.tobytes()) for n, v in values.items()}, {n: metadata.get(n) for n in known}

    def loaded(path: Path = folder / "done" / "biases.safetensors") -> Any:
        return {n: p.detach().numpy().tobytes() for n, p in load_biases(mlp(), path).named_parameters()}

    cases.append(Case("biases.safetensors", folder / "done" / "biases.safetensors", arrays))
    cases.append(Case("biases.safetensors, onto a model", folder / "done" / "biases.safetensors", loaded))
    described = {
        "labels": ["neg", "pos"],
        "padded_lengths": [4, 8],
        "trainable": ["bias"],
        "exclude": [],
        "add_bias": False,
    }
    (folder / RUN_FILE).write_text(json.dumps(described))
    cases.append(Case("run.json", folder / RUN_FILE, lambda: read_run(folder), True, covered=False))
    return cases


def _of_ledger(folder: Path) -> list[Case]:
    from dpbitfit_fx.accounting import PriorRun
    from dpbitfit_fx.ledger import Ledger, _line

    ledger = Ledger.create(folder / "ledger", target_epsilon=8.0, target_delta=1e-3)
    for name in ("a", "b"):
        run = PriorRun(name, 0.1, 2.0, 5)
        ledger.reserve([run], dataset_size=100, run_delta=1e-3)
        ledger.settle([run])

    def sign(entry: Any) -> Any:
        if not isinstance(entry, dict):
            return entry
        rest = {name: value for name, value in entry.items() if name not in ("sha256", "previous")}
        try:
            return json.loads(_line(rest, entry.get("previous"))[0])  # type: ignore[arg-type]
        except ValueError:
            return entry

    def read() -> Any:
        books = ledger.read()
        return books.ledger_id, books.target_epsilon, books.hashes, books.charged()

    return [Case("ledger", ledger.path, read, True, cut=True, sign=sign)]


def _of_exports(folder: Path) -> list[Case]:
    from onnx_cases import compiled

    import dpbitfit_fx as dpb
    from dpbitfit_fx.files import sha256_file
    from dpbitfit_fx.onnx_seal import declared
    from dpbitfit_fx.ort_artifacts import read_manifest
    from dpbitfit_fx.ort_backends import load_artifacts
    from dpbitfit_fx.ort_plan import plan_for

    step, _ = compiled("mlp")
    export = dpb.export_onnx(step, folder / "onnx", sample_rate=0.25, dataset_size=24, steps=3, target_delta=1e-2)

    def sealed(verify: bool = True) -> Any:
        manifest = read_manifest(export, verify=verify)
        backend = load_artifacts(export, manifest)
        said = declared(manifest)
        plan_for(manifest, 24).mechanism(manifest, False, False, {})
        # What epsilon and the noise depend on. The plan (rate, steps, delta) is what the run then does, and states.
        numbers = [
            f"{value:.5g}" for value in (said.noise_multiplier, said.expected_batch_size)
        ]  # the graphs have float32
        return (said.clipping, numbers, said.sizes), backend.flat().tobytes()

    cases = [Case("export: manifest.json", export / "manifest.json", sealed, True)]
    for name in ("grad_step.onnx", "update_step.onnx", "initial.safetensors"):
        cases.append(Case(f"export: {name}", export / name, lambda: read_manifest(export) and "whole"))

        def rehashed(name: str = name) -> Any:
            manifest = read_manifest(export, verify=False)
            manifest["files"][name] = sha256_file(export / name)
            return load_artifacts(export, manifest).flat().shape

        cases.append(Case(f"export: {name}, hash made right", export / name, rehashed, covered=False))
    return cases


def _of_data(folder: Path) -> list[Case]:
    from dpbitfit_fx.data import read_table
    from dpbitfit_fx.ort_records import read_arrays

    np.savez(folder / "data.npz", x=np.arange(24.0).reshape(6, 4), y=np.arange(6))
    np.savez_compressed(folder / "small.npz", x=np.arange(24.0).reshape(6, 4), y=np.arange(6))
    (folder / "data.csv").write_text("text,label\n" + "good film,pos\nbad film,neg\n" * 4)
    (folder / "data.jsonl").write_text('{"text": "good film", "label": "pos"}\n{"text": "bad", "label": "neg"}\n' * 3)
    cases = [
        Case(f"records: {name}", folder / name, partial(read_arrays, folder / name), covered=False)
        for name in ("data.npz", "small.npz")
    ]
    for name in ("data.csv", "data.jsonl"):
        cases.append(
            Case(
                f"records: {name}",
                folder / name,
                partial(read_table, folder / name, "text", "label", ["neg", "pos"]),
                name.endswith("l"),
                covered=False,
            )
        )
    return cases


# -- the verdict ------------------------------------------------------------------------------------------------------


def judge(
    cases: list[Case], variants: int, seed: int, show: Callable[[int], None] = lambda _: None
) -> dict[str, Tally]:
    """`variants` in all, in turn over the cases; each file is as it was afterwards."""
    found = {case.name: Tally() for case in cases}
    original = {case.name: case.path.read_bytes() for case in cases}
    right: dict[str, list[Any]] = {}
    for case in cases:
        right[case.name] = [case.read()]
        lines = original[case.name].splitlines(keepends=True)
        for end in range(1, len(lines)) if case.cut else ():
            case.path.write_bytes(b"".join(lines[:end]))
            right[case.name].append(case.read())
        if case.cut and "journal" in case.name:
            case.path.write_bytes(b"")
            right[case.name].append(case.read())
        case.path.write_bytes(original[case.name])
    for number in range(variants):
        case = cases[number % len(cases)]
        chance = random.Random(seed * 1_000_003 + number)
        tally, data = found[case.name], original[case.name]
        changed, forged = variant(case, data, chance)
        case.path.write_bytes(changed)
        try:
            state = case.read()
        except DPBitFitError:
            kind = "refused"
        except Exception as error:
            kind = "raw"
            tally.wrong.append(f"variant {number}: {type(error).__name__}: {error}"[:300])
        else:
            same = not case.covered or any(_equal(state, one) for one in right[case.name])
            kind = (
                "not covered" if not case.covered else "forged" if forged and not same else "same" if same else "other"
            )
            if kind == "same" and not _equal(state, right[case.name][0]):
                kind = "cut"
            if kind == "other":
                tally.wrong.append(f"variant {number}: read as another state")
        finally:
            case.path.write_bytes(data)
        tally.counts[kind] += 1
        show(number)
    return found


def _equal(one: Any, other: Any) -> bool:
    return bool(one == other)


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="tools/fuzz files", description=__doc__)
    parser.add_argument("--variants", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="write the counts here")
    options = parser.parse_args(arguments)
    folder = Path(tempfile.mkdtemp(prefix="dpbitfit-corrupted-"))
    started = time.process_time()

    def show(number: int) -> None:
        if (number + 1) % 1000 == 0:
            print(f"{number + 1} variants, {time.process_time() - started:.0f} CPU s", file=sys.stderr, flush=True)

    try:
        found = judge(build(folder), options.variants, options.seed, show)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    total: Counter[str] = sum((tally.counts for tally in found.values()), Counter())
    result = {
        "variants": options.variants,
        "seed": options.seed,
        "cpu_seconds": round(time.process_time() - started, 1),
        "total": dict(total),
        "files": {name: dict(tally.counts) for name, tally in found.items()},
        "wrong": {name: tally.wrong for name, tally in found.items() if tally.wrong},
    }
    print(json.dumps(result, indent=2))
    if options.json:
        options.json.write_text(json.dumps(result, indent=2) + "\n")
    return 1 if result["wrong"] else 0
