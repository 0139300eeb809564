"""CUDA's three fused attention operators written out, so that graphs that hold them run on the CPU."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def wide(x: Any) -> Any:
    """The kernels add up in float32 and keep their log-sum-exp in it."""
    return x.float() if isinstance(x, Tensor) and x.dtype is torch.bfloat16 else x


def scores(q: Tensor, k: Tensor, bias: Tensor | None, causal: bool, scale: float | None) -> Tensor:
    x = q @ k.mT * (q.shape[-1] ** -0.5 if scale is None else scale)
    if causal:
        x = x.masked_fill(~torch.ones(x.shape[-2:], dtype=torch.bool).tril(), float("-inf"))
    return x if bias is None else x + bias


def forward(q: Tensor, k: Tensor, v: Tensor, bias: Any, causal: bool, scale: Any) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp [M, H, T], on arguments that the kernel would take."""
    assert all(x.dim() == 4 and x.stride(-1) == 1 for x in (q, k, v))
    if bias is not None:
        assert bias.shape == (*q.shape[:3], k.shape[2]) and bias.dtype == q.dtype
        assert bias.stride(-1) == 1 and all(s % 8 == 0 for s in bias.stride()[:-1])
    x = scores(wide(q), wide(k), wide(bias), causal, scale)
    return (x.softmax(-1) @ wide(v)).to(q.dtype), x.logsumexp(-1)


def backward(
    go: Tensor, q: Tensor, k: Tensor, v: Tensor, bias: Any, out: Tensor, lse: Tensor, causal: bool, scale: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """The flash recurrence: probabilities from the scores and the log-sum-exp that the forward kept."""
    assert go.stride(-1) == 1 and go.dtype == q.dtype == out.dtype
    kind, (go, q, k, v, bias, out) = q.dtype, map(wide, (go, q, k, v, bias, out))
    p = (scores(q, k, bias, causal, scale) - lse.unsqueeze(-1)).exp()
    inner = p * (go @ v.mT - (go * out).sum(-1, keepdim=True)) * (q.shape[-1] ** -0.5 if scale is None else scale)
    return (inner @ k).to(kind), (inner.mT @ q).to(kind), (p.mT @ go).to(kind)


def state(dtype: torch.dtype = torch.int64, shape: tuple[int, ...] = ()) -> Tensor:
    return torch.zeros(shape, dtype=dtype)


def by_position(x: Tensor) -> Tensor:
    """[M, H, T, d] that lies in memory as [M, T, H, d], as this kernel gives it."""
    return x.transpose(1, 2).contiguous().transpose(1, 2)


def efficient(q, k, v, bias, keep, p=0.0, causal=False, *, scale=None):  # type: ignore[no-untyped-def]
    assert keep and p == 0
    out, lse = forward(q, k, v, bias, causal, scale)
    return by_position(out), F.pad(lse, [0, -lse.shape[-1] % 32], value=float("nan")), state(), state()


def efficient_backward(  # type: ignore[no-untyped-def]
    go, q, k, v, bias, out, lse, seed, offset, p, wanted, causal=False, *, scale=None
):
    assert wanted == [True, True, True, False] and p == 0 and seed.dim() == offset.dim() == 0
    return *map(by_position, backward(go, q, k, v, bias, out, lse[..., : q.shape[2]], causal, scale)), None


def flash(q, k, v, p=0.0, causal=False, debug=False, *, scale=None):  # type: ignore[no-untyped-def]
    assert q.shape[-1] % 8 == 0 and p == 0
    out, lse = forward(q, k, v, None, causal, scale)
    sizes = q.shape[2], k.shape[2]
    return out, lse, None, None, *sizes, state(torch.uint64, (2,)), state(torch.uint64), q.new_zeros(0)


def flash_backward(  # type: ignore[no-untyped-def]
    go, q, k, v, out, lse, start_q, start_k, max_q, max_k, p, causal, seed, offset, *, scale=None
):
    assert (max_q, max_k, p) == (q.shape[2], k.shape[2], 0) and seed.shape == (2,) and offset.shape == ()
    return backward(go, q, k, v, None, out, lse, causal, scale)


def cudnn(q, k, v, bias, keep, p=0.0, causal=False, debug=False, *, scale=None):  # type: ignore[no-untyped-def]
    assert keep and p == 0
    out, lse = forward(q, k, v, bias, causal, scale)
    return out, lse.unsqueeze(-1), None, None, q.shape[2], k.shape[2], state(), state(), None


def cudnn_backward(  # type: ignore[no-untyped-def]
    go, q, k, v, out, lse, seed, offset, bias, start_q, start_k, max_q, max_k, p, causal, *, scale=None
):
    assert (max_q, max_k, p) == (q.shape[2], k.shape[2], 0) and seed.dim() == offset.dim() == 0
    return backward(go, q, k, v, bias, out, lse.squeeze(-1), causal, scale)


@contextlib.contextmanager
def registered() -> Iterator[None]:
    """The CUDA operators have CPU kernels inside: the references above."""
    make: Any = torch.library.Library
    library = make("aten", "IMPL")
    for name, run in (("flash", flash), ("efficient", efficient), ("cudnn", cudnn)):
        library.impl(f"_scaled_dot_product_{name}_attention", run, "CPU")
        library.impl(f"_scaled_dot_product_{name}_attention_backward", globals()[f"{name}_backward"], "CPU")
    try:
        yield
    finally:
        library._destroy()
