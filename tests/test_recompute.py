"""A memory budget: values are computed again instead of kept, bit for bit the same sum, in less memory; the proof stays."""

from __future__ import annotations

import dataclasses
import functools
import re
from collections import Counter
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from fit_cases import run as run_fit
from memory import peak_bytes
from small_models import Middle, Sandwich, losses, none_below, points
from torch import Tensor, fx, nn

import dpbitfit_fx as dpb
from dpbitfit_fx.lowering import Lowered
from dpbitfit_fx.passes import facts, packing, recompute
from dpbitfit_fx.passes.joint_graph import JointGraph, Role, copy_graph, finish
from dpbitfit_fx.passes.torch_private import LINEAR, is_random
from dpbitfit_fx.randomness import SecretKey

aten = torch.ops.aten


class Block(nn.Module):
    """Attention and a feed-forward layer, each with a residual and a norm behind it, over [B, T, 16]."""

    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.query, self.key, self.value, self.out = (nn.Linear(16, 16) for _ in range(4))
        self.up, self.down, self.drop = nn.Linear(16, 64), nn.Linear(64, 16), nn.Dropout(dropout)
        self.first, self.second = nn.LayerNorm(16), nn.LayerNorm(16)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (f(x).unflatten(-1, (2, 8)).transpose(1, 2) for f in (self.query, self.key, self.value))
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        x = self.first(x + self.drop(self.out(mixed)))
        result: Tensor = self.second(x + self.drop(self.down(F.gelu(self.up(x)))))
        return result


def encoder(blocks: int = 4, dropout: float = 0.0) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(*(Block(dropout) for _ in range(blocks)), nn.Flatten(), nn.Linear(24 * 16, 3))


def words(size: int = 4) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(size)
    return torch.randn(size, 24, 16, generator=generator), torch.arange(size) % 3


def images(size: int = 4) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(size)
    return torch.randn(size, 3, 12, 12, generator=generator), torch.arange(size) % 3


def convolutions() -> nn.Module:
    torch.manual_seed(0)
    middle = [layer for _ in range(4) for layer in (nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.SiLU())]
    return nn.Sequential(nn.Conv2d(3, 8, 1), *middle, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3)).eval()


def sandwich(middle: Middle) -> nn.Module:
    torch.manual_seed(0)
    return Sandwich(middle)


def total(step: dpb.PrivateStep, batch: Any) -> Tensor:
    masks = step.dropout_masks(range(len(batch[0])), SecretKey.insecure_for_tests(1), 0) or None
    return step.accumulate(batch, torch.ones(len(batch[0])), step.zero_accumulator(), masks)


def calls(joint: JointGraph) -> Counter[Any]:
    return Counter(n.target for n in joint.module.graph.nodes if n.op == "call_function")


def note(step: dpb.PrivateStep) -> str:
    return " ".join(line for line in step.report().optimized if line.startswith("recompute: "))


MODELS: dict[str, tuple[Any, Any]] = {
    "encoder": (encoder, words),
    "convolutions": (convolutions, images),
    "pointwise": (lambda: sandwich(lambda h: (h.sin() * h.softmax(1)).tanh().cos()), points),
    "views of a chunk": (lambda: sandwich(lambda h: torch.cat([x.sigmoid() for x in h.chunk(2, 1)], 1)), points),
    "a sort": (lambda: sandwich(lambda h: (h.sin().sort(1)[0] * h.cumsum(1)).tanh()), points),
    "an assertion": (lambda: sandwich(none_below), points),
}


@functools.cache
def compiled(name: str, budget: float) -> dpb.PrivateStep:
    build, batch = MODELS[name]
    return dpb.compile(build(), losses, batch(), memory_budget=budget)


CASES = [("encoder", 0.5), *((name, 0.0) for name in MODELS)]


@pytest.mark.parametrize(("name", "budget"), CASES)
def test_the_sum_is_the_same_bit_for_bit_for_every_batch_size(name: str, budget: float) -> None:
    step, plain = compiled(name, budget), compiled(name, 1.0)
    for size in (1, 3, 8):
        batch = MODELS[name][1](size)
        assert torch.equal(total(step, batch), total(plain, batch))


@pytest.mark.parametrize("budget", [0.5, 0.0])
def test_the_peak_falls_below_the_budget_to_what_the_report_tells(budget: float) -> None:
    told = re.search(r": (\d+) values .* peak is (\d+)% of ([\d.]+) MB", note(compiled("encoder", budget)))
    assert told is not None and int(told[1]) > 0
    for size in (4, 32):
        peaks = [
            peak_bytes(functools.partial(total, compiled("encoder", b), words(size))) for b in (1.0, budget)
        ]
        assert peaks[1] <= 1.01 * (budget or 0.45) * peaks[0]
        assert peaks[1] / peaks[0] == pytest.approx(int(told[2]) / 100, abs=0.02)
        if size == 4:
            assert peaks[0] / 1e6 == pytest.approx(float(told[3]), abs=0.06)


def test_a_budget_of_one_is_the_default_and_leaves_the_graph_alone() -> None:
    default = dpb.compile(sandwich(torch.sin), losses, points())
    whole = dpb.compile(sandwich(torch.sin), losses, points(), memory_budget=1)
    assert default._lowered.joint.text() == whole._lowered.joint.text()
    plain, less = compiled("encoder", 1.0), compiled("encoder", 0.5)
    assert note(plain) == "" != note(less)
    assert Lowered(less.partial, "eager", ["recompute"]).joint.text() == plain._lowered.joint.text()
    assert less._lowered.joint.text() != plain._lowered.joint.text()


def test_the_sealed_graph_and_its_hash_are_those_before_and_the_template_matches_after() -> None:
    plain, less = compiled("encoder", 1.0), compiled("encoder", 0.0)
    assert plain.graph_hash == less.graph_hash and plain.partial.text() == less.partial.text()
    assert calls(less._lowered.joint) > calls(plain._lowered.joint)
    facts.partial(less._lowered.joint)


def test_nothing_of_the_clip_and_none_of_its_gradients_is_computed_again() -> None:
    def clip(joint: JointGraph) -> tuple[Counter[Any], Counter[Any]]:
        """The operators that depend on the mask, and those that they read."""
        behind = {joint.placeholder(i.name) for i in joint.with_role(Role.MASK)}
        for node in joint.module.graph.nodes:
            if behind & set(node.all_input_nodes):
                behind.add(node)
        read = {i for n in behind for i in n.all_input_nodes} - behind
        return Counter(n.target for n in behind), Counter(n.target for n in read if n.op == "call_function")

    plain, less = (compiled("encoder", b)._lowered.joint for b in (1.0, 0.0))
    assert clip(plain) == clip(less)


def test_products_are_repeated_only_where_cheaper_values_do_not_suffice() -> None:
    torch.manual_seed(0)
    layers: list[nn.Module] = [m for _ in range(4) for m in (nn.Linear(256, 256), nn.GELU(), nn.Softsign(), nn.Tanh())]
    batch = (torch.randn(4, 8, 256), words()[1])
    step = dpb.compile(nn.Sequential(*layers, nn.Flatten(), nn.Linear(8 * 256, 3)), losses, batch)
    plain, some, most = (within(step.partial, b) for b in (1.0, 0.8, 0.0))
    products = {aten.mm.default, aten.addmm.default}
    assert products & set(calls(most) - calls(plain))
    assert calls(some) > calls(plain) and not products & set(calls(some) - calls(plain))


def within(joint: JointGraph, budget: float) -> JointGraph:
    assert joint.source is not None
    source = dataclasses.replace(joint.source, memory_budget=budget)
    return recompute.recompute(dataclasses.replace(joint, source=source))


def test_a_budget_that_cannot_be_met_gives_the_lowest_peak_and_says_so() -> None:
    least, low = (within(compiled("encoder", 1.0).partial, b) for b in (0.0, 0.01))
    assert least.text() == low.text()
    assert low.optimized[-1] == least.optimized[-1] + "; the budget of 1% cannot be met"


def test_where_nothing_lowers_the_peak_nothing_is_computed_again() -> None:
    step = compiled("an assertion", 0.0)
    assert note(step).startswith("recompute: nothing is computed again")
    assert step._lowered.joint.text() == compiled("an assertion", 1.0)._lowered.joint.text()


def test_dropout_masks_come_from_the_host_once_and_the_sum_is_the_same_bit_for_bit() -> None:
    model = encoder(2, dropout=0.3).train()
    plain, step = (dpb.compile(model, losses, words(), memory_budget=b, dropout=True) for b in (1.0, 0.0))
    assert calls(step._lowered.joint) > calls(plain._lowered.joint)
    assert not any(is_random(n) for n in step._lowered.joint.module.graph.nodes)
    for size in (1, 5):
        assert torch.equal(total(step, words(size)), total(plain, words(size)))


@pytest.mark.parametrize("blind", [False, True])
def test_a_random_operator_is_not_doubled(blind: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """No graph with one passes the facts; the pass does not rely on that. Blind to randomness, it doubles it."""
    joint = compiled("encoder", 0.0).partial
    graph, _ = copy_graph(joint.module)
    for value in [n.args[0] for n in graph.nodes if n.target is aten.gelu.default]:
        assert isinstance(value, fx.Node)
        with graph.inserting_after(value):
            drawn = graph.call_function(aten.rand_like.default, (value,))
        with graph.inserting_after(drawn):
            noisy = graph.call_function(aten.add.Tensor, (value, drawn))
        value.replace_all_uses_with(noisy)
        drawn.args, noisy.args = (value,), (value, drawn)
    monkeypatch.setattr(recompute, "AGAIN", recompute.AGAIN | {aten.rand_like.default})
    if blind:
        monkeypatch.setattr(recompute, "is_random", lambda node: False)
    before = dataclasses.replace(joint, module=finish(graph))
    after = recompute.recompute(before)
    assert calls(after) > calls(before)
    assert (calls(after)[aten.rand_like.default] > calls(before)[aten.rand_like.default]) is blind


@pytest.mark.usefixtures("bfloat16_products")
@pytest.mark.parametrize("precision", ["float32", "bf16"])
def test_repeated_products_share_their_packed_weight(precision: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packing, "SMALLEST", 1)
    plain, less = (Lowered(compiled("encoder", b).partial, "eager", (), precision) for b in (1.0, 0.0))
    assert [p.target for p in less.packs] == [p.target for p in plain.packs]
    assert calls(less.joint)[LINEAR] > calls(plain.joint)[LINEAR] > 0
    given = list(words(5)), torch.ones(5), compiled("encoder", 1.0).zero_accumulator()
    assert torch.equal(less(*given), plain(*given))


def test_one_graph_for_every_length_keeps_its_numbers_at_each() -> None:
    def loss(model: Any, batch: Any) -> Tensor:
        return F.cross_entropy(model(batch["x"]).mean(1), batch["y"], reduction="none")

    torch.manual_seed(0)
    shapes = {"x": {1: torch.export.Dim("T", min=8, max=24)}}
    example = dict(zip(("x", "y"), words(), strict=True))
    step = dpb.compile(nn.Sequential(Block(0.0), Block(0.0)), loss, example, dynamic_shapes=shapes, memory_budget=0.0)
    plain = Lowered(step.partial, "eager", ["recompute"])
    assert calls(step._lowered.joint) > calls(plain.joint)
    for length in (8, 13, 24):
        given = [example["x"][:, :length], example["y"]], torch.ones(4), step.zero_accumulator()
        assert torch.equal(step._lowered(*given), plain(*given))


def test_fit_within_a_budget_ends_at_the_same_biases_bit_for_bit() -> None:
    plain, less = (dict(run_fit(None, max_steps=3, memory_budget=b).model.named_parameters()) for b in (1.0, 0.0))
    assert all(torch.equal(plain[name], less[name]) for name in plain)


@pytest.mark.parametrize("budget", [-0.1, 1.5, float("nan"), True, "0.5", None])
def test_a_budget_that_is_no_share_is_refused(budget: Any) -> None:
    with pytest.raises(dpb.CompileRefused, match=r"memory_budget is .*: give a number from 0 .* to 1"):
        dpb.compile(encoder(1), losses, words(), memory_budget=budget)


def test_a_budget_is_refused_for_a_backend_that_orders_nodes_by_itself() -> None:
    with pytest.raises(dpb.CompileRefused, match=r"memory_budget below 1 .*Inductor .*use backend='eager'"):
        dpb.compile(encoder(1), losses, words(), memory_budget=0.9, backend="inductor")
