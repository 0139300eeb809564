"""Ways of mixing samples by what a layer or a loss computes; ``mixes_with_state.py`` has those that need a module.

None may be accepted where it shows. Each works on ``h`` [B, N, ..] of any kind, and does nothing to a batch of one or
something that one sample alone can mean: only so can the capture of one sample miss it.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

Mix = Callable[[Tensor], Tensor]


def beside(x: Tensor, h: Tensor) -> Tensor:
    """``x`` [B] as [B, 1, ..], to go with ``h``."""
    return x.to(h).reshape(-1, *[1] * (h.dim() - 1))


def numbers(h: Tensor) -> Tensor:
    """Row numbers [B]."""
    return torch.arange(h.shape[0])


def largest(h: Tensor) -> Tensor:
    """Each row's largest entry [B]."""
    return h.detach().flatten(1).amax(1)


def equals(h: Tensor) -> Tensor:
    """How many rows of the batch equal this one [B]."""
    flat = h.detach().flatten(1)
    return (flat[:, None] == flat[None]).all(-1).sum(1)


def from_the_row_before(h: Tensor) -> Tensor:
    out = h * 1.0
    out[1:] = h[:-1]
    return out


def put_by_number(h: Tensor) -> Tensor:
    return (h * 1.0).index_put((torch.zeros(1, dtype=torch.long),), h.mean(0, keepdim=True))


def scattered(h: Tensor) -> Tensor:
    return torch.zeros_like(h).scatter_add(0, torch.zeros(h.shape, dtype=torch.long), h)


def between_rows(h: Tensor) -> Tensor:
    stretched = F.interpolate(h.flatten(1).T[None], size=2 * h.shape[0], mode="linear")
    return stretched[0, :, ::2].T.reshape(h.shape)


def attention(h: Tensor) -> Tensor:
    flat = h.flatten(1)
    return ((flat @ flat.T).softmax(-1) @ flat).reshape(h.shape)


def along_the_batch(h: Tensor) -> Tensor:
    """A convolution that takes the batch for time."""
    flat = h.flatten(1).T[:, None]
    return F.conv1d(flat, torch.tensor([[[0.2, 1.0, 0.2]]]).to(h), padding=1)[:, 0].T.reshape(h.shape)


def halves_centred(h: Tensor) -> Tensor:
    return torch.cat([x - x.mean(0) for x in h.chunk(2)])


def through_one_bias(h: Tensor, free: Tensor) -> Tensor:
    """The value of ``h + free``; the gradient of ``free`` is weighted by each row's share of the batch."""
    share = beside(h.detach().flatten(1).sum(1).softmax(0), h)
    return h + free.detach() + share * (free - free.detach())


MIXES: dict[str, Mix] = {
    # through values
    "minus the batch mean": lambda h: h - h.mean(0),
    "minus the batch mean, detached": lambda h: h - h.mean(0).detach(),
    "softmax over samples": lambda h: h.softmax(0),
    "neighbour": lambda h: h + h.roll(1, 0),
    "reversed batch": lambda h: h.flip(0),
    "cumsum over samples": lambda h: h.cumsum(0),
    "batch norm": lambda h: F.batch_norm(h, None, None, training=True),
    "norm of the batch": lambda h: h / h.norm(),
    "spread over samples": lambda h: h / (1.0 + h.var(0, unbiased=False)),
    "sorted over samples": lambda h: h.sort(0).values,
    "rows sorted by their norm": lambda h: h[h.flatten(1).norm(dim=1).argsort()],
    "median over samples": lambda h: h - h.median(0).values,
    "quantile of the batch": lambda h: h.clamp(max=h.detach().flatten().quantile(0.7)),
    "largest of the batch": lambda h: h / h.abs().max(),
    "the row with the largest entry": lambda h: h + h[largest(h).argmax()],
    "attention between samples": attention,
    "distances between samples": lambda h: h * beside(torch.cdist(h.flatten(1), h.flatten(1)).mean(1), h),
    "halves of the batch centred": halves_centred,
    "a convolution along the batch": along_the_batch,
    "interpolated between rows": between_rows,
    "entries rolled through the batch": lambda h: h.flatten().roll(1).reshape(h.shape),
    "samples and features swapped": lambda h: h.transpose(0, 1).reshape(h.shape),
    "layer norm over the whole batch": lambda h: F.layer_norm(h, h.shape),
    "checkpointed batch mean": lambda h: checkpoint(lambda x: x - x.mean(0), h, use_reentrant=False),
    # through sizes
    "divided by the batch size": lambda h: h / h.shape[0],
    "divided by the number of entries": lambda h: h * (h[0].numel() / h.numel()),
    "a branch on the batch size": lambda h: h * 2 if h.shape[0] > 2 else h,
    "a branch on an even batch size": lambda h: h * 2 if h.shape[0] % 2 == 0 else h,
    "padded to the longest row": lambda h: (
        h * beside((h > 0).flatten(1).sum(1) / (1 + (h > 0).flatten(1).sum(1).max()), h)
    ),
    # through row positions
    "row numbers": lambda h: h + 0.1 * beside(numbers(h), h),
    "first row doubled": lambda h: torch.cat([h[:1] * 2, h[1:]]),
    "first row added to all": lambda h: h + h[:1],
    "last row halved": lambda h: torch.cat([h[:-1], h[-1:] * 0.5]),
    "last row counts twice from the second on": lambda h: h * beside(1 + (numbers(h) * 2 > h.shape[0]), h),
    "even rows": lambda h: h * beside(1 + numbers(h) % 2, h),
    "halves swapped": lambda h: torch.cat(h.chunk(2)[::-1]),
    # written in place
    "written from the row before": from_the_row_before,
    "put by row number": put_by_number,
    "scattered over the batch": scattered,
    "copied by row number": lambda h: (h * 1.0).index_copy(0, numbers(h), h.flip(0)),
    "the mean subtracted in place": lambda h: (h * 1.0).sub_(h.mean(0)),
    "one row filled in place": lambda h: (h * 1.0).index_fill_(0, torch.tensor([0]), 0.5),
    # in the gradient alone
    "mixing in the gradient": lambda h: h + (h.mean(0) - h.mean(0).detach()),
    "the neighbour's gradient": lambda h: h.detach() + (h.roll(1, 0) - h.roll(1, 0).detach()),
    "gradients weighted by the batch": lambda h: h.detach() + (h - h.detach()) * h.detach().softmax(0),
    # hard to see
    "a mask of the whole batch": lambda h: h.masked_fill((h > 0).any(0), 0.5),
    "only where all rows are positive": lambda h: torch.where((h > 0).all(0), h.mean(0), h),
    "only in batches of more than eight rows": lambda h: h - h.mean(0) if h.shape[0] > 8 else h,
    "only in rows equal to another": lambda h: h / beside(equals(h), h),
    "only gradients of rows equal to another": lambda h: h.detach() + (h - h.detach()) / beside(equals(h), h),
    "a millionth of the batch mean": lambda h: h * (1 + 1e-6 * torch.tanh(h.mean(0))),
    "a millionth of the gradient": lambda h: h + 1e-6 * (h.mean(0) - h.mean(0).detach()),
    "only above three": lambda h: torch.where(h.detach().amax() > 3.0, h * 0.5, h),
    "only behind a row above three": lambda h: h * (1 + beside(largest(h) > 3.0, h).roll(1, 0)),
    "only between rows above two": lambda h: h + beside(largest(h) > 2.0, h) * (h * beside(largest(h) > 2.0, h)).sum(0),
}

# What no probe made of the example batch can promise to reach: a region of values that its rows never enter.
RARE = {
    "only above three": "needs an activation above three, which neither the example rows nor their perturbations need have",
    "only behind a row above three": "as above",
    "only between rows above two": "needs two rows of a batch with an activation above two each",
}


def alike(y: Tensor) -> Tensor:
    """How many rows of the batch have this row's label [B]."""
    return (y[:, None] == y[None]).sum(1)


def contrast(loss: Tensor, z: Tensor, y: Tensor) -> Tensor:
    unit = F.normalize(z, dim=1)
    return loss + F.cross_entropy(unit @ unit.T, torch.arange(len(z)), reduction="none")


# (losses [B], logits [B, 3], labels [B]) -> losses [B] or a scalar; whether a scalar of equal rows is to be their sum.
LOSS_MIXES: dict[str, tuple[Callable[[Tensor, Tensor, Tensor], Tensor], bool]] = {
    "weighted by class counts": (lambda loss, z, y: loss / alike(y), False),
    "mean weighted by class counts": (lambda loss, z, y: (loss / alike(y)).mean(), False),
    "hardest example": (lambda loss, z, y: loss.max(), False),
    "two hardest examples": (lambda loss, z, y: loss.sort(descending=True).values[:2].mean(), False),
    "harder half of the batch": (lambda loss, z, y: loss * (loss >= loss.median()), False),
    "log-sum-exp of the losses": (lambda loss, z, y: loss.logsumexp(0), False),
    "root of the sum": (lambda loss, z, y: loss.sum().sqrt(), True),
    "squared mean": (lambda loss, z, y: loss.mean() ** 2, False),
    "divided by one less than the batch": (lambda loss, z, y: loss.sum() / max(len(loss) - 1, 1), False),
    "mean or sum, by the size": (lambda loss, z, y: loss.sum() if len(loss) > 8 else loss.mean(), False),
    "softmax of the losses": (lambda loss, z, y: (loss.detach().softmax(0) * loss).sum(), False),
    "losses in another order": (lambda loss, z, y: loss.flip(0), False),
    "labels of the neighbour": (lambda loss, z, y: F.cross_entropy(z, y.roll(1), reduction="none"), False),
    "towards the batch's mean answer": (
        lambda loss, z, y: loss + (z.softmax(1) - z.softmax(1).mean(0)).pow(2).sum(1),
        False,
    ),
    "spread of the losses": (lambda loss, z, y: loss.mean() + loss.var(unbiased=False), False),
    "mean over one class": (lambda loss, z, y: (loss * (y == 0)).sum() / (y == 0).sum().clamp(min=1), False),
    "contrast": (contrast, False),
    "minus a baseline of the batch": (lambda loss, z, y: loss * (loss - loss.mean()).detach().sigmoid(), False),
    "mixing in the loss's gradient": (lambda loss, z, y: loss + (loss.mean() - loss.mean().detach()), False),
    "a millionth of the mean loss": (lambda loss, z, y: loss * (1 + 1e-6 * loss.mean().detach()), False),
    "first row's loss twice": (lambda loss, z, y: torch.cat([loss[:1] * 2, loss[1:]]), False),
    "equal logits share": (lambda loss, z, y: loss / equals(z), False),
}
