"""torch's fused attention kernels on tensors whose sample axis is folded into their batch axis; dropout is zero.

    forward(q, k, v, mask, causal, scale)  ->  (out, lse, *rest)     q [M, H, T, d], k and v [M, H, S, d], M = B * N
    backward(go, q, k, v, mask, out, lse, rest, causal, scale)  ->  (dq, dk, dv)

mask [M, 1 or H, 1 or T, S] is added to the scores. lse holds a row per entry of M, whatever else its shape: [M, H, T] for
CPU and CUDA flash, [M, H, T rounded up to 32] for efficient, [M, H, T, 1] for cuDNN. ``rest`` is the kernel's random
state, one for all M, unread without dropout.

functorch (torch 2.13) batches the forward of the three CUDA kernels and loops over samples in their backward; the CPU
kernel it loops over in both. No GPU has run the CUDA kernels here: their numbers were compared with reference
implementations of the same operators registered for the CPU, their shapes seen on fake CUDA tensors. A build of torch
without CUDA has no device guard for fake CUDA tensors, and autograd aborts on the first that needs a gradient.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

aten = torch.ops.aten


class Kernel(NamedTuple):
    """``head`` is what the head dimension must be a multiple of, ``lowest`` what a bool mask's False becomes."""

    forward: Callable[..., Any]
    backward: Callable[..., Any]
    masked: bool = True
    head: int = 1
    lowest: float = float("-inf")


def _dense(*tensors: Tensor) -> list[Tensor]:
    """The CUDA kernels read rows of stride one; the gradient of a sum has stride zero."""
    return [x if x.stride(-1) == 1 else x.contiguous() for x in tensors]


def _spread(mask: Tensor | None, q: Tensor, k: Tensor, alignment: int = 8) -> Tensor | None:
    """``[M, 1 or H, 1 or T, 1 or S] -> [M, H, T, S]``, a view with strides that ``alignment`` divides, as torch's own."""
    if mask is None:
        return None
    mask = mask.expand(*mask.shape[:-1], k.shape[2])
    size = mask.shape[-1]
    if mask.stride(-1) != 1 or any(s % alignment for s in mask.stride()[:-1]):
        mask = torch.nn.functional.pad(mask, [0, alignment - size % alignment]).narrow(-1, 0, size)
    return mask.expand(q.shape[0], q.shape[1], q.shape[2], k.shape[2])


def _cpu(q: Tensor, k: Tensor, v: Tensor, mask: Any, causal: bool, scale: Any) -> Any:
    return aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, causal, attn_mask=mask, scale=scale)


def _cpu_backward(
    go: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Any,
    out: Tensor,
    lse: Tensor,
    rest: Any,
    causal: bool,
    scale: Any,
) -> Any:
    return aten._scaled_dot_product_flash_attention_for_cpu_backward(
        go, q, k, v, out, lse, 0.0, causal, attn_mask=mask, scale=scale
    )


def _flash(q: Tensor, k: Tensor, v: Tensor, mask: Any, causal: bool, scale: Any) -> Any:
    q, k, v = _dense(q, k, v)
    out = aten._scaled_dot_product_flash_attention(q, k, v, 0.0, causal, False, scale=scale)
    return out[0], out[1], out[6], out[7]


def _flash_backward(
    go: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Any,
    out: Tensor,
    lse: Tensor,
    rest: Any,
    causal: bool,
    scale: Any,
) -> Any:
    go, q, k, v = _dense(go, q, k, v)
    return aten._scaled_dot_product_flash_attention_backward(
        go, q, k, v, out, lse, None, None, q.shape[-2], k.shape[-2], 0.0, causal, *rest, scale=scale
    )


def _efficient(q: Tensor, k: Tensor, v: Tensor, mask: Any, causal: bool, scale: Any) -> Any:
    q, k, v = _dense(q, k, v)
    bias = _spread(mask, q, k)
    return aten._scaled_dot_product_efficient_attention(q, k, v, bias, True, 0.0, causal, scale=scale)


def _efficient_backward(
    go: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Any,
    out: Tensor,
    lse: Tensor,
    rest: Any,
    causal: bool,
    scale: Any,
) -> Any:
    go, q, k, v = _dense(go, q, k, v)
    wanted = [True, True, True, False]
    return aten._scaled_dot_product_efficient_attention_backward(
        go, q, k, v, _spread(mask, q, k), out, lse, *rest, 0.0, wanted, causal, scale=scale
    )[:3]


def _cudnn(q: Tensor, k: Tensor, v: Tensor, mask: Any, causal: bool, scale: Any) -> Any:
    q, k, v = _dense(q, k, v)
    bias = _spread(mask, q, k)
    out = aten._scaled_dot_product_cudnn_attention(q, k, v, bias, True, 0.0, causal, False, scale=scale)
    return out[0], out[1], out[6], out[7]


def _cudnn_backward(
    go: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Any,
    out: Tensor,
    lse: Tensor,
    rest: Any,
    causal: bool,
    scale: Any,
) -> Any:
    go, q, k, v = _dense(go, q, k, v)
    sizes = q.shape[-2], k.shape[-2]
    return aten._scaled_dot_product_cudnn_attention_backward(
        go, q, k, v, out, lse, *rest, _spread(mask, q, k), None, None, *sizes, 0.0, causal, scale=scale
    )


KERNELS = {
    "cpu": Kernel(_cpu, _cpu_backward),
    "flash": Kernel(_flash, _flash_backward, masked=False, head=8),
    "efficient": Kernel(_efficient, _efficient_backward),
    "cudnn": Kernel(_cudnn, _cudnn_backward, lowest=-65504.0),
}
