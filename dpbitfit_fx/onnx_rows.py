"""Every view of the clipped sum says again that it has one row per entry of sample_mask, after the exporter's optimizer.

The sealed step reads each gradient as ``[B, ..]`` with B the length of the mask. The exporter writes -1 for that B, or drops
the view, and with it the proof that a record has one row (``[B, 2 n]`` read as ``[2 B, n]`` would be clipped in halves).
So after it has run, ``Reshape(x, Concat(Shape(sample_mask), sizes))`` is put back in front of the clipped sum.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from dpbitfit_fx.errors import ExportError
from dpbitfit_fx.onnx_weights import constant

if TYPE_CHECKING:
    import onnx_ir as ir


def pin_rows(model: ir.Model, sizes: Sequence[int]) -> None:
    """Edit ``.. -> accumulator_out`` in place; ``sizes``: of the trainables. What it does not find, the seal refuses."""
    import onnx_ir as ir

    graph = model.graph
    mask = next(v for v in graph.inputs if v.name == "sample_mask")
    count = ir.node("Shape", [mask])
    count.outputs[0].name = "dpbitfit_rows"
    graph.insert_before(graph[0], count)
    shapes: dict[tuple[int, ...], ir.Value] = {}
    done: set[ir.Value] = set()

    def pin(x: ir.Value, wanted: Sequence[int] | None = None) -> None:
        if x in done:
            return
        rest = wanted if wanted is not None else list(x.shape)[1:] if x.shape is not None else [None]
        if not all(type(n) is int for n in rest):
            raise ExportError(
                "A factor of a ghost gradient has no fixed size in the exported graph. Pass ghost_norms=False."
            )
        key = tuple(int(n) for n in rest)  # type: ignore[arg-type]
        if key not in shapes:
            name = "_".join(map(str, key))
            given = constant(model, f"dpbitfit_row_{name}", np.array(key, dtype=np.int64))
            concat = ir.node("Concat", [count.outputs[0], given], attributes={"axis": 0})
            concat.outputs[0].name = f"dpbitfit_rows_of_{name}"
            graph.insert_after(count, concat)
            shapes[key] = concat.outputs[0]
        uses = list(x.uses())
        view = ir.node("Reshape", [x, shapes[key]])
        view.outputs[0].name = f"{x.name}_dpbitfit_rows"
        view.outputs[0].type, view.outputs[0].shape = x.type, x.shape
        source = x.producer()
        graph.insert_after(source if source is not None else shapes[key].producer(), view)  # type: ignore[arg-type]
        for node, at in uses:
            node.replace_input_with(at, view.outputs[0])
        done.update((x, view.outputs[0]))

    def made_by(value: Any, *path: int) -> Any:
        """The node that computes the value which is reached along these inputs."""
        node = value.producer()
        for at in path:
            node = node.inputs[at].producer()
        return node

    flat = made_by(graph.outputs[0], 1)
    whole = flat.inputs[0]
    pieces = list(made_by(whole).inputs) if made_by(whole).op_type == "Concat" else [whole]
    start = 0
    for piece in pieces:
        node = made_by(piece)
        if node.op_type == "MatMul" and made_by(node.inputs[0]).op_type == "Unsqueeze":
            values = made_by(node.inputs[1]).inputs[1]
            inner = made_by(values)
            views = list(inner.inputs) if inner is not None and inner.op_type == "Concat" else [values]
            for view in views:
                pin(view, [sizes[start]])
                start += 1
            continue
        start += 1
        node = made_by(node.inputs[0]) if node.op_type == "Reshape" else node
        for term in [made_by(v) for v in node.inputs] if node.op_type == "Add" else [node]:
            if term.op_type == "MatMul":
                pin(made_by(term.inputs[0], 0, 0, 0).inputs[1])
                pin(made_by(term.inputs[1], 0).inputs[1])
            else:
                pin(made_by(term.inputs[2], 0, 0).inputs[1])
                pin(made_by(term.inputs[1], 0, 0).inputs[0])
