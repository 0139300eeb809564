"""`fit(shard_frozen=True)`: of every large frozen weight each process keeps its share, as FSDP2 lays it out, while it trains.

The step is compiled, proved and checked on the whole model. Then each rank keeps ``Shard(0)`` of the large frozen weights and
frees the rest; the lowered step gathers a weight before it is read (:mod:`passes.sharded_weights`). When the run is over the
model gets its own parameters back, whole, bit for bit; after an error it is left with DTensors, which the next call takes.

A gather needs every rank, so all of them run as many physical batches in a step: before each they tell one another whether
somebody has one left, and who has none runs a filler, whose result is dropped. That is all that travels besides the weights.
Gathers go through a group of their own, on the device of the weights, which whoever stops leaves first: nobody waits for a rank
that will not come.
"""

from __future__ import annotations

import contextlib
import math
import mmap
import sys
import weakref
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from dpbitfit_fx.errors import CompileRefused, RankError
from dpbitfit_fx.passes.opaque import gathering
from dpbitfit_fx.passes.sharded_weights import Shard
from dpbitfit_fx.passes.torch_private import default_group_timeout, gather_into

__all__ = ["SMALLEST", "FrozenShards", "GatherBroken", "check_sharding", "make_whole", "parts_of", "refuse_parts"]

T = TypeVar("T")
SMALLEST = 64 * 64  # entries; below this a weight is not worth a message


class GatherBroken(RankError):
    """A gather did not come about; why it did not, another rank knows."""

    def __init__(self) -> None:
        super().__init__(
            "The frozen weights could not be gathered: another process stopped, or was silent for longer than the timeout of the "
            "process group. The run stopped, and the model is left sharded; where the run has an output_dir, the same call in "
            "all processes continues it."
        )


class _Room:
    """Memory of the CPU for whole weights, used again when no tensor refers to it any more: as many pieces as are alive at once.

    malloc would do, but it was seen to keep several weights' worth for itself, and new pages cost more than the gather.
    """

    MOST = 4

    def __init__(self) -> None:
        self._pieces: list[tuple[mmap.mmap, Callable[[], Any]]] = []  # and what lives as long as a tensor on the piece does

    def take(self, count: int, dtype: torch.dtype) -> Tensor:
        size = count * dtype.itemsize
        free = [piece for piece, lent in self._pieces if lent() is None]
        fitting = [piece for piece in free if len(piece) >= size]
        chosen = min(fitting, key=len) if fitting else mmap.mmap(-1, size)
        gone = chosen if fitting else free[0] if free else None
        held = np.frombuffer(chosen, np.uint8, size)  # the storage of every tensor on it holds this very object
        kept = [entry for entry in self._pieces if entry[0] is not gone]
        alive: Callable[[], Any] = weakref.ref(held)
        self._pieces = [*kept, (chosen, alive)][-self.MOST :]
        return torch.from_numpy(held).view(dtype)


class _Place(NamedTuple):
    """Where a parameter is registered, and what stands there while it is away."""

    module: nn.Module
    name: str
    shown: nn.Parameter


class _Weight(NamedTuple):
    """A frozen parameter (empty while it is sharded), its shape, its shard, and everywhere it is registered."""

    parameter: nn.Parameter
    shape: torch.Size
    shard: Shard
    places: list[_Place]


def check_sharding(
    shard_frozen: bool, backend: str, precision: str, parallel_batches: int, cache_frozen_prefix: bool
) -> None:
    """Raises CompileRefused for what cannot be combined with shard_frozen."""
    for wrong, what, instead in (
        (backend != "eager", f"backend={backend!r}, whose kernels take whole weights", "backend='eager'"),
        (precision != "float32", f"precision={precision!r}, which keeps a packed copy of each weight", "precision='float32'"),
        (parallel_batches != 1, f"parallel_batches={parallel_batches}, whose order varies", "parallel_batches=1"),
        (cache_frozen_prefix, "cache_frozen_prefix, whose records differ from rank to rank", "cache_frozen_prefix=False"),
    ):
        if wrong and shard_frozen:
            raise CompileRefused(
                f"shard_frozen=True cannot be combined with {what}: all processes gather the same weights in the same order. "
                f"Use {instead}, or shard_frozen=False."
            )


def parts_of(model: nn.Module) -> list[str]:
    """The parameters of which this process holds a part: DTensors, such as a stopped run with ``shard_frozen`` leaves behind.

    Raises CompileRefused for a module that FSDP2 wraps.
    """
    wrapped, part = _loaded("torch.distributed.fsdp", "FSDPModule"), _loaded("torch.distributed.tensor", "DTensor")
    for path, module in model.named_modules():
        if wrapped and isinstance(module, wrapped):
            raise CompileRefused(
                f"fully_shard was called on {path or 'the model'}, and torch.export cannot capture the hooks that it adds. Pass "
                "the model as it was before fully_shard: fit(shard_frozen=True) keeps the same shards."
            )
    named = model.named_parameters(remove_duplicate=False)
    return [name for name, parameter in named if part and isinstance(parameter.data, part)]


def refuse_parts(model: nn.Module) -> None:
    """Raises CompileRefused for a model of which this process holds a part."""
    parts = parts_of(model)
    if parts:
        raise CompileRefused(
            f"{parts[0]} is a DTensor, of which this process holds a part. Pass shard_frozen=True in all processes of torchrun, "
            "or a whole model (parameter.full_tensor())."
        )


def make_whole(model: nn.Module) -> None:
    """Whole parameters in the place of DTensors. On all ranks at once. Raises RankError where one that holds a part is gone."""
    whole: dict[Any, nn.Parameter] = {}
    for name in parts_of(model):
        path, _, leaf = name.rpartition(".")
        module = model.get_submodule(path)
        parameter: Any = getattr(module, leaf)
        if parameter not in whole:
            try:
                whole[parameter] = nn.Parameter(parameter.detach().full_tensor(), requires_grad=parameter.requires_grad)
            except RuntimeError:
                raise RankError(
                    "The model's frozen weights were left sharded by a run that stopped, and a process that holds a part of them "
                    "is gone. Load the model again in every process."
                ) from None
        setattr(module, leaf, whole[parameter])


def _loaded(module: str, name: str) -> Any:
    """A class that nobody has an object of before its module is imported, which takes seconds; None until then."""
    return getattr(sys.modules.get(module), name, None)


class FrozenShards:
    """The large frozen parameters of a model, sharded over the ranks of a run.

    Between :meth:`free` and :meth:`give_back` the model shows DTensors in their place and the parameters are empty.
    Every method but :meth:`leave` is called by all ranks, in the same order.
    """

    def __init__(self, model: nn.Module, trained: Collection[nn.Parameter]) -> None:
        """trained: the parameters that any phase trains; they stay whole. The model is not touched yet."""
        from torch.distributed.device_mesh import DeviceMesh

        self._rank, self._ranks = dist.get_rank(), dist.get_world_size()
        device = next(model.parameters()).device
        # As the weights' device asks: a default group of nccl has no backend for the CPU.
        backend = "gloo" if device.type == "cpu" else None
        self._group: Any = dist.new_group(backend=backend, timeout=default_group_timeout())
        self._device, self._room = device, _Room()
        world: Any = dist.group.WORLD
        mesh = DeviceMesh.from_group(world, device.type)
        places: dict[nn.Parameter, list[tuple[nn.Module, str]]] = {}
        for module in model.modules():
            for name, parameter in module.named_parameters(recurse=False):
                places.setdefault(parameter, []).append((module, name))
        kept = set(trained)
        chosen = [p for p in places if p not in kept and self._worth(p)]
        self.weights = [self._sharded(p, places[p], mesh) for p in chosen]
        self._of = {id(weight.parameter): weight.shard for weight in self.weights}

    def _worth(self, parameter: nn.Parameter) -> bool:
        return (
            type(parameter.data) is Tensor
            and parameter.device == self._device
            and parameter.numel() >= SMALLEST
            and parameter.dim() > 0
            and parameter.shape[0] >= self._ranks
            and parameter.is_contiguous()  # a gathered weight is: another layout could mean another kernel, and other bits
            and parameter.grad is None
        )

    def _sharded(self, parameter: nn.Parameter, places: Sequence[tuple[nn.Module, str]], mesh: Any) -> _Weight:
        from torch.distributed.tensor import DTensor
        from torch.distributed.tensor import Shard as ByRows

        whole = parameter.detach()
        rows = whole.shape[0]
        each = -(-rows // self._ranks)
        own = whole[self._rank * each : (self._rank + 1) * each]
        filled = whole.new_zeros((each, *whole.shape[1:]))
        filled[: own.shape[0]] = own
        shard = Shard(filled, rows, self._ranks)
        size, stride = whole.shape, whole.stride()
        part = DTensor.from_local(
            filled[: own.shape[0]], mesh, [ByRows(0)], run_check=False, shape=size, stride=stride
        )
        held = nn.Parameter(part, requires_grad=False)
        return _Weight(parameter, whole.shape, shard, [_Place(module, name, held) for module, name in places])

    # -- gathering ------------------------------------------------------------------------------------------------

    def of(self, parameter: Tensor) -> Shard | None:
        return self._of.get(id(parameter))

    def gather(self, shard: Tensor, ranks: int) -> Tensor:
        """``[m, ..] -> [N m, ..]``: the ranks' shards, in their order."""
        shape = (ranks * shard.shape[0], *shard.shape[1:])
        if shard.device.type != "cpu":
            whole = shard.new_empty(shape)
            self._together(lambda: gather_into(whole, shard, self._group))
            return whole
        # Part by part: gloo would gather into a second copy. As bytes, since gloo does not know every dtype.
        whole = self._room.take(math.prod(shape), shard.dtype)
        parts = whole.view(torch.uint8).chunk(ranks)
        parts[self._rank].copy_(shard.reshape(-1).view(torch.uint8))
        for rank, part in enumerate(parts):
            self._together(lambda rank=rank, part=part: dist.broadcast(part, rank, self._group))  # type: ignore[misc]
        return whole.view(shape)

    def gathered(self, weight: _Weight) -> Tensor:
        return self.gather(weight.shard.tensor, self._ranks)[: weight.shape[0]]

    def in_step(self, batches: Iterable[T]) -> Iterator[T | None]:
        """The batches, then None as often as it takes until no rank has one left."""
        left = iter(batches)
        while True:
            batch = next(left, None)
            some = torch.tensor([0 if batch is None else 1], device=self._device)
            self._together(lambda some=some: dist.all_reduce(some, dist.ReduceOp.MAX, group=self._group))  # type: ignore[misc]
            if not some.item():
                return
            yield batch

    def gathering(self) -> contextlib.AbstractContextManager[None]:
        """Inside, a sharded step gathers from these ranks."""
        return gathering(self.gather)

    def whole_here(self) -> contextlib.AbstractContextManager[None]:
        """Inside, a sharded step gets from this rank's whole weights what :meth:`check` saw the ranks gather."""
        here = {weight.shard.tensor.data_ptr(): weight for weight in self.weights}

        def gather(shard: Tensor, ranks: int) -> Tensor:
            weight = here[shard.data_ptr()]
            whole, more = weight.parameter.detach(), ranks * shard.shape[0] - weight.shape[0]
            return torch.cat([whole, shard.new_zeros((more, *shard.shape[1:]))]) if more else whole

        return gathering(gather)

    def _together(self, collective: Callable[[], Any]) -> None:
        failed = self._group is None
        if not failed:
            try:
                collective()
            except RuntimeError:
                failed = True
            except BaseException as error:
                # Without the frames of torch.distributed, which hold the group, and with it the connections, open.
                raise error.with_traceback(None)  # noqa: B904
        if failed:
            raise GatherBroken

    def leave(self) -> None:
        """Closes the connections: a rank that waits for this one in a gather stops waiting."""
        group, self._group = self._group, None
        if group is not None:
            dist.destroy_process_group(group)

    # -- the model ------------------------------------------------------------------------------------------------

    def check(self) -> None:
        """Raises RankError where the ranks' shards do not make up this rank's own weights, bit for bit. Before :meth:`free`."""
        for weight in self.weights:
            own = weight.parameter.detach().reshape(-1).view(torch.uint8)
            if not torch.equal(self.gathered(weight).reshape(-1).view(torch.uint8), own):
                raise RankError("The frozen weights differ between the processes. Load the same ones in every process.")

    def free(self) -> None:
        """From here on this rank keeps its shards alone."""
        for weight in self.weights:
            for module, name, shown in weight.places:
                setattr(module, name, shown)
            weight.parameter.data = weight.shard.tensor.new_empty(0)

    def give_back(self, to_all: bool = True) -> None:
        """The model has its own parameters again, whole; on rank 0 alone unless ``to_all``. All of them or none."""
        found = []
        for weight in self.weights:
            whole = self.gathered(weight)
            if to_all or self._rank == 0:
                found.append(whole.clone())
        for weight, whole in zip(self.weights, found, strict=False):
            weight.parameter.data = whole
            for module, name, _ in weight.places:
                setattr(module, name, weight.parameter)
