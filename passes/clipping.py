"""The two clippings of a per-sample gradient over all trainables, each with the sensitivity that it bounds."""

from __future__ import annotations

import dataclasses
import math


@dataclasses.dataclass(frozen=True)
class Clipping:
    """A bounded factor ``c`` per sample: ``c * norm(g) <= max_grad_norm``, the norm taken over *all* trainables at once.

    Guarantee: the sum of clipped gradients changes by at most ``max_grad_norm`` (L2) when one record is added or
    removed, and by at most twice that when one is replaced.
    """

    max_grad_norm: float = 1.0

    def __post_init__(self) -> None:
        value = self.max_grad_norm
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
            raise ValueError(f"max_grad_norm must be a finite number, got {value!r}")
        if not 1e-6 <= value <= 1e6:
            raise ValueError(f"max_grad_norm must lie between 1e-6 and 1e6, got {value!r}")

    @property
    def sensitivity(self) -> float:
        """L2 sensitivity of the clipped sum under add-or-remove-one."""
        return self.max_grad_norm


@dataclasses.dataclass(frozen=True)
class FlatClipping(Clipping):
    """``c = min(1, R / norm(g))`` with R = ``max_grad_norm`` (Abadi et al. 2016; Opacus's ``flat``)."""


@dataclasses.dataclass(frozen=True)
class AutomaticClipping(Clipping):
    """``c = R / (norm(g) + gamma)`` with R = ``max_grad_norm`` (AUTO-S, Bu et al. 2023; the DP-BiTFiT paper's default)."""

    gamma: float = 0.01

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.gamma, bool) or not isinstance(self.gamma, (int, float)) or not 0 < self.gamma < math.inf:
            raise ValueError(f"gamma must be a positive finite number, got {self.gamma!r}")
