"""What ``tools/zoo --onnx`` does: every case exported in a process of its own, run by onnxruntime, as one table."""

from __future__ import annotations

import argparse
import fnmatch
import gc
import hashlib
import json
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from onnx_replay import replay
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from zoo import POOL, Case, compile_case
from zoo_table import Row, collect, run_all, short

from dpbitfit_fx import onnx_export, ort_export
from dpbitfit_fx.errors import CompileRefused, ExportError
from dpbitfit_fx.onnx_check import contributions, relative_error
from dpbitfit_fx.onnx_cuda import Need, needs, tables, without_kernel
from dpbitfit_fx.onnx_export import IR_VERSION, OPSET, Core, export_core, export_onnx, flat_parameters, layout_of
from dpbitfit_fx.ort_artifacts import WEIGHTS
from dpbitfit_fx.ort_export import export_ort_training
from dpbitfit_fx.ort_runner import load_artifacts
from dpbitfit_fx.passes.torch_private import tree_flatten, tree_unflatten

BATCHES = {1: [4], 3: [2, 5, 1], 8: [(5 * i + 1) % POOL for i in range(8)]}
LIMIT = 1e-4
ROOT = Path(__file__).resolve().parents[1]
SOURCES = [*sorted((ROOT / "passes").glob("*.py")), *sorted((ROOT / "dpbitfit_fx").glob("onnx_[!c]*.py"))]


def version() -> str:
    """Of the compiler and the export: which code a row was made with."""
    return hashlib.sha256(b"\0".join(p.read_bytes() for p in SOURCES)).hexdigest()[:12]


@contextmanager
def one_trace() -> Iterator[None]:
    """Both targets get the same core: it is exported once and copied."""
    import onnx_ir as ir

    kept: dict[str, Any] = {}

    def shared(step: Any, layout: onnx_export.Layout, weights: None = None) -> Core:
        if step.graph_hash not in kept:
            kept[step.graph_hash] = ir.serde.serialize_model(export_core(step, layout).model)
        return Core(ir.serde.deserialize_model(kept[step.graph_hash]), layout)

    places: tuple[Any, ...] = (onnx_export, ort_export)
    for place in places:
        place.export_core = shared
    try:
        yield
    finally:
        for place in places:
            place.export_core = export_core


def save_probes(step: Any, case: Case, folder: Path) -> None:
    """What grad_step.onnx and update_step.onnx are given, and what PyTorch computes from it, in ``probes.npz``."""
    layout, theta, size = layout_of(step), flat_parameters(step), step.num_trainable
    arrays: dict[str, Any] = {"sizes": np.array(list(BATCHES))}
    for rows, index in BATCHES.items():
        batch = case.rows(index)
        leaves, spec = tree_flatten(batch)
        mask = torch.ones(rows)
        given = {b.name: x.numpy() for b, x in zip(layout.batch, leaves, strict=True)}
        given |= {"sample_mask": mask.numpy(), "theta": theta, "accumulator": np.zeros(size, np.float32)}
        arrays |= {f"{rows}/in/{k}": v for k, v in given.items()}
        arrays[f"{rows}/out"] = step.accumulate(batch, mask, step.zero_accumulator()).numpy()
        arrays[f"{rows}/room"] = np.array(contributions(step, _Tree(spec), leaves, mask))  # type: ignore[arg-type]
    # SGD with a rate of 1 on theta = 0 moves by exactly the private gradient.
    generator = torch.Generator().manual_seed(0)
    total, noise = (torch.randn(size, generator=generator) for _ in range(2))
    zeros = np.zeros(size, np.float32)
    arrays |= {
        "update/in/theta": zeros,
        "update/in/accumulator": total.numpy(),
        "update/in/noise": noise.numpy(),
        "update/in/learning_rate": np.ones(1, np.float32),
        "update/out/theta_out": -step.privatize(total, noise).numpy(),
    }
    np.savez(folder / "probes.npz", **arrays)


class _Tree:
    """``contributions`` builds batches from rows of their leaves."""

    def __init__(self, spec: Any) -> None:
        self.spec = spec

    def tree(self, leaves: list[torch.Tensor]) -> Any:
        return tree_unflatten(list(leaves), self.spec)


def buffers(step: Any, folder: Path) -> float:
    """The largest error of ONNX Runtime Training's gradient buffers on the probes of the plain pair beside it."""
    backend, layout = load_artifacts(folder), layout_of(step)
    probes = np.load(folder.parent / "pair" / "probes.npz")
    worst = 0.0
    for rows in BATCHES:
        batch = {b.name: probes[f"{rows}/in/{b.name}"] for b in layout.batch}
        backend.begin()
        backend.accumulate(batch, np.ones(rows, np.float32), np.zeros(step.num_trainable, np.float32))
        worst = max(worst, relative_error(backend.gradient_buffers(), probes[f"{rows}/out"]))
    return worst


def examine(case: Case, second: Path | None, training: bool = True) -> Row:
    """Compile, export both targets, and compare gradients and one update with PyTorch's on two runtimes."""
    row: Row = {"name": case.name, "family": case.family, "status": "refused", "reason": "", "code": version()}
    begin = time.perf_counter()
    try:
        step = compile_case(case).with_noise(1.0, 4.0)
    except CompileRefused as error:
        return {**row, "status": "not compiled", "reason": str(error)}
    row["torch_nodes"] = len(step.partial.module.graph.nodes)
    work = Path(tempfile.mkdtemp(prefix="onnx-zoo-"))
    try:
        with one_trace():
            try:
                pair = export_onnx(step, work / "pair", optimizer="sgd", tolerance=LIMIT)
            except ExportError as error:
                return {**row, "reason": str(error), "seconds": time.perf_counter() - begin}
            row["bytes"] = sum(f.stat().st_size for f in (pair / "grad_step.onnx", pair / WEIGHTS) if f.exists())
            row["operators"] = _operators(pair / "grad_step.onnx")
            row["needs"] = _needs([pair / "grad_step.onnx", pair / "update_step.onnx"])
            save_probes(step, case, pair)
            runs = [replay(pair)]
            if second is not None:
                script = str(Path(__file__).with_name("onnx_replay.py"))
                done = subprocess.run([second, script, pair], capture_output=True, text=True, timeout=300)
                if done.returncode:
                    return {**row, "status": "WRONG", "reason": f"{second}: {done.stderr[-300:]}"}
                runs.append(json.loads(done.stdout))
            row["runs"] = runs
            exact = all(e <= LIMIT for r in runs for e in [*r["strict"].values(), r["update"]])
            row["status"] = "exact" if exact else "WRONG"
            if not training:
                return {**row, "seconds": time.perf_counter() - begin}
            try:
                folder = export_ort_training(step, work / "training", optimizer="sgd", tolerance=LIMIT)
                row["training"] = buffers(step, folder)
                row["training_needs"] = _needs([folder / f"{n}_model.onnx" for n in ("training", "eval", "optimizer")])
                if not row["training"] <= LIMIT:
                    row["status"] = "WRONG"
            except ExportError as error:
                row["training_refused"] = str(error)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return {**row, "seconds": time.perf_counter() - begin}


def _operators(path: Path) -> dict[str, int]:
    import onnx

    model, counts = onnx.load(path, load_external_data=False), dict[str, int]()
    assert [(o.domain, o.version) for o in model.opset_import] == [("", OPSET)] and model.ir_version == IR_VERSION
    for node in model.graph.node:
        counts[node.op_type] = counts.get(node.op_type, 0) + 1
    return counts


def _needs(paths: list[Path]) -> list[list[Any]]:
    """What the files need of a provider, as JSON values: [operator, {type variable: type}, note]."""
    import onnx

    found: set[Need] = set()
    for path in paths:
        found |= needs(onnx.load(path, load_external_data=False)).keys()
    return [[n.operator, dict(n.types), n.note] for n in sorted(found)]


def lacking(row: Row, release: str, key: str = "needs") -> list[Need]:
    """What the architecture needs and this release of onnxruntime has no CUDA kernel for."""
    wanted = [Need(name, tuple(kinds.items()), note) for name, kinds, note in row[key]]
    return without_kernel(dict.fromkeys(wanted, 1), release)


def _cuda(row: Row, release: str) -> str:
    if "needs" not in row:
        return "not run"
    return ", ".join(sorted({n.operator for n in lacking(row, release)})) or "all"


def fallbacks(rows: list[Row]) -> list[str]:
    """The operators that some architecture leaves to the CPU, with their types and who has them, as lines of a table."""
    lines = []
    for key, what in (("needs", "the pair"), ("training_needs", "training artifacts")):
        who: dict[Need, dict[str, list[str]]] = {}
        for release in tables():
            for row in rows:
                for need in lacking(row, release, key) if key in row else ():
                    who.setdefault(need, {}).setdefault(release, []).append(row["name"])
        for need, found in sorted(who.items()):
            names = sorted({n for some in found.values() for n in some})
            lines.append(f"| `{need}` | {what} | {', '.join(found)} | {', '.join(names)} |")
    return lines


def _errors(run: Row) -> str:
    return " | ".join(f"{e:.0e}" for e in run["strict"].values())


def markdown(rows: list[Row], asked: int) -> str:
    """The table: what exported and how exact it is, then what was refused and why."""
    compiled = [r for r in rows if r["status"] != "not compiled"]
    exact = [r for r in compiled if r["status"] == "exact"]
    refused = [r for r in compiled if r["status"] == "refused"]
    trained = [r for r in exact if "training" in r]
    rest = len(compiled) - len(exact) - len(refused)
    names = next(([x["onnxruntime"] for x in r["runs"]] for r in exact), ["none"])
    versions = sorted({str(r.get("code", "none")) for r in rows})
    columns = len(names) * len(BATCHES) + len(tables()) + 4
    early = f" of {asked} (the run was ended early)" if len(rows) < asked else ""
    lines = [
        "# The zoo in ONNX",
        "",
        "Written by `tools/zoo --onnx`. Every architecture of [the zoo](zoo.md) that compiles is exported as a plain "
        f"`grad_step`/`update_step` pair (opset {OPSET}, IR {IR_VERSION}) and as ONNX Runtime Training artifacts, from one "
        "trace. An error is the distance of the clipped sum of gradients from PyTorch's over its norm, at "
        "ORT_ENABLE_ALL, for batches of 1, 3 and 8 from one file; at most 1e-4. The update step is held to the same. "
        f"Runtimes: {' and '.join(names)}; in the column Training, the largest error of the gradient buffers of "
        "onnxruntime-training. CUDA: whether every operator of the pair has, at its opset and for its types, a CUDA kernel "
        "by that release's published table; else those that ONNX Runtime leaves to the CPU. "
        "Small, randomly initialised configurations; sizes with their frozen weights.",
        "",
        f"{len(compiled)} architectures{early}: {len(exact)} export and match, {len(trained)} of them also as training "
        f"artifacts; {len(refused)} are refused by name{f'; {rest} FAIL' if rest else ''}. torch {torch.__version__}, "
        f"export {', '.join(versions)}.",
        "",
        "| architecture | family | result | "
        + " | ".join(f"{n} B={b}" for n in names for b in BATCHES)
        + " | Training | "
        + " | ".join(f"CUDA {r}" for r in tables())
        + " | opset | ONNX nodes | KiB |",
        "|---" * (3 + columns) + "|",
    ]
    for r in compiled:
        if r["status"] == "refused":
            continue
        head = f"| {r['name']} | {r['family']} | {r['status']}"
        if "runs" not in r:
            lines.append(f"{head} {short(r['reason'][-300:])}" + " | " * columns + " |")
            continue
        training = f"{r['training']:.0e}" if "training" in r else "refused" if "training_refused" in r else "not run"
        lines.append(
            f"{head} | {' | '.join(_errors(x) for x in r['runs'])} | {training} | "
            f"{' | '.join(_cuda(r, release) for release in tables())} | {OPSET} | "
            f"{sum(r['operators'].values())} | {r['bytes'] / 1024:,.0f} |"
        )
    if found := fallbacks(exact):
        lines += ["", "## Left to the CPU by the CUDA provider", ""]
        lines += ["| operator and types | in | no CUDA kernel in | architectures |", "|---|---|---|---|", *found]
    lines += ["", "Kernel tables: " + "; ".join(f"{r}: {t['source']}" for r, t in tables().items()) + "."]
    told = [(r, r["reason"], "both") for r in refused]
    told += [(r, r["training_refused"], "training artifacts") for r in exact if "training_refused" in r]
    if told:
        lines += ["", "## Refused", "", "| architecture | family | what | reason |", "|---|---|---|---|"]
        lines += [f"| {r['name']} | {r['family']} | {what} | {short(why)} |" for r, why, what in told]
    return "\n".join(lines) + "\n"


def _again(row: Row, again: list[str]) -> bool:
    return "all" in again or row["status"] in again or ("stale" in again and row.get("code") != version())


def main(description: str | None, docs: Path) -> int:
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--onnx", action="store_true", required=True)
    parser.add_argument("names", nargs="*", help="names or shell-style patterns; all when none are given")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--timeout", type=float, default=1800.0, help="seconds for one architecture")
    parser.add_argument("--memory", type=float, default=6.0, help="GiB for one architecture")
    parser.add_argument("--second", type=Path, help="another environment's python, with onnxruntime and numpy")
    parser.add_argument("--pair-only", action="store_true", help="no training artifacts: about two thirds of the time")
    parser.add_argument("--report", action="store_true", help="run nothing: the table of what is finished")
    parser.add_argument(
        "--state", type=Path, default=ROOT / "build" / "onnx-zoo.jsonl", help="finished rows: a run resumes"
    )
    parser.add_argument(
        "--again",
        default="",
        help="statuses (comma-separated), 'all', or 'stale' (made with other code): rows to make anew",
    )
    parser.add_argument("--markdown", type=Path, help="default: docs/onnx-zoo.md for a run over all")
    options = parser.parse_args()
    every = collect()
    if unknown := [n for n in options.names if not fnmatch.filter(every, n)]:
        parser.error(f"no architecture is called {', '.join(unknown)}; there are {', '.join(every)}")
    wanted = dict.fromkeys(n for pattern in options.names or ["*"] for n in every if fnmatch.fnmatch(n, pattern))
    chosen = [every[n] for n in wanted]
    options.state.parent.mkdir(parents=True, exist_ok=True)
    rows = (
        {r["name"]: r for r in map(json.loads, options.state.read_text().splitlines())}
        if options.state.exists()
        else {}
    )
    again = options.again.split(",")
    waiting = [] if options.report else [c for c in chosen if c.name not in rows or _again(rows[c.name], again)]
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler)

    def keep(row: Row) -> None:
        rows[row["name"]] = row
        with options.state.open("a") as file:
            file.write(json.dumps(row) + "\n")

    if (
        waiting
    ):  # once, before the forks: the exporter reads the sources of its thousand ONNX functions at its first use
        torch.onnx.export(torch.nn.ReLU(), (torch.ones(1),), dynamo=True, opset_version=OPSET, verbose=False)
        gc.freeze()  # a collection in a child would go through all that is here

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True)) as progress:
        run_all(
            waiting,
            options.jobs,
            options.timeout,
            progress,
            lambda case: examine(case, options.second, not options.pair_only),
            keep,
            int(options.memory * 2**30),
        )
    found = [rows[c.name] for c in chosen if c.name in rows]
    text = markdown(found, len(chosen))
    target = options.markdown or (None if options.names else docs / "onnx-zoo.md")
    if target is not None:
        target.write_text(text)
    sys.stdout.write(text)
    return 0 if all(r["status"] in ("exact", "refused", "not compiled") for r in found) else 1
