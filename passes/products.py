"""Products of activations with a parameter, read off a graph: where a bias would go, and of which shape.

A weight is whatever no batch input reaches and some parameter does, so transposed, cast and reparametrized ones count.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import fx

aten = torch.ops.aten
LINEARS = {aten.linear.default}
CONVS = {
    aten.conv1d.default,
    aten.conv1d.padding,
    aten.conv2d.default,
    aten.conv2d.padding,
    aten.conv3d.default,
    aten.conv3d.padding,
    aten.conv_transpose1d.default,
    aten.conv_transpose2d.input,
    aten.conv_transpose3d.input,
    aten.convolution.default,
}
MATMULS = {aten.matmul.default, aten.mm.default, aten.bmm.default}
Product = tuple[fx.Node, tuple[int, ...], tuple[int, ...]]


def product(node: fx.Node, made_of: Mapping[fx.Node, frozenset[fx.Node]]) -> Product | None:
    """(weight, shape of the bias, its view against the trailing axes) if ``node`` is a product without a bias."""

    def is_weight(x: Any) -> bool:
        return isinstance(x, fx.Node) and bool(made_of.get(x))

    target, args = node.target, node.args
    if target in LINEARS or target in CONVS:
        bias = args[2] if len(args) > 2 else node.kwargs.get("bias")
        weight, out = args[1], node.meta["val"].shape
        if bias is not None or not isinstance(weight, fx.Node) or not is_weight(weight):
            return None
        spatial = weight.meta["val"].dim() - 2
        if spatial < 0:
            return None
        channels = int(out[-1 - spatial])
        return weight, (channels,), (channels, *[1] * spatial)
    if target in MATMULS:
        left, right = args[:2]
        if is_weight(left) == is_weight(right) or (left in made_of and right in made_of):
            return None
        weight = right if is_weight(right) else left
        assert isinstance(weight, fx.Node) and isinstance(left, fx.Node) and isinstance(right, fx.Node)
        *heads, rows, columns = (int(s) for s in weight.meta["val"].shape) if weight.meta["val"].dim() > 1 else (0, 0)
        if not columns or min(left.meta["val"].dim(), right.meta["val"].dim()) < 2:
            return None
        end = (columns,) if weight is right else (rows, 1)
        if heads:
            end = (1, columns) if weight is right else (rows, 1)
        width = columns if weight is right else rows
        return weight, (*(h for h in heads if h > 1), width), (*heads, *end)
    if target is aten.einsum.default and isinstance(args[0], str) and isinstance(args[1], (list, tuple)):
        return _einsum_product(node, args[0], list(args[1]), made_of)
    return None


def _einsum_product(
    node: fx.Node, equation: str, operands: list[Any], made_of: Mapping[fx.Node, frozenset[fx.Node]]
) -> Product | None:
    equation = equation.replace(" ", "")
    weights = [i for i, x in enumerate(operands) if made_of.get(x)]
    if len(weights) != 1 or len(operands) != 2 or operands[1 - weights[0]] in made_of or "->" not in equation:
        return None
    given, out = equation.split("->")
    letters = given.split(",")[weights[0]]
    own = [letter in letters for letter in out.replace("...", "")]
    if "." in letters or not any(own):
        return None
    start = own.index(True)
    if "..." in out and out.index("...") > start:
        return None
    trailing = node.meta["val"].shape[len(node.meta["val"].shape) - (len(own) - start) :]
    view = tuple(int(s) if mine else 1 for s, mine in zip(trailing, own[start:], strict=True))
    shape = tuple(s for s, mine in zip(view, own[start:], strict=True) if mine)
    weight: fx.Node = operands[weights[0]]
    return weight, shape, view
