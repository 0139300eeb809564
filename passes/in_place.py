"""Lowering for eager mode: a pointwise operator writes over an operand that nobody reads afterwards.

    op(x, y, ..)    ->    op.out(x, y, .., out=x)          x of the result's shape and dtype, contiguous

The same kernel on the same values, so the same bits; one tensor less is alive where the step is fullest, between the forward
and the backward pass (the gradient of a GELU, [B, T, 4 n], lands in the memory of the gradient before it), and fewer new pages
are touched. Inductor does this by itself.

Written over is only memory that is known to be the graph's own: made by an operator of ``OWN``, which neither returns a view
of what it is given nor keeps it, and read by nothing that comes later, through whatever view. An operator that is in no
list may return a view. Contiguity is known, not guessed: a result lies as torch would have laid it out, or
contiguously, which every later view accepts as well.
"""

from __future__ import annotations

import dataclasses
import operator
from typing import Any

import torch
from torch import fx

from .joint_graph import JointGraph, copy_graph, finish
from .pointwise import POINTWISE
from .torch_private import LINEAR, LINEAR_ADD
from .views import VIEWS, shown_by

aten = torch.ops.aten
CONTIGUOUS = {aten.mm.default, aten.addmm.default, aten.bmm.default, LINEAR, LINEAR_ADD} - {None}
NORMS = {aten.native_layer_norm.default, aten.native_layer_norm_backward.default}  # their first result is contiguous
# What makes memory of its own, and keeps none of its inputs'. (What is written over has no other reader left.)
OWN = {
    *POINTWISE,
    *(form for form, _ in POINTWISE.values()),
    *CONTIGUOUS,
    *NORMS,
    aten._to_copy.default,
    aten.cat.default,
    aten.sum.dim_IntList,
    aten.mean.dim,
    aten._scaled_dot_product_flash_attention_for_cpu.default,
    aten._scaled_dot_product_flash_attention_for_cpu_backward.default,
    aten._softmax.default,
    aten._softmax_backward_data.default,
    aten.embedding.default,
    aten.convolution.default,
    aten.where.ScalarOther,
    aten.sym_size.int,
}


def write_in_place(joint: JointGraph) -> JointGraph:
    """The same sums; how many operators write over an operand is added to the report."""
    graph, _ = copy_graph(joint.module)
    done = write_over(graph)
    notes = (*joint.optimized, f"{done} operators write over what nobody reads afterwards")
    return dataclasses.replace(joint, module=finish(graph), optimized=notes) if done else joint


def write_over(graph: fx.Graph) -> int:
    """Rewrites the graph, by the ``shape`` and ``dtype`` in its nodes' ``meta``; how many operators now write in place."""
    order = {node: at for at, node in enumerate(graph.nodes)}
    contiguous: set[fx.Node] = set()
    done = 0
    for node in graph.nodes:
        over = None
        if node.target in POINTWISE:
            over = next((x for x in node.all_input_nodes if _free(x, node, order, contiguous)), None)
        if over is not None:
            node.target, name = POINTWISE[node.target]
            node.kwargs = {**node.kwargs, name: over}
            done += 1
        if over is not None or _is_contiguous(node, contiguous):
            contiguous.add(node)
    return done


def _is_contiguous(node: fx.Node, known: set[fx.Node]) -> bool:
    """Whether it is the graph's own memory, or a view of all of it, and contiguous."""
    if node.target in CONTIGUOUS:
        return True
    if node.target is operator.getitem:
        source: Any = node.args[0]
        return source.target in NORMS and bool(node.args[1] == 0)
    if node.target in VIEWS or node.target is aten._to_copy.default:
        return node.args[0] in known and set(node.kwargs) <= {"dtype"}
    if node.target is aten.cat.default:
        return len(node.meta.get("shape", ())) == 2
    if node.target in POINTWISE:
        shape = node.meta.get("shape")
        whole = [x for x in node.all_input_nodes if x.meta.get("shape") == shape]
        return shape is not None and bool(whole) and all(x in known for x in whole)
    return False


def _free(x: fx.Node, node: fx.Node, order: dict[fx.Node, int], contiguous: set[fx.Node]) -> bool:
    """Whether ``node`` may write its result into ``x``, which it reads."""
    same = all(x.meta.get(key) is not None and x.meta.get(key) == node.meta.get(key) for key in ("shape", "dtype"))
    if not same or x not in contiguous:  # which only views of the graph's own memory are
        return False
    base = shown_by(x)
    others = {other for other in node.all_input_nodes if other is not x}
    todo, seen = [base], {base}
    while todo:
        for reader in todo.pop().users:
            if order[reader] > order[node]:
                return False
            if reader is not node and not _own(reader) and reader not in seen:
                seen.add(reader)
                todo.append(reader)
    return not others & seen


def _own(node: fx.Node) -> bool:
    """Whether its memory is no other node's."""
    if node.target is operator.getitem:
        source: Any = node.args[0]
        return source.target in NORMS
    return node.target in OWN
