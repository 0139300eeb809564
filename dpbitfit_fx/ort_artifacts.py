"""The files of an export: its manifest, and the API of ONNX Runtime Training that some of them need. Torch-free."""

from __future__ import annotations

import importlib
import json
import math
import os
import re
import sys
import types
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

from dpbitfit_fx.errors import ArtifactError
from dpbitfit_fx.files import atomic_write_text, read_text, sha256_file
from dpbitfit_fx.passes.clipping import KINDS

__all__ = [
    "FORMAT",
    "MANIFEST",
    "WEIGHTS",
    "at_lengths",
    "attach",
    "clipping_of",
    "graph_file",
    "phases_of",
    "read_manifest",
    "set_aside",
    "training_api",
]

FORMAT: Final = "dpbitfit_fx.onnx.v1"
MANIFEST: Final = "manifest.json"
WEIGHTS: Final = "weights.data"  # the frozen weights of all graphs of an export
_DTYPES: Final = ("float32", "int64", "bool", "int32", "uint8")


def training_api() -> Any:
    """``onnxruntime.training.api`` without its package's ``__init__``, which imports torch and patches its seeding.

    Raises:
        ArtifactError: onnxruntime-training is not installed.
    """
    name = "onnxruntime.training"
    if f"{name}.api" in sys.modules:
        return sys.modules[f"{name}.api"]
    standing_in = name not in sys.modules
    try:
        import onnxruntime

        if standing_in:
            folder = Path(onnxruntime.__file__).parent / "training"
            if not (folder / "api").is_dir():
                raise ImportError("onnxruntime has no training API")
            package = types.ModuleType(name)
            package.__path__ = [str(folder)]
            sys.modules[name] = package
        return importlib.import_module(f"{name}.api")
    except ImportError as error:
        raise ArtifactError(
            "These artifacts need ONNX Runtime Training: pip install onnxruntime-training-cpu==1.19.2 (Python 3.11 "
            "or older), after "
            "uninstalling onnxruntime. On other Pythons, export with export_onnx instead: it runs on any onnxruntime."
        ) from error
    finally:
        # Whoever imports the real package later gets the real one.
        if standing_in:
            sys.modules.pop(name, None)


def set_aside(folder: Path, whole: bool = True) -> list[Path]:
    """Earlier exports that killed ones had moved out of the way of ``folder``, the newest last; with ``whole`` off, those of
    which a part has been removed since."""
    name = re.compile(rf"\.{re.escape(folder.name)}\.[0-9a-f]{{8}}\.old")
    beside = folder.parent.iterdir() if folder.parent.is_dir() else iter(())
    found = [f for f in beside if name.fullmatch(f.name) and (f / MANIFEST).is_file() == whole]
    return sorted(found, key=lambda f: (f / MANIFEST if whole else f).stat().st_mtime)


def read_manifest(folder: str | os.PathLike[str], verify: bool = True) -> dict[str, Any]:
    """The manifest of an export; with ``verify``, every file's SHA-256 is checked first.

    Raises:
        ArtifactError: not an export, or a file is missing or was changed after the export.
    """
    root = Path(folder)
    if not root.exists() and set_aside(root):
        raise ArtifactError(
            f"An export into {os.fspath(folder)!r} was killed while it took the place of an earlier one, which is kept in "
            f"{os.fspath(set_aside(root)[-1])!r}. Export again, or rename that folder back."
        )
    try:
        manifest = json.loads(read_text(root / MANIFEST))
    except (ValueError, RecursionError):
        raise ArtifactError(f"{os.fspath(folder)!r} has a damaged manifest.json. Export again.") from None
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise ArtifactError(
            f"{os.fspath(folder)!r} is not an export that this version of dpbitfit_fx can read. Export again."
        )
    wrong = _fault(manifest)
    if wrong is not None:
        raise ArtifactError(
            f"The manifest.json in {os.fspath(folder)!r} is damaged or was edited: {wrong}. Export again."
        )
    if verify:
        for name, digest in manifest["files"].items():
            path = root / name
            if not path.is_file():
                raise ArtifactError(
                    f"The export {os.fspath(folder)!r} lacks {name!r}. Copy the whole folder, or export again."
                )
            if sha256_file(path) != digest:
                raise ArtifactError(
                    f"{name!r} in {os.fspath(folder)!r} was changed after the export, so it is no longer the graph "
                    "that was proved private "
                    "and checked. Export again."
                )
    return manifest


def attach(root: Path, manifest: dict[str, Any], name: str, content: str, /, **entries: Any) -> None:
    """Put the file `name` beside an export, and `entries` into its manifest.

    Raises:
        ArtifactError: the folder cannot be written; then its manifest is as it was.
    """
    atomic_write_text(root / name, content)
    manifest["files"][name] = sha256_file(root / name)
    manifest.update(entries)
    atomic_write_text(root / MANIFEST, json.dumps(manifest, indent=1) + "\n")


def _text(value: Any) -> bool:
    return isinstance(value, str) and bool(value)


def _number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < math.inf


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**63


def _file(value: Any) -> bool:
    return _text(value) and value == os.path.basename(value) and value not in (".", "..") and "\0" not in value


def _shape_fault(manifest: Mapping[str, Any]) -> str | None:
    """What in a manifest is not of the type that its readers take for granted; its values are the seal's business."""

    def each(name: str, kind: type, fields: Mapping[str, Callable[[Any], bool]]) -> str | None:
        items = manifest.get(name)
        if not isinstance(items, kind) or not items:
            return f"{name!r} is not what it should be"
        for item in items if isinstance(items, list) else [items]:
            for field, sound in fields.items():
                if not isinstance(item, dict) or not sound(item.get(field)):
                    return f"{field!r} in {name!r} is not what it should be"
        return None

    def sizes(value: Any) -> bool:
        return isinstance(value, list) and all(map(_whole, value))

    def optional(sound: Callable[[Any], bool]) -> Callable[[Any], bool]:
        return lambda value: value is None or sound(value)

    tops: dict[str, Callable[[Any], bool]] = {
        "target": lambda v: v in ("onnx", "ort_training"),
        "graph_hash": lambda v: isinstance(v, str) and re.fullmatch("[0-9a-f]{64}", v) is not None,
        "num_trainable": _whole,
        "num_parameters": _whole,
        "max_grad_norm": _number,
        "noise_multiplier": _number,
        "expected_batch_size": _number,
        "files": lambda v: isinstance(v, dict) and all(_file(n) and _text(d) for n, d in v.items()),
        "plan": lambda v: isinstance(v, dict),
        "fingerprints": lambda v: v is None or (isinstance(v, dict) and all(map(_text, v.values()))),
        "text": lambda v: v is None or isinstance(v, dict),
        "dynamic_length": lambda v: v is None or isinstance(v, dict),
        "frozen_weights": lambda v: v is None or isinstance(v, dict),
    }
    for name, sound in tops.items():
        if not sound(manifest.get(name)) or (name in manifest and manifest[name] is None):
            return f"{name!r} is not what it should be"
    parts = {"name": _text, "onnx_name": _text, "shape": sizes, "offset": _whole, "numel": _whole}
    batch = {"path": lambda v: isinstance(v, str), "name": _text, "shape": sizes, "dtype": lambda v: v in _DTYPES}
    plan: dict[str, Callable[[Any], bool]] = {
        "sample_rate": _number,
        "dataset_size": _whole,
        "steps": _whole,
        "target_delta": _number,
        "prior": lambda v: isinstance(v, list),
    }
    faults = [
        each("parameters", list, parts),
        each("batch_inputs", list, batch),
        each("optimizer", dict, {"type": _text, "lr": _number}),
        each("clipping", dict, {"type": _text, "gamma": optional(_number)}),
        each("plan", dict, {k: optional(v) for k, v in plan.items()}) if manifest["plan"] else None,
    ]
    if "text" in manifest:
        labels = lambda v: isinstance(v, list) and all(map(_text, v))  # noqa: E731
        faults.append(each("text", dict, {"tokenizer": _file, "labels": labels, "pad_id": _whole}))
    if "dynamic_length" in manifest:
        dims = lambda v: isinstance(v, dict) and all(map(_whole, v.values()))  # noqa: E731
        faults.append(each("dynamic_length", dict, {"dims": dims, "min": _whole, "max": _whole}))
    return next((fault for fault in faults if fault is not None), None)


def _fault(manifest: Mapping[str, Any]) -> str | None:
    """``_shape_fault`` of an export of one phase, or of every phase of a run and of what they share."""
    if "phases" not in manifest:
        return _shape_fault(manifest)
    phases = manifest["phases"]
    if not isinstance(phases, list) or not phases or not all(isinstance(phase, dict) for phase in phases):
        return "'phases' is not what it should be"

    def lists(value: Any, sound: Callable[[Any], bool]) -> bool:
        return isinstance(value, list) and all(map(sound, value))

    def graph(value: Any) -> bool:
        return _file(value) or (lists(value, _file) and bool(value))

    own: dict[str, Callable[[Any], bool]] = {
        "trainable": lambda v: isinstance(v, str) or lists(v, lambda name: isinstance(name, str)),
        "learning_rates": lambda v: lists(
            v, lambda p: isinstance(p, list) and len(p) == 2 and _text(p[0]) and _number(p[1])
        ),
        "schedule": lambda v: isinstance(v, dict) and _text(v.get("type")) and _number(v.get("warmup_steps")),
        "graphs": lambda v: isinstance(v, dict) and graph(v.get("grad_step")) and _file(v.get("update_step")),
        "held": lambda v: isinstance(v, list),
    }
    for phase in phases:
        odd = next((name for name, sound in own.items() if not sound(phase.get(name))), None)
        if odd is not None:
            return f"{odd!r} of a phase is not what it should be"
    lengths = manifest.get("padded_lengths", {})
    if not isinstance(lengths, dict) or not all(lists(each, _whole) for each in lengths.values()):
        return "'padded_lengths' is not what it should be"
    target = manifest.get("plan", {}).get("target_epsilon") if isinstance(manifest.get("plan"), dict) else None
    if target is not None and not _number(target):
        return "'target_epsilon' in 'plan' is not what it should be"
    views = phases_of(manifest)
    held = [view | {"parameters": view["held"]} for view in views if view["held"]]
    # What the phases share is no phase of its own: its parameters, plan and files are checked as the first phase's.
    whole = views[0] | {name: manifest.get(name) for name in ("parameters", "num_trainable", "plan")}
    return next((fault for view in (*views, *held, whole) if (fault := _shape_fault(view)) is not None), None)


def phases_of(manifest: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The phases of the run, each described as an export of one phase is; of such an export, the manifest itself.

    `parameters` are then those that the phase trains, and `held` those that other phases do and this one takes as they are.
    """
    shared = {name: value for name, value in manifest.items() if name != "phases"}
    return [shared | phase for phase in manifest.get("phases", [{}])]


def graph_file(phase: Mapping[str, Any], name: str) -> str:
    """The file of the graph `name` (grad_step, update_step) of one of ``phases_of``, or of ``at_lengths``."""
    return str(phase.get("graphs", {}).get(name, f"{name}.onnx"))


def at_lengths(phase: Mapping[str, Any]) -> list[dict[str, Any]]:
    """One of ``phases_of`` once for each of its gradient graphs: of a model that needs one graph per padded length, with
    that length's file and shapes."""
    files = phase.get("graphs", {}).get("grad_step")
    if not isinstance(files, list):
        return [dict(phase)]
    found = []
    for bucket, file in enumerate(files):
        first = {path: lengths[bucket] for path, lengths in phase["padded_lengths"].items()}
        entries = [
            entry | ({"shape": [first[entry["path"]], *entry["shape"][1:]]} if entry["path"] in first else {})
            for entry in phase["batch_inputs"]
        ]
        found.append({**phase, "batch_inputs": entries, "graphs": {**phase["graphs"], "grad_step": file}})
    return found


def clipping_of(manifest: Mapping[str, Any]) -> tuple[str, float | None]:
    """How privacy.json names the export's clipping, and the gamma of automatic clipping.

    Raises:
        ArtifactError: another version's, of which nothing could be stated.
    """
    clipping = manifest["clipping"]
    kind = next((k for k, c in KINDS.items() if c.__name__ == clipping["type"]), None)
    if kind is None:
        raise ArtifactError(
            f"The manifest was written with the clipping {clipping['type']!r}, which this version does not know. Use "
            "the version that exported it."
        )
    if kind == "automatic" and not _number(clipping.get("gamma")):
        raise ArtifactError("The manifest names no gamma for its automatic clipping. It is damaged; export again.")
    return kind, float(clipping["gamma"]) if kind == "automatic" else None
