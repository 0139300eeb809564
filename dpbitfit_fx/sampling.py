"""Poisson sampling: each record enters each logical batch independently, with the same public probability."""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import numpy.typing as npt

from dpbitfit_fx.errors import DataError, PrivacyError
from dpbitfit_fx.randomness import SecretKey, stream

if TYPE_CHECKING:
    import dp_accounting  # type: ignore[import-untyped, unused-ignore]

PURPOSE: Final = "poisson sample"
_MAX_DATASET: Final = 2**31 - 1


def _whole(value: object, name: str, minimum: int, error: type[Exception]) -> int:
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < minimum:
        raise error(f"{name} must be a whole number, {minimum} or more; got {value!r}.")
    return int(value)


@dataclass(frozen=True)
class PoissonSampler:
    """The plan that both draws the batches and feeds the accountant, so that neither can differ from the other.

    Args:
        dataset_size: N, the number of records; a public declaration.
        sample_rate: q in (0, 1], the probability of each record at each step. q = 1 takes every record at every step.
        steps: how many logical steps are planned.

    Guarantee: ``draw`` includes every record independently with probability q (within 2**-53), whatever the others;
    ``dp_event`` describes exactly that. How many records a draw holds is private.

    Raises:
        PrivacyError: sample_rate or steps are not usable. DataError: dataset_size is not.
    """

    dataset_size: int
    sample_rate: float
    steps: int

    def __post_init__(self) -> None:
        size = _whole(self.dataset_size, "dataset_size", 1, DataError)
        if size > _MAX_DATASET:
            raise DataError(f"dataset_size is {size}; more than {_MAX_DATASET} records are not supported.")
        steps = _whole(self.steps, "steps", 1, PrivacyError)
        rate = self.sample_rate
        if isinstance(rate, bool) or not isinstance(rate, (int, float, np.floating)) or not 0.0 < rate <= 1.0:
            raise PrivacyError(
                f"sample_rate is the probability that a record enters a batch and must be above 0 and at most 1; got "
                f"{rate!r}."
            )
        if float(rate) < sys.float_info.epsilon:
            raise PrivacyError(
                f"sample_rate {rate!r} is below what 53-bit uniforms resolve; use a larger expected batch."
            )
        # numpy scalars would not serialise, and would break equality of plans read back from a file.
        object.__setattr__(self, "dataset_size", size)
        object.__setattr__(self, "steps", steps)
        object.__setattr__(self, "sample_rate", float(rate))

    @classmethod
    def from_expected_batch_size(
        cls,
        dataset_size: int,
        expected_batch_size: float,
        *,
        epochs: float | None = None,
        steps: int | None = None,
    ) -> PoissonSampler:
        """The plan with sample_rate = expected_batch_size / N and steps as given, or ceil(epochs * N / expected batch).

        Rounding up means that every record is expected to be drawn at least ``epochs`` times; the accountant is charged
        for the steps, not the epochs.

        Raises:
            DataError: the dataset is empty or smaller than the expected batch.
            PrivacyError: expected_batch_size, epochs or steps are not usable, or not exactly one of the last two is
                given.
        """
        size = _whole(dataset_size, "dataset_size", 1, DataError)
        batch = _positive(expected_batch_size, "expected_batch_size")
        if batch > size:
            raise DataError(
                f"The dataset has {size} records, fewer than the expected batch of {batch:g}. Choose an "
                f"expected_batch_size of at most {size}; differential privacy works best with far more records than "
                "that."
            )
        if (epochs is None) == (steps is None):
            raise PrivacyError(
                "Give either epochs or steps (max_steps), and not both: the plan must be fixed beforehand."
            )
        if steps is None:
            assert epochs is not None
            # Exact rational arithmetic: 3 epochs at q = 0.1 are 30 steps, not 31.
            exact = Fraction(_positive(epochs, "epochs")).limit_denominator(10**9) * size / Fraction(batch)
            steps = max(1, math.ceil(exact))
        return cls(size, batch / size, steps)

    @property
    def expected_batch_size(self) -> float:
        """q * N, the public denominator of the averaged gradient."""
        product = self.sample_rate * self.dataset_size
        nearest = float(round(product))
        # 256 / 9543 * 9543 is not 256 in floating point.
        return nearest if nearest > 0 and abs(product - nearest) <= 1e-12 * product else product

    @property
    def epochs(self) -> float:
        """Expected number of times that a record is drawn over the planned steps."""
        return self.sample_rate * self.steps

    def draw(self, key: SecretKey, step: int) -> npt.NDArray[np.int64]:
        """Indices of the records in the logical batch of ``step``: sorted int64, maybe none. They are private data.

        Replays bit for bit for the same key and step; independent across steps.
        """
        numbers = stream(key, PURPOSE, step).uniform(self.dataset_size)
        indices: npt.NDArray[np.int64] = np.flatnonzero(numbers < self.sample_rate).astype(np.int64, copy=False)
        return indices

    def dp_event(self, noise_multiplier: float, steps: int | None = None) -> dp_accounting.DpEvent:
        """What ``steps`` (default: all planned) noisy sums over these draws are, in dp-accounting's language.

        Args:
            noise_multiplier: standard deviation of the noise divided by the sensitivity (max_grad_norm).
            steps: logical steps taken; 0 is a no-op.
        """
        return poisson_gaussian_event(self.sample_rate, noise_multiplier, self.steps if steps is None else steps)

    def to_dict(self) -> dict[str, Any]:
        """The plan as JSON values."""
        return {
            "type": "poisson",
            "dataset_size": self.dataset_size,
            "sample_rate": self.sample_rate,
            "steps": self.steps,
            "expected_batch_size": self.expected_batch_size,
        }

    @classmethod
    def from_dict(cls, content: dict[str, Any]) -> PoissonSampler:
        """The plan from ``to_dict``.

        Raises:
            PrivacyError: the sampler is of another type, or a field is missing or unusable.
        """
        if not isinstance(content, dict) or content.get("type") != "poisson":
            raise PrivacyError("The sampler must be of type 'poisson': only Poisson sampling is accounted for here.")
        missing = {"dataset_size", "sample_rate", "steps", "expected_batch_size"} - content.keys()
        if missing:
            raise PrivacyError(f"The sampler lacks {', '.join(sorted(missing))}.")
        try:
            return cls(content["dataset_size"], content["sample_rate"], content["steps"])
        except DataError as error:
            raise PrivacyError(str(error)) from error


def _positive(value: object, name: str) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float, np.floating, np.integer)):
        raise PrivacyError(f"{name} must be a number above 0; got {type(value).__name__}.")
    if not (math.isfinite(value) and value > 0):
        raise PrivacyError(f"{name} must be a finite number above 0; got {value!r}.")
    return float(value)


def poisson_gaussian_event(sample_rate: float, noise_multiplier: float, steps: int) -> dp_accounting.DpEvent:
    """``steps`` Gaussian sums over Poisson samples, as a dp-accounting event."""
    # dp_accounting takes over a second to import; nothing but accounting needs it.
    import dp_accounting

    if steps < 0:
        raise PrivacyError(f"A number of steps cannot be negative; got {steps}.")
    if steps == 0:
        return dp_accounting.NoOpDpEvent()
    sigma = _positive(noise_multiplier, "noise_multiplier")
    one = dp_accounting.PoissonSampledDpEvent(sample_rate, dp_accounting.GaussianDpEvent(sigma))
    return dp_accounting.SelfComposedDpEvent(one, steps)
