"""The state of a private run from an export between its logical steps: advanced, saved, resumed. Torch-free."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dpbitfit_fx.accounting import EpsilonTracker
from dpbitfit_fx.checkpoint import CheckpointStore, JournalEntry, SavedState, key_id, sum_digest
from dpbitfit_fx.errors import ArtifactError, CheckpointError, DataError, PrivacyError
from dpbitfit_fx.onnx_seal import check_artifacts
from dpbitfit_fx.ort_artifacts import phases_of
from dpbitfit_fx.ort_backends import Array, Backend, initial_values, open_backend, pieces
from dpbitfit_fx.ort_plan import PhasePlan, Plan, rates_by_parameter
from dpbitfit_fx.ort_records import Records
from dpbitfit_fx.randomness import SecretKey, stream
from dpbitfit_fx.run_account import RunAccount, besides
from dpbitfit_fx.run_statement import comparable, go_on_as, ledger_of, statement_of_stopped

if TYPE_CHECKING:
    from dpbitfit_fx.privacy_statement import PrivacyStatement

__all__ = ["Backends", "OrtRun"]


class Backends:
    """The backend of the phase under way, and the values of all parameters that any phase trains, handed on from phase to
    phase by name.

    Raises:
        SealBroken: a graph of any phase is not the private step that the manifest declares.
        ArtifactError: the folder is not an export, was changed, or its runtime (or onnx, for the seal) is not installed.
    """

    def __init__(self, folder: str | os.PathLike[str], manifest: Mapping[str, Any], device: str = "cpu") -> None:
        self.device = device
        self.folder, self.parameters, self.phases = Path(folder), manifest["parameters"], phases_of(manifest)
        check_artifacts(folder, manifest)
        values = initial_values(self.folder, manifest)
        self._flat = np.concatenate([values[p["name"]].ravel() for p in self.parameters])
        # One object: an interrupt finds the phase and its backend together.
        self._current = (0, self._open(0, self._flat))

    @property
    def phase(self) -> int:
        return self._current[0]

    @property
    def backend(self) -> Backend:
        return self._current[1]

    def _open(self, phase: int, flat: Array) -> Backend:
        return open_backend(self.folder, self.phases[phase], pieces(self.parameters, flat, "name"), self.device)

    def enter(self, phase: int) -> None:
        """Hands the values on to another phase, whose optimizer is new."""
        if phase != self.phase:
            self._flat = self.flat()
            self._current = (phase, self._open(phase, self._flat))

    def flat(self) -> Array:
        """float32[D] of the run's parameters."""
        result: Array = self._flat.copy()
        places = pieces(self.parameters, result, "name")
        for name, value in pieces(self.phases[self.phase]["parameters"], self.backend.flat(), "name").items():
            places[name][...] = value
        return result

    def restore(self, phase: int, flat: Array, optimizer_state: Mapping[str, Array]) -> None:
        """The values and the optimizer of `phase` as they were saved; unchanged where they cannot be loaded."""
        flat = np.asarray(flat, np.float32)
        if flat.shape != self._flat.shape:
            raise ValueError("other parameters")
        backend = self._open(phase, flat) if phase != self.phase or len(self.phases) > 1 else self.backend
        places = pieces(self.parameters, flat, "name")
        own = np.concatenate([places[p["name"]].ravel() for p in self.phases[phase]["parameters"]])
        backend.restore(own, optimizer_state)
        self._flat, self._current = flat.copy(), (phase, backend)


class OrtRun:
    """One run: the numbers of a step come from the backend, everything that privacy depends on from here.

    declared: for privacy.json: tuning_covered, and what else was declared public.
    """

    def __init__(
        self,
        manifest: Mapping[str, Any],
        backends: Backends,
        records: Records,
        plan: Plan,
        key: SecretKey,
        store: CheckpointStore | None,
        *,
        account: RunAccount,
        tuning_covered: bool,
        declared: Mapping[str, Any],
    ) -> None:
        self.account = account
        self.manifest, self.backends, self.records, self.plan = manifest, backends, records, plan
        self.key, self.store = key, store
        self.mechanism = account.named(plan.mechanism(manifest, key.insecure, tuning_covered, declared))
        self.fingerprint = _fingerprint(manifest, plan, key, records) | {"device": backends.device}
        self.ledger = ledger_of(self.mechanism)
        self.step = 0
        self.history: list[dict[str, Any]] = []
        # Steps that may have been released by the process that was killed, with the digest of what they added up to.
        self.pending: dict[int, str] = {}
        # While a step's noise is being added, or a charge is not on disk yet: parameters, key and checkpoint disagree.
        self._torn = False
        self._entered_phase = -1
        self._settle()

    @property
    def phase(self) -> int:
        """Of the step taken last."""
        return self.backends.phase

    @property
    def stage(self) -> PhasePlan:
        return self.plan.phases[self.phase]

    @property
    def backend(self) -> Backend:
        return self.backends.backend

    def flat(self) -> Array:
        """float32[D] of all parameters that any phase trains."""
        return self.backends.flat()

    def _settle(self) -> None:
        """Enters the phase that takes the next step."""
        phase = self.ledger.phase_of(self.step)
        self.backends.enter(phase)
        if phase != self._entered_phase:
            self._entered()

    def _entered(self) -> None:
        view = self.backends.phases[self.phase]
        self.size = int(view["num_trainable"])
        rates = rates_by_parameter([p["name"] for p in view["parameters"]], self.stage.learning_rates)
        each = np.repeat(np.asarray(rates), [int(p["numel"]) for p in view["parameters"]])
        self._rates: float | Array = each if "learning_rates" in view else rates[0]
        runs = besides(self.mechanism, self.ledger, self.phase)
        self._tracker = EpsilonTracker(self.stage.sampler, self.plan.noise_multiplier, self.plan.target_delta, runs)
        self._entered_phase = self.phase  # last: an interrupt before it is made good by the next step

    @property
    def steps_in_phase(self) -> int:
        return self.step - self.ledger.start(self.phase)

    @property
    def phase_finished(self) -> bool:
        return self.steps_in_phase >= self.ledger.limit(self.phase)

    def spent(self) -> Callable[[], float]:
        """ε after the steps taken so far, lost ones included, an upper bound; computed when called."""
        tracker, step, lost = self._tracker, self.steps_in_phase, self.ledger.charged[self.phase]
        return lambda: tracker.at(step, lost)

    @property
    def total(self) -> int:
        """Steps that the run takes, fewer than planned where lost ones shorten it."""
        return self.ledger.total

    @property
    def lost(self) -> int:
        return sum(self.ledger.charged)

    def reserve(self) -> None:
        """The whole of what the run may spend, in its ledger, where it has one."""
        self.account.reserve(self.mechanism, self.ledger.at_most())

    def advance(self) -> None:
        """Draw, clip and sum, journal, add noise once, update. Control flow depends on public values only, except that a
        replayed step whose sum changed (so: data or machine changed) is charged, and not taken."""
        self._check_whole()
        self.account.require()
        if self.step >= self.total:
            raise PrivacyError("The plan has 0 steps left. The budget was computed for the plan: make a new one.")
        self._settle()
        rows = self.stage.sampler.draw(self.key, self.step)
        noise = stream(self.key, "noise", self.step).normal(self.size).astype(np.float32)
        # Nothing is released by this, noise or no noise: the sum is in memory, and only `update` reads it.
        self._accumulate(rows, noise)
        digest = sum_digest(self.key, self.step, self.backend.gradient_buffers())
        if self.pending.get(self.step, digest) != digest:
            self.charge(max(self.pending) + 1 - self.step)
            return
        if self.store is not None:
            self.store.record(JournalEntry(self.step, key_id(self.key), digest))
        self._torn = True
        self.backend.update(noise, self._rates * self.stage.factor(self.steps_in_phase))
        self.pending.pop(self.step, None)
        self.step += 1
        self._torn = False

    def _accumulate(self, rows: Array, noise: Array) -> None:
        """The clipped sum over `rows`, into the backend; with the noise, where that comes with the last micro-batch."""
        nothing = np.zeros_like(noise)
        batches = self.records.micro_batches(rows, self.plan.physical_batch_sizes)
        try:
            self.backend.begin()
            batch, mask = next(batches)
            for following in batches:
                self.backend.accumulate(batch, mask, nothing)
                batch, mask = following
            self.backend.accumulate(batch, mask, noise if self.backend.noise_with_last_batch else nothing)
            return
        except DataError:
            raise
        except Exception as error:
            kind = type(error).__name__
        # Outside the handler: ONNX Runtime quotes the value that it stumbled over, which is somebody's.
        raise DataError(
            f"ONNX Runtime could not compute step {self.step} ({kind}); nothing of it was released. The usual cause is a "
            "record with an index that the model does not have: a token id of another tokenizer, or a label beyond its "
            "classes."
        )

    def _check_whole(self) -> None:
        if self._torn:
            raise CheckpointError(
                "A step was interrupted in its middle, so this trainer's parameters and its key no longer belong "
                "together. Make a new OrtTrainer: with output_dir it continues from the last checkpoint."
            )

    def charge(self, lost: int) -> None:
        """Pays for `lost` steps that somebody may have seen, and goes on under a new key; on disk first of all."""
        self.account.reserve(self.mechanism, self.ledger.at_most(self.step, lost))
        self._torn = True
        self.ledger.charge(self.step, lost)
        self._entered_phase = -1  # what ε so far has besides this phase is another now
        self.pending = {}
        old, self.key = self.key, self.key.renewed()
        self._commit()
        self._torn = False
        old.erase()

    def statement(self) -> PrivacyStatement:
        """Of a run that stops here: a step under way, or possibly released before a crash, counts as lost."""
        since = max([int(self._torn), *(number + 1 - self.step for number in self.pending)])
        return statement_of_stopped(self.mechanism, self.ledger.charged, self.step, since)

    # -- checkpoints --------------------------------------------------------------------------------------------------

    def save(self) -> None:
        """Commit a PRIVATE checkpoint at a logical-step boundary; without output_dir, nothing.

        Raises:
            CheckpointError: in the middle of a step, or the disk refuses; the last checkpoint is intact.
        """
        if self.store is not None:
            self._check_whole()
            self._commit()

    def _commit(self) -> None:
        self._settle()
        if self.store is None:
            return
        state = SavedState(
            step=self.step,
            charged_steps=list(self.ledger.charged),
            mechanism=self.mechanism,
            fingerprint=self.fingerprint,
            trainables={"theta": self.flat()},
            optimizer=self.backend.optimizer_state(),
            history=self.history,
        )
        name = key_id(self.key)
        self.store.save(state, self.key, [JournalEntry(step, name, d) for step, d in sorted(self.pending.items())])

    def restore(self, state: SavedState, key: SecretKey, pending: list[JournalEntry]) -> None:
        """Continues `state`: exactly where everything matches, else with the lost steps charged.

        Raises CheckpointError, and changes nothing, where it cannot be continued at all.
        """
        self.account.check_resumed(state.mechanism)
        limit = ledger_of(self.mechanism, state.charged_steps).total
        begun = max([state.step, *(entry.step + 1 for entry in pending)])
        fixed = ("backend", "optimizer", "parameters")
        why = None
        if any(state.fingerprint.get(name) != self.fingerprint[name] for name in fixed):
            why = "of other artifacts (another target, optimizer, or other trained parameters)"
        elif comparable(state.mechanism) != comparable(self.mechanism):
            why = "under another privacy plan (noise, sample rate, number of records, target or earlier runs)"
        elif begun > limit:
            why = f"of which {begun} steps are taken, more than the {limit} that this call would take"
        if why is not None:
            raise CheckpointError(
                f"The output folder holds an unfinished run {why}, which this call cannot continue. Nothing was changed. "
                "Repeat that run's arguments to continue it, or pass resume=False, overwrite=True to give it up: what it "
                "has spent is then kept in the folder and counted in this run."
            )
        ledger = ledger_of(self.mechanism, state.charged_steps)
        try:
            self.backends.restore(ledger.phase_of(state.step), state.trainables["theta"], state.optimizer)
        except (ArtifactError, KeyError, ValueError, RuntimeError) as error:
            raise CheckpointError(
                f"The checkpoint's optimizer state cannot be loaded ({type(error).__name__}). Nothing was changed."
            ) from error
        go_on_as(self.mechanism, state.mechanism)
        self.key.erase()
        self.key, self.step, self.history = key, state.step, list(state.history)
        self.ledger.charged = list(state.charged_steps)
        self._entered()
        self.pending = {entry.step: entry.digest for entry in pending}
        assert self.store is not None
        self.store.resume_journal(pending)
        if state.fingerprint != self.fingerprint:
            # Even with no step to pay for: nothing of the new plan may run under the old plan's key.
            self.charge(begun - self.step)
        elif state.mechanism != self.mechanism:
            self.save()  # a longer plan: what is on disk never plans fewer steps than the run may take


def _fingerprint(manifest: Mapping[str, Any], plan: Plan, key: SecretKey, records: Records) -> dict[str, Any]:
    """What a bit-for-bit replay depends on; the data are known by the digests in the journal."""
    import onnxruntime

    views = phases_of(manifest)
    schedules = [
        phase.schedule.to_dict() | ({"over": phase.sampler.steps} if phase.schedule.kind != "constant" else {})
        for phase in plan.phases
    ]
    return {
        "backend": manifest["target"],
        "optimizer": [view["optimizer"]["type"] for view in views],
        "parameters": [[[p["name"], list(p["shape"])] for p in view["parameters"]] for view in views],
        "onnxruntime": onnxruntime.__version__,
        "files": dict(manifest["files"]),
        "learning_rates": [[list(pair) for pair in phase.learning_rates] for phase in plan.phases],
        "schedules": schedules,
        "physical_batch_size": list(plan.physical_batch_sizes),
        "padded_lengths": {path: list(lengths) for path, lengths in records.lengths.items()},
        "pad_values": {path: repr(float(value)) for path, value in records.pad_values.items()},  # NaN is not equal to NaN
        "insecure": key.insecure,
    }
