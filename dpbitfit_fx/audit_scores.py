"""What an audit sees of a run, which is what the run releases, and how it scores the canaries by it.

White-box: after every step the noisy gradient (or the step that the parameters took), projected onto the direction of
each canary. Black-box: the loss of each canary before and after the run. A higher score says "it was in".
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from rich.console import Console
from rich.progress import Progress
from torch import nn

from dpbitfit_fx.batching import PhysicalBatches, global_random_state_kept
from dpbitfit_fx.engine import Engine
from dpbitfit_fx.errors import PrivacyError
from dpbitfit_fx.progress import StepInfo

__all__ = ["SCORES", "Along", "Coordinates", "Observed", "Watcher", "losses_of", "score_by"]

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Observed:
    """What a score may use.

    projections [T, m]: of each step's release onto each canary's direction, in units of what one canary that is drawn
    adds (R over the public denominator). before, after [m]: losses, of a black-box audit. releases [T, D]: the releases
    themselves, all trainables side by side, kept only for a score that is a function; coordinates [m]: where in them a
    gradient canary points, downwards.
    """

    projections: Floats
    before: Floats
    after: Floats
    releases: Floats
    coordinates: npt.NDArray[np.int64]


def _sum(seen: Observed) -> Floats:
    return np.asarray(seen.projections.sum(0))


def _largest(seen: Observed) -> Floats:
    return np.asarray(seen.projections.max(0))


def _spread(seen: Observed) -> Floats:
    return np.asarray(seen.projections.std(0))


def _loss(seen: Observed) -> Floats:
    return seen.before - seen.after


# sum: Steinke et al., section 6; largest, spread: for faults that show in single steps, or between them.
SCORES: dict[str, Callable[[Observed], Floats]] = {"sum": _sum, "largest": _largest, "spread": _spread, "loss": _loss}


def score_by(score: str | Callable[[Observed], Floats], seen: Observed, count: int) -> Floats:
    """float64[count]; where a score is not a number, the canary is one to abstain on."""
    function = SCORES[score] if isinstance(score, str) else score
    values = np.asarray(function(seen), np.float64)
    if values.shape != (count,):
        raise PrivacyError(f"score gave an array of shape {values.shape}; it must be one number for each of {count}.")
    usable = values[np.isfinite(values)]
    return np.where(np.isfinite(values), values, np.median(usable) if usable.size else 0.0)


# -- white-box --------------------------------------------------------------------------------------------------------


class Directions(Protocol):
    """`project`: of a flat release [D] onto every canary's own direction, [m]. `moved`: the model has changed."""

    def moved(self) -> None: ...
    def project(self, release: torch.Tensor) -> Floats: ...


class Coordinates:
    """Canary i points along one coordinate: the gradient of its loss is a negative multiple of a unit vector."""

    def __init__(self, coordinates: npt.NDArray[np.int64]) -> None:
        self.coordinates = torch.from_numpy(coordinates)

    def moved(self) -> None:
        pass

    def project(self, release: torch.Tensor) -> Floats:
        return -release.cpu()[self.coordinates].double().numpy()


class Along:
    """Canary i points along its own gradient at the released parameters, which the audit computes for itself."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.rows: list[torch.Tensor] = []
        self.moved()

    def moved(self) -> None:
        engine = self.engine
        found: dict[int, torch.Tensor] = {}
        with global_random_state_kept():
            for batch in engine.batches.split(range(engine.sampler.dataset_size), bytes(32)):
                step = engine.compiled[batch.bucket]
                gradients = step.per_sample_gradients(batch.batch)
                flat = torch.cat([g.flatten(1) for g in gradients.values()], 1)[: len(batch.rows)]
                length = flat.double().norm(dim=1, keepdim=True).clamp(min=1e-12)
                found |= dict(zip(batch.rows, flat / length.to(flat.dtype), strict=True))
        self.rows = [found[row] for row in range(len(found))]

    def project(self, release: torch.Tensor) -> Floats:
        products = [row.double() @ release.double() for row in self.rows]
        return torch.stack(products).cpu().numpy()


class Watcher:
    """A callback of `fit`. It reads what the step released, `.grad` or the parameters, and nothing else.

    unit: what one canary that is drawn adds to a release. keep: the releases as well, not their projections alone.
    """

    def __init__(
        self, parameters: Sequence[nn.Parameter], directions: Directions, released: str, unit: float, keep: bool
    ) -> None:
        self.parameters, self.directions, self.released, self.unit = list(parameters), directions, released, unit
        self.keep = keep
        self.steps: list[Floats] = []
        self.releases: list[Floats] = []
        self.last = self._flat([p.detach() for p in self.parameters])

    @staticmethod
    def _flat(values: Sequence[torch.Tensor]) -> torch.Tensor:
        return torch.cat([value.flatten() for value in values]).clone()

    def __call__(self, info: StepInfo) -> None:
        now = self._flat([p.detach() for p in self.parameters])
        if self.released == "gradient":
            release = self._flat([torch.zeros_like(p) if p.grad is None else p.grad for p in self.parameters])
        else:
            release = self.last - now  # what plain SGD does with a gradient of the same sign
        self.steps.append(self.directions.project(release) / self.unit)
        if self.keep:
            self.releases.append(release.double().cpu().numpy())
        self.last = now
        if info.step < info.steps:
            self.directions.moved()


# -- black-box --------------------------------------------------------------------------------------------------------


def losses_of(
    model: nn.Module,
    loss_fn: Callable[[Any, Any], torch.Tensor],
    batches: Callable[[int], PhysicalBatches],
    rows: int = 32,
    progress: bool = False,
) -> Floats:
    """The loss of every record of `batches(rows per batch)`, the model in eval mode. PRIVATE where the records are."""
    modes = {module: module.training for module in model.modules()}
    chosen = batches(rows)
    found: dict[int, float] = {}
    try:
        model.eval()
        with global_random_state_kept(), torch.no_grad(), _bar(progress) as bar:
            task = bar.add_task("losses of the canaries", total=len(chosen.dataset))
            for batch in chosen.split(range(len(chosen.dataset)), bytes(32)):
                losses = loss_fn(model, batch.batch)
                if losses.dim() == 0 and rows > 1:  # their mean or sum
                    return losses_of(model, loss_fn, batches, 1, progress)
                values = losses.double().reshape(-1).tolist()
                found |= dict(zip(batch.rows, values, strict=False))
                bar.advance(task, len(batch.rows))
    finally:
        for module, training in modes.items():
            module.training = training
    return np.asarray([found[row] for row in range(len(found))])


def _bar(shown: bool) -> Progress:
    return Progress(console=Console(stderr=True), transient=True, disable=not shown)
