"""Pass 3, re-fuse: put back what vmap took apart, so that eager does not pay for it. Same numbers up to rounding.

view(b * 1 + _unsafe_view(mm(x, Wt)))          ->  view(addmm(b, x, Wt))                        b [C], x [N, K], Wt [K, C]
layer_norm_backward(g * w, x, .., None, ..)     ->  layer_norm_backward(g, x, .., w, ..)         g [.., C], w [C]
view(view(x, s), t)                             ->  view(x, t);  t(t(W)) -> W;  permute(x, identity) -> x
two nodes with the same operator and arguments  ->  one (attention masks hoisted out of the layers)
"""

from __future__ import annotations

import dataclasses
import operator
from typing import Any

import torch
from torch import fx

from .joint_graph import Extent, JointGraph, copy_graph, finish
from .views import VIEWS

aten = torch.ops.aten


def refuse_operators(joint: JointGraph) -> JointGraph:
    """The same function in fewer, fatter operators; placeholders and outputs keep their order."""
    graph, _ = copy_graph(joint.module)
    vectors = {i.name for i in joint.inputs if i.target in joint.state and joint.state[i.target].dim() == 1}
    for _ in range(2):
        _drop_identities(graph)
        _share(graph)
        _fuse_linear(graph, vectors)
        _fuse_layer_norm_backward(graph, vectors)
        graph.eliminate_dead_code()
    return dataclasses.replace(joint, module=finish(graph))


def _drop_identities(graph: fx.Graph) -> None:
    for node in list(graph.nodes):
        if node.op != "call_function" or not node.args or not isinstance(node.args[0], fx.Node):
            continue
        source = node.args[0]
        if node.target in VIEWS and source.target in VIEWS:
            inner: Any = source.args[0]
            if node.meta.get("shape") is not None and node.meta["shape"] == inner.meta.get("shape"):
                node.replace_all_uses_with(inner)
                continue
            node.args = (inner, *node.args[1:])
        elif node.target is aten.permute.default and list(node.args[1]) == list(range(len(node.args[1]))):
            node.replace_all_uses_with(source)
        elif (node.target is aten.t.default and source.target is aten.t.default) or (
            node.target is aten.transpose.int
            and source.target is aten.transpose.int
            and node.args[1:] == source.args[1:]
        ):
            node.replace_all_uses_with(source.args[0])
        elif node.target is aten.mul.Scalar and node.args[1] == 1 and type(node.args[1]) is int:
            node.replace_all_uses_with(source)


def _share(graph: fx.Graph) -> None:
    """Common subexpressions: the graph is functional and holds no random operator, so equal calls are equal values."""
    seen: dict[Any, fx.Node] = {}
    for node in list(graph.nodes):
        if node.op != "call_function":
            continue
        key = (str(node.target), repr(node.args), repr(node.kwargs))
        if key in seen:
            node.replace_all_uses_with(seen[key])
        else:
            seen[key] = node


def _fuse_linear(graph: fx.Graph, vectors: set[str]) -> None:
    """A bias [C], or another sum of the same shape (residual and q/k/v gradients), goes into the product as addmm."""
    for node in list(graph.nodes):
        if node.target is not aten.add.Tensor or node.kwargs:
            continue
        for other, rest in (node.args, node.args[::-1]):
            if not (isinstance(other, fx.Node) and isinstance(rest, fx.Node) and other is not rest):
                continue
            mm = rest.args[0] if rest.target in VIEWS else None
            if not (isinstance(mm, fx.Node) and mm.target is aten.mm.default and len(rest.users) == len(mm.users) == 1):
                continue
            columns, full, shape = mm.meta.get("shape"), rest.meta.get("shape"), other.meta.get("shape")
            if columns is None or full is None or shape is None or columns[-1] != full[-1]:
                continue
            if isinstance(columns[-1], Extent):  # a reshape would write it down
                continue
            if other.name in vectors and shape == (columns[-1],):
                operand = other
            elif shape == full:
                with graph.inserting_before(node):
                    operand = graph.call_function(aten.reshape.default, (other, [-1, columns[-1]]))
                operand.meta["shape"] = columns
            else:
                continue
            with graph.inserting_before(node):
                fused = graph.call_function(aten.addmm.default, (operand, *mm.args))
                view = graph.call_function(aten.reshape.default, (fused, rest.args[1]))
            fused.meta.update(mm.meta)
            view.meta["shape"] = full
            node.replace_all_uses_with(view)
            break


def _fuse_layer_norm_backward(graph: fx.Graph, vectors: set[str]) -> None:
    for node in list(graph.nodes):
        if node.target is not aten.native_layer_norm_backward.default or node.args[5] is not None:
            continue
        scaled = node.args[0]
        if not (isinstance(scaled, fx.Node) and scaled.target is aten.mul.Tensor and len(node.args[2]) == 1):
            continue
        used = {u.args[1] for u in node.users if u.target is operator.getitem}
        for grad, weight in (scaled.args, scaled.args[::-1]):
            if not isinstance(weight, fx.Node) or weight.meta.get("shape") != tuple(node.args[2]):
                continue
            if weight.name in vectors and used <= {0}:
                node.args = (grad, *node.args[1:5], weight, *node.args[6:])
                break
