"""Neighbouring datasets, and the judge of what is released on both under the same randomness. ``tools/replay`` runs it.

A world is two datasets, of which the larger has one record more, anywhere. A cell is one way to train: backend, precision,
clipping, model, with or without a resume in the middle. The neighbour's run (``replay_runs``) is given the other run's
released parameters after every step, as the adaptive composition of the proof gives them, so each step is one pair:

    |g(D) - g(D')| <= R / denominator * (1 + SLACK)     in a step that draws the record; else not one bit differs
"""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from fit_cases import MaskedAttention, MaskedMean, mlp, scaled_loss, text_loss, text_model
from torch import Tensor, nn

from dpbitfit_fx.passes.clipping import AutomaticClipping, AutoVClipping, Clipping, FlatClipping, PerLayerClipping
from dpbitfit_fx.passes.numerics import slack

Array = npt.NDArray[Any]
R, SIGMA = 0.5, 1.0
# What the noise pays for, whatever the backend and the precision; no world's draws are expected to be larger.
SLACK = slack(16.0)
BUCKETS = (4, 8, 12)
CLIPPINGS: tuple[Clipping, ...] = (FlatClipping(R), AutomaticClipping(R), AutoVClipping(R), PerLayerClipping(R))
SIZES: tuple[tuple[int, ...], ...] = ((3, 4, 2), (8, 8, 8), (1, 16, 4), (7, 2, 5), (32, 32, 32))
WIDE = 64  # from here on frozen weights are packed, and bfloat16 products are products


# -- models ------------------------------------------------------------------------------------------------------------


def masked_loss(model: Any, batch: Any) -> Tensor:
    """Squares of what the model reads off a float sequence, weighted."""
    losses: Tensor = (model(batch["x"], batch["mask"])[:, 0] - 1.0) ** 2 * batch["weight"]
    return losses


def _sequences(kind: Any, wide: bool) -> nn.Module:
    torch.manual_seed(0)
    model: nn.Module = kind(WIDE, WIDE) if wide else kind()
    return model


def _point(generator: torch.Generator, index: int, wide: bool) -> dict[str, Any]:
    return {"x": torch.randn(WIDE if wide else 4, generator=generator), "y": index % 2}


def _length(generator: torch.Generator) -> int:
    return int(torch.randint(1, BUCKETS[-1] + 1, (), generator=generator))


def _text(generator: torch.Generator, index: int, wide: bool) -> dict[str, Any]:
    tokens = torch.randint(0, 20, (_length(generator),), generator=generator).tolist()
    return {"input_ids": tokens, "attention_mask": [1] * len(tokens), "label": index % 2}


def _sequence(generator: torch.Generator, index: int, wide: bool) -> dict[str, Any]:
    length = _length(generator)
    return {"x": torch.randn(length, WIDE if wide else 3, generator=generator), "mask": torch.ones(length)}


@dataclass(frozen=True)
class Model:
    """A model that learns its biases, and how a record of its kind is made; padded: the entries of unequal length."""

    build: Callable[[bool], nn.Module]
    loss: Callable[[Any, Any], Tensor]
    record: Callable[[torch.Generator, int, bool], dict[str, Any]]
    padded: tuple[str, ...] = ()
    pad_values: Mapping[str, float] = field(default_factory=dict)


# Padding is a token that stands in texts too, and NaN.
MODELS: dict[str, Model] = {
    "mlp": Model(lambda wide: mlp(WIDE, WIDE) if wide else mlp(), scaled_loss, _point),
    "text": Model(
        lambda wide: text_model(WIDE if wide else 5),
        text_loss,
        _text,
        ("input_ids", "attention_mask"),
        {"input_ids": 7.0, "attention_mask": 0.0},
    ),
    **{
        name: Model(partial(_sequences, kind), masked_loss, _sequence, ("x", "mask"), {"x": math.nan, "mask": 0.0})
        for name, kind in (("sequences", MaskedMean), ("attention", MaskedAttention))
    },
}


# -- worlds ------------------------------------------------------------------------------------------------------------

SCENARIOS = ("norms", "aligned", "hostile", "sparse")
HOSTILE = (math.nan, 1e6, math.inf, 3e38, 1e6, 1e-45, 0.0, -1e20, 1.0, 1e6)


@dataclass(frozen=True)
class World:
    """`rows` of the larger dataset; the smaller one lacks the record at `place`. added: the neighbour is the larger."""

    model: str
    scenario: str
    rows: list[dict[str, Any]]
    place: int
    added: bool
    expected: float
    sizes: tuple[int, ...]
    wide: bool = False

    def dataset(self, larger: bool) -> list[dict[str, Any]]:
        return [row for index, row in enumerate(self.rows) if larger or index != self.place]

    @property
    def rate(self) -> float:
        return self.expected / len(self.rows)

    def batches(self, rows: Sequence[int]) -> tuple[int, ...]:
        """Of a draw from the larger dataset: how many physical batches there are of each padded length."""
        counts = [0] * len(self.sizes)
        for row in rows:
            entry = next((self.rows[row][name] for name in MODELS[self.model].padded), ())
            counts[next(b for b, longest in enumerate(BUCKETS) if len(entry) <= longest)] += 1
        return tuple(-(-count // size) for count, size in zip(counts, self.sizes, strict=True))


def make_world(model: str, number: int, seed: int, *, wide: bool = False) -> World:
    """The `number`-th world of a model: scenarios, directions, places and physical batch sizes take turns.

    norms: gradients from 1e-20 to 1e20 of the usual; aligned: all records alike, at full norm; hostile: NaN, infinite,
    huge, denormal and zero losses among them; sparse: draws of 1.5 records in the mean, so many are empty.
    """
    scenario = SCENARIOS[number % 4]
    chance = random.Random(f"{model} {number} {seed}")
    generator = torch.Generator().manual_seed(chance.getrandbits(40))
    weights = {
        "norms": [10.0**exponent for exponent in range(-20, 21, 2)],
        "aligned": [1e6] * 20,
        "hostile": [HOSTILE[i % len(HOSTILE)] for i in range(20)],
        "sparse": [1e6] * 4,
    }[scenario]
    # Mostly a record that can move a release by R; each kind of world must show that the bound is met.
    strong = [i for i, weight in enumerate(weights) if 1 <= abs(weight) <= 1e20]
    kind = MODELS[model]
    same = kind.record(generator, 1, wide)
    rows = [dict(same) if scenario == "aligned" else kind.record(generator, i, wide) for i in range(len(weights))]
    return World(
        model,
        scenario,
        [row | {"weight": weight} for row, weight in zip(rows, weights, strict=True)],
        chance.choice(strong) if chance.random() < 0.8 else chance.randrange(len(rows)),
        bool(number // 4 % 2) ^ bool(number % 2),
        1.5 if scenario == "sparse" else 16.0,
        SIZES[number % len(SIZES)],
        wide,
    )


# -- cells and their judge ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Cell:
    """One way to train."""

    engine: str
    clipping: Clipping
    model: str
    resume: bool

    @property
    def names(self) -> tuple[str, str, str, str]:
        return self.engine, self.clipping.kind, self.model, "resumed" if self.resume else "straight"


@dataclass
class Tally:
    """Pairs of releases, in units of R / denominator. changed: pairs that are released by other physical batches; alone:
    pairs in which the neighbour's draw is empty; equal: steps that do not draw the record; stray: those of them that differ
    all the same; unseen: runs in which the optimizer's parameters do not follow from the releases."""

    pairs: int = 0
    total: float = 0.0
    largest: float = 0.0
    changed: int = 0
    alone: int = 0
    equal: int = 0
    stray: int = 0
    unseen: int = 0

    def add(self, other: Tally) -> None:
        for name, value in vars(other).items():
            setattr(self, name, max(self.largest, value) if name == "largest" else getattr(self, name) + value)

    @property
    def mean(self) -> float:
        return self.total / max(1, self.pairs)

    @property
    def broken(self) -> bool:
        # Not `largest > ..`: a distance that is not a number is no distance within the bound.
        return not self.largest <= 1 + SLACK or self.stray > 0 or self.unseen > 0


def judge(world: World, draws: Sequence[Sequence[int]], ours: Sequence[Array], theirs: Sequence[Array]) -> Tally:
    """Of two runs' releases, step by step; `draws` are those of the larger dataset."""
    found = Tally()
    assert len(draws) == len(ours) == len(theirs), "both runs take every step"
    for drawn, one, other in zip(draws, ours, theirs, strict=True):
        if world.place not in drawn:
            found.equal += 1
            found.stray += not np.array_equal(one, other)
            continue
        others = [row for row in drawn if row != world.place]
        distance = float(np.linalg.norm(one.astype(np.float64) - other.astype(np.float64))) * world.expected / R
        found.pairs += 1
        found.total += distance
        found.largest = math.nan if math.isnan(distance) else max(found.largest, distance)
        found.changed += world.batches(others) != world.batches(drawn)
        found.alone += not others
    return found


def cells(engines: Sequence[str], clippings: Sequence[Clipping] = CLIPPINGS) -> Iterator[Cell]:
    """Backends take turns, so that a run that is stopped has met all of them."""
    for clipping, model, resume, engine in itertools.product(clippings, MODELS, (False, True), engines):
        yield Cell(engine, clipping, model, resume)
