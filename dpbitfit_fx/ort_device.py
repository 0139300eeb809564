"""Where ONNX Runtime runs a graph: sessions of one device, and values that stay on it between runs. Torch-free.

A private step runs a graph per micro-batch, each taking what the last one left: the sum so far, the parameters, the
optimizer's moments. IO binding keeps those on the device; only the batch, the noise and the learning rate travel.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from dpbitfit_fx.errors import ArtifactError
from dpbitfit_fx.ort_artifacts import WEIGHTS

__all__ = ["DEVICES", "DeviceSession", "check_device", "numpy_of", "on_device", "open_session", "session_options"]

DEVICES: Final = ("cpu", "cuda")

# float32 products in full: rounded to TF32 (ten bits), a clipped gradient could be a thousandth longer than its bound.
_PROVIDERS: Final[dict[str, list[Any]]] = {
    "cpu": ["CPUExecutionProvider"],
    "cuda": [("CUDAExecutionProvider", {"use_tf32": "0"}), "CPUExecutionProvider"],
}

LARGE_WEIGHTS: Final = 1 << 30  # bytes; an export with more of them is run from its file, without copies in memory


def check_device(device: str) -> str:
    """The device, where this ONNX Runtime has it.

    Raises:
        ArtifactError: an unknown name, or an ONNX Runtime that was built without it.
    """
    import onnxruntime

    if device not in DEVICES:
        raise ArtifactError(f"device must be one of {', '.join(DEVICES)}; got {device!r}.")
    if device == "cuda" and "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
        raise ArtifactError(
            f"device='cuda' needs an ONNX Runtime with the CUDA execution provider, and onnxruntime {onnxruntime.__version__} "
            f"here has {', '.join(onnxruntime.get_available_providers())}. Install onnxruntime-gpu in place of onnxruntime, "
            "or leave the device out."
        )
    return device


def session_options(folder: Path) -> Any:
    """At ORT_ENABLE_ALL, for the graphs of the export in ``folder``. Nothing is logged: ONNX Runtime's message on an index that
    does not exist quotes it, and it is a record's; what fails raises.

    ONNX Runtime maps WEIGHTS into memory, then packs one copy of a weight for the forward pass and one for the backward
    pass. Large weights are read from the map instead, which all sessions and processes share: a third slower at 64 tokens.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
    options.log_severity_level = 4
    # Where it joins a quantized weight to its product: the product in float32, not with activations rounded to 8 bits.
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
    weights = folder / WEIGHTS
    if weights.is_file() and weights.stat().st_size > LARGE_WEIGHTS:
        options.add_session_config_entry("session.disable_prepacking", "1")
        options.add_session_config_entry("optimization.disable_specified_optimizers", "ConstantFolding")
    return options


def open_session(path: Path, device: str = "cpu") -> Any:
    """An InferenceSession on the device.

    Raises:
        ArtifactError: ONNX Runtime does not take the file, or fell back to the CPU where CUDA was asked for.
    """
    import onnxruntime

    check_device(device)
    try:
        session = onnxruntime.InferenceSession(str(path), session_options(path.parent), providers=_PROVIDERS[device])
    except Exception as error:  # onnxruntime's classes differ by version, and share no base of their own
        raise ArtifactError(
            f"ONNX Runtime {onnxruntime.__version__} cannot load {os.fspath(path)!r} ({type(error).__name__}). Export again, or "
            "use the version that the export was checked with."
        ) from error
    if device == "cuda" and session.get_providers()[0] != "CUDAExecutionProvider":
        raise ArtifactError(
            "device='cuda': ONNX Runtime could not start its CUDA execution provider and would run on the CPU without a "
            "word. Its log says why (usually CUDA or cuDNN of another version than it was built for)."
        )
    return session


class DeviceSession:
    """A session whose results stay where they were computed, as OrtValues that the next run takes as they are."""

    def __init__(self, path: Path, device: str) -> None:
        self.session, self.device = open_session(path, device), device
        self.inputs: Collection[str] = frozenset(i.name for i in self.session.get_inputs())
        self._outputs = [o.name for o in self.session.get_outputs()]

    def run(self, given: Mapping[str, Any]) -> list[Any]:
        """Arrays and OrtValues by name, those the graph does not take left out -> its outputs as OrtValues."""
        binding = self.session.io_binding()
        for name in self.inputs:
            value = given[name]
            if isinstance(value, np.ndarray):
                value = on_device(value, "cpu")  # ONNX Runtime brings it to where it is read
            binding.bind_ortvalue_input(name, value)
        for name in self._outputs:
            binding.bind_output(name, self.device)
        self.session.run_with_iobinding(binding)
        return list(binding.get_outputs())


def on_device(array: npt.NDArray[Any], device: str) -> Any:
    """An OrtValue that holds a copy of the array on another device, and the array's own memory on the CPU."""
    import onnxruntime

    return onnxruntime.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(array), device)


def numpy_of(value: Any) -> npt.NDArray[Any]:
    """The OrtValue's content, copied back."""
    found: npt.NDArray[Any] = np.array(value.numpy())
    return found
