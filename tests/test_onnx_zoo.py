"""Architectures of many kinds leave PyTorch as one file for every batch size; ``tools/zoo --onnx`` runs all of the zoo."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("onnx")
pytest.importorskip("onnxscript")
pytest.importorskip("onnxruntime")

import zoo_torch
from onnx_replay import replay
from onnx_table import LIMIT, markdown, save_probes
from zoo import compile_case
from zoo_table import Row

from dpbitfit_fx.errors import ExportError
from dpbitfit_fx.onnx_export import export_core, export_onnx, layout_of, plain_gradient_model
from dpbitfit_fx.onnx_weights import save_models

# Small, and each with operators that no other has.
DIVERSE = (
    "prelu",
    "conv3d",
    "distances",
    "binned",
    "bag_of_maxima",
    "sort_topk_gather",
    "weight_norm",
    "windows",
    "unpooled",
    "rms_norm",
    "writes_slices",
    "group_norm",
)


def step_of(name: str) -> Any:
    return compile_case(zoo_torch.cases()[name]).with_noise(1.0, 4.0)


@pytest.mark.parametrize("name", DIVERSE)
def test_one_file_has_pytorchs_gradients_for_batches_of_1_3_and_8(name: str, tmp_path: Path) -> None:
    step = step_of(name)
    save_models({"grad_step.onnx": plain_gradient_model(export_core(step, layout_of(step)))}, tmp_path)
    save_probes(step, zoo_torch.cases()[name], tmp_path)
    errors = replay(tmp_path)["strict"]
    assert list(errors) == ["1", "3", "8"] and max(errors.values()) <= LIMIT, errors


def test_a_model_that_factorizes_matrices_is_refused_with_operator_reason_and_line(tmp_path: Path) -> None:
    with pytest.raises(
        ExportError, match=r"aten\.\w*linalg\w+\.default.*no factorization.* It comes from .*zoo_torch\.py"
    ):
        export_onnx(step_of("linear_algebra"), tmp_path / "pair")
    assert not (tmp_path / "pair").exists()


def test_the_table_counts_what_failed_and_tells_why_something_was_refused() -> None:
    def run(error: float) -> Row:
        return {"onnxruntime": "1.19.2", "strict": {"1": error, "3": 0.0, "8": 0.0}, "update": 0.0}

    common = {"family": "", "reason": "", "code": "abc"}
    good = {**common, "name": "good", "status": "exact", "runs": [run(1e-7)], "operators": {"Add": 2}, "bytes": 2048}
    rows: list[Row] = [
        good,
        {**good, "name": "bad", "status": "WRONG", "runs": [run(0.1)]},
        {**common, "name": "gone", "status": "FAILED", "reason": "its process ended with exit code -11"},
        {**common, "name": "never", "status": "refused", "reason": "aten.x.default has no ONNX form"},
        {**common, "name": "outside", "status": "not compiled"},
    ]
    text = markdown(rows, len(rows))
    assert "4 architectures: 1 export and match" in text and "1 are refused by name; 2 FAIL" in text
    assert "| bad |  | WRONG | 1e-01 |" in text and "exit code -11" in text and "outside" not in text
    assert "aten.x.default has no ONNX form" in text.partition("## Refused")[2]


def test_the_table_names_the_operators_that_cuda_leaves_to_the_cpu_and_the_architectures_that_have_them() -> None:
    run = {"onnxruntime": "1.19.2", "strict": {"1": 0.0, "3": 0.0, "8": 0.0}, "update": 0.0}
    common = {"family": "", "reason": "", "status": "exact", "runs": [run], "operators": {"Add": 2}, "bytes": 2048}
    needs = [["Add", {"T": "float"}, ""]]
    rows: list[Row] = [
        {**common, "name": "whole", "needs": needs},
        {**common, "name": "torn", "needs": [*needs, ["ArgMax", {"T": "float"}, ""], ["Tan", {"T": "float"}, ""]]},
        {**common, "name": "early"},
    ]
    text = markdown(rows, len(rows))
    assert "| whole |  | exact | 0e+00 | 0e+00 | 0e+00 | not run | all | all | 18 |" in text
    assert "| not run | ArgMax, Tan | Tan | 18 |" in text and "| not run | not run | not run | 18 |" in text
    told = text.partition("## Left to the CPU")[2]
    assert "| `ArgMax(T float)` | the pair | 1.19.2 | torn |" in told
    assert "| `Tan(T float)` | the pair | 1.19.2, 1.27 | torn |" in told and "Add" not in told


def test_the_second_runtime_needs_neither_torch_nor_this_package() -> None:
    source = Path(sys.modules["onnx_replay"].__file__ or "").read_text()
    imported = {line.split()[1] for line in source.splitlines() if line.startswith(("import ", "from "))}
    assert imported <= {"__future__", "json", "sys", "pathlib", "typing", "numpy", "onnxruntime"}
