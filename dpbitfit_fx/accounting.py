"""Epsilon for a plan and noise for an epsilon, by dp-accounting's PLD accountant, add-or-remove-one.

Guarantee: no epsilon given out here is below the one that the accountant's real-number analysis gives. Privacy losses
are discretised pessimistically (connect-the-dots), progress is reported for a later step than the one reached, and
printed values are rounded up. Source: Doroshenko et al., "Connect the Dots", PoPETs 2022; Google's dp-accounting.
"""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Final, Protocol, TypeAlias, runtime_checkable

from dpbitfit_fx.errors import PrivacyError, PrivacyWarning
from dpbitfit_fx.sampling import PoissonSampler, poisson_gaussian_event

if TYPE_CHECKING:
    import dp_accounting  # type: ignore[import-untyped, unused-ignore]

ACCOUNTANT: Final = "dp-accounting PLDAccountant"
NEIGHBORING_RELATION: Final = "add-or-remove-one"
KIND: Final = "poisson_subsampled_gaussian"
# Below this the accountant's FFT rounding (about 1e-14 in delta) is no longer negligible beside delta.
SMALLEST_DELTA: Final = 1e-10
_LARGEST_NOISE: Final = 2.0**20
_SMALLEST_NOISE: Final = 2.0**-10
# Beyond tier 2 of Ponomareva et al., "How to DP-fy ML", JAIR 2023, twice over: e^20 is half a billion.
_WEAK_EPSILON: Final = 20.0


@dataclass(frozen=True)
class PriorRun:
    """One earlier run on the same records, as composition needs it: its mechanism, never its printed epsilon.

    Args:
        run_id: names the run, so that the same run reached by two paths is counted once.
        sample_rate: in (0, 1]. noise_multiplier: above 0. steps: every step charged, lost ones included.
        insecure: its noise came from a known seed.
    """

    run_id: str
    sample_rate: float
    noise_multiplier: float
    steps: int
    insecure: bool = False

    def __post_init__(self) -> None:
        where = "A prior run"
        if not isinstance(self.run_id, str) or not self.run_id:
            raise PrivacyError(f"{where} has no run_id; it must name the run.")
        where = f"The prior run {self.run_id!r}"
        for name in ("sample_rate", "noise_multiplier"):
            value = getattr(self, name)
            if (
                isinstance(value, bool)
                or not isinstance(value, (int, float))
                or not (math.isfinite(value) and value > 0)
            ):
                raise PrivacyError(f"{where} has {name} {value!r}; it must be a finite number above 0.")
            object.__setattr__(self, name, float(value))
        if self.sample_rate > 1:
            raise PrivacyError(f"{where} has sample_rate {self.sample_rate!r}; a probability is at most 1.")
        if isinstance(self.steps, bool) or not isinstance(self.steps, int) or self.steps < 0:
            raise PrivacyError(f"{where} has steps {self.steps!r}; it must be a whole number, 0 or more.")
        if not isinstance(self.insecure, bool):
            raise PrivacyError(f"{where} has insecure {self.insecure!r}; it must be true or false.")

    def to_dict(self) -> dict[str, Any]:
        """The run as JSON values."""
        return {
            "run_id": self.run_id,
            "mechanism": KIND,
            "sample_rate": self.sample_rate,
            "noise_multiplier": self.noise_multiplier,
            "steps": self.steps,
            "insecure": self.insecure,
        }

    @classmethod
    def from_dict(cls, content: object) -> PriorRun:
        """The run from ``to_dict``.

        Raises:
            PrivacyError: a field is missing, unknown or unusable, so that the run cannot be composed exactly.
        """
        if not isinstance(content, dict):
            raise PrivacyError("A prior run must be a JSON object.")
        expected = {"run_id", "mechanism", "sample_rate", "noise_multiplier", "steps", "insecure"}
        if content.keys() != expected:
            raise PrivacyError(
                f"A prior run must have exactly the fields {', '.join(sorted(expected))}: without its mechanism an "
                "earlier run cannot be composed exactly, and printed epsilons are never added up."
            )
        if content["mechanism"] != KIND:
            raise PrivacyError(f"A prior run has a mechanism other than {KIND!r}, which this version cannot compose.")
        return cls(
            content["run_id"],
            content["sample_rate"],
            content["noise_multiplier"],
            content["steps"],
            content["insecure"],
        )


@runtime_checkable
class Priors(Protocol):
    """Whatever can list the runs it stands for, its own and those before it (a ``PrivacyStatement`` does)."""

    def as_prior_runs(self) -> tuple[PriorRun, ...]: ...


Prior: TypeAlias = "PriorRun | Priors | str | os.PathLike[str]"


def resolve_prior(prior: Prior | Iterable[Prior] = ()) -> tuple[PriorRun, ...]:
    """All earlier runs behind ``prior``, each once.

    Args:
        prior: runs, privacy statements, paths of privacy.json files or of the folders that hold one; or one of these.

    Raises:
        PrivacyError: two entries carry one run_id but differ (an early and a late copy of one run, or two runs forked
            from one key), or a statement cannot be composed. ArtifactError: a file is absent or unreadable.
    """
    items: Iterable[Prior] = (prior,) if isinstance(prior, (str, os.PathLike, PriorRun, Priors)) else prior
    found: dict[str, PriorRun] = {}
    for item in items:
        if isinstance(item, PriorRun):
            runs: tuple[PriorRun, ...] = (item,)
        elif isinstance(item, (str, os.PathLike)):
            from dpbitfit_fx.privacy_statement import PrivacyStatement

            runs = PrivacyStatement.load(item).as_prior_runs()
        elif isinstance(item, Priors):
            runs = item.as_prior_runs()
        else:
            raise PrivacyError(
                f"An entry of prior is a {type(item).__name__}; give paths of privacy.json files, or "
                "PrivacyStatement objects."
            )
        for run in runs:
            known = found.setdefault(run.run_id, run)
            if known != run:
                raise PrivacyError(
                    f"Two entries of prior describe the run {run.run_id!r} differently ({known.steps} and "
                    f"{run.steps} steps charged). Either one is an earlier copy of the same run: give only the "
                    "later. Or the run was copied and continued twice from one key: then the noise of one copy "
                    "reveals that of the other, and no epsilon holds."
                )
    return tuple(found.values())


def check_target_epsilon(target_epsilon: float) -> float:
    """``target_epsilon`` as a float.

    Raises:
        PrivacyError: it is not a finite number above 0.
    """
    if isinstance(target_epsilon, bool) or not isinstance(target_epsilon, (int, float)):
        raise PrivacyError(f"target_epsilon must be a number above 0; got {type(target_epsilon).__name__}.")
    if not (math.isfinite(target_epsilon) and target_epsilon > 0):
        raise PrivacyError(
            f"target_epsilon must be a finite number above 0; got {target_epsilon!r}. Common choices lie between 1 "
            "and 10; smaller is more private."
        )
    return float(target_epsilon)


def check_target_delta(target_delta: float, dataset_size: int) -> float:
    """``target_delta`` as a float, strictly below 1/N.

    Raises:
        PrivacyError: it is not in (0, 1), is 1/N or more, or is below what the accountant resolves (1e-10).
    """
    if isinstance(target_delta, bool) or not isinstance(target_delta, (int, float)):
        raise PrivacyError(f"target_delta must be a number above 0; got {type(target_delta).__name__}.")
    if not 0.0 < target_delta < 1.0:
        raise PrivacyError(f"target_delta must be above 0 and below 1; got {target_delta!r}. Choose it well below 1/N.")
    if target_delta * dataset_size >= 1.0:
        raise PrivacyError(
            f"target_delta is {target_delta!r}, which is not below 1/N = {1 / dataset_size:.3g} for {dataset_size} "
            "records: such a delta allows publishing somebody's whole record. Choose one well below 1/N."
        )
    if target_delta < SMALLEST_DELTA:
        raise PrivacyError(
            f"target_delta {target_delta!r} is below {SMALLEST_DELTA}, where the accountant's floating point is no "
            f"longer reliable. Choose {SMALLEST_DELTA} or more."
        )
    return float(target_delta)


def _check_noise(noise_multiplier: float) -> float:
    if isinstance(noise_multiplier, bool) or not isinstance(noise_multiplier, (int, float)):
        raise PrivacyError(f"noise_multiplier must be a number above 0; got {type(noise_multiplier).__name__}.")
    if not (math.isfinite(noise_multiplier) and noise_multiplier > 0):
        raise PrivacyError(
            f"noise_multiplier must be a finite number above 0; got {noise_multiplier!r}. Without noise there is no "
            "epsilon."
        )
    if noise_multiplier < _SMALLEST_NOISE:
        raise PrivacyError(
            f"noise_multiplier {noise_multiplier!r} is too small to be accounted for; use {_SMALLEST_NOISE:g} or more."
        )
    return float(noise_multiplier)


# (sample_rate, noise_multiplier, steps), equal mechanisms merged, sorted: equal plans are equal keys of the cache.
_Plan: TypeAlias = tuple[tuple[float, float, int], ...]


def _plan(own: Iterable[tuple[float, float, int]], prior: Sequence[PriorRun]) -> _Plan:
    steps: dict[tuple[float, float], int] = {}
    entries = [(run.sample_rate, run.noise_multiplier, run.steps) for run in prior]
    for rate, sigma, count in [*entries, *own]:
        if count:
            steps[rate, sigma] = steps.get((rate, sigma), 0) + count
    return tuple((rate, sigma, count) for (rate, sigma), count in sorted(steps.items()))


def _interval(plan: _Plan) -> float:
    """Width of the privacy-loss grid: as fine as a few hundred thousand points allow. Any width is pessimistic."""
    losses, width = [], 0.0
    for rate, sigma, steps in plan:
        if rate == 1:
            # The accountant composes plain Gaussians in closed form, into one with less noise.
            sigma, steps = sigma / math.sqrt(steps), 1
        loss = 0.5 / sigma**2 + 10 / sigma
        variance = min(rate**2 * math.expm1(min(1 / sigma**2, 700.0)), 1 / sigma**2)
        losses.append(loss)
        width += loss + steps * variance / 2 + 8 * math.sqrt(steps * variance)
    # Losses far below the grid's width would be rounded up to whole cells and pile up over the steps.
    finest = max(min(losses) / 5e4, max(losses) / 2e5, width / 1e6)
    return min(finest, 1e-3) if max(losses) < 100 else finest


@lru_cache(maxsize=4096)
def _epsilon(plan: _Plan, delta: float, coarsening: float = 1.0) -> float:
    if not plan:
        return 0.0
    import dp_accounting
    from dp_accounting.pld import PLDAccountant  # type: ignore[import-untyped, unused-ignore]

    accountant = PLDAccountant(
        dp_accounting.NeighboringRelation.ADD_OR_REMOVE_ONE,
        value_discretization_interval=_interval(plan) * coarsening,
    )
    for rate, sigma, steps in plan:
        accountant.compose(_event(rate, sigma, steps))
    value = float(accountant.get_epsilon(delta))
    if math.isnan(value):
        raise PrivacyError("The accountant could not compute epsilon for this plan (not a number). Use more noise.")
    return max(value, 0.0)


def _event(rate: float, sigma: float, steps: int) -> dp_accounting.DpEvent:
    if rate == 1:
        import dp_accounting

        return dp_accounting.SelfComposedDpEvent(dp_accounting.GaussianDpEvent(sigma), steps)
    return poisson_gaussian_event(rate, sigma, steps)


def _finite(value: float, delta: float) -> float:
    if not math.isfinite(value):
        raise PrivacyError(
            f"This plan has no finite epsilon at delta = {delta:g}: the noise is too small. Use more noise."
        )
    return value


def epsilon(
    sampler: PoissonSampler,
    noise_multiplier: float,
    target_delta: float,
    steps: int | None = None,
    prior: Prior | Iterable[Prior] = (),
    lost_steps: int = 0,
) -> float:
    """Epsilon at ``target_delta`` after ``steps`` steps of this run and everything in ``prior``, never too low.

    Args:
        sampler: the object that drew the batches.
        noise_multiplier: standard deviation of the noise over max_grad_norm.
        target_delta: in [1e-10, 1/N).
        steps: logical steps taken; default all planned.
        prior: earlier runs on the same records (see ``resolve_prior``), composed exactly.
        lost_steps: steps somebody may have seen but that could not be replayed: charged on top.

    Raises:
        PrivacyError: an argument is unusable, or no finite epsilon exists.
    """
    charged = _charged(sampler.steps if steps is None else steps, lost_steps)
    return epsilon_of_phases([(sampler, charged)], noise_multiplier, target_delta, prior)


def epsilon_of_phases(
    phases: Sequence[tuple[PoissonSampler, int]],
    noise_multiplier: float,
    target_delta: float,
    prior: Prior | Iterable[Prior] = (),
) -> float:
    """Epsilon of a run of several phases, composed exactly: ``epsilon`` for (sampler, steps charged) of each.

    Raises:
        PrivacyError: an argument is unusable, or no finite epsilon exists.
    """
    delta = check_target_delta(target_delta, phases[0][0].dataset_size)
    sigma = _check_noise(noise_multiplier)
    own = [(sampler.sample_rate, sigma, _charged(charged, 0)) for sampler, charged in phases]
    return _finite(_epsilon(_plan(own, resolve_prior(prior)), delta), delta)


def warn_of_extremes(epsilon: float, noise_multiplier: float, samplers: Sequence[PoissonSampler]) -> None:
    """Warns (PrivacyWarning) before a run that protects next to nothing, and before one that can learn nothing."""
    if epsilon > _WEAK_EPSILON:
        warnings.warn(
            f"Epsilon will be {epsilon:,.0f}, earlier runs on these records included: so large a number promises next to nothing "
            f"(8 is common, 1 is strong). noise_multiplier is {noise_multiplier:.4g}; raise it, or give target_epsilon instead.",
            PrivacyWarning,
            stacklevel=3,
        )
    expected = max(sampler.expected_batch_size for sampler in samplers)
    if noise_multiplier >= expected:
        warnings.warn(
            f"noise_multiplier is {noise_multiplier:.4g}: in every single number that is released, noise outweighs all that "
            f"{expected:.4g} records (expected_batch_size) can add up to, so nothing will be learnt. The privacy budget is small "
            "or, with earlier runs on these records, nearly spent: raise target_epsilon, or train on other records.",
            PrivacyWarning,
            stacklevel=3,
        )


def epsilon_of_runs(runs: Iterable[PriorRun], target_delta: float) -> float:
    """Epsilon of several runs on the same records, composed exactly; infinity where the noise is too small for any."""
    return _epsilon(_plan((), tuple(runs)), target_delta)


def most_steps(run: PriorRun, others: Iterable[PriorRun], target_epsilon: float, target_delta: float) -> int:
    """How many steps of ``run``, at most its own, keep it and ``others`` together within the target; 0 for none.

    The search takes a coarser grid, which is quicker and never too low; around its answer the accountant's own decides.
    """
    rest = tuple(others)

    def fits(steps: int, coarsening: float) -> bool:
        own = [(run.sample_rate, run.noise_multiplier, steps)]
        return _epsilon(_plan(own, rest), target_delta, coarsening) <= target_epsilon

    low, high = 0, run.steps + 1
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle, 8.0) else (low, middle)
    while low and not fits(low, 1.0):
        low -= 1
    for _ in range(3):
        low += low < run.steps and fits(low + 1, 1.0)
    return low


def enough_noise(
    runs: Sequence[PriorRun], others: Iterable[PriorRun], target_epsilon: float, target_delta: float
) -> float | None:
    """A noise multiplier, larger than that of ``runs`` and about the least, with which they and ``others`` keep within the
    target; None where nothing sensible does. Quicker and less exact (2 %) than ``solve_noise_multiplier``.
    """
    rest = tuple(others)

    def fits(sigma: float, coarsening: float) -> bool:
        own = [(run.sample_rate, sigma, run.steps) for run in runs]
        return _epsilon(_plan(own, rest), target_delta, coarsening) <= target_epsilon

    low = high = max(run.noise_multiplier for run in runs)
    while not fits(high, 8.0):
        low, high = high, 2 * high
        if high > _LARGEST_NOISE:
            return None
    while high > 1.02 * low:
        middle = math.sqrt(low * high)
        low, high = (low, middle) if fits(middle, 8.0) else (middle, high)
    while not fits(high, 1.0):
        high *= 1.01
    return high


def _charged(steps: int, lost_steps: int) -> int:
    for name, value in (("steps", steps), ("lost_steps", lost_steps)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 0:
            raise PrivacyError(f"{name} must be a whole number, 0 or more; got {value!r}.")
    return steps + lost_steps


def solve_noise_multiplier(
    sampler: PoissonSampler | Sequence[PoissonSampler],
    target_epsilon: float,
    target_delta: float,
    prior: Prior | Iterable[Prior] = (),
) -> float:
    """The smallest noise multiplier (within 0.1 %) whose planned steps, composed with ``prior``, stay within the
    target.

    Args:
        sampler: the run's, or one for each of its phases, which then share the noise multiplier.

    Guarantee: ``epsilon(sampler, result, target_delta, prior=prior) <= target_epsilon``, and ``epsilon_of_phases``
    likewise.

    Raises:
        PrivacyError: an argument is unusable, or the earlier runs already spent the target.
    """
    samplers = (sampler,) if isinstance(sampler, PoissonSampler) else tuple(sampler)
    delta = check_target_delta(target_delta, samplers[0].dataset_size)
    target = check_target_epsilon(target_epsilon)
    runs = resolve_prior(prior)
    return _solve(tuple((s.sample_rate, s.steps) for s in samplers), target, delta, runs)


@lru_cache(maxsize=256)
def _solve(phases: tuple[tuple[float, int], ...], target: float, delta: float, runs: tuple[PriorRun, ...]) -> float:
    import dp_accounting
    from dp_accounting.pld import PLDAccountant

    spent, steps = _epsilon(_plan((), runs), delta), sum(count for _, count in phases)
    if spent >= target:
        raise PrivacyError(
            f"The {len(runs)} earlier run(s) on these records already spend epsilon = {format_epsilon(spent)} at "
            f"delta = {delta:g}, which is not below the target of {target:g}: no amount of noise leaves room for "
            "this run. Raise target_epsilon, or train on other records."
        )

    def plan(sigma: float) -> _Plan:
        return _plan([(rate, sigma, count) for rate, count in phases], runs)

    def coarse(sigma: float) -> float:
        return _epsilon(plan(sigma), delta, 8.0)

    upper = 1.0
    while coarse(upper) > target:
        upper *= 2
        if upper > _LARGEST_NOISE:
            raise PrivacyError(
                f"No noise multiplier up to {_LARGEST_NOISE:g} keeps {steps} steps within epsilon = {target:g} at "
                f"delta = {delta:g} (earlier runs spend {format_epsilon(spent)}). Take fewer steps, a smaller batch, "
                "or a larger target_epsilon."
            )
    lower = upper / 2
    while lower >= _SMALLEST_NOISE and coarse(lower) <= target:
        upper, lower = lower, lower / 2
    if lower < _SMALLEST_NOISE:
        return upper

    # One grid for the whole bracket: a grid that moved with sigma would make epsilon jump under the solver.
    grid = 8.0 * min(_interval(plan(lower)), _interval(plan(upper)))

    def accountant() -> PLDAccountant:
        relation = dp_accounting.NeighboringRelation.ADD_OR_REMOVE_ONE
        return PLDAccountant(relation, value_discretization_interval=grid)

    def event(sigma: float) -> dp_accounting.DpEvent:
        return dp_accounting.ComposedDpEvent([_event(*entry) for entry in plan(float(sigma))])

    # On the finer of two grids the lower end may just meet the target; it is no bracket then, but an answer.
    sigma = lower
    if accountant().compose(event(lower)).get_epsilon(delta) > target:
        bracket = dp_accounting.ExplicitBracketInterval(lower, upper)
        sigma = float(
            dp_accounting.calibrate_dp_mechanism(
                accountant, event, target, delta, bracket_interval=bracket, tol=2e-4 * upper
            )
        )
    if _epsilon(plan(sigma), delta) < 0.999 * target:
        # The coarse grid was loose (very small losses over very many steps): bisect on the grid that `epsilon` uses.
        low, high = sigma, sigma
        while low > _SMALLEST_NOISE and _epsilon(plan(low), delta) <= target:
            low, high = low * 0.98, low
        while high - low > 2e-4 * high:
            middle = (low + high) / 2
            low, high = (low, middle) if _epsilon(plan(middle), delta) <= target else (middle, high)
        sigma = high
    # What is promised is what `epsilon` will report, so that is what is checked.
    while _epsilon(plan(sigma), delta) > target:
        sigma *= 1.0005
    return sigma


class EpsilonTracker:
    """Epsilon spent so far, cheap enough to ask at every step, for a progress bar and a partial statement.

    Epsilon is computed only at about ``points`` step counts, the last planned one among them, when first reached;
    between two of them the later one's is reported. So ``at`` is never below ``epsilon(..., steps=step)``, is exact at
    the end, and depends on the public step number alone.
    """

    def __init__(
        self,
        sampler: PoissonSampler,
        noise_multiplier: float,
        target_delta: float,
        prior: Prior | Iterable[Prior] = (),
        points: int = 25,
    ) -> None:
        if points < 1:
            raise PrivacyError(f"points must be 1 or more; got {points}.")
        self._sampler = sampler
        self._noise_multiplier = _check_noise(noise_multiplier)
        self._delta = check_target_delta(target_delta, sampler.dataset_size)
        self._prior = resolve_prior(prior)
        self._stride = -(-sampler.steps // points)

    def _value(self, charged: int, coarsening: float) -> float:
        plan = _plan([(self._sampler.sample_rate, self._noise_multiplier, charged)], self._prior)
        return _finite(_epsilon(plan, self._delta, coarsening), self._delta)

    def at(self, step: int, lost_steps: int = 0) -> float:
        """Epsilon after ``step`` steps taken and ``lost_steps`` charged besides, prior included: an upper bound."""
        charged = _charged(step, lost_steps)
        ceiling = -(-charged // self._stride) * self._stride
        planned = self._sampler.steps
        if charged <= planned <= ceiling:
            return self.exact(planned)
        # A little cheaper and a little higher, never lower.
        return self._value(ceiling, 1.0 if charged == 0 else 4.0)

    def exact(self, step: int, lost_steps: int = 0) -> float:
        """Epsilon after exactly these steps: what ``epsilon`` gives. Takes up to a second or two."""
        return self._value(_charged(step, lost_steps), 1.0)


def format_epsilon(value: float, decimals: int = 4) -> str:
    """``value`` rounded **up**, for people: a printed epsilon is never below the one computed."""
    if not math.isfinite(value):
        return "infinity"
    scale = 10**decimals
    rounded = math.ceil(value * scale) / scale
    while rounded < value:
        rounded = (math.ceil(value * scale) + 1) / scale
    return f"{rounded:.{decimals}f}"


def accountant_version() -> str:
    """Version of dp-accounting installed here."""
    from importlib.metadata import version

    return version("dp-accounting")
