"""``rounded_normals`` has the law of a rounded normal exactly, whatever ties, and replays bit for bit."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from dpbitfit_fx.exact_normal import _Karney, _Uniforms, rounded_normals
from dpbitfit_fx.randomness import SecretKey, stream

COUNT, TIES = 150_000, 50_000
Integers = npt.NDArray[np.int64]


def words(seed: int) -> Callable[[int], Any]:
    return stream(SecretKey.insecure_for_tests(seed), "noise", 0).words


def law_p_value(values: Integers, scale: int, sigma: float = 1.0) -> float:
    """Chi-square of the integers against differences of the normal distribution function, tails pooled."""
    edge = math.floor(3 * 2**scale)
    bounds = np.concatenate([[-np.inf], np.arange(-edge, edge) + 0.5, [np.inf]])
    expected = np.diff(stats.norm.cdf(bounds / (sigma * 2**scale)))
    observed = np.histogram(values, bounds)[0]
    return float(stats.chisquare(observed, expected * len(values)).pvalue)


# Digits of 2 bits tie in every fourth comparison, so that further digits are asked for all the time.
@pytest.mark.parametrize(("scale", "digit"), [(0, 64), (3, 64), (1, 2), (2, 4)])
def test_every_integer_has_the_probability_of_the_rounded_normal_however_often_digits_tie(
    scale: int, digit: int
) -> None:
    values = rounded_normals(words(scale + digit), COUNT if digit == 64 else TIES, scale, digit=digit)
    assert law_p_value(values, scale) > 1e-3
    for wrong in (0.96, 1.04):
        assert law_p_value(values, scale, wrong) < 1e-6


def test_a_tie_that_is_not_resolved_by_further_digits_would_be_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    def first_digits_only(self: _Karney, fresh: Any, places: Any, than: _Uniforms) -> Any:
        return fresh < than.first[places], {}

    monkeypatch.setattr(_Karney, "less", first_digits_only)
    assert law_p_value(rounded_normals(words(5), TIES, 1, digit=2), 1) < 1e-9


def test_at_the_scale_of_fit_the_values_are_normal_and_their_low_bits_uniform() -> None:
    values = rounded_normals(words(7), COUNT, 24)
    assert stats.kstest(values / 2**24, "norm").pvalue > 1e-3
    for wrong in (0.96, 1.04):
        assert stats.kstest(values / 2**24 * wrong, "norm").pvalue < 1e-6
    assert stats.chisquare(np.bincount(values & 255, minlength=256)).pvalue > 1e-3
    assert np.abs(values).max() / 2**24 > 4 and abs(int(np.sign(values).sum())) < 5 * COUNT**0.5


def test_the_same_stream_gives_the_same_noise_and_another_step_other_noise() -> None:
    key = SecretKey.insecure_for_tests(1)
    one, again, other = (rounded_normals(stream(key, "noise", s).words, 70_000, 24) for s in (3, 3, 4))
    assert np.array_equal(one, again) and (one != other).mean() > 0.999
    assert len(np.unique(one)) > 69_000, "no chunk repeats another's bits"
    assert rounded_normals(words(1), 0, 24).shape == (0,)


def test_what_digits_cannot_hold_is_refused() -> None:
    for scale, digit in ((64, 64), (3, 3), (-1, 64), (3, 65)):
        with pytest.raises(ValueError, match="scale"):
            rounded_normals(words(1), 4, scale, digit=digit)


class Tape:
    """Digits in a fixed order, then zeros and ones in turn, so that no tie lasts for ever."""

    def __init__(self, digits: list[int], size: int) -> None:
        self.digits, self.size, self.taken = digits, size, 0

    def words(self, count: int) -> Any:
        places = range(self.taken, self.taken + count)
        found = [self.digits[p] if p < len(self.digits) else p % 2 for p in places]
        self.taken += count
        return np.array(found, dtype=np.uint64) << np.uint64(64 - self.size)


@settings(max_examples=200, deadline=None)
@given(
    st.integers(1, 3),
    st.lists(st.integers(0, 7), min_size=2, max_size=2),
    st.lists(st.integers(0, 7), max_size=4),
    st.lists(st.integers(0, 7), min_size=10, max_size=10),
)
def test_a_comparison_is_that_of_the_whole_digit_rows_and_what_it_drew_is_kept(
    size: int, first: list[int], known: list[int], tape: list[int]
) -> None:
    """Oracle: Python compares the rows of digits as lists. ``known``: what an earlier tie drew of the other number."""
    cut = 2**size
    fresh, than = (np.array([d % cut], dtype=np.uint64) for d in first)
    other = _Uniforms(than)
    other.more[0] = [d % cut for d in known]
    sampler = _Karney(Tape([d % cut for d in tape], size).words, size)
    less, more = sampler.less(fresh, np.array([0]), other)
    if fresh[0] != than[0]:
        assert bool(less[0]) == bool(fresh[0] < than[0]) and more == {} and other.more[0] == [d % cut for d in known]
        return
    mine, theirs = more[0], other.more[0]
    assert theirs[: len(known)] == [d % cut for d in known], "digits that are drawn once stay"
    assert mine[:-1] == theirs[: len(mine) - 1] and mine[-1] != theirs[len(mine) - 1], "as many digits as decide it"
    assert bool(less[0]) == (mine < theirs[: len(mine)])


def test_uniform_integers_below_a_limit_are_uniform_though_it_divides_no_power_of_two() -> None:
    sampler = _Karney(words(9), 64)
    for limit in (2, 6, 14):
        drawn = sampler.below(np.full(60_000, limit, dtype=np.int64))
        assert stats.chisquare(np.bincount(drawn, minlength=limit)).pvalue > 1e-3 and drawn.max() == limit - 1


def test_a_word_beyond_the_last_whole_multiple_of_the_limit_is_drawn_again() -> None:
    tape = [2**64 - 1, 2**64 - 4, 2**64 - 5]  # 2^64 = 4 modulo 6
    sampler = _Karney(lambda count: np.array([tape.pop(0) for _ in range(count)], dtype=np.uint64), 64)
    assert sampler.below(np.array([6])).tolist() == [5] and tape == []
