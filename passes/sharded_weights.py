"""Lowering for several processes: of a large frozen weight each keeps a share, and gathers the whole just before it is read.

    W [n, ..];  y = f(x, W);  ..  g' = b(g, W)      ->      S [m, ..];  y = f(x, W');  ..  g' = b(g, W'')
                                                            W' [n, ..] = slice(whole_weight(S, N) [N m, ..], 0, n), and W'' again

N processes, m = ceil(n/N) rows each, the last ones' filled up. What is made of weights alone (a transpose, a cast) is made again
from each W'. Behind its last reader a W' is freed; one is gathered again where another weight is read in between, so that the
weights of one operator are alive at a time: those of the forward pass are gathered once more for the backward pass.

The same bits as the whole weight's, in the same layout, so the same numbers; the sealed graph, its hash and its exports are
those before this lowering, and the template is matched again after it. Every process has to run the same graph as often as the
others: whoever calls it sees to that. The weights of a run are public; what is gathered tells nothing of a record.
Source: fully sharded data parallel, Zhao et al., VLDB 2023 (torch's FSDP2: ``Shard(0)``, gathered before use, freed behind).
"""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor, fx

from .joint_graph import Input, JointGraph, Role, finish
from .opaque import WHOLE

aten = torch.ops.aten
_SIZES = (aten.sym_size.int, operator.mul, operator.add, operator.floordiv)


class Shard(NamedTuple):
    """What one of N processes keeps of a weight with n rows: m = ceil(n/N) of them, filled up behind the last."""

    tensor: Tensor
    rows: int
    ranks: int


def shard_weights(joint: JointGraph, shards: Mapping[str, Shard]) -> tuple[JointGraph, tuple[str, ...]]:
    """The graph that reads these frozen inputs as shards, and the weights in the order in which a call gathers them."""
    names = {i.name: i for i in joint.inputs}
    chain = _made_of_shards(joint, shards)
    graph = fx.Graph()
    made: dict[fx.Node, fx.Node] = {}
    held: dict[fx.Node, fx.Node] = {}  # of the operator at hand: its whole weights and what is made of them
    order: list[str] = []

    def read(node: fx.Node) -> fx.Node:
        return held[node] if node in chain else made[node]

    def hold(node: fx.Node) -> None:
        if node not in held and node.op == "placeholder":
            shard = shards[names[node.name].target]
            order.append(names[node.name].target)
            gathered = graph.call_function(WHOLE, (made[node], shard.ranks))
            if shard.rows < shard.ranks * shard.tensor.shape[0]:
                gathered = graph.call_function(aten.slice.Tensor, (gathered, 0, 0, shard.rows))
            gathered.meta.update(node.meta)
            held[node] = gathered
        elif node not in held:
            for source in node.all_input_nodes:
                if source in chain:
                    hold(source)
            held[node] = graph.node_copy(node, read)

    for node in joint.module.graph.nodes:
        if node in chain and node.op == "call_function":
            continue
        sources = [source for source in node.all_input_nodes if source in chain]
        needed = set().union(*(chain[source] for source in sources))
        if not needed <= held.keys():
            held = {n: copy for n, copy in held.items() if chain[n] <= needed}
        for source in sources:
            hold(source)
        made[node] = graph.node_copy(node, read)
        if node in chain:
            made[node].meta = {}  # of the whole weight
    inputs = tuple(
        Input(i.name, Role.FROZEN, f"shard of {i.target}") if i.role is Role.FROZEN and i.target in shards else i
        for i in joint.inputs
    )
    state = {**joint.state, **{f"shard of {target}": shard.tensor for target, shard in shards.items()}}
    note = f"sharded weights: {len(set(order))}, gathered {len(order)} times in a pass over a physical batch"
    module, optimized = finish(graph), (*joint.optimized, note)
    return dataclasses.replace(joint, module=module, inputs=inputs, state=state, optimized=optimized), tuple(order)


def _made_of_shards(joint: JointGraph, shards: Mapping[str, Shard]) -> dict[fx.Node, set[fx.Node]]:
    """The sharded inputs, and what is computed from them and other frozen inputs alone; of each, the sharded ones behind it."""
    frozen = {i.name: i.target in shards for i in joint.with_role(Role.FROZEN)}
    fixed: dict[fx.Node, set[fx.Node]] = {}
    for node in joint.module.graph.nodes:
        if node.op == "placeholder" and node.name in frozen:
            fixed[node] = {node} if frozen[node.name] else set()
        elif node.op == "call_function":
            if node.target in _SIZES and not any(fixed.get(i) for i in node.all_input_nodes):
                fixed[node] = set()  # the size of a batch, which may shape what is made of a weight
            elif node.all_input_nodes and all(i in fixed for i in node.all_input_nodes):
                fixed[node] = set().union(*(fixed[i] for i in node.all_input_nodes))
    return {node: sources for node, sources in fixed.items() if sources}
