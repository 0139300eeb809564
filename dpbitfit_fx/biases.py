"""Trained biases as one small safetensors file, and back onto the model they were trained for.

The file is the whole result of a private run: about 0.1 % of the model, written alike by PyTorch and by the ONNX
Runtime runner, which has no torch. Nothing here imports torch until a model is passed in.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Collection, Mapping
from typing import TYPE_CHECKING, Any, Final, TypeVar

import numpy as np

from dpbitfit_fx.arrays import raw_bytes
from dpbitfit_fx.errors import ArtifactError
from dpbitfit_fx.files import atomic_write_bytes, json_digest, read_bytes

if TYPE_CHECKING:
    import torch

    from dpbitfit_fx.passes.joint_graph import AddedBias

FORMAT: Final = "dpbitfit_fx.biases.v2"  # with a checksum of all that the file holds
_WITHOUT_CHECKSUM: Final = "dpbitfit_fx.biases.v1"
MODEL_FINGERPRINT: Final = "model_fingerprint"
FROZEN_FINGERPRINT: Final = "frozen_weights_sha256"
ADDED_BIASES: Final = "added_biases"

_CHECKSUM: Final = "sha256"

_Model = TypeVar("_Model", bound="torch.nn.Module")


def model_fingerprint(model: torch.nn.Module, added: Collection[str] = ()) -> str:
    """SHA-256 (hex) over the names, shapes and dtypes of all parameters; the values do not enter, nor does the device.

    Two models with one fingerprint have the same architecture as far as loading biases goes. ``added``: names of biases
    that are no part of the original and are left out.
    """
    left_out = set(added)
    digest = hashlib.sha256()
    for name, parameter in sorted(model.named_parameters()):
        if name in left_out:
            continue
        digest.update(json.dumps([name, list(parameter.shape), str(parameter.dtype)]).encode())
    return digest.hexdigest()


def frozen_weights_fingerprint(model: torch.nn.Module, trainable_names: Collection[str]) -> str:
    """SHA-256 (hex) over names, shapes, dtypes and **values** of the parameters not in ``trainable_names``.

    Biases fit the frozen weights they were trained with and no others: save this beside them
    (metadata ``frozen_weights_sha256``) and ``load_biases`` refuses another checkpoint of the same architecture.
    """
    import torch

    left_out = set(trainable_names)
    digest = hashlib.sha256()
    for name, parameter in sorted(model.named_parameters()):
        if name in left_out:
            continue
        digest.update(json.dumps([name, list(parameter.shape), str(parameter.dtype)]).encode())
        flat = parameter.detach().to("cpu").contiguous().reshape(-1)
        digest.update(flat.view(torch.uint8).numpy().data)
    return digest.hexdigest()


def fingerprints(model: Any, added: Collection[AddedBias], trained: Collection[str]) -> dict[str, str]:
    """What a file says of the model that its values belong to; reads every frozen weight."""
    return {
        MODEL_FINGERPRINT: model_fingerprint(model, [bias.name for bias in added]),
        FROZEN_FINGERPRINT: frozen_weights_fingerprint(model, trained),
        **({ADDED_BIASES: describe_added(added)} if added else {}),
    }


def describe_added(added: Collection[AddedBias]) -> str:
    """JSON for the metadata ``added_biases``: where each bias that the original model lacks belongs, by its name."""
    return json.dumps({b.name: {"module": b.module, "leaf": b.leaf, "view": list(b.view)} for b in added})


def save_biases(
    path: str | os.PathLike[str], biases: Mapping[str, Any], metadata: Mapping[str, str] | None = None
) -> None:
    """Write ``biases`` to ``path`` as safetensors, atomically.

    Args:
        path: the file; replaced in one step, or left as it was.
        biases: name (as in ``model.named_parameters()``) to numpy array or torch tensor, of floating-point values.
        metadata: strings kept in the header: ``model_fingerprint``, ``frozen_weights_sha256``, whatever else.

    Raises:
        ArtifactError: nothing to save, a value is not a floating-point array or not finite, or the file cannot be
            written.
    """
    if not biases:
        raise ArtifactError("There are no biases to save: the run trained nothing.")
    header = {**(metadata or {}), "format": FORMAT}
    header.pop(_CHECKSUM, None)
    for name, value in header.items():
        if not isinstance(name, str) or not isinstance(value, str):
            raise ArtifactError(f"Metadata of the biases must be strings; {name!r} is a {type(value).__name__}.")
    if all(hasattr(value, "detach") for value in biases.values()):
        data = _torch_bytes(biases, header)
    else:
        data = _numpy_bytes(biases, header)
    atomic_write_bytes(path, data)


def _refuse_value(name: str, why: str) -> ArtifactError:
    return ArtifactError(f"The bias {name!r} {why}, so the biases were not saved; any previous file is unchanged.")


_DIVERGED: Final = "holds values that are not finite (training diverged: lower the learning rate)"


def _torch_bytes(biases: Mapping[str, Any], header: dict[str, str]) -> bytes:
    # numpy has no bfloat16, so tensors go through safetensors' torch side; whoever holds tensors has torch.
    import torch
    from safetensors.torch import save

    tensors: dict[str, torch.Tensor] = {}
    for name, value in biases.items():
        # A clone, because safetensors refuses tensors that share memory, such as slices of one flat vector.
        tensor = value.detach().to("cpu").clone(memory_format=torch.contiguous_format)
        if not tensor.is_floating_point():
            raise _refuse_value(name, f"is of type {tensor.dtype}, not floating point")
        if not bool(torch.isfinite(tensor).all()):
            raise _refuse_value(name, _DIVERGED)
        tensors[name] = tensor
    return bytes(save(tensors, {**header, _CHECKSUM: _checksum(tensors, header)}))


def _numpy_bytes(biases: Mapping[str, Any], header: dict[str, str]) -> bytes:
    from safetensors.numpy import save

    arrays: dict[str, np.ndarray[Any, np.dtype[Any]]] = {}
    for name, value in biases.items():
        array = np.asarray(value.detach().cpu().numpy() if hasattr(value, "detach") else value)
        if array.dtype not in (np.float16, np.float32, np.float64):
            raise _refuse_value(name, f"is of type {array.dtype}, not floating point")
        if not np.isfinite(array).all():
            raise _refuse_value(name, _DIVERGED)
        # `ascontiguousarray` would turn a scalar into one dimension; the file is little-endian.
        arrays[name] = np.array(array, dtype=array.dtype.newbyteorder("="), order="C", copy=True)
    return bytes(save(arrays, {**header, _CHECKSUM: _checksum(arrays, header)}))


def _checksum(values: Mapping[str, Any], metadata: Mapping[str, str]) -> str:
    """SHA-256 (hex) of the metadata and of every value: a damaged file is never other biases."""
    digest = hashlib.sha256(json_digest({k: v for k, v in metadata.items() if k != _CHECKSUM}).encode())
    for name, value in sorted(values.items()):
        digest.update(json.dumps([name, list(value.shape), str(value.dtype).removeprefix("torch.")]).encode())
        digest.update(raw_bytes(value))
    return digest.hexdigest()


def _read(
    path: str | os.PathLike[str], load: Callable[[bytes], dict[str, Any]]
) -> tuple[dict[str, Any], dict[str, str]]:
    data = read_bytes(path)
    damaged = ArtifactError(
        f"{os.fspath(path)!r} is not a safetensors file, or is damaged. Nothing was loaded. Copy it again from where "
        "it was made."
    )
    try:
        tensors = load(data)
        length = int.from_bytes(data[:8], "little")
        metadata = json.loads(data[8 : 8 + length]).get("__metadata__", {})
    except Exception:
        # safetensors' own exceptions differ by version; whatever it says, the file is unusable.
        raise damaged from None
    if not isinstance(metadata, dict) or metadata.get("format") not in (FORMAT, _WITHOUT_CHECKSUM):
        raise ArtifactError(
            f"{os.fspath(path)!r} is a safetensors file, but not one of trained biases written by this version of "
            f"dpbitfit_fx (its format is not {FORMAT!r}). Nothing was loaded."
        )
    if metadata["format"] == FORMAT and metadata.get(_CHECKSUM) != _checksum(tensors, metadata):
        raise damaged
    return tensors, {str(key): str(value) for key, value in metadata.items() if key != _CHECKSUM}


def read_biases(path: str | os.PathLike[str]) -> tuple[dict[str, np.ndarray[Any, np.dtype[Any]]], dict[str, str]]:
    """The biases as numpy arrays, and the metadata; without torch. Not for bfloat16 files.

    Raises:
        ArtifactError: the file is absent, damaged, or of another kind.
    """
    from safetensors.numpy import load

    return _read(path, load)


def load_biases(model: _Model, path: str | os.PathLike[str], strict: bool = True) -> _Model:
    """Copy the biases in ``path`` onto ``model``, in place, and return it. All of them or none.

    Every name, shape and dtype is checked, and every value for being finite, before the first one is copied.

    Biases that training added (``add_bias=True``) need no change of the model's source. Where a module has an empty slot
    of that name (``bias=None`` in nn.Linear, nn.Conv1d/2d/3d, nn.ConvTranspose1d/2d/3d, nn.MultiheadAttention and what
    derives from them) it gets a real parameter, which its own forward adds. Any other module gets a parameter and a
    forward hook that adds it to the module's output. Both are in ``state_dict``; to load that into a fresh model,
    call ``load_biases`` on it first. Loading twice is loading once.

    Args:
        model: the model that was trained, or a fresh copy of what it was before.
        path: a file written by ``save_biases``.
        strict: also compare the fingerprints in the metadata, where present, with the model. ``strict=False`` leaves
            out that comparison alone, for a model that was changed on purpose (a new head, say).

    Raises:
        ArtifactError: the file is absent, damaged or of another kind, or does not fit; the model is unchanged.
    """
    import torch
    from safetensors.torch import load

    from dpbitfit_fx.passes.bias_slots import attach

    tensors, metadata = _read(path, load)
    where = os.fspath(path)
    # With duplicates, because a tied parameter may have been saved under either of its names.
    parameters = dict(model.named_parameters(remove_duplicate=False))

    lacking = [bias for bias in _added(metadata, tensors, where) if bias.name not in parameters]
    absent = [name for name in tensors if name not in parameters and name not in {bias.name for bias in lacking}]
    problems = [why for bias in lacking if (why := _fault(model, bias)) is not None]
    if absent:
        problems.append(f"the model has no parameter {_list(absent)}")
    for name, tensor in tensors.items():
        if not bool(torch.isfinite(tensor).all()):
            problems.append(f"{name!r} holds values that are not finite")
        parameter = parameters.get(name)
        if parameter is None:
            continue
        if parameter.shape != tensor.shape:
            problems.append(
                f"{name!r} has shape {list(tensor.shape)} in the file and {list(parameter.shape)} in the model"
            )
        elif parameter.dtype != tensor.dtype:
            problems.append(f"{name!r} is {tensor.dtype} in the file and {parameter.dtype} in the model")
        elif parameter.is_meta:
            problems.append(f"{name!r} is on the meta device in the model: it has no values yet")
    if not tensors:
        problems.append("the file holds no biases")
    if problems:
        more = f"; and {len(problems) - 8} more" if len(problems) > 8 else ""
        raise ArtifactError(
            f"The biases in {where!r} do not fit this model: {'; '.join(problems[:8])}{more}. Nothing was loaded. "
            "Build the model the way it was built for training (same class, same head, same dtype) and load again."
        )
    if strict:
        _check_fingerprints(model, metadata, tensors, where)

    before = {name: parameters[name].detach().clone() for name in tensors if name in parameters}
    new = {bias.name: torch.nn.Parameter(tensors[bias.name].to(_device(model, bias.module))) for bias in lacking}
    try:
        with torch.no_grad():
            for name in before:
                parameters[name].copy_(tensors[name])
        attach(model, lacking, new)
    except BaseException:
        with torch.no_grad():
            for name, value in before.items():
                parameters[name].copy_(value)
        raise
    return model


def _added(metadata: Mapping[str, str], tensors: Mapping[str, Any], where: str) -> list[AddedBias]:
    """What the file says of the biases that the original model lacks."""
    from dpbitfit_fx.passes.joint_graph import AddedBias

    try:
        found = []
        for name, place in json.loads(metadata.get(ADDED_BIASES, "{}")).items():
            module, leaf, view = place["module"], place["leaf"], tuple(place["view"])
            tensor = tensors[name]
            tensor.reshape(view)
            if name != f"{module}.{leaf}".lstrip(".") or not leaf.isidentifier():
                raise ValueError(name)
            found.append(AddedBias(name, module, leaf, tuple(tensor.shape), tensor.dtype, view))
    except (ValueError, KeyError, TypeError, AttributeError, RuntimeError):
        raise ArtifactError(
            f"{where!r} does not say correctly where its added biases belong: its metadata {ADDED_BIASES!r} are damaged. "
            "Nothing was loaded."
        ) from None
    return found


def _fault(model: torch.nn.Module, bias: AddedBias) -> str | None:
    """Why this added bias does not fit this model, or None."""
    from dpbitfit_fx.passes.bias_slots import fault

    why = fault(model, bias)
    if why is None:
        layer = model.get_submodule(bias.module)
        weights = [p for p in layer.parameters() if p.is_floating_point()]
        if weights and all(p.dtype != bias.dtype for p in weights):
            why = f"{bias.name!r} is {bias.dtype} in the file and its layer {weights[0].dtype} in the model"
        elif any(p.is_meta for p in weights):
            why = f"{bias.module!r} is on the meta device in the model: it has no values yet"
    return why


def _device(model: torch.nn.Module, module: str) -> torch.device:
    own = next(model.get_submodule(module).parameters(), None)
    return (own if own is not None else next(model.parameters())).device


def _check_fingerprints(
    model: torch.nn.Module, metadata: Mapping[str, str], names: Collection[str], where: str
) -> None:
    advice = "Nothing was loaded. If you changed the model on purpose, pass strict=False."
    expected = metadata.get(MODEL_FINGERPRINT)
    added = json.loads(metadata.get(ADDED_BIASES, "{}"))
    if expected is not None and expected != model_fingerprint(model, added):
        raise ArtifactError(
            f"The biases in {where!r} were trained for a model whose parameters have other names, shapes or dtypes "
            f"than this one's, although these biases would fit. {advice}"
        )
    expected = metadata.get(FROZEN_FINGERPRINT)
    if expected is not None and expected != frozen_weights_fingerprint(model, names):
        raise ArtifactError(
            f"The biases in {where!r} were trained with other frozen weights than this model's: the architecture is "
            f"the same, the pretrained values are not. {advice}"
        )


def _list(names: list[str]) -> str:
    shown = ", ".join(repr(name) for name in names[:8])
    return shown if len(names) <= 8 else f"{shown} and {len(names) - 8} more"
