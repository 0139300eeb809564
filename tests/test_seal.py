"""The seal refuses every graph that is not the closed template; each test here is a really compiled graph, sabotaged."""

from __future__ import annotations

import copy
import dataclasses
import functools
import operator
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from fit_cases import mlp, mlp_loss, text_loss, text_model
from torch import Tensor, fx

from dpbitfit_fx.compile import PrivateStep, check_rows
from dpbitfit_fx.compile import compile as compile_step
from dpbitfit_fx.lowering import Lowered
from dpbitfit_fx.passes import facts
from dpbitfit_fx.passes.clipping import AutomaticClipping, AutoVClipping, Clipping, FlatClipping, PerLayerClipping
from dpbitfit_fx.passes.errors import SealBroken
from dpbitfit_fx.passes.joint_graph import Input, JointGraph, Noise, Role, copy_graph
from dpbitfit_fx.passes.numerics import noise_scale
from dpbitfit_fx.passes.seal import check_update, seal, seal_partial, split

aten = torch.ops.aten
SIGMA, R, N = 1.25, 0.5, 16.0
SCALE = noise_scale(SIGMA, R, N)


def compiled(kind: str, clipping: Clipping) -> PrivateStep:
    generator = torch.Generator().manual_seed(4)
    if kind == "mlp":
        batch: Any = (torch.randn(4, 4, generator=generator), torch.tensor([0, 1, 1, 0]))
        return compile_step(mlp(), mlp_loss, batch, clipping=clipping, noise_multiplier=SIGMA, expected_batch_size=N)
    lengths = torch.tensor([6, 4, 2, 5])
    batch = {
        "input_ids": torch.randint(1, 20, (4, 6), generator=generator),
        "attention_mask": (torch.arange(6)[None] < lengths[:, None]).long(),
        "label": torch.tensor([0, 1, 1, 0]),
        "weight": torch.tensor([1.0, 2.0, 0.5, 1.0]),
    }
    model = text_model()
    return compile_step(model, text_loss, batch, clipping=clipping, noise_multiplier=SIGMA, expected_batch_size=N)


CASES = {
    "mlp-automatic": ("mlp", AutomaticClipping(R)),
    "text-flat": ("text", FlatClipping(R)),
}
VARIANTS = {
    "mlp-auto-v": ("mlp", AutoVClipping(R)),
    "mlp-per-layer": ("mlp", PerLayerClipping(R)),
    "text-per-layer": ("text", PerLayerClipping(layer_norms={"mix": 0.3, "head": 0.4})),
}


@pytest.fixture(scope="module", params=CASES, ids=str)
def step(request: pytest.FixtureRequest) -> PrivateStep:
    return compiled(*CASES[request.param])


@functools.cache
def compiled_once(case: str) -> PrivateStep:
    return compiled(*VARIANTS[case])


@pytest.fixture(params=VARIANTS, ids=str)
def variant(request: pytest.FixtureRequest) -> PrivateStep:
    return compiled_once(request.param)


class Parts:
    """A copy of a sealed graph to cut up, with the nodes of its tail by the names that the template gives them."""

    def __init__(self, joint: JointGraph) -> None:
        self.joint = joint
        self.graph, _ = copy_graph(joint.module)
        self.inputs = list(joint.inputs)
        self.changes: dict[str, Any] = {}
        self.root, self.keep_dead = torch.nn.Module(), False
        self.output = self.graph.output_node()
        self.named = {n.name: n for n in self.graph.nodes}
        self.div: fx.Node = self.output.args[0][0]  # type: ignore[index, assignment]
        self.noisy, self.scaled = self.up(self.div), self.up(self.div, 0, 1)
        self.z = self.up(self.scaled)
        self.result = self.up(self.noisy)
        self.accumulator, self.total = self.result.all_input_nodes
        whole = self.up(self.total)
        self.products = whole.all_input_nodes if whole.target is aten.cat.default else [whole]
        self.product = self.products[0]
        self.weights, self.rows = self.product.all_input_nodes
        self.column, self.side = self.rows.all_input_nodes
        self.narrow = self.up(self.weights)
        self.kept = self.up(self.narrow)
        self.keep, self.factor = self.kept.all_input_nodes
        self.present, self.finite = self.keep.all_input_nodes
        self.mask = self.up(self.present)
        self.reciprocal = self.up(self.factor)
        self.below = self.up(self.reciprocal)
        self.norm = self.below if self.below.target is aten.sqrt.default else self.up(self.below)
        self.squared = self.up(self.norm)
        self.square = self.up(self.squared)
        self.wide = self.up(self.square)
        self.pieces = [view for product in self.products for view in self.up(product, 1, 1).all_input_nodes]
        self.gradients = [self.up(p) for p in self.pieces]
        self.batch = [self.named[i.name] for i in joint.with_role(Role.BATCH)]
        self.trainables = [self.named[i.name] for i in joint.with_role(Role.TRAINABLE)]

    @staticmethod
    def up(node: fx.Node, *path: int) -> fx.Node:
        for at in path or (0,):
            node = node.args[at]  # type: ignore[assignment]
        assert isinstance(node, fx.Node)
        return node

    @staticmethod
    def up_list(node: fx.Node, at: int) -> list[Any]:
        value = node.args[at]
        assert isinstance(value, list)
        return value

    @property
    def tail(self) -> list[fx.Node]:
        """Every operator of the template, from the gradients' flat views to the output."""
        first = min(list(self.graph.nodes).index(p) for p in self.pieces)
        return [n for n in list(self.graph.nodes)[first:] if n.op == "call_function"]

    def before(self, user: fx.Node, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        with self.graph.inserting_before(user):
            return self.graph.call_function(target, args, kwargs)

    def wrap(self, node: fx.Node, user: fx.Node, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        """``user`` reads ``target(node, *args)`` where it read ``node``."""
        new = self.before(user, target, node, *args, **kwargs)
        user.replace_input_with(node, new)
        return new

    def put(self, node: fx.Node, at: int, value: Any) -> None:
        node.args = (*node.args[:at], value, *node.args[at + 1 :])

    def out(self, *values: Any) -> None:
        self.output.args = (values,)

    def add_input(self, name: str, role: Role) -> fx.Node:
        with self.graph.inserting_after([n for n in self.graph.nodes if n.op == "placeholder"][-1]):
            self.inputs.append(Input(name, role, name))
            return self.graph.placeholder(name)

    def done(self) -> JointGraph:
        if not self.keep_dead:
            self.graph.eliminate_dead_code()
        self.graph.lint()
        module = fx.GraphModule(self.root, self.graph, class_name="Sabotaged")
        return dataclasses.replace(self.joint, module=module, inputs=tuple(self.inputs), **self.changes)

    def proof_only(self) -> JointGraph:
        """The same without compiling the module, which no predicate needs: thousands of these are proved."""
        if not self.keep_dead:
            self.graph.eliminate_dead_code()
        return dataclasses.replace(self.joint, module=SimpleNamespace(graph=self.graph))  # type: ignore[arg-type]


Sabotage = Callable[[Parts], Any]
SABOTAGES: dict[str, tuple[Sabotage, str]] = {}


def sabotage(reason: str) -> Callable[[Sabotage], Sabotage]:
    """Registers a way to break the graph, with the reason the seal must give."""

    def register(break_it: Sabotage) -> Sabotage:
        SABOTAGES[break_it.__name__] = (break_it, reason)
        return break_it

    return register


# --- the noise


@sabotage("noise: expected aten.mul.Scalar, found aten.reshape.default")
def noise_removed(p: Parts) -> None:
    p.put(p.div, 0, p.result)


@sabotage("noise: expected aten.mul.Scalar, found aten.add.Tensor")
def noise_added_before_the_accumulation(p: Parts) -> None:
    p.put(p.div, 0, p.result)
    inner = p.before(p.result, aten.add.Tensor, p.total, p.before(p.result, aten.mul.Scalar, p.z, SCALE))
    p.put(p.result, 1, inner)


@sabotage("noise: expected aten.mul.Scalar, found aten.reshape.default")
def noise_added_before_the_clip(p: Parts) -> None:
    noise = p.before(p.pieces[0], aten.mul.Scalar, p.z, SCALE)
    flat = p.before(p.pieces[0], aten.slice.Tensor, noise, 0, 0, p.joint.targets[0].numel)
    p.wrap(p.gradients[0], p.pieces[0], aten.add.Tensor, flat)
    p.put(p.div, 0, p.result)


@sabotage("noise scale sigma . R . .1 . slack.: found .* expected the public constant")
def noise_scaled_wrong(p: Parts) -> None:
    p.put(p.scaled, 1, SCALE * 2 / 3)


@sabotage("noise scale sigma . R")
def noise_that_does_not_pay_for_rounding(p: Parts) -> None:
    p.put(p.scaled, 1, SIGMA * R)


@sabotage("noise scale sigma . R")
def noise_scaled_by_an_input_instead_of_a_constant(p: Parts) -> None:
    p.put(p.scaled, 1, p.before(p.scaled, aten.sym_size.int, p.batch[0], 0))


@sabotage("noise: aten.add.Tensor has the options .*alpha")
def noise_added_with_a_small_alpha(p: Parts) -> None:
    p.noisy.kwargs = {"alpha": 1e-3}


@sabotage("The graph has 2 outputs")
def one_z_in_two_outputs(p: Parts) -> None:
    second = p.before(p.output, aten.add.Tensor, p.total, p.scaled)
    p.out(p.div, second)


@sabotage("The graph has 2 outputs")
def z_itself_an_output(p: Parts) -> None:
    p.out(p.div, p.z)


@sabotage("expected the input noise, found expand")
def z_expanded_over_the_coordinates(p: Parts) -> None:
    first = p.before(p.scaled, aten.slice.Tensor, p.z, 0, 0, 1)
    p.scaled.replace_input_with(p.z, p.before(p.scaled, aten.expand.default, first, [p.joint.num_trainable]))


@sabotage("noise: expected the input noise, found slice")
def z_sliced(p: Parts) -> None:
    p.wrap(p.z, p.scaled, aten.slice.Tensor, 0, 0, 1)


@sabotage("the input noise is used 2 times")
def z_subtracted_again_from_the_sum(p: Parts) -> None:
    p.wrap(p.result, p.noisy, aten.sub.Tensor, p.z)


@sabotage("noise_multiplier is zero")
def noise_multiplier_zero(p: Parts) -> None:
    p.put(p.scaled, 1, 0.0)
    p.changes["noise"] = Noise(0.0, N)


@sabotage("carries no noise scale")
def noise_scale_not_declared(p: Parts) -> None:
    p.changes["noise"] = None


@sabotage("the graph has 2 inputs with the role noise")
def a_second_noise_that_the_host_might_leave_at_zero(p: Parts) -> None:
    p.put(p.scaled, 0, p.add_input("other", Role.NOISE))


@sabotage("draws random numbers")
def noise_from_a_random_operator_in_the_graph(p: Parts) -> None:
    random = p.before(p.pieces[0], aten.randn_like.default, p.gradients[0])
    p.wrap(p.gradients[0], p.pieces[0], aten.add.Tensor, random)


# --- what leaves, and by what it is divided


@sabotage("The graph has 2 outputs")
def the_same_sum_released_twice(p: Parts) -> None:
    p.out(p.div, p.result)


@sabotage("noise: the clipped sum is used a second time")
def the_sum_read_by_a_node_that_leads_nowhere(p: Parts) -> None:
    p.before(p.output, aten.neg.default, p.result)
    p.keep_dead = True


@sabotage("which nothing reads: all that it could do is to fail")
def a_look_up_by_what_a_record_holds_that_leads_nowhere(p: Parts) -> None:
    p.before(p.output, aten.gather.default, p.batch[0], 0, p.batch[0])
    p.keep_dead = True


@sabotage("noise: expected aten.mul.Scalar, found aten.add.Tensor")
def the_sum_added_to_its_own_noisy_version(p: Parts) -> None:
    p.wrap(p.noisy, p.div, aten.add.Tensor, p.result)


@sabotage("accumulation: expected aten.add.Tensor, found aten.mul")
def a_thousand_times_the_sum(p: Parts) -> None:
    p.wrap(p.result, p.noisy, aten.mul.Scalar, 1000.0)


@sabotage("accumulation: aten.add.Tensor has the options .*alpha")
def the_sum_scaled_by_alpha(p: Parts) -> None:
    p.result.kwargs = {"alpha": 1000}


@sabotage("weighted sum: expected aten.reshape.default, found aten.mul")
def the_sum_scaled_before_it_is_accumulated(p: Parts) -> None:
    p.wrap(p.total, p.result, aten.mul.Scalar, 2.0)


@sabotage("The graph has 2 outputs")
def a_per_sample_norm_as_an_output(p: Parts) -> None:
    p.out(p.div, p.norm)


@sabotage("The graph has 2 outputs")
def a_per_sample_gradient_as_an_output(p: Parts) -> None:
    p.out(p.div, p.gradients[0])


@sabotage("denominator: expected aten.div.Scalar, found")
def an_output_that_is_a_nest(p: Parts) -> None:
    p.out((p.div, p.norm))


@sabotage("The graph returns one vector bare")
def an_output_that_is_bare(p: Parts) -> None:
    """What runs takes the first of a tuple of one; of a vector it would take a number."""
    p.output.args = (p.div,)


@sabotage("denominator: expected aten.div.Scalar, found aten.div.Tensor")
def the_sum_of_the_mask_as_denominator(p: Parts) -> None:
    count = p.before(p.div, aten.sum.default, p.mask)
    p.out(p.before(p.output, aten.div.Tensor, p.noisy, count))


@sabotage("denominator: found sym_size_int.*, expected the public constant 16.0")
def the_batch_size_as_denominator(p: Parts) -> None:
    p.put(p.div, 1, p.before(p.div, aten.sym_size.int, p.batch[0], 0))


@sabotage("denominator: found 15.0, expected the public constant 16.0")
def another_denominator_than_the_declared(p: Parts) -> None:
    p.put(p.div, 1, 15.0)


@sabotage("The batch size is used as a value by aten.mul.Scalar")
def the_batch_size_as_a_value(p: Parts) -> None:
    p.wrap(p.gradients[0], p.pieces[0], aten.mul.Scalar, p.before(p.pieces[0], aten.sym_size.int, p.batch[0], 0))


@sabotage("The batch size fills a tensor")
def the_batch_size_filled_into_a_tensor(p: Parts) -> None:
    size = p.before(p.pieces[0], aten.sym_size.int, p.batch[0], 0)
    p.wrap(p.gradients[0], p.pieces[0], aten.mul.Tensor, p.before(p.pieces[0], aten.full.default, [1], size))


@sabotage("The batch size fills a tensor")
def the_batch_size_filled_into_a_tensor_by_keyword(p: Parts) -> None:
    size = p.before(p.pieces[0], aten.sym_size.int, p.batch[0], 0)
    fill = p.before(p.pieces[0], aten.full.default, [1], fill_value=size)
    p.wrap(p.gradients[0], p.pieces[0], aten.mul.Tensor, fill)


# --- the clip


@sabotage("non-finite rows: expected aten.where.ScalarOther, found aten.cat")
def the_guard_against_non_finite_rows_removed(p: Parts) -> None:
    p.put(p.product, 1, p.side)


@sabotage("weights: expected aten.where.ScalarOther")
def the_guard_of_the_weights_removed(p: Parts) -> None:
    p.put(p.narrow, 0, p.factor)


@sabotage("non-finite rows: found 1.0")
def non_finite_rows_become_ones(p: Parts) -> None:
    p.put(p.rows, 2, 1.0)


@sabotage("kept rows: logical_and.* is used 1 times, expected 2")
def another_mask_for_the_weights_than_for_the_rows(p: Parts) -> None:
    p.put(p.kept, 0, p.present)


@sabotage("the weights and the rows do not drop the same samples")
def another_mask_for_the_weights_with_the_right_one_read_twice(p: Parts) -> None:
    p.put(p.kept, 0, p.present)
    p.before(p.output, aten.neg.default, p.keep)
    p.keep_dead = True


@sabotage("finite norms: found 1e.300")
def absurd_norms_let_through(p: Parts) -> None:
    p.put(p.finite, 1, 1e300)


@sabotage("clip factor R: found 1.0")
def the_coefficient_doubled(p: Parts) -> None:
    p.put(p.factor, 1, 2 * R)


@sabotage("clip factor R: found 0.5, expected the public constant 0.4")
def another_r_declared_than_baked_in(p: Parts) -> None:
    p.changes["clipping"] = dataclasses.replace(p.joint.clipping or FlatClipping(), max_grad_norm=0.4)
    p.put(p.scaled, 1, noise_scale(SIGMA, 0.4, N))


@sabotage("clip factor (gamma|R): found 1e-06")
def the_bound_of_the_factor_lowered(p: Parts) -> None:
    p.put(p.below, 1, 1e-6)


@sabotage("clip factor: expected aten.(add.Scalar|clamp_min.default), found aten.sqrt")
def the_bound_of_the_factor_removed(p: Parts) -> None:
    p.put(p.reciprocal, 0, p.norm)


@sabotage("weights: expected aten._to_copy.default, found aten.ones_like")
def the_clip_bypassed_for_every_row(p: Parts) -> None:
    p.put(p.weights, 0, p.before(p.weights, aten.ones_like.default, p.narrow))


@sabotage("non-finite rows: expected aten.where.ScalarOther, found aten.cat")
def the_clip_bypassed_for_one_bias(p: Parts) -> None:
    """The first bias is divided by the factor beforehand, so that its own rows come out unclipped."""
    column = p.before(p.product, aten.unsqueeze.default, p.kept, 1)
    raw = p.before(p.product, aten.div.Tensor, p.pieces[0], column)
    p.put(p.product, 1, p.before(p.product, aten.cat.default, [raw, *p.pieces[1:]], 1))


@sabotage("expected aten.reshape.default, found aten.add.Tensor")
def an_unclipped_sum_added_beside(p: Parts) -> None:
    raw = p.before(p.total, aten.sum.dim_IntList, p.side, [0])
    p.wrap(p.total, p.result, aten.add.Tensor, raw)


@sabotage("the norm is taken over other values than those that are summed")
def a_norm_over_fewer_values_than_are_summed(p: Parts) -> None:
    p.put(p.wide, 0, p.before(p.wide, aten.cat.default, p.pieces[1:], 1))


@sabotage("the norm is taken over other values than those that are summed")
def a_norm_of_half_the_gradient(p: Parts) -> None:
    p.wrap(p.side, p.wide, aten.mul.Scalar, 0.5)


@sabotage("the norm is taken over other values than those that are summed")
def a_norm_over_other_gradients(p: Parts) -> None:
    p.put(p.wide, 0, p.before(p.wide, aten.cat.default, [p.pieces[0], p.pieces[0]], 1))


@sabotage("the squares are not summed over each sample's own row")
def the_norm_taken_over_dim_0(p: Parts) -> None:
    p.put(p.squared, 1, [0])


@sabotage("norm: aten.sum.dim_IntList has 3 arguments")
def the_norm_keeps_its_dimension(p: Parts) -> None:
    p.squared.args = (*p.squared.args, True)


@sabotage("clip factor: (aten.add.Scalar has 3 arguments|expected aten.clamp_min)")
def gamma_scaled(p: Parts) -> None:
    args = (p.norm, p.below.args[1], 1e-3)
    p.put(p.reciprocal, 0, p.before(p.reciprocal, aten.add.Scalar, *args))


@sabotage("norm: .*_to_copy.* is used 2 times|norm: the product is not the square")
def a_norm_that_is_not_a_square(p: Parts) -> None:
    p.put(p.square, 1, p.before(p.square, aten.ones_like.default, p.wide))


@sabotage("norm: sum_.* is used 3 times|norm: the finite test and the factor use different norms")
def another_norm_in_the_factor_than_in_the_finite_test(p: Parts) -> None:
    p.put(p.norm, 0, p.before(p.norm, aten.mul.Scalar, p.squared, 0.25))


@sabotage("norm: aten._to_copy.default has the options")
def a_norm_in_half_precision(p: Parts) -> None:
    p.wide.kwargs = {"dtype": torch.float16}


@sabotage("1 gradients for 2 trainables; a parameter was dropped or added")
def a_parameter_dropped(p: Parts) -> None:
    p.put(p.side, 0, p.pieces[:1])


@sabotage("does not have .* entries per sample")
def rows_cut_in_two_so_that_each_half_is_clipped_alone(p: Parts) -> None:
    p.put(p.pieces[0], 1, [-1, 1])


@sabotage("sample_mask: its length is read 0 times, expected once")
def a_record_that_may_be_more_than_one_row(p: Parts) -> None:
    """In a batch of one the mask broadcasts, each half of the record is clipped alone, and the sum moves by 2 R."""
    for piece, gradient in zip(p.pieces, p.gradients, strict=True):
        p.put(piece, 0, p.before(piece, aten.cat.default, [gradient, gradient], 1))
        p.put(piece, 1, [-1, *p.up_list(piece, 1)[1:]])


@sabotage("gradient of .*: it does not have .* entries per sample")
def rows_counted_by_the_batch_instead_of_the_mask(p: Parts) -> None:
    p.put(p.pieces[0], 1, [p.before(p.pieces[0], aten.sym_size.int, p.batch[0], 0), *p.up_list(p.pieces[0], 1)[1:]])


@sabotage("gradient of .*: it does not have .* entries per sample")
def rows_counted_twice_over(p: Parts) -> None:
    twice = p.before(p.pieces[0], operator.mul, p.up_list(p.pieces[0], 1)[0], 2)
    p.put(p.pieces[0], 1, [twice, *p.up_list(p.pieces[0], 1)[1:]])


@sabotage("sample_mask: its length is read 2 times, expected once")
def the_length_of_the_mask_read_elsewhere(p: Parts) -> None:
    p.put(p.pieces[0], 1, [p.before(p.pieces[0], aten.sym_size.int, p.mask, 0), *p.up_list(p.pieces[0], 1)[1:]])


@sabotage("gradients: found 0")
def rows_of_the_biases_stacked_as_if_they_were_samples(p: Parts) -> None:
    p.put(p.side, 1, 0)


@sabotage("non-finite rows: expected aten.where.ScalarOther, found aten.unsqueeze")
def rows_and_weights_in_the_wrong_order(p: Parts) -> None:
    p.product.args = (p.rows, p.weights)


@sabotage("gradients: cat.* is used 3 times, expected 2")
def the_gradients_read_by_something_else_as_well(p: Parts) -> None:
    p.before(p.output, aten.neg.default, p.side)
    p.keep_dead = True


def test_a_record_that_is_read_as_two_rows_does_not_run(step: PrivateStep) -> None:
    """Proof and run agree: the views that the seal demands fail on rows that hold more than one record's gradient."""

    def doubled(p: Parts) -> None:
        for piece, gradient in zip(p.pieces, p.gradients, strict=True):
            p.put(piece, 0, p.before(piece, aten.cat.default, [gradient, gradient], 1))

    partial, _ = split(sabotaged(step.joint, doubled))
    for rows in (1, 4):
        values = partial.values([x[:rows] for x in step._example_leaves()])
        with pytest.raises(RuntimeError, match="invalid for input of size"):
            partial.module(*values, torch.ones(rows), torch.zeros(step.num_trainable))


# --- the inputs


@sabotage("the input accumulator is used 2 times")
def the_accumulator_also_fed_elsewhere(p: Parts) -> None:
    earlier = p.before(p.pieces[0], aten.sum.default, p.accumulator)
    p.wrap(p.gradients[0], p.pieces[0], aten.mul.Tensor, earlier)


@sabotage("the graph has 2 inputs with the role accumulator")
def a_second_accumulator(p: Parts) -> None:
    other = p.add_input("other", Role.ACCUMULATOR)
    p.accumulator.append(other)  # behind the first, where a second of its role would be fed
    p.inputs.insert([i.role for i in p.inputs].index(Role.ACCUMULATOR) + 1, p.inputs.pop())
    p.put(p.result, 0, other)


@sabotage("accumulation: expected the input accumulator, found")
def an_accumulator_that_is_scaled(p: Parts) -> None:
    p.wrap(p.accumulator, p.result, aten.mul.Scalar, 3.0)


@sabotage("sample_mask: the input sample_mask is used 3 times, expected 2")
def the_mask_reaches_the_gradients(p: Parts) -> None:
    column = p.before(p.pieces[0], aten.unsqueeze.default, p.mask, 1)
    p.wrap(p.gradients[0], p.pieces[0], aten.mul.Tensor, column)


@sabotage("sample_mask: expected the input sample_mask")
def a_mask_from_the_batch_instead(p: Parts) -> None:
    p.put(p.present, 0, p.batch[-1])


@sabotage("The graph's inputs are not those that were declared")
def an_input_that_was_not_declared(p: Parts) -> None:
    p.add_input("extra", Role.BATCH)
    p.inputs.pop()


@sabotage("The graph's inputs are not those that were declared")
def inputs_in_another_order(p: Parts) -> None:
    p.inputs[:2] = p.inputs[1::-1]


@sabotage("not in the order in which they are fed")
def the_mask_and_the_accumulator_in_each_others_place(p: Parts) -> None:
    """Fed by place, a batch of D rows would be weighted by the secret sum, and the mask would be released."""
    p.mask.prepend(p.accumulator)
    at = [i.role for i in p.inputs].index(Role.MASK)
    p.inputs[at : at + 2] = p.inputs[at : at + 2][::-1]


@sabotage("The graph holds get_attr")
def a_constant_read_from_an_attribute(p: Parts) -> None:
    p.root.register_buffer("buffer", torch.ones(1))
    with p.graph.inserting_before(p.pieces[0]):
        held = p.graph.get_attr("buffer")
    p.wrap(p.gradients[0], p.pieces[0], aten.mul.Tensor, held)


@sabotage("which writes its input")
def an_operator_that_writes_in_place(p: Parts) -> None:
    p.wrap(p.gradients[0], p.pieces[0], aten.mul_.Scalar, 2.0)


@sabotage("which writes its input")
def a_per_sample_value_written_into_a_parameter(p: Parts) -> None:
    first = p.before(p.pieces[0], aten.select.int, p.gradients[0], 0, 0)
    flat = p.before(p.pieces[0], aten.reshape.default, first, list(p.joint.targets[0].shape))
    p.before(p.pieces[0], aten.copy_.default, p.trainables[0], flat)


@sabotage("which is not an operator")
def a_python_function_in_the_graph(p: Parts) -> None:
    p.wrap(p.gradients[0], p.pieces[0], torch.clone)


@sabotage("which is one tensor: its rows would be picked apart")
def a_row_picked_by_python(p: Parts) -> None:
    p.wrap(p.gradients[0], p.pieces[0], operator.getitem, 0)


@sabotage("tells of private values by other means")
def an_assertion_on_private_values(p: Parts) -> None:
    finite = p.before(p.output, aten.all.default, p.before(p.output, aten.isfinite.default, p.gradients[0]))
    p.before(p.output, aten._assert_async.msg, finite, "a record is not finite")


@sabotage("tells of private values by other means")
def a_private_value_turned_into_a_python_number(p: Parts) -> None:
    number = p.before(
        p.pieces[0], aten._local_scalar_dense.default, p.before(p.pieces[0], aten.sum.default, p.batch[0])
    )
    p.wrap(p.gradients[0], p.pieces[0], aten.mul.Scalar, number)


@sabotage("has no template")
def a_clipping_that_nobody_proved(p: Parts) -> None:
    @dataclasses.dataclass(frozen=True)
    class Mine(Clipping):
        pass

    p.changes["clipping"] = Mine(R)


@sabotage("carries no noise scale")
def no_clipping_declared(p: Parts) -> None:
    p.changes["clipping"] = None


@sabotage("Boastful has no template")
def a_clipping_that_understates_its_sensitivity(p: Parts) -> None:
    @dataclasses.dataclass(frozen=True)
    class Boastful(AutomaticClipping):
        @property
        def sensitivity(self) -> float:
            return self.max_grad_norm / 10

    p.changes["clipping"] = Boastful(R)


# --- the tails of AUTO-V and of clipping per layer

BROKEN_VARIANTS: dict[str, tuple[str, Sabotage, str]] = {}


def sabotage_of(case: str, reason: str) -> Callable[[Sabotage], Sabotage]:
    def register(break_it: Sabotage) -> Sabotage:
        BROKEN_VARIANTS[break_it.__name__] = (case, break_it, reason)
        return break_it

    return register


@sabotage_of("mlp-auto-v", "finite norms: expected aten.logical_and.default, found aten.lt.Scalar")
def norms_of_zero_let_through(p: Parts) -> None:
    p.put(p.keep, 1, p.up(p.finite))


@sabotage_of("mlp-auto-v", "norms above zero: found 0.0")
def norms_let_through_that_overflow_the_factor(p: Parts) -> None:
    p.put(p.up(p.finite, 1), 1, 0.0)


@sabotage_of("mlp-auto-v", "the two tests of the norm use different norms")
def another_norm_in_the_test_above_zero(p: Parts) -> None:
    above = p.up(p.finite, 1)
    p.put(above, 0, p.before(above, aten.mul.Scalar, p.squared, 4.0))


@sabotage_of("mlp-auto-v", "norm: expected aten.sqrt.default, found aten.clamp_min.default")
def a_norm_that_is_cut_from_above(p: Parts) -> None:
    p.put(p.reciprocal, 0, p.before(p.reciprocal, aten.clamp_min.default, p.norm, 1e-3))


@sabotage_of("mlp-per-layer", "two layers share one weight")
def one_layer_weighted_by_the_other(p: Parts) -> None:
    p.put(p.products[1], 0, p.weights)


@sabotage_of("mlp-per-layer", "non-finite rows: where.* is used 2 times")
def a_layer_summed_twice_and_the_other_never(p: Parts) -> None:
    p.put(p.products[1], 1, p.rows)


@sabotage_of("mlp-per-layer", "finite test and the factor use different norms|is used 3 times")
def the_norm_of_one_layer_in_the_factor_of_the_other(p: Parts) -> None:
    other = p.up(p.products[1], 0, 0, 0, 1, 0, 0, 0)
    assert other.target is aten.sqrt.default
    p.put(other, 0, p.squared)


@sabotage_of("text-per-layer", "clip factor R: found 0.4, expected the public constant 0.3")
def the_bounds_of_two_layers_exchanged(p: Parts) -> None:
    p.put(p.factor, 1, 0.4)


@sabotage_of("text-per-layer", "norm: 1 terms were added up, expected 2")
def a_layer_left_out_of_the_finite_test(p: Parts) -> None:
    stack = p.up(p.finite, 0, 0)
    assert stack.target is aten.stack.default
    p.put(stack, 0, [p.squared])


@sabotage_of("text-per-layer", "noise scale sigma . R")
def the_noise_of_one_layer_only(p: Parts) -> None:
    p.put(p.scaled, 1, noise_scale(SIGMA, 0.4, N))


@sabotage_of("text-per-layer", "clip factor: expected aten.clamp_min.default, found aten.add.Scalar|clip factor R")
def the_layers_clipped_by_another_rule_than_declared(p: Parts) -> None:
    p.put(p.reciprocal, 0, p.before(p.reciprocal, aten.add.Scalar, p.norm, 0.01))


@sabotage_of("text-per-layer", "do not make up the sensitivity|noise scale")
def a_total_that_is_less_than_its_layers(p: Parts) -> None:
    clipping = PerLayerClipping(layer_norms={"mix": 0.3, "head": 0.4})
    object.__setattr__(clipping, "max_grad_norm", 0.4)
    p.changes["clipping"] = clipping
    p.put(p.scaled, 1, noise_scale(SIGMA, 0.4, N))


@sabotage_of("mlp-per-layer", "weighted sum: found 0, expected the public constant 1|weighted sum")
def the_sums_of_the_layers_stacked(p: Parts) -> None:
    p.put(p.up(p.total), 1, 0)


@pytest.mark.parametrize("kind", BROKEN_VARIANTS)
def test_a_sabotaged_variant_is_refused_for_its_own_reason(kind: str) -> None:
    case, break_it, reason = BROKEN_VARIANTS[kind]
    joint = compiled_once(case).joint
    broken = sabotaged(joint, break_it)
    assert differs(broken, joint)
    with pytest.raises(SealBroken, match=reason):
        seal(broken)


def sabotaged(joint: JointGraph, break_it: Sabotage) -> JointGraph:
    parts = Parts(joint)
    break_it(parts)
    return parts.done()


def differs(one: JointGraph, other: JointGraph) -> bool:
    return any(
        (
            str(one.module.graph) != str(other.module.graph),
            one.inputs != other.inputs,
            one.noise != other.noise,
            one.clipping != other.clipping,
        )
    )


def test_there_are_more_kinds_of_sabotage_than_the_design_asks_for() -> None:
    assert len(SABOTAGES) >= 60


def test_the_untouched_graph_passes(step: PrivateStep) -> None:
    for joint in (step.joint, Parts(step.joint).done()):
        assert seal(joint) is joint
        assert not differs(joint, step.joint) and joint.text() == step.joint.text()


@pytest.mark.parametrize("kind", SABOTAGES)
def test_a_sabotaged_graph_is_refused_for_its_own_reason(step: PrivateStep, kind: str) -> None:
    break_it, reason = SABOTAGES[kind]
    broken = sabotaged(step.joint, break_it)
    assert differs(broken, step.joint)
    with pytest.raises(SealBroken, match=reason):
        seal(broken)
    with pytest.raises(SealBroken, match=reason):
        split(broken)


# --- every edge, constant and operator of the tail, one at a time


def every_mutation(joint: JointGraph) -> Iterator[tuple[str, JointGraph]]:
    """Each single change of the tail: an edge moved or scaled, a constant changed, an operator changed, a second use."""
    private = {i.name for i in joint.inputs if i.role not in (Role.FROZEN, Role.TRAINABLE)}
    for at in range(len(Parts(joint).tail)):
        base = Parts(joint)
        name, feeds = base.tail[at].name, base.tail[at].all_input_nodes
        leaving = base.tail[at] in base.pieces  # its input is the gradient, where the template ends
        for k, _ in enumerate(feeds if not leaving else []):
            parts = Parts(joint)
            node = parts.tail[at]
            parts.wrap(node.all_input_nodes[k], node, aten.mul.Scalar, 1.5)
            yield f"{name}: input {k} scaled", parts.proof_only()
            nodes = list(base.graph.nodes)
            for j, candidate in enumerate(nodes[: nodes.index(base.tail[at])]):
                if candidate is not feeds[k] and (candidate.name in private or candidate in base.tail):
                    parts = Parts(joint)
                    node, other = parts.tail[at], list(parts.graph.nodes)[j]
                    node.replace_input_with(node.all_input_nodes[k], other)
                    yield f"{name}: input {k} is {other}", parts.proof_only()
        for k, value in enumerate(base.tail[at].args):
            changed: list[Any] = []
            if isinstance(value, (int, float)):
                changed = [value * 1.5 + 1, value * (1 + 1e-9) + 1e-9, -value - 1, True, None]
            elif isinstance(value, list) and all(isinstance(v, int) for v in value):
                changed = [[*value, 1], value[:-1], [v + 1 for v in value], None]
            elif isinstance(value, list) and isinstance(value[-1], int):  # a view [B, n]
                changed = [[-1, *value[1:]], [*value, 1], value[:-1], [1, *value[1:]], [value[0], value[1] + 1]]
            for new in changed:
                parts = Parts(joint)
                new = [parts.named[v.name] if isinstance(v, fx.Node) else v for v in new] if type(new) is list else new
                parts.put(parts.tail[at], k, new)
                yield f"{name}: argument {k} is {new}", parts.proof_only()
        for target in sorted({n.target for n in base.tail}, key=str):
            if target is not base.tail[at].target:
                parts = Parts(joint)
                parts.tail[at].target = target
                yield f"{name}: {target}", parts.proof_only()
        every: list[dict[str, Any]] = [{"alpha": 2}, {"dtype": torch.float16}, {"out": None}]
        for options in every:
            parts = Parts(joint)
            parts.tail[at].kwargs = options
            yield f"{name}: {options}", parts.proof_only()
        parts = Parts(joint)
        parts.tail[at].args = (*parts.tail[at].args, 1)
        yield f"{name}: one argument more", parts.proof_only()
        if at < len(base.tail) - 1:
            parts = Parts(joint)
            parts.before(parts.output, aten.neg.default, parts.tail[at])
            parts.keep_dead = True
            yield f"{name}: used again", parts.proof_only()
        parts = Parts(joint)
        parts.out(parts.div, parts.tail[at])
        yield f"{name}: also an output", parts.proof_only()


def test_no_single_change_anywhere_in_the_tail_passes(step: PrivateStep) -> None:
    """Mutation testing of the template itself: a constraint that nobody checks shows up here by name."""
    survivors, count = [], 0
    for what, broken in every_mutation(step.joint):
        count += 1
        try:
            facts.sealed(broken)
        except SealBroken:
            continue
        survivors.append(what)
    assert survivors == [] and count > 500


def test_no_single_change_in_the_tail_of_a_variant_passes(variant: PrivateStep) -> None:
    seal(Parts(variant.joint).done())
    survivors = []
    for what, broken in every_mutation(variant.joint):
        try:
            facts.sealed(broken)
        except SealBroken:
            continue
        survivors.append(what)
    assert survivors == []


# --- the two halves


def test_both_halves_are_proved_and_are_the_whole(step: PrivateStep) -> None:
    partial, update = split(step.joint)
    facts.partial(partial)
    check_update(update)
    assert seal_partial(partial) is partial
    assert [i.role for i in update.inputs] == [Role.ACCUMULATOR, Role.NOISE]
    assert Role.NOISE not in {i.role for i in partial.inputs}
    values = [*partial.values(step._example_leaves()), torch.ones(4)]
    start, z = torch.randn(step.num_trainable), torch.randn(step.num_trainable)
    (whole,) = step.joint.module(*values, start, z)
    (halfway,) = partial.module(*values, start)
    assert torch.equal(whole, update.module(halfway, z)[0])


def test_the_code_that_runs_is_the_graph_that_was_proved(step: PrivateStep) -> None:
    assert step.update is not None
    for half in (step.partial, step.update):
        assert half.module.code == half.module.graph.python_code("self").src


def test_neither_half_passes_for_the_whole(step: PrivateStep) -> None:
    partial, update = split(step.joint)
    for half in (partial, update):
        with pytest.raises(SealBroken):
            facts.sealed(half)
    with pytest.raises(SealBroken):
        facts.partial(update)
    with pytest.raises(SealBroken):
        check_update(partial)
    with pytest.raises(SealBroken):
        check_update(step.joint)


@pytest.mark.parametrize("kind", ["clipped", "gradient", "norm", "accumulator used again"])
def test_a_partial_half_that_says_more_is_refused(step: PrivateStep, kind: str) -> None:
    whole = Parts(step.joint)
    extra = {"clipped": whole.total, "gradient": whole.gradients[0], "norm": whole.norm}.get(kind, whole.result)
    whole.out(whole.result, extra)
    if extra is whole.result:
        whole.out(whole.before(whole.output, aten.add.Tensor, whole.result, whole.accumulator))
    whole.graph.eliminate_dead_code()
    whole.graph.erase_node(whole.z)
    whole.inputs = [i for i in whole.inputs if i.role is not Role.NOISE]
    with pytest.raises(SealBroken):
        seal_partial(whole.done())


UPDATES: dict[str, Callable[[fx.Graph], Any]] = {
    "an extra node": lambda g: tap(g, "add_tensor", aten.neg.default),
    "a scaled accumulator": lambda g: wrap_first(g, "add_tensor", aten.mul.Scalar, 2.0),
    "a scaled output": lambda g: wrap_first(g, "div_scalar", aten.mul.Scalar, 2.0),
    "a scaled noise": lambda g: wrap_first(g, "mul_scalar", aten.mul.Scalar, 0.5),
    "another denominator": lambda g: put_second(g, "div_scalar", 1.0),
    "another scale": lambda g: put_second(g, "mul_scalar", 1.0),
    "noise twice": lambda g: put_second(g, "add_tensor", find(g, "accumulator")),
    "a bare output": lambda g: setattr(g.output_node(), "args", (find(g, "div_scalar"),)),
}


def find(graph: fx.Graph, name: str) -> fx.Node:
    (found,) = [n for n in graph.nodes if n.name == name]
    assert isinstance(found, fx.Node)
    return found


def tap(graph: fx.Graph, name: str, target: Any) -> None:
    with graph.inserting_before(graph.output_node()):
        graph.call_function(aten.neg.default, (graph.call_function(target, (find(graph, name),)),))


def wrap_first(graph: fx.Graph, name: str, target: Any, *args: Any) -> None:
    node = find(graph, name)
    with graph.inserting_before(node):
        node.args = (graph.call_function(target, (node.args[0], *args)), *node.args[1:])


def put_second(graph: fx.Graph, name: str, value: Any) -> None:
    find(graph, name).args = (find(graph, name).args[0], value)


@pytest.mark.parametrize("kind", UPDATES)
def test_a_sabotaged_update_half_is_refused(step: PrivateStep, kind: str) -> None:
    _, update = split(step.joint)
    graph, _ = copy_graph(update.module)
    UPDATES[kind](graph)
    broken = dataclasses.replace(update, module=fx.GraphModule(torch.nn.Module(), graph))
    with pytest.raises(SealBroken):
        check_update(broken)


def test_an_update_half_that_takes_the_noise_for_the_sum_is_refused(step: PrivateStep) -> None:
    """``update(sum, noise)`` would give ``(noise + sum * sigma R) / N``: another scale of the noise, and of the sum."""
    _, update = split(step.joint)
    graph, _ = copy_graph(update.module)
    find(graph, "accumulator").prepend(find(graph, "noise"))
    broken = dataclasses.replace(
        update, module=fx.GraphModule(torch.nn.Module(), graph), inputs=tuple(reversed(update.inputs))
    )
    with pytest.raises(SealBroken, match="not in the order in which they are fed"):
        check_update(broken)


def test_an_update_half_with_a_node_that_only_reads_an_input_is_refused(step: PrivateStep) -> None:
    _, update = split(step.joint)
    graph, _ = copy_graph(update.module)
    with graph.inserting_before(graph.output_node()):
        graph.call_function(aten.zeros.default, ([3],))
    with pytest.raises(SealBroken, match="holds more than the accumulator"):
        check_update(dataclasses.replace(update, module=fx.GraphModule(torch.nn.Module(), graph)))


# --- rows mixed before the clip: outside the reach of the template, caught on what finally runs

MIXERS: dict[str, Callable[[Parts, fx.Node], fx.Node]] = {
    "rows reversed": lambda p, g: p.before(p.pieces[0], aten.flip.default, g, [0]),
    "rows rolled": lambda p, g: p.before(p.pieces[0], aten.roll.default, g, [1], [0]),
    "rows summed as they go": lambda p, g: p.before(p.pieces[0], aten.cumsum.default, g, 0),
    "batch mean subtracted": lambda p, g: p.before(
        p.pieces[0], aten.sub.Tensor, g, p.before(p.pieces[0], aten.mean.dim, g, [0], True)
    ),
    "first row added to all": lambda p, g: p.before(
        p.pieces[0], aten.add.Tensor, g, p.before(p.pieces[0], aten.slice.Tensor, g, 0, 0, 1)
    ),
    "divided by the largest row": lambda p, g: p.before(
        p.pieces[0], aten.div.Tensor, g, p.before(p.pieces[0], aten.amax.default, g, [0], True)
    ),
    "read column by column": lambda p, g: p.before(
        p.pieces[0],
        aten.reshape.default,
        p.before(p.pieces[0], aten.t.default, p.before(p.pieces[0], aten.reshape.default, g, [3, -1])),
        [3, -1],
    ),
}


def floats_of(p: Parts) -> fx.Node:
    """The floating point entry of the batch: the points, or the weights of the texts."""
    entries = {i.target: i.name for i in p.joint.with_role(Role.BATCH)}
    node: fx.Node = p.named[entries.get("weight", p.batch[0].name)]
    return node


def doubled_where_a_number_is_huge(p: Parts, g: fx.Node) -> fx.Node:
    """A comparison with NaN is false: it shows only where another row holds a large number."""
    huge = p.before(p.pieces[0], aten.gt.Scalar, p.before(p.pieces[0], aten.max.default, floats_of(p)), 1e3)
    return p.before(p.pieces[0], aten.mul.Tensor, g, p.before(p.pieces[0], aten.add.Scalar, huge, 1))


def dropped_where_a_number_is_infinite(p: Parts, g: fx.Node) -> fx.Node:
    """A step that is skipped for everyone where one record overflows, as mixed precision does."""
    overflow = p.before(p.pieces[0], aten.any.default, p.before(p.pieces[0], aten.isinf.default, floats_of(p)))
    return p.before(p.pieces[0], aten.mul.Tensor, g, p.before(p.pieces[0], aten.logical_not.default, overflow))


def flipped_where_a_number_is_very_negative(p: Parts, g: fx.Node) -> fx.Node:
    least = p.before(p.pieces[0], aten.lt.Scalar, p.before(p.pieces[0], aten.min.default, floats_of(p)), -1e3)
    return p.before(p.pieces[0], aten.where.self, least, p.before(p.pieces[0], aten.neg.default, g), g)


@pytest.mark.parametrize(
    "mix",
    [doubled_where_a_number_is_huge, dropped_where_a_number_is_infinite, flipped_where_a_number_is_very_negative],
)
def test_rows_mixed_only_where_one_of_them_is_extreme_are_caught(
    step: PrivateStep, mix: Callable[[Parts, fx.Node], fx.Node]
) -> None:
    with pytest.raises(SealBroken, match=r"mixes rows"):
        check_rows(runs_instead(step, mix))


def scaled_by_row_number(p: Parts, g: fx.Node) -> fx.Node:
    """Removing the first record moves every other one up a row: the sum may change by R for each."""
    rows = p.before(p.pieces[0], aten.sym_size.int, p.batch[0], 0)
    numbers = p.before(p.pieces[0], aten.add.Scalar, p.before(p.pieces[0], aten.arange.default, rows), 1)
    return p.before(p.pieces[0], aten.mul.Tensor, g, p.before(p.pieces[0], aten.unsqueeze.default, numbers, 1))


def fifth_row_added_to_all(p: Parts, g: fx.Node) -> fx.Node:
    """In a batch of fewer than five rows there is nothing to see."""
    fifth = p.before(p.pieces[0], aten.slice.Tensor, g, 0, 4, 5)
    return p.before(p.pieces[0], aten.add.Tensor, g, p.before(p.pieces[0], aten.sum.dim_IntList, fifth, [0], True))


@pytest.mark.parametrize("mix", [scaled_by_row_number, fifth_row_added_to_all])
def test_rows_that_depend_on_their_place_or_on_a_far_row_are_caught(
    step: PrivateStep, mix: Callable[[Parts, fx.Node], fx.Node]
) -> None:
    with pytest.raises(SealBroken, match=r"mixes rows"):
        check_rows(runs_instead(step, mix))


def runs_instead(step: PrivateStep, mix: Callable[[Parts, fx.Node], fx.Node]) -> PrivateStep:
    """The step with another graph behind ``accumulate``; its seal still holds, for the template ends at the gradients."""
    parts = Parts(step.joint)
    mixed = mix(parts, parts.gradients[0])
    parts.pieces[0].replace_input_with(parts.gradients[0], mixed)
    partial, update = split(parts.done())
    other = copy.copy(step)
    other.partial, other.update, other._lowered = partial, update, Lowered(partial, "eager")
    return other


@pytest.mark.parametrize("kind", MIXERS)
def test_rows_mixed_before_the_clip_are_caught_on_what_finally_runs(step: PrivateStep, kind: str) -> None:
    with pytest.raises(SealBroken, match="mixes rows"):
        check_rows(runs_instead(step, MIXERS[kind]))


def test_a_backend_that_mixes_rows_is_caught(step: PrivateStep) -> None:
    other = copy.copy(step)
    other._lowered = copy.copy(step._lowered)
    at = [i for i, x in enumerate(step._lowered.joint.inputs) if x.role is Role.BATCH]

    def leaky(*values: Tensor) -> Any:
        rolled = [v.roll(1, 0) if i in at else v for i, v in enumerate(values)]
        return step._lowered.joint.module(*rolled)

    other._lowered.runner = copy.copy(step._lowered.runner)
    other._lowered.runner._call = leaky
    with pytest.raises(SealBroken, match="mixes rows"):
        check_rows(other)


def test_check_rows_accepts_the_step_itself_and_rows_treated_alike(step: PrivateStep) -> None:
    check_rows(step)
    check_rows(runs_instead(step, lambda p, g: p.before(p.pieces[0], aten.mul.Scalar, g, 2.0)))
