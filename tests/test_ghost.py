"""Every parameter trained: gradients that stay products clip and sum as the oracle says; no [B, p, d] is made."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from ghost_cases import CASES, ROWS, oracle
from torch import Tensor, fx, nn

from dpbitfit_fx.compile import PrivateStep
from dpbitfit_fx.compile import compile as compile_step
from dpbitfit_fx.fit import fit
from dpbitfit_fx.passes import facts, template
from dpbitfit_fx.passes.clipping import (
    AutomaticClipping,
    AutoVClipping,
    Clipping,
    FlatClipping,
    PerLayerClipping,
)
from dpbitfit_fx.passes.errors import SealBroken
from dpbitfit_fx.passes.ghost import SMALLEST
from dpbitfit_fx.passes.joint_graph import JointGraph, Role, copy_graph
from dpbitfit_fx.passes.seal import seal, split

aten = torch.ops.aten
R = 0.5


class Tied(nn.Module):
    """Tokens [B, 4] of a vocabulary of 9; the output layer is the table: a product, a lookup and their cross term."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.mix = nn.Embedding(9, 6), nn.Linear(6, 6)

    def forward(self, tokens: Tensor) -> Tensor:
        result: Tensor = torch.tanh(self.mix(self.table(tokens))) @ self.table.weight.t()
        return result


def token_loss(model: Any, batch: Any) -> Tensor:
    logits = model(batch["tokens"])
    losses: Tensor = F.cross_entropy(logits.transpose(1, 2), batch["tokens"], reduction="none").sum(1) * batch["weight"]
    return losses


def tokens() -> dict[str, Tensor]:
    return {"tokens": torch.tensor([[1, 2, 1, 1], [3, 3, 3, 3], [0, 5, 8, 7], [4, 4, 2, 0]]), "weight": torch.ones(4)}


@functools.cache
def tied(clipping: Clipping, ghost_norms: bool | None = True) -> PrivateStep:
    torch.manual_seed(0)
    return compile_step(
        Tied(), token_loss, tokens(), trainable="all", clipping=clipping, ghost_norms=ghost_norms,
        noise_multiplier=1.25, expected_batch_size=16.0,
    )  # fmt: skip


class Product(nn.Module):
    """Tokens [B, T, n] -> one linear layer -> a sum over the tokens."""

    def __init__(self, n: int, m: int) -> None:
        super().__init__()
        self.layer = nn.Linear(n, m, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.layer(x).sum(1)
        return result


def weighted(model: Any, batch: Any) -> Tensor:
    scale = torch.linspace(-1, 1, model.layer.out_features).to(batch["x"])
    out: Tensor = (model(batch["x"]) * scale).sum(1) * batch["weight"]
    return out


def product(length: int, n: int, m: int, **options: Any) -> PrivateStep:
    torch.manual_seed(0)
    batch = {"x": torch.randn(3, length, n), "weight": torch.ones(3)}
    return compile_step(Product(n, m), weighted, batch, trainable="all", **options)


def total(step: PrivateStep, batch: Any, mask: Tensor | None = None) -> Tensor:
    rows = len(next(iter(batch.values())))
    return step.accumulate(batch, torch.ones(rows) if mask is None else mask, step.zero_accumulator())


def values_of(step: PrivateStep, batch: Any) -> dict[str, Tensor]:
    """Every tensor that the step makes on its way to the clipped sum."""
    seen: dict[str, Tensor] = {}

    class Watch(fx.Interpreter):
        def run_node(self, n: fx.Node) -> Any:
            value = super().run_node(n)
            if isinstance(value, Tensor) and n.op == "call_function":
                seen[n.name] = value
            return value

    leaves = step._leaves(batch)
    mask = torch.ones(len(leaves[0]))
    with torch.no_grad():
        Watch(step.partial.module).run(*step.partial.values(leaves), mask, step.zero_accumulator())
    return seen


# --- the numbers


@pytest.mark.parametrize("name", CASES)
def test_norms_and_clipped_sums_of_every_parameter_equal_the_single_sample_oracle(name: str) -> None:
    case = CASES[name]()
    model, loss, batch = case
    step = compile_step(model, loss, batch, trainable="all", clipping=FlatClipping(R), ghost_norms=True)
    assert set(step.trainable_names) == {n for n, _ in model.named_parameters()}
    gradients = oracle(case, step.trainable_names)
    kept = torch.stack([g * min(1.0, R / g.norm().item()) for g in gradients])
    for row in range(ROWS):
        one = total(step, batch, torch.eye(ROWS)[row])
        assert (one - kept[row]).norm() <= 1e-5 * kept[row].norm()
    assert (total(step, batch) - kept.sum(0)).norm() <= 1e-5 * kept.norm(dim=1).sum()
    (squared,) = [v for k, v in values_of(step, batch).items() if k.startswith("maximum")]
    norms = torch.stack([g.double().norm() for g in gradients])
    assert torch.allclose(squared.sqrt(), norms, rtol=1e-5)
    ghosts = {n for n, why in step.report().ghosts if why.startswith("ghost norm")}
    matrices = {n for n, p in model.named_parameters() if p.dim() == 2}
    assert ghosts == matrices, "every linear layer and table stays factored; convolutions are materialised"


@pytest.mark.parametrize("clipping", [FlatClipping(R), AutoVClipping(R), PerLayerClipping(R)], ids=repr)
def test_every_clipping_gives_the_same_sum_with_and_without_ghost_norms(clipping: Clipping) -> None:
    ghost, plain, batch = tied(clipping), tied(clipping, False), tokens()
    assert ghost.report().ghosts and not plain.report().ghosts
    for scale in (1e-3, 1.0, 1e3):
        batch["weight"] = torch.tensor([1.0, 3.0, 0.2, 1.0]) * scale
        theirs = total(plain, batch)
        assert (total(ghost, batch) - theirs).norm() <= 1e-5 * min(4 * R, float(theirs.norm()) + 1e-30)


def test_a_float64_model_is_summed_in_float64() -> None:
    torch.manual_seed(0)
    batch = {"tokens": tokens()["tokens"], "weight": torch.ones(4, dtype=torch.float64)}
    steps = [
        compile_step(Tied().double(), token_loss, batch, trainable="all", clipping=FlatClipping(R), ghost_norms=g)
        for g in (True,)
    ]
    model = steps[0].model
    gradients = oracle((model, token_loss, batch), steps[0].trainable_names)
    want = torch.stack([g * min(1.0, R / g.norm().item()) for g in gradients]).sum(0)
    assert steps[0].dtype == torch.float64 and (total(steps[0], batch) - want).norm() <= 1e-11


# --- what is made, and when


def test_no_per_sample_matrix_is_ever_made() -> None:
    ghost, plain = (product(3, 70, 80, clipping=FlatClipping(R), ghost_norms=g) for g in (None, False))
    batch = {"x": torch.randn(5, 3, 70), "weight": torch.ones(5)}

    def largest(step: PrivateStep) -> int:
        return max(v.numel() for v in values_of(step, batch).values())

    assert largest(plain) == 5 * 70 * 80
    assert largest(ghost) == 70 * 80, "nothing is larger than the sum itself"


@pytest.mark.parametrize(
    ("length", "n", "m", "how"),
    [
        (3, 70, 80, "ghost norm: 2 x 3^2 numbers instead of 5600"),
        (60, 70, 80, "materialised: 5600 numbers against 2 x 60^2"),
        (1, 4, 5, None),
    ],
)
def test_the_cheaper_of_the_two_is_taken_and_reported(length: int, n: int, m: int, how: str | None) -> None:
    step = product(length, n, m)
    reasons = [why for _, why in step.report().ghosts]
    assert len(reasons) == (how is not None) and all(why.startswith(how or "") for why in reasons)
    if how:
        assert n * m >= SMALLEST and how in str(step.report())


# --- hostile rows


@pytest.mark.parametrize("clipping", [FlatClipping(R), AutoVClipping(R)], ids=repr)
@pytest.mark.parametrize("poison", [float("nan"), float("inf"), 3e38])
def test_a_row_whose_factors_are_not_finite_contributes_exactly_zero(clipping: Clipping, poison: float) -> None:
    step, batch = tied(clipping), tokens()
    without = total(step, batch, torch.tensor([1.0, 0.0, 1.0, 1.0]))
    batch["weight"][1] = poison
    assert torch.equal(total(step, batch), without)


@pytest.mark.parametrize("at", ["x", "weight"])
@pytest.mark.parametrize("poison", [float("nan"), float("inf"), -1e30])
def test_a_poisoned_activation_or_gradient_contributes_exactly_zero(at: str, poison: float) -> None:
    step = product(3, 6, 5, clipping=FlatClipping(R), ghost_norms=True)
    batch = {"x": torch.randn(4, 3, 6), "weight": torch.ones(4)}
    without = total(step, batch, torch.tensor([1.0, 1.0, 0.0, 1.0]))
    if at == "x":
        batch["x"][2, 1, 3] = poison
        batch["weight"][2] = 0.0 if abs(poison) != 1e30 else 1e10  # 0 * NaN, or a product beyond any sane norm
    else:
        batch["weight"][2] = poison
    assert torch.equal(total(step, batch), without)


def hostile_rows(dtype: torch.dtype, length: int, width: int) -> dict[str, Tensor]:
    """Every size of features beside every size of output gradients that the dtype holds, inf and NaN among them."""
    generator = torch.Generator().manual_seed(5)
    reach = (
        range(-38, 39, 4) if dtype is torch.float32 else (-323, -170, -161, -38, 0, 19, 21, 38, 120, 150, 153, 155, 308)
    )
    sizes = [*(10.0**e for e in reach), float("inf"), float("nan")]
    pairs = [(a, w) for a in sizes for w in [*sizes, 1e-45, 10.0**-162 * (dtype is torch.float64)]]
    x = torch.rand(len(pairs), length, width, generator=generator, dtype=torch.float64)
    x[::3] -= 0.5
    wide = x * torch.tensor([a for a, _ in pairs], dtype=torch.float64)[:, None, None]
    return {"x": wide.to(dtype), "weight": torch.tensor([w for _, w in pairs], dtype=torch.float64).to(dtype)}


CLIPPINGS: dict[str, Callable[[float], Clipping]] = {
    "flat": FlatClipping,
    "automatic": AutomaticClipping,
    "automatic, smallest gamma": lambda r: AutomaticClipping(r, gamma=1e-12),
    "auto-v": AutoVClipping,
    "per-layer": PerLayerClipping,
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("kind", CLIPPINGS)
def test_no_row_of_any_size_of_features_and_gradients_contributes_more_than_r(kind: str, dtype: torch.dtype) -> None:
    """A scaled gradient of 1e-44 has lost its digits; features of 1e38 make that loss many times R where R is small."""
    rows = hostile_rows(dtype, 16, 3)
    torch.manual_seed(0)
    example = {"x": torch.randn(3, 16, 3, dtype=dtype), "weight": torch.ones(3, dtype=dtype)}
    for r in (1e-6, 1e-4, 1e-2, 1.0, 1e2):
        step = compile_step(
            Product(3, 40).to(dtype), weighted, example, trainable="all", clipping=CLIPPINGS[kind](r), ghost_norms=True
        )
        everyone, largest = total(step, rows), 0.0
        assert torch.isfinite(everyone).all()
        for at in range(len(rows["weight"])):
            one = total(step, {k: v[at : at + 1] for k, v in rows.items()}).double()
            largest = max(largest, one.norm().item() if torch.isfinite(one).all() else float("inf"))
        assert 0.9 * r < largest <= r * (1 + 1e-5)


def test_tokens_that_cancel_move_the_sum_by_at_most_r() -> None:
    """Their float32 rounding, blown up by R over a tiny norm, would be far more than R: the norm has a floor for this."""
    step = product(2, 6, 5, clipping=AutoVClipping(R), ghost_norms=True)
    generator = torch.Generator().manual_seed(1)
    for exponent in range(-6, 7):
        x = torch.randn(1, 1, 6, generator=generator) * 1e4
        batch = {
            "x": torch.cat([x, -x * (1 + 10.0**exponent)], 1).repeat(3, 1, 1),
            "weight": torch.tensor([1.0, 1e3, 1e-3]),
        }
        for row in range(3):
            assert total(step, batch, torch.eye(3)[row]).norm() <= R * (1 + 1e-5)


@pytest.mark.parametrize("clipping", [FlatClipping(R), AutoVClipping(R), PerLayerClipping(R)], ids=repr)
def test_leaving_one_record_out_moves_the_sum_by_at_most_r(clipping: Clipping) -> None:
    step, generator, largest = tied(clipping), torch.Generator().manual_seed(2), 0.0
    for _ in range(30):
        scale = 10.0 ** (torch.rand(8, generator=generator) * 30 - 12)
        batch = {"tokens": torch.randint(0, 9, (8, 4), generator=generator), "weight": scale}
        whole = total(step, batch).double()
        for row in range(8):
            rest = {k: torch.cat([v[:row], v[row + 1 :]]) for k, v in batch.items()}
            largest = max(largest, (whole - total(step, rest).double()).norm().item())
    assert 0.99 * R < largest <= R * (1 + 1e-5)


def test_a_row_that_is_masked_out_moves_nothing_whatever_it_holds() -> None:
    step, batch = tied(FlatClipping(R)), tokens()
    kept = total(step, batch, torch.tensor([1.0, 1.0, 0.0, 1.0]))
    batch["tokens"][2], batch["weight"][2] = 0, float("nan")
    assert torch.equal(total(step, batch, torch.tensor([1.0, 1.0, 0.0, 1.0])), kept)


# --- the seal

GHOSTS: dict[str, Clipping] = {"flat": FlatClipping(R), "per-layer": PerLayerClipping(R)}


def tail_of(joint: JointGraph) -> list[str]:
    """Names of the operators between the factors and the output: what the template must match."""
    end = template.match_noise(joint)
    stop = {n for source in template.match_clip(joint, end) for n in above(source)}
    return [n.name for n in joint.module.graph.nodes if n.op == "call_function" and n not in stop]


def above(node: fx.Node) -> set[fx.Node]:
    found, todo = set(), [node]
    while todo:
        one = todo.pop()
        if one not in found:
            found.add(one)
            todo += one.all_input_nodes
    return found


def edited(
    joint: JointGraph, edit: Callable[[dict[str, fx.Node], fx.Graph], Any], keep_dead: bool = False
) -> JointGraph:
    graph, _ = copy_graph(joint.module)
    edit({n.name: n for n in graph.nodes}, graph)
    if not keep_dead:
        graph.eliminate_dead_code()
    return dataclasses.replace(joint, module=SimpleNamespace(graph=graph))  # type: ignore[arg-type]


def replace_input(name: str, k: int, other: str) -> Callable[[dict[str, fx.Node], fx.Graph], Any]:
    return lambda n, g: n[name].replace_input_with(n[name].all_input_nodes[k], n[other])


def every_mutation(joint: JointGraph) -> Iterator[tuple[str, JointGraph]]:
    """Single changes of the tail: edges moved or scaled, constants and operators changed, second uses."""
    tail = tail_of(joint)
    nodes = {n.name: n for n in joint.module.graph.nodes}
    order = {name: i for i, name in enumerate(nodes)}
    private = [i.name for i in joint.inputs if i.role not in (Role.FROZEN, Role.TRAINABLE)]
    targets = sorted({nodes[n].target for n in tail}, key=str)

    def scaled(name: str, k: int) -> Callable[[dict[str, fx.Node], fx.Graph], Any]:
        def edit(n: dict[str, fx.Node], g: fx.Graph) -> None:
            feed = n[name].all_input_nodes[k]
            with g.inserting_before(n[name]):
                n[name].replace_input_with(feed, g.call_function(aten.mul.Scalar, (feed, 1.5)))

        return edit

    def put(name: str, k: int, value: Any) -> Callable[[dict[str, fx.Node], fx.Graph], Any]:
        def edit(n: dict[str, fx.Node], g: fx.Graph) -> None:
            n[name].args = (*n[name].args[:k], value, *n[name].args[k + 1 :])

        return edit

    def put_target(name: str, target: Any) -> Callable[[dict[str, fx.Node], fx.Graph], Any]:
        return lambda n, g: setattr(n[name], "target", target)

    def put_nodes(name: str, k: int, names: list[str]) -> Callable[[dict[str, fx.Node], fx.Graph], Any]:
        return lambda n, g: put(name, k, [n[x] for x in names])(n, g)

    def change(name: str, what: str, to: Callable[[Any], Any]) -> Callable[[dict[str, fx.Node], fx.Graph], Any]:
        return lambda n, g: setattr(n[name], what, to(getattr(n[name], what)))

    def used_again(name: str) -> Callable[[dict[str, fx.Node], fx.Graph], Any]:
        def edit(n: dict[str, fx.Node], g: fx.Graph) -> None:
            with g.inserting_before(g.output_node()):
                g.call_function(aten.neg.default, (n[name],))

        return edit

    for place, name in enumerate(tail):
        node = nodes[name]
        for k, feed in enumerate(node.all_input_nodes):
            if feed.name not in tail and feed.name not in private:
                continue  # a factor's source: there the template ends
            yield f"{name}: input {k} scaled", edited(joint, scaled(name, k))
            for step, other in enumerate([*private, *tail]):
                if other != feed.name and order[other] < order[name] and (step + place) % 8 == 0:
                    yield f"{name}: input {k} is {other}", edited(joint, replace_input(name, k, other))
        for k, value in enumerate(node.args):
            changed: list[Any] = []
            if isinstance(value, (int, float)):
                changed = [value * 1.5 + 1, -value - 1, not value if isinstance(value, bool) else True]
            elif isinstance(value, list) and all(isinstance(v, int) for v in value):
                changed = [[*value, 1], value[:-1], [v + 1 for v in value]]
            elif isinstance(value, list) and not isinstance(value[-1], int):
                changed = [value[:-1], [*value, value[0]], value[::-1]]
            for new in changed:
                if new != value and not (isinstance(new, list) and any(isinstance(v, fx.Node) for v in new)):
                    yield f"{name}: argument {k} is {new}", edited(joint, put(name, k, new))
            if (
                isinstance(value, list) and isinstance(value[0], fx.Node) and isinstance(value[-1], int)
            ):  # a view [B, n]
                for first in (-1, 1):
                    yield f"{name}: argument {k} is [{first}, ..]", edited(joint, put(name, k, [first, *value[1:]]))
            elif isinstance(value, list) and value and isinstance(value[0], fx.Node):
                for pick in (lambda v: v[:-1], lambda v: [*v, v[0]], lambda v: v[::-1]):
                    names = [v.name for v in pick(value)]
                    if names != [v.name for v in value]:
                        yield (
                            f"{name}: {names}",
                            edited(joint, put_nodes(name, k, names)),
                        )
        for at, target in enumerate(targets):
            if target is not node.target and (at + place) % 6 == 0:
                yield f"{name}: {target}", edited(joint, put_target(name, target))
        yield f"{name}: dtype", edited(joint, change(name, "kwargs", lambda _: {"dtype": torch.float16}))
        yield f"{name}: one argument more", edited(joint, change(name, "args", lambda args: (*args, 1)))
        if place < len(tail) - 1:
            yield f"{name}: used again", edited(joint, used_again(name), keep_dead=True)


@pytest.mark.parametrize("kind", GHOSTS)
def test_no_single_change_anywhere_in_the_tail_of_a_ghost_passes(kind: str) -> None:
    joint = tied(GHOSTS[kind]).joint
    seal(edited(joint, lambda n, g: None))
    survivors, count = [], 0
    for what, broken in every_mutation(joint):
        count += 1
        try:
            facts.sealed(broken)
        except SealBroken:
            continue
        survivors.append(what)
    assert survivors == [] and count > 500


class Tail:
    """The nodes of the tied table's ghost, by what they are."""

    def __init__(self, graph: fx.Graph) -> None:
        self.graph = graph
        (self.lookup,) = graph.find_nodes(op="call_function", target=aten.embedding_dense_backward.default)
        (self.both,) = self.lookup.users
        self.mm = self.both.args[0]
        self.left, self.right = self.mm.args
        self.scaled = self.left.args[0].args[0]
        self.kept_g, self.scale = self.scaled.args
        self.kept_a = self.right.args[0]
        self.g, self.a = self.kept_g.args[1], self.kept_a.args[1]
        self.index, self.scaled_e = self.lookup.args[1], self.lookup.args[0]
        self.kept_e = self.scaled_e.args[0]
        self.e = self.kept_e.args[1]
        (self.picked,) = [u for n in self.g.users for u in n.users if u.target is aten.gather.default]
        (self.same,) = graph.find_nodes(op="call_function", target=aten.eq.Tensor)
        (self.above,) = [u for u in self.picked.users if u.target is aten.cat.default]
        (self.whole,) = self.above.users
        (self.h,) = self.whole.users
        (self.maximum,) = graph.find_nodes(op="call_function", target=aten.maximum.default)
        self.narrow = self.picked.args[0]
        (self.finite,) = [n for n in graph.find_nodes(op="call_function", target=aten.lt.Scalar) if n.args[1] == 1e40]
        self.sizes = self.finite.args[0].args[0].args[0]

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(name)

    def before(self, user: Any, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        with self.graph.inserting_before(user):
            return self.graph.call_function(target, args, kwargs)

    def put(self, node: Any, at: int, value: Any) -> None:
        node.args = (*node.args[:at], value, *node.args[at + 1 :])


Sabotage = Callable[[Any], Any]
SABOTAGES: dict[str, tuple[Sabotage, str]] = {
    "a dropped cross term": (
        lambda t: t.put(t.above, 0, [t.above.args[0][0], t.before(t.above, aten.zeros_like.default, t.picked)]),
        "ghost norm: expected aten.gather.default, found aten.zeros_like|cross term",
    ),
    "a cross term left out": (lambda t: t.put(t.h, 0, t.above.args[0][0]), "ghost norm: expected aten.cat.default"),
    "a norm over other activations than those summed": (
        lambda t: t.put(t.kept_a, 1, t.before(t.kept_a, aten.mul.Scalar, t.a, 2.0)),
        "ghost sum: expected aten.reshape.default, found aten.mul",
    ),
    "activations summed through another view": (
        lambda t: t.put(t.kept_a, 1, t.before(t.kept_a, aten.reshape.default, *t.a.args)),
        "the norm is taken over other factors than those that are summed",
    ),
    "gradients of one half in the norm of the other": (
        lambda t: t.put(t.narrow, 0, t.a),
        "the norm is taken over other factors than those that are summed|is used",
    ),
    "another index in the norm": (
        lambda t: t.put(t.same.args[0], 0, t.before(t.same.args[0], aten.zeros_like.default, t.index)),
        "the norm is taken over other factors than those that are summed",
    ),
    "an unclipped term": (lambda t: t.put(t.left.args[0], 0, t.kept_g), "ghost sum: expected aten.mul.Tensor, found aten.where"),
    "an unclipped lookup": (lambda t: t.put(t.lookup, 0, t.kept_e), "ghost sum: expected aten.mul.Tensor, found aten.where"),
    "the mask dropped from the gradients": (
        lambda t: t.put(t.scaled, 0, t.g), "non-finite rows: expected aten.where.ScalarOther, found aten.reshape"
    ),
    "the mask dropped from the activations": (
        lambda t: t.put(t.right, 0, t.a), "non-finite rows: expected aten.where.ScalarOther, found aten.reshape"
    ),
    "the mask dropped from the lookup": (
        lambda t: t.put(t.scaled_e, 0, t.e), "non-finite rows: expected aten.where.ScalarOther, found aten.reshape"
    ),
    "rows that are not kept become ones": (lambda t: t.put(t.kept_a, 2, 1.0), "non-finite rows: found 1.0"),
    "the floor of the norm removed": (lambda t: t.put(t.maximum, 1, t.maximum.args[0]), "ghost norm: expected aten.mul.Scalar"),
    "a lower floor": (lambda t: t.put(t.maximum.args[1], 1, 1e-9), "ghost norm: found 1e-09"),
    "half a norm": (
        lambda t: t.put(t.maximum, 0, t.before(t.maximum, aten.mul.Scalar, t.maximum.args[0], 0.5)),
        "norm: expected aten.sum.dim_IntList, found aten.mul.Scalar",
    ),
    "a Gram matrix in float32": (
        lambda t: setattr(t.narrow, "kwargs", {"dtype": torch.float32}), "ghost norm: aten._to_copy.default has the options"
    ),
    "the norm of the first pair of tokens only": (
        lambda t: t.put(t.maximum.args[0].args[0], 0, t.maximum.args[0].args[0].args[0][:1]), "terms were added up"
    ),
    "rows counted by how often they occur in the batch": (
        lambda t: t.put(t.lookup, 4, True), "scaled by how often they occur"
    ),
    "factors read as shorter rows": (lambda t: t.put(t.left.args[0], 1, [-1, 3]), "other shapes than the norm's"),
    "a term added a second time": (lambda t: t.put(t.both, 0, t.lookup), "adds something else than a product"),
    "views that may read a record as two": (
        lambda t: [
            t.put(view, 1, [-1, *view.args[1][1:]]) or t.put(view, 0, t.before(view, aten.cat.default, [view.args[0]] * 2, 1))
            for view in (t.g, t.a, t.e, t.index)
        ],
        "expected one row per record and",
    ),
    "an index that may be read as another's": (
        lambda t: t.put(t.index, 1, [-1, *t.index.args[1][1:]]), "expected one row per record and 1 public sizes"
    ),
    "the sizes of the factors not tested": (
        lambda t: [user.replace_all_uses_with(user.args[0]) for user in list(t.finite.users)],
        "finite factors",
    ),
    "the size of the features not tested": (
        lambda t: t.put(t.finite, 0, t.finite.args[0].args[0].args[0][0]),
        "finite factors: expected aten.stack.default, found aten.diagonal.default",
    ),
    "the size of the features left out of the sum": (
        lambda t: t.put(t.finite.args[0].args[0], 0, t.finite.args[0].args[0].args[0][::2]),
        "finite factors: 2 terms were added up, expected 4",
    ),
    "the size of the gradients tested twice": (
        lambda t: t.put(t.sizes[1].args[0], 0, t.sizes[0].args[0].args[0]),
        "the size of a factor is not tested|is used",
    ),
    "the size of the features of another product": (
        lambda t: t.put(t.finite.args[0].args[0], 0, [t.sizes[i] for i in (0, 3, 2, 1)]),
        "the size of a factor is not tested",
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", SABOTAGES)
def test_a_sabotaged_ghost_is_refused_for_its_own_reason(kind: str) -> None:
    joint = tied(FlatClipping(R)).joint
    break_it, reason = SABOTAGES[kind]
    broken = edited(joint, lambda n, g: break_it(Tail(g)))
    assert str(broken.module.graph) != str(joint.module.graph)
    with pytest.raises(SealBroken, match=reason):
        seal(broken)


def test_a_ghost_graph_is_split_in_two_proved_halves_that_are_the_whole() -> None:
    step = tied(FlatClipping(R))
    partial, update = split(step.joint)
    values = [*partial.values(step._leaves(tokens())), torch.ones(4)]
    start, z = torch.randn(step.num_trainable), torch.randn(step.num_trainable)
    (whole,) = step.joint.module(*values, start, z)
    assert torch.equal(whole, update.module(partial.module(*values, start)[0], z)[0])


# --- fit


def test_fit_trains_every_parameter() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 80), nn.Tanh(), nn.Linear(80, 2))
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    data = torch.utils.data.TensorDataset(torch.randn(60, 64), torch.arange(60) % 2)

    def loss(m: Any, batch: Any) -> Tensor:
        return F.cross_entropy(m(batch[0]), batch[1], reduction="none")

    result = fit(
        model, loss, data, target_epsilon=8.0, max_steps=3, expected_batch_size=10, physical_batch_size=8,
        trainable="all", progress=False,
    )  # fmt: skip
    assert result.statement.num_trainable == sum(p.numel() for p in model.parameters())
    assert all(not torch.equal(p, before[n]) for n, p in model.named_parameters())
