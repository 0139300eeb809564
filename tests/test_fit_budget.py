"""What was spent is never forgotten: a kill at any file operation, lost files, a second run on the same records."""

from __future__ import annotations

import itertools
import os
import re
import shutil
import sys
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from fit_cases import RECORDS, biases, mlp, momentum, points, run
from torch.utils.data import ConcatDataset, Subset, TensorDataset

from dpbitfit_fx.accounting import epsilon_of_phases
from dpbitfit_fx.checkpoint import CheckpointStore
from dpbitfit_fx.errors import ArtifactError, CheckpointError, DataError, PrivacyError, PrivacyWarning
from dpbitfit_fx.fit import FitResult
from dpbitfit_fx.privacy_statement import PrivacyStatement
from dpbitfit_fx.progress import StepInfo
from dpbitfit_fx.randomness import SecretKey
from dpbitfit_fx.sampling import PoissonSampler

FIXED = {"target_epsilon": None, "noise_multiplier": 1.0}
RATE = 20 / RECORDS


def spent(steps: int) -> float:
    return epsilon_of_phases([(PoissonSampler(RECORDS, RATE, max(1, steps)), steps)], 1.0, 1e-3)


# -- killed at every file operation -----------------------------------------------------------------------------------


class Killed(BaseException):
    """As SIGKILL: nothing that the process would still do to its files is done."""


class Kill:
    """Counts the operations on files; from the `at`-th on none is carried out."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.count, self.at = 0, sys.maxsize
        for name in ("open", "write", "fsync", "replace", "unlink", "rmdir", "mkdir"):
            patch.setattr(os, name, self._counted(getattr(os, name)))

    def _counted(self, operation: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*arguments: Any, **names: Any) -> Any:
            self.count += 1
            if self.count >= self.at:
                raise Killed
            return operation(*arguments, **names)

        return wrapped

    def during(self, call: Callable[[], FitResult], at: int) -> FitResult | None:
        """The result of `call`, or None where it was killed at its `at`-th operation."""
        self.count, self.at = 0, at
        try:
            return call()
        except Killed:
            return None
        finally:
            self.at = sys.maxsize


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., FitResult]]:
    """A run of 5 steps, checkpoints every 2, on one model that is compiled once for all runs."""
    module, model, data = sys.modules["dpbitfit_fx.fit"], mlp(), points()
    start = {name: value.clone() for name, value in model.state_dict().items()}
    built: list[Any] = []
    build = module.build_engine

    def once(*arguments: Any, **names: Any) -> Any:
        if not built:
            built.append(build(*arguments, **names))
        return built[0]

    monkeypatch.setattr(module, "build_engine", once)
    monkeypatch.setattr(module, "warn_of_earlier_runs", lambda *_: None)

    def go(folder: Path | None, **changes: Any) -> FitResult:
        model.load_state_dict(start)
        plan: dict[str, Any] = {"model": model, "dataset": data, "max_steps": 5, "checkpoint_every": 2, **FIXED}
        return run(folder, **(plan | changes))

    yield go


def test_a_run_killed_at_any_file_operation_ends_bit_for_bit_where_the_uninterrupted_one_does(
    short: Callable[..., FitResult], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = biases(short(None).model).clone()
    kill = Kill(monkeypatch)
    for at in itertools.count(1):
        folder = tmp_path / str(at)
        if kill.during(partial(short, folder), at) is not None:
            break
        try:
            result = short(folder)
        except ArtifactError as error:  # killed while tidying up
            assert "finished run" in str(error), at
            assert PrivacyStatement.load(folder).epsilon == spent(5)
            assert not list(folder.rglob("key-*")) and not list(folder.rglob("checkpoint.json")), at
        else:
            assert torch.equal(biases(result.model), whole), at
            assert (result.epsilon, result.charged_steps, result.statement.prior) == (spent(5), 0, ()), at
        shutil.rmtree(folder)
    assert at > 100  # every operation of five saves and of the results


@pytest.mark.parametrize("lost", [0, 1], ids=["nothing lost", "a step lost"])
def test_a_kill_at_any_file_operation_of_a_charge_resumes_and_pays_once(
    lost: int, short: Callable[..., FitResult], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed_at_record(number: int) -> Callable[..., Any]:
        record, calls = CheckpointStore.record, itertools.count(1)

        def wrapped(store: CheckpointStore, entry: Any) -> None:
            if next(calls) == number:
                raise Killed
            record(store, entry)

        return wrapped

    begun = tmp_path / "begun"
    with monkeypatch.context() as patch:
        patch.setattr(CheckpointStore, "record", killed_at_record(3 + lost))
        with pytest.raises(Killed):
            short(begun)

    def folder(name: str) -> Path:
        return Path(shutil.copytree(begun, tmp_path / name))

    slower = {"learning_rate": 0.05}
    reference = short(folder("whole"), **slower)
    want, cost = biases(reference.model).clone(), reference.epsilon
    assert (cost, reference.charged_steps) == (spent(5 + lost), lost)
    kill = Kill(monkeypatch)

    def first_step_only(info: StepInfo) -> None:
        raise Killed

    for at in itertools.count(1, 1 + 2 * lost):
        cut = folder(str(at))
        kill.during(partial(short, cut, callbacks=[first_step_only], **slower), at)
        over, third = kill.count < at, Path(shutil.copytree(cut, tmp_path / f"{at}-third"))
        result = short(cut, **slower)
        assert torch.equal(biases(result.model), want), at
        assert (result.epsilon, result.charged_steps) == (cost, lost), at
        if over:  # the callback ended it: the charge was complete, and a step under the new key was seen
            break
        # The step under the new key may be in the journal by now; then it counts too.
        again = b'"step": 2' in (third / "checkpoint" / "journal.jsonl").read_bytes()
        other = short(third, optimizer=momentum)
        assert other.charged_steps in ((lost, lost + 1) if again else (lost,)), at
        assert other.epsilon == spent(5 + other.charged_steps), at
        shutil.rmtree(cut)
        shutil.rmtree(third)
    assert at > 20


def test_a_kill_while_a_run_is_given_up_counts_it_once(
    short: Callable[..., FitResult], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(info: StepInfo) -> None:
        if info.step == 3:
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        short(tmp_path / "begun", callbacks=[stop])
    kill = Kill(monkeypatch)
    for at in itertools.count(1, 3):
        cut = Path(shutil.copytree(tmp_path / "begun", tmp_path / str(at)))
        done = kill.during(partial(short, cut, resume=False, overwrite=True), at)
        given_up = bool(list(cut.glob("privacy-abandoned-*")))
        if done is None:
            try:
                done = short(cut)
            except ArtifactError:
                assert PrivacyStatement.load(cut).epsilon == spent(8)
                continue
        assert done.epsilon == (spent(8) if given_up else spent(5)), at
        if kill.count < at:
            break
        shutil.rmtree(cut)
    assert at > 50


# -- files that are lost ----------------------------------------------------------------------------------------------


def unfinished(folder: Path, at: int = 5, **changes: Any) -> None:
    def stop(info: StepInfo) -> None:
        if info.step == at:
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        run(folder, callbacks=[stop], **(FIXED | changes))


@pytest.mark.parametrize(
    "lost, counted",
    [("key-*.json", 5), ("state-*.safetensors", 5), ("journal.jsonl", 12)],
    ids=["key", "state", "journal"],
)
def test_an_unfinished_run_beside_an_older_result_is_not_forgotten_when_its_files_are_lost(
    lost: str, counted: int, tmp_path: Path
) -> None:
    """It may have taken 5 steps; without its journal nobody knows how many, so all 12 count."""
    finished = run(tmp_path, max_steps=4, **FIXED)
    unfinished(tmp_path, overwrite=True)
    for path in (tmp_path / "checkpoint").glob(lost):
        path.unlink()
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    for plan in ({}, {"overwrite": True}):
        with pytest.raises(CheckpointError, match="resume=False, overwrite=True"):
            run(tmp_path, **FIXED, **plan)
        assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    after = run(tmp_path, resume=False, overwrite=True, **FIXED)
    assert sorted(earlier.steps for earlier in after.statement.prior) == [4, counted]
    assert finished.statement.run_id in {earlier.run_id for earlier in after.statement.prior}
    assert after.epsilon == spent(4 + counted + 12)


def test_steps_that_a_run_took_beyond_its_result_are_not_forgotten_with_its_key(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped before its key was erased, continued under a longer plan, stopped again: one run, one id, one old result."""
    with monkeypatch.context() as patch:

        def die(store: CheckpointStore) -> None:
            raise Killed

        patch.setattr(CheckpointStore, "erase", die)
        with pytest.raises(Killed):
            run(tmp_path, max_steps=4, **FIXED)
    unfinished(tmp_path, at=6)
    for path in (tmp_path / "checkpoint").glob("key-*.json"):
        path.unlink()
    with pytest.raises(CheckpointError, match="resume=False, overwrite=True"):
        run(tmp_path, **FIXED)
    assert run(tmp_path, resume=False, overwrite=True, **FIXED).epsilon == spent(6 + 12)


def test_a_finished_run_whose_key_was_half_erased_is_finished(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def die(path: Path) -> None:
        Path(path).write_bytes(b"\x93" * 80)
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(SecretKey, "erase_file", staticmethod(die))
        with pytest.raises(Killed):
            run(tmp_path, checkpoint_every=99, **FIXED)
    with pytest.raises(ArtifactError, match="finished run"):
        run(tmp_path, **FIXED)
    assert not (tmp_path / "checkpoint").exists() and PrivacyStatement.load(tmp_path).epsilon == spent(12)


# -- another run on the same records ----------------------------------------------------------------------------------


def test_a_run_that_overwrites_another_counts_it(tmp_path: Path) -> None:
    for number in (1, 2, 3):
        result = run(tmp_path, overwrite=True, **FIXED)
        assert result.epsilon == spent(12 * number)
    assert len(list(tmp_path.glob("privacy-earlier-*.json"))) == 2
    with pytest.raises(PrivacyError, match=r"already spend.*privacy\.json.*choose another output_dir"):
        run(tmp_path, overwrite=True, target_epsilon=1.0)
    again = run(tmp_path, overwrite=True, prior=result.statement, **FIXED)
    assert again.epsilon == spent(48)  # named twice, counted once


def test_an_overwriting_run_that_was_interrupted_goes_on_with_the_same_earlier_runs(tmp_path: Path) -> None:
    run(tmp_path, **FIXED)
    unfinished(tmp_path, overwrite=True)
    result = run(tmp_path, **FIXED)
    assert (result.charged_steps, result.epsilon) == (0, spent(24))


class Rows(torch.utils.data.Dataset[Any]):
    def __init__(self) -> None:
        self.rows = points()

    def __len__(self) -> int:
        return RECORDS

    def __getitem__(self, index: int) -> Any:
        return self.rows[index]


MAKERS: dict[str, Callable[[], Any]] = {
    "dataset": points,
    "own class": Rows,
    "list": lambda: [{"0": x, "1": y} for x, y in zip(*points().tensors, strict=True)],
}


def loss_of(model: Any, batch: Any) -> Any:
    x, y = (batch["0"], batch["1"]) if isinstance(batch, dict) else batch
    return torch.nn.functional.cross_entropy(model(x), y, reduction="none")


@pytest.mark.parametrize("kind", MAKERS)
def test_a_second_run_on_the_same_dataset_object_warns_unless_it_counts_the_first(kind: str) -> None:
    data, plan = MAKERS[kind](), {"loss_fn": loss_of, "max_steps": 2, **FIXED}
    with warnings.catch_warnings():
        warnings.simplefilter("error", PrivacyWarning)
        first = run(None, dataset=data, **plan)
    with pytest.warns(PrivacyWarning, match=f"not counted in this one .{first.statement.run_id}.*prior=") as caught:
        second = run(None, dataset=data, **plan)
    assert caught[0].filename.endswith("fit_cases.py")
    with warnings.catch_warnings():
        warnings.simplefilter("error", PrivacyWarning)
        run(None, dataset=data, prior=[first.statement, second.statement], **plan)
        run(None, dataset=MAKERS[kind](), **plan)


def test_subsets_of_one_dataset_warn_only_where_they_overlap(tmp_path: Path) -> None:
    data, plan = points(), {"max_steps": 2, "expected_batch_size": 10, **FIXED}
    with warnings.catch_warnings():
        warnings.simplefilter("error", PrivacyWarning)
        run(None, dataset=Subset(data, range(0, 60)), **plan)
        run(None, dataset=Subset(data, range(60, 100)), **plan)
    with pytest.warns(PrivacyWarning, match="2 earlier run"):
        run(None, dataset=Subset(Subset(data, range(50, 120)), list(range(20))), **plan)


def test_resuming_is_no_second_run(tmp_path: Path) -> None:
    data = points()
    unfinished(tmp_path, dataset=data)
    with warnings.catch_warnings():
        warnings.simplefilter("error", PrivacyWarning)
        run(tmp_path, dataset=data, **FIXED)


# -- one record, one row ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "twice, rows",
    [
        (lambda data: Subset(data, [*range(50), 7, 3]), "3 and 51"),
        (lambda data: Subset(data, torch.tensor([*range(50), -120]).tolist()), "0 and 50"),
        (lambda data: Subset(Subset(data, range(10, 60)), [*range(50), 49]), "49 and 50"),
        (lambda data: ConcatDataset([Subset(data, range(60)), Subset(data, range(59, 100))]), "59 and 60"),
        (lambda data: ConcatDataset([data, data]), "0 and 120"),
        (lambda data: (items := [{"0": x, "1": y} for x, y in data]) + items[:1], "0 and 120"),
    ],
    ids=["subset", "negative index", "subset of subset", "overlapping parts", "twice", "list"],
)
def test_a_record_that_is_in_the_dataset_twice_is_refused(twice: Callable[[Any], Any], rows: str) -> None:
    with pytest.raises(DataError, match=f"Rows {rows} of the dataset are the same record"):
        run(None, dataset=twice(points()), loss_fn=loss_of, **FIXED)


def test_equal_rows_and_subsets_without_repetition_are_left_alone() -> None:
    data, plan = points(), {"loss_fn": loss_of, "max_steps": 1, "expected_batch_size": 10, **FIXED}
    x, y = data.tensors
    equal = TensorDataset(x[:1].expand(40, 4), y[:1].expand(40))
    datasets: tuple[Any, ...] = (
        Subset(data, torch.randperm(RECORDS).tolist()),
        ConcatDataset([Subset(data, range(60)), Subset(data, range(60, 100))]),
        ConcatDataset([data, points()]),
        equal,
        [(1.0, 2.0, 3.0, 4.0)] * 40,
    )
    for dataset in datasets:
        loss = (lambda m, b: m(torch.stack(list(b), 1)).pow(2).sum(1)) if isinstance(dataset, list) else loss_of
        run(None, dataset=dataset, **(plan | {"loss_fn": loss}))


# -- stopped without a folder -----------------------------------------------------------------------------------------


class Stopped(torch.optim.SGD):
    """Ctrl-C within the fifth update: its noise is drawn already."""

    def __init__(self, *arguments: Any, **names: Any) -> None:
        super().__init__(*arguments, **names)
        self.left = 5

    def step(self, closure: Any = None) -> Any:
        self.left -= 1
        if not self.left:
            raise KeyboardInterrupt
        return super().step(closure)


def test_ctrl_c_without_a_folder_says_what_was_spent_and_carries_it_as_a_prior() -> None:
    with pytest.raises(KeyboardInterrupt) as caught:
        run(None, optimizer=Stopped, **FIXED)
    text, statement = str(caught.value), caught.value.statement  # type: ignore[attr-defined]
    assert re.search(r"4 private steps were taken and 1 more charged, epsilon = \d+\.\d+ at delta = 0\.001", text)
    assert "no output_dir" in text and "prior=" in text
    assert (statement.steps, statement.lost_steps, statement.epsilon) == (4, 1, spent(5))
    assert run(None, prior=statement, **FIXED).epsilon == spent(17)


def test_any_other_error_without_a_folder_warns_of_what_was_spent() -> None:
    def stop(info: StepInfo) -> None:
        if info.step == 3:
            raise RuntimeError("stop")

    with pytest.warns(PrivacyWarning, match="3 private steps were taken, epsilon ="), pytest.raises(RuntimeError):
        run(None, callbacks=[stop], **FIXED)
