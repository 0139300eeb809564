"""The operators that capture writes in others before vmap give torch's own numbers; a mutant of any of them does not."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import draws
import pytest
import torch
import torch.nn.functional as F
from draws import D
from torch import Tensor, nn
from torch.func import vmap

from dpbitfit_fx.passes.functional_program import functional_program
from dpbitfit_fx.passes.one_sample import OneSample
from dpbitfit_fx.passes.sample_rules import DECOMPOSED

aten = torch.ops.aten
B = 3
Fn = Callable[..., Any]


class Draw(draws.Draw):
    """One example of ``B`` samples."""

    def sizes(self, count: int, low: int, high: int) -> list[int]:
        return [self.whole(low, high) for _ in range(count)]

    def rows(self, *shape: int) -> Tensor:
        return self.floats(B, *shape)

    def classes(self, count: int, *shape: int) -> Tensor:
        return self.ints(0, count - 1, B, *shape)


@dataclasses.dataclass(frozen=True)
class Case:
    """``draw`` gives tensors [B, ..], a row of each per sample, and the operator's other arguments.

    ``mutant(original)`` is a wrong decomposition: the right one on other arguments, or a neighbouring operator.
    """

    draw: Callable[[Draw], tuple[list[Tensor], list[Any]]]
    mutant: Callable[[Fn], Fn]


def resized(dims: int) -> Callable[[Draw], tuple[list[Tensor], list[Any]]]:
    def draw(d: Draw) -> tuple[list[Tensor], list[Any]]:
        x = d.rows(d.whole(1, 3), *d.sizes(dims, 2, 5))
        if d.whole(0, 1):
            return [x], [None, [d.whole(2, 9) / 4 for _ in range(dims)]]
        return [x], [d.sizes(dims, 1, 9), None]

    return draw


def affine(d: Draw) -> tuple[list[Tensor], list[Any]]:
    dims = d.whole(2, 3)
    return [d.rows(dims, dims + 1)], [[1, 2, *d.sizes(dims, 2, 4)], bool(d.whole(0, 1))]


def pooled(dims: int) -> Callable[[Draw], tuple[list[Tensor], list[Any]]]:
    pool: Fn = F.max_pool2d if dims == 2 else F.max_pool3d

    def draw(d: Draw) -> tuple[list[Tensor], list[Any]]:
        channels, cells = d.whole(1, 2), d.sizes(dims, 1, 3)
        full = [2 * c for c in cells]
        _, places = pool(d.rows(channels, *full), 2, return_indices=True)
        rest = [full] if dims == 2 else [full, [2] * dims, [0] * dims]
        return [d.rows(channels, *cells), places], rest

    return draw


def signed(d: Draw) -> tuple[list[Tensor], list[Any]]:
    shape = d.sizes(d.whole(1, 2), 1, 4)
    return [d.rows(*shape), 1.0 - 2 * d.classes(2, *shape).to(D)], [d.whole(0, 2)]


def classes(d: Draw) -> tuple[list[Tensor], list[Any]]:
    count = d.whole(2, 5)
    weight = torch.rand(count, generator=d.generator, dtype=D) if d.whole(0, 1) else None
    return [d.rows(count), d.classes(count)], [d.whole(1, 2), 0.5 + d.whole(0, 1), weight, d.whole(0, 2)]


def moved(original: Fn) -> Fn:
    """Every value one place further in its plane."""

    def unpool(x: Tensor, places: Tensor, size: list[int], *rest: Any) -> Any:
        volume = 1
        for s in size:
            volume *= s
        return original(x, (places + 1) % volume, size, *rest)

    return unpool


CASES: dict[Any, Case] = {
    aten._upsample_nearest_exact1d.vec: Case(resized(1), lambda f: aten.upsample_nearest1d.vec),
    aten._upsample_nearest_exact2d.vec: Case(resized(2), lambda f: aten.upsample_nearest2d.vec),
    aten._upsample_nearest_exact3d.vec: Case(resized(3), lambda f: aten.upsample_nearest3d.vec),
    aten.affine_grid_generator.default: Case(affine, lambda f: lambda t, size, corners: f(t, size, not corners)),
    aten.max_unpool2d.default: Case(pooled(2), moved),
    aten.max_unpool3d.default: Case(pooled(3), moved),
    aten.soft_margin_loss.default: Case(signed, lambda f: lambda x, y, *rest: f(x, -y, *rest)),
    aten.multi_margin_loss.default: Case(
        classes, lambda f: lambda x, y, p=1, margin=1, weight=None, *rest: f(x, y, p, 1.01 * margin, weight, *rest)
    ),
}


class Call(nn.Module):
    def __init__(self, op: Any, rest: list[Any]) -> None:
        super().__init__()
        self.op, self.rest = op, rest

    def forward(self, *tensors: Tensor) -> Tensor:
        result: Tensor = self.op(*tensors, *self.rest)
        return result


def value_and_gradient(run: Fn, tensors: list[Tensor]) -> tuple[Tensor, Tensor]:
    """The value [B, ..] and the gradient of a weighted sum of it with respect to the first tensor."""
    x = tensors[0].detach().requires_grad_()
    value = run(x, *tensors[1:])
    weights = torch.linspace(-1, 2, value.numel(), dtype=D).reshape(value.shape)
    return value.detach(), torch.autograd.grad((value * weights).sum(), x)[0]


def agree(op: Any, seed: int) -> bool:
    """Whether what capture makes of the operator, under vmap, equals torch's operator on each sample."""
    tensors, rest = CASES[op].draw(Draw(seed))
    call = Call(op, rest)
    exported = torch.export.export(call, tuple(x[:1].clone() for x in tensors), strict=False)
    assert op in [n.target for n in exported.graph.nodes]
    program = functional_program(exported, DECOMPOSED)
    assert op not in [n.target for n in program.graph.nodes]
    state = {**program.constants, **program.state_dict}
    held = [state[s.target] for s in program.graph_signature.input_specs if s.target is not None]
    one = OneSample(program.graph_module)

    def ours(*x: Tensor) -> Any:
        return vmap(lambda *y: one.run(*held, *(t[None] for t in y), enable_io_processing=False)[0])(*x)

    def loop(*x: Tensor) -> Tensor:
        return torch.stack([call(*(t[i : i + 1] for t in x)) for i in range(B)])

    pairs = zip(value_and_gradient(ours, tensors), value_and_gradient(loop, tensors), strict=True)
    return all(a.shape == b.shape and torch.allclose(a, b, rtol=1e-10, atol=1e-11) for a, b in pairs)


def test_every_decomposition_of_capture_has_a_case_here_and_is_torchs_to_give() -> None:
    assert set(CASES) == set(DECOMPOSED) and len(DECOMPOSED) == len(CASES)
    assert set(DECOMPOSED) <= set(torch.export.default_decompositions())


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("op", CASES, ids=str)
def test_the_decomposition_under_vmap_equals_torchs_operator_on_each_sample(op: Any, seed: int) -> None:
    assert agree(op, seed)


@pytest.mark.parametrize("op", CASES, ids=str)
def test_the_comparison_kills_a_mutant_of_the_decomposition(op: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    mutant = CASES[op].mutant(torch.export.default_decompositions()[op])
    monkeypatch.setattr(torch.export, "default_decompositions", lambda: {op: mutant})
    for key in op.py_kernels:  # where torch registers the decomposition at the operator itself, that one comes first
        monkeypatch.setitem(op.py_kernels, key, mutant)
    op._dispatch_cache.clear()
    try:
        assert not all(agree(op, seed) for seed in range(4))
    finally:
        monkeypatch.undo()
        op._dispatch_cache.clear()
    assert agree(op, 0)
