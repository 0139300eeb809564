"""Ways of mixing samples, each in a module named ``middle``: none is accepted, and the reason names it. Lookalikes are."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from mixes_with_state import MeanInBackward, MeanInForward
from small_models import Middle, Sandwich, losses, points, refusal
from torch import Tensor, nn

import dpbitfit_fx as dpb


class Mixer(nn.Module):
    """h [B, 8] -> [B, 8] by a function, so that a refusal can name a module."""

    def __init__(self, function: Middle, **modules: nn.Module) -> None:
        super().__init__()
        self.function = function
        for name, module in modules.items():
            self.add_module(name, module)

    def forward(self, h: Tensor) -> Any:
        return self.function(h)


def hooked(h: Tensor) -> Tensor:
    h = h * 1.0
    if h.requires_grad:
        h.register_hook(lambda grad: grad - grad.mean(0))  # type: ignore[no-untyped-call]
    return h


class Remembers(nn.Module):
    """Adds what it saw last: in a buffer, a plain attribute, or a list."""

    last: Tensor | None

    def __init__(self, way: str) -> None:
        super().__init__()
        self.way = way
        self.seen: list[Tensor] = []
        self.register_buffer("last", torch.zeros(8)) if way == "buffer" else setattr(self, "last", None)

    def forward(self, h: Tensor) -> Tensor:
        if self.way == "list":
            self.seen.append(h.detach().mean(0))
            return h + self.seen[-1]
        before = torch.zeros(8) if self.last is None else self.last
        self.last = h.detach().mean(0)
        return h + before


class OverTime(nn.Module):
    """A recurrence that takes the batch for time."""

    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.GRU(8, 8)

    def forward(self, h: Tensor) -> Any:
        return self.cell(h[:, None])[0][:, 0]


class FoldedAttention(nn.Module):
    """Attention over the tokens of the whole batch: [B, 8] as one sample of 2 B tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.attend = nn.MultiheadAttention(4, 2, batch_first=True)

    def forward(self, h: Tensor) -> Any:
        tokens = h.reshape(1, -1, 4)
        return self.attend(tokens, tokens, tokens, need_weights=False)[0].reshape(h.shape)


GLOBAL: list[Tensor] = []


def through_a_global(h: Tensor) -> Tensor:
    GLOBAL.append(h.detach().mean(0))
    return h + GLOBAL[-1]


def closure() -> Middle:
    kept: dict[str, Tensor] = {}

    def run(h: Tensor) -> Tensor:
        kept["mean"] = h.detach().mean(0)
        return h - kept["mean"]

    return run


def fold(h: Tensor, per_row: Callable[[Tensor], Tensor]) -> Tensor:
    return per_row(h.reshape(1, -1)).reshape(h.shape)


def scattered(h: Tensor) -> Tensor:
    """Each row plus the sum of the rows of its own kind."""
    kind = (h[:, 0] > 0).long()
    return h + torch.zeros(2, 8).index_add(0, kind, h)[kind]


MIXING: dict[str, Middle] = {
    "minus the batch mean": lambda h: h - h.mean(0),
    "minus a detached batch mean": lambda h: h - h.mean(0).detach(),
    "batch standardization": lambda h: (h - h.mean(0)) / (h.std(0, unbiased=False) + 1e-5),
    "softmax over samples": lambda h: h.softmax(0),
    "log-sum-exp over samples": lambda h: h - h.logsumexp(0),
    "cumulative sum over samples": lambda h: h.cumsum(0),
    "sorted over samples": lambda h: h.sort(0).values,
    "median over samples": lambda h: h - h.median(0).values,
    "quantile over samples": lambda h: h - h.quantile(0.3, 0),
    "unit columns": lambda h: F.normalize(h, dim=0),
    "divided by the batch size": lambda h: h / h.shape[0],
    "times the batch size": lambda h: h * float(len(h)),
    "row numbers added": lambda h: h + 0.01 * torch.arange(h.shape[0])[:, None].to(h.dtype),
    "rows weighted by position": lambda h: h * torch.linspace(0.1, 1, h.shape[0])[:, None],
    "a random order": lambda h: h[torch.randperm(h.shape[0])],
    "reversed batch": lambda h: h.flip(0),
    "the neighbour's row": lambda h: h + h.roll(1, 0),
    "difference to the row before": lambda h: torch.cat([h[:1], h[1:] - h[:-1]]),
    "a convolution along the batch": lambda h: F.conv1d(h.t()[:, None], torch.ones(1, 1, 3), padding=1)[:, 0].t(),
    "attention between samples": lambda h: (h @ h.T).softmax(-1) @ h,
    "distances between samples": lambda h: h * torch.cdist(h, h).mean(1, keepdim=True),
    "gram matrix of the batch": lambda h: h @ (h.T @ h),
    "einsum over samples": lambda h: torch.einsum("bi,cj->bij", h, h).sum(-1),
    "norm of the whole batch": lambda h: h / h.norm(),
    "largest entry of the batch": lambda h: h / h.abs().max(),
    "layer norm over the whole batch": lambda h: F.layer_norm(h, h.shape),
    "softmax over the batch as one row": lambda h: fold(h, lambda r: r.softmax(-1)),
    "first row added to all": lambda h: h + h[:1],
    "everyone gets row zero": lambda h: h[torch.zeros(h.shape[0], dtype=torch.long)],
    "the row with the largest entry": lambda h: h + h[h.amax(1).argmax()],
    "samples and features swapped": lambda h: h.t().reshape(h.shape),
    "top of each column": lambda h: h * (h >= h.topk(1, dim=0).values),
    "sum over rows of one kind": scattered,
    "counts of equal rows": lambda h: h / (h[:, None] == h[None]).all(-1).sum(1, keepdim=True),
    "a branch on the batch size": lambda h: h * 2 if h.shape[0] > 2 else h,
    "mixing in the gradient alone": lambda h: h + (h.mean(0) - h.mean(0).detach()),
    "written in place": lambda h: h.sub_(h.mean(0)),
    "one row written in place": lambda h: h.clone().index_fill_(0, torch.tensor([0]), 0.0),
    "functional batch norm": lambda h: F.batch_norm(h, None, None, training=True),
    "a custom backward": lambda h: MeanInBackward.apply(h),  # type: ignore[no-untyped-call]
    "a custom forward": lambda h: MeanInForward.apply(h),  # type: ignore[no-untyped-call]
    "a gradient hook": hooked,
    "a global list": through_a_global,
    "a closure's dict": closure(),
}
MODULES: dict[str, Callable[[], nn.Module]] = {
    "a BatchNorm in train mode": lambda: nn.BatchNorm1d(8).train(),
    "a buffer": lambda: Remembers("buffer"),
    "a plain attribute": lambda: Remembers("attribute"),
    "a list on the module": lambda: Remembers("list"),
    "a recurrence over the batch": OverTime,
    "attention over all tokens of the batch": FoldedAttention,
}
HARMLESS: dict[str, Callable[[], nn.Module]] = {
    "times an identity of the batch's size": lambda: Mixer(lambda h: torch.eye(h.shape[0]) @ h),
    "there and back": lambda: Mixer(lambda h: h.flip(0).flip(0)),
    "padded and cut": lambda: Mixer(lambda h: torch.cat([h, h])[: h.shape[0]]),
    "batch at the end": lambda: Mixer(lambda h: (h.t() * 2).t()),
    "row by row": lambda: Mixer(lambda h: torch.stack([r.softmax(0) for r in h])),
    "mean over features": lambda: Mixer(lambda h: h - h.mean(-1, keepdim=True)),
    "softmax over features": lambda: Mixer(lambda h: h.softmax(1)),
    "cumulative sum over features": lambda: Mixer(lambda h: h.cumsum(1)),
    "sorted over features": lambda: Mixer(lambda h: h.sort(1).values),
    "norm of each sample": lambda: Mixer(lambda h: h / h.norm(dim=1, keepdim=True)),
    "gram matrix of each sample": lambda: Mixer(lambda h: (h[:, :, None] * h[:, None]).mean(2)),
    "attention within a sample": lambda: Mixer(
        lambda h: (h.view(-1, 4, 2) @ h.view(-1, 2, 4)).softmax(-1).matmul(h.view(-1, 4, 2)).flatten(1)
    ),
    "distances to public points": lambda: Mixer(lambda h: torch.cdist(h, torch.eye(8))),
    "written in place, by row": lambda: Mixer(lambda h: (h * 1.0).sub_(h.mean(1, keepdim=True))),
    "LayerNorm": lambda: nn.LayerNorm(8),
    "GroupNorm": lambda: nn.GroupNorm(2, 8),
    "BatchNorm in eval mode": lambda: nn.BatchNorm1d(8).eval(),
}


@pytest.mark.parametrize("way", [*MIXING, *MODULES])
def test_a_way_of_mixing_samples_is_refused_and_its_module_or_line_named(way: str) -> None:
    middle = MODULES[way]() if way in MODULES else Mixer(MIXING[way])
    message = refusal(Sandwich(middle))
    named = {"module middle", "is middle", "'middle.", "middle (BatchNorm1d)", "test_mixing.py"}
    named |= {"first first.bias's", "autograd.Function MeanIn"}  # where only the gradient mixes
    assert any(x in message for x in named), message


def test_there_are_at_least_thirty_ways_and_a_lookalike_for_every_third() -> None:
    assert len(MIXING) + len(MODULES) >= 30 and 3 * len(HARMLESS) >= len(MIXING) + len(MODULES)


@pytest.mark.parametrize("way", HARMLESS)
def test_a_lookalike_that_keeps_samples_apart_is_accepted_with_right_gradients(way: str) -> None:
    model = Sandwich(HARMLESS[way]())
    step = dpb.compile(model, losses, points())
    batch = points(5)
    ours = step.per_sample_gradients(batch)
    for row in range(5):
        loss = losses(model, tuple(x[[row, row]] for x in batch))[0]
        theirs = torch.autograd.grad(loss, [dict(model.named_parameters())[k] for k in ours], allow_unused=True)
        for mine, other in zip(ours.values(), theirs, strict=True):
            assert other is not None and torch.allclose(mine[row], other, rtol=1e-5, atol=1e-7)
