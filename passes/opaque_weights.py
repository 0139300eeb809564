"""Lowering for torch.compile: packed weights, whose layout only oneDNN knows, are no inputs but are read by their place.

    linear(x [N, K], P, b)        ->  packed_linear(x, b, i, C)        P = the i-th of the packs that the caller holds
    linear(x, P) + r              ->  packed_linear(x, None, i, C) + r          fused with what follows

A backend that took such a tensor as an input would ask for strides that it does not have. Places, not addresses, stand in
the graph, so that what is compiled for it is found again in torch's cache, in another process too.

The rows [B, D] of gradients pass through ``rows``, which copies them and which no backend looks into: the norm that clips a row
is that of the very numbers that are summed, whatever is fused, rounded or computed twice before or behind it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import threading
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from .joint_graph import JointGraph, copy_graph, finish
from .torch_private import LINEAR, LINEAR_ADD

aten = torch.ops.aten
_HELD = threading.local()
LIBRARY: Any = torch.library.Library("dpbitfit_fx", "DEF")  # type: ignore[no-untyped-call]
LIBRARY.define("packed_linear(Tensor x, Tensor? bias, int place, int width) -> Tensor")
LIBRARY.define("rows(Tensor gradients) -> Tensor")


def _packed_linear(x: Tensor, bias: Tensor | None, place: int, width: int) -> Tensor:
    result: Tensor = LINEAR(x, _HELD.packs[place], bias, "none", [], "")
    return result


def _packed_linear_fake(x: Tensor, bias: Tensor | None, place: int, width: int) -> Tensor:
    return x.new_empty((*x.shape[:-1], width))


def _rows(gradients: Tensor) -> Tensor:
    return gradients.clone(memory_format=torch.contiguous_format)


LIBRARY.impl("packed_linear", _packed_linear, "CPU")
LIBRARY.impl("rows", _rows, "CompositeExplicitAutograd")
torch.library.register_fake("dpbitfit_fx::packed_linear", _packed_linear_fake, lib=LIBRARY)
torch.library.register_fake("dpbitfit_fx::rows", _rows, lib=LIBRARY)
PACKED_LINEAR: Any = torch.ops.dpbitfit_fx.packed_linear.default
ROWS: Any = torch.ops.dpbitfit_fx.rows.default


@contextlib.contextmanager
def holding(packs: Sequence[Tensor]) -> Iterator[None]:
    """The packs that graphs called inside, on this thread, read by their place."""
    before = getattr(_HELD, "packs", ())
    _HELD.packs = packs
    try:
        yield
    finally:
        _HELD.packs = before


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
                held = graph.call_function(ROWS, (rows,))
            rows.replace_all_uses_with(held, delete_user_cb=lambda user, held=held: user is not held)
    for placeholder in packs:
        graph.erase_node(placeholder)
    inputs = tuple(i for i in joint.inputs if i.target not in targets)
    return dataclasses.replace(joint, module=finish(graph), inputs=inputs)
