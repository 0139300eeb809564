"""Realistic privacy faults, each a patch of our own code, with the detector that must catch it. Run it for the table.

`python tests/planted_bugs.py > docs/planted-bugs.md` writes the table; tests/test_planted_bugs.py proves every line of it.
A patch gets pytest's monkeypatch. Faults that only an audit sees are in tests/planted_audits.py.
"""

from __future__ import annotations

import dataclasses
import sys
import types
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor

import dpbitfit_fx.checkpoint as checkpoint
import dpbitfit_fx.compile
import dpbitfit_fx.fit  # noqa: F401
from dpbitfit_fx import accounting, lowering, sampling
from dpbitfit_fx.batching import PhysicalBatches
from dpbitfit_fx.engine import Engine
from dpbitfit_fx.passes import capture, clip, one_sample
from dpbitfit_fx.passes.joint_graph import JointGraph, Role, copy_graph, finish
from dpbitfit_fx.passes.pipeline import PIPELINE, RELEASE, Pass
from dpbitfit_fx.randomness import SecretKey, Stream
from dpbitfit_fx.ranks import Ranks
from dpbitfit_fx.training_run import TrainingRun

Patch = Callable[[pytest.MonkeyPatch], None]
aten = torch.ops.aten
# The package's attributes `fit` and `compile` are the functions; these are the modules, to patch names in.
FIT, COMPILE = sys.modules["dpbitfit_fx.fit"], sys.modules["dpbitfit_fx.compile"]
RANDOMNESS, ENGINE = sys.modules["dpbitfit_fx.randomness"], sys.modules["dpbitfit_fx.engine"]


@dataclasses.dataclass(frozen=True)
class Bug:
    name: str
    caught_by: str
    where: str
    what: str
    plant: Patch


BUGS: dict[str, Bug] = {}


def planted(caught_by: str, where: str) -> Callable[[Patch], Patch]:
    """Registers a patch; its docstring says what goes wrong."""

    def register(plant: Patch) -> Patch:
        name = plant.__name__.replace("_", " ")
        assert name not in BUGS and plant.__doc__
        BUGS[name] = Bug(name, caught_by, where, " ".join(plant.__doc__.split()), plant)
        return plant

    return register


# -- in the graph: the seal ---------------------------------------------------------------------------------------------


def _noise_pass(patch: pytest.MonkeyPatch, edit: Callable[[Any, Any, Any, Any], None]) -> None:
    """Replaces the pass that adds noise by itself and an edit of (graph, sum + noise, scaled noise, quotient)."""
    real = RELEASE[0]

    def run(joint: JointGraph) -> JointGraph:
        after = real.run(joint)
        graph, _ = copy_graph(after.module)
        quotient: Any = graph.output_node().args[0][0]  # type: ignore[index]
        noisy: Any = quotient.args[0]
        edit(graph, noisy, noisy.args[1], quotient)
        graph.eliminate_dead_code()
        return dataclasses.replace(after, module=finish(graph))

    patch.setattr(COMPILE, "RELEASE", (dataclasses.replace(real, run=run), RELEASE[1]))


@planted("seal", "passes/noise.py")
def noise_not_multiplied_by_the_sensitivity(patch: pytest.MonkeyPatch) -> None:
    """The noise has standard deviation sigma, whatever the clipping norm R."""
    _noise_pass(patch, lambda g, noisy, scaled, q: setattr(scaled, "args", (scaled.args[0], 1.25)))


@planted("seal", "passes/noise.py")
def noise_scaled_down_by_the_batch(patch: pytest.MonkeyPatch) -> None:
    """The noise is meant for a mean, and added to a sum that is divided afterwards."""
    _noise_pass(patch, lambda g, noisy, scaled, q: setattr(scaled, "args", (scaled.args[0], scaled.args[1] / 16)))


@planted("seal", "passes/noise.py")
def denominator_from_the_draw(patch: pytest.MonkeyPatch) -> None:
    """The noisy sum is divided by how many records were drawn, which is private."""

    def edit(graph: Any, noisy: Any, scaled: Any, quotient: Any) -> None:
        mask = next(n for n in graph.nodes if n.name == "sample_mask")
        with graph.inserting_before(quotient):
            count = graph.call_function(aten.sum.default, (mask,))
            divided = graph.call_function(aten.div.Tensor, (noisy, count))
        graph.output_node().args = ((divided,),)

    _noise_pass(patch, edit)


@planted("seal", "passes/noise.py")
def noise_from_an_operator_in_the_graph(patch: pytest.MonkeyPatch) -> None:
    """The graph draws its noise itself, from torch's generator."""

    def edit(graph: Any, noisy: Any, scaled: Any, quotient: Any) -> None:
        with graph.inserting_before(scaled):
            scaled.args = (graph.call_function(aten.randn_like.default, (noisy.args[0],)), scaled.args[1])

    _noise_pass(patch, edit)


@planted("seal", "passes/noise.py")
def the_sum_is_released_beside_the_noisy_one(patch: pytest.MonkeyPatch) -> None:
    """A debugging output keeps the sum as it was before the noise."""
    _noise_pass(patch, lambda g, noisy, scaled, q: setattr(g.output_node(), "args", ((q, noisy.args[0]),)))


def _after_sum(patch: pytest.MonkeyPatch, change: Callable[[Any, Any, list[Any], Any, Any], Any]) -> None:
    """Changes what the clip returns: (writer of the tail, graph, gradients, mask, total) -> total."""
    real = clip._Tail.build

    def build(self: Any, gradients: list[Any], mask: Any) -> Any:
        return change(self, self.graph, gradients, mask, real(self, gradients, mask))

    patch.setattr(clip._Tail, "build", build)


@planted("seal", "passes/clip.py")
def mean_in_place_of_the_sum(patch: pytest.MonkeyPatch) -> None:
    """The clipped gradients are averaged over the physical batch; noise and denominator are those of a sum."""
    _after_sum(
        patch,
        lambda t, g, gradients, mask, total: t.call(aten.div.Tensor, total, t.call(aten.sym_size.int, mask, 0)),
    )


@planted("seal", "passes/clip.py")
def one_bias_left_unclipped(patch: pytest.MonkeyPatch) -> None:
    """The first bias is summed as it is, beside the clipped sum."""

    def change(t: Any, graph: Any, gradients: list[Any], mask: Any, total: Any) -> Any:
        raw = t.call(aten.sum.dim_IntList, gradients[0], [0])
        rest = t.joint.num_trainable - t.joint.targets[0].numel
        return t.call(aten.add.Tensor, total, t.call(aten.constant_pad_nd.default, raw, [0, rest]))

    _after_sum(patch, change)


@planted("seal", "passes/clip.py")
def norm_over_fewer_values_than_are_summed(patch: pytest.MonkeyPatch) -> None:
    """The norm leaves the last bias out."""
    real = clip._Tail.squared

    def squared(self: Any, side: Any) -> Any:
        return real(self, self.call(aten.slice.Tensor, side, 1, 0, self.joint.targets[0].numel))

    patch.setattr(clip._Tail, "squared", squared)


@planted("seal", "passes/clip.py")
def norm_in_half_precision(patch: pytest.MonkeyPatch) -> None:
    """The norm is taken in float16, where squares above 65504 are infinite and small ones vanish."""

    def squared(self: Any, side: Any) -> Any:
        wide = self.call(aten._to_copy.default, side, dtype=torch.float16)
        return self.call(aten.sum.dim_IntList, self.call(aten.mul.Tensor, wide, wide), [1])

    patch.setattr(clip._Tail, "squared", squared)


@planted("seal", "passes/clip.py")
def norm_of_the_batch_in_place_of_the_sample(patch: pytest.MonkeyPatch) -> None:
    """The squares are summed over samples, so every record's factor depends on all."""

    def squared(self: Any, side: Any) -> Any:
        wide = self.call(aten._to_copy.default, side, dtype=torch.float64)
        return self.call(aten.sum.dim_IntList, self.call(aten.mul.Tensor, wide, wide), [0])

    patch.setattr(clip._Tail, "squared", squared)


@planted("seal", "passes/clip.py")
def clip_factor_unbounded(patch: pytest.MonkeyPatch) -> None:
    """The factor is R / norm without a lower bound of the norm, and has no limit near zero."""

    def weights(self: Any, keep: Any, squared: Any, bound: float) -> Any:
        below = self.call(aten.sqrt.default, squared)
        factor = self.call(aten.mul.Scalar, self.call(aten.reciprocal.default, below), bound)
        kept = self.call(aten.where.ScalarOther, keep, factor, 0.0)
        return self.call(aten.unsqueeze.default, self.call(aten._to_copy.default, kept, dtype=self.joint.flat_dtype), 0)

    patch.setattr(clip._Tail, "weights", weights)


@planted("seal", "passes/clip.py")
def records_counted_twice_over(patch: pytest.MonkeyPatch) -> None:
    """The clip factor is 2 R / norm: a bound that somebody took for that of replacing a record."""
    real = clip._Tail.weights
    patch.setattr(clip._Tail, "weights", lambda self, keep, squared, bound: real(self, keep, squared, 2 * bound))


@planted("seal", "passes/clip.py")
def non_finite_gradients_let_through(patch: pytest.MonkeyPatch) -> None:
    """The guard against NaN and infinite norms is gone: one record poisons the model, and shows itself."""
    patch.setattr(clip._Tail, "keep", lambda self, mask, squared, factors: self.call(aten.ne.Scalar, mask, 0))


@planted("seal", "passes/clip.py")
def clipping_per_micro_batch(patch: pytest.MonkeyPatch) -> None:
    """The sum over the physical batch is clipped, not each sample (seen as "fast DP-SGD")."""

    def build(self: Any, gradients: list[Any], mask: Any) -> Any:
        flat = [self.call(aten.reshape.default, self.call(aten.sum.dim_IntList, g, [0]), [-1]) for g in gradients]
        total = self.call(aten.cat.default, flat, 0)
        norm = self.call(aten.clamp_min.default, self.call(aten.linalg_vector_norm.default, total), 0.5)
        return self.call(aten.mul.Scalar, self.call(aten.div.Tensor, total, norm), 0.5)

    patch.setattr(clip._Tail, "build", build)


@planted("seal", "passes/refusion.py")
def loss_weights_that_leak_the_batch_size(patch: pytest.MonkeyPatch) -> None:
    """A rewrite scales every gradient by the number of rows, as the gradient of a mean is scaled."""

    def run(joint: JointGraph) -> JointGraph:
        graph, _ = copy_graph(joint.module)
        outputs: Any = graph.output_node().args[0]
        batch = next(i.name for i in joint.inputs if i.role is Role.BATCH)
        row = next(n for n in graph.nodes if n.name == batch)
        with graph.inserting_before(graph.output_node()):
            size = graph.call_function(aten.sym_size.int, (row, 0))
            scaled = [graph.call_function(aten.mul.Tensor, (g, size)) for g in outputs[1:]]
        graph.output_node().args = ((outputs[0], *scaled),)
        return dataclasses.replace(joint, module=finish(graph))

    _in_place_of_refusion(patch, run)


def _in_place_of_refusion(patch: pytest.MonkeyPatch, run: Callable[[JointGraph], JointGraph]) -> None:
    first = PIPELINE[0]
    patch.setattr(COMPILE, "PIPELINE", (Pass(first.name, run, first.needs, first.gives), *PIPELINE[1:]))


# -- before and behind the graph: the perturbation check -----------------------------------------------------------------


@planted("perturbation", "passes/refusion.py")
def a_rewrite_that_mixes_rows(patch: pytest.MonkeyPatch) -> None:
    """A rewrite centres the gradients over the batch ("variance reduction")."""

    def run(joint: JointGraph) -> JointGraph:
        graph, _ = copy_graph(joint.module)
        outputs: Any = graph.output_node().args[0]
        mixed = []
        with graph.inserting_before(graph.output_node()):
            for gradient in outputs[1:]:
                mean = graph.call_function(aten.mean.dim, (gradient, [0], True))
                mixed.append(graph.call_function(aten.sub.Tensor, (gradient, mean)))
        graph.output_node().args = ((outputs[0], *mixed),)
        return dataclasses.replace(joint, module=finish(graph))

    _in_place_of_refusion(patch, run)


class _FoldedTanh(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return torch.tanh(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.save_for_backward(output)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        (y,) = ctx.saved_tensors
        return gradients[0] * (1 - y * y)

    @staticmethod
    def vmap(info: Any, in_dims: Any, x: Tensor) -> Any:
        folded = x.movedim(in_dims[0], 0)
        return torch.tanh(folded - 0.1 * folded.mean(0, keepdim=True)), 0


@planted("perturbation", "passes/*_rules.py")
def a_folding_rule_that_mixes_rows(patch: pytest.MonkeyPatch) -> None:
    """The rule that folds the samples of tanh into one call subtracts their mean."""
    patch.setitem(one_sample.RULES, aten.tanh.default, lambda x: _FoldedTanh.apply(x))  # type: ignore[no-untyped-call]


@planted("perturbation", "dpbitfit_fx/lowering.py")
def a_fused_kernel_that_drops_the_mask(patch: pytest.MonkeyPatch) -> None:
    """What finally runs takes every row for a real one."""
    real = lowering.Lowered.__call__
    patch.setattr(
        lowering.Lowered, "__call__", lambda self, batch, mask, acc: real(self, batch, torch.ones_like(mask), acc)
    )


@planted("perturbation", "dpbitfit_fx/lowering.py")
def a_kernel_that_is_not_the_proved_graph(patch: pytest.MonkeyPatch) -> None:
    """The backend's clip is half as tight as that of the graph that was proved."""
    real = lowering.Lowered.__call__
    patch.setattr(
        lowering.Lowered, "__call__", lambda self, batch, mask, acc: acc + 2 * (real(self, batch, mask, acc) - acc)
    )


@planted("perturbation (BatchNorm)", "passes/model_state.py")
def batch_statistics_of_a_frozen_model(patch: pytest.MonkeyPatch) -> None:
    """The model is put in train mode: BatchNorm then mixes samples, and its statistics absorb them without noise."""
    patch.setattr(capture, "refuse_train_mode_batchnorm", lambda model: model.train())


@planted("seal (ONNX)", "dpbitfit_fx/onnx_export.py")
def an_exporter_that_reorders_noise(patch: pytest.MonkeyPatch) -> None:
    """The exported update adds one coordinate's noise to all."""
    from dpbitfit_fx import onnx_export

    real = onnx_export.UpdateStep.forward

    def forward(self: Any, *args: Tensor) -> Any:
        *state, accumulator, noise, rate = args
        return real(self, *state, accumulator, noise[:1].expand_as(noise), rate)

    patch.setattr(onnx_export.UpdateStep, "forward", forward)


# -- around the graph: replay --------------------------------------------------------------------------------------------


def _around_gradient(patch: pytest.MonkeyPatch, change: Callable[..., Tensor]) -> None:
    """Changes the accumulator before noise is added: (engine, key, step, accumulator) -> accumulator."""
    real = Engine.private_gradient
    patch.setattr(
        Engine, "private_gradient", lambda self, key, step, acc: real(self, key, step, change(self, key, step, acc))
    )


@planted("replay", "dpbitfit_fx/engine.py")
def the_average_is_over_the_records_drawn(patch: pytest.MonkeyPatch) -> None:
    """The engine divides by the size of the draw after all, noise included."""
    real = Engine.private_gradient

    def private_gradient(self: Engine, key: SecretKey, step: int, acc: Tensor) -> dict[str, Tensor]:
        drawn = max(1, len(self.sampler.draw(key, step)))
        return {n: g * 6.0 / drawn for n, g in real(self, key, step, acc).items()}

    patch.setattr(Engine, "private_gradient", private_gradient)


@planted("replay", "dpbitfit_fx/engine.py")
def momentum_before_the_noise(patch: pytest.MonkeyPatch) -> None:
    """Momentum is kept of the clipped sums, so each record is in many of them, and noise is added for one."""
    kept: dict[int, Tensor] = {}

    def change(self: Engine, key: SecretKey, step: int, acc: Tensor) -> Tensor:
        kept[id(self)] = acc if step == 0 else 0.9 * kept[id(self)] + acc
        return kept[id(self)]

    _around_gradient(patch, change)


@planted("replay", "dpbitfit_fx/engine.py")
def an_accumulator_that_is_not_reset(patch: pytest.MonkeyPatch) -> None:
    """The sum of a step starts from that of the step before."""
    kept: dict[int, Tensor] = {}
    real = Engine.drawn_sum

    def drawn_sum(self: Engine, key: SecretKey, step: int) -> Tensor:
        kept[id(self)] = real(self, key, step) + (kept[id(self)] if step else 0)
        return kept[id(self)]

    patch.setattr(Engine, "drawn_sum", drawn_sum)


@planted("replay", "dpbitfit_fx/batching.py")
def records_repeated_for_balance(patch: pytest.MonkeyPatch) -> None:
    """Every record stands twice in its batch ("oversampling"), each time clipped to R."""
    real = PhysicalBatches.split
    patch.setattr(PhysicalBatches, "split", lambda self, rows, secret: real(self, [*rows, *rows], secret))


@planted("replay", "dpbitfit_fx/batching.py")
def padding_rows_with_mask_one(patch: pytest.MonkeyPatch) -> None:
    """The dummy rows that fill a physical batch count as records, more of them the fewer are drawn."""
    real = PhysicalBatches.assemble

    def assemble(self: PhysicalBatches, *args: Any) -> Any:
        made = real(self, *args)
        return dataclasses.replace(made, sample_mask=torch.ones_like(made.sample_mask))

    patch.setattr(PhysicalBatches, "assemble", assemble)


@planted("replay", "dpbitfit_fx/batching.py")
def features_standardised_on_the_private_data(patch: pytest.MonkeyPatch) -> None:
    """Every record is centred on the mean of all records, which is never paid for."""
    real = PhysicalBatches.load

    def load(self: PhysicalBatches, row: int, secret: bytes) -> Any:
        bucket, values = real(self, row, secret)
        mean = torch.stack([self.dataset[i]["x"] for i in range(len(self.dataset))]).mean(0)
        return bucket, {"x": values["x"] - mean}

    patch.setattr(PhysicalBatches, "load", load)


@planted("replay", "dpbitfit_fx/batching.py")
def one_row_clipped_with_its_neighbour(patch: pytest.MonkeyPatch) -> None:
    """Two records of a physical batch are merged into one row (packing), whose norm is clipped once."""
    real = PhysicalBatches.assemble

    def assemble(self: PhysicalBatches, bucket: int, rows: Any, numbers: Any) -> Any:
        merged = [{n: a[n] + b[n] for n in a} for a, b in zip(rows[::2], rows[1::2], strict=False)]
        merged += list(rows[-1:]) if len(rows) % 2 else []
        return real(self, bucket, merged, numbers)

    patch.setattr(PhysicalBatches, "assemble", assemble)


@planted("replay", "dpbitfit_fx/fit.py")
def early_stopping_on_the_private_loss(patch: pytest.MonkeyPatch) -> None:
    """Training stops once a record's loss is large: how many steps there are tells of that record."""
    real = TrainingRun.advance

    def advance(self: TrainingRun) -> None:
        real(self)
        engine = self.stage.engine
        with torch.no_grad():
            for batch in engine.batches.split(range(len(engine.batches.dataset)), bytes(32)):
                if float((engine.update.loss_fn(engine.update.model, batch.batch) * batch.sample_mask).abs().max()) > 2:
                    self.ledger.planned = (self.step,)

    patch.setattr(TrainingRun, "advance", advance)


@planted("replay", "dpbitfit_fx/engine.py")
def noise_fitted_to_the_sum(patch: pytest.MonkeyPatch) -> None:
    """The noise follows the norm of the very sum that it is to hide ("relative noise")."""
    real = Engine.private_gradient

    def private_gradient(self: Engine, key: SecretKey, step: int, acc: Tensor) -> dict[str, Tensor]:
        quiet = real(self, key, step, torch.zeros_like(acc))
        loud = real(self, key, step, acc)
        share = float(acc.norm())
        return {n: loud[n] - quiet[n] + share * quiet[n] for n in loud}

    patch.setattr(Engine, "private_gradient", private_gradient)


@planted("replay (ranks)", "dpbitfit_fx/ranks.py")
def every_rank_takes_the_whole_draw(patch: pytest.MonkeyPatch) -> None:
    """The draw is not shared among the processes: each computes all of it, and the sum holds every record once a process."""
    patch.setattr(Ranks, "share", lambda self, rows, rank: rows)


@planted("replay (texts)", "dpbitfit_fx/batching.py")
def padding_to_the_longest_of_the_draw(patch: pytest.MonkeyPatch) -> None:
    """All texts are padded to the longest one drawn, so it changes the rows of the others."""
    load, split = PhysicalBatches.load, PhysicalBatches.split
    floor = [0]

    def longest(self: PhysicalBatches, rows: Any, secret: bytes) -> Any:
        floor[0] = max((load(self, int(row), secret)[0] for row in rows), default=0)
        return split(self, rows, secret)

    def padded(self: PhysicalBatches, row: int, secret: bytes) -> Any:
        bucket, values = load(self, row, secret)
        return max(bucket, floor[0]), values

    patch.setattr(PhysicalBatches, "split", longest)
    patch.setattr(PhysicalBatches, "load", padded)


@planted("replay (resume)", "dpbitfit_fx/training_run.py")
def noise_reused_on_resume_for_another_draw(patch: pytest.MonkeyPatch) -> None:
    """A resumed run draws other records under the noise that somebody has already seen."""
    real, restored = TrainingRun.restore, [False]

    def restore(self: TrainingRun, *args: Any) -> None:
        restored[0] = True
        real(self, *args)

    draw = sampling.PoissonSampler.draw
    patch.setattr(TrainingRun, "restore", restore)
    patch.setattr(
        sampling.PoissonSampler, "draw", lambda self, key, step: draw(self, key.renewed() if restored[0] else key, step)
    )


@planted("replay (resume)", "dpbitfit_fx/training_run.py")
def a_resumed_run_with_new_noise(patch: pytest.MonkeyPatch) -> None:
    """A resumed run forgets its key, and takes steps that somebody has already seen once more, with other noise."""
    real = TrainingRun.restore
    patch.setattr(TrainingRun, "restore", lambda self, state, key, pending: real(self, state, key.renewed(), pending))


@planted("replay (changed plan)", "dpbitfit_fx/checkpoint.py")
def no_journal_of_released_steps(patch: pytest.MonkeyPatch) -> None:
    """Nothing is written before a step is released, so a killed run does not know what it showed."""
    patch.setattr(checkpoint.CheckpointStore, "record", lambda self, entry: None)


# -- noise and draws: statistics -----------------------------------------------------------------------------------------


def _noise(patch: pytest.MonkeyPatch, change: Callable[[np.ndarray[Any, Any]], np.ndarray[Any, Any]]) -> None:
    real = Stream.normal
    patch.setattr(Stream, "normal", lambda self, count: change(real(self, count)))


@planted("statistics", "dpbitfit_fx/randomness.py")
def noise_drawn_too_small(patch: pytest.MonkeyPatch) -> None:
    """The generator is wired for a variance where a standard deviation was meant."""
    _noise(patch, lambda z: z * 1.3**-0.5)


@planted("statistics", "dpbitfit_fx/randomness.py")
def noise_that_is_not_gaussian(patch: pytest.MonkeyPatch) -> None:
    """Uniform noise of the right variance."""
    real = Stream.uniform
    patch.setattr(Stream, "normal", lambda self, count: (real(self, count) - 0.5) * 12**0.5)


@planted("statistics", "dpbitfit_fx/randomness.py")
def noise_without_tails(patch: pytest.MonkeyPatch) -> None:
    """Noise beyond one and a half standard deviations is taken for an outlier, and cut off."""
    _noise(patch, lambda z: z.clip(-1.5, 1.5))


@planted("statistics", "dpbitfit_fx/randomness.py")
def one_seed_for_the_noise_of_every_step(patch: pytest.MonkeyPatch) -> None:
    """The noise stream forgets the step number: every step has the same noise, and differences have none."""
    real = ENGINE.stream
    patch.setattr(ENGINE, "stream", lambda key, purpose, step: real(key, purpose, 0 if purpose == "noise" else step))


@planted("statistics", "dpbitfit_fx/engine.py")
def noise_scale_per_micro_batch(patch: pytest.MonkeyPatch) -> None:
    """Each of k micro-batches brings noise of scale sigma R / k, which adds up to less than sigma R."""
    real = Engine.private_gradient

    def private_gradient(self: Engine, key: SecretKey, step: int, acc: Tensor) -> dict[str, Tensor]:
        parts = max(1, -(-len(self.sampler.draw(key, step)) // self.batches.sizes[0])) ** 0.5
        return {n: g / parts for n, g in real(self, key, step, parts * acc).items()}

    patch.setattr(Engine, "private_gradient", private_gradient)


@planted("statistics", "dpbitfit_fx/engine.py")
def noise_that_fades_with_the_steps(patch: pytest.MonkeyPatch) -> None:
    """sigma is halved after the first epoch, which the accountant does not know."""
    real = ENGINE.stream

    def faded(key: SecretKey, purpose: str, step: int) -> Any:
        made = real(key, purpose, step)
        if purpose != "noise" or step < 2:
            return made
        return types.SimpleNamespace(normal=lambda count: made.normal(count) / 2)

    patch.setattr(ENGINE, "stream", faded)


@planted("statistics (empty draws)", "dpbitfit_fx/engine.py")
def empty_batches_skipped(patch: pytest.MonkeyPatch) -> None:
    """A draw without records takes no step at all, which says that nobody was drawn."""
    real = Engine.private_gradient

    def private_gradient(self: Engine, key: SecretKey, step: int, acc: Tensor) -> dict[str, Tensor]:
        if len(self.sampler.draw(key, step)):
            return real(self, key, step, acc)
        return self.update.unflatten(torch.zeros_like(acc))

    patch.setattr(Engine, "private_gradient", private_gradient)


def _draws(patch: pytest.MonkeyPatch, draw: Callable[..., Any]) -> None:
    patch.setattr(sampling.PoissonSampler, "draw", draw)


@planted("statistics", "dpbitfit_fx/sampling.py")
def shuffled_batches_accounted_as_poisson(patch: pytest.MonkeyPatch) -> None:
    """Every epoch is cut into batches of one size; the accountant believes in independent coins."""

    def draw(self: Any, key: SecretKey, step: int) -> Any:
        per_epoch = max(1, round(1 / self.sample_rate))
        order = np.argsort(RANDOMNESS.stream(key, "poisson sample", step // per_epoch).uniform(self.dataset_size))
        return np.sort(np.array_split(order, per_epoch)[step % per_epoch])

    _draws(patch, draw)


@planted("statistics", "dpbitfit_fx/sampling.py")
def a_fixed_batch_size_accounted_as_poisson(patch: pytest.MonkeyPatch) -> None:
    """Exactly the expected number of records is drawn, every time."""

    def draw(self: Any, key: SecretKey, step: int) -> Any:
        order = np.argsort(RANDOMNESS.stream(key, "poisson sample", step).uniform(self.dataset_size))
        return np.sort(order[: round(self.expected_batch_size)])

    _draws(patch, draw)


@planted("statistics", "dpbitfit_fx/sampling.py")
def records_drawn_more_often_than_accounted(patch: pytest.MonkeyPatch) -> None:
    """The sampler rounds the rate up to the next multiple of a quarter; the accountant does not."""

    def draw(self: Any, key: SecretKey, step: int) -> Any:
        rate = -(-(self.sample_rate + 1e-9) // 0.25) * 0.25
        return np.flatnonzero(RANDOMNESS.stream(key, "poisson sample", step).uniform(self.dataset_size) < rate)

    _draws(patch, draw)


@planted("statistics", "dpbitfit_fx/sampling.py")
def one_seed_for_the_draws_of_two_steps(patch: pytest.MonkeyPatch) -> None:
    """Prefetching serves each draw twice."""

    def draw(self: Any, key: SecretKey, step: int) -> Any:
        numbers = RANDOMNESS.stream(key, "poisson sample", step // 2).uniform(self.dataset_size)
        return np.flatnonzero(numbers < self.sample_rate)

    _draws(patch, draw)


@planted("statistics", "dpbitfit_fx/batching.py")
def truncated_draws(patch: pytest.MonkeyPatch) -> None:
    """A draw that is larger than a physical batch is cut."""
    real = PhysicalBatches.split
    patch.setattr(PhysicalBatches, "split", lambda self, rows, secret: real(self, list(rows)[: self.sizes[0]], secret))


@planted("statistics (ranks)", "dpbitfit_fx/ranks.py")
def noise_per_rank(patch: pytest.MonkeyPatch) -> None:
    """Each of W processes adds noise of scale sigma R / W to its own sum, as it would to a mean: together sigma R / sqrt(W)."""
    real, release = Engine.clipped_sum, Engine.private_gradient

    def clipped_sum(self: Engine, rows: Any, secret: bytes = bytes(32)) -> Tensor:
        update, purpose = self.update, f"noise of rank {dist.get_rank()}"
        assert update.noise_multiplier is not None
        normals = torch.from_numpy(
            RANDOMNESS.stream(SecretKey.from_bytes(secret), purpose, 0).normal(update.num_trainable)
        )
        scale = update.noise_multiplier * update.max_grad_norm / dist.get_world_size()
        return real(self, rows, secret) + (scale * normals).to(update.dtype)

    def private_gradient(self: Engine, key: SecretKey, step: int, acc: Tensor) -> dict[str, Tensor]:
        noise = release(self, key, step, torch.zeros_like(acc))
        return {name: value - noise[name] for name, value in release(self, key, step, acc).items()}

    patch.setattr(Engine, "clipped_sum", clipped_sum)
    patch.setattr(Engine, "private_gradient", private_gradient)


@planted("statistics (ranks)", "dpbitfit_fx/sampling.py")
def seeds_shared_by_ranks(patch: pytest.MonkeyPatch) -> None:
    """Each of four shards of the records is sampled with the same coins: four records are always drawn together."""

    def draw(self: Any, key: SecretKey, step: int) -> Any:
        coins = RANDOMNESS.stream(key, "poisson sample", step).uniform(self.dataset_size // 4)
        return np.flatnonzero(np.resize(coins, self.dataset_size) < self.sample_rate)

    _draws(patch, draw)


# -- epsilon: closed forms -----------------------------------------------------------------------------------------------


@planted("accounting", "dpbitfit_fx/accounting.py")
def variance_taken_for_a_standard_deviation(patch: pytest.MonkeyPatch) -> None:
    """The accountant is given sigma squared."""
    real = accounting._event
    patch.setattr(accounting, "_event", lambda rate, sigma, steps: real(rate, sigma**2, steps))


@planted("accounting", "dpbitfit_fx/accounting.py")
def epochs_accounted_as_steps(patch: pytest.MonkeyPatch) -> None:
    """The accountant composes a quarter of the steps."""
    real = accounting._charged
    patch.setattr(accounting, "_charged", lambda steps, lost: -(-real(steps, lost) // 4))


@planted("accounting", "dpbitfit_fx/accounting.py")
def amplification_counted_twice(patch: pytest.MonkeyPatch) -> None:
    """The sampling rate is multiplied by itself before it reaches the accountant."""
    real = accounting._event
    patch.setattr(accounting, "_event", lambda rate, sigma, steps: real(rate**2, sigma, steps))


@planted("accounting", "dpbitfit_fx/accounting.py")
def earlier_runs_forgotten(patch: pytest.MonkeyPatch) -> None:
    """Earlier runs on the same records are read, and not composed."""
    real = accounting._plan
    patch.setattr(accounting, "_plan", lambda own, prior: real(own, ()))


@planted("accounting", "dpbitfit_fx/accounting.py")
def epsilon_at_another_delta(patch: pytest.MonkeyPatch) -> None:
    """epsilon is read off the curve at delta times a thousand."""
    real = accounting._epsilon

    class Cached:
        cache_clear = staticmethod(real.cache_clear)

        def __call__(self, plan: Any, delta: float, coarsening: float = 1.0) -> float:
            return real(plan, 1000 * delta, coarsening)

    patch.setattr(accounting, "_epsilon", Cached())


@planted("accounting", "dpbitfit_fx/accounting.py")
def any_delta_accepted(patch: pytest.MonkeyPatch) -> None:
    """A delta of 1/N allows the publication of somebody's whole record."""
    patch.setattr(accounting, "check_target_delta", lambda delta, size: delta)


# -- the table -----------------------------------------------------------------------------------------------------------


def table() -> str:
    """docs/planted-bugs.md."""
    from planted_audits import AUDITED

    lines = [
        "# Planted bugs",
        "",
        "Faults of the kind that real systems had, each planted into our own code and caught in CI. The table is written by",
        "`python tests/planted_bugs.py > docs/planted-bugs.md`; `tests/test_planted_bugs.py` plants each fault and holds the",
        "detector that is named here to it, after the same detector was silent on the code as it is.",
        "",
        "- **seal**: the proof of the finished graph. **perturbation**: the captured step against the user's model, and what",
        "  finally runs with its other rows spoiled. **replay**: `fit` with and without one record, randomness frozen.",
        "  **statistics**: the law of the noise and of the draws of a `fit`. **accounting**: epsilon against closed forms.",
        "- **audit**: the one-run audit of `dpbitfit audit`, whose 95 % lower bound exceeds the claimed epsilon. For these",
        "  faults all the other detectors are run as well, and see nothing.",
        "",
        f"{len(BUGS) + len(AUDITED)} faults, {len(AUDITED)} of them for the audit alone.",
        "",
        "| fault | what goes wrong | planted in | caught by |",
        "|---|---|---|---|",
    ]
    rows = [(b.name, b.what, b.where, b.caught_by) for b in BUGS.values()]
    rows += [(a.name, a.what, a.where, f"audit ({a.attack})") for a in AUDITED.values()]
    return "\n".join([*lines, *(f"| {n} | {what} | `{where}` | {by} |" for n, what, where, by in rows)]) + "\n"


if __name__ == "__main__":
    sys.stdout.write(table())
