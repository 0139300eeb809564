"""The report says what was trained and by which rule, what was proved and rewritten, and holds nothing private."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dpbitfit_fx.compile import PrivateStep
from dpbitfit_fx.compile import compile as compile_step
from dpbitfit_fx.passes.joint_graph import Fact


class Varied(nn.Module):
    """A bias by name, one by structure, a position table that is a near miss, one never used, and a public buffer."""

    centre: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.first, self.head = nn.Linear(6, 6), nn.Linear(6, 2)
        self.shift = nn.Parameter(torch.zeros(6))
        self.table = nn.Parameter(torch.zeros(5, 6))
        self.spare = nn.Linear(6, 6)
        self.register_buffer("centre", torch.ones(6))

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.head(torch.tanh(self.first(x - self.centre + self.table) + self.shift)).mean(1)
        return result


def loss(model: Any, batch: Any) -> Tensor:
    losses: Tensor = model(batch).square().sum(1)
    return losses


EXAMPLE = torch.full((3, 5, 6), 0.12345)


@pytest.fixture(scope="module")
def step() -> PrivateStep:
    torch.manual_seed(0)
    return compile_step(Varied(), loss, EXAMPLE, noise_multiplier=1.5, expected_batch_size=8.0)


def test_every_trainable_is_listed_with_its_shape_and_the_rule_that_chose_it(step: PrivateStep) -> None:
    assert step.report().trained == (
        ("shift", (6,), "structure"),
        ("first.bias", (6,), "name"),
        ("head.bias", (2,), "name"),
    )


def test_near_misses_unused_parameters_and_public_inputs_are_named(step: PrivateStep) -> None:
    report = step.report()
    assert [name for name, _ in report.near_misses] == ["table"]
    assert "varies along a token or spatial axis" in report.near_misses[0][1]
    assert report.unused == ("spare.bias",)
    assert report.public_inputs == ("centre",)


def test_the_counts_are_those_of_the_model(step: PrivateStep) -> None:
    report = step.report()
    assert report.num_trainable == step.num_trainable == 14
    assert report.num_parameters == sum(p.numel() for p in step.model.parameters())
    assert report.share == 14 / report.num_parameters


def test_facts_passes_and_operators_are_those_of_the_sealed_graph(step: PrivateStep) -> None:
    report = step.report()
    assert set(report.facts) == {f.value for f in Fact}
    order = [name for name, *_ in report.passes]
    assert order == [
        "capture",
        "re-fuse",
        "dead_tokens",
        "check_meaning",
        "ghost",
        "clip",
        "seal_partial",
        "add_noise",
        "seal",
    ]
    calls = [n for n in step.joint.module.graph.nodes if n.op == "call_function"]
    assert sum(report.operators.values()) == len(calls)
    assert report.operators["aten.div.Scalar"] >= 1
    assert report.graph_hash == step.graph_hash == step.joint.digest()
    assert re.fullmatch("[0-9a-f]{64}", report.graph_hash)


def test_a_step_without_noise_does_not_say_that_it_is_sealed() -> None:
    report = compile_step(Varied(), loss, EXAMPLE).report()
    assert "partial" in report.facts and not {"noised", "sealed"} & set(report.facts)


def test_the_text_has_one_line_per_finding(step: PrivateStep) -> None:
    lines = str(step.report()).splitlines()
    assert lines[0].startswith("Varied: 3 trainables, 14 of ")
    assert step.graph_hash[:12] in lines[0]
    assert "  trained  shift [6] (by structure)" in lines
    assert "  unused by the loss  spare.bias" in lines
    assert "  assumed public  centre" in lines
    assert sum(line.startswith("  pass ") for line in lines) == 9
    assert any(line.startswith("  near miss  table: ") for line in lines)


def test_the_dict_survives_json(step: PrivateStep) -> None:
    told = step.report().to_dict()
    back = json.loads(json.dumps(told))
    assert back["trained"][0] == ["shift", [6], "structure"]
    assert back["share"] == pytest.approx(14 / told["num_parameters"])


def test_no_value_of_a_record_is_in_the_report(step: PrivateStep) -> None:
    """Not even of the example batch, and nothing changes when private batches have passed through."""
    before = (str(step.report()), step.report().to_dict())
    step.accumulate(torch.full((4, 5, 6), 9.87654), torch.ones(4), step.zero_accumulator())
    assert (str(step.report()), step.report().to_dict()) == before
    assert "0.12345" not in before[0] + str(before[1]) and "9.87654" not in before[0] + str(before[1])


def test_a_recurrent_layer_is_listed_as_slow_and_a_linear_one_is_not() -> None:
    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn = nn.GRU(3, 4, batch_first=True)
            self.head = nn.Linear(4, 1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.as_tensor(self.head(self.rnn(x)[0][:, -1])[:, 0])

    slow = compile_step(Recurrent(), lambda model, x: model(x), torch.randn(3, 2, 3)).report().slow
    assert len(slow) == 1 and "gru" in slow[0] and "unrolled over time" in slow[0]
    assert compile_step(nn.Linear(3, 1), lambda model, x: model(x)[:, 0], torch.randn(3, 3)).report().slow == ()
