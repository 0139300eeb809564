"""Lowering, ``precision="bf16"``: attention is rounded to bfloat16 as the products around it are.

On the CPU torch's fused kernel gains little from bfloat16: its products are too small, and its backward is up to four
times slower than in float32 on short sequences. There it becomes products again, a block of heads at a time:

    Q, K, V = bf16(scale q), bf16(k), bf16(v)                    [M H, T, d], [M H, S, d], [M H, S, d]
    out = float32(attend(Q, K, V, mask))                         [M, H, T, d]         :mod:`passes.block_attention`
    dQ, dK, dV = attend_backward(bf16(go), Q, K, V, mask)        dq = scale float32(dQ)

A row of scores that is masked whole (padding before a causal sequence) gives zero and takes no gradient; the fused kernel
gives zero, and its backward takes such a row for ones, which shows only if somebody reads it. Where a head has more than ``LONG``
scores the kernel stays and reads bfloat16. What attention reads and gives is float32 as before, and so is every
per-sample sum behind it.
Measured on Zen 4 (AVX512_BF16), d = 32: blocks take 0.48 of the better kernel's time at T = 128, 0.64 to 0.86 at T = 256 to 2048,
and as much at T = 4096.

On CUDA the kernel that takes float32 (memory-efficient) stays at every length and reads bfloat16.
"""

from __future__ import annotations

import dataclasses
import math
import operator
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import fx

from .block_attention import ATTEND, ATTEND_BACKWARD, LOWEST
from .joint_graph import DynamicLength, Extent, JointGraph, copy_graph, finish
from .torch_private import argument_names, arguments
from .views import VIEWS, seen_as, shown_by

aten = torch.ops.aten
FORWARD = aten._scaled_dot_product_flash_attention_for_cpu.default
BACKWARD = aten._scaled_dot_product_flash_attention_for_cpu_backward.default
EFFICIENT = aten._scaled_dot_product_efficient_attention.default
CALLS = {FORWARD: BACKWARD, EFFICIENT: aten._scaled_dot_product_efficient_attention_backward.default}
MASKS = ("attn_mask", "attn_bias")  # what an operator calls it
SPREAD = {*VIEWS, aten.expand.default, aten.slice.Tensor, aten.constant_pad_nd.default}  # how a mask is laid out for a kernel
LONG = 2**23  # scores of a head
HOW = {"blocks": "in blocks", "fused": "by the fused kernel"}


def round_attention(joint: JointGraph) -> JointGraph:
    """The same attention in bfloat16; the report says how many of which kind."""
    graph, _ = copy_graph(joint.module)
    lengths = None if joint.source is None else joint.source.length
    writer = _Writer(graph)
    done = {"blocks": 0, "fused": 0}
    made: dict[fx.Node, _Made] = {}
    for node in list(graph.nodes):
        if node.target in CALLS and (kind := _kind(node, lengths)):
            made[node] = (writer.blocks if kind == "blocks" else writer.fused)(node)
            done[kind] += 1
    order = {node: at for at, node in enumerate(graph.nodes)}
    for node in [n for n in order if n.target in CALLS.values()]:
        # Where attention is computed again to save memory, its two results may come from two calls: the later one is read.
        given = arguments(node)
        calls = [x.args[0] for x in (given["out"], given["logsumexp"]) if x.args[0] in made]
        if calls:
            made[max(calls, key=order.__getitem__)].backward(node)
    for node, forward in made.items():
        writer.replace(node, forward.results)
    notes = tuple(f"attention in bfloat16: {n} {HOW[kind]}" for kind, n in done.items() if n)
    return dataclasses.replace(joint, module=finish(graph), optimized=(*joint.optimized, *notes)) if notes else joint


def _kind(node: fx.Node, lengths: DynamicLength | None) -> str:
    """``blocks``, ``fused`` or empty: left as it is. Where T is not one number, its longest decides."""
    given = arguments(node)
    q, k, mask = given["query"], given["key"], _mask_of(given)
    shapes = [x.meta.get("shape") for x in (q, k)]
    if None in shapes or any(x.meta.get("dtype") is not torch.float32 for x in (q, k, *([mask] if mask else []))):
        return ""
    if node.target is EFFICIENT:
        return "" if given["dropout_p"] else "fused"
    (_, heads, t, d), (_, others, s, _) = shapes
    dynamic = isinstance(t, Extent) or isinstance(s, Extent)
    if given["dropout_p"] or heads != others or isinstance(heads, Extent) or isinstance(d, Extent):
        return ""
    if _longest(t, lengths) * _longest(s, lengths) < LONG:
        return "blocks"
    return "" if dynamic else "fused"


def _mask_of(given: dict[str, Any]) -> Any:
    return next(given[name] for name in MASKS if name in given)


def _longest(size: int, lengths: DynamicLength | None) -> float:
    """A size at the greatest length that the step takes; sizes grow with it by a constant."""
    if not isinstance(size, Extent) or lengths is None:
        return size
    short, long = lengths.captured
    return int(size) + (size.other - int(size)) * (lengths.checked[-1] - short) / (long - short)


class _Made(NamedTuple):
    """What stands for a forward call: its results, and how a backward call that read them is written."""

    results: list[fx.Node]
    backward: Callable[[fx.Node], None]


class _Writer:
    def __init__(self, graph: fx.Graph) -> None:
        self.graph = graph
        self.masks: dict[fx.Node, tuple[fx.Node, fx.Node]] = {}

    def call(self, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        return self.graph.call_function(target, args, kwargs)

    def round(self, x: fx.Node) -> fx.Node:
        return self.call(aten._to_copy.default, x, dtype=torch.bfloat16)

    def widen(self, x: fx.Node) -> fx.Node:
        return self.call(aten._to_copy.default, x, dtype=torch.float32)

    def replace(self, node: fx.Node, values: list[fx.Node]) -> None:
        """``values[i]`` where the i-th result of ``node`` was read, and ``node`` is gone: torch takes it for one that draws."""
        for user in list(node.users):
            at: Any = user.args[1]
            if at < len(values):
                user.replace_all_uses_with(values[at])
            self.graph.erase_node(user)
        self.graph.erase_node(node)

    def blocks(self, node: fx.Node) -> _Made:
        given = arguments(node)
        query, key, value, mask = (given[name] for name in ("query", "key", "value", "attn_mask"))
        _, heads, _, d = query.meta["shape"]
        scale = 1 / math.sqrt(d) if given["scale"] is None else given["scale"]

        def rows(x: fx.Node, length: Any) -> fx.Node:
            return self.call(aten.reshape.default, x, [-1, length, d])

        def apart(x: fx.Node, length: Any) -> fx.Node:
            return self.call(aten.reshape.default, self.widen(x), [-1, heads, length, d])

        with self.graph.inserting_before(node):
            t, s = self.length(query), self.length(key)
            q = rows(self.round(self.call(aten.mul.Scalar, query, scale)), t)
            k, v = rows(self.round(key), s), rows(self.round(value), s)
            finite, dead = (None, None) if mask is None else self.mask(mask)
            rest = q, k, v, finite, heads, bool(given["is_causal"])
            out = apart(self.call(ATTEND, *rest), t)
            if dead is not None:
                out = self.call(aten.masked_fill.Scalar, out, dead, 0.0)

        def backward(reader: fx.Node) -> None:
            with self.graph.inserting_before(reader):
                go: Any = reader.args[0]
                if dead is not None:
                    go = self.call(aten.masked_fill.Scalar, go, dead, 0.0)
                grads = self.call(ATTEND_BACKWARD, rows(self.round(go), t), *rest)
                dq, dk, dv = (self.call(operator.getitem, grads, i) for i in range(3))
                scaled = self.call(aten.mul.Scalar, apart(dq, t), scale)
                self.replace(reader, [scaled, apart(dk, s), apart(dv, s)])

        return _Made([out], backward)

    def length(self, x: fx.Node) -> Any:
        """T of ``[M, H, T, d]``."""
        size = x.meta["shape"][2]
        return self.call(aten.sym_size.int, x, 2) if isinstance(size, Extent) else size

    def mask(self, mask: fx.Node) -> tuple[fx.Node, fx.Node]:
        """The mask in bfloat16 without infinities, and [.., T or 1, 1] bool: rows that are masked whole."""
        if mask not in self.masks:
            with self.graph.inserting_after(mask):
                finite = self.call(aten.clamp_min.default, mask, LOWEST)
            with self.graph.inserting_after(finite):
                rounded = self.round(finite)
            with self.graph.inserting_after(rounded):
                highest = self.call(aten.amax.default, mask, [-1], True)
            with self.graph.inserting_after(highest):
                dead = self.call(aten.eq.Scalar, highest, -math.inf)
            self.masks[mask] = rounded, dead
        return self.masks[mask]

    def fused(self, node: fx.Node) -> _Made:
        """The same kernel, forward and backward, on rounded tensors."""
        with self.graph.inserting_before(node):
            given = {name: x for name, x in arguments(node).items() if isinstance(x, fx.Node)}
            rounded = {n: (self.round_spread if n in MASKS else self.round)(x) for n, x in given.items()}
            both = self.swapped(node, rounded)
            results = [self.call(operator.getitem, both, i) for i in range(len(node.target._schema.returns))]  # type: ignore[union-attr]
            out, lse, *state = results
            wide = self.widen(out)

        def backward(reader: fx.Node) -> None:
            with self.graph.inserting_before(reader):
                go: Any = self.round(reader.args[0])  # type: ignore[arg-type]
                known = {**rounded, argument_names(reader.target)[0]: go, "out": out, "logsumexp": lse}
                known |= dict(zip(("philox_seed", "philox_offset"), state, strict=False))
                grads = self.swapped(reader, known)
                self.replace(reader, [self.widen(self.call(operator.getitem, grads, i)) for i in range(3)])

        return _Made([wide, lse, *state], backward)

    def swapped(self, node: fx.Node, known: dict[str, fx.Node]) -> fx.Node:
        """The call again, with these tensors for its own of the same name."""
        names = argument_names(node.target)
        args = [known.get(name, x) for name, x in zip(names, node.args, strict=False)]
        return self.call(node.target, *args, **{name: known.get(name, x) for name, x in node.kwargs.items()})

    def round_spread(self, mask: fx.Node) -> fx.Node:
        """A mask rounded where it is small, and spread over heads and rows as it was: a copy would write it out."""
        return seen_as(self.graph, self.round(shown_by(mask, SPREAD)), mask, SPREAD)
