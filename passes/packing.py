"""Lowering, packed frozen weights: on the CPU a product with a frozen weight reads it in oneDNN's own layout.

    mm(x [N, K], W [K, C])               ->  linear(x, P)            P = pack(Wt [C, K]), made once, not at every step
    addmm(b [C], x, W)                   ->  linear(x, P, b)
    addmm(r [N, C], x, W)                ->  linear(x, P) + r, in one call

With ``dtype=torch.bfloat16`` the same products read a bfloat16 copy of the weight, packed once, and of their input, cast
once however many products share it; they accumulate in float32 and round their result to bfloat16:

    addmm(b, x, W)                       ->  float32(linear(bfloat16(x), P)) + b

On CUDA, which multiplies both layouts as they are, P = bfloat16(W) [K, C] and ``mm`` stands for ``linear``; float32 weights
are not copied there.

All else stays float32: the residual stream, norms, attention, losses, per-sample sums, the clip and the sums behind it. A
row's norm is that of the very row that is summed, so the sensitivity is R as before; only the gradient is a rounded one.

W is anything that is computed from frozen inputs alone, so the transposed weight of the backward pass is packed too. The
same numbers up to rounding; the sealed graph (its hash, its exports) is the one before this lowering, and the template
is matched again after it. The original weights stay inputs: when one of them changes, :func:`pack` runs again.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping

import torch
from torch import fx

from .joint_graph import Input, JointGraph, Role, copy_graph, finish
from .torch_private import LINEAR, LINEAR_ADD, can_pack, pack_linear_weight

aten = torch.ops.aten
SMALLEST = 64 * 64  # below this a product is not worth a second copy of its weight


@dataclasses.dataclass(frozen=True)
class Pack:
    """One packed weight: the input that holds it, how it is computed from frozen inputs, and its size in bytes."""

    target: str
    sources: tuple[str, ...]
    module: fx.GraphModule
    bytes: int
    dtype: torch.dtype = torch.float32
    layout: str = "onednn"


def layout(device: torch.device, dtype: torch.dtype) -> str:
    """How products with weights of this kind read them fastest: ``onednn``, ``plain`` (rounded only), or empty: as they are."""
    if device.type == "cpu":
        return "onednn" if can_pack() else ""
    return "plain" if dtype is not torch.float32 else ""


def pack_weights(joint: JointGraph, dtype: torch.dtype = torch.float32) -> tuple[JointGraph, tuple[Pack, ...]]:
    """The graph with packed inputs (not yet in ``state``: see :func:`pack`), and the recipes of the packs.

    Nothing is packed where the weights are not float32, and on a CPU where torch has no oneDNN or the CPU lacks AVX-512,
    without which packed products were measured to be no faster.
    """
    graph, mapping = copy_graph(joint.module)
    names = {i.name: i for i in joint.inputs}
    frozen: dict[fx.Node, set[fx.Node]] = {}  # nodes computed from frozen inputs alone, and those inputs
    for node in graph.nodes:
        if node.op == "placeholder":
            if names[node.name].role is Role.FROZEN:
                frozen[node] = {node}
        elif node.op == "call_function" and node.all_input_nodes and all(i in frozen for i in node.all_input_nodes):
            frozen[node] = set().union(*(frozen[i] for i in node.all_input_nodes))
    after = [mapping[joint.placeholder(i.name)] for i in joint.inputs if i.role in (Role.TRAINABLE, Role.FROZEN)][-1]
    packs: list[Pack] = []
    inputs: list[Input] = []
    made: dict[fx.Node, fx.Node] = {}
    rounded: dict[fx.Node, fx.Node] = {}
    for node in list(graph.nodes):
        if node.target not in (aten.mm.default, aten.addmm.default) or node.kwargs:
            continue
        *rest, x, weight = node.args
        added = rest[0] if rest else None
        kind = "" if weight not in frozen or x in frozen else _kind(joint, frozen[weight], node, dtype)
        if not kind:
            continue
        shape = None if added is None else added.meta.get("shape")
        if added is not None and shape not in (node.meta["shape"], node.meta["shape"][-1:]):
            continue
        if weight not in made:
            recipe, used = _recipe(weight)
            sources = tuple(names[n.name].target for n in used)
            target = f"packed {len(packs)}: {', '.join(sources)}"
            with graph.inserting_after(after):
                made[weight] = after = graph.placeholder(f"packed_{len(packs)}")
            size = math.prod(node.meta["shape"][-1:]) * math.prod(x.meta["shape"][-1:]) * dtype.itemsize
            packs.append(Pack(target, sources, recipe, size, dtype, kind))
            inputs.append(Input(made[weight].name, Role.FROZEN, target))
        with graph.inserting_before(node):
            if dtype is not torch.float32:
                if x not in rounded:
                    rounded[x] = graph.call_function(aten._to_copy.default, (x,), {"dtype": dtype})
                    rounded[x].meta = {**x.meta, "dtype": dtype}
                if kind == "onednn":
                    product = graph.call_function(LINEAR, (rounded[x], made[weight], None, "none", [], ""))
                else:
                    product = graph.call_function(aten.mm.default, (rounded[x], made[weight]))
                new = graph.call_function(aten._to_copy.default, (product,), {"dtype": torch.float32})
                product.meta = {**node.meta, "dtype": dtype}
                if added is not None:
                    new.meta.update(node.meta)
                    new = graph.call_function(aten.add.Tensor, (new, added))
            elif added is not None and shape == node.meta["shape"]:
                new = graph.call_function(LINEAR_ADD, (x, added, made[weight], None, "add"))
            else:
                new = graph.call_function(LINEAR, (x, made[weight], added, "none", [], ""))
        new.meta.update(node.meta)
        node.replace_all_uses_with(new)
    if not packs:
        return joint, ()
    at = max(i for i, entry in enumerate(joint.inputs) if entry.role in (Role.TRAINABLE, Role.FROZEN)) + 1
    order = (*joint.inputs[:at], *inputs, *joint.inputs[at:])
    return dataclasses.replace(joint, module=finish(graph), inputs=order), tuple(packs)


def pack(item: Pack, state: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """The packed weight from the frozen tensors as they are now."""
    with torch.no_grad():
        (weight,) = item.module(*(state[name].detach() for name in item.sources))
        if item.layout == "plain":
            copy: torch.Tensor = weight.to(item.dtype, memory_format=torch.contiguous_format)
            return copy
        return pack_linear_weight(weight.t().contiguous().to(item.dtype))


def _kind(joint: JointGraph, sources: set[fx.Node], node: fx.Node, dtype: torch.dtype) -> str:
    """The layout for a product's weight, which is computed from these inputs; empty where it stays as it is."""
    tensors = [joint.state[i.target] for i in joint.inputs if i.name in {s.name for s in sources}]
    suits = all(t.dtype == torch.float32 for t in tensors) and len({t.device for t in tensors}) == 1
    if not suits or "shape" not in node.meta or sum(t.numel() for t in tensors) < SMALLEST:
        return ""
    return layout(tensors[0].device, dtype)


def _recipe(weight: fx.Node) -> tuple[fx.GraphModule, list[fx.Node]]:
    """The frozen subgraph that computes ``weight``, as a module of its own, and the inputs it reads, in order."""
    needed: set[fx.Node] = set()
    todo = [weight]
    while todo:
        node = todo.pop()
        if node not in needed:
            needed.add(node)
            todo += node.all_input_nodes
    graph = fx.Graph()
    mapping: dict[fx.Node, fx.Node] = {}
    used: list[fx.Node] = []
    for node in weight.graph.nodes:
        if node in needed:
            mapping[node] = graph.node_copy(node, lambda n: mapping[n])
            used += [node] if node.op == "placeholder" else []
    graph.output((mapping[weight],))
    return finish(graph), used
