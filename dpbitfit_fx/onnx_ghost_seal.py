"""The template of one ghost gradient in an exported graph: its norm is of exactly what is summed (``passes/ghost_sum.py``).

sum    MatMul(t(c G), A) + ScatterElements(0 [p, d], idx, c E, add)     G [B, T, p], A [B, T, d], idx [B, N], E [B, N, d]
norm   sum(H), (sum sqrt(diag H))^2, |G|^2, |[A; E]|^2 of the same views, in float64, every cross term included
"""

from __future__ import annotations

import dataclasses
from typing import Final

import numpy as np

from dpbitfit_fx.onnx_graph import OnnxGraph

LEAST_SHARE: Final = 1e-4
LARGEST_FACTORS: Final = 1e40
SURELY_ABOVE: Final = (
    1e300  # of everything that was a float32: the exporter's own clamp, which is there for ONNX Runtime
)
LAST: Final = np.iinfo(np.int64).max
DOUBLE: Final = 11
WHAT: Final = "ghost sum"


@dataclasses.dataclass
class Ghost:
    """What the weighted sum read: factors [B], kept rows [B], the views of its sources ("": that half is absent), sizes."""

    factors: str
    keep: str
    g: str = ""
    a: str = ""
    index: str = ""
    e: str = ""
    tokens: int = 0
    lookups: int = 0

    @property
    def views(self) -> list[str]:
        return [v for v in (self.g, self.a, self.index, self.e) if v]


def stacked(g: OnnxGraph, name: str, count: int, what: str) -> list[str]:
    """The ``count`` vectors [B] whose sum ``name`` is."""
    if count == 1:
        return [name]
    stack, axes = g.call(name, "ReduceSum", what, keepdims=0)
    g.integers(axes, [1], what)
    terms = g.call(stack, "Concat", what, None, axis=1)
    if len(terms) != count:
        g.refuse(f"{what}: {len(terms)} terms are added up, expected {count}")
    found = []
    for term in terms:
        vector, axes = g.call(term, "Unsqueeze", what)
        g.integers(axes, [1], what)
        found.append(vector)
    return found


def match_ghost_sum(g: OnnxGraph, piece: str, numel: int, alone: bool) -> Ghost:
    """``reshape(product + lookups, [1, p d])``, one half or both; the exporter merges the reshape of the only piece."""
    total = piece
    if not alone:
        total, shape = g.call(piece, "Reshape", WHAT)
        g.integers(shape, [1, numel], WHAT)
    terms = g.call(total, "Add", WHAT) if g.op(total) == "Add" else [total]
    result = Ghost("", "")
    found = set()
    rows = columns = 0
    for term in terms:
        if g.op(term) == "MatMul" and not result.g:
            turned, right = g.call(term, "MatMul", WHAT)
            (left,) = g.call(turned, "Transpose", WHAT, 1, perm=[1, 0])
            left, shape = g.call(left, "Reshape", WHAT)
            keep, scale, result.g = _scaled(g, left)
            right, wide = g.call(right, "Reshape", WHAT)
            kept, result.a = _kept(g, right)
            found |= {(keep, scale), (kept, scale)}
            result.tokens, p = _view(g, result.g, 3)
            also, d = _view(g, result.a, 3)
            g.integers(shape, [-1, p], WHAT)
            g.integers(wide, [-1, d], WHAT)
            if also != result.tokens:
                g.refuse(f"{WHAT}: the factors of the product have different lengths")
        elif not result.index:
            zeros, where, added = g.call(term, "ScatterElements", WHAT, 3, axis=0, reduction=b"add")
            added, wide = g.call(added, "Reshape", WHAT)
            keep, scale, result.e = _scaled(g, added)
            found.add((keep, scale))
            where, spread = g.call(where, "Expand", WHAT)
            result.index, single = g.call(where, "Reshape", WHAT)
            g.integers(single, [-1, 1], WHAT)
            view, count = g.call(result.index, "Mod", "ghost sum's index", fmod=0)
            (result.lookups,) = _view(g, view, 2)
            also, d = _view(g, result.e, 3)
            p = numel // d
            g.scalar(count, p, "ghost sum's index")
            g.integers(spread, [1, d], WHAT)
            g.integers(wide, [-1, d], WHAT)
            _zeros(g, zeros, [p, d])
            if also != result.lookups:
                g.refuse(f"{WHAT}: there are other rows than their indices")
        else:
            g.refuse(f"{WHAT}: it adds something else than a product and the rows of an index")
        if columns and (rows, columns) != (p, d):
            g.refuse(f"{WHAT}: its halves have different shapes")
        rows, columns = p, d
    if rows * columns != numel:
        g.refuse(f"{WHAT}: it does not have {numel} entries")
    if len(found) != 1:
        g.refuse(f"{WHAT}: its factors do not drop or scale the same samples")
    ((result.keep, result.factors),) = found
    return result


def _zeros(g: OnnxGraph, name: str, shape: list[int]) -> None:
    if name in g.constants:
        if g.numbers(name, WHAT).shape != tuple(shape) or g.numbers(name, WHAT).any():
            g.refuse(f"{WHAT}: the rows are not added to a table of zeros")
        return
    # Without the option `value`, which g.call would refuse, it is zero in float32.
    (sizes,) = g.call(name, "ConstantOfShape", WHAT, 1)
    g.integers(sizes, shape, WHAT)


def _keep(g: OnnxGraph, name: str) -> str:
    """``keep`` [B] of a condition [B, 1, 1]."""
    keep, axes = g.call(name, "Unsqueeze", "non-finite rows")
    if g.op(keep) != "Unsqueeze":
        g.integers(axes, [1, 2], "non-finite rows")
        return keep
    g.integers(axes, [2], "non-finite rows")
    keep, axes = g.call(keep, "Unsqueeze", "non-finite rows")
    g.integers(axes, [1], "non-finite rows")
    return keep


def _kept(g: OnnxGraph, name: str) -> tuple[str, str]:
    """``where(keep, x, 0)``: keep and x."""
    condition, x, zero = g.call(name, "Where", "non-finite rows", 3)
    g.scalar(zero, 0.0, "non-finite rows")
    return _keep(g, condition), x


def _scaled(g: OnnxGraph, name: str) -> tuple[str, str, str]:
    """``where(keep, x, 0) * c``: keep, c [B] and x."""
    product, scale = g.call(name, "Mul", WHAT)
    keep, x = _kept(g, product)
    factors, shape = g.call(scale, "Reshape", "weights")
    g.integers(shape, [-1, 1, 1], "weights")
    if g.op(factors) == "Unsqueeze":
        factors, axes = g.call(factors, "Unsqueeze", "weights")
        g.integers(axes, [0], "weights")
    return keep, factors, x


def _view(g: OnnxGraph, name: str, dims: int) -> list[int]:
    """The public sizes after the batch axis of a view ``[B, ..]``."""
    _, sizes = g.rows(name, WHAT)
    if len(sizes) != dims - 1:
        g.refuse(f"{WHAT}: a factor has rows of the shape {sizes}, expected {dims - 1} sizes")
    return sizes


def match_ghost_norm(g: OnnxGraph, squared: str, bound: str, traces: list[str], ghost: Ghost) -> None:
    """``sum(H)``, ``(sum sqrt(diag H))^2`` and the two sizes of the views that ``match_ghost_sum`` found."""
    what, other = "ghost norm", "ghost norm: it is taken over other factors than those that are summed"
    side = ghost.tokens + ghost.lookups
    h, axes = g.call(squared, "ReduceSum", what, keepdims=0)
    g.integers(axes, [1, 2], what)
    together, again = g.call(bound, "Mul", what)
    each, axes = g.call(together, "ReduceSum", what, keepdims=0)
    g.integers(axes, [1], what)
    (diagonal,) = g.call(each, "Sqrt", what, 1)
    if again != together or _diagonal(g, diagonal, side) != h:
        g.refuse(f"{what}: the bound and the norm are of different products")
    left, right = g.call(h, "Mul", what)
    wide = _gram(g, right)
    halves = [v for v in (ghost.a, ghost.e) if v]
    (narrow,) = g.call(wide, "Cast", what, 1, to=DOUBLE)
    if (g.call(narrow, "Concat", what, 2, axis=1) if len(halves) == 2 else [narrow]) != halves:
        g.refuse(other)
    same, dense, picked = left, left, ""
    if ghost.g and ghost.index:
        above, below = g.call(left, "Concat", what, axis=1)
        dense, picked = g.call(above, "Concat", what, axis=2)
        turned, same = g.call(below, "Concat", what, axis=2)
        if g.call(turned, "Transpose", what, 1, perm=[0, 2, 1]) != [picked]:
            g.refuse(f"{what}: a cross term is not the transpose of the other")
    if ghost.g:
        wide = _gram(g, dense)
        if g.call(wide, "Cast", what, 1, to=DOUBLE) != [ghost.g]:
            g.refuse(other)
        for trace, gram, length in zip(traces, (dense, right), (ghost.tokens, side), strict=True):
            entries, axes = g.call(trace, "ReduceSum", what, keepdims=0)
            g.integers(axes, [1], what)
            if _diagonal(g, entries, length) != gram:
                g.refuse(f"{what}: the size of a factor is not tested")
    if ghost.index:
        (equal,) = g.call(same, "Cast", what, 1, to=DOUBLE)
        down, across = g.call(equal, "Equal", what)
        for view, axis in ((down, 2), (across, 1)):
            index, axes = g.call(view, "Unsqueeze", what)
            g.integers(axes, [axis], what)
            if index != ghost.index:
                g.refuse(other)
        if picked:
            source, every = g.call(picked, "GatherElements", what, axis=2)
            if ghost.tokens != 1 or every != across:
                every, shape = g.call(every, "Expand", what)
                g.integers(shape, [1, ghost.tokens, 1], what)
            if source != wide or every != across:
                g.refuse(f"{what}: the cross term picks other rows than the index")


def _diagonal(g: OnnxGraph, name: str, side: int) -> str:
    """x [B, S, S] of its diagonals [B, S]: every (S + 1)-th of S * S."""
    what = "ghost norm's diagonal"
    flat, start, stop, axes, step = g.call(name, "Slice", what, 5)
    for found, expected in ((start, 0), (stop, LAST), (axes, 1), (step, side + 1)):
        g.integers(found, [expected], what)
    x, shape = g.call(flat, "Reshape", what)
    g.integers(shape, [-1, side * side], what)
    return x


def _gram(g: OnnxGraph, name: str) -> str:
    """x of ``x x'`` per sample."""
    what = "ghost norm's product"
    x, right = g.call(name, "MatMul", what)
    turned, most = g.call(right, "Min", what)
    value = g.numbers(most, what)
    if value.size != 1 or value.ndim > 1 or not float(value.ravel()[0]) >= SURELY_ABOVE:
        g.refuse(f"{what}: a factor is cut at {value.tolist()}")
    if g.call(turned, "Transpose", what, 1, perm=[0, 2, 1]) != [x]:
        g.refuse(f"{what}: it is not the Gram matrix of one factor")
    return x
