"""One private step from an export, on the runtime that it is for. Importable without torch.

``ort_training``  Module, Optimizer and CheckpointState of ONNX Runtime Training (onnxruntime-training-cpu 1.19.2)
``onnx``          the plain pair grad_step.onnx and update_step.onnx, on any onnxruntime
"""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from dpbitfit_fx.errors import ArtifactError, SealBroken
from dpbitfit_fx.files import describe_os_error
from dpbitfit_fx.onnx_seal import check_artifacts
from dpbitfit_fx.ort_artifacts import at_lengths, graph_file, phases_of, read_manifest, training_api
from dpbitfit_fx.ort_device import DeviceSession, check_device, numpy_of, on_device, session_options

__all__ = [
    "Array",
    "Backend",
    "OrtTrainingBackend",
    "PlainBackend",
    "load_artifacts",
    "open_backend",
    "pieces",
]

Array = npt.NDArray[Any]


def pieces(parameters: Sequence[Mapping[str, Any]], flat: Array, key: str) -> dict[str, Array]:
    """``float32[D]`` -> the parameters in their shapes, views, by ``"name"`` (torch's) or ``"onnx_name"``."""
    return {p[key]: flat[p["offset"] : p["offset"] + p["numel"]].reshape(p["shape"]) for p in parameters}


class Backend(Protocol):
    """One private step on some runtime: ``begin``, ``accumulate`` for every micro-batch, ``update``.

    ``accumulate`` and ``gradient_buffers`` handle SECRET sums: they reach no disk and no callback. ``optimizer_state``
    and ``flat`` are functions of noisy sums only. ``learning_rate``: one for all, or float32[D] where the export takes that.
    """

    noise_with_last_batch: bool

    def begin(self) -> None: ...
    def accumulate(self, batch: Mapping[str, Array], mask: Array, noise: Array) -> None: ...
    def gradient_buffers(self) -> Array:
        """What ``update`` will consume: with the noise where it comes with the last micro-batch, else without."""
        ...

    def update(self, noise: Array, learning_rate: float | Array) -> None: ...
    def flat(self) -> Array: ...
    def set_flat(self, flat: Array) -> None: ...
    def optimizer_state(self) -> dict[str, Array]: ...
    def restore(self, flat: Array, optimizer_state: Mapping[str, Array]) -> None: ...


class OrtTrainingBackend:
    """Module, Optimizer and CheckpointState of ONNX Runtime Training; the noise enters with the last micro-batch."""

    noise_with_last_batch = True

    def __init__(
        self, folder: Path, manifest: Mapping[str, Any], checkpoint: Path | None = None, device: str = "cpu"
    ) -> None:
        self.folder, self.manifest, self.device = folder, manifest, check_device(device)
        self.parameters = manifest["parameters"]
        self._open(checkpoint or folder / "checkpoint")

    def _open(self, checkpoint: Path) -> None:
        api = training_api()
        self.state = api.CheckpointState.load_checkpoint(str(checkpoint))
        self.module = api.Module(
            str(self.folder / "training_model.onnx"),
            self.state,
            str(self.folder / "eval_model.onnx"),
            device=self.device,
            session_options=session_options(self.folder),
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

    def update(self, noise: Array, learning_rate: float | Array) -> None:
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
        for name, piece in pieces(self.parameters, np.ascontiguousarray(flat, np.float32), "onnx_name").items():
            self.state.parameters[name] = piece

    def optimizer_state(self) -> dict[str, Array]:
        with _temporary_file() as path:
            training_api().CheckpointState.save_checkpoint(self.state, str(path), include_optimizer_state=True)
            return {"checkpoint": np.frombuffer(path.read_bytes(), np.uint8)}

    def restore(self, flat: Array, optimizer_state: Mapping[str, Array]) -> None:
        with _temporary_file() as path:
            path.write_bytes(optimizer_state["checkpoint"].tobytes())
            self._open(path)
        if self.flat().tobytes() != np.asarray(flat, np.float32).tobytes():
            raise ArtifactError("ONNX Runtime did not give back the parameters that its checkpoint was made of.")


@contextlib.contextmanager
def _temporary_file() -> Iterator[Path]:
    """ONNX Runtime reads and writes its checkpoints by name only. They hold no secret: parameters and moments."""
    try:
        with tempfile.TemporaryDirectory() as folder:
            yield Path(folder) / "state.ckpt"
    except OSError as error:
        raise ArtifactError(describe_os_error(error, tempfile.gettempdir())) from error


class PlainBackend:
    """``grad_step.onnx`` and ``update_step.onnx`` on any onnxruntime; the sum, parameters and moments stay on its device.

    Args:
        manifest: of an export of one phase, or one of ``phases_of``.
        values: what the parameters that any phase trains hold now, by torch name; default: as exported.
        device: one of ``ort_device.DEVICES``.
    """

    noise_with_last_batch = False

    def __init__(
        self,
        folder: Path,
        manifest: Mapping[str, Any],
        values: Mapping[str, Array] | None = None,
        device: str = "cpu",
    ) -> None:
        lengths, self.device = at_lengths(manifest), device
        self.grads = [DeviceSession(folder / graph_file(one, "grad_step"), device) for one in lengths]
        self.shapes = [{b["name"]: list(b["shape"]) for b in one["batch_inputs"]} for one in lengths]
        self.step = DeviceSession(folder / graph_file(manifest, "update_step"), device)
        self.size = int(manifest["num_trainable"])
        known = values if values is not None else {}
        if values is None:
            known = initial_values(folder, {"parameters": [*manifest["parameters"], *manifest.get("held", [])]})
        theta, held = (_joined(manifest.get(kind, []), known) for kind in ("parameters", "held"))
        start: dict[str, Array] = {"theta": theta}
        if manifest["optimizer"]["type"] == "AdamW":
            start |= {n: np.zeros(self.size, np.float32) for n in ("m", "v")} | {"t": np.zeros(1, np.int64)}
        self.state: dict[str, Any] = {name: on_device(value, device) for name, value in start.items()}  # OrtValues
        self.set_held(held)
        self.begin()

    def begin(self) -> None:
        self._accumulator = on_device(np.zeros(self.size, np.float32), self.device)

    def accumulate(self, batch: Mapping[str, Array], mask: Array, noise: Array) -> None:
        own = {"theta": self.state["theta"], "held": self._held, "accumulator": self._accumulator}
        bucket = 0
        if len(self.grads) > 1:
            bucket = self.shapes.index({name: list(batch[name].shape[1:]) for name in self.shapes[0]})
        (self._accumulator,) = self.grads[bucket].run({**batch, "sample_mask": mask, **own})

    def update(self, noise: Array, learning_rate: float | Array) -> None:
        rate = np.array(learning_rate, np.float32).reshape(-1)
        given = {**self.state, "accumulator": self._accumulator, "noise": noise, "learning_rate": rate}
        self.state = dict(zip(self.state, self.step.run(given), strict=True))

    def gradient_buffers(self) -> Array:
        return numpy_of(self._accumulator)

    def flat(self) -> Array:
        return numpy_of(self.state["theta"])

    def set_flat(self, flat: Array) -> None:
        self.state["theta"] = on_device(np.array(flat, np.float32), self.device)

    def set_held(self, flat: Array) -> None:
        """The values of the run's parameters that other phases train."""
        self._held = on_device(np.array(flat, np.float32), self.device)

    def optimizer_state(self) -> dict[str, Array]:
        return {name: numpy_of(value) for name, value in self.state.items() if name != "theta"}

    def restore(self, flat: Array, optimizer_state: Mapping[str, Array]) -> None:
        given = {"theta": np.asarray(flat, np.float32), **optimizer_state}
        self.state = {name: on_device(np.array(given[name]), self.device) for name in self.state}


def _joined(parameters: Sequence[Mapping[str, Any]], values: Mapping[str, Array]) -> Array:
    """``float32[D]`` of the values of these parameters, in their order."""
    return np.concatenate([np.zeros(0, np.float32), *(values[p["name"]].ravel() for p in parameters)], dtype=np.float32)


def initial_values(folder: Path, manifest: Mapping[str, Any]) -> dict[str, Array]:
    """What the trainable parameters of the export held when it was made, by torch name.

    Raises:
        ArtifactError: the file is damaged, or holds other parameters.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    path = folder / "initial.safetensors"
    try:
        found = load_file(path)
        values = {p["name"]: found[p["name"]].astype(np.float32) for p in manifest["parameters"]}
    except (OSError, KeyError, ValueError, TypeError, AttributeError, SafetensorError):
        raise ArtifactError(f"'{path}' is damaged. Export again.") from None
    if [list(values[p["name"]].shape) for p in manifest["parameters"]] != [p["shape"] for p in manifest["parameters"]]:
        raise ArtifactError(f"'{path}' does not hold the export's parameters. Export again.")
    return values


def open_backend(
    folder: Path, phase: Mapping[str, Any], values: Mapping[str, Array] | None = None, device: str = "cpu"
) -> Backend:
    """The backend of one of ``phases_of``, whose seal was matched. values, device: as in ``PlainBackend``."""
    if phase["target"] == "ort_training":
        return OrtTrainingBackend(folder, phase, device=device)
    return PlainBackend(folder, phase, values, device)


def load_artifacts(
    folder: str | os.PathLike[str], manifest: Mapping[str, Any] | None = None, device: str = "cpu"
) -> Backend:
    """The backend for the artifacts in ``folder``: ONNX Runtime Training's, or the plain pair's, their seal matched first.
    Of several phases, the first one's.

    Raises:
        SealBroken: a graph is not the private step that the manifest declares, whatever its hashes say.
        ArtifactError: the folder is not an export, was changed, or its runtime (or onnx, for the seal) is not installed.
    """
    manifest = read_manifest(folder) if manifest is None else manifest
    check_artifacts(folder, manifest)
    return open_backend(Path(folder), phases_of(manifest)[0], device=device)
