"""What a program says of its data's values: assertions, sizes read off the data, and backwards of the model's own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from small_models import Sandwich, losses, none_below, points
from torch import Tensor, fx

import dpbitfit_fx as dpb
from dpbitfit_fx.passes.checks import data_dependent_origin

aten = torch.ops.aten


def test_an_assertion_on_values_is_taken_out_and_told_and_the_rest_stays() -> None:
    torch.manual_seed(0)
    plain = Sandwich()
    model = Sandwich(none_below)
    model.load_state_dict(plain.state_dict())
    step, other = dpb.compile(model, losses, points()), dpb.compile(plain, losses, points())
    for ours, theirs in zip(
        step.per_sample_gradients(points()).values(), other.per_sample_gradients(points()).values(), strict=True
    ):
        assert torch.equal(ours, theirs)
    (told,) = step.report().dropped
    assert "small_models.py" in told and "assert" in told
    assert "assertion on values taken out" in str(step.report()) and not other.report().dropped


class Halved(torch.autograd.Function):
    """x, with half the gradient: a backward that is not the derivative of the forward."""

    factor = 0.5

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x * 1.0

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return grads[0] * Halved.factor


def test_a_backward_of_the_models_own_is_refused_by_the_name_of_its_function() -> None:
    with pytest.raises(dpb.CompileRefused, match=r"first.bias.*autograd.Function Halved with a backward of its own"):
        dpb.compile(Sandwich(lambda h: Halved.apply(h)), losses, points())  # type: ignore[no-untyped-call]


def test_a_backward_of_its_own_that_is_the_derivative_is_no_obstacle(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Halved, "factor", 1.0)
    dpb.compile(Sandwich(lambda h: Halved.apply(h)), losses, points())  # type: ignore[no-untyped-call]


def test_a_wrong_gradient_that_is_small_beside_the_others_is_refused_too() -> None:
    """The middle's gradient reaches ``first.bias`` scaled by 1e-4: far below a thousandth of the whole gradient's norm."""

    def middle(h: Tensor) -> Tensor:
        halved: Tensor = Halved.apply(h * 1e-3)  # type: ignore[no-untyped-call]
        return halved

    with pytest.raises(dpb.CompileRefused, match="Halved"):
        dpb.compile(Sandwich(middle), losses, points())


def test_the_operator_that_reads_a_size_off_the_data_is_found_behind_those_that_use_it() -> None:
    graph = fx.Graph()
    x = graph.placeholder("x")
    aside = graph.call_function(aten.item.default, (graph.call_function(aten.sum.default, (x,)),))
    indices = graph.call_function(aten.nonzero.default, (x,))
    user = graph.call_function(aten.mul.Tensor, (graph.call_function(aten.sum.default, (indices,)), x))
    assert data_dependent_origin(user) is indices
    assert data_dependent_origin(aside) is aside
    assert data_dependent_origin(graph.call_function(aten.sin.default, (x,))) is None
