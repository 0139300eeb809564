"""Whole runs on neighbouring datasets, and killed ones: a slice of ``tools/replay``, and the faults that it has to see."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from kill_cases import STAGES, Outcome, kill_many
from planted_bugs import BUGS
from replay_cases import CLIPPINGS, MODELS, SLACK, Cell, Tally, cells, judge, make_world
from replay_runs import ENGINES, compare
from torch import Tensor

from dpbitfit_fx.compile import PrivateStep
from dpbitfit_fx.ort_backends import PlainBackend
from dpbitfit_fx.ort_device import on_device
from dpbitfit_fx.passes.clipping import Clipping

ALIGNED = 1  # every record at full norm: what moves a release most
FLAT = CLIPPINGS[0]


def name(value: Any) -> str:
    return value.kind if isinstance(value, Clipping) else str(value)


def compared(engine: str, clipping: Clipping, model: str, number: int, resume: bool = False, steps: int = 24) -> Tally:
    if (why := ENGINES[engine].why_not()) is not None:
        pytest.skip(why)
    world = make_world(model, number, 0, wide=ENGINES[engine].wide)
    return compare(Cell(engine, clipping, model, resume), world, steps, seed=5)


@pytest.mark.parametrize("clipping", CLIPPINGS, ids=name)
def test_releases_of_whole_runs_of_fit_on_neighbours_are_at_most_r_over_the_denominator_apart(
    clipping: Clipping,
) -> None:
    found = compared("eager float32", clipping, "mlp", ALIGNED)
    assert not found.broken and found.pairs + found.equal == 24 and found.equal > 0
    assert found.largest > 0.99, "the bound must be met by some pair, or the test tests nothing"


@pytest.mark.parametrize(
    ("engine", "model", "resume"),
    [
        ("eager float32", "text", True),
        ("eager float32, 2 ranks", "mlp", True),
        ("eager grid", "text", True),
        ("eager bf16", "sequences", False),
        ("inductor bf16", "attention", False),
        ("onnx float32", "sequences", True),
    ],
    ids=name,
)
def test_so_are_they_with_buckets_two_ranks_a_grid_bfloat16_inductor_onnx_and_a_resume_in_the_middle(
    engine: str, model: str, resume: bool
) -> None:
    found = compared(engine, FLAT, model, ALIGNED + 4, resume)
    assert not found.broken and found.largest > 0.9 and found.pairs > 5


def test_the_cells_are_every_backend_with_every_clipping_model_and_resume_and_meet_every_kind_of_world() -> None:
    everything = list(cells(list(ENGINES)))
    assert len(everything) == len(set(everything)) == len(ENGINES) * 4 * len(MODELS) * 2
    worlds = [make_world("text", number, 0) for number in range(40)]
    assert len({(world.scenario, world.added) for world in worlds}) == 8
    assert len({world.sizes for world in worlds}) == 5 and len({world.place for world in worlds}) > 10
    everyone = range(len(worlds[0].rows))
    fewer = [row for row in everyone if row != worlds[0].place]
    assert sum(worlds[0].batches(everyone)) >= sum(worlds[0].batches(fewer))


# -- what the judge must see -------------------------------------------------------------------------------------------


def doubled(patch: pytest.MonkeyPatch) -> None:
    """Clipped at 2 R, behind the seal."""
    real = PrivateStep.accumulate

    def accumulate(self: PrivateStep, batch: Any, mask: Tensor, total: Tensor, masks: Any = None) -> Tensor:
        return total + 2 * (real(self, batch, mask, total, masks) - total)

    patch.setattr(PrivateStep, "accumulate", accumulate)


def norm_over_fewer(patch: pytest.MonkeyPatch) -> None:
    """The norm leaves the last bias out, behind the seal."""

    def accumulate(self: PrivateStep, batch: Any, mask: Tensor, total: Tensor, masks: Any = None) -> Tensor:
        gradients = [g.flatten(1).double() for g in self.per_sample_gradients(batch).values()]
        norms = torch.cat(gradients[:-1], 1).norm(dim=1).clamp_min(self.max_grad_norm)
        factors = mask * self.max_grad_norm / norms
        clipped: Tensor = factors @ torch.cat(gradients, 1)
        return total + clipped.to(total.dtype)

    patch.setattr(PrivateStep, "accumulate", accumulate)


def doubled_in_onnx(patch: pytest.MonkeyPatch) -> None:
    real = PlainBackend.accumulate

    def accumulate(self: PlainBackend, batch: Mapping[str, Any], mask: Any, noise: Any) -> None:
        before = self.gradient_buffers()
        real(self, batch, mask, noise)
        self._accumulator = on_device(before + 2 * (self.gradient_buffers() - before), "cpu")

    patch.setattr(PlainBackend, "accumulate", accumulate)


@pytest.mark.parametrize(
    ("engine", "plant"),
    [
        ("eager float32", doubled),
        ("eager float32", norm_over_fewer),
        ("eager float32", BUGS["records repeated for balance"].plant),
        ("onnx float32", doubled_in_onnx),
    ],
    ids=["2 R", "norm over fewer", "twice in its batch", "2 R in ONNX"],
)
def test_a_planted_fault_breaks_the_bound(
    engine: str, plant: Callable[[pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    plant(monkeypatch)
    found = compared(engine, FLAT, "mlp", ALIGNED, steps=12)
    assert found.broken and found.largest > 1.5


def test_the_judge_sees_a_step_that_differs_without_the_record_and_numbers_that_are_none() -> None:
    world = make_world("mlp", ALIGNED, 0)
    zero, near = torch.zeros(8).numpy(), torch.full((8,), 1e-7).numpy()
    mine = [world.place]
    assert not judge(world, [[], mine], [zero, zero], [zero, near]).broken
    assert judge(world, [[], mine], [zero, zero], [near, zero]).stray == 1
    assert judge(world, [mine, mine], [zero, zero], [zero + float("nan"), zero]).broken
    exact = Tally(pairs=1, largest=1 + SLACK)
    assert not exact.broken and Tally(largest=1 + 2 * SLACK).broken and Tally(unseen=1).broken


# -- kills -------------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(os.name != "posix", reason="SIGKILL")
def test_a_run_killed_at_a_random_moment_ends_as_if_it_had_not_been_or_pays() -> None:
    """Of `fit`: the tool's own way of killing; more kills are in test_fit_budget.py and test_ort_runner.py."""
    found = kill_many(1, 1, ["fit"])
    assert found.kills >= 1 and not found.wrong
    assert set(found.stages["fit"]) <= set(STAGES) and found.ends["fit"].total() >= 1


def test_a_run_that_ends_elsewhere_or_pays_too_little_is_wrong() -> None:
    whole = Outcome({"bias": b"1234"}, 2.0, 10, 0)
    assert whole.judged(whole, 0) == "identical"
    assert Outcome({"bias": b"1235"}, 2.0, 10, 0).judged(whole, 0) == "wrong"
    assert Outcome({"bias": b"1235"}, 2.5, 10, 2).judged(whole, 0) == "wrong"
    assert Outcome({"bias": b"1235"}, 2.5, 10, 2).judged(whole, 2) == "charged"
    assert Outcome({"bias": b"1235"}, 2.5, 10, 1).judged(whole, 2) == "wrong"
    assert Outcome({"bias": b"1235"}, 2.0, 10, 2).judged(whole, 2) == "wrong"
