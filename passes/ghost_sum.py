"""Clipped sums of gradients that are products, with no ``[B, p, d]`` tensor and no second backward (design §5).

A ghost gradient of sample i is ``M_i [p, d] = G_i' A_i + onehot(idx_i)' E_i``, one half or both: G [B, T, p], A [B, T, d],
idx [B, N], E [B, N, d]. A weight used several times has its uses side by side along T or N, so cross terms are inside.

    H [B, S, S] = (L L') * (R R')  in float64,  L = [G; onehot(idx)],  R = [A; E],  S = T + N
    |M_i|^2     = sum H_i                                  (Li et al. 2022; Bu et al. 2022)
    bound_i     = (sum_s sqrt(H_ss))^2  >= |M_i|^2         the squared sum of the norms of the terms
    sum_i c_i M_i = mm(reshape(c G)' [p, B T], reshape(A) [B T, d]) + embedding_dense_backward(c E, idx)    (book-keeping)

Float rounding: the float32 product errs by about 1e-7 of ``c_i sqrt(bound_i)``, which terms that cancel can make far larger
than ``c_i |M_i|``. So the norm that clips is at least ``sqrt(bound) / 100``: never smaller than the true one, and the sum
errs by about 1e-5 R; 8e-5 R was the worst seen, for 2,048 tokens that cancel.

Range: rows with ``sum |G_i|^2 + |[A_i; E_i]|^2 >= 1e40`` over the products contribute zero. So ``c G`` cannot overflow, what
``c G`` loses below float32's smallest number (1e-38) comes to less than 1e-13 R beside features of 1e20, and squares of G
that float64 cannot hold (below 1e-162) belong to products that are zero for every clipping.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import fx

aten = torch.ops.aten
LEAST_SHARE = 1e-4  # of the bound, that the squared norm is taken to be at least
LARGEST_FACTORS = 1e40  # squared


@dataclasses.dataclass(frozen=True)
class Ghost:
    """Sources of one ghost gradient and their public sizes (p and d constants); the halves that are absent are None."""

    g: fx.Node | None
    a: fx.Node | None
    index: fx.Node | None
    e: fx.Node | None
    rows: int  # p
    columns: int  # d
    tokens: int | fx.Node  # T; a node where it depends on the padded length
    lookups: int | fx.Node  # N

    def outputs(self) -> tuple[Any, ...]:
        """How the graph carries it between the passes ``ghost`` and ``clip``."""
        return (self.g, self.a, self.index, self.e, self.rows, self.columns, self.tokens, self.lookups)


class GhostSum:
    """Writes the nodes of one ghost gradient at the graph's insertion point: first its norm, then its weighted sum.

    ``count`` is the node B, the length of the mask.
    """

    def __init__(self, graph: fx.Graph, ghost: Ghost, count: fx.Node) -> None:
        self.graph, self.ghost = graph, ghost
        self.g: fx.Node | None = None
        self.a: fx.Node | None = None
        self.index: fx.Node | None = None
        self.e: fx.Node | None = None
        self.traces: list[fx.Node] = []
        if ghost.g is not None:
            self.g = self.call(aten.reshape.default, ghost.g, [count, ghost.tokens, ghost.rows])
            self.a = self.call(aten.reshape.default, ghost.a, [count, ghost.tokens, ghost.columns])
        if ghost.index is not None:
            self.index = self.call(aten.reshape.default, ghost.index, [count, ghost.lookups])
            self.e = self.call(aten.reshape.default, ghost.e, [count, ghost.lookups, ghost.columns])
        self._norm()

    def call(self, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        return self.graph.call_function(target, args, kwargs)

    def _gram(self, x: fx.Node) -> fx.Node:
        return self.call(aten.bmm.default, x, self.call(aten.transpose.int, x, 1, 2))

    def _trace(self, gram: fx.Node) -> fx.Node:
        return self.call(aten.sum.dim_IntList, self.call(aten.diagonal.default, gram, 0, 1, 2), [1])

    def _norm(self) -> None:
        """``squared`` and ``bound`` [B]; ``traces`` are ``|G|^2`` and ``|[A; E]|^2`` [B] where there is a product."""
        left = wide = None
        if self.g is not None:
            wide = self.call(aten._to_copy.default, self.g, dtype=torch.float64)
            left = self._gram(wide)
            self.traces.append(self._trace(left))
        if self.index is not None:
            across, down = (
                self.call(aten.unsqueeze.default, self.index, 1),
                self.call(aten.unsqueeze.default, self.index, 2),
            )
            same = self.call(aten._to_copy.default, self.call(aten.eq.Tensor, down, across), dtype=torch.float64)
            if left is not None:
                every = self.call(aten.expand.default, across, [-1, self.ghost.tokens, -1])
                picked = self.call(aten.gather.default, wide, 2, every)  # <g_t, onehot(idx_n)>
                above = self.call(aten.cat.default, [left, picked], 2)
                below = self.call(aten.cat.default, [self.call(aten.transpose.int, picked, 1, 2), same], 2)
                left = self.call(aten.cat.default, [above, below], 1)
            else:
                left = same
        halves = [x for x in (self.a, self.e) if x is not None]
        right = halves[0] if len(halves) == 1 else self.call(aten.cat.default, halves, 1)
        gram = self._gram(self.call(aten._to_copy.default, right, dtype=torch.float64))
        if self.g is not None:
            self.traces.append(self._trace(gram))
        h = self.call(aten.mul.Tensor, left, gram)
        self.squared = self.call(aten.sum.dim_IntList, h, [1, 2])
        each = self.call(aten.sqrt.default, self.call(aten.diagonal.default, h, 0, 1, 2))
        together = self.call(aten.sum.dim_IntList, each, [1])
        self.bound = self.call(aten.mul.Tensor, together, together)

    def weighted(self, column: fx.Node, weights: fx.Node) -> fx.Node:
        """``[1, p d]``, from ``column`` [B, 1] (kept rows) and ``weights`` [1, B]."""
        keep = self.call(aten.unsqueeze.default, column, 2)
        scale = self.call(aten.reshape.default, weights, [-1, 1, 1])
        terms = []
        if self.g is not None:
            scaled = self.call(aten.mul.Tensor, self.call(aten.where.ScalarOther, keep, self.g, 0.0), scale)
            flat = self.call(aten.t.default, self.call(aten.reshape.default, scaled, [-1, self.ghost.rows]))
            kept = self.call(aten.where.ScalarOther, keep, self.a, 0.0)
            terms.append(
                self.call(aten.mm.default, flat, self.call(aten.reshape.default, kept, [-1, self.ghost.columns]))
            )
        if self.index is not None:
            scaled = self.call(aten.mul.Tensor, self.call(aten.where.ScalarOther, keep, self.e, 0.0), scale)
            terms.append(
                self.call(aten.embedding_dense_backward.default, scaled, self.index, self.ghost.rows, -1, False)
            )
        whole = terms[0] if len(terms) == 1 else self.call(aten.add.Tensor, *terms)
        return self.call(aten.reshape.default, whole, [1, self.ghost.rows * self.ghost.columns])
