"""Random edits of a graph that holds a seal: one to three of the kinds in ``KINDS``, all drawn from one generator.

Most are aimed at the clip and the noise, the rest anywhere. A draft is a copy: the graph that it came from stays.
"""

from __future__ import annotations

import dataclasses
import functools
import random
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch import fx

from dpbitfit_fx.passes.joint_graph import JointGraph, Role

aten = torch.ops.aten
ON_THE_TAIL = 0.75  # the share of edits that are aimed at the template's own nodes; the others fall anywhere
NUMBERS = (0.5, 2.0, -1.0, 0.0, 1.0, 1e-3, 1e3, 1 + 1e-6, float("inf"), float("nan"))
# What may be put on an edge, as (operator, arguments behind the value, options).
ON_AN_EDGE: tuple[tuple[Any, tuple[Any, ...], dict[str, Any]], ...] = (
    *((op, (x,), {}) for op in (aten.mul.Scalar, aten.add.Scalar, aten.div.Scalar) for x in NUMBERS),
    *((op, (x,), {}) for op in (aten.clamp_min.default, aten.clamp_max.default) for x in (0.0, 1e-3, 1.0, 1e3)),
    *((op.default, (), {}) for op in (
        aten.neg, aten.abs, aten.exp, aten.log, aten.sqrt, aten.rsqrt, aten.reciprocal, aten.sign, aten.relu, aten.tanh,
        aten.sigmoid, aten.nan_to_num, aten.detach, aten.clone, aten.alias, aten.t, aten.zeros_like, aten.ones_like,
        aten.logical_not, aten.isfinite, aten.sum, aten.mean, aten.max, aten.rand_like, aten.bernoulli,
    )),
    *((aten._to_copy.default, (), {"dtype": d}) for d in (torch.float16, torch.float32, torch.float64, torch.int64)),
    *((op, ([dim], keep), {}) for op in (aten.sum.dim_IntList, aten.mean.dim) for dim in (0, 1) for keep in (True, False)),
    *((op, ([0], True), {}) for op in (aten.amax.default, aten.amin.default)),
    *((op, (dim,), {}) for op in (aten.cumsum.default, aten.unsqueeze.default, aten.squeeze.dim) for dim in (0, 1)),
    *((aten._softmax.default, (dim, False), {}) for dim in (0, 1)),
    *((aten.flip.default, ([dim],), {}) for dim in (0, 1)),
    (aten.roll.default, ([1], [0]), {}),
    (aten.slice.Tensor, (0, 0, 1), {}),
    (aten.slice.Tensor, (0, 1), {}),
    (aten.select.int, (0, 0), {}),
    (aten.pow.Tensor_Scalar, (2,), {}),
    (aten.mul_.Scalar, (2.0,), {}),
    (aten._local_scalar_dense.default, (), {}),
    (aten.reshape.default, ([-1],), {}),
)  # fmt: skip
WITH_ANOTHER = (aten.add.Tensor, aten.sub.Tensor, aten.mul.Tensor, aten.div.Tensor, aten.maximum.default, aten.mm.default)
# Operators that take one another's arguments.
RELATIVES: tuple[tuple[Any, ...], ...] = (
    (aten.add.Tensor, aten.sub.Tensor, aten.mul.Tensor, aten.div.Tensor, aten.maximum.default, aten.minimum.default),
    (aten.add.Scalar, aten.sub.Scalar, aten.mul.Scalar, aten.div.Scalar, aten.clamp_min.default, aten.clamp_max.default,
     aten.pow.Tensor_Scalar),
    (aten.ne.Scalar, aten.eq.Scalar, aten.lt.Scalar, aten.le.Scalar, aten.gt.Scalar, aten.ge.Scalar),
    (aten.eq.Tensor, aten.ne.Tensor, aten.le.Tensor, aten.ge.Tensor),
    (aten.sum.dim_IntList, aten.mean.dim, aten.amax.default, aten.amin.default, aten.logsumexp.default),
    (aten.logical_and.default, aten.logical_or.default, aten.logical_xor.default),
    (aten.sqrt.default, aten.rsqrt.default, aten.reciprocal.default, aten.neg.default, aten.abs.default, aten.exp.default,
     aten.tanh.default, aten.detach.default),
    (aten.tanh_backward.default, aten.sigmoid_backward.default, aten.mul.Tensor, aten.add.Tensor),
    (aten.cat.default, aten.stack.default),
    (aten.mm.default, aten.bmm.default, aten.matmul.default, aten.mul.Tensor),
    (aten.reshape.default, aten.view.default, aten.expand.default, aten.permute.default),
    (aten.unsqueeze.default, aten.squeeze.dim, aten.cumsum.default),
    (aten.where.ScalarOther, aten.where.ScalarSelf),
    (aten.ones_like.default, aten.zeros_like.default, aten.rand_like.default),
    (aten._log_softmax.default, aten._softmax.default),
    (aten.t.default, aten.neg.default),
)  # fmt: skip
OPTIONS: tuple[dict[str, Any], ...] = ({"alpha": 2}, {"alpha": 1000}, {"dtype": torch.float16}, {"rounding_mode": "floor"})
Path = tuple[Any, ...]


class Draft:
    """A copy of a graph to be edited; ``sizes``: shape and dtype of the nodes' values on some batch, by name."""

    def __init__(
        self, joint: JointGraph, sizes: dict[str, Any], chance: random.Random, on_the_tail: float = ON_THE_TAIL
    ) -> None:
        self.joint, self.sizes, self.chance, self.on_the_tail = joint, sizes, chance, on_the_tail
        self.graph, mapping = fx.Graph(), dict[fx.Node, fx.Node]()
        for node in joint.module.graph.nodes:
            mapping[node] = self.graph.node_copy(node, lambda n: mapping[n])
        self.inputs, self.keep_dead = list(joint.inputs), False

    def calls(self) -> list[fx.Node]:
        return [n for n in self.graph.nodes if n.op == "call_function"]

    def site(self) -> fx.Node:
        """A node to be edited, often one of the template: those from where the mask is read; with a share of 0 none of them."""
        calls = self.calls()
        masks = {i.name for i in self.inputs if i.role is Role.MASK}
        at = next((k for k, n in enumerate(calls) if any(i.name in masks for i in n.all_input_nodes)), 0)
        if self.on_the_tail == 0.0:
            return self.chance.choice(calls[:at] or calls)
        return self.chance.choice(calls[at:] if self.chance.random() < self.on_the_tail else calls)

    def earlier(self, node: fx.Node, like: fx.Node | None = None) -> fx.Node:
        """Any node before this one; half of the time one whose value has the shape and dtype of ``like``'s."""
        before: list[fx.Node] = []
        for other in self.graph.nodes:
            if other is node:
                break
            before.append(other)
        size = self.sizes.get(like.name) if like is not None else None
        alike = [n for n in before if n is not like and self.sizes.get(n.name) == size]
        return self.chance.choice(alike if size is not None and alike and self.chance.random() < 0.5 else before)

    def edge(self) -> tuple[fx.Node, Path, fx.Node] | None:
        """A node to be edited, and one of its inputs with where it stands; None if it has none."""
        node = self.site()
        found = node_slots(node)
        return (node, *self.chance.choice(found)) if found else None

    def done(self) -> JointGraph:
        """The edited graph, not compiled: no proof needs that."""
        if not self.keep_dead:
            self.graph.eliminate_dead_code(lambda n: n.op in ("placeholder", "output") or writes(n.target))
        self.graph.lint()
        return dataclasses.replace(self.joint, module=SimpleNamespace(graph=self.graph), inputs=tuple(self.inputs))  # type: ignore[arg-type]


@functools.cache
def writes(target: Any) -> bool:
    return bool(target._schema.is_mutable) if isinstance(target, torch._ops.OpOverload) else False


def slots(node: fx.Node) -> list[tuple[Path, Any]]:
    """Every argument of a node, those in lists too, with where it stands."""
    found: list[tuple[Path, Any]] = []
    arguments: list[tuple[Any, Any]] = [*enumerate(node.args), *node.kwargs.items()]
    for key, value in arguments:
        inner: list[tuple[Path, Any]] = [((key, at), x) for at, x in enumerate(value)] if isinstance(value, (list, tuple)) else []
        found += inner or [((key,), value)]
    return found


def put(node: fx.Node, path: Path, value: Any) -> None:
    args, kwargs = list(node.args), dict(node.kwargs)
    holder: Any = kwargs if isinstance(path[0], str) else args
    if len(path) == 2:
        inner = list(holder[path[0]])
        inner[path[1]] = value
        value = inner
    holder[path[0]] = value
    node.args, node.kwargs = tuple(args), kwargs


def node_slots(node: fx.Node) -> list[tuple[Path, Any]]:
    return [(path, x) for path, x in slots(node) if isinstance(x, fx.Node)]


def swap_inputs(d: Draft) -> str:
    node = d.site()
    found = node_slots(node)
    if len({x for _, x in found}) < 2:
        return ""
    (here, one), (there, other) = d.chance.sample(found, 2)
    put(node, here, other)
    put(node, there, one)
    return f"{node}: {one} and {other} change places"


def rewire(d: Draft) -> str:
    if (edge := d.edge()) is None:
        return ""
    node, path, old = edge
    new = d.earlier(node, old)
    put(node, path, new)
    return f"{node}: reads {new} instead of {old}"


def drop(d: Draft) -> str:
    node = d.site()
    if not node.all_input_nodes:
        return ""
    source = d.chance.choice(node.all_input_nodes)
    node.replace_all_uses_with(source)
    d.graph.erase_node(node)
    return f"{node}: dropped, its readers read {source}"


def duplicate(d: Draft) -> str:
    node = d.site()
    with d.graph.inserting_after(node):
        twin = d.graph.node_copy(node)
    users = d.chance.sample(list(node.users), d.chance.randint(0, len(node.users)))
    for user in users:
        user.replace_input_with(node, twin)
    d.keep_dead |= not users
    return f"{node}: there twice, the copy read by {users or 'nobody'}"


def insert(d: Draft) -> str:
    if (edge := d.edge()) is None:
        return ""
    node, path, source = edge
    if d.chance.random() < 0.2:
        target, args, kwargs = d.chance.choice(WITH_ANOTHER), (d.earlier(node, source),), dict[str, Any]()
    else:
        target, args, kwargs = d.chance.choice(ON_AN_EDGE)
    with d.graph.inserting_before(node):
        new = d.graph.call_function(target, (source, *args), kwargs)
    everywhere = d.chance.random() < 0.3
    if everywhere:
        later = set[fx.Node]()
        for other in reversed(d.graph.nodes):
            if other is new:
                break
            later.add(other)
        for user in list(source.users):
            if user in later:
                user.replace_input_with(source, new)
    else:
        put(node, path, new)
    return f"{node}: {target}{args}{kwargs or ''} on the way from {source}{' and everywhere later' if everywhere else ''}"


def change_constant(d: Draft) -> str:
    node = d.site()
    found = [(p, x) for p, x in slots(node) if isinstance(x, (bool, int, float, torch.dtype))]
    if not found:
        return ""
    path, old = d.chance.choice(found)
    new: Any
    if isinstance(old, torch.dtype):
        new = d.chance.choice((torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.int64, torch.bool))
    elif isinstance(old, bool):
        new = not old
    elif isinstance(old, int):
        new = d.chance.choice((old + 1, old - 1, -old, 2 * old, 0, 1, -1, float(old), True, None))
    else:
        new = d.chance.choice((old * 2, old / 2, -old, old + 1, old * (1 + 1e-9), *NUMBERS, str(old)))
    if len(path) == 2 and d.chance.random() < 0.2:
        holder: Any = node.kwargs if isinstance(path[0], str) else node.args
        whole = list(holder[path[0]])
        new = d.chance.choice((whole[:-1], [*whole, whole[-1]], whole[::-1], [*whole, 1]))
        path = path[:1]
    put(node, path, new)
    return f"{node}: {old!r} becomes {new!r}"


def change_operator(d: Draft) -> str:
    node = d.site()
    near = [t for group in RELATIVES if node.target in group for t in group if t is not node.target]
    if not near:
        return ""
    old, node.target = node.target, d.chance.choice(near)
    return f"{node}: {node.target} instead of {old}"


def add_option(d: Draft) -> str:
    node = d.site()
    if d.chance.random() < 0.5:
        node.kwargs = {**node.kwargs, **d.chance.choice(OPTIONS)}
    else:
        node.args = (*node.args, d.chance.choice((True, False, 0, 1, 2.0, None)))
    return f"{node}: now {node.args}{node.kwargs}"


def exchange_placeholders(d: Draft) -> str:
    """Their readers, the places of both in the graph, in what is declared, or in both."""
    nodes = [n for n in d.graph.nodes if n.op == "placeholder"]
    if len(nodes) < 2:
        return ""
    last = nodes[-5:] if d.chance.random() < ON_THE_TAIL else nodes
    one, other = sorted(d.chance.sample(last, 2), key=nodes.index)
    how = d.chance.choice(("readers", "graph", "declared", "both"))
    if how == "readers":
        for user in {**one.users, **other.users}:
            for path, value in node_slots(user):
                put(user, path, {one: other, other: one}.get(value, value))
        return f"{one} and {other} change readers"
    a, b = nodes.index(one), nodes.index(other)
    if how != "declared":
        nodes[a - 1].append(other) if a else nodes[0].prepend(other)
        nodes[b - 1].append(one) if b - 1 > a else other.append(one)
    if how != "graph":
        d.inputs[a], d.inputs[b] = d.inputs[b], d.inputs[a]
    return f"{one} and {other} change places ({how})"


def change_output(d: Draft) -> str:
    output = d.graph.output_node()
    new = d.earlier(output, d.chance.choice(output.all_input_nodes))
    output.args = (d.chance.choice(((new,), new, ((new,),), [new])),)
    return f"the output is {output.args[0]}"


def add_output(d: Draft) -> str:
    output = d.graph.output_node()
    here: Any = output.args[0]
    new = d.earlier(output, d.chance.choice(output.all_input_nodes))
    both = [*here, new] if isinstance(here, (list, tuple)) else [here, new]
    d.chance.shuffle(both)
    output.args = (tuple(both),)
    return f"the outputs are {both}"


Edit = Callable[[Draft], str]
KINDS: dict[str, Edit] = {
    edit.__name__: edit
    for edit in (
        swap_inputs, rewire, drop, duplicate, insert, change_constant, change_operator, add_option, exchange_placeholders,
        change_output, add_output,
    )
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Edited:
    joint: JointGraph
    text: str
    said: tuple[tuple[str, str], ...]  # the kinds of the edits, and what they were


def edited(
    joint: JointGraph, text: str, sizes: dict[str, Any], chance: random.Random, on_the_tail: float = ON_THE_TAIL
) -> Edited:
    """The graph with one to three random edits; its text, or its inputs, are never those of the original (``text``)."""
    while True:
        draft, said, wanted = Draft(joint, sizes, chance, on_the_tail), list[tuple[str, str]](), chance.choice((1, 1, 2, 3))
        while len(said) < wanted:
            kind = chance.choice(list(KINDS))
            if what := KINDS[kind](draft):
                said.append((kind, what))
        result = draft.done()
        if (now := result.text()) != text or result.inputs != joint.inputs:
            return Edited(result, now, tuple(said))
