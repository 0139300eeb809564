"""Passes that rewrite nothing: they prove. PARTIAL for the accumulating graph, SEALED for what may leave.

``split`` then cuts a sealed graph at its clipped sum, and both halves are matched against their half of the template.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import fx

from . import facts, template
from .errors import SealBroken
from .joint_graph import Fact, Input, JointGraph, Role, copy_graph, finish

aten = torch.ops.aten


def seal_partial(joint: JointGraph) -> JointGraph:
    """Nothing but the closed template between the gradients and the accumulator, or :class:`SealBroken`."""
    facts.partial(joint)
    return joint


def seal(joint: JointGraph) -> JointGraph:
    """Nothing but the closed template between the gradients and the private gradient, or :class:`SealBroken`."""
    facts.sealed(joint)
    return joint


def split(joint: JointGraph) -> tuple[JointGraph, JointGraph]:
    """A sealed graph as (partial, update): ``(.., mask, acc) -> acc'`` and ``(acc [D], noise [D]) -> gradient [D]``."""
    facts.sealed(joint)
    whole = template.match_noise(joint)
    graph, mapping = copy_graph(joint.module)
    graph.output_node().args = ((mapping[whole],),)
    graph.eliminate_dead_code()
    for entry in joint.with_role(Role.NOISE):
        graph.erase_node(next(n for n in graph.nodes if n.op == "placeholder" and n.name == entry.name))
    inputs = tuple(i for i in joint.inputs if i.role is not Role.NOISE)
    first = dataclasses.replace(
        joint, module=finish(graph), inputs=inputs, facts=frozenset({Fact.FUNCTIONAL, Fact.PARTIAL})
    )
    facts.partial(first)
    tail = fx.Graph()
    accumulator, z = tail.placeholder("accumulator"), tail.placeholder("noise")
    div = joint.outputs[0]
    noisy = div.args[0]
    if joint.grid:
        units = tail.call_function(aten.add.Tensor, (accumulator, z))
        total = tail.call_function(aten.mul.Scalar, (units, noisy.args[1]))
    else:
        scaled = tail.call_function(aten.mul.Scalar, (z, noisy.args[1].args[1]))
        total = tail.call_function(aten.add.Tensor, (accumulator, scaled))
    tail.output((tail.call_function(aten.div.Scalar, (total, div.args[1])),))
    ends = (Input("accumulator", Role.ACCUMULATOR, "accumulator"), Input("noise", Role.NOISE, "noise"))
    second = dataclasses.replace(
        joint, module=finish(tail), inputs=ends, state={}, facts=frozenset({Fact.FUNCTIONAL, Fact.NOISED})
    )
    check_update(second)
    return first, second


def check_update(joint: JointGraph) -> None:
    """The update half is exactly ``(accumulator + noise * sigma R (1 + slack)) / expected_batch_size``."""
    facts.functional(joint)
    start = template.match_noise(joint)
    template.placeholder(joint, Role.ACCUMULATOR, start, 1, "update")
    if len(list(joint.module.graph.nodes)) != 6:
        raise SealBroken("update: the graph holds more than the accumulator, the noise, their sum and the denominator.")
