"""Systems x models x shapes: every system in a process of its own, one step each in turn (A B C A B C ..).

    tools/bench side-by-side --models minilm --sizes 32 128
    tools/bench side-by-side --models minilm gpt2 --systems bias ours ours-bf16 opacus-full
    tools/bench side-by-side --models long --sizes 512 1024 2048 4096 8192 --picture docs/benchmark
    tools/bench side-by-side --models minilm --layers 2 6 12        (time and memory against depth)
    tools/bench side-by-side --from minilm.json long.json --markdown docs/benchmark.md      (measures nothing)

Columns: CPU time of the process, all threads (on CUDA: wall time), as the median of the ratios to the first system's step
in the same turn, with a bootstrapped 95 % interval; the most that torch's allocator holds during a step; memory kept between
steps beside the model itself (optimizer, packed weights, what libraries keep); peak RSS of the process in these steps; seconds
until the first step is done, compiling included. The floor is the FLOPs of a step at the best rate among matrix products of
MKL, oneDNN (packed) and ONNX Runtime in the same process.

Needs [hf] and [ort]; [bench] adds Opacus and plots. fastDP: a checkout of awslabs/fast-differential-privacy, by --fastdp.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import Progress
from scipy.stats import bootstrap

from .models import MODELS
from .systems import SYSTEMS

ROOT = Path(__file__).resolve().parents[1]
LEAST = 5  # turns, however slow


class Died(Exception):
    pass


class Worker:
    """A child that builds a system's step; it has the machine for itself until that is done."""

    def __init__(self, system: str, options: argparse.Namespace, case: dict[str, Any]) -> None:
        arguments = ["--system", system, "--device", options.device, "--threads", str(options.threads)]
        for key in ("model", "rows", "size", "layers"):
            if case[key] is not None:
                arguments += [f"--{key}", str(case[key])]
        arguments += ["--memory-limit", str(int(options.memory_limit * 1e9))]
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "FASTDP": str(options.fastdp or ""), "TQDM_DISABLE": "1"}
        self.child = subprocess.Popen(  # noqa: S603  our own module
            [sys.executable, "-m", "benchmarks.worker", *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=None if options.verbose else subprocess.DEVNULL,
            text=True,
            env=environment,
            cwd=ROOT,
        )
        self.started = self._answer()

    def ask(self, what: str) -> dict[str, Any]:
        assert self.child.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            print(what, file=self.child.stdin, flush=True)
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self.child.stdout is not None
        line = self.child.stdout.readline()
        if not line:
            raise Died(f"the process ended with status {self.child.wait()}, for want of memory as a rule")
        found: dict[str, Any] = json.loads(line)
        if "error" in found:
            raise Died(found["error"])
        return found

    def end(self) -> None:
        self.child.kill()
        self.child.wait()


def measure(case: dict[str, Any], options: argparse.Namespace, progress: Progress) -> dict[str, Any]:
    """All systems on one model and shape."""
    title = f"{case['model']} {case['rows']} x {case['size']}"
    task = progress.add_task(title, total=None)
    workers: dict[str, Worker] = {}
    failed: dict[str, str] = {}
    floor = None
    try:
        for name in (*(["floor"] if options.device == "cpu" else []), *options.systems):
            progress.update(task, description=f"{title}: starting {name}")
            try:
                worker = Worker(name, options, case)
            except Died as error:
                failed[name] = str(error)
                continue
            if name == "floor":
                floor = worker.started
                worker.end()
            else:
                workers[name] = worker
        steps: dict[str, list[dict[str, float]]] = {name: [] for name in workers}
        begin = time.monotonic()
        progress.update(task, total=options.alternations, description=title)
        for turn in range(options.alternations):
            if turn >= LEAST and time.monotonic() - begin > options.seconds:
                break
            for name, worker in list(workers.items()):
                try:
                    steps[name].append(worker.ask("step"))
                except Died as error:
                    failed[name] = str(error)
                    del workers[name], steps[name]
                    worker.end()
            progress.advance(task)
        memory = {name: worker.ask("memory") for name, worker in workers.items()}
        started = {name: worker.started for name, worker in workers.items()}
    finally:
        for worker in workers.values():
            worker.end()
        progress.remove_task(task)
    key = "wall" if options.device == "cuda" else "cpu"
    base = np.array([s[key] for s in steps[options.systems[0]]]) if options.systems[0] in steps else None
    rows = {}
    for name, taken in steps.items():
        times = np.array([s[key] for s in taken])
        rows[name] = {
            **{k: float(np.median([s[k] for s in taken])) for k in ("cpu", "wall")},
            **({} if base is None else against(times / base)),
            **memory[name],
            **started[name],
        }
    turns = max((len(s) for s in steps.values()), default=0)
    return {**case, "turns": turns, "systems": rows, "failed": failed, "floor": floor}


def against(ratios: np.ndarray[Any, np.dtype[np.float64]]) -> dict[str, Any]:
    """The median of paired ratios and its 95 % interval, by scipy's bootstrap."""
    middle = float(np.median(ratios))
    if len(ratios) < LEAST or np.ptp(ratios) == 0:
        return {"ratio": middle, "interval": [middle, middle]}
    found = bootstrap((ratios,), np.median, method="percentile", rng=np.random.default_rng(0)).confidence_interval
    return {"ratio": middle, "interval": [float(found.low), float(found.high)]}


def machine(options: argparse.Namespace) -> dict[str, Any]:
    threads = options.threads or torch.get_num_threads()
    device = torch.cuda.get_device_name() if options.device == "cuda" else torch.backends.cpu.get_cpu_capability()
    return {
        "torch": torch.__version__,
        "python": platform.python_version(),
        "threads": threads,
        "device": f"{options.device}, {device}",
    }


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="tools/bench side-by-side", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", choices=MODELS, default=["minilm"])
    parser.add_argument("--systems", nargs="+", choices=SYSTEMS, help="the first is what the others are compared with")
    parser.add_argument("--rows", type=int, nargs="+", help="B; by default the model's own")
    parser.add_argument("--sizes", type=int, nargs="+", help="T, or pixels a side; by default the model's own")
    parser.add_argument("--layers", type=int, nargs="+", help="depth, of the transformers; by default the model's own")
    parser.add_argument("--alternations", type=int, default=20)
    parser.add_argument("--seconds", type=float, default=300, help=f"then no more turns, but {LEAST} at least")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=int, default=0, help="0: as many as torch takes by itself")
    parser.add_argument("--fastdp", type=Path, help="a checkout of fast-differential-privacy")
    parser.add_argument("--memory-limit", type=float, default=14, help="GB of data a process; above it does not run")
    parser.add_argument("--json", type=Path, help="write the numbers here, after every shape")
    parser.add_argument("--from", dest="given", type=Path, nargs="+", help="take these numbers and measure nothing")
    parser.add_argument("--markdown", type=Path, help="write the tables here; by default to the terminal")
    parser.add_argument("--picture", type=Path, help="a folder for the plots; needs matplotlib")
    parser.add_argument("--verbose", action="store_true", help="show what the systems print")
    options = parser.parse_args(arguments)
    from .picture import draw, tables

    if options.given:
        parts = [json.loads(path.read_text()) for path in options.given]
        found = {"machine": parts[0]["machine"], "cases": [case for part in parts for case in part["cases"]]}
    else:
        options.systems = list(dict.fromkeys(options.systems or [k for k in SYSTEMS if not k.startswith("fastdp")]))
        cases = [
            {"model": model, "rows": rows, "size": size, "layers": layers}
            for model in options.models
            for layers in options.layers or [None]
            for rows in options.rows or [MODELS[model].rows]
            for size in options.sizes or MODELS[model].sizes
        ]
        found = {"machine": machine(options), "cases": []}
        with Progress(console=Console(stderr=True)) as progress:
            whole = progress.add_task("shapes", total=len(cases))
            for case in cases:
                found["cases"].append(measure(case, options, progress))
                progress.advance(whole)
                if options.json:
                    options.json.write_text(json.dumps(found, indent=1) + "\n")
    pictures = draw(found, options.picture) if options.picture else []
    text = tables(found, [p.name for p in pictures], options.picture)
    if options.markdown:
        options.markdown.write_text(text)
    else:
        print(text)
    return 0
