"""One budget for all runs on the same records: reserved before the first noise, never under-counted, never spent twice."""

from __future__ import annotations

import errno
import itertools
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from fit_cases import PHASES, RECORDS, STEPS, Crash, biases, crash_at, run, run_phases
from test_fit_budget import FIXED, RATE, Kill, Killed, short, spent
from typer.testing import CliRunner, Result

import dpbitfit_fx
from dpbitfit_fx.accounting import PriorRun, epsilon_of_phases, epsilon_of_runs, solve_noise_multiplier
from dpbitfit_fx.checkpoint import CheckpointStore
from dpbitfit_fx.cli import app
from dpbitfit_fx.errors import ArtifactError, CheckpointError, PrivacyError, PrivacyWarning
from dpbitfit_fx.fit import FitResult
from dpbitfit_fx.ledger import Ledger
from dpbitfit_fx.privacy_statement import PrivacyStatement
from dpbitfit_fx.progress import StepInfo
from dpbitfit_fx.sampling import PoissonSampler

__all__ = ["short"]  # a fixture

DELTA = 1e-3
pytestmark = pytest.mark.skipif(os.name != "posix", reason="flock")


def mechanism(name: str, steps: int, sigma: float = 1.0, rate: float = RATE) -> PriorRun:
    return PriorRun(name, rate, sigma, steps)


@pytest.fixture
def ledger(tmp_path: Path) -> Ledger:
    return Ledger.create(tmp_path / "ledger", target_epsilon=8.0, target_delta=DELTA, name="visits", who="ada")


def reserve(ledger: Ledger, *runs: PriorRun, **more: Any) -> None:
    ledger.reserve(runs, dataset_size=RECORDS, run_delta=DELTA, **more)


def charged(ledger: Ledger) -> dict[str, tuple[int, ...]]:
    return {name: books.charged for name, books in ledger.read().runs.items()}


# -- the books --------------------------------------------------------------------------------------------------------


def test_epsilon_so_far_is_that_of_all_mechanisms_composed_and_not_a_sum(ledger: Ledger) -> None:
    runs = [mechanism("a", 12), mechanism("b", 7, 1.4), mechanism("c", 5, 2.0, 0.5)]
    for one in runs:
        reserve(ledger, one)
    books = ledger.read()
    assert books.epsilon() == books.stated == epsilon_of_runs(runs, DELTA)
    parts = [(PoissonSampler(RECORDS, r.sample_rate, r.steps), r.steps) for r in runs]
    alone = [epsilon_of_phases([part], r.noise_multiplier, DELTA) for part, r in zip(parts, runs, strict=True)]
    assert max(alone) < books.epsilon() < 0.9 * sum(alone)
    assert books.epsilon() == epsilon_of_phases([parts[2]], 2.0, DELTA, prior=runs[:2])


def test_a_run_is_charged_its_reservation_until_it_settles_and_what_it_spent_from_then_on(ledger: Ledger) -> None:
    reserve(ledger, mechanism("a", 12))
    assert charged(ledger) == {"a": (12,)}
    ledger.settle([mechanism("a", 5)])
    assert charged(ledger) == {"a": (5,)} and ledger.read().epsilon() == spent(5)
    reserve(ledger, mechanism("a", 12))  # continued
    assert charged(ledger) == {"a": (12,)}
    ledger.settle([mechanism("a", 3)])  # an early copy of its statement
    assert charged(ledger) == {"a": (5,)}


def test_reserving_or_settling_twice_writes_nothing_new(ledger: Ledger) -> None:
    for call in (partial(reserve, ledger, mechanism("a", 12)), partial(ledger.settle, [mechanism("a", 12)])):
        call()
        before = ledger.path.read_bytes()
        call()
        assert ledger.path.read_bytes() == before
    reserve(ledger, mechanism("a", 12))  # a finished run that is called again has nothing left to spend
    assert ledger.path.read_bytes() == before


def test_a_run_beyond_the_budget_is_refused_with_what_fits_and_what_it_names_does_fit(ledger: Ledger) -> None:
    reserve(ledger, mechanism("a", 30))
    before = ledger.path.read_bytes()
    with pytest.raises(PrivacyError, match=r"does not allow.*What would fit: ") as caught:
        reserve(ledger, mechanism("b", 100))
    text = str(caught.value)
    assert f"epsilon = {spent(30):.2f}" in text.replace(f"{spent(30):.4f}", f"{spent(30):.2f}") and " of 8 at" in text
    assert ledger.path.read_bytes() == before
    advice = text.split("What would fit: ")[1]
    sigma = float(advice.split("noise_multiplier=")[1].split(";")[0])
    target = float(advice.split("target_epsilon=")[1].split()[0])
    steps = int(advice.split("; or ")[-1].split()[0])
    sampler = PoissonSampler(RECORDS, RATE, 100)
    solved = solve_noise_multiplier(sampler, target, DELTA)
    for fits in (mechanism("b", 100, sigma), mechanism("b", 100, solved), mechanism("b", steps)):
        assert ledger.read().epsilon() < epsilon_of_runs([mechanism("a", 30), fits], DELTA) <= 8
        ledger.check([fits], dataset_size=RECORDS, run_delta=DELTA)
    for beyond in (mechanism("b", 100, 0.95 * sigma), mechanism("b", steps + 3)):
        assert epsilon_of_runs([mechanism("a", 30), beyond], DELTA) > 8


def test_earlier_runs_that_the_ledger_does_not_know_are_entered_and_those_it_knows_are_counted_once(
    ledger: Ledger,
) -> None:
    reserve(ledger, mechanism("a", 12))
    ledger.settle([mechanism("a", 12)])
    reserve(ledger, mechanism("b", 2), prior=[mechanism("a", 12), mechanism("old", 4)])
    assert charged(ledger) == {"a": (12,), "old": (4,), "b": (2,)}
    reserve(ledger, mechanism("c", 1), prior=[mechanism("a", 14)])  # it went on without the ledger
    assert charged(ledger) == {"a": (14,), "old": (4,), "b": (2,), "c": (1,)}
    with pytest.raises(PrivacyError, match="other mechanisms"):
        reserve(ledger, mechanism("d", 1), prior=[mechanism("a", 14, sigma=3.0)])


def test_a_new_ledger_never_replaces_a_file_and_wants_a_usable_budget(ledger: Ledger, tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="never replaced"):
        Ledger.create(ledger.path, target_epsilon=80.0, target_delta=DELTA)
    for bad in ({"target_epsilon": 0.0}, {"target_delta": 1.0}, {"name": "two\nlines"}):
        with pytest.raises(PrivacyError):
            Ledger.create(tmp_path / "other", **({"target_epsilon": 1.0, "target_delta": DELTA} | bad))
    assert not (tmp_path / "other").exists()
    with pytest.raises(PrivacyError, match="1/N"):
        ledger.check([mechanism("a", 1)], dataset_size=2000, run_delta=1e-5)


# -- the chain --------------------------------------------------------------------------------------------------------


@pytest.fixture
def lines(ledger: Ledger) -> list[bytes]:
    for name in "abc":
        reserve(ledger, mechanism(name, 3))
        ledger.settle([mechanism(name, 2)])
    return ledger.path.read_bytes().splitlines(keepends=True)


def test_an_edited_removed_repeated_or_moved_line_is_refused(ledger: Ledger, lines: list[bytes]) -> None:
    whole = len(lines)
    changed = {
        "removed": [lines[:i] + lines[i + 1 :] for i in range(whole - 1)],
        "repeated": [lines[: i + 1] + lines[i:] for i in range(whole)],
        "moved": [[*lines[:i], lines[i + 1], lines[i], *lines[i + 2 :]] for i in range(whole - 1)],
        "edited": [
            [*lines[:i], lines[i].replace(b'"steps":3', b'"steps":1'), *lines[i + 1 :]] for i in range(1, whole, 2)
        ],
        "blank": [[*lines, b"\n"]],
        "spaced": [[lines[0].replace(b",", b", ", 1), *lines[1:]]],
    }
    for kind, files in changed.items():
        for content in files:
            ledger.path.write_bytes(b"".join(content))
            with pytest.raises(PrivacyError, match=r"its line \d+ .*no run may spend"):
                ledger.read()
            with pytest.raises(PrivacyError, match="its line"):
                reserve(ledger, mechanism("d", 1))
            assert ledger.path.read_bytes() == b"".join(content), kind


def test_a_line_made_anew_with_its_own_hash_is_seen_by_the_next_one(ledger: Ledger, lines: list[bytes]) -> None:
    from dpbitfit_fx.ledger import _line

    entry = json.loads(lines[1])
    entry["runs"][0]["steps"] = 2
    forged, _ = _line({k: v for k, v in entry.items() if k not in ("sha256", "previous")}, entry["previous"])
    ledger.path.write_bytes(b"".join([lines[0], forged, *lines[2:]]))
    with pytest.raises(PrivacyError, match="line 3 does not follow"):
        ledger.read()


def test_a_cut_tail_is_missed_by_whoever_kept_a_head_and_by_nobody_else(ledger: Ledger, lines: list[bytes]) -> None:
    head = ledger.read().head().to_dict()
    ledger.path.write_bytes(b"".join(lines[:-2]))
    assert ledger.read().epsilon() < epsilon_of_runs([mechanism("x", 6)], DELTA)
    with pytest.raises(PrivacyError, match="has lost lines"):
        ledger.check_holds(head, "somebody")


def test_a_torn_last_line_is_refused_until_it_is_repaired_and_a_copy_is_kept(
    ledger: Ledger, lines: list[bytes]
) -> None:
    for cut in (1, 30, len(lines[-1]) - 1):
        torn = b"".join(lines[:-1]) + lines[-1][:cut]
        ledger.path.write_bytes(torn)
        for use in (ledger.read, partial(reserve, ledger, mechanism("d", 1))):
            with pytest.raises(PrivacyError, match=r"is torn .*ledger repair"):
                use()
        assert ledger.path.read_bytes() == torn
        assert ledger.repair() == cut
        assert charged(ledger)["c"] == (3,)  # the settlement is gone, the reservation stands
        (copy,) = ledger.path.parent.glob("ledger.torn-*")
        assert copy.read_bytes() == torn
        copy.unlink()
        reserve(ledger, mechanism("d", 1))
    with pytest.raises(PrivacyError, match="no torn last line"):
        ledger.repair()


@pytest.mark.parametrize("where", ["write", "fsync"])
def test_a_full_disk_leaves_the_ledger_as_it_was(where: str, ledger: Ledger, monkeypatch: pytest.MonkeyPatch) -> None:
    before, write = ledger.path.read_bytes(), os.write

    def full(descriptor: int, *data: Any) -> int:
        if where == "write" and len(data[0]) > 40:
            return write(descriptor, data[0][:40])
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, where, full)
        with pytest.raises(ArtifactError, match="disk is full"):
            reserve(ledger, mechanism("a", 1))
    assert ledger.path.read_bytes() == before


def test_a_file_system_without_locks_and_a_ledger_that_is_held_are_clear_errors(
    ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    import fcntl

    with monkeypatch.context() as patch:

        def refuse(*_: Any) -> None:
            raise OSError(errno.ENOLCK, "No locks available")

        patch.setattr(fcntl, "flock", refuse)
        with pytest.raises(PrivacyError, match="does not lock files"):
            ledger.read()
    monkeypatch.setattr("dpbitfit_fx.ledger._PATIENCE_S", 0.05)
    with open(ledger.path) as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(PrivacyError, match="Another process has held"):
            reserve(ledger, mechanism("a", 1))
    reserve(ledger, mechanism("a", 1))


# -- processes --------------------------------------------------------------------------------------------------------


def cases(*arguments: object) -> str:
    script = Path(__file__).with_name("ledger_cases.py")
    environment = os.environ | {
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(Path(dpbitfit_fx.__file__).resolve().parents[1]),
    }
    command = [sys.executable, str(script), *(str(argument) for argument in arguments)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_of_eight_processes_at_once_only_as_many_are_granted_as_the_budget_holds(ledger: Ledger) -> None:
    fits = max(n for n in range(1, 9) if spent(30 * n) <= 8)
    assert 1 <= fits < 8
    assert int(cases("race", ledger.path, 8, 30)) == fits
    assert len(charged(ledger)) == fits and ledger.read().epsilon() == spent(30 * fits)


MOMENTS = ("before-reserve", "half-reserved", "reserved", "in-training", "before-settling", "settled")


def test_after_kill_9_at_six_moments_nothing_is_under_counted_and_the_run_goes_on_bit_for_bit(
    short: Callable[..., FitResult], tmp_path: Path
) -> None:
    whole = biases(short(None).model).clone()
    for moment in MOMENTS:
        (tmp_path / moment).mkdir()
        Ledger.create(tmp_path / moment / "ledger", target_epsilon=8.0, target_delta=DELTA)
    assert cases("kill", tmp_path, *MOMENTS).split() == ["-9"] * len(MOMENTS)
    for moment in MOMENTS:
        folder, ledger = tmp_path / moment / "out", Ledger(tmp_path / moment / "ledger")
        if moment == "half-reserved":
            with pytest.raises(PrivacyError, match="is torn"):
                short(folder, ledger=ledger)
            ledger.repair()
        known = charged(ledger)
        assert list(known.values()) == ([(5,)] if moment not in MOMENTS[:2] else []), moment
        result = short(folder, ledger=ledger)
        assert torch.equal(biases(result.model), whole) and result.charged_steps == 0, moment
        assert charged(ledger) == {result.statement.run_id: (5,)}, moment
        assert known in ({}, {result.statement.run_id: (5,)})
        assert ledger.read().runs[result.statement.run_id].reserved is None


# -- fit --------------------------------------------------------------------------------------------------------------


def test_a_kill_at_any_file_operation_never_leaves_fewer_steps_charged_than_were_released(
    short: Callable[..., FitResult],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    whole = biases(short(None).model).clone()
    kill = Kill(monkeypatch)
    released = [0]
    ranges: list[tuple[int, int]] = []

    def marking(method: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*arguments: Any, **names: Any) -> Any:
            first = kill.count
            try:
                return method(*arguments, **names)
            finally:
                ranges.append((first, kill.count + 2))

        return wrapped

    def see(info: StepInfo) -> None:
        released[0] = info.step

    with monkeypatch.context() as patch:
        for name in ("read", "reserve", "settle"):
            patch.setattr(Ledger, name, marking(getattr(Ledger, name)))
        one = Ledger.create(tmp_path / "one", target_epsilon=8.0, target_delta=DELTA)
        kill.during(partial(short, tmp_path / "whole", ledger=one), sys.maxsize)
    within = {at for first, last in ranges for at in range(first + 1, last + 1)}
    assert len(ranges) > 3 and len(within) > 15
    for at in itertools.count(1):
        if at not in within and at % 6:  # the rest of a run is held by test_fit_budget.py
            continue
        folder = tmp_path / str(at)
        folder.mkdir()
        ledger = Ledger.create(folder / "ledger", target_epsilon=8.0, target_delta=DELTA)
        released[0] = 0
        done = kill.during(partial(short, folder / "out", ledger=ledger, callbacks=[see]), at)
        try:
            known = charged(ledger)
        except PrivacyError:
            pytest.fail(f"torn at {at}")
        assert released[0] <= sum(sum(steps) for steps in known.values()) <= 5, at
        if done is None:
            try:
                result = short(folder / "out", ledger=ledger)
            except ArtifactError as error:  # killed while tidying up
                assert "finished run" in str(error), at
            else:
                assert torch.equal(biases(result.model), whole) and result.epsilon == spent(5), at
                assert result.statement.ledger is not None and result.statement.ledger["epsilon"] == spent(5)
        books = ledger.read()
        assert [(r.reserved, r.settled) for r in books.runs.values()] == [(None, (5,))], at
        assert books.epsilon() == spent(5)
        shutil.rmtree(folder)
        if done is not None:
            break
    assert at > 100


def test_a_run_that_stops_is_charged_what_it_used_and_a_resumed_one_once(ledger: Ledger, tmp_path: Path) -> None:
    whole = biases(run(None, **FIXED).model)
    with pytest.raises(Crash):
        run(tmp_path / "out", ledger=ledger.path, callbacks=[crash_at(5)], **FIXED)
    assert list(charged(ledger).values()) == [(5,)]
    result = run(tmp_path / "out", ledger=ledger.path, **FIXED)
    assert torch.equal(biases(result.model), whole)
    assert charged(ledger) == {result.statement.run_id: (STEPS,)}
    assert result.statement.ledger == ledger.read().head().to_dict()
    assert PrivacyStatement.load(tmp_path / "out") == result.statement
    assert result.statement.ledger["sha256"] in (tmp_path / "out" / "summary.md").read_text()


def test_steps_that_are_lost_on_top_of_the_plan_are_reserved_before_they_are_redrawn(
    ledger: Ledger, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(Crash):
        run(tmp_path / "out", ledger=ledger, callbacks=[crash_at(5)], **FIXED)
    save, seen = CheckpointStore.save, []

    def spy(self: CheckpointStore, state: Any, *rest: Any) -> None:
        if sum(state.charged_steps):
            seen.append(list(charged(ledger).values()))
        save(self, state, *rest)

    monkeypatch.setattr(CheckpointStore, "save", spy)
    result = run(tmp_path / "out", ledger=ledger, learning_rate=0.05, **FIXED)
    assert seen[0] == [(STEPS + 2,)]
    assert charged(ledger) == {result.statement.run_id: (STEPS + 2,)} and result.charged_steps == 2


def test_lost_steps_that_the_budget_has_no_room_for_are_not_redrawn_and_nothing_is_changed(tmp_path: Path) -> None:
    ledger = Ledger.create(tmp_path / "ledger", target_epsilon=spent(STEPS + 1), target_delta=DELTA)
    with pytest.raises(Crash):
        run(tmp_path / "out", ledger=ledger, callbacks=[crash_at(5)], **FIXED)
    before = {path: path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()}
    with pytest.raises(PrivacyError, match="does not allow"):
        run(tmp_path / "out", ledger=ledger, learning_rate=0.05, **FIXED)
    assert {path: path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()} == before
    assert list(charged(ledger).values()) == [(5,)]
    assert run(tmp_path / "out", ledger=ledger, **FIXED).epsilon == spent(STEPS)


def test_a_run_beyond_the_budget_takes_no_step_and_leaves_nothing_in_its_folder(ledger: Ledger, tmp_path: Path) -> None:
    first = run(tmp_path / "one", ledger=ledger, target_epsilon=6.0)
    with pytest.raises(PrivacyError, match=r"does not allow.*target_epsilon=(\S+)") as caught:
        run(tmp_path / "two", ledger=ledger, target_epsilon=6.0, callbacks=[crash_at(1)])
    assert not (tmp_path / "two" / "checkpoint").exists() and list(charged(ledger)) == [first.statement.run_id]
    fits = float(str(caught.value).split("target_epsilon=")[1].split()[0])
    second = run(tmp_path / "two", ledger=ledger, target_epsilon=fits)
    total = ledger.read().epsilon()
    assert 7.5 < total <= 8.0 and second.statement.ledger is not None and second.statement.ledger["epsilon"] == total
    assert second.epsilon <= fits  # of this run alone; the ledger says what both spent


def test_budget_taken_between_check_and_reservation_stops_the_run_before_its_first_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ledger = Ledger.create(tmp_path / "tight", target_epsilon=spent(66), target_delta=DELTA)
    check = Ledger.check

    def then_somebody_else(self: Ledger, *arguments: Any, **names: Any) -> None:
        check(self, *arguments, **names)
        reserve(self, mechanism("other", 60))

    with monkeypatch.context() as patch:
        patch.setattr(Ledger, "check", then_somebody_else)
        patch.setattr("dpbitfit_fx.ledger._refusal", lambda *_: "does not allow")
        with pytest.raises(PrivacyError, match="does not allow"):
            run(tmp_path / "out", ledger=ledger, callbacks=[crash_at(1)], **FIXED)
    assert not (tmp_path / "out" / "checkpoint").exists() and list(charged(ledger)) == ["other"]
    assert run(tmp_path / "out", ledger=ledger, target_epsilon=None, noise_multiplier=4.0).steps == STEPS


def test_an_unfinished_run_keeps_to_its_ledger(ledger: Ledger, tmp_path: Path) -> None:
    other = Ledger.create(tmp_path / "other", target_epsilon=8.0, target_delta=DELTA)
    with pytest.raises(Crash):
        run(tmp_path / "out", ledger=ledger, callbacks=[crash_at(5)])
    for wrong in (None, other):
        with pytest.raises(CheckpointError, match="Pass that ledger"):
            run(tmp_path / "out", ledger=wrong)
    kept = ledger.path.read_bytes()
    ledger.path.write_bytes(kept.splitlines(keepends=True)[0])
    assert run(tmp_path / "out", ledger=ledger).charged_steps == 0  # its own head was the first line: it reserves again
    assert list(charged(ledger).values()) == [(STEPS,)]


def test_a_run_given_up_is_settled_at_what_it_may_have_spent_and_counted_once(ledger: Ledger, tmp_path: Path) -> None:
    def vanish(info: StepInfo) -> None:
        if info.step == 5:
            raise Killed

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        patch.setattr(Ledger, "settle", lambda *_, **__: (_ for _ in ()).throw(Killed()))
        run(tmp_path, ledger=ledger, callbacks=[vanish], **FIXED)
    (lost,) = charged(ledger)
    assert charged(ledger) == {lost: (STEPS,)}
    result = run(tmp_path, ledger=ledger, resume=False, overwrite=True, **FIXED)
    assert charged(ledger) == {lost: (5,), result.statement.run_id: (STEPS,)}
    assert result.epsilon == ledger.read().epsilon() == spent(5 + STEPS)


def test_the_phases_of_a_run_are_charged_each_with_its_own_mechanism(ledger: Ledger, tmp_path: Path) -> None:
    with pytest.raises(Crash):
        run_phases(tmp_path / "out", ledger=ledger, callbacks=[crash_at(3)])
    assert list(charged(ledger).values()) == [(3, 0)]
    result = run_phases(tmp_path / "out", ledger=ledger)
    assert charged(ledger) == {result.statement.run_id: (5, 7)} and len(PHASES) == 2
    assert ledger.read().epsilon() == result.epsilon


def test_a_ledger_that_cannot_be_settled_keeps_the_whole_reservation_and_says_so(
    ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise ArtifactError("Cannot write: the disk is full.")

    monkeypatch.setattr(Ledger, "settle", fail)
    with pytest.warns(PrivacyWarning, match="steps were taken|stays charged") as caught, pytest.raises(Crash):
        run(None, ledger=ledger, callbacks=[crash_at(2)])
    assert any("stays charged with all that it had reserved" in str(one.message) for one in caught)
    assert list(charged(ledger).values()) == [(STEPS,)]


def test_a_finished_run_is_not_lost_with_its_ledger(
    ledger: Ledger, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a folder nothing could continue it: its result is handed out. With one the same call ends it."""
    settle = Ledger.settle

    def fail(*_: Any, **__: Any) -> None:
        raise PrivacyError("Another process has held the ledger for 120 s.")

    monkeypatch.setattr(Ledger, "settle", fail)
    with pytest.warns(PrivacyWarning, match="stays charged with all that it had reserved"):
        alone = run(None, ledger=ledger, **FIXED)
    assert alone.epsilon == spent(STEPS) and alone.statement.ledger is None
    with pytest.raises(PrivacyError, match="held the ledger"):
        run(tmp_path / "out", ledger=ledger, **FIXED)
    monkeypatch.setattr(Ledger, "settle", settle)
    assert [books.settled for books in ledger.read().runs.values()] == [None, None]
    ended = run(tmp_path / "out", ledger=ledger, callbacks=[crash_at(STEPS)], **FIXED)
    alone.statement.save(tmp_path)
    assert invoke("settle", ledger.path, tmp_path).exit_code == 0
    assert [books.settled for books in ledger.read().runs.values()] == [(STEPS,), (STEPS,)]
    assert ended.statement.ledger is not None


def test_no_step_is_taken_without_a_reservation(ledger: Ledger, monkeypatch: pytest.MonkeyPatch) -> None:
    from dpbitfit_fx.training_run import TrainingRun

    monkeypatch.setattr(TrainingRun, "reserve", lambda self: None)
    with pytest.raises(PrivacyError, match="holds no reservation"):
        run(None, ledger=ledger, callbacks=[crash_at(1)])


# -- the command ------------------------------------------------------------------------------------------------------


def invoke(*words: object) -> Result:
    return CliRunner().invoke(app, ["ledger", *(str(word) for word in words)], env={"COLUMNS": "200"})


def test_the_command_makes_shows_settles_enters_and_repairs(tmp_path: Path) -> None:
    path = tmp_path / "visits.ledger"
    made = invoke("init", path, "--target-epsilon", 8, "--target-delta", DELTA, "--name", "visits", "--who", "ada")
    assert made.exit_code == 0, made.output
    assert invoke("init", path, "--target-epsilon", 9, "--target-delta", DELTA).exit_code == 2
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        patch.setattr(Ledger, "settle", lambda *_, **__: (_ for _ in ()).throw(Killed()))

        def vanish(info: StepInfo) -> None:
            if info.step == 5:
                raise Killed

        run(tmp_path / "out", ledger=path, callbacks=[vanish], **FIXED)
    shown = json.loads(invoke("show", path, "--json").stdout)
    assert shown["runs"][0]["reserved"] == [STEPS] and shown["epsilon"] == spent(STEPS) and shown["name"] == "visits"
    settled = invoke("settle", path, tmp_path / "out")
    assert settled.exit_code == 0 and "settled at 5 steps" in settled.stdout, settled.output
    result = run(tmp_path / "out", ledger=path, **FIXED)
    outside = run(tmp_path / "outside", max_steps=3, **FIXED)
    assert invoke("enter", path, tmp_path / "outside" / "privacy.json").exit_code == 0
    text = invoke("show", path, "--against", tmp_path / "out" / "privacy.json")
    assert text.exit_code == 0 and "of 8 at delta = 0.001, 2 runs" in " ".join(text.stdout.split()), text.output
    assert charged(Ledger(path)) == {result.statement.run_id: (STEPS,), outside.statement.run_id: (3,)}
    whole = path.read_bytes()
    path.write_bytes(b"".join(whole.splitlines(keepends=True)[:2]))
    cut = invoke("show", path, "--against", tmp_path / "out" / "privacy.json")
    assert cut.exit_code == 2 and "has lost lines" in cut.stderr and len(cut.stderr.strip().splitlines()) == 1
    path.write_bytes(whole[:-9])
    assert "is torn" in invoke("show", path).stderr
    assert invoke("repair", path).exit_code == 0 and invoke("show", path).exit_code == 0


def test_a_run_that_is_still_going_is_not_settled_by_another_process(ledger: Ledger, tmp_path: Path) -> None:
    def meddle(info: StepInfo) -> None:
        if info.step == 2:
            refused = invoke("settle", ledger.path, tmp_path / "out")
            assert refused.exit_code == 2 and "Another process" in refused.stderr
            assert list(charged(ledger).values()) == [(STEPS,)]

    run(tmp_path / "out", ledger=ledger, callbacks=[meddle])
