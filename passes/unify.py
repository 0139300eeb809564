"""A capture at one prime batch size becomes a graph with a symbolic batch (design §3, dynamic batch).

functorch's C++ rules burn the batch size P into view and expand sizes. P is a prime that divides no integer of the
one-sample graph, so it divides none of their products: an integer that it divides is that multiple of the batch, and the
others are constants. An integer or a float that looks as if it came from P in another way leaves a doubt, and a second
capture at Q decides, node by node: equal in both is a constant, in the ratio P : Q a multiple of the batch, and anything
else is refused, since it makes a row depend on how many others there are.
"""

from __future__ import annotations

import collections
import itertools
import math
import operator
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import fx

from .errors import CompileRefused
from .torch_private import module_stack
from .views import VIEWS

aten = torch.ops.aten
LIBRARIES = ("/torch/", "/passes/", "<")


# From, below: not beside 100, the ignore_index of every cross entropy, and small, since an operator without a batching
# rule is unrolled before it is refused.
PRIMES = (107, 2000)
NEAR = 2  # B - 1, B + 1 and the like are never taken for constants


def any_batch_size(trace_at: Callable[[int], fx.GraphModule], one_sample: fx.Graph, batch_input: int) -> fx.Graph:
    """One graph for every batch size, from ``trace_at(P)`` alone, or from ``trace_at(Q)`` too where P leaves a doubt."""
    known = {x for n in one_sample.nodes for x in _integers(n) if abs(x) < 2**62}
    primes = [p for p in range(*PRIMES) if all(p % q for q in range(2, math.isqrt(p) + 1))]
    pairs = list(itertools.pairwise(primes))
    clear = [pair for pair in pairs if not any(_near(x, pair[0]) for x in known)]
    size, second = (clear or pairs)[0]
    graph = trace_at(size)
    calls = [n for n in graph.graph.nodes if n.op == "call_function"]
    many = any(len(n.all_input_nodes) > size // 2 for n in calls)  # a stack of one piece per sample
    if not clear or many or any(_doubtful(x, size) for n in calls for x in _numbers((n.args, n.kwargs))):
        return unify(graph, trace_at(second), (size, second), batch_input)
    return unify(graph, graph, (size, size), batch_input)


def _numbers(args: Any) -> Iterator[int | float]:
    if isinstance(args, (list, tuple)):
        yield from itertools.chain.from_iterable(map(_numbers, args))
    elif isinstance(args, dict):
        yield from _numbers(list(args.values()))
    elif type(args) in (int, float):
        yield args


def _integers(node: fx.Node) -> Iterator[int]:
    """Integers among a node's arguments, the sizes of its value and their products from the right (its strides)."""
    yield from (x for x in _numbers((node.args, node.kwargs)) if type(x) is int and x)
    for value in node.meta["val"] if isinstance(node.meta.get("val"), (list, tuple)) else [node.meta.get("val")]:
        if isinstance(value, torch.Tensor):
            sizes = [x for x in value.shape if type(x) is int and x]
            yield from sizes
            yield from itertools.accumulate(sizes[::-1], operator.mul)


def _near(x: int, prime: int) -> bool:
    return abs(x) > prime // 2 and min(x % prime, -x % prime) <= NEAR


def _doubtful(x: int | float, prime: int) -> bool:
    """Whether a number of the batched graph may come from the batch size otherwise than as its multiple.

    A loop over samples indexes up to B - 1, so it is doubtful too.
    """
    if type(x) is int:
        return abs(x) < 2**62 and x % prime != 0 and _near(x, prime)
    if x == 0 or not math.isfinite(x):
        return False
    return any(abs(v) < 2**53 and round(v) % prime == 0 and math.isclose(v, round(v)) and round(v) for v in (x, 1 / x))


class _Multiple:
    """``factor * B``, standing in an argument list until it becomes ``-1`` or a node."""

    def __init__(self, factor: int) -> None:
        self.factor = factor


def unify(one: fx.GraphModule, other: fx.GraphModule, sizes: tuple[int, int], batch_input: int) -> fx.Graph:
    """One graph for every batch size; B is read from dim 0 of the placeholder number ``batch_input``."""
    a, b = list(one.graph.nodes), list(other.graph.nodes)
    if len(a) != len(b):
        raise CompileRefused(_unrolled(a, b, sizes))
    graph = fx.Graph()
    mapping: dict[fx.Node, fx.Node] = {}
    place = {n: i for i, n in enumerate(a)}
    place_other = {n: i for i, n in enumerate(b)}
    symbols: dict[int, fx.Node] = {}
    last = [n for n in a if n.op == "placeholder"][-1]

    def symbol(factor: int) -> fx.Node:
        if 1 not in symbols:
            first = [mapping[n] for n in a if n.op == "placeholder"][batch_input]
            with graph.inserting_after(mapping[last]):
                symbols[1] = graph.call_function(aten.sym_size.int, (first, 0))
        if factor not in symbols:
            with graph.inserting_after(symbols[1]):
                symbols[factor] = graph.call_function(operator.mul, (symbols[1], factor))
        return symbols[factor]

    def merge(x: Any, y: Any, node: fx.Node) -> Any:
        if isinstance(x, fx.Node) and isinstance(y, fx.Node) and place[x] == place_other[y]:
            return mapping[x]
        if isinstance(x, (list, tuple)) and isinstance(y, (list, tuple)) and len(x) == len(y):
            return type(x)(merge(p, q, node) for p, q in zip(x, y, strict=True)) if not hasattr(x, "_fields") else x
        if isinstance(x, dict) and isinstance(y, dict) and x.keys() == y.keys():
            return {k: merge(x[k], y[k], node) for k in x}
        if type(x) is int and type(y) is int and x and x * sizes[1] == y * sizes[0] and x % sizes[0] == 0:
            return _Multiple(x // sizes[0])
        if type(x) is type(y) and (x == y or (x != x and y != y)):
            return x
        raise CompileRefused(
            f"The operator {node.target} takes {x!r} for a batch of {sizes[0]} and {y!r} for a batch of {sizes[1]}: its "
            f"result depends on how many samples there are.{where(node)} Such a model has no per-sample meaning."
        )

    def place_symbols(args: Any, target: Any) -> Any:
        if isinstance(args, _Multiple):
            return symbol(args.factor)
        if isinstance(args, (list, tuple)):
            batched = [x for x in args if isinstance(x, _Multiple)]
            plain = all(isinstance(x, (int, _Multiple)) for x in args) and -1 not in args and 0 not in args
            if target in VIEWS and len(batched) == 1 and plain:
                return [-1 if isinstance(x, _Multiple) else x for x in args]
            return type(args)(place_symbols(x, target) for x in args)
        if isinstance(args, dict):
            return {k: place_symbols(v, target) for k, v in args.items()}
        return args

    for x, y in zip(a, b, strict=True):
        if x.op != y.op or (x.op == "call_function" and x.target != y.target):
            raise CompileRefused(
                f"The captured graph differs with the batch size: {x.target} for {sizes[0]} samples, {y.target} for "
                f"{sizes[1]}.{where(x)}"
            )
        if x.op == "placeholder":
            mapping[x] = graph.placeholder(x.name)
            mapping[x].meta["shape"] = tuple(int(size) for size in getattr(x.meta.get("val"), "shape", ()))
            continue
        args, kwargs = merge(x.args, y.args, x), merge(x.kwargs, y.kwargs, x)
        args, kwargs = place_symbols(args, x.target), place_symbols(kwargs, x.target)
        if x.op == "output":
            graph.output(args[0])
            continue
        # A view of strides that only fit one batch size becomes a reshape: the graph is functional, so both mean the same.
        target = aten.reshape.default if x.target in VIEWS else x.target
        mapping[x] = graph.create_node(x.op, target, args, kwargs, name=x.name)
        for key in ("stack_trace", "nn_module_stack"):
            if x.meta.get(key):
                mapping[x].meta[key] = x.meta[key]
        shape = getattr(x.meta.get("val"), "shape", None)
        if shape is not None:  # at the first of the two sizes: rewrites compare shapes with it
            mapping[x].meta["shape"] = tuple(int(size) for size in shape)
            mapping[x].meta["dtype"] = x.meta["val"].dtype
    return graph


def _unrolled(a: list[fx.Node], b: list[fx.Node], sizes: tuple[int, int]) -> str:
    """Names the operators that occur more often in the larger batch's graph, and the user's line of the first."""
    counts = collections.Counter(str(n.target) for n in b if n.op == "call_function")
    counts.subtract(str(n.target) for n in a if n.op == "call_function")
    more = [op for op, count in counts.most_common() if count > 0]
    first = next((n for n in b if str(n.target) in more and where(n)), None)
    return (
        f"The captured graph has {len(a)} nodes for a batch of {sizes[0]} and {len(b)} for a batch of {sizes[1]}: the "
        f"operators {', '.join(more[:5])} are unrolled over samples.{where(first) if first else ''} Replace the operator "
        "in the model by one that has a batching rule."
    )


def where(node: fx.Node) -> str:
    """`` It comes from module m, File f, line n, in forward: `code`.`` as far as the node knows, else nothing.

    Of the node's Python frames the innermost outside torch is taken: the user's line, not ``nn.Linear``'s.
    """
    path = module_stack(node.meta).removeprefix("model").strip(".")
    trace = node.meta.get("stack_trace") or ""
    lines = [line.strip() for line in str(trace).strip().splitlines()]
    files = [i for i, line in enumerate(lines) if line.startswith("File ")]
    files = [i for i in files if not any(part in lines[i] for part in LIBRARIES)] or files
    places = [f"module {path}"] if path else []
    if files:
        code = lines[files[-1] + 1] if files[-1] + 1 < len(lines) else ""
        places.append(lines[files[-1]] + (f": `{code}`" if code and not code.startswith("File ") else ""))
    return f" It comes from {', '.join(places)}." if places else ""
