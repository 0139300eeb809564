"""Pass 4, ghost: large gradients that are products stay products; no ``[B, p, d]`` tensor is ever made (design §5).

    bmm(G' [B, p, T], A [B, T, d])                    ->  the pair (G, A)
    scatter_add(0 [B, p, d], 1, idx [B, N], E)        ->  the pair (idx, E)               an embedding's gradient
    their sums, views and transposes                  ->  factors side by side along T or N, cross terms included

A factored gradient costs ``2 S^2`` numbers per sample, S = T + N, where a materialised one costs ``p d``: the smaller is
taken (the mixed ghost rule of Bu et al. 2022). ``clip`` then writes its norm and its weighted sum (``ghost_sum``).
The rewrite is run beside the graph it came from on the example batch before it is believed.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import torch
from torch import fx

from .errors import CompileRefused, PassError
from .ghost_sum import Ghost
from .joint_graph import Extent, JointGraph, copy_graph, finish
from .lengths import Sizes, sizes_of
from .random_draws import example
from .torch_private import tree_flatten
from .views import VIEWS

aten = torch.ops.aten
SMALLEST = 4096  # numbers: below it a few more nodes cost more than a batched product


@dataclasses.dataclass(frozen=True)
class _Product:
    """``left [B, p, T] @ right [B, T, d]``; or, turned, the same for the transposed parameter."""

    left: fx.Node
    right: fx.Node
    turned: bool

    @property
    def sizes(self) -> tuple[int, int, int]:
        (_, p, t), (_, _, d) = self.left.meta["shape"], self.right.meta["shape"]
        return (d, p, t) if self.turned else (p, d, t)


@dataclasses.dataclass(frozen=True)
class _Rows:
    """``rows [B, N, d]`` added up at ``index [B, N]`` of a table of ``count`` rows."""

    index: fx.Node
    rows: fx.Node
    count: int

    @property
    def sizes(self) -> tuple[int, int, int]:
        _, n, d = self.rows.meta["shape"]
        return self.count, d, n


def ghost(joint: JointGraph) -> JointGraph:
    """``(loss, gradient or factors ...)``; the report says for every large gradient which and why."""
    choice = joint.source.ghost_norms if joint.source is not None else None
    if joint.grid:
        if choice:
            raise CompileRefused(
                "noise='grid' rounds each record's gradient, and ghost_norms=True makes none. Leave ghost_norms out."
            )
        choice = False
    graph, _ = copy_graph(joint.module)
    output = graph.output_node()
    results: Any = output.args[0]
    loss, *gradients = results
    notes: list[tuple[str, str]] = []
    found: dict[int, Ghost] = {}
    sizes = sizes_of(graph, joint) if joint.length is not None else None
    for at, (target, node) in enumerate(zip(joint.targets, gradients, strict=True)):
        terms = None if choice is False else factors(node, joint.flat_dtype)
        fixed = terms is not None and not any(isinstance(s, Extent) for t in terms for s in t.sizes[:2])
        if (
            terms is None
            or not fixed
            or len({t.sizes[:2] for t in terms}) != 1
            or math.prod(terms[0].sizes[:2]) != target.numel
        ):
            if target.numel >= SMALLEST and choice is not False:
                notes.append(
                    (
                        target.name,
                        f"materialised: its gradient is no sum of products of one shape in {joint.flat_dtype}",
                    )
                )
            continue
        length = sum(t.sizes[2] for t in terms)
        if choice is None and not (target.numel >= SMALLEST and 2 * length**2 < target.numel):
            if target.numel >= SMALLEST:
                notes.append((target.name, f"materialised: {target.numel} numbers against 2 x {length}^2"))
            continue
        with graph.inserting_before(output):
            factored = side_by_side(graph, terms, sizes)
        if factored is None:
            notes.append((target.name, "materialised: the number of its tokens is no multiple of the padded length"))
            continue
        found[at] = factored
        kinds = ", ".join("product" if isinstance(t, _Product) else "lookup" for t in terms)
        notes.append((target.name, f"ghost norm: 2 x {length}^2 numbers instead of {target.numel} ({kinds})"))
    if not found:
        return dataclasses.replace(joint, ghosts=tuple(notes))
    rest = [found[at].outputs() if at in found else g for at, g in enumerate(gradients)]
    output.args = ((loss, *rest),)
    result = dataclasses.replace(joint, module=finish(graph), ghosts=tuple(notes))
    if joint.source is not None:
        check(joint, result)
    return result


def factors(node: Any, dtype: torch.dtype) -> list[_Product | _Rows] | None:
    """The terms of a per-sample gradient ``[B, ...]``, or None where it is something else, or of another dtype."""
    if not isinstance(node, fx.Node) or node.op != "call_function" or node.meta.get("shape") is None:
        return None
    shape = node.meta["shape"]
    args: Any = node.args
    source = args[0]
    if node.target in VIEWS or node.target is aten.clone.default:
        inner = source.meta.get("shape")
        return factors(source, dtype) if inner and inner[0] == shape[0] else None
    if node.target is aten.transpose.int or node.target is aten.permute.default:
        moved = (
            args[1] if node.target is aten.permute.default else [0, *reversed(sorted(a % len(shape) for a in args[1:]))]
        )
        terms = factors(source, dtype) if list(moved) == [0, 2, 1] and len(shape) == 3 else None
        if terms is None or any(not isinstance(t, _Product) or t.sizes[:2] != source.meta["shape"][1:] for t in terms):
            return None
        return [_Product(t.left, t.right, not t.turned) for t in terms if isinstance(t, _Product)]
    if node.target is aten.add.Tensor and not node.kwargs:
        both = [factors(x, dtype) for x in args]
        if any(b is None or x.meta["shape"] != shape for b, x in zip(both, args, strict=True)):
            return None
        return [t for b in both for t in b or ()]
    if node.meta.get("dtype") is not dtype:
        return None
    if node.target is aten.bmm.default and all(x.meta.get("shape") for x in args):
        return [_Product(args[0], args[1], False)]
    if node.target is aten.scatter_add.default and args[1] == 1 and len(shape) == 3:
        zeros, _, where, rows = args
        index = where.args[0] if where.target is aten.expand.default else where
        spread = index.target is aten.unsqueeze.default and index.args[1] in (2, -1)
        if zeros.target is aten.new_zeros.default and spread and rows.meta.get("shape"):
            return [_Rows(index.args[0], rows, shape[1])]
    return None


def side_by_side(graph: fx.Graph, terms: list[_Product | _Rows], sizes: Sizes | None = None) -> Ghost | None:
    """One ghost of several terms: ``sum_k G_k' A_k = [G_1; G_2; ..]' [A_1; A_2; ..]``; None where T has no node."""

    def join(nodes: list[fx.Node]) -> fx.Node | None:
        return None if not nodes else nodes[0] if len(nodes) == 1 else graph.call_function(aten.cat.default, (nodes, 1))

    def total(counts: list[int]) -> int | fx.Node | None:
        others = sum(getattr(n, "other", n) for n in counts)
        return sum(counts) if sizes is None else sizes.size(sum(counts), others)

    products, rows = [t for t in terms if isinstance(t, _Product)], [t for t in terms if isinstance(t, _Rows)]
    tokens, lookups = total([t.sizes[2] for t in products]), total([t.sizes[2] for t in rows])
    if tokens is None or lookups is None:
        return None
    left = [_tokens_first(graph, t.left) for t in products]
    g = [t.right if t.turned else x for t, x in zip(products, left, strict=True)]
    a = [x if t.turned else t.right for t, x in zip(products, left, strict=True)]
    p, d, _ = terms[0].sizes
    return Ghost(
        join(g), join(a), join([t.index for t in rows]), join([t.rows for t in rows]), p, d, tokens, lookups
    )  # fmt: skip


def _tokens_first(graph: fx.Graph, left: fx.Node) -> fx.Node:
    """``[B, p, T] -> [B, T, p]``; a transpose that is already there is undone instead."""
    node: Any = left
    while node.target in VIEWS | {aten.expand.default} and node.args[0].meta.get("shape") == node.meta["shape"]:
        node = node.args[0]
    if node.target is aten.transpose.int and sorted(a % 3 for a in node.args[1:]) == [1, 2]:
        inner: fx.Node = node.args[0]
        return inner
    return graph.call_function(aten.transpose.int, (left, 1, 2))


def check(before: JointGraph, after: JointGraph) -> None:
    """The factors multiply out to the gradients that they replace, on two rows of the public example batch."""
    source = before.source
    assert source is not None
    leaves = [x[:2] for x in tree_flatten(source.example_batch)[0] if isinstance(x, torch.Tensor)]
    values = before.values([*leaves, *(x.to(leaves[0].device) for x in example(before.draws, len(leaves[0])))])
    with torch.no_grad():
        ours, theirs = after.module(*values), before.module(*values)
        for target, factored, gradient in zip(before.targets, ours[1:], theirs[1:], strict=True):
            if isinstance(factored, torch.Tensor):
                continue
            g, a, index, e, p, d, tokens, lookups = factored
            total = gradient.new_zeros(len(gradient), p, d)
            if g is not None:
                total += g.reshape(-1, tokens, p).transpose(1, 2) @ a.reshape(-1, tokens, d)
            if index is not None:
                where = index.reshape(-1, lookups).unsqueeze(2).expand(-1, -1, d)
                total.scatter_add_(1, where.expand(len(gradient), -1, -1), e.reshape(-1, lookups, d))
            error, size = (total.reshape(gradient.shape) - gradient).norm(), gradient.norm()
            if not bool(error <= 1e-4 * size + 1e-12) and bool(size.isfinite()):
                raise PassError(
                    f"The factors of {target.name}'s gradient do not multiply out to it (error {error:.1e})."
                )
