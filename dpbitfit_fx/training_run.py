"""The state of a private training run between its logical steps: advanced, saved, resumed, given up, stated."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from dpbitfit_fx.accounting import EpsilonTracker
from dpbitfit_fx.arrays import raw_bytes
from dpbitfit_fx.averaging import TailAverage
from dpbitfit_fx.checkpoint import CheckpointStore, JournalEntry, SavedState, encode, key_id, sum_digest
from dpbitfit_fx.engine import Engine
from dpbitfit_fx.errors import CheckpointError
from dpbitfit_fx.privacy_statement import PrivacyStatement
from dpbitfit_fx.randomness import SecretKey
from dpbitfit_fx.ranks import Ranks
from dpbitfit_fx.run_account import RunAccount, besides
from dpbitfit_fx.run_statement import comparable, go_on_as, ledger_of, make_statement, statement_of_stopped
from dpbitfit_fx.sampling import PoissonSampler

__all__ = ["Stage", "TrainingRun", "frozen_digest"]


@dataclass(frozen=True)
class Stage:
    """One phase, ready to train: its engine, its public plan, and a new optimizer with the schedule's rates.

    record: what privacy.json says of it. fingerprint: what a bit-for-bit replay of it depends on.
    """

    engine: Engine
    sampler: PoissonSampler
    begin: Callable[[], tuple[torch.optim.Optimizer, Callable[[int], None]]]
    record: dict[str, Any]
    fingerprint: dict[str, Any]

    @property
    def per_epoch(self) -> int:
        return max(1, round(1 / self.sampler.sample_rate))


class TrainingRun:
    """The state of one training run, of one phase or several, between its logical steps."""

    def __init__(
        self,
        stages: Sequence[Stage],
        *,
        key: SecretKey,
        mechanism: dict[str, Any],
        fingerprint: dict[str, Any],
        store: CheckpointStore | None,
        checkpoint_every: int,
        account: RunAccount,
        ranks: Ranks,
        average_from: float | None = None,
    ) -> None:
        self.stages, self.account, self.ranks = tuple(stages), account, ranks
        self.key, self.store, self.checkpoint_every = key, store, checkpoint_every
        phases = [{"sampler": stage.sampler.to_dict(), "record": stage.record} for stage in stages]
        self.mechanism = account.named(mechanism | {"phases": phases})
        self.fingerprint = fingerprint | {"phases": [stage.fingerprint for stage in stages]}
        self.ledger = ledger_of(self.mechanism)
        self.step = 0
        self.begun = 0  # steps whose noise was added: one more than `step` where one is under way
        self.history: list[dict[str, Any]] = []
        # Steps that may have been released by the process that was killed, with the digest of their clipped sums.
        self.pending: dict[int, str] = {}
        # Of every phase, all the time: a parameter that one phase trained is part of the state of those that follow.
        self.trainables: dict[str, nn.Parameter] = {}
        for stage in stages:
            self.trainables |= stage.engine.update.parameters()
        last = stages[-1].engine.update.parameters()
        self.average = None if average_from is None else TailAverage(last, average_from)
        self.phase = 0
        self._enter(0)

    @property
    def stage(self) -> Stage:
        """Of the step taken last."""
        return self.stages[self.phase]

    def _enter(self, phase: int) -> None:
        self.phase = phase
        for parameter in self.trainables.values():
            parameter.grad = None
        # An optimizer may have written through .data, which what is cached of frozen weights would not notice.
        torch.autograd.graph.increment_version(list(self.trainables.values()))
        self.optimizer, self.set_rates = self.stage.begin()
        self._track()

    def _track(self) -> None:
        sigma, delta = self.mechanism["noise_multiplier"], self.mechanism["statement"]["delta"]
        runs = besides(self.mechanism, self.ledger, self.phase)
        self._tracker = EpsilonTracker(self.stage.sampler, sigma, delta, runs)

    def _settle(self) -> None:
        """Enters the phase that takes the next step."""
        phase = self.ledger.phase_of(self.step)
        if phase != self.phase:
            self._enter(phase)

    def reserve(self) -> None:
        """The whole of what the run may spend, in its ledger, where it has one."""
        self.account.reserve(self.mechanism, self.ledger.at_most())

    # -- one step -------------------------------------------------------------------------------------------------

    def advance(self) -> None:
        """One logical step: draw, clip, journal, noise, optimizer. Control flow depends on public values only, except
        that a replayed step whose clipped sum changed (so: data or machine changed) is charged."""
        self.account.require()
        self._settle()
        engine = self.stage.engine
        accumulator = self.ranks.drawn_sum(engine, self.key, self.step, self.phase, self.trainables)
        if self.step in self.pending and self.pending[self.step] != sum_digest(self.key, self.step, accumulator):
            self.charge(max(self.pending) + 1 - self.step)
            return
        if self.store is not None:
            self.store.record(JournalEntry(self.step, key_id(self.key), sum_digest(self.key, self.step, accumulator)))
        self.begun = self.step + 1
        gradient = engine.private_gradient(self.key, self.step, accumulator)
        for name, value in gradient.items():
            parameter = self.trainables[name]
            parameter.grad = value.to(parameter.dtype)
        self.set_rates(self.steps_in_phase)
        self.optimizer.step()
        self.pending.pop(self.step, None)
        self.step += 1
        if self.average is not None and self.phase == len(self.stages) - 1:
            self.average.update(self.steps_in_phase, self.ledger.limit(self.phase))

    def charge(self, lost: int) -> None:
        """Pays for `lost` steps that somebody may have seen, and goes on under a new key; on disk first of all."""
        self.account.reserve(self.mechanism, self.ledger.at_most(self.step, lost))
        self.ledger.charge(self.step, lost)
        self._track()
        self.pending = {}
        old, self.key = self.key, self.key.renewed()
        self.save()
        old.erase()

    @property
    def steps_in_phase(self) -> int:
        return self.step - self.ledger.start(self.phase)

    @property
    def phase_finished(self) -> bool:
        return self.steps_in_phase >= self.ledger.limit(self.phase)

    @property
    def finished(self) -> bool:
        return self.step >= self.ledger.total

    @property
    def epochs(self) -> float:
        """How often a record was drawn so far, in expectation."""
        taken = self.ledger.taken(self.step)
        return sum(steps * stage.sampler.sample_rate for steps, stage in zip(taken, self.stages, strict=True))

    def spent(self) -> Callable[[], float]:
        """ε after the steps taken so far, lost ones included, an upper bound; computed when called."""
        tracker, step, lost = self._tracker, self.steps_in_phase, self.ledger.charged[self.phase]
        return lambda: tracker.at(step, lost)

    def averaged(self) -> contextlib.AbstractContextManager[None]:
        """Inside, the model holds the mean of its last iterates, where the run keeps one."""
        return contextlib.nullcontext() if self.average is None else self.average.applied()

    def statement(self) -> PrivacyStatement:
        mechanism = self.mechanism
        if self.average is not None:
            fields = mechanism["statement"]
            kept = {"average_from": self.average.share, "averaged_steps": self.average.count}
            declared = fields["public_declarations"] | {"averaging": kept}
            mechanism = mechanism | {"statement": fields | {"public_declarations": declared}}
        return make_statement(mechanism, self.ledger, self.step)

    def statement_so_far(self) -> PrivacyStatement:
        """Of a run that stops here: a step under way, which may be in the parameters already, counts as lost."""
        since = max(0, self.begun - self.step, *(number + 1 - self.step for number in self.pending))
        return statement_of_stopped(self.mechanism, self.ledger.charged, self.step, since)

    # -- checkpoints ----------------------------------------------------------------------------------------------

    def save(self) -> None:
        if self.store is None:
            return
        self._settle()
        state = SavedState(
            step=self.step,
            charged_steps=list(self.ledger.charged),
            mechanism=self.mechanism,
            fingerprint=self.fingerprint,
            trainables={name: parameter.detach() for name, parameter in self.trainables.items()},
            optimizer=self.optimizer.state_dict(),
            history=self.history,
            average={} if self.average is None else self.average.values,
            averaged=0 if self.average is None else self.average.count,
        )
        name = key_id(self.key)
        pending = [JournalEntry(step, name, digest) for step, digest in sorted(self.pending.items())]
        self.store.save(state, self.key, pending)

    def restore(self, state: SavedState, key: SecretKey, pending: list[JournalEntry]) -> None:
        """Continues `state`: exactly where everything matches, else with the lost steps charged.

        Raises CheckpointError, and changes nothing, where it cannot be continued at all.
        """
        self.account.check_resumed(state.mechanism)
        if comparable(state.mechanism) != comparable(self.mechanism):
            raise CheckpointError(
                "The output folder holds an unfinished run under another privacy plan (noise, sample rate, phases, "
                "number of records or earlier runs), which this call cannot continue. Nothing was changed. Repeat that "
                "run's arguments to continue it, or pass resume=False, overwrite=True to give it up: what it has spent "
                "is then kept in the folder and counted in this run."
            )
        limit = ledger_of(self.mechanism, state.charged_steps).total
        begun = max([state.step, *(entry.step + 1 for entry in pending)])
        if begun > limit:
            raise CheckpointError(
                f"The output folder holds an unfinished run of which {begun} steps are taken, more than the {limit} that "
                "this call would take. Nothing was changed. Repeat that run's epochs or max_steps to continue it, or pass "
                "resume=False, overwrite=True to give it up: what it has spent is then kept in the folder and counted in "
                "this run."
            )
        shapes = {name: tuple(parameter.shape) for name, parameter in self.trainables.items()}
        if {name: tuple(value.shape) for name, value in state.trainables.items()} != shapes:
            raise CheckpointError(
                "The output folder holds an unfinished run that trains other parameters. Nothing was changed. Repeat "
                "that run's model and trainable= to continue it, or pass resume=False, overwrite=True to give it up: "
                "what it has spent is then kept in the folder and counted in this run."
            )
        go_on_as(self.mechanism, state.mechanism)
        same = state.fingerprint == self.fingerprint
        with torch.no_grad():
            for name, parameter in self.trainables.items():
                parameter.copy_(state.trainables[name])
        self.key.erase()
        self.key, self.step, self.begun = key, state.step, state.step
        self.ledger.charged = list(state.charged_steps)
        # Only now: an optimizer or a schedule may read the parameters it is built for.
        self._enter(self.ledger.phase_of(self.step))
        ours, theirs = self.stage.fingerprint, state.fingerprint["phases"][self.phase]
        exact = same or all(theirs[name] == ours[name] for name in ("optimizer", "optimizer_settings", "trainables"))
        if self.steps_in_phase:
            # First the schedule, which may compute rates from rates; then the optimizer's saved ones over it.
            self.set_rates(self.steps_in_phase - 1)
        if exact:
            self._restore_optimizer(state)
        if self.average is not None:
            self.average.restore(state.average, state.averaged)
        self.history = list(state.history)
        self.pending = {entry.step: entry.digest for entry in pending}
        if self.store is not None:
            self.store.resume_journal(pending)
        if same:
            if state.mechanism != self.mechanism:
                self.save()  # a longer plan: what is on disk never plans fewer steps than the run may take
        else:
            # Even with no step to pay for: nothing of the new plan may run under the old plan's key.
            self.charge(max(self.pending, default=self.step - 1) + 1 - self.step)

    def _restore_optimizer(self, state: SavedState) -> None:
        self.optimizer.load_state_dict(state.optimizer)
        # load_state_dict casts some tensors to the parameter's dtype; a replay needs the very bits.
        ours: dict[str, torch.Tensor] = {}
        theirs: dict[str, torch.Tensor] = {}
        same = encode(self.optimizer.state_dict(), ours, "o") == encode(state.optimizer, theirs, "o")
        if not same or any(not _same_bits(ours[name], theirs[name]) for name in theirs):
            raise CheckpointError(
                f"{type(self.optimizer).__name__} does not give back the state that was saved, so the run cannot be "
                f"continued bit for bit. Start in another output_dir, or use another optimizer."
            )


def _same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.dtype == other.dtype and one.shape == other.shape and raw_bytes(one) == raw_bytes(other)


def frozen_digest(model: nn.Module, trainables: set[str]) -> str:
    digest = hashlib.sha256()
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if name not in trainables and tensor.numel():
            digest.update(name.encode())
            digest.update(raw_bytes(tensor))
    return digest.hexdigest()
