"""Which operators of an exported graph ONNX Runtime has no CUDA kernel for, by its published tables: no GPU is needed.

``cuda_kernels.json`` is what ``tools/cuda_kernels`` derives from a release's table of registered kernels: for every operator
as opset 18 selects it, the types that its CUDA kernel takes. Needs onnx, never torch.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

from dpbitfit_fx.errors import ExportError

TABLES: Final = Path(__file__).with_name("cuda_kernels.json")
UNKNOWN: Final = "a type that is not known"


@dataclasses.dataclass(frozen=True, order=True)
class Need:
    """What a node asks of a provider: its operator, and the type of each of its inputs and outputs by type variable.

    Where onnx has no schema of the operator the variables are the inputs' positions. ``note``: what else decides.
    """

    operator: str
    types: tuple[tuple[str, str], ...] = ()
    note: str = ""

    def __str__(self) -> str:
        told = ", ".join(f"{name} {kind}" for name, kind in self.types)
        return f"{self.operator}({told}){' ' + self.note if self.note else ''}"


@functools.cache
def tables() -> Mapping[str, Any]:
    """``{release: {"opset", "source", "kernels": {operator: {type variable: "type type .."}}}}``, oldest first."""
    found: dict[str, Any] = json.loads(TABLES.read_text())
    return found


def needs(model: Any) -> Counter[Need]:
    """How often each thing is needed by the nodes of an onnx.ModelProto, subgraphs included.

    Raises:
        ExportError: the model is of another opset than the tables, or holds functions.
    """
    import onnx

    versions, opset = {o.domain: o.version for o in model.opset_import}, {t["opset"] for t in tables().values()}
    if {versions.get("", 0)} != opset or model.functions:
        raise ExportError(
            f"The tables of CUDA kernels are for opset {min(opset)} and models without functions; this model is of opset "
            f"{versions.get('', 0)}, with {len(model.functions)} functions."
        )
    graph = onnx.shape_inference.infer_shapes(model).graph
    return Counter(_need(node, kinds, versions[""]) for node, kinds in _nodes(graph, {}))


def cuda_kernels(model: Any, release: str) -> list[Need]:
    """What the model needs and onnxruntime ``release`` has no CUDA kernel for (it runs on the CPU), sorted."""
    return without_kernel(needs(model), release)


def left_to_cpu(folder: Path) -> dict[str, dict[str, list[str]]]:
    """``{file: {release: [what it has no CUDA kernel for]}}`` of every model in a folder; its weights are not read."""
    import onnx

    found = {}
    for path in sorted(folder.glob("*.onnx")):
        wanted = needs(onnx.load(path, load_external_data=False))
        found[path.name] = {release: [str(n) for n in without_kernel(wanted, release)] for release in tables()}
    return found


def without_kernel(wanted: Mapping[Need, int], release: str) -> list[Need]:
    kernels = tables()[release]["kernels"]
    return sorted(need for need in wanted if not _covered(need, kernels.get(need.operator)))


def _covered(need: Need, kernel: Mapping[str, str] | None) -> bool:
    return kernel is not None and not need.note and all(k in kernel.get(n, k).split(" ") for n, k in need.types)


def _nodes(graph: Any, outer: Mapping[str, str]) -> Iterator[tuple[Any, Mapping[str, str]]]:
    kinds = dict(outer)
    for value in (*graph.input, *graph.output, *graph.value_info):
        kinds[value.name] = _kind(value.type)
    kinds |= {t.name: _element(t.data_type) for t in graph.initializer}
    for node in graph.node:
        if node.op_type != "Constant":  # no node any more once it is loaded
            yield node, kinds
        for attribute in node.attribute:
            for inner in (*([attribute.g] if attribute.HasField("g") else ()), *attribute.graphs):
                yield from _nodes(inner, kinds)


def _kind(type_: Any) -> str:
    if type_.HasField("sequence_type"):
        return f"seq({_kind(type_.sequence_type.elem_type)})"
    return _element(type_.tensor_type.elem_type) if type_.HasField("tensor_type") else UNKNOWN


def _element(code: int) -> str:
    import onnx

    return str(onnx.TensorProto.DataType.Name(code)).lower() if code else UNKNOWN


def _need(node: Any, kinds: Mapping[str, str], opset: int) -> Need:
    import onnx

    given = [(i, False, name) for i, name in enumerate(node.input) if name]
    given += [(i, True, name) for i, name in enumerate(node.output) if name]
    if node.domain not in ("", "ai.onnx") or not onnx.defs.has(node.op_type, opset, ""):
        inputs = tuple((str(i), kinds.get(name, UNKNOWN)) for i, out, name in given if not out)
        return Need(f"{node.domain}:{node.op_type}" if node.domain else node.op_type, inputs)
    schema = onnx.defs.get_schema(node.op_type, opset, "")
    variables, types = {c.type_param_str for c in schema.type_constraints}, {}
    for i, out, name in given:
        formal = schema.outputs if out else schema.inputs
        variable = formal[min(i, len(formal) - 1)].type_str
        if variable in variables:
            types[variable] = kinds.get(name, UNKNOWN)
    return Need(node.op_type, tuple(sorted(types.items())), _note(node))


def _note(node: Any) -> str:
    """Where a kernel exists, the provider still leaves these nodes to the CPU."""
    values = {a.name: a for a in node.attribute}
    if node.op_type in ("LSTM", "GRU", "RNN"):
        return "whose activations decide"
    if node.op_type == "ConvTranspose":
        pads = list(values["pads"].ints) if "pads" in values else []
        padded = values["auto_pad"].s.decode() if "auto_pad" in values else "NOTSET"
        if padded.startswith("SAME") or pads[: len(pads) // 2] != pads[len(pads) // 2 :]:
            return "padded unevenly"
    return ""
