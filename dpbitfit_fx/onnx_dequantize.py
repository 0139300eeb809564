"""How a graph reads a weight that is held in 8 or 4 bits: by plain ONNX operators of opset 18.

    8 bits   DequantizeLinear(codes int8 [rows, 1, K], scale [rows], axis=0)
    4 bits   byte & 15 and byte >> 4 of uint8 [rows, K/32, 16], then DequantizeLinear per block of 32
    a table  Gather of codes, scales (and zero points), then the same arithmetic on the rows that were looked up

Blocks are rows of a reshaped weight, since DequantizeLinear has blocks of its own from opset 21 on only.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import numpy.typing as npt

from dpbitfit_fx.onnx_weights import constant

if TYPE_CHECKING:
    import onnx_ir as ir

BLOCK: Final = 32  # numbers that share a scale, in 4 bits
FLOAT: Final = 1  # of onnx.TensorProto
Array = npt.NDArray[Any]


@dataclasses.dataclass(frozen=True)
class Quantized:
    """One weight. In 8 bits: codes int8 [rows, 1, K], scale float32 [rows, 1]. In 4: codes uint8 [rows, K/32, 16], whose byte i
    holds the numbers i (low half) and 16 + i of its block, scale float32 [rows, K/32], zero uint8 [rows, K/32]."""

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
            return (self.codes.astype(np.float32) * self.scale[..., None]).reshape(self.shape)
        numbers = np.concatenate([self.codes & 15, self.codes >> 4], axis=2)
        return ((numbers.astype(np.float32) - self.zero[..., None]) * self.scale[..., None]).reshape(self.shape)


def read_quantized(model: ir.Model, weight: ir.Value, content: Quantized) -> None:
    """Whatever reads the initializer ``weight`` reads ``content`` instead; the initializer goes. In place."""
    _Reader(model, weight, content).replace()


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
        # Never a view of the same shape: ONNX Runtime 1.32 joins a DequantizeLinear to the product that reads it, and such a
        # product rounds its activations to 8 bits.
        shape = self._sizes("shape", content.shape)
        nodes.append(self._node("Reshape", [nodes[-1].outputs[0], shape], f"whole_{number}"))
        nodes[-1].outputs[0].shape, nodes[-1].outputs[0].type = self.weight.shape, self.weight.type
        return nodes

    def _looked_up(self, where: ir.Value, number: int) -> list[ir.Node]:
        """The rows ``where`` of a table, each dequantized by itself: ``Gather`` of codes, scales and zero points."""
        content = self.content

        def rows(part: str, array: Array) -> ir.Node:
            return self._node("Gather", [self._constant(part, array), where], f"{part}_{number}_rows", axis=0)

        nodes = [rows("codes", content.codes)]
        if content.zero is not None:
            nodes += self._halves(nodes[0].outputs[0], f"numbers_{number}_rows")[0]
        nodes.append(self._node("Cast", [nodes[-1].outputs[0]], f"wide_{number}_rows", to=FLOAT))
        if content.zero is not None:
            zero = rows("zero_rows", content.zero[..., None])
            wide = self._node("Cast", [zero.outputs[0]], f"wide_zero_{number}_rows", to=FLOAT)
            nodes += [zero, wide, self._node("Sub", [nodes[-1].outputs[0], wide.outputs[0]], f"centred_{number}_rows")]
        scale = rows("scale_rows", content.scale[..., None])
        nodes += [scale, self._node("Mul", [nodes[-1].outputs[0], scale.outputs[0]], f"float_{number}_rows")]
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
