"""Pass 4, clip: per-sample gradients become one accumulated sum of clipped gradients (design §6).

    B         = the length of sample_mask: every view says [B, ..] and none -1, so a record has one row, one norm, one factor
    G [B, D]  = gradients side by side, float32 (float64 for float64 models); a block: neighbours of one layer
    n_l [B]   = sqrt(sum_d G^2) in float64, over exactly the values that are summed, of every layer l (flat: one layer)
    keep [B]  = (sample_mask != 0) and (sum_l n_l^2 < 1e60)   NaN, inf and absurd norms contribute exactly zero
    c_l [B]   = R_l / max(n_l, R_l)   (flat, per layer)   or   R / (n + gamma)   (AUTO-S)
                or   R / n with keep also asking n^2 > 1e-24   (AUTO-V)
                a layer with ghosts (``ghost_sum``): n_l at least 1/100 of their bound, keep also asking |G|^2 + |A|^2 < 1e40
    out [D]   = accumulator + [1, B] @ [B, D] of (where(keep, c_l, 0), where(keep, G, 0)), block by block
                on the grid of unit g: accumulator + sum_b trunc(where(keep, G, 0) * where(keep, c_l (1 - 2^-20) / g, 0)),
                whole numbers in float64, so the sum is exact

Guarantee: adding or removing one row changes ``out`` by at most R = sqrt(sum_l R_l^2) in L2 in real numbers; what float32
rounding adds to it, ``numerics.slack``, the noise pays for. The loss output is dropped: it is private and never released.
The weighted sum is written ``[1, B] @ [B, D]`` because ONNX Runtime miscompiles ``Xt @ v``.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import fx

from .clipping import SMALLEST_SQUARED_NORM, AutomaticClipping, AutoVClipping, Clipping, Layer
from .errors import CompileRefused
from .ghost_sum import LARGEST_FACTORS, LEAST_SHARE, Ghost, GhostSum
from .joint_graph import Input, JointGraph, Role, copy_graph, finish, rows_at_capture

aten = torch.ops.aten
LARGEST_SQUARED_NORM = 1e60


def clip(joint: JointGraph) -> JointGraph:
    """``(.., batch, sample_mask [B], accumulator [D]) -> accumulator' [D]``."""
    clipping = joint.clipping
    if clipping is None:
        raise CompileRefused(
            "No clipping was given; use AutomaticClipping(max_grad_norm) or FlatClipping(max_grad_norm)."
        )
    try:
        layers = clipping.layers([t.name for t in joint.targets])
    except ValueError as error:
        raise CompileRefused(str(error)) from error
    if joint.noise is not None and joint.grid and not joint.noise.noise_multiplier > 0:
        raise CompileRefused(
            f"noise_multiplier must be a positive finite number, got {joint.noise.noise_multiplier!r}: the grid is a share "
            "of the noise."
        )
    graph, mapping = copy_graph(joint.module)
    output = graph.output_node()
    gradients: Any = output.args[0][1:]  # type: ignore[index]
    last = [n for n in graph.nodes if n.op == "placeholder"][-1]
    with graph.inserting_after(last):
        mask = graph.placeholder("sample_mask")
    with graph.inserting_after(mask):
        accumulator = graph.placeholder("accumulator")
    loss: Any = output.args[0][0]  # type: ignore[index]
    _forget(graph, loss, mapping[joint.placeholder(joint.with_role(Role.BATCH)[0].name)])
    with graph.inserting_before(output):
        total = _Tail(graph, joint, clipping, layers).build(gradients, mask)
        output.args = ((graph.call_function(aten.add.Tensor, (accumulator, total)),),)
    inputs = (
        *joint.inputs,
        Input(mask.name, Role.MASK, "sample_mask"),
        Input(accumulator.name, Role.ACCUMULATOR, "accumulator"),
    )
    return dataclasses.replace(joint, module=finish(graph), inputs=inputs)


def _forget(graph: fx.Graph, loss: fx.Node, batch: fx.Node) -> None:
    """The cotangent ``ones_like(loss) [B]`` reads the loss for its shape alone: as ones of the batch's size it lets the loss
    die with its output. Nothing is computed of a record that is not summed, so nothing else can fail on what it holds."""
    for reader in list(loss.users):
        if reader.target is aten.ones_like.default and "dtype" in loss.meta:
            with graph.inserting_before(reader):
                size = graph.call_function(aten.sym_size.int, (batch, 0))
                ones = graph.call_function(aten.new_ones.default, (batch, [size]), {"dtype": loss.meta["dtype"]})
            ones.meta = dict(reader.meta)
            reader.replace_all_uses_with(ones)
            graph.erase_node(reader)


def blocks(layers: tuple[Layer, ...], ghosts: set[int]) -> list[tuple[int, list[int]]]:
    """Runs of neighbouring trainables of one layer: ``(layer, members)``, which share a matrix of rows; a ghost has none."""
    home = {member: at for at, layer in enumerate(layers) for member in layer.members}
    runs: list[tuple[int, list[int]]] = []
    for member in sorted(home):
        alone = member in ghosts or (runs and runs[-1][1][-1] in ghosts)
        if runs and runs[-1][0] == home[member] and not alone:
            runs[-1][1].append(member)
        else:
            runs.append((home[member], [member]))
    return runs


class _Tail:
    """Writes the closed template of ``template.match_clip``, node for node."""

    def __init__(self, graph: fx.Graph, joint: JointGraph, clipping: Clipping, layers: tuple[Layer, ...]) -> None:
        self.graph, self.joint, self.clipping, self.layers = graph, joint, clipping, layers

    def call(self, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        return self.graph.call_function(target, args, kwargs)

    def sum(self, terms: list[fx.Node]) -> fx.Node:
        """``sum_k terms_k`` of vectors [B]."""
        return (
            terms[0]
            if len(terms) == 1
            else self.call(aten.sum.dim_IntList, self.call(aten.stack.default, terms, 1), [1])
        )

    def build(self, gradients: list[Any], mask: fx.Node) -> fx.Node:
        self.count = self.call(aten.sym_size.int, mask, 0)
        ghosts = {
            i: GhostSum(self.graph, Ghost(*g), self.count) for i, g in enumerate(gradients) if isinstance(g, tuple)
        }
        runs = blocks(self.layers, set(ghosts))
        sides = [ghosts.get(members[0]) or self.side(gradients, members) for _, members in runs]
        squares: list[list[fx.Node]] = [[] for _ in self.layers]
        bounds: list[list[fx.Node]] = [[] for _ in self.layers]
        for (layer, _), side in zip(runs, sides, strict=True):
            if isinstance(side, GhostSum):
                squares[layer].append(side.squared)
                bounds[layer].append(side.bound)
            else:
                squares[layer].append(self.squared(side))
        squared = [self.floored(s, b) for s, b in zip(squares, bounds, strict=True)]
        keep = self.keep(mask, self.sum(squared), [t for g in ghosts.values() for t in g.traces])
        column = self.call(aten.unsqueeze.default, keep, 1)
        weights = [self.weights(keep, n, layer.bound) for n, layer in zip(squared, self.layers, strict=True)]
        sums = [
            side.weighted(column, weights[layer])
            if isinstance(side, GhostSum)
            else self.weighted(weights[layer], self.call(aten.where.ScalarOther, column, side, 0.0))
            for (layer, _), side in zip(runs, sides, strict=True)
        ]
        whole = sums[0] if len(sums) == 1 else self.call(aten.cat.default, sums, 1)
        return self.call(aten.reshape.default, whole, [self.joint.num_trainable])

    def floored(self, squares: list[fx.Node], bounds: list[fx.Node]) -> fx.Node:
        if not bounds:
            return self.sum(squares)
        return self.call(
            aten.maximum.default, self.sum(squares), self.call(aten.mul.Scalar, self.sum(bounds), LEAST_SHARE)
        )

    def side(self, gradients: list[Any], members: list[int]) -> fx.Node:
        """The block's gradients side by side: ``[B, sum_k numel_k]``."""
        targets = [self.joint.targets[m] for m in members]
        views = [
            self.call(aten.reshape.default, gradients[m], [self.count, self.joint.targets[m].numel]) for m in members
        ]
        side = self.call(aten.cat.default, views, 1)
        if any(t.dtype != self.joint.flat_dtype for t in targets):
            side = self.call(aten._to_copy.default, side, dtype=self.joint.flat_dtype)
        width = sum(t.numel for t in targets)
        side.meta = {"shape": (rows_at_capture(self.joint), width), "dtype": self.joint.flat_dtype}
        return side

    def squared(self, side: fx.Node) -> fx.Node:
        wide = self.call(aten._to_copy.default, side, dtype=torch.float64)
        squares = self.call(aten.mul.Tensor, wide, wide)
        wide.meta = squares.meta = {**side.meta, "dtype": torch.float64}
        return self.call(aten.sum.dim_IntList, squares, [1])

    def keep(self, mask: fx.Node, squared: fx.Node, factors: list[fx.Node]) -> fx.Node:
        sane = self.call(aten.lt.Scalar, squared, LARGEST_SQUARED_NORM)
        if type(self.clipping) is AutoVClipping:
            sane = self.call(aten.logical_and.default, sane, self.call(aten.gt.Scalar, squared, SMALLEST_SQUARED_NORM))
        if factors:
            below = self.call(aten.lt.Scalar, self.sum(factors), LARGEST_FACTORS)
            sane = self.call(aten.logical_and.default, sane, below)
        return self.call(aten.logical_and.default, self.call(aten.ne.Scalar, mask, 0), sane)

    def weighted(self, weights: fx.Node, rows: fx.Node) -> fx.Node:
        """``[1, D']``: the weighted sum; on the grid every weighted row is rounded toward zero before it is added."""
        if not self.joint.grid:
            return self.call(aten.mm.default, weights, rows)
        whole = self.call(aten.trunc.default, self.call(aten.mul.Tensor, rows, weights))
        return self.call(aten.unsqueeze.default, self.call(aten.sum.dim_IntList, whole, [0]), 0)

    def weights(self, keep: fx.Node, squared: fx.Node, bound: float) -> fx.Node:
        """``where(keep, c, 0)`` as ``[1, B]``; on the grid in its units, and as ``[B, 1]``."""
        below = self.call(aten.sqrt.default, squared)
        if isinstance(self.clipping, AutomaticClipping):
            below = self.call(aten.add.Scalar, below, self.clipping.gamma)
        elif type(self.clipping) is not AutoVClipping:
            below = self.call(aten.clamp_min.default, below, bound)
        factor = self.call(aten.mul.Scalar, self.call(aten.reciprocal.default, below), self.joint.factor(bound))
        kept = self.call(aten.where.ScalarOther, keep, factor, 0.0)
        narrow = self.call(aten._to_copy.default, kept, dtype=self.joint.flat_dtype)
        return self.call(aten.unsqueeze.default, narrow, int(self.joint.grid))
