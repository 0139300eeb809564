"""How many bytes a step holds at once: what each node of a graph makes, measured in one run on the example batch.

A view holds nothing of its own and keeps alive what it is a view of; the graph drops a value behind its last reader.
Inputs are not counted: they are there before the step and after it.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import fx
from torch.utils.flop_counter import FlopCounterMode

from .joint_graph import JointGraph
from .pointwise import POINTWISE
from .random_draws import example
from .torch_private import tree_flatten

aten = torch.ops.aten
BATCHES = (3, 5)  # of two sizes, to see what grows with the batch
# Where the work of a step is.
PRODUCTS = {
    aten.mm.default,
    aten.addmm.default,
    aten.bmm.default,
    aten.baddbmm.default,
    aten.convolution.default,
    aten._scaled_dot_product_flash_attention_for_cpu.default,
    aten._scaled_dot_product_flash_attention.default,
    aten._scaled_dot_product_efficient_attention.default,
    aten._scaled_dot_product_cudnn_attention.default,
}


class Call(NamedTuple):
    """A node where it stands, or (``again``) a second copy of it."""

    node: fx.Node
    again: bool = False


class Made(NamedTuple):
    """Of one node: bytes that it allocates, the operand that it is a view of, floating-point operations, bytes it touches."""

    own: int
    view_of: fx.Node | None
    flops: int
    touched: int


def _attention_flops(q: tuple[int, ...], k: tuple[int, ...], *_: Any, **__: Any) -> int:
    """Of the two products, from the shapes of q [N, H, T, d] and k [N, H, S, d]."""
    return 4 * math.prod(q) * k[-2]


class _Measure(fx.Interpreter):
    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module)
        self.made: dict[fx.Node, Made] = {}
        self._inside: dict[fx.Node, list[fx.Node | None]] = {}  # of a tuple's tensors: what each is a view of
        # torch counts the attention kernels of CUDA only.
        self.counter = FlopCounterMode(
            display=False, custom_mapping={aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops}
        )

    def run_node(self, n: fx.Node) -> Any:
        before = self.counter.get_total_flops()
        result = super().run_node(n)
        if n.op != "call_function":
            self.made[n] = Made(0, None, 0, 0)
            return result
        sources = {
            _place(x): i for i in n.all_input_nodes if isinstance(x := self.env[i], torch.Tensor) and _place(x) != 0
        }
        if n.target is operator.getitem and isinstance(n.args[0], fx.Node):
            view_of = self._inside[n.args[0]][n.args[1]]  # type: ignore[index]
        else:
            parts = result if isinstance(result, (tuple, list)) else [result]
            roots = [sources.get(_place(x)) if isinstance(x, torch.Tensor) else None for x in parts]
            self._inside[n] = roots
            view_of = roots[0] if isinstance(result, torch.Tensor) else None
        own = result.untyped_storage().nbytes() if isinstance(result, torch.Tensor) and view_of is None else 0
        read = sum(x.nbytes for i in n.all_input_nodes if isinstance(x := self.env[i], torch.Tensor))
        self.made[n] = Made(own, view_of, self.counter.get_total_flops() - before, read + own)
        return result


def _place(x: torch.Tensor) -> int:
    return x.untyped_storage().data_ptr()


def _run(run: fx.Interpreter, joint: JointGraph, rows: int | None = None) -> None:
    """One run on the source's example batch, or on so many rows of it."""
    source = joint.source
    assert source is not None
    leaves = [x for x in tree_flatten(source.example_batch)[0] if isinstance(x, torch.Tensor)]
    device = leaves[0].device
    if rows is None:
        rows = leaves[0].shape[0]
    else:
        index = (torch.arange(rows) % leaves[0].shape[0]).to(device)
        leaves = [x[index] for x in leaves]
    values = joint.values([*leaves, *(x.to(device) for x in example(joint.draws, rows))])
    mask, accumulator = torch.ones(rows), torch.zeros(joint.num_trainable, dtype=joint.flat_dtype)
    with torch.no_grad(), torch.autocast(device.type, enabled=False):
        run.run(*values, mask.to(device), accumulator.to(device), enable_io_processing=False)


def measure(joint: JointGraph) -> dict[fx.Node, Made]:
    """Runs the accumulating graph once on its source's example batch. No number of the result leaves this function."""
    run = _Measure(joint.module)
    with run.counter:
        _run(run, joint)
    return run.made


class _Shapes(fx.Interpreter):
    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module)
        self.found: dict[fx.Node, tuple[tuple[int, ...], int]] = {}

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        if isinstance(result, torch.Tensor):
            self.found[n] = tuple(result.shape), result.element_size()
        return result


def shapes(joint: JointGraph) -> dict[fx.Node, tuple[tuple[int, ...], tuple[int, ...], int]]:
    """Of every tensor of the accumulating graph: its shapes in batches of the two sizes of ``BATCHES``, and bytes an entry."""
    small, large = (_Shapes(joint.module) for _ in BATCHES)
    for run, rows in zip((small, large), BATCHES, strict=True):
        _run(run, joint, rows)
    return {n: (shape, large.found[n][0], item) for n, (shape, item) in small.found.items()}


def live_bytes(
    calls: Sequence[Call], again: Collection[fx.Node], late: Collection[fx.Node], made: Mapping[fx.Node, Made]
) -> list[int]:
    """The bytes alive while each call runs; a call whose value nobody reads, directly or not, is left out and counts zero.

    A copy, and a node of ``late``, reads the copies of the nodes in ``again``; all others read them where they stand. What
    works entry by entry writes over an operand of its size that is read no more (:mod:`passes.in_place`).
    """

    def read_by(call: Call) -> Iterable[Call]:
        copies = call.again or call.node in late
        return (Call(n, copies and n in again) for n in call.node.all_input_nodes)

    roots: dict[Call, Call] = {}
    for call in calls:
        source = made[call.node].view_of
        at = None if source is None else Call(source, (call.again or call.node in late) and source in again)
        roots[call] = call if at is None else roots[at]
    last: dict[Call, int] = {}
    needed: set[Call] = set()
    for position in range(len(calls) - 1, -1, -1):
        call = calls[position]
        if call in needed or call.node.op == "output":
            for read in read_by(call):
                needed.add(read)
                last.setdefault(roots[read], position)
    freed = [0] * (len(calls) + 1)
    found, live = [], 0
    for position, call in enumerate(calls):
        own = made[call.node].own
        if call in needed and roots[call] is call:
            live += own
            freed[last[call]] += own
        over = (
            call in needed
            and call.node.target in POINTWISE
            and any(last[roots[r]] == position and made[roots[r].node].own == own for r in read_by(call))
        )
        found.append(live - own * over if call in needed else 0)
        live -= freed[position]
    return found
