"""Each fact, one predicate over the graph, written apart from the pass that gives it. A predicate raises or returns."""

from __future__ import annotations

import operator
from collections.abc import Callable

import torch
from torch import fx

from . import template
from .errors import SealBroken
from .joint_graph import Fact, JointGraph, Role
from .matching import public_sizes
from .torch_private import has_effect, is_op, is_random, returns_several, schema_is_mutable

aten = torch.ops.aten
SHAPE_USERS = {
    aten.reshape.default,
    aten.view.default,
    aten.expand.default,
    aten.new_zeros.default,
    aten.new_ones.default,
    aten.new_full.default,
    aten.new_empty.default,
    aten.full.default,
    aten.zeros.default,
    aten.ones.default,
    aten.empty.memory_format,
    aten.select_backward.default,
    aten.slice_backward.default,
    aten.embedding_dense_backward.default,
    aten.new_empty_strided.default,
    aten.as_strided.default,
    aten.as_strided_scatter.default,
    aten.slice.Tensor,
    aten.split_with_sizes.default,
    aten.unfold_backward.default,
    aten.diagonal_backward.default,
    aten.repeat.default,
    aten.upsample_bilinear2d_backward.default,
    aten.upsample_nearest2d_backward.default,
    aten.upsample_linear1d_backward.default,
    aten.upsample_trilinear3d_backward.default,
    aten.upsample_bicubic2d_backward.default,
    aten.upsample_nearest1d_backward.default,
    aten.upsample_nearest3d_backward.default,
    aten.convolution.default,
    aten.convolution_backward.default,
    aten.native_group_norm.default,
    aten.native_group_norm_backward.default,
    aten.arange.default,
    aten.arange.start,
}


def functional(joint: JointGraph) -> None:
    """Only operators that write, draw and assert nothing; the batch size only in shapes. The padded length is public."""
    public = public_sizes(joint)
    for node in joint.module.graph.nodes:
        if node.op in ("placeholder", "output"):
            continue
        if node.op != "call_function":
            raise SealBroken(f"The graph holds {node.op} {node.target}: only operators on inputs are allowed.")
        if node.target is operator.getitem:
            if not isinstance(node.args[0], fx.Node) or not returns_several(node.args[0].target):
                raise SealBroken(
                    f"The graph indexes {node.args[0]}, which is one tensor: its rows would be picked apart."
                )
            continue
        if node in public:
            continue
        if node.target is operator.mul:
            if (
                not isinstance(node.args[0], fx.Node)
                or node.args[0].target is not aten.sym_size.int
                or not (type(node.args[1]) is int or node.args[1] in public)
            ):
                raise SealBroken("The graph multiplies something other than the batch size by a public constant.")
        elif not is_op(node.target):
            raise SealBroken(f"The graph calls {node.target}, which is not an operator.")
        elif has_effect(node.target):
            raise SealBroken(
                f"The graph calls {node.target}, which tells of private values by other means than its result."
            )
        elif schema_is_mutable(node.target):
            raise SealBroken(f"The graph calls {node.target}, which writes its input.")
        elif is_random(node):
            raise SealBroken(
                f"The graph calls {node.target}, which draws random numbers: noise must come from the host."
            )
        if node.target in (aten.sym_size.int, operator.mul):
            for user in node.users:
                if user.target is not operator.mul and user.target not in SHAPE_USERS:
                    raise SealBroken(
                        f"The batch size is used as a value by {user.target}: it is private and may only shape tensors."
                    )
                if user.target in (aten.full.default, aten.new_full.default) and (
                    node in user.args[-1:] or node is user.kwargs.get("fill_value")
                ):
                    raise SealBroken("The batch size fills a tensor: it is private and may only shape tensors.")
    names = [n.name for n in joint.module.graph.nodes if n.op == "placeholder"]
    if names != [i.name for i in joint.inputs]:
        raise SealBroken("The graph's inputs are not those that were declared, in their order.")
    # State and batch, the mask, the accumulator and the noise are fed by place, in the order of the roles.
    order = [list(Role).index(i.role) for i in joint.inputs]
    if order != sorted(order):
        raise SealBroken("The graph's inputs are not in the order in which they are fed: one would be taken for another.")


def per_sample(joint: JointGraph) -> None:
    """Before the clip: a loss and one gradient per trainable; after it, exactly the gradients of the template."""
    if any(i.role is Role.MASK for i in joint.inputs):
        return
    if len(joint.outputs) != 1 + len(joint.targets):
        raise SealBroken(f"The graph has {len(joint.outputs)} outputs for a loss and {len(joint.targets)} gradients.")
    if not joint.with_role(Role.BATCH):
        raise SealBroken("The graph has no batch input.")


def clipped(joint: JointGraph) -> None:
    """All that leaves is the clipped sum, or the clipped sum with noise added."""
    end = template.match_noise(joint) if joint.with_role(Role.NOISE) else template.single_output(joint)
    if not joint.with_role(Role.NOISE) and isinstance(end, fx.Node) and len(end.users) != 1:
        raise SealBroken("accumulation: the clipped sum is used a second time.")
    gradients = template.match_clip(joint, end)
    template.check_sources(joint, gradients)


def partial(joint: JointGraph) -> None:
    """PARTIAL: the output is a secret accumulator of clipped sums, with no noise yet; only an update may consume it."""
    functional(joint)
    clipped(joint)
    for node in joint.module.graph.nodes:
        # The end of whatever is unused. Dtypes are asserted without a reader, and are public.
        if node.op == "call_function" and not node.users and node.target is not aten._assert_tensor_metadata.default:
            raise SealBroken(
                f"The graph computes {node} ({node.target}), which nothing reads: all that it could do is to fail, and "
                f"whether an operator fails may depend on what one record holds."
            )


def noised(joint: JointGraph) -> None:
    """Every output coordinate has its own noise coordinate, of the declared scale, once."""
    template.match_noise(joint)


def sealed(joint: JointGraph) -> None:
    """SEALED: what leaves is ``(clipped sum + sigma R (1 + slack) z) / expected_batch_size`` and nothing else."""
    noised(joint)
    partial(joint)


PREDICATES: dict[Fact, Callable[[JointGraph], None]] = {
    Fact.FUNCTIONAL: functional,
    Fact.PER_SAMPLE: per_sample,
    Fact.CLIPPED: clipped,
    Fact.PARTIAL: partial,
    Fact.NOISED: noised,
    Fact.SEALED: sealed,
}
