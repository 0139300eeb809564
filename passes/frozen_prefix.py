"""What no trainable reaches, apart from the rest: computed once for each record, and not at every step (design section 5).

    (.., batch, mask, acc) -> acc'     ->     prefix: (.., batch) -> h_1 [B, ..], ..      rest: (.., batch, h, mask, acc) -> acc'

With ``exclude=["*layer.[0-3].*"]`` or so, the first blocks of a model are a fixed function of the record. What crosses is a
least cut of the graph, in bytes, by networkx: the products, convolutions and attention that no trainable reaches stand
before it; lookups and pointwise work (masks, say) may be done again. A value may cross only if its dimension 0, and no
other, is the batch in batches of every size: row b is then record b's own, as the capture proved of the graph.
Source: min-cut as in :mod:`recompute`.

The rest is matched against the closed template again (PARTIAL): its ``h`` are batch inputs, and whatever a record's are, its
gradient is clipped as before. They are PRIVATE: no export and no file ever holds them.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import NamedTuple

import networkx as nx
import torch
from torch import fx

from .errors import CompileRefused
from .joint_graph import Input, JointGraph, Role, copy_graph, finish
from .live_values import BATCHES, PRODUCTS, shapes

aten = torch.ops.aten
HEAVY = PRODUCTS | {aten._fft_r2c.default, aten._fft_c2c.default}


class NothingFrozen(CompileRefused):
    """No product, convolution or attention lies before the first trainable."""

    def __init__(self) -> None:
        super().__init__(
            "Nothing worth keeping lies before the first trainable parameter. Train the last blocks only, for example with "
            "exclude=['*layer.[0-3].*'], or leave cache_frozen_prefix off."
        )


class Parts(NamedTuple):
    """``prefix``: one output per value that crosses, [B, ..]; ``rest``: the PARTIAL graph that reads them as batch inputs.

    ``reads``: numbers of the batch inputs that the prefix looks at.
    """

    prefix: JointGraph
    rest: JointGraph
    reads: tuple[int, ...]


def split_prefix(joint: JointGraph) -> Parts:
    """The accumulating graph in two. Raises CompileRefused where nothing worth keeping lies before the first trainable."""
    nodes = list(joint.module.graph.nodes)
    role = {joint.placeholder(i.name): i.role for i in joint.inputs}
    moved = {n for n, r in role.items() if r in (Role.TRAINABLE, Role.MASK, Role.ACCUMULATOR, Role.NOISE)}
    batched = {n for n, r in role.items() if r is Role.BATCH}
    for node in nodes:
        if any(i in moved for i in node.all_input_nodes):
            moved.add(node)
        elif any(i in batched for i in node.all_input_nodes):
            batched.add(node)
    fixed = [n for n in nodes if n in batched and n not in moved and n.op == "call_function"]
    heavy = [n for n in fixed if n.target in HEAVY]
    if joint.draws:
        raise CompileRefused("Dropout draws anew at every step: nothing that it reaches can be computed once. Leave it off.")
    if not heavy:
        raise NothingFrozen
    bytes_of = _storable(joint, fixed)
    cut = _least_cut(fixed, heavy, moved, bytes_of)
    return Parts(*_parts(joint, cut), tuple(_inputs_of(cut, joint)))


def _storable(joint: JointGraph, fixed: Sequence[fx.Node]) -> dict[fx.Node, int]:
    """Bytes a record of every value whose dimension 0, and no other, is the batch, seen in batches of two sizes."""
    few, many = BATCHES
    found = shapes(joint)
    return {
        n: found[n][2] * math.prod(found[n][0][1:])
        for n in fixed
        if n in found and found[n][0][:1] == (few,) and found[n][1] == (many, *found[n][0][1:])
    }


def _least_cut(
    fixed: Sequence[fx.Node], heavy: Sequence[fx.Node], moved: set[fx.Node], bytes_of: dict[fx.Node, int]
) -> list[fx.Node]:
    """The values that are kept, fewest bytes, in graph order: heavy nodes before it, whatever reads ``moved`` values behind."""
    network = nx.DiGraph()
    for node in fixed:
        network.add_edge((node, "in"), (node, "out"), **({"capacity": bytes_of[node]} if node in bytes_of else {}))
        for user in node.users:
            network.add_edge((node, "out"), "rest" if user in moved or user.op == "output" else (user, "in"))
    for node in heavy:
        network.add_edge("record", (node, "in"))
    try:
        _, (before, _) = nx.minimum_cut(network, "record", "rest")
    except nx.NetworkXUnbounded:
        raise CompileRefused(
            "What lies before the first trainable parameter has no value per record: its results are not laid out as "
            "[B, ..], so they cannot be kept. Leave cache_frozen_prefix off."
        ) from None
    return [n for n in fixed if (n, "in") in before and (n, "out") not in before]


def _parts(joint: JointGraph, cut: Sequence[fx.Node]) -> tuple[JointGraph, JointGraph]:
    graph, mapping = copy_graph(joint.module)
    graph.output_node().args = (tuple(mapping[n] for n in cut),)
    _prune(graph)
    for name in [i.name for i in joint.inputs if i.role in (Role.MASK, Role.ACCUMULATOR)]:
        graph.erase_node(mapping[joint.placeholder(name)])
    kept = tuple(i for i in joint.inputs if i.role not in (Role.MASK, Role.ACCUMULATOR))
    prefix = dataclasses.replace(joint, module=finish(graph), inputs=kept)

    graph, mapping = copy_graph(joint.module)
    last = mapping[joint.placeholder(joint.with_role(Role.BATCH)[-1].name)]
    inputs: list[Input] = []
    for number, node in enumerate(cut):
        with graph.inserting_after(last):
            last = graph.placeholder(f"kept_{number}")
        last.meta.update(node.meta)
        mapping[node].replace_all_uses_with(last)
        inputs.append(Input(last.name, Role.BATCH, f"kept {number}"))
    at = max(i for i, entry in enumerate(joint.inputs) if entry.role is Role.BATCH) + 1
    order = (*joint.inputs[:at], *inputs, *joint.inputs[at:])
    _prune(graph)
    return prefix, dataclasses.replace(joint, module=finish(graph), inputs=order)


def _prune(graph: fx.Graph) -> None:
    """What nobody reads any more is gone: fused attention too, which torch takes for an operator that draws, and asserts."""
    for node in reversed(list(graph.nodes)):
        if node.op == "call_function" and not node.users:
            graph.erase_node(node)


def _inputs_of(cut: Sequence[fx.Node], joint: JointGraph) -> list[int]:
    """Numbers of the batch inputs that the cut's values are computed from."""
    seen: set[fx.Node] = set()
    todo = list(cut)
    while todo:
        node = todo.pop()
        if node not in seen:
            seen.add(node)
            todo += node.all_input_nodes
    batch = [joint.placeholder(i.name) for i in joint.with_role(Role.BATCH)]
    return [number for number, node in enumerate(batch) if node in seen]
