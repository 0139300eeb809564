"""Fused attention under vmap: the sample axis is folded into the operator's own batch axis (design §3).

functorch has no batching rule for CPU flash attention, and none for the backward of CUDA's three kernels: it would loop
over samples and unroll the graph B times. Here ``[B, N, H, T, d]`` becomes ``[B*N, H, T, d]``, one fused call forward and
one backward. No size is read from ``info.batch_size``, which is a plain int.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .attention_kernels import KERNELS

aten = torch.ops.aten


def _fold(x: Tensor | None, dim: int | None, batch: Any) -> Tensor | None:
    """``[.., B at dim, ..] -> [B * first, ...]``; an unbatched tensor is first expanded (a view)."""
    if x is None:
        return None
    x = x.movedim(dim, 0) if dim is not None else x.unsqueeze(0).expand(batch, *x.shape)
    return x.reshape(x.shape[0] * x.shape[1], *x.shape[2:])


def _unfold(x: Tensor, batch: Any) -> Tensor:
    return x.reshape(batch, x.shape[0] // batch, *x.shape[1:])


def _batch_size(dims: tuple[int | None, ...], tensors: tuple[Tensor | None, ...]) -> Any:
    return next(x.shape[d] for x, d in zip(tensors, dims, strict=False) if d is not None and x is not None)


def _apply(function: Any, *args: Any) -> Any:
    return function.apply(*args)


class _AttentionBackward(torch.autograd.Function):
    @staticmethod
    def forward(
        go: Any, q: Any, k: Any, v: Any, mask: Any, out: Any, lse: Any, kernel: Any, causal: Any, scale: Any, *rest: Any
    ) -> Any:
        return KERNELS[kernel].backward(go, q, k, v, mask, out, lse, rest, causal, scale)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass

    @staticmethod
    def vmap(info: Any, in_dims: Any, *args: Any) -> Any:
        batch = _batch_size(in_dims[:7], args[:7])
        folded = [_fold(x, d, batch) for x, d in zip(args[:7], in_dims[:7], strict=True)]
        grads = _apply(_AttentionBackward, *folded, *args[7:])
        return tuple(_unfold(g, batch) for g in grads), (0, 0, 0)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(q: Any, k: Any, v: Any, mask: Any, kernel: Any, causal: Any, scale: Any) -> Any:
        return KERNELS[kernel].forward(q, k, v, mask, causal, scale)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        q, k, v, mask, ctx.kernel, ctx.causal, ctx.scale = inputs
        ctx.save_for_backward(q, k, v, mask, *output)
        ctx.mark_non_differentiable(*output[1:])

    @staticmethod
    def backward(ctx: Any, go: Any, *_: Any) -> Any:
        q, k, v, mask, out, lse, *rest = ctx.saved_tensors
        grads = _apply(_AttentionBackward, go, q, k, v, mask, out, lse, ctx.kernel, ctx.causal, ctx.scale, *rest)
        return (*grads, None, None, None, None)

    @staticmethod
    def vmap(info: Any, in_dims: Any, *args: Any) -> Any:
        batch = _batch_size(in_dims[:4], args[:4])
        folded = [_fold(x, d, batch) for x, d in zip(args[:4], in_dims[:4], strict=True)]
        out, lse, *rest = _apply(_Attention, *folded, *args[4:])
        return (_unfold(out, batch), _unfold(lse, batch), *rest), (0, 0, *(None for _ in rest))


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
    dropout_p: float = 0.0,
    causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
    mask_is_trainable: bool = False,
    kernel: str = "cpu",
) -> Tensor:
    """``scaled_dot_product_attention`` of one sample, in a form that vmap folds; math where fusion does not apply.

    q ``[N, H, T, d]``, k and v ``[N, H, S, d]``, mask broadcastable to ``[N, H, T, S]``; same result as torch's own.
    ``kernel`` is one of ``KERNELS`` or "math"; flash takes heads padded to a multiple of 8, as torch's own gives it.
    """
    if enable_gqa and q.shape[-3] != k.shape[-3]:
        repeat = q.shape[-3] // k.shape[-3]
        k, v = k.repeat_interleave(repeat, -3), v.repeat_interleave(repeat, -3)
    fusable = (
        dropout_p == 0.0
        and kernel in KERNELS
        and q.dim() == k.dim() == v.dim() == 4
        and q.shape[:2] == k.shape[:2] == v.shape[:2]
        and q.shape[-1] == k.shape[-1] == v.shape[-1]
        and q.shape[-2] > 0
        and not mask_is_trainable
        and not (causal and mask is not None)
        and (mask is None or KERNELS[kernel].masked)
    )
    if not fusable:
        if dropout_p == 0.0 and q.device.type != "cpu":  # the backward of torch's own choice would be unrolled
            exact: Tensor = aten._scaled_dot_product_attention_math(q, k, v, mask, 0.0, causal, scale=scale)[0]
            return exact
        plain: Tensor = aten.scaled_dot_product_attention.default(q, k, v, mask, dropout_p, causal, scale=scale)
        return plain
    if mask is not None:
        if mask.dtype == torch.bool:
            mask = torch.zeros_like(mask, dtype=q.dtype).masked_fill(~mask, KERNELS[kernel].lowest)
        while mask.dim() < 4:
            mask = mask.unsqueeze(0)
        if mask.shape[0] != q.shape[0]:  # folding multiplies both by B, so a broadcast over N must be spelled out first
            mask = mask.expand(q.shape[0], *mask.shape[1:])
    head = q.shape[-1]
    if head % KERNELS[kernel].head:
        scale = scale if scale is not None else head**-0.5
        q, k, v = (torch.nn.functional.pad(x, [0, -head % KERNELS[kernel].head]) for x in (q, k, v))
    result: Tensor = _apply(_Attention, q, k, v, mask, kernel, causal, scale)[0]
    return result.narrow(-1, 0, head) if result.shape[-1] != head else result
