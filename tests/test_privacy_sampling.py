"""Poisson sampling: the law that the accountant assumes, and a plan that cannot be half right."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats  # type: ignore[import-untyped, unused-ignore]

from dpbitfit_fx.errors import DataError, DPBitFitError, PrivacyError
from dpbitfit_fx.randomness import SecretKey
from dpbitfit_fx.sampling import PoissonSampler

KEY = SecretKey.insecure_for_tests(11)


def test_records_are_drawn_at_the_declared_rate_and_the_test_would_notice_five_percent() -> None:
    sampler = PoissonSampler(2000, 0.05, 500)
    drawn = sum(sampler.draw(KEY, step).size for step in range(500))
    assert stats.binomtest(drawn, 2000 * 500, 0.05).pvalue > 1e-3
    for wrong in (0.95, 1.05):
        assert stats.binomtest(drawn, 2000 * 500, 0.05 * wrong).pvalue < 1e-6


def test_every_record_is_drawn_alike_and_the_size_of_a_draw_varies_as_poisson_sampling_does() -> None:
    sampler = PoissonSampler(400, 0.25, 2000)
    counts, sizes = np.zeros(400), []
    for step in range(2000):
        indices = sampler.draw(KEY, step)
        counts[indices] += 1
        sizes.append(indices.size)
    # A fixed-size sampler, which is accounted for differently, has variance 0 here.
    statistic = ((counts - 500) ** 2 / (500 * 0.75)).sum()
    assert 1e-4 < stats.chi2.cdf(statistic, 400) < 1 - 1e-4
    assert 0.85 < np.var(sizes) / (400 * 0.25 * 0.75) < 1.15


def test_whether_one_record_is_drawn_says_nothing_of_another_or_of_the_next_step() -> None:
    sampler = PoissonSampler(50, 0.3, 4000)
    member = np.zeros((4000, 50))
    for step in range(4000):
        member[step, sampler.draw(KEY, step)] = 1
    across = np.corrcoef(member.T)[np.triu_indices(50, 1)]
    after = [np.corrcoef(member[:-1, i], member[1:, i])[0, 1] for i in range(50)]
    assert np.abs(across).max() < 5 / np.sqrt(4000)
    assert np.abs(after).max() < 5 / np.sqrt(4000)


def test_a_draw_is_sorted_unique_in_range_and_replays() -> None:
    sampler = PoissonSampler(1000, 0.1, 10)
    first = sampler.draw(KEY, 4)
    assert first.dtype == np.int64
    assert (np.diff(first) > 0).all() and first.min() >= 0 and first.max() < 1000
    assert (sampler.draw(KEY, 4) == first).all()
    assert sampler.draw(KEY, 5).tolist() != first.tolist()
    assert sampler.draw(KEY.renewed(), 4).tolist() != first.tolist()


def test_removing_the_last_record_leaves_the_draw_of_the_others_as_it_was() -> None:
    larger, smaller = PoissonSampler(101, 0.2, 5), PoissonSampler(100, 0.2, 5)
    for step in range(5):
        drawn = larger.draw(KEY, step)
        assert drawn[drawn < 100].tolist() == smaller.draw(KEY, step).tolist()


def test_draws_may_be_empty_and_a_rate_of_one_takes_everybody() -> None:
    rare = PoissonSampler(3, 0.01, 50)
    assert any(rare.draw(KEY, step).size == 0 for step in range(50))
    assert PoissonSampler(7, 1.0, 1).draw(KEY, 0).tolist() == list(range(7))


@pytest.mark.parametrize(
    ("epochs", "batch", "size", "steps"),
    [
        (3, 256, 9543, 112),
        (1, 10, 100, 10),
        (3, 10, 100, 30),
        (0.1, 10, 100, 1),
        (0.01, 50, 100, 1),
        (2.5, 10, 100, 25),
    ],
)
def test_epochs_become_steps_rounded_up_and_no_further(epochs: float, batch: int, size: int, steps: int) -> None:
    sampler = PoissonSampler.from_expected_batch_size(size, batch, epochs=epochs)
    assert sampler.steps == steps
    assert sampler.expected_batch_size == batch


@given(st.integers(1, 10**7), st.floats(1e-3, 1), st.integers(1, 10**6))
def test_a_plan_survives_its_dictionary(size: int, rate: float, steps: int) -> None:
    sampler = PoissonSampler(size, rate, steps)
    assert PoissonSampler.from_dict(sampler.to_dict()) == sampler
    assert sampler.expected_batch_size == pytest.approx(size * rate, rel=1e-11)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((0, 0.1, 1), DataError, "dataset_size"),
        ((True, 0.1, 1), DataError, "dataset_size"),
        ((10.0, 0.1, 1), DataError, "dataset_size"),
        ((2**40, 0.1, 1), DataError, "not supported"),
        ((10, 0.0, 1), PrivacyError, "sample_rate"),
        ((10, 1.01, 1), PrivacyError, "sample_rate"),
        ((10, float("nan"), 1), PrivacyError, "sample_rate"),
        ((10, "0.1", 1), PrivacyError, "sample_rate"),
        ((10, 1e-20, 1), PrivacyError, "53-bit"),
        ((10, 0.1, 0), PrivacyError, "steps"),
        ((10, 0.1, 1.5), PrivacyError, "steps"),
    ],
)
def test_an_unusable_plan_is_refused_by_name(arguments: Any, error: type[DPBitFitError], message: str) -> None:
    with pytest.raises(error, match=message):
        PoissonSampler(*arguments)


def test_a_dataset_smaller_than_the_expected_batch_is_refused_with_both_numbers() -> None:
    with pytest.raises(DataError, match=r"100 records, fewer than the expected batch of 256"):
        PoissonSampler.from_expected_batch_size(100, 256, epochs=1)
    with pytest.raises(DataError, match="dataset_size"):
        PoissonSampler.from_expected_batch_size(0, 1, epochs=1)


def test_epochs_and_steps_are_alternatives() -> None:
    for both in ({}, {"epochs": 1.0, "steps": 1}):
        with pytest.raises(PrivacyError, match="either epochs or steps"):
            PoissonSampler.from_expected_batch_size(100, 10, **both)  # type: ignore[arg-type]
    with pytest.raises(PrivacyError, match="epochs"):
        PoissonSampler.from_expected_batch_size(100, 10, epochs=float("inf"))
    with pytest.raises(PrivacyError, match="expected_batch_size"):
        PoissonSampler.from_expected_batch_size(100, 0, epochs=1)


def test_a_sampler_of_another_kind_is_not_read_as_poisson() -> None:
    content = PoissonSampler(10, 0.1, 1).to_dict()
    for damaged in ({**content, "type": "shuffle"}, {k: v for k, v in content.items() if k != "steps"}):
        with pytest.raises(PrivacyError):
            PoissonSampler.from_dict(damaged)


def test_the_event_says_what_is_drawn() -> None:
    event = PoissonSampler(10, 0.25, 8).dp_event(1.5)
    assert event.count == 8
    assert event.event.sampling_probability == 0.25
    assert event.event.event.noise_multiplier == 1.5
    assert PoissonSampler(10, 0.25, 8).dp_event(1.5, steps=3).count == 3
    for noise in (0.0, -1.0, float("nan")):
        with pytest.raises(PrivacyError, match="noise_multiplier"):
            PoissonSampler(10, 0.25, 8).dp_event(noise)
