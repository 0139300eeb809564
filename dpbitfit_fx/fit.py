"""`fit`: differentially private training of a compiled step, from Poisson draws to the privacy statement.

Formal guarantee: the sequence of parameter values that `fit` releases (to callbacks, `eval_fn`, the model and the
output folder) is (ε, δ)-differentially private for adding or removing one record, with the ε that the accountant
derives from the very sampler object that drew the batches, under the caveats that privacy.json lists.
"""

from __future__ import annotations

import contextlib
import math
import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dpbitfit_fx.accounting import (
    Prior,
    PriorRun,
    check_target_delta,
    epsilon_of_phases,
    format_epsilon,
    resolve_prior,
    solve_noise_multiplier,
    warn_of_extremes,
)
from dpbitfit_fx.arguments import check_arguments, device_of, names_in
from dpbitfit_fx.averaging import check_average_from
from dpbitfit_fx.batching import MapDataset, check_rows, global_random_state_kept
from dpbitfit_fx.biases import fingerprints, save_biases
from dpbitfit_fx.checkpoint import CheckpointStore
from dpbitfit_fx.engine import Engine, build_engine, graph_hashes
from dpbitfit_fx.errors import CompileRefused, DataError, DPBitFitError, PrivacyError, PrivacyWarning
from dpbitfit_fx.files import ensure_output_folder
from dpbitfit_fx.ledger import Ledger
from dpbitfit_fx.lowering import check_lowering
from dpbitfit_fx.optimizing import build_optimizer, build_schedule, optimizer_settings
from dpbitfit_fx.output_folder import BIASES, CHECKPOINT, naming_statements, settle, statements_in, write_statement
from dpbitfit_fx.passes import bias_slots
from dpbitfit_fx.passes.clipping import AutomaticClipping, Clipping
from dpbitfit_fx.passes.frozen_prefix import NothingFrozen
from dpbitfit_fx.passes.numerics import NOISES
from dpbitfit_fx.phases import Phase, joined_hash, naming_phase, plan_phases
from dpbitfit_fx.privacy_statement import PrivacyStatement, base_id, library_versions, mechanism_ids, new_run_id
from dpbitfit_fx.progress import Progress, StepInfo
from dpbitfit_fx.randomness import SecretKey
from dpbitfit_fx.ranks import Ranks, records_digest, together
from dpbitfit_fx.records import check_distinct, warn_of_earlier_runs
from dpbitfit_fx.run_account import RunAccount
from dpbitfit_fx.sampling import PoissonSampler
from dpbitfit_fx.sharding import FrozenShards, check_sharding, make_whole, parts_of, refuse_parts
from dpbitfit_fx.training_run import Stage, TrainingRun, frozen_digest

__all__ = ["Engine", "FitResult", "StepInfo", "build_engine", "fit"]

_CHECKPOINT_EVERY = 50


@dataclass(frozen=True)
class FitResult:
    """The trained model (the very object that was passed in) and what it cost.

    epsilon, delta: spent, lost steps and earlier runs included. steps: logical steps whose result is in the model.
    charged_steps: steps lost to interruptions that could not be replayed, paid for on top. history: one entry per
    evaluation: step, epoch, epsilon (an upper bound) and what `eval_fn` returned.
    """

    model: nn.Module = field(repr=False)
    epsilon: float
    delta: float
    noise_multiplier: float
    steps: int
    history: list[dict[str, Any]]
    output_dir: Path | None
    statement: PrivacyStatement = field(repr=False)
    charged_steps: int = 0


@together
def fit(
    ranks: Ranks,
    model: nn.Module,
    loss_fn: Callable[[Any, Any], torch.Tensor],
    dataset: MapDataset,
    *,
    target_epsilon: float | None = None,
    target_delta: float | None = None,
    noise_multiplier: float | None = None,
    epochs: float | None = None,
    max_steps: int | None = None,
    phases: Sequence[Phase] | None = None,
    expected_batch_size: float = 256,
    physical_batch_size: int | Sequence[int] = 32,
    parallel_batches: int = 1,
    trainable: str | Sequence[str] = "bias",
    exclude: str | Sequence[str] = (),
    add_bias: bool = False,
    dropout: bool = False,
    clipping: Clipping | None = None,
    backend: str = "eager",
    precision: str = "float32",
    noise: str = "float",
    memory_budget: float = 1.0,
    disable: str | Sequence[str] = (),
    cache_frozen_prefix: bool = False,
    shard_frozen: bool = False,
    optimizer: Callable[[list[nn.Parameter]], torch.optim.Optimizer] | type[torch.optim.Optimizer] | None = None,
    learning_rate: float = 5e-3,
    lr_schedule: Callable[[Any], Any] | None = None,
    average_from: float | None = None,
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
    ledger: Ledger | str | os.PathLike[str] | None = None,
    progress: bool = True,
    callbacks: Sequence[Callable[[StepInfo], None]] = (),
    tuning_covered: bool = False,
    public_declarations: Mapping[str, Any] | None = None,
    public_tensors: bool = False,
    insecure_seed_for_tests: int | None = None,
) -> FitResult:
    """Trains `model` in place with differential privacy, and says what it cost.

    Called in every process of an initialised default group of torch.distributed (`torchrun`), it is one run of them all, the
    same as one process's to float rounding. Rank 0 alone has the key, adds noise, steps the optimizer, reads and writes files,
    spends, and calls `eval_fn` and callbacks; its parameters go to all, and all return its result. The others compute their
    share of each step's records, so model, records and arguments have to be the same everywhere; the group's timeout has to be
    longer than an evaluation. Whatever stops one process stops all.

    Args:
        model: any nn.Module; only the chosen parameters change. It keeps its modes, flags and class.
        loss_fn: `loss_fn(model, batch) -> Tensor[B]`, one loss per record, or their mean or sum.
        dataset: map-style. An item is a pytree of tensors, arrays, numbers and lists of numbers: one privacy unit.
        target_epsilon, noise_multiplier: exactly one of them. The first solves for the second.
        target_delta: below 1/N. Default: the largest power of ten that is at most 1/(10 N), recorded in privacy.json.
        epochs, max_steps: exactly one of them; a public declaration. With `phases`, neither.
        phases: train in phases, one after the other, under one noise multiplier and one ε: X+BiTFiT is
            `[Phase(trainable="all", epochs=1), Phase(trainable="bias", epochs=2)]`. What a Phase leaves out is taken
            from these arguments. biases.safetensors then holds every parameter that any phase trained.
        expected_batch_size: of a Poisson draw, in records; sample_rate is this divided by N. The public denominator.
        physical_batch_size: rows per forward and backward pass: one number, or one per padded length. Memory only.
        parallel_batches: physical batches computed at once, each on its share of torch's threads: faster where they are small
            (CPU and backend="eager" only), for the memory of so many. Sums are the same but for rounding.
        trainable, exclude, add_bias, clipping, backend, precision, memory_budget, disable: as in `compile`. Default clipping:
            AutomaticClipping(1.0).
            Each phase trains the added biases that its `trainable` covers, and adds the others as they are.
            With add_bias=True the model has the added biases from the first step on, as `load_biases` would give them
            to it: `eval_fn` and callbacks see them, and it comes back with them.
        dropout: leave dropout on in the modules that are in train mode, as in `compile`. The mask of a record in a step
            depends on the run's secret key, the step and the record's number alone. `eval_fn` sees the model in eval mode.
        noise: "float", or "grid" for a guarantee that holds to the letter in floating point: clipped gradients are rounded to
            a grid on which sums are exact, and the noise is a normal rounded to it, sampled exactly (docs/threat-model.md,
            Numerics). Needs memory for every record's gradient in float64 (no ghost norms), so it is for biases and heads.
        cache_frozen_prefix: what no trained parameter reaches (the first blocks of the model, with
            `exclude=["*layer.[0-3].*"]` or so) is computed once for each record, before the first step, and kept in memory;
            a step then runs the other blocks alone. For datasets that give the same record at every load. Not with dropout or
            noise="grid". The same gradients up to rounding; nothing of it is written or exported.
        shard_frozen: less memory in each process: while it trains, each keeps 1/N of every large frozen weight
            and gathers it whole before it is read, the same bits. Nothing in a single process. The model has to fit while it is
            compiled, and comes back whole; meanwhile it shows DTensors, and only `eval_fn` gets a whole one. After an error
            it is left sharded, and the same call takes it. For backend="eager" in float32.
        optimizer: a class (built with `learning_rate`) or a function of the parameters. Default: Adam.
        lr_schedule: step -> multiplier, or optimizer -> LRScheduler, stepped once per logical step.
        average_from: the trained model is the mean of the parameters after each step beyond this share of the run (of
            its last phase), which costs no budget: 0.5 averages over the second half. `eval_fn` sees the mean so far;
            training, callbacks and checkpoints go on from the parameters themselves. None: the last ones.
        eval_fn: called with the model at the end of every epoch, of every phase and of the run, without gradients, on
            data that you call **public**: its result is reported as it is.
        collate_fn: called with a list of **one** item.
        padded_lengths: public lengths; dimension 0 of an item is padded to the smallest that holds that item. One tuple
            for all sequences, or a mapping from key to tuple. Records longer than the largest are an error. One graph
            serves all lengths where the model allows it; else there is one per length, and a warning says why.
        pad_values: by key, or one number. Default 0; -100 for integer sequences called "labels".
        example_batch: **made-up or public** batch, dimension 0 = batch; fixes shapes and dtypes, fills unused rows,
            probes the model. Default: made up from the dtypes and shapes (never values) of the first record.
        dataset_size: the public N. Default: len(dataset), recorded as "N assumed public".
        output_dir: receives biases.safetensors, privacy.json and summary.md; while running, a private checkpoint
            folder.
        checkpoint_every: logical steps between checkpoints. A killed run replays the steps since, bit for bit.
        resume: continue an unfinished run found in output_dir; a changed plan is continued with its lost steps charged.
        overwrite: replace the results of a finished run. Its privacy.json is kept beside the new one and composed with
            this run, which is taken to be on the same records. With resume=False also gives up an unfinished run, whose
            spent budget is kept in the folder and composed with this one.
        prior: privacy.json files or statements of earlier runs on the same records, composed exactly.
        ledger: the dataset's ledger (`dpbitfit ledger init`). The run is charged there with all its planned steps before
            the first, and with what it really took at the end; one that would exceed the dataset's budget does not start.
            The ledger counts every run once, those in `prior` too; ε here is still of this run and `prior`.
        progress: a progress bar once the run has lasted two seconds.
        callbacks: called with a StepInfo after every step.
        tuning_covered: declares that hyper-parameters were not tuned on these records (or that `prior` counts it).
        public_declarations: what else was declared public (a label set, say), kept in privacy.json.
        public_tensors: declares the tensors that `loss_fn` captures to be public; otherwise they are refused.
        insecure_seed_for_tests: a known seed for the draws and the noise: **no privacy at all**.

    Raises:
        PrivacyError, DataError, ArtifactError, CheckpointError, CompileRefused: before any budget is spent wherever the
        cause can be seen by then. Interrupted at any moment, the same call continues from output_dir.
        RankError: another process stopped, died or disagrees.
    """
    if (target_epsilon is None) == (noise_multiplier is None):
        raise PrivacyError("Give either target_epsilon or noise_multiplier, and not both: one follows from the other.")
    if type(checkpoint_every) is not int or checkpoint_every < 1:
        raise PrivacyError(f"checkpoint_every must be a positive number of logical steps; got {checkpoint_every!r}.")
    if noise not in NOISES:
        raise PrivacyError(f"Unknown noise {noise!r}; choose one of {', '.join(NOISES)}.")
    average_from = check_average_from(average_from)
    check_arguments(model, loss_fn, clipping)
    trainable = trainable if isinstance(trainable, str) else names_in(trainable, "trainable")
    exclude, disable = names_in(exclude, "exclude"), names_in(disable, "disable")
    check_lowering(backend, disable, precision, memory_budget, device_of(model))
    if callable(callbacks) or not all(map(callable, callbacks)):
        raise CompileRefused("callbacks is to be a list of functions that take a StepInfo.")
    check_sharding(shard_frozen, backend, precision, parallel_batches, cache_frozen_prefix)
    account = RunAccount(ledger if ranks.first else None)
    records = _dataset_length(dataset)
    check_distinct(dataset)
    size = records if dataset_size is None else dataset_size
    clipping = AutomaticClipping() if clipping is None else clipping
    whole = Phase(
        trainable=trainable,
        exclude=exclude,
        epochs=epochs,
        max_steps=max_steps,
        expected_batch_size=expected_batch_size,
        clipping=clipping,
        optimizer=optimizer,
        learning_rate=learning_rate,
        lr_schedule=lr_schedule,
    )
    plan = plan_phases(phases, whole)
    samplers = [_sampler(phase, size, index, len(plan)) for index, phase in enumerate(plan)]
    delta = check_target_delta(_default_delta(size) if target_delta is None else target_delta, size)

    folder = None if output_dir is None or not ranks.first else ensure_output_folder(output_dir)
    store = None if folder is None else CheckpointStore(folder / CHECKPOINT)
    found: dict[str, PrivacyStatement] = {}
    if folder is not None and store is not None:
        store.open()
    try:
        if folder is not None and store is not None:
            settle(folder, store, resume=resume, overwrite=overwrite)
            earlier = (prior,) if isinstance(prior, (str, os.PathLike)) or not isinstance(prior, Sequence) else prior
            found = statements_in(folder, store)
            account.settle_given_up(folder, found.values(), store.run_id if store.exists else None)
            prior = [*earlier, *found.values()]
        sigma = noise_multiplier
        if ranks.first:
            runs = resolve_prior(prior)
            if sigma is None:
                assert target_epsilon is not None
                with naming_statements(folder, found):
                    sigma = solve_noise_multiplier(samplers, target_epsilon, delta, runs)
            # Asked for once before anything is trained: it also tells whether the noise suffices for a finite epsilon.
            planned_epsilon = epsilon_of_phases([(sampler, sampler.steps) for sampler in samplers], sigma, delta, runs)
            warn_of_extremes(planned_epsilon, sigma, samplers)
            run_id = new_run_id()
            own = store.run_id if store is not None and store.exists else run_id
            planned = [
                PriorRun(name, sampler.sample_rate, sigma, sampler.steps)
                for name, sampler in zip(mechanism_ids(own, len(plan)), samplers, strict=True)
            ]
            account.check(planned, dataset_size=size, run_delta=delta, prior=runs)
        sigma, shard_frozen = ranks.settle([sigma, shard_frozen and ranks.several])
        if shard_frozen:
            check_sharding(True, backend, precision, parallel_batches, cache_frozen_prefix)  # where rank 0 alone was asked to
            ranks.compare(lambda: {"the frozen weights": parts_of(model)})
            ranks.at_once(lambda: make_whole(model))
            ranks.settle(None)
        else:
            refuse_parts(model)

        with _model_as_found(model), contextlib.ExitStack() as undo:

            def engine_of(index: int) -> Engine:
                phase, sampler = plan[index], samplers[index]
                assert phase.trainable is not None and phase.exclude is not None and phase.clipping is not None
                with naming_phase(index, len(plan)):
                    return build_engine(
                        model,
                        loss_fn,
                        dataset,
                        PoissonSampler(records, sampler.sample_rate, sampler.steps),
                        sigma,
                        sampler.expected_batch_size,
                        physical_batch_size=physical_batch_size,
                        parallel_batches=parallel_batches,
                        trainable=phase.trainable,
                        exclude=phase.exclude,
                        add_bias=add_bias,
                        dropout=dropout,
                        clipping=phase.clipping,
                        backend=backend,
                        precision=precision,
                        noise=noise,
                        memory_budget=memory_budget,
                        cache_frozen_prefix=cache_frozen_prefix,
                        disable=(*disable, "packed_weights") if shard_frozen else disable,
                        public_tensors=public_tensors,
                        collate_fn=collate_fn,
                        padded_lengths=padded_lengths,
                        pad_values=pad_values,
                        example_batch=example_batch,
                    )

            if add_bias and len(plan) > 1:
                # A phase that does not train an added bias must still add it. So each is put onto the model first, by
                # the phase that asks for it, and every phase's graph is that of the model with all of them.
                for index in range(len(plan)):
                    undo.callback(bias_slots.detach, model, engine_of(index).update.apply_added_biases())
            stages: list[Stage] = []
            for index, phase in enumerate(plan):
                engine = engine_of(index)
                with naming_phase(index, len(plan)):
                    if not stages:
                        check_rows(engine.batches)
                    if engine.prefix is not None:
                        engine.prefix.show = progress and ranks.first
                    stages.append(_stage(phase, engine, samplers[index]))
            if cache_frozen_prefix and all(stage.engine.prefix is None for stage in stages):
                raise NothingFrozen
            first, last = stages[0].engine, stages[-1].record
            trained = {name: p for stage in stages for name, p in stage.engine.update.parameters().items()}
            fingerprint = {
                "frozen": "" if store is None and not ranks.several else frozen_digest(model, set(trained)),
                "backend": backend,
                "precision": precision,
                "noise": noise,
                "torch": torch.__version__,
                "threads": torch.get_num_threads(),
                "layout": [repr(leaf) for leaf in first.batches.layout.leaves],
                "physical_batch_size": list(first.batches.sizes),
                "parallel_batches": parallel_batches,
                "insecure": insecure_seed_for_tests is not None,
                **({"cache_frozen_prefix": True} if cache_frozen_prefix else {}),
                **({"shard_frozen": True} if shard_frozen else {}),  # other bits than those of packed weights
                **({"disable": disable} if disable else {}),
            }
            asked = [target_epsilon, noise_multiplier, delta]

            def begin() -> None:
                first.update.apply_added_biases()
                undo.pop_all()

            fingerprint |= ranks.compare(lambda: _described(stages, asked, fingerprint))
            if shard_frozen:
                shards = ranks.at_once(lambda: _sharded(ranks, model, stages, trained))
                ranks.at_once(shards.free)  # no rank's weights before every rank's checks
            if not ranks.first:
                told = ranks.help([stage.engine for stage in stages], trained, begin)
                return _told(told, model, sigma)
            seed = insecure_seed_for_tests
            key = SecretKey() if seed is None else SecretKey.insecure_for_tests(seed)
            dropped = any(step.dropout for stage in stages for step in stage.engine.compiled)
            statement_fields = {
                "run_id": run_id,
                "delta": delta,
                "max_grad_norm": last["max_grad_norm"],
                "clipping": last["clipping"],
                "gamma": last["gamma"],
                "graph_hash": joined_hash([stage.record["graph_hash"] for stage in stages]),
                "num_trainable": sum(parameter.numel() for parameter in trained.values()),
                "num_parameters": sum(p.numel() for p in {*model.parameters(), *trained.values()}),
                "dataset_size_assumed_public": dataset_size is None,
                "tuning_covered": tuning_covered,
                "noise": noise,
                "insecure": key.insecure,
                "backend": f"pytorch {backend}"
                + ("" if precision == "float32" else f", {precision}")
                + (f", {ranks.count} ranks" if ranks.several else ""),
                "public_declarations": {
                    **(public_declarations or {}),
                    "target_epsilon": target_epsilon,
                    "target_delta": "by default, at most 1/(10 N)" if target_delta is None else "declared",
                    **({"dropout": "on: masks drawn by the host for each record and step"} if dropped else {}),
                    "padded_lengths": [
                        f"{leaf.path}: {list(leaf.lengths)}" for leaf in first.batches.layout.leaves if leaf.lengths
                    ],
                    "example_batch": (
                        "made up from the dtypes and shapes of the first record"
                        if example_batch is None
                        else "given, and public by the caller's word"
                    ),
                },
            }
            run = TrainingRun(
                stages,
                key=key,
                mechanism={
                    "dataset_size": samplers[0].dataset_size,
                    "noise_multiplier": sigma,
                    "prior": [run.to_dict() for run in runs],
                    # With a target, steps that were lost are steps that are no longer there to take.
                    "shortened": target_epsilon is not None,
                    "statement": statement_fields,
                },
                fingerprint=fingerprint,
                store=store,
                checkpoint_every=checkpoint_every,
                account=account,
                ranks=ranks,
                average_from=average_from,
            )
            resumed = store is not None and store.exists
            if store is not None and resumed:
                run.restore(*store.load())
            else:
                run.save()
            with account.spending(run.statement_so_far):
                try:
                    run.reserve()
                except DPBitFitError:
                    if store is not None and not resumed:
                        store.erase()  # nothing was begun
                    raise
                own = run.mechanism["statement"]["run_id"]
                warn_of_earlier_runs(dataset, own, {base_id(run.run_id) for run in runs})
                begin()
                _train(run, model, eval_fn, callbacks, progress)
                if ranks.shards is not None:
                    run.save()  # a rank that goes now costs no step
                    ranks.give_back()

        run.save()
        statement = run.statement()
        try:
            statement = account.settle(statement)
        except DPBitFitError as error:
            if store is not None:
                raise  # the checkpoint is whole: the same call settles and writes the results
            account.warn_of(error)
        if run.average is not None:
            run.average.apply()  # after the last checkpoint, which holds the parameters themselves
        if folder is not None and store is not None:
            _write_results(folder, run, model, statement)
            store.erase()
        run.key.erase()
        lost = sum(run.ledger.charged)
        result = FitResult(model, statement.epsilon, delta, sigma, run.step, run.history, folder, statement, lost)
        ranks.finish(_telling(result), run.trainables)
        return result
    finally:
        if store is not None:
            store.close()


def _sharded(
    ranks: Ranks, model: nn.Module, stages: Sequence[Stage], trained: Mapping[str, nn.Parameter]
) -> FrozenShards:
    """The large frozen weights as shards, which from now on every step gathers; the whole ones are still there."""
    ranks.shards = shards = FrozenShards(model, trained.values())
    shards.check()
    for stage in stages:
        stage.engine.shard(shards)
    return shards


def _described(stages: Sequence[Stage], asked: Sequence[Any], fingerprint: Mapping[str, Any]) -> dict[str, Any]:
    """What has to be the same on every rank, by the name that an error gives it; values of JSON."""
    batches = stages[0].engine.batches
    return {
        "the versions of the packages": library_versions(),
        "the privacy plan": [*asked, [[stage.sampler.to_dict(), stage.record] for stage in stages]],
        "the compiled step and its optimizer": [stage.fingerprint for stage in stages],
        "the shapes and the backend": [
            fingerprint.get(n) for n in ("backend", "precision", "disable", "layout", "physical_batch_size")
        ],
        "the frozen weights": fingerprint["frozen"],
        "the number of records": len(batches.dataset),
        "the records": records_digest(batches),
    }


def _telling(result: FitResult) -> dict[str, Any]:
    """What the other ranks are told of rank 0's result, as JSON."""
    told = {name: getattr(result, name) for name in ("steps", "history", "charged_steps")}
    folder = None if result.output_dir is None else str(result.output_dir)
    return told | {"statement": result.statement.to_json(), "output_dir": folder}


def _told(content: dict[str, Any], model: nn.Module, sigma: float) -> FitResult:
    """The same result, of the model as this rank has it."""
    statement = PrivacyStatement.from_json(content.pop("statement"))
    folder = content.pop("output_dir")
    where = None if folder is None else Path(folder)
    return FitResult(model, statement.epsilon, statement.delta, sigma, output_dir=where, statement=statement, **content)


def _sampler(phase: Phase, size: int, index: int, count: int) -> PoissonSampler:
    assert phase.expected_batch_size is not None
    with naming_phase(index, count):
        return PoissonSampler.from_expected_batch_size(
            size, phase.expected_batch_size, epochs=phase.epochs, steps=phase.max_steps
        )


def _stage(phase: Phase, engine: Engine, sampler: PoissonSampler) -> Stage:
    """The phase with its optimizer and schedule tried out, so that what is wrong with them shows before step 0."""
    parameters, clipping, asked = list(engine.update.parameters().values()), phase.clipping, phase.trainable
    rate = phase.learning_rate
    assert clipping is not None and asked is not None and rate is not None

    def begin() -> tuple[torch.optim.Optimizer, Callable[[int], None]]:
        optimizer = build_optimizer(phase.optimizer, parameters, rate)
        return optimizer, build_schedule(phase.lr_schedule, optimizer, sampler.steps)[0]

    tried = build_optimizer(phase.optimizer, parameters, rate)
    settings = optimizer_settings(tried)
    _, schedule = build_schedule(phase.lr_schedule, tried, sampler.steps)
    hashes = graph_hashes(engine.compiled)
    return Stage(
        engine,
        sampler,
        begin,
        record={
            "trainable": asked if isinstance(asked, str) else list(asked),
            "num_trainable": engine.update.num_trainable,
            "max_grad_norm": float(engine.update.max_grad_norm),
            "clipping": clipping.kind,
            "gamma": clipping.gamma if isinstance(clipping, AutomaticClipping) else None,
            "graph_hash": joined_hash(hashes),
        },
        fingerprint={
            "graphs": hashes,
            "clipping": repr(clipping),
            "trainables": [[name, list(shape)] for name, shape in engine.update.trainable_shapes.items()],
            "optimizer": f"{type(tried).__module__}.{type(tried).__qualname__}",
            "optimizer_settings": settings,
            "schedule": schedule,
            "dtype": str(engine.update.dtype),
            "device": torch.device(engine.update.device).type,
        },
    )


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
        for parameter in model.parameters():
            if parameter not in flags:  # an added bias
                parameter.grad = None


def _train(
    run: TrainingRun,
    model: nn.Module,
    eval_fn: Callable[[nn.Module], Any] | None,
    callbacks: Sequence[Callable[[StepInfo], None]],
    progress: bool,
) -> None:
    bar = Progress(progress, run.step, run.ledger.total)
    try:
        while not run.finished:
            before = run.step
            run.advance()
            if run.step == before:  # charged: the same step again, under a new key
                continue
            done, spent = run.step, run.spent()
            if eval_fn is not None and (run.steps_in_phase % run.stage.per_epoch == 0 or run.phase_finished):
                entry = {"step": done, "epoch": run.epochs, "epsilon": spent()}
                where = {"phase": run.phase} if len(run.stages) > 1 else {}
                with run.averaged(), run.ranks.whole():
                    run.history.append(entry | where | _evaluate(model, eval_fn))
            rate = float(run.optimizer.param_groups[0]["lr"])
            for callback in callbacks:
                callback(StepInfo(done, run.ledger.total, rate, spent, run.phase))
            bar.update(done, spent)
            if done % run.checkpoint_every == 0 and not run.finished:
                run.save()
    except KeyboardInterrupt:
        raise _interrupted(run) from None
    except Exception:
        if run.store is None and run.begun:
            warnings.warn(_spent(run.statement_so_far()) + _NOT_SAVED, PrivacyWarning, stacklevel=4)
        raise
    finally:
        bar.close()


def _interrupted(run: TrainingRun) -> KeyboardInterrupt:
    """Says what was spent, and carries it as `statement`, which a later run takes as prior=."""
    spent = run.statement_so_far()
    if run.store is not None:
        rest = " Running the same call again continues, at no extra cost."
    else:
        rest = _NOT_SAVED + " It is this exception's .statement, which a later run on these records takes as prior=."
    interrupt = KeyboardInterrupt("Interrupted: " + _spent(spent) + rest)
    interrupt.statement = spent  # type: ignore[attr-defined]
    return interrupt


_NOT_SAVED = " Nothing was saved (no output_dir). That much is spent if the model, or anything that was seen of the run, is kept."


def _spent(statement: PrivacyStatement) -> str:
    lost = f" and {statement.lost_steps} more charged" if statement.lost_steps else ""
    epsilon = format_epsilon(statement.epsilon)
    return f"{statement.steps} private steps were taken{lost}, epsilon = {epsilon} at delta = {statement.delta:g}."


def _evaluate(model: nn.Module, eval_fn: Callable[[nn.Module], Any]) -> dict[str, Any]:
    modes = {module: module.training for module in model.modules()}
    try:
        model.eval()
        with global_random_state_kept(), torch.no_grad():
            value = eval_fn(model)
    finally:
        for module, training in modes.items():
            module.training = training
    if isinstance(value, Mapping):
        return {str(name): float(number) for name, number in value.items()}
    return {"eval": float(value)}


def _write_results(folder: Path, run: TrainingRun, model: nn.Module, statement: PrivacyStatement) -> None:
    """All three files; the checkpoint is still there, so that a full disk here loses nothing."""
    write_statement(folder, statement)
    # Of an earlier run too, so each phase may know of others.
    added = list({bias.name: bias for stage in run.stages for bias in stage.engine.update.added_biases}.values())
    metadata = {
        **fingerprints(model, added, run.trainables),
        "graph_hash": statement.graph_hash,
        "run_id": statement.run_id,
    }
    save_biases(folder / BIASES, {name: p.detach() for name, p in run.trainables.items()}, metadata)
