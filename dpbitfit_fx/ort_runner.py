"""Train from exported artifacts, with onnxruntime and without PyTorch.

    python -m dpbitfit_fx.ort_runner artifacts/ data.npz --steps 100 --delta 1e-5 --output out/

The runner draws the Poisson samples and the noise itself, from a key of the operating system's secure generator,
keeps the accounts, and writes ``biases.safetensors`` (for ``load_biases`` on the PyTorch model) and ``privacy.json``.
Before anything runs, the graphs are matched against the private template (``onnx_seal``).
Needs numpy, onnx, onnxruntime (onnxruntime-training-cpu for ``export_ort_training``'s artifacts), safetensors, cryptography,
scipy and dp-accounting; never torch.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib
import importlib.util
import json
import os
import sys
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Protocol

import numpy as np
import numpy.typing as npt

from dpbitfit_fx.biases import save_biases
from dpbitfit_fx.errors import ArtifactError, CheckpointError, DataError, PrivacyError, SealBroken
from dpbitfit_fx.files import atomic_write_text, ensure_output_folder, read_text, sha256_file
from dpbitfit_fx.onnx_seal import check_artifacts
from dpbitfit_fx.passes.clipping import KINDS
from dpbitfit_fx.randomness import SecretKey, stream
from dpbitfit_fx.sampling import PoissonSampler

if TYPE_CHECKING:
    from dpbitfit_fx.privacy_statement import PrivacyStatement

FORMAT: Final = "dpbitfit_fx.onnx.v1"
CHECKPOINT_FORMAT: Final = "dpbitfit_fx.ort_checkpoint.v1"
Array = npt.NDArray[Any]


# -- artifacts --------------------------------------------------------------------------------------------------------


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


def read_manifest(folder: str | os.PathLike[str], verify: bool = True) -> dict[str, Any]:
    """The manifest of an export; with ``verify``, every file's SHA-256 is checked first.

    Raises:
        ArtifactError: not an export, or a file is missing or was changed after the export.
    """
    root = Path(folder)
    try:
        manifest = json.loads(read_text(root / "manifest.json"))
    except ValueError:
        raise ArtifactError(f"{os.fspath(folder)!r} has a damaged manifest.json. Export again.") from None
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise ArtifactError(
            f"{os.fspath(folder)!r} is not an export that this version of dpbitfit_fx can read. Export again."
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


class Backend(Protocol):
    """One private step on some runtime. ``accumulate`` and ``gradient_buffers`` handle SECRET sums."""

    def begin(self) -> None: ...
    def accumulate(self, batch: Mapping[str, Array], mask: Array, noise: Array) -> None: ...
    def update(self, noise: Array, learning_rate: float) -> None: ...
    def gradient_buffers(self) -> Array: ...
    def flat(self) -> Array: ...
    def set_flat(self, flat: Array) -> None: ...
    def save(self, folder: Path) -> None: ...
    def load(self, folder: Path) -> None: ...


class OrtTrainingBackend:
    """Module, Optimizer and CheckpointState of ONNX Runtime Training; the noise enters with the last micro-batch."""

    noise_with_last_batch = True

    def __init__(self, folder: Path, manifest: Mapping[str, Any], checkpoint: Path | None = None) -> None:
        self.folder, self.manifest = folder, manifest
        self.parameters = manifest["parameters"]
        self._open(checkpoint or folder / "checkpoint")

    def _open(self, checkpoint: Path) -> None:
        import onnxruntime

        api = training_api()
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        self.state = api.CheckpointState.load_checkpoint(str(checkpoint))
        self.module = api.Module(
            str(self.folder / "training_model.onnx"),
            self.state,
            str(self.folder / "eval_model.onnx"),
            session_options=options,
        )
        self.optimizer = api.Optimizer(str(self.folder / "optimizer_model.onnx"), self.module)
        self.module.train()
        self.names = list(self.module.input_names())
        # ONNX Runtime takes every input that the checkpoint has a value for as a weight, and asks the user for the rest.
        expected = {*(b["name"] for b in self.manifest["batch_inputs"]), "sample_mask", "noise"}
        weights = {name for name, _ in self.state.parameters}
        if not {"sample_mask", "noise"} <= set(self.names) <= expected or weights != {
            p["onnx_name"] for p in self.parameters
        }:
            raise SealBroken(
                f"{checkpoint.name}: it holds other values than the trainable parameters, so the noise or the mask might never "
                "reach the training graph. Export again, or resume from another checkpoint."
            )

    def begin(self) -> None:
        self.module.lazy_reset_grad()

    def accumulate(self, batch: Mapping[str, Array], mask: Array, noise: Array) -> None:
        given = {**batch, "sample_mask": mask, "noise": noise}
        self.module.train()
        self.module(*(np.ascontiguousarray(given[n]) for n in self.names))

    def update(self, noise: Array, learning_rate: float) -> None:
        self.optimizer.set_learning_rate(float(learning_rate))
        self.optimizer.step()

    def gradient_buffers(self) -> Array:
        return np.concatenate(
            [np.asarray(self.state.parameters[p["onnx_name"]].grad, np.float32).ravel() for p in self.parameters]
        )

    def flat(self) -> Array:
        return np.concatenate(
            [np.asarray(self.state.parameters[p["onnx_name"]].data, np.float32).ravel() for p in self.parameters]
        )

    def set_flat(self, flat: Array) -> None:
        for p in self.parameters:
            piece = np.ascontiguousarray(flat[p["offset"] : p["offset"] + p["numel"]], np.float32)
            self.state.parameters[p["onnx_name"]] = piece.reshape(p["shape"])

    def save(self, folder: Path) -> None:
        training_api().CheckpointState.save_checkpoint(
            self.state, str(folder / "state.ckpt"), include_optimizer_state=True
        )

    def load(self, folder: Path) -> None:
        self._open(folder / "state.ckpt")


class PlainBackend:
    """``grad_step.onnx`` and ``update_step.onnx`` on any onnxruntime; parameters and moments are numpy vectors."""

    noise_with_last_batch = False

    def __init__(self, folder: Path, manifest: Mapping[str, Any]) -> None:
        import onnxruntime
        from safetensors.numpy import load_file

        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        providers = ["CPUExecutionProvider"]
        self.grad = onnxruntime.InferenceSession(str(folder / "grad_step.onnx"), options, providers=providers)
        self.step = onnxruntime.InferenceSession(str(folder / "update_step.onnx"), options, providers=providers)
        self.grad_inputs = {i.name for i in self.grad.get_inputs()}
        self.step_inputs = {i.name for i in self.step.get_inputs()}
        size = int(manifest["num_trainable"])
        initial = load_file(folder / "initial.safetensors")
        theta = np.concatenate([initial[p["name"]].astype(np.float32).ravel() for p in manifest["parameters"]])
        self.state: dict[str, Array] = {"theta": theta}
        if manifest["optimizer"]["type"] == "AdamW":
            self.state.update(m=np.zeros(size, np.float32), v=np.zeros(size, np.float32), t=np.zeros(1, np.int64))
        self.accumulator: Array = np.zeros(size, np.float32)

    def begin(self) -> None:
        self.accumulator = np.zeros_like(self.accumulator)

    def accumulate(self, batch: Mapping[str, Array], mask: Array, noise: Array) -> None:
        given = {**batch, "sample_mask": mask, "theta": self.state["theta"], "accumulator": self.accumulator}
        feed = {k: np.ascontiguousarray(v) for k, v in given.items() if k in self.grad_inputs}
        self.accumulator = np.asarray(self.grad.run(None, feed)[0])

    def update(self, noise: Array, learning_rate: float) -> None:
        rate = np.array([learning_rate], np.float32)
        given = {**self.state, "accumulator": self.accumulator, "noise": noise, "learning_rate": rate}
        results = self.step.run(None, {k: v for k, v in given.items() if k in self.step_inputs})
        self.state = dict(zip(self.state, (np.asarray(r) for r in results), strict=True))

    def gradient_buffers(self) -> Array:
        return self.accumulator

    def flat(self) -> Array:
        return np.array(self.state["theta"], np.float32)

    def set_flat(self, flat: Array) -> None:
        self.state["theta"] = np.ascontiguousarray(flat, np.float32)

    def save(self, folder: Path) -> None:
        from safetensors.numpy import save_file

        save_file({k: np.ascontiguousarray(v) for k, v in self.state.items()}, folder / "state.safetensors")

    def load(self, folder: Path) -> None:
        from safetensors.numpy import load_file

        loaded = load_file(folder / "state.safetensors")
        self.state = {k: loaded[k] for k in self.state}


def load_artifacts(
    folder: str | os.PathLike[str], manifest: Mapping[str, Any] | None = None
) -> OrtTrainingBackend | PlainBackend:
    """The backend for the artifacts in ``folder``: ONNX Runtime Training's, or the plain pair's, their seal matched first.

    Raises:
        SealBroken: a graph is not the private step that the manifest declares, whatever its hashes say.
        ArtifactError: the folder is not an export, was changed, or its runtime (or onnx, for the seal) is not installed.
    """
    manifest = read_manifest(folder) if manifest is None else manifest
    check_artifacts(folder, manifest)
    if manifest["target"] == "ort_training":
        return OrtTrainingBackend(Path(folder), manifest)
    return PlainBackend(Path(folder), manifest)


# -- data -------------------------------------------------------------------------------------------------------------


class Records:
    """The user's records as arrays of the artifacts' fixed, public shapes.

    Args:
        manifest: of the artifacts.
        data: path or name of every batch entry to an array [N, ...], or a sequence of records, each such a mapping to
        one
            record's array. Shorter sequences are padded at the end to the artifacts' length; longer ones are an error.
        pad_values: by path, what to pad with (0 unless given).

    Raises:
        DataError: an entry is missing or has the wrong shape or type. Rows are named by number, never quoted.
    """

    def __init__(
        self,
        manifest: Mapping[str, Any],
        data: Mapping[str, Any] | Sequence[Mapping[str, Any]],
        pad_values: Mapping[str, float] | None = None,
    ) -> None:
        self.inputs = manifest["batch_inputs"]
        self.pad_values = dict(pad_values or {})
        self.data = data
        if isinstance(data, Mapping):
            sizes = {len(self._column(data, i, None)) for i in self.inputs}
            if len(sizes) != 1:
                raise DataError(
                    "The entries of the data set have different numbers of records. Each must hold one row per record."
                )
            self.size = sizes.pop()
        else:
            self.size = len(data)
        if self.size < 1:
            raise DataError("The data set is empty.")

    def __len__(self) -> int:
        return self.size

    def _column(self, record: Mapping[str, Any], entry: Mapping[str, Any], row: int | None) -> Any:
        for key in (entry["path"], entry["name"]):
            if key in record:
                return record[key]
        where = "The data set" if row is None else f"Row {row} of the data set"
        raise DataError(f"{where} lacks the entry {entry['path']!r}, which the artifacts take.")

    def row(self, entry: Mapping[str, Any], row: int) -> Array:
        record, single = (self.data, False) if isinstance(self.data, Mapping) else (self.data[row], True)
        column = self._column(record, entry, row if single else None)
        try:
            value = np.asarray(column if single else column[row])
        except (ValueError, TypeError, IndexError):
            raise DataError(
                f"Row {row} of the data set: {entry['path']!r} is not a regular array of numbers."
            ) from None
        wanted, dtype = tuple(entry["shape"]), np.dtype(entry["dtype"])
        if value.dtype.kind not in "biuf" or (value.dtype.kind == "f" and dtype.kind != "f"):
            raise DataError(
                f"Row {row} of the data set: {entry['path']!r} has type {value.dtype}; the artifacts take {dtype}."
            )
        if value.shape != wanted:
            if (
                value.ndim != len(wanted)
                or value.ndim == 0
                or value.shape[1:] != wanted[1:]
                or value.shape[0] > wanted[0]
            ):
                raise DataError(
                    f"Row {row} of the data set: {entry['path']!r} has shape {value.shape}; the artifacts take "
                    f"{wanted}, or a shorter first "
                    "axis, which is padded. Cut longer records yourself, or export with a longer example batch."
                )
            padded = np.full(wanted, self.pad_values.get(entry["path"], 0), dtype)
            padded[: value.shape[0]] = value
            value = padded
        return value.astype(dtype, copy=False)

    def micro_batches(self, rows: Array, size: int) -> Iterator[tuple[dict[str, Array], Array]]:
        """Batches of exactly ``size`` rows, dummies (zeros) masked; at least one, also for an empty draw."""
        for start in range(0, max(1, len(rows)), size):
            chosen = [int(r) for r in rows[start : start + size]]
            mask = np.zeros(size, np.float32)
            mask[: len(chosen)] = 1
            batch = {}
            for entry in self.inputs:
                block = np.zeros((size, *entry["shape"]), np.dtype(entry["dtype"]))
                for i, r in enumerate(chosen):
                    block[i] = self.row(entry, r)
                batch[entry["name"]] = block
            yield batch, mask

    def fingerprint(self, key: SecretKey) -> str:
        """A keyed digest of every record, for a private checkpoint: a replayed step must meet the same data."""
        digest = hashlib.sha256(stream(key, "data fingerprint", 0).bytes(32))
        for entry in self.inputs:
            for row in range(self.size):
                digest.update(self.row(entry, row).tobytes())
        return digest.hexdigest()


# -- training ---------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Plan:
    """The public plan of a run: its sampler, delta and step size."""

    sampler: PoissonSampler
    target_delta: float
    learning_rate: float
    physical_batch_size: int


class OrtTrainer:
    """Private training from an export, on records held in numpy.

    Args:
        artifacts: folder written by ``export_ort_training`` or ``export_onnx``.
        data, pad_values: see ``Records``.
        steps: planned logical steps (default: the manifest's). sample_rate is expected_batch_size / dataset_size.
        dataset_size: a public declaration; default the manifest's, else len(data), recorded as "assumed public".
        target_delta: default the manifest's.
        learning_rate: default the manifest's.
        physical_batch_size: rows of a micro-batch; every one has exactly this many, dummies masked.
        insecure_seed_for_tests: a known seed in place of a secret key: NO PRIVACY, recorded in privacy.json.

    Guarantee: (epsilon, delta)-DP for adding or removing one record, as ``finish`` states it in privacy.json. One noise
    vector per logical batch, from the operating system's secure generator; an empty draw takes a full noisy step.

    Raises:
        ArtifactError, DataError, PrivacyError: the artifacts, the data or the plan cannot be used; nothing was trained.
    """

    def __init__(
        self,
        artifacts: str | os.PathLike[str],
        data: Mapping[str, Any] | Sequence[Mapping[str, Any]],
        *,
        steps: int | None = None,
        dataset_size: int | None = None,
        target_delta: float | None = None,
        learning_rate: float | None = None,
        physical_batch_size: int = 32,
        pad_values: Mapping[str, float] | None = None,
        insecure_seed_for_tests: int | None = None,
    ) -> None:
        self.folder = Path(artifacts)
        self.manifest = read_manifest(self.folder)
        self.records = Records(self.manifest, data, pad_values)
        known = self.manifest["plan"]
        declared = dataset_size if dataset_size is not None else known.get("dataset_size")
        self.dataset_size_assumed_public = declared is None
        size = len(self.records) if declared is None else int(declared)
        if size != len(self.records):
            raise DataError(
                f"The declared dataset_size is {size}, and the data set has another number of records. Declare the "
                "size of the data "
                "set that is trained on."
            )
        count = steps if steps is not None else known.get("steps")
        delta = target_delta if target_delta is not None else known.get("target_delta")
        if count is None or delta is None:
            raise PrivacyError("Give steps and target_delta: the export does not hold a plan.")
        expected = float(self.manifest["expected_batch_size"])
        sampler = PoissonSampler.from_expected_batch_size(size, expected, steps=int(count))
        rate = known.get("sample_rate")
        if rate is not None and abs(rate - sampler.sample_rate) > 1e-9 * rate:
            raise PrivacyError(
                f"The export was planned for sample_rate {rate:g}, and its expected batch of {expected:g} over "
                f"{size} records gives "
                f"{sampler.sample_rate:g}. Export again for this data set."
            )
        if isinstance(physical_batch_size, bool) or physical_batch_size < 1:
            raise DataError("physical_batch_size must be 1 or more.")
        chosen = learning_rate if learning_rate is not None else float(self.manifest["optimizer"]["lr"])
        self.plan = Plan(sampler, float(delta), float(chosen), int(physical_batch_size))
        from dpbitfit_fx.accounting import check_target_delta

        check_target_delta(self.plan.target_delta, size)
        self.insecure = insecure_seed_for_tests is not None
        self.key = (
            SecretKey() if insecure_seed_for_tests is None else SecretKey.insecure_for_tests(insecure_seed_for_tests)
        )
        self.backend = load_artifacts(self.folder, self.manifest)
        self.step = 0
        self.size = int(self.manifest["num_trainable"])

    def train(self, steps: int | None = None, callback: Callable[[int], None] | None = None) -> int:
        """Take ``steps`` more logical steps (default: all that are left); returns how many are done. Never beyond the
        plan."""
        left = self.plan.sampler.steps - self.step
        wanted = left if steps is None else steps
        if wanted > left:
            raise PrivacyError(
                f"The plan has {left} steps left; {wanted} were asked for. The budget was computed for the plan: "
                "make a new one."
            )
        for _ in range(wanted):
            self.logical_step()
            if callback is not None:
                callback(self.step)
        return self.step

    def logical_step(self) -> None:
        """Draw, clip and sum, add noise once, update. Replays bit for bit from a checkpoint."""
        rows = self.plan.sampler.draw(self.key, self.step)
        noise = stream(self.key, "noise", self.step).normal(self.size).astype(np.float32)
        nothing = np.zeros_like(noise)
        self.backend.begin()
        batches = self.records.micro_batches(rows, self.plan.physical_batch_size)
        batch, mask = next(batches)
        for following in batches:
            self.backend.accumulate(batch, mask, nothing)
            batch, mask = following
        self.backend.accumulate(batch, mask, noise if self.backend.noise_with_last_batch else nothing)
        self.backend.update(noise, self.plan.learning_rate)
        self.step += 1

    def biases(self) -> dict[str, Array]:
        """The trained parameters by their torch names."""
        flat = self.backend.flat()
        return {
            p["name"]: flat[p["offset"] : p["offset"] + p["numel"]].reshape(p["shape"]).copy()
            for p in self.manifest["parameters"]
        }

    def statement(self) -> PrivacyStatement:
        """The privacy statement of the steps taken so far."""
        from dpbitfit_fx.privacy_statement import PrivacyStatement

        clipping = self.manifest["clipping"]
        kind = next((k for k, c in KINDS.items() if c.__name__ == clipping["type"]), None)
        if kind is None:
            raise ArtifactError(
                f"The manifest was written with the clipping {clipping['type']!r}, which this version does not know. Use the "
                "version that exported it."
            )
        return PrivacyStatement.create(
            self.plan.sampler,
            noise_multiplier=float(self.manifest["noise_multiplier"]),
            delta=self.plan.target_delta,
            max_grad_norm=float(self.manifest["max_grad_norm"]),
            clipping=kind,
            gamma=float(clipping["gamma"]) if kind == "automatic" else None,
            graph_hash=self.manifest["graph_hash"],
            num_trainable=self.size,
            num_parameters=int(self.manifest["num_parameters"]),
            dataset_size_assumed_public=self.dataset_size_assumed_public,
            steps=self.step,
            public_declarations={
                "padded_lengths": "the artifacts' shapes",
                "physical_batch_size": self.plan.physical_batch_size,
                "learning_rate": self.plan.learning_rate,
                "optimizer": self.manifest["optimizer"]["type"],
            },
            insecure=self.insecure,
            backend=f"onnxruntime ({self.manifest['target']})",
        )

    def finish(self, output: str | os.PathLike[str]) -> PrivacyStatement:
        """Write ``biases.safetensors`` and ``privacy.json`` to ``output`` and erase the key; training ends here.

        Raises:
            ArtifactError: the folder cannot be written; the run can be finished again elsewhere.
        """
        folder = ensure_output_folder(output)
        statement = self.statement()
        metadata = {"graph_hash": str(self.manifest["graph_hash"]), **self.manifest.get("fingerprints", {})}
        save_biases(folder / "biases.safetensors", self.biases(), metadata)
        statement.save(folder)
        self.key.erase()
        return statement

    # -- checkpoints --------------------------------------------------------------------------------------------------

    def _about(self) -> dict[str, Any]:
        return {
            "format": CHECKPOINT_FORMAT,
            "step": self.step,
            "graph_hash": self.manifest["graph_hash"],
            "files": self.manifest["files"],
            "sampler": self.plan.sampler.to_dict(),
            "target_delta": self.plan.target_delta,
            "learning_rate": self.plan.learning_rate,
            "physical_batch_size": self.plan.physical_batch_size,
            "data": self.records.fingerprint(self.key),
        }

    def save_checkpoint(self, path: str | os.PathLike[str]) -> None:
        """Write a PRIVATE checkpoint (mode 0700): state, key and plan, at a logical-step boundary.

        A new folder per checkpoint, then one small file that names it: a crash leaves the previous one valid.
        """
        root = Path(path)
        ensure_output_folder(root)
        os.chmod(root, 0o700)
        name = f"step-{self.step}"
        part = root / name
        part.mkdir(exist_ok=True)
        self.backend.save(part)
        self.key.save(part / "key.json")
        about = {
            **self._about(),
            "state_files": {f.name: sha256_file(f) for f in sorted(part.iterdir()) if f.name.startswith("state")},
        }
        atomic_write_text(part / "about.json", json.dumps(about) + "\n", mode=0o600)
        atomic_write_text(root / "latest.json", json.dumps({"latest": name}) + "\n", mode=0o600)
        for old in root.glob("step-*"):
            if old.name != name:
                SecretKey.erase_file(old / "key.json")
                for file in old.iterdir():
                    file.unlink()
                old.rmdir()

    def resume(self, path: str | os.PathLike[str]) -> int:
        """Continue from a checkpoint exactly; returns the step. Data, plan and artifacts must be the same.

        Raises:
            CheckpointError: they are not, or the checkpoint is damaged; nothing was changed.
        """
        root = Path(path)
        try:
            part = root / str(json.loads(read_text(root / "latest.json"))["latest"])
            about = json.loads(read_text(part / "about.json"))
            key = SecretKey.load(part / "key.json")
            damaged = any(sha256_file(part / n) != d for n, d in about["state_files"].items())
        except (ArtifactError, ValueError, KeyError, TypeError, OSError) as error:
            raise CheckpointError(
                f"{os.fspath(path)!r} is not a checkpoint that can be resumed from: {type(error).__name__}."
            ) from error
        if damaged or about.get("format") != CHECKPOINT_FORMAT:
            raise CheckpointError(
                f"The checkpoint {os.fspath(path)!r} is damaged or of another version; nothing was changed."
            )
        own, self.key = self.key, key
        expected = {**self._about(), "step": about["step"]}
        changed = [k for k in expected if expected[k] != about.get(k)]
        if changed:
            self.key = own
            raise CheckpointError(
                f"The checkpoint {os.fspath(path)!r} belongs to another run: {', '.join(changed)} changed. A "
                "replayed step would meet other "
                "data or another graph under noise that is already known. Restore what changed, or start a new run "
                "and compose both."
            )
        self.backend.load(part)
        self.insecure = key.insecure
        self.step = int(about["step"])
        return self.step


def main() -> None:
    """The command line: one .npz in, a folder with biases and privacy.json out."""
    import typer
    from rich.console import Console

    def run(
        artifacts: Path = typer.Argument(..., help="Folder of an export."),  # noqa: B008
        data: Path = typer.Argument(..., help=".npz with one array [N, ...] per batch entry."),  # noqa: B008
        output: Path = typer.Option(..., help="Folder for biases.safetensors and privacy.json."),  # noqa: B008
        steps: int | None = typer.Option(None, help="Logical steps (default: the export's plan)."),
        delta: float | None = typer.Option(None, help="Delta (default: the export's plan)."),
        learning_rate: float | None = typer.Option(None, help="Default: the export's."),
        physical_batch_size: int = typer.Option(32, help="Rows per micro-batch."),
        checkpoint: Path | None = typer.Option(None, help="PRIVATE folder to resume from and save to."),  # noqa: B008
        checkpoint_every: int = typer.Option(50, help="Steps between checkpoints."),
    ) -> None:
        console = Console()
        from dpbitfit_fx.errors import DPBitFitError

        try:
            ensure_output_folder(output)
            with np.load(data, allow_pickle=False) as archive:
                arrays = {name: archive[name] for name in archive.files}
            trainer = OrtTrainer(
                artifacts,
                arrays,
                steps=steps,
                target_delta=delta,
                learning_rate=learning_rate,
                physical_batch_size=physical_batch_size,
            )
            if checkpoint is not None and (checkpoint / "latest.json").is_file():
                console.print(f"Resumed at step {trainer.resume(checkpoint)}.")

            def save(done: int) -> None:
                if checkpoint is not None and done % checkpoint_every == 0:
                    trainer.save_checkpoint(checkpoint)

            trainer.train(callback=save)
            console.print(trainer.finish(output).summary())
        except (DPBitFitError, OSError, ValueError) as error:
            console.print(f"[red]Error:[/red] {error}", highlight=False)
            raise typer.Exit(1) from error

    typer.run(run)


if __name__ == "__main__":
    main()
