"""Filling in place and windows, for one sample, in operators that vmap batches with their gradient."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

aten = torch.ops.aten


def zero(x: Tensor) -> Tensor:
    return torch.zeros_like(x)


def fill(x: Tensor, value: Tensor) -> Tensor:
    """``x[...] = 0.5`` functionalized: every entry is the value [], whose gradient is the sum."""
    return torch.zeros_like(x) + value.to(x.dtype)


def unfold(x: Tensor, dim: int, size: int, step: int) -> Any:
    """``[.., L, ..] -> [.., (L - size) // step + 1, .., size]``, gathered: the windows may overlap."""
    if x.dim() == 0:
        return aten.unfold.default(x, dim, size, step)
    dim = dim % x.dim()
    count = (x.shape[dim] - size) // step + 1
    at = torch.arange(count, device=x.device).unsqueeze(1) * step + torch.arange(size, device=x.device)
    picked = x.index_select(dim, at.reshape(-1))
    return picked.reshape(*x.shape[:dim], count, size, *x.shape[dim + 1 :]).movedim(dim + 1, -1)


RULES: dict[Any, Callable[..., Any]] = {
    aten.fill.Tensor: fill,
    aten.zero.default: zero,
    aten.unfold.default: unfold,
}
