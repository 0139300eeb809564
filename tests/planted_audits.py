"""Faults that leave the graph, the sensitivity, the noise's law and the accountant as they should be: for the audit alone.

Each comes with the attack that somebody who suspects it would run. `plan` is what `fit` is asked for, and what it claims.
"""

from __future__ import annotations

import dataclasses
import random
import sys
import time
import types
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import Tensor, nn

from dpbitfit_fx.audit import AuditReport, Observed, audit
from dpbitfit_fx.engine import Engine
from dpbitfit_fx.passes.clipping import FlatClipping
from dpbitfit_fx.randomness import SecretKey, Stream, stream
from dpbitfit_fx.training_run import TrainingRun

FIT, ENGINE = sys.modules["dpbitfit_fx.fit"], sys.modules["dpbitfit_fx.engine"]
RANDOMNESS, TRAINING = sys.modules["dpbitfit_fx.randomness"], sys.modules["dpbitfit_fx.training_run"]
R, OTHERS = 10.0, 16  # R is above the gradients of ordinary records, so that they do not drown the canaries'
Floats = npt.NDArray[np.float64]


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 100), nn.Tanh(), nn.Linear(100, 2))  # 702 parameters


def records() -> torch.utils.data.TensorDataset:
    x = torch.randn(OTHERS, 4, generator=torch.Generator().manual_seed(1))
    return torch.utils.data.TensorDataset(x, (x.sum(1) > 0).long())


def loss(model: Any, batch: Any) -> Tensor:
    return nn.functional.cross_entropy(model(batch[0]), batch[1], reduction="none")


def sgd(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=1e-3)


@dataclasses.dataclass(frozen=True)
class Plan:
    """canaries, and the share of all records that a draw holds in expectation, over `steps` steps."""

    canaries: int
    rate: float
    noise: float
    steps: int

    def audit(self, seed: int | None = 1, **attack: Any) -> AuditReport:
        size = OTHERS + self.canaries
        options: dict[str, Any] = {
            "noise_multiplier": self.noise,
            "target_delta": 1e-5,
            "max_steps": self.steps,
            "expected_batch_size": self.rate * size,
            "physical_batch_size": 64,
            "trainable": "all",
            "clipping": FlatClipping(R),
            "optimizer": sgd,
            "progress": False,
            "insecure_seed_for_tests": 100 + (seed or 0),
        }
        return audit(network(), loss, records(), canaries=self.canaries, seed=seed, **(options | attack))


HALF = Plan(canaries=256, rate=0.5, noise=4.0, steps=16)  # epsilon 2.13
FULL = Plan(canaries=160, rate=1.0, noise=3.5, steps=100)  # epsilon 15
RARE = Plan(canaries=256, rate=0.1, noise=2.5, steps=100)  # epsilon 1.6


@dataclasses.dataclass(frozen=True)
class Audited:
    name: str
    where: str
    what: str
    attack: str
    plan: Plan
    options: dict[str, Any]
    plant: Callable[[pytest.MonkeyPatch], Callable[[Observed], Floats] | None]


AUDITED: dict[str, Audited] = {}


def planted(where: str, plan: Plan, attack: str, **options: Any) -> Callable[[Any], Any]:
    """Registers a patch. What it returns, if anything, is the score of somebody who knows what to look for."""

    def register(plant: Any) -> Any:
        name = plant.__name__.replace("_", " ")
        AUDITED[name] = Audited(name, where, " ".join(plant.__doc__.split()), attack, plan, options, plant)
        return plant

    return register


# -- the claim is wrong, and every part of it right ----------------------------------------------------------------------


@planted("dpbitfit_fx/run_statement.py", FULL, "sum of the noisy gradients")
def checkpoints_counted_as_steps(patch: pytest.MonkeyPatch) -> None:
    """The statement is made of the number of checkpoints (one in 50 steps), not of steps."""
    real = TRAINING.make_statement
    patch.setattr(TRAINING, "make_statement", lambda mechanism, ledger, step: real(mechanism, ledger, -(-step // 50)))


@planted("dpbitfit_fx/fit.py", FULL, "sum of the noisy gradients", physical_batch_size=16)
def the_rate_of_a_physical_batch_is_stated(patch: pytest.MonkeyPatch) -> None:
    """The statement's sample rate is that of a micro-batch, so it claims an amplification that nobody had."""
    real = TRAINING.make_statement

    def make_statement(mechanism: Any, ledger: Any, step: int) -> Any:
        phases = [
            {**p, "sampler": {**p["sampler"], "sample_rate": min(1.0, 16 / p["sampler"]["dataset_size"])}}
            for p in mechanism["phases"]
        ]
        return real({**mechanism, "phases": phases}, ledger, step)

    patch.setattr(TRAINING, "make_statement", make_statement)


# -- who is drawn --------------------------------------------------------------------------------------------------------


@planted("dpbitfit_fx/engine.py", RARE, "sum of the noisy gradients", guesses=(48, 0))
def hard_examples_always_drawn(patch: pytest.MonkeyPatch) -> None:
    """Records with a large loss are added to every draw ("hard example mining"); all others are drawn by their coins."""
    hard: dict[int, list[int]] = {}
    begin = Engine.__init__

    def init(self: Engine, *args: Any) -> None:
        begin(self, *args)
        found = hard[id(self)] = []
        for batch in self.batches.split(range(self.sampler.dataset_size), bytes(32)):
            losses = self.update.loss_fn(self.update.model, batch.batch).detach()[: len(batch.rows)]
            found += [row for row, value in zip(batch.rows, losses.tolist(), strict=True) if value > 100]

    def drawn_sum(self: Engine, key: SecretKey, step: int) -> Tensor:
        rows = sorted({*self.sampler.draw(key, step).tolist(), *hard[id(self)]})
        return self.clipped_sum(rows, stream(key, "records", step).bytes(32))

    patch.setattr(Engine, "__init__", init)
    patch.setattr(Engine, "drawn_sum", drawn_sum)


# -- noise of the right law that is not secret, or not there where it matters ---------------------------------------------


def _without(noise: Callable[[int, int], Floats], seen: Observed) -> Floats:
    """The sum of the projections after a noise that the attacker can compute is subtracted."""
    steps, size = seen.releases.shape
    rest = seen.releases - np.stack([noise(step, size) for step in range(steps)]) * (4.0 * R / 136.0)
    return np.asarray(-rest.sum(0)[seen.coordinates])


@planted("dpbitfit_fx/randomness.py", HALF, "noise recomputed from guessed seeds, and subtracted")
def a_key_from_the_clock(patch: pytest.MonkeyPatch) -> Callable[[Observed], Floats]:
    """The secret key comes from a generator that is seeded with the time of day in seconds."""
    fake = types.SimpleNamespace(token_bytes=lambda count: random.Random(int(time.time())).randbytes(count))
    patch.setattr(RANDOMNESS, "secrets", fake)

    def score(seen: Observed) -> Floats:
        best: tuple[float, Any] = (np.inf, None)
        for second in range(int(time.time()) - 300, int(time.time()) + 1):
            key = SecretKey.from_bytes(random.Random(second).randbytes(32))
            guess = stream(key, "noise", 0).normal(seen.releases.shape[1]) * (4.0 * R / 136.0)
            left = float(np.median(np.abs(seen.releases[0] - guess)))
            best = min(best, (left, key), key=lambda found: found[0])
        return _without(lambda step, size: stream(best[1], "noise", step).normal(size), seen)

    return score


@planted("dpbitfit_fx/randomness.py", HALF, "noise recomputed, and subtracted")
def noise_that_does_not_depend_on_the_key(patch: pytest.MonkeyPatch) -> Callable[[Observed], Floats]:
    """The noise stream is derived from purpose and step alone: the same in every run of everybody."""
    real = ENGINE.stream
    known = SecretKey.from_bytes(bytes(32))
    patch.setattr(
        ENGINE, "stream", lambda key, purpose, step: real(known if purpose == "noise" else key, purpose, step)
    )
    return lambda seen: _without(lambda step, size: real(known, "noise", step).normal(size), seen)


@planted("dpbitfit_fx/randomness.py", HALF, "sum over pairs of coordinates", guesses=(30, 30))
def antithetic_noise(patch: pytest.MonkeyPatch) -> Callable[[Observed], Floats]:
    """Noise comes in pairs of opposite sign ("variance reduction"): each coordinate has the right law, two together none."""
    real = Stream.normal

    def normal(self: Stream, count: int) -> Floats:
        half = real(self, -(-count // 2))
        return np.stack([half, -half], 1).ravel()[:count]

    patch.setattr(Stream, "normal", normal)

    def score(seen: Observed) -> Floats:
        """Of canaries whose partner is a canary too: nothing, since either may be what is seen."""
        total, partner = seen.releases.sum(0), seen.coordinates ^ 1
        pairs = -(total[seen.coordinates] + total[np.minimum(partner, total.size - 1)])
        return np.where(np.isin(partner, seen.coordinates) | (partner >= total.size), np.nan, pairs)

    return score


@planted("dpbitfit_fx/engine.py", HALF, "sum of the noisy gradients")
def less_noise_where_there_is_much_to_learn(patch: pytest.MonkeyPatch) -> None:
    """The noise is cut to a sixteenth where the sum is large, "to keep the signal-to-noise ratio of big batches"."""
    real = Engine.private_gradient

    def private_gradient(self: Engine, key: SecretKey, step: int, acc: Tensor) -> dict[str, Tensor]:
        if float(acc.norm()) <= 5 * self.update.max_grad_norm:
            return real(self, key, step, acc)
        return {n: g / 16 for n, g in real(self, key, step, 16 * acc).items()}

    patch.setattr(Engine, "private_gradient", private_gradient)


# -- another way out -----------------------------------------------------------------------------------------------------


def _remember_sums(patch: pytest.MonkeyPatch) -> list[Tensor]:
    """The un-noised sum of the step under way, divided as the noisy one is."""
    latest: list[Tensor] = []
    real = Engine.private_gradient

    def private_gradient(self: Engine, key: SecretKey, step: int, acc: Tensor) -> dict[str, Tensor]:
        assert self.update.expected_batch_size is not None
        latest[:] = [acc / self.update.expected_batch_size]
        return real(self, key, step, acc)

    patch.setattr(Engine, "private_gradient", private_gradient)
    return latest


@planted("dpbitfit_fx/training_run.py", HALF, "sum of the steps of the parameters", released="parameters")
def an_optimizer_hook_with_momentum_of_the_sums(patch: pytest.MonkeyPatch) -> None:
    """A hook adds momentum to the step, of the sums before the noise; the gradients that one sees are the noisy ones."""
    latest, real = _remember_sums(patch), TrainingRun.advance
    velocity: list[Tensor] = []

    def advance(self: TrainingRun) -> None:
        first = self.step == 0
        real(self)
        velocity[:] = [latest[0] if first else 0.9 * velocity[0] + latest[0]]
        with torch.no_grad():
            for name, step in self.stage.engine.update.unflatten(velocity[0]).items():
                self.trainables[name].sub_(1e-3 * step)

    patch.setattr(TrainingRun, "advance", advance)


@planted(
    "dpbitfit_fx/optimizing.py", HALF, "size of the late steps of the parameters", released="parameters", optimizer=None
)
def adam_with_second_moments_of_the_sums(patch: pytest.MonkeyPatch) -> Callable[[Observed], Floats]:
    """The default optimizer scales its steps by second moments of the sums before the noise: less noisy, and no secret."""
    latest, real = _remember_sums(patch), FIT.build_optimizer

    class Scaled(torch.optim.SGD):
        moments: Tensor | None = None

        def step(self, closure: Any = None) -> Any:
            squares = latest[0] ** 2
            self.moments = squares if self.moments is None else self.moments + squares
            start = 0
            with torch.no_grad():
                for parameter in self.param_groups[0]["params"]:
                    scale = self.moments[start : start + parameter.numel()].sqrt().view_as(parameter) + 1e-6
                    assert parameter.grad is not None
                    parameter.sub_(1e-3 * parameter.grad / scale)
                    start += parameter.numel()

    def build_optimizer(optimizer: Any, parameters: list[nn.Parameter], rate: float) -> Any:
        return real(optimizer, parameters, rate) if optimizer is not None else Scaled(parameters, lr=1e-3)

    patch.setattr(FIT, "build_optimizer", build_optimizer)
    return lambda seen: -seen.projections[8:].std(0)
