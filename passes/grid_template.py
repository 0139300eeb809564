"""The template's pieces on the grid (``numerics``): rows rounded before they are added, noise in whole units."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from .errors import SealBroken
from .joint_graph import JointGraph
from .matching import as_list, constant, expect

aten = torch.ops.aten


def match_rounded(piece: Any) -> tuple[Any, Any]:
    """``unsqueeze(sum(trunc(rows [B, D'] * weights [B, 1]), [0]), 0)``: returns rows and weights.

    Both are float64 (the weights by their own template), so every row holds whole numbers and their sum is exact.
    """
    row = expect(piece, aten.unsqueeze.default, "weighted sum")
    constant(row.args[1], 0, "weighted sum")
    total = expect(row.args[0], aten.sum.dim_IntList, "weighted sum")
    if as_list(total.args[1]) != [0]:
        raise SealBroken("weighted sum: the rounded rows are not summed over the samples.")
    whole = expect(total.args[0], aten.trunc.default, "grid: rows are rounded toward zero before they are added")
    rows, weights = expect(whole.args[0], aten.mul.Tensor, "weights").args
    return rows, weights


def match_units(joint: JointGraph, released: Any) -> fx.Node:
    """``(sum + z) * g``: returns the addition."""
    assert joint.noise is not None and joint.clipping is not None
    units = expect(released, aten.mul.Scalar, "grid: its unit")
    constant(units.args[1], joint.noise.unit(joint.clipping), "grid: its unit")
    return expect(units.args[0], aten.add.Tensor, "noise")
