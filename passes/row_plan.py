"""Which nodes of a joint graph need compute only some rows of a sample's own axis: the plan of ``dead_tokens``."""

from __future__ import annotations

import heapq
import operator
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import fx

from . import row_wise
from .joint_graph import Extent, JointGraph, rows_at_capture
from .row_wise import ATTENTION, ATTENTION_BACKWARD, KEPT, ZEROS, Axis, shape_of

aten = torch.ops.aten
READS = (aten.select.int, aten.slice.Tensor)
PADS = (aten.select_backward.default, aten.slice_backward.default)
Needs = dict[int | str, Axis | None]


class Rows(NamedTuple):
    """``start : stop`` of an axis of ``length`` rows."""

    length: int
    start: int
    stop: int


def rows_read(node: fx.Node, batch: int) -> Rows | None:
    """Of a select or a slice with public ends that leaves some rows of a sample's own axis out; ``batch`` rows at capture."""
    args: Any = node.args
    shape = shape_of(args[0]) if node.target in READS else None
    if shape is None or node.kwargs or not all(type(a) is int for a in args[1:]):
        return None
    dim = args[1] % len(shape)
    length, fixed = shape[dim], not isinstance(args[0].meta["shape"][dim], Extent)
    if node.target is aten.select.int:
        start, stop = args[2], args[2] + 1
    else:
        start, stop = args[2] if len(args) > 2 else 0, args[3] if len(args) > 3 else length
        if len(args) > 4 and args[4] != 1:
            return None
    if fixed:
        start, stop = (min(x + length * (x < 0), length) for x in (start, stop))
        stop = length if node.target is aten.select.int and stop == 0 else stop
    some = 0 <= start < stop <= length and stop - start < length
    return Rows(length, start, stop) if some and length % batch else None


class RowPlan:
    """Which nodes compute the rows alone (``narrow``), and which compute all from operands of which some are narrow.

    ``pads``: narrow because they are zero elsewhere. ``sums``: over all rows of such. ``split``: addmm of all rows and a
    product that is zero elsewhere.
    """

    def __init__(self, graph: fx.Graph, rows: Rows, joint: JointGraph) -> None:
        self.rows, self.nodes = rows, list(graph.nodes)
        self.place = {n: i for i, n in enumerate(self.nodes)}
        batch = rows_at_capture(joint)
        self.reads = [n for n in self.nodes if n.target in READS and rows_read(n, batch) == rows]
        self.narrow: dict[fx.Node, Axis] = {}
        self.sums: dict[fx.Node, Needs] = {}
        self.split: dict[fx.Node, Axis] = {}
        self._sweep([n for n in self.nodes if n.target in PADS], self._pad, 1)
        self.pads = dict(self.narrow)
        asking = (*self.reads, *self.narrow, *self.sums, *self.split)
        self._sweep([x for n in asking for x in n.all_input_nodes], self._demand, -1)
        for node in list(self.narrow):  # one result of several, of which others are whole: it is cut out of its own
            if node.target is operator.getitem and node.args[0] not in self.narrow:
                del self.narrow[node]

    def _sweep(self, first: list[fx.Node], visit: Callable[[fx.Node], None], way: int) -> None:
        """Visits these in the graph's order (``way`` 1) or against it (-1), and what lies behind each that became narrow."""
        heap = sorted({way * self.place[n] for n in first})
        seen: set[int] = set()
        while heap:
            at = heapq.heappop(heap)
            if at in seen:
                continue
            seen.add(at)
            node = self.nodes[way * at]
            visit(node)
            if node in self.narrow:
                for n in node.users if way > 0 else node.all_input_nodes:
                    heapq.heappush(heap, way * self.place[n])

    def _pad(self, node: fx.Node) -> None:
        args: Any = node.args
        if node.target in PADS:
            axis = padding(node, self.rows)
            if axis is not None:
                self.narrow[node] = axis
            return
        if node.op != "call_function" or not any(a in self.narrow for a in args if isinstance(a, fx.Node)):
            return
        if node.target is operator.getitem and args[0].target in KEPT and args[1] != KEPT[args[0].target]:
            return  # a sum over rows
        for places in ZEROS.get(node.target, ()):
            operands = [args[p] for p in places]
            if all(isinstance(x, fx.Node) and x in self.narrow for x in operands):
                found = [row_wise.result(node, p, self.narrow[args[p]], self.rows.length) for p in places]
                if found[0] is not None and found.count(found[0]) == len(found) and self._allowed(node):
                    self.narrow[node] = found[0]
                    return
        for place, x in enumerate(args):
            axis = self.narrow.get(x) if isinstance(x, fx.Node) else None
            if axis is None:
                continue
            needs = row_wise.contracted(node, place, axis)
            if needs is not None:
                self.sums[node] = needs
                return
            if node.target is aten.addmm.default and place == 1 and axis.dim == 0:
                self.split[node] = axis
                return

    def _allowed(self, node: fx.Node) -> bool:
        if node.target not in (ATTENTION, ATTENTION_BACKWARD) or not row_wise.is_causal(node):
            return True
        keys: Any = shape_of(node.args[2 if node.target is ATTENTION_BACKWARD else 1])
        return keys is not None and (keys[2], self.rows.stop - self.rows.start) == (self.rows.stop, 1) and (
            self.rows.stop == self.rows.length
        )  # fmt: skip

    def needs(self, node: fx.Node) -> Needs:
        """What a node will read of its operands; an operand that is not named is read in full."""
        if node in self.narrow:
            own = {} if node.target in PADS else row_wise.operands(node, self.narrow[node], self.rows.length)
            return own or {}
        if node in self.reads:
            args: Any = node.args
            return {0: Axis(args[1] % len(args[0].meta["shape"]))}
        if node.target is operator.getitem and node.all_input_nodes[0] in self.pads:
            return {0: self.pads[node.all_input_nodes[0]]}
        return {1: self.split[node]} if node in self.split else self.sums.get(node, {})

    def _demand(self, node: fx.Node) -> None:
        if node.op != "call_function" or node in self.narrow or node in self.sums or node in self.split:
            return
        wanted = {
            self.needs(user).get(key) for user in node.users for key, x in row_wise.arguments(user) if _holds(x, node)
        }
        axis = wanted.pop() if len(wanted) == 1 else None
        known = axis is not None and row_wise.operands(node, axis, self.rows.length) is not None
        if axis is not None and known and node.target not in READS + PADS and self._allowed(node):
            self.narrow[node] = axis

    def obstacle(self) -> str:
        """Why an activation is computed whole although the gradient that comes back to it is zero in other rows."""
        if not any(padding(n, self.rows) for n in self.pads if n.target in PADS):
            return ""
        for read in self.reads:
            source: Any = read.args[0]
            source = source.args[0] if source.target is operator.getitem else source
            if source not in self.narrow and source.op == "call_function":
                others = {u.target for u in source.users if u not in self.reads} - {operator.getitem}
                if not others & set(READS):  # else the axis is no row of tokens: queries, keys and values side by side
                    return f"{min(map(str, others))} reads them" if others else f"{source.target} is not row by row"
        return ""


def _holds(value: Any, node: fx.Node) -> bool:
    return value is node or (isinstance(value, (list, tuple)) and any(_holds(v, node) for v in value))


def padding(node: fx.Node, rows: Rows) -> Axis | None:
    """The axis of a ``select_backward`` or ``slice_backward`` that puts these rows back."""
    args: Any = node.args
    shape = shape_of(node)
    if shape is None or not all(type(a) is int for a in args[2:]):
        return None
    dim = args[2] % len(shape)
    start = args[3] + shape[dim] * (args[3] < 0)
    stop = start + 1
    if node.target is aten.slice_backward.default:
        stop = min(args[4] + shape[dim] * (args[4] < 0), shape[dim])
        if args[5] != 1:
            return None
    return Axis(dim) if Rows(shape[dim], start, stop) == rows else None
