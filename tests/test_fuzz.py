"""Random networks: private, meant and equal to autograd on one sample at a time, or refused. ``tools/fuzz`` runs more."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from mixes import LOSS_MIXES, MIXES
from mixes_with_state import STATEFUL
from network_judge import BAD, Verdict, added, judge, judge_many, tally
from networks import Do, Network, mix
from small_models import losses
from torch import Tensor, nn

import dpbitfit_fx as dpb
from dpbitfit_fx.passes import meaning

NETWORKS, MIXING = 42, 18


def test_random_networks_are_sealed_and_right_or_refused_never_wrong() -> None:
    judged = judge_many(NETWORKS, start=0)
    assert [(n.text, v) for n, v in judged if v.kind in BAD] == []
    kinds = tally(judged)["kinds"]
    assert kinds["sealed"] >= NETWORKS // 2, kinds  # a fuzz that refuses everything proves nothing
    assert any(n.mixes and v.kind == "refused" for n, v in judged)


def test_random_networks_that_all_mix_samples_are_refused_or_mix_nothing_that_shows() -> None:
    judged = judge_many(MIXING, start=0, mixing=1.0)
    assert all(n.mixes for n, _ in judged) and [(n.text, v) for n, v in judged if v.kind in BAD] == []
    assert tally(judged)["mixing"]["refused"] >= MIXING // 2


def test_there_are_a_hundred_ways_of_mixing_each_of_one_name() -> None:
    assert len({*MIXES, *LOSS_MIXES, *STATEFUL}) == len(MIXES) + len(LOSS_MIXES) + len(STATEFUL) >= 100


def network(middle: Do | None = None) -> Network:
    torch.manual_seed(0)
    layers = [nn.Tanh()] if middle is None else [nn.Tanh(), middle, nn.Tanh()]
    model = nn.Sequential(nn.Linear(6, 4), *layers, nn.Linear(4, 3)).double().eval()
    data = (torch.randn(6, 6, dtype=torch.float64), torch.arange(6) % 3)
    return Network(model, losses, data, "by hand", "" if middle is None else middle.text)


def test_the_judge_accepts_a_right_network_and_sees_a_gradient_that_is_off_by_a_millionth(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert judge(network()).kind == "sealed"
    true = dpb.PrivateStep.per_sample_gradients

    def off(self: Any, batch: Any) -> dict[str, Tensor]:
        return {k: v * (1 + 1e-6) for k, v in true(self, batch).items()}

    monkeypatch.setattr(dpb.PrivateStep, "per_sample_gradients", off)
    assert judge(network()) == Verdict("wrong", "a per-sample gradient is not the model's own")


@pytest.mark.parametrize(
    "way",
    [
        "minus the batch mean",
        "mixing in the gradient",
        "even rows",
        "a branch on the batch size",
        "only in batches of more than eight rows",
        "only in rows equal to another",
        "one bias weighted by the batch",
    ],
)
def test_the_judge_sees_a_mix_that_the_meaning_check_lets_through(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert judge(network(mix(way, (4,)))).kind == "refused"
    monkeypatch.setattr(meaning, "_compare_at_zero", lambda joint, batch: {"per sample"})
    assert judge(network(mix(way, (4,)))).kind == "meaning missed"


def test_the_judge_sees_a_millionth_of_a_mix(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(meaning, "_compare_at_zero", lambda joint, batch: {"per sample"})
    assert judge(network(Do("a mix", lambda m, h: h + 1e-6 * h.mean(0)))).kind == "meaning missed"


def test_the_judge_sees_a_buffer_that_is_written(monkeypatch: pytest.MonkeyPatch) -> None:
    way = "a buffer that is only written"
    assert judge(network(mix(way, (4,)))).kind == "refused"
    monkeypatch.setattr(meaning, "untouched", lambda model: contextlib.nullcontext())
    monkeypatch.setattr(dpb.passes.capture, "untouched", lambda model: contextlib.nullcontext())
    monkeypatch.setattr(dpb.passes.capture, "_refuse_mutation", lambda program: None)
    assert judge(network(mix(way, (4,)))).kind == "unsound"


def leaks(leak: Callable[[Tensor, Tensor], Tensor], monkeypatch: pytest.MonkeyPatch) -> Verdict:
    """The verdict where what finally runs adds ``leak(what it should give, the batch's x)``."""
    true = dpb.PrivateStep.accumulate

    def leaking(self: Any, batch: Any, mask: Tensor, accumulator: Tensor) -> Tensor:
        given = true(self, batch, mask, accumulator)
        return given + leak(given, batch[0])

    monkeypatch.setattr(dpb.PrivateStep, "accumulate", leaking)
    return judge(network())


LEAKS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "a trillionth of the other rows": lambda given, x: given * 1e-11 * x.nan_to_num().sum().tanh(),
    "only where a row is large": lambda given, x: given * -0.5 * float(bool((x.abs() > 100).any())),
    "the first row": lambda given, x: given * -0.1 * float(x[0, 0] > 0.9),
    "the batch's size": lambda given, x: given * (0.01 / len(x)),
    "more than R": lambda given, x: given * 0.5,
}


@pytest.mark.parametrize("leak", LEAKS)
def test_the_judge_sees_what_finally_runs_let_a_row_through(leak: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert leaks(LEAKS[leak], monkeypatch).kind == "unsound"


def test_slices_add_up() -> None:
    judged = judge_many(6, start=3, mixing=0.5)
    assert added([tally(judged[:2]), tally(judged[2:])]) == tally(judged)
