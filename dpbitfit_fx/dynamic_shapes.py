"""``compile(dynamic_shapes=...)``: which dimensions of the batch are the padded length, as a user of torch.export says it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch.export import Dim

from .errors import CompileRefused
from .passes.capture import split_batch
from .passes.joint_graph import DynamicLength

SHORTEST = 2  # a dimension of one is broadcast: another graph


def dynamic_length(
    dynamic_shapes: Mapping[str, Mapping[int, Any]] | None, example_batch: Any, model: torch.nn.Module
) -> DynamicLength | None:
    """``{"input_ids": {1: T}, "attention_mask": {1: T}}`` with one ``T = torch.export.Dim("T", min=.., max=..)``.

    Captured at two lengths that are no size of the model, a long one and one in the middle; checked at the shortest, the
    longest, the example's own, and one between of the other parity.
    """
    if not dynamic_shapes:
        return None
    tensors, _, _, names, _ = split_batch(example_batch)
    shapes = dict(zip(names, (x.shape for x in tensors), strict=True))
    dims, found = {}, list[Any]()
    for name, marked in dynamic_shapes.items():
        if name not in shapes:
            raise CompileRefused(f"dynamic_shapes names {name!r}; the tensors of the batch are {', '.join(shapes)}.")
        for dim, size in marked.items():
            if type(dim) is not int or not 0 < dim < len(shapes[name]) or name in dims:
                raise CompileRefused(
                    f"dynamic_shapes marks dimension {dim!r} of {name!r}, which is {list(shapes[name])}. One dimension of an "
                    "entry may vary, counted from 1: dimension 0 is the batch, and always varies."
                )
            if type(size) is not Dim or (found and size is not found[0] and size.__name__ != found[0].__name__):
                raise CompileRefused(
                    f"dynamic_shapes gives {name!r} the size {size}. All marked dimensions have one padded length: use one "
                    "T = torch.export.Dim('T', min=8, max=128) for them."
                )
            dims[name] = dim
            found.append(size)
    if not found:
        return None
    own = {int(shapes[n][d]) for n, d in dims.items()}
    if not isinstance(found[0].max, int) or len(own) != 1:
        raise CompileRefused(
            "dynamic_shapes needs a largest length, as in torch.export.Dim('T', min=8, max=128), up to which the step is "
            f"checked; and the marked dimensions of example_batch have one size, not {sorted(own)}."
        )
    low, high, here = max(SHORTEST, int(found[0].min)), int(found[0].max), own.pop()
    if not low <= here <= high or high - low < 4:
        raise CompileRefused(
            f"dynamic_shapes allows lengths from {low} to {high}; example_batch has {here}, which must be one of them, and "
            "there must be five at least: two are captured, others are checked."
        )
    sizes = {int(s) for p in model.parameters() for s in p.shape} | {int(s) for shape in shapes.values() for s in shape}
    between = [n for n in range(high, low - 1, -1) if n not in (low, high, here)]
    # Far apart, so that hardly anything but a line through integers has integer values at both.
    best = sorted(between, key=lambda n: (n in sizes, not _prime(n)))
    upper, lower = best[0], min(best[1:], key=lambda n: (n in sizes, not _prime(n), abs(2 * n - low - high)))
    rest = [n for n in between if n not in (upper, lower)]
    middle = min(rest, key=lambda n: (n % 2, abs(2 * n - low - high)), default=low)
    captured = (upper, lower)
    return DynamicLength(dims, captured, tuple(sorted({low, here, middle, high})))


def _prime(n: int) -> bool:
    return n > 3 and all(n % q for q in range(2, math.isqrt(n) + 1))
