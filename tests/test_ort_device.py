"""The exported step keeps its values on the device, and a device that ONNX Runtime does not have is refused, not replaced."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("onnx")
pytest.importorskip("onnxscript")
pytest.importorskip("onnxruntime")

import onnxruntime as ort
from onnx_cases import compiled, has_ort_training
from typer.testing import CliRunner

import dpbitfit_fx as dpb
from dpbitfit_fx import ort_backends, ort_device
from dpbitfit_fx.cli import app
from dpbitfit_fx.errors import ArtifactError
from dpbitfit_fx.ort_backends import PlainBackend, load_artifacts
from dpbitfit_fx.ort_runner import OrtTrainer, read_manifest


@pytest.fixture(scope="module")
def export(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    step, data = compiled("mlp")
    folder = dpb.export_onnx(step, tmp_path_factory.mktemp("export") / "onnx")
    return folder, {name: value.numpy() for name, value in data.items()}


def batch_of(folder: Path, arrays: dict[str, Any], rows: slice) -> dict[str, Any]:
    entries = read_manifest(folder)["batch_inputs"]
    return {e["name"]: arrays[e["path"]][rows] for e in entries}


def test_sum_parameters_and_moments_are_not_copied_back_between_the_runs_of_two_steps(
    export: tuple[Path, dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, arrays = export
    backend: Any = load_artifacts(folder)
    given = {name: np.zeros(backend.size, np.float32) for name in ("m", "v")} | {"t": np.zeros(1, np.int64)}
    theta, noise = backend.flat(), np.linspace(-1, 1, backend.size).astype(np.float32)
    sessions = {
        name: ort.InferenceSession(str(folder / f"{name}.onnx"), providers=["CPUExecutionProvider"])
        for name in ("grad_step", "update_step")
    }

    def by_hand(name: str, **feed: Any) -> Any:
        return sessions[name].run(None, {k: v for k, v in feed.items() if k in {i.name for i in sessions[name].get_inputs()}})

    def copied(value: Any) -> Any:
        raise AssertionError("copied back")

    with monkeypatch.context() as inside:
        inside.setattr(ort_backends, "numpy_of", copied)
        for number in range(2):
            backend.begin()
            total = np.zeros(backend.size, np.float32)
            for rows in (slice(0, 3), slice(3, 8)):
                batch = batch_of(folder, arrays, rows)
                mask = np.ones(rows.stop - rows.start, np.float32)
                backend.accumulate(batch, mask, noise)
                (total,) = by_hand("grad_step", **batch, sample_mask=mask, theta=theta, accumulator=total)
            backend.update(noise, 0.1 + number)
            rate = np.array([0.1 + number], np.float32)
            results = by_hand(
                "update_step", theta=theta, accumulator=total, noise=noise, learning_rate=rate, **given
            )
            theta, given = results[0], dict(zip(given, results[1:], strict=True))
        assert all(isinstance(value, ort.OrtValue) for value in backend.state.values())
    assert np.array_equal(backend.gradient_buffers(), total) and np.abs(total).sum() > 0
    assert np.array_equal(backend.flat(), theta)
    assert all(np.array_equal(backend.optimizer_state()[name], value) for name, value in given.items())


def test_what_is_read_from_a_backend_does_not_change_with_its_next_step(export: tuple[Path, dict[str, Any]]) -> None:
    folder, arrays = export
    backend: Any = load_artifacts(folder)
    before, zeros = backend.flat(), np.zeros(backend.size, np.float32)
    kept = before.copy()
    mine = before.copy()
    backend.set_flat(mine)
    mine += 1.0  # what was given is not looked at again
    backend.accumulate(batch_of(folder, arrays, slice(0, 4)), np.ones(4, np.float32), zeros)
    backend.update(zeros, 0.5)
    assert np.array_equal(before, kept) and not np.array_equal(backend.flat(), kept)
    assert np.abs(backend.flat() - kept).max() < 0.6  # one step of Adam from kept, not from mine


def test_cuda_is_refused_where_onnx_runtime_has_none_and_before_anything_is_left(
    export: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    folder, arrays = export
    if "CUDAExecutionProvider" in ort.get_available_providers():
        pytest.skip("this ONNX Runtime has CUDA")
    with pytest.raises(ArtifactError, match="Install onnxruntime-gpu"):
        OrtTrainer(folder, arrays, steps=2, target_delta=1e-2, output_dir=tmp_path / "out", device="cuda")
    with pytest.raises(ArtifactError, match="one of cpu, cuda; got 'tpu'"):
        OrtTrainer(folder, arrays, steps=2, target_delta=1e-2, output_dir=tmp_path / "out", device="tpu")
    assert not (tmp_path / "out").exists()
    np.savez(tmp_path / "data.npz", **arrays)
    words = ["ort-train", str(folder), "--data", str(tmp_path / "data.npz"), "--output", str(tmp_path / "out")]
    said = CliRunner().invoke(app, [*words, "--steps", "2", "--target-delta", "1e-2", "--device", "cuda"])
    assert said.exit_code == 2 and "onnxruntime-gpu" in said.output and not list((tmp_path / "out").glob("*"))


def test_an_onnx_runtime_that_falls_back_to_the_cpu_is_refused(
    export: tuple[Path, dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    if "CUDAExecutionProvider" in ort.get_available_providers():
        pytest.skip("this ONNX Runtime has CUDA")
    monkeypatch.setattr(ort, "get_available_providers", lambda: ["CUDAExecutionProvider", "CPUExecutionProvider"])
    with pytest.warns(UserWarning, match="CUDAExecutionProvider"), pytest.raises(ArtifactError, match="without a word"):
        PlainBackend(export[0], read_manifest(export[0]), device="cuda")


def test_cuda_multiplies_in_full_float32(export: tuple[Path, dict[str, Any]], monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []

    class Session:
        def __init__(self, path: str, options: Any, providers: list[Any]) -> None:
            seen.extend(providers)

        def get_providers(self) -> list[str]:
            return ["CUDAExecutionProvider"]

    monkeypatch.setattr(ort, "get_available_providers", lambda: ["CUDAExecutionProvider"])
    monkeypatch.setattr(ort, "InferenceSession", Session)
    ort_device.open_session(export[0] / "grad_step.onnx", "cuda")
    assert seen == [("CUDAExecutionProvider", {"use_tf32": "0"}), "CPUExecutionProvider"]


@pytest.mark.parametrize("target", ["onnx", "ort_training"])
def test_a_label_that_does_not_exist_is_not_quoted_on_the_screen(
    target: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    if target == "ort_training" and not has_ort_training():
        pytest.skip("needs ONNX Runtime Training")
    step, data = compiled("mlp")
    folder = (dpb.export_onnx if target == "onnx" else dpb.export_ort_training)(step, tmp_path / target)
    backend = load_artifacts(folder)
    arrays = {name: value.numpy() for name, value in data.items()}
    batch = batch_of(folder, arrays, slice(0, 3))
    labels = [name for name, value in batch.items() if value.dtype == np.int64]
    assert labels
    backend.begin()
    with pytest.raises(Exception, match="987654"):  # ONNX Runtime's own: what the runner says instead is tested with it
        backend.accumulate(
            batch | {name: np.full_like(batch[name], 987654) for name in labels},
            np.ones(3, np.float32),
            np.zeros(step.num_trainable, np.float32),
        )
    said = capfd.readouterr()
    assert "987654" not in said.out + said.err
