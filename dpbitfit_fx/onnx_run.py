"""``export_run``: a whole private run, of one phase or several, as plain ONNX graphs that the runner without torch trains from.

``grad_step_<i>.onnx``    batch..., sample_mask[B], theta[D_i], held[H_i], accumulator[D_i] -> accumulator_out[D_i]
``update_step_<i>.onnx``  theta, (m, v, t,) accumulator, noise[D_i], learning_rate[D_i] -> theta_out, (m_out, v_out, t_out)
``eval_model.onnx``       batch... and every parameter that any phase trains -> what ``eval_output`` returns

What ``fit`` is told as Python (optimizers, schedules), the manifest holds as numbers. A parameter that any phase trains is an
input of every phase's graph: of its own phase in theta, of the others in held, so that each phase takes what the ones before
it trained. One graph takes all padded lengths; a model that has none gets ``grad_step_<i>_<length>.onnx`` for each.
"""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import dpbitfit_fx
from dpbitfit_fx.accounting import (
    Prior,
    check_target_delta,
    epsilon_of_phases,
    resolve_prior,
    solve_noise_multiplier,
    warn_of_extremes,
)
from dpbitfit_fx.batching import ItemLayout
from dpbitfit_fx.biases import fingerprints
from dpbitfit_fx.engine import graph_hashes, one_for_every_length
from dpbitfit_fx.errors import ExportError, PrivacyError
from dpbitfit_fx.export_folder import write_folder
from dpbitfit_fx.onnx_export import (
    Layout,
    Optimizer,
    export_core,
    export_update,
    layout_of,
    live_parameters,
    phase_entries,
    placed,
    plain_gradient_model,
    plan_metadata,
    prepare,
    resolve_optimizer,
    run_entries,
    save_initial,
)
from dpbitfit_fx.onnx_quantize import FrozenWeights, check_bits, in_torch
from dpbitfit_fx.onnx_weights import save_models
from dpbitfit_fx.ort_plan import Schedule, rates_by_parameter
from dpbitfit_fx.passes.clipping import AutomaticClipping, Clipping
from dpbitfit_fx.passes.joint_graph import Role
from dpbitfit_fx.passes.torch_private import leaf_names
from dpbitfit_fx.phases import joined_hash, naming_phase
from dpbitfit_fx.sampling import PoissonSampler

__all__ = ["RunPhase", "export_run"]


@dataclass(frozen=True)
class RunPhase:
    """One phase of an exported run: ``Phase`` in numbers. Exactly one of `epochs` and `max_steps`.

    optimizer: as in ``export_onnx``. learning_rates: by name pattern, of which the first that matches a parameter counts;
    default: the optimizer's for all. Each phase has a new optimizer, and its schedule starts at step 0.
    """

    trainable: str | Sequence[str] = "bias"
    exclude: str | Sequence[str] = ()
    epochs: float | None = None
    max_steps: int | None = None
    expected_batch_size: float = 256
    clipping: Clipping = AutomaticClipping()  # noqa: RUF009 - frozen
    optimizer: str | Optimizer = "adamw"
    learning_rates: Mapping[str, float] | None = None
    schedule: Schedule = Schedule()  # noqa: RUF009 - frozen


@dataclass(frozen=True)
class _Ready:
    """A compiled phase (one step for all padded lengths, or one each), its names in the graphs, its files, and its plan."""

    phase: RunPhase
    steps: tuple[Any, ...]
    layout: Layout
    optimizer: Optimizer
    sampler: PoissonSampler
    gradients: tuple[str, ...]
    update: str

    @property
    def step(self) -> Any:
        return self.steps[-1]

    @property
    def rates(self) -> tuple[tuple[str, float], ...]:
        given = {"*": self.optimizer.lr} if self.phase.learning_rates is None else self.phase.learning_rates
        return tuple((str(pattern), float(rate)) for pattern, rate in given.items())


def export_run(
    model: torch.nn.Module,
    loss_fn: Callable[[Any, Any], torch.Tensor],
    example_batch: Any,
    path: str | os.PathLike[str],
    *,
    phases: Sequence[RunPhase],
    dataset_size: int,
    target_delta: float,
    target_epsilon: float | None = None,
    noise_multiplier: float | None = None,
    prior: Prior | Sequence[Prior] = (),
    padded_lengths: Sequence[int] | Mapping[str, Sequence[int]] | None = None,
    eval_output: Callable[[Any, Any], Any] | None = None,
    public_tensors: bool = False,
    weight_bits: int | None = None,
    overwrite: bool = False,
    tolerance: float = 1e-5,
) -> Path:
    """Write a run that ``fit(model, loss_fn, ..., phases=...)`` would do to the folder ``path``, for ``OrtTrainer`` and
    ``dpbitfit ort-train``, which need no torch.

    Args:
        model: its parameters' values are where training starts, and are public.
        example_batch: **made-up or public**, two rows at least; cut or repeated to the padded lengths.
        target_epsilon, noise_multiplier: exactly one of them; the noise is solved for all phases (and ``prior``) together,
            as by ``fit``, and baked into the graphs. The runner never exceeds a target_epsilon given here.
        prior: as in ``fit``; the manifest holds them, and the runner counts them without being told again.
        dataset_size, target_delta: public; the runner refuses a data set of another size.
        padded_lengths: as in ``fit``: one graph takes them all, or there is one for each, with a warning. Default: the
            length of the example.
        eval_output: ``(model, batch) -> tensor(s)``, what eval_model.onnx gives; default: no evaluation model.
        weight_bits, overwrite, tolerance: as in ``export_onnx``; the evaluation model reads the same quantized weights.

    Guarantee: as ``export_onnx``'s, for the graphs of every phase, at every padded length.

    Raises:
        ExportError: a phase cannot be exported, or onnxruntime computes something else than PyTorch.
        CompileRefused, PrivacyError, DataError, ArtifactError: as from ``fit`` and ``export_onnx``.
    """
    from dpbitfit_fx.onnx_check import Probes, check_eval, check_phase
    from dpbitfit_fx.onnx_eval import eval_model

    check_bits(weight_bits)
    if (target_epsilon is None) == (noise_multiplier is None):
        raise PrivacyError("Give either target_epsilon or noise_multiplier, and not both: one follows from the other.")
    if not phases or not all(isinstance(phase, RunPhase) for phase in phases):
        raise PrivacyError("phases must be a list of RunPhase, at least one.")
    samplers = []
    for index, phase in enumerate(phases):
        with naming_phase(index, len(phases)):
            expected = phase.expected_batch_size
            samplers.append(
                PoissonSampler.from_expected_batch_size(
                    dataset_size, expected, epochs=phase.epochs, steps=phase.max_steps
                )
            )
    delta, runs = check_target_delta(target_delta, dataset_size), resolve_prior(prior)
    sigma = noise_multiplier
    if sigma is None:
        assert target_epsilon is not None
        sigma = solve_noise_multiplier(samplers, target_epsilon, delta, runs)
    epsilon = epsilon_of_phases([(sampler, sampler.steps) for sampler in samplers], sigma, delta, runs)
    warn_of_extremes(epsilon, sigma, samplers)

    batches = ItemLayout.build(example_batch, padded_lengths, is_example=True)
    compiled = _compiled(model, loss_fn, batches, phases, public_tensors)
    steps = [
        tuple(prepare(step, sigma, sampler.expected_batch_size) for step in each)
        for each, sampler in zip(compiled, samplers, strict=True)
    ]
    trained = {name: p for each in steps for name, p in each[0].parameters().items()}
    whole = layout_of(steps[-1][-1], trained)
    lengths = next((leaf.lengths for leaf in batches.leaves if leaf.lengths), ())
    ready = []
    for index, (phase, each, sampler) in enumerate(zip(phases, steps, samplers, strict=True)):
        with naming_phase(index, len(phases)):
            layouts = [_layout_in(step, whole, trained) for step in each]
            if any(layout != layouts[0] for layout in layouts):
                raise ExportError("The graph of one padded length reads or trains other parameters than another's.")
            suffixes = [f"{index + 1}"] if len(each) == 1 else [f"{index + 1}_{length}" for length in lengths]
            one = _Ready(
                phase,
                each,
                layouts[0],
                resolve_optimizer(phase.optimizer),
                sampler,
                tuple(f"grad_step_{suffix}.onnx" for suffix in suffixes),
                f"update_step_{index + 1}.onnx",
            )
            rates_by_parameter([p.name for p in one.layout.parameters], one.rates)
            if phase.schedule.warmup_steps > sampler.steps:
                raise PrivacyError(f"warmup_steps is more than the {sampler.steps} planned steps.")
            ready.append(one)
    names = leaf_names(batches.example_batch(0))
    every = [step for one in ready for step in one.steps]
    weights = None if weight_bits is None else FrozenWeights(every, weight_bits)
    padded = {n: list(leaf.lengths) for n, leaf in zip(names, batches.leaves, strict=True) if leaf.lengths}

    def build(folder: Path, previous: Path | None) -> dict[str, Any]:
        models = {}
        for index, one in enumerate(ready):
            with naming_phase(index, len(ready)):
                for step, name in zip(one.steps, one.gradients, strict=True):
                    models[name] = plain_gradient_model(export_core(step, one.layout, weights))
                models[one.update] = export_update(one.steps[0], one.optimizer, one.layout, rates=True)
        last = ready[-1]
        save_initial(last.step, whole, folder / "initial.safetensors")
        extra: dict[str, Any] = {} if len(lengths) < 2 else {"padded_lengths": padded}
        if eval_output is not None:
            models["eval_model.onnx"], outputs = eval_model(last.step, whole, eval_output, weights)
            extra |= {"eval_outputs": outputs, "eval_takes_mask": False, "eval_outputs_are_private": False}
        if weights is not None:
            extra["frozen_weights"] = weights.described(every)
        save_models(models, folder, previous)
        plan = plan_metadata(None, dataset_size, None, delta) | {"target_epsilon": target_epsilon}
        plan["prior"] = [run.to_dict() for run in runs]
        added = {bias.name: bias for each in steps for bias in each[0].added_biases}
        known = fingerprints(model, added.values(), trained)
        return {
            **run_entries(last.step, whole, "onnx", known),
            **extra,
            "plan": plan,
            "num_trainable": whole.num_trainable,
            "parameters": [p.to_dict() for p in whole.parameters],
            "phases": [_described(one) for one in ready],
        }

    def check(folder: Path) -> None:
        for index, one in enumerate(ready):
            described, free = _described(one), lengths if len(one.steps) == 1 else ()
            with naming_phase(index, len(ready)):
                for step, name in zip(one.steps, one.gradients, strict=True):
                    view = {**described, "graphs": {**described["graphs"], "grad_step": name}}
                    check_phase(step, folder, view, one.layout, lengths=free, tolerance=tolerance)
        if eval_output is not None:
            step = ready[-1].step
            probes = Probes(step, more=lengths if step.dynamic_length is not None else ())
            check_eval(step, folder, {}, whole, probes, eval_output)

    def check_quantized(folder: Path) -> None:
        with in_torch(weights):
            check(folder)

    return write_folder(path, overwrite, build, check_quantized)


def _compiled(
    model: torch.nn.Module,
    loss_fn: Callable[..., Any],
    batches: ItemLayout,
    phases: Sequence[RunPhase],
    public_tensors: bool,
) -> list[tuple[Any, ...]]:
    """Of every phase one step for all padded lengths; where a phase has none, of all phases one for each length."""
    compile_step = dpbitfit_fx.__getattr__("compile")
    examples = [batches.example_batch(bucket) for bucket in range(batches.buckets)]
    made: list[tuple[Any, ...]] = []
    for one_graph in (True, False):
        made = []
        for index, phase in enumerate(phases):

            def compiled(example: Any, phase: RunPhase = phase, **options: Any) -> Any:
                return compile_step(
                    model,
                    loss_fn,
                    example,
                    trainable=phase.trainable if isinstance(phase.trainable, str) else list(phase.trainable),
                    exclude=phase.exclude,
                    clipping=phase.clipping,
                    public_tensors=public_tensors,
                    **options,
                )

            with naming_phase(index, len(phases)):
                if not one_graph or len(examples) == 1:
                    made.append(tuple(compiled(example) for example in examples))
                    continue
                step = one_for_every_length(batches, examples[-1], compiled)  # warns where there is none
            if step is None:
                break
            made.append((step,))
        if len(made) == len(phases):
            break
    return made


def _layout_in(step: Any, whole: Layout, trained: Mapping[str, torch.Tensor]) -> Layout:
    """The layout of one phase: its own parameters, and those of the others that its graph reads.

    Raises:
        ExportError: its graph reads a parameter of another phase in a way that could not follow that one's training.
    """
    known = {p.name: p for p in whole.parameters}
    by_id = {id(x): name for name, x in trained.items()}
    storages = {x.untyped_storage().data_ptr(): name for name, x in trained.items()}
    live = live_parameters(step)
    held: list[str] = []
    for entry in step.partial.inputs:
        if entry.role is not Role.FROZEN:
            continue
        tensor = step.partial.state[entry.target]
        name = by_id.get(id(tensor))
        alias = storages.get(tensor.untyped_storage().data_ptr())
        own = set(step.trainable_names)
        if (name is None and alias is not None and alias not in own) or name in held:
            raise ExportError(
                f"The graph of this phase reads {entry.target!r}, which shares its memory with {alias!r} of another phase: "
                "what that phase trains would not reach it. Train such parameters in one phase, or untie them."
            )
        if name is not None and name not in own:
            held.append(name)
    if any(live.get(name) is not x for name, x in trained.items()):
        raise ExportError(
            "A phase adds biases (add_bias=True) that the model does not have, so the other phases would not add them. Put "
            "them onto the model first, with step.apply_added_biases()."
        )

    def part(names: Sequence[str]) -> Any:
        return placed([(known[n].name, known[n].onnx_name, known[n].shape) for n in names])

    return dataclasses.replace(whole, parameters=part(step.trainable_names), held=part(held))


def _described(one: _Ready) -> dict[str, Any]:
    """The phase's part of the manifest."""
    asked = one.phase.trainable
    plan = {"sample_rate": one.sampler.sample_rate, "steps": one.sampler.steps}
    entries = phase_entries(one.step, one.layout, one.optimizer, plan)
    if not math.isclose(entries["expected_batch_size"], one.sampler.expected_batch_size):
        raise ExportError(
            f"The graph divides by {entries['expected_batch_size']:g} and the sampler expects "
            f"{one.sampler.expected_batch_size:g} records a step."
        )
    gradients: Any = one.gradients[0] if len(one.gradients) == 1 else list(one.gradients)
    return {
        **entries,
        "graph_hash": joined_hash(graph_hashes(one.steps)),
        "trainable": asked if isinstance(asked, str) else list(asked),
        "held": [p.to_dict() for p in one.layout.held],
        "learning_rates": [list(pair) for pair in one.rates],
        "schedule": one.phase.schedule.to_dict(),
        "graphs": {"grad_step": gradients, "update_step": one.update},
    }
