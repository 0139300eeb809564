"""noise="grid": no row is longer than R, sums are exact, noise is a rounded normal, and the seal knows all of it."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fit_cases import Crash, biases, crash_at, mlp, mlp_loss, points, run, scaled_loss
from test_numerics import R, Shift, loss
from torch import Tensor, fx, nn

import dpbitfit_fx as dpb
from dpbitfit_fx.compile import PrivateStep
from dpbitfit_fx.engine import Engine, build_engine
from dpbitfit_fx.errors import CheckpointError, CompileRefused, ExportError, PrivacyError
from dpbitfit_fx.exact_normal import rounded_normals
from dpbitfit_fx.lowering import Lowered
from dpbitfit_fx.passes import facts
from dpbitfit_fx.passes.clipping import AutomaticClipping, AutoVClipping, Clipping, FlatClipping, PerLayerClipping
from dpbitfit_fx.passes.errors import SealBroken
from dpbitfit_fx.passes.joint_graph import JointGraph, copy_graph
from dpbitfit_fx.passes.numerics import GRID_BITS, fits_the_grid
from dpbitfit_fx.passes.seal import check_update, split
from dpbitfit_fx.placement import check_places
from dpbitfit_fx.randomness import GRID_CAVEAT, TAIL_CAVEAT, SecretKey, stream
from dpbitfit_fx.sampling import PoissonSampler

aten = torch.ops.aten
SIGMA, N = 0.7, 12.0
CLIPPINGS: tuple[Clipping, ...] = (FlatClipping(R), AutomaticClipping(R, 1e-12), AutoVClipping(R), PerLayerClipping(R))


def kind(value: Any) -> str:
    return value.kind if isinstance(value, Clipping) else str(value)


# -- no row is longer than R -------------------------------------------------------------------------------------------


class TwoShifts(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.one, self.two = Shift(width), Shift(width)

    def forward(self, x: Tensor) -> Tensor:
        both: Tensor = self.one(x) + self.two(2 * x)
        return both


@functools.cache
def shifts(clipping: Clipping, width: int = 700) -> PrivateStep:
    step: PrivateStep = dpb.compile(TwoShifts(width), loss, {"x": torch.randn(4, width)}, clipping=clipping)
    return step


def length_squared(step: PrivateStep, row: Tensor) -> Fraction:
    """Of the row's contribution, in units of R, as an exact number."""
    units = step.accumulate({"x": row[None]}, torch.ones(1), step.zero_accumulator())
    assert step.joint.noise is not None and torch.equal(units, units.trunc())
    ratio = Fraction(step.joint.noise.unit(step.clipping)) / Fraction(step.clipping.sensitivity)
    return sum((Fraction(int(x)) ** 2 for x in units.tolist()), Fraction(0)) * ratio**2


@pytest.mark.parametrize("clipping", CLIPPINGS, ids=kind)
def test_no_contribution_is_longer_than_r_in_exact_arithmetic_and_full_ones_are_hardly_shorter(
    clipping: Clipping,
) -> None:
    step = shifts(clipping).with_noise(SIGMA, N, noise="grid")
    for seed, scale in enumerate((1e-18, 1e-3, 1.0, 7.0, 1e4, 1e25)):
        row = torch.randn(700, generator=torch.Generator().manual_seed(seed)) * scale
        assert length_squared(step, row) <= 1
        assert scale < 1 or length_squared(step, row) > Fraction(1 - 2**-17)


def test_a_grid_that_rounds_to_the_nearest_or_does_not_shrink_the_factor_would_exceed_r() -> None:
    """What the two measures are for: a coarse grid shows the first, and 2^-20 is far above what the second hides."""
    row = torch.full((40,), 2.0, dtype=torch.float64)
    clipped = row * (R / row.norm())
    unit = float(clipped[0]) / 1.6
    assert (clipped / unit).round().mul(unit).norm() > R > (clipped / unit).trunc().mul(unit).norm()
    exact = sum(Fraction(float(x)) ** 2 for x in clipped)
    longer = [w for w in range(2, 200) if _overshoots(w)]
    assert longer and exact <= Fraction(R) ** 2 * (1 + Fraction(1, 2**40))


def _overshoots(width: int) -> bool:
    row = torch.rand(width, dtype=torch.float64, generator=torch.Generator().manual_seed(width))
    clipped = row * (row.norm().reciprocal() * R)
    return sum((Fraction(float(x)) ** 2 for x in clipped), Fraction(0)) > Fraction(R) ** 2


# -- sums are exact ----------------------------------------------------------------------------------------------------


def records(count: int = 40) -> list[dict[str, Any]]:
    g = torch.Generator().manual_seed(3)
    return [
        {"x": torch.randn(4, generator=g), "y": i % 2, "weight": 10.0 ** (i % 9 - 4) if i != 5 else float("nan")}
        for i in range(count)
    ]


def engine(rows: list[dict[str, Any]], physical: int, noise: str = "grid", sigma: float = SIGMA) -> Engine:
    sampler = PoissonSampler(len(rows), 0.5, 10)
    return build_engine(
        mlp(),
        scaled_loss,
        rows,
        sampler,
        sigma,
        N,
        clipping=FlatClipping(R),
        physical_batch_size=physical,
        noise=noise,
    )


@pytest.mark.parametrize("size", [1, 3, 32])
def test_a_sum_is_bit_for_bit_that_of_its_records_alone_in_any_order_and_in_float32_it_is_not(size: int) -> None:
    rows = records()
    everyone = list(range(len(rows)))
    grid, plain = engine(rows, size), engine(rows, size, "float")
    whole = grid.clipped_sum(everyone)
    alone = [grid.clipped_sum([record]) for record in everyone]
    assert torch.equal(sum(alone, grid.update.zero_accumulator()), whole)
    assert torch.equal(grid.clipped_sum(everyone[::-1]), whole)
    for record in (0, 5, 17, 39):
        rest = grid.clipped_sum([row for row in everyone if row != record])
        assert torch.equal(whole - rest, alone[record])
        assert bool(alone[record].any()) == (record != 5), "a record without a finite gradient adds nothing"
    assert not torch.equal(plain.clipped_sum(everyone[::-1]), plain.clipped_sum(everyone))
    scale = grid.update.noise_scale
    assert scale is not None
    assert torch.allclose(whole.float() * (scale / 2**GRID_BITS), plain.clipped_sum(everyone), atol=2e-5 * R)


def test_where_kernels_give_a_record_the_same_gradient_at_every_size_the_split_does_not_show_at_all() -> None:
    """The gradient of a shift is the record itself, whatever the kernel."""
    step = shifts(FlatClipping(R)).with_noise(SIGMA, N, noise="grid")
    rows = torch.randn(24, 700, generator=torch.Generator().manual_seed(8)) * torch.logspace(-6, 6, 24)[:, None]
    sums = []
    for size in (1, 5, 8, 24):
        total = step.zero_accumulator()
        for part in torch.split(rows, size):
            total = step.accumulate({"x": part}, torch.ones(len(part)), total)
        sums.append(total)
    assert bool(sums[0].any()) and all(torch.equal(total, sums[0]) for total in sums[1:])


def test_what_is_released_is_the_sum_and_the_streams_rounded_normals_in_units_over_the_denominator() -> None:
    trained, key = engine(records(), 8), SecretKey.insecure_for_tests(4)
    update, total = trained.update, trained.clipped_sum(list(range(20)))
    z = rounded_normals(stream(key, "noise", 2).words, update.num_trainable, GRID_BITS)
    released = torch.cat([g.flatten() for g in trained.private_gradient(key, 2, total).values()])
    unit = Fraction(SIGMA * R)  # 2^24 units: no less than sigma R, and hardly more
    scale = Fraction(update.noise_scale or 0)
    assert unit <= scale <= unit * (1 + Fraction(1, 2**50))
    for given, s, n in zip(released.tolist(), total.tolist(), z.tolist(), strict=True):
        assert given == pytest.approx(float((int(s) + n) * scale / 2**GRID_BITS / int(N)), rel=1e-15)
    by_name = update.clipped_sum({"x": torch.ones(1, 4), "y": torch.ones(1).long(), "weight": torch.full((1,), 1e6)})
    assert torch.cat([x.flatten() for x in by_name.values()]).norm() == pytest.approx(R, rel=2e-6), "not in units"
    halves = torch.full_like(total, 0.5)
    for accumulator, noise in ((total, halves), (total + halves, total)):
        with pytest.raises(CompileRefused, match="whole numbers"):
            update.privatize(accumulator, noise)


# -- the seal ----------------------------------------------------------------------------------------------------------

EDITS: dict[str, tuple[str, Callable[[fx.Graph], None]]] = {}


def edit(reason: str) -> Callable[[Callable[[fx.Graph], None]], Callable[[fx.Graph], None]]:
    def register(change: Callable[[fx.Graph], None]) -> Callable[[fx.Graph], None]:
        EDITS[change.__name__] = (reason, change)
        return change

    return register


def only(graph: fx.Graph, target: Any) -> Any:
    return next(n for n in reversed(list(graph.nodes)) if n.target is target)


def after(graph: fx.Graph, node: fx.Node, target: Any, *args: Any, **kwargs: Any) -> None:
    """Puts ``target(node, ...)`` between a node and its readers."""
    with graph.inserting_after(node):
        new = graph.call_function(target, (node, *args), kwargs)
    node.replace_all_uses_with(new, delete_user_cb=lambda user: user is not new)


def without(graph: fx.Graph, node: fx.Node) -> None:
    node.replace_all_uses_with(node.all_input_nodes[0])
    graph.erase_node(node)


@edit("grid: rows are rounded toward zero before they are added")
def rounding_removed(graph: fx.Graph) -> None:
    without(graph, only(graph, aten.trunc.default))


@edit("weighted sum: expected aten.sum.dim_IntList, found aten.trunc.default")
def rounding_after_the_sum(graph: fx.Graph) -> None:
    rounded = only(graph, aten.trunc.default)
    total = next(iter(rounded.users))
    without(graph, rounded)
    after(graph, total, aten.trunc.default)


@edit("grid: rows are rounded toward zero")
def rounding_to_the_nearest(graph: fx.Graph) -> None:
    only(graph, aten.trunc.default).target = aten.round.default


@edit("grid: rows are rounded toward zero")
def the_rounded_rows_scaled(graph: fx.Graph) -> None:
    after(graph, only(graph, aten.trunc.default), aten.mul.Scalar, 1.5)


@edit("clip factor R: found")
def the_factor_of_another_grid(graph: fx.Graph) -> None:
    factor: Any = next(n for n in graph.nodes if n.target is aten.mul.Scalar)
    factor.args = (factor.args[0], factor.args[1] * 2)


@edit("clip factor R: found")
def the_factor_not_shrunk(graph: fx.Graph) -> None:
    factor: Any = next(n for n in graph.nodes if n.target is aten.mul.Scalar)
    factor.args = (factor.args[0], factor.args[1] / (1 - 2.0**-20))


@edit("weights: aten._to_copy.default has the options")
def weights_in_float32(graph: fx.Graph) -> None:
    narrow = [n for n in graph.nodes if n.target is aten._to_copy.default][-1]
    narrow.kwargs = {"dtype": torch.float32}


@edit("the rounded rows are not summed over the samples")
def rows_summed_over_the_coordinates(graph: fx.Graph) -> None:
    total = next(iter(only(graph, aten.trunc.default).users))
    total.args = (total.args[0], [1])


@edit("grid: its unit: found")
def the_release_in_another_unit(graph: fx.Graph) -> None:
    units = only(graph, aten.mul.Scalar)
    units.args = (units.args[0], units.args[1] / 2)


@edit("grid: its unit: expected aten.mul.Scalar, found aten.add.Tensor")
def noise_added_in_other_units_than_the_sum(graph: fx.Graph) -> None:
    units = only(graph, aten.mul.Scalar)
    total, z = units.args[0].args
    with graph.inserting_before(units):
        scaled = graph.call_function(aten.mul.Scalar, (total, units.args[1]))
        noisy = graph.call_function(aten.add.Tensor, (scaled, z))
    units.replace_all_uses_with(noisy)


@edit("noise: expected the input noise")
def noise_scaled_once_more(graph: fx.Graph) -> None:
    after(graph, next(n for n in graph.nodes if n.op == "placeholder" and n.name == "noise"), aten.mul.Scalar, 0.5)


@functools.cache
def sealed_step(grid: bool = True) -> PrivateStep:
    example = (torch.randn(4, 4, generator=torch.Generator().manual_seed(1)), torch.tensor([0, 1, 1, 0]))
    step: PrivateStep = dpb.compile(mlp(), mlp_loss, example, clipping=AutomaticClipping(R))
    return step.with_noise(SIGMA, N, noise="grid" if grid else "float")


def edited(joint: JointGraph, change: Callable[[fx.Graph], None]) -> JointGraph:
    graph, _ = copy_graph(joint.module)
    change(graph)
    graph.eliminate_dead_code()
    graph.lint()
    return dataclasses.replace(joint, module=fx.GraphModule(nn.Module(), graph))


@pytest.mark.parametrize("name", EDITS)
def test_a_graph_on_the_grid_that_rounds_otherwise_is_refused(name: str) -> None:
    reason, change = EDITS[name]
    joint = sealed_step().joint
    facts.sealed(joint)
    with pytest.raises(SealBroken, match=reason):
        facts.sealed(edited(joint, change))
    half = split(joint)[0]
    if any(n.target is aten.trunc.default for n in half.module.graph.nodes) and "noise" not in name and "release" not in name:
        with pytest.raises(SealBroken):
            facts.partial(edited(half, change))


def test_an_update_half_in_another_unit_is_refused() -> None:
    update = split(sealed_step().joint)[1]
    check_update(update)
    with pytest.raises(SealBroken, match="grid: its unit"):
        check_update(edited(update, the_release_in_another_unit))


def test_neither_kind_of_graph_passes_for_the_other() -> None:
    grid, plain = sealed_step().joint, sealed_step(grid=False).joint
    assert grid.noise is not None and plain.noise is not None and grid.digest() != plain.digest()
    with pytest.raises(SealBroken):
        facts.sealed(dataclasses.replace(grid, noise=plain.noise))
    with pytest.raises(SealBroken):
        facts.sealed(dataclasses.replace(plain, noise=grid.noise))
    with pytest.raises(SealBroken):
        facts.partial(dataclasses.replace(split(plain)[0], noise=grid.noise))


# -- fit ---------------------------------------------------------------------------------------------------------------


def test_a_run_on_the_grid_says_so_resumes_bit_for_bit_and_costs_the_same_epsilon(tmp_path: Path) -> None:
    whole = run(None, noise="grid", physical_batch_size=5)
    with pytest.raises(Crash):
        run(tmp_path, noise="grid", physical_batch_size=5, callbacks=[crash_at(7)], checkpoint_every=5)
    with pytest.raises(CheckpointError, match="another privacy plan"):
        run(tmp_path, checkpoint_every=5)
    resumed = run(tmp_path, noise="grid", physical_batch_size=5, checkpoint_every=5)
    assert torch.equal(biases(resumed.model), biases(whole.model)) and resumed.charged_steps == 0
    said, plain = resumed.statement, run(None)
    assert said.epsilon == plain.statement.epsilon and said.noise_multiplier == plain.noise_multiplier
    assert GRID_CAVEAT in said.numeric_caveats and TAIL_CAVEAT not in said.numeric_caveats
    assert GRID_CAVEAT not in plain.statement.numeric_caveats
    assert not torch.equal(biases(plain.model), biases(whole.model))


def test_what_cannot_be_had_on_the_grid_is_refused_with_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(PrivacyError, match="Unknown noise 'discrete'; choose one of float, grid"):
        run(None, noise="discrete")
    with pytest.raises(ExportError, match="noise='grid' cannot be exported"):
        dpb.export_onnx(sealed_step(), tmp_path)
    ghosts = dpb.compile(mlp(), mlp_loss, points()[:4], trainable="all", ghost_norms=True)
    with pytest.raises(Exception, match="Leave ghost_norms out"):
        ghosts.with_noise(SIGMA, N, noise="grid")
    for sigma in (0.0, -1.0, float("nan")):
        with pytest.raises(Exception, match="noise_multiplier"):
            sealed_step(grid=False).with_noise(sigma, N, noise="grid")
    assert fits_the_grid(1.0, 10**8) and not fits_the_grid(1.0, 10**9) and not fits_the_grid(1e-3, 10**7)


def test_a_machine_whose_kernels_depend_on_the_place_is_told_to_take_one_record_at_a_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    real = Lowered.__call__

    def last_bit_by_place(self: Lowered, batch: list[Tensor], mask: Tensor, total: Tensor) -> Tensor:
        """As a kernel whose last rows are computed by another routine."""
        result = real(self, batch, mask, total)
        return torch.nextafter(result, 2 * result) if mask.numel() > 1 and bool(mask[-1]) else result

    example = (torch.randn(4, 4, generator=torch.Generator().manual_seed(1)), torch.tensor([0, 1, 1, 0]))
    step: PrivateStep = dpb.compile(mlp(), mlp_loss, example)
    for size in (1, 2, 8, 20):
        check_places(step, example, size)
    monkeypatch.setattr(Lowered, "__call__", last_bit_by_place)
    check_places(step, example, 1)
    for size in (2, 8, 20):
        with pytest.raises(CompileRefused, match="Pass physical_batch_size=1"):
            check_places(step, example, size)


def test_noise_on_the_grid_costs_well_under_a_second_a_step_for_300_000_coordinates() -> None:
    import time

    started = time.process_time()
    drawn = rounded_normals(stream(SecretKey.insecure_for_tests(1), "noise", 0).words, 300_000, GRID_BITS)
    assert time.process_time() - started < 2.0, "0.2 s were measured"
    assert np.abs(drawn).max() < 8 * 2**GRID_BITS
