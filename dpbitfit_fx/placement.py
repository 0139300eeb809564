"""What the proof assumes of a machine's kernels, tried: a record's gradient is the same at every place of a batch.

To the bit for ``noise="grid"``, and for bfloat16, whose last bit is large, within what the slack charges for a record.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from dpbitfit_fx.errors import CompileRefused

if TYPE_CHECKING:
    from dpbitfit_fx.compile import PrivateStep

__all__ = ["check_places"]

_ALL_UP_TO = 8
_RECORDS = 2


def check_places(step: PrivateStep, batch: Any, size: int, within: float = 0.0) -> None:
    """Compares what a record contributes at several places of a physical batch of ``size``, beside others.

    Args:
        step: without noise, so that every bit of a contribution shows and none is rounded away. batch: an example, at
            least two rows. size: of the physical batches; 1 is always right. within: of R, in L2; 0 asks for the same bits,
            at more places.

    Raises:
        CompileRefused: they differ by more. Then leaving a record out, which moves those behind it, moves their gradients.
    """
    rows = step._batch_leaves(batch)[0].shape[0]
    leaves = step._leaves(batch, step._masks(range(rows), bytes(32)))
    middle = size // 2
    near_ends = {0, 1, 2, 3, middle - 1, middle, *range(size - 4, size)}
    if within:
        near_ends = {0, middle, size - 1}
    places = range(size) if size <= _ALL_UP_TO else sorted(near_ends)
    for record in range(min(1 if within else _RECORDS, rows)):
        first: torch.Tensor | None = None
        for place in places if size > 1 else ():
            index = (torch.arange(size) + place + 1) % rows  # other neighbours at every place
            index[place] = record
            mask = torch.zeros(size, device=step.device)
            mask[place] = 1.0
            found = step._lowered([x[index.to(x.device)] for x in leaves], mask, step.zero_accumulator())
            first = found if first is None else first
            share = float((found - first).double().norm()) / step.max_grad_norm
            if within and share > within:
                raise CompileRefused(
                    f"In a physical batch of {size}, a record's gradient in bfloat16 differs by {share:.0e} of max_grad_norm "
                    f"with its place: more than the {within:g} that the noise pays for. Pass another physical_batch_size "
                    "(multiples of 8 were the same bits at every place, where it was tried), or precision='float32'."
                )
            if not within and not torch.equal(first, found):
                raise CompileRefused(
                    f"noise='grid' needs a record's gradient to be the same bits wherever it stands in its physical batch, and "
                    f"on this machine it is not, in a batch of {size}. Pass physical_batch_size=1, with which there is "
                    "nothing to assume (slower), or noise='float'."
                )
