"""What floating point may add to the sensitivity R of a clipped sum, as numbers that the noise is scaled up by. Torch-free.

In float32 the factor, the product with the gradients and the running sum are rounded, so two runs on neighbouring datasets
differ by up to ``R (1 + slack)`` rather than R. One constant for ``precision="float32"`` and ``"bf16"``: what is clipped,
weighted and summed is float32 in both. Measured (docs/threat-model.md, tests/test_numerics.py), not proved: the worst case
of float32 over B rows a batch and n rows is ``2 (B + n / B) n 2^-24``, which no data we tried came near.
"""

from __future__ import annotations

from typing import Final

SLACK_PER_RECORD: Final = 1e-6
FEWEST_RECORDS: Final = 100


def slack(expected_batch_size: float) -> float:
    """The numeric slack, relative to R, that is charged for a draw of so many records: at least 1e-4."""
    return SLACK_PER_RECORD * max(FEWEST_RECORDS, expected_batch_size)


def noise_scale(noise_multiplier: float, sensitivity: float, expected_batch_size: float) -> float:
    """Standard deviation ``sigma R (1 + slack)`` of the noise: sigma, which the accountant knows, times what R really is."""
    return noise_multiplier * sensitivity * (1.0 + slack(expected_batch_size))
