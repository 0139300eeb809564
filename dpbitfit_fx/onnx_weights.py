"""The frozen weights of an export: one file that all its graphs read, each tensor in it once. Written by streaming.

    grad_step.onnx, training_model.onnx, eval_model.onnx  --(offset, length)-->  weights.data

A tensor of more than INLINE_LIMIT bytes never enters a protobuf, whose limit is 2 GiB. It is written from the storage that
torch holds, one tensor at a time, and equal tensors (tied weights, the same weight in two graphs) share one place. Where an
earlier export left the very same bytes, that file stays: same inode, same time of change.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import numpy.typing as npt

from dpbitfit_fx.errors import ExportError
from dpbitfit_fx.ort_artifacts import WEIGHTS

if TYPE_CHECKING:
    import onnx_ir as ir

INLINE_LIMIT: Final = 4096
ALIGNMENT: Final = 1 << 16  # what every system can map into memory
SMALL: Final = 1 << 18  # bytes; a smaller tensor starts at a page, lest gaps be as large as what they part
PAGE: Final = 1 << 12
LARGEST_GRAPH: Final = 1 << 30  # without its weights; protobuf stops at twice that
_CHUNK: Final = 1 << 26


@dataclasses.dataclass(frozen=True)
class Place:
    """One tensor of the file: where it starts, and the tensor itself (its bytes are read when they are needed)."""

    offset: int
    tensor: Any

    @property
    def end(self) -> int:
        return self.offset + int(self.tensor.nbytes)


def save_models(models: Mapping[str, ir.Model], folder: Path, previous: Path | None = None) -> None:
    """Write every model to ``folder`` by its file name, and the weights of all of them to WEIGHTS, if there are any.

    Args:
        previous: folder of an earlier export, whose WEIGHTS is kept (by a hard link) where it holds the same bytes.

    Raises:
        ExportError: a graph is too large for a file even without its weights.
    """
    import onnx_ir as ir

    places: dict[bytes, Place] = {}
    known: dict[tuple[int, int], tuple[bytes, Any]] = {}
    for model in models.values():
        for value in model.graph.initializers.values():
            tensor = value.const_value
            if tensor is None or tensor.nbytes <= INLINE_LIMIT:
                continue
            digest = _digest(tensor, known)
            if digest not in places:
                end = max((p.end for p in places.values()), default=0)
                step = ALIGNMENT if tensor.nbytes >= SMALL else PAGE
                places[digest] = Place(-(-end // step) * step, tensor)
            value.const_value = ir.ExternalTensor(
                WEIGHTS,
                places[digest].offset,
                tensor.nbytes,
                tensor.dtype,
                shape=tensor.shape,  # type: ignore[arg-type]
                name=str(value.name),
                base_dir=folder,
            )
    if places and not _kept(previous, folder, places.values()):
        _write(folder / WEIGHTS, places.values())
    for name, model in models.items():
        _small_enough(model, name)
        ir.save(model, folder / name)


def _bytes(tensor: Any) -> npt.NDArray[np.uint8]:
    """A view of the tensor's own memory, where that is contiguous."""
    return np.ascontiguousarray(tensor.numpy()).reshape(-1).view(np.uint8)


def _digest(tensor: Any, known: dict[tuple[int, int], tuple[bytes, Any]]) -> bytes:
    """SHA-256 of the tensor's bytes. Two graphs name the same storage: hashed once."""
    data = _bytes(tensor)
    if not np.shares_memory(data, tensor.numpy()):
        return hashlib.sha256(data.data).digest()  # a copy, whose address will be that of another one
    key = (data.ctypes.data, data.nbytes)
    if key not in known:
        known[key] = hashlib.sha256(data.data).digest(), tensor  # held, so that its address stays its own
    return known[key][0]


def _kept(previous: Path | None, folder: Path, places: Iterable[Place]) -> bool:
    """Whether an earlier export's file, byte for byte what would be written, is now this one's too."""
    old = previous / WEIGHTS if previous is not None else None
    if old is None or old.is_symlink() or not old.is_file():
        return False
    places = list(places)
    if old.stat().st_size != places[-1].end:
        return False
    at = 0
    with open(old, "rb") as stream:
        for place in places:
            if any(stream.read(place.offset - at)):
                return False
            data = _bytes(place.tensor)
            for start in range(0, len(data), _CHUNK):
                piece = data[start : start + _CHUNK]
                if not np.array_equal(np.frombuffer(stream.read(len(piece)), np.uint8), piece):
                    return False
            at = place.end
    try:
        os.link(old, folder / WEIGHTS)
    except OSError:  # a file system without links
        return False
    return True


def _write(path: Path, places: Iterable[Place]) -> None:
    with open(path, "wb", buffering=0) as stream:
        for place in places:
            stream.truncate(place.offset)
            stream.seek(place.offset)
            data = _bytes(place.tensor).data
            while data:
                data = data[stream.write(data[:_CHUNK]) or 0 :]


def _small_enough(model: ir.Model, name: str) -> None:
    """What is left in the graph fits a protobuf with room: small constants, and attributes of nodes."""
    inline = [v.const_value for v in model.graph.initializers.values() if v.const_value is not None]
    size = sum(int(t.nbytes) for t in inline if t.nbytes <= INLINE_LIMIT)
    for node in model.graph.all_nodes():
        size += sum(int(a.value.nbytes) for a in node.attributes.values() if hasattr(a.value, "nbytes"))
    if size > LARGEST_GRAPH:
        raise ExportError(f"{name} would hold {size / 1e9:.1f} GB of constants beside its weights; no ONNX file can.")


def constant(model: ir.Model, name: str, array: np.ndarray[Any, Any]) -> ir.Value:
    """A named initializer."""
    import onnx_ir as ir

    tensor = ir.tensor(array, name=name)
    value = ir.Value(name=name, const_value=tensor, shape=ir.Shape(array.shape), type=ir.TensorType(tensor.dtype))
    model.graph.register_initializer(value)
    return value


# -- weights that are read as they lie --------------------------------------------------------------------------------


def read_transposed(model: ir.Model) -> None:
    """``x @ Transpose(W)`` with x [N, K] and a large weight W [C, K] becomes ``Gemm(x, W, transB=1)``, in place.

    ONNX Runtime would fold the Transpose: a second W in memory, which no other graph or process shares.
    """
    import onnx_ir as ir

    graph = model.graph
    for node in list(graph):
        if node.domain or node.op_type not in ("MatMul", "Gemm") or node.inputs[1] is None:
            continue
        turn = node.inputs[1].producer()
        if turn is None or turn.op_type != "Transpose" or turn.domain or turn.inputs[0] is None:
            continue
        weight, x = turn.inputs[0], node.inputs[0]
        large = weight.const_value is not None and weight.const_value.nbytes > INLINE_LIMIT
        if not large or weight.shape is None or len(weight.shape) != 2 or x is None:
            continue
        if node.op_type == "Gemm":
            turned = node.attributes["transB"].as_int() if "transB" in node.attributes else 0
        elif x.shape is not None and len(x.shape) == 2:
            node.op_type, turned = "Gemm", 0
        else:
            continue
        node.attributes["transB"] = ir.AttrInt64("transB", 1 - turned)
        node.replace_input_with(1, weight)
        if not turn.outputs[0].uses() and turn.outputs[0] not in graph.outputs:
            graph.remove(turn, safe=True)


__all__ = ["ALIGNMENT", "INLINE_LIMIT", "constant", "read_transposed", "save_models"]
