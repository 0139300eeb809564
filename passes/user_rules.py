"""Rules that a user adds for operators of their own; each is checked on the example rows before it is believed.

For every call of such an operator in the one-sample program, on the arguments that it really gets for each row i:

    rule(x_i) = op(x_i)                     one sample: the operator's numbers, forward and backward
    vmap(rule)(x)[i] = op(x_i)              many samples: the loop, forward and backward
    vmap(rule)(x')[i] = vmap(rule)(x)[i]    bit for bit, whatever the other rows of x' hold
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, fx
from torch.func import grad_and_value, vmap

from .errors import CompileRefused
from .torch_private import as_overload, tree_flatten, tree_unflatten
from .unify import where

RULES: dict[Any, Callable[..., Any]] = {}
SPOILS = (float("nan"), float("inf"), 1e4, -1e4)  # what other rows may hold
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-5, torch.bfloat16: 3e-2, torch.float16: 5e-3}


def overload(op: Any) -> Any:
    """The one operator that ``op`` names, or a refusal."""
    target = as_overload(op)
    if target is None:
        raise CompileRefused(
            f"{op!r} is not one operator. Give the object that torch.library.custom_op returned, or one overload such as "
            "torch.ops.mylib.swish.default."
        )
    return target


def register(target: Any, rule: Callable[..., Any]) -> None:
    """``rule`` stands for the operator in every later compile."""
    if not callable(rule):
        raise CompileRefused(f"The rule for {target} is a {type(rule).__name__}; it must be a function.")
    RULES[target] = rule


def check(
    module: fx.GraphModule, batch: Iterable[fx.Node], trained: Iterable[fx.Node], rows: list[list[Tensor]]
) -> tuple[str, ...]:
    """Checks every rule on every call in the one-sample program, fed with ``rows`` of its inputs; names the operators."""
    calls = [n for n in module.graph.nodes if n.target in RULES]
    if calls:
        varies, learns = _downstream(module, batch), _downstream(module, trained)
        with torch.no_grad():
            seen = [_record(module, values) for values in rows]
        for node in calls:
            _Call(node, [s[node] for s in seen], varies, learns).check()
    return tuple(sorted({str(n.target) for n in calls}))


def _downstream(module: fx.GraphModule, start: Iterable[fx.Node]) -> set[fx.Node]:
    found = set(start)
    for node in module.graph.nodes:
        if any(i in found for i in node.all_input_nodes):
            found.add(node)
    return found


def _record(module: fx.GraphModule, values: list[Tensor]) -> dict[fx.Node, Any]:
    """``{node: (args, kwargs)}`` that every operator with a rule gets when the program runs on ``values``."""
    seen: dict[fx.Node, Any] = {}

    class Recorder(fx.Interpreter):
        def run_node(self, n: fx.Node) -> Any:
            if n.target in RULES:
                leaves, spec = tree_flatten(self.fetch_args_kwargs_from_env(n))
                seen[n] = tree_unflatten([x.clone() if isinstance(x, Tensor) else x for x in leaves], spec)
            return super().run_node(n)

    Recorder(module).run(*values, enable_io_processing=False)
    return seen


def _same(a: Tensor, b: Tensor) -> bool:
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    if not (a.dtype.is_floating_point or a.dtype.is_complex):
        return torch.equal(a, b)
    equal = (a == b) | (a.isnan() & b.isnan())
    distance = torch.where(equal, 0, a - b).abs().double().norm()
    size = torch.where(equal, 0, b).abs().double().norm() + torch.where(b.isfinite(), b, 0).abs().double().norm()
    return bool(distance <= TOLERANCE.get(a.abs().dtype, 1e-5) * size)


class _Call:
    """One call of the operator: its arguments for every row, those that vary with the row, those that need a gradient."""

    def __init__(self, node: fx.Node, seen: list[Any], varies: set[fx.Node], learns: set[fx.Node]) -> None:
        self.node, self.rule = node, RULES[node.target]
        sources = tree_flatten((node.args, dict(node.kwargs)))[0]
        flat = [tree_flatten(s) for s in seen]
        self.spec, self.rows = flat[0][1], [leaves for leaves, _ in flat]
        if len(sources) != len(self.rows[0]):
            raise CompileRefused(
                f"The operator {node.target} takes arguments that no rule can be checked on.{where(node)}"
            )
        tensors = [i for i, x in enumerate(self.rows[0]) if isinstance(x, Tensor)]
        self.batched = [i for i in tensors if sources[i] in varies]
        self.learned = [i for i in tensors if sources[i] in learns and self.rows[0][i].dtype.is_floating_point]

    def check(self) -> None:
        theirs = [self._value_and_gradients(self.node.target, row) for row in self.rows]
        for row, expected in zip(self.rows, theirs, strict=True):
            self._compare(
                self._try(functools.partial(self._value_and_gradients, self.rule, row)), expected, "for one sample"
            )
        if not self.batched:
            return
        together = self._try(lambda: self._batched(self.rows))
        for i, expected in enumerate(theirs):
            self._compare([x[i] for x in together], expected, "for several samples at once")
        for i in range(len(self.rows)):
            spoils = [
                [self.rows[j] if j == i else self._spoiled(self.rows[j], value) for j in range(len(self.rows))]
                for value in SPOILS
            ]
            moved = [self.rows[j] if j == i else self.rows[(j + 1) % len(self.rows)] for j in range(len(self.rows))]
            for batch in (*spoils, moved):
                spoiled = self._try(functools.partial(self._batched, batch))
                if not all(_bitwise(a[i], b[i]) for a, b in zip(spoiled, together, strict=True)):
                    raise CompileRefused(
                        f"The rule for {self.node.target} mixes samples: a row's result changes with the other rows."
                        f"{where(self.node)} Write the rule for one sample, in operators that torch.func.vmap batches."
                    )

    def _function(self, fn: Any, row: list[Any]) -> Callable[..., Any]:
        """``(every tensor that varies or learns) -> (weighted sum of the outputs, outputs)``."""
        places = sorted({*self.batched, *self.learned})

        def run(*tensors: Tensor) -> Any:
            leaves = list(row)
            for place, x in zip(places, tensors, strict=True):
                leaves[place] = x
            args, kwargs = tree_unflatten(leaves, self.spec)
            outputs = [x for x in tree_flatten(fn(*args, **kwargs))[0] if isinstance(x, Tensor)]
            total: Any = 0.0
            for x in outputs:
                if x.dtype.is_floating_point:
                    weights = torch.linspace(0.5, 1.5, x.numel(), dtype=x.dtype, device=x.device).reshape(x.shape)
                    total = total + (x * weights).sum()
            return total, outputs

        return run

    def _value_and_gradients(self, fn: Any, row: list[Any]) -> list[Tensor]:
        places = sorted({*self.batched, *self.learned})
        tensors = [row[i].detach().clone().requires_grad_(i in self.learned) for i in places]
        with torch.enable_grad():
            total, outputs = self._function(fn, row)(*tensors)
            wanted = [x for x in tensors if x.requires_grad]
            found: Any = ()
            if wanted and isinstance(total, Tensor) and total.requires_grad:
                found = torch.autograd.grad(total, wanted, allow_unused=True)
            elif wanted:
                found = [None] * len(wanted)
        zeros = [torch.zeros_like(x) if g is None else g for g, x in zip(found, wanted, strict=True)]
        return [x.detach() for x in (*outputs, *zeros)]

    def _batched(self, rows: list[list[Any]]) -> list[Tensor]:
        places = sorted({*self.batched, *self.learned})
        run = self._function(self.rule, rows[0])
        tensors = [torch.stack([r[i] for r in rows]) if i in self.batched else rows[0][i] for i in places]
        dims = tuple(0 if i in self.batched else None for i in places)
        wanted = tuple(k for k, i in enumerate(places) if i in self.learned)
        if not wanted:
            return list(vmap(lambda *x: run(*x)[1], in_dims=dims)(*tensors))
        gradients, (_, outputs) = vmap(grad_and_value(run, argnums=wanted, has_aux=True), in_dims=dims)(*tensors)
        return [*outputs, *gradients]

    def _spoiled(self, row: list[Any], value: float) -> list[Any]:
        garbage = list(row)
        for i in self.batched:
            x = row[i]
            garbage[i] = torch.full_like(x, value) if x.dtype.is_floating_point else torch.zeros_like(x)
        return garbage

    def _compare(self, ours: list[Tensor], theirs: list[Tensor], when: str) -> None:
        if len(ours) != len(theirs) or not all(_same(a, b) for a, b in zip(ours, theirs, strict=True)):
            raise CompileRefused(
                f"The rule for {self.node.target} gives other numbers than the operator {when} (values or gradients)."
                f"{where(self.node)} It must return the same outputs for the same arguments."
            )

    def _try(self, run: Callable[[], list[Tensor]]) -> list[Tensor]:
        try:
            return run()
        except Exception as error:
            raise CompileRefused(
                f"The rule for {self.node.target} fails on the example batch: {type(error).__name__}: {str(error)[:200]}."
                f"{where(self.node)}"
            ) from error


def _bitwise(a: Tensor, b: Tensor) -> bool:
    return bool(((a == b) | (a.isnan() & b.isnan())).all()) if a.dtype.is_floating_point else torch.equal(a, b)
