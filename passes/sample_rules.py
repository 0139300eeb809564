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


def bilinear(x: Tensor, y: Tensor, w: Tensor, b: Tensor | None = None) -> Tensor:
    """``z[.., o] = sum_ij x[.., i] w[o, i, j] y[.., j] + b[o]``."""
    z = torch.einsum("...i,oij,...j->...o", x, w, y)
    return z if b is None else z + b


def embedding_bag(
    table: Tensor,
    index: Tensor,
    offsets: Tensor,
    scale_by_frequency: bool = False,
    mode: int = 0,
    sparse: bool = False,
    weights: Tensor | None = None,
    last_offset: bool = False,
    padding: int | None = None,
) -> Any:
    """index [L] -> one row per bag [N, C]: sum, mean or maximum (mode 0, 1, 2) of its entries that are no padding."""
    if scale_by_frequency:
        return aten.embedding_bag.padding_idx(
            table, index, offsets, scale_by_frequency, mode, sparse, weights, last_offset, padding
        )
    index, offsets = index.reshape(-1), offsets[:-1] if last_offset else offsets
    bags = torch.arange(offsets.shape[0], device=index.device)
    own = (torch.arange(index.shape[0], device=index.device).unsqueeze(1) >= offsets).sum(1) - 1
    member = own == bags.unsqueeze(1)  # [N, L]
    if padding is not None:
        member = member & (index != padding % table.shape[0])
    rows = torch.nn.functional.embedding(index, table)
    count = member.sum(1, keepdim=True)
    if mode == 2:
        apart = torch.where(member.unsqueeze(2), rows, float("-inf")).max(1).values
        out = torch.where(count > 0, apart, 0.0)
    else:
        share = member.to(rows.dtype) if weights is None else member * weights.reshape(-1)
        out = share @ rows
        if mode == 1:
            out = out / count.clamp_min(1)
    rest = index.new_zeros(0)
    return out, rest, rest, rest


def one_hot(x: Tensor, classes: int = -1) -> Any:
    """``x [..] -> [.., classes]``; a label outside gives a row of zeros, where torch's own raises."""
    if classes < 0:  # then the number of classes is the data's
        return aten.one_hot.default(x, classes)
    return (x.unsqueeze(-1) == torch.arange(classes, device=x.device)).to(torch.int64)


def _rrelu(x: Tensor, lower: float = 0.125, upper: float = 1 / 3, training: bool = False, generator: Any = None) -> Any:
    if training:
        return aten.rrelu.default(x, lower, upper, training, generator)
    return torch.nn.functional.leaky_relu(x, (lower + upper) / 2)


def multilabel_margin(x: Tensor, labels: Tensor, reduction: int = 1) -> Tensor:
    """``sum_jk max(0, 1 - x[y_j] + x[k]) / C`` over labels y_j before the first -1 and classes k that are none of them.

    Not torch's own decomposition (2.13), which gives other numbers than its operator.
    """
    valid = (labels >= 0).long().cumprod(-1).bool()
    classes = torch.arange(x.shape[-1], device=x.device)
    named = ((labels.unsqueeze(-1) == classes) & valid.unsqueeze(-1)).any(-2)
    margins = (1 - x.gather(-1, labels.clamp(0, x.shape[-1] - 1)).unsqueeze(-1) + x.unsqueeze(-2)).clamp_min(0)
    counted = valid.unsqueeze(-1) & ~named.unsqueeze(-2)
    losses = torch.where(counted, margins, 0.0).sum((-2, -1)) / x.shape[-1]
    return losses if reduction == 0 else losses.mean() if reduction == 1 else losses.sum()


def grid_sampler(x: Tensor, grid: Tensor, mode: int, padding: int, corners: bool) -> Any:
    """Torch's own, but a place that is NaN is the centre: its kernel (2.13, CPU) reads outside the image there."""
    return aten.grid_sampler.default(x, torch.where(grid.isnan(), 0.0, grid), mode, padding, corners)


def binary_cross_entropy(x: Tensor, target: Tensor, weight: Tensor | None = None, reduction: int = 1) -> Any:
    """Torch's own, but a probability outside [0, 1] (or NaN) counts as 1/2, where torch's own would raise and stop a run."""
    inside = torch.where((x >= 0) & (x <= 1), x, 0.5)
    return aten.binary_cross_entropy.default(inside, target, weight, reduction)


# Operators without a batching rule, forward or backward, that torch itself can write in others.
DECOMPOSED = (
    aten._upsample_nearest_exact1d.vec,
    aten._upsample_nearest_exact2d.vec,
    aten._upsample_nearest_exact3d.vec,
    aten.affine_grid_generator.default,
    aten.max_unpool2d.default,
    aten.max_unpool3d.default,
    aten.soft_margin_loss.default,
    aten.multi_margin_loss.default,
)


def quantile(
    x: Tensor, q: float, dim: int | None = None, keepdim: bool = False, *, interpolation: str = "linear"
) -> Any:
    """``s[f] + (q (n - 1) - f) (s[f + 1] - s[f])`` of the sorted ``s``, f the whole part; NaN where there is one."""
    if interpolation != "linear" or x.dim() == 0:
        return aten.quantile.scalar(x, q, dim, keepdim, interpolation=interpolation)
    shape, flat = [1] * x.dim(), x
    if dim is None:
        flat, dim = x.reshape(-1), 0
    ordered = flat.sort(dim).values
    last = ordered.shape[dim] - 1
    low = min(int(q * last), last)
    first, second = ordered.select(dim, low), ordered.select(dim, min(low + 1, last))
    share = q * last - low
    value = torch.where(flat.isnan().any(dim), float("nan"), first + share * (second - first) if share else first)
    if not keepdim:
        return value
    return value.reshape(shape) if flat is not x else value.unsqueeze(dim)


RULES: dict[Any, Callable[..., Any]] = {
    aten.batch_norm.default: _batch_norm,
    aten._native_batch_norm_legit_no_training.default: _legit_no_training,
    aten.adaptive_avg_pool1d.default: _adaptive_avg_pool1d,
    aten.adaptive_avg_pool2d.default: _adaptive_avg_pool2d,
    aten.embedding.default: embedding,
    aten.bilinear.default: bilinear,
    aten.binary_cross_entropy.default: binary_cross_entropy,
    aten.grid_sampler.default: grid_sampler,
    aten.multilabel_margin_loss.default: multilabel_margin,
    aten.one_hot.default: one_hot,
    aten.quantile.scalar: quantile,
    aten.rrelu.default: _rrelu,
    aten.embedding_bag.default: embedding_bag,
    aten.embedding_bag.padding_idx: embedding_bag,
}
