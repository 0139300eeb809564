"""`audit`: attack a real `fit` and say how much it leaked at least. A test of the privacy claim, never a proof of it.

One-run auditing (Steinke, Nasr, Jagielski, NeurIPS 2023, arXiv:2305.08846, Algorithm 1): every canary is in the training
data or not, by its own fair coin; `fit` runs once, as it always does; each canary is scored by what the run released; the
highest k+ scores are guessed in, the lowest k- out, the rest not at all. So many right guesses are too unlikely under a
small epsilon: what they refute is the lower bound (``audit_bound``).

Guarantee: where `fit` is (epsilon, delta)-DP as it claims, the bound exceeds epsilon with probability at most
1 - confidence. A bound below epsilon proves nothing: another attack may see what this one does not. The run is a private
run like any other: what it releases costs the other records the epsilon that it claims.

``audit_bound`` from guesses to epsilon · ``audit_canaries`` what is put in · ``audit_scores`` what is seen ·
``audit_report`` the result, its files and picture · ``audit_cli`` the command.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from dpbitfit_fx.arguments import device_of
from dpbitfit_fx.audit_bound import flip_coins, split_guesses
from dpbitfit_fx.audit_canaries import GradientCanaries, members_of, take_out
from dpbitfit_fx.audit_report import AuditReport
from dpbitfit_fx.audit_scores import (
    SCORES,
    Along,
    Coordinates,
    Floats,
    Observed,
    Watcher,
    losses_of,
    score_by,
)
from dpbitfit_fx.batching import ItemLayout, MapDataset, PhysicalBatches, global_random_state_kept, load_item
from dpbitfit_fx.engine import Engine, build_engine
from dpbitfit_fx.errors import DataError, PrivacyError
from dpbitfit_fx.fit import fit
from dpbitfit_fx.passes.clipping import AutomaticClipping
from dpbitfit_fx.sampling import PoissonSampler

__all__ = ["ATTACKS", "AuditReport", "Observed", "audit"]

ATTACKS = ("gradient", "white-box", "black-box")
# What the private step is compiled from, of fit's arguments.
_STEP = (
    "physical_batch_size",
    "trainable",
    "exclude",
    "clipping",
    "backend",
    "precision",
    "memory_budget",
    "disable",
    "public_tensors",
    "collate_fn",
    "padded_lengths",
    "pad_values",
    "example_batch",
)
_NOT_HERE = {
    "output_dir": "the model that it trains holds canaries, and is not kept",
    "average_from": "what an audit of the average would see is the average alone; audit the iterates",
}


def audit(
    model: nn.Module,
    loss_fn: Callable[[Any, Any], torch.Tensor],
    dataset: MapDataset,
    *,
    attack: str = "gradient",
    canaries: int | Sequence[Any] = 256,
    score: str | Callable[[Observed], Floats] | None = None,
    released: str = "gradient",
    guesses: int | tuple[int, int] | None = None,
    confidence: float = 0.95,
    seed: int | None = None,
    progress: bool = True,
    **fit_options: Any,
) -> AuditReport:
    """Trains a copy of `model` with canaries among the records, attacks what the run released, and reports.

    Args:
        model, loss_fn, dataset: as for `fit`. The model is copied and stays as it is.
        attack: "gradient": made-up canaries with gradients of their own, seen at every step: the strongest.
            "white-box": canaries that are records, by their own gradients at every step. "black-box": the same, by their
            losses before and after the run.
        canaries: how many. Of records: taken out of the dataset, at random; or a sequence of made-up ones.
        score: "sum", "largest" or "spread" over the steps, "loss", or a function of `Observed` that gives one number for
            each canary, higher where it was in. Default: "loss" where black-box, else "sum".
        released: what a white-box attack reads of each step: its noisy "gradient", or how the "parameters" moved.
        guesses: how many canaries are guessed, half in and half out, or (in, out). Default: half of them.
        confidence: with which the bound holds. One audit, one bound: choose attack, score and guesses beforehand, or
            confidence is not what it says.
        seed: of the coins and of the choice of canaries, for tests. Default: the operating system's.
        fit_options: all else that `fit` takes, privacy budget included. dataset_size defaults to the dataset and all
            canaries, in or out: it must not depend on the coins.

    Raises:
        PrivacyError, DataError, CompileRefused: before anything is trained.
    """
    began = time.monotonic()
    _check(attack, score, released, fit_options)
    count = canaries if isinstance(canaries, int) else len(canaries)
    if isinstance(canaries, bool) or count < 1:
        raise DataError(f"An audit needs at least one canary; got {canaries!r}.")
    if attack == "gradient" and not isinstance(canaries, int):
        raise DataError("Gradient canaries are made up here: give their number, or audit with attack='white-box'.")
    k_in, k_out = split_guesses(guesses, count)
    for_coins, for_canaries = (int(n) for n in np.random.SeedSequence(seed).generate_state(2))
    trained = copy.deepcopy(model)
    options = {"expected_batch_size": 256, "progress": progress, **fit_options}
    callbacks = list(options.pop("callbacks", ()))

    # All that depends on the canaries, and nothing on the coins.
    others, theirs = dataset, dataset
    if attack != "gradient":
        others, theirs = (
            take_out(dataset, canaries, for_canaries) if isinstance(canaries, int) else (dataset, list(canaries))
        )
    options.setdefault("dataset_size", len(dataset) + (0 if others is not dataset else count))
    watcher, train_loss, before, coordinates = None, loss_fn, np.zeros(count), np.zeros(0, np.int64)
    if attack == "black-box":
        before = losses_of(trained, loss_fn, _batches(theirs, trained, options), progress=progress)
    else:
        engine = _engine(trained, loss_fn, theirs, options)
        parameters, directions = engine.update.parameters(), None
        if attack == "gradient":
            made = GradientCanaries(list(parameters), engine.update.num_trainable, count, for_canaries)
            train_loss, coordinates, options = made.loss(loss_fn), made.coordinates, made.options(options)
            others, theirs, directions = made.tagged(dataset), made.records(dataset), Coordinates(coordinates)
        unit = engine.update.max_grad_norm / options["expected_batch_size"]
        watcher = Watcher(list(parameters.values()), directions or Along(engine), released, unit, callable(score))
        callbacks.insert(0, watcher)

    coins = flip_coins(count, for_coins)
    result = fit(trained, train_loss, members_of(others, theirs, coins), callbacks=callbacks, **options)

    after = before
    if attack == "black-box":
        after = losses_of(trained, loss_fn, _batches(theirs, trained, options), progress=progress)
    steps, releases = ([], []) if watcher is None else (watcher.steps, watcher.releases)
    seen = Observed(np.asarray(steps), before, after, np.asarray(releases), coordinates)
    chosen = score or ("loss" if attack == "black-box" else "sum")
    scores = score_by(chosen, seen, count)
    return AuditReport.judge(
        scores,
        coins,
        (k_in, k_out),
        result.statement,
        attack=attack,
        score=chosen if isinstance(chosen, str) else getattr(chosen, "__name__", "custom"),
        released=released if watcher is not None else "final model",
        confidence=confidence,
        records=len(others),
        made_up=attack == "gradient" or not isinstance(canaries, int),
        seconds=time.monotonic() - began,
    )


def _check(attack: str, score: Any, released: str, options: dict[str, Any]) -> None:
    if attack not in ATTACKS:
        raise PrivacyError(f"attack must be one of {', '.join(ATTACKS)}; got {attack!r}.")
    if isinstance(score, str) and score not in SCORES:
        raise PrivacyError(f"score must be one of {', '.join(SCORES)}, or a function; got {score!r}.")
    if isinstance(score, str) and (score == "loss") != (attack == "black-box"):
        raise PrivacyError(
            f"score={score!r} does not go with attack={attack!r}: losses are what a black-box attack sees."
        )
    if released not in ("gradient", "parameters"):
        raise PrivacyError(f"released must be 'gradient' or 'parameters'; got {released!r}.")
    for name, why in _NOT_HERE.items():
        if options.get(name):
            raise PrivacyError(f"audit does not take {name}: {why}.")
    for name in ("phases", "add_bias", "dropout") if attack != "black-box" else ():
        if options.get(name):
            raise PrivacyError(
                f"A white-box audit reads the gradients of one fixed set of parameters, and does not take {name}. Leave "
                "it out, or audit with attack='black-box'."
            )


def _engine(model: nn.Module, loss_fn: Any, dataset: MapDataset, options: dict[str, Any]) -> Engine:
    """The user's step, compiled once more: the audit's own, to know what is trained and the canaries' gradients."""
    step = {name: options[name] for name in _STEP if name in options}
    step["clipping"] = step.get("clipping") or AutomaticClipping()
    return build_engine(
        model,
        loss_fn,
        dataset,
        PoissonSampler(len(dataset), 1.0, 1),
        1.0,
        float(options["expected_batch_size"]),
        **step,
    )


def _batches(dataset: MapDataset, model: nn.Module, options: dict[str, Any]) -> Callable[[int], PhysicalBatches]:
    """Physical batches of the canaries, of any size, in the layout that `fit` gives the records."""
    example, collate_fn = options.get("example_batch"), options.get("collate_fn")
    with global_random_state_kept():
        template = load_item(dataset, collate_fn, 0) if example is None else example
    lengths, pads = options.get("padded_lengths"), options.get("pad_values")
    layout = ItemLayout.build(template, lengths, pads, is_example=example is not None)
    device = device_of(model)
    return lambda rows: PhysicalBatches(dataset, layout, rows, collate_fn=collate_fn, device=device)
