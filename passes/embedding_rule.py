"""Embedding tables under vmap: every sample's gradient ``[V, p]`` is one scatter of its own tokens (design §5).

functorch batches ``embedding_dense_backward`` by adding ``arange(0, B * V, V)`` to the indices: the batch size as a value,
which no sealed graph may hold. Here ``dW[i] = scatter_add(0 [B, V, p], 1, idx [B, N, p], g [B, N, p])``: the same sum,
row by row, a form that ``ghost`` can read.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

aten = torch.ops.aten


def _apply(function: Any, *args: Any) -> Any:
    return function.apply(*args)


def _scatter(g: Tensor, index: Tensor, count: int, dim: int) -> Tensor:
    """``out[.., index[.., n], :] += g[.., n, :]``; g ``[.., N, p]``, index ``[.., N]``, out ``[.., count, p]``."""
    where = index.unsqueeze(-1).expand(g.shape)
    return g.new_zeros([*g.shape[:dim], count, g.shape[-1]]).scatter_add(dim, where, g)


class _Backward(torch.autograd.Function):
    @staticmethod
    def forward(g: Any, index: Any, count: Any) -> Any:
        return _scatter(g, index, count, 0)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass

    @staticmethod
    def vmap(info: Any, in_dims: Any, g: Any, index: Any, count: Any) -> Any:
        if in_dims[0] is None:
            g, batched = g.unsqueeze(0), index.movedim(in_dims[1], 0)
            g = g.expand(batched.shape[0], *g.shape[1:])
        else:
            g = g.movedim(in_dims[0], 0)
            batched = index.expand(g.shape[0], *index.shape) if in_dims[1] is None else index.movedim(in_dims[1], 0)
        return _scatter(g, batched, count, 1), 0


class _Embedding(torch.autograd.Function):
    @staticmethod
    def forward(weight: Any, index: Any, padding: Any) -> Any:
        return aten.embedding.default(weight, index)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        weight, index, ctx.padding = inputs
        ctx.count = weight.shape[0]
        ctx.save_for_backward(index)

    @staticmethod
    def backward(ctx: Any, g: Any) -> Any:
        (index,) = ctx.saved_tensors
        flat, rows = index.reshape(-1), g.reshape(-1, g.shape[-1])
        if ctx.padding >= 0:
            rows = torch.where((flat == ctx.padding).unsqueeze(-1), 0.0, rows)
        return _apply(_Backward, rows, flat, ctx.count), None, None

    @staticmethod
    def vmap(info: Any, in_dims: Any, weight: Any, index: Any, padding: Any) -> Any:
        if in_dims[0] is None:
            return _apply(_Embedding, weight, index.movedim(in_dims[1], 0), padding), 0
        weight = weight.movedim(in_dims[0], 0)  # a table of each sample's own, computed from its inputs
        index = index.expand(weight.shape[0], *index.shape) if in_dims[1] is None else index.movedim(in_dims[1], 0)
        flat = index.reshape(index.shape[0], -1, 1).expand(-1, -1, weight.shape[-1])
        return weight.gather(1, flat).reshape(*index.shape, weight.shape[-1]), 0


def embedding(
    weight: Tensor, index: Tensor, padding_idx: int = -1, scale_grad_by_freq: bool = False, sparse: bool = False
) -> Tensor:
    """``weight [V, p]`` at ``index`` of one sample; the gradient of ``padding_idx`` is zero, as torch's own."""
    if scale_grad_by_freq:  # counts tokens over the whole batch: no meaning sample by sample
        plain: Tensor = aten.embedding.default(weight, index, padding_idx, scale_grad_by_freq, sparse)
        return plain
    result: Tensor = _apply(_Embedding, weight, index, padding_idx)
    return result
