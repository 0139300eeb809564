"""Run an exported pair on whatever onnxruntime is here, and compare: numpy and onnxruntime alone (no torch, no package).

python tests/onnx_replay.py FOLDER: prints one JSON object. FOLDER holds the pair and ``probes.npz``, which has, for every
size B of ``sizes``: ``B/in/NAME`` (what grad_step.onnx is given), ``B/out`` (what PyTorch computes), ``B/room`` (the sum of
the rows' norms), and ``update/in/NAME``, ``update/out/NAME`` for update_step.onnx.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime


def session(path: Path) -> Any:
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
    options.log_severity_level = 3
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def run(one: Any, given: dict[str, Any]) -> dict[str, Any]:
    names = {i.name for i in one.get_inputs()}
    outputs = [o.name for o in one.get_outputs()]
    return dict(zip(outputs, one.run(None, {k: v for k, v in given.items() if k in names}), strict=True))


def error(got: Any, want: Any, room: float = 0.0) -> float:
    """The distance over the larger of the true value's norm and ``room``; infinite where a number is not finite."""
    a, b = np.asarray(got, np.float64).ravel(), np.asarray(want, np.float64).ravel()
    if a.shape != b.shape or not (np.isfinite(a).all() and np.isfinite(b).all()):
        return float("inf")
    return float(np.linalg.norm(a - b) / max(np.linalg.norm(b), room, 1e-30))


def replay(folder: Path) -> dict[str, Any]:
    """``{"onnxruntime": version, "strict": {B: error}, "scaled": {B: error over room}, "update": error}``."""
    probes = np.load(folder / "probes.npz")

    def under(prefix: str) -> dict[str, Any]:
        return {k.removeprefix(prefix): probes[k] for k in probes.files if k.startswith(prefix)}

    grad, strict, scaled = session(folder / "grad_step.onnx"), {}, {}
    for size in (str(int(b)) for b in probes["sizes"]):
        (got,) = run(grad, under(f"{size}/in/")).values()
        strict[size] = error(got, probes[f"{size}/out"])
        scaled[size] = error(got, probes[f"{size}/out"], float(probes[f"{size}/room"]))
    found = {"onnxruntime": onnxruntime.__version__, "strict": strict, "scaled": scaled}
    if (folder / "update_step.onnx").exists():
        result = run(session(folder / "update_step.onnx"), under("update/in/"))
        found["update"] = max(error(result[k], v) for k, v in under("update/out/").items())
    return found


if __name__ == "__main__":
    print(json.dumps(replay(Path(sys.argv[1]))))
