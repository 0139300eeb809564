"""A run that was killed, interrupted or starved of disk goes on bit for bit, or pays for what it cannot replay."""

from __future__ import annotations

import errno
import os
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from fit_cases import RECORDS, STEPS, Crash, biases, crash_at, mlp, points, run
from torch import Tensor

import dpbitfit_fx
from dpbitfit_fx.accounting import epsilon, solve_noise_multiplier
from dpbitfit_fx.biases import load_biases
from dpbitfit_fx.errors import ArtifactError, CheckpointError
from dpbitfit_fx.fit import StepInfo
from dpbitfit_fx.privacy_statement import PrivacyStatement
from dpbitfit_fx.sampling import PoissonSampler

MOMENTS = (
    "before-journal",
    "journaled-not-released",
    "before-commit",
    "after-commit",
    "in-optimizer",
    "results-written",
)


def crashed(folder: Path, step: int = 5, **changes: Any) -> None:
    with pytest.raises(Crash):
        run(folder, callbacks=[crash_at(step)], **changes)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Tensor:
    return biases(run(tmp_path_factory.mktemp("reference") / "out").model)


@pytest.mark.skipif(os.name != "posix", reason="SIGKILL")
@pytest.mark.parametrize("moment", MOMENTS)
def test_after_kill_9_the_resumed_run_ends_bit_for_bit_where_the_uninterrupted_one_does(
    moment: str, tmp_path: Path, uninterrupted: Tensor
) -> None:
    folder = tmp_path / "out"
    script = Path(__file__).with_name("fit_cases.py")
    root = str(Path(dpbitfit_fx.__file__).resolve().parents[1])
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": root}
    process = subprocess.run([sys.executable, str(script), str(folder), moment], env=environment, capture_output=True)
    assert process.returncode == -9, process.stderr.decode()
    for path in (folder / "checkpoint").iterdir():
        assert stat.S_IMODE(path.stat().st_mode) & 0o077 == 0 or path.name == "lock"
    result = run(folder)
    assert torch.equal(biases(result.model), uninterrupted)
    assert result.steps == STEPS and result.charged_steps == 0
    assert result.epsilon <= 8
    assert torch.equal(biases(load_biases(mlp(), folder / "biases.safetensors")), uninterrupted)
    assert sorted(os.listdir(folder)) == sorted(
        ["biases.safetensors", "privacy.json", "summary.md"]
        + [name for name in os.listdir(folder) if name.startswith("privacy-earlier")]
    )


def test_a_run_killed_while_tidying_up_is_finished(tmp_path: Path, uninterrupted: Tensor) -> None:
    from dpbitfit_fx.checkpoint import CheckpointStore

    with pytest.MonkeyPatch.context() as patch:

        def die(self: CheckpointStore) -> None:
            raise Crash

        patch.setattr(CheckpointStore, "tidy", die)
        with pytest.raises(Crash):
            run(tmp_path)
    with pytest.raises(ArtifactError, match="finished"):
        run(tmp_path)
    assert not (tmp_path / "checkpoint" / "checkpoint.json").exists()
    assert torch.equal(biases(load_biases(mlp(), tmp_path / "biases.safetensors")), uninterrupted)


OPTIMIZERS: dict[str, Any] = {
    "Adam, decaying": {"lr_schedule": lambda step: 1 / (1 + step)},
    "AdamW class": {"optimizer": torch.optim.AdamW},
    "SGD, momentum, cosine": {
        "optimizer": lambda params: torch.optim.SGD(params, lr=0.2, momentum=0.9),
        "lr_schedule": lambda optimizer: torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=STEPS),
    },
    "Adagrad": {"optimizer": torch.optim.Adagrad},
    "RMSprop, centered": {"optimizer": lambda params: torch.optim.RMSprop(params, lr=0.01, centered=True)},
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_any_optimizer_and_schedule_resumes_bit_for_bit(name: str, tmp_path: Path) -> None:
    whole = biases(run(None, **OPTIMIZERS[name]).model)
    crashed(tmp_path, step=8, **OPTIMIZERS[name])
    result = run(tmp_path, **OPTIMIZERS[name])
    assert torch.equal(biases(result.model), whole)
    assert result.charged_steps == 0


class Augmented(torch.utils.data.Dataset[tuple[Tensor, Tensor]]):
    """Every look at a record gives other numbers, as augmentation does."""

    def __len__(self) -> int:
        return RECORDS

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        x, y = points()[index]
        return x + torch.randn(4), y


def test_random_augmentation_replays_too(tmp_path: Path) -> None:
    whole = biases(run(None, dataset=Augmented()).model)
    assert not torch.equal(whole, biases(run(None).model))
    crashed(tmp_path, dataset=Augmented())
    torch.manual_seed(12345)
    result = run(tmp_path, dataset=Augmented())
    assert torch.equal(biases(result.model), whole) and result.charged_steps == 0


def test_history_of_a_resumed_run_is_that_of_the_whole_run(tmp_path: Path) -> None:
    def eval_fn(model: torch.nn.Module) -> dict[str, float]:
        return {"norm": float(biases(model).norm())}

    whole = run(None, eval_fn=eval_fn).history
    crashed(tmp_path, step=8, eval_fn=eval_fn)
    assert run(tmp_path, eval_fn=eval_fn).history == whole
    assert [entry["step"] for entry in whole] == [6, 12]


class Interrupted(torch.optim.SGD):
    """Ctrl-C between two parameters of one update."""

    at = 0

    def step(self, closure: Any = None) -> Any:
        Interrupted.at -= 1
        if Interrupted.at == 0:
            with torch.no_grad():
                self.param_groups[0]["params"][0].add_(1.0)
            raise KeyboardInterrupt
        return super().step(closure)


def test_ctrl_c_in_the_middle_of_a_step_resumes_in_the_same_process_on_the_same_model(tmp_path: Path) -> None:
    Interrupted.at = 0
    whole = biases(run(None, optimizer=Interrupted).model)
    model = mlp()
    Interrupted.at = 5
    with pytest.raises(KeyboardInterrupt, match="continues"):
        run(tmp_path, model=model, optimizer=Interrupted)
    assert all(parameter.grad is None for parameter in model.parameters())
    result = run(tmp_path, model=model, optimizer=Interrupted)
    assert torch.equal(biases(model), whole)
    assert result.charged_steps == 0 and result.epsilon <= 8


def changed_rows() -> torch.utils.data.TensorDataset:
    """Every record's label flipped."""
    x, y = points().tensors
    return torch.utils.data.TensorDataset(x, 1 - y)


CHANGES: dict[str, dict[str, Any]] = {
    "learning rate": {"learning_rate": 0.05},
    "optimizer": {"optimizer": torch.optim.AdamW},
    "physical batch size": {"physical_batch_size": 5},
    "parallel batches": {"parallel_batches": 2},
    "schedule": {"lr_schedule": lambda step: 0.5},
    "data": {"dataset": changed_rows()},
}


@pytest.mark.parametrize("what", CHANGES)
def test_steps_that_cannot_be_replayed_are_charged_and_the_target_still_holds(what: str, tmp_path: Path) -> None:
    crashed(tmp_path, step=5)  # checkpoint at 3; steps 3 and 4 were seen
    result = run(tmp_path, **CHANGES[what])
    assert result.charged_steps == 2
    assert result.steps == STEPS - 2
    assert result.epsilon <= 8
    statement = PrivacyStatement.load(tmp_path / "privacy.json", verify=True)
    assert (statement.steps, statement.lost_steps) == (STEPS - 2, 2)
    sampler = PoissonSampler(RECORDS, 20 / RECORDS, STEPS)
    assert result.epsilon == epsilon(sampler, result.noise_multiplier, 1e-3, steps=STEPS)


def test_the_lost_step_is_redrawn_under_another_key(tmp_path: Path) -> None:
    """Same plan but for a harmless change: were the key kept, the end would be the same."""
    crashed(tmp_path, step=5)
    redrawn = run(tmp_path, lr_schedule=lambda step: 1.0)
    assert redrawn.charged_steps == 2
    short = run(None, max_steps=STEPS, noise_multiplier=redrawn.noise_multiplier, target_epsilon=None)
    assert not torch.equal(biases(redrawn.model), biases(short.model))


def test_a_charge_survives_another_crash(tmp_path: Path) -> None:
    crashed(tmp_path, step=5)
    with pytest.raises(Crash):
        run(tmp_path, learning_rate=0.05, callbacks=[crash_at(4)])
    result = run(tmp_path, learning_rate=0.05)
    assert (result.steps, result.charged_steps) == (STEPS - 2, 2)


def test_without_a_target_all_steps_are_taken_and_epsilon_counts_the_lost_ones(tmp_path: Path) -> None:
    plan = {"target_epsilon": None, "noise_multiplier": 1.0}
    crashed(tmp_path, step=5, **plan)
    result = run(tmp_path, learning_rate=0.05, **plan)
    assert (result.steps, result.charged_steps) == (STEPS, 2)
    sampler = PoissonSampler(RECORDS, 20 / RECORDS, STEPS)
    assert result.epsilon == epsilon(sampler, 1.0, 1e-3, steps=STEPS + 2)


@pytest.mark.parametrize("change", [{"target_epsilon": 4.0}, {"expected_batch_size": 30}], ids=["epsilon", "rate"])
def test_another_privacy_plan_is_refused_and_nothing_is_lost(
    change: dict[str, Any], tmp_path: Path, uninterrupted: Tensor
) -> None:
    crashed(tmp_path)
    with pytest.raises(CheckpointError, match="another privacy plan"):
        run(tmp_path, **change)
    assert torch.equal(biases(run(tmp_path).model), uninterrupted)


def test_a_run_that_is_given_up_is_still_paid_for(tmp_path: Path) -> None:
    crashed(tmp_path, step=5)
    with pytest.raises(CheckpointError, match="resume=False"):
        run(tmp_path, resume=False)
    result = run(tmp_path, resume=False, overwrite=True)
    (earlier,) = result.statement.prior
    assert earlier.steps == 5  # 3 in the checkpoint, 2 that may have been seen
    assert result.epsilon <= 8
    assert result.noise_multiplier > run(None).noise_multiplier


def test_a_finished_folder_is_not_overwritten_unless_asked(tmp_path: Path, uninterrupted: Tensor) -> None:
    run(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(ArtifactError, match="finished run"):
        run(tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    run(tmp_path, overwrite=True, learning_rate=0.2, target_epsilon=None, noise_multiplier=1.0)
    kept = [path for path in tmp_path.glob("privacy-earlier-*.json")]
    assert [path.read_bytes() for path in kept] == [before["privacy.json"]]


def test_two_processes_cannot_train_in_one_folder(tmp_path: Path) -> None:
    def intruder(info: StepInfo) -> None:
        if info.step == 2:
            with pytest.raises(CheckpointError, match="Another process"):
                run(tmp_path)

    run(tmp_path, callbacks=[intruder])


@pytest.mark.parametrize("full_from", [4, STEPS], ids=["at a checkpoint", "at the end"])
def test_a_full_disk_stops_the_run_with_a_clear_error_and_loses_nothing(
    full_from: int, tmp_path: Path, uninterrupted: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = os.write

    def full(descriptor: int, data: Any) -> int:
        if full.on:  # type: ignore[attr-defined]
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(descriptor, data)

    full.on = False  # type: ignore[attr-defined]
    monkeypatch.setattr(os, "write", full)

    def fill(info: StepInfo) -> None:
        full.on = info.step >= full_from  # type: ignore[attr-defined]

    with pytest.raises((CheckpointError, ArtifactError), match="disk is full"):
        run(tmp_path, callbacks=[fill])
    full.on = False  # type: ignore[attr-defined]
    assert not [name for name in os.listdir(tmp_path / "checkpoint") if name.endswith(".tmp")]
    result = run(tmp_path)
    assert torch.equal(biases(result.model), uninterrupted) and result.charged_steps == 0


def test_the_key_is_gone_when_the_run_is_finished(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from dpbitfit_fx.randomness import SecretKey

    erased: list[bytes] = []
    erase_file = SecretKey.erase_file

    def spy(path: Path) -> None:
        erased.append(Path(path).read_bytes())
        erase_file(path)

    monkeypatch.setattr(SecretKey, "erase_file", staticmethod(spy))
    run(tmp_path)
    (secret,) = erased
    import json

    needle = json.loads(secret)["key"].encode()
    assert not any(needle in path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())
    assert not (tmp_path / "checkpoint").exists()


@pytest.mark.parametrize(
    "again",
    [
        {"max_steps": 4},
        {"target_epsilon": 8.0, "noise_multiplier": None},
    ],
)
def test_a_plan_that_would_forget_steps_already_taken_is_refused_and_nothing_is_lost(
    tmp_path: Path, again: dict[str, Any]
) -> None:
    sigma = solve_noise_multiplier(PoissonSampler.from_expected_batch_size(RECORDS, 20, steps=STEPS), 8.0, 1e-3)
    fixed = {"target_epsilon": None, "noise_multiplier": sigma}
    crashed(tmp_path, 8, **fixed)
    files = {path.name: path.read_bytes() for path in (tmp_path / "checkpoint").iterdir()}
    with pytest.raises(CheckpointError, match="Nothing was changed"):
        run(tmp_path, **fixed | again)
    assert {path.name: path.read_bytes() for path in (tmp_path / "checkpoint").iterdir()} == files
    result = run(tmp_path, **fixed)
    assert (result.steps, result.statement.steps, result.charged_steps) == (STEPS, STEPS, 0)


def test_a_longer_plan_continues_an_unfinished_run(tmp_path: Path) -> None:
    fixed = {"target_epsilon": None, "noise_multiplier": 1.0}
    crashed(tmp_path, 8, **fixed)
    result = run(tmp_path, max_steps=STEPS + 3, **fixed)
    assert result.steps == result.statement.steps == STEPS + 3
