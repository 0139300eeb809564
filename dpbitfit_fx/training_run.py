"""The state of a private training run between its logical steps: advanced, saved, resumed, given up, stated."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dpbitfit_fx.accounting import EpsilonTracker, PriorRun
from dpbitfit_fx.checkpoint import CheckpointStore, JournalEntry, SavedState, encode, key_id, sum_digest
from dpbitfit_fx.engine import Engine
from dpbitfit_fx.errors import CheckpointError
from dpbitfit_fx.privacy_statement import PrivacyStatement
from dpbitfit_fx.randomness import SecretKey
from dpbitfit_fx.sampling import PoissonSampler

__all__ = ["TrainingRun", "abandon", "frozen_digest", "make_statement"]


class TrainingRun:
    """The state of one training run between its logical steps."""

    def __init__(
        self,
        engine: Engine,
        optimizer: torch.optim.Optimizer,
        set_rates: Callable[[int], None],
        tracker: EpsilonTracker,
        *,
        key: SecretKey,
        limit: Callable[[int], int],
        mechanism: dict[str, Any],
        fingerprint: dict[str, Any],
        store: CheckpointStore | None,
        checkpoint_every: int,
    ) -> None:
        self.engine, self.optimizer, self.set_rates, self.tracker = engine, optimizer, set_rates, tracker
        self.key, self.limit, self.mechanism, self.fingerprint = key, limit, mechanism, fingerprint
        self.store, self.checkpoint_every = store, checkpoint_every
        self.step = 0
        self.charged = 0
        self.history: list[dict[str, Any]] = []
        # Steps that may have been released by the process that was killed, with the digest of their clipped sums.
        self.pending: dict[int, str] = {}
        self.trainables = engine.update.parameters()

    # -- one step -------------------------------------------------------------------------------------------------

    def advance(self) -> None:
        """One logical step: draw, clip, journal, noise, optimizer. Control flow depends on public values only, except
        that a replayed step whose clipped sum changed (so: data or machine changed) is charged."""
        accumulator = self.engine.drawn_sum(self.key, self.step)
        if self.step in self.pending and self.pending[self.step] != sum_digest(self.key, self.step, accumulator):
            self.charge(max(self.pending) + 1 - self.step)
            return
        if self.store is not None:
            self.store.record(JournalEntry(self.step, key_id(self.key), sum_digest(self.key, self.step, accumulator)))
        gradient = self.engine.private_gradient(self.key, self.step, accumulator)
        for name, parameter in self.trainables.items():
            parameter.grad = gradient[name].to(parameter.dtype)
        self.set_rates(self.step)
        self.optimizer.step()
        self.pending.pop(self.step, None)
        self.step += 1

    def charge(self, lost: int) -> None:
        """Pays for `lost` steps that somebody may have seen, and goes on under a new key; on disk first of all."""
        self.charged += lost
        self.pending = {}
        old, self.key = self.key, self.key.renewed()
        self.save()
        old.erase()

    @property
    def finished(self) -> bool:
        return self.step >= self.limit(self.charged)

    # -- checkpoints ----------------------------------------------------------------------------------------------

    def save(self) -> None:
        if self.store is None:
            return
        state = SavedState(
            step=self.step,
            charged_steps=self.charged,
            mechanism=self.mechanism,
            fingerprint=self.fingerprint,
            trainables={name: parameter.detach() for name, parameter in self.trainables.items()},
            optimizer=self.optimizer.state_dict(),
            history=self.history,
        )
        name = key_id(self.key)
        pending = [JournalEntry(step, name, digest) for step, digest in sorted(self.pending.items())]
        self.store.save(state, self.key, pending)

    def restore(self, state: SavedState, key: SecretKey, pending: list[JournalEntry]) -> None:
        """Continues `state`: exactly where everything matches, else with the lost steps charged.

        Raises CheckpointError, and changes nothing, where it cannot be continued at all.
        """
        if _comparable(state.mechanism) != _comparable(self.mechanism):
            raise CheckpointError(
                "The output folder holds an unfinished run under another privacy plan (noise, sample rate, number of "
                "records or earlier runs), which this call cannot continue. Nothing was changed. Repeat that run's "
                "arguments to continue it, or pass resume=False, overwrite=True to give it up: what it has spent is "
                "then kept in the folder and counted in this run."
            )
        shapes = {name: tuple(parameter.shape) for name, parameter in self.trainables.items()}
        if {name: tuple(value.shape) for name, value in state.trainables.items()} != shapes:
            raise CheckpointError(
                "The output folder holds an unfinished run that trains other parameters. Nothing was changed. Repeat "
                "that run's model and trainable= to continue it, or pass resume=False, overwrite=True to give it up: "
                "what it has spent is then kept in the folder and counted in this run."
            )
        # The statement goes on naming the run that began; noise from a known seed stays insecure for ever.
        statement, saved = self.mechanism["statement"], state.mechanism["statement"]
        statement["run_id"] = saved["run_id"]
        statement["insecure"] = statement["insecure"] or saved["insecure"]
        same = state.fingerprint == self.fingerprint
        with torch.no_grad():
            for name, parameter in self.trainables.items():
                parameter.copy_(state.trainables[name])
        exact = same or all(
            state.fingerprint.get(name) == self.fingerprint[name] for name in ("optimizer", "optimizer_settings")
        )
        if state.step:
            # First the schedule, which may compute rates from rates; then the optimizer's saved ones over it.
            self.set_rates(state.step - 1)
        if exact:
            self._restore_optimizer(state)
        self.key.erase()
        self.key, self.step, self.charged = key, state.step, state.charged_steps
        self.history = list(state.history)
        self.pending = {entry.step: entry.digest for entry in pending}
        if self.store is not None:
            self.store.resume_journal(pending)
        if not same:
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
    return one.dtype == other.dtype and one.shape == other.shape and _tensor_bytes(one) == _tensor_bytes(other)


def _comparable(mechanism: dict[str, Any]) -> dict[str, Any]:
    """What ε of each step depends on; the number of steps does not matter to the steps already taken."""
    return {name: mechanism[name] for name in ("sample_rate", "dataset_size", "noise_multiplier", "prior")}


def _tensor_bytes(tensor: torch.Tensor) -> bytes:
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def frozen_digest(model: nn.Module, trainables: set[str]) -> str:
    digest = hashlib.sha256()
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if name not in trainables and tensor.numel():
            digest.update(name.encode())
            digest.update(_tensor_bytes(tensor))
    return digest.hexdigest()


def _statement_of_unfinished(store: CheckpointStore) -> PrivacyStatement:
    """What an unfinished run has spent, steps that may have been released since its checkpoint included."""
    state, key, pending = store.load()
    key.erase()
    lost = max((entry.step + 1 - state.step for entry in pending), default=0)
    return make_statement(state.mechanism, state.step, state.charged_steps + lost)


def make_statement(mechanism: Mapping[str, Any], steps: int, lost_steps: int) -> PrivacyStatement:
    return PrivacyStatement.create(
        PoissonSampler.from_dict(mechanism["sampler"]),
        noise_multiplier=mechanism["noise_multiplier"],
        prior=[PriorRun.from_dict(run) for run in mechanism["prior"]],
        steps=steps,
        lost_steps=lost_steps,
        **mechanism["statement"],
    )


def abandon(store: CheckpointStore, output_dir: Path) -> None:
    """Gives up an unfinished run; its spent budget stays in the folder and is composed with whatever follows there."""
    statement = _statement_of_unfinished(store)
    statement.save(output_dir / f"privacy-abandoned-{statement.run_id}.json")
    store.erase()
