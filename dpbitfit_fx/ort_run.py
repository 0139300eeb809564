"""The state of a private run from an export between its logical steps: advanced, saved, resumed. Torch-free."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from dpbitfit_fx.checkpoint import CheckpointStore, JournalEntry, SavedState, key_id, sum_digest
from dpbitfit_fx.errors import ArtifactError, CheckpointError, DataError, PrivacyError
from dpbitfit_fx.ort_backends import Array, Backend
from dpbitfit_fx.ort_plan import Plan
from dpbitfit_fx.ort_records import Records
from dpbitfit_fx.randomness import SecretKey, stream
from dpbitfit_fx.run_account import RunAccount
from dpbitfit_fx.run_statement import comparable, go_on_as, ledger_of, statement_of_stopped

if TYPE_CHECKING:
    from dpbitfit_fx.privacy_statement import PrivacyStatement

__all__ = ["OrtRun"]


class OrtRun:
    """One run: the numbers of a step come from the backend, everything that privacy depends on from here.

    declared: for privacy.json: tuning_covered, and what else was declared public.
    """

    def __init__(
        self,
        manifest: Mapping[str, Any],
        backend: Backend,
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
        self.manifest, self.backend, self.records, self.plan = manifest, backend, records, plan
        self.key, self.store = key, store
        self.size = int(manifest["num_trainable"])
        self.mechanism = account.named(plan.mechanism(manifest, key.insecure, tuning_covered, declared))
        self.fingerprint = _fingerprint(manifest, plan, key, records)
        self.ledger = ledger_of(self.mechanism)
        self.step = 0
        self.history: list[dict[str, Any]] = []
        # Steps that may have been released by the process that was killed, with the digest of what they added up to.
        self.pending: dict[int, str] = {}
        # While a step's noise is being added, or a charge is not on disk yet: parameters, key and checkpoint disagree.
        self._torn = False

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
        rows = self.plan.sampler.draw(self.key, self.step)
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
        self.backend.update(noise, self.plan.rate(self.step))
        self.pending.pop(self.step, None)
        self.step += 1
        self._torn = False

    def _accumulate(self, rows: Array, noise: Array) -> None:
        """The clipped sum over `rows`, into the backend; with the noise, where that comes with the last micro-batch."""
        nothing = np.zeros_like(noise)
        batches = self.records.micro_batches(rows, self.plan.physical_batch_size)
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
        if self.store is None:
            return
        state = SavedState(
            step=self.step,
            charged_steps=list(self.ledger.charged),
            mechanism=self.mechanism,
            fingerprint=self.fingerprint,
            trainables={"theta": self.backend.flat()},
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
        try:
            self.backend.restore(state.trainables["theta"], state.optimizer)
        except (ArtifactError, KeyError, ValueError, RuntimeError) as error:
            raise CheckpointError(
                f"The checkpoint's optimizer state cannot be loaded ({type(error).__name__}). Nothing was changed."
            ) from error
        go_on_as(self.mechanism, state.mechanism)
        self.key.erase()
        self.key, self.step, self.history = key, state.step, list(state.history)
        self.ledger.charged = list(state.charged_steps)
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

    return {
        "backend": manifest["target"],
        "optimizer": manifest["optimizer"]["type"],
        "parameters": [[p["name"], list(p["shape"])] for p in manifest["parameters"]],
        "onnxruntime": onnxruntime.__version__,
        "files": dict(manifest["files"]),
        "learning_rate": plan.learning_rate,
        "schedule": plan.schedule.to_dict() | ({"over": plan.sampler.steps} if plan.schedule.kind == "linear" else {}),
        "physical_batch_size": plan.physical_batch_size,
        "pad_values": records.pad_values,
        "insecure": key.insecure,
    }
