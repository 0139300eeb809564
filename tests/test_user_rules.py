"""A user's rule for an operator of their own is believed only if it is the operator, row by row."""
# mypy: disable-error-code="untyped-decorator, no-untyped-call, dict-item, misc"

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from small_models import Sandwich, losses, points, refusal
from torch import Tensor

import dpbitfit_fx as dpb
from dpbitfit_fx.passes import user_rules

op: Any = torch.library.custom_op


@op("dpbitfit_test::swish", mutates_args=())
def swish(x: Tensor, beta: float) -> Tensor:
    """Opaque to torch: a kernel that works on the detached array."""
    z = x.detach().double().numpy()
    return torch.from_numpy(z / (1 + pow(2.718281828459045, -beta * z))).to(x.dtype)


@swish.register_fake
def _(x: Tensor, beta: float) -> Tensor:
    return torch.empty_like(x)


def _setup(ctx: Any, inputs: Any, output: Any) -> None:
    x, ctx.beta = inputs
    ctx.save_for_backward(x)


def _backward(ctx: Any, grad: Tensor) -> Any:
    (x,) = ctx.saved_tensors
    s = torch.sigmoid(ctx.beta * x)
    return grad * (s + ctx.beta * x * s * (1 - s)), None


swish.register_autograd(_backward, setup_context=_setup)


@pytest.fixture(autouse=True)
def forget() -> Iterator[None]:
    """Rules are global; every test starts and ends with none."""
    before = dict(user_rules.RULES)
    yield
    user_rules.RULES.clear()
    user_rules.RULES.update(before)


def model() -> Sandwich:
    torch.manual_seed(0)
    return Sandwich(lambda h: swish(h, 1.5))


def true_rule(x: Tensor, beta: float) -> Tensor:
    return x * torch.sigmoid(beta * x)


def test_an_operator_of_the_users_without_a_rule_is_refused_with_line_and_remedy() -> None:
    message = refusal(model())
    assert "dpbitfit_test.swish.default could not be batched over samples" in message
    assert "give it a rule with dpbitfit_fx.sample_rule" in message and "small_models.py" in message


@pytest.mark.parametrize("handle", [swish, torch.ops.dpbitfit_test.swish, torch.ops.dpbitfit_test.swish.default])
def test_with_a_rule_it_compiles_and_equals_the_loop(handle: Any) -> None:
    dpb.sample_rule(handle)(true_rule)
    net = model()
    step = dpb.compile(net, losses, points(), noise_multiplier=1.0, expected_batch_size=4)
    batch = points(5)
    ours = step.per_sample_gradients(batch)
    for row in range(5):
        loss = losses(net, tuple(x[row : row + 1] for x in batch))
        (theirs,) = torch.autograd.grad(loss.sum(), [net.first.bias])
        assert torch.allclose(ours["first.bias"][row], theirs, rtol=1e-5, atol=1e-7)
    assert not any("swish" in name for name in step.report().operators)


class Folded(torch.autograd.Function):
    """The operator itself, its samples folded into its own first axis."""

    @staticmethod
    def forward(x: Tensor, beta: float) -> Any:
        return swish(x, beta)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.save_for_backward(inputs[0])
        ctx.beta = inputs[1]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return _backward(ctx, grads[0])

    @staticmethod
    def vmap(info: Any, in_dims: Any, x: Tensor, beta: float) -> Any:
        x = x.movedim(in_dims[0], 0)
        out: Any = Folded.apply(x.flatten(0, 1), beta)
        return out.reshape(x.shape), 0


class Leaking(Folded):
    """Folded, but a row gets a little of its neighbour."""

    @staticmethod
    def vmap(info: Any, in_dims: Any, x: Tensor, beta: float) -> Any:
        x = x.movedim(in_dims[0], 0)
        out: Any = swish(x.flatten(0, 1), beta).reshape(x.shape)
        return out + 1e-7 * out.roll(1, 0), 0


class Scaled(Folded):
    """Folded, but rows share a scale once one of them is large; NaN elsewhere does not show it."""

    @staticmethod
    def vmap(info: Any, in_dims: Any, x: Tensor, beta: float) -> Any:
        x = x.movedim(in_dims[0], 0)
        out: Any = Folded.apply(x.flatten(0, 1), beta)
        scale = torch.nan_to_num(x.detach().abs(), posinf=0.0).amax().clamp(min=8.0) / 8.0
        return out.reshape(x.shape) / scale, 0


def test_a_folded_rule_keeps_the_operator_and_calls_it_once() -> None:
    dpb.sample_rule(swish)(lambda x, beta: Folded.apply(x, beta))
    step = dpb.compile(model(), losses, points())
    assert step.report().operators["dpbitfit_test.swish.default"] == 1


WRONG: dict[str, tuple[Callable[[Tensor, float], Any], str]] = {
    "another function": (lambda x, beta: x * torch.sigmoid(x), "gives other numbers"),
    "off by a hundred-thousandth": (lambda x, beta: true_rule(x, beta) * 1.00003, "gives other numbers"),
    "right value, wrong gradient": (lambda x, beta: true_rule(x, beta).detach() + 0 * x, "gives other numbers"),
    "another shape": (lambda x, beta: true_rule(x, beta).flatten(), "gives other numbers"),
    "another dtype": (lambda x, beta: true_rule(x, beta).double(), "gives other numbers"),
    "one output too many": (lambda x, beta: (true_rule(x, beta), x), "gives other numbers"),
    "mixes rows by its fold": (lambda x, beta: Leaking.apply(x, beta), "mixes samples"),
    "mixes rows above a threshold": (lambda x, beta: Scaled.apply(x, beta), "mixes samples"),
    "not batchable": (
        lambda x, beta: x * torch.sigmoid(beta * x) if x.sum() > -1e9 else x,
        "fails on the example batch",
    ),
    "raises": (lambda x: x, "fails on the example batch"),
}


@pytest.mark.parametrize("kind", WRONG)
def test_a_wrong_rule_is_refused_with_the_operators_name(kind: str) -> None:
    rule, words = WRONG[kind]
    dpb.sample_rule(swish)(rule)
    message = refusal(model())
    assert words in message and "dpbitfit_test.swish.default" in message


def test_a_rule_for_something_else_than_one_operator_is_refused() -> None:
    for thing in ("swish", torch.sigmoid, torch.ops.aten.add):
        with pytest.raises(dpb.CompileRefused, match="not one operator"):
            dpb.sample_rule(thing)
    with pytest.raises(dpb.CompileRefused, match="must be a function"):
        dpb.sample_rule(swish)(3)  # type: ignore[type-var]
