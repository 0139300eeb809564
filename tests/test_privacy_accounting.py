"""Epsilon is never too low, composes exactly, and a solved noise multiplier keeps its promise."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import dp_accounting  # type: ignore[import-untyped, unused-ignore]
import pytest
from dp_accounting.pld import PLDAccountant  # type: ignore[import-untyped, unused-ignore]
from dp_accounting.rdp import RdpAccountant  # type: ignore[import-untyped, unused-ignore]
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import optimize, stats  # type: ignore[import-untyped, unused-ignore]

from dpbitfit_fx import accounting
from dpbitfit_fx.accounting import (
    EpsilonTracker,
    PriorRun,
    epsilon,
    format_epsilon,
    resolve_prior,
    solve_noise_multiplier,
)
from dpbitfit_fx.errors import ArtifactError, PrivacyError
from dpbitfit_fx.sampling import PoissonSampler

DELTA = 1e-5
# The plan of the field notes: 90 % of 10,604 sentences, batch 256, three epochs.
REVIEWS = PoissonSampler.from_expected_batch_size(9543, 256, epochs=3)
RELATION = dp_accounting.NeighboringRelation.ADD_OR_REMOVE_ONE


def rdp_epsilon(sampler: PoissonSampler, noise_multiplier: float, steps: int, delta: float) -> float:
    """An upper bound that shares no code with PLD."""
    accountant = RdpAccountant(neighboring_relation=RELATION)
    accountant.compose(sampler.dp_event(noise_multiplier, steps))
    return float(accountant.get_epsilon(delta))


def gaussian_epsilon(noise_multiplier: float, delta: float) -> float:
    """Exact for one Gaussian sum (Balle and Wang, 2018), in closed form."""

    def gap(value: float) -> float:
        half = 1 / (2 * noise_multiplier)
        scaled = value * noise_multiplier
        return float(stats.norm.cdf(half - scaled) - math.exp(value) * stats.norm.cdf(-half - scaled)) - delta

    return float(optimize.brentq(gap, 0, 500, xtol=1e-12))


@pytest.mark.parametrize(("noise_multiplier", "expected"), [(0.586, 8.0), (0.849, 3.0)])
def test_epsilon_is_near_and_below_the_field_notes_figures(noise_multiplier: float, expected: float) -> None:
    assert REVIEWS.steps == 112
    assert 0.98 * expected < epsilon(REVIEWS, noise_multiplier, DELTA) <= expected


@pytest.mark.parametrize("noise_multiplier", [0.3, 1.0, 5.0, 40.0])
def test_without_sampling_epsilon_is_the_closed_form_and_not_below_it(noise_multiplier: float) -> None:
    for steps in (1, 50):
        everybody = PoissonSampler(1000, 1.0, steps)
        exact = gaussian_epsilon(noise_multiplier / math.sqrt(steps), DELTA)
        assert exact - 1e-9 <= epsilon(everybody, noise_multiplier, DELTA) <= exact * 1.005 + 1e-4


@pytest.mark.parametrize(
    ("sampler", "noise_multiplier"),
    [
        (REVIEWS, 0.586),
        (REVIEWS, 5.0),
        (PoissonSampler(90_000, 1e-3, 10_000), 1.0),
        (PoissonSampler(500, 0.5, 20), 2.0),
    ],
)
def test_epsilon_lies_between_what_one_step_costs_and_the_renyi_bound(
    sampler: PoissonSampler, noise_multiplier: float
) -> None:
    value = epsilon(sampler, noise_multiplier, DELTA)
    assert epsilon(sampler, noise_multiplier, DELTA, steps=1) < value
    assert value <= rdp_epsilon(sampler, noise_multiplier, sampler.steps, DELTA)


def test_one_sampled_step_is_not_below_the_exact_hockey_stick_divergence() -> None:
    # For one step of Poisson sampling delta(epsilon) has a closed form; epsilon must not undershoot its inverse.
    rate, sigma = 0.1, 0.8
    sampler = PoissonSampler(1000, rate, 1)
    value = epsilon(sampler, sigma, DELTA)

    def delta_at(eps: float) -> float:
        # Removal: P = (1-q) N(0, s) + q N(1, s) against Q = N(0, s); P > e^eps Q beyond a threshold.
        threshold = 0.5 + sigma**2 * math.log((math.exp(eps) - 1 + rate) / rate)
        upper = rate * stats.norm.sf((threshold - 1) / sigma) + (1 - rate) * stats.norm.sf(threshold / sigma)
        return float(upper - math.exp(eps) * stats.norm.sf(threshold / sigma))

    assert delta_at(value) <= DELTA * (1 + 1e-9)
    assert delta_at(value * 0.995) > DELTA


def test_the_grid_of_losses_is_fine_enough_to_match_the_accountants_own_finest() -> None:
    for sampler, sigma in ((REVIEWS, 0.849), (REVIEWS, 200.0), (PoissonSampler(90_000, 1e-3, 10_000), 2.0)):
        finest = PLDAccountant(RELATION, value_discretization_interval=1e-5 if sigma > 100 else 1e-4)
        reference = finest.compose(sampler.dp_event(sigma)).get_epsilon(DELTA)
        assert epsilon(sampler, sigma, DELTA) == pytest.approx(reference, rel=0.02)


def test_more_steps_or_less_noise_or_a_smaller_delta_cost_more() -> None:
    base = epsilon(REVIEWS, 1.0, DELTA, steps=50)
    assert epsilon(REVIEWS, 1.0, DELTA, steps=60) > base
    assert epsilon(REVIEWS, 0.9, DELTA, steps=50) > base
    assert epsilon(REVIEWS, 1.0, DELTA / 10, steps=50) > base
    assert epsilon(REVIEWS, 1.0, DELTA, steps=0) == 0.0


def test_a_lost_step_is_charged_like_a_step() -> None:
    assert epsilon(REVIEWS, 1.0, DELTA, steps=50, lost_steps=7) == epsilon(REVIEWS, 1.0, DELTA, steps=57)


@pytest.mark.parametrize("target", [0.1, 1.0, 3.0, 8.0, 50.0])
def test_a_solved_noise_multiplier_meets_its_target_and_is_not_wasteful(target: float) -> None:
    sigma = solve_noise_multiplier(REVIEWS, target, DELTA)
    assert 0.995 * target < epsilon(REVIEWS, sigma, DELTA) <= target
    assert epsilon(REVIEWS, sigma * 0.995, DELTA) > target


@settings(max_examples=4)
@given(
    size=st.integers(200, 10**6),
    rate=st.floats(1e-3, 1.0),
    steps=st.integers(1, 500),
    target=st.floats(0.05, 10.0),
)
def test_every_solved_noise_multiplier_stays_within_its_target(
    size: int, rate: float, steps: int, target: float
) -> None:
    sampler, delta = PoissonSampler(size, rate, steps), 1e-7
    sigma = solve_noise_multiplier(sampler, target, delta)
    assert epsilon(sampler, sigma, delta) <= target


def test_prior_runs_compose_as_one_accountant_composes_them_and_not_as_a_sum() -> None:
    earlier = [PriorRun("a", 0.01, 0.9, 300), PriorRun("b", 0.05, 1.4, 40)]
    together = epsilon(REVIEWS, 0.849, DELTA, prior=earlier)
    accountant = PLDAccountant(RELATION, value_discretization_interval=3e-4)
    accountant.compose(REVIEWS.dp_event(0.849))
    for run in earlier:
        accountant.compose(PoissonSampler(9543, run.sample_rate, run.steps).dp_event(run.noise_multiplier))
    assert together == pytest.approx(accountant.get_epsilon(DELTA), rel=2e-3)
    alone = [epsilon(REVIEWS, 0.849, DELTA)]
    alone += [epsilon(PoissonSampler(9543, r.sample_rate, r.steps), r.noise_multiplier, DELTA) for r in earlier]
    assert max(alone) < together < sum(alone)


def test_a_run_in_two_halves_costs_what_the_whole_costs() -> None:
    half = PriorRun("first half", REVIEWS.sample_rate, 0.7, 56)
    assert epsilon(REVIEWS, 0.7, DELTA, steps=56, prior=[half]) == epsilon(REVIEWS, 0.7, DELTA)


def test_the_noise_solved_beside_a_prior_run_stays_within_the_joint_target() -> None:
    earlier = PriorRun("a", REVIEWS.sample_rate, 0.849, 112)
    sigma = solve_noise_multiplier(REVIEWS, 5.0, DELTA, prior=earlier)
    assert sigma > solve_noise_multiplier(REVIEWS, 5.0, DELTA)
    assert 0.99 * 5.0 < epsilon(REVIEWS, sigma, DELTA, prior=earlier) <= 5.0


def test_a_target_that_earlier_runs_have_spent_is_refused() -> None:
    earlier = PriorRun("a", REVIEWS.sample_rate, 0.849, 112)
    with pytest.raises(PrivacyError, match=r"1 earlier run\(s\).*already spend epsilon = 2\.96"):
        solve_noise_multiplier(REVIEWS, 2.9, DELTA, prior=[earlier])


def test_one_run_reached_twice_counts_once_and_two_versions_of_it_are_refused() -> None:
    run = PriorRun("a", 0.1, 1.0, 10)
    assert resolve_prior([run, run, PriorRun("b", 0.1, 1.0, 10)]) == (run, PriorRun("b", 0.1, 1.0, 10))
    with pytest.raises(PrivacyError, match="earlier copy of the same run"):
        resolve_prior([run, PriorRun("a", 0.1, 1.0, 20)])


def test_a_prior_that_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(PrivacyError, match="is a float"):
        resolve_prior([3.0])  # type: ignore[list-item]
    with pytest.raises(ArtifactError, match="does not exist"):
        resolve_prior([tmp_path / "privacy.json"])


@pytest.mark.parametrize(
    "change",
    [
        {"epsilon": 3.0},
        {"mechanism": "shuffled"},
        {"steps": None},
        {"steps": -1},
        {"steps": True},
        {"sample_rate": 1.5},
        {"sample_rate": 0},
        {"noise_multiplier": float("nan")},
        {"noise_multiplier": 0.0},
        {"insecure": "no"},
        {"run_id": ""},
    ],
)
def test_a_prior_run_without_a_usable_mechanism_is_refused(change: dict[str, Any]) -> None:
    good = PriorRun("a", 0.1, 1.0, 10).to_dict()
    assert PriorRun.from_dict(good).to_dict() == good
    with pytest.raises(PrivacyError):
        PriorRun.from_dict({**good, **change})
    with pytest.raises(PrivacyError, match="never added up"):
        PriorRun.from_dict({"run_id": "a", "epsilon": 3.0})


@pytest.mark.parametrize("target", [0.0, -1.0, float("nan"), float("inf"), "8", True, None])
def test_an_epsilon_that_is_not_a_positive_number_is_refused(target: Any) -> None:
    with pytest.raises(PrivacyError, match="target_epsilon"):
        solve_noise_multiplier(REVIEWS, target, DELTA)


@pytest.mark.parametrize("delta", [0.0, -1e-5, 1.0, 2.0, float("nan"), "1e-5", True, 1e-11])
def test_a_delta_outside_its_range_is_refused(delta: Any) -> None:
    with pytest.raises(PrivacyError, match="target_delta"):
        solve_noise_multiplier(REVIEWS, 8.0, delta)
    with pytest.raises(PrivacyError, match="target_delta"):
        epsilon(REVIEWS, 1.0, delta)


def test_a_delta_of_one_over_n_is_refused_and_just_below_is_not() -> None:
    sampler = PoissonSampler(1000, 0.1, 5)
    with pytest.raises(PrivacyError, match=r"not below 1/N"):
        epsilon(sampler, 1.0, 1 / 1000)
    assert epsilon(sampler, 1.0, 0.999 / 1000) > 0


@pytest.mark.parametrize("noise", [0.0, -1.0, float("nan"), float("inf"), "1", True, 1e-9])
def test_a_noise_multiplier_that_gives_no_privacy_is_refused(noise: Any) -> None:
    with pytest.raises(PrivacyError, match="noise_multiplier"):
        epsilon(REVIEWS, noise, DELTA)


def test_the_tracker_is_never_below_the_exact_epsilon_and_ends_on_it() -> None:
    sampler = PoissonSampler(9543, 0.0268, 97)
    # With sigma = 2 the grids are small and the test is quick.
    for prior in ((), (PriorRun("a", 0.01, 2.0, 100),)):
        tracker = EpsilonTracker(sampler, 2.0, DELTA, prior=prior, points=12)
        shown = [tracker.at(step) for step in range(98)]
        for step in (0, 1, 8, 9, 10, 50, 96, 97):
            exact = epsilon(sampler, 2.0, DELTA, steps=step, prior=prior)
            assert shown[step] >= exact
        assert shown[-1] == epsilon(sampler, 2.0, DELTA, prior=prior)
        assert shown == sorted(shown)
        assert len(set(shown)) <= 14


def test_the_tracker_charges_lost_steps_even_beyond_the_plan() -> None:
    sampler = PoissonSampler(9543, 0.0268, 20)
    tracker = EpsilonTracker(sampler, 1.0, DELTA, points=5)
    assert tracker.at(20, lost_steps=3) >= epsilon(sampler, 1.0, DELTA, lost_steps=3) > tracker.at(20)
    assert tracker.exact(20, lost_steps=3) == epsilon(sampler, 1.0, DELTA, lost_steps=3)


@given(st.floats(0, 1e6))
def test_a_printed_epsilon_is_rounded_up_by_less_than_its_last_digit(value: float) -> None:
    printed = float(format_epsilon(value))
    assert value <= printed <= value + 2e-4


def test_the_accountants_name_and_version_are_known() -> None:
    assert "PLD" in accounting.ACCOUNTANT
    assert accounting.accountant_version()[0].isdigit()
