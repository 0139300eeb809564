"""A model that mixes samples has no per-sample meaning and is refused; one that only looks so is accepted."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from small_models import Middle, Sandwich, losses, points, refusal
from torch import Tensor, nn

import dpbitfit_fx as dpb

MIXING: dict[str, Middle] = {
    "minus the batch mean": lambda h: h - h.mean(0),
    "minus a detached batch mean": lambda h: h - h.mean(0).detach(),
    "batch standardization": lambda h: (h - h.mean(0)) / (h.std(0, unbiased=False) + 1e-5),
    "softmax over samples": lambda h: h.softmax(0),
    "cumulative sum over samples": lambda h: h.cumsum(0),
    "sorted over samples": lambda h: h.sort(0).values,
    "median over samples": lambda h: h - h.median(0).values,
    "divided by the batch size": lambda h: h / h.shape[0],
    "times the batch size": lambda h: h * float(len(h)),
    "row numbers added": lambda h: h + 0.01 * torch.arange(h.shape[0])[:, None].to(h.dtype),
    "rows weighted by position": lambda h: h * torch.linspace(0.1, 1, h.shape[0])[:, None],
    "reversed batch": lambda h: h.flip(0),
    "the neighbour's row": lambda h: h + h.roll(1, 0),
    "attention between samples": lambda h: (h @ h.T).softmax(-1) @ h,
    "gram matrix of the batch": lambda h: h @ (h.T @ h),
    "norm of the whole batch": lambda h: h / h.norm(),
    "largest entry of the batch": lambda h: h / h.abs().max(),
    "first row added to all": lambda h: h + h[:1],
    "everyone gets row zero": lambda h: h[torch.zeros(h.shape[0], dtype=torch.long)],
    "samples and features swapped": lambda h: h.t().reshape(h.shape),
    "top of each column": lambda h: h * (h >= h.topk(1, dim=0).values),
    "a branch on the batch size": lambda h: h * 2 if h.shape[0] > 2 else h,
    "mixing in the gradient alone": lambda h: h + (h.mean(0) - h.mean(0).detach()),
    "written in place": lambda h: h.sub_(h.mean(0)),
}
HARMLESS: dict[str, Middle] = {
    "times an identity of the batch's size": lambda h: torch.eye(h.shape[0]) @ h,
    "there and back": lambda h: h.flip(0).flip(0),
    "padded and cut": lambda h: torch.cat([h, h])[: h.shape[0]],
    "mean over features": lambda h: h - h.mean(-1, keepdim=True),
    "cumulative sum over features": lambda h: h.cumsum(1),
}


@pytest.mark.parametrize("way", MIXING)
def test_a_model_that_mixes_samples_is_refused(way: str) -> None:
    message = refusal(Sandwich(MIXING[way]))
    assert "does not mean the same sample by sample" in message


@pytest.mark.parametrize("way", HARMLESS)
def test_a_model_that_only_touches_the_batch_axis_is_accepted(way: str) -> None:
    model = Sandwich(HARMLESS[way])
    step = dpb.compile(model, losses, points())
    batch = points(5)
    ours = step.per_sample_gradients(batch)
    for row in range(5):
        loss = losses(model, tuple(x[row : row + 1] for x in batch))
        (theirs,) = torch.autograd.grad(loss.sum(), [model.first.bias])
        assert torch.allclose(ours["first.bias"][row], theirs, rtol=1e-5, atol=1e-7)


class BatchNormInside(nn.Module):
    """Standardizes over the batch by hand, inside a named module."""

    def forward(self, h: Tensor) -> Tensor:
        return h - h.mean(0)


def test_the_first_module_that_mixes_is_named() -> None:
    message = refusal(Sandwich(BatchNormInside()))
    assert "The first module whose output for a sample depends on the others is middle (BatchNormInside)" in message


def contrast(model: Any, batch: Any) -> Tensor:
    """In-batch negatives: every sample is every other sample's counter-example."""
    a = F.normalize(model(batch[0]), dim=1)
    found: Tensor = F.cross_entropy(a @ a.T, torch.arange(len(a)), reduction="none")
    return found


BAD_LOSSES: dict[str, tuple[Any, str]] = {
    "in-batch contrast": (contrast, "does not mean the same"),
    "pairs of neighbours": (lambda m, b: (m(b[0]) - m(b[0]).roll(1, 0)).pow(2).sum(1), "does not mean the same"),
    "root of the sum": (lambda m, b: losses(m, b).sum().sqrt(), "neither the mean nor the sum"),
    "worst sample": (lambda m, b: losses(m, b).max(), "neither the mean nor the sum"),
    "log-sum-exp": (lambda m, b: losses(m, b).logsumexp(0), "neither the mean nor the sum"),
    "mean plus sum": (lambda m, b: losses(m, b).mean() + losses(m, b).sum(), "neither the mean nor the sum"),
    "weighted by class counts": (
        lambda m, b: F.cross_entropy(m(b[0]), b[1], weight=torch.tensor([1.0, 2.0, 3.0])),
        "neither the mean nor the sum",
    ),
    "divided by a label count": (lambda m, b: losses(m, b) / (b[1] == 1).sum(), "does not mean the same"),
}


@pytest.mark.parametrize("kind", BAD_LOSSES)
def test_a_loss_that_is_no_sum_or_mean_over_samples_is_refused(kind: str) -> None:
    loss, words = BAD_LOSSES[kind]
    assert words in refusal(Sandwich(), loss)


@pytest.mark.parametrize("reduce", ["mean", "sum"])
def test_a_scalar_loss_that_is_the_mean_or_the_sum_gives_the_same_gradients(reduce: str) -> None:
    model = Sandwich()
    scalar = dpb.compile(model, lambda m, b: getattr(losses(m, b), reduce)(), points())
    rows = dpb.compile(model, losses, points())
    for key, value in rows.per_sample_gradients(points(5)).items():
        assert torch.allclose(scalar.per_sample_gradients(points(5))[key], value, rtol=1e-6, atol=1e-8)


class Tagger(nn.Module):
    """A label for every token: ids [B, T] -> logits [B, T, 4]."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(20, 8), nn.Linear(8, 4)

    def forward(self, ids: Tensor) -> Any:
        return self.head(self.embed(ids))


def tokens(padded: bool) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 4, (4, 5), generator=g)
    if padded:
        labels[1, 3:] = -100
    return {"ids": torch.randint(0, 20, (4, 5), generator=g), "labels": labels}


def token_mean(model: Any, batch: Any) -> Tensor:
    """What Hugging Face models return for ``labels=``: the mean over all tokens of the batch that count."""
    found: Tensor = F.cross_entropy(model(batch["ids"]).transpose(1, 2), batch["labels"], ignore_index=-100)
    return found


def test_a_mean_over_the_tokens_of_a_padded_batch_is_refused() -> None:
    assert "neither the mean nor the sum" in refusal(Tagger(), token_mean, tokens(padded=True))
    dpb.compile(Tagger(), token_mean, tokens(padded=False))  # here it is the mean over samples
