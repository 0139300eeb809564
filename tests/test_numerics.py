"""The numeric slack is more than float32 rounding was ever seen to add to R, and the noise pays for it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from replay_cases import SLACK, Tally
from torch import Tensor, nn

import dpbitfit_fx as dpb
from dpbitfit_fx.accounting import epsilon
from dpbitfit_fx.compile import PrivateStep
from dpbitfit_fx.passes.clipping import FlatClipping
from dpbitfit_fx.passes.numerics import noise_scale, slack
from dpbitfit_fx.sampling import PoissonSampler

R = 0.5


class Shift(nn.Module):
    """The gradient of its bias is the record itself: any dataset of gradients can be made."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.bias


def loss(model: Any, batch: Any) -> Tensor:
    losses: Tensor = model(batch["x"]).sum(1)
    return losses


def step_of(width: int) -> PrivateStep:
    step: PrivateStep = dpb.compile(Shift(width), loss, {"x": torch.randn(4, width)}, clipping=FlatClipping(R))
    return step


def aligned(count: int, width: int, g: torch.Generator) -> Tensor:
    """All in one direction, at full norm: the sum grows to count R, and its last bit with it."""
    direction = nn.functional.normalize(torch.randn(width, generator=g), dim=0)
    return 10 * (direction + 1e-3 * torch.randn(count, width, generator=g))


def held(count: int, width: int, g: torch.Generator) -> Tensor:
    """Up to a large sum, and then to and fro: every further record is rounded at its last bit, always from the same side."""
    signs = torch.ones(count)
    signs[count // 2 :: 2] = -1
    return 10 * signs[:, None] * (torch.ones(width) + 1e-3 * torch.randn(count, width, generator=g))


def scattered(count: int, width: int, g: torch.Generator) -> Tensor:
    return torch.randn(count, width, generator=g) * 10.0 ** (torch.arange(count) % 9 - 4)[:, None]


def clipped_sum(step: PrivateStep, rows: Tensor, size: int, after: Callable[[Tensor], Tensor]) -> Tensor:
    """In physical batches of ``size``; ``after`` is done to the accumulator behind each."""
    total = step.zero_accumulator()
    for start in range(0, len(rows), size):
        chosen = rows[start : start + size]
        mask = torch.cat([torch.ones(len(chosen)), torch.zeros(size - len(chosen))])
        filled = torch.cat([chosen, torch.ones(size - len(chosen), rows.shape[1])])
        total = after(step.accumulate({"x": filled}, mask, total))
    return total.double()


def largest(width: int, count: int, size: int, after: Callable[[Tensor], Tensor] = lambda x: x) -> float:
    """The largest distance of neighbours in units of R, over kinds of datasets and places of the record, less one."""
    step, found = step_of(width), 0.0
    for make in (aligned, held, scattered):
        rows = make(count, width, torch.Generator().manual_seed(count))
        whole = clipped_sum(step, rows, size, after)
        for place in (0, 1, count // 3, count // 2, count - 1):
            others = torch.cat([rows[:place], rows[place + 1 :]])
            found = max(found, float((whole - clipped_sum(step, others, size, after)).norm()) / R)
    assert found > 0.999, "some neighbour must move the sum by R, or nothing is measured"
    return found - 1


@pytest.mark.parametrize(("count", "size"), [(16, 4), (128, 1), (256, 32), (1024, 128), (2048, 64)])
@pytest.mark.parametrize("width", [1, 4])
def test_on_aligned_hostile_and_scattered_records_rounding_stays_within_a_third_of_the_slack(
    width: int, count: int, size: int
) -> None:
    assert largest(width, count, size) < slack(count) / 3


@pytest.mark.parametrize("coarse", [torch.bfloat16, torch.float16], ids=str)
def test_a_sum_that_is_kept_in_half_precision_would_break_the_slack(coarse: torch.dtype) -> None:
    assert largest(4, 64, 4, lambda x: x.to(coarse).float()) > slack(64)


def test_a_factor_that_is_rounded_up_by_a_thousandth_would_break_the_slack_and_the_verdict_of_replays() -> None:
    step = step_of(4)
    alone = clipped_sum(step, torch.full((1, 4), 9.0), 1, lambda x: x).norm() / R
    assert abs(alone - 1) < SLACK and not Tally(largest=float(alone)).broken
    assert alone * 1.001 > 1 + slack(256) and Tally(largest=float(alone) * 1.001).broken


def test_the_noise_is_sigma_times_what_a_record_can_do_so_the_accountant_keeps_sigma() -> None:
    for count in (1.0, 64.0, 4096.0):
        noisy = step_of(4).with_noise(1.25, count)
        released = noisy.privatize(noisy.zero_accumulator(), torch.ones(4)).double() * count
        assert released.min() / (R * (1 + slack(count))) == pytest.approx(1.25, rel=2e-7)
        assert noisy.noise_scale == noise_scale(1.25, R, count) > 1.25 * R * (1 + 0.99e-4)
    assert slack(1) == slack(100) == pytest.approx(1e-4) and slack(4096) == pytest.approx(4.096e-3)


def test_to_leave_the_slack_uncharged_would_state_an_epsilon_that_is_too_low() -> None:
    sampler = PoissonSampler.from_expected_batch_size(50_000, 1024, epochs=10)
    uncharged = epsilon(sampler, 1.0 / (1 + slack(1024)), 1e-6)
    assert epsilon(sampler, 1.0, 1e-6) < uncharged < 1.005 * epsilon(sampler, 1.0, 1e-6)
