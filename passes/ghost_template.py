"""The template of one ghost gradient, matched node for node (design §7): its norm is of exactly what is summed.

Proved: the views G [B, T, p], A [B, T, d], idx [B, N], E [B, N, d] that the weighted sum reads are those of the Gram
matrices, all of them with every cross term, the rows that are not kept are zero in both factors of the product, and what
``template.match_factors`` tests is the size of both factors.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection
from typing import Any

import torch
from torch import fx

from .errors import SealBroken
from .matching import as_list, constant, expect

aten = torch.ops.aten
LEAST_SHARE = 1e-4
LARGEST_FACTORS = 1e40
WHAT = "ghost sum"


@dataclasses.dataclass
class GhostMatch:
    """What the weighted sum read: the views of its sources (None: that half is absent), and their sizes."""

    column: fx.Node
    weights: fx.Node
    g: fx.Node | None = None
    a: fx.Node | None = None
    index: fx.Node | None = None
    e: fx.Node | None = None
    sizes: tuple[Any, ...] = (0, 0, 0, 0)  # p, d, T, N; T and N may be nodes of public sizes

    @property
    def sources(self) -> list[fx.Node]:
        views = [v for v in (self.g, self.a, self.index, self.e) if v is not None]
        return [v.args[0] for v in views if isinstance(v.args[0], fx.Node)]


def match_sum(piece: Any, numel: int, batch: fx.Node, public: Collection[fx.Node] = ()) -> GhostMatch:
    """``reshape(mm(reshape(c G)', reshape(A)) + embedding_dense_backward(c E, idx), [1, p d])``, one half or both.

    ``batch`` is the node B: the views of the sources are ``[B, ..]``. ``public``: the graph's nodes for public sizes;
    T and N may be among them, p and d are constants.
    """
    flat = expect(piece, aten.reshape.default, WHAT)
    if as_list(flat.args[1]) != [1, numel]:
        raise SealBroken(f"{WHAT}: it does not have {numel} entries.")
    terms = [flat.args[0]]
    if isinstance(terms[0], fx.Node) and terms[0].target is aten.add.Tensor:
        terms = list(expect(terms[0], aten.add.Tensor, WHAT).args)
        if [getattr(t, "target", None) for t in terms] != [aten.mm.default, aten.embedding_dense_backward.default]:
            raise SealBroken(f"{WHAT}: it adds something else than a product and the rows of an index.")
    uses = 0  # of the kept rows: two factors of a product, one of a lookup
    keeps: list[tuple[fx.Node, fx.Node | None]] = []
    g: Any = None
    a: Any = None
    index: Any = None
    e: Any = None
    rows = columns = tokens = lookups = 0
    for term in terms:
        if isinstance(term, fx.Node) and term.target is aten.mm.default:
            product = expect(term, aten.mm.default, WHAT)
            uses += 2
            left = expect(expect(product.args[0], aten.t.default, WHAT).args[0], aten.reshape.default, WHAT)
            right = expect(product.args[1], aten.reshape.default, WHAT)
            keep, scale, g = _scaled(left.args[0])
            kept, a = _kept(right.args[0])
            keeps += [(keep, scale), (kept, None)]
            _, tokens, rows = _view(g, 3, batch, public)
            _, also, columns = _view(a, 3, batch, public)
            if also != tokens or as_list(left.args[1]) != [-1, rows] or as_list(right.args[1]) != [-1, columns]:
                raise SealBroken(f"{WHAT}: the factors are read with other shapes than the norm's.")
        else:
            add = expect(term, aten.embedding_dense_backward.default, WHAT)
            uses += 1
            keep, scale, e = _scaled(add.args[0])
            keeps.append((keep, scale))
            index = add.args[1]
            _, lookups = _view(index, 2, batch, public)
            _, also, width = _view(e, 3, batch, public)
            count = add.args[2]
            if also != lookups or (columns and width != columns) or (rows and count != rows) or type(count) is not int:
                raise SealBroken(f"{WHAT}: the rows of the index have another shape than the product's.")
            constant(add.args[3], -1, WHAT)
            if add.args[4] is not False:
                raise SealBroken(f"{WHAT}: the rows are scaled by how often they occur in the batch.")
            rows, columns = count, width
    if rows * columns != numel:
        raise SealBroken(f"{WHAT}: it does not have {numel} entries.")
    first, by = keeps[0]
    if any(k is not first or (s is not None and s is not by) for k, s in keeps):
        raise SealBroken(f"{WHAT}: its factors do not drop or scale the same samples.")
    expect(first, aten.unsqueeze.default, WHAT, users=uses)
    constant(first.args[1], 2, WHAT)
    scale = expect(by, aten.reshape.default, WHAT, users=len(terms))
    if as_list(scale.args[1]) != [-1, 1, 1]:
        raise SealBroken(f"{WHAT}: the weights are not one per sample.")
    column = expect(first.args[0], aten.unsqueeze.default, "non-finite rows", users=None)
    weights = expect(scale.args[0], aten.unsqueeze.default, "weights", users=None)
    return GhostMatch(column, weights, g, a, index, e, (rows, columns, tokens, lookups))


def _kept(node: Any) -> tuple[fx.Node, fx.Node]:
    """``where(keep, x, 0)``."""
    where = expect(node, aten.where.ScalarOther, "non-finite rows")
    constant(where.args[2], 0.0, "non-finite rows")
    return expect(where.args[0], aten.unsqueeze.default, "non-finite rows", users=None), where.args[1]  # type: ignore[return-value]


def _scaled(node: Any) -> tuple[fx.Node, fx.Node, fx.Node]:
    """``where(keep, x, 0) * scale``."""
    product = expect(node, aten.mul.Tensor, WHAT)
    keep, x = _kept(product.args[0])
    return keep, expect(product.args[1], aten.reshape.default, WHAT, users=None), x


def _view(node: Any, dims: int, batch: fx.Node, public: Collection[fx.Node]) -> list[Any]:
    """The sizes ``[B, T]`` or ``[B, T, p]`` of a view of a source: p a constant, T a constant or a public size."""
    view = expect(node, aten.reshape.default, WHAT, users=None)
    sizes = as_list(view.args[1])
    rest = [s for at, s in enumerate(sizes) if at != 0 and not (at == 1 and isinstance(s, fx.Node) and s in public)]
    if len(sizes) != dims or sizes[0] is not batch or any(type(s) is not int or s < 1 for s in rest):
        raise SealBroken(
            f"{WHAT}: a factor has the shape {sizes}; expected one row per record and {dims - 1} public sizes."
        )
    if not isinstance(view.args[0], fx.Node):
        raise SealBroken(f"{WHAT}: a factor is not computed in the graph.")
    return sizes


def match_norm(squared: Any, bound: Any, traces: list[Any], block: GhostMatch, what: str = "ghost norm") -> None:
    """``sum(H)``, ``(sum sqrt(diag H))^2``, ``|G|^2`` and ``|[A; E]|^2`` of the views that ``match_sum`` found."""
    other = "the norm is taken over other factors than those that are summed"
    squared = expect(squared, aten.sum.dim_IntList, what)
    if as_list(squared.args[1]) != [1, 2]:
        raise SealBroken(f"{what}: it is not the sum over all pairs of tokens.")
    h = expect(squared.args[0], aten.mul.Tensor, what, users=2)
    bound = expect(bound, aten.mul.Tensor, what)
    together = expect(bound.args[0], aten.sum.dim_IntList, what, users=1)
    if bound.args[1] is not together or as_list(together.args[1]) != [1]:
        raise SealBroken(f"{what}: the bound is not a square of a sum over tokens.")
    each = _diagonal(expect(together.args[0], aten.sqrt.default, what).args[0], what)
    if each is not h:
        raise SealBroken(f"{what}: the bound and the norm are of different products.")
    left, right = h.args
    wide = _gram(right, what, users=2 if block.g is not None else 1).args[0]
    if block.a is not None and block.e is not None:
        both = expect(wide, aten.cat.default, what)
        constant(both.args[1], 1, what)
        parts = as_list(both.args[0])
    else:
        parts = [wide]
    views = [v for v in (block.a, block.e) if v is not None]
    if len(parts) != len(views) or any(p is not v for p, v in zip(parts, views, strict=True)):
        raise SealBroken(f"{what}: {other}.")
    _, _, tokens, _ = block.sizes
    same = left
    if block.g is not None:
        dense = left
        if block.index is not None:
            above, below = _pair(left, 1, what)
            dense, picked = _pair(above, 2, what)
            turned, same = _pair(below, 2, what)
            turned = expect(turned, aten.transpose.int, what)
            expect(picked, aten.gather.default, what, users=2)
            if turned.args[0] is not picked or turned.args[1:] != (1, 2):
                raise SealBroken(f"{what}: a cross term is not the transpose of the other.")
        narrow = _gram(dense, what, users=2, wide_users=3 if block.index is not None else 2)
        if narrow.args[0] is not block.g:
            raise SealBroken(f"{what}: {other}.")
        for trace, gram in zip(traces, (dense, right), strict=True):
            size = expect(trace, aten.sum.dim_IntList, what)
            if as_list(size.args[1]) != [1] or _diagonal(size.args[0], what) is not gram:
                raise SealBroken(f"{what}: the size of a factor is not tested.")
    across = None
    if block.index is not None:
        narrow_same = expect(same, aten._to_copy.default, what, dtype=torch.float64)
        equal = expect(narrow_same.args[0], aten.eq.Tensor, what)
        down = expect(equal.args[0], aten.unsqueeze.default, what)
        across = expect(equal.args[1], aten.unsqueeze.default, what, users=2 if block.g is not None else 1)
        constant(down.args[1], 2, what)
        constant(across.args[1], 1, what)
        if down.args[0] is not block.index or across.args[0] is not block.index:
            raise SealBroken(f"{what}: {other}.")
        _readers(block.index, 3, what)
    if block.g is not None and block.index is not None:
        every = expect(picked.args[2], aten.expand.default, what)
        if every.args[0] is not across or as_list(every.args[1]) != [-1, tokens, -1]:
            raise SealBroken(f"{what}: the cross term picks other rows than the index.")
        if picked.args[0] is not narrow or picked.args[1] != 2:
            raise SealBroken(f"{what}: the cross term is of another factor than the one that is summed.")
    for view in (block.g, block.a, block.e):
        if view is not None:
            _readers(view, 2, what)


def _readers(view: fx.Node, count: int, what: str) -> None:
    if len(view.users) != count:
        raise SealBroken(f"{what}: {view.name} is used {len(view.users)} times, expected {count}.")


def _pair(node: Any, dim: int, what: str) -> list[Any]:
    cat = expect(node, aten.cat.default, what)
    constant(cat.args[1], dim, what)
    parts = as_list(cat.args[0])
    if len(parts) != 2:
        raise SealBroken(f"{what}: a cross term is missing.")
    return parts


def _diagonal(node: Any, what: str) -> Any:
    diagonal = expect(node, aten.diagonal.default, what)
    if diagonal.args[1:] != (0, 1, 2):
        raise SealBroken(f"{what}: not the diagonal of every sample's own matrix.")
    return diagonal.args[0]


def _gram(node: Any, what: str, users: int = 1, wide_users: int = 2) -> fx.Node:
    """``x x'`` per sample of ``x = float64(view)``; returns the node x."""
    product = expect(node, aten.bmm.default, what, users=users)
    wide = expect(product.args[0], aten._to_copy.default, what, users=wide_users, dtype=torch.float64)
    turned = expect(product.args[1], aten.transpose.int, what)
    if turned.args[0] is not wide or turned.args[1:] != (1, 2):
        raise SealBroken(f"{what}: it is not the Gram matrix of one factor.")
    return wide
