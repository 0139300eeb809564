"""Lowering for torch.compile, ``precision="bf16"``: what the backward pass reads of norms and gradients is kept in bfloat16.

    norm backward      dx = r (g w - mean(g w) - n mean(g w n))          n = float32(held(bf16((x - m) r)))  [.., d]
    a bias's gradient  sum_t g                ->        sum_t float32(bf16(g))          g [B, T, n] that a product reads in bf16

The first keeps the normalised input, two bytes an entry, instead of the input itself, four; mean m, inverse deviation r [.., 1]
and all arithmetic stay float32. The second reads what the product of the backward pass reads anyway, so that g is written
once, in bfloat16, and not in float32 beside it; entries are added up in float32 as before. Both round entries to three digits,
as the products around them do; the row [B, D] that is clipped is the very row that is summed.

``held`` copies and is opaque: a backend would work the cast out where it is read, and keep x.
"""

from __future__ import annotations

import dataclasses
import operator
from typing import Any

import torch
from torch import fx

from .joint_graph import JointGraph, copy_graph, finish
from .opaque import HELD
from .torch_private import LINEAR
from .views import forward_pass, readers, seen_as, shown_by

aten = torch.ops.aten


def keep_bfloat16(joint: JointGraph) -> JointGraph:
    """The same sums from fewer bytes; the report says of how many norms and gradients."""
    graph, _ = copy_graph(joint.module)
    forward = forward_pass(graph)
    done = {"norms": 0, "gradients": 0}
    for node in list(graph.nodes):
        if node.target is aten.native_layer_norm_backward.default:
            done["norms"] += _norm(graph, node, forward)
        elif node.target is aten.sum.dim_IntList and node not in forward:
            done["gradients"] += _sum(graph, node)
    notes = tuple(f"kept in bfloat16: what {n} {what} leave for the backward pass" for what, n in done.items() if n)
    return dataclasses.replace(joint, module=finish(graph), optimized=(*joint.optimized, *notes)) if notes else joint


def _cast(graph: fx.Graph, x: fx.Node, dtype: torch.dtype) -> fx.Node:
    return graph.call_function(aten._to_copy.default, (x,), {"dtype": dtype})


def _norm(graph: fx.Graph, node: fx.Node, forward: set[fx.Node]) -> bool:
    """Where its call in the forward pass is found, and nothing else of the backward pass keeps the input."""
    args: Any = node.args
    gradient, x, shape, mean, deviation, weight = args[:6]
    results = list(node.users)
    statistics: list[Any] = [n.args if n.target is operator.getitem else (None, None) for n in (mean, deviation)]
    call = statistics[0][0]
    if (
        x.meta.get("dtype") is not torch.float32
        or statistics != [(call, 1), (call, 2)]
        or getattr(call, "target", None) is not aten.native_layer_norm.default
        or call.args[0] is not x
        or any(r is not node and r not in forward for r in readers(x))
        or any(r.target is not operator.getitem or r.args[1] != 0 for r in results)
    ):
        return False
    order = list(graph.nodes)
    with graph.inserting_before(max((mean, deviation), key=order.index).next):
        centred = graph.call_function(aten.sub.Tensor, (x, mean))
        normal = graph.call_function(aten.mul.Tensor, (centred, deviation))
        held = graph.call_function(HELD, (_cast(graph, normal, torch.bfloat16),))
    dims = list(range(-len(shape), 0))
    with graph.inserting_before(node):
        n = _cast(graph, held, torch.float32)
        g = gradient if weight is None else graph.call_function(aten.mul.Tensor, (gradient, weight))
        along = graph.call_function(aten.mean.dim, (graph.call_function(aten.mul.Tensor, (g, n)), dims, True))
        flat = graph.call_function(aten.mean.dim, (g, dims, True))
        rest = graph.call_function(aten.sub.Tensor, (g, flat))
        rest = graph.call_function(aten.sub.Tensor, (rest, graph.call_function(aten.mul.Tensor, (n, along))))
        new = graph.call_function(aten.mul.Tensor, (rest, deviation))
    for reader in results:
        new.meta.update(reader.meta)
        reader.replace_all_uses_with(new)
        graph.erase_node(reader)
    graph.erase_node(node)
    return True


def _sum(graph: fx.Graph, node: fx.Node) -> bool:
    """Where the gradient is read by this sum and, through one cast, by products."""
    seen: Any = node.args[0]
    base = shown_by(seen)
    all_readers = readers(base)
    casts = [r for r in all_readers if r.target is aten._to_copy.default and r.kwargs == {"dtype": torch.bfloat16}]
    if base.meta.get("dtype") is not torch.float32 or len(casts) != 1 or set(all_readers) != {node, *casts}:
        return False
    (cast,) = casts
    products = [u for u in cast.users if u.target in (LINEAR, aten.mm.default)]
    if not products or len(products) != len(cast.users):
        return False
    # The cast goes before the views that lead to it, so that the sum finds it in the shape of the gradient.
    with graph.inserting_before(cast):
        rounded = _cast(graph, base, torch.bfloat16)
        read = seen_as(graph, rounded, cast.all_input_nodes[0])
    cast.replace_all_uses_with(read)
    order = {n: at for at, n in enumerate(graph.nodes)}
    after = max((*products, seen), key=order.__getitem__)
    with graph.inserting_before(after.next):
        wide = seen_as(graph, _cast(graph, rounded, torch.float32), seen)
        new = graph.call_function(aten.sum.dim_IntList, (wide, *node.args[1:]), node.kwargs)
    new.meta.update(node.meta)
    node.replace_all_uses_with(new)
    graph.erase_node(node)
    _behind(new)
    return True


def _behind(node: fx.Node) -> None:
    """Moves what reads ``node`` and stands before it, and what reads that, behind it."""
    late, needing = [], {node}
    for other in node.graph.nodes:
        if other is node:
            break
        if not needing.isdisjoint(other.all_input_nodes):
            needing.add(other)
            late.append(other)
    for other in reversed(late):
        node.append(other)
