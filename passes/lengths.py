"""Two captures at padded lengths T1 and T2 become one graph for every length between the checked ones (design §3).

Node by node the two must hold the same operators; an integer that differs between them is ``k T^2`` or ``a T + b`` with
integer ``k, a, b``, or the length behind a convolution (times the batch where the batch was flattened into it). Anything
else is refused by name. Two points prove no line: ``check_meaning`` runs the graph at lengths that neither capture saw.
T is the size of a declared dimension of the batch, a padded length: public (design §6), so it may also be a value (the
divisor of a mean over tokens).
"""

from __future__ import annotations

import collections
import dataclasses
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import fx

from .errors import CompileRefused
from .joint_graph import DynamicLength, Extent, JointGraph, Role, Source, finish, rows_at_capture
from .torch_private import leaf_names, tree_flatten, tree_unflatten
from .unify import where

aten = torch.ops.aten
ADVICE = "Compile once per length instead (without dynamic_shapes)."


def at_length(x: torch.Tensor, dim: int, length: int) -> torch.Tensor:
    """Made-up data of another length: cut, or repeated from its start."""
    return x.index_select(dim, torch.arange(length, device=x.device) % x.shape[dim])


def resized(
    leaves: Sequence[torch.Tensor], names: Sequence[str], dynamic: DynamicLength, length: int
) -> list[torch.Tensor]:
    """The batch's leaves, the marked dimensions of this length."""
    return [
        at_length(x, dynamic.dims[n], length) if n in dynamic.dims else x for n, x in zip(names, leaves, strict=True)
    ]


def coefficients(x: int, y: int, lengths: tuple[int, int]) -> tuple[int, int, int] | None:
    """``(c0, c1, c2)``, one of ``k T^2`` and ``a T + b``, with the value x at the first length and y at the second."""
    (one, two), step = lengths, lengths[1] - lengths[0]
    if x and x % one**2 == 0 and y == x // one**2 * two**2:
        return 0, 0, x // one**2
    slope, rest = divmod(y - x, step)
    return None if rest else (x - slope * one, slope, 0)


class Sizes:
    """Nodes of one graph for public sizes that depend on the length, made on demand behind its placeholders."""

    def __init__(self, graph: fx.Graph, dynamic: DynamicLength, first: fx.Node, dim: int, after: fx.Node) -> None:
        self.graph, self.dynamic, self._first, self._dim, self._last = graph, dynamic, first, dim, after
        self._made: dict[Any, fx.Node] = {}
        self._learnt: dict[tuple[int, int], fx.Node] = {}

    def _call(self, key: Any, target: Any, *args: Any) -> fx.Node:
        if key not in self._made:
            with self.graph.inserting_after(self._last):
                self._last = self._made[key] = self.graph.call_function(target, args)
        return self._made[key]

    def _length(self) -> fx.Node:
        return self._call("T", aten.sym_size.int, self._first, self._dim)

    def size(self, x: int, y: int) -> int | fx.Node | None:
        """What is x at the first captured length and y at the second; None where it is neither line nor square."""
        if x == y:
            return int(x)
        if (x, y) in self._learnt:
            return self._learnt[x, y]
        found = coefficients(x, y, self.dynamic.captured)
        if found is None:
            return None
        offset, slope, square = found
        if square:
            node = self._call("TT", operator.mul, self._length(), self._length())
            return node if square == 1 else self._call(("TT", square), operator.mul, node, square)
        node = self._length() if slope == 1 else self._call(("T", slope), operator.mul, self._length(), slope)
        return node if not offset else self._call(("T", slope, offset), operator.add, node, offset)

    def learn(self, x: fx.Node, y: fx.Node) -> None:
        """``(L + 2 p - d (k - 1) - 1) // s + 1``: the length behind a convolution, from the length L before it."""
        args: Any = x.args
        if x.target is not aten.convolution.default or args[6]:
            return
        (source, weight, _, *options), source_y = args[:6], y.args[0]
        shapes: Any = [getattr(n, "meta", {}).get("shape") for n in (source, source_y, x, y, weight)]
        if any(s is None for s in shapes):
            return
        before, before_y, after, after_y, kernel = (s[2:] for s in shapes)
        for i, (old, old_y, new, new_y) in enumerate(zip(before, before_y, after, after_y, strict=True)):
            stride, padding, dilation = (o[i % len(o)] for o in options)
            base = self.size(old, old_y)
            if new == new_y or (old, old_y) == (new, new_y) or not isinstance(base, fx.Node):
                continue
            shift = 2 * padding - dilation * (kernel[i] - 1) - 1
            whole = self._call((base, shift), operator.add, base, shift)
            parts = self._call((base, shift, stride), operator.floordiv, whole, stride)
            self._learnt[new, new_y] = self._call((base, shift, stride, 1), operator.add, parts, 1)

    def batch(self, x: int, y: int) -> fx.Node | None:
        """The batch size times what is x at the first captured length and y at the second."""
        rows = self._call("B", aten.sym_size.int, self._first, 0)
        if x == y == 1:
            return rows
        factor = self.size(x, y)
        return None if factor is None else self._call(("B", factor), operator.mul, rows, factor)


def sizes_of(graph: fx.Graph, joint: JointGraph) -> Sizes:
    """:class:`Sizes` for a graph that has ``joint``'s placeholders."""
    assert joint.length is not None
    nodes = [n for n in graph.nodes if n.op == "placeholder"]
    first = next(i for i in joint.with_role(Role.BATCH) if i.target in joint.length.dims)
    place = next(n for n in nodes if n.name == first.name)
    return Sizes(graph, joint.length, place, joint.length.dims[first.target], nodes[-1])


def any_length(capture: Callable[[Source], JointGraph], source: Source) -> JointGraph:
    """One joint graph from the captures at the two lengths of ``source.length``."""
    dynamic = source.length
    assert dynamic is not None
    leaves, spec = tree_flatten(source.example_batch)
    names = leaf_names(source.example_batch)
    joints = []
    for length in dynamic.captured:
        batch = tree_unflatten(resized(leaves, names, dynamic, length), spec)
        joints.append(capture(dataclasses.replace(source, example_batch=batch, length=None)))
    one, two = joints
    _same_state(one, two, dynamic.captured)
    graph = _unify(one, two, dynamic)
    return dataclasses.replace(one, module=finish(graph), length=dynamic, source=source)


def _same_state(one: JointGraph, two: JointGraph, lengths: tuple[int, int]) -> None:
    mine, theirs = ([(i.role, i.target) for i in j.inputs] for j in (one, two))
    if mine != theirs or one.targets != two.targets or one.added != two.added:
        odd = sorted({t for _, t in mine} ^ {t for _, t in theirs}) or ["their order"]
        raise CompileRefused(
            f"dynamic_shapes: the captures at the lengths {lengths[0]} and {lengths[1]} have other inputs ({odd[0]}): the "
            f"model keeps a constant or uses a parameter at some lengths only. {ADVICE}"
        )
    new = {b.name for b in one.added}
    for name, x in one.state.items():
        y = two.state[name]
        if x is not y and name not in new and not (x.shape == y.shape and x.dtype == y.dtype and torch.equal(x, y)):
            raise CompileRefused(
                f"dynamic_shapes: the constant {name!r} that the model computes outside its graph is {list(x.shape)} at the "
                f"length {lengths[0]} and {list(y.shape)} or of other values at {lengths[1]}, so one graph cannot hold it. "
                f"{ADVICE}"
            )


def _symbols(graph: fx.Graph) -> dict[fx.Node, int]:
    """The batch size of a captured graph and its multiples, by their factor."""
    found: dict[fx.Node, int] = {}
    for node in graph.nodes:
        if node.target is aten.sym_size.int:
            found[node] = 1
        elif node.target is operator.mul and node.args[0] in found:
            found[node] = int(node.args[1])
    return found


def _unify(one: JointGraph, two: JointGraph, dynamic: DynamicLength) -> fx.Graph:
    factors, factors_two = _symbols(one.module.graph), _symbols(two.module.graph)
    a = [n for n in one.module.graph.nodes if n not in factors]
    b = [n for n in two.module.graph.nodes if n not in factors_two]
    lengths = dynamic.captured
    if [n.target for n in a if n.op == "call_function"] != [n.target for n in b if n.op == "call_function"]:
        raise CompileRefused(_other_operators(a, b, lengths))
    graph, mapping = fx.Graph(), dict[fx.Node, fx.Node]()
    place, place_two = ({n: i for i, n in enumerate(nodes)} for nodes in (a, b))
    for x in a:
        if x.op == "placeholder":
            mapping[x] = graph.placeholder(x.name)
    sizes = sizes_of(graph, dataclasses.replace(one, length=dynamic))
    rows = tuple(rows_at_capture(j) for j in (one, two))

    def merge(x: Any, y: Any, node: fx.Node) -> Any:
        found: Any = None
        if isinstance(x, fx.Node) and isinstance(y, fx.Node):
            if x in factors and y in factors_two:
                found = sizes.batch(factors[x], factors_two[y])
            elif x not in factors and y not in factors_two and place[x] == place_two[y]:
                return mapping[x]
        elif isinstance(x, (list, tuple)) and isinstance(y, (list, tuple)) and len(x) == len(y):
            return [merge(p, q, node) for p, q in zip(x, y, strict=True)]
        elif type(x) is type(y) and (x == y or (x != x and y != y)):
            return x
        elif type(x) is int and type(y) is int:
            found = sizes.size(x, y)
        if found is None:
            raise CompileRefused(
                f"dynamic_shapes: the operator {node.target} takes {_shown(x, factors)} at the length {lengths[0]} and "
                f"{_shown(y, factors_two)} at {lengths[1]}, which is no multiple of the length plus a constant."
                f"{where(node)} {ADVICE}"
            )
        return found

    for x, y in zip(a, b, strict=True):
        if x.op == "output":
            graph.output(tuple(merge(x.args[0], y.args[0], x)))
            continue
        if x.op == "call_function":
            if x.kwargs.keys() != y.kwargs.keys():
                raise CompileRefused(_other_operators(a, b, lengths))
            kwargs = {k: merge(v, y.kwargs[k], x) for k, v in x.kwargs.items()}
            mapping[x] = graph.create_node(x.op, x.target, tuple(merge(x.args, y.args, x)), kwargs, name=x.name)
            sizes.learn(x, y)
        mapping[x].meta.update(_meta(x, y, rows))
    return graph


def _meta(x: fx.Node, y: fx.Node, rows: Sequence[int]) -> dict[str, Any]:
    """The first capture's, its shape telling sizes that depend on the length from those that do not."""
    meta = dict(x.meta)
    if meta.get("shape") is not None and y.meta.get("shape") is not None:
        pairs = zip(meta["shape"], y.meta["shape"], strict=True)
        meta["shape"] = tuple(_extent(p, q, rows) for p, q in pairs)
    return meta


def _extent(x: int, y: int, rows: Sequence[int]) -> int:
    batched = x and y and x % rows[0] == 0 and y % rows[1] == 0
    if x // rows[0] == y // rows[1] if batched else x == y:
        return x
    return Extent(x, y)


def _shown(x: Any, factors: Mapping[fx.Node, int]) -> str:
    return f"{factors[x]} times the batch" if isinstance(x, fx.Node) and x in factors else repr(x)


def _other_operators(a: list[fx.Node], b: list[fx.Node], lengths: tuple[int, int]) -> str:
    """Names the operators that occur more often at one length, or the first place where the two graphs part."""
    counts = collections.Counter(str(n.target) for n in a if n.op == "call_function")
    counts.subtract(str(n.target) for n in b if n.op == "call_function")
    odd = [op for op, count in counts.most_common() if count] or ["another order of them"]
    calls = [[n for n in nodes if n.op == "call_function"] for nodes in (a, b)]
    parted = next((x for x, y in zip(*calls, strict=False) if x.target != y.target), calls[0][-1])
    loop = "a loop over the sequence, or " if len(a) != len(b) else ""
    return (
        f"dynamic_shapes: the captures at the lengths {lengths[0]} and {lengths[1]} differ in their operators "
        f"({', '.join(odd[:5])}): {loop}a branch on the length. They part at {parted.target}.{where(parted)} {ADVICE}"
    )
