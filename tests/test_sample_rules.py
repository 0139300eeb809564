"""Each operator rewritten for one sample gives what torch's own gives, forward and backward, and vmap equals the loop."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.func import grad_and_value, vmap

from dpbitfit_fx.passes import embedding_rule, recurrent_rules, sample_rules
from dpbitfit_fx.passes.attention_rule import attention

aten = torch.ops.aten
D = torch.float64


def same(a: Tensor, b: Tensor) -> None:
    assert a.shape == b.shape
    assert torch.allclose(a, b, rtol=1e-10, atol=1e-11), float((a - b).abs().max())


def gradients(fn: Callable[..., Tensor], *inputs: Tensor) -> tuple[Tensor, ...]:
    """Value, then gradients of a fixed weighted sum of it with respect to every input."""
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    value = fn(*leaves)
    weights = torch.linspace(-1, 1, value.numel(), dtype=value.dtype).reshape(value.shape)
    return (value.detach(), *torch.autograd.grad((value * weights).sum(), leaves))


def agree(ours: Callable[..., Tensor], theirs: Callable[..., Tensor], *inputs: Tensor) -> None:
    for a, b in zip(gradients(ours, *inputs), gradients(theirs, *inputs), strict=True):
        same(a, b)


@settings(max_examples=8)
@given(
    n=st.integers(2, 3), c=st.integers(1, 5), space=st.sampled_from([(), (4,), (3, 2), (2, 3, 2)]), affine=st.booleans()
)
def test_eval_batch_norm_equals_torchs(n: int, c: int, space: tuple[int, ...], affine: bool) -> None:
    mean, var = torch.randn(c, dtype=D), torch.rand(c, dtype=D) + 0.5
    x, w, b = torch.randn(n, c, *space, dtype=D), torch.randn(c, dtype=D), torch.randn(c, dtype=D)
    if affine:
        agree(
            lambda x, w, b: sample_rules.eval_batch_norm(x, w, b, mean, var, 1e-5),
            lambda x, w, b: F.batch_norm(x, mean, var, w, b, False, 0.1, 1e-5),
            x, w, b,
        )  # fmt: skip
    else:
        agree(
            lambda x: sample_rules.eval_batch_norm(x, None, None, mean, var, 1e-5),
            lambda x: F.batch_norm(x, mean, var, None, None, False, 0.1, 1e-5),
            x,
        )


@settings(max_examples=10)
@given(length=st.integers(1, 9), size=st.integers(1, 5))
def test_adaptive_average_pooling_equals_torchs(length: int, size: int) -> None:
    one, two = aten.adaptive_avg_pool1d.default, aten.adaptive_avg_pool2d.default
    row = torch.randn(2, 3, length, dtype=D)
    agree(lambda x: sample_rules.RULES[one](x, [size]), lambda x: F.adaptive_avg_pool1d(x, size), row)
    image = torch.randn(2, 3, length, 7, dtype=D)
    for cells in ([size, 2], [1, 1]):
        agree(lambda x, s=cells: sample_rules.RULES[two](x, s), lambda x, s=cells: F.adaptive_avg_pool2d(x, s), image)


RECURRENT: dict[str, tuple[Any, dict[str, Any]]] = {
    "lstm": (aten.lstm.input, {}),
    "lstm with projections": (aten.lstm.input, {"proj_size": 3}),
    "gru": (aten.gru.input, {}),
    "tanh": (aten.rnn_tanh.input, {"nonlinearity": "tanh"}),
    "relu": (aten.rnn_relu.input, {"nonlinearity": "relu"}),
}


@pytest.mark.parametrize("kind", RECURRENT)
@pytest.mark.parametrize("both", [False, True])
@pytest.mark.parametrize("first", [False, True])
@pytest.mark.parametrize("biases", [True, False])
def test_recurrent_nets_equal_torchs(kind: str, both: bool, first: bool, biases: bool) -> None:
    op, options = RECURRENT[kind]
    layers = 2
    make: Any = nn.LSTM if "lstm" in kind else nn.GRU if kind == "gru" else nn.RNN
    net = make(4, 5, layers, bias=biases, batch_first=first, bidirectional=both, dtype=D, **options)
    x = torch.randn(3, 4, 4, dtype=D)
    n, rows = (3 if first else 4), layers * (2 if both else 1)
    states = [torch.randn(rows, n, options.get("proj_size", 5), dtype=D)]
    if "lstm" in kind:
        states.append(torch.randn(rows, n, 5, dtype=D))

    def joined(outputs: Any) -> Tensor:
        return torch.cat([o.flatten() for o in outputs])

    def ours(x: Tensor, *hx: Tensor) -> Tensor:
        given_states = hx if "lstm" in kind else hx[0]
        weights = list(net._flat_weights)
        return joined(recurrent_rules.RULES[op](x, given_states, weights, biases, layers, 0.0, False, both, first))

    def theirs(x: Tensor, *hx: Tensor) -> Tensor:
        output, last = net(x, hx if "lstm" in kind else hx[0])
        return joined([output, *(last if isinstance(last, tuple) else (last,))])

    agree(ours, theirs, x, *states)


MASKS: dict[str, Any] = {
    "none": lambda b, n, h, t, s: None,
    "bool, per sample": lambda b, n, h, t, s: torch.rand(b, n, 1, 1, s) > 0.3,
    "bool, full": lambda b, n, h, t, s: torch.rand(b, n, h, t, s) > 0.2,
    "float, per sample": lambda b, n, h, t, s: torch.randn(b, n, 1, t, s, dtype=D),
    "float, over windows": lambda b, n, h, t, s: torch.randn(b, 1, h, t, s, dtype=D),
    "two axes": lambda b, n, h, t, s: torch.randn(b, t, s, dtype=D),
}


@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize("windows", [1, 3])
def test_folded_attention_equals_torchs_for_every_mask(kind: str, windows: int) -> None:
    b, n, h, t, s = 4, windows, 2, 5, 6
    mask = MASKS[kind](b, n, h, t, s)
    if mask is not None and mask.dtype == torch.bool:
        mask[..., 0] = True  # a row with nothing to attend to has no value
    q, k, v = (
        torch.randn(b, n, h, t, 4, dtype=D),
        torch.randn(b, n, h, s, 4, dtype=D),
        torch.randn(b, n, h, s, 4, dtype=D),
    )

    def folded(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        dims = (0, 0, 0, None if mask is None else 0)
        return vmap(lambda q, k, v, m: attention(q, k, v, m), in_dims=dims)(q, k, v, mask)

    def loop(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        masks = [None] * b if mask is None else list(mask)
        return torch.stack([F.scaled_dot_product_attention(q[i], k[i], v[i], masks[i]) for i in range(b)])

    agree(folded, loop, q, k, v)


@settings(max_examples=8)
@given(t=st.integers(1, 5), causal=st.booleans(), groups=st.sampled_from([1, 2]), scale=st.sampled_from([None, 0.3]))
def test_folded_attention_equals_torchs_causal_grouped_and_scaled(
    t: int, causal: bool, groups: int, scale: float | None
) -> None:
    q, k, v = (torch.randn(3, 2, h, t, 4, dtype=D) for h in (4, 4 // groups, 4 // groups))
    gqa = groups > 1

    def folded(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return vmap(lambda q, k, v: attention(q, k, v, causal=causal, scale=scale, enable_gqa=gqa))(q, k, v)

    def loop(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return torch.stack(
            [
                F.scaled_dot_product_attention(*rows, is_causal=causal, scale=scale, enable_gqa=gqa)
                for rows in zip(q, k, v, strict=True)
            ]
        )

    agree(folded, loop, q, k, v)


def test_a_mask_or_a_key_shared_by_all_samples_is_spread_over_them() -> None:
    q, shared = torch.randn(3, 1, 2, 4, 4, dtype=D), torch.randn(1, 2, 4, 4, dtype=D)
    mask = torch.randn(4, 4, dtype=D)

    def folded(q: Tensor, k: Tensor) -> Tensor:
        return vmap(lambda q, k: attention(q, k, k, mask), in_dims=(0, None))(q, k)

    def loop(q: Tensor, k: Tensor) -> Tensor:
        return torch.stack([F.scaled_dot_product_attention(x, k, k, mask) for x in q])

    agree(folded, loop, q, shared)


def test_a_mask_that_is_trained_gets_its_gradient() -> None:
    q, mask = torch.randn(3, 1, 2, 4, 4, dtype=D), torch.randn(2, 4, 4, dtype=D)

    def folded(q: Tensor, m: Tensor) -> Tensor:
        return vmap(lambda q, m: attention(q, q, q, m, mask_is_trainable=True), in_dims=(0, None))(q, m)

    def loop(q: Tensor, m: Tensor) -> Tensor:
        return torch.stack([F.scaled_dot_product_attention(x, x, x, m) for x in q])

    agree(folded, loop, q, mask)


@settings(max_examples=8)
@given(rows=st.integers(2, 6), shape=st.sampled_from([(4,), (1, 5), (2, 3)]), padding=st.sampled_from([-1, 0, 1]))
def test_an_embedding_equals_torchs_and_its_padding_row_gets_no_gradient(
    rows: int, shape: tuple[int, ...], padding: int
) -> None:
    weight, index = torch.randn(rows, 3, dtype=D), torch.randint(0, rows, shape)
    agree(
        lambda w: embedding_rule.embedding(w, index, padding),
        lambda w: F.embedding(index, w, padding_idx=padding if padding >= 0 else None),
        weight,
    )


@pytest.mark.parametrize("batched", ["index", "weight", "both", "neither"])
@pytest.mark.parametrize("padding", [-1, 2])
def test_an_embedding_under_vmap_equals_the_loop_over_samples(batched: str, padding: int) -> None:
    """Tables and indices of each sample's own, or shared: position tables are looked up by the same index for all."""
    generator = torch.Generator().manual_seed(0)
    own_w, own_i = batched in ("weight", "both"), batched in ("index", "both")
    weight = torch.randn(*([4] if own_w else []), 5, 3, generator=generator, dtype=D)
    index = torch.randint(0, 5, (*([4] if own_i else []), 2, 6), generator=generator)
    scale = torch.randn(4, 2, 6, 3, generator=generator, dtype=D)

    def loss(w: Tensor, i: Tensor, s: Tensor) -> Tensor:
        return (embedding_rule.embedding(w, i, padding) * s).square().sum()

    dims = (0 if own_w else None, 0 if own_i else None, 0)
    both = vmap(grad_and_value(loss), in_dims=dims)(weight, index, scale)
    for row in range(4):
        w, i = (weight[row] if own_w else weight).clone().requires_grad_(), index[row] if own_i else index
        value = (F.embedding(i, w, padding_idx=padding if padding >= 0 else None) * scale[row]).square().sum()
        (gradient,) = torch.autograd.grad(value, w)
        same(both[0][row], gradient)
        same(both[1][row], value.detach())
