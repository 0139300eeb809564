"""The runner without torch: a run that was killed goes on bit for bit, or pays; a plan beyond its budget never starts."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

import numpy as np
import pytest

pytest.importorskip("onnx")
pytest.importorskip("onnxscript")
pytest.importorskip("onnxruntime")

from fit_cases import Crash, crash_at
from onnx_cases import compiled, has_ort_training
from ort_zygote import BATCH, DELTA, RECORDS, SIGMA, STEPS
from typer.testing import CliRunner, Result

import dpbitfit_fx as dpb
from dpbitfit_fx.accounting import epsilon
from dpbitfit_fx.biases import read_biases
from dpbitfit_fx.cli import app
from dpbitfit_fx.errors import ArtifactError, CheckpointError, DataError, PrivacyError
from dpbitfit_fx.files import sha256_file
from dpbitfit_fx.ledger import Ledger
from dpbitfit_fx.ort_backends import PlainBackend
from dpbitfit_fx.ort_export import export_ort_training
from dpbitfit_fx.ort_runner import OrtTrainer, Schedule
from dpbitfit_fx.privacy_statement import PrivacyStatement
from dpbitfit_fx.sampling import PoissonSampler

Exports = tuple[dict[str, Path], dict[str, Any]]


@pytest.fixture(scope="module")
def exports(tmp_path_factory: pytest.TempPathFactory) -> Exports:
    """One small step for each target that this environment can run, and its records."""
    step, data = compiled("mlp")
    folder = tmp_path_factory.mktemp("exports")
    made = {"onnx": dpb.export_onnx(step, folder / "onnx")}
    if has_ort_training():
        made["ort_training"] = export_ort_training(step, folder / "ort_training")
    arrays: dict[str, Any] = {name: value.numpy() for name, value in data.items()}
    np.savez(folder / "data.npz", **arrays)
    return made, arrays


@pytest.fixture(scope="module")
def plain(exports: Exports) -> Callable[..., OrtTrainer]:
    """`plain(folder, **changes)`: the reference run of 12 steps, checkpoints every 3, deterministic."""

    def make(output: Path | None, **changes: Any) -> OrtTrainer:
        usual: dict[str, Any] = {
            "artifacts": exports[0]["onnx"], "data": exports[1], "steps": 12, "target_delta": DELTA, "output_dir": output,
            "physical_batch_size": 4, "checkpoint_every": 3, "insecure_seed_for_tests": 7,
        }  # fmt: skip
        return OrtTrainer(**(usual | changes))

    return make


def crashed(trainer: OrtTrainer, step: int = 5) -> None:
    with trainer, pytest.raises(Crash):
        trainer.train(callbacks=[crash_at(step)])


def finished(trainer: OrtTrainer) -> tuple[np.ndarray[Any, Any], PrivacyStatement]:
    with trainer:
        trainer.train()
        return trainer.flat(), trainer.finish()


def spent(steps: int, sigma: float = SIGMA) -> float:
    return epsilon(PoissonSampler.from_expected_batch_size(RECORDS, BATCH, steps=steps), sigma, DELTA)


# -- kill -9 -----------------------------------------------------------------------------------------------------------


class Zygote:
    """Runs of the command `dpbitfit ort-train`, each a process of its own."""

    def __init__(self, folder: Path) -> None:
        root = str(Path(dpb.__file__).resolve().parents[1])
        command = [sys.executable, str(Path(__file__).with_name("ort_zygote.py")), str(folder / "errors.txt")]
        environment = os.environ | {"PYTHONPATH": root, "OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen(
            command, env=environment, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        self.errors = folder / "errors.txt"

    def _lines(self) -> tuple[IO[str], IO[str]]:
        assert self.process.stdin is not None and self.process.stdout is not None
        return self.process.stdin, self.process.stdout

    def run(self, arguments: list[str], until: Callable[[], bool] | None = None) -> int:
        """The exit code; with `until`, that of a run that is killed as soon as it holds."""
        to, back = self._lines()
        to.write(json.dumps(arguments) + "\n")
        to.flush()
        child = int(back.readline())
        if until is not None:
            while not until() and (Path("/proc") / str(child)).exists():
                time.sleep(0.0005)
            with contextlib.suppress(ProcessLookupError):
                os.kill(child, signal.SIGKILL)
        return int(back.readline())


@pytest.fixture
def zygote(tmp_path: Path) -> Iterator[Zygote]:
    one = Zygote(tmp_path)
    yield one
    one.process.kill()
    one.process.wait()


def after(seconds: float) -> Callable[[], bool]:
    end = time.monotonic() + seconds
    return lambda: time.monotonic() >= end


def results(folder: Path) -> dict[str, Any]:
    """All that a run releases, bit for bit; safetensors orders its metadata anew each time."""
    values, metadata = read_biases(folder / "biases.safetensors")
    bits = {name: (value.dtype.str, value.shape, value.tobytes()) for name, value in values.items()}
    return {"biases": bits, "metadata": metadata, **json.loads((folder / "privacy.json").read_text())}


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs SIGKILL, fork and /proc")
def test_killed_at_20_random_moments_every_run_ends_where_the_uninterrupted_one_does(
    exports: Exports, zygote: Zygote, tmp_path: Path
) -> None:
    """Real processes of the command, without torch, under their own secret key: the reference is a copy of the folder."""

    def command(target: str, output: Path) -> list[str]:
        data = exports[0][target].parent / "data.npz"
        plan = ["--steps", str(STEPS), "--target-delta", str(DELTA), "--checkpoint-every", "4"]
        usual = ["--physical-batch-size", "4", "--lr-schedule", "linear", "--warmup-steps", "3"]
        return ["ort-train", str(exports[0][target]), "--data", str(data), "--output", str(output), *plan, *usual]

    base, whole, seconds = {}, {}, {}
    for target in exports[0]:
        base[target] = tmp_path / f"{target}-base"
        started = (base[target] / "checkpoint" / "checkpoint.json").exists
        assert zygote.run(command(target, base[target]), started) == -9, zygote.errors.read_text()
        reference = tmp_path / f"{target}-reference"
        shutil.copytree(base[target], reference)
        begin = time.monotonic()
        assert zygote.run(command(target, reference)) == 0, zygote.errors.read_text()
        seconds[target] = time.monotonic() - begin
        whole[target] = results(reference)
        assert whole[target]["steps"] == STEPS and whole[target]["epsilon"] == spent(STEPS)

    chance = random.Random(20)
    moments: list[int] = []  # steps in the checkpoint when the process died
    targets = itertools.cycle(exports[0])
    while len(moments) < 20:
        target = next(targets)
        folder = tmp_path / "run"
        shutil.copytree(base[target], folder)
        for _ in range(chance.choice((1, 1, 2))):
            if zygote.run(command(target, folder), after(chance.uniform(0, 1.1 * seconds[target]))) == -9:
                left = folder / "checkpoint" / "checkpoint.json"
                moments.append(json.loads(left.read_text())["step"] if left.exists() else STEPS)
        code = zygote.run(command(target, folder))
        # Code 2: it had finished before it was killed, and says so.
        assert code == 0 or (code == 2 and "finished run" in zygote.errors.read_text()), zygote.errors.read_text()
        assert results(folder) == whole[target], (target, moments)
        assert sorted(os.listdir(folder)) == ["biases.safetensors", "privacy.json", "summary.md"]
        shutil.rmtree(folder)
    assert len(set(moments)) >= 4 and any(0 < m < STEPS for m in moments), moments


def test_the_journal_has_the_step_on_disk_before_its_noise_reaches_the_parameters_and_no_sum_ever_does(
    plain: Callable[..., OrtTrainer], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    update = PlainBackend.update
    seen: list[int] = []

    def spy(self: PlainBackend, noise: Any, learning_rate: float) -> None:
        lines = (tmp_path / "checkpoint" / "journal.jsonl").read_text().splitlines()
        seen.append(json.loads(lines[-1])["step"])
        secret = [self.gradient_buffers().tobytes(), noise.tobytes()]
        files = [path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()]
        assert files and not any(one in content for one in secret for content in files)
        update(self, noise, learning_rate)

    monkeypatch.setattr(PlainBackend, "update", spy)
    finished(plain(tmp_path))
    assert seen == list(range(12))


def test_a_step_interrupted_in_its_middle_is_not_taken_again_by_the_same_trainer(
    plain: Callable[..., OrtTrainer], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = finished(plain(tmp_path / "whole"))[0]
    update = PlainBackend.update
    with plain(tmp_path / "out") as trainer:
        trainer.train(4)

        def interrupt(self: PlainBackend, noise: Any, learning_rate: float) -> None:
            update(self, noise, learning_rate)
            raise KeyboardInterrupt

        monkeypatch.setattr(PlainBackend, "update", interrupt)
        with pytest.raises(KeyboardInterrupt, match=r"4 private steps.*continues"):
            trainer.train()
        monkeypatch.undo()
        with pytest.raises(CheckpointError, match="interrupted in its middle"):
            trainer.train()
        with pytest.raises(CheckpointError, match="interrupted in its middle"):
            trainer.finish()
        assert (trainer.statement().steps, trainer.statement().lost_steps) == (4, 1)
    flat, statement = finished(plain(tmp_path / "out"))
    assert np.array_equal(flat, whole) and statement.lost_steps == 0 and statement.epsilon == spent(12)


# -- what cannot be replayed -------------------------------------------------------------------------------------------

CHANGES: dict[str, dict[str, Any]] = {
    "learning rate": {"learning_rate": 0.05},
    "schedule": {"schedule": Schedule("linear")},
    "physical batch size": {"physical_batch_size": 5},
    "data": {"data": None},
}


@pytest.mark.parametrize("what", CHANGES)
def test_steps_that_cannot_be_replayed_are_charged_and_the_target_still_holds(
    what: str, plain: Callable[..., OrtTrainer], exports: Exports, tmp_path: Path
) -> None:
    target = {"target_epsilon": spent(12)}
    crashed(plain(tmp_path, **target))  # checkpoint at 3; steps 3 and 4 were seen
    change = dict(CHANGES[what])
    if "data" in change:
        change["data"] = exports[1] | {"y": (exports[1]["y"] + 1) % 3}
    _, statement = finished(plain(tmp_path, **target, **change))
    assert (statement.steps, statement.lost_steps) == (10, 2)
    assert statement.epsilon == spent(12)
    PrivacyStatement.load(tmp_path / "privacy.json", verify=True)


def test_without_a_target_all_steps_are_taken_and_epsilon_counts_the_lost_ones(
    plain: Callable[..., OrtTrainer], tmp_path: Path
) -> None:
    crashed(plain(tmp_path))
    _, statement = finished(plain(tmp_path, learning_rate=0.05))
    assert (statement.steps, statement.lost_steps, statement.epsilon) == (12, 2, spent(14))


def test_other_artifacts_under_the_same_plan_pay_for_the_steps_that_were_seen(
    plain: Callable[..., OrtTrainer], exports: Exports, tmp_path: Path
) -> None:
    other = tmp_path / "other"
    shutil.copytree(exports[0]["onnx"], other)
    manifest = json.loads((other / "manifest.json").read_text())
    (other / "note.txt").write_text("another export of the same model")
    manifest["files"]["note.txt"] = "0" * 64
    (other / "manifest.json").write_text(json.dumps(manifest))
    crashed(plain(tmp_path / "out"))
    with pytest.raises(ArtifactError, match="changed after the export"):
        plain(tmp_path / "out", artifacts=other)
    manifest["files"]["note.txt"] = sha256_file(other / "note.txt")
    (other / "manifest.json").write_text(json.dumps(manifest))
    assert finished(plain(tmp_path / "out", artifacts=other))[1].lost_steps == 2


@pytest.mark.parametrize("what", ["fewer steps", "another target", "an earlier run"])
def test_a_run_that_cannot_be_continued_is_refused_and_nothing_is_lost(
    what: str, plain: Callable[..., OrtTrainer], exports: Exports, tmp_path: Path
) -> None:
    whole = finished(plain(tmp_path / "whole"))[0]
    crashed(plain(tmp_path / "out"))
    files = {path.name: path.read_bytes() for path in (tmp_path / "out" / "checkpoint").iterdir()}
    changes: dict[str, dict[str, Any]] = {
        "fewer steps": {"steps": 4},
        "an earlier run": {"prior": tmp_path / "whole"},
        "another target": {"artifacts": exports[0].get("ort_training")},
    }
    if what == "another target" and "ort_training" not in exports[0]:
        pytest.skip("needs onnxruntime-training-cpu")
    with pytest.raises(CheckpointError, match="Nothing was changed"):
        plain(tmp_path / "out", **changes[what])
    assert {path.name: path.read_bytes() for path in (tmp_path / "out" / "checkpoint").iterdir()} == files
    flat, statement = finished(plain(tmp_path / "out"))
    assert np.array_equal(flat, whole) and statement.lost_steps == 0


def test_pytorchs_fit_and_the_runner_refuse_each_others_unfinished_runs(
    plain: Callable[..., OrtTrainer], tmp_path: Path
) -> None:
    from fit_cases import run

    crashed(plain(tmp_path / "one"))
    with pytest.raises(CheckpointError, match="unfinished run"):
        run(tmp_path / "one")
    with pytest.raises(Crash):
        run(tmp_path / "two", callbacks=[crash_at(5)])
    with pytest.raises(CheckpointError, match="of other artifacts"):
        plain(tmp_path / "two")
    with plain(tmp_path / "two", resume=False, overwrite=True) as trainer:
        assert [earlier.steps for earlier in trainer.plan.prior] == [5]


def test_a_run_that_is_given_up_is_still_paid_for(plain: Callable[..., OrtTrainer], tmp_path: Path) -> None:
    crashed(plain(tmp_path))
    with pytest.raises(CheckpointError, match="resume=False"):
        plain(tmp_path, resume=False)
    _, statement = finished(plain(tmp_path, resume=False, overwrite=True))
    assert [earlier.steps for earlier in statement.prior] == [5]  # 3 in the checkpoint, 2 that may have been seen
    assert statement.epsilon == spent(17)


def test_a_finished_run_is_replaced_only_when_asked_and_is_then_counted(
    plain: Callable[..., OrtTrainer], tmp_path: Path
) -> None:
    finished(plain(tmp_path))
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(ArtifactError, match="finished run"):
        plain(tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    _, statement = finished(plain(tmp_path, overwrite=True, insecure_seed_for_tests=8))
    assert statement.epsilon == spent(24)
    assert [path.read_bytes() for path in tmp_path.glob("privacy-earlier-*.json")] == [before["privacy.json"]]


def test_two_trainers_cannot_share_a_folder(plain: Callable[..., OrtTrainer], tmp_path: Path) -> None:
    with plain(tmp_path), pytest.raises(CheckpointError, match="Another process"):
        plain(tmp_path)
    finished(plain(tmp_path))


# -- the plan ----------------------------------------------------------------------------------------------------------


def test_a_plan_beyond_the_target_is_refused_with_the_most_steps_that_fit(plain: Callable[..., OrtTrainer]) -> None:
    with pytest.raises(PrivacyError, match="At most 7 steps stay within it"):
        plain(None, target_epsilon=(spent(7) + spent(8)) / 2)
    assert plain(None, steps=7, target_epsilon=spent(7)).train() == 7


def test_earlier_runs_are_composed_and_counted_against_the_target(
    plain: Callable[..., OrtTrainer], tmp_path: Path
) -> None:
    finished(plain(tmp_path / "first", steps=6))
    again: dict[str, Any] = {"prior": [tmp_path / "first" / "privacy.json"], "insecure_seed_for_tests": 8}
    _, statement = finished(plain(tmp_path / "second", steps=6, **again))
    assert statement.epsilon == spent(12)
    with pytest.raises(PrivacyError, match=r"1 earlier run\(s\).*At most 6 steps"):
        plain(None, target_epsilon=spent(12), **again)


def test_no_step_is_taken_beyond_the_plan(plain: Callable[..., OrtTrainer]) -> None:
    trainer = plain(None)
    trainer.train()
    with pytest.raises(PrivacyError, match="0 steps left"):
        trainer.train(1)


@pytest.mark.parametrize(
    ("schedule", "factors"),
    [
        (Schedule(), [1, 1, 1, 1, 1, 1]),
        (Schedule("constant", 2), [1 / 2, 1, 1, 1, 1, 1]),
        (Schedule("linear"), [1, 5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6]),
        (Schedule("linear", 2), [1 / 2, 1, 1, 3 / 4, 2 / 4, 1 / 4]),
    ],
    ids=lambda value: str(value.to_dict()) if isinstance(value, Schedule) else "",
)
def test_the_scheduled_rate_is_what_reaches_the_optimizer_and_what_callbacks_see(
    schedule: Schedule, factors: list[float], plain: Callable[..., OrtTrainer], monkeypatch: pytest.MonkeyPatch
) -> None:
    used: list[float] = []
    monkeypatch.setattr(PlainBackend, "update", lambda self, noise, learning_rate: used.append(learning_rate))
    shown: list[float] = []
    trainer = plain(None, steps=6, schedule=schedule, learning_rate=0.1)
    trainer.train(callbacks=[lambda info: shown.append(info.learning_rate)])
    assert used == shown == pytest.approx([0.1 * factor for factor in factors])


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"schedule": Schedule("constant", 13)}, PrivacyError, "more than the 12 planned"),
        ({"learning_rate": float("nan")}, PrivacyError, "learning_rate"),
        ({"physical_batch_size": 0}, DataError, "physical_batch_size"),
        ({"dataset_size": 25}, DataError, "declared dataset_size is 25"),
        ({"target_delta": 0.5}, PrivacyError, "1/N"),
        ({"steps": None}, PrivacyError, "steps"),
        ({"target_epsilon": -1.0}, PrivacyError, "target_epsilon"),
        ({"checkpoint_every": 0}, PrivacyError, "checkpoint_every"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_an_unusable_plan_is_refused_before_anything_is_left_in_the_folder(
    change: dict[str, Any], error: type[Exception], words: str, plain: Callable[..., OrtTrainer], tmp_path: Path
) -> None:
    with pytest.raises(error, match=words):
        plain(tmp_path / "out", **change)
    assert not (tmp_path / "out").exists() or os.listdir(tmp_path / "out") == []


@pytest.mark.parametrize(("bad", "words"), [(np.zeros(9), r"shape \(9,\)"), (["a"] * 5, "type"), (None, "type")])
def test_a_record_that_does_not_fit_is_refused_by_its_row_before_anything_is_spent(
    bad: Any, words: str, plain: Callable[..., OrtTrainer], exports: Exports, tmp_path: Path
) -> None:
    rows = [{"x": exports[1]["x"][row], "y": exports[1]["y"][row]} for row in range(RECORDS)]
    rows[17] = {"x": bad, "y": 0}
    with pytest.raises(DataError, match="Row 17.*" + words):
        plain(tmp_path / "out", data=rows)
    assert not (tmp_path / "out").exists()


def test_a_record_that_is_there_twice_is_refused(
    plain: Callable[..., OrtTrainer], exports: Exports, tmp_path: Path
) -> None:
    """Its clipped gradient would be added twice, and epsilon is that of one row."""
    rows = [{"x": exports[1]["x"][row], "y": exports[1]["y"][row]} for row in range(RECORDS)]
    rows[9] = rows[4]
    with pytest.raises(DataError, match=r"Rows 4 and 9 .* the same record"):
        plain(tmp_path / "out", data=rows)


def test_what_onnx_runtime_says_of_a_record_is_not_repeated(
    plain: Callable[..., OrtTrainer], monkeypatch: pytest.MonkeyPatch
) -> None:
    def stumble(self: PlainBackend, batch: Any, mask: Any, noise: Any) -> None:
        raise RuntimeError("indices element out of data bounds, idx=4711 must be within the inclusive range [-3,2]")

    monkeypatch.setattr(PlainBackend, "accumulate", stumble)
    with pytest.raises(DataError, match=r"step 0.*nothing of it was released") as caught:
        plain(None).train()
    assert "4711" not in str(caught.value) and caught.value.__cause__ is caught.value.__context__ is None


def test_an_unknown_schedule_is_refused() -> None:
    with pytest.raises(PrivacyError, match="constant, linear"):
        Schedule("cosine")


# -- the ledger --------------------------------------------------------------------------------------------------------


def charged(ledger: Ledger) -> list[tuple[int, ...]]:
    return [books.charged for books in ledger.read().runs.values()]


def test_a_run_is_reserved_whole_settled_where_it_stops_and_counted_once_when_it_goes_on(
    plain: Callable[..., OrtTrainer], tmp_path: Path
) -> None:
    ledger = Ledger.create(tmp_path / "ledger", target_epsilon=spent(14), target_delta=DELTA)
    whole = finished(plain(tmp_path / "whole"))[0]
    with plain(tmp_path / "out", ledger=ledger.path) as trainer:
        assert charged(ledger) == [(12,)]
        trainer.train(5)
    assert charged(ledger) == [(5,)]
    with pytest.raises(CheckpointError, match="Pass that ledger"):
        plain(tmp_path / "out")
    flat, statement = finished(plain(tmp_path / "out", ledger=ledger.path))
    assert np.array_equal(flat, whole) and charged(ledger) == [(12,)]
    assert statement.ledger == ledger.read().head().to_dict() and statement.ledger["epsilon"] == spent(12)
    assert PrivacyStatement.load(tmp_path / "out") == statement
    with pytest.raises(PrivacyError, match=r"does not allow this run.*2 steps at this noise"):
        plain(tmp_path / "second", ledger=ledger.path)
    assert os.listdir(tmp_path / "second") == [] and charged(ledger) == [(12,)]
    assert finished(plain(tmp_path / "second", ledger=ledger.path, steps=2))[1].ledger["epsilon"] == spent(14)  # type: ignore[index]


def test_steps_lost_on_top_of_the_plan_are_reserved_first_or_not_redrawn(
    plain: Callable[..., OrtTrainer], tmp_path: Path
) -> None:
    for room, name in ((14, "enough"), (13, "too little")):
        ledger = Ledger.create(tmp_path / f"{name}.ledger", target_epsilon=spent(room), target_delta=DELTA)
        crashed(plain(tmp_path / name, ledger=ledger))  # checkpoint at 3; steps 3 and 4 were seen
        assert charged(ledger) == [(5,)]
        again = {"ledger": ledger, "learning_rate": 0.05}
        if room == 14:
            assert finished(plain(tmp_path / name, **again))[1].lost_steps == 2 and charged(ledger) == [(14,)]
        else:
            with pytest.raises(PrivacyError, match="does not allow"):
                plain(tmp_path / name, **again)
            assert charged(ledger) == [(5,)]
            assert finished(plain(tmp_path / name, ledger=ledger))[1].lost_steps == 0


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs SIGKILL, fork and /proc")
def test_killed_without_torch_the_ledger_holds_the_whole_plan_until_the_run_is_done(
    exports: Exports, zygote: Zygote, tmp_path: Path
) -> None:
    data = exports[0]["onnx"].parent / "data.npz"
    for number, seconds in enumerate((0.05, 0.3, 0.8)):
        ledger = Ledger.create(tmp_path / f"ledger{number}", target_epsilon=spent(STEPS) * 1.01, target_delta=DELTA)
        out = tmp_path / f"out{number}"
        plan = [
            "--steps",
            str(STEPS),
            "--target-delta",
            str(DELTA),
            "--checkpoint-every",
            "4",
            "--ledger",
            str(ledger.path),
        ]
        command = ["ort-train", str(exports[0]["onnx"]), "--data", str(data), "--output", str(out), *plan]
        begun = zygote.run(command, lambda: bool(charged(ledger)))  # noqa: B023 - called at once
        assert begun == -9 and charged(ledger) == [(STEPS,)], zygote.errors.read_text()
        ended = zygote.run(command, after(seconds))
        assert charged(ledger) == [(STEPS,)]
        if ended == -9 and not (out / "privacy.json").exists():
            assert zygote.run(command) == 0, zygote.errors.read_text()
        else:
            zygote.run(command)
        assert charged(ledger) == [(STEPS,)] and json.loads((out / "privacy.json").read_text())["steps"] == STEPS


# -- the command -------------------------------------------------------------------------------------------------------


def invoke(*words: object) -> Result:
    return CliRunner().invoke(app, ["ort-train", *(str(word) for word in words)])


def one_paragraph(result: Result, *parts: str) -> None:
    assert result.exit_code == 2 and "Traceback" not in result.output, result.output
    assert len(result.stderr.strip().splitlines()) == 1, result.stderr
    for part in parts:
        assert part in result.stderr


def test_bad_arguments_and_bad_files_give_one_paragraph(exports: Exports, tmp_path: Path) -> None:
    folder = exports[0]["onnx"]
    data, out = folder.parent / "data.npz", tmp_path / "out"
    plan = ("--steps", 4, "--target-delta", DELTA)
    one_paragraph(invoke(tmp_path / "nowhere", "--data", data, "--output", out), "does not exist")
    one_paragraph(invoke(folder, "--data", tmp_path / "none.npz", "--output", out, *plan), "does not exist")
    one_paragraph(invoke(folder, "--data", data, "--output", out), "target_delta")
    one_paragraph(invoke(folder, "--data", data, "--output", out, *plan, "--lr-schedule", "cosine"), "constant, linear")
    one_paragraph(
        invoke(folder, "--data", data, "--output", out, *plan, "--target-epsilon", 2), "At most", "target of 2"
    )
    one_paragraph(invoke(folder, "--data", data, "--output", out, *plan, "--eval-file", data), "no evaluation model")
    (tmp_path / "text.csv").write_text("text,label\na,b\nc,d\n")
    one_paragraph(invoke(folder, "--data", tmp_path / "text.csv", "--output", out, *plan), "x, y", ".npz")
    (tmp_path / "bad.npz").write_bytes(b"not a zip file")
    one_paragraph(invoke(folder, "--data", tmp_path / "bad.npz", "--output", out, *plan), "not a .npz")
    assert not out.exists() or os.listdir(out) == []
