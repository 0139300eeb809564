"""`fit` in phases: one noise multiplier, one composed epsilon, one run to resume, each phase its own parameters."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import dp_accounting  # type: ignore[import-untyped, unused-ignore]
import pytest
import torch
from dp_accounting.pld import PLDAccountant  # type: ignore[import-untyped, unused-ignore]
from fit_cases import PHASES, RECORDS, Crash, crash_at, mlp, mlp_loss, momentum, points, run, run_phases
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import dpbitfit_fx as dpb
from dpbitfit_fx.accounting import epsilon_of_phases, solve_noise_multiplier
from dpbitfit_fx.biases import load_biases
from dpbitfit_fx.errors import ArtifactError, CheckpointError, CompileRefused, DPBitFitError, PrivacyError
from dpbitfit_fx.phases import StepLedger
from dpbitfit_fx.privacy_statement import PrivacyStatement
from dpbitfit_fx.progress import StepInfo
from dpbitfit_fx.randomness import SecretKey, stream
from dpbitfit_fx.sampling import PoissonSampler

DELTA = 1e-3
# For tests that ask nothing of epsilon: no noise has to be solved for.
FIXED = {"target_epsilon": None, "noise_multiplier": 1.0}
RATES, STEPS = (20 / RECORDS, 12 / RECORDS), (5, 7)
SAMPLERS = [PoissonSampler(RECORDS, rate, steps) for rate, steps in zip(RATES, STEPS, strict=True)]


def parameters(model: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def crashed(folder: Path, step: int, **changes: Any) -> None:
    with pytest.raises(Crash):
        run_phases(folder, callbacks=[crash_at(step)], **changes)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The uninterrupted run: its result, its folder, and the parameters after every step."""
    folder = tmp_path_factory.mktemp("phases") / "out"
    model = mlp()
    seen: list[dict[str, Tensor]] = []
    infos: list[StepInfo] = []

    def look(info: StepInfo) -> None:
        infos.append(info)
        seen.append(parameters(model))

    result = run_phases(
        folder, model=model, callbacks=[look], eval_fn=lambda m: {"norm": float(m.get_parameter("0.bias").norm())}
    )
    return result, folder, seen, infos


# -- one epsilon ------------------------------------------------------------------------------------------------------


def accounted(sigma: float, parts: Iterable[tuple[float, int]]) -> float:
    """dp-accounting's own composition, on a grid of its own."""
    accountant = PLDAccountant(dp_accounting.NeighboringRelation.ADD_OR_REMOVE_ONE, value_discretization_interval=2e-4)
    for rate, steps in parts:
        one = dp_accounting.PoissonSampledDpEvent(rate, dp_accounting.GaussianDpEvent(sigma))
        accountant.compose(dp_accounting.SelfComposedDpEvent(one, steps))
    return float(accountant.get_epsilon(DELTA))


def test_epsilon_is_dp_accountings_composition_of_both_phases_and_of_nothing_else(whole: Any) -> None:
    result, _, _, _ = whole
    sigma = result.noise_multiplier
    right = accounted(sigma, zip(RATES, STEPS, strict=True))
    assert result.epsilon == pytest.approx(right, rel=2e-3)
    for wrong in ([(RATES[0], 12)], [(RATES[1], 12)], [(RATES[0], 7), (RATES[1], 5)], [(RATES[0], 5)]):
        assert abs(accounted(sigma, wrong) - right) > 0.02 * right


def test_the_noise_solved_for_the_phases_together_meets_the_target_and_is_not_wasteful(whole: Any) -> None:
    result, _, _, _ = whole
    assert 0.99 * 8 < result.epsilon <= 8
    sigma = solve_noise_multiplier(SAMPLERS, 8.0, DELTA)
    assert result.noise_multiplier == sigma
    assert sigma > max(solve_noise_multiplier(sampler, 8.0, DELTA) for sampler in SAMPLERS)
    one = PoissonSampler(RECORDS, RATES[0], 12)
    halves = [PoissonSampler(RECORDS, RATES[0], steps) for steps in STEPS]
    assert solve_noise_multiplier(halves, 8.0, DELTA) == solve_noise_multiplier(one, 8.0, DELTA)


def test_a_two_phase_statement_composes_as_an_earlier_run(whole: Any, tmp_path: Path) -> None:
    _, folder, _, _ = whole
    later = run(tmp_path, prior=folder / "privacy.json", target_epsilon=20.0)
    assert [(r.sample_rate, r.steps) for r in later.statement.prior] == list(zip(RATES, STEPS, strict=True))
    single = PoissonSampler(RECORDS, RATES[0], 12)
    assert later.epsilon == epsilon_of_phases(
        [(single, 12)], later.noise_multiplier, DELTA, prior=[folder / "privacy.json"]
    )
    assert later.epsilon <= 20 and "Earlier runs on these records: 1 (12 steps" in later.statement.summary()
    with pytest.raises(PrivacyError, match="already spend"):
        run(None, prior=whole[0].statement, target_epsilon=4.0)


def test_a_run_in_phases_composes_with_earlier_runs(whole: Any) -> None:
    first = run(None, target_epsilon=4.0)
    both = run_phases(None, prior=first.statement)
    assert 4 < both.epsilon <= 8 and both.noise_multiplier > whole[0].noise_multiplier


# -- what is trained --------------------------------------------------------------------------------------------------


def test_the_run_equals_two_loops_over_private_steps_with_draws_and_noise_numbered_through(whole: Any) -> None:
    """Oracle: compile, draw, sum, add the stream's noise, step; nothing of `fit`."""
    result, _, _, _ = whole
    data, model, key = points(), mlp(), SecretKey.insecure_for_tests(7)
    x, y = data.tensors
    number = 0
    plans = [(["2.*"], torch.optim.Adam, {"lr": 0.05}), ("bias", torch.optim.SGD, {"lr": 0.2, "momentum": 0.9})]
    for (trainable, optimizer, settings), sampler in zip(plans, SAMPLERS, strict=True):
        step = dpb.compile(model, mlp_loss, (x[:4], y[:4]), trainable=trainable)
        step = step.with_noise(result.noise_multiplier, sampler.expected_batch_size)
        named = dict(model.named_parameters())
        made = optimizer([named[name] for name in step.trainable_names], **settings)
        for _ in range(sampler.steps):
            rows = torch.from_numpy(sampler.draw(key, number))
            total = step.zero_accumulator()
            if len(rows):
                total = step.accumulate((x[rows], y[rows]), torch.ones(len(rows)), total)
            noise = torch.from_numpy(stream(key, "noise", number).normal(step.num_trainable)).float()
            for name, gradient in step.unflatten(step.privatize(total, noise)).items():
                named[name].grad = gradient
            made.step()
            number += 1
    for name, parameter in model.named_parameters():
        assert torch.allclose(parameter, result.model.get_parameter(name), atol=2e-5, rtol=0), name


def test_each_phase_moves_its_own_parameters_and_no_other(whole: Any) -> None:
    result, _, seen, _ = whole
    start, boundary, end = parameters(mlp()), seen[4], seen[11]
    assert {n for n in start if not torch.equal(start[n], boundary[n])} == {"2.weight", "2.bias"}
    assert {n for n in start if not torch.equal(boundary[n], end[n])} == {"0.bias", "2.bias"}
    assert torch.equal(boundary["2.weight"], end["2.weight"])
    assert same(parameters(result.model), end)


def test_the_file_holds_every_parameter_that_any_phase_trained(whole: Any) -> None:
    result, folder, _, _ = whole
    loaded = load_biases(mlp(), folder / "biases.safetensors")
    assert same(parameters(loaded), parameters(result.model))
    other = mlp()
    with torch.no_grad():
        other.get_parameter("0.weight").add_(1)
    with pytest.raises(ArtifactError):
        load_biases(other, folder / "biases.safetensors")


def test_callbacks_evaluations_and_the_learning_rate_run_through_the_phases(whole: Any) -> None:
    result, _, _, infos = whole
    assert [(i.step, i.steps, i.phase) for i in infos] == [(n + 1, 12, int(n >= 5)) for n in range(12)]
    assert [i.learning_rate for i in infos] == [0.05] * 5 + [0.2] * 7
    spent = [i.epsilon for i in infos]
    assert spent == sorted(spent) and spent[-1] == result.epsilon and spent[0] < spent[4] < spent[11]
    # An epoch of the first phase has 6 steps, of the second 10; the end of a phase is looked at too.
    assert [(e["step"], e["phase"]) for e in result.history] == [(5, 0), (12, 1)]
    assert result.history[1]["epoch"] == pytest.approx(5 * RATES[0] + 7 * RATES[1])
    assert (
        spent[4]
        == result.history[0]["epsilon"]
        == epsilon_of_phases([(SAMPLERS[0], 5)], result.noise_multiplier, DELTA)
    )


def test_a_schedule_starts_again_with_each_phase() -> None:
    rates: list[float] = []
    run_phases(
        None,
        phases=[dpb.Phase(max_steps=3, learning_rate=1.0), dpb.Phase(max_steps=2, learning_rate=0.5)],
        lr_schedule=lambda step: 1 / (1 + step),
        **FIXED,
        callbacks=[lambda info: rates.append(info.learning_rate)],
    )
    assert rates == [1.0, 1 / 2, 1 / 3, 0.5, 0.25]


def test_one_phase_is_a_plain_run() -> None:
    one, plain = run_phases(None, phases=[dpb.Phase(max_steps=12)], **FIXED), run(None, **FIXED)
    assert same(parameters(one.model), parameters(plain.model))
    assert one.statement.phases == () and "phases" not in one.statement.to_dict()


class BehindTheBack(torch.optim.SGD):
    """Writes through .data, as older optimizers do: torch's version counters do not notice."""

    def step(self, closure: Any = None) -> Any:
        for parameter in self.param_groups[0]["params"]:
            parameter.data.sub_(parameter.grad, alpha=self.param_groups[0]["lr"])


def test_the_second_phase_sees_the_weights_of_the_first_whatever_wrote_them() -> None:
    def wide(optimizer: type[torch.optim.Optimizer]) -> dict[str, Tensor]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 2))
        phases = [dpb.Phase(trainable=["2.weight"], max_steps=2, optimizer=optimizer), dpb.Phase(max_steps=2)]
        return parameters(run_phases(None, model=model, phases=phases, learning_rate=5.0, **FIXED).model)

    assert same(wide(BehindTheBack), wide(torch.optim.SGD))


# -- resuming ---------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(os.name != "posix", reason="SIGKILL")
@pytest.mark.parametrize(
    "step", [5, 6, 11], ids=["in the first phase", "the first step after the boundary", "in the second phase"]
)
def test_after_kill_9_in_any_phase_the_resumed_run_ends_bit_for_bit_where_the_uninterrupted_one_does(
    step: int, whole: Any, tmp_path: Path
) -> None:
    script = Path(__file__).with_name("fit_cases.py")
    root = str(Path(dpb.__file__).resolve().parents[1])
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": root}
    command = [sys.executable, str(script), str(tmp_path / "out"), f"phases-{step}"]
    process = subprocess.run(command, env=environment, capture_output=True)
    assert process.returncode == -9, process.stderr.decode()
    result = run_phases(tmp_path / "out")
    assert same(parameters(result.model), parameters(whole[0].model))
    assert (result.steps, result.charged_steps, result.epsilon) == (12, 0, whole[0].epsilon)
    assert result.statement.phases == whole[0].statement.phases


def test_a_checkpoint_on_the_boundary_itself_starts_the_second_phase(whole: Any, tmp_path: Path) -> None:
    crashed(tmp_path, step=6, checkpoint_every=5)
    result = run_phases(tmp_path, checkpoint_every=5)
    assert same(parameters(result.model), parameters(whole[0].model)) and result.charged_steps == 0


def test_lost_steps_are_charged_to_the_phase_that_took_them(tmp_path: Path) -> None:
    crashed(tmp_path, step=7)  # checkpoint at 6; before it, at 3
    crashed(tmp_path / "over", step=8, checkpoint_every=4)  # checkpoint at 4; the boundary, 5, and 7 were seen
    slower = (PHASES[0], dpb.Phase(max_steps=7, expected_batch_size=12, optimizer=momentum, learning_rate=1.0))
    result = run_phases(tmp_path, phases=(dpb.Phase(["2.*"], max_steps=5, learning_rate=0.1), slower[1]))
    assert [(p.steps, p.lost_steps) for p in result.statement.phases] == [(5, 0), (6, 1)]
    result = run_phases(tmp_path / "over", phases=(dpb.Phase(["2.*"], max_steps=5, learning_rate=0.1), PHASES[1]))
    assert [(p.steps, p.lost_steps) for p in result.statement.phases] == [(4, 1), (4, 3)]
    assert (result.steps, result.charged_steps) == (8, 4)
    assert result.epsilon <= 8
    PrivacyStatement.load(tmp_path / "over", verify=True)
    assert result.epsilon == epsilon_of_phases([(SAMPLERS[0], 5), (SAMPLERS[1], 7)], result.noise_multiplier, DELTA)


def test_epsilon_so_far_counts_what_a_later_phase_has_lost_already(tmp_path: Path) -> None:
    """One crash loses the last step of the first phase and three of the second; the first phase then goes on."""
    crashed(tmp_path, step=8, checkpoint_every=4, **FIXED)
    infos: list[StepInfo] = []
    phases = (dpb.Phase(["2.*"], max_steps=5, learning_rate=0.1), PHASES[1])
    result = run_phases(tmp_path, phases=phases, callbacks=[infos.append], **FIXED)
    assert [(p.steps, p.lost_steps) for p in result.statement.phases] == [(5, 1), (7, 3)]
    assert (infos[0].step, infos[0].phase, infos[-1].phase) == (5, 0, 1)
    assert infos[0].epsilon >= epsilon_of_phases([(SAMPLERS[0], 6), (SAMPLERS[1], 3)], 1.0, DELTA)
    assert infos[-1].epsilon >= result.epsilon


def test_a_run_given_up_in_its_second_phase_is_paid_for_phase_by_phase(tmp_path: Path) -> None:
    crashed(tmp_path, step=8)
    result = run(tmp_path, resume=False, overwrite=True, **FIXED)
    assert [(r.sample_rate, r.steps) for r in result.statement.prior] == [(RATES[0], 5), (RATES[1], 3)]


@pytest.mark.parametrize(
    "phases",
    [(PHASES[0],), (dpb.Phase(["2.*"], max_steps=5), dpb.Phase(max_steps=7)), (PHASES[1], PHASES[0])],
    ids=["one less", "another rate", "another order"],
)
def test_other_phases_are_another_plan_and_are_refused(phases: Any, whole: Any, tmp_path: Path) -> None:
    sigma = {"target_epsilon": None, "noise_multiplier": whole[0].noise_multiplier}
    crashed(tmp_path, step=2, **sigma)
    with pytest.raises(CheckpointError, match="another privacy plan"):
        run_phases(tmp_path, phases=phases, **sigma)
    assert same(parameters(run_phases(tmp_path, **sigma).model), parameters(whole[0].model))


# -- the ledger -------------------------------------------------------------------------------------------------------


@given(
    st.lists(st.integers(1, 6), min_size=1, max_size=4),
    st.booleans(),
    st.lists(st.tuples(st.integers(0, 5), st.integers(0, 4)), max_size=6),
)
def test_no_phase_is_ever_charged_more_than_its_plan_and_no_step_has_two_phases(
    planned: list[int], shortened: bool, crashes: list[tuple[int, int]]
) -> None:
    ledger, step, spent = StepLedger(planned, shortened=shortened), 0, [0] * len(planned)
    for forward, lost in [*crashes, (99, 0)]:
        for _ in range(min(forward, ledger.total - step)):
            spent[ledger.phase_of(step)] += 1
            step += 1
        assert ledger.taken(step) == [s - c for s, c in zip(spent, ledger.charged, strict=True)]
        for number in range(step, min(step + lost, ledger.total)):
            spent[ledger.phase_of(number)] += 1
        ledger.charge(step, min(lost, ledger.total - step))
    assert step == ledger.total
    extra = [0] * len(planned) if shortened else ledger.charged
    assert spent == [p + c for p, c in zip(planned, extra, strict=True)]


# -- privacy.json -----------------------------------------------------------------------------------------------------


def test_privacy_json_lists_the_phases_and_their_graphs(whole: Any) -> None:
    result, folder, _, _ = whole
    statement = PrivacyStatement.load(folder, verify=True)
    assert statement == result.statement
    x, y = points().tensors
    content = statement.to_dict()
    for index, phase in enumerate(content["phases"]):
        asked, batch = PHASES[index].trainable, SAMPLERS[index].expected_batch_size
        step = dpb.compile(mlp(), mlp_loss, (x[:4], y[:4]), trainable=asked)  # type: ignore[arg-type]
        assert phase == {
            "trainable": asked,
            "num_trainable": step.num_trainable,
            "planned_steps": STEPS[index],
            "steps": STEPS[index],
            "lost_steps": 0,
            "sample_rate": RATES[index],
            "expected_batch_size": batch,
            "noise_multiplier": result.noise_multiplier,
            "max_grad_norm": 1.0,
            "clipping": "automatic",
            "gamma": 0.01,
            "graph_hash": step.with_noise(result.noise_multiplier, batch).graph_hash,
        }
    assert (content["steps"], content["num_trainable"], content["sample_rate"]) == (12, 14 + 6, RATES[0])
    summary = (folder / "summary.md").read_text()
    assert '1. trainable ["2.*"] (14 parameters): 5 steps' in summary and "2. trainable bias (8 param" in summary


def test_a_statement_whose_phases_were_taken_out_or_edited_is_refused(whole: Any) -> None:
    content = whole[0].statement.to_dict()
    bare = PrivacyStatement.from_dict({name: value for name, value in content.items() if name != "phases"})
    with pytest.raises(PrivacyError, match="Do not rely on it"):
        bare.verify()
    assert bare.recompute_epsilon() > content["epsilon"]
    first, second = content["phases"]
    edits: list[Any] = [
        [],
        [first],
        [first, second, second],
        [first, {**second, "steps": 6}],
        [first, {**second, "sample_rate": 0.01}],
        [{**first, "sample_rate": 0.01, "expected_batch_size": 1.2}, second],
        [first, {**second, "noise_multiplier": 50.0}],
        [first, {**second, "lost_steps": 1.0}],
        [first, {**second, "graph_hash": first["graph_hash"]}],
        [first, {**second, "gamma": None}],
        [first, {**second, "clipping": "flat", "gamma": None}],
        [{**first, "planned_steps": 0}, second],
        [first, {n: v for n, v in second.items() if n != "steps"}],
        [first, {**second, "trainable": 3}],
        "bias",
    ]
    for phases in edits:
        with pytest.raises(PrivacyError):
            PrivacyStatement.from_dict({**content, "phases": phases})
    own = PrivacyStatement.from_dict(content).as_prior_runs()
    with pytest.raises(PrivacyError, match="its own run"):
        PrivacyStatement.from_dict({**content, "prior": [own[1].to_dict()]})


# -- bad input --------------------------------------------------------------------------------------------------------

Phase = dpb.Phase
BAD: dict[str, tuple[Callable[[], dict[str, Any]], type[DPBitFitError], str]] = {
    "no phases": (lambda: {"phases": []}, PrivacyError, "phases is empty"),
    "one phase, not a list": (lambda: {"phases": Phase(max_steps=1)}, PrivacyError, "a list of"),
    "something else": (lambda: {"phases": [{"epochs": 1}]}, PrivacyError, "a list of"),
    "steps twice": (lambda: {"max_steps": 3}, PrivacyError, "its own epochs or max_steps"),
    "epochs twice": (lambda: {"epochs": 3}, PrivacyError, "its own epochs or max_steps"),
    "a phase without steps": (lambda: {"phases": [PHASES[0], Phase()]}, PrivacyError, "Phase 2 of 2: .*either epochs"),
    "a pattern that matches nothing": (
        lambda: {"phases": [PHASES[0], Phase(["head.*"], max_steps=2)]},
        CompileRefused,
        r"Phase 2 of 2: .*'head\.\*' matches no parameter",
    ),
    "a learning rate below zero": (
        lambda: {"phases": [PHASES[0], Phase(max_steps=2, learning_rate=-1.0)]},
        PrivacyError,
        "Phase 2 of 2: learning_rate",
    ),
    "an optimizer object": (
        lambda: {"phases": [Phase(max_steps=2, optimizer=momentum(list(mlp().parameters()))), PHASES[1]]},  # type: ignore[arg-type]
        PrivacyError,
        "Phase 1 of 2: optimizer is an Optimizer object",
    ),
}


@pytest.mark.parametrize("what", BAD)
def test_bad_phases_are_refused_before_anything_is_trained(what: str, tmp_path: Path) -> None:
    changes, error, message = BAD[what]
    model = mlp()
    with pytest.raises(error, match=f"(?s){message}"):
        run_phases(tmp_path / "out", model=model, **(FIXED | changes()))
    assert not any((tmp_path / "out").rglob("*")) and same(parameters(model), parameters(mlp()))
