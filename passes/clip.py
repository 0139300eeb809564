"""Pass 4, clip: per-sample gradients become one accumulated sum of clipped gradients (design §6).

    G [B, D]  = all gradients side by side, float32 (float64 for float64 models)
    n [B]     = sqrt(sum_d G^2) in float64, over exactly the values that are summed
    keep [B]  = (sample_mask != 0) and (n^2 < 1e60)          NaN, inf and absurd norms contribute exactly zero
    c [B]     = R / max(n, R)   (flat)   or   R / (n + gamma)   (automatic)
    out [D]   = accumulator + [1, B] @ [B, D] of (where(keep, c, 0), where(keep, G, 0))

Guarantee: adding or removing one row changes ``out`` by at most R in L2, up to float rounding of about 1e-6 R.
The loss output is dropped: it is private and never released. The weighted sum is written ``[1, B] @ [B, D]`` because
ONNX Runtime miscompiles ``Xt @ v``.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import fx

from .clipping import AutomaticClipping
from .errors import CompileRefused
from .joint_graph import Input, JointGraph, Role, copy_graph, finish

aten = torch.ops.aten
LARGEST_SQUARED_NORM = 1e60


def clip(joint: JointGraph) -> JointGraph:
    """``(.., batch, sample_mask [B], accumulator [D]) -> accumulator' [D]``."""
    clipping = joint.clipping
    if clipping is None:
        raise CompileRefused(
            "No clipping was given; use AutomaticClipping(max_grad_norm) or FlatClipping(max_grad_norm)."
        )
    graph, _mapping = copy_graph(joint.module)
    output = graph.output_node()
    gradients: Any = output.args[0][1:]  # type: ignore[index]
    last = [n for n in graph.nodes if n.op == "placeholder"][-1]
    with graph.inserting_after(last):
        mask = graph.placeholder("sample_mask")
    with graph.inserting_after(mask):
        accumulator = graph.placeholder("accumulator")
    with graph.inserting_before(output):
        call = graph.call_function
        flat = [call(aten.reshape.default, (g, [-1, t.numel])) for g, t in zip(gradients, joint.targets, strict=True)]
        side: fx.Node = call(aten.cat.default, (flat, 1))
        if any(t.dtype != joint.flat_dtype for t in joint.targets):
            side = call(aten._to_copy.default, (side,), {"dtype": joint.flat_dtype})
        wide = call(aten._to_copy.default, (side,), {"dtype": torch.float64})
        squared = call(aten.sum.dim_IntList, (call(aten.mul.Tensor, (wide, wide)), [1]))
        present = call(aten.ne.Scalar, (mask, 0))
        keep = call(aten.logical_and.default, (present, call(aten.lt.Scalar, (squared, LARGEST_SQUARED_NORM))))
        norm = call(aten.sqrt.default, (squared,))
        bound = clipping.max_grad_norm
        if isinstance(clipping, AutomaticClipping):
            below = call(aten.add.Scalar, (norm, clipping.gamma))
        else:
            below = call(aten.clamp_min.default, (norm, bound))
        factor = call(aten.mul.Scalar, (call(aten.reciprocal.default, (below,)), bound))
        kept = call(aten.where.ScalarOther, (keep, factor, 0.0))
        weights = call(aten.unsqueeze.default, (call(aten._to_copy.default, (kept,), {"dtype": joint.flat_dtype}), 0))
        rows = call(aten.where.ScalarOther, (call(aten.unsqueeze.default, (keep, 1)), side, 0.0))
        total = call(aten.reshape.default, (call(aten.mm.default, (weights, rows)), [joint.num_trainable]))
        result = call(aten.add.Tensor, (accumulator, total))
        output.args = ((result,),)
    inputs = (
        *joint.inputs,
        Input(mask.name, Role.MASK, "sample_mask"),
        Input(accumulator.name, Role.ACCUMULATOR, "accumulator"),
    )
    return dataclasses.replace(joint, module=finish(graph), inputs=inputs)
