"""The one closed template between per-sample gradients and outputs, matched node for node (design §7).

Reachability is not enough: ``1000 * clipped + z`` passes it. So each node on the way from the output back to the
gradients must be the expected operator with the expected constants, and must have no other user.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import networkx as nx
import torch
from torch import fx

from .clipping import AutomaticClipping, FlatClipping
from .errors import SealBroken
from .joint_graph import JointGraph, Role

aten = torch.ops.aten
LARGEST_SQUARED_NORM = 1e60
# Positional arguments of the operators of the template; two where not listed. One more could be `keepdim` or `alpha`.
ARITY: dict[Any, int] = {
    aten.reciprocal.default: 1,
    aten.sqrt.default: 1,
    aten._to_copy.default: 1,
    aten.where.ScalarOther: 3,
}


def as_list(value: Any) -> list[Any]:
    return list(value) if isinstance(value, (list, tuple)) else [value]


def expect(node: Any, target: Any, what: str, users: int | None = 1, **kwargs: Any) -> fx.Node:
    """The node, if it is a call of ``target`` with exactly these options, no argument too many and this many users."""
    if not isinstance(node, fx.Node) or node.op != "call_function" or node.target is not target:
        found = getattr(node, "target", node)
        raise SealBroken(f"{what}: expected {target}, found {found}.")
    if dict(node.kwargs) != kwargs:
        raise SealBroken(f"{what}: {target} has the options {dict(node.kwargs)}, expected {kwargs}.")
    if len(node.args) != ARITY.get(target, 2):
        raise SealBroken(f"{what}: {target} has {len(node.args)} arguments; a scale or an option was added.")
    if users is not None and len(node.users) != users:
        raise SealBroken(
            f"{what}: {node.name} is used {len(node.users)} times, expected {users}; a second use could leave the graph."
        )
    return node


def constant(value: Any, expected: float, what: str) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or value != expected:
        raise SealBroken(f"{what}: found {value!r}, expected the public constant {expected!r}.")


def placeholder(joint: JointGraph, role: Role, node: Any, users: int, what: str) -> None:
    names = [i.name for i in joint.with_role(role)]
    if len(names) != 1:
        raise SealBroken(f"{what}: the graph has {len(names)} inputs with the role {role.value}, expected one.")
    if not isinstance(node, fx.Node) or node.op != "placeholder" or node.name != names[0]:
        raise SealBroken(f"{what}: expected the input {role.value}, found {node}.")
    if len(node.users) != users:
        raise SealBroken(f"{what}: the input {role.value} is used {len(node.users)} times, expected {users}.")


def single_output(joint: JointGraph) -> Any:
    if len(joint.outputs) != 1:
        raise SealBroken(f"The graph has {len(joint.outputs)} outputs; only one flat vector [D] may leave it.")
    return joint.outputs[0]


def match_noise(joint: JointGraph) -> fx.Node:
    """Matches ``(sum + z * sigma R) / N`` at the output and returns the node ``sum``."""
    if joint.noise is None or joint.clipping is None:
        raise SealBroken("The graph carries no noise scale; it cannot be sealed.")
    if joint.noise.noise_multiplier <= 0:
        raise SealBroken("noise_multiplier is zero: a graph without noise is never sealed.")
    div = expect(single_output(joint), aten.div.Scalar, "denominator")
    constant(div.args[1], joint.noise.expected_batch_size, "denominator")
    noisy = expect(div.args[0], aten.add.Tensor, "noise")
    scaled = expect(noisy.args[1], aten.mul.Scalar, "noise")
    constant(scaled.args[1], joint.noise.noise_multiplier * joint.clipping.sensitivity, "noise scale sigma * R")
    placeholder(joint, Role.NOISE, scaled.args[0], 1, "noise")
    if not isinstance(noisy.args[0], fx.Node) or len(noisy.args[0].users) != 1:
        raise SealBroken("noise: the clipped sum is used a second time besides the noisy output.")
    return noisy.args[0]


def match_clip(joint: JointGraph, result: Any) -> list[fx.Node]:
    """Matches the clip tail at ``result`` and returns the per-sample gradient nodes, one per target."""
    clipping = joint.clipping
    if clipping is None:
        raise SealBroken("The graph carries no clipping; its sensitivity is unbounded.")
    result = expect(result, aten.add.Tensor, "accumulation")
    placeholder(joint, Role.ACCUMULATOR, result.args[0], 1, "accumulation")
    total = expect(result.args[1], aten.reshape.default, "weighted sum")
    if as_list(total.args[1]) != [joint.num_trainable]:
        raise SealBroken("weighted sum: the sum does not have one entry per trainable coordinate.")
    product = expect(total.args[0], aten.mm.default, "weighted sum")
    rows = expect(product.args[1], aten.where.ScalarOther, "non-finite rows")
    constant(rows.args[2], 0.0, "non-finite rows")
    column = expect(rows.args[0], aten.unsqueeze.default, "non-finite rows")
    constant(column.args[1], 1, "non-finite rows")
    weights = expect(product.args[0], aten.unsqueeze.default, "weights")
    constant(weights.args[1], 0, "weights")
    narrow = expect(weights.args[0], aten._to_copy.default, "weights", dtype=joint.flat_dtype)
    kept = expect(narrow.args[0], aten.where.ScalarOther, "weights")
    constant(kept.args[2], 0.0, "weights")
    keep = expect(column.args[0], aten.logical_and.default, "kept rows", users=2)
    if kept.args[0] is not keep:
        raise SealBroken("weights: the weights and the rows do not drop the same samples.")
    present = expect(keep.args[0], aten.ne.Scalar, "sample_mask")
    constant(present.args[1], 0, "sample_mask")
    placeholder(joint, Role.MASK, present.args[0], 1, "sample_mask")
    finite = expect(keep.args[1], aten.lt.Scalar, "finite norms")
    constant(finite.args[1], LARGEST_SQUARED_NORM, "finite norms")
    squared = expect(finite.args[0], aten.sum.dim_IntList, "norm", users=2)
    factor = expect(kept.args[1], aten.mul.Scalar, "clip factor")
    constant(factor.args[1], clipping.max_grad_norm, "clip factor R")
    reciprocal = expect(factor.args[0], aten.reciprocal.default, "clip factor")
    if isinstance(clipping, AutomaticClipping):
        below = expect(reciprocal.args[0], aten.add.Scalar, "clip factor")
        constant(below.args[1], clipping.gamma, "clip factor gamma")
    elif type(clipping) is FlatClipping:
        below = expect(reciprocal.args[0], aten.clamp_min.default, "clip factor")
        constant(below.args[1], clipping.max_grad_norm, "clip factor R")
    else:
        raise SealBroken(f"clip factor: {type(clipping).__name__} has no template.")
    norm = expect(below.args[0], aten.sqrt.default, "norm")
    if norm.args[0] is not squared:
        raise SealBroken("norm: the finite test and the factor use different norms.")
    if as_list(squared.args[1]) != [1]:
        raise SealBroken("norm: the squares are not summed over each sample's own row.")
    square = expect(squared.args[0], aten.mul.Tensor, "norm")
    wide = expect(square.args[0], aten._to_copy.default, "norm", users=1, dtype=torch.float64)
    if square.args[1] is not wide:
        raise SealBroken("norm: the product is not the square of the gradients.")
    side = rows.args[1]
    if wide.args[0] is not side:
        raise SealBroken("norm: the norm is taken over other values than those that are summed.")
    if isinstance(side, fx.Node) and side.target is aten._to_copy.default:
        side = expect(side, aten._to_copy.default, "gradients", users=2, dtype=joint.flat_dtype)
        side = expect(side.args[0], aten.cat.default, "gradients")
    else:
        side = expect(side, aten.cat.default, "gradients", users=2)
    constant(side.args[1], 1, "gradients")
    pieces = as_list(side.args[0])
    if len(pieces) != len(joint.targets):
        raise SealBroken(
            f"gradients: {len(pieces)} gradients for {len(joint.targets)} trainables; a parameter was dropped or added."
        )
    found = []
    for piece, target in zip(pieces, joint.targets, strict=True):
        view = expect(piece, aten.reshape.default, f"gradient of {target.name}")
        if as_list(view.args[1]) != [-1, target.numel]:
            raise SealBroken(f"gradient of {target.name}: it does not have {target.numel} entries per sample.")
        if not isinstance(view.args[0], fx.Node):
            raise SealBroken(f"gradient of {target.name}: it is not computed in the graph.")
        found.append(view.args[0])
    return found


def check_sources(joint: JointGraph, gradients: Iterable[fx.Node]) -> None:
    """Mask, accumulator and noise reach no gradient (networkx reachability): they enter only where the template says."""
    reach = nx.DiGraph()
    for node in joint.module.graph.nodes:
        reach.add_node(node)
        reach.add_edges_from((i, node) for i in node.all_input_nodes)
    for role in (Role.MASK, Role.ACCUMULATOR, Role.NOISE):
        for entry in joint.with_role(role):
            down = nx.descendants(reach, joint.placeholder(entry.name))
            if any(g in down for g in gradients):
                raise SealBroken(f"The input {role.value} reaches a per-sample gradient.")
