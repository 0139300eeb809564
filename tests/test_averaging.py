"""``average_from``: the model that comes out is the mean of the last iterates, at the same epsilon, resumed exactly."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from fit_cases import PHASES, STEPS, biases, mlp, run, run_phases
from torch import Tensor, nn

from dpbitfit_fx.averaging import TailAverage
from dpbitfit_fx.biases import load_biases
from dpbitfit_fx.errors import PrivacyError
from dpbitfit_fx.fit import FitResult
from dpbitfit_fx.privacy_statement import PrivacyStatement
from dpbitfit_fx.progress import StepInfo

FIXED = {"target_epsilon": None, "noise_multiplier": 1.0}


def trained(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def watched(go: Callable[..., FitResult], **changes: Any) -> tuple[list[Tensor], FitResult]:
    """The parameters after every step, and the result."""
    model, seen = mlp(), []

    def look(info: StepInfo) -> None:
        seen.append(trained(model))

    return seen, go(None, model=model, callbacks=[look], **FIXED, **changes)


@pytest.mark.parametrize("share", [0, 0.5, 0.7, 0.99])
def test_the_model_is_the_mean_of_the_iterates_beyond_the_share_and_the_iterates_are_the_same(share: float) -> None:
    plain, last = watched(run)
    iterates, result = watched(run, average_from=share)
    assert all(torch.equal(one, other) for one, other in zip(plain, iterates, strict=True))
    mean = torch.stack(iterates[math.floor(share * STEPS) :]).double().mean(0)
    assert torch.allclose(trained(result.model).double(), mean, atol=1e-6, rtol=0)
    assert torch.allclose(mean.float(), iterates[-1], atol=1e-6) == (share == 0.99)
    assert result.epsilon == last.epsilon


@pytest.mark.parametrize("go, first", [(run, 6), (run_phases, 5 + 3)], ids=["one phase", "two phases"])
def test_eval_fn_sees_the_mean_so_far_and_training_goes_on_from_the_iterates(
    go: Callable[..., FitResult], first: int
) -> None:
    looked: list[Tensor] = []

    def look(model: nn.Module) -> float:
        looked.append(trained(model))
        return 0.0

    plain, _ = watched(go)
    iterates, result = watched(go, average_from=0.5, eval_fn=look)
    assert all(torch.equal(one, other) for one, other in zip(plain, iterates, strict=True))
    for value, entry in zip(looked, result.history, strict=True):
        step = entry["step"]
        want = iterates[step - 1] if step <= first else torch.stack(iterates[first:step]).mean(0)
        assert torch.allclose(value, want, atol=1e-6, rtol=0), step
    assert torch.equal(looked[-1], trained(result.model)) and len(looked) == 2


@pytest.mark.parametrize("go, crash", [(run, 5), (run, 8), (run_phases, 11), (run_phases, STEPS)])
def test_a_resumed_run_ends_bit_for_bit_at_the_same_mean(
    go: Callable[..., FitResult], crash: int, tmp_path: Path
) -> None:
    _, whole = watched(go, average_from=0.5)

    def stop(info: StepInfo) -> None:
        if info.step == crash:
            raise RuntimeError("crash")

    with pytest.raises(RuntimeError, match="crash"):
        go(tmp_path, average_from=0.5, callbacks=[stop], **FIXED)
    result = go(tmp_path, average_from=0.5, **FIXED)
    assert torch.equal(trained(result.model), trained(whole.model)) and result.charged_steps == 0
    assert torch.equal(trained(load_biases(mlp(), tmp_path / "biases.safetensors")), trained(whole.model))


def test_a_run_stopped_while_its_results_are_written_averages_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, whole = watched(run, average_from=0.5)
    with monkeypatch.context() as patch:

        def fail(*_: Any) -> None:
            raise OSError("no more")

        patch.setattr(sys.modules["dpbitfit_fx.fit"], "_write_results", fail)
        with pytest.raises(OSError, match="no more"):
            run(tmp_path, average_from=0.5, **FIXED)
    assert torch.equal(trained(run(tmp_path, average_from=0.5, **FIXED).model), trained(whole.model))


def test_the_statement_says_what_was_averaged_and_epsilon_is_that_of_the_steps(tmp_path: Path) -> None:
    result = run_phases(tmp_path, average_from=0.5)
    statement = PrivacyStatement.load(tmp_path, verify=True)
    assert statement.public_declarations["averaging"] == {"average_from": 0.5, "averaged_steps": 4}
    assert '"averaged_steps": 4' in (tmp_path / "summary.md").read_text()
    plain = run_phases(None)
    assert (result.epsilon, result.noise_multiplier) == (plain.epsilon, plain.noise_multiplier)
    assert "averaging" not in plain.statement.public_declarations


def test_asking_for_a_mean_later_costs_nothing_and_begins_where_the_run_goes_on(tmp_path: Path) -> None:
    def stop(info: StepInfo) -> None:
        if info.step == 10:
            raise RuntimeError("crash")

    iterates, _ = watched(run)
    with pytest.raises(RuntimeError):
        run(tmp_path, callbacks=[stop], **FIXED)
    result = run(tmp_path, average_from=0.5, **FIXED)
    assert result.charged_steps == 0
    assert result.statement.public_declarations["averaging"]["averaged_steps"] == 3  # steps 10 to 12, from checkpoint 9
    assert torch.allclose(trained(result.model), torch.stack(iterates[9:]).mean(0), atol=1e-6, rtol=0)


def test_a_longer_plan_begins_its_mean_later(tmp_path: Path) -> None:
    def stop(info: StepInfo) -> None:
        if info.step == 9:
            raise RuntimeError("crash")

    iterates, _ = watched(run, max_steps=20)
    with pytest.raises(RuntimeError):
        run(tmp_path, average_from=0.5, checkpoint_every=8, callbacks=[stop], **FIXED)
    result = run(tmp_path, max_steps=20, average_from=0.5, checkpoint_every=8, **FIXED)
    assert torch.allclose(trained(result.model), torch.stack(iterates[10:]).mean(0), atol=1e-6, rtol=0)


def test_low_precision_parameters_are_averaged_in_float32() -> None:
    parameter = nn.Parameter(torch.zeros(3, dtype=torch.bfloat16))
    average, values = TailAverage({"bias": parameter}, 0.0), torch.linspace(100, 101, 64).to(torch.bfloat16)
    for step, value in enumerate(values, 1):
        with torch.no_grad():
            parameter.fill_(value)
        average.update(step, len(values))
    assert torch.allclose(average.values["bias"], values.float().mean().expand(3), atol=1e-3, rtol=0)
    before = parameter.detach().clone()
    with average.applied():
        assert torch.equal(parameter, average.values["bias"].to(torch.bfloat16)) and not torch.equal(parameter, before)
    assert torch.equal(parameter, before)


@pytest.mark.parametrize("share", [-0.1, 1, 1.5, float("nan"), True, "half"])
def test_a_share_outside_the_run_is_refused(share: Any) -> None:
    with pytest.raises(PrivacyError, match="average_from must be the share"):
        run(None, average_from=share)


def test_the_mean_covers_the_last_phase_only() -> None:
    iterates, result = watched(run_phases, average_from=0)
    first = PHASES[0].max_steps
    assert first is not None
    assert torch.allclose(trained(result.model), torch.stack(iterates[first:]).mean(0), atol=1e-6, rtol=0)
    assert not torch.equal(biases(result.model), biases(mlp()))
