"""Pass 5, add noise: ``out [D] = (sum [D] + z [D] * (sigma * R * (1 + slack))) / expected_batch_size`` (design §6).

z is an explicit input, drawn by the host from N(0, I) by a secure generator; sigma, R, the numeric
slack (``numerics``) and the denominator are public constants baked into the graph. There is no random operator in the graph.
On the grid z is ``round(2^24 N(0, I))``, exactly drawn, and ``out = (sum + z) * g / expected_batch_size`` in its unit g.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import torch

from .errors import CompileRefused
from .joint_graph import Input, JointGraph, Role, copy_graph, finish

aten = torch.ops.aten


def add_noise(joint: JointGraph) -> JointGraph:
    """``(.., accumulator [D], noise [D]) -> private gradient [D]``."""
    noise, clipping = joint.noise, joint.clipping
    if noise is None or clipping is None:
        raise CompileRefused("No noise was given; pass noise_multiplier and expected_batch_size.")
    for name, value in (
        ("noise_multiplier", noise.noise_multiplier),
        ("expected_batch_size", noise.expected_batch_size),
    ):
        if not math.isfinite(value) or value < 0 or (name == "expected_batch_size" and value == 0):
            raise CompileRefused(f"{name} must be a positive finite number, got {value!r}.")
    graph, _ = copy_graph(joint.module)
    output = graph.output_node()
    last = [n for n in graph.nodes if n.op == "placeholder"][-1]
    with graph.inserting_after(last):
        z = graph.placeholder("noise")
    with graph.inserting_before(output):
        total: Any = output.args[0][0]  # type: ignore[index]
        if noise.grid:
            units = graph.call_function(aten.add.Tensor, (total, z))
            noisy = graph.call_function(aten.mul.Scalar, (units, noise.unit(clipping)))
        else:
            scaled = graph.call_function(aten.mul.Scalar, (z, noise.scale(clipping)))
            noisy = graph.call_function(aten.add.Tensor, (total, scaled))
        output.args = ((graph.call_function(aten.div.Scalar, (noisy, noise.expected_batch_size)),),)
    return dataclasses.replace(joint, module=finish(graph), inputs=(*joint.inputs, Input(z.name, Role.NOISE, "noise")))
