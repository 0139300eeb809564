"""Each of our rules, under vmap, gives what torch's operator gives for every sample alone; a mutant of it does not."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from draws import D, Draw
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.func import vmap

from dpbitfit_fx.passes import exportable, recurrent_rules, sample_rules, write_rules

aten = torch.ops.aten
B = 3
Fn = Callable[..., Any]


@dataclasses.dataclass(frozen=True)
class Spec:
    """``rule`` against ``theirs``; ``draw`` gives the tensors, [B, ..] each (or shared), and the other arguments."""

    rule: Fn
    theirs: Fn
    draw: Callable[[Draw], tuple[list[Tensor], dict[str, Any]]]
    mutant: Fn
    shared: tuple[int, ...] = ()


def bag(d: Draw, mode: int) -> tuple[list[Tensor], dict[str, Any]]:
    length, bags, padding = d.whole(1, 6), d.whole(1, 3), d.whole(-1, 2)
    offsets = torch.cat([torch.zeros(B, 1, dtype=torch.long), d.ints(0, length, B, bags - 1).sort(1).values], 1)
    options: dict[str, Any] = {"mode": mode, "padding": padding if padding < 2 else None}
    tensors = [d.floats(7, 3), d.ints(0, 6, B, length), offsets]
    if mode == 0 and d.whole(0, 1):
        tensors.append(d.floats(B, length))
    return tensors, options


def our_bag(
    table: Tensor, index: Tensor, offsets: Tensor, weights: Any = None, *, mode: int, padding: int | None
) -> Any:
    return sample_rules.embedding_bag(table, index, offsets, False, mode, False, weights, False, padding)[0]


def their_bag(
    table: Tensor, index: Tensor, offsets: Tensor, weights: Any = None, *, mode: int, padding: int | None
) -> Any:
    return torch.embedding_bag(table, index, offsets, False, mode, False, weights, False, padding)[0]


def mutant_bag(
    table: Tensor, index: Tensor, offsets: Tensor, weights: Any = None, *, mode: int, padding: int | None
) -> Any:
    return our_bag(table, index, offsets, weights, mode=mode, padding=None)


def cell_inputs(gates: int, states: int) -> Callable[[Draw], tuple[list[Tensor], dict[str, Any]]]:
    def draw(d: Draw) -> tuple[list[Tensor], dict[str, Any]]:
        n, inside, hidden = d.whole(1, 3), d.whole(1, 4), d.whole(1, 4)
        shapes = [(gates * hidden, inside), (gates * hidden, hidden), (gates * hidden,), (gates * hidden,)]
        state = [d.floats(B, n, hidden) for _ in range(states)]
        return [*(d.floats(*s) for s in shapes), d.floats(B, n, inside), *state], {}

    return draw


def cell(op: Fn) -> Fn:
    def run(w_ih: Tensor, w_hh: Tensor, b_ih: Tensor, b_hh: Tensor, x: Tensor, *state: Tensor) -> Any:
        hx: Any = list(state) if len(state) > 1 else state[0]
        out = op(x, hx, w_ih, w_hh, b_ih, b_hh)
        return torch.cat(list(out)) if isinstance(out, (tuple, list)) else out

    return run


def swapped_biases(op: Fn) -> Fn:
    return cell(lambda x, hx, w, v, b, c: op(x, hx, w, v, b, c * 0))


def nll_inputs(d: Draw) -> tuple[list[Tensor], dict[str, Any]]:
    shape = (B, d.whole(1, 4), d.whole(1, 3))
    return [d.floats(*shape), d.floats(*shape), d.floats(*shape).abs() * d.whole(0, 1)], {"full": bool(d.whole(0, 1))}


CELLS = {
    "lstm": (aten.lstm_cell.default, 4),
    "gru": (aten.gru_cell.default, 3),
    "tanh": (aten.rnn_tanh_cell.default, 1),
    "relu": (aten.rnn_relu_cell.default, 1),
}
WEIGHTS = (0, 1, 2, 3)
SPECS: dict[str, Spec] = {
    **{
        f"{kind} cell": Spec(
            cell(recurrent_rules.CELLS[op]),
            cell(op),
            cell_inputs(gates, 2 if kind == "lstm" else 1),
            swapped_biases(recurrent_rules.CELLS[op]),
            WEIGHTS,
        )
        for kind, (op, gates) in CELLS.items()
    },
    **{
        f"bag of {name}": Spec(our_bag, their_bag, functools.partial(bag, mode=mode), mutant_bag, (0,))
        for mode, name in enumerate(("sums", "means", "maxima"))
    },
    "bilinear": Spec(
        sample_rules.bilinear,
        F.bilinear,
        lambda d: ([d.floats(B, 2, 3), d.floats(B, 2, 4), d.floats(5, 3, 4), d.floats(5)], {}),
        lambda x, y, w, b: sample_rules.bilinear(x, y, w.flip(0), b),
        (2, 3),
    ),
    "multilabel margin": Spec(
        sample_rules.multilabel_margin,
        lambda x, labels, reduction: F.multilabel_margin_loss(x, labels, reduction=("none", "mean", "sum")[reduction]),
        lambda d: ([d.floats(B, 2, 4), d.ints(-1, 3, B, 2, 4)], {"reduction": d.whole(0, 2)}),
        lambda x, labels, reduction: sample_rules.multilabel_margin(x, labels.clamp_min(0), reduction),
    ),
    "quantile": Spec(
        sample_rules.quantile,
        torch.quantile,
        lambda d: ([d.floats(B, 3, d.whole(1, 6))], {"q": d.whole(0, 4) / 4 * 0.9, "dim": -1, "keepdim": d.whole(0, 1) == 1}),
        lambda x, q, dim, keepdim: sample_rules.quantile(x, 0.9 - q, dim, keepdim),
    ),
    "one hot": Spec(
        sample_rules.one_hot,
        lambda x, classes: F.one_hot(x, classes),
        lambda d: ([d.ints(0, 4, B, *[2, 3][: d.whole(0, 2)])], {"classes": 5}),
        lambda x, classes: sample_rules.one_hot(x, classes).flip(-1),
    ),
    "rrelu": Spec(
        sample_rules._rrelu,
        lambda x, lower, upper: F.rrelu(x, lower, upper, False),
        lambda d: ([d.floats(B, 3, 4)], {"lower": 0.1, "upper": 0.5}),
        lambda x, lower, upper: F.leaky_relu(x, lower),
    ),
    "unfold": Spec(
        write_rules.unfold,
        lambda x, dim, size, step: x.unfold(dim, size, step),
        lambda d: (
            [d.floats(B, d.whole(3, 6), d.whole(3, 6))],
            {"dim": d.whole(-2, 1), "size": d.whole(1, 3), "step": d.whole(1, 3)},
        ),
        lambda x, dim, size, step: write_rules.unfold(x, dim, size, step).flip(-1),
    ),
    "binary cross-entropy": Spec(
        sample_rules.binary_cross_entropy,
        lambda x, t, reduction: F.binary_cross_entropy(x, t, reduction=("none", "mean", "sum")[reduction]),
        lambda d: ([d.floats(B, 2, 3).sigmoid(), d.floats(B, 2, 3).sigmoid()], {"reduction": d.whole(0, 2)}),
        lambda x, t, reduction: sample_rules.binary_cross_entropy(x * 0.9, t, None, reduction),
    ),
    "grid sample": Spec(
        sample_rules.grid_sampler,
        lambda x, grid, mode, padding, corners: torch.grid_sampler(x, grid, mode, padding, corners),
        lambda d: (
            [d.floats(B, 1, 2, 4, 4), d.floats(B, 1, 3, 3, 2)],
            {"mode": 0, "padding": d.whole(0, 2), "corners": bool(d.whole(0, 1))},
        ),
        lambda x, grid, mode, padding, corners: sample_rules.grid_sampler(x, grid, mode, padding, not corners),
    ),
    "zeroed": Spec(
        lambda x, y: write_rules.zero(x) + y,
        lambda x, y: x.clone().zero_() + y,
        lambda d: ([d.floats(B, 2, 3), d.floats(B, 2, 3)], {}),
        lambda x, y: write_rules.zero(x) + x + y,
    ),
    "gaussian likelihood": Spec(
        lambda x, t, v, full: exportable.gaussian_nll_loss(x, t, v, full, 1e-2, "none"),
        lambda x, t, v, full: F.gaussian_nll_loss(x, t, v, full=full, eps=1e-2, reduction="none"),
        nll_inputs,
        lambda x, t, v, full: exportable.gaussian_nll_loss(x, t, v, full, 1e-1, "none"),
    ),
}  # fmt: skip


def value_and_gradients(run: Fn, tensors: list[Tensor]) -> list[Tensor]:
    leaves = [x.detach().requires_grad_() if x.is_floating_point() else x for x in tensors]
    value = run(*leaves)
    if not value.requires_grad:
        return [value]
    weights = torch.linspace(-1, 1, value.numel(), dtype=D).reshape(value.shape)
    wanted = [x for x in leaves if x.requires_grad]
    found = torch.autograd.grad((value * weights).sum(), wanted, allow_unused=True)
    return [value.detach(), *(torch.zeros_like(x) if g is None else g for g, x in zip(found, wanted, strict=True))]


def agree(spec: Spec, rule: Fn, seed: int) -> bool:
    tensors, options = spec.draw(Draw(seed))
    dims = tuple(None if i in spec.shared else 0 for i in range(len(tensors)))

    def one_by_one(*x: Tensor) -> Tensor:
        rows = [[t if d is None else t[i] for t, d in zip(x, dims, strict=True)] for i in range(B)]
        return torch.stack([spec.theirs(*row, **options) for row in rows])

    ours = value_and_gradients(lambda *x: vmap(lambda *y: rule(*y, **options), in_dims=dims)(*x), tensors)
    theirs = value_and_gradients(one_by_one, tensors)
    same = [a.shape == b.shape and a.dtype == b.dtype for a, b in zip(ours, theirs, strict=True)]
    return all(same) and all(torch.allclose(a, b, rtol=1e-10, atol=1e-11) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("name", SPECS)
@settings(max_examples=12, deadline=None)
@given(seed=st.integers(0, 10**6))
def test_the_rule_under_vmap_equals_torchs_operator_on_each_sample(name: str, seed: int) -> None:
    assert agree(SPECS[name], SPECS[name].rule, seed)


@pytest.mark.parametrize("name", SPECS)
def test_the_comparison_kills_a_mutant_of_the_rule(name: str) -> None:
    assert not all(agree(SPECS[name], SPECS[name].mutant, seed) for seed in range(30))


def test_a_place_or_a_probability_that_is_nan_stops_nobody() -> None:
    image, grid = torch.randn(1, 2, 4, 4), torch.full((1, 3, 3, 2), float("nan"))
    assert sample_rules.grid_sampler(image, grid, 0, 1, False).isfinite().all()
    assert sample_rules.binary_cross_entropy(torch.tensor([float("nan")]), torch.ones(1)).isfinite()


def test_a_label_outside_the_classes_stops_nobody() -> None:
    assert sample_rules.one_hot(torch.tensor([1, 7, -1]), 3).tolist() == [[0, 1, 0], [0, 0, 0], [0, 0, 0]]
