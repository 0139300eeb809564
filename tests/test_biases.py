"""Biases go out as safetensors and come back onto the model they belong to: all of them or none."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file
from torch import nn

from dpbitfit_fx.biases import (
    FROZEN_FINGERPRINT,
    MODEL_FINGERPRINT,
    frozen_weights_fingerprint,
    load_biases,
    model_fingerprint,
    read_biases,
    save_biases,
)
from dpbitfit_fx.errors import ArtifactError


def build(seed: int = 0, width: int = 5, dtype: torch.dtype = torch.float32) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, width), nn.LayerNorm(width), nn.Linear(width, 2)).to(dtype)


def biases_of(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if name.endswith("bias")}


def trained(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    model = build(dtype=dtype)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.add_(torch.randn(parameter.shape).to(dtype))
    return model


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_biases_come_back_bit_for_bit_onto_a_fresh_model(tmp_path: Path, dtype: torch.dtype) -> None:
    model, fresh = trained(dtype), build(dtype=dtype)
    save_biases(tmp_path / "b", biases_of(model), {MODEL_FINGERPRINT: model_fingerprint(model)})
    parameters = list(fresh.parameters())
    assert load_biases(fresh, tmp_path / "b") is fresh
    assert all(old is new for old, new in zip(parameters, fresh.parameters(), strict=True))
    for name, parameter in fresh.named_parameters():
        assert torch.equal(parameter, dict(model.named_parameters())[name])
        assert parameter.requires_grad


def test_arrays_and_tensors_make_the_same_file(tmp_path: Path) -> None:
    biases = biases_of(trained())
    save_biases(tmp_path / "t", biases, {"a": "b"})
    save_biases(tmp_path / "n", {name: b.numpy() for name, b in biases.items()}, {"a": "b"})
    arrays, metadata = read_biases(tmp_path / "n")
    assert metadata["a"] == "b"
    assert read_biases(tmp_path / "t")[0].keys() == arrays.keys() == biases.keys()
    for name, array in arrays.items():
        assert np.array_equal(array, biases[name].numpy()) and array.dtype == np.float32
    loaded = load_biases(build(), tmp_path / "n")
    assert torch.equal(dict(loaded.named_parameters())["0.bias"], biases["0.bias"])


def test_slices_of_one_flat_vector_and_scalars_can_be_saved(tmp_path: Path) -> None:
    flat = torch.arange(6.0)
    save_biases(tmp_path / "t", {"a": flat[:2], "b": flat[2:].reshape(2, 2).T, "c": flat[5].reshape(())})
    save_biases(tmp_path / "n", {"a": flat.numpy()[:2], "b": flat[2:].reshape(2, 2).T.numpy(), "c": np.float32(5)})
    for path in (tmp_path / "t", tmp_path / "n"):
        arrays = read_biases(path)[0]
        assert arrays["b"].tolist() == [[2, 4], [3, 5]] and arrays["c"].shape == ()


def refuse(model: nn.Module, path: Path, match: str, strict: bool = True) -> str:
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ArtifactError, match=match) as caught:
        load_biases(model, path, strict)
    assert "Nothing was loaded" in str(caught.value)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])
    return str(caught.value)


def test_one_bias_that_does_not_fit_leaves_the_whole_model_unchanged(tmp_path: Path) -> None:
    biases = biases_of(trained())
    save_biases(tmp_path / "b", {**biases, "head.bias": torch.ones(2), "9.bias": torch.ones(2)})
    message = refuse(build(), tmp_path / "b", "no parameter")
    assert "'head.bias', '9.bias'" in message or "'9.bias', 'head.bias'" in message
    save_biases(tmp_path / "b", biases)
    refuse(build(width=6), tmp_path / "b", r"'0.bias' has shape \[5\] in the file and \[6\] in the model", strict=False)
    refuse(build(dtype=torch.float64), tmp_path / "b", r"float32 in the file and torch\.float64 in the model")
    refuse_meta = build().to("meta")
    with pytest.raises(ArtifactError, match="meta device"):
        load_biases(refuse_meta, tmp_path / "b")


def test_biases_of_another_model_are_refused_unless_asked_for(tmp_path: Path) -> None:
    model = trained()
    biases = biases_of(model)
    metadata = {
        MODEL_FINGERPRINT: model_fingerprint(model),
        FROZEN_FINGERPRINT: frozen_weights_fingerprint(model, biases.keys()),
    }
    save_biases(tmp_path / "b", biases, metadata)
    load_biases(build(), tmp_path / "b")
    refuse(build(seed=1), tmp_path / "b", "other frozen weights")
    longer = nn.Sequential(*build(), nn.Linear(2, 2))
    refuse(longer, tmp_path / "b", "other names, shapes or dtypes")
    for other in (longer, build(seed=1)):
        load_biases(other, tmp_path / "b", strict=False)
        assert torch.equal(dict(other.named_parameters())["2.bias"], biases["2.bias"])


def test_a_fingerprint_depends_on_names_shapes_and_dtypes_and_not_on_values() -> None:
    base = model_fingerprint(build())
    assert base == model_fingerprint(build(seed=3)) == model_fingerprint(build().to("meta"))
    others = [build(width=6), build(dtype=torch.float64), nn.Sequential(*build(), nn.Linear(2, 2))]
    assert len({base, *map(model_fingerprint, others)}) == 4
    names = biases_of(build()).keys()
    assert frozen_weights_fingerprint(build(), names) == frozen_weights_fingerprint(trained(), names)
    assert frozen_weights_fingerprint(build(), names) != frozen_weights_fingerprint(build(seed=1), names)


def test_a_tied_bias_loads_under_either_of_its_names(tmp_path: Path) -> None:
    model = build()
    tied = nn.Module()
    tied.first, tied.second = model[0], model[0]
    for name in ("first.bias", "second.bias"):
        save_biases(tmp_path / "b", {name: torch.full((5,), 2.0)})
        load_biases(tied, tmp_path / "b")
        assert dict(model.named_parameters())["0.bias"].tolist() == [2.0] * 5


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_values_that_are_not_finite_are_neither_saved_nor_loaded(tmp_path: Path, bad: float) -> None:
    good = biases_of(trained())
    save_biases(tmp_path / "b", good)
    broken = {**good, "0.bias": torch.full((5,), bad)}
    for biases in (broken, {name: value.numpy() for name, value in broken.items()}):
        with pytest.raises(ArtifactError, match=r"'0\.bias' holds values that are not finite"):
            save_biases(tmp_path / "b", biases)
    load_biases(build(), tmp_path / "b")
    save_file({n: v.numpy() for n, v in broken.items()}, tmp_path / "b", {"format": "dpbitfit_fx.biases.v1"})
    refuse(build(), tmp_path / "b", "not finite")


@pytest.mark.parametrize("biases", [{}, {"a": np.arange(3)}, {"a": torch.arange(3)}, {"a": np.array(["x"])}])
def test_what_is_no_set_of_biases_is_not_saved(tmp_path: Path, biases: dict[str, Any]) -> None:
    with pytest.raises(ArtifactError):
        save_biases(tmp_path / "b", biases)
    with pytest.raises(ArtifactError, match="must be strings"):
        save_biases(tmp_path / "b", {"a": torch.ones(2)}, {"steps": 3})  # type: ignore[dict-item]
    assert not list(tmp_path.iterdir())


def test_a_damaged_or_foreign_file_is_refused(tmp_path: Path) -> None:
    save_biases(tmp_path / "b", biases_of(trained()))
    data = (tmp_path / "b").read_bytes()
    for damaged in (b"", data[:7], data[:40], data[:-1], data + b"x", b"\xff" * 64, b"PK\x03\x04" + data):
        (tmp_path / "d").write_bytes(damaged)
        refuse(build(), tmp_path / "d", "not a safetensors file, or is damaged")
    save_file({"0.bias": np.ones(5, np.float32)}, tmp_path / "f")
    refuse(build(), tmp_path / "f", "not one of trained biases")
    with pytest.raises(ArtifactError, match="does not exist"):
        load_biases(build(), tmp_path / "absent")


def test_an_interruption_while_copying_puts_the_old_values_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_biases(tmp_path / "b", biases_of(trained()))
    model, real, calls = build(), torch.Tensor.copy_, []
    before = biases_of(model)

    def interrupted(self: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(self, other)

    with monkeypatch.context() as patched:
        patched.setattr(torch.Tensor, "copy_", interrupted)
        with pytest.raises(KeyboardInterrupt):
            load_biases(model, tmp_path / "b")
    assert len(calls) > 2
    for name, value in biases_of(model).items():
        assert torch.equal(value, before[name])


def test_a_full_disk_leaves_the_earlier_biases(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_biases(tmp_path / "b", biases_of(trained()))
    data = (tmp_path / "b").read_bytes()

    def full(*_args: object) -> NoReturn:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patched:
        patched.setattr(os, "write", full)
        with pytest.raises(ArtifactError, match="disk is full"):
            save_biases(tmp_path / "b", biases_of(build()))
    assert (tmp_path / "b").read_bytes() == data
