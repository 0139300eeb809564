"""Random networks: each is sealed and equal to autograd on one sample at a time, or refused. ``tools/fuzz`` runs more."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from networks import MIXES, Do, Network, judge, judge_many, tally
from small_models import losses
from torch import Tensor, nn

import dpbitfit_fx as dpb
from dpbitfit_fx.passes import meaning

NETWORKS = 60


def test_sixty_random_networks_are_sealed_and_right_or_refused_never_wrong() -> None:
    judged = judge_many(NETWORKS, start=0)
    assert [(n.text, v.why) for n, v in judged if v.kind == "wrong"] == []
    kinds = tally(judged)["kinds"]
    assert kinds["sealed"] >= NETWORKS // 2, kinds  # a fuzz that refuses everything proves nothing
    assert any(n.mixes and v.kind == "refused" for n, v in judged)


def network(mixes: bool = False) -> Network:
    middle = [Do("mix", lambda m, h: MIXES["minus the batch mean"](h))] if mixes else []
    model = nn.Sequential(nn.Linear(6, 4), *middle, nn.Tanh(), nn.Linear(4, 3)).double()
    data = (torch.randn(6, 6, dtype=torch.float64), torch.arange(6) % 3)
    return Network(model, losses, data, "by hand", mixes)


def test_the_judge_accepts_a_right_network_and_sees_a_gradient_that_is_off_by_a_millionth(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert judge(network()).kind == "sealed"
    true = dpb.PrivateStep.per_sample_gradients

    def off(self: Any, batch: Any) -> dict[str, Tensor]:
        return {k: v * (1 + 1e-6) for k, v in true(self, batch).items()}

    monkeypatch.setattr(dpb.PrivateStep, "per_sample_gradients", off)
    assert "gradients are off" in judge(network()).why


def test_the_judge_sees_mixed_samples_that_the_meaning_check_would_let_through(monkeypatch: pytest.MonkeyPatch) -> None:
    assert judge(network(mixes=True)).kind == "refused"
    monkeypatch.setattr(meaning, "_compare_at_zero", lambda joint, batch: {"per sample"})
    assert judge(network(mixes=True)).kind == "wrong"
