"""What ``tools/zoo`` does: every case in a process of its own, compared with the loop, as one table and one JSON file."""

from __future__ import annotations

import argparse
import fnmatch
import importlib
import importlib.util
import json
import logging
import multiprocessing
import multiprocessing.connection
import os
import platform
import re
import resource
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from zoo import POOL, Case, build, compile_case, in_dtype, loop, relative_errors

from dpbitfit_fx.errors import CompileRefused
from dpbitfit_fx.passes.joint_graph import Source
from dpbitfit_fx.passes.meaning import run_joint
from dpbitfit_fx.passes.pipeline import CAPTURE, MEANING, PIPELINE, run
from dpbitfit_fx.passes.torch_private import tree_flatten

BATCHES = {1: [4], 2: [5, 0], 3: [2, 5, 1], 17: [(5 * i + 1) % POOL for i in range(17)]}
MODULES = ("zoo", "zoo_transformers", "zoo_torch")
FLOAT32, FLOAT64 = 1e-5, 1e-9
Row = dict[str, Any]


def collect() -> dict[str, Case]:
    """Every case of every zoo module that is there; a name taken twice is an error."""
    found: dict[str, Case] = {}
    for module in MODULES:
        if importlib.util.find_spec(module) is None:
            continue
        for name, case in importlib.import_module(module).cases().items():
            if name in found:
                raise ValueError(f"two zoo cases are called {name}")
            found[name] = case
    return found


def missing_biases(model: Any, report: Any) -> list[str]:
    """Parameters with ``bias`` in their own name that the report neither trains nor accounts for."""
    told = {n for n, *_ in report.trained} | {n for n, _ in report.near_misses} | set(report.unused)
    return [n for n, _ in model.named_parameters() if "bias" in n.rsplit(".", 1)[-1] and n not in told]


def examine(case: Case) -> Row:
    """Compile once per dtype; per-sample gradients at batches 1, 2, 3 and 17 against the loop of single samples."""
    row: Row = {"name": case.name, "family": case.family, "status": "refused", "reason": ""}
    begin = time.perf_counter()
    try:
        step = compile_case(case)
        row["seconds"] = time.perf_counter() - begin
    except CompileRefused as error:
        return {**row, "reason": str(error), "seconds": time.perf_counter() - begin}
    released = step.with_noise(1.0, 4.0)
    report = released.report()
    row |= {
        "model": report.model,
        "trainables": len(report.trained),
        "coordinates": report.num_trainable,
        "nodes": len(step.partial.module.graph.nodes),
        "folded": list(report.folded),
        "slow": list(report.slow),
        "dropped": list(report.dropped),
        "sealed": {"partial", "sealed"} <= set(report.facts),
        "operators": report.operators,
        "capture_seconds": dict((name, seconds) for name, seconds, *_ in report.passes)["capture"],
        "missing": missing_biases(step.model, report) if case.trainable == "bias" else [],
    }
    names = step.trainable_names
    loop32, loop64 = loop(case, names), _loop64(case, names)
    worst, excess, own = {"float32": 0.0, "float64": float("nan") if loop64 is None else 0.0}, 0.0, torch.zeros(POOL)
    if loop64 is not None:
        joint, own = _captured64(case), relative_errors(loop32, loop64)
        if tuple(t.name for t in joint.targets) != names:
            return {**row, "status": "WRONG", "reason": "float64 trains other parameters than float32"}
    for rows in BATCHES.values():
        error32 = relative_errors(step.per_sample_gradients(case.rows(rows)), {k: loop32[k][rows] for k in names})
        excess = max(excess, _largest(error32 / (2 * own[rows]).clamp(min=FLOAT32)))
        worst["float32"] = max(worst["float32"], _largest(error32))
        if loop64 is not None:
            _, grads = run_joint(joint, tree_flatten(case.rows(rows, torch.float64))[0])
            error64 = relative_errors(dict(zip(names, grads, strict=True)), {k: loop64[k][rows] for k in names})
            worst["float64"] = max(worst["float64"], _largest(error64))
    exact = loop64 is None or worst["float64"] <= FLOAT64
    good = excess <= 1 and exact and row["sealed"] and not row["missing"]
    return {**row, **worst, "own": _largest(own), "status": "matches" if good else "WRONG"}


def _loop64(case: Case, names: tuple[str, ...]) -> dict[str, torch.Tensor] | None:
    """The loop in float64; None where torch has no kernel for it (the grouped product of experts)."""
    try:
        return loop(case, names, torch.float64)
    except RuntimeError as error:
        if "Expected mat_a to be Float32" not in str(error):
            raise
        return None


def _captured64(case: Case) -> Any:
    chosen = case.trainable if isinstance(case.trainable, str) else tuple(case.trainable)
    model, loss = build(case, torch.float64), in_dtype(case.loss, torch.float64)
    # What in_dtype widens in between comes from outside the model; that nothing else does, the float32 compile has shown.
    source = Source(model, loss, case.rows([0, 1, 2, 3], torch.float64), chosen, public_tensors=True)
    return run((CAPTURE, *PIPELINE[:MEANING]), source)


def _largest(errors: torch.Tensor) -> float:
    """The maximum, infinite where one is not a number: NaN compares as small with everything."""
    return float(errors.max()) if bool(errors.isfinite().all()) else float("inf")


def _child(case: Case, pipe: Any, work: Callable[[Case], Row], memory: int) -> None:
    if memory:
        resource.setrlimit(resource.RLIMIT_DATA, (memory, memory))
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # torch prints whole graphs where a capture fails
    logging.disable(logging.CRITICAL)
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    try:
        row = work(case)
    except Exception as error:
        text = "".join(traceback.format_exception(error)[-3:])
        row = {"name": case.name, "family": case.family, "status": "FAILED", "reason": text}
    pipe.send(row)
    pipe.close()


def run_all(
    cases: list[Case],
    jobs: int,
    timeout: float,
    progress: Progress,
    work: Callable[[Case], Row] = examine,
    keep: Callable[[Row], None] = lambda row: None,
    memory: int = 0,
) -> list[Row]:
    """Each case in a forked process of its own, ``jobs`` at a time: a crash or a hang stops no other.

    ``keep`` gets every row as soon as it is there; ``memory`` limits a process, in bytes (0: no limit).
    Ctrl-C (or SIGTERM) ends the run early and keeps what is done.
    """
    context = multiprocessing.get_context("fork")
    waiting = list(cases)
    done: dict[str, Row] = {}
    running: dict[Any, tuple[Case, Any, float]] = {}
    task = progress.add_task("zoo", total=len(cases))
    try:
        while waiting or running:
            while waiting and len(running) < jobs:
                case = waiting.pop(0)
                receive, send = context.Pipe(duplex=False)
                process = context.Process(target=_child, args=(case, send, work, memory), daemon=True)
                process.start()
                send.close()
                running[receive] = (case, process, time.monotonic())
            progress.update(task, description=", ".join(c.name for c, *_ in running.values()))
            for pipe in multiprocessing.connection.wait(list(running), timeout=1.0):
                receiver: Any = pipe
                case, process, _ = running.pop(receiver)
                try:
                    done[case.name] = receiver.recv()
                except EOFError:
                    process.join()
                    done[case.name] = _failed(case, f"its process ended with exit code {process.exitcode}")
                process.join()
                keep(done[case.name])
                progress.advance(task)
            for pipe, (case, process, begin) in list(running.items()):
                if time.monotonic() - begin > timeout:
                    process.kill()
                    del running[pipe]
                    done[case.name] = _failed(case, f"took more than {timeout:.0f} s")
                    keep(done[case.name])
                    progress.advance(task)
    except KeyboardInterrupt:
        for _, process, _ in running.values():
            process.kill()
    return [done[c.name] for c in cases if c.name in done]


def _failed(case: Case, reason: str) -> Row:
    return {"name": case.name, "family": case.family, "status": "FAILED", "reason": reason}


def short(reason: str) -> str:
    """A refusal's first words and the user's line, on one line and free of the paths of this machine."""
    text = re.sub(r'File "[^"]*/(\w+\.py)", line', r"\1 line", " ".join(reason.split())).replace("|", "\\|")
    head, _, place = text.partition(" It comes from ")
    place = place.partition("`. ")[0]
    head = head if len(head) < 260 else head[:260] + " ..."
    return f"{head} It comes from {place + '`' if place.count('`') % 2 else place}" if place else head


def short_name(operator: str) -> str:
    return operator.removeprefix("aten.").removesuffix(".default")


def markdown(rows: list[Row], asked: int, minutes: float) -> str:
    matched = [r for r in rows if r["status"] == "matches"]
    refused = [r for r in rows if r["status"] == "refused"]
    early = f" of {asked} (the run was ended early)" if len(rows) < asked else ""
    rest = len(rows) - len(matched) - len(refused)
    lines = [
        "# The zoo",
        "",
        "Written by `tools/zoo`. Every architecture is a small, randomly initialised configuration, compiled unedited; the "
        "per-sample gradients of one compile at batches of 1, 2, 3 and 17 are compared with a loop of single-sample "
        "autograd. An error is the largest distance of a sample's whole gradient over its norm: at most 1e-5 in float32 (or "
        "twice the float32 loop's own distance from float64, where that is larger), "
        "1e-9 in float64 (nan: torch has no kernel for it). "
        "Folded: operators of "
        "the model that a rule of ours batches. Nothing is unrolled over samples: a graph that grows with the batch is "
        "refused; recurrent layers are unrolled over time.",
        "",
        f"{len(rows)} architectures{early}: {len(matched)} compile and match, {len(refused)} are refused"
        f"{f', {rest} FAIL' if rest else ''}; {minutes:.1f} minutes with torch {torch.__version__}.",
        "",
        "| architecture | family | result | float32 | float64 | trainables | nodes | folded | unrolled | capture s |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for r in rows:
        if r["status"] == "refused":
            continue
        if r["status"] == "FAILED":
            lines.append(f"| {r['name']} | {r['family']} | FAILED: {short(r['reason'][-300:])} | | | | | | | |")
            continue
        folded = ", ".join(f"`{f}`" for f in map(short_name, r["folded"]))
        lines.append(
            f"| {r['name']} | {r['family']} | {r['status']} {r['reason']}".rstrip()
            + f" | {r.get('float32', float('nan')):.0e} | {r.get('float64', float('nan')):.0e} | {r['coordinates']:,} in "
            f"{r['trainables']} | {r['nodes']} | {folded} | {'over time' if r['slow'] else 'no'} | "
            f"{r['capture_seconds']:.1f} |"
        )
    if refused:
        lines += ["", "## Refused", "", "| architecture | family | reason |", "|---|---|---|"]
        lines += [f"| {r['name']} | {r['family']} | {short(r['reason'])} |" for r in refused]
    lines += ["", "## Operators", "", "Of each graph that runs: forward, backward, clip and noise.", ""]
    lines += ["| architecture | operators |", "|---|---|"]
    for r in matched:
        names = sorted(short_name(o) for o in r["operators"] if o.startswith("aten."))
        lines.append(f"| {r['name']} | {', '.join(names)} |")
    return "\n".join(lines) + "\n"


def main(description: str | None, docs: Path) -> int:
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="names or shell-style patterns; all when none are given")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--timeout", type=float, default=600.0, help="seconds for one architecture")
    parser.add_argument("--markdown", type=Path)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    every = collect()
    if unknown := [n for n in options.names if not fnmatch.filter(every, n)]:
        parser.error(f"no architecture is called {', '.join(unknown)}; there are {', '.join(every)}")
    chosen = [c for n, c in every.items() if not options.names or any(fnmatch.fnmatch(n, p) for p in options.names)]
    for number in (signal.SIGINT, signal.SIGTERM):  # a shell's background job would ignore the first
        signal.signal(number, signal.default_int_handler)
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    begin = time.perf_counter()
    with Progress(*columns, console=console) as progress:
        rows = run_all(chosen, options.jobs, options.timeout, progress)
    text = markdown(rows, len(chosen), (time.perf_counter() - begin) / 60)
    machine = {"torch": torch.__version__, "python": platform.python_version(), "jobs": options.jobs}
    data = json.dumps({"machine": machine, "rows": rows}, indent=1) + "\n"
    whole = not options.names
    for path, content in ((options.markdown, text), (options.json, data)):
        target = path or (docs / ("zoo.md" if content is text else "zoo.json") if whole else None)
        if target is not None:
            target.parent.mkdir(exist_ok=True)
            target.write_text(content)
    sys.stdout.write(text)
    return 0 if all(r["status"] in ("matches", "refused") for r in rows) else 1
