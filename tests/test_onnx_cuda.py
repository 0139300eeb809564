"""The published kernel tables say, without a GPU, which nodes of an exported graph the CUDA provider leaves to the CPU."""

from __future__ import annotations

import json
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxscript")

import zoo  # noqa: E402
from onnx import TensorProto, helper  # noqa: E402

from dpbitfit_fx.errors import ExportError  # noqa: E402
from dpbitfit_fx.onnx_cuda import cuda_kernels, left_to_cpu, tables  # noqa: E402
from dpbitfit_fx.onnx_export import SGD, AdamW, export_update, layout_of  # noqa: E402
from dpbitfit_fx.onnx_weights import save_models  # noqa: E402
from dpbitfit_fx.ort_export import optimizer_model  # noqa: E402

ROOT = Path(__file__).resolve().parents[1]
RELEASES = tuple(tables())


def model(*nodes: Any, kind: int = TensorProto.FLOAT, opset: int = 18) -> Any:
    """x[2, 3] -> y, whose type onnx infers."""
    given = [helper.make_tensor_value_info("x", kind, [2, 3])]
    graph = helper.make_graph(list(nodes), "g", given, [onnx.ValueInfoProto(name="y")])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset), helper.make_opsetid("mine", 1)])


def lacking(*nodes: Any, release: str = "1.19.2", **options: Any) -> list[str]:
    return [str(n) for n in cuda_kernels(model(*nodes, **options), release)]


def node(op: str, given: str = "x", made: str = "y", **attributes: Any) -> Any:
    return helper.make_node(op, given.split(), made.split(), **attributes)


@pytest.mark.parametrize("release", RELEASES)
def test_a_graph_of_operators_with_kernels_lacks_none_and_each_planted_one_is_listed(release: str) -> None:
    good = [node("MatMul", "x z", "p"), node("Relu", "p", "q"), node("Shape", "q", "s"), node("Reshape", "q s")]
    first = node("Transpose", "x", "z", perm=[1, 0])
    assert lacking(first, *good, release=release) == []
    assert lacking(first, *good, node("Tan", "q", "t"), release=release) == ["Tan(T float)"]
    assert lacking(first, *good, node("Invented", "q", "t"), release=release) == ["Invented(0 float)"]
    assert lacking(first, *good, node("Relu", "q", "t", domain="mine"), release=release) == ["mine:Relu(0 float)"]


@pytest.mark.parametrize("release", RELEASES)
def test_the_types_decide_not_the_operators_name(release: str) -> None:
    assert (
        lacking(node("Sqrt"), release=release) == lacking(node("Sqrt"), kind=TensorProto.DOUBLE, release=release) == []
    )
    assert lacking(node("ReduceMean"), kind=TensorProto.INT64, release=release) == ["ReduceMean(T int64)"]
    assert lacking(node("Sign"), kind=TensorProto.BOOL, release=release) == ["Sign(T bool)"]
    cast = node("Cast", "x", "i", to=TensorProto.INT64)
    assert lacking(cast, node("Erf", "i"), release=release) == ["Erf(T int64)"]


def test_the_opsets_version_of_an_operator_decides() -> None:
    """1.19.2 has ArgMax for opset 11 and older only; the newer table has it again."""
    assert lacking(node("ArgMax", axis=1)) == ["ArgMax(T float)"]
    assert lacking(node("ArgMax", axis=1), release=RELEASES[-1]) == []
    with pytest.raises(ExportError, match=r"opset 18.*opset 17"):
        lacking(node("Relu"), opset=17)


def test_a_value_of_unknown_type_counts_as_lacking() -> None:
    hidden = node("Hidden", "x", "h", domain="mine")
    assert lacking(hidden, node("Sqrt", "h")) == ["Sqrt(T a type that is not known)", "mine:Hidden(0 float)"]


def test_nodes_inside_a_branch_count() -> None:
    branch = helper.make_graph([node("Tan", "x", "b")], "branch", [], [onnx.ValueInfoProto(name="b")])
    condition = helper.make_node("Constant", [], ["c"], value=helper.make_tensor("c", TensorProto.BOOL, [], [True]))
    chosen = helper.make_node("If", ["c"], ["y"], then_branch=branch, else_branch=branch)
    assert "Tan(T float)" in lacking(condition, chosen)


@pytest.mark.parametrize("pads", [[1, 1, 1, 1], [1, 0, 1, 1]])
def test_a_transposed_convolution_that_is_padded_unevenly_is_left_to_the_cpu(pads: list[int]) -> None:
    shapes = {"x": [1, 2, 5, 5], "w": [2, 3, 3, 3]}
    given = [helper.make_tensor_value_info(n, TensorProto.FLOAT, s) for n, s in shapes.items()]
    graph = helper.make_graph([node("ConvTranspose", "x w", pads=pads)], "g", given, [onnx.ValueInfoProto(name="y")])
    found = cuda_kernels(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)]), "1.19.2")
    assert [n.note for n in found] == ([] if pads[0] == pads[1] else ["padded unevenly"])


@pytest.mark.parametrize("optimizer", [SGD(), AdamW()])
def test_every_update_and_optimizer_graph_runs_on_cuda_whole(optimizer: Any, tmp_path: Path) -> None:
    step = zoo.compile_case(zoo.cases()["mlp"]).with_noise(1.0, 4.0)
    save_models({"update_step.onnx": export_update(step, optimizer, layout_of(step))}, tmp_path)
    onnx.save(optimizer_model(optimizer, 3, 4.0), tmp_path / "optimizer_model.onnx")
    found = left_to_cpu(tmp_path)
    assert found["update_step.onnx"] == {release: [] for release in RELEASES}
    assert found["optimizer_model.onnx"]["1.19.2"] == []


TABLE = """
## Operators implemented by CPUExecutionProvider
|**Operator Domain:** *ai.onnx*||||
|Tan|*in* input:**T**<br> *out* output:**T**|7+|**T** = tensor(float)|
## Operators implemented by CUDAExecutionProvider
|**Operator Domain:** *ai.onnx*||||
|Add|*in* A:**T**<br> *out* C:**T**|14+|**T** = tensor(float), tensor(double)|
|||13|**T** = tensor(int8)|
|Equal|*in* A:**T**<br> *out* C:**T1**|[7, 18]|**T** = tensor(bool)<br/> **T1** = tensor(bool)|
|Relu|*in* X:**T**<br> *out* Y:**T**|13+|**T** = tensor(float)|
|**Operator Domain:** *com.microsoft*||||
|Gelu|*in* X:**T**<br> *out* Y:**T**|1+|**T** = tensor(float)|
## Operators implemented by DmlExecutionProvider
|**Operator Domain:** *ai.onnx*||||
|Sin|*in* input:**T**<br> *out* output:**T**|7+|**T** = tensor(float)|
"""


def test_the_derivation_reads_cudas_rows_alone_and_takes_the_version_that_opset_18_selects() -> None:
    """Add is of 14, Equal of 13 there. Relu is of 14: an open "13+" does not serve it, as onnxruntime looks kernels up."""
    tool = runpy.run_path(str(ROOT / "tools" / "cuda_kernels"))
    assert tool["kernels"](TABLE) == {"Add": {"T": "double float"}, "Equal": {"T": "bool", "T1": "bool"}}
    registered = (
        "BuildKernelCreateInfo<ONNX_OPERATOR_TYPED_KERNEL_CLASS_NAME(kCudaExecutionProvider, kMSDomain, 1, {}, {})>,"
    )
    lines = [registered.format(k, "InPlaceAccumulatorV2") for k in ("float_float", "float_MLFloat16")]
    assert tool["training"]("\n".join([*lines, registered.format("float", "ZeroGradient")])) == {
        "com.microsoft:InPlaceAccumulatorV2": {"0": "float", "1": "float float16"}
    }


def test_the_tables_are_read_without_torch() -> None:
    script = (
        "import json, sys, dpbitfit_fx.onnx_cuda as c; print(json.dumps([len(c.tables()), 'torch' in sys.modules]))"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == [len(RELEASES), False]
