"""An exported program without in-place writes, retraced only where it holds something to rewrite.

``run_decompositions`` is a third of a small capture, and changes nothing in most programs: it rewrites operators that
write or alias (functionalization), submodules, and those of its table. The views that it takes apart in every program,
such as ``reshape``, mean the same under vmap as they are.
"""

from __future__ import annotations

import operator
from collections.abc import Collection
from typing import Any

import torch
from torch import fx

from .torch_private import is_op, may_alias_or_write

aten = torch.ops.aten
MEAN_THE_SAME = {
    aten.reshape.default,
    aten.flatten.using_ints,
    aten.unflatten.int,
    aten.chunk.default,
    aten.contiguous.default,
    aten.to.dtype,
    aten.to.device,
    aten.to.dtype_layout,
}
EVAL = {
    aten.dropout.default: 2,
    aten.feature_dropout.default: 2,
    aten.alpha_dropout.default: 2,
    aten.feature_alpha_dropout.default: 2,
    aten.batch_norm.default: 5,
}  # where the argument says that it is not in training


def functional_program(
    program: torch.export.ExportedProgram, decomposed: Collection[Any]
) -> torch.export.ExportedProgram:
    """The program functionalized and without the operators ``decomposed``; itself where there is nothing to do."""
    if all(_stays(n, decomposed) for n in program.graph.nodes):
        return program
    table = torch.export.default_decompositions()
    rewritten: torch.export.ExportedProgram = program.run_decompositions(
        {op: table[op] for op in decomposed if op in table}
    )
    return rewritten


def _stays(node: fx.Node, decomposed: Collection[Any]) -> bool:
    if node.op in ("placeholder", "output") or node.target is operator.getitem or node.target in MEAN_THE_SAME:
        return True
    if node.target in EVAL and node.target not in decomposed:
        idle = node.target is not aten.batch_norm.default and node.args[1] == 0.0
        return bool(idle) or (len(node.args) > EVAL[node.target] and node.args[EVAL[node.target]] is False)
    return (
        node.op == "call_function"
        and is_op(node.target)
        and node.target not in decomposed
        and not may_alias_or_write(node.target)
    )
