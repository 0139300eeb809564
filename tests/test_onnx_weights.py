"""The frozen weights of an export: once on disk, never in a protobuf, left alone by the next export, whole after a kill."""

from __future__ import annotations

import itertools
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("onnx")
pytest.importorskip("onnxscript")
pytest.importorskip("onnxruntime")

import onnx
import onnx_ir as ir
from onnx_cases import has_ort_training

import dpbitfit_fx as dpb
from dpbitfit_fx.errors import ArtifactError, SealBroken
from dpbitfit_fx.export_folder import write_folder
from dpbitfit_fx.files import sha256_file
from dpbitfit_fx.onnx_export import export_onnx
from dpbitfit_fx.onnx_seal import check_artifacts
from dpbitfit_fx.onnx_weights import ALIGNMENT, INLINE_LIMIT, save_models
from dpbitfit_fx.ort_artifacts import WEIGHTS, read_manifest
from dpbitfit_fx.ort_backends import PlainBackend, load_artifacts
from dpbitfit_fx.ort_device import session_options

WIDTH = 48


class Net(torch.nn.Module):
    """``up`` is turned on its way forward, ``twin``, of the same values in another storage, on its way back."""

    def __init__(self, width: int = WIDTH) -> None:
        super().__init__()
        self.first, self.up, self.last = (torch.nn.Linear(a, b) for a, b in ((5, width), (width, width), (width, 3)))
        self.twin, self.twin_bias = (
            torch.nn.Parameter(self.up.weight.detach().clone()),
            torch.nn.Parameter(torch.zeros(width)),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = torch.tanh(self.up(torch.tanh(self.first(x))))
        logits: torch.Tensor = self.last(torch.tanh(torch.addmm(self.twin_bias, h, self.twin)))
        return logits


def loss(model: Any, batch: Any) -> torch.Tensor:
    return torch.nn.functional.cross_entropy(model(batch["x"]), batch["y"], reduction="none")


def step_of(width: int = WIDTH) -> Any:
    torch.manual_seed(5)
    batch = {"x": torch.randn(4, 5), "y": torch.tensor([0, 2, 1, 0])}
    return dpb.compile(Net(width), loss, batch, noise_multiplier=0.8, expected_batch_size=6.0)


def unchecked(step: Any, path: Path, **options: Any) -> Path:
    """``export_onnx`` with its seal, without its numeric comparison."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("dpbitfit_fx.onnx_check.check_onnx", lambda *_, **__: None)
        return export_onnx(step, path, **options)


@pytest.fixture(scope="module")
def step() -> Any:
    return step_of()


@pytest.fixture(scope="module")
def plain(step: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Compared with PyTorch by the export itself."""
    return export_onnx(step, tmp_path_factory.mktemp("plain") / "out")


def places(path: Path) -> dict[str, tuple[str, int, int]]:
    """File, offset and length of every tensor that is kept outside the graph."""
    found = {}
    for tensor in onnx.load(path, load_external_data=False).graph.initializer:
        if tensor.external_data:
            e = {x.key: x.value for x in tensor.external_data}
            found[tensor.name] = (e["location"], int(e["offset"]), int(e["length"]))
    return found


def photograph(folder: Path) -> dict[str, tuple[int, int]]:
    return {f.name: (f.stat().st_ino, f.stat().st_mtime_ns) for f in folder.iterdir()}


# -- once on disk, never in a protobuf --------------------------------------------------------------------------------


def test_equal_weights_share_one_place_and_the_file_holds_nothing_else(step: Any, plain: Path) -> None:
    found = places(plain / "grad_step.onnx")
    assert sorted(found) == ["twin", "up.weight"] and len(set(found.values())) == 1
    name, offset, length = found["up.weight"]
    assert name == WEIGHTS and offset % ALIGNMENT == 0 and length == 4 * WIDTH * WIDTH
    assert (plain / WEIGHTS).read_bytes() == step.model.up.weight.detach().numpy().tobytes()
    assert WEIGHTS in read_manifest(plain)["files"]


def test_a_graph_does_not_grow_with_the_weights(plain: Path, tmp_path: Path) -> None:
    wide = unchecked(step_of(4 * WIDTH), tmp_path / "wide")
    small, large = (f / "grad_step.onnx" for f in (plain, wide))
    assert (wide / WEIGHTS).stat().st_size == 16 * (plain / WEIGHTS).stat().st_size
    assert large.stat().st_size < small.stat().st_size + 2 * INLINE_LIMIT  # the first and the last layer are small
    for path in (small, large):
        graph = onnx.load(path, load_external_data=False).graph
        assert all(t.external_data or t.ByteSize() <= 2 * INLINE_LIMIT for t in graph.initializer)
        assert not any(a.HasField("t") and a.t.ByteSize() > INLINE_LIMIT for n in graph.node for a in n.attribute)


def test_no_graph_turns_a_weight_which_onnxruntime_would_keep_twice(plain: Path) -> None:
    graph = onnx.load(plain / "grad_step.onnx", load_external_data=False).graph
    readers = [n.op_type for n in graph.node for i in n.input if i in ("up.weight", "twin")]
    assert sorted(readers) == ["Gemm", "Gemm", "Gemm", "MatMul"]  # each forward and backward


@pytest.mark.skipif(not has_ort_training(), reason="needs onnxruntime-training-cpu")
def test_training_and_evaluation_graph_read_the_same_bytes(step: Any, tmp_path: Path) -> None:
    folder = dpb.export_ort_training(step, tmp_path / "out", eval_output=lambda m, b: m(b["x"]))
    train, evaluate = (places(folder / f"{n}_model.onnx") for n in ("training", "eval"))
    assert [f.name for f in folder.glob("*.data*")] == [WEIGHTS]
    assert set(train.values()) == set(evaluate.values()) and len(train) == len(evaluate) == 2
    assert (folder / WEIGHTS).stat().st_size == 4 * WIDTH * WIDTH


def test_weights_that_are_called_large_are_read_from_the_file_and_give_the_same_sum(
    plain: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    size = int(read_manifest(plain)["num_trainable"])
    batch = {"x": np.linspace(-1, 1, 15, dtype=np.float32).reshape(3, 5), "y": np.array([0, 1, 2])}
    sums = []
    for limit in (1 << 30, 0):
        monkeypatch.setattr("dpbitfit_fx.ort_device.LARGE_WEIGHTS", limit)
        if limit == 0:
            assert session_options(plain).get_session_config_entry("session.disable_prepacking") == "1"
        backend = PlainBackend(plain, read_manifest(plain))
        backend.begin()
        backend.accumulate(batch, np.ones(3, np.float32), np.zeros(size, np.float32))
        sums.append(backend.gradient_buffers())
    assert np.linalg.norm(sums[0]) > 0 and np.linalg.norm(sums[0] - sums[1]) <= 1e-6 * np.linalg.norm(sums[0])


# -- the next export --------------------------------------------------------------------------------------------------


def test_an_export_again_writes_only_what_changed(step: Any, plain: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(plain, tmp_path / "out"))
    before = photograph(folder)
    unchecked(step, folder, overwrite=True)
    assert photograph(folder) == before  # nothing did
    unchecked(step.with_noise(1.5, 6.0), folder, overwrite=True)
    after = photograph(folder)
    changed = {name for name in after if after[name] != before[name]}
    assert changed == {"update_step.onnx", "manifest.json"}
    assert read_manifest(folder)["noise_multiplier"] == 1.5 and os.listdir(tmp_path) == ["out"]
    load_artifacts(folder)


def test_another_weight_is_written_and_the_earlier_file_is_not_written_into(
    step: Any, plain: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(plain, tmp_path / "out"))
    os.link(folder / WEIGHTS, tmp_path / "kept")  # whoever reads the earlier export goes on reading it
    weight = step.model.up.weight
    kept = weight.detach().clone()
    with torch.no_grad():
        weight[3, 4] += 1
    try:
        unchecked(step, folder, overwrite=True)
        _, offset, length = places(folder / "grad_step.onnx")["up.weight"]
        written = np.frombuffer((folder / WEIGHTS).read_bytes()[offset : offset + length], np.float32)
        assert np.array_equal(written, weight.detach().numpy().ravel())
    finally:
        with torch.no_grad():
            weight.copy_(kept)
    assert not (folder / WEIGHTS).samefile(tmp_path / "kept")
    assert (tmp_path / "kept").read_bytes() == (plain / WEIGHTS).read_bytes()


def model_with(array: Any) -> ir.Model:
    """x + array, the array an initializer."""
    x, y = (onnx.helper.make_tensor_value_info(n, onnx.TensorProto.FLOAT, list(array.shape)) for n in "xy")
    node, held = onnx.helper.make_node("Add", ["x", "w"], ["y"]), onnx.numpy_helper.from_array(array, "w")
    return ir.serde.deserialize_model(
        onnx.helper.make_model(onnx.helper.make_graph([node], "g", [x], [y], [held]))
    )


@pytest.mark.parametrize("spoil", ["nothing", "other bytes", "cut short", "a link", "longer"])
def test_a_spoiled_earlier_file_is_not_taken_over(tmp_path: Path, spoil: str) -> None:
    array = np.arange(2000, dtype=np.float32)
    old, new = tmp_path / "old", tmp_path / "new"
    old.mkdir()
    new.mkdir()
    right = array.tobytes()
    spoiled = {"other bytes": right[:-4] + b"\1\2\3\4", "cut short": right[:-4], "longer": right + b"\0"}
    (tmp_path / "elsewhere").write_bytes(right)
    if spoil == "a link":
        (old / WEIGHTS).symlink_to(tmp_path / "elsewhere")
    else:
        (old / WEIGHTS).write_bytes(spoiled.get(spoil, right))
    save_models({"m.onnx": model_with(array)}, new, old)
    assert (new / WEIGHTS).read_bytes() == right and not (new / WEIGHTS).is_symlink()
    assert (new / WEIGHTS).samefile(old / WEIGHTS) == (spoil == "nothing")


def test_a_disk_without_hard_links_gets_whole_files(
    plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = Path(shutil.copytree(plain, tmp_path / "out"))

    def refuse(*_: Any, **__: Any) -> None:
        raise OSError(1, "Operation not permitted")

    before = photograph(folder)
    monkeypatch.setattr(os, "link", refuse)
    save_models({"m.onnx": model_with(np.arange(2000, dtype=np.float32))}, tmp_path, folder)
    assert (tmp_path / WEIGHTS).stat().st_size == 8000
    write_folder(folder, True, copied(plain, "new"), lambda _: None)
    assert not before.items() & photograph(folder).items()
    assert read_manifest(folder)["files"] == read_manifest(plain)["files"]


# -- killed -----------------------------------------------------------------------------------------------------------


def copied(source: Path, kind: str) -> Callable[[Path, Path | None], dict[str, Any]]:
    """Builds what ``source`` holds; ``kind`` tells two exports apart."""

    def build(work: Path, previous: Path | None) -> dict[str, Any]:
        for f in source.iterdir():
            if f.name != "manifest.json":
                shutil.copyfile(f, work / f.name)
        return {**json.loads((source / "manifest.json").read_text()), "kind": kind}

    return build


def killed_at(call: int, target: Path, source: Path) -> bool:
    """An export into ``target`` by a child that dies at this call that changes the disk; False once it has come through."""
    child = os.fork()
    if child == 0:
        left = [call]

        def counted(real: Callable[..., Any]) -> Callable[..., Any]:
            def run(*args: Any, **kwargs: Any) -> Any:
                left[0] -= 1
                if left[0] < 0:
                    os._exit(9)
                return real(*args, **kwargs)

            return run

        try:
            for name in ("link", "replace", "fsync", "mkdir", "unlink", "rmdir"):
                setattr(os, name, counted(getattr(os, name)))
            write_folder(target, True, copied(source, "new"), lambda _: None)
        finally:
            os._exit(0 if left[0] >= 0 else 9)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9


def test_killed_at_any_moment_an_export_leaves_the_old_one_or_the_new_one_or_a_clear_refusal(
    plain: Path, tmp_path: Path
) -> None:
    target, seen = tmp_path / "out", []
    for call in range(1000):
        shutil.rmtree(tmp_path, ignore_errors=True)
        tmp_path.mkdir()
        write_folder(target, False, copied(plain, "old"), lambda _: None)
        if not killed_at(call, target, plain):
            break
        try:
            found = read_manifest(target)
            check_artifacts(target, found)
            seen.append(found["kind"])
        except ArtifactError as refusal:
            assert "killed" in str(refusal) and "rename that folder back" in str(refusal)
            seen.append("refused")
            assert read_manifest(next(tmp_path.glob(".out.*.old")))["kind"] == "old"
        if call % 4 == 0 or seen[-1] != "old":
            write_folder(target, True, copied(plain, "next"), lambda _: None)
            assert read_manifest(target)["kind"] == "next" and os.listdir(tmp_path) == ["out"]
    assert [seen[0], *(b for a, b in itertools.pairwise(seen) if a != b)] == ["old", "refused", "new"]
    assert seen.count("refused") == 1  # the instant between two renames
    assert read_manifest(target)["kind"] == "new"


def test_an_export_that_another_process_is_building_is_left_alone(plain: Path, tmp_path: Path) -> None:
    fcntl = pytest.importorskip("fcntl")
    busy, dead = tmp_path / ".out.0123abcd.tmp", tmp_path / ".out.4567cdef.tmp"
    busy.mkdir()
    dead.mkdir()
    held = os.open(busy, os.O_RDONLY)
    fcntl.flock(held, fcntl.LOCK_EX)
    write_folder(tmp_path / "out", False, copied(plain, "new"), lambda _: None)
    os.close(held)
    assert sorted(os.listdir(tmp_path)) == [".out.0123abcd.tmp", "out"]


# -- changed by somebody else -----------------------------------------------------------------------------------------


def test_one_changed_bit_of_the_shared_weights_is_refused_at_load(plain: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(plain, tmp_path / "out"))
    data = bytearray((folder / WEIGHTS).read_bytes())
    data[777] ^= 1
    (folder / WEIGHTS).write_bytes(data)
    with pytest.raises(ArtifactError, match=r"'weights.data' .* was changed after the export"):
        read_manifest(folder)
    (folder / WEIGHTS).unlink()
    with pytest.raises(ArtifactError, match=r"lacks 'weights.data'"):
        read_manifest(folder)


@pytest.mark.parametrize(
    ("key", "value", "reason"),
    [
        ("offset", str(ALIGNMENT), "a place that 'weights.data' does not have"),
        ("offset", "-8", "a place that 'weights.data' does not have"),
        ("length", "64", "a place that 'weights.data' does not have"),
        ("location", "initial.safetensors", "no file of this export"),
        ("location", "../weights.data", "no file of this export"),
    ],
)
def test_a_weight_read_from_elsewhere_is_refused_though_all_hashes_are_right(
    plain: Path, tmp_path: Path, key: str, value: str, reason: str
) -> None:
    folder = Path(shutil.copytree(plain, tmp_path / "out"))
    path, manifest = folder / "grad_step.onnx", json.loads((plain / "manifest.json").read_text())
    model = onnx.load(path, load_external_data=False)
    tensor = next(t for t in model.graph.initializer if t.name == "up.weight")
    next(e for e in tensor.external_data if e.key == key).value = value
    path.write_bytes(model.SerializeToString())
    manifest["files"]["grad_step.onnx"] = sha256_file(path)
    (folder / "manifest.json").write_text(json.dumps(manifest))
    check_artifacts(plain, read_manifest(plain))
    with pytest.raises(SealBroken, match=reason):
        load_artifacts(folder)
