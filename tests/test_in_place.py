"""Eager mode writes over what nobody reads afterwards: the same bits from less memory, and never over what is read again."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from memory import peak_bytes
from torch import Tensor, fx, nn

import dpbitfit_fx as dpb
from dpbitfit_fx.passes.in_place import write_over
from dpbitfit_fx.passes.pointwise import POINTWISE

aten = torch.ops.aten
WIDTH, LENGTH = 32, 64
IN_PLACE = {form for form, _ in POINTWISE.values()}


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.wide = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 4 * WIDTH)
        self.back, self.head = nn.Linear(4 * WIDTH, WIDTH), nn.Linear(WIDTH, 2)

    def forward(self, x: Tensor) -> Any:
        return self.head((x + self.back(F.gelu(self.wide(self.norm(x))))).mean(1))


def loss(model: Any, batch: Any) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1], reduction="none")


def records(size: int) -> tuple[Tensor, Tensor]:
    return torch.randn(size, LENGTH, WIDTH, generator=torch.Generator().manual_seed(size)), torch.arange(size) % 2


def compiled(**options: Any) -> dpb.PrivateStep:
    torch.manual_seed(0)
    return dpb.compile(Block(), loss, records(3), **options)


def written(step: dpb.PrivateStep) -> list[Any]:
    return [n.target for n in step._lowered.runner._inputs.module.graph.nodes if n.target in IN_PLACE]


def test_the_gradient_of_a_gelu_lands_where_the_gradient_before_it_lay() -> None:
    ours, plain = compiled(), compiled(disable=["in_place"])
    assert aten.gelu_backward.grad_input in written(ours) and written(plain) == []
    assert f"{len(written(ours))} operators write over what nobody reads afterwards" in ours.report().optimized
    size, sums, peaks = 16, [], []
    for step in (ours, plain):
        before = [x.clone() for x in records(size)]
        batch = records(size)

        def once(step: dpb.PrivateStep = step, batch: Any = batch) -> Tensor:
            return step.accumulate(batch, torch.ones(size), step.zero_accumulator())

        sums.append(once())
        peaks.append(peak_bytes(once))
        assert all(torch.equal(x, y) for x, y in zip(batch, before, strict=True))
    assert torch.equal(*sums)
    # One tensor [B, T, 4 n] less there; then the step is fullest in its forward pass, which holds one [B, T, n] more.
    assert peaks[0] <= peaks[1] - 4 * size * LENGTH * (4 * WIDTH - WIDTH), peaks


def test_the_graph_that_is_proved_and_hashed_writes_nothing_in_place() -> None:
    step, plain = compiled(), compiled(disable=["in_place"])
    assert step.graph_hash == plain.graph_hash
    for joint in (step.partial, step._lowered.joint):
        assert not any(n.target in IN_PLACE for n in joint.module.graph.nodes)


def graph_of(build: Callable[[fx.Graph, list[fx.Node]], Any], inputs: list[Tensor]) -> fx.Graph:
    """What ``build`` writes, with the shapes and dtypes that capture leaves in ``meta``."""
    graph = fx.Graph()
    graph.output(build(graph, [graph.placeholder(f"x{i}") for i in range(len(inputs))]))

    class Notes(fx.Interpreter):
        def run_node(self, n: fx.Node) -> Any:
            value = super().run_node(n)
            if isinstance(value, Tensor):
                n.meta = {"shape": tuple(value.shape), "dtype": value.dtype}
            return value

    Notes(fx.GraphModule(nn.Module(), graph)).run(*inputs)
    return graph


def call(graph: fx.Graph, target: Any, *args: Any) -> fx.Node:
    return graph.call_function(target, args)


def last_reader(graph: fx.Graph, nodes: list[fx.Node]) -> Any:
    return call(graph, aten.exp.default, call(graph, aten.mm.default, nodes[0], nodes[1]))


def through_a_view(graph: fx.Graph, nodes: list[fx.Node]) -> Any:
    product = call(graph, aten.mm.default, nodes[0], nodes[1])
    return call(graph, aten.exp.default, call(graph, aten.reshape.default, product, [2, 8]))


def read_again(graph: fx.Graph, nodes: list[fx.Node]) -> Any:
    product = call(graph, aten.mm.default, nodes[0], nodes[1])
    return call(graph, aten.exp.default, product), call(graph, aten.neg.default, product)


def returned(graph: fx.Graph, nodes: list[fx.Node]) -> Any:
    product = call(graph, aten.mm.default, nodes[0], nodes[1])
    return call(graph, aten.exp.default, product), product


def read_again_through_a_view(graph: fx.Graph, nodes: list[fx.Node]) -> Any:
    product = call(graph, aten.mm.default, nodes[0], nodes[1])
    turned = call(graph, aten.t.default, product)
    return call(graph, aten.exp.default, product), call(graph, aten.sum.dim_IntList, turned, [0])


def read_again_through_what_may_be_a_view(graph: fx.Graph, nodes: list[fx.Node]) -> Any:
    product = call(graph, aten.mm.default, nodes[0], nodes[1])
    lines = call(graph, aten.as_strided.default, product, [4], [1])
    return call(graph, aten.exp.default, product), call(graph, aten.sum.dim_IntList, lines, [0])


def beside_its_own_transpose(graph: fx.Graph, nodes: list[fx.Node]) -> Any:
    product = call(graph, aten.mm.default, nodes[0], nodes[1])
    return call(graph, aten.add.Tensor, product, call(graph, aten.t.default, product))


def of_an_input(graph: fx.Graph, nodes: list[fx.Node]) -> Any:
    return call(graph, aten.exp.default, nodes[0])


def of_a_view_of_an_input(graph: fx.Graph, nodes: list[fx.Node]) -> Any:
    return call(graph, aten.exp.default, call(graph, aten.reshape.default, nodes[0], [-1]))


def spread(graph: fx.Graph, nodes: list[fx.Node]) -> Any:
    row = call(graph, aten.sum.dim_IntList, call(graph, aten.mm.default, nodes[0], nodes[1]), [0])
    return call(graph, aten.add.Tensor, row, nodes[0])


def widened(graph: fx.Graph, nodes: list[fx.Node]) -> Any:
    product = call(graph, aten.mm.default, nodes[0], nodes[1])
    double = graph.call_function(aten._to_copy.default, (nodes[0],), {"dtype": torch.float64})
    return call(graph, aten.add.Tensor, product, double)


def turned(graph: fx.Graph, nodes: list[fx.Node]) -> Any:
    product = call(graph, aten.mm.default, nodes[0], nodes[1])
    return call(graph, aten.exp.default, call(graph, aten.t.default, product))


@pytest.mark.parametrize(
    ("build", "expected"),
    [
        (last_reader, 1),
        (through_a_view, 1),
        (read_again, 1),  # the later of the two readers
        (returned, 0),
        (read_again_through_a_view, 0),
        (read_again_through_what_may_be_a_view, 0),
        (beside_its_own_transpose, 0),
        (of_an_input, 0),
        (of_a_view_of_an_input, 0),
        (spread, 0),
        (widened, 0),
        (turned, 0),  # how it lies in memory is not known
    ],
)
def test_only_the_last_reader_of_memory_of_its_own_writes_over_it(build: Any, expected: int) -> None:
    inputs = [torch.randn(4, 4), torch.randn(4, 4)]
    graph = graph_of(build, inputs)
    wanted = fx.GraphModule(nn.Module(), graph)(*inputs)
    before = [x.clone() for x in inputs]
    assert write_over(graph) == expected
    found = fx.GraphModule(nn.Module(), graph)(*inputs)
    torch.testing.assert_close(found, wanted, rtol=0, atol=0, equal_nan=True)
    assert all(torch.equal(x, y) for x, y in zip(inputs, before, strict=True))


UNARY: list[Any] = [aten.exp.default, aten.neg.default, aten.tanh.default, aten.relu.default, aten.sigmoid.default]
BINARY: list[Any] = [aten.add.Tensor, aten.mul.Tensor, aten.sub.Tensor, aten.gelu_backward.default, aten.mm.default]
VIEWS: list[tuple[Any, ...]] = [(aten.t.default,), (aten.reshape.default, [4, 4]), (aten.transpose.int, 0, 1)]
OTHERS: list[tuple[Any, ...]] = [(aten.sum.dim_IntList, [1], True), (aten.slice.Tensor, 0, 0, 4), (aten.clone.default,)]


@settings(max_examples=300, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 99), st.integers(0, 99), st.integers(0, 99)), max_size=14))
def test_no_graph_gives_other_bits_and_no_input_is_touched(steps: list[tuple[int, int, int, int]]) -> None:
    def build(graph: fx.Graph, nodes: list[fx.Node]) -> Any:
        made = list(nodes)
        for kind, which, first, second in steps:
            x, y = made[first % len(made)], made[second % len(made)]
            if kind == 0:
                made.append(call(graph, UNARY[which % len(UNARY)], x))
            elif kind == 1:
                wide = call(graph, aten.expand.default, y, [4, 4])
                made.append(call(graph, BINARY[which % len(BINARY)], call(graph, aten.expand.default, x, [4, 4]), wide))
            else:
                target, *rest = (VIEWS if kind == 2 else OTHERS)[which % 3]
                whole = call(graph, aten.expand.default, x, [4, 4]) if target is aten.reshape.default else x
                made.append(call(graph, target, whole, *rest))
        return tuple(made[-3:])

    inputs = [torch.randn(4, 4, generator=torch.Generator().manual_seed(at)) for at in range(2)]
    graph = graph_of(build, inputs)
    wanted = [x.clone() for x in fx.GraphModule(nn.Module(), graph)(*inputs)]
    write_over(graph)
    found = fx.GraphModule(nn.Module(), graph)(*inputs)
    torch.testing.assert_close(list(found), wanted, rtol=0, atol=0, equal_nan=True)
    for at, x in enumerate(inputs):
        assert torch.equal(x, torch.randn(4, 4, generator=torch.Generator().manual_seed(at)))
