"""An ONNX file as a graph that can be matched: nothing in it is random, hidden in a subgraph, or of an unknown operator.

Needs onnx and numpy, never torch. Weights in external files are not read.
"""

from __future__ import annotations

import math
import os
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any, Final, NoReturn

import numpy as np
import numpy.typing as npt

from dpbitfit_fx.errors import ArtifactError, SealBroken

MICROSOFT: Final = "com.microsoft"
OPSETS: Final = range(18, 22)  # what exports are written in, up to what ONNX Runtime Training 1.19.2 reads
# Of those opsets, every operator that draws random numbers, runs a subgraph, or carries anything else than one tensor.
RANDOM: Final = frozenset(
    ["RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike", "Multinomial", "Bernoulli", "Dropout"]
)
CONTROL: Final = frozenset(["If", "Loop", "Scan", "SequenceMap"])
SEQUENCES: Final = frozenset(
    ["SequenceAt", "SequenceConstruct", "SequenceEmpty", "SequenceErase", "SequenceInsert", "SequenceLength"]
) | frozenset(["SplitToSequence", "ConcatFromSequence", "Optional", "OptionalGetElement", "OptionalHasElement"])
STRINGS: Final = frozenset(
    ["StringNormalizer", "StringConcat", "StringSplit", "RegexFullMatch", "TfIdfVectorizer", "ImageDecoder"]
)
# A private step computes in floating point. DynamicQuantizeLinear takes one scale over all records of a batch, so that each
# moves the others' gradients; the integer products are fed by it.
INTEGER: Final = frozenset(
    ["DynamicQuantizeLinear", "QuantizeLinear", "MatMulInteger", "ConvInteger", "QLinearMatMul", "QLinearConv"]
)
LENGTH: Final = "length"  # in an expected shape: a dimension that is the padded length, free within its range
# The fields of a model, a graph, a node, a tensor and an attribute that are read here. Any other could carry a second graph.
FIELDS: Final[Mapping[str, frozenset[str]]] = {
    "ModelProto": frozenset(
        [
            "ir_version",
            "opset_import",
            "producer_name",
            "producer_version",
            "domain",
            "model_version",
            "doc_string",
            "graph",
        ]
    ),
    "GraphProto": frozenset(["node", "name", "initializer", "doc_string", "input", "output", "value_info"]),
    "NodeProto": frozenset(["input", "output", "name", "op_type", "domain", "attribute", "doc_string"]),
}
# Options that change nothing of what the template says, given that all shapes and axes in it are constants without zeros.
IRRELEVANT: Final[Mapping[str, frozenset[str]]] = {
    "Reshape": frozenset(["allowzero"]),
    "ReduceSum": frozenset(["noop_with_empty_axes"]),
    "Split": frozenset(["num_outputs"]),
    "Cast": frozenset(["saturate"]),
}


def _onnx() -> Any:
    try:
        import onnx
    except ImportError as error:
        raise ArtifactError(
            "Exported graphs are read and matched against the private template before they run, and that needs the package "
            "onnx: pip install onnx. Nothing was loaded."
        ) from error
    return onnx


class OnnxGraph:
    """One file, indexed by value name.

    Args:
        path: the .onnx file.
        data_files: names of the files beside it that may hold external tensors.
        custom: operators of com.microsoft that it may hold; with any, that domain is imported too.
        sequences: whether it may hold sequences of tensors (ONNX Runtime's optimizer models do).

    Raises:
        SealBroken: it holds what no template could see through. ArtifactError: it cannot be read.
    """

    def __init__(
        self, path: Path, data_files: Collection[str] = (), custom: Collection[str] = (), sequences: bool = False
    ) -> None:
        onnx = _onnx()
        self.onnx, self.name = onnx, path.name
        self._data_files, self._folder = set(data_files), path.parent
        try:
            model = onnx.load(os.fspath(path), load_external_data=False)
        except Exception as error:
            raise ArtifactError(
                f"{path.name} in {os.fspath(path.parent)!r} is not an ONNX file that can be read. Export again."
            ) from error
        graph = model.graph
        self._known(model)
        self._known(graph)
        imports = {o.domain: o.version for o in model.opset_import}
        self.opset = int(imports.get("", 0))
        if self.opset not in OPSETS or len(imports) != len(model.opset_import):
            self.refuse(f"it is written in opset {self.opset}; expected one of {OPSETS[0]} to {OPSETS[-1]}")
        for domain in imports:
            if domain not in ({"", MICROSOFT} if custom else {""}):
                self.refuse(f"it imports the operator domain {domain!r}, whose operators nobody here knows")
        self.constants: dict[str, Any] = {}
        self.inputs: dict[str, Any] = {}
        self.producer: dict[str, Any] = {}
        self.readers: dict[str, list[Any]] = {}
        self.custom: list[str] = []
        self._fixed: set[str] = set()  # constants, and what is computed from nothing else
        for tensor in graph.initializer:
            self._new(tensor.name)
            self._tensor(tensor)
            self.constants[tensor.name] = tensor
            self._fixed.add(tensor.name)
        for value in graph.input:
            self._new(value.name)
            self.inputs[value.name] = value
        for node in graph.node:
            self._node(node, custom, sequences)
            for name in node.input:
                if name and not self._there(name):
                    self.refuse(f"{node.op_type} reads {name!r}, which nothing before it computes")
                self.readers.setdefault(name, []).append(node)
            fixed = all(name in self._fixed for name in node.input if name)
            if node.op_type == "DequantizeLinear" and not fixed:
                self.refuse("it holds a DequantizeLinear of something that is no constant weight")
            if fixed:
                self._fixed.update(node.output)
            for name in node.output:
                if name:
                    self._new(name)
                    self.producer[name] = node
        self.outputs = [o.name for o in graph.output]
        for name in self.outputs:
            if name not in self.producer:
                self.refuse(f"its output {name!r} is not computed in the graph")

    def refuse(self, what: str) -> NoReturn:
        raise SealBroken(
            f"{self.name}: {what}. It is not a graph that was proved private, so nothing was loaded. Export again."
        )

    # -- what it is made of -------------------------------------------------------------------------------------------

    def _there(self, name: str) -> bool:
        return name in self.constants or name in self.inputs or name in self.producer

    def _new(self, name: str) -> None:
        if not name or self._there(name):
            self.refuse(f"two values are called {name!r}, or a weight can be overridden by an input")

    def _known(self, message: Any) -> None:
        kind = message.DESCRIPTOR.name
        for field, _ in message.ListFields():
            if field.name not in FIELDS[kind]:
                self.refuse(f"it holds {field.name!r} in a {kind}, where something could hide")

    def _tensor(self, tensor: Any, external: bool = True) -> None:
        if tensor.data_type == self.onnx.TensorProto.STRING:
            self.refuse(f"the constant {tensor.name!r} holds strings")
        if tensor.data_location != self.onnx.TensorProto.EXTERNAL and not tensor.external_data:
            return
        places = [e.value for e in tensor.external_data if e.key == "location"]
        if not external or len(places) != 1 or Path(places[0]).name != places[0] or places[0] not in self._data_files:
            self.refuse(f"the constant {tensor.name!r} is read from {places}, which is no file of this export")
        if (self._folder / places[0]).is_symlink():
            self.refuse(f"{places[0]!r}, which holds weights, is a link to somewhere else")
        self._place(tensor, self._folder / places[0])

    def _place(self, tensor: Any, file: Path) -> None:
        """The bytes that a weight names are there, and are as many as its shape needs."""
        entries = {e.key: e.value for e in tensor.external_data}
        try:
            offset, length = int(entries.get("offset", 0)), int(entries["length"])
            size = self.onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize * math.prod(tensor.dims)
            fits = offset >= 0 and length == size and offset + length <= file.stat().st_size
        except (KeyError, ValueError, OSError):
            fits = False
        if not fits:
            self.refuse(f"the constant {tensor.name!r} is read from a place that {file.name!r} does not have")

    def _node(self, node: Any, custom: Collection[str], sequences: bool) -> None:
        self._known(node)
        kind = node.op_type
        if not node.output or not node.output[0]:
            self.refuse(f"it holds {kind}, which computes nothing that has a name")
        if node.domain == MICROSOFT and kind in custom:
            self.custom.append(kind)
            return self._attributes(node)
        if node.domain:
            self.refuse(f"it holds the custom operator {node.domain}::{kind}")
        if kind in RANDOM:
            self.refuse(
                f"it holds {kind}, an operator that draws random numbers; ONNX Runtime's generators are not secure"
            )
        if kind in CONTROL:
            self.refuse(f"it holds {kind}, which runs a graph inside the graph")
        if kind in INTEGER:
            self.refuse(f"it holds {kind}: quantized activations, whose scale the records of a batch could share")
        if kind in STRINGS or (kind in SEQUENCES and not sequences):
            self.refuse(f"it holds {kind}, which no private step needs")
        try:
            self.onnx.defs.get_schema(kind, self.opset, "")
        except Exception:
            self.refuse(f"it holds {kind}, which is no operator of ONNX opset {self.opset}")
        if kind == "BatchNormalization" and any(a.name == "training_mode" and a.i for a in node.attribute):
            self.refuse("it holds a BatchNormalization in training mode, which mixes the records of a batch")
        self._attributes(node)

    def _attributes(self, node: Any) -> None:
        kinds = self.onnx.AttributeProto
        plain = {kinds.FLOAT, kinds.INT, kinds.STRING, kinds.FLOATS, kinds.INTS, kinds.TENSOR}
        for attribute in node.attribute:
            if attribute.type not in plain or attribute.ref_attr_name:
                self.refuse(f"the attribute {attribute.name!r} of {node.op_type} is neither a number nor a tensor")
            if attribute.type == kinds.TENSOR:
                self._tensor(attribute.t, external=False)

    # -- what it computes ---------------------------------------------------------------------------------------------

    def op(self, name: str) -> str:
        """The operator that computes a value, "" for inputs and constants."""
        node = self.producer.get(name)
        return str(node.op_type) if node is not None else ""

    def call(
        self, name: str, op: str, what: str, count: int | None = 2, domain: str = "", outputs: int = 1, **options: Any
    ) -> list[str]:
        """The inputs of the node that computes ``name``, if it is ``op`` with exactly these inputs and options."""
        node = self.producer.get(name)
        if node is None:
            found = "a constant" if name in self.constants else f"the input {name!r}"
            self.refuse(f"{what}: expected {op}, found {found}")
        if (node.domain, node.op_type) != (domain, op):
            self.refuse(f"{what}: expected {op}, found {node.op_type}")
        if (count is not None and len(node.input) != count) or not all(node.input) or len(node.output) != outputs:
            self.refuse(
                f"{what}: {op} has {len(node.input)} inputs and {len(node.output)} outputs; one was added or dropped"
            )
        helper = self.onnx.helper
        given = {a.name: helper.get_attribute_value(a) for a in node.attribute}
        given = {k: list(v) if isinstance(v, Iterable) and not isinstance(v, bytes) else v for k, v in given.items()}
        given = {k: v for k, v in given.items() if k not in IRRELEVANT.get(op, ())}
        if given != options:
            self.refuse(f"{what}: {op} has the options {given}, expected {options}")
        return list(node.input)

    def numbers(self, name: str, what: str) -> npt.NDArray[Any]:
        """A constant that is written in the file itself."""
        tensor = self.constants.get(name)
        if tensor is None:
            self.refuse(f"{what}: expected a constant, found {self.op(name) or 'the input ' + repr(name)}")
        if tensor.data_location == self.onnx.TensorProto.EXTERNAL or tensor.external_data:
            self.refuse(f"{what}: the constant is kept outside the graph")
        return np.asarray(self.onnx.numpy_helper.to_array(tensor))

    def integers(self, name: str, expected: list[int], what: str) -> None:
        found = self.numbers(name, what)
        if found.ndim != 1 or found.dtype != np.int64 or found.tolist() != expected:
            self.refuse(f"{what}: found {found.tolist()}, expected {expected}")

    def scalar(self, name: str, expected: float, what: str) -> None:
        """One public number: ``expected``, or its float32 rounding, which is what exporters write."""
        found = self.numbers(name, what)
        if found.size != 1 or found.ndim > 1 or found.dtype.kind not in "fi":
            self.refuse(f"{what}: found numbers of the shape {list(found.shape)}, expected the one number {expected!r}")
        value = float(found.ravel()[0])
        with np.errstate(over="ignore"):
            rounded = float(np.float32(expected))
        if not math.isfinite(value) or value not in (float(expected), rounded):
            self.refuse(f"{what}: found {value!r}, expected the public constant {expected!r}")

    def scaled(self, name: str, by: float, what: str) -> str:
        """x of ``x * by``. The exporter drops a product with 1."""
        node = self.producer.get(name)
        if by == 1 and (
            node is None or node.op_type != "Mul" or len(node.input) != 2 or node.input[1] not in self.constants
        ):
            return name
        x, factor = self.call(name, "Mul", what)
        self.scalar(factor, by, what)
        return x

    def rows(self, name: str, what: str) -> tuple[str, list[int]]:
        """x and the sizes of ``Reshape(x, [B, *sizes])``, where B is the length of sample_mask: one row per record."""
        x, shape = self.call(name, "Reshape", what)
        count, rest = self.call(shape, "Concat", what, axis=0)
        if self.call(count, "Shape", what, 1) != ["sample_mask"]:
            self.refuse(f"{what}: it does not have one row per entry of sample_mask")
        sizes = self.numbers(rest, what)
        if sizes.ndim != 1 or sizes.dtype != np.int64 or not (sizes > 0).all():
            self.refuse(f"{what}: a row has the shape {sizes.tolist()}")
        return x, [int(n) for n in sizes]

    def only_custom(self, kind: str, count: int) -> None:
        """These operators write into their inputs: one more of them could change a weight that nothing here reads again."""
        if self.custom != [kind] * count:
            self.refuse(
                f"it holds the operators {sorted(self.custom)[:5]}, which write in place; expected {count} times {kind}"
            )

    def read_once(self, name: str, what: str) -> None:
        readers = len(self.readers.get(name, []))
        if readers != 1:
            self.refuse(f"{what}: it is read {readers} times, expected once; a second use could leave the graph")

    def has_inputs(self, expected: Mapping[str, tuple[int, list[Any]]], optional: Collection[str] = ()) -> None:
        """Exactly these inputs, with their element types and shapes.

        None is the batch size and LENGTH a free padded length: one symbol each, for all inputs.
        """
        for name in self.inputs:
            if name not in expected:
                self.refuse(f"it takes the input {name!r}, which no step has; frozen weights belong into the file")
        symbols: dict[Any, set[str]] = {None: set(), LENGTH: set()}
        for name, (kind, shape) in expected.items():
            if name not in self.inputs:
                if name in optional:
                    continue
                self.refuse(f"it does not take the input {name!r}")
            tensor = self.inputs[name].type.tensor_type
            dims = [
                d.dim_param or None if d.WhichOneof("value") != "dim_value" else d.dim_value for d in tensor.shape.dim
            ]
            free = [isinstance(d, str) and n in (None, LENGTH) for d, n in zip(dims, shape, strict=False)]
            for dim, size, symbolic in zip(dims, shape, free, strict=False):
                if symbolic:
                    symbols[size].add(str(dim))
            found = [n if symbolic else d for d, n, symbolic in zip(dims, shape, free, strict=False)]
            found += dims[len(found) :]
            if (
                self.inputs[name].type.WhichOneof("value") != "tensor_type"
                or tensor.elem_type != kind
                or not tensor.HasField("shape")
                or found != shape
            ):
                self.refuse(
                    f"its input {name!r} has the type {tensor.elem_type} and shape {dims}; expected {kind}, {shape}"
                )
        if len(symbols[None]) > 1 or len(symbols[LENGTH]) > 1 or symbols[None] & symbols[LENGTH]:
            have = sorted(symbols[None] | symbols[LENGTH])
            self.refuse(f"its inputs do not share one batch size (and one padded length) but have {have}")

    def reached_by(self, sources: Iterable[str]) -> set[str]:
        """Every input whose values ``sources`` depend on; a shape says the physical batch size, which is public."""
        waiting, seen = list(sources), set()
        while waiting:
            name = waiting.pop()
            if name in seen:
                continue
            seen.add(name)
            node = self.producer.get(name)
            if node is not None and node.op_type not in ("Shape", "Size"):
                waiting.extend(i for i in node.input if i)
        return {name for name in seen if name in self.inputs}
