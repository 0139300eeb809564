"""Operators of our own that no backend looks into: they are called where they stand, on what they are given.

    packed_linear(x [N, K], b [C] or None, i, C)  ->  [N, C]      the i-th of the packed weights that the caller holds
    whole_weight(s [m, ..], N)                    ->  [N m, ..]   the shards of N processes, as the caller gathers them
    held(x)                                       ->  x, copied: no fusion reaches through it
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from .torch_private import LINEAR

Gather = Callable[[Tensor, int], Tensor]


class _Here(threading.local):
    """What the caller of a graph, on this thread, gives the operators in it."""

    packs: Sequence[Tensor] = ()
    gather: Gather | None = None


_HERE = _Here()
LIBRARY: Any = torch.library.Library("dpbitfit_fx", "DEF")  # type: ignore[no-untyped-call]
LIBRARY.define("packed_linear(Tensor x, Tensor? bias, int place, int width) -> Tensor")
LIBRARY.define("whole_weight(Tensor shard, int ranks) -> Tensor")
LIBRARY.define("held(Tensor x) -> Tensor")


def _packed_linear(x: Tensor, bias: Tensor | None, place: int, width: int) -> Tensor:
    result: Tensor = LINEAR(x, _HERE.packs[place], bias, "none", [], "")
    return result


def _packed_linear_fake(x: Tensor, bias: Tensor | None, place: int, width: int) -> Tensor:
    return x.new_empty((*x.shape[:-1], width))


def _whole(shard: Tensor, ranks: int) -> Tensor:
    assert _HERE.gather is not None, "a sharded graph is called inside gathering()"
    return _HERE.gather(shard, ranks)


def _whole_fake(shard: Tensor, ranks: int) -> Tensor:
    return shard.new_empty((ranks * shard.shape[0], *shard.shape[1:]))


def _held(x: Tensor) -> Tensor:
    return x.clone(memory_format=torch.contiguous_format)


LIBRARY.impl("packed_linear", _packed_linear, "CPU")
LIBRARY.impl("whole_weight", _whole, "CompositeExplicitAutograd")
LIBRARY.impl("held", _held, "CompositeExplicitAutograd")
torch.library.register_fake("dpbitfit_fx::packed_linear", _packed_linear_fake, lib=LIBRARY)
torch.library.register_fake("dpbitfit_fx::whole_weight", _whole_fake, lib=LIBRARY)
torch.library.register_fake("dpbitfit_fx::held", _held, lib=LIBRARY)
PACKED_LINEAR: Any = torch.ops.dpbitfit_fx.packed_linear.default
WHOLE: Any = torch.ops.dpbitfit_fx.whole_weight.default
HELD: Any = torch.ops.dpbitfit_fx.held.default


def holding(packs: Sequence[Tensor]) -> contextlib.AbstractContextManager[None]:
    """The packs that graphs called inside, on this thread, read by their place."""
    return _given("packs", packs)


def gathering(gather: Gather) -> contextlib.AbstractContextManager[None]:
    """Inside, graphs gather by this: ``(shard [m, ..], N) -> [N m, ..]``, the processes' shards in their order."""
    return _given("gather", gather)


@contextlib.contextmanager
def _given(name: str, value: Any) -> Iterator[None]:
    before = getattr(_HERE, name)
    setattr(_HERE, name, value)
    try:
        yield
    finally:
        setattr(_HERE, name, before)
