"""How an axis of rows (tokens) goes through an operator: what each operand must hold for some rows of the result.

An operator is row-wise along an axis when a row of its result needs no other row of its operands than the same one:

    add, gelu, where, ... [.., T, ..]      layer norm, softmax over another axis      mm [N, K] @ [K, C] along N
    bmm along its batch and its left rows  attention along its queries                views that keep the axis together

``ZEROS`` lists operands that make a row of the result zero where they are zero: the operators of a backward pass, linear in
the gradient that comes in.
"""

from __future__ import annotations

import math
import operator
from typing import Any, NamedTuple

import torch
from torch import fx

from .views import VIEWS

aten = torch.ops.aten
MOVES = VIEWS | {
    aten.transpose.int,
    aten.permute.default,
    aten.t.default,
    aten.unsqueeze.default,
    aten.squeeze.dims,
    aten.expand.default,
}
COPIES = {aten.clone.default, aten._to_copy.default, aten.alias.default, aten.detach.default, aten.zeros_like.default}
SUMS = {aten.sum.dim_IntList, aten.mean.dim}
REDUCTIONS = SUMS | {aten.amax.default, aten.any.dim, aten.all.dim}
SPLITS = {aten.split.Tensor, aten.split_with_sizes.default}
SOFTMAXES = {aten._softmax.default: 1, aten._log_softmax.default: 1}
SOFTMAX_BACKWARDS = {aten._softmax_backward_data.default: 2, aten._log_softmax_backward_data.default: 2}
ATTENTION = aten._scaled_dot_product_flash_attention_for_cpu.default
ATTENTION_BACKWARD = aten._scaled_dot_product_flash_attention_for_cpu_backward.default
NORM_BACKWARD = aten.native_layer_norm_backward.default
PRODUCTS = {aten.mm.default, aten.addmm.default, aten.bmm.default, ATTENTION, ATTENTION_BACKWARD}
EITHER, FIRST, BOTH = ((0,), (1,)), ((0,),), ((0, 1),)
ZEROS: dict[Any, tuple[tuple[int, ...], ...]] = {
    **dict.fromkeys(MOVES | SUMS | {aten.clone.default, aten._to_copy.default, operator.getitem}, FIRST),
    **dict.fromkeys((aten.mul.Tensor, aten.mm.default, aten.bmm.default), EITHER),
    **dict.fromkeys((aten.add.Tensor, aten.sub.Tensor, aten.addmm.default), BOTH),
    **dict.fromkeys(SOFTMAX_BACKWARDS, FIRST),
    **dict.fromkeys((ATTENTION_BACKWARD, NORM_BACKWARD), FIRST),
    **dict.fromkeys(
        (
            aten.neg.default,
            aten.mul.Scalar,
            aten.div.Scalar,
            aten.div.Tensor,
            aten.gelu_backward.default,
            aten.tanh_backward.default,
            aten.sigmoid_backward.default,
            aten.silu_backward.default,
            aten.threshold_backward.default,
            aten.hardtanh_backward.default,
            aten.leaky_relu_backward.default,
            aten.elu_backward.default,
            aten.select.int,
            aten.slice.Tensor,
        ),
        FIRST,
    ),
}
# The results of these that keep the rows of the gradient; the others are sums over all rows.
KEPT = {ATTENTION_BACKWARD: 0, NORM_BACKWARD: 0}


class Axis(NamedTuple):
    """``outer * T * inner`` entries of dimension ``dim``: T rows, alone (1, 1) or flattened with neighbouring axes."""

    dim: int
    outer: int = 1
    inner: int = 1


def arguments(node: fx.Node) -> list[tuple[int | str, Any]]:
    """Every argument by its place or its name."""
    return [*enumerate(node.args), *node.kwargs.items()]


def shape_of(node: Any) -> tuple[int, ...] | None:
    """The shape at capture; None where it is unknown."""
    shape = node.meta.get("shape") if isinstance(node, fx.Node) else None
    return None if shape is None else tuple(map(int, shape))


def moved(source: tuple[int, ...], target: tuple[int, ...], axis: Axis, rows: int) -> Axis | None:
    """Where a reshape takes the rows; None where it tears them apart."""
    before = math.prod(source[: axis.dim]) * axis.outer
    after = axis.inner * math.prod(source[axis.dim + 1 :])
    for dim, size in enumerate(target):
        left, right = math.prod(target[:dim]), math.prod(target[dim + 1 :])
        if left and right and before % left == 0 and after % right == 0:
            found = Axis(dim, before // left, after // right)
            if found.outer * rows * found.inner == size:
                return found
    return None


def _aligned(operand: Any, out: tuple[int, ...], axis: Axis) -> Axis | bool | None:
    """Broadcast from the right: where the rows are in an operand, None where it has none, False where it is unclear."""
    shape = shape_of(operand)
    if shape is None:
        return False
    dim = axis.dim - len(out) + len(shape)
    if dim < 0 or shape[dim] == 1:
        return None
    return axis._replace(dim=dim) if shape[dim] == out[axis.dim] else False


def _kept(node: fx.Node, axis: Axis) -> Axis | None:
    """Of an operator that drops some dimensions of its first operand: where the result's axis was."""
    args: Any = node.args
    source = shape_of(args[0]) or ()
    given = args[1] if len(args) > 1 else None
    dims = list(range(len(source))) if given is None else list(given) if isinstance(given, (list, tuple)) else [given]
    dropped = named = {d % len(source) for d in dims} if source else set()
    if node.target is aten.squeeze.dims:
        dropped = {d for d in named if source[d] == 1}
    if node.target is aten.slice.Tensor or (node.target in REDUCTIONS and len(args) > 2 and args[2]):
        return None if axis.dim in dropped else axis
    kept = [d for d in range(len(source)) if d not in dropped]
    if (
        axis.dim >= len(kept) or kept[axis.dim] in named
    ):  # a named axis of many rows stays, and would go with one row left
        return None
    return axis._replace(dim=kept[axis.dim])


def _moved_back(node: fx.Node, axis: Axis, rows: int) -> Axis | None:
    args: Any = node.args
    source, out = shape_of(args[0]), shape_of(node)
    if source is None or out is None:
        return None
    if node.target in VIEWS:
        return moved(out, source, axis, rows)
    if node.target in (aten.select.int, aten.slice.Tensor, aten.squeeze.dims) or node.target in REDUCTIONS:
        return _kept(node, axis)
    order = list(range(len(source)))
    if node.target is aten.permute.default:
        order = [d % len(source) for d in args[1]]
    elif node.target is aten.t.default:
        order = order[::-1]
    elif node.target is aten.transpose.int:
        a, b = args[1] % len(source), args[2] % len(source)
        order[a], order[b] = order[b], order[a]
    elif node.target is aten.unsqueeze.default:
        at = args[1] % len(out)
        order.insert(at, -1)
    return None if order[axis.dim] < 0 else axis._replace(dim=order[axis.dim])


def operands(node: fx.Node, axis: Axis, rows: int) -> dict[int | str, Axis | None] | None:
    """Which rows of its operands some rows of a result need: an axis, or None for all of it; None: not row-wise."""
    target: Any = node.target
    args: Any = node.args
    if target is operator.getitem:  # the other gradients of attention have keys where this one has queries
        return {0: axis} if KEPT.get(args[0].target, args[1]) == args[1] else None
    if (
        target in MOVES - {aten.expand.default}
        or target in REDUCTIONS
        or target in (aten.select.int, aten.slice.Tensor)
    ):
        source = _moved_back(node, axis, rows)
        return None if source is None else {0: source}
    if target in (ATTENTION, ATTENTION_BACKWARD):
        return _attention(node, axis)
    if target in SPLITS:
        rank, at = len(shape_of(args[0]) or ()), args[2] if len(args) > 2 else node.kwargs.get("dim", 0)
        return {0: axis} if rank and isinstance(at, int) and at % rank != axis.dim else None
    if target in (aten.native_layer_norm.default, NORM_BACKWARD):
        shape, over = shape_of(args[0]), args[2 if target is NORM_BACKWARD else 1]
        if shape is None or not isinstance(over, (list, tuple)) or axis.dim >= len(shape) - len(over):
            return None
        return dict.fromkeys((0, 1, 3, 4) if target is NORM_BACKWARD else (0,), axis)
    out = shape_of(node)
    if out is None:
        return None
    if target in SOFTMAXES or target in SOFTMAX_BACKWARDS:
        at = args[SOFTMAXES.get(target) or SOFTMAX_BACKWARDS[target]]
        return (
            None if at % len(out) == axis.dim else dict.fromkeys(range(2 if target in SOFTMAX_BACKWARDS else 1), axis)
        )
    if target is aten.mm.default:
        return {0: axis} if axis.dim == 0 else None
    if target is aten.addmm.default:
        added = _aligned(args[0], out, axis)
        return {0: added, 1: axis} if axis.dim == 0 and not isinstance(added, bool) else None
    if target is aten.bmm.default:
        return {0: axis, 1: axis} if axis.dim == 0 else {0: axis} if axis.dim == 1 else None
    if target is aten.expand.default or target in COPIES or torch.Tag.pointwise in getattr(target, "tags", ()):
        found: dict[int | str, Axis | None] = {}
        for key, operand in arguments(node):
            if isinstance(operand, fx.Node):
                place = _aligned(operand, out, axis)
                if isinstance(place, bool):
                    return None
                found[key] = place
        return found
    return None


def _attention(node: fx.Node, axis: Axis) -> dict[int | str, Axis | None] | None:
    """Along the queries, dimension 2 of all of them; keys and values are read in full."""
    args: Any = node.args
    mask: Any = node.kwargs.get("attn_mask")
    backward = node.target is ATTENTION_BACKWARD
    query = shape_of(args[1 if backward else 0])
    if query is None or axis != Axis(2) or set(node.kwargs) - {"attn_mask", "scale"}:
        return None
    found: dict[int | str, Axis | None] = dict.fromkeys((0, 1, 4, 5) if backward else (0,), axis)
    if mask is not None:
        shape = shape_of(mask)
        if shape is None or len(shape) != 4:
            return None
        found["attn_mask"] = axis if shape[2] == query[2] else None
    return found


def is_causal(node: fx.Node) -> bool:
    at = 7 if node.target is ATTENTION_BACKWARD else 4
    return bool(node.args[at]) if len(node.args) > at else False


def result(node: fx.Node, place: int, axis: Axis, rows: int) -> Axis | None:
    """Where the rows of an operand are in the result of a row-wise operator."""
    args: Any = node.args
    if node.target in (operator.getitem, *KEPT):
        axes = [axis]
    elif (out := shape_of(node)) is None:
        return None
    elif node.target in VIEWS:
        target = moved(shape_of(args[0]) or (), out, axis, rows)
        axes = [] if target is None else [target]
    else:
        axes = [axis._replace(dim=d) for d, size in enumerate(out) if size == axis.outer * rows * axis.inner]
    return next((a for a in axes if (operands(node, a, rows) or {}).get(place) == axis), None)


def contracted(node: fx.Node, place: int, axis: Axis) -> dict[int | str, Axis | None] | None:
    """The operands of a sum over all rows, where those outside are zero in operand ``place``; None: no such sum."""
    args: Any = node.args
    if node.target is aten.sum.dim_IntList:
        rank = len(shape_of(args[0]) or ())
        return {0: axis} if rank and (not args[1] or axis.dim in [d % rank for d in args[1]]) else None
    if node.target in (aten.mm.default, aten.bmm.default):
        left, right = (1, 0) if node.target is aten.mm.default else (2, 1)
        return {0: axis._replace(dim=left), 1: axis._replace(dim=right)} if axis.dim == (left, right)[place] else None
    return None
