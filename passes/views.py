"""Looking through operators that move no value: what a node shows, and who reads it under another shape."""

from __future__ import annotations

import itertools
from collections.abc import Collection
from typing import Any

import torch
from torch import fx

aten = torch.ops.aten
VIEWS = {aten.reshape.default, aten.view.default, aten._unsafe_view.default}


def shown_by(node: fx.Node, views: Collection[Any] = VIEWS) -> fx.Node:
    """What lies behind these views."""
    while node.target in views:
        source: Any = node.args[0]
        node = source
    return node


def seen_as(graph: fx.Graph, x: fx.Node, view: fx.Node, views: Collection[Any] = VIEWS) -> fx.Node:
    """``x``, of the shape of what lies behind ``view``, under the same views."""
    if view.target not in views:
        return x
    source: Any = view.args[0]
    target: Any = aten.reshape.default if view.target in VIEWS else view.target  # x may lie otherwise in memory
    new = graph.call_function(target, (seen_as(graph, x, source, views), *view.args[1:]), view.kwargs)
    new.meta.update(view.meta)
    return new


def readers(node: fx.Node, views: Collection[Any] = VIEWS) -> list[fx.Node]:
    """Who reads it, itself or through these views."""
    found: list[fx.Node] = []
    for user in node.users:
        found += readers(user, views) if user.target in views else [user]
    return found


def forward_pass(graph: fx.Graph) -> set[fx.Node]:
    """The nodes of a joint graph before the first operator of a backward pass."""
    return set(itertools.takewhile(lambda n: "backward" not in str(n.target), graph.nodes))
