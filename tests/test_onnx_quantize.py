"""Frozen weights in 8 or 4 bits: what the graphs compute is what PyTorch does on the dequantized weights, and no record's
gradient feels another's."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("onnx")
pytest.importorskip("onnxscript")
ort = pytest.importorskip("onnxruntime")

import onnx  # noqa: E402
from onnx import TensorProto, helper, numpy_helper  # noqa: E402
from typer.testing import CliRunner  # noqa: E402

import dpbitfit_fx as dpb  # noqa: E402
from dpbitfit_fx.errors import ExportError, SealBroken  # noqa: E402
from dpbitfit_fx.onnx_check import check_onnx  # noqa: E402
from dpbitfit_fx.onnx_export import export_onnx  # noqa: E402
from dpbitfit_fx.onnx_graph import OnnxGraph  # noqa: E402
from dpbitfit_fx.onnx_quantize import FrozenWeights, in_torch, quantized  # noqa: E402
from dpbitfit_fx.ort_artifacts import WEIGHTS, read_manifest  # noqa: E402
from dpbitfit_fx.ort_device import session_options  # noqa: E402
from dpbitfit_fx.ort_runner import OrtTrainer  # noqa: E402

WORDS, WIDTH, LENGTH = 80, 64, 6
LARGE = {"words.weight", "up.weight", "down.weight", "odd.weight"}


class Net(torch.nn.Module):
    """A table, two products whose rows blocks of 32 divide, one whose rows they do not, a buffer, and small weights."""

    def __init__(self) -> None:
        super().__init__()
        self.words = torch.nn.Embedding(WORDS, WIDTH)
        self.up, self.down = torch.nn.Linear(WIDTH, 96), torch.nn.Linear(96, 40)
        self.odd, self.last = torch.nn.Linear(40, WIDTH), torch.nn.Linear(WIDTH, 3)
        self.register_buffer("mix", torch.randn(WIDTH, WIDTH) / WIDTH**0.5)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        h = torch.tanh(self.down(torch.tanh(self.up(self.words(ids) @ self.mix))))
        logits: torch.Tensor = self.last(torch.tanh(self.odd(h)).mean(1))
        return logits


def loss(model: Any, batch: Any) -> torch.Tensor:
    return torch.nn.functional.cross_entropy(model(batch["ids"]), batch["y"], reduction="none")


def example(rows: int = 4) -> dict[str, torch.Tensor]:
    return {"ids": torch.randint(0, WORDS, (rows, LENGTH)), "y": torch.randint(0, 3, (rows,))}


@pytest.fixture(scope="module")
def step() -> Any:
    torch.manual_seed(7)
    return dpb.compile(Net(), loss, example(), noise_multiplier=0.8, expected_batch_size=6.0)


@pytest.fixture(scope="module", params=[8, 4])
def bits(request: pytest.FixtureRequest) -> int:
    return int(request.param)


@pytest.fixture(scope="module")
def folder(step: Any, bits: int, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Compared with PyTorch on the dequantized weights, at 1e-5, by the export itself."""
    return export_onnx(step, tmp_path_factory.mktemp("quantized") / "out", weight_bits=bits)


def graph_of(folder: Path) -> Any:
    return onnx.load(folder / "grad_step.onnx", load_external_data=False).graph


def clipped_sum(session: Any, ids: torch.Tensor, mask: list[float], theta: Any) -> Any:
    given = {"ids": ids.numpy(), "y": np.zeros(len(mask), np.int64), "sample_mask": np.array(mask, np.float32)}
    given |= {"theta": theta, "accumulator": np.zeros_like(theta)}
    return session.run(None, given)[0]


def neighbours(step: Any) -> list[torch.Tensor]:
    """Two batches whose first record is the same, of small embeddings; the other records have small ones, or the largest."""
    order = step.model.words.weight.detach().abs().amax(1).argsort()
    first = order[:LENGTH].expand(3, LENGTH).clone()
    second = first.clone()
    second[1:] = order[-1]
    return [first, second]


# -- the numbers ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(5, 64), (64, 5), (7, 96), (6, 8, 3, 3), (1, 9, 64), (3, 40, 32)])
def test_no_number_moves_by_more_than_half_a_scale(bits: int, shape: tuple[int, ...]) -> None:
    weight = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    weight.reshape(-1)[:3] = 0
    found = quantized(weight, bits)
    again = found.values()
    assert again.shape == shape and again.dtype == np.float32
    width = weight.size // found.scale.size
    gap, half = np.abs(again - weight).reshape(-1, width), found.scale.reshape(-1, 1) / 2
    # In 4 bits the zero point is rounded too, so that an end of a block may move by a whole scale.
    assert (gap <= half * (1.001 if found.bits == 8 else 2.001)).all()
    assert found.bits == (4 if bits == 4 and width == 32 else 8)


def test_in_8_bits_they_are_those_of_onnxruntime_row_by_row() -> None:
    from onnxruntime.quantization.quant_utils import quantize_data

    weight = np.random.default_rng(1).normal(size=(9, 64)).astype(np.float32)
    weight[4] = 0
    found = quantized(weight, 8)
    for row, codes, scale in zip(weight, found.codes[:, 0], found.scale[:, 0], strict=True):
        *_, zero, wanted_scale, wanted = quantize_data(row, TensorProto.INT8, True)
        assert int(zero) == 0 and float(wanted_scale) == float(scale) and np.array_equal(wanted, codes)


def test_in_4_bits_they_are_those_of_onnxruntime_block_by_block() -> None:
    from onnxruntime.quantization.quant_utils import quantize_data

    weight = np.random.default_rng(2).normal(size=(3, 64)).astype(np.float32)
    again = quantized(weight, 4).values().reshape(-1, 32)
    for block, values in zip(weight.reshape(-1, 32), again, strict=True):
        *_, zero, scale, codes = quantize_data(block, TensorProto.UINT4, False)
        assert np.array_equal((codes.astype(np.float32) - np.float32(zero)) * np.float32(scale), values)


# -- the export -------------------------------------------------------------------------------------------------------


def test_the_graph_computes_with_the_dequantized_weights_and_with_no_others(step: Any, bits: int, folder: Path) -> None:
    with in_torch(FrozenWeights([step], bits)):
        check_onnx(step, folder)  # at 1e-5
    with pytest.raises(ExportError, match="the clipped sum of a batch of"):
        check_onnx(step, folder)
    said = read_manifest(folder)["frozen_weights"]
    assert said["bits"] == bits and said["quantizer"] == f"onnxruntime.quantization {ort.__version__}"
    assert 1e-5 < said["gradient_distance"][0] < (0.05 if bits == 8 else 0.5)


def test_large_frozen_weights_alone_are_quantized_and_no_float_copy_is_left(bits: int, folder: Path) -> None:
    graph = graph_of(folder)
    kinds = {t.name: t.data_type for t in graph.initializer}
    assert {n.removesuffix("_dpbitfit_codes") for n in kinds if n.endswith("_dpbitfit_codes")} == LARGE
    assert not LARGE & kinds.keys()
    sizes = [np.prod(t.dims) * 4 for t in graph.initializer if t.data_type == TensorProto.FLOAT and "dpbitfit" not in t.name]
    assert max(sizes) == 4 * WIDTH * WIDTH  # the buffer, as it was
    said = read_manifest(folder)["frozen_weights"]["values"]
    odd = WIDTH * 40  # rows of 40
    total = WORDS * WIDTH + 96 * WIDTH + 96 * 40 + odd
    assert said == ({"8": total, "4": 0} if bits == 8 else {"8": odd, "4": total - odd})


def test_the_model_is_left_as_it_was_and_the_default_is_float32(step: Any, bits: int, tmp_path: Path) -> None:
    before = {n: p.detach().clone() for n, p in step.model.named_parameters()}
    with pytest.raises(ZeroDivisionError), in_torch(FrozenWeights([step], bits)):
        assert not torch.equal(step.model.up.weight, before["up.weight"])
        raise ZeroDivisionError
    assert all(torch.equal(p, before[n]) for n, p in step.model.named_parameters())
    plain = export_onnx(step, tmp_path / "plain")
    assert not any("DequantizeLinear" in n.op_type for n in graph_of(plain).node)
    assert "frozen_weights" not in read_manifest(plain)


def test_each_product_dequantizes_for_itself_also_after_onnxruntime_has_optimized(folder: Path, tmp_path: Path) -> None:
    """Joined, or folded, the weights would lie in memory in float32."""
    options = ort.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    options.log_severity_level = 4
    ort.InferenceSession(str(folder / "grad_step.onnx"), options, providers=["CPUExecutionProvider"])
    nodes = onnx.load(tmp_path / "optimized.onnx", load_external_data=False).graph.node
    made = [n.output[0] for n in nodes if n.op_type == "DequantizeLinear"]
    assert len(made) == 5  # down and odd forward and backward, up forward; of the table, rows only
    assert not {n.op_type for n in nodes} & {"MatMulNBits", "DynamicQuantizeMatMul", "MatMulIntegerToFloat"}


def test_no_product_reads_a_dequantized_weight_directly(folder: Path) -> None:
    """ONNX Runtime 1.32 makes one operator of the two, which rounds activations to 8 bits: MiniLM's logits were 1 to 6 % off."""
    nodes = graph_of(folder).node
    made = {n.output[0] for n in nodes if n.op_type == "DequantizeLinear"}
    sizes = {t.name: t for t in graph_of(folder).initializer}
    readers = [n for n in nodes if made & {*n.input}]
    assert len(readers) == len(made) and {n.op_type for n in readers} == {"Reshape"}
    assert all(numpy_helper.to_array(sizes[n.input[1]]).size == 2 for n in readers)  # of [rows, 1, K] or [blocks, 32]
    codes = [t for t in sizes.values() if t.name.endswith("_dpbitfit_codes")]
    assert all(len(t.dims) == 3 for t in codes)
    # And where an ONNX Runtime to come joins them all the same, our sessions take the product in float32.
    assert session_options(folder).get_session_config_entry("session.qdq_matmulnbits_accuracy_level") == "1"


def test_a_row_of_another_record_moves_no_gradient_at_all(step: Any, folder: Path) -> None:
    session = ort.InferenceSession(str(folder / "grad_step.onnx"), providers=["CPUExecutionProvider"])
    theta = np.concatenate([p.detach().numpy().ravel() for p in step.parameters().values()])
    first, second = (clipped_sum(session, x, [1, 0, 0], theta) for x in neighbours(step))
    assert np.array_equal(first, second) and np.abs(first).max() > 0


def test_the_runner_trains_from_it_and_privacy_json_says_how_weights_are_held(
    step: Any, bits: int, folder: Path, tmp_path: Path
) -> None:
    data = {"ids": np.random.default_rng(3).integers(0, WORDS, (24, LENGTH)), "y": np.arange(24) % 3}
    with OrtTrainer(
        folder, data, steps=2, target_delta=1e-3, output_dir=tmp_path / "run", insecure_seed_for_tests=1
    ) as trainer:
        trainer.train()
        trainer.finish()
    said = json.loads((tmp_path / "run" / "privacy.json").read_text())["public_declarations"]["frozen_weights"]
    assert said["bits"] == bits and "onnxruntime.quantization" in said["quantizer"]
    # The model's own weights are the ones that the file names, so that the biases go into the float32 model as ever.
    model = dpb.load_biases(copy.deepcopy(step.model), tmp_path / "run" / "biases.safetensors")
    assert not torch.equal(model.last.bias, step.model.last.bias)


def test_the_graphs_of_a_run_and_its_evaluation_read_one_copy(bits: int, tmp_path: Path) -> None:
    torch.manual_seed(7)
    trained = (["last.*"], ["up.weight", "last.bias"])
    phases = [dpb.RunPhase(names, max_steps=2, expected_batch_size=6) for names in trained]
    out = dpb.export_run(
        Net(), loss, example(), tmp_path / "out", phases=phases, dataset_size=24, target_delta=1e-3, noise_multiplier=1.0,
        eval_output=lambda m, b: m(b["ids"]), weight_bits=bits,
    )  # fmt: skip
    places = []
    for name in ("grad_step_1", "grad_step_2", "eval_model"):
        graph = onnx.load(out / f"{name}.onnx", load_external_data=False).graph
        names = [t.name for t in graph.initializer]
        assert not any(n.startswith("up.weight_dpbitfit") for n in names)  # the second phase trains it: float32 in both
        (table,) = [t for t in graph.initializer if t.name.endswith("words.weight_dpbitfit_codes")]
        places.append({e.key: e.value for e in table.external_data})
    assert places[0] == places[1] == places[2] and places[0].get("location", WEIGHTS) == WEIGHTS


# -- refused ----------------------------------------------------------------------------------------------------------


def test_what_cannot_be_quantized_is_refused_with_a_reason(step: Any, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="weight_bits must be 8 or 4"):
        export_onnx(step, tmp_path / "out", weight_bits=3)
    small = torch.nn.Linear(3, 2)
    compiled = dpb.compile(
        small, lambda m, b: m(b["x"]).square().sum(1), {"x": torch.randn(3, 3)}, noise_multiplier=1.0, expected_batch_size=2.0
    )
    with pytest.raises(ExportError, match="no frozen weight of more than 4096 bytes"):
        export_onnx(compiled, tmp_path / "out", weight_bits=8)
    with pytest.raises(ExportError, match="not finite"):
        quantized(np.full((64, 64), np.inf, np.float32), 8)
    assert not (tmp_path / "out").exists()


def test_the_command_refuses_it_for_onnx_runtime_training(tmp_path: Path) -> None:
    from dpbitfit_fx.cli import app

    words = ["export", str(tmp_path), str(tmp_path), "--output", str(tmp_path / "out"), "--weight-bits", "8"]
    done = CliRunner().invoke(app, words)
    assert done.exit_code != 0 and "--format onnx" in f"{done.output}{done.exception}"


def test_without_the_quantizer_the_export_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "onnxruntime.quantization", None)
    with pytest.raises(ExportError, match="pip install onnx onnxruntime"):
        quantized(np.ones((64, 64), np.float32), 8)


def quantize_activations(graph: Any, product: Any) -> None:
    """``product`` as onnxruntime's dynamic quantization writes it: one scale over all records of the batch."""
    at = list(graph.node).index(product)
    x, y = product.input[0], product.output[0]
    shape = next(t.dims for t in graph.initializer if t.name == "mix")
    codes = np.random.default_rng(0).integers(0, 255, list(shape)).astype(np.uint8)
    graph.initializer.append(numpy_helper.from_array(codes, "w"))
    graph.initializer.append(numpy_helper.from_array(np.array(1e-3, np.float32), "w_scale"))
    nodes = [
        helper.make_node("DynamicQuantizeLinear", [x], ["x_codes", "x_scale", "x_zero"]),
        helper.make_node("MatMulInteger", ["x_codes", "w", "x_zero"], ["whole"]),
        helper.make_node("Cast", ["whole"], ["wide"], to=TensorProto.FLOAT),
        helper.make_node("Mul", ["x_scale", "w_scale"], ["both"]),
        helper.make_node("Mul", ["wide", "both"], [y]),
    ]
    del graph.node[at]
    for i, node in enumerate(nodes):
        graph.node.insert(at + i, node)


def test_dynamically_quantized_activations_mix_records_and_the_seal_refuses_them(
    step: Any, tmp_path: Path
) -> None:
    model = onnx.load(export_onnx(step, tmp_path / "plain") / "grad_step.onnx")
    product = next(n for n in model.graph.node if "mix" in n.input and n.op_type in ("MatMul", "Gemm"))
    quantize_activations(model.graph, product)
    onnx.save(model, tmp_path / "mixing.onnx")
    session = ort.InferenceSession(str(tmp_path / "mixing.onnx"), providers=["CPUExecutionProvider"])
    theta = np.concatenate([p.detach().numpy().ravel() for p in step.parameters().values()])
    first, second = (clipped_sum(session, x, [1, 0, 0], theta) for x in neighbours(step))
    assert not np.array_equal(first, second)  # a masked record moves another one's gradient
    with pytest.raises(SealBroken, match="it holds DynamicQuantizeLinear: quantized activations"):
        OnnxGraph(tmp_path / "mixing.onnx")


@pytest.mark.parametrize(
    ("nodes", "reason"),
    [
        ([("QuantizeLinear", ["x", "one"], "q")], "it holds QuantizeLinear"),
        ([("MatMulInteger", ["codes", "codes"], "q")], "it holds MatMulInteger"),
        ([("Cast", ["x"], "q"), ("DequantizeLinear", ["q", "one"], "y")], "DequantizeLinear of something that is no constant"),
        ([("ReduceMax", ["x"], "s"), ("DequantizeLinear", ["codes", "s"], "y")], "DequantizeLinear of something that is no"),
    ],
)  # fmt: skip
def test_the_seal_takes_dequantized_constants_and_no_other_integers(
    nodes: list[tuple[str, list[str], str]], reason: str, tmp_path: Path
) -> None:
    def graph(extra: list[tuple[str, list[str], str]]) -> OnnxGraph:
        options: dict[str, Any] = {"Cast": {"to": TensorProto.INT8}, "ReduceMax": {"keepdims": 0}}
        last = helper.make_node("DequantizeLinear", ["codes", "one"], ["weight"])
        made = [helper.make_node(op, inputs, [out], **options.get(op, {})) for op, inputs, out in extra]
        x, y = (helper.make_tensor_value_info(n, TensorProto.FLOAT, [2, 2]) for n in ("x", "out"))
        constants = [numpy_helper.from_array(np.ones((2, 2), np.int8), "codes"), numpy_helper.from_array(np.float32(1), "one")]
        total = helper.make_node("Add", ["x", "weight"], ["out"])
        opset = [helper.make_opsetid("", 18)]
        model = helper.make_model(helper.make_graph([last, *made, total], "g", [x], [y], constants), opset_imports=opset)
        onnx.save(model, tmp_path / "g.onnx")
        return OnnxGraph(tmp_path / "g.onnx")

    graph([])
    with pytest.raises(SealBroken, match=reason):
        graph(nodes)
