"""What a number of correct guesses proves about epsilon: the bound of one-run auditing. Torch-free.

Source: Steinke, Nasr, Jagielski, "Privacy Auditing with One (1) Training Run", NeurIPS 2023 (arXiv:2305.08846v1): Theorem
2.1, in the form of Corollary 5.4; its p-value is computed as in their Appendix D.

    m canaries, each in or out by its own fair coin; r guesses; (epsilon, delta)-DP for adding or removing one record
    W ~ Binomial(r, e^epsilon / (1 + e^epsilon)),  f(v) = P[W >= v]
    P[at least v guesses are right]  <=  f(v) + 2 m delta max_{1 <= i <= v} (f(v - i) - f(v)) / i
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
from scipy.stats import binom

from dpbitfit_fx.errors import DataError, PrivacyError

__all__ = ["epsilon_lower_bound", "flip_coins", "largest_bound", "p_value", "pick", "split_guesses"]

_LARGEST_EPSILON = 64.0


def flip_coins(count: int, seed: int) -> npt.NDArray[np.bool_]:
    """A fair coin for each canary: whether it is in."""
    return np.random.default_rng(seed).random(count) < 0.5


def pick(size: int, count: int, seed: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """`count` rows of `size` at random, as they were drawn, and the others in their order.

    Raises:
        DataError: there are not so many, or none would be left.
    """
    if not 1 <= count < size:
        raise DataError(f"{count} canaries cannot be taken out of {size} records: give a number from 1 to {size - 1}.")
    order = np.random.default_rng(seed).permutation(size)
    return order[:count], np.sort(order[count:])


def p_value(canaries: int, guesses: int, correct: int, epsilon: float, delta: float) -> float:
    """An upper bound on the probability of so many correct guesses, if the run is (epsilon, delta)-DP.

    Args:
        canaries: m, each included by a fair coin. guesses: r, without abstentions. correct: v of them.

    Raises:
        PrivacyError: not 0 <= correct <= guesses <= canaries, or epsilon or delta out of range.
    """
    _check(canaries, guesses, correct, delta)
    if not epsilon >= 0:
        raise PrivacyError(f"epsilon must be 0 or more; got {epsilon!r}.")
    if correct == 0:
        return 1.0
    right = 1.0 / (1.0 + math.exp(-epsilon))
    tail = float(binom.sf(correct - 1, guesses, right))
    if delta == 0.0:
        return min(tail, 1.0)
    # f(v - i) - f(v) = P[v - i <= W < v]: sums of the masses below v, so that nothing cancels.
    masses = np.cumsum(binom.pmf(np.arange(correct - 1, -1, -1), guesses, right))
    slope = float((masses / np.arange(1, correct + 1)).max())
    return min(tail + 2.0 * canaries * delta * slope, 1.0)


def epsilon_lower_bound(canaries: int, guesses: int, correct: int, delta: float, confidence: float = 0.95) -> float:
    """The largest epsilon that so many correct guesses refute: with probability ``confidence`` a run that is
    (epsilon, delta)-DP gives no bound above its epsilon. 0.0 where nothing is refuted; at most 64.

    Raises:
        PrivacyError: as ``p_value``, or confidence is not in (0, 1).
    """
    _check(canaries, guesses, correct, delta)
    if not 0.0 < confidence < 1.0:
        raise PrivacyError(f"confidence must be above 0 and below 1; got {confidence!r}.")
    level = 1.0 - confidence
    low, high = 0.0, 1.0
    if p_value(canaries, guesses, correct, 0.0, delta) >= level:
        return 0.0
    while p_value(canaries, guesses, correct, high, delta) < level:
        low, high = high, 2.0 * high
        if high > _LARGEST_EPSILON:
            return low
    for _ in range(50):
        middle = (low + high) / 2.0
        if p_value(canaries, guesses, correct, middle, delta) < level:
            low = middle
        else:
            high = middle
    return low  # the end that is refuted: never rounded up


def largest_bound(canaries: int, guesses: int, delta: float, confidence: float = 0.95) -> float:
    """What an audit of this size gives where every guess is right: no leak beyond it can be shown with it."""
    return epsilon_lower_bound(canaries, guesses, guesses, delta, confidence)


def split_guesses(guesses: int | tuple[int, int] | None, count: int) -> tuple[int, int]:
    """(k+, k-): how many of the highest scores are guessed in, and of the lowest out. Chosen before any score is seen."""
    if guesses is None:
        return max(1, count // 4), count // 4
    chosen = (guesses - guesses // 2, guesses // 2) if isinstance(guesses, int) else tuple(guesses)
    if len(chosen) != 2 or min(chosen) < 0 or not 1 <= sum(chosen) <= count:
        raise PrivacyError(
            f"guesses must be a number, or (in, out), of 1 to {count} guesses together; got {guesses!r}."
        )
    return chosen


def _check(canaries: int, guesses: int, correct: int, delta: float) -> None:
    if not 0 <= correct <= guesses <= canaries or canaries < 1:
        raise PrivacyError(
            f"An audit needs 0 <= correct <= guesses <= canaries and a canary; got {correct}, {guesses}, {canaries}."
        )
    if not 0.0 <= delta < 1.0:
        raise PrivacyError(f"delta must be 0 or more and below 1; got {delta!r}.")
