"""Operators that functorch would loop over samples, rewritten for one sample in terms of ones it can batch.

Each rule is an equality: the same numbers, up to rounding, for the same arguments. ``RULES`` is consulted by the
one-sample interpreter of ``capture``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .embedding_rule import embedding

aten = torch.ops.aten


def eval_batch_norm(x: Tensor, w: Tensor | None, b: Tensor | None, mean: Tensor, var: Tensor, eps: float) -> Tensor:
    """``y = x * s + (b - mean * s)``, ``s = w / sqrt(var + eps)`` [C]: two pointwise ops whose backward keeps no input."""
    scale = torch.rsqrt(var + eps)
    if w is not None:
        scale = scale * w
    shift = -mean * scale
    if b is not None:
        shift = shift + b
    shape = [-1] + [1] * (x.dim() - 2)
    return (x * scale.reshape(shape).to(x.dtype) + shift.reshape(shape).to(x.dtype)).to(x.dtype)


def _batch_norm(
    x: Tensor, w: Any, b: Any, mean: Any, var: Any, training: bool, momentum: float, eps: float, cudnn: bool = False
) -> Any:
    if training or mean is None or var is None:
        return aten.batch_norm.default(x, w, b, mean, var, training, momentum, eps, cudnn)
    return eval_batch_norm(x, w, b, mean, var, eps)


def _legit_no_training(x: Tensor, w: Any, b: Any, mean: Tensor, var: Tensor, momentum: float, eps: float) -> Any:
    return eval_batch_norm(x, w, b, mean, var, eps), x.new_zeros(0), x.new_zeros(0)


def _adaptive_avg_pool1d(x: Tensor, size: list[int]) -> Any:
    """``[N, C, L] -> [N, C, size]``; a single cell is a mean, the rest the 2-D pool over a height of one."""
    if list(size) == [1]:
        return x.mean(-1, keepdim=True)
    return aten.adaptive_avg_pool2d.default(x.unsqueeze(-2), [1, *size]).squeeze(-2)


def _adaptive_avg_pool2d(x: Tensor, size: list[int]) -> Any:
    if list(size) == [1, 1]:
        return x.mean((-2, -1), keepdim=True)
    return aten.adaptive_avg_pool2d.default(x, size)


RULES: dict[Any, Callable[..., Any]] = {
    aten.batch_norm.default: _batch_norm,
    aten._native_batch_norm_legit_no_training.default: _legit_no_training,
    aten.adaptive_avg_pool1d.default: _adaptive_avg_pool1d,
    aten.adaptive_avg_pool2d.default: _adaptive_avg_pool2d,
    aten.embedding.default: embedding,
}
