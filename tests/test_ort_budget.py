"""budget.json: an epsilon for every step that is never too low, and never past the target."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

pytest.importorskip("onnx")
pytest.importorskip("onnxscript")
pytest.importorskip("onnxruntime")

from onnx_cases import ROWS, compiled
from typer.testing import CliRunner

import dpbitfit_fx as dpb
from dpbitfit_fx.accounting import epsilon
from dpbitfit_fx.cli import app
from dpbitfit_fx.errors import ArtifactError, PrivacyError, SealBroken
from dpbitfit_fx.ort_artifacts import read_manifest
from dpbitfit_fx.ort_budget import attach_budget
from dpbitfit_fx.privacy_statement import PrivacyStatement
from dpbitfit_fx.sampling import PoissonSampler

DELTA, SIGMA, BATCH = 1e-3, 3.0, 4.0


@pytest.fixture(scope="module")
def export(tmp_path_factory: pytest.TempPathFactory) -> Path:
    step, _ = compiled("mlp", noise_multiplier=SIGMA, expected_batch_size=BATCH)
    return dpb.export_onnx(step, tmp_path_factory.mktemp("budget") / "export")


@pytest.fixture
def copy(export: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(export, tmp_path / "export"))


def spent(steps: int, records: int = ROWS) -> float:
    return epsilon(PoissonSampler.from_expected_batch_size(records, BATCH, steps=steps), SIGMA, DELTA)


def test_no_entry_is_below_the_accountants_epsilon_and_the_last_one_is_it(copy: Path) -> None:
    made = attach_budget(copy, dataset_size=ROWS, target_epsilon=2, target_delta=DELTA, steps=12)
    table = made["epsilon_by_step"]
    assert len(table) == 13 and table[0] == 0 and table[12] == spent(12)
    for step in (1, 7, 11):
        assert spent(step) <= table[step] <= spent(step + 1) * 1.001
    assert table == sorted(table)
    assert json.loads((copy / "budget.json").read_text()) == made
    assert "budget.json" in read_manifest(copy)["files"]
    said = PrivacyStatement.from_dict(made["statement"])
    assert (said.steps, said.epsilon, said.dataset_size_assumed_public) == (12, spent(12), False)


def test_without_a_number_of_steps_it_is_the_largest_within_the_target_and_priors_shorten_it(copy: Path) -> None:
    made = attach_budget(copy, dataset_size=ROWS, target_epsilon=0.4, target_delta=DELTA)
    steps = made["steps"]
    assert spent(steps) <= 0.4 < spent(steps + 1)
    said = PrivacyStatement.from_dict(made["statement"])
    again = attach_budget(copy, dataset_size=ROWS, target_epsilon=0.5, target_delta=DELTA, prior=said)
    assert again["epsilon_by_step"][0] >= spent(steps) and again["epsilon_by_step"][-1] <= 0.5
    assert [run["run_id"] for run in again["statement"]["prior"]] == [said.run_id]


def test_a_target_that_allows_too_few_steps_writes_nothing(copy: Path) -> None:
    before = (copy / "manifest.json").read_bytes()
    for steps, reason in ((None, "Not even one step"), (5, "Not even one step")):
        with pytest.raises(PrivacyError, match=reason):
            attach_budget(copy, dataset_size=ROWS, target_epsilon=0.05, target_delta=DELTA, steps=steps)
    assert (copy / "manifest.json").read_bytes() == before and not (copy / "budget.json").exists()


def test_only_a_sealed_plain_export_gets_a_budget(copy: Path) -> None:
    plan = {"dataset_size": ROWS, "target_epsilon": 2.0, "target_delta": DELTA, "steps": 2}
    manifest = json.loads((copy / "manifest.json").read_text())
    (copy / "manifest.json").write_text(json.dumps(manifest | {"noise_multiplier": 9.0}))
    with pytest.raises(SealBroken):
        attach_budget(copy, **plan)  # type: ignore[arg-type]
    (copy / "manifest.json").write_text(json.dumps(manifest | {"target": "ort_training"}))
    with pytest.raises(ArtifactError, match="--format onnx"):
        attach_budget(copy, **plan)  # type: ignore[arg-type]


def test_the_command_writes_the_same_table(copy: Path) -> None:
    made = attach_budget(copy, dataset_size=ROWS, target_epsilon=2, target_delta=DELTA, steps=4)
    words = ["ort-budget", copy, "--dataset-size", ROWS, "--target-epsilon", 2, "--target-delta", DELTA, "--steps", 4]
    done = CliRunner().invoke(app, [str(word) for word in words])
    assert done.exit_code == 0 and "4 steps" in done.stdout, done.output
    assert json.loads((copy / "budget.json").read_text())["epsilon_by_step"] == made["epsilon_by_step"]
