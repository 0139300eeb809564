"""Normals rounded to the nearest integer, exactly: ``round(2^m N(0, 1))``, from comparisons of random bits alone.

Source: C. F. F. Karney, "Sampling exactly from the normal distribution", ACM TOMS 42 (2016), arXiv:1303.6257, Algorithms
N, H and B. Nothing is computed in floating point: a uniform number is a row of binary digits, of which as many are drawn as
a comparison needs to be decided, so the law is that of the real normal, to the last bit and out to the last tail. The
magnitude comes as k + x, an integer and a uniform; scaled by 2^m, its rounding is read off the digits of x.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final, TypeAlias

import numpy as np
import numpy.typing as npt

Words: TypeAlias = npt.NDArray[np.uint64]
Places: TypeAlias = npt.NDArray[np.intp]
Flags: TypeAlias = npt.NDArray[np.bool_]

_CHUNK: Final = 1 << 16  # as much at a time as stays in the cache; part of what a stream's bits mean
_ONE: Final = np.uint64(1)


class _Uniforms:
    """Uniforms in (0, 1), by place: their first digits, and of those that tied in a comparison the further ones."""

    def __init__(self, first: Words) -> None:
        self.first = first
        self.more: dict[int, list[int]] = {}

    def put(self, places: Places, first: Words, more: dict[int, list[int]]) -> None:
        """``more``: by number in ``places``."""
        self.first[places] = first
        if self.more or more:
            for number, place in enumerate(places.tolist()):
                self.more.pop(place, None)
                if number in more:
                    self.more[place] = more[number]


class _Karney:
    """Vectorised over the lanes of one request; every lane rejects and goes on by itself, bits are taken in a fixed order.

    digit: bits in a digit of a uniform, 64; fewer make ties frequent, for tests, and change nothing of the law.
    """

    def __init__(self, words: Callable[[int], Words], digit: int) -> None:
        self.words, self.digit = words, digit

    def digits(self, count: int) -> Words:
        first: Words = self.words(count) >> np.uint64(64 - self.digit)
        return first

    def less(self, fresh: Words, places: Places, than: _Uniforms) -> tuple[Flags, dict[int, list[int]]]:
        """Which of the new uniforms are less than ``than`` at these places; and the further digits that ties asked for."""
        other = than.first[places]
        less, more = fresh < other, dict[int, list[int]]()
        for tie in np.flatnonzero(fresh == other).tolist():
            mine, theirs = list[int](), than.more.setdefault(int(places[tie]), [])
            while not mine or mine[-1] == theirs[len(mine) - 1]:
                if len(theirs) == len(mine):
                    theirs.append(int(self.digits(1)[0]))
                mine.append(int(self.digits(1)[0]))
            less[tie], more[tie] = mine[-1] < theirs[len(mine) - 1], mine
        return less, more

    def falling(
        self,
        fresh: Words,
        less: Flags,
        more: dict[int, list[int]],
        passes: Callable[[Places], Flags] = lambda at: np.ones(len(at), dtype=np.bool_),
    ) -> Flags:
        """Whether u1 > u2 > .. goes on for an even number of terms. ``fresh``, ``less``, ``more``: u1, and how it compared with
        what it has to be below. ``passes``: a further test of each term, by place."""
        count = len(fresh)
        even, at = np.ones(count, dtype=np.bool_), np.arange(count)
        last = _Uniforms(np.empty(count, dtype=np.uint64))
        while True:
            chosen = np.flatnonzero(less)
            chosen = chosen[passes(at[chosen])]
            at = at[chosen]
            if not len(at):
                return even
            even[at] ^= True
            last.put(at, fresh[chosen], _picked(more, chosen))
            fresh = self.digits(len(at))
            less, more = self.less(fresh, at, last)

    def half(self, count: int) -> Flags:
        """Algorithm H: True with probability exp(-1/2), where 1/2 > u1 > u2 > .. goes on for an even number of terms."""
        fresh = self.digits(count)
        return self.falling(fresh, fresh < _ONE << np.uint64(self.digit - 1), {})

    def integers(self, count: int) -> npt.NDArray[np.int64]:
        """Step 1: k = 0, 1, .. with probability exp(-k/2) (1 - exp(-1/2))."""
        k, active = np.zeros(count, dtype=np.int64), np.arange(count)
        while len(active):
            active = active[self.half(len(active))]
            k[active] += 1
        return k

    def all_of(self, times: npt.NDArray[np.int64], trial: Callable[[Places], Flags]) -> Places:
        """The lanes whose trial, at most so many times in a row, never says no."""
        left, kept = times.copy(), np.ones(len(times), dtype=np.bool_)
        active = np.flatnonzero(left > 0)
        while len(active):
            yes = trial(active)
            kept[active[~yes]] = False
            active = active[yes]
            left[active] -= 1
            active = active[left[active] > 0]
        return np.flatnonzero(kept)

    def bernoulli(self, lanes: Places, x: _Uniforms, k: npt.NDArray[np.int64]) -> Flags:
        """Algorithm B: True with probability exp(-x (2 k + x) / (2 k + 2)), where x > z1 > z2 > .., each also passing a
        test of probability (2 k + x) / (2 k + 2), goes on for an even number of terms."""
        fresh = self.digits(len(lanes))
        return self.falling(fresh, *self.less(fresh, lanes, x), lambda at: self.selected(lanes[at], x, k))

    def selected(self, lanes: Places, x: _Uniforms, k: npt.NDArray[np.int64]) -> Flags:
        """True with probability (2 k + x) / (2 k + 2): of 2 k + 2 equal cases 2 k are true, one is false, one is u < x."""
        case = self.below(2 * k[lanes] + 2)
        result: Flags = case < 2 * k[lanes]
        open_ = np.flatnonzero(case == 2 * k[lanes])
        result[open_] = self.less(self.digits(len(open_)), lanes[open_], x)[0]
        return result

    def below(self, limits: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Uniform integers in [0, limit): words beyond the last whole multiple are drawn again."""
        sizes = limits.astype(np.uint64)
        largest = ~np.uint64(0)
        last = largest - (largest % sizes + _ONE) % sizes
        drawn = self.words(len(sizes))
        while len(again := np.flatnonzero(drawn > last)):
            drawn[again] = self.words(len(again))
        return (drawn % sizes).astype(np.int64)

    def rounded(self, count: int, scale: int) -> npt.NDArray[np.int64]:
        """Algorithm N, its result scaled by ``2 ** scale`` and rounded."""
        values, pending = np.empty(count, dtype=np.int64), np.arange(count)
        while len(pending):
            k = self.integers(len(pending))
            lanes = self.all_of(k * (k - 1), lambda active: self.half(len(active)))  # step 2
            k, places = k[lanes], pending[lanes]
            x = _Uniforms(self.digits(len(places)))
            # Steps 3 and 4; the default binds this round's k and x.
            done = self.all_of(k + 1, lambda active, x=x, k=k: self.bernoulli(active, x, k))  # type: ignore[misc]
            fraction = x.first[done] >> np.uint64(self.digit - scale - 1)  # scale + 1 bits: the last one rounds
            size = (k[done] << scale) + ((fraction + _ONE) >> _ONE).astype(np.int64)
            minus = self.words(len(done)) >> np.uint64(63) == _ONE
            values[places[done]] = np.where(minus, -size, size)
            left = np.ones(len(pending), dtype=np.bool_)
            left[lanes[done]] = False
            pending = pending[left]
        return values


def _picked(more: dict[int, list[int]], chosen: Places) -> dict[int, list[int]]:
    return {new: more[old] for new, old in enumerate(chosen.tolist()) if old in more} if more else more


def rounded_normals(words: Callable[[int], Any], count: int, scale: int, *, digit: int = 64) -> npt.NDArray[np.int64]:
    """``int64[count]``: independent standard normals times ``2 ** scale``, rounded to the nearest integer.

    Guarantee: exactly that law (no value has the probability of another real number), if ``words(n)`` gives ``uint64[n]``
    of independent uniform bits. The same bits give the same numbers; a request for more does not begin with those for fewer.

    Args:
        scale: 0 to ``digit - 1``. digit: for tests only, bits of a uniform's digit, which the law does not depend on.
    """
    if not 0 <= scale < digit <= 64:
        raise ValueError(f"scale must be at least 0 and below digit, and digit at most 64; got {scale} and {digit}.")
    sampler = _Karney(words, digit)
    pieces = [sampler.rounded(min(_CHUNK, count - start), scale) for start in range(0, count, _CHUNK)]
    return np.concatenate(pieces) if pieces else np.empty(0, dtype=np.int64)
