"""Every optimization can be switched off by its name, alone or with the others, and changes no number and no proof.

``bf16_attention`` and ``bf16_kept``, which round, have their own files; for ``cuda_graphs`` see ``test_cuda_lowering``.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import dpbitfit_fx as dpb
from dpbitfit_fx import lowering
from dpbitfit_fx.passes import packing
from dpbitfit_fx.passes.joint_graph import Fact
from dpbitfit_fx.passes.torch_private import LINEAR

OPTIMIZATIONS = tuple(name for name in lowering.OPTIMIZATIONS if not name.startswith(("bf16", "cuda")))


class Net(nn.Module):
    """Something for each of them: a linear layer to fuse and to pack, tokens nobody reads, a ReLU, values to keep."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Linear(64, 64), nn.Linear(64, 64), nn.Linear(64, 2)

    def forward(self, x: Tensor) -> Any:
        return self.head(F.relu(self.second(F.relu(self.first(x))))[:, 0])


def loss(model: Any, batch: Any) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1], reduction="none")


BATCH = (torch.randn(5, 6, 64, generator=torch.Generator().manual_seed(0)), torch.arange(5) % 2)


@pytest.fixture(scope="module")
def model() -> Net:
    torch.manual_seed(0)
    return Net()


def compiled(model: nn.Module, disable: Any = ()) -> dpb.PrivateStep:
    return dpb.compile(model, loss, BATCH, disable=disable, memory_budget=0.5, noise_multiplier=1.0, expected_batch_size=5.0)


def did(step: dpb.PrivateStep) -> set[str]:
    """The names of the optimizations that left a trace in the graph that runs."""
    report, nodes = step.report(), list(step._lowered.joint.module.graph.nodes)
    traces = {
        "refusion": any(name == "re-fuse" for name, *_ in report.passes),
        "dead_tokens": any(line.startswith("dead tokens: 1 of 6") for line in report.optimized),
        "saved_inputs": any(line.startswith("saved inputs: 2 ReLU") for line in report.optimized),
        "recompute": any(line.startswith("recompute: ") for line in report.optimized),
        "packed_weights": bool(report.packed) and any(n.target is LINEAR for n in nodes),
        "in_place": any(line.endswith("write over what nobody reads afterwards") for line in report.optimized),
    }
    assert traces.keys() == set(OPTIMIZATIONS)
    return {name for name, there in traces.items() if there}


@pytest.mark.parametrize("name", ["none", *OPTIMIZATIONS, "all"])
def test_a_name_switches_off_that_one_and_the_sum_and_the_seal_stay(
    model: Net, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packing, "can_pack", lambda: LINEAR is not None)
    off = {"none": (), "all": OPTIMIZATIONS}.get(name, name)
    step = compiled(model, off)
    there = set(OPTIMIZATIONS) if LINEAR is not None else set(OPTIMIZATIONS) - {"packed_weights"}
    assert did(step) == there - ({off} if isinstance(off, str) else set(off))
    assert step.joint.facts == frozenset(Fact)
    found = step.per_sample_gradients(BATCH)
    params = dict(model.named_parameters())
    for row in range(5):
        theirs = torch.autograd.grad(loss(model, [x[row : row + 1] for x in BATCH]).sum(), [params[n] for n in found])
        for key, expected in zip(found, theirs, strict=True):
            assert torch.allclose(found[key][row], expected, atol=1e-6)
    plain = compiled(model, OPTIMIZATIONS)
    sums = [s.accumulate(BATCH, torch.ones(5), s.zero_accumulator()) for s in (step, plain)]
    assert float((sums[0] - sums[1]).norm()) <= 1e-6 * float(sums[1].norm())


def test_an_unknown_name_is_an_error_that_lists_the_names(model: Net) -> None:
    with pytest.raises(dpb.CompileRefused, match="'dead_token'.*" + ", ".join(lowering.OPTIMIZATIONS)):
        compiled(model, ["refusion", "dead_token"])


def test_what_was_switched_off_stays_off_with_other_noise(model: Net) -> None:
    step = compiled(model, OPTIMIZATIONS).with_noise(2.0, 5.0)
    assert did(step) == set()
