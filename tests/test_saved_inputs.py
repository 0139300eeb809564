"""What the backward pass does not need is not kept for it: bit for bit the same sum, in less memory."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from memory import peak_bytes
from torch import Tensor, nn

import dpbitfit_fx as dpb
from dpbitfit_fx.compile import check_rows
from dpbitfit_fx.passes import facts

aten = torch.ops.aten


class Stack(nn.Module):
    """Convolutions of several strides with frozen weights, ReLU between them, a pool and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.convs = nn.ModuleList(
            [nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 2, 3)]
        )
        self.norm, self.head = nn.BatchNorm2d(8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Any:
        x = F.max_pool2d(F.relu(self.norm(self.convs[0](x))), 2)
        x = x + F.relu(self.convs[1](x))
        return self.head(F.relu(self.convs[2](x)).mean((2, 3)))


def loss(model: Any, batch: Any) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1], reduction="none")


def images(size: int = 4) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(size)
    return torch.randn(size, 3, 22, 22, generator=generator), torch.arange(size) % 3


def both(model: nn.Module, **options: Any) -> list[dpb.PrivateStep]:
    return [dpb.compile(model, loss, images(), disable=["in_place", *off], **options) for off in ([], ["saved_inputs"])]


def stack() -> Stack:
    torch.manual_seed(0)
    return Stack().eval()


def targets(step: dpb.PrivateStep) -> list[Any]:
    return [n.target for n in step._lowered.joint.module.graph.nodes]


def total(step: dpb.PrivateStep, batch: Any) -> Tensor:
    return step.accumulate(batch, torch.ones(batch[0].shape[0]), step.zero_accumulator())


def test_convolutions_pools_and_relus_keep_none_of_their_inputs() -> None:
    on, off = both(stack())
    assert on.report().optimized == (
        "saved inputs: 2 convolution inputs are not kept for the backward pass",
        "saved inputs: 1 pool inputs are not kept for the backward pass",
        "saved inputs: 3 ReLU inputs are not kept for the backward pass",
    )
    gone = {aten.convolution_backward.default, aten.threshold_backward.default}
    assert not gone & set(targets(on)) and gone < set(targets(off))


@pytest.mark.parametrize("size", [1, 3, 8])
def test_the_sum_is_the_same_for_every_batch_size(size: int) -> None:
    on, off = both(stack())
    ours, theirs = total(on, images(size)), total(off, images(size))
    assert float((ours - theirs).norm()) <= 1e-6 * float(theirs.norm())


def test_the_peak_of_a_step_falls() -> None:
    torch.manual_seed(0)
    layers = [layer for i in range(8) for layer in (nn.Conv2d(4 if i else 3, 4, 3, padding=1), nn.ReLU())]
    on, off = both(nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3)))
    batch = images(32)
    ours, theirs = (peak_bytes(functools.partial(total, step, batch)) for step in (on, off))
    assert ours < 0.7 * theirs


def test_the_sealed_graph_is_the_one_before_and_the_template_matches_after() -> None:
    on, off = both(stack(), noise_multiplier=1.0, expected_batch_size=4.0)
    assert on.graph_hash == off.graph_hash and on.partial.text() == off.partial.text()
    facts.partial(on._lowered.joint)


def test_a_convolution_whose_weight_is_trained_keeps_its_input() -> None:
    on, _ = both(stack(), trainable=["bias", "convs.1.weight"])
    assert "2 convolution" in on.report().optimized[0]  # the gradients of the inputs
    assert aten.convolution_backward.default in targets(on)
    assert_is_the_loop(on)


def assert_is_the_loop(step: dpb.PrivateStep) -> None:
    batch = images()
    found, params = step.per_sample_gradients(batch), dict(step.model.named_parameters())
    for row in range(4):
        theirs = torch.autograd.grad(
            loss(step.model, [x[row : row + 1] for x in batch]).sum(), [params[n] for n in found]
        )
        for name, expected in zip(found, theirs, strict=True):
            assert torch.allclose(found[name][row], expected, atol=1e-5)


def test_a_relu_that_a_trained_product_reads_keeps_its_numbers_and_makes_no_mask() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(3 * 22 * 22, 5), nn.ReLU(), nn.Linear(5, 3))
    assert both(model, trainable=["bias", "3.weight"])[0].report().optimized == ()
    (line,) = both(model)[0].report().optimized
    assert line == "saved inputs: 1 ReLU inputs are not kept for the backward pass"


GEOMETRIES = [  # size, kernel, stride, padding, dilation, groups, transposed
    (9, 3, 1, 1, 1, 1, False),
    (10, 3, 2, 1, 1, 1, False),
    (11, 2, 3, 0, 1, 2, False),
    (13, 3, 2, 2, 3, 1, False),
    (8, 1, 2, 0, 1, 4, False),
    (7, 3, 2, 1, 1, 2, True),
]


@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_the_gradient_of_a_convolution_is_the_transposed_one_at_every_geometry(geometry: Any) -> None:
    size, kernel, stride, padding, dilation, groups, transposed = geometry
    torch.manual_seed(0)
    options = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups}
    conv = nn.ConvTranspose2d(4, 8, kernel, **options) if transposed else nn.Conv2d(4, 8, kernel, **options)

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.conv, self.head = nn.Conv2d(3, 4, 1), conv, nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Any:
            return self.head(torch.tanh(self.conv(self.first(x[:, :, :size, :size]))).mean((2, 3)))

    on, off = both(Net().eval())
    assert aten.convolution_backward.default not in targets(on)
    ours, theirs = total(on, images()), total(off, images())
    assert float((ours - theirs).norm()) <= 1e-6 * float(theirs.norm())


def test_a_transposed_convolution_that_pads_its_output_by_a_stride_keeps_its_own_backward() -> None:
    torch.manual_seed(0)
    turned = nn.ConvTranspose2d(3, 4, 3, dilation=2, output_padding=1)
    model = nn.Sequential(nn.Conv2d(3, 3, 1), turned, nn.Tanh(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3))
    on, off = both(model)
    assert targets(on).count(aten.convolution_backward.default) == 1
    ours, theirs = total(on, images()), total(off, images())
    assert float((ours - theirs).norm()) <= 1e-6 * float(theirs.norm())


def test_a_lowering_that_changes_the_numbers_is_caught_however_large_the_clipping_norm() -> None:
    torch.manual_seed(0)
    step = dpb.compile(stack(), loss, images(), clipping=dpb.FlatClipping(1e6))
    runs = step._lowered.runner._call
    step._lowered.runner._call = lambda *values: (1.05 * runs(*values)[0],)
    with pytest.raises(dpb.SealBroken, match="the clipped sum is off by"):
        check_rows(step)


def test_the_pools_read_nothing_of_their_input_but_its_shape() -> None:
    x = torch.randn(2, 3, 8, 8)
    out, index = aten.max_pool2d_with_indices(x, [2, 2])
    g, small = torch.randn_like(out), torch.randn(2, 3, 1, 1)
    for fill in (float("nan"), 0.0):
        spoiled = torch.full((1, 1, 1, 1), fill).expand(x.shape)
        calls: tuple[Callable[[torch.Tensor], torch.Tensor], ...] = (
            lambda y: aten.max_pool2d_with_indices_backward(g, y, [2, 2], [2, 2], [0, 0], [1, 1], False, index),
            lambda y: aten.avg_pool2d_backward(g, y, [2, 2], [2, 2], [0, 0], False, True, None),
            lambda y: aten._adaptive_avg_pool2d_backward(small, y),
        )
        for call in calls:
            assert torch.equal(call(spoiled), call(x))


def test_a_nan_in_a_record_passes_through_the_mask_as_through_the_relu() -> None:
    on, off = both(stack())
    batch = images()
    batch[0][1, 0, 3, 3] = float("nan")
    alone = torch.tensor([1.0, 0.0, 1.0, 1.0])
    ours, theirs = (s.accumulate(batch, torch.ones(4), s.zero_accumulator()) for s in (on, off))
    assert torch.equal(ours, on.accumulate(batch, alone, on.zero_accumulator()))
    assert float((ours - theirs).norm()) <= 1e-6 * float(theirs.norm())
