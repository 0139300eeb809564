"""The made-up batches on which ``check_meaning`` compares the user's model with the captured step."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from .joint_graph import JointGraph, Source
from .lengths import resized
from .torch_private import leaf_names, tree_flatten
from .unify import where

WIDE = 17  # rows of the widest probe: the one that is recombined


def probes_of(source: Source) -> list[list[torch.Tensor]]:
    """Several sizes, permuted and perturbed; with ``source.length`` in turn at every length that is to be checked."""
    leaves, names = tensors_of(source.example_batch)
    size = leaves[0].shape[0]
    generator = torch.Generator().manual_seed(0)  # probes are made-up data; nothing private rides on this seed
    lengths = source.length.checked if source.length is not None else ()
    probes = []
    for at, rows in enumerate([2, 3, WIDE, 0, *[3] * (len(lengths) - 4)]):
        index = torch.randperm(size, generator=generator).repeat(rows // size + 1)[:rows]
        if not rows:
            index = torch.arange(size).repeat(2)[: max(2, min(size, 4))]
        probe = [x[index.to(x.device)].clone() for x in leaves]
        if source.length is not None:
            probe = resized(probe, names, source.length, lengths[at % len(lengths)])
        probe = [perturbed(x, generator) for x in probe] if rows else probe
        probes.append([twinned(x) for x in probe] if rows == WIDE else probe)
    return probes


def twinned(x: torch.Tensor) -> torch.Tensor:
    """The second and the last row are the first once more: what mixes equal rows alone (counts of duplicates) shows on no
    others. Kernels round the last rows of a batch otherwise than the first, so that only neighbours surely stay equal."""
    return torch.cat([x[:1], x[:1], x[2:-1], x[:1]])


def tensors_of(batch: Any) -> tuple[list[torch.Tensor], list[str]]:
    """The tensor leaves of a batch and their names."""
    pairs = [
        (x, n) for x, n in zip(tree_flatten(batch)[0], leaf_names(batch), strict=True) if isinstance(x, torch.Tensor)
    ]
    return [x for x, _ in pairs], [n for _, n in pairs]


def recombined(batch: list[torch.Tensor]) -> list[torch.Tensor] | None:
    """Rows that no example has: every id and mask from the same place of some row. None where there is nothing of it.

    Ids cannot be perturbed as floats are (their range is the model's secret), but a value seen in a place is legal there.
    Without it a few example rows hide what they share: the largest of the batch, where each of them contains it. A mask
    and the ids that it covers are moved together. Labels [B] stay: a permuted row has a new one already.
    """
    generator = torch.Generator().manual_seed(1)  # made-up data, as above
    rows, chosen, out = batch[0].shape[0], dict[torch.Size, torch.Tensor](), []
    for x in batch:
        if x.dtype.is_floating_point or x.dim() < 2:
            out.append(x)
            continue
        if x.shape not in chosen:
            chosen[x.shape] = twinned(torch.randint(rows, x.shape, generator=generator))
        out.append(x.gather(0, chosen[x.shape].to(x.device)))
    return out if chosen else None


def alike(batch: list[torch.Tensor]) -> list[int]:
    """Which tensors hold the same in every row: of what mixes through them, nothing shows."""
    return [i for i, x in enumerate(batch) if x.dim() and bool((x == x[:1]).all())]


def differing(batch: list[torch.Tensor], at: set[int]) -> list[torch.Tensor]:
    """The batch with the tensors ``at`` these places :func:`varied`."""
    generator = torch.Generator().manual_seed(2)  # made-up data, as above
    return [twinned(varied(x, generator)) if i in at else x for i, x in enumerate(batch)]


def varied(x: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Another value in every row: floats with noise of their own size added; integers and booleans drawn from those that the
    tensor holds, and 0 or 1 where it holds but one. The model may take none of it: its refusal then means nothing."""
    if x.dtype.is_floating_point:
        noise, spread = torch.randn(x.shape, generator=generator).to(x), float(x.float().std().nan_to_num(0.0))
        return x + noise * (spread or 0.3 * (float(x.abs().mean().nan_to_num(0.0)) or 1.0))
    values: torch.Tensor = torch.unique(x)
    if len(values) == 1:
        values = torch.cat([values, (values == 0).to(x.dtype)])
    return values[torch.randint(len(values), x.shape, generator=generator).to(x.device)]


def monotonous(batch: list[torch.Tensor]) -> list[list[torch.Tensor]]:
    """Two rows of one id each, from the start, the middle and the end of theirs; none without ids.

    What a model remembers of a batch is the same for all batches that hold a token of every row, the largest say.
    """
    ids = [not x.dtype.is_floating_point and x.dim() > 1 and x.numel() > 0 and int(x.max()) > 1 for x in batch]
    if not any(ids):
        return []

    def filled(x: torch.Tensor, place: int) -> torch.Tensor:
        column = place * (x.shape[1] - 1) // 2
        return x[:, column : column + 1].expand_as(x).clone()

    return [
        [filled(x[:2], place) if has else x[:2] for x, has in zip(batch, ids, strict=True)] for place in (0, 1, 2)
    ]


def perturbed(x: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    if not x.dtype.is_floating_point:
        return x.clone()
    noise = torch.randn(x.shape, generator=generator).to(x)
    scale = x.float().std().nan_to_num(0.0).to(x) * 0.3 if x.numel() > 1 else x.new_tensor(0.0)
    return x + noise * scale


def length_of(source: Source, batch: list[torch.Tensor]) -> str:
    """`` of length n``, where the length may vary."""
    if source.length is None:
        return ""
    _, names = tensors_of(source.example_batch)
    dims = source.length.dims
    return f" of length {next(x.shape[dims[n]] for x, n in zip(batch, names, strict=True) if n in dims)}"


class _Failing(fx.Interpreter):
    """Runs a graph and knows the node it was at."""

    at: fx.Node | None = None

    def run_node(self, n: fx.Node) -> Any:
        self.at = n
        return super().run_node(n)


def first_failing(joint: JointGraph, batch: list[torch.Tensor]) -> str:
    """`` The operator .. is the first that fails. It comes from ..``, or nothing."""
    run = _Failing(joint.module)
    try:
        run.run(*joint.values(batch))
    except (RuntimeError, IndexError):
        return f" The operator {run.at.target} is the first that fails.{where(run.at)}" if run.at is not None else ""
    return ""
