"""Attention as products, a block of heads at a time: the same numbers in all blocks, nothing of one record in another."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from dpbitfit_fx.passes import block_attention
from dpbitfit_fx.passes.block_attention import ATTEND, ATTEND_BACKWARD, LOWEST

aten = torch.ops.aten

M, H, T, S, D = 5, 3, 4, 6, 8
MASKS: dict[str, tuple[int, ...] | None] = {
    "none": None,
    "keys": (M, 1, 1, S),
    "all": (M, H, T, S),
    "heads": (1, H, T, S),
    "rows": (M, 1, T, S),
    "one": (T, S),
}
# One head, two, a record's, two records', all, in scores.
BLOCKS = [1, 2 * T * S, H * T * S, (2 * H + 1) * T * S, 10**9]


def inputs(dtype: torch.dtype, mask: tuple[int, ...] | None, length: int = S) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(M * H, n, D, generator=generator).to(dtype) for n in (T, length, length))
    g = torch.randn(M * H, T, D, generator=generator).to(dtype)
    added = torch.zeros(()) if mask is None else torch.randn(mask, generator=generator).to(dtype)
    return q, k, v, g, added


def plain(q: Tensor, k: Tensor, v: Tensor, g: Tensor, mask: Tensor | None, causal: bool) -> tuple[Tensor, ...]:
    """By autograd, in float64."""
    q, k, v = (x.double().view(M, H, *x.shape[1:]).requires_grad_() for x in (q, k, v))
    scores = q @ k.transpose(-1, -2)
    if causal:
        scores = scores.masked_fill(torch.ones(scores.shape[-2:]).triu(1).bool(), -math.inf)
    out = (scores if mask is None else scores + mask.double()).softmax(-1) @ v
    grads = torch.autograd.grad(out, [q, k, v], g.double().view_as(out))
    return tuple(x.flatten(0, 1) for x in (out, *grads))


def ours(q: Tensor, k: Tensor, v: Tensor, g: Tensor, mask: Tensor | None, causal: bool) -> tuple[Tensor, ...]:
    return ATTEND(q, k, v, mask, H, causal), *ATTEND_BACKWARD(g, q, k, v, mask, H, causal)


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("shape", MASKS.values(), ids=MASKS)
def test_in_blocks_of_whatever_size_it_is_attention_and_its_gradient(
    shape: Any, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(block_attention, "BLOCK", block)
    q, k, v, g, added = inputs(torch.float64, shape)
    mask = None if shape is None else added
    for found, wanted in zip(ours(q, k, v, g, mask, False), plain(q, k, v, g, mask, False), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("block", BLOCKS)
def test_a_causal_query_sees_nothing_ahead(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(block_attention, "BLOCK", block)
    q, k, v, g, _ = inputs(torch.float64, None, length=T)
    for found, wanted in zip(ours(q, k, v, g, None, True), plain(q, k, v, g, None, True), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("block", BLOCKS)
def test_nothing_of_one_record_is_found_in_another(
    dtype: torch.dtype, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Blocks share their memory: what the last one left there must not be read."""
    monkeypatch.setattr(block_attention, "BLOCK", block)
    q, k, v, g, mask = inputs(dtype, (M, 1, T, S))
    before = ours(q, k, v, g, mask, False)
    for at in range(M):
        own = slice(at * H, (at + 1) * H)
        for poison in (math.nan, math.inf, 1e30):
            q2, k2, v2, g2 = (x.clone() for x in (q, k, v, g))
            for x in (q2, k2, v2, g2):
                x[own] = poison
            others = torch.ones(M * H).bool()
            others[own] = False
            for x, y in zip(before, ours(q2, k2, v2, g2, mask, False), strict=True):
                assert torch.equal(x[others], y[others])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("length", [1, 6, 33, 128, 1500, 5000])
def test_torchs_softmax_and_its_gradient_may_write_over_what_they_read(dtype: torch.dtype, length: int) -> None:
    """Undocumented, so it is asked of every torch that this runs on."""
    generator = torch.Generator().manual_seed(length)
    x, g = (torch.randn(7, 3, length, generator=generator).to(dtype) for _ in range(2))
    p = torch.softmax(x, -1)
    wanted = aten._softmax_backward_data(g, p, -1, dtype)
    assert torch.equal(torch.softmax(x, -1, out=x), p)
    assert torch.equal(aten._softmax_backward_data.out(g, p, -1, dtype, grad_input=g), wanted)


@pytest.mark.parametrize("shape", [(40, 1, 1, 70), (40, 2, 50, 70)])
def test_many_heads_of_many_scores_go_in_blocks_of_the_usual_size(shape: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(1)
    q, g = (torch.randn(80, 50, 16, generator=generator) for _ in range(2))
    k, v = (torch.randn(80, 70, 16, generator=generator) for _ in range(2))
    mask = torch.where(torch.rand(shape, generator=generator) < 0.3, LOWEST, 0.0)
    found = ATTEND(q, k, v, mask, 2, False), *ATTEND_BACKWARD(g, q, k, v, mask, 2, False)
    q4, k4, v4, g4 = (x.double().view(40, 2, *x.shape[1:]) for x in (q, k, v, g))
    leaves = [x.requires_grad_() for x in (q4, k4, v4)]
    out = (q4 @ k4.transpose(-1, -2) + mask).softmax(-1) @ v4
    for ours, theirs in zip(found, (out, *torch.autograd.grad(out, leaves, g4)), strict=True):
        torch.testing.assert_close(ours.double(), theirs.flatten(0, 1), rtol=1e-4, atol=1e-4)


def test_they_are_what_torch_expects_of_an_operator() -> None:
    q, k, v, g, mask = inputs(torch.float32, (M, 1, T, S))
    torch.library.opcheck(ATTEND, (q, k, v, mask, H, False))
    torch.library.opcheck(ATTEND_BACKWARD, (g, q, k, v, mask, H, False))
