"""What floating point may add to the sensitivity R of a clipped sum, and the grid on which it adds nothing. Torch-free.

In float32 the factor, the product with the gradients and the running sum are rounded, so two runs on neighbouring datasets
differ by up to ``R (1 + slack)`` rather than R. One constant for ``precision="float32"`` and ``"bf16"``: what is clipped,
weighted and summed is float32 in both. Measured (docs/threat-model.md, tests/test_numerics.py), not proved: the worst case
of float32 over B rows a batch and n rows is ``2 (B + n / B) n 2^-24``, which no data we tried came near.

On the grid (``noise="grid"``) every clipped gradient is rounded toward zero to multiples of the unit g in float64, which no
entry's size survives to grow, and sums of integers are exact in any order below 2^53. The noise is ``round(s Z / g)`` units,
s = 2^24 g >= sigma R, Z normal, drawn exactly; since ``sum + round(s Z) = round(sum + s Z)``, what leaves is post-processing of
the real Gaussian mechanism of sensitivity R, and the ordinary accounting holds to the letter.
The factor is R (1 - 2^-20) / norm: the norm of D entries and all that follows lose at most (D / 2 + 10) 2^-53 to rounding,
whatever the order, which that covers up to D = 2^33; so no row is longer than R, by proof (Higham 2002, section 3.1).
"""

from __future__ import annotations

import math
from typing import Final

NOISES: Final = ("float", "grid")
SLACK_PER_RECORD: Final = 1e-6
FEWEST_RECORDS: Final = 100
GRID_BITS: Final = 24  # of sigma R: finer than float32 gradients, and rounding moves a sum of n records by n 2^-24 sigma R
SHRINK: Final = 1.0 - 2.0**-20
LARGEST_INTEGER: Final = 2**53


def slack(expected_batch_size: float) -> float:
    """The numeric slack, relative to R, that is charged for a draw of so many records: at least 1e-4."""
    return SLACK_PER_RECORD * max(FEWEST_RECORDS, expected_batch_size)


def noise_scale(noise_multiplier: float, sensitivity: float, expected_batch_size: float) -> float:
    """Standard deviation ``sigma R (1 + slack)`` of the noise: sigma, which the accountant knows, times what R really is."""
    return noise_multiplier * sensitivity * (1.0 + slack(expected_batch_size))


def grid_unit(noise_multiplier: float, sensitivity: float) -> float:
    """The unit g: ``2^24 g`` is a float64 that is not below sigma R."""
    return math.ldexp(math.nextafter(noise_multiplier * sensitivity, math.inf), -GRID_BITS)


def grid_factor(noise_multiplier: float, sensitivity: float, bound: float) -> float:
    """What a clip factor is multiplied by on the grid, in place of its layer's bound R_l: ``R_l (1 - 2^-20) / g``."""
    return bound * SHRINK / grid_unit(noise_multiplier, sensitivity)


def fits_the_grid(noise_multiplier: float, records: int) -> bool:
    """Whether no sum of so many clipped gradients, noise included, reaches 2^53 units: beyond it integers have gaps."""
    return records * math.ldexp(1.0, GRID_BITS) / noise_multiplier + math.ldexp(1.0, GRID_BITS + 8) < LARGEST_INTEGER
