"""Operators of our own: attention as products, a block of heads at a time, whose scores stay in the caches and are never kept.

    attend(q [N, T, d], k [N, S, d], v [N, S, d], mask, causal)  ->  softmax(q kt + mask) v        [N, T, d]
    attend_backward(g [N, T, d], q, k, v, mask, causal)          ->  dq, dk, dv

N = M H heads of M rows, q scaled already; ``mask`` [M or 1, H or 1, T or 1, S] is added to the scores, and causal hides what lies
ahead. Of each block, with P = softmax(q kt + mask) and ``BLOCK`` scores at most (or one head's):

    out = P v        dv = Pt g    dS = P (g vt - sum_s P g vt)    dq = dS k    dk = dSt q

P is worked out again in the backward pass, so that neither it nor the scores [N, T, S] ever lie in memory whole. In bfloat16
products add up in float32 and round their result; softmax works in float32. Every head is computed from its own rows alone,
and a block's memory is written whole before it is read.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from .opaque import LIBRARY

BLOCK = 2**20  # scores at once: 2 MB in bfloat16
LOWEST = -1e30  # added to any score it leaves only itself, and no infinity

LIBRARY.define("attend(Tensor q, Tensor k, Tensor v, Tensor? mask, int heads, bool causal) -> Tensor")
LIBRARY.define(
    "attend_backward(Tensor g, Tensor q, Tensor k, Tensor v, Tensor? mask, int heads, bool causal)"
    " -> (Tensor, Tensor, Tensor)"
)


def _turned(x: Tensor) -> Tensor:
    return x.transpose(1, 2)


def _blocks(q: Tensor, k: Tensor, mask: Tensor | None, heads: int, causal: bool) -> Iterator[tuple[slice, Tensor]]:
    """Each block of heads and its P, in memory that the next block reuses."""
    (n, t, _), s = q.shape, k.shape[1]
    at_once = max(1, BLOCK // max(1, t * s))
    if at_once > heads:
        at_once -= at_once % heads  # whole rows
    mask = None if mask is None else mask.reshape((1,) * (4 - mask.dim()) + mask.shape)
    scores = q.new_empty(min(n, at_once), t, s)
    ahead = q.new_full((t, s), LOWEST).triu_(1) if causal else None
    start = 0
    while start < n:
        row, first = divmod(start, heads)
        count = min(at_once, n - start) if at_once >= heads else min(at_once, heads - first)
        block = slice(start, start + count)
        p = scores[:count]
        torch.bmm(q[block], _turned(k[block]), out=p)
        if ahead is not None:
            p.add_(ahead)
        if mask is not None:
            rows = slice(row, row + max(1, count // heads)) if mask.shape[0] > 1 else slice(None)
            own = slice(first, first + count) if mask.shape[1] > 1 and count < heads else slice(None)
            p.view(-1, min(count, heads), t, s).add_(mask[rows, own])
        torch.softmax(p, -1, out=p)
        yield block, p
        start += count


def _room_for(*tensors: Tensor) -> tuple[Tensor, ...]:
    return tuple(torch.empty_like(x, memory_format=torch.contiguous_format) for x in tensors)


def _attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, heads: int, causal: bool) -> Tensor:
    (out,) = _room_for(q)
    for block, p in _blocks(q, k, mask, heads, causal):
        torch.bmm(p, v[block], out=out[block])
    return out


def _attend_backward(
    g: Tensor, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, heads: int, causal: bool
) -> tuple[Tensor, Tensor, Tensor]:
    dq, dk, dv = _room_for(q, k, v)
    other: Tensor | None = None
    for block, p in _blocks(q, k, mask, heads, causal):
        other = torch.empty_like(p) if other is None else other
        ds = other[: len(p)]
        torch.bmm(_turned(p), g[block], out=dv[block])
        torch.bmm(g[block], _turned(v[block]), out=ds)
        torch.ops.aten._softmax_backward_data.out(ds, p, -1, p.dtype, grad_input=ds)
        torch.bmm(ds, k[block], out=dq[block])
        torch.bmm(_turned(ds), q[block], out=dk[block])
    return dq, dk, dv


def _attend_fake(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, heads: int, causal: bool) -> Tensor:
    return _room_for(q)[0]


def _backward_fake(
    g: Tensor, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, heads: int, causal: bool
) -> tuple[Tensor, Tensor, Tensor]:
    dq, dk, dv = _room_for(q, k, v)
    return dq, dk, dv


LIBRARY.impl("attend", _attend, "CompositeExplicitAutograd")
LIBRARY.impl("attend_backward", _attend_backward, "CompositeExplicitAutograd")
torch.library.register_fake("dpbitfit_fx::attend", _attend_fake, lib=LIBRARY)
torch.library.register_fake("dpbitfit_fx::attend_backward", _backward_fake, lib=LIBRARY)
ATTEND: Any = torch.ops.dpbitfit_fx.attend.default
ATTEND_BACKWARD: Any = torch.ops.dpbitfit_fx.attend_backward.default
