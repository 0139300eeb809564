"""eval_model.onnx says what the model says: its losses as it is trained, and the user's own outputs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import dpbitfit_fx as dpb

pytest.importorskip("onnxscript")
ir = pytest.importorskip("onnx_ir")
runtime = pytest.importorskip("onnxruntime")

from dpbitfit_fx.errors import ExportError  # noqa: E402
from dpbitfit_fx.onnx_eval import eval_model  # noqa: E402
from dpbitfit_fx.onnx_export import flat_parameters, layout_of  # noqa: E402

ROWS, LENGTH = 6, 5


class Encoder(nn.Module):
    """Its mean reads padded tokens, of which torch's fast path makes zeros."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, dropout=0.0)
        self.encoder, self.head = nn.TransformerEncoder(layer, 1), nn.Linear(8, 3)

    def forward(self, b: Any) -> Any:
        return self.head(self.encoder(b["x"], src_key_padding_mask=b["padded"]).mean(1))


class Projected(nn.Module):
    """torch.onnx writes its cell states in the projection's width."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.head = nn.LSTM(8, 8, proj_size=4, batch_first=True), nn.Linear(4, 3)

    def forward(self, b: Any) -> Any:
        return self.head(self.lstm(b["x"])[0].mean(1))


class Bags(nn.Module):
    """torch.onnx writes loops and sequences for them."""

    def __init__(self) -> None:
        super().__init__()
        self.bag, self.head = nn.EmbeddingBag(20, 8, mode="mean", padding_idx=0), nn.Linear(8, 3)

    def forward(self, b: Any) -> Any:
        return self.head(torch.tanh(self.bag(b["ids"])))


class Turned(nn.Module):
    """``1.0 - x`` of whole numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.head = nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, b: Any) -> Any:
        kept = 1.0 - b["padded"].long()
        return self.head((torch.tanh(self.first(b["x"])) * kept[:, :, None]).mean(1))


MODELS = (Encoder, Projected, Bags, Turned)


def batch(rows: int, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "x": torch.randn(rows, LENGTH, 8, generator=generator),
        "padded": torch.arange(LENGTH) > (torch.arange(rows)[:, None] % 3 + 1),
        "ids": torch.randint(0, 20, (rows, LENGTH), generator=generator),
        "labels": torch.arange(rows) % 3,
    }


def losses(model: Any, b: Any) -> Tensor:
    return F.cross_entropy(model(b), b["labels"], reduction="none")


def mean(model: Any, b: Any) -> Tensor:
    return losses(model, b).mean()


def compiled(model: type[nn.Module], loss: Any = losses) -> dpb.PrivateStep:
    torch.manual_seed(0)
    step = dpb.compile(model().eval(), loss, batch(ROWS), noise_multiplier=1.0, expected_batch_size=4.0)
    with torch.no_grad():
        for p in step.parameters().values():
            p.add_(0.1 * torch.randn_like(p))
    return step


def says(step: dpb.PrivateStep, eval_output: Any, given: dict[str, Tensor], folder: Path, *mask: Tensor) -> Any:
    """What eval_model.onnx computes, in onnxruntime."""
    layout = layout_of(step)
    model, names = eval_model(step, layout, eval_output)
    ir.save(model, folder / "eval.onnx")
    flat = flat_parameters(step, layout.parameters)
    feed = {b.name: given[b.path].numpy() for b in layout.batch}
    feed |= {p.onnx_name: flat[p.offset : p.offset + p.numel].reshape(p.shape) for p in layout.parameters}
    feed |= dict(zip(("sample_mask",), (m.numpy() for m in mask), strict=False))
    session = runtime.InferenceSession(folder / "eval.onnx", providers=["CPUExecutionProvider"])
    assert {i.name for i in session.get_inputs()} <= feed.keys()
    return session.run(names, {i.name: feed[i.name] for i in session.get_inputs()})


@pytest.mark.parametrize("loss", [losses, mean], ids=["per sample", "mean"])
@pytest.mark.parametrize("model", MODELS)
def test_the_mean_loss_is_that_of_the_unmasked_rows_as_they_are_trained(
    model: type[nn.Module], loss: Any, tmp_path: Path
) -> None:
    step = compiled(model, loss)
    for rows in (3, 8):
        given, mask = batch(rows, seed=rows), torch.arange(rows) % 2
        (found,) = says(step, None, given, tmp_path, mask.float())
        each = [losses(step.model, {k: v[i : i + 1] for k, v in given.items()}) for i in range(rows) if mask[i]]
        assert np.isclose(found, torch.cat(each).mean().item(), rtol=1e-5)
    (nothing,) = says(step, None, given, tmp_path, torch.zeros(rows))
    assert nothing == 0.0


@pytest.mark.parametrize("model", (Encoder, Bags, Turned))
def test_the_users_own_outputs_are_those_of_the_model_that_trains(model: type[nn.Module], tmp_path: Path) -> None:
    step, given = compiled(model), batch(8, seed=1)
    (found,) = says(step, lambda m, b: m(b), given, tmp_path)
    assert np.allclose(found, step.model(given).detach(), rtol=1e-4, atol=1e-5)


def test_an_output_that_cannot_be_traced_is_named(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="eval_output could not be turned into ONNX"):
        says(compiled(Turned), lambda m, b: m(b) if float(b["x"].sum()) > 0 else b["x"], batch(3), tmp_path)


def test_torchs_fast_path_is_as_it_was_afterwards(tmp_path: Path) -> None:
    for enabled in (True, False):
        torch.backends.mha.set_fastpath_enabled(enabled)
        try:
            says(compiled(Turned), None, batch(3), tmp_path, torch.ones(3))
            assert torch.backends.mha.get_fastpath_enabled() is enabled
        finally:
            torch.backends.mha.set_fastpath_enabled(True)
