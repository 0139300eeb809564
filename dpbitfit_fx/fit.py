"""`fit`: differentially private training of a compiled step, from Poisson draws to the privacy statement.

Formal guarantee: the sequence of parameter values that `fit` releases (to callbacks, `eval_fn`, the model and the
output folder) is (ε, δ)-differentially private for adding or removing one record, with the ε that the accountant
derives from the very sampler object that drew the batches, under the caveats that privacy.json lists.
"""

from __future__ import annotations

import contextlib
import hashlib
import inspect
import json
import math
import os
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

import dpbitfit_fx
from dpbitfit_fx.accounting import (
    EpsilonTracker,
    Prior,
    PriorRun,
    check_target_delta,
    resolve_prior,
    solve_noise_multiplier,
)
from dpbitfit_fx.batching import (
    ItemLayout,
    MapDataset,
    PhysicalBatch,
    PhysicalBatches,
    check_rows,
    global_random_state_kept,
    load_item,
)
from dpbitfit_fx.biases import (
    FROZEN_FINGERPRINT,
    MODEL_FINGERPRINT,
    frozen_weights_fingerprint,
    model_fingerprint,
    save_biases,
)
from dpbitfit_fx.checkpoint import CheckpointStore, JournalEntry, SavedState, encode, key_id, sum_digest
from dpbitfit_fx.errors import ArtifactError, CheckpointError, DataError, DPBitFitError, PrivacyError
from dpbitfit_fx.files import atomic_write_bytes, atomic_write_text, ensure_output_folder, read_bytes
from dpbitfit_fx.passes.clipping import AutomaticClipping, Clipping
from dpbitfit_fx.privacy_statement import PrivacyStatement, new_run_id
from dpbitfit_fx.randomness import SecretKey, stream
from dpbitfit_fx.sampling import PoissonSampler

if TYPE_CHECKING:
    from dpbitfit_fx.compile import PrivateStep

__all__ = ["Engine", "FitResult", "StepInfo", "build_engine", "fit"]

BIASES, STATEMENT, SUMMARY, CHECKPOINT = "biases.safetensors", "privacy.json", "summary.md", "checkpoint"
_ABANDONED = "privacy-abandoned-*.json"
_CHECKPOINT_EVERY = 50


# -- what callers see -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class StepInfo:
    """What a callback may know after a step: public numbers only. `step`: steps done; `steps`: planned."""

    step: int
    steps: int
    learning_rate: float
    _epsilon: Callable[[], float] = field(repr=False)

    @cached_property
    def epsilon(self) -> float:
        """ε spent so far at the target δ, an upper bound (computed at a coarse grid of steps)."""
        return self._epsilon()


@dataclass(frozen=True)
class FitResult:
    """The trained model (the very object that was passed in) and what it cost.

    epsilon, delta: spent, lost steps and earlier runs included. steps: logical steps whose result is in the model.
    charged_steps: steps lost to interruptions that could not be replayed, paid for on top. history: one entry per
    evaluation: step, epoch, epsilon (an upper bound) and what `eval_fn` returned.
    """

    model: nn.Module
    epsilon: float
    delta: float
    noise_multiplier: float
    steps: int
    history: list[dict[str, Any]]
    output_dir: Path | None
    statement: PrivacyStatement
    charged_steps: int = 0


# -- the private computation ------------------------------------------------------------------------------------------


class Engine:
    """One logical batch at a time: records -> physical batches -> one clipped sum -> one noisy gradient.

    Args:
        compiled: one PrivateStep per bucket (padded length), same trainables in the same order; the first has noise.
        batches: turns rows into physical batches.
        sampler: draws over all records that are really there.

    Guarantee: `clipped_sum(rows)` changes by at most max_grad_norm (L2, in real numbers) when one row is added or
    removed; `private_gradient` adds noise exactly once, whatever the number of physical batches, none included.
    """

    def __init__(self, compiled: Sequence[PrivateStep], batches: PhysicalBatches, sampler: PoissonSampler) -> None:
        first = compiled[0]
        if any(step.trainable_names != first.trainable_names for step in compiled):
            raise DataError("The step compiled for one padded length trains other parameters than for another.")
        self.compiled = tuple(compiled)
        self.batches = batches
        self.sampler = sampler

    @property
    def update(self) -> PrivateStep:
        return self.compiled[0]

    def clipped_sum(self, rows: Sequence[int], secret: bytes = b"") -> torch.Tensor:
        """The clipped sum over `rows`, flat, [D]. Private: only noise may follow."""
        with global_random_state_kept(), torch.no_grad():
            accumulator = self.update.zero_accumulator()
            for batch in self.batches.split(rows, secret):
                accumulator = self._accumulate(batch, accumulator)
            return accumulator

    def drawn_sum(self, key: SecretKey, step: int) -> torch.Tensor:
        """The clipped sum of the Poisson draw of `step`; replays bit for bit for the same key, step and parameters."""
        rows = self.sampler.draw(key, step).tolist()
        return self.clipped_sum(rows, stream(key, "records", step).bytes(32))

    def private_gradient(self, key: SecretKey, step: int, accumulator: torch.Tensor) -> dict[str, torch.Tensor]:
        """(clipped sum + sigma R z) / expected batch size, by parameter name. May be released."""
        update = self.update
        normals = torch.from_numpy(stream(key, "noise", step).normal(update.num_trainable))
        noise = normals.to(dtype=update.dtype, device=update.device)
        with torch.no_grad():
            return update.unflatten(update.privatize(accumulator, noise))

    def _accumulate(self, batch: PhysicalBatch, accumulator: torch.Tensor) -> torch.Tensor:
        step = self.compiled[batch.bucket]
        try:
            return step.accumulate(batch.batch, batch.sample_mask, accumulator)
        except DPBitFitError:
            raise
        except (IndexError, ValueError, RuntimeError):
            for row in batch.rows:
                self._blame(row, step)
            raise

    def _blame(self, row: int, step: PrivateStep) -> None:
        """Names the record on which the model fails by itself, and nothing else of the draw."""
        bucket, values = self.batches.load(row, b"")
        alone = self.batches.assemble(bucket, [values], [row])
        try:
            step.accumulate(alone.batch, alone.sample_mask, step.zero_accumulator())
        except Exception as error:
            raise DataError(
                f"The model fails with {type(error).__name__} on row {row} of the dataset. Likely a label outside the "
                f"model's classes or a token id outside its vocabulary. The message is withheld because it may quote "
                f"the record; run the loss on that row alone to see it."
            ) from None


# -- public arguments -------------------------------------------------------------------------------------------------


def _default_delta(size: int) -> float:
    """The largest power of ten that is at most 1/(10 N)."""
    return max(1e-10, 10.0 ** math.floor(math.log10(1 / (10 * size)) + 1e-9))


def _dataset_length(dataset: Any) -> int:
    if isinstance(dataset, torch.utils.data.DataLoader):
        raise DataError(
            "fit wants a map-style dataset, not a DataLoader: it draws Poisson samples by itself, and shuffled batches "
            "would void the accounting. Pass loader.dataset."
        )
    if isinstance(dataset, torch.utils.data.IterableDataset) or not (
        hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__")
    ):
        raise DataError(
            "fit wants a map-style dataset (len(dataset) and dataset[i]): every record must be reachable by its row "
            "number, or it cannot be Poisson sampled. Read the stream into a list first."
        )
    size = len(dataset)
    if size == 0:
        raise DataError("The dataset is empty: there is no record to train on.")
    return size


def _build_optimizer(optimizer: Any, parameters: list[nn.Parameter], learning_rate: float) -> torch.optim.Optimizer:
    if isinstance(optimizer, torch.optim.Optimizer):
        raise PrivacyError(
            "optimizer is an Optimizer object, which was built before fit knew what is trained. Pass its class, or a "
            "function of the parameters: optimizer=lambda params: torch.optim.SGD(params, lr=0.1, momentum=0.9)."
        )
    if not (isinstance(learning_rate, (int, float)) and math.isfinite(learning_rate) and learning_rate > 0):
        raise PrivacyError(f"learning_rate must be a finite number above 0; got {learning_rate!r}.")
    if optimizer is None:
        built: Any = torch.optim.Adam(parameters, lr=learning_rate)
    elif isinstance(optimizer, type):
        built = optimizer(parameters, lr=learning_rate)
    else:
        built = optimizer(parameters)
    if not isinstance(built, torch.optim.Optimizer):
        raise PrivacyError(f"optimizer returned a {type(built).__name__}, not a torch.optim.Optimizer.")
    held = [id(parameter) for group in built.param_groups for parameter in group["params"]]
    if sorted(held) != sorted(map(id, parameters)):
        raise PrivacyError(
            "The optimizer must hold exactly the parameters it was given: those whose gradient is private."
        )
    closure = inspect.signature(built.step).parameters.get("closure")
    if closure is not None and closure.default is inspect.Parameter.empty:
        raise PrivacyError(
            f"{type(built).__name__} evaluates the loss again inside its step, which would release private losses. "
            f"Use an optimizer that needs gradients only."
        )
    return built


_PLATEAU = (
    "ReduceLROnPlateau changes the learning rate by a loss, and the training loss is private data. Use a schedule "
    "that is a function of the step."
)


def _scheduler(lr_schedule: Any, optimizer: torch.optim.Optimizer, steps: int) -> tuple[Callable[[int], None], Any]:
    """A function that sets the learning rates for a step, called with 0, 1, 2, …; and what identifies the schedule."""
    base = [float(group["lr"]) for group in optimizer.param_groups]
    if lr_schedule is None:
        return (lambda step: None), None
    if lr_schedule is torch.optim.lr_scheduler.ReduceLROnPlateau or isinstance(
        lr_schedule, torch.optim.lr_scheduler.ReduceLROnPlateau
    ):
        raise PrivacyError(_PLATEAU)
    if isinstance(lr_schedule, torch.optim.lr_scheduler.LRScheduler) or not callable(lr_schedule):
        raise PrivacyError(
            "lr_schedule must be a function step -> multiplier, or a function optimizer -> LRScheduler (fit makes the "
            "optimizer itself): lr_schedule=lambda opt: CosineAnnealingLR(opt, T_max=100)."
        )
    value: Any = None
    if not isinstance(lr_schedule, type):
        with contextlib.suppress(TypeError, AttributeError):
            value = lr_schedule(0)
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        multipliers = [float(lr_schedule(step)) for step in range(steps)]
        if not all(math.isfinite(multiplier) for multiplier in multipliers):
            raise PrivacyError("lr_schedule gives a multiplier that is not a finite number.")

        def set_rates(step: int) -> None:
            for group, rate in zip(optimizer.param_groups, base, strict=True):
                group["lr"] = rate * multipliers[step]

        return set_rates, hashlib.sha256(json.dumps(multipliers).encode()).hexdigest()
    with warnings.catch_warnings():
        # Schedulers warn when stepped before the optimizer; a resumed run does that on purpose.
        warnings.simplefilter("ignore")
        scheduler = lr_schedule(optimizer)
    if isinstance(scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau):
        raise PrivacyError(_PLATEAU)
    if not isinstance(scheduler, torch.optim.lr_scheduler.LRScheduler):
        raise PrivacyError(f"lr_schedule returned a {type(scheduler).__name__}: neither a number nor an LRScheduler.")
    position = 0

    def advance(step: int) -> None:
        nonlocal position
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            while position < step:
                scheduler.step()
                position += 1

    return advance, type(scheduler).__qualname__


# -- the run ----------------------------------------------------------------------------------------------------------


def _tensor_bytes(tensor: torch.Tensor) -> bytes:
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def _frozen_digest(model: nn.Module, trainables: set[str]) -> str:
    digest = hashlib.sha256()
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if name not in trainables and tensor.numel():
            digest.update(name.encode())
            digest.update(_tensor_bytes(tensor))
    return digest.hexdigest()


@contextlib.contextmanager
def _model_as_found(model: nn.Module) -> Iterator[None]:
    """Flags, modes and gradients of the model as the user left them, whatever happens in between."""
    modes = {module: module.training for module in model.modules()}
    flags = {parameter: (parameter.requires_grad, parameter.grad) for parameter in model.parameters()}
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training
        for parameter, (requires_grad, gradient) in flags.items():
            parameter.requires_grad_(requires_grad)
            parameter.grad = gradient


def _evaluate(model: nn.Module, eval_fn: Callable[[nn.Module], Any]) -> dict[str, Any]:
    modes = {module: module.training for module in model.modules()}
    try:
        with global_random_state_kept(), torch.no_grad():
            value = eval_fn(model)
    finally:
        for module, training in modes.items():
            module.training = training
    if isinstance(value, Mapping):
        return {str(name): float(number) for name, number in value.items()}
    return {"eval": float(value)}


class _Progress:
    """A bar on standard error once the run has lasted two seconds: ε spent, speed, time left. Public numbers only."""

    def __init__(self, enabled: bool, done: int, total: int, spent: Callable[[int], float]) -> None:
        self._enabled, self._first, self._total, self._spent = enabled, done, total, spent
        self._start = time.monotonic()
        self._bar: Any = None
        self._task: Any = None

    def update(self, done: int) -> None:
        if not self._enabled or (self._bar is None and time.monotonic() - self._start < 2.0):
            return
        if self._bar is None:
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

            self._bar = Progress(
                TextColumn("private steps"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("epsilon <= {task.fields[epsilon]:.3f}"),
                TextColumn("{task.fields[speed]:.2f} steps/s"),
                TimeRemainingColumn(),
                console=Console(stderr=True),
            )
            self._bar.start()
            self._task = self._bar.add_task("", total=self._total, completed=self._first, epsilon=0.0, speed=0.0)
        speed = (done - self._first) / max(1e-9, time.monotonic() - self._start)
        self._bar.update(self._task, completed=done, epsilon=self._spent(done), speed=speed)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.stop()


def _statement_of_unfinished(store: CheckpointStore) -> PrivacyStatement:
    """What an unfinished run has spent, steps that may have been released since its checkpoint included."""
    state, key, pending = store.load()
    key.erase()
    lost = max((entry.step + 1 - state.step for entry in pending), default=0)
    return _make_statement(state.mechanism, state.step, state.charged_steps + lost)


def _make_statement(mechanism: Mapping[str, Any], steps: int, lost_steps: int) -> PrivacyStatement:
    return PrivacyStatement.create(
        PoissonSampler.from_dict(mechanism["sampler"]),
        noise_multiplier=mechanism["noise_multiplier"],
        prior=[PriorRun.from_dict(run) for run in mechanism["prior"]],
        steps=steps,
        lost_steps=lost_steps,
        **mechanism["statement"],
    )


def _abandon(store: CheckpointStore, output_dir: Path) -> None:
    """Gives up an unfinished run; its spent budget stays in the folder and is composed with whatever follows there."""
    statement = _statement_of_unfinished(store)
    statement.save(output_dir / f"privacy-abandoned-{statement.run_id}.json")
    store.erase()


class _Run:
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
        model = engine.update.model
        named = dict(model.named_parameters(remove_duplicate=False))
        self.trainables = {name: named[name] for name in engine.update.trainable_names}

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


def _settings(optimizer: torch.optim.Optimizer) -> Any:
    """Hyper-parameters of every group, as JSON."""
    tensors: dict[str, torch.Tensor] = {}
    groups = [{name: value for name, value in group.items() if name != "params"} for group in optimizer.param_groups]
    encoded = encode(groups, tensors, "group")
    return json.loads(json.dumps([encoded, {name: tensor.tolist() for name, tensor in tensors.items()}]))


def fit(
    model: nn.Module,
    loss_fn: Callable[[Any, Any], torch.Tensor],
    dataset: MapDataset,
    *,
    target_epsilon: float | None = None,
    target_delta: float | None = None,
    noise_multiplier: float | None = None,
    epochs: float | None = None,
    max_steps: int | None = None,
    expected_batch_size: float = 256,
    physical_batch_size: int | Sequence[int] = 32,
    trainable: str | Sequence[str] = "bias",
    clipping: Clipping | None = None,
    backend: str = "eager",
    optimizer: Callable[[list[nn.Parameter]], torch.optim.Optimizer] | type[torch.optim.Optimizer] | None = None,
    learning_rate: float = 5e-3,
    lr_schedule: Callable[[Any], Any] | None = None,
    eval_fn: Callable[[nn.Module], float | Mapping[str, float]] | None = None,
    collate_fn: Callable[[list[Any]], Any] | None = None,
    padded_lengths: Sequence[int] | Mapping[str, Sequence[int]] | None = None,
    pad_values: Mapping[str, float] | float | None = None,
    example_batch: Any = None,
    dataset_size: int | None = None,
    output_dir: str | os.PathLike[str] | None = None,
    checkpoint_every: int = _CHECKPOINT_EVERY,
    resume: bool = True,
    overwrite: bool = False,
    prior: Prior | Sequence[Prior] = (),
    progress: bool = True,
    callbacks: Sequence[Callable[[StepInfo], None]] = (),
    tuning_covered: bool = False,
    public_declarations: Mapping[str, Any] | None = None,
    public_tensors: bool = False,
    insecure_seed_for_tests: int | None = None,
) -> FitResult:
    """Trains `model` in place with differential privacy, and says what it cost.

    Args:
        model: any nn.Module; only the chosen parameters change. It keeps its modes, flags and class.
        loss_fn: `loss_fn(model, batch) -> Tensor[B]`, one loss per record, or their mean or sum.
        dataset: map-style. An item is a pytree of tensors, arrays, numbers and lists of numbers: one privacy unit.
        target_epsilon, noise_multiplier: exactly one of them. The first solves for the second.
        target_delta: below 1/N. Default: the largest power of ten that is at most 1/(10 N), recorded in privacy.json.
        epochs, max_steps: exactly one of them; a public declaration.
        expected_batch_size: of a Poisson draw, in records; sample_rate is this divided by N. The public denominator.
        physical_batch_size: rows per forward and backward pass: one number, or one per padded length. Memory only.
        trainable, clipping, backend: as in `compile`. Default clipping: AutomaticClipping(1.0).
        optimizer: a class (built with `learning_rate`) or a function of the parameters. Default: Adam.
        lr_schedule: step -> multiplier, or optimizer -> LRScheduler, stepped once per logical step.
        eval_fn: called with the model at the end of every epoch and of the run, without gradients, on data that you
            call **public**: its result is reported as it is.
        collate_fn: called with a list of **one** item.
        padded_lengths: public lengths; dimension 0 of an item is padded to the smallest that holds that item. One tuple
            for all sequences, or a mapping from key to tuple. Records longer than the largest are an error.
        pad_values: by key, or one number. Default 0; -100 for integer sequences called "labels".
        example_batch: **made-up or public** batch, dimension 0 = batch; fixes shapes and dtypes, fills unused rows,
            probes the model. Default: made up from the dtypes and shapes (never values) of the first record.
        dataset_size: the public N. Default: len(dataset), recorded as "N assumed public".
        output_dir: receives biases.safetensors, privacy.json and summary.md; while running, a private checkpoint
            folder.
        checkpoint_every: logical steps between checkpoints. A killed run replays the steps since, bit for bit.
        resume: continue an unfinished run found in output_dir; a changed plan is continued with its lost steps charged.
        overwrite: replace the results of a finished run (its privacy.json is kept beside the new one). With
            resume=False also gives up an unfinished run, whose spent budget is kept in the folder and composed with
            this one.
        prior: privacy.json files or statements of earlier runs on the same records, composed exactly.
        progress: a progress bar once the run has lasted two seconds.
        callbacks: called with a StepInfo after every step.
        tuning_covered: declares that hyper-parameters were not tuned on these records (or that `prior` counts it).
        public_declarations: what else was declared public (a label set, say), kept in privacy.json.
        public_tensors: declares the tensors that `loss_fn` captures to be public; otherwise they are refused.
        insecure_seed_for_tests: a known seed for the draws and the noise: **no privacy at all**.

    Raises:
        PrivacyError, DataError, ArtifactError, CheckpointError, CompileRefused: before any budget is spent wherever the
        cause can be seen by then. Interrupted at any moment, the same call continues from output_dir.
    """
    clipping = AutomaticClipping() if clipping is None else clipping
    if (target_epsilon is None) == (noise_multiplier is None):
        raise PrivacyError("Give either target_epsilon or noise_multiplier, and not both: one follows from the other.")
    if type(checkpoint_every) is not int or checkpoint_every < 1:
        raise PrivacyError(f"checkpoint_every must be a positive number of logical steps; got {checkpoint_every!r}.")
    records = _dataset_length(dataset)
    size = records if dataset_size is None else dataset_size
    sampler = PoissonSampler.from_expected_batch_size(size, expected_batch_size, epochs=epochs, steps=max_steps)
    delta = check_target_delta(_default_delta(size) if target_delta is None else target_delta, size)

    folder = None if output_dir is None else ensure_output_folder(output_dir)
    store = None if folder is None else CheckpointStore(folder / CHECKPOINT)
    if folder is not None and store is not None:
        store.open()
    try:
        if folder is not None and store is not None:
            _check_folder(folder, store, resume=resume, overwrite=overwrite)
            if store.exists and not resume:
                _abandon(store, folder)
                store.open()
            earlier = (prior,) if isinstance(prior, (str, os.PathLike)) or not isinstance(prior, Sequence) else prior
            prior = [*earlier, *sorted(folder.glob(_ABANDONED))]
        runs = resolve_prior(prior)
        sigma = (
            solve_noise_multiplier(sampler, target_epsilon, delta, runs)
            if noise_multiplier is None and target_epsilon is not None
            else noise_multiplier
        )
        assert sigma is not None
        tracker = EpsilonTracker(sampler, sigma, delta, runs)

        with _model_as_found(model):
            engine = build_engine(
                model,
                loss_fn,
                dataset,
                PoissonSampler(records, sampler.sample_rate, sampler.steps),
                sigma,
                sampler.expected_batch_size,
                physical_batch_size=physical_batch_size,
                trainable=trainable,
                clipping=clipping,
                backend=backend,
                public_tensors=public_tensors,
                collate_fn=collate_fn,
                padded_lengths=padded_lengths,
                pad_values=pad_values,
                example_batch=example_batch,
            )
            check_rows(engine.batches)
            named = dict(model.named_parameters(remove_duplicate=False))
            built = _build_optimizer(optimizer, [named[n] for n in engine.update.trainable_names], learning_rate)
            settings = _settings(built)
            set_rates, schedule = _scheduler(lr_schedule, built, sampler.steps)
            seed = insecure_seed_for_tests
            key = SecretKey() if seed is None else SecretKey.insecure_for_tests(seed)
            statement_fields = {
                "run_id": new_run_id(),
                "delta": delta,
                "max_grad_norm": float(engine.update.max_grad_norm),
                "clipping": clipping.kind,
                "gamma": clipping.gamma if isinstance(clipping, AutomaticClipping) else None,
                "graph_hash": _graph_hash(engine.compiled),
                "num_trainable": engine.update.num_trainable,
                "num_parameters": sum(parameter.numel() for parameter in model.parameters()),
                "dataset_size_assumed_public": dataset_size is None,
                "tuning_covered": tuning_covered,
                "insecure": key.insecure,
                "backend": f"pytorch {backend}",
                "public_declarations": {
                    **(public_declarations or {}),
                    "target_epsilon": target_epsilon,
                    "target_delta": "by default, at most 1/(10 N)" if target_delta is None else "declared",
                    "padded_lengths": [
                        f"{leaf.path}: {list(leaf.lengths)}" for leaf in engine.batches.layout.leaves if leaf.lengths
                    ],
                    "example_batch": (
                        "made up from the dtypes and shapes of the first record"
                        if example_batch is None
                        else "given, and public by the caller's word"
                    ),
                },
            }
            run = _Run(
                engine,
                built,
                set_rates,
                tracker,
                key=key,
                # With a target, steps that were lost are steps that are no longer there to take.
                limit=lambda lost: sampler.steps - (lost if target_epsilon is not None else 0),
                mechanism={
                    "sample_rate": sampler.sample_rate,
                    "dataset_size": sampler.dataset_size,
                    "noise_multiplier": sigma,
                    "prior": [run.to_dict() for run in runs],
                    "sampler": sampler.to_dict(),
                    "statement": statement_fields,
                },
                fingerprint={
                    "graphs": [step.graph_hash for step in engine.compiled],
                    "frozen": "" if store is None else _frozen_digest(model, set(engine.update.trainable_names)),
                    "clipping": repr(clipping),
                    "trainables": {name: list(shape) for name, shape in engine.update.trainable_shapes.items()},
                    "optimizer": f"{type(built).__module__}.{type(built).__qualname__}",
                    "optimizer_settings": settings,
                    "schedule": schedule,
                    "backend": backend,
                    "dtype": str(engine.update.dtype),
                    "device": torch.device(engine.update.device).type,
                    "torch": torch.__version__,
                    "threads": torch.get_num_threads(),
                    "layout": [repr(leaf) for leaf in engine.batches.layout.leaves],
                    "physical_batch_size": list(engine.batches.sizes),
                    "insecure": insecure_seed_for_tests is not None,
                },
                store=store,
                checkpoint_every=checkpoint_every,
            )
            if store is not None and store.exists:
                run.restore(*store.load())
            else:
                run.save()
            _train(run, sampler, eval_fn, callbacks, progress)

        statement = _make_statement(run.mechanism, run.step, run.charged)
        if folder is not None and store is not None:
            run.save()
            _write_results(folder, run, statement)
            store.erase()
        run.key.erase()
        return FitResult(model, statement.epsilon, delta, sigma, run.step, run.history, folder, statement, run.charged)
    finally:
        if store is not None:
            store.close()


def _graph_hash(compiled: Sequence[PrivateStep]) -> str:
    """Of the one graph, or of all of them where there is one per padded length."""
    if len(compiled) == 1:
        return compiled[0].graph_hash
    return hashlib.sha256("\n".join(step.graph_hash for step in compiled).encode()).hexdigest()


def _check_folder(folder: Path, store: CheckpointStore, *, resume: bool, overwrite: bool) -> None:
    if store.exists and not store.has_key and (folder / BIASES).exists() and (folder / STATEMENT).exists():
        # Killed while tidying up: the results are complete and the key is gone.
        store.tidy()
    if store.exists:
        if not resume and not overwrite:
            raise CheckpointError(
                f"{str(folder)!r} holds an unfinished run, and resume=False was asked for. Nothing was changed. Leave "
                f"resume=True to continue it, choose another output_dir, or pass overwrite=True to give it up: what "
                f"it has spent is then kept in the folder and counted in this run."
            )
        return
    finished = [name for name in (BIASES, STATEMENT) if (folder / name).exists()]
    if finished and not overwrite:
        raise ArtifactError(
            f"{str(folder)!r} already holds the result of a finished run ({', '.join(finished)}). Nothing was "
            f"changed. Choose another output_dir, or pass overwrite=True; if the records are the same, pass its "
            f"privacy.json as prior=."
        )


def build_engine(
    model: nn.Module,
    loss_fn: Callable[[Any, Any], torch.Tensor],
    dataset: MapDataset,
    sampler: PoissonSampler,
    sigma: float,
    expected_batch_size: float,
    *,
    physical_batch_size: int | Sequence[int] = 32,
    trainable: str | Sequence[str] = "bias",
    clipping: Clipping,
    backend: str = "eager",
    public_tensors: bool = False,
    collate_fn: Callable[[list[Any]], Any] | None = None,
    padded_lengths: Any = None,
    pad_values: Mapping[str, float] | float | None = None,
    example_batch: Any = None,
) -> Engine:
    """One step compiled per padded length, and the batches for them: everything of `fit` that touches a gradient.

    `sampler` draws over the records that are really there; the other arguments are those of `fit`.
    """
    # Through the package, so that importing the submodule does not leave `dpbitfit_fx.compile` bound to a module.
    compile_step: Callable[..., PrivateStep] = dpbitfit_fx.__getattr__("compile")
    if example_batch is None:
        with global_random_state_kept():
            template = load_item(dataset, collate_fn, 0)
    else:
        template = example_batch
    layout = ItemLayout.build(template, padded_lengths, pad_values, is_example=example_batch is not None)
    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    selection = trainable if isinstance(trainable, str) else list(trainable)
    examples = [layout.example_batch(bucket) for bucket in range(layout.buckets)]
    steps = [
        compile_step(
            model,
            loss_fn,
            layout.on_device(example, device),
            trainable=selection,
            clipping=clipping,
            backend=backend,
            public_tensors=public_tensors,
        )
        for example in examples
    ]
    steps[0] = steps[0].with_noise(sigma, expected_batch_size)
    batches = PhysicalBatches(
        dataset,
        layout,
        physical_batch_size,
        collate_fn=collate_fn,
        dummies=examples,
        mask_dtype=steps[0].dtype,
        device=device,
    )
    return Engine(steps, batches, sampler)


def _train(
    run: _Run,
    sampler: PoissonSampler,
    eval_fn: Callable[[nn.Module], Any] | None,
    callbacks: Sequence[Callable[[StepInfo], None]],
    progress: bool,
) -> None:
    per_epoch = max(1, round(1 / sampler.sample_rate))
    model = run.engine.update.model

    def spent(step: int) -> float:
        return run.tracker.at(step, run.charged)

    bar = _Progress(progress, run.step, run.limit(run.charged), spent)
    try:
        while not run.finished:
            before = run.step
            run.advance()
            if run.step == before:  # charged: the same step again, under a new key
                continue
            done = run.step
            if eval_fn is not None and (done % per_epoch == 0 or run.finished):
                entry = {"step": done, "epoch": done * sampler.sample_rate, "epsilon": spent(done)}
                run.history.append(entry | _evaluate(model, eval_fn))
            rate = float(run.optimizer.param_groups[0]["lr"])
            for callback in callbacks:
                callback(StepInfo(done, run.limit(run.charged), rate, partial(spent, done)))
            bar.update(done)
            if done % run.checkpoint_every == 0 and not run.finished:
                run.save()
    except KeyboardInterrupt:
        saved = "" if run.store is None else " Running the same call again continues, at no extra cost."
        raise KeyboardInterrupt(f"Interrupted after {run.step} private steps.{saved}") from None
    finally:
        bar.close()


def _write_results(folder: Path, run: _Run, statement: PrivacyStatement) -> None:
    """All three files; the checkpoint is still there, so that a full disk here loses nothing."""
    old = folder / STATEMENT
    if old.exists():
        kept = read_bytes(old)
        atomic_write_bytes(folder / f"privacy-earlier-{hashlib.sha256(kept).hexdigest()[:12]}.json", kept)
    statement.save(old)
    atomic_write_text(folder / SUMMARY, statement.summary())
    model = run.engine.update.model
    metadata = {
        MODEL_FINGERPRINT: model_fingerprint(model),
        FROZEN_FINGERPRINT: frozen_weights_fingerprint(model, run.trainables),
        "graph_hash": statement.graph_hash,
        "run_id": statement.run_id,
    }
    save_biases(folder / BIASES, {name: p.detach() for name, p in run.trainables.items()}, metadata)
