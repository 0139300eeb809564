"""Frozen weights in 8 or 4 bits. ONNX Runtime's own quantizer chooses the numbers; plain ONNX operators read them.

    8 bits   int8 [rows, K], a scale per row                          DequantizeLinear(codes, scale, axis=0)
    4 bits   uint8 [rows, K/32, 16], two numbers in each byte, a       byte & 15 and byte >> 4, then DequantizeLinear
             scale and a zero point per block of 32                   by block

One copy is on disk, for all graphs. A product dequantizes its weight just before it reads it, the forward and the backward
pass each for itself, so that one weight at a time is there in float32; of a table, only the rows that were looked up are.
Everything else stays float32: biases, whatever is trained, activations, gradients, the clipped sum. No activation is
quantized: a scale taken over a batch would let one record move the others' gradients (the seal refuses such operators).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import numpy.typing as npt
import torch

from dpbitfit_fx.errors import ExportError
from dpbitfit_fx.onnx_weights import INLINE_LIMIT, constant
from dpbitfit_fx.passes.torch_private import tree_flatten

if TYPE_CHECKING:
    import onnx_ir as ir

BLOCK: Final = 32  # numbers that share a scale, in 4 bits
SHORTEST_ROW: Final = 32
FLOAT: Final = 1  # of onnx.TensorProto
SCHEMES: Final = {
    8: "int8, symmetric, one scale per row",
    4: f"uint4, a scale and a zero point per block of {BLOCK}; rows that blocks do not divide: as in 8 bits",
}
Array = npt.NDArray[Any]


@dataclasses.dataclass(frozen=True)
class Quantized:
    """One weight. In 8 bits: codes int8 [rows, K], scale float32 [rows]. In 4: codes uint8 [rows, K/32, 16], whose byte i holds
    the numbers i (low half) and 16 + i of its block, scale float32 [rows, K/32], zero uint8 [rows, K/32]."""

    shape: tuple[int, ...]
    codes: Array
    scale: npt.NDArray[np.float32]
    zero: npt.NDArray[np.uint8] | None = None

    @property
    def bits(self) -> int:
        return 8 if self.zero is None else 4

    @property
    def nbytes(self) -> int:
        return self.codes.nbytes + self.scale.nbytes + (0 if self.zero is None else self.zero.nbytes)

    def values(self) -> npt.NDArray[np.float32]:
        """What the graph computes with, to the bit: float32 of ``shape``."""
        if self.zero is None:
            return (self.codes.astype(np.float32) * self.scale[:, None]).reshape(self.shape)
        numbers = np.concatenate([self.codes & 15, self.codes >> 4], axis=2)
        return ((numbers.astype(np.float32) - self.zero[..., None]) * self.scale[..., None]).reshape(self.shape)


def check_bits(weight_bits: int | None) -> None:
    """Raises ExportError unless it is None, 8 or 4."""
    if weight_bits is not None and weight_bits not in SCHEMES:
        raise ExportError(f"weight_bits must be 8 or 4, or None for float32; got {weight_bits!r}.")


def quantized(weight: Array, bits: int) -> Quantized:
    """float32 of two axes or more -> the same in 8 or 4 bits, by onnxruntime.quantization.

    A row is the shortest run of last axes that has SHORTEST_ROW numbers; of a smaller weight, what lies along axis 0.

    Raises:
        ExportError: the installed onnxruntime has no such quantizer, or the weight is not finite.
    """
    onnx, tools = _quantizer()
    kinds = onnx.TensorProto
    if not np.isfinite(weight).all():
        raise ExportError("A frozen weight holds values that are not finite; it has no form in 8 or 4 bits.")
    width = next((k for k in (math.prod(weight.shape[i:]) for i in range(weight.ndim - 1, 0, -1)) if k >= SHORTEST_ROW), 0)
    matrix = weight.reshape(-1, width or math.prod(weight.shape[1:]))
    if bits == 8 or matrix.shape[1] % BLOCK:
        low, high = tools.get_qmin_qmax_for_qType(kinds.INT8, symmetric=True)
        scale, zero = _scales(tools, matrix, low, high, True)
        codes = tools.quantize_nparray(kinds.INT8, matrix, scale[:, None], zero[:, None].astype(np.int8))
        return Quantized(weight.shape, codes.astype(np.int8), scale)
    blocks = matrix.reshape(-1, BLOCK)
    scale, zero = _scales(tools, blocks, np.array(0, np.uint8), np.array(15, np.uint8), False)
    numbers = tools.quantize_nparray(kinds.UINT8, blocks, scale[:, None], zero[:, None].astype(np.uint8), 0, 15)
    numbers = numbers.astype(np.uint8).reshape(len(matrix), -1, BLOCK)
    codes = numbers[..., : BLOCK // 2] | (numbers[..., BLOCK // 2 :] << 4)
    places = codes.shape[:2]
    return Quantized(weight.shape, codes, scale.reshape(places), zero.astype(np.uint8).reshape(places))


def _scales(tools: Any, rows: Array, low: Any, high: Any, symmetric: bool) -> tuple[npt.NDArray[np.float32], Array]:
    """Scale and zero point of every row."""
    each = [
        tools.compute_scale_zp(least, most, low, high, symmetric)
        for least, most in zip(rows.min(1), rows.max(1), strict=True)
    ]
    return np.array([s for _, s in each], np.float32), np.array([z for z, _ in each])


def _quantizer() -> tuple[Any, Any]:
    try:
        import onnx
        from onnxruntime.quantization import quant_utils
    except ImportError as error:
        raise ExportError(
            "weight_bits needs the quantizer of onnxruntime (onnxruntime.quantization, in every release since 1.19), and it "
            "cannot be imported here: pip install onnx onnxruntime. Without weight_bits, weights are exported in float32."
        ) from error
    return onnx, quant_utils


class FrozenWeights:
    """The frozen weights of a model that an export holds in ``bits`` bits, each quantized once for all graphs.

    They are its float32 parameters of two axes or more and over INLINE_LIMIT bytes that no phase trains and that are no
    biases by name. Buffers stay.
    """

    def __init__(self, steps: Sequence[Any], bits: int) -> None:
        self.bits = bits
        trained = {id(p) for step in steps for p in step.parameters().values()}
        named = dict(steps[-1].model.named_parameters())
        self.parameters = {
            _key(p): p
            for name, p in named.items()
            if id(p) not in trained and p.dtype == torch.float32 and p.dim() > 1 and p.is_contiguous()
            and p.numel() * p.element_size() > INLINE_LIMIT and "bias" not in name.rpartition(".")[2]
        }  # fmt: skip
        if not self.parameters:
            raise ExportError(f"weight_bits={bits}: the model has no frozen weight of more than {INLINE_LIMIT} bytes.")
        self._done: dict[Any, Quantized] = {}

    def quantized(self, tensor: torch.Tensor) -> Quantized:
        key = _key(tensor)
        if key not in self._done:
            self._done[key] = quantized(tensor.detach().cpu().numpy(), self.bits)
        return self._done[key]

    def rewrite(self, model: ir.Model, frozen: Mapping[str, torch.Tensor]) -> None:
        """Let the graph read the quantized weights in place of its initializers ``frozen``, in place."""
        for name, tensor in frozen.items():
            weight = model.graph.initializers.get(name)
            if weight is not None and _key(tensor) in self.parameters:
                _Reader(model, weight, self.quantized(tensor)).replace()

    def described(self, steps: Sequence[Any]) -> dict[str, Any]:
        """For the manifest: how, by which version, how much, and how far the gradients of the example batch moved.

        gradient_distance: of each step, ‖clipped sum - float32 model's‖ / ‖float32 model's‖.
        """
        import onnxruntime

        wanted = [_clipped_sum(step) for step in steps]
        with in_torch(self):
            found = [_clipped_sum(step) for step in steps]
        parts = [self.quantized(p) for p in self.parameters.values()]
        return {
            "bits": self.bits,
            "scheme": SCHEMES[self.bits],
            "quantizer": f"onnxruntime.quantization {onnxruntime.__version__}",
            "values": {str(bits): sum(math.prod(p.shape) for p in parts if p.bits == bits) for bits in (8, 4)},
            "bytes": sum(part.nbytes for part in parts),
            "gradient_distance": [
                float((a - b).norm() / b.norm().clamp(min=1e-30)) for a, b in zip(found, wanted, strict=True)
            ],
        }


@contextmanager
def in_torch(weights: FrozenWeights | None) -> Iterator[None]:
    """The model holds the dequantized weights inside, and its own again afterwards, bit for bit. With None, nothing."""
    parameters = {} if weights is None else weights.parameters
    kept = {key: p.detach().clone() for key, p in parameters.items()}
    try:
        with torch.no_grad():
            for p in parameters.values():
                assert weights is not None
                p.copy_(torch.from_numpy(weights.quantized(p).values()))
        yield
    finally:
        with torch.no_grad():
            for key, value in kept.items():
                parameters[key].copy_(value)


def _key(tensor: torch.Tensor) -> tuple[Any, ...]:
    return tensor.data_ptr(), tuple(tensor.shape), tensor.stride()


def _clipped_sum(step: Any) -> torch.Tensor:
    rows = tree_flatten(step.example_batch)[0][0].shape[0]
    with torch.no_grad():
        total: torch.Tensor = step.accumulate(step.example_batch, torch.ones(rows), step.zero_accumulator())
    return total


class _Reader:
    """Writes what reads one quantized weight into a graph."""

    def __init__(self, model: ir.Model, weight: ir.Value, content: Quantized) -> None:
        self.model, self.weight, self.content = model, weight, content
        self._unpacked: ir.Value | None = None

    def replace(self) -> None:
        graph, name = self.model.graph, str(self.weight.name)
        early: list[ir.Node] = []
        table = len(self.content.shape) == 2 and len(self.content.codes) == self.content.shape[0]
        for number, (node, at) in enumerate(list(self.weight.uses())):
            where = node.inputs[1] if node.op_type == "Gather" and at == 0 and table else None
            axis = node.attributes["axis"].as_int() if "axis" in node.attributes else 0
            if where is None or where.shape is None or axis or node.outputs[0] in graph.outputs:
                nodes = self._whole(number)
                node.replace_input_with(at, nodes[-1].outputs[0])
                early += nodes
                continue
            nodes = self._looked_up(where, number)
            found, old = nodes[-1].outputs[0], node.outputs[0]
            found.shape, found.type = old.shape, old.type
            graph.insert_before(node, nodes)
            for reader, place in list(old.uses()):
                reader.replace_input_with(place, found)
            graph.remove(node, safe=True)
        # First in the file: ONNX Runtime visits a node's last inputs first, so that it dequantizes just before the product.
        graph.insert_before(graph[0], early)
        graph.initializers.pop(name)

    def _whole(self, number: int) -> list[ir.Node]:
        """The weight in float32, for one reader. Its scales are its own: one DequantizeLinear for two readers, to which ONNX
        Runtime would join equal ones, would keep every weight in float32 from the forward to the backward pass."""
        content = self.content
        nodes: list[ir.Node] = []
        codes = self._constant("codes", content.codes)
        zero = np.zeros(len(content.codes), np.int8) if content.zero is None else content.zero.reshape(-1)
        # Zeros are written too: without them ONNX Runtime, which moves a Transpose of the weight, takes the codes for uint8.
        given = [self._constant(f"scale_{number}", content.scale.reshape(-1)), self._constant("zero", zero)]
        if content.zero is not None:
            if self._unpacked is None:
                nodes, both = self._halves(codes, "numbers")
                nodes.append(self._node("Reshape", [both, self._sizes("block", [-1, BLOCK])], "blocks"))
                self._unpacked = nodes[-1].outputs[0]
            codes = self._unpacked
        nodes.append(self._node("DequantizeLinear", [codes, *given], f"float_{number}", axis=0))
        if content.zero is not None or content.codes.shape != content.shape:
            shape = self._sizes("shape", content.shape)
            nodes.append(self._node("Reshape", [nodes[-1].outputs[0], shape], f"whole_{number}"))
        nodes[-1].outputs[0].shape, nodes[-1].outputs[0].type = self.weight.shape, self.weight.type
        return nodes

    def _looked_up(self, where: ir.Value, number: int) -> list[ir.Node]:
        """The rows ``where`` of a table, each dequantized by itself: ``Gather`` of codes, scales and zero points."""
        content = self.content
        four = content.zero is not None

        def rows(part: str, array: Array) -> ir.Node:
            return self._node("Gather", [self._constant(part, array), where], f"{part}_{number}_rows", axis=0)

        nodes = [rows("codes", content.codes)]
        if four:
            nodes += self._halves(nodes[0].outputs[0], f"numbers_{number}_rows")[0]
        nodes.append(self._node("Cast", [nodes[-1].outputs[0]], f"wide_{number}_rows", to=FLOAT))
        if content.zero is not None:
            zero = rows("zero_rows", content.zero.astype(np.float32)[..., None])
            nodes += [zero, self._node("Sub", [nodes[-1].outputs[0], zero.outputs[0]], f"centred_{number}_rows")]
        scale = rows("scale_rows", content.scale[..., None])
        nodes += [scale, self._node("Mul", [nodes[-1].outputs[0], scale.outputs[0]], f"float_{number}_rows")]
        if four:
            assert where.shape is not None
            shape = self._sizes(f"shape_{number}_rows", [*[0] * len(where.shape), content.shape[1]])
            nodes.append(self._node("Reshape", [nodes[-1].outputs[0], shape], f"whole_{number}_rows"))
        return nodes

    def _halves(self, codes: ir.Value, what: str) -> tuple[list[ir.Node], ir.Value]:
        """uint8 [.., 16] -> the two numbers of each byte, uint8 [.., 32]."""
        low = self._node("BitwiseAnd", [codes, self._constant("low_half", np.array(15, np.uint8))], f"{what}_low")
        half = self._constant("half", np.array(4, np.uint8))
        high = self._node("BitShift", [codes, half], f"{what}_high", direction="RIGHT")
        both = self._node("Concat", [low.outputs[0], high.outputs[0]], what, axis=-1)
        return [low, high, both], both.outputs[0]

    def _name(self, part: str) -> str:
        return f"{self.weight.name}_dpbitfit_{part}"

    def _node(self, op: str, inputs: Sequence[ir.Value], part: str, **attributes: Any) -> ir.Node:
        import onnx_ir as ir

        node = ir.node(op, inputs, attributes=attributes)
        node.outputs[0].name = self._name(part)
        return node

    def _constant(self, part: str, array: Array) -> ir.Value:
        found = self.model.graph.initializers.get(self._name(part))
        return found if found is not None else constant(self.model, self._name(part), array)

    def _sizes(self, part: str, sizes: Sequence[int]) -> ir.Value:
        return self._constant(part, np.array(sizes, np.int64))
