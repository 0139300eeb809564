"""Real processes that train, killed with SIGKILL at random moments and resumed until they end. ``tools/replay --kills``.

Each process is a fork of a server that has imported everything. A run that goes on as it began has to end bit for bit where
the uninterrupted one does; one that goes on with another learning rate has to pay for every step that its journal holds.
"""

from __future__ import annotations

import itertools
import multiprocessing
import os
import random
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from multiprocessing import forkserver
from multiprocessing.sharedctypes import RawValue
from pathlib import Path
from typing import Any

import pytest
from fit_cases import run
from replay_cases import CLIPPINGS, make_world
from replay_runs import ENGINES, export

from dpbitfit_fx.biases import read_biases
from dpbitfit_fx.checkpoint import CheckpointStore, JournalEntry
from dpbitfit_fx.errors import ArtifactError
from dpbitfit_fx.privacy_statement import PrivacyStatement
from dpbitfit_fx.progress import StepInfo

STAGES = ("before the first step", "in training", "while saving", "at the end")
STEPS, EVERY, SEED, DELTA = 120, 7, 7, 1e-3
BATCH, SIGMA = {"fit": 20.0, "ort": 16.0}, 1.0
TARGETS: dict[str, str] = {"fit": "eager float32", "onnx": "onnx float32", "ort_training": "ort_training float32"}


@dataclass(frozen=True)
class Job:
    """One call, repeated until it ends; rate: of learning, which a replay depends on."""

    target: str
    folder: str
    exported: str = ""
    rate: float = 0.1


def work(job: Job, stage: Any) -> None:
    """A process: from wherever its folder stands to the end. `stage` tells the parent where it is."""
    watched = _watch(stage)
    try:
        _fit(job, watched) if job.target == "fit" else _ort_train(job, watched)
    except ArtifactError as error:
        if "finished run" not in str(error):
            raise


def _watch(stage: Any) -> Callable[[StepInfo], None]:
    """Writes down where the run is, from outside of it: at its journal, its checkpoints and its callbacks."""
    record, save = CheckpointStore.record, CheckpointStore.save

    def recording(self: CheckpointStore, entry: JournalEntry) -> None:
        stage.value = max(stage.value, 1)
        record(self, entry)

    def saving(self: CheckpointStore, *arguments: Any) -> None:
        before = stage.value
        stage.value = 2 if before == 1 else before
        save(self, *arguments)
        stage.value = before

    CheckpointStore.record, CheckpointStore.save = recording, saving  # type: ignore[method-assign, assignment]

    def callback(info: StepInfo) -> None:
        stage.value = 3 if info.step == info.steps else 1

    return callback


def _fit(job: Job, watched: Callable[[StepInfo], None]) -> None:
    plan: dict[str, Any] = {
        "target_epsilon": None,
        "noise_multiplier": SIGMA,
        "target_delta": DELTA,
        "expected_batch_size": BATCH["fit"],
        "max_steps": STEPS,
        "learning_rate": job.rate,
    }
    run(job.folder, checkpoint_every=EVERY, callbacks=[watched], insecure_seed_for_tests=SEED, **plan)


def ort_records() -> list[dict[str, Any]]:
    return make_world("mlp", 0, SEED).rows


def _ort_train(job: Job, watched: Callable[[StepInfo], None]) -> None:
    from dpbitfit_fx.ort_runner import OrtTrainer

    with OrtTrainer(
        job.exported,
        ort_records(),
        steps=STEPS,
        target_delta=DELTA,
        learning_rate=job.rate,
        physical_batch_size=8,
        output_dir=job.folder,
        checkpoint_every=EVERY,
        insecure_seed_for_tests=SEED,
    ) as trainer:
        trainer.train(callbacks=[watched])
        trainer.finish()


# -- the parent --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Outcome:
    """What a finished folder says."""

    biases: dict[str, bytes]
    epsilon: float
    steps: int
    lost: int

    @classmethod
    def of(cls, folder: Path) -> Outcome:
        statement = PrivacyStatement.load(folder / "privacy.json", verify=True)
        values, _ = read_biases(folder / "biases.safetensors")
        bits = {name: value.tobytes() for name, value in values.items()}
        return cls(bits, statement.epsilon, statement.steps, statement.lost_steps)

    def judged(self, whole: Outcome, owed: int) -> str:
        """`owed`: steps that the journal held when the plan was changed; 0 for a plan that was not."""
        if owed == 0:
            return "identical" if self == whole else "wrong"
        paid = self.lost == owed and self.steps == whole.steps and self.epsilon > whole.epsilon
        return "charged" if paid else "wrong"


@dataclass
class Killed:
    """How many kills hit which stage, and how the runs ended, of each target."""

    stages: dict[str, Counter[str]] = field(default_factory=dict)
    ends: dict[str, Counter[str]] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    wrong: list[str] = field(default_factory=list)

    @property
    def kills(self) -> int:
        return sum(stages.total() for stages in self.stages.values())


class Processes:
    """Forks of a server that has imported torch and the package (kill_server)."""

    def __init__(self) -> None:
        self.context = multiprocessing.get_context("forkserver")
        self.context.set_forkserver_preload(["kill_server"])
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("PYTHONPATH", os.pathsep.join(sys.path))  # the server is not told of sys.path otherwise
            forkserver.ensure_running()

    def run(self, job: Job, kill_after: float | None = None) -> tuple[bool, str]:
        """Whether it was killed, and in which stage; a process that fails by itself is an error."""
        stage = RawValue("i", 0)
        process = self.context.Process(target=work, args=(job, stage))
        process.start()
        process.join(kill_after)
        killed = process.exitcode is None
        if killed:
            process.kill()
        process.join()
        if process.exitcode not in ((0, -9) if killed else (0,)):
            raise RuntimeError(f"{job} ended with exit code {process.exitcode}")
        return process.exitcode == -9, STAGES[stage.value]


def installed() -> tuple[list[str], dict[str, str]]:
    """The targets that run here, and why the others do not."""
    why = {target: ENGINES[engine].why_not() for target, engine in TARGETS.items()}
    return [t for t in why if why[t] is None], {target: reason for target, reason in why.items() if reason is not None}


def kill_many(
    count: int, seed: int, targets: Sequence[str], show: Callable[[Killed], None] = lambda killed: None
) -> Killed:
    """`count` kills, at moments uniform over the wall time of the uninterrupted run; one run in three is killed twice."""
    processes, chance, found = Processes(), random.Random(seed), Killed()
    with tempfile.TemporaryDirectory() as name:
        base, whole, jobs = Path(name), dict[str, Outcome](), dict[str, Job]()
        for target in targets:
            exported = "" if target == "fit" else str(export(target, "mlp", CLIPPINGS[0], BATCH["ort"], False))
            jobs[target] = Job(target, str(base / target), exported)
            begin = time.monotonic()
            processes.run(jobs[target])
            found.seconds[target] = time.monotonic() - begin
            whole[target] = Outcome.of(base / target)
            assert (whole[target].steps, whole[target].lost) == (STEPS, 0)
            found.stages[target], found.ends[target] = Counter(), Counter()
        for target in itertools.cycle(targets):
            if found.kills >= count:
                return found
            folder, owed = base / "run", 0
            job = Job(target, str(folder), jobs[target].exported)
            for _ in range(chance.choice((1, 1, 2))):
                killed, stage = processes.run(job, chance.uniform(0, found.seconds[target]))
                if not killed:
                    break
                found.stages[target][stage] += 1
                seen = _seen(folder)
                if seen and not owed and chance.random() < 0.3:
                    job, owed = Job(target, str(folder), job.exported, rate=0.05), seen
            processes.run(job)
            end = Outcome.of(folder).judged(whole[target], owed)
            found.ends[target][end] += 1
            if end == "wrong":
                found.wrong.append(f"{target}, seed {seed}, kill {found.kills}, owed {owed}")
            shutil.rmtree(folder)
            show(found)
    return found


def _seen(folder: Path) -> int:
    """How many steps the journal of an unfinished run holds beyond its checkpoint: somebody may have seen them."""
    store = CheckpointStore(folder / "checkpoint")
    return (store.spent()[3] or 0) if store.exists and not (folder / "privacy.json").exists() else 0
