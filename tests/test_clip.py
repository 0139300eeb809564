"""The clipped sum and the released gradient, against an oracle in float64 that is written without tensors' tricks."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from fit_cases import mlp, mlp_loss
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from dpbitfit_fx.compile import PrivateStep
from dpbitfit_fx.compile import compile as compile_step
from dpbitfit_fx.errors import CompileRefused, SealBroken
from dpbitfit_fx.passes.clipping import AutomaticClipping, AutoVClipping, Clipping, FlatClipping, PerLayerClipping
from dpbitfit_fx.passes.errors import DPBitFitError

R, SIGMA, N = 0.5, 1.25, 16.0
LAYERED = PerLayerClipping(layer_norms={"inner": 0.3, "outer": 0.4})
CLIPPINGS = [
    FlatClipping(R),
    AutomaticClipping(R),
    AutomaticClipping(R, gamma=1e-6),
    AutoVClipping(R),
    PerLayerClipping(R),
    LAYERED,
]


class TwoLayers(nn.Module):
    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 6, dtype=dtype)
        self.outer = nn.Linear(6, 2, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.outer(torch.tanh(self.inner(x)))
        return result


def weighted_loss(model: Any, batch: Any) -> Tensor:
    """A loss per sample times its own weight: the gradient has whatever scale the weight says."""
    squares: Tensor = model(batch["x"]).square().sum(1) + model(batch["x"]).sum(1)
    losses: Tensor = squares * batch["weight"]
    return losses


def points(size: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(size, 4, generator=generator, dtype=torch.float64)
    return {"x": x.to(dtype), "weight": torch.ones(size, dtype=dtype)}


def make(clipping: Clipping, dtype: torch.dtype = torch.float32) -> PrivateStep:
    torch.manual_seed(0)
    return compile_step(TwoLayers(dtype), weighted_loss, points(3, dtype=dtype), clipping=clipping)


@pytest.fixture(scope="module")
def steps() -> dict[Clipping, PrivateStep]:
    return {clipping: make(clipping) for clipping in CLIPPINGS}


def flat(step: PrivateStep, batch: Any, mask: Tensor | None = None) -> Tensor:
    size = batch["x"].shape[0]
    return step.accumulate(batch, torch.ones(size) if mask is None else mask, step.zero_accumulator())


def oracle(step: PrivateStep, batch: Any, mask: list[float], clipping: Clipping) -> tuple[list[float], float]:
    """A Python loop over samples and coordinates in float64, from the per-sample gradients; and the sum of the norms."""
    gradients = step.per_sample_gradients(batch)
    total, norms = [0.0] * step.num_trainable, 0.0
    for row in range(len(mask)):
        pieces = {n: gradients[n][row].double().flatten().tolist() for n in step.trainable_names}
        size = math.sqrt(math.fsum(v * v for values in pieces.values() for v in values))
        if mask[row] == 0 or not math.isfinite(size) or size >= 1e30:
            continue
        factors = {}
        for name in pieces:
            bound, alike = clipping.max_grad_norm, list(pieces)
            if isinstance(clipping, PerLayerClipping):
                layer = name.split(".")[0]
                bound, alike = dict(clipping.layer_norms or {}).get(layer, R / 2**0.5), [f"{layer}.bias"]
            norm = math.sqrt(math.fsum(v * v for other in alike for v in pieces[other]))
            if isinstance(clipping, AutomaticClipping):
                factors[name] = bound / (norm + clipping.gamma)
            elif isinstance(clipping, AutoVClipping):
                factors[name] = bound / norm if norm > 1e-12 else 0.0
            else:
                factors[name] = min(1.0, bound / norm) if norm else 1.0
        clipped = [factors[name] * v for name, values in pieces.items() for v in values]
        total = [t + v for t, v in zip(total, clipped, strict=True)]
        norms += math.sqrt(math.fsum(v * v for v in clipped))
    return total, norms


exponents = st.lists(st.floats(-20, 20), min_size=1, max_size=6)


@pytest.mark.parametrize("clipping", CLIPPINGS, ids=repr)
@settings(max_examples=40)
@given(scales=exponents, seed=st.integers(0, 9), present=st.integers(0, 63))
def test_the_clipped_sum_is_that_of_a_python_loop_in_float64_at_every_gradient_scale(
    steps: dict[Clipping, PrivateStep], clipping: Clipping, scales: list[float], seed: int, present: int
) -> None:
    step, size = steps[clipping], len(scales)
    batch = points(size, seed)
    batch["weight"] = torch.tensor([10.0**s for s in scales])
    mask = [float(present >> row & 1) for row in range(size)]
    ours = flat(step, batch, torch.tensor(mask)).double()
    theirs, norms = oracle(step, batch, mask, clipping)
    assert (ours - torch.tensor(theirs, dtype=torch.float64)).norm().item() <= 1e-6 * norms
    assert ours.norm().item() <= R * sum(mask) * (1 + 1e-6)


@pytest.mark.parametrize("clipping", [FlatClipping(R), AutomaticClipping(R), AutoVClipping(R), LAYERED], ids=repr)
def test_a_float64_model_is_clipped_in_float64(clipping: Clipping) -> None:
    step = make(clipping, torch.float64)
    batch = points(5, 1, torch.float64)
    theirs, norms = oracle(step, batch, [1.0] * 5, clipping)
    ours = flat(step, batch)
    assert ours.dtype == torch.float64
    assert (ours - torch.tensor(theirs, dtype=torch.float64)).norm().item() <= 1e-14 * norms


def test_a_gradient_shorter_than_r_is_left_as_it_is_by_flat_clipping(steps: dict[Clipping, PrivateStep]) -> None:
    step = steps[FlatClipping(R)]
    batch = points(1)
    batch["weight"] = torch.tensor([1e-3])
    gradients = step.per_sample_gradients(batch)
    raw = torch.cat([gradients[n].flatten() for n in step.trainable_names])
    assert raw.norm() < R and torch.allclose(flat(step, batch), raw, rtol=1e-6)


@pytest.mark.parametrize("clipping", CLIPPINGS, ids=repr)
@pytest.mark.parametrize(
    ("where", "poison"),
    [(w, float(p)) for w in ("x", "weight") for p in ("nan", "inf", "-inf")] + [("weight", 3.4e38)],
)
def test_a_row_with_a_non_finite_gradient_contributes_exactly_zero(
    steps: dict[Clipping, PrivateStep], clipping: Clipping, where: str, poison: float
) -> None:
    step = steps[clipping]
    batch, clean = points(4), points(4)
    batch[where][1] = poison
    gradients = step.per_sample_gradients(batch)
    assert not all(torch.isfinite(g[1]).all() and g[1].abs().max() < 1e30 for g in gradients.values())
    result = flat(step, batch)
    assert torch.isfinite(result).all()
    assert torch.equal(result, flat(step, clean, torch.tensor([1.0, 0.0, 1.0, 1.0])))


@pytest.mark.parametrize("clipping", CLIPPINGS, ids=repr)
@pytest.mark.parametrize("garbage", [0.0, 1e30, float("nan"), float("inf")])
def test_a_masked_row_contributes_exactly_zero_whatever_it_holds(
    steps: dict[Clipping, PrivateStep], clipping: Clipping, garbage: float
) -> None:
    step = steps[clipping]
    batch = points(3)
    batch["x"][2], batch["weight"][2] = garbage, garbage
    kept = flat(step, batch, torch.tensor([1.0, 1.0, 0.0]))
    assert torch.equal(kept, flat(step, points(3), torch.tensor([1.0, 1.0, 0.0])))
    start = torch.randn(step.num_trainable)
    assert torch.equal(step.accumulate(batch, torch.zeros(3), start), start)


def test_the_mask_says_present_or_absent_and_never_scales(steps: dict[Clipping, PrivateStep]) -> None:
    step = steps[FlatClipping(R)]
    for value in (1e-30, 0.5, 2.0, 1e30, -1.0, float("nan"), float("inf")):
        assert torch.equal(flat(step, points(3), torch.full((3,), value)), flat(step, points(3)))


@pytest.mark.parametrize("clipping", CLIPPINGS, ids=repr)
@settings(max_examples=20)
@given(cuts=st.lists(st.integers(1, 11), max_size=4), seed=st.integers(0, 5))
def test_accumulating_adds_up_over_every_split_of_a_batch(
    steps: dict[Clipping, PrivateStep], clipping: Clipping, cuts: list[int], seed: int
) -> None:
    step, batch = steps[clipping], points(12, seed)
    edges = [0, *sorted(set(cuts)), 12]
    total = step.zero_accumulator()
    for start, end in itertools.pairwise(edges):
        before = total.clone()
        result = step.accumulate({k: v[start:end] for k, v in batch.items()}, torch.ones(end - start), total)
        assert torch.equal(total, before), "accumulate returns a new tensor"
        total = result
    assert (total - flat(step, batch)).norm() <= 1e-6 * 12 * R


@pytest.mark.parametrize("clipping", CLIPPINGS, ids=repr)
@settings(max_examples=40)
@given(
    scales=st.lists(st.floats(-20, 20), min_size=2, max_size=12), seed=st.integers(0, 99), left_out=st.integers(0, 11)
)
def test_leaving_one_record_out_moves_the_sum_by_at_most_r(
    steps: dict[Clipping, PrivateStep], clipping: Clipping, scales: list[float], seed: int, left_out: int
) -> None:
    step, size = steps[clipping], len(scales)
    batch = points(size, seed)
    batch["weight"] = torch.tensor([10.0**s for s in scales])
    rest = [row for row in range(size) if row != left_out % size]
    without = {k: v[rest] for k, v in batch.items()}
    assert (flat(step, batch).double() - flat(step, without).double()).norm().item() <= R * (1 + 1e-5)


@pytest.mark.parametrize("clipping", CLIPPINGS, ids=repr)
def test_replacing_one_record_moves_the_sum_by_at_most_two_r_and_can_come_close(
    steps: dict[Clipping, PrivateStep], clipping: Clipping
) -> None:
    step, batch, other = steps[clipping], points(4), points(4)
    batch["weight"][0], other["weight"][0] = 1e6, -1e6
    distance = (flat(step, batch).double() - flat(step, other).double()).norm().item()
    assert 1.99 * R < distance <= 2 * R * (1 + 1e-5)


@pytest.mark.parametrize("clipping", CLIPPINGS, ids=repr)
def test_privatize_is_the_accumulator_plus_sigma_r_z_over_n_and_a_ten_thousandth_for_rounding(
    steps: dict[Clipping, PrivateStep], clipping: Clipping
) -> None:
    step = steps[clipping].with_noise(SIGMA, N)
    accumulator, z = flat(step, points(5)), torch.randn(step.num_trainable)
    by_hand = [(a + SIGMA * R * 1.0001 * n) / N for a, n in zip(accumulator.tolist(), z.tolist(), strict=True)]
    assert torch.allclose(
        step.privatize(accumulator, z).double(), torch.tensor(by_hand, dtype=torch.float64), rtol=1e-6
    )
    assert torch.equal(step.privatize(accumulator, torch.zeros_like(z)), accumulator / N)
    quiet = step.privatize(step.zero_accumulator(), z)
    assert torch.equal(quiet, z * (SIGMA * R * 1.0001) / N), "an empty batch takes a full noisy step"


def test_noise_changes_nothing_but_the_noise(steps: dict[Clipping, PrivateStep]) -> None:
    step = steps[FlatClipping(R)]
    noisy = step.with_noise(SIGMA, N)
    assert torch.equal(flat(step, points(5)), flat(noisy, points(5)))
    assert noisy.graph_hash != step.graph_hash != noisy.with_noise(SIGMA * 2, N).graph_hash


def test_without_noise_nothing_is_released(steps: dict[Clipping, PrivateStep]) -> None:
    step = steps[FlatClipping(R)]
    with pytest.raises(SealBroken, match="no noise, so nothing may leave"):
        step.privatize(step.zero_accumulator(), torch.zeros(step.num_trainable))


@pytest.mark.parametrize(
    ("sigma", "denominator"),
    [(0.0, N), (-1.0, N), (float("nan"), N), (float("inf"), N), (1.0, 0.0), (1.0, -2.0), (1.0, float("nan"))],
)
def test_a_scale_that_is_no_noise_is_refused(
    steps: dict[Clipping, PrivateStep], sigma: float, denominator: float
) -> None:
    with pytest.raises(DPBitFitError, match=r"noise_multiplier|expected_batch_size"):
        steps[FlatClipping(R)].with_noise(sigma, denominator)


def test_shapes_that_would_broadcast_are_refused(steps: dict[Clipping, PrivateStep]) -> None:
    step = steps[FlatClipping(R)].with_noise(SIGMA, N)
    zero = step.zero_accumulator()
    for wrong in (torch.zeros(1), torch.zeros(()), zero.double(), torch.zeros(2, step.num_trainable)):
        with pytest.raises(CompileRefused, match="expected"):
            step.privatize(zero, wrong)
        with pytest.raises(CompileRefused, match="expected"):
            step.accumulate(points(3), torch.ones(3), wrong)
    for mask in (torch.ones(1), torch.ones(4), torch.ones(3, 3)):
        with pytest.raises(CompileRefused, match="sample_mask"):
            step.accumulate(points(3), mask, zero)


def test_a_loss_of_which_only_the_shape_is_read_is_not_computed() -> None:
    step = compile_step(mlp(), mlp_loss, (torch.randn(3, 4), torch.tensor([0, 1, 0])), clipping=FlatClipping(R))
    called = [n.target for n in step.joint.module.graph.nodes]
    assert torch.ops.aten.gather.default not in called and torch.ops.aten.neg.default not in called, called
    assert torch.ops.aten._log_softmax.default in called  # its gradient reads that
    assert torch.ops.aten.ones_like.default not in called and torch.ops.aten.new_ones.default in called


def test_a_loss_whose_gradient_reads_it_is_kept() -> None:
    def exponential(model: Any, batch: Any) -> Tensor:
        return torch.exp(model(batch["x"]).square().sum(1))

    step = compile_step(TwoLayers(torch.float32), exponential, points(3), clipping=FlatClipping(R))
    assert torch.ops.aten.exp.default in [n.target for n in step.joint.module.graph.nodes]


def test_auto_v_gives_every_gradient_the_length_r_and_a_gradient_of_zero_none(
    steps: dict[Clipping, PrivateStep],
) -> None:
    step, batch = steps[AutoVClipping(R)], points(1)
    for weight in (1e-9, 1.0, 1e15):
        batch["weight"] = torch.tensor([weight])
        assert flat(step, batch).norm().item() == pytest.approx(R, rel=1e-6)
    batch["weight"] = torch.zeros(1)
    assert torch.equal(flat(step, batch), step.zero_accumulator())


def test_each_layer_is_bounded_on_its_own_and_all_together_by_the_root_of_their_squares() -> None:
    step, batch = make(LAYERED), points(1)
    batch["weight"] = torch.tensor([1e6])
    sums = step.unflatten(flat(step, batch))
    assert sums["inner.bias"].norm().item() == pytest.approx(0.3, rel=1e-6)
    assert sums["outer.bias"].norm().item() == pytest.approx(0.4, rel=1e-6)
    assert LAYERED.sensitivity == LAYERED.max_grad_norm == step.max_grad_norm == pytest.approx(0.5)


def test_a_layer_is_a_module_and_may_be_one_parameter() -> None:
    torch.manual_seed(0)
    norms = {"inner": 0.3, "outer.weight": 0.4, "outer": 1.2}
    step = compile_step(
        TwoLayers(torch.float32),
        weighted_loss,
        points(3),
        trainable=["*"],
        clipping=PerLayerClipping(layer_norms=norms),
    )
    batch = points(1)
    batch["weight"] = torch.tensor([1e6])
    sums = step.unflatten(flat(step, batch))
    inner = torch.cat([sums[n].flatten() for n in ("inner.weight", "inner.bias")])
    found = [inner.norm().item(), sums["outer.weight"].norm().item(), sums["outer.bias"].norm().item()]
    assert found == pytest.approx([0.3, 0.4, 1.2], rel=1e-6) and step.max_grad_norm == pytest.approx(1.3)


@pytest.mark.parametrize(
    ("norms", "why"),
    [
        ({"inner": 0.3}, r"no bound for the layers \['outer'\]"),
        ({"inner": 0.3, "outer": 0.3, "nowhere": 1.0}, r"\['nowhere'\], which hold no trainable"),
    ],
)
def test_layers_without_a_bound_and_bounds_without_a_layer_are_refused(norms: dict[str, float], why: str) -> None:
    with pytest.raises(CompileRefused, match=why):
        make(PerLayerClipping(layer_norms=norms))


@pytest.mark.parametrize("norms", [{}, {"inner": 0.0}, {"inner": float("nan")}, {"inner": True}])
def test_bounds_per_layer_that_bound_nothing_are_refused(norms: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="layer_norms"):
        PerLayerClipping(layer_norms=norms)


@pytest.mark.parametrize("bound", [0.0, -1.0, float("nan"), float("inf"), True, 1e7, "1"])
def test_a_bound_that_bounds_nothing_is_refused(bound: Any) -> None:
    for kind in (FlatClipping, AutomaticClipping, AutoVClipping, PerLayerClipping):
        with pytest.raises(ValueError, match="max_grad_norm"):
            kind(bound)


@pytest.mark.parametrize("gamma", [0.0, 1e-300, -0.01, float("nan"), float("inf"), True])
def test_a_gamma_that_divides_by_nothing_is_refused(gamma: Any) -> None:
    with pytest.raises(ValueError, match="gamma"):
        AutomaticClipping(1.0, gamma=gamma)


def test_autocast_around_a_step_changes_no_bit_of_it() -> None:
    """Behind a norm in float64, a weighted sum rounded to bfloat16 would exceed R."""
    step = compile_step(mlp(), mlp_loss, (torch.randn(4, 4), torch.tensor([0, 1, 1, 0])), clipping=FlatClipping(1e-3))
    step = step.with_noise(1.0, 4.0)
    batch, noise = (torch.randn(4, 4), torch.tensor([0, 1, 1, 0])), torch.randn(step.num_trainable)
    alone = step.accumulate(batch, torch.ones(4), step.zero_accumulator())
    with torch.autocast("cpu", torch.bfloat16):
        total = step.accumulate(batch, torch.ones(4), step.zero_accumulator())
        released = step.privatize(total, noise)
    assert torch.equal(total, alone) and torch.equal(released, step.privatize(alone, noise))


def precisions() -> tuple[str, str]:
    backends: Any = torch.backends
    kinds = [backends.cuda.matmul, backends.mkldnn.matmul]
    return kinds[0].fp32_precision, kinds[1].fp32_precision


@pytest.mark.parametrize("setting", ["medium", "high", "tf32"])
def test_the_step_multiplies_in_float32_whatever_precision_is_set_for_other_code(setting: str) -> None:
    """TF32 and bfloat16 would round the weighted sum behind a norm that is not rounded."""
    step = compile_step(TwoLayers(torch.float32), weighted_loss, points(4))
    seen: list[tuple[str, str]] = []
    run = step._lowered.runner._call

    def watched(*values: Tensor) -> Any:
        seen.append(precisions())
        return run(*values)

    step._lowered.runner._call = watched
    backends: Any = torch.backends
    kinds = [backends.cuda.matmul, backends.mkldnn.matmul]
    before = precisions()
    try:
        if setting == "tf32":
            kinds[0].fp32_precision = kinds[1].fp32_precision = setting
        else:
            torch.set_float32_matmul_precision(setting)
        chosen = precisions()
        step.clipped_sum(points(4))
        assert precisions() == chosen != before
    finally:
        if setting != "tf32":
            torch.set_float32_matmul_precision("highest")
        for kind, precision in zip(kinds, before, strict=True):
            kind.fp32_precision = precision
    assert len(seen) == 1 and not {"tf32", "bf16"} & set(seen[0])


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.autograd.detect_anomaly])
def test_a_step_compiled_in_another_mode_of_autograd_is_the_same_step(mode: Any) -> None:
    model = TwoLayers(torch.float32)
    usual = compile_step(model, weighted_loss, points(4))
    with mode():
        other = compile_step(model, weighted_loss, points(4))
        sums = other.clipped_sum(points(3))
    assert other.graph_hash == usual.graph_hash
    assert all(torch.equal(v, sums[k]) for k, v in usual.clipped_sum(points(3)).items())
