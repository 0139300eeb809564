"""Lowering for torch.compile: what a reshape leaves to be worked out, in terms of the batch, is spelled out.

    reshape(x, [-1, H, T, d])        ->        reshape(x, [k B, H, T, d])        k B rows, B = sym_size(batch, 0)

torch.compile keeps B symbolic, and works a -1 out as a quotient of products of sizes, which holds the one before it: a deep
model's last reshapes held expressions that took minutes to simplify (ViT of 12 layers, T = 197: over four minutes; 55 s
without them). Rows are counted in batches of two sizes; what does not grow as a multiple of B stays as it is.
"""

from __future__ import annotations

import dataclasses
import operator
from typing import Any

import torch
from torch import fx

from .joint_graph import JointGraph, Role, copy_graph, finish
from .live_values import BATCHES, shapes
from .views import VIEWS

aten = torch.ops.aten


def spell_sizes(joint: JointGraph) -> JointGraph:
    """The same graph; where the padded length may vary too, as it was."""
    if joint.source is None or joint.source.length is not None:
        return joint
    found, (few, many) = shapes(joint), BATCHES
    graph, mapping = copy_graph(joint.module)
    batch = mapping[joint.placeholder(joint.with_role(Role.BATCH)[0].name)]
    last = [n for n in graph.nodes if n.op == "placeholder"][-1]
    with graph.inserting_after(last):
        count = graph.call_function(aten.sym_size.int, (batch, 0))
    multiples: dict[int, fx.Node] = {1: count}
    after = count
    for node in joint.module.graph.nodes:
        shape: Any = node.args[1] if node.target in VIEWS else ()
        if -1 not in shape:
            continue
        at = list(shape).index(-1)
        rows, other = found[node][0][at], found[node][1][at]
        times = rows // few
        if not times or (rows, other) != (times * few, times * many):
            continue
        if times not in multiples:
            with graph.inserting_after(after):
                multiples[times] = after = graph.call_function(operator.mul, (count, times))
        new: Any = mapping[node]
        new.args = (new.args[0], [multiples[times] if i == at else x for i, x in enumerate(new.args[1])])
    return dataclasses.replace(joint, module=finish(graph))
