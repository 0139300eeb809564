"""``add_bias=True`` in phases: each trains the added biases that it names, and adds the others as they are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from fit_cases import mlp_loss, points, run
from small_models import assert_untouched, photograph
from torch import Tensor, nn

import dpbitfit_fx as dpb
from dpbitfit_fx.biases import load_biases
from dpbitfit_fx.engine import Engine
from dpbitfit_fx.privacy_statement import PrivacyStatement
from dpbitfit_fx.progress import StepInfo

Phase = dpb.Phase
ADDED = {"0.bias", "2.bias"}
PLANS = {
    "head, then biases": [Phase(["4.*"], max_steps=2), Phase("bias", max_steps=3)],
    "biases, then head": [Phase("bias", max_steps=2), Phase(["4.*"], max_steps=3)],
    "one, then the other": [Phase(["0.bias"], max_steps=2), Phase(["2.bias", "4.*"], max_steps=3)],
    "everything, then one": [Phase("all", max_steps=2), Phase(["2.bias"], max_steps=3)],
}


def bare(bias: bool = False) -> nn.Sequential:
    """Two layers without bias and a head with one; with `bias`, as if written with zero biases."""
    torch.manual_seed(0)
    layers: list[Any] = [nn.Linear(4, 6, bias=False), nn.Linear(6, 6, bias=False), nn.Linear(6, 2)]
    if bias:
        for layer in layers[:2]:
            layer.bias = nn.Parameter(torch.zeros(6))
    return nn.Sequential(layers[0], nn.Tanh(), layers[1], nn.Tanh(), layers[2])


def phased(folder: Path | None, plan: str, **changes: Any) -> dpb.FitResult:
    options: dict[str, Any] = {
        "model": bare(),
        "phases": PLANS[plan],
        "max_steps": None,
        "target_epsilon": None,
        "noise_multiplier": 1.0,
        "add_bias": True,
        "checkpoint_every": 2,
        "optimizer": torch.optim.SGD,
    }
    return run(folder, **(options | changes))


def parameters(model: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


class Stop(Exception):
    pass


def stop_at(step: int) -> Any:
    def callback(info: StepInfo) -> None:
        if info.step == step:
            raise Stop

    return callback


@pytest.mark.parametrize("plan", PLANS)
def test_a_run_in_phases_equals_that_of_the_model_written_with_zero_biases(
    plan: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without noise, whose coordinates follow the order of the parameters: added ones may come last."""

    def without_noise(engine: Engine, key: Any, step: int, accumulator: Tensor) -> dict[str, Tensor]:
        return engine.update.unflatten(engine.update.privatize(accumulator, torch.zeros_like(accumulator)))

    monkeypatch.setattr(Engine, "private_gradient", without_noise)
    ours = phased(tmp_path, plan)
    written = phased(None, plan, model=bare(bias=True), add_bias=False)
    want, got = parameters(written.model), parameters(ours.model)
    assert got.keys() == want.keys()
    for name, value in got.items():
        assert torch.allclose(value, want[name], atol=1e-5, rtol=0), name
    assert all(bool(got[name].any()) for name in ADDED)
    assert ours.epsilon == written.epsilon and ours.statement.num_trainable == written.statement.num_trainable
    fresh = load_biases(bare(), tmp_path / "biases.safetensors")
    x, _ = points().tensors
    assert torch.equal(fresh(x), ours.model(x))
    statement = PrivacyStatement.load(tmp_path, verify=True)
    assert [p.num_trainable for p in statement.phases] == [p.num_trainable for p in written.statement.phases]


def test_a_phase_moves_the_added_biases_it_names_and_no_other() -> None:
    model, seen = bare(), []

    def look(info: StepInfo) -> None:
        seen.append(parameters(model))

    phased(None, "one, then the other", model=model, callbacks=[look])
    assert bool(seen[1]["0.bias"].any()) and not bool(seen[1]["2.bias"].any())
    assert torch.equal(seen[1]["0.bias"], seen[4]["0.bias"]) and bool(seen[4]["2.bias"].any())


@pytest.mark.parametrize("same_object", [False, True])
@pytest.mark.parametrize("plan, step", [("one, then the other", 1), ("biases, then head", 3)])
def test_an_interrupted_run_goes_on_bit_for_bit(plan: str, step: int, same_object: bool, tmp_path: Path) -> None:
    whole, model = phased(None, plan), bare()
    with pytest.raises(Stop):
        phased(tmp_path, plan, model=model, callbacks=[stop_at(step)])
    result = phased(tmp_path, plan, model=model if same_object else bare())
    assert result.charged_steps == 0
    assert same(parameters(result.model), parameters(whole.model))


class Product(nn.Module):
    """Its output is a product with a bare parameter: an added bias needs a hook."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 6) * 0.3)

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("bi,ij->bj", x, self.weight)


def test_a_bias_behind_a_hook_is_added_in_the_phase_that_does_not_train_it(tmp_path: Path) -> None:
    def make() -> nn.Sequential:
        torch.manual_seed(0)
        return nn.Sequential(Product(), nn.Tanh(), nn.Linear(6, 2))

    phases = [Phase("bias", max_steps=3, learning_rate=2.0), Phase(["2.*"], max_steps=2)]
    looked: list[Tensor] = []

    def loss(model: Any, batch: Any) -> Tensor:
        return mlp_loss(model, batch)

    def evaluate(model: nn.Module) -> float:
        looked.append(model(points().tensors[0]))
        return 0.0

    result = phased(tmp_path, "one, then the other", model=make(), phases=phases, loss_fn=loss, eval_fn=evaluate)
    added = set(dict(result.model.named_parameters())) - set(dict(make().named_parameters()))
    assert len(added) == 1 and bool(dict(result.model.named_parameters())[added.pop()].any())
    fresh = load_biases(make(), tmp_path / "biases.safetensors")
    assert torch.equal(fresh(points().tensors[0]), looked[-1])


def test_a_failed_fit_before_training_leaves_the_model_as_it_was() -> None:
    model = bare()
    before = photograph(model)
    for wrong in (Phase(["nothing.*"], max_steps=1), Phase("bias", max_steps=1, learning_rate=-1.0)):
        with pytest.raises(dpb.DPBitFitError, match="Phase 2 of 2"):
            phased(None, "head, then biases", model=model, phases=[Phase("bias", max_steps=1), wrong])
        assert_untouched(model, before)
