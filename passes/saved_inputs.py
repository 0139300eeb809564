"""Lowering: what the backward pass does not need is not kept for it (design §5). The same numbers, bit for bit.

    convolution_backward(g, x, W, .., [True, False, False])  ->  convolution(g, W, .., transposed)     x [N, C, ..] not read
    pool_backward(g, x, ..)                  ->  pool_backward(g, x', ..)          x' of x's shape is one zero, expanded
    threshold_backward(g, y, c)              ->  where(m, 0, g),  m = y <= c       m [N, ..] bool, made where y is

The gradient of a convolution's input is the transposed convolution of g, which knows the input's shape from its options;
functorch takes the shape from a row of the input itself, and so keeps all of it. The pools take from x nothing but the
shape. The mask of a ReLU is a byte for each of y's four, and is made only where y would be kept for that alone. The
sealed graph, its hash and its exports are those before this lowering.
"""

from __future__ import annotations

import dataclasses
import operator
from typing import Any

import torch
from torch import fx

from .joint_graph import Extent, JointGraph, Role, copy_graph, finish, rows_at_capture
from .views import VIEWS, forward_pass, readers, shown_by

aten = torch.ops.aten
ALIASES = {
    *VIEWS,
    aten.transpose.int,
    aten.permute.default,
    aten.t.default,
    aten.unsqueeze.default,
    aten.squeeze.dims,
    aten.expand.default,
    aten.slice.Tensor,
    aten.select.int,
}
SHAPE_ONLY = {
    aten.max_pool2d_with_indices_backward.default,
    aten.avg_pool2d_backward.default,
    aten._adaptive_avg_pool2d_backward.default,
}


def drop_saved_inputs(joint: JointGraph) -> JointGraph:
    """The same accumulated sum; how many inputs are no longer kept is added to the report."""
    graph, _ = copy_graph(joint.module)
    batch = {joint.placeholder(i.name).name for i in joint.with_role(Role.BATCH)}
    count = next((n for n in graph.nodes if n.target is aten.sym_size.int and n.args[0].name in batch), None)
    rows = rows_at_capture(joint)
    done = {"convolution": 0, "pool": 0, "ReLU": 0}
    for node in list(graph.nodes):
        if node.target is aten.convolution_backward.default:
            done["convolution"] += _transpose(graph, node)
        elif node.target in SHAPE_ONLY and count is not None:
            done["pool"] += _only_shape(graph, node, count, rows)
    graph.eliminate_dead_code()
    forward = forward_pass(graph)
    for node in list(graph.nodes):
        if node.target is aten.threshold_backward.default:
            done["ReLU"] += _one_byte(graph, node, forward)
    notes = tuple(
        f"saved inputs: {n} {what} inputs are not kept for the backward pass" for what, n in done.items() if n
    )
    return dataclasses.replace(joint, module=finish(graph), optimized=(*joint.optimized, *notes)) if notes else joint


def _transpose(graph: fx.Graph, node: fx.Node) -> bool:
    """``extra`` is what the forward's stride left over at the end of each axis: the input's size is known by it.

    A transposed convolution that padded its output by a whole stride or more has no such form: it stays.
    """
    args: Any = node.args
    gradient, source, weight, _, stride, padding, dilation, transposed, _, groups, wanted = args
    shapes = [x.meta.get("shape") for x in (gradient, source, weight)]
    used = {u.args[1] for u in node.users if u.target is operator.getitem}
    if None in shapes or list(wanted) != [True, False, False] or used != {0} or len(used) != len(node.users):
        return False
    out, inner, kernel = (s[2:] for s in shapes)
    if any(isinstance(size, Extent) for s in shapes for size in s):
        return False
    rank = len(kernel)
    s, p, d = (list(x) * (rank if len(x) == 1 else 1) for x in (stride, padding, dilation))
    extra = [0] * rank
    if not transposed:
        extra = [inner[i] - ((out[i] - 1) * s[i] - 2 * p[i] + d[i] * (kernel[i] - 1) + 1) for i in range(rank)]
    elif any((out[i] + 2 * p[i] - d[i] * (kernel[i] - 1) - 1) // s[i] + 1 != inner[i] for i in range(rank)):
        return False
    if any(not 0 <= e < max(s[i], d[i]) for i, e in enumerate(extra)):
        return False
    with graph.inserting_before(node):
        new = graph.call_function(
            aten.convolution.default, (gradient, weight, None, s, p, d, not transposed, extra, groups)
        )
    (user,) = node.users
    new.meta.update(user.meta)
    user.replace_all_uses_with(new)
    return True


def _only_shape(graph: fx.Graph, node: fx.Node, count: fx.Node, rows: int) -> bool:
    args: Any = node.args
    gradient, source = args[:2]
    shape = source.meta.get("shape")
    if shape is None or shape[0] % rows or any(isinstance(x, Extent) for x in shape) or source.op == "placeholder":
        return False
    with graph.inserting_before(node):
        first = count if shape[0] == rows else graph.call_function(operator.mul, (count, shape[0] // rows))
        zero = graph.call_function(aten.new_zeros.default, (gradient, [1] * len(shape)))
        flat = graph.call_function(aten.expand.default, (zero, [first, *map(int, shape[1:])]))
    flat.meta.update(source.meta)
    node.args = (gradient, flat, *args[2:])
    return True


def _one_byte(graph: fx.Graph, node: fx.Node, forward: set[fx.Node]) -> bool:
    """Where nothing else reads ``y``, under any view of it, in the backward pass."""
    args: Any = node.args
    gradient, kept, threshold = args
    base = shown_by(kept, ALIASES)
    if base.op == "placeholder" or kept.meta.get("dtype") not in (torch.float32, torch.float64):
        return False
    if any(r is not node and r not in forward for r in readers(base, ALIASES)):
        return False
    with graph.inserting_after(kept):
        mask = graph.call_function(aten.le.Scalar, (kept, threshold))
    with graph.inserting_before(node):
        new = graph.call_function(aten.where.ScalarSelf, (mask, 0.0, gradient))
    mask.meta.update(kept.meta)
    mask.meta["dtype"] = torch.bool
    new.meta.update(node.meta)
    node.replace_all_uses_with(new)
    return True
