"""What finally runs: the accumulating graph as the backend executes it, with its packed weights kept up to date."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import shutil
import threading
import weakref
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any

import torch

from .errors import CompileRefused
from .passes import facts
from .passes.batch_sizes import spell_sizes
from .passes.bf16_kept import keep_bfloat16
from .passes.frozen_prefix import split_prefix
from .passes.in_place import write_in_place
from .passes.joint_graph import JointGraph, Role
from .passes.opaque import holding
from .passes.opaque_weights import hide_weights
from .passes.packing import Pack, pack, pack_weights
from .passes.pipeline import LOWERING, OPTIONS, ROUNDING, run
from .passes.sharded_weights import Shard, shard_weights
from .passes.torch_private import at_one_place, has_bfloat16_products, look_for_vector_units, of_any_size, own

BACKENDS = ("eager", "inductor")
CPU = torch.device("cpu")
OPTIMIZATIONS = (*OPTIONS, "packed_weights", "in_place", "bf16_kept", "cuda_graphs")
PRECISIONS = {"float32": torch.float32, "bf16": torch.bfloat16}


def check_lowering(
    backend: str,
    disable: Collection[str],
    precision: str = "float32",
    memory_budget: float = 1.0,
    device: torch.device = CPU,
) -> None:
    """Raises CompileRefused for a backend, optimization, precision or budget that does not exist (here), and says what does."""
    if backend not in BACKENDS:
        raise CompileRefused(f"Unknown backend {backend!r}; choose one of {', '.join(BACKENDS)}.")
    number = isinstance(memory_budget, (int, float)) and not isinstance(memory_budget, bool)
    if not (number and 0.0 <= memory_budget <= 1.0):
        raise CompileRefused(
            f"memory_budget is {memory_budget!r}: give a number from 0 (the least memory that can be had) to 1 (the default: no "
            "value is computed twice)."
        )
    if backend == "inductor" and memory_budget < 1.0:
        raise CompileRefused(
            "memory_budget below 1 chooses by the order in which backend='eager' runs the nodes; Inductor fuses and orders them "
            "anew, and its peak would be another. Leave memory_budget at 1, or use backend='eager'."
        )
    if backend == "inductor" and not any(
        shutil.which(c) for c in (os.environ.get("CXX", ""), "g++", "clang++", "c++") if c
    ):
        raise CompileRefused(
            "backend='inductor' generates C++ and finds no compiler for it. Install g++ (or clang++), name one in the "
            "environment variable CXX, or use backend='eager'."
        )
    for name in disable:
        if name not in OPTIMIZATIONS:
            raise CompileRefused(
                f"Unknown optimization {name!r} in disable; those that can be switched off: {', '.join(OPTIMIZATIONS)}."
            )
    if precision not in PRECISIONS:
        raise CompileRefused(f"Unknown precision {precision!r}; choose one of {', '.join(PRECISIONS)}.")
    if precision == "bf16":
        if "packed_weights" in disable:
            raise CompileRefused(
                "precision='bf16' rounds the packed frozen weights: 'packed_weights' must not be disabled."
            )
        if device.type == "cuda" and not torch.cuda.is_bf16_supported():
            raise CompileRefused(f"precision='bf16' needs a GPU that multiplies bfloat16; {device} does not. Use 'float32'.")
        if device.type == "cpu" and not has_bfloat16_products():
            raise CompileRefused(
                "precision='bf16' needs a torch with oneDNN and a CPU that multiplies bfloat16 (AVX512_BF16 or AMX): on "
                "this machine it would be slower than float32. Use precision='float32'."
            )


def prepare(backend: str, device: torch.device = CPU) -> None:
    """Starts what the backend will have to wait for, while the passes run."""
    if backend == "inductor" and device.type == "cpu":
        look_for_vector_units()


@contextlib.contextmanager
def float32_products() -> Iterator[None]:
    """float32 products round as float32, whatever the user chose for other code (TF32, bfloat16); then all is as it was.

    The weighted sum is such a product, behind a norm in float64: TF32 would round it by 5e-4 and more per record.
    """
    backends: Any = torch.backends
    kinds = [backends.cuda.matmul, backends.mkldnn.matmul]
    before = [kind.fp32_precision for kind in kinds]
    chosen: str | None = None
    with contextlib.suppress(RuntimeError):  # not readable where it was set backend by backend
        chosen = torch.get_float32_matmul_precision()
    try:
        if chosen is None:
            for kind in kinds:
                kind.fp32_precision = "ieee"
        elif chosen != "highest":
            torch.set_float32_matmul_precision("highest")
        yield
    finally:
        if chosen not in (None, "highest"):
            torch.set_float32_matmul_precision(chosen)
        for kind, precision in zip(kinds, before, strict=True):
            if kind.fp32_precision != precision:
                kind.fp32_precision = precision


class MadeFrom:
    """Tensors that something was made from, as they were: object and version of each."""

    def __init__(self, sources: Sequence[torch.Tensor]) -> None:
        self._then = [(weakref.ref(x), _version(x)) for x in sources]

    def fresh(self, sources: Sequence[torch.Tensor]) -> bool:
        """Whether these are the same tensors, and unchanged."""
        return all(ref() is x and v == _version(x) for (ref, v), x in zip(self._then, sources, strict=True))


class _Packed(MadeFrom):
    """A packed weight, and the frozen tensors it was made from."""

    def __init__(self, item: Pack, state: Any) -> None:
        super().__init__([state[name] for name in item.sources])
        self.tensor = pack(item, state)


# Steps compiled for several padded lengths of one model share its packed weights; gone when the last step is.
_PACKING = threading.Lock()  # parallel batches meet a stale pack at the same time
_SHARED: weakref.WeakValueDictionary[tuple[Any, ...], _Packed] = weakref.WeakValueDictionary()


def _version(x: torch.Tensor) -> int:
    return 0 if x.is_inference() else x._version


@dataclasses.dataclass(frozen=True)
class How:
    """What a graph is turned into before it runs."""

    backend: str = "eager"
    precision: str = "float32"
    packed: bool = True
    kept: bool = True
    graphs: bool = True
    in_place: bool = True


class _Runner:
    """A graph as the backend executes it: fed with the live state, its packs kept up to date."""

    def __init__(self, joint: JointGraph, how: How) -> None:
        self.joint, self.packs = pack_weights(joint, PRECISIONS[how.precision]) if how.packed else (joint, ())
        self._held: dict[str, _Packed] = {}
        self._inductor = how.backend == "inductor"
        self._graphs = self._inductor and how.graphs and joint.device.type == "cuda"
        self._in_place = how.in_place
        # Inductor knows no oneDNN layout: such packs are no inputs then.
        self._hidden = [i.target for i in self.packs if self._inductor and i.layout == "onednn"]
        # In eager mode both copies would be there at once: rounding is for what fuses it.
        if self._inductor and how.kept and how.precision == "bf16":
            self.joint = keep_bfloat16(self.joint)
        self._open = _open_sizes(joint)
        self.load(self.joint)
        self.joint = dataclasses.replace(self.joint, optimized=self._inputs.optimized)

    def load(self, joint: JointGraph) -> None:
        """What runs from now on: a graph with the inputs of ``self.joint``."""
        self._inputs = joint
        if self._inductor:
            self._inputs = hide_weights(joint, self._hidden)
        elif self._in_place:
            self._inputs = write_in_place(joint)
        module = self._inputs.module
        options: dict[str, Any] | None = {"triton.cudagraphs": True} if self._graphs else None
        self._call: Any = torch.compile(module, options=options) if self._inductor else module

    def __call__(self, batch: list[torch.Tensor], *more: torch.Tensor) -> tuple[torch.Tensor, ...]:
        packs = {item.target: self.packed(item) for item in self.packs}
        hidden = [packs.pop(target) for target in self._hidden]
        if self._inductor:
            batch = [of_any_size(own(x), *dims) for x, dims in zip(batch, self._open, strict=True)]
            more = tuple(of_any_size(own(x), *dims) for x, dims in zip(more, ((0,), ()), strict=False))
        values = self._inputs.values(batch, packs)
        if self._graphs:
            at_one_place(*values[: -len(batch)])
        # Autocast would round the weighted sum to bfloat16 behind a norm that is not rounded: more than R per record.
        with (
            torch.no_grad(),
            torch.autocast(batch[0].device.type, enabled=False),
            float32_products(),
            holding(hidden),
        ):
            result: tuple[torch.Tensor, ...] = self._call(*values, *more)
            # The next replay of a CUDA graph writes where this one did, and it may read what this one gave.
            return tuple(x.clone() for x in result) if self._graphs else result

    def packed(self, item: Pack) -> torch.Tensor:
        sources = [self.joint.state[name] for name in item.sources]
        held = self._held.get(item.target)
        if held is None or not held.fresh(sources):
            key = (tuple(map(id, sources)), item.module.code, item.dtype, item.layout)
            with _PACKING:
                held = _SHARED.get(key)
                if held is None or not held.fresh(sources):
                    held = _SHARED[key] = _Packed(item, self.joint.state)
            self._held[item.target] = held
        return held.tensor


def _open_sizes(joint: JointGraph) -> list[tuple[int, ...]]:
    """The dimensions of each batch input that vary from call to call: the batch, and the padded length where it may."""
    dims = {} if joint.source is None or joint.source.length is None else joint.source.length.dims
    return [(0, dims[i.target]) if i.target in dims else (0,) for i in joint.with_role(Role.BATCH)]


class Lowered:
    """The PARTIAL graph of a step, lowered: ``(.., batch, sample_mask [B], accumulator [D]) -> accumulator' [D]``.

    Inputs that the backward pass does not need are not kept for it (:mod:`passes.saved_inputs`); within a memory budget below
    1, values are computed again for it (:mod:`passes.recompute`).
    Products with frozen weights read them packed (:mod:`passes.packing`), unless ``disable`` holds ``"packed_weights"``; with
    ``precision="bf16"`` they and attention are in bfloat16.
    eager: pointwise operators write over what nobody reads afterwards (:mod:`passes.in_place`).
    inductor: torch.compile fuses what lies between products, one graph for every batch size; :mod:`passes.opaque_weights`
    gives it the packs, and with bfloat16 :mod:`passes.bf16_kept` keeps less. On CUDA it replays CUDA graphs, one for each
    batch size (``"cuda_graphs"``).
    With :meth:`prefix`, what no trainable reaches is computed apart (:mod:`passes.frozen_prefix`).

    After :meth:`run_as`, large frozen weights are read as shards (:mod:`passes.sharded_weights`).

    A frozen weight that is changed in place or replaced is packed anew at the next call. A write through ``.data`` is
    invisible to torch's version counter: compile again after one.
    """

    def __init__(
        self, partial: JointGraph, backend: str, disable: Collection[str] = (), precision: str = "float32"
    ) -> None:
        check_lowering(backend, disable, precision, device=partial.device)
        rounding = ROUNDING if precision == "bf16" else ()
        packed, kept, graphs, in_place = (
            name not in disable for name in ("packed_weights", "bf16_kept", "cuda_graphs", "in_place")
        )
        self._how = How(backend, precision, packed, kept, graphs, in_place)
        self._whole: JointGraph = run((*LOWERING, *rounding), partial, disable=disable)
        if backend == "inductor":
            self._whole = spell_sizes(self._whole)
        self.runner = _Runner(self._whole, self._how)
        self.joint, self.packs = self.runner.joint, self.runner.packs
        facts.partial(self.joint)
        self._parts: tuple[_Runner, _Runner] | None = None
        self._reads: tuple[int, ...] = ()

    @property
    def packed_bytes(self) -> int:
        """Memory of the packed weights, beside the model's own."""
        return sum(item.bytes for item in self.packs)

    def __call__(
        self,
        batch: list[torch.Tensor],
        sample_mask: torch.Tensor,
        accumulator: torch.Tensor,
        prefix: Sequence[torch.Tensor] | None = None,
    ) -> torch.Tensor:
        """``prefix``: what :meth:`prefix` gave for these records, row by row; it is not computed then."""
        if prefix is None:
            return self.runner(batch, sample_mask, accumulator)[0]
        return self._split()[1]([*batch, *prefix], sample_mask, accumulator)[0]

    def prefix(self, batch: list[torch.Tensor]) -> tuple[torch.Tensor, ...]:
        """What no trainable reaches and the rest of the step reads, each [B, ..]; a function of each record. PRIVATE."""
        return tuple(self._split()[0](batch))

    def prefix_reads(self) -> tuple[int, ...]:
        """Numbers of the batch's tensors that the prefix is computed from."""
        self._split()
        return self._reads

    def sharded(self, shard_of: Callable[[torch.Tensor], Shard | None]) -> tuple[_Runner, tuple[int, ...]]:
        """The same sum from shards of these frozen weights, and the weights, by their id, in the order of the gathers."""
        shards = {i.target: shard_of(self._whole.state[i.target]) for i in self._whole.with_role(Role.FROZEN)}
        joint, order = shard_weights(self._whole, {n: shard for n, shard in shards.items() if shard is not None})
        facts.partial(joint)
        how = dataclasses.replace(self._how, packed=False)
        return _Runner(joint, how), tuple(id(self._whole.state[n]) for n in order)

    def run_as(self, runner: _Runner) -> None:
        """What runs from now on: of :meth:`sharded`."""
        self.runner, self.joint, self.packs = runner, runner.joint, runner.packs

    def _split(self) -> tuple[_Runner, _Runner]:
        if self._parts is None:
            parts = split_prefix(self._whole)
            before, rest = _Runner(parts.prefix, self._how), _Runner(parts.rest, self._how)
            facts.partial(rest.joint)
            self._parts, self._reads = (before, rest), parts.reads
        return self._parts
