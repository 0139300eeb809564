"""A run's dealings with the ledger of its dataset: reserved before the first step, settled at the last. Torch-free.

Without a ledger everything here does nothing. `fit` and the runner without torch share it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from dpbitfit_fx.accounting import PriorRun
from dpbitfit_fx.errors import CheckpointError, DPBitFitError, PrivacyError, PrivacyWarning
from dpbitfit_fx.ledger import Ledger
from dpbitfit_fx.phases import StepLedger
from dpbitfit_fx.privacy_statement import PrivacyStatement, base_id, mechanism_ids

__all__ = ["RunAccount", "besides", "mechanisms_of"]


def mechanisms_of(mechanism: Mapping[str, Any], steps: Sequence[int]) -> list[PriorRun]:
    """Each phase of a run (see ``run_statement``) with the steps given for it, as the accountant and the ledger name it."""
    statement, sigma = mechanism["statement"], mechanism["noise_multiplier"]
    run_id, phases = statement["run_id"], mechanism["phases"]
    return [
        PriorRun(
            name,
            phase["sampler"]["sample_rate"],
            sigma,
            count,
            statement["insecure"],
        )
        for name, phase, count in zip(mechanism_ids(run_id, len(phases)), phases, steps, strict=True)
    ]


def besides(mechanism: Mapping[str, Any], ledger: StepLedger, phase: int) -> list[PriorRun]:
    """All that ε of a run in `phase` has besides that phase: earlier runs, the phases before it, and what those after it
    have lost already, since the steps of one crash may lie on both sides of a border.
    """
    steps = [ledger.charged[i] + (ledger.limit(i) if i < phase else 0) for i in range(len(ledger.planned))]
    steps[phase] = 0
    return [*(PriorRun.from_dict(run) for run in mechanism["prior"]), *mechanisms_of(mechanism, steps)]


class RunAccount:
    """One run's place in the ledger, or in none.

    Guarantee, with a ledger: `require` passes only while a reservation of this process covers the run, and `reserve` for
    more steps is refused before anything changes. A process that dies leaves its reservation standing.
    """

    def __init__(self, ledger: Ledger | str | os.PathLike[str] | None) -> None:
        self.ledger = ledger if ledger is None or isinstance(ledger, Ledger) else Ledger(ledger)
        self._open = False
        # At once: a ledger that cannot be used is no reason to load a model first.
        self._seen = None if self.ledger is None else self.ledger.read().head()

    @property
    def open(self) -> bool:
        return self._open

    def named(self, mechanism: dict[str, Any]) -> dict[str, Any]:
        """The mechanism with the ledger that it spends from."""
        return mechanism if self._seen is None else mechanism | {"ledger": self._seen.to_dict()}

    def check_resumed(self, saved: Mapping[str, Any]) -> None:
        """That an unfinished run goes on spending from the ledger that it began with, and that this has kept its lines.

        Raises:
            CheckpointError: another ledger, or none. PrivacyError: it has lost lines. Nothing was changed.
        """
        theirs = saved.get("ledger")
        if theirs is None:
            return
        if self.ledger is None or self._seen is None or self._seen.ledger_id != theirs["ledger_id"]:
            raise CheckpointError(
                f"The output folder holds an unfinished run that spends from a ledger (its id is {theirs['ledger_id']}), and "
                f"this call names {'none' if self.ledger is None else 'another'}. Nothing was changed. Pass that ledger."
            )
        self.ledger.check_holds(theirs, "the unfinished run's checkpoint")

    def check(
        self, runs: Sequence[PriorRun], *, dataset_size: int, run_delta: float, prior: Sequence[PriorRun] = ()
    ) -> None:
        """As ``Ledger.check``."""
        if self.ledger is not None:
            self.ledger.check(runs, dataset_size=dataset_size, run_delta=run_delta, prior=prior)

    def reserve(self, mechanism: Mapping[str, Any], steps: Sequence[int]) -> None:
        """Charges the dataset with the most that the run may take: `steps` of each phase.

        Raises:
            PrivacyError: the budget does not allow it; nothing was written. ArtifactError: it cannot be written.
        """
        if self.ledger is not None:
            statement = mechanism["statement"]
            self.ledger.reserve(
                mechanisms_of(mechanism, steps),
                dataset_size=mechanism["dataset_size"],
                run_delta=statement["delta"],
                prior=[PriorRun.from_dict(run) for run in mechanism["prior"]],
                backend=statement["backend"],
                graph_hash=statement["graph_hash"],
            )
            self._open = True

    def require(self) -> None:
        """Raises PrivacyError where a step would not be paid for."""
        if self.ledger is not None and not self._open:
            raise PrivacyError(
                "This run holds no reservation in its ledger, so it takes no step. Start or resume it anew."
            )

    def settle(self, statement: PrivacyStatement) -> PrivacyStatement:
        """What the run has spent, in place of its reservation; the statement with where the ledger then stands."""
        if self.ledger is None:
            return statement
        head = self.ledger.settle(statement.own_runs(), run_delta=statement.delta)
        self._open = False
        return dataclasses.replace(statement, ledger=head.to_dict())

    @contextlib.contextmanager
    def spending(self, so_far: Callable[[], PrivacyStatement]) -> Iterator[None]:
        """Settles what was used where the run stops inside; whatever stops it goes on."""
        try:
            yield
        except BaseException:
            self.stop(so_far)
            raise

    def stop(self, so_far: Callable[[], PrivacyStatement]) -> None:
        """Settles what a run that stops here has used. Where the ledger cannot be written it stays charged in full."""
        if not self._open:
            return
        try:
            self.settle(so_far())
        except DPBitFitError as error:
            self.warn_of(error)

    def warn_of(self, error: DPBitFitError) -> None:
        """Of a settlement that failed, where the run has nothing to gain from failing too."""
        warnings.warn(
            f"{error} So this run stays charged with all that it had reserved, until it is continued or settled "
            "(`dpbitfit ledger settle LEDGER FOLDER`, with its privacy.json in the folder).",
            PrivacyWarning,
            stacklevel=2,
        )

    def settle_given_up(self, folder: Path | None, found: Iterable[PrivacyStatement], own: str | None) -> None:
        """Settles runs that were given up in the folder, and checks that the ledger has kept what their statements saw.

        own: the unfinished run in the folder, which is left alone.
        """
        if self.ledger is None or folder is None:
            return
        for statement in found:
            if statement.ledger is not None:
                self.ledger.check_holds(statement.ledger, f"the privacy statement of the run {statement.run_id}")
            given_up = (folder / f"privacy-abandoned-{statement.run_id}.json").exists()
            if given_up and statement.run_id != own and base_id(statement.run_id) in self.ledger.read().runs:
                self.ledger.settle(statement.own_runs(), run_delta=statement.delta)
