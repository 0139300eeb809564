"""The one closed template between per-sample gradients and outputs, matched node for node (design §7).

Reachability is not enough: ``1000 * clipped + z`` passes it. So each node on the way from the output back to the
gradients must be the expected operator with the expected constants, and must have no other user.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable
from typing import Any

import networkx as nx
import torch
from torch import fx

from . import ghost_template
from .clipping import KINDS, SMALLEST_SQUARED_NORM, AutomaticClipping, AutoVClipping, Layer
from .errors import SealBroken
from .grid_template import match_rounded, match_units
from .joint_graph import JointGraph, Role
from .matching import as_list, constant, expect, public_sizes

aten = torch.ops.aten
LARGEST_SQUARED_NORM = 1e60


def placeholder(joint: JointGraph, role: Role, node: Any, users: int, what: str) -> None:
    names = [i.name for i in joint.with_role(role)]
    if len(names) != 1:
        raise SealBroken(f"{what}: the graph has {len(names)} inputs with the role {role.value}, expected one.")
    if not isinstance(node, fx.Node) or node.op != "placeholder" or node.name != names[0]:
        raise SealBroken(f"{what}: expected the input {role.value}, found {node}.")
    if len(node.users) != users:
        raise SealBroken(f"{what}: the input {role.value} is used {len(node.users)} times, expected {users}.")


def single_output(joint: JointGraph) -> Any:
    if not isinstance(joint.module.graph.output_node().args[0], (tuple, list)):
        raise SealBroken("The graph returns one vector bare: its first coordinate would be taken for the vector.")
    if len(joint.outputs) != 1:
        raise SealBroken(f"The graph has {len(joint.outputs)} outputs; only one flat vector [D] may leave it.")
    return joint.outputs[0]


def match_noise(joint: JointGraph) -> fx.Node:
    """Matches ``(sum + z * sigma R (1 + slack)) / N`` at the output, on the grid ``(sum + z) * g / N``; returns ``sum``."""
    if joint.noise is None or joint.clipping is None:
        raise SealBroken("The graph carries no noise scale; it cannot be sealed.")
    if joint.noise.noise_multiplier <= 0:
        raise SealBroken("noise_multiplier is zero: a graph without noise is never sealed.")
    known_layers(joint)
    div = expect(single_output(joint), aten.div.Scalar, "denominator")
    constant(div.args[1], joint.noise.expected_batch_size, "denominator")
    if joint.noise.grid:
        noisy = match_units(joint, div.args[0])
        placeholder(joint, Role.NOISE, noisy.args[1], 1, "noise")
        return once(noisy.args[0])
    noisy = expect(div.args[0], aten.add.Tensor, "noise")
    scaled = expect(noisy.args[1], aten.mul.Scalar, "noise")
    constant(scaled.args[1], joint.noise.scale(joint.clipping), "noise scale sigma * R * (1 + slack)")
    placeholder(joint, Role.NOISE, scaled.args[0], 1, "noise")
    return once(noisy.args[0])


def once(total: Any) -> fx.Node:
    if not isinstance(total, fx.Node) or len(total.users) != 1:
        raise SealBroken("noise: the clipped sum is used a second time besides the noisy output.")
    return total


def known_layers(joint: JointGraph) -> tuple[Layer, ...]:
    """The layers of a clipping that has a template; they hold every trainable once, their bounds make the sensitivity."""
    clipping = joint.clipping
    if clipping is None:
        raise SealBroken("The graph carries no clipping; its sensitivity is unbounded.")
    if type(clipping) not in KINDS.values():
        raise SealBroken(f"clip factor: {type(clipping).__name__} has no template.")
    layers = clipping.layers([t.name for t in joint.targets])
    if sorted(m for layer in layers for m in layer.members) != list(range(len(joint.targets))):
        raise SealBroken("layers: a trainable belongs to no layer or to two.")
    if not math.isclose(math.fsum(x.bound**2 for x in layers), clipping.sensitivity**2, rel_tol=1e-12):
        raise SealBroken("layers: their bounds R_l do not make up the sensitivity sqrt(sum R_l^2).")
    return layers


@dataclasses.dataclass
class Block:
    """One matched piece of the weighted sum: its trainables, the weights it read, the column and what it summed."""

    members: list[int]
    weights: fx.Node
    column: fx.Node
    gradients: list[fx.Node]
    values: fx.Node | None = None
    views: tuple[fx.Node, ...] = ()
    ghost: ghost_template.GhostMatch | None = None


def match_clip(joint: JointGraph, result: Any) -> list[fx.Node]:
    """Matches the clip tail at ``result`` and returns the per-sample gradient nodes, one per target."""
    layers = known_layers(joint)
    home = {member: at for at, layer in enumerate(layers) for member in layer.members}
    result = expect(result, aten.add.Tensor, "accumulation")
    placeholder(joint, Role.ACCUMULATOR, result.args[0], 1, "accumulation")
    found = match_sum(joint, result.args[1], batch_size(joint))
    weights: dict[int, fx.Node] = {}
    squares: list[list[Block]] = [[] for _ in layers]
    for block in found:
        homes = {home[m] for m in block.members}
        if len(homes) != 1:
            raise SealBroken("weights: gradients of two layers share one weight.")
        layer = homes.pop()
        if weights.setdefault(layer, block.weights) is not block.weights:
            raise SealBroken("weights: one layer has two weights.")
        squares[layer].append(block)
    if len(set(weights.values())) != len(layers):
        raise SealBroken("weights: two layers share one weight.")
    column = found[0].column
    if any(block.column is not column for block in found):
        raise SealBroken("non-finite rows: the blocks do not drop the same samples.")
    expect(column, aten.unsqueeze.default, "non-finite rows", users=len(found))
    constant(column.args[1], 1, "non-finite rows")
    keep = column.args[0]
    norms = [
        match_weights(joint, weights[at], layer.bound, keep, len(squares[at]), 1 + len(layers))
        for at, layer in enumerate(layers)
    ]
    keep = expect(keep, aten.logical_and.default, "kept rows", users=1 + len(layers))
    present = expect(keep.args[0], aten.ne.Scalar, "sample_mask")
    constant(present.args[1], 0, "sample_mask")
    placeholder(joint, Role.MASK, present.args[0], 2, "sample_mask")
    sane, traces = match_factors(keep.args[1], [b.ghost for b in found if b.ghost is not None])
    whole = match_finite(joint, sane)
    tests = 2 if isinstance(joint.clipping, AutoVClipping) else 1
    readers = 1 + (tests if len(layers) == 1 else 1)  # of each layer's norm: its factor, and the tests or the total
    total = [whole] if len(layers) == 1 else stacked(whole, len(layers), "norm", users=tests)
    if any(one is not other for one, other in zip(total, norms, strict=True)):
        raise SealBroken("norm: the finite test and the factor use different norms.")
    for blocks, squared in zip(squares, norms, strict=True):
        match_layer(blocks, squared, readers, traces)
    return [gradient for block in found for gradient in block.gradients]


def batch_size(joint: JointGraph) -> fx.Node:
    """The node B, the length of the mask, which has one entry per record: a view ``[B, ..]`` has one row per record.

    ``-1`` would let ``[B, 2 n]`` be read as ``[2 B, n]``, each half of a record clipped alone, where B = 1 broadcasts.
    """
    found = [
        node
        for entry in joint.with_role(Role.MASK)
        for node in joint.placeholder(entry.name).users
        if node.target is aten.sym_size.int
    ]
    if len(found) != 1:
        raise SealBroken(f"sample_mask: its length is read {len(found)} times, expected once.")
    constant(expect(found[0], aten.sym_size.int, "sample_mask", users=None).args[1], 0, "sample_mask")
    return found[0]


def match_factors(sane: Any, ghosts: list[ghost_template.GhostMatch]) -> tuple[Any, dict[int, list[Any]]]:
    """``and(sane, sum of |G|^2 + |A|^2 < 1e40)`` where there are products; returns ``sane``, and both by their ghost's id."""
    dense = [g for g in ghosts if g.g is not None]
    if not dense:
        return sane, {}
    both = expect(sane, aten.logical_and.default, "finite factors")
    below = expect(both.args[1], aten.lt.Scalar, "finite factors")
    constant(below.args[1], ghost_template.LARGEST_FACTORS, "finite factors")
    traces = stacked(below.args[0], 2 * len(dense), "finite factors", users=1)
    return both.args[0], {id(g): traces[2 * at : 2 * at + 2] for at, g in enumerate(dense)}


def match_layer(blocks: list[Block], squared: Any, readers: int, traces: dict[int, list[Any]]) -> None:
    """The squared norm [B] of one layer: the sum of its blocks', with ghosts at least a share of their bound."""
    ghosts = [b.ghost for b in blocks if b.ghost is not None]
    bounds: dict[int, Any] = {}
    if ghosts:
        larger = expect(squared, aten.maximum.default, "ghost norm", users=readers)
        squared, readers = larger.args[0], 1
        share = expect(larger.args[1], aten.mul.Scalar, "ghost norm")
        constant(share.args[1], ghost_template.LEAST_SHARE, "ghost norm")
        alone = len(ghosts) == 1
        terms = [share.args[0]] if alone else stacked(share.args[0], len(ghosts), "ghost norm", users=1)
        bounds = {id(g): t for g, t in zip(ghosts, terms, strict=True)}
    single = len(blocks) == 1
    terms = [squared] if single else stacked(squared, len(blocks), "norm", users=readers)
    for block, term in zip(blocks, terms, strict=True):
        if block.ghost is None:
            match_square(term, block, users=readers if single else 1)
        else:
            ghost_template.match_norm(term, bounds[id(block.ghost)], traces.get(id(block.ghost), []), block.ghost)


def match_sum(joint: JointGraph, total: Any, batch: fx.Node) -> list[Block]:
    """The weighted sum ``[D]``: one product, or several side by side, whose gradients are those of the targets in order."""
    total = expect(total, aten.reshape.default, "weighted sum")
    if as_list(total.args[1]) != [joint.num_trainable]:
        raise SealBroken("weighted sum: the sum does not have one entry per trainable coordinate.")
    pieces = [total.args[0]]
    if isinstance(pieces[0], fx.Node) and pieces[0].target is aten.cat.default:
        whole = expect(pieces[0], aten.cat.default, "weighted sum")
        constant(whole.args[1], 1, "weighted sum")
        pieces = as_list(whole.args[0])
        if len(pieces) < 2 or len(set(pieces)) != len(pieces):
            raise SealBroken("weighted sum: a piece of the sum is missing or there twice.")
    found: list[Block] = []
    for piece in pieces:
        found.append(match_block(joint, piece, sum(len(block.members) for block in found), batch))
    count = sum(len(block.members) for block in found)
    if count != len(joint.targets):
        raise SealBroken(
            f"gradients: {count} gradients for {len(joint.targets)} trainables; a parameter was dropped or added."
        )
    return found


def match_block(joint: JointGraph, piece: Any, start: int, batch: fx.Node) -> Block:
    """``[1, B] @ [B, D']`` over the gradients of the targets from number ``start`` on, or the ghost sum of one."""
    if isinstance(piece, fx.Node) and piece.target is aten.reshape.default and not joint.grid:
        if start >= len(joint.targets):
            raise SealBroken(f"gradients: more than {len(joint.targets)} for as many trainables; one was added.")
        ghost = ghost_template.match_sum(piece, joint.targets[start].numel, batch, public_sizes(joint))
        return Block([start], ghost.weights, ghost.column, ghost.sources, ghost=ghost)
    left, right = match_rounded(piece) if joint.grid else reversed(expect(piece, aten.mm.default, "weighted sum").args)
    rows = expect(left, aten.where.ScalarOther, "non-finite rows")
    constant(rows.args[2], 0.0, "non-finite rows")
    column = expect(rows.args[0], aten.unsqueeze.default, "non-finite rows", users=None)
    weights = expect(right, aten.unsqueeze.default, "weights", users=None)
    side = rows.args[1]
    if isinstance(side, fx.Node) and side.target is aten._to_copy.default:
        values = expect(side, aten._to_copy.default, "gradients", users=None, dtype=joint.flat_dtype)
        side = expect(values.args[0], aten.cat.default, "gradients")
    else:
        values = side = expect(side, aten.cat.default, "gradients", users=None)
    constant(side.args[1], 1, "gradients")
    pieces = as_list(side.args[0])
    targets = joint.targets[start : start + len(pieces)]
    if not pieces or len(targets) != len(pieces):
        raise SealBroken(
            f"gradients: {start + len(pieces)} gradients for {len(joint.targets)} trainables; a parameter was dropped or "
            "added."
        )
    gradients = []
    for view, target in zip(pieces, targets, strict=True):
        view = expect(view, aten.reshape.default, f"gradient of {target.name}", users=None)
        sizes = as_list(view.args[1])
        if len(sizes) != 2 or sizes[0] is not batch or type(sizes[1]) is not int or sizes[1] != target.numel:
            raise SealBroken(f"gradient of {target.name}: it does not have {target.numel} entries per sample.")
        if not isinstance(view.args[0], fx.Node):
            raise SealBroken(f"gradient of {target.name}: it is not computed in the graph.")
        gradients.append(view.args[0])
    members = list(range(start, start + len(pieces)))
    return Block(members, weights, column, gradients, values, tuple(pieces))


def match_weights(joint: JointGraph, weights: fx.Node, bound: float, keep: Any, blocks: int, kept_by: int) -> fx.Node:
    """``unsqueeze(where(keep, R / below(norm), 0), 0)``, read once by every block; returns the squared norm [B]."""
    clipping = joint.clipping
    expect(weights, aten.unsqueeze.default, "weights", users=blocks)
    constant(weights.args[1], int(joint.grid), "weights")
    narrow = expect(weights.args[0], aten._to_copy.default, "weights", dtype=joint.flat_dtype)
    kept = expect(narrow.args[0], aten.where.ScalarOther, "weights")
    constant(kept.args[2], 0.0, "weights")
    expect(keep, aten.logical_and.default, "kept rows", users=kept_by)
    if kept.args[0] is not keep:
        raise SealBroken("weights: the weights and the rows do not drop the same samples.")
    factor = expect(kept.args[1], aten.mul.Scalar, "clip factor")
    constant(factor.args[1], joint.factor(bound), "clip factor R")
    below = expect(factor.args[0], aten.reciprocal.default, "clip factor").args[0]
    if isinstance(clipping, AutomaticClipping):
        below = expect(below, aten.add.Scalar, "clip factor")
        constant(below.args[1], clipping.gamma, "clip factor gamma")
        below = below.args[0]
    elif not isinstance(clipping, AutoVClipping):
        below = expect(below, aten.clamp_min.default, "clip factor")
        constant(below.args[1], bound, "clip factor R")
        below = below.args[0]
    squared = expect(below, aten.sqrt.default, "norm").args[0]
    if not isinstance(squared, fx.Node):
        raise SealBroken("norm: it is not computed in the graph.")
    return squared


def match_finite(joint: JointGraph, sane: Any) -> Any:
    """``n^2 < 1e60``, for AUTO-V also ``n^2 > 1e-24``; returns the node n^2 [B]."""
    if isinstance(joint.clipping, AutoVClipping):
        both = expect(sane, aten.logical_and.default, "finite norms")
        above = expect(both.args[1], aten.gt.Scalar, "norms above zero")
        constant(above.args[1], SMALLEST_SQUARED_NORM, "norms above zero")
        sane = both.args[0]
    finite = expect(sane, aten.lt.Scalar, "finite norms")
    constant(finite.args[1], LARGEST_SQUARED_NORM, "finite norms")
    if isinstance(joint.clipping, AutoVClipping) and above.args[0] is not finite.args[0]:
        raise SealBroken("norm: the two tests of the norm use different norms.")
    return finite.args[0]


def stacked(node: Any, count: int, what: str, users: int) -> list[Any]:
    """The ``count`` vectors [B] whose sum ``node`` is: ``sum(stack(vectors, 1), [1])``."""
    total = expect(node, aten.sum.dim_IntList, what, users=users)
    if as_list(total.args[1]) != [1]:
        raise SealBroken(f"{what}: the squares are not summed over each sample's own row.")
    stack = expect(total.args[0], aten.stack.default, what)
    constant(stack.args[1], 1, what)
    terms = as_list(stack.args[0])
    if len(terms) != count:
        raise SealBroken(f"{what}: {len(terms)} terms were added up, expected {count}.")
    return terms


def match_square(squared: Any, block: Block, users: int) -> None:
    """``sum(x * x, [1])`` in float64 of exactly the values that are summed."""
    squared = expect(squared, aten.sum.dim_IntList, "norm", users=users)
    if as_list(squared.args[1]) != [1]:
        raise SealBroken("norm: the squares are not summed over each sample's own row.")
    square = expect(squared.args[0], aten.mul.Tensor, "norm")
    wide = expect(square.args[0], aten._to_copy.default, "norm", users=1, dtype=torch.float64)
    if square.args[1] is not wide:
        raise SealBroken("norm: the product is not the square of the gradients.")
    values = block.values
    if values is None or wide.args[0] is not values:
        raise SealBroken("norm: the norm is taken over other values than those that are summed.")
    if len(values.users) != 2:
        raise SealBroken(f"gradients: {values.name} is used {len(values.users)} times, expected 2.")
    for view in block.views:
        expect(view, aten.reshape.default, "gradients")


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
