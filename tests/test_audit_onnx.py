"""The audit of training from an export: without torch, below the claim where it is right, and above it where it is not."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fit_cases import mlp_loss

pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

from typer.testing import CliRunner

from dpbitfit_fx.audit_onnx import audit_onnx
from dpbitfit_fx.cli import app
from dpbitfit_fx.compile import compile as compile_step
from dpbitfit_fx.errors import DataError, PrivacyError
from dpbitfit_fx.onnx_export import SGD, export_onnx
from dpbitfit_fx.ort_backends import PlainBackend
from dpbitfit_fx.passes.clipping import AutomaticClipping

ROWS, CANARIES, WIDTH = 10, 80, 300


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A classifier whose first layer is trained, under so much noise that epsilon is about 1.6."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(WIDTH, 8), torch.nn.Tanh(), torch.nn.Linear(8, 2))
    batch = (torch.randn(4, WIDTH), torch.tensor([0, 1, 1, 0]))
    step = compile_step(
        model,
        mlp_loss,
        batch,
        trainable=["0.weight"],
        clipping=AutomaticClipping(1.0),
        noise_multiplier=5.0,
        expected_batch_size=45,
    )
    folder = tmp_path_factory.mktemp("audit") / "out"
    plan: dict[str, Any] = {"sample_rate": 0.5, "dataset_size": ROWS + CANARIES, "steps": 16, "target_delta": 1e-5}
    return export_onnx(step, folder, optimizer=SGD(lr=1e-3), **plan)


def rows(count: int, seed: int, scale: float = 1.0) -> list[dict[str, Any]]:
    """Records by path of the batch entry; canaries are mislabelled at random."""
    generator = np.random.default_rng(seed)
    x = (scale * generator.standard_normal((count, WIDTH))).astype(np.float32)
    return [{"0": one, "1": int(label)} for one, label in zip(x, generator.integers(0, 2, count), strict=True)]


def audited(folder: Path, **options: Any) -> Any:
    usual: dict[str, Any] = {"canaries": rows(CANARIES, 2), "seed": 0, "progress": False, "insecure_seed_for_tests": 4}
    return audit_onnx(folder, rows(ROWS, 1), **(usual | options))


def test_a_right_run_stays_below_its_claim(exported: Path) -> None:
    report = audited(exported)
    assert report.epsilon_lower_bound < report.epsilon < report.largest_bound and not report.violated
    assert report.steps == 16 and report.records == ROWS and report.made_up and "onnx" in report.backend


def test_an_update_step_that_forgets_its_noise_is_shown_to_leak(
    exported: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The attack attacks: the runner hands zeros to update_step.onnx, and everything else is as it was."""
    update = PlainBackend.update
    monkeypatch.setattr(PlainBackend, "update", lambda self, noise, rate: update(self, 0 * noise, rate))
    report = audited(exported)
    assert report.violated and report.correct > 0.95 * report.guesses, report.summary()


def test_records_of_ones_own_are_taken_out_and_what_cannot_be_is_refused(exported: Path) -> None:
    report = audit_onnx(exported, rows(ROWS + CANARIES, 3), canaries=30, seed=0, progress=False, steps=2)
    assert report.records == ROWS + CANARIES - 30 and not report.made_up and "PRIVATE" in report.summary()
    with pytest.raises(DataError, match="cannot be taken out"):
        audit_onnx(exported, rows(10, 3), canaries=10)
    with pytest.raises(PrivacyError, match="is not kept"):
        audit_onnx(exported, rows(10, 3), canaries=5, output_dir="somewhere")


def test_the_command_audits_an_export_and_leaves_its_report(exported: Path, tmp_path: Path) -> None:
    data = rows(ROWS + CANARIES, 3)
    columns: dict[str, Any] = {"0": np.stack([r["0"] for r in data]), "1": np.array([r["1"] for r in data])}
    np.savez(tmp_path / "data.npz", **columns)
    words = ["audit", exported, tmp_path / "data.npz", "--output", tmp_path / "out", "--target-epsilon", 8]
    words += ["--canaries", 30, "--target-delta", "1e-5"]
    done = CliRunner().invoke(app, [str(w) for w in words])
    assert done.exit_code == 0, done.output
    assert "lower bound" in done.stdout and "not a proof" in done.stdout
    assert json.loads((tmp_path / "out" / "audit.json").read_text())["canaries"] == 30
    wrong = CliRunner().invoke(app, [*map(str, words), "--attack", "gradient"])
    assert wrong.exit_code == 2 and "--attack white-box" in wrong.stderr


def test_nothing_of_it_needs_torch() -> None:
    """At import; onnxruntime-training itself takes torch along where it is installed."""
    code = "import sys, dpbitfit_fx.audit_onnx, dpbitfit_fx.audit_cli; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
