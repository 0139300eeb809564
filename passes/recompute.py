"""Lowering: values of the forward pass are computed again just before the backward pass reads them, for less memory.

    h = f(x)  ...  g' = f'(g, h)        ->        h = f(x)  ...  h' = f(x);  g' = f'(g, h')        x is kept, h is not

``compile(memory_budget=)`` says what share of the step's peak may stay: 1, the default, changes nothing. What is kept across
the point where most bytes are alive is a cut of the graph: every path from the inputs to a
reader behind that point passes a value that is kept (its bytes) or starts at one that is computed again (its work times a
price). The least such cut of each price is found by networkx; a high price keeps everything, a low one only what many
values come from. Between two prices, nodes change sides from the inputs on: the last values are read first. Of all these,
the cheapest that stays in the budget is taken; where none does, the one with the lowest peak. The peak of each is that of
its order of nodes on the example batch (``live_values``).

Only what stands before the clip is touched; the sealed graph, its hash and its exports are those before this lowering. The
numbers are the same bit for bit: the same operators on the same values. Views, pointwise operators and those of ``AGAIN`` may be
computed again, and none that draws random numbers or that may add up in another order each time.
Source: torch's min-cut partitioner; He and Yu, "Transcending runtime-memory tradeoffs in checkpointing by being fusion aware",
MLSys 2023.
"""

from __future__ import annotations

import dataclasses
import math
import operator
from collections.abc import Collection

import networkx as nx
import torch
from torch import fx

from .joint_graph import JointGraph, Role, finish
from .live_values import PRODUCTS, Call, Made, live_bytes, measure
from .torch_private import is_random, returns_several

aten = torch.ops.aten
FLOPS_PER_BYTE = 20  # what a CPU multiplies and adds while it reads or writes a byte
PRICES = tuple(2.0**-k for k in range(11))  # of the work of a byte, in bytes that are kept
STEPS = 32  # the most places between two cuts that are looked at
AGAIN = {
    *PRODUCTS,
    operator.getitem,
    aten.native_layer_norm.default,
    aten.native_group_norm.default,
    aten._softmax.default,
    aten._log_softmax.default,
    aten._safe_softmax.default,
    aten.sum.dim_IntList,
    aten.mean.dim,
    aten.amax.default,
    aten.var_mean.correction,
    aten.max_pool2d_with_indices.default,
    aten.avg_pool2d.default,
    aten._adaptive_avg_pool2d.default,
    aten.constant_pad_nd.default,
    aten.cat.default,
    aten.stack.default,
    aten.embedding.default,
    aten.gather.default,
    aten.index.Tensor,
    aten.index_select.default,
    aten._to_copy.default,
    aten.clone.default,
    aten.reshape.default,
    aten.repeat.default,
    aten.full.default,
    *(getattr(aten, f"{name}_like").default for name in ("zeros", "ones", "full")),
    *(getattr(aten, f"new_{name}").default for name in ("zeros", "ones", "full")),
}


def recompute(joint: JointGraph) -> JointGraph:
    """The same accumulated sum, bit for bit, from fewer bytes alive at once; the report says how many."""
    budget = 1.0 if joint.source is None else joint.source.memory_budget
    if budget >= 1.0:
        return joint
    plan = _Plan(joint)
    again, peak = plan.within(budget * plan.peak)
    whole = f"{plan.peak / 1e6:.1f} MB on the example batch"
    if again:
        count = sum(n.target is not operator.getitem and plan.made[n].view_of is None for n in again)
        note = f"{count} values are computed again for the backward pass; the peak is {peak / plan.peak:.0%} of {whole}"
    else:
        note = f"nothing is computed again: it would not lower the peak, {whole}"
    if peak > budget * plan.peak > 0:
        note += f"; the budget of {budget:.0%} cannot be met"
    module = plan.rewritten(again) if again else joint.module
    return dataclasses.replace(joint, module=module, optimized=(*joint.optimized, f"recompute: {note}"))


class _Plan:
    """The graph and the node where most bytes are alive: ``early`` nodes stand before it, ``late`` ones do not.

    Neither holds the clip, whose inputs (``fixed``) it reads where they stood when it was proved.
    """

    def __init__(self, joint: JointGraph) -> None:
        self.nodes = list(joint.module.graph.nodes)
        self.made: dict[fx.Node, Made] = measure(joint)
        tail = self.behind(joint, Role.MASK, Role.ACCUMULATOR)
        self.batched = self.behind(joint, Role.BATCH)
        self.fixed = {i for n in tail for i in n.all_input_nodes}
        live = live_bytes([Call(n) for n in self.nodes], (), (), self.made)
        self.peak = max(live)
        before = next(i for i, n in enumerate(self.nodes) if n in tail and n.op != "placeholder")
        widest = max(range(before), key=live.__getitem__)
        self.early = {n: i for i, n in enumerate(self.nodes[:widest]) if n.op == "call_function"}
        self.late = {n for n in self.nodes[widest:] if n not in tail}
        self.members = {
            n: [u for u in n.users if u.target is operator.getitem] for n in self.early if returns_several(n.target)
        }

    def behind(self, joint: JointGraph, *roles: Role) -> set[fx.Node]:
        """The inputs of these roles and all that depends on them."""
        found = {joint.placeholder(i.name) for i in joint.inputs if i.role in roles}
        for node in self.nodes:
            if any(i in found for i in node.all_input_nodes):
                found.add(node)
        return found

    def price(self, node: fx.Node) -> float:
        """Of computing it again, in bytes read or written; a view is free."""
        made = self.made[node]
        return 0.0 if made.view_of is not None else made.touched + made.flops / FLOPS_PER_BYTE

    def may(self, node: fx.Node) -> bool:
        """Whether a node may be computed again. What weights alone make is kept, or each copy would be packed by itself."""
        if node in self.fixed or node not in self.batched or is_random(node):
            return False
        if self.made[node].view_of is not None or node.target in AGAIN:
            return True
        members = self.members.get(node)
        views = bool(members) and all(self.made[m].view_of is not None for m in members or ())
        return views or torch.Tag.pointwise in getattr(node.target, "tags", ())

    def cut(self, price: float) -> set[fx.Node]:
        """What is computed again where a byte of work costs ``price`` bytes: the readers' side of the least cut."""
        graph = nx.DiGraph()
        graph.add_nodes_from(("inputs", "readers"))
        for node in self.early:
            again, members = self.may(node), self.members.get(node)
            work = {"capacity": 1 + round(price * self.price(node))} if again else {}  # without one: no cut here
            graph.add_edge("inputs", (node, "in"), **work)
            # Of a view, that which it is a view of is kept; of a tuple, its members.
            own = sum(self.made[m].own for m in members) if members else self.made[node].own
            through = again and (members or self.made[node].view_of is not None)
            graph.add_edge((node, "in"), (node, "out"), **({} if through else {"capacity": 1 + own}))
            for user in node.users:
                if user in self.early:
                    graph.add_edge((node, "out"), (user, "in"))
                elif user in self.late:
                    graph.add_edge((node, "out"), "readers")
        _, (_, below) = nx.minimum_cut(graph, "inputs", "readers")
        return {key[0] for key in below if key != "readers" and key[1] == "in"}

    def within(self, most: float) -> tuple[set[fx.Node], int]:
        """The cheapest that has at most this peak, or else the one of the lowest: what is computed again, and its peak."""
        tried: list[tuple[int, float, set[fx.Node]]] = [(self.peak, 0.0, set())]
        kept: set[fx.Node] = set()
        for price in PRICES:
            cut = self.cut(price)
            more = sorted(cut - kept, key=self.early.__getitem__)
            places = [i for i, n in enumerate(more, 1) if self.made[n].view_of is None]
            for i in places[:: math.ceil(len(places) / STEPS) or 1] + [len(more)] * bool(more):
                some = kept & cut | set(more[:i])
                tried.append((*self.cost(some), some))
            kept = cut
        inside = [t for t in tried if t[0] <= most]
        least = min(t[0] for t in tried)
        peak, _, again = min(inside or [t for t in tried if t[0] == least], key=lambda t: (t[1], t[0]))
        return again, peak

    def cost(self, again: Collection[fx.Node]) -> tuple[int, float]:
        """The peak, and the work of what is computed again."""
        calls = self.order(again)
        live = live_bytes(calls, again, self.late, self.made)
        return max(live), sum(self.price(c.node) for c in calls if c.again)

    def order(self, again: Collection[fx.Node]) -> list[Call]:
        """The nodes in their order, each copy just before the first that reads it; of a tuple, all members with it."""
        found: dict[Call, None] = {}

        def copy(node: fx.Node) -> None:
            todo = [node]
            while todo:
                missing = [i for i in todo[-1].all_input_nodes if i in again and Call(i, True) not in found]
                if missing:
                    todo += missing[::-1]
                    continue
                node = todo.pop()
                members = [u for u in self.members.get(node, ()) if u in again]
                found.update(dict.fromkeys(Call(n, True) for n in (node, *members)))

        for node in self.nodes:
            for read in node.all_input_nodes if node in self.late else ():
                if read in again and Call(read, True) not in found:
                    copy(read)
            found[Call(node)] = None
        return list(found)

    def rewritten(self, again: Collection[fx.Node]) -> fx.GraphModule:
        graph = fx.Graph()
        made: dict[Call, fx.Node] = {}

        def add(call: Call) -> fx.Node:
            copies = call.again or call.node in self.late
            return graph.node_copy(call.node, lambda n: made[Call(n, copies and n in again)])

        for call in self.order(again):
            made[call] = add(call)
        return finish(graph)
