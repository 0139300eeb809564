"""Writes a plan of ``row_plan`` into its graph."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

from . import row_wise
from .joint_graph import Extent, JointGraph, Role, rows_at_capture
from .lengths import sizes_of
from .row_plan import PADS, RowPlan
from .row_wise import ATTENTION, ATTENTION_BACKWARD, MOVES, NORM_BACKWARD, Axis
from .views import VIEWS

aten = torch.ops.aten
CONTIGUOUS = {"memory_format": torch.contiguous_format}
# What a forward kernel saved: some backward kernels read its memory without looking at its strides.
SAVED: dict[Any, tuple[int, int]] = {NORM_BACKWARD: (3, 4), ATTENTION_BACKWARD: (4, 5)}


class NoSize(Exception):
    """A size of the rewritten graph has no node; the rows are left as they were."""


class RowWriter:
    """What every node of the plan becomes; the whole nodes that nobody reads any more are erased."""

    def __init__(self, graph: fx.Graph, joint: JointGraph, plan: RowPlan) -> None:
        self.graph, self.plan, self.rows = graph, plan, plan.rows
        self.small: dict[tuple[fx.Node, Axis], fx.Node] = {}
        self.whole: dict[fx.Node, fx.Node] = {}
        self.multiples: dict[int, fx.Node] = {}
        self.batch = rows_at_capture(joint)
        self.lengths = sizes_of(graph, joint) if joint.length is not None else None
        batch = {joint.placeholder(i.name).name for i in joint.with_role(Role.BATCH)}
        for node in graph.nodes:
            if node.target is aten.sym_size.int and node.args[1] == 0 and node.args[0].name in batch:
                self.multiples[1] = node
                break
        else:
            places = [n for n in graph.nodes if n.op == "placeholder"]
            with graph.inserting_after(places[-1]):
                first = next(n for n in places if n.name in batch)
                self.multiples[1] = graph.call_function(aten.sym_size.int, (first, 0))

    def run(self) -> None:
        plan = self.plan
        live = [n for n in plan.nodes if n.users]
        for node in plan.nodes:
            with self.graph.inserting_before(node):
                if node in plan.narrow:
                    axis = plan.narrow[node]
                    self.small[node, axis] = self._pad_source(node) if node.target in PADS else self._emit(node, axis)
                elif node in plan.reads:
                    self._read(node)
                elif node in plan.split:
                    self._split(node)
                elif node.op in ("call_function", "output"):
                    needs: Any = plan.needs(node)
                    node.args = tuple(self._operand(x, needs.get(i)) for i, x in enumerate(node.args))
                    node.kwargs = {k: self._operand(x, needs.get(k)) for k, x in node.kwargs.items()}
        for node in reversed(live):  # fx takes attention for random, and would keep it
            if not node.users and node.op == "call_function":
                self.graph.erase_node(node)

    def _operand(self, x: Any, axis: Axis | None) -> Any:
        if isinstance(x, fx.Node):
            return self._full(x) if axis is None else self._rows_of(x, axis)
        return fx.node.map_arg(x, self._full)

    def _call(self, like: fx.Node, shape: list[Any], target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        new = self.graph.call_function(target, args, kwargs)
        new.meta.update(like.meta)
        if "shape" in like.meta:
            new.meta["shape"] = tuple(shape)
        return new

    def _multiple(self, factor: int) -> fx.Node:
        if factor not in self.multiples:
            with self.graph.inserting_after(self.multiples[1]):
                self.multiples[factor] = self.graph.call_function(operator.mul, (self.multiples[1], factor))
        return self.multiples[factor]

    def _sizes(self, shape: list[Any], view: bool = True) -> list[Any]:
        """What a reshape takes for a shape at capture: the batch and the length as nodes, -1 for one made of both."""
        found: list[Any] = []
        for size in shape:
            if int(size) and int(size) % self.batch == 0:
                if isinstance(size, Extent) and (not view or -1 in found):
                    raise NoSize
                found.append(-1 if isinstance(size, Extent) else self._multiple(int(size) // self.batch))
            elif isinstance(size, Extent):
                known = self.lengths.size(int(size), size.other) if self.lengths is not None else None
                if known is None:
                    raise NoSize
                found.append(known)
            else:
                found.append(int(size))
        return found

    def _narrow_shape(self, node: fx.Node, axis: Axis) -> list[Any]:
        shape = list(node.meta.get("shape") or ())
        if shape:
            shape[axis.dim] = axis.outer * (self.rows.stop - self.rows.start) * axis.inner
        return shape

    def _split_shape(self, node: fx.Node, axis: Axis, length: Any) -> list[Any]:
        shape = list(node.meta["shape"])
        return [*shape[: axis.dim], axis.outer, length, axis.inner, *shape[axis.dim + 1 :]]

    def _length(self) -> Any:
        args: Any = self.plan.reads[0].args
        return args[0].meta["shape"][args[1] % len(args[0].meta["shape"])]

    def _rows_of(self, node: fx.Node, axis: Axis) -> fx.Node:
        """The rows of a node: computed alone, or cut out, as far up as it is only views."""
        if (node, axis) not in self.small:
            if node.target in MOVES and row_wise.operands(node, axis, self.rows.length) is not None:
                self.small[node, axis] = self._emit(node, axis)
            else:
                self.small[node, axis] = self._cut(node, axis)
        return self.small[node, axis]

    def _cut(self, node: fx.Node, axis: Axis) -> fx.Node:
        source, dim, shape = self._full(node), axis.dim, self._narrow_shape(node, axis)
        if axis[1:] != (1, 1):
            apart = self._split_shape(node, axis, self._length())
            source, dim = self._call(node, apart, aten.reshape.default, source, self._sizes(apart)), dim + 1
            few = self._split_shape(node, axis, self.rows.stop - self.rows.start)
            cut = self._call(node, few, aten.slice.Tensor, source, dim, self.rows.start, self.rows.stop)
            return self._call(node, shape, aten.reshape.default, cut, self._sizes(shape))
        return self._call(node, shape, aten.slice.Tensor, source, dim, self.rows.start, self.rows.stop)

    def _full(self, node: fx.Node) -> fx.Node:
        """All rows of a node: zeros around those of a gradient that is zero elsewhere."""
        axis = self.plan.pads.get(node)
        if axis is None or "shape" not in node.meta:
            return node
        if node not in self.whole:
            inner, dim, shape = self.small[node, axis], axis.dim, list(node.meta["shape"])
            apart = shape if axis[1:] == (1, 1) else self._split_shape(node, axis, self._length())
            if apart is not shape:
                few = self._split_shape(node, axis, self.rows.stop - self.rows.start)
                inner, dim = self._call(node, few, aten.reshape.default, inner, self._sizes(few)), dim + 1
            ends = (dim, self.rows.start, self.rows.stop, 1)
            padded = self._call(node, apart, aten.slice_backward.default, inner, self._sizes(apart, view=False), *ends)
            if apart is not shape:
                padded = self._call(node, shape, aten.reshape.default, padded, self._sizes(shape))
            self.whole[node] = padded
        return self.whole[node]

    def _pad_source(self, node: fx.Node) -> fx.Node:
        args: Any = node.args
        source = self._full(args[0])
        if node.target is aten.slice_backward.default:
            return source
        axis = self.plan.narrow[node]
        return self._call(node, self._narrow_shape(node, axis), aten.unsqueeze.default, source, axis.dim)

    def _read(self, node: fx.Node) -> None:
        args: Any = node.args
        few = self._rows_of(args[0], Axis(args[1] % len(args[0].meta["shape"])))
        if node.target is aten.select.int:
            few = self._call(node, list(node.meta["shape"]), aten.select.int, few, args[1], 0)
        node.replace_all_uses_with(few)

    def _split(self, node: fx.Node) -> None:
        args: Any = node.args
        axis = self.plan.split[node]
        product = self._call(
            node, self._narrow_shape(node, axis), aten.mm.default, self._rows_of(args[1], axis), self._full(args[2])
        )
        self.small[node, axis], self.plan.pads[node] = product, axis
        added = self._call(node, list(node.meta["shape"]), aten.add.Tensor, self._full(args[0]), self._full(node))
        del self.plan.pads[node]
        node.replace_all_uses_with(added)

    def _emit(self, node: fx.Node, axis: Axis) -> fx.Node:
        """The node for the rows alone."""
        places: Any = row_wise.operands(node, axis, self.rows.length)
        args: list[Any] = [self._operand(x, places.get(i)) for i, x in enumerate(node.args)]
        kwargs = {k: self._operand(x, places.get(k)) for k, x in node.kwargs.items()}
        shape = self._narrow_shape(node, axis)
        for i in SAVED.get(node.target, ()):
            if args[i].target is not operator.getitem:
                args[i] = self._call(args[i], list(args[i].meta["shape"]), aten.clone.default, args[i], **CONTIGUOUS)
        if node.target in VIEWS or node.target is aten.expand.default:
            sizes = list(args[1])
            keeps = node.target is aten.expand.default and places[0] is not None
            if keeps:
                sizes[axis.dim] = -1
            elif sizes[axis.dim] != -1:
                (sizes[axis.dim],) = self._sizes([shape[axis.dim]])
            args[1] = sizes
        if node.target in (ATTENTION, ATTENTION_BACKWARD) and row_wise.is_causal(node):
            args[7 if node.target is ATTENTION_BACKWARD else 4] = False  # the last row sees every key
        return self._call(node, shape, node.target, *args, **kwargs)
