"""What a run spent, from its mechanism and its ledger alone: for privacy.json, and for a run that is given up.

A mechanism is what a checkpoint says of the plan: `dataset_size`, `noise_multiplier`, `prior`, `phases` (sampler and
record of each), `shortened`, and the fields of the `statement`. Torch-free: every runner writes the same.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dpbitfit_fx.accounting import PriorRun
from dpbitfit_fx.checkpoint import CheckpointStore
from dpbitfit_fx.errors import PrivacyError
from dpbitfit_fx.phases import PhaseRecord, StepLedger
from dpbitfit_fx.privacy_statement import PrivacyStatement
from dpbitfit_fx.sampling import PoissonSampler

__all__ = [
    "abandon",
    "abandoned_name",
    "comparable",
    "go_on_as",
    "ledger_of",
    "make_statement",
    "statement_of_stopped",
    "statement_of_unfinished",
]


def comparable(mechanism: Mapping[str, Any]) -> dict[str, Any]:
    """What ε of each step depends on; the number of steps does not matter to the steps already taken, but it does to
    which phase a step belongs to."""
    plans = [phase["sampler"] for phase in mechanism["phases"]]
    return {name: mechanism[name] for name in ("dataset_size", "noise_multiplier")} | {
        "prior": sorted(mechanism["prior"], key=lambda run: str(run["run_id"])),
        "rates": [plan["sample_rate"] for plan in plans],
        "steps": [plan["steps"] for plan in plans[:-1]],
        "shortened": mechanism["shortened"],
        # A run that changed over would say of all its steps what holds for some.
        "noise": mechanism["statement"].get("noise", "float"),
    }


def ledger_of(mechanism: Mapping[str, Any], charged: Sequence[int] | None = None) -> StepLedger:
    planned = [phase["sampler"]["steps"] for phase in mechanism["phases"]]
    return StepLedger(planned, charged, shortened=mechanism["shortened"])


def statement_of_unfinished(store: CheckpointStore) -> PrivacyStatement:
    """What an unfinished run has spent, steps that may have been released since its checkpoint included."""
    step, charged, mechanism, since = store.spent()
    return statement_of_stopped(mechanism, charged, step, since)


def statement_of_stopped(
    mechanism: Mapping[str, Any], charged: Sequence[int], step: int, since: int | None
) -> PrivacyStatement:
    """Of a run that stops after `step` steps: the `since` ones that may have been released beyond them count as lost.

    since: None where nobody knows how far the run went: then as far as it could.
    """
    ledger = ledger_of(mechanism, charged)
    taken = ledger.taken(step)
    ledger.charge(step, ledger.total - step if since is None else since)
    return make_statement(mechanism, ledger, step, taken)


def go_on_as(mechanism: dict[str, Any], saved: Mapping[str, Any]) -> None:
    """The statement goes on naming the run that began; noise from a known seed stays insecure for ever."""
    statement, theirs = mechanism["statement"], saved["statement"]
    statement["run_id"] = theirs["run_id"]
    statement["insecure"] = statement["insecure"] or theirs["insecure"]
    if "ledger" in saved and "ledger" in mechanism:
        mechanism["ledger"] = saved["ledger"]  # where it stood when the run began


def make_statement(
    mechanism: Mapping[str, Any], ledger: StepLedger, step: int, taken: Sequence[int] | None = None
) -> PrivacyStatement:
    """What privacy.json says of a run in which `step` steps were taken and those in the ledger lost."""
    taken = ledger.taken(step) if taken is None else taken
    if sum(taken) != step:
        raise PrivacyError(f"The statement would count {sum(taken)} of the {step} steps that were taken.")
    samplers = [PoissonSampler.from_dict(phase["sampler"]) for phase in mechanism["phases"]]
    sigma, size = mechanism["noise_multiplier"], mechanism["dataset_size"]
    records = [
        PhaseRecord(
            planned_steps=sampler.steps,
            steps=steps,
            lost_steps=lost,
            sample_rate=sampler.sample_rate,
            expected_batch_size=sampler.expected_batch_size,
            noise_multiplier=sigma,
            **phase["record"],
        )
        for phase, sampler, steps, lost in zip(mechanism["phases"], samplers, taken, ledger.charged, strict=True)
    ]
    return PrivacyStatement.create(
        PoissonSampler(size, max(s.sample_rate for s in samplers), sum(s.steps for s in samplers)),
        noise_multiplier=sigma,
        prior=[PriorRun.from_dict(run) for run in mechanism["prior"]],
        steps=sum(taken),
        lost_steps=sum(ledger.charged),
        phases=records if len(records) > 1 else (),
        **mechanism["statement"],
    )


def abandoned_name(run_id: str) -> str:
    return f"privacy-abandoned-{run_id}.json"


def abandon(store: CheckpointStore, output_dir: Path) -> None:
    """Gives up an unfinished run; its spent budget stays in the folder and is composed with whatever follows there."""
    statement = statement_of_unfinished(store)
    statement.save(output_dir / abandoned_name(statement.run_id))
    store.erase()
