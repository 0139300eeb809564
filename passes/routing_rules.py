"""Operators of mixtures of experts and of strided writes, for one sample, in terms of ones that vmap batches.

grouped product  x [S, K], W [E, K, N], rows sorted by group, group e ends before row offs[e]:
    y = X W',  X [S, E K] = x in the columns of its row's group and zero elsewhere, W' = W as [E K, N]
histogram        counts[i] = #{x : edge[i] <= x < edge[i + 1]}, the last bin closed on the right
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

aten = torch.ops.aten


def grouped_product(x: Tensor, w: Tensor, offs: Tensor) -> Tensor:
    """``y[s] = x[s] @ w[e]`` for the group e of row s; rows behind the last group are zero. One product, no loop."""
    rows, groups = x.shape[0], w.shape[0]
    row = torch.arange(rows, device=x.device).unsqueeze(1)
    before = row < offs
    own = before & ~torch.nn.functional.pad(before, (1, -1))  # [S, E]: the first group that ends behind the row
    spread = torch.where(own.unsqueeze(-1), x.unsqueeze(1), 0.0)
    return spread.reshape(rows, -1) @ w.reshape(groups * w.shape[1], w.shape[2])


def _grouped_mm(x: Tensor, w: Tensor, offs: Any = None, bias: Any = None, out_dtype: Any = None) -> Any:
    if x.dim() != 2 or w.dim() != 3 or offs is None or bias is not None or out_dtype is not None:
        return aten._grouped_mm.default(x, w, offs, bias, out_dtype)
    return grouped_product(x, w, offs)


def _histc(x: Tensor, bins: int = 100, min: float = 0, max: float = 0) -> Any:
    if min == max:  # the range is then the data's own
        return aten.histc.default(x, bins, min, max)
    edges = torch.linspace(float(min), float(max), bins + 1, dtype=x.dtype, device=x.device)
    x = x.reshape(-1, 1)
    inside = (x >= edges[:-1]) & (x < edges[1:])
    last = (torch.arange(bins, device=x.device) == bins - 1) & (x == edges[-1])
    return (inside | last).sum(0).to(x.dtype)


def _slice_scatter(x: Tensor, source: Tensor, dim: int = 0, start: Any = None, end: Any = None, step: int = 1) -> Any:
    """``end`` may be a number far behind the axis ("to the end"), from which functorch would compute sizes."""
    first, last, _ = slice(start, end, step).indices(x.shape[dim])
    return aten.slice_scatter.default(x, source, dim, first, max(first, last), step)


def _copy(x: Tensor, source: Tensor, non_blocking: bool = False) -> Tensor:
    """What ``x.copy_(source)`` leaves in x: torch has no derivative for the functional form."""
    return source.to(x.dtype).expand(x.shape)


RULES: dict[Any, Callable[..., Any]] = {
    aten._grouped_mm.default: _grouped_mm,
    aten.histc.default: _histc,
    aten.slice_scatter.default: _slice_scatter,
    aten.copy.default: _copy,
}
# Operators that a library of models registers; torch does not know them before that library is imported.
BY_NAME: dict[str, Callable[..., Any]] = {"transformers.grouped_mm_fallback.default": grouped_product}
