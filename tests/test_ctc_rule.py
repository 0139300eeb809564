"""CTC folded over samples gives what torch's own gives for each sample, forward and backward."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.func import vmap

from dpbitfit_fx.passes import ctc_rule

B = 3


def batch(seed: int, frames: int, labels: int, classes: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    scores = torch.randn(B, frames, classes, generator=g, dtype=torch.float64)
    targets = torch.randint(1, classes, (B, labels), generator=g)
    inputs = torch.randint(1, frames + 1, (B,), generator=g)
    lengths = torch.minimum(torch.randint(0, labels + 1, (B,), generator=g), inputs)
    return scores, targets, inputs, lengths


def values_and_gradients(fn: Any, scores: Tensor) -> tuple[Tensor, Tensor]:
    leaf = scores.clone().requires_grad_()
    values = fn(leaf)
    weights = torch.linspace(0.5, 2, B, dtype=scores.dtype)
    (found,) = torch.autograd.grad((values * weights).sum(), leaf)
    return values.detach(), found


def folded(scores: Tensor, targets: Tensor, inputs: Tensor, lengths: Tensor, **options: Any) -> Tensor:
    def one(s: Tensor, t: Tensor, i: Tensor, n: Tensor) -> Tensor:
        logs = s.log_softmax(-1).unsqueeze(1)
        return ctc_rule.ctc_loss(logs, t.unsqueeze(0), i.unsqueeze(0), n.unsqueeze(0), **options).reshape(())

    return vmap(one)(scores, targets, inputs, lengths)


def loop(scores: Tensor, targets: Tensor, inputs: Tensor, lengths: Tensor, **options: Any) -> Tensor:
    reduction = ["none", "mean", "sum"][options.pop("reduction", 1)]
    rows = zip(scores, targets, inputs, lengths, strict=True)
    parts = [(s.log_softmax(-1).unsqueeze(1), t.unsqueeze(0), i.unsqueeze(0), n.unsqueeze(0)) for s, t, i, n in rows]
    return torch.stack([F.ctc_loss(*p, reduction=reduction, **options).reshape(()) for p in parts])


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 1000),
    frames=st.integers(1, 7),
    labels=st.integers(1, 3),
    classes=st.integers(2, 5),
    reduction=st.integers(0, 2),
)
def test_folded_ctc_equals_the_loop(seed: int, frames: int, labels: int, classes: int, reduction: int) -> None:
    scores, *rest = batch(seed, frames, labels, classes)
    ours = values_and_gradients(lambda s: folded(s, *rest, reduction=reduction, zero_infinity=True), scores)
    theirs = values_and_gradients(lambda s: loop(s, *rest, reduction=reduction, zero_infinity=True), scores)
    for a, b in zip(ours, theirs, strict=True):
        assert torch.allclose(a, b, rtol=1e-10, atol=1e-11)


def test_a_target_that_cannot_be_spelled_in_its_frames_is_infinite_as_in_torch() -> None:
    scores, targets, _, _ = batch(0, 3, 3, 4)
    targets[1] = 2  # three equal labels want two blanks between them: five frames
    full = torch.full((B,), 3)
    ours, theirs = (fn(scores, targets, full, full, reduction=0) for fn in (folded, loop))
    assert ours[1] == torch.inf and torch.equal(ours.isinf(), theirs.isinf())


def test_layouts_shared_labels_and_a_batch_of_one_in_two_dimensions() -> None:
    scores, targets, inputs, lengths = batch(1, 6, 2, 4)

    def one(s: Tensor, i: Tensor, n: Tensor) -> Tensor:  # s [C, T], labels shared by all samples and flat
        return ctc_rule.ctc_loss(s.t().log_softmax(-1), targets[0], i, n, reduction=0, zero_infinity=True)

    strided = scores.transpose(1, 2)
    ours = vmap(one)(strided, inputs, lengths)
    shared = targets[:1].expand(B, -1)
    assert torch.allclose(ours, loop(scores, shared, inputs, lengths, reduction=0, zero_infinity=True), rtol=1e-10)


def test_a_row_with_impossible_lengths_stops_nobody() -> None:
    scores, targets, inputs, lengths = batch(2, 5, 2, 4)
    fine = folded(scores, targets, inputs, lengths, reduction=0)
    inputs, lengths, targets = inputs.clone(), lengths.clone(), targets.clone()
    inputs[1], lengths[1], targets[1] = 99, -3, 1000
    spoiled = folded(scores, targets, inputs, lengths, reduction=0)
    assert torch.equal(fine[[0, 2]], spoiled[[0, 2]])


def flipped(x: Tensor, dim: int | None, batch: Any, axis: int) -> Tensor:
    """A mutant: of the folded tensors, the labels' rows alone stand in the other order."""
    found = ctc_fold(x, dim, batch, axis)
    return found.flip(0) if not x.dtype.is_floating_point and found.dim() == 2 else found


def unfolded_elsewhere(x: Tensor, batch: Any, axis: int) -> Tensor:
    """A mutant: the folded axis is taken apart with the samples inside."""
    return (
        x.reshape(*x.shape[:axis], x.shape[axis] // batch, batch, *x.shape[axis + 1 :])
        .transpose(axis, axis + 1)
        .flip(axis)
    )


ctc_fold = ctc_rule._fold


@pytest.mark.parametrize("mutant", [{"_fold": flipped}, {"_unfold": unfolded_elsewhere}])
def test_the_comparison_kills_a_mutant(mutant: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in mutant.items():
        monkeypatch.setattr(ctc_rule, name, value)
    with pytest.raises((AssertionError, RuntimeError)):
        test_folded_ctc_equals_the_loop()
