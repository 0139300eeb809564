"""Random operators of the exported one-sample graph become arithmetic with random numbers that the host gives.

    native_dropout(x, p)    ->  x * keep / (1 - p)             keep [shape of x] of bool, True with probability 1 - p
    attention(.., p)        ->  (softmax(..) * keep / (1 - p)) v
    rand, uniform           ->  u, a + (b - a) u               u of float32 in [0, 1), 24 bits
    bernoulli(q)            ->  keep, or u < q for a tensor q

What the operators of one sample draw lies side by side, in call order: ``dropout_keep [1, n]`` and ``dropout_uniform
[1, m]``, batch inputs like any other once the graph is under vmap. An operator that is not here stays, and is refused.
"""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from . import recurrent_rules
from .joint_graph import Draw
from .torch_private import arguments
from .unify import where

aten = torch.ops.aten
KEEP, UNIFORM = "dropout_keep", "dropout_uniform"
UNIFORM_BITS = {torch.float16: 11, torch.bfloat16: 8}  # of torch.rand in these; rounding 24 bits would give ones
Need = tuple[tuple[int, ...], float | None]


def uniform_as(u: Tensor, dtype: torch.dtype) -> Tensor:
    """Uniforms of 24 bits in another dtype, none of them 1."""
    bits = UNIFORM_BITS.get(dtype)
    return (u if bits is None else torch.floor(u * 2.0**bits) * 2.0**-bits).to(dtype)


def _noise(keep: Tensor, p: float, dtype: torch.dtype) -> Tensor:
    return keep.to(dtype) / (1.0 - p)


def _dropout(given: Sequence[Tensor], x: Tensor, p: float, train: bool | None) -> Any:
    if train is False or p == 0.0:
        return x, torch.ones_like(x, dtype=torch.bool)
    if p == 1.0:
        return x * torch.zeros_like(x), torch.zeros_like(x, dtype=torch.bool)
    return x * _noise(given[0], p, x.dtype), given[0]


def _attention(
    given: Sequence[Tensor],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    p: float,
    causal: bool,
    scale: float | None,
    gqa: bool,
) -> Any:
    if gqa and q.shape[-3] != k.shape[-3]:
        k, v = (x.repeat_interleave(q.shape[-3] // x.shape[-3], -3) for x in (k, v))
    scores = (q * (q.shape[-1] ** -0.5 if scale is None else scale)) @ k.transpose(-2, -1)
    if causal:
        mask = torch.ones(q.shape[-2], k.shape[-2], dtype=torch.bool, device=q.device).tril()
    if mask is not None:
        scores = torch.where(mask, scores, float("-inf")) if mask.dtype == torch.bool else scores + mask
    weights = aten._safe_softmax.default(scores, -1)
    return (weights * _noise(given[0], p, weights.dtype)) @ v


def _recurrent(rule: Callable[..., Any]) -> Callable[..., Any]:
    def run(
        given: Sequence[Tensor], x: Tensor, hx: Any, params: Any, biases: bool, layers: int, p: float, *r: Any
    ) -> Any:
        noises = [_noise(keep, p, x.dtype) for keep in given]
        return rule(x, hx, params, biases, layers, p, *r, noises=noises)

    return run


def _needs_dropout(a: dict[str, Any]) -> list[Need]:
    on = a["train"] is not False and 0.0 < a["p"] < 1.0
    return [(_shape(a["input"]), 1.0 - a["p"])] if on else []


def _needs_attention(a: dict[str, Any]) -> list[Need]:
    q, k = _shape(a["query"]), _shape(a["key"])
    return [((*q[:-1], k[-2]), 1.0 - a["dropout_p"])] if 0.0 < a["dropout_p"] < 1.0 else []


def _needs_recurrent(a: dict[str, Any]) -> list[Need]:
    if not a["train"] or not 0.0 < a["dropout"] < 1.0:
        return []
    first = a["hx"][0] if isinstance(a["hx"], (list, tuple)) else a["hx"]
    rows, steps, _ = _shape(a["input"]) if a["batch_first"] else (*_shape(a["input"])[1::-1], 0)
    width = _shape(first)[-1] * (2 if a["bidirectional"] else 1)
    return [((steps, rows, width), 1.0 - a["dropout"])] * (a["num_layers"] - 1)


def _shape(node: Any) -> tuple[int, ...]:
    return tuple(int(x) for x in node.meta["val"].shape)


def _uniforms(name: str) -> Callable[[dict[str, Any]], list[Need]]:
    return lambda a: [(tuple(a["size"]) if name == "size" else _shape(a[name]), None)]


@dataclasses.dataclass(frozen=True)
class Rule:
    """``needs(arguments)``: shape and probability of True (None: uniforms) of each draw; ``run(draws, *arguments)``."""

    needs: Callable[[dict[str, Any]], list[Need]]
    run: Callable[..., Any]


RULES: dict[Any, Rule] = {
    aten.native_dropout.default: Rule(_needs_dropout, _dropout),
    aten.bernoulli.p: Rule(lambda a: [(_shape(a["self"]), a["p"])], lambda d, x, p, g: d[0].to(x.dtype)),
    aten.bernoulli.default: Rule(_uniforms("self"), lambda d, q, g: (d[0] < q).to(q.dtype)),
    aten.bernoulli.Tensor: Rule(_uniforms("self"), lambda d, x, q, g: (d[0] < q).to(x.dtype)),
    aten.rand.default: Rule(
        _uniforms("size"), lambda d, size, dtype, *_: uniform_as(d[0], dtype or torch.get_default_dtype())
    ),
    aten.rand_like.default: Rule(_uniforms("self"), lambda d, x, dtype, *_: uniform_as(d[0], dtype or x.dtype)),
    aten.uniform.default: Rule(
        _uniforms("self"), lambda d, x, low, high, g: low + (high - low) * uniform_as(d[0], x.dtype)
    ),
    aten.scaled_dot_product_attention.default: Rule(_needs_attention, _attention),
    **{op: Rule(_needs_recurrent, _recurrent(rule)) for op, rule in recurrent_rules.RULES.items()},
}
ALWAYS = {aten.native_dropout.default}  # vmap refuses it even where it draws nothing


def feed(module: fx.GraphModule) -> tuple[tuple[Draw, ...], list[fx.Node]]:
    """Rewrites ``module`` in place; returns what one sample draws, in call order, and the new placeholders.

    The one-sample graph then draws nothing but by operators without a rule here.
    """
    found: list[tuple[fx.Node, Rule, list[Need]]] = []
    for node in module.graph.nodes:
        rule = RULES.get(node.target) if node.op == "call_function" else None
        needs = rule.needs(arguments(node)) if rule is not None else []
        if rule is not None and (needs or node.target in ALWAYS):
            found.append((node, rule, needs))
    draws = tuple(Draw(shape, keep, where(n)) for n, _, needs in found for shape, keep in needs)
    pieces, placeholders = _inputs(module.graph, draws)
    rest = iter(pieces)
    for node, rule, needs in found:
        with module.graph.inserting_before(node):
            given = tuple(module.graph.call_function(aten.reshape.default, (next(rest), list(s))) for s, _ in needs)
            new = module.graph.call_function(rule.run, (given, *arguments(node).values()))
        new.meta.update(node.meta)
        for piece in given:
            piece.meta.update({k: v for k, v in node.meta.items() if k != "val"})
        node.replace_all_uses_with(new)
        module.graph.erase_node(node)
    if found:
        module.recompile()
    return draws, placeholders


def _inputs(graph: fx.Graph, draws: Sequence[Draw]) -> tuple[list[fx.Node], list[fx.Node]]:
    """One flat piece ``[1, size]`` of an input per draw, and the inputs themselves."""
    last = [n for n in graph.nodes if n.op == "placeholder"][-1]
    placeholders, splits = [], {}

    def after(make: Callable[..., fx.Node], *args: Any) -> fx.Node:
        with graph.inserting_after(last):
            return make(*args)

    for name in names(draws):
        last = after(graph.placeholder, name)
        placeholders.append(last)
    for node, name in zip(placeholders, names(draws), strict=True):
        sizes = [d.size for d in draws if name_of(d) == name]
        splits[name] = last = after(graph.call_function, aten.split_with_sizes.default, (node, sizes, 1))
    pieces, taken = [], dict.fromkeys(splits, 0)
    for draw in draws:
        name = name_of(draw)
        last = after(graph.call_function, operator.getitem, (splits[name], taken[name]))
        pieces.append(last)
        taken[name] += 1
    return pieces, placeholders


def name_of(draw: Draw) -> str:
    """Which of the two inputs holds it."""
    return UNIFORM if draw.keep is None else KEEP


def example(draws: Sequence[Draw], rows: int, constant: float | None = None) -> list[Tensor]:
    """Made-up inputs for ``rows`` samples: keep [rows, n], uniform [rows, m], each where there is one.

    constant: everything is kept and every uniform is this; without it, seeded.
    """
    generator = torch.Generator().manual_seed(0)  # for checks on made-up data; nothing private rides on this seed
    values: dict[str, list[Tensor]] = {}
    for draw in draws:
        u = torch.rand(rows, draw.size, generator=generator)
        if constant is not None:
            u = torch.full_like(u, constant) if draw.keep is None else torch.full_like(u, -1.0)
        values.setdefault(name_of(draw), []).append(u if draw.keep is None else u < draw.keep)
    return [torch.cat(values[name], 1) for name in names(draws)]


def of_row(draws: Sequence[Draw], inputs: Sequence[Tensor], row: int) -> list[Tensor]:
    """Of one sample: each draw in its shape."""
    pieces = {
        name: iter(torch.split(x[row], [d.size for d in draws if name_of(d) == name]))
        for name, x in zip(names(draws), inputs, strict=True)
    }
    return [next(pieces[name_of(d)]).reshape(d.shape) for d in draws]


def names(draws: Sequence[Draw]) -> list[str]:
    """Of the inputs, in their order."""
    return [n for n in (KEEP, UNIFORM) if any(name_of(d) == n for d in draws)]
