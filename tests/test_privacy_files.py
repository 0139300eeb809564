"""Files are replaced whole or not at all, whatever fails; and the privacy modules need no torch."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, NoReturn

import pytest

from dpbitfit_fx.errors import ArtifactError
from dpbitfit_fx.files import (
    atomic_replace,
    atomic_write,
    atomic_write_bytes,
    atomic_write_text,
    ensure_output_folder,
    read_bytes,
    read_text,
)


def failing(code: int) -> Any:
    def fail(*_args: object, **_kwargs: object) -> NoReturn:
        raise OSError(code, os.strerror(code))

    return fail


def test_a_file_is_written_and_replaced_and_nothing_else_is_left(tmp_path: Path) -> None:
    atomic_write_text(tmp_path / "a", "first é\n")
    atomic_write_bytes(tmp_path / "b", b"\x00" * 100)
    atomic_write(tmp_path / "a", "second")
    atomic_write(tmp_path / "b", b"bytes")
    assert read_text(tmp_path / "a") == "second" and read_bytes(tmp_path / "b") == b"bytes"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b"]


@pytest.mark.parametrize("where", ["write", "fsync", "replace", "open"])
@pytest.mark.parametrize(
    ("code", "message"),
    [(errno.ENOSPC, "disk is full"), (errno.EROFS, "read-only"), (errno.EACCES, "permission"), (errno.EIO, "Check")],
)
def test_a_failure_at_any_point_leaves_the_previous_file_and_no_litter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str, code: int, message: str
) -> None:
    atomic_write(tmp_path / "a", "previous")
    with monkeypatch.context() as patched:
        patched.setattr(os, where, failing(code))
        with pytest.raises(ArtifactError, match=message) as caught:
            atomic_write(tmp_path / "a", "next")
    assert str(tmp_path / "a") in str(caught.value) and "unchanged" in str(caught.value)
    assert read_text(tmp_path / "a") == "previous"
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_a_disk_that_fills_up_half_way_leaves_the_previous_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    atomic_write(tmp_path / "a", "previous")
    real = os.write

    def half(descriptor: int, data: Any) -> int:
        if len(data) < 8:
            failing(errno.ENOSPC)()
        return real(descriptor, data[: len(data) // 2])

    with monkeypatch.context() as patched:
        patched.setattr(os, "write", half)
        with pytest.raises(ArtifactError, match="disk is full"):
            atomic_write(tmp_path / "a", "x" * 100_000)
    assert read_text(tmp_path / "a") == "previous"
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_ctrl_c_while_writing_leaves_the_previous_file_and_is_passed_on(tmp_path: Path) -> None:
    atomic_write(tmp_path / "a", "previous")
    with pytest.raises(KeyboardInterrupt), atomic_replace(tmp_path / "a") as temporary:
        temporary.write_text("half of")
        raise KeyboardInterrupt
    assert read_text(tmp_path / "a") == "previous"
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_a_writer_that_wants_a_file_name_gets_one_beside_the_target(tmp_path: Path) -> None:
    with atomic_replace(tmp_path / "model.onnx", mode=0o600) as temporary:
        assert temporary.parent == tmp_path
        temporary.write_bytes(b"graph")
        assert not (tmp_path / "model.onnx").exists()
    assert read_bytes(tmp_path / "model.onnx") == b"graph"
    assert os.stat(tmp_path / "model.onnx").st_mode & 0o777 == 0o600


def test_an_output_folder_is_made_and_left_empty(tmp_path: Path) -> None:
    folder = ensure_output_folder(tmp_path / "a" / "b")
    assert folder.is_dir() and not list(folder.iterdir())
    assert ensure_output_folder(folder) == folder


def test_an_output_folder_that_cannot_take_files_is_refused_before_anything_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("x")
    for path in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(ArtifactError, match="Nothing was started"):
            ensure_output_folder(path)
    (tmp_path / "folder").mkdir()
    for name, code, message in (
        ("open", errno.EACCES, "permission"),
        ("open", errno.EROFS, "read-only"),
        ("write", errno.ENOSPC, "disk is full"),
        ("fsync", errno.EDQUOT, "quota"),
    ):
        with monkeypatch.context() as patched:
            patched.setattr(os, name, failing(code))
            with pytest.raises(ArtifactError, match=message):
                ensure_output_folder(tmp_path / "folder")
        assert not list((tmp_path / "folder").iterdir())


def test_reading_says_what_is_wrong_and_never_quotes_the_contents(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="does not exist"):
        read_text(tmp_path / "absent")
    with pytest.raises(ArtifactError, match="is a folder"):
        read_bytes(tmp_path)
    (tmp_path / "latin").write_bytes(b"secret caf\xe9")
    with pytest.raises(ArtifactError, match="not UTF-8") as caught:
        read_text(tmp_path / "latin")
    assert "secret" not in str(caught.value) and caught.value.__cause__ is None


def test_the_privacy_modules_work_in_a_process_that_cannot_import_torch(tmp_path: Path) -> None:
    program = """
import sys

class NoTorch:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "torch":
            raise ImportError("torch is not here")

# Not sys.modules["torch"] = None: scipy would take the None for torch.
sys.meta_path.insert(0, NoTorch())
import numpy as np
from dpbitfit_fx import errors, files
from dpbitfit_fx.biases import read_biases, save_biases
from dpbitfit_fx.privacy_statement import PrivacyStatement
from dpbitfit_fx.randomness import SecretKey, stream
from dpbitfit_fx.sampling import PoissonSampler

folder, key = files.ensure_output_folder(sys.argv[1]), SecretKey()
sampler = PoissonSampler.from_expected_batch_size(1000, 50, steps=4)
noise = stream(key, "noise", 0).normal(6).astype(np.float32)
rows = sampler.draw(key, 0)
save_biases(folder / "b.safetensors", {"layer.bias": noise}, {"model_fingerprint": "0" * 64})
assert (read_biases(folder / "b.safetensors")[0]["layer.bias"] == noise).all()
statement = PrivacyStatement.create(
    sampler, noise_multiplier=1.0, delta=1e-5, max_grad_norm=1.0, clipping="automatic", gamma=0.01, graph_hash="0" * 64,
    num_trainable=6, num_parameters=100, dataset_size_assumed_public=True, backend="onnxruntime",
)
statement.save(folder)
assert PrivacyStatement.load(folder, verify=True) == statement
assert "torch" not in sys.modules
"""
    done = subprocess.run([sys.executable, "-c", program, str(tmp_path)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
