"""Grouped products, histograms and open-ended slice writes equal torch's, forward, backward and over samples; mutants fail."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.func import grad, vmap

import dpbitfit_fx as dpb
from dpbitfit_fx.passes import routing_rules

D = torch.float64
FAR = 9223372036854775807  # how torch writes "to the end"
property_test = settings(max_examples=15, phases=[Phase.explicit, Phase.generate], report_multiple_bugs=False)
Rule = Callable[..., Any]


def equal(a: Tensor, b: Tensor) -> None:
    assert a.shape == b.shape and a.dtype == b.dtype
    assert torch.allclose(a, b, rtol=1e-10, atol=1e-11)


def weighted(fn: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A scalar of a function's whole result, so that its gradient tells apart every coordinate."""

    def scalar(*args: Any) -> Tensor:
        value = fn(*args)
        return (value * torch.linspace(-1, 2, value.numel(), dtype=value.dtype).reshape(value.shape)).sum()

    return scalar


def over_samples(rule: Rule, loop: Rule, *inputs: Tensor, differentiable: int) -> None:
    """Values and gradients of ``vmap(rule)`` against ``loop`` for one sample after the other; inputs [B, ...]."""
    equal(vmap(rule)(*inputs), torch.stack([loop(*row) for row in zip(*inputs, strict=True)]))
    if differentiable:
        at = tuple(range(differentiable))
        ours = vmap(grad(weighted(rule), argnums=at))(*inputs)
        theirs = [grad(weighted(loop), argnums=at)(*row) for row in zip(*inputs, strict=True)]
        for i in at:
            equal(ours[i], torch.stack([t[i] for t in theirs]))


def grouped_loop(x: Tensor, w: Tensor, offs: Tensor) -> Tensor:
    """Group by group, as torch and transformers define it; rows behind the last group are zero."""
    pieces, start = [], 0
    for e, end in enumerate(offs.tolist()):
        pieces.append(x[start:end] @ w[e])
        start = end
    return torch.cat([*pieces, x.new_zeros(x.shape[0] - start, w.shape[2])])


def grouped_claim(rule: Rule) -> None:
    @property_test
    @given(
        rows=st.integers(1, 6),
        groups=st.integers(1, 4),
        k=st.integers(1, 4),
        n=st.integers(1, 3),
        strided=st.booleans(),
    )
    def claim(rows: int, groups: int, k: int, n: int, strided: bool) -> None:
        offs = (
            torch.randint(0, rows + 1, (3, groups)).sort(1).values.int()
        )  # empty groups and left-over rows among them
        x, w = torch.randn(3, rows, k, dtype=D), torch.randn(3, groups, k, n, dtype=D)
        if strided:
            x, w = x.mT.contiguous().mT, w.mT.contiguous().mT
        over_samples(rule, grouped_loop, x, w, offs, differentiable=2)

    claim()


def histogram_claim(rule: Rule) -> None:
    @property_test
    @given(
        size=st.integers(1, 12),
        bins=st.integers(1, 5),
        low=st.integers(-2, 1),
        width=st.floats(0.5, 4),
        whole=st.booleans(),
    )
    def claim(size: int, bins: int, low: int, width: float, whole: bool) -> None:
        x = torch.randn(3, size, dtype=D) * 2
        if whole:  # every value falls on an edge, or outside
            x, width = x.round(), bins
        over_samples(
            lambda row: rule(row, bins, low, low + width),
            lambda row: torch.histc(row, bins, low, low + width),
            x,
            differentiable=0,
        )

    claim()


def slice_claim(rule: Rule) -> None:
    @property_test
    @given(
        size=st.integers(1, 6),
        start=st.one_of(st.none(), st.integers(-7, 7)),
        end=st.one_of(st.none(), st.integers(-7, 7), st.just(FAR)),
        step=st.integers(1, 3),
        dim=st.sampled_from([0, 1, -1]),
    )
    def claim(size: int, start: int | None, end: int | None, step: int, dim: int) -> None:
        x = torch.randn(3, size, size, dtype=D)
        shape = x[0].transpose(0, dim)[slice(start, end, step)].transpose(0, dim).shape
        source = torch.randn(3, *shape, dtype=D)

        def loop(x: Tensor, source: Tensor) -> Tensor:
            out = x.clone()
            out.transpose(0, dim)[slice(start, end, step)] = source.transpose(0, dim)
            return out

        over_samples(lambda x, s: rule(x, s, dim, start, end, step), loop, x, source, differentiable=2)

    claim()


def copy_claim(rule: Rule) -> None:
    @property_test
    @given(rows=st.integers(1, 4), columns=st.integers(1, 4), wide=st.booleans(), narrow=st.booleans())
    def claim(rows: int, columns: int, wide: bool, narrow: bool) -> None:
        x = torch.randn(3, rows, columns, dtype=torch.float32 if narrow else D)
        source = torch.randn(3, columns, dtype=D) if wide else torch.randn(3, columns, rows, dtype=D).mT
        zero = torch.zeros((), dtype=x.dtype)

        def loop(x: Tensor, source: Tensor) -> Tensor:
            return (x * zero).copy_(source)

        over_samples(rule, loop, x, source, differentiable=2)

    claim()


RULES: dict[str, tuple[Callable[[Rule], None], Rule]] = {
    "grouped product": (grouped_claim, routing_rules.grouped_product),
    "histogram": (histogram_claim, routing_rules._histc),
    "copy": (copy_claim, routing_rules._copy),
    "slice write": (slice_claim, routing_rules._slice_scatter),
}


@pytest.mark.parametrize("name", RULES)
def test_the_rule_equals_torch_over_samples_for_any_shape(name: str) -> None:
    claim, rule = RULES[name]
    claim(rule)


@pytest.mark.parametrize(
    ("name", "right", "wrong"),
    [
        ("grouped product", "row < offs", "row <= offs"),
        ("grouped product", "before & ~", "before | ~"),
        ("grouped product", "before & ~torch.nn.functional.pad(before, (1, -1))", "before"),
        ("histogram", "x >= edges[:-1]", "x > edges[:-1]"),
        ("histogram", "x < edges[1:]", "x <= edges[1:]"),
        ("histogram", "(inside | last)", "inside"),
        ("copy", ".to(x.dtype)", ""),
        ("copy", ".expand(x.shape)", ""),
        ("copy", "source.to", "(x + source).to"),
        ("slice write", "max(first, last), step", "last - 1, step"),
        ("slice write", "first, max", "0, max"),
        ("slice write", "last), step)", "last), 1)"),
    ],
)
def test_a_mutant_of_the_rule_is_caught(name: str, right: str, wrong: str) -> None:
    claim, rule = RULES[name]
    source = inspect.getsource(rule)
    assert source.count(right) == 1
    scope = dict(vars(routing_rules))
    exec(source.replace(right, wrong), scope)
    with pytest.raises((AssertionError, RuntimeError)):
        claim(scope[rule.__name__])


def test_a_histogram_of_the_datas_own_range_stays_torchs() -> None:
    values = torch.randn(9)
    assert torch.equal(routing_rules._histc(values, 4), torch.histc(values, 4))


class Writes(nn.Module):
    """In-place writes, strided views and copies between two linear layers, as user code has them."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(6, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.first(x))
        buffer = torch.zeros(x.shape[0], 12, dtype=h.dtype)
        buffer[:, 1:9].copy_(h)
        buffer[:, ::3] *= 2
        buffer[:, 2:] += buffer[:, :-2].clone()
        square = buffer.view(-1, 3, 4).transpose(1, 2)
        square[:, 0].sub_(square[:, 1]).mul_(1.5)
        flat = square.mT.contiguous().view(-1, 12)[:, 2:10]
        flat.mul_(0.5)
        out: Tensor = self.last(flat)
        return out


def test_writes_in_place_through_views_are_batched_like_a_loop() -> None:
    model = Writes().double()
    batch = (torch.randn(5, 6, dtype=D), torch.arange(5) % 3)

    def loss(model: Any, batch: Any) -> Tensor:
        return nn.functional.cross_entropy(model(batch[0]), batch[1], reduction="none")

    ours = dpb.compile(model, loss, batch).per_sample_gradients(batch)
    for i in range(5):
        theirs = torch.autograd.grad(loss(model, [x[i : i + 1] for x in batch])[0], [model.first.bias, model.last.bias])
        for mine, other in zip(ours.values(), theirs, strict=True):
            equal(mine[i], other)
