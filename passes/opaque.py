"""Operators of our own that no backend looks into: torch.compile calls them where they stand, on what they are given.

    packed_linear(x [N, K], b [C] or None, i, C)  ->  [N, C]      the i-th of the packed weights that the caller holds
    held(x)                                       ->  x, copied: no fusion reaches through it
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from .torch_private import LINEAR

_PACKS = threading.local()
LIBRARY: Any = torch.library.Library("dpbitfit_fx", "DEF")  # type: ignore[no-untyped-call]
LIBRARY.define("packed_linear(Tensor x, Tensor? bias, int place, int width) -> Tensor")
LIBRARY.define("held(Tensor x) -> Tensor")


def _packed_linear(x: Tensor, bias: Tensor | None, place: int, width: int) -> Tensor:
    result: Tensor = LINEAR(x, _PACKS.packs[place], bias, "none", [], "")
    return result


def _packed_linear_fake(x: Tensor, bias: Tensor | None, place: int, width: int) -> Tensor:
    return x.new_empty((*x.shape[:-1], width))


def _held(x: Tensor) -> Tensor:
    return x.clone(memory_format=torch.contiguous_format)


LIBRARY.impl("packed_linear", _packed_linear, "CPU")
LIBRARY.impl("held", _held, "CompositeExplicitAutograd")
torch.library.register_fake("dpbitfit_fx::packed_linear", _packed_linear_fake, lib=LIBRARY)
torch.library.register_fake("dpbitfit_fx::held", _held, lib=LIBRARY)
PACKED_LINEAR: Any = torch.ops.dpbitfit_fx.packed_linear.default
HELD: Any = torch.ops.dpbitfit_fx.held.default


@contextlib.contextmanager
def holding(packs: Sequence[Tensor]) -> Iterator[None]:
    """The packs that graphs called inside, on this thread, read by their place."""
    before = getattr(_PACKS, "packs", ())
    _PACKS.packs = packs
    try:
        yield
    finally:
        _PACKS.packs = before
