"""A two-layer model with a hole in the middle, and how to see that compile left a model as it was."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import dpbitfit_fx as dpb

Middle = Callable[[Tensor], Tensor]


class Sandwich(nn.Module):
    """``first`` -> tanh -> ``middle`` -> ``last``: x [B, 6] -> logits [B, 3]."""

    def __init__(self, middle: Middle | None = None) -> None:
        super().__init__()
        self.first, self.last, self.middle = nn.Linear(6, 8), nn.Linear(8, 3), middle

    def transform(self, h: Tensor) -> Tensor:
        return h if self.middle is None else self.middle(h)

    def forward(self, x: Tensor) -> Any:
        return self.last(self.transform(torch.tanh(self.first(x))))


def none_below(h: Tensor) -> Tensor:
    """Asserts that nothing is below -2; it stands here since pytest rewrites the assertions of test modules."""
    counts = (h > -2).sum(1)
    assert counts.min().item() >= h.shape[1]
    return h


def losses(model: Any, batch: Any) -> Tensor:
    found: Tensor = F.cross_entropy(model(batch[0]), batch[1], reduction="none")
    return found


def points(size: int = 4) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(3)
    return torch.randn(size, 6, generator=g), torch.arange(size) % 3


def photograph(model: nn.Module) -> dict[str, Any]:
    """Everything compile might change: values, gradient flags, modes, hooks, plain attributes."""
    return {
        "values": {k: v.clone() for k, v in model.state_dict().items()},
        "identity": {k: id(v) for k, v in [*model.named_parameters(), *model.named_buffers()]},
        "requires_grad": {k: p.requires_grad for k, p in model.named_parameters()},
        "grad": {k: p.grad for k, p in model.named_parameters()},
        "training": {k: m.training for k, m in model.named_modules()},
        "hooks": {k: (len(m._forward_hooks), len(m._forward_pre_hooks)) for k, m in model.named_modules()},
        "attributes": {k: sorted(vars(m)) for k, m in model.named_modules()},
        "class": type(model),
    }


def assert_untouched(model: nn.Module, before: dict[str, Any]) -> None:
    after = photograph(model)
    assert before["values"].keys() == after["values"].keys()
    assert all(torch.equal(v, after["values"][k]) for k, v in before["values"].items())
    assert {k: v for k, v in before.items() if k != "values"} == {k: v for k, v in after.items() if k != "values"}


def refusal(model: nn.Module, loss: Any = losses, batch: Any = None, **options: Any) -> str:
    """The message with which compile refuses; the model must come back as it went in."""
    before = photograph(model)
    with pytest.raises(dpb.CompileRefused) as caught:
        dpb.compile(model, loss, points() if batch is None else batch, **options)
    assert_untouched(model, before)
    message = str(caught.value)
    assert "\n" not in message and len(message) < 1500
    return message
