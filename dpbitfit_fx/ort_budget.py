"""`budget.json` beside a plain export: sample rate, number of steps, and epsilon after each of them. Torch-free.

For trainers in languages that have no accountant (`docs/other-languages.md`): they look epsilon up and never compute it.
The export's ONNX seal is matched here, since they cannot do that either.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Final

from dpbitfit_fx.accounting import EpsilonTracker, Prior, epsilon, resolve_prior
from dpbitfit_fx.errors import ArtifactError, PrivacyError
from dpbitfit_fx.onnx_seal import check_artifacts
from dpbitfit_fx.ort_artifacts import attach, read_manifest
from dpbitfit_fx.ort_plan import Plan, most_steps, plan_for
from dpbitfit_fx.randomness import INSECURE_CAVEAT
from dpbitfit_fx.run_statement import ledger_of, make_statement

__all__ = ["BUDGET", "attach_budget"]

BUDGET: Final = "budget.json"
FORMAT: Final = "dpbitfit_fx.budget.v1"
_MOST_STEPS: Final = 2**17


def attach_budget(
    folder: str | os.PathLike[str],
    *,
    dataset_size: int,
    target_epsilon: float,
    target_delta: float | None = None,
    steps: int | None = None,
    prior: Prior | Iterable[Prior] = (),
    tuning_covered: bool = False,
) -> dict[str, Any]:
    """Put ``budget.json`` beside an export of `export_onnx`, list it in the manifest, and return its content.

    Args:
        dataset_size: the public number of records planned for. Each record is drawn with probability
            expected_batch_size / dataset_size at every step, however many there are in the end.
        steps: default: as many as stay within `target_epsilon`.
        prior: earlier runs on the same records, composed.

    Guarantee: ``epsilon_by_step[k]`` is never below the epsilon of k steps together with `prior`, is exact at the last
    step, and never exceeds `target_epsilon`. ``statement`` is what privacy.json says of a run that takes all steps.

    Raises:
        ArtifactError: no plain export, or it was changed. SealBroken: its graphs are not the private step.
        PrivacyError: the budget does not allow `steps`, or not even one step.
    """
    manifest = read_manifest(folder)
    if manifest["target"] != "onnx":
        raise ArtifactError(
            f"{os.fspath(folder)!r} is an export for ONNX Runtime Training, which only its own trainers read. Export with "
            "export_onnx, or `dpbitfit export --format onnx`."
        )
    check_artifacts(folder, manifest)
    runs = resolve_prior(prior)

    def plan(count: int, target: float | None) -> Plan:
        return plan_for(
            manifest,
            dataset_size,
            steps=count,
            dataset_size=dataset_size,
            target_delta=target_delta,
            target_epsilon=target,
            prior=runs,
        )

    chosen = plan(_affordable(plan(1, target_epsilon), target_epsilon) if steps is None else steps, target_epsilon)
    content = {"format": FORMAT, **_table(chosen), "insecure_caveat": INSECURE_CAVEAT}
    mechanism = chosen.mechanism(
        manifest, False, tuning_covered, {"dataset_size": "declared before the records were seen"}
    )
    statement = make_statement(mechanism, ledger_of(mechanism), chosen.sampler.steps)
    content["statement"] = statement.to_dict()
    attach(Path(folder), manifest, BUDGET, json.dumps(content, indent=1, ensure_ascii=False) + "\n")
    return content


def _affordable(one: Plan, target: float) -> int:
    """The largest number of steps within `target`; `one` is a plan that fits."""

    def spent(steps: int) -> float:
        return epsilon(one.sampler, one.noise_multiplier, one.target_delta, steps=steps, prior=one.prior)

    beyond = 2
    while spent(beyond) <= target:
        beyond *= 2
        if beyond > _MOST_STEPS:
            raise PrivacyError(
                f"More than {_MOST_STEPS} steps stay within epsilon = {target:g}. Give the number of steps."
            )
    return most_steps(spent, target, beyond)


def _table(plan: Plan) -> Mapping[str, Any]:
    sampler = plan.sampler
    tracker = EpsilonTracker(sampler, plan.noise_multiplier, plan.target_delta, plan.prior, points=50)
    exact = tracker.exact(sampler.steps)
    # Coarser grids in between may come out a hair above the exact end.
    by_step = [min(tracker.at(step), exact) for step in range(sampler.steps)] + [exact]
    return {
        "dataset_size": sampler.dataset_size,
        "sample_rate": sampler.sample_rate,
        "expected_batch_size": sampler.expected_batch_size,
        "noise_multiplier": plan.noise_multiplier,
        "target_epsilon": plan.target_epsilon,
        "target_delta": plan.target_delta,
        "steps": sampler.steps,
        "epsilon_by_step": by_step,
    }
