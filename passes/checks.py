"""What an exported program of one sample says about the values of its data: assertions, and results read off them."""

from __future__ import annotations

import torch
from torch import fx

from .torch_private import reads_data
from .unify import where

aten = torch.ops.aten
# The last one: torch.linalg.inv and its like raise on a singular matrix; without it they give inf or NaN.
CHECKS = (aten._assert_scalar.default, aten._assert_async.msg, aten._linalg_check_errors.default)


def drop_checks(module: fx.GraphModule) -> tuple[str, ...]:
    """Takes out the model's assertions on values: one record that fails would stop a run and show itself.

    For data that pass them the program is the same. Returns where they were.
    """
    checks = [n for n in module.graph.nodes if n.target in CHECKS]
    for node in checks:
        module.graph.erase_node(node)
    if checks:
        module.graph.eliminate_dead_code()
        module.recompile()
    return tuple(f"{n.args[1]}.{where(n)}" for n in checks)


def data_dependent_origin(node: fx.Node) -> fx.Node | None:
    """The last operator before ``node``, among what it depends on, whose result's size or type is read off the data."""
    todo, seen = [node], set()
    while todo:
        current = todo.pop()
        if current not in seen:
            seen.add(current)
            todo += current.all_input_nodes
    return next((n for n in reversed(list(node.graph.nodes)) if n in seen and reads_data(n.target)), None)
