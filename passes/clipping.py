"""The clippings of a per-sample gradient, each with the L2 sensitivity of the sum that it bounds."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import ClassVar

SMALLEST_GAMMA = 1e-12  # R / gamma <= 1e18 is a float32; below it a gradient of zero would give inf * 0
SMALLEST_SQUARED_NORM = 1e-24  # of AUTO-V, for the same reason


@dataclasses.dataclass(frozen=True)
class Layer:
    """Trainables (by their place in the list) that are clipped together, and the bound of their common norm."""

    members: tuple[int, ...]
    bound: float


@dataclasses.dataclass(frozen=True)
class Clipping:
    """A bounded factor ``c`` per sample: ``c * norm(g) <= max_grad_norm``, the norm taken over *all* trainables at once.

    Guarantee: the sum of clipped gradients changes by at most ``max_grad_norm`` (L2) when one record is added or
    removed, and by at most twice that when one is replaced.
    """

    kind: ClassVar[str] = ""  # what privacy.json calls it
    max_grad_norm: float = 1.0

    def __post_init__(self) -> None:
        _check_bound("max_grad_norm", self.max_grad_norm)

    @property
    def sensitivity(self) -> float:
        """L2 sensitivity of the clipped sum under add-or-remove-one."""
        return self.max_grad_norm

    def layers(self, names: Sequence[str]) -> tuple[Layer, ...]:
        """Which of the trainables ``names`` share a norm and a factor; here all of them."""
        return (Layer(tuple(range(len(names))), self.max_grad_norm),)


@dataclasses.dataclass(frozen=True)
class FlatClipping(Clipping):
    """``c = min(1, R / norm(g))`` with R = ``max_grad_norm`` (Abadi et al. 2016; Opacus's ``flat``)."""

    kind: ClassVar[str] = "flat"


@dataclasses.dataclass(frozen=True)
class AutomaticClipping(Clipping):
    """``c = R / (norm(g) + gamma)`` with R = ``max_grad_norm`` (AUTO-S, Bu et al. 2023; the DP-BiTFiT paper's default)."""

    kind: ClassVar[str] = "automatic"
    gamma: float = 0.01

    def __post_init__(self) -> None:
        super().__post_init__()
        value = self.gamma
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not SMALLEST_GAMMA <= value < math.inf:
            raise ValueError(
                f"gamma must be a positive finite number, at least {SMALLEST_GAMMA:g}, got {value!r}; for gamma = 0 use "
                "AutoVClipping."
            )


@dataclasses.dataclass(frozen=True)
class AutoVClipping(Clipping):
    """``c = R / norm(g)`` with R = ``max_grad_norm``: every gradient gets length R (AUTO-V, Bu et al. 2023).

    A gradient whose norm is 1e-12 or less contributes zero (0/0 = 0), so the sensitivity is R here too.
    """

    kind: ClassVar[str] = "auto-v"


@dataclasses.dataclass(frozen=True)
class PerLayerClipping(Clipping):
    """``c_l = min(1, R_l / norm(g_l))`` for every layer l on its own (McMahan et al. 2018; He et al. 2023).

    A layer is a module: its trainables share a norm. ``max_grad_norm`` is the bound of the whole gradient,
    ``R = sqrt(sum_l R_l^2)``, which every layer shares evenly: ``R_l = R / sqrt(L)``. Or give ``layer_norms``, a mapping
    ``{module: R_l}`` that names every layer, from which R follows; a key may also be a parameter's full name, which then
    is a layer of its own.
    Guarantee: sensitivity R under add-or-remove-one. A sample whose gradient is not finite in any layer contributes zero.
    """

    kind: ClassVar[str] = "per-layer"
    layer_norms: Mapping[str, float] | tuple[tuple[str, float], ...] | None = None  # kept as a tuple of pairs

    def __post_init__(self) -> None:
        if self.layer_norms is not None:
            norms = dict(self.layer_norms)
            if not norms:
                raise ValueError("layer_norms names no layer.")
            for name, value in norms.items():
                _check_bound(f"layer_norms[{name!r}]", value)
            object.__setattr__(self, "layer_norms", tuple(norms.items()))
            object.__setattr__(self, "max_grad_norm", math.sqrt(math.fsum(v * v for v in norms.values())))
        super().__post_init__()

    def layers(self, names: Sequence[str]) -> tuple[Layer, ...]:
        given = dict(self.layer_norms or ())
        members: dict[str, list[int]] = {}
        for at, name in enumerate(names):
            members.setdefault(name if name in given else name.rpartition(".")[0], []).append(at)
        if self.layer_norms is None:
            return tuple(Layer(tuple(m), self.max_grad_norm / math.sqrt(len(members))) for m in members.values())
        if missing := [name for name in members if name not in given]:
            raise ValueError(f"layer_norms gives no bound for the layers {missing[:5]}; name every layer or none.")
        if unknown := [name for name in given if name not in members]:
            raise ValueError(
                f"layer_norms names {unknown[:5]}, which hold no trainable; the layers are {list(members)[:20]}."
            )
        return tuple(Layer(tuple(m), given[name]) for name, m in members.items())


def _check_bound(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise ValueError(f"{name} must be a finite number, got {value!r}")
    if not 1e-6 <= value <= 1e6:
        raise ValueError(f"{name} must lie between 1e-6 and 1e6, got {value!r}")


KINDS: dict[str, type[Clipping]] = {
    c.kind: c for c in (AutomaticClipping, FlatClipping, AutoVClipping, PerLayerClipping)
}
