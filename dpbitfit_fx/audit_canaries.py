"""Canaries of an audit: records that are in the data, or not, by fair coins, and how the others are told apart.

Two kinds. *Records*: made up by the caller, or taken out of the dataset. *Gradient canaries*: made up here; the gradient
of each is one coordinate vector, so that none is in the way of another (Nasr et al., USENIX Security 2023). They pass
through the user's own model, compiled by `fit` as ever: only the loss of a record that is tagged as one differs,

    loss_i = where(tag_i < 0, user's loss_i, -SCALE theta[tag_i]),   theta = the trainables, flat.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn
from torch.utils.data import ConcatDataset, Subset

from dpbitfit_fx.audit_bound import pick
from dpbitfit_fx.batching import MapDataset
from dpbitfit_fx.errors import DataError
from dpbitfit_fx.passes.torch_private import tree_flatten

__all__ = ["GradientCanaries", "members_of", "take_out"]

SCALE = 1e4  # a gradient norm far above any max_grad_norm in use: clipped to its whole length
NO_CANARY = -1


def take_out(dataset: MapDataset, count: int, seed: int) -> tuple[MapDataset, MapDataset]:
    """The dataset without `count` records picked at random, and those."""
    chosen, rest = (sorted(map(int, rows)) for rows in pick(len(dataset), count, seed))
    return Subset(dataset, rest), Subset(dataset, chosen)  # type: ignore[arg-type]


def members_of(others: MapDataset, canaries: MapDataset, coins: npt.NDArray[np.bool_]) -> MapDataset:
    """The others and the canaries that are in, behind them: no row number of another depends on a coin."""
    inside: Subset[Any] = Subset(canaries, [int(i) for i in np.flatnonzero(coins)])  # type: ignore[arg-type]
    both: Any = [others, inside]
    return ConcatDataset(both) if len(inside) else others


class _Tagged(Subset[Any]):
    """Records with a tag each; a Subset, so that `fit` recognises the records of the dataset behind it."""

    def __init__(self, dataset: Any, rows: Sequence[int], tags: Sequence[int]) -> None:
        super().__init__(dataset, rows)
        self.tags = tags

    def __getitem__(self, index: Any) -> Any:
        return self.dataset[self.indices[index]], self.tags[index]

    def __getitems__(self, indices: list[int]) -> Any:
        return [self[i] for i in indices]


class _Copies:
    """One record again and again: what a gradient canary is made of. Its values reach no gradient."""

    def __init__(self, record: Any, count: int) -> None:
        self.record, self.count = record, count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Any:
        return self.record


class GradientCanaries:
    """`count` canaries, each along a coordinate of its own; what `fit` needs to know of them.

    Args:
        names: the trained parameters, in the order of `theta`. size: of `theta`.

    Raises:
        DataError: there are more canaries than coordinates.
    """

    def __init__(self, names: Sequence[str], size: int, count: int, seed: int) -> None:
        if not 1 <= count <= size:
            raise DataError(
                f"{count} gradient canaries need a trained parameter each, and {size} are trained. Ask for at most {size} "
                "canaries, or train more parameters (trainable='all')."
            )
        self.names = tuple(names)
        order = np.random.default_rng(seed).permutation(size)[:count]
        self.coordinates: npt.NDArray[np.int64] = order.astype(np.int64)

    def tagged(self, dataset: MapDataset) -> MapDataset:
        size = len(dataset)
        return _Tagged(dataset, range(size), [NO_CANARY] * size)

    def records(self, dataset: MapDataset) -> MapDataset:
        """The canaries, all of them."""
        count = len(self.coordinates)
        return _Tagged(_Copies(dataset[0], count), range(count), [int(c) for c in self.coordinates])

    def options(self, options: dict[str, Any]) -> dict[str, Any]:
        """`fit`'s arguments, for records with tags."""
        told: dict[str, Any] = {"trainable": list(self.names), "exclude": ()}
        if (collate_fn := options.get("collate_fn")) is not None:
            told["collate_fn"] = lambda items: (
                collate_fn([item for item, _ in items]),
                torch.tensor([tag for _, tag in items]),
            )
        if (example := options.get("example_batch")) is not None:
            rows = next(x.shape[0] for x in tree_flatten(example)[0] if isinstance(x, torch.Tensor))
            told["example_batch"] = (example, torch.full((rows,), NO_CANARY))
        return {**options, **told}

    def loss(self, loss_fn: Callable[[Any, Any], torch.Tensor]) -> Callable[[Any, Any], torch.Tensor]:
        names = self.names

        def with_canaries(model: nn.Module, batch: Any) -> torch.Tensor:
            records, tags = batch
            losses = loss_fn(model, records)
            if losses.dim() != 1:
                raise DataError(
                    "Gradient canaries need a loss for each record: let loss_fn return losses of shape [B] "
                    "(reduction='none'), or audit with attack='black-box'."
                )
            parameters = dict(model.named_parameters())
            theta = torch.cat([parameters[name].reshape(-1) for name in names])
            at = torch.arange(theta.shape[0], device=theta.device)[None] == tags[:, None]
            drawn = torch.where(at, theta[None], torch.zeros_like(theta)[None]).sum(1)
            return torch.where(tags < 0, losses, -SCALE * drawn.to(losses.dtype))

        return with_canaries
