"""Lowering for torch.compile: packed weights, whose layout only oneDNN knows, are no inputs but are read by their place.

    linear(x [N, K], P, b)        ->  packed_linear(x, b, i, C)        P = the i-th of the packs that the caller holds
    linear(x, P) + r              ->  packed_linear(x, None, i, C) + r          fused with what follows

A backend that took such a tensor as an input would ask for strides that it does not have. Places, not addresses, stand in
the graph, so that what is compiled for it is found again in torch's cache, in another process too.

The rows [B, D] of gradients pass through ``held``: the norm that clips a row is that of the very numbers that are summed,
whatever is fused, rounded or computed twice before or behind it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch

from .joint_graph import JointGraph, copy_graph, finish
from .opaque import HELD, PACKED_LINEAR
from .torch_private import LINEAR, LINEAR_ADD

aten = torch.ops.aten


def hide_weights(joint: JointGraph, targets: Sequence[str]) -> JointGraph:
    """The graph without the inputs of these names, the packs in the order in which :func:`holding` will get them."""
    graph, mapping = copy_graph(joint.module)
    packs = {mapping[joint.placeholder(i.name)]: targets.index(i.target) for i in joint.inputs if i.target in targets}
    for node in list(graph.nodes):
        if node.target not in (LINEAR, LINEAR_ADD):
            continue
        args: Any = node.args
        x, weight = args[0], args[1] if node.target is LINEAR else args[2]
        bias, added = (args[2], None) if node.target is LINEAR else (None, args[1])
        with graph.inserting_before(node):
            new = graph.call_function(PACKED_LINEAR, (x, bias, packs[weight], int(node.meta["shape"][-1])))
            if added is not None:
                new = graph.call_function(aten.add.Tensor, (new, added))
        node.replace_all_uses_with(new)
        graph.erase_node(node)
    for node in list(graph.nodes):
        if node.target is aten.where.ScalarOther and node.args[1].op == "call_function" and len(node.args[1].users) > 1:
            rows: Any = node.args[1]
            with graph.inserting_after(rows):
                held = graph.call_function(HELD, (rows,))
            rows.replace_all_uses_with(held, delete_user_cb=lambda user, held=held: user is not held)
    for placeholder in packs:
        graph.erase_node(placeholder)
    inputs = tuple(i for i in joint.inputs if i.target not in targets)
    return dataclasses.replace(joint, module=finish(graph), inputs=inputs)
