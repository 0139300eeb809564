"""What the model drops: masks drawn by the host for each record, from the run's own streams.

The row of a record is a function of (secret of the step, number of the record) alone: not of who else was drawn, of
padding rows, or of how a logical batch is split. Masks are no part of the mechanism's noise and need not stay secret.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch

from dpbitfit_fx.passes.joint_graph import Draw
from dpbitfit_fx.passes.random_draws import KEEP, UNIFORM, name_of, names
from dpbitfit_fx.randomness import SecretKey, Stream, stream

__all__ = ["draw_masks"]


def draw_masks(draws: Sequence[Draw], secret: SecretKey, records: Sequence[int], rows: int) -> dict[str, torch.Tensor]:
    """``{dropout_keep: bool [rows, n], dropout_uniform: float32 [rows, m]}``; rows beyond the records drop nothing.

    Four bytes a number: a mask keeps with its probability within 2**-33, and a uniform is k / 2**24, below 1.
    """
    sizes = {name: sum(d.size for d in draws if name_of(d) == name) for name in names(draws)}
    values: dict[str, npt.NDArray[np.bool_] | npt.NDArray[np.float32]] = {}
    if KEEP in sizes:
        values[KEEP] = np.ones((rows, sizes[KEEP]), dtype=np.bool_)
    if UNIFORM in sizes:
        values[UNIFORM] = np.full((rows, sizes[UNIFORM]), 0.5, dtype=np.float32)
    for row, record in enumerate(records):
        numbers, at = stream(secret, "dropout", int(record)), dict.fromkeys(sizes, 0)
        for draw in draws:
            name = name_of(draw)
            values[name][row, at[name] : at[name] + draw.size] = _numbers(draw, numbers)
            at[name] += draw.size
    return {name: torch.from_numpy(x) for name, x in values.items()}


def _numbers(draw: Draw, numbers: Stream) -> npt.NDArray[np.bool_] | npt.NDArray[np.float32]:
    words = np.frombuffer(numbers.bytes(4 * draw.size), dtype="<u4")
    if draw.keep is None:
        uniforms: npt.NDArray[np.float32] = (words >> np.uint32(8)).astype(np.float32) * np.float32(2.0**-24)
        return uniforms
    below = round(draw.keep * 2**32)
    kept: npt.NDArray[np.bool_] = words <= np.uint32(max(below, 1) - 1)
    return kept if below else np.zeros(draw.size, dtype=np.bool_)
