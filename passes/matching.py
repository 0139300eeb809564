"""How a node is matched against a template: one operator, these options, these constants, this many readers."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

from .errors import SealBroken
from .joint_graph import JointGraph, Role

aten = torch.ops.aten
# Positional arguments of the operators of the template; two where not listed. One more could be `keepdim` or `alpha`.
ARITY: dict[Any, int] = {
    aten.reciprocal.default: 1,
    aten.sqrt.default: 1,
    aten.trunc.default: 1,
    aten.t.default: 1,
    aten._to_copy.default: 1,
    aten.where.ScalarOther: 3,
    aten.transpose.int: 3,
    aten.gather.default: 3,
    aten.diagonal.default: 4,
    aten.embedding_dense_backward.default: 5,
}


def as_list(value: Any) -> list[Any]:
    return list(value) if isinstance(value, (list, tuple)) else [value]


def expect(node: Any, target: Any, what: str, users: int | None = 1, **kwargs: Any) -> fx.Node:
    """The node, if it is a call of ``target`` with exactly these options, no argument too many and this many users."""
    if not isinstance(node, fx.Node) or node.op != "call_function" or node.target is not target:
        found = getattr(node, "target", node)
        raise SealBroken(f"{what}: expected {target}, found {found}.")
    if dict(node.kwargs) != kwargs:
        raise SealBroken(f"{what}: {target} has the options {dict(node.kwargs)}, expected {kwargs}.")
    if len(node.args) != ARITY.get(target, 2):
        raise SealBroken(f"{what}: {target} has {len(node.args)} arguments; a scale or an option was added.")
    if users is not None and len(node.users) != users:
        raise SealBroken(
            f"{what}: {node.name} is used {len(node.users)} times, expected {users}; a second use could leave the graph."
        )
    return node


def constant(value: Any, expected: float, what: str) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or value != expected:
        raise SealBroken(f"{what}: found {value!r}, expected the public constant {expected!r}.")


def public_sizes(joint: JointGraph) -> set[fx.Node]:
    """The padded length (declared dimensions of batch inputs, design §6), and what sums, products and quotients make of it."""
    dims = {} if joint.length is None else joint.length.dims
    declared = {(joint.placeholder(i.name), dims[i.target]) for i in joint.with_role(Role.BATCH) if i.target in dims}
    found: set[fx.Node] = set()
    for node in joint.module.graph.nodes:
        if node.target is aten.sym_size.int:
            known = node.args in declared and node.args[1] != 0 and not node.kwargs
        else:
            known = (
                node.target in (operator.mul, operator.add, operator.floordiv)
                and len(node.args) == 2
                and all(type(x) is int or x in found for x in node.args)
            )
        if known:
            found.add(node)
    return found
