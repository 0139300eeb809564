"""What the plain ONNX pair and every export promise."""

from __future__ import annotations

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
from fit_cases import mlp, mlp_loss  # noqa: E402
from onnx import numpy_helper  # noqa: E402
from onnx_cases import compiled, flat  # noqa: E402

from dpbitfit_fx.compile import compile as compile_step  # noqa: E402
from dpbitfit_fx.errors import ArtifactError, ExportError  # noqa: E402
from dpbitfit_fx.onnx_check import check_onnx  # noqa: E402
from dpbitfit_fx.onnx_export import RANDOM_OPS, AdamW, export_onnx, resolve_optimizer  # noqa: E402
from dpbitfit_fx.onnx_lowering import Lowered  # noqa: E402
from dpbitfit_fx.ort_artifacts import clipping_of  # noqa: E402
from dpbitfit_fx.ort_runner import read_manifest  # noqa: E402
from dpbitfit_fx.passes.clipping import AutomaticClipping, PerLayerClipping  # noqa: E402

aten = torch.ops.aten


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any, Path]:
    step, data = compiled("mlp")
    return step, data, export_onnx(step, tmp_path_factory.mktemp("plain") / "out", optimizer=AdamW(lr=0.01))


def test_one_file_takes_batches_of_1_3_and_8_and_equals_the_pytorch_step(plain: tuple[Any, Any, Path]) -> None:
    step, data, folder = plain
    session = ort.InferenceSession(str(folder / "grad_step.onnx"), providers=["CPUExecutionProvider"])
    for rows in (1, 3, 8):
        batch = {k: v[:rows] for k, v in data.items()}
        mask, start = torch.ones(rows), torch.linspace(-1, 1, step.num_trainable)
        want = step.accumulate(batch, mask, start).numpy()
        feed = {k: v.numpy() for k, v in batch.items()}
        (got,) = session.run(
            None, {**feed, "sample_mask": mask.numpy(), "theta": flat(step), "accumulator": start.numpy()}
        )
        assert np.linalg.norm(got - want) <= 1e-6 * np.linalg.norm(want)


def test_exported_graphs_draw_no_random_numbers_and_are_plain_opset_18(plain: tuple[Any, Any, Path]) -> None:
    for name in ("grad_step.onnx", "update_step.onnx"):
        model = onnx.load(plain[2] / name)
        assert not RANDOM_OPS & {n.op_type for n in model.graph.node}
        assert [(o.domain, o.version) for o in model.opset_import] == [("", 18)]
        assert model.ir_version == 10
        assert not any(n.metadata_props for n in model.graph.node)


def test_a_graph_edited_after_the_export_fails_the_numeric_check(plain: tuple[Any, Any, Path]) -> None:
    step, _data, folder = plain
    path = folder / "update_step.onnx"
    original = path.read_bytes()
    try:
        scales = []
        for index, tensor in enumerate(onnx.load_from_string(original).graph.initializer):
            value = numpy_helper.to_array(tensor)
            if (
                value.size == 1
                and value.dtype.kind == "f"
                and any(abs(float(value.ravel()[0]) - known) < 1e-6 for known in (step.noise_scale, 6.0, 1 / 6))
            ):
                scales.append(index)
        assert len(scales) >= 2, "sigma and the denominator are constants of the graph"
        for index in scales:
            model = onnx.load_from_string(original)
            tensor = model.graph.initializer[index]
            tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor) / 2, tensor.name))
            path.write_bytes(model.SerializeToString())
            with pytest.raises(ExportError, match="does not compute"):
                check_onnx(step, folder)
        path.write_bytes(original)
        gradient = folder / "grad_step.onnx"
        kept = gradient.read_bytes()
        model = onnx.load_from_string(kept)
        last = next(n for n in model.graph.node if "accumulator_out" in n.output)
        assert last.op_type == "Add"
        last.op_type = "Sub"
        gradient.write_bytes(model.SerializeToString())
        with pytest.raises(ExportError, match="clipped sum"):
            check_onnx(step, folder)
        with pytest.raises(ArtifactError, match="changed after the export"):
            read_manifest(folder)
        gradient.write_bytes(kept)
    finally:
        path.write_bytes(original)
    check_onnx(step, folder)


def test_a_step_without_noise_is_not_exported(tmp_path: Path) -> None:
    step, _ = compiled("mlp", noise_multiplier=None, expected_batch_size=None)
    with pytest.raises(ExportError, match="adds no noise"):
        export_onnx(step, tmp_path / "out")
    with pytest.raises(ExportError, match="Give both"):
        export_onnx(step, tmp_path / "out", noise_multiplier=1.0)
    assert not list(tmp_path.iterdir())


def test_a_folder_that_is_not_an_export_is_never_overwritten(plain: tuple[Any, Any, Path], tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    for overwrite in (False, True):
        with pytest.raises(ArtifactError):
            export_onnx(plain[0], tmp_path, overwrite=overwrite)
    assert (tmp_path / "thesis.txt").read_text() == "mine"


def test_the_manifest_lists_public_facts_only(plain: tuple[Any, Any, Path]) -> None:
    manifest = json.loads((plain[2] / "manifest.json").read_text())
    assert manifest["graph_hash"] == plain[0].graph_hash
    assert [p["name"] for p in manifest["parameters"]] == list(plain[0].trainable_names)
    assert manifest["noise_multiplier"] == 0.8 and manifest["expected_batch_size"] == 6.0
    assert [b["path"] for b in manifest["batch_inputs"]] == ["x", "y"]


def test_unknown_optimizers_and_impossible_settings_are_refused() -> None:
    for bad in ("lamb", AdamW(lr=-1.0), AdamW(betas=(0.9, 1.0))):
        with pytest.raises(ExportError):
            resolve_optimizer(bad)


def _one_op(op: Any, *args: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """op(*args) by its kernel and by its lowering."""
    graph = torch.fx.Graph()
    tensors = [a for a in args if isinstance(a, torch.Tensor)]
    holes = iter([graph.placeholder(f"x{i}") for i in range(len(tensors))])
    graph.output(graph.call_function(op, tuple(next(holes) if isinstance(a, torch.Tensor) else a for a in args)))
    lowered = Lowered(torch.fx.GraphModule(torch.nn.Module(), graph))
    want, got = op(*args), lowered(*tensors)
    return (want, got) if isinstance(want, torch.Tensor) else (want[0], got[0])


def test_lowered_backward_passes_equal_their_kernels() -> None:
    torch.manual_seed(0)

    def r(*shape: int) -> torch.Tensor:
        return torch.randn(*shape)

    cases: list[tuple[Any, ...]] = [
        (aten._adaptive_avg_pool2d_backward.default, r(2, 3, 3, 2), r(2, 3, 7, 5)),
        (aten.avg_pool2d_backward.default, r(2, 3, 4, 3), r(2, 3, 8, 6), [3, 2], [2, 2], [1, 0], False, True, None),
        (aten.avg_pool2d_backward.default, r(2, 3, 4, 3), r(2, 3, 7, 5), [2, 2], [], [0, 0], True, False, None),
        (aten.avg_pool2d_backward.default, r(2, 3, 4, 3), r(2, 3, 8, 6), [2, 2], [], [0, 0], False, True, 3),
        (aten.upsample_nearest2d_backward.default, r(2, 3, 8, 9), [8, 9], [2, 3, 4, 5], None, None),
        (aten.upsample_bilinear2d_backward.default, r(2, 3, 8, 9), [8, 9], [2, 3, 4, 5], False, None, None),
        (aten.upsample_bilinear2d_backward.default, r(2, 3, 8, 9), [8, 9], [2, 3, 4, 5], True, None, None),
        (aten.silu_backward.default, r(4, 5), r(4, 5)),
        (aten.mish_backward.default, r(4, 5), r(4, 5)),
        (aten.unfold_backward.default, r(2, 4, 3), [2, 9], 1, 3, 2),
        (aten.embedding_dense_backward.default, r(2, 4, 3), torch.tensor([[0, 1, 1, 5], [5, 2, 0, 1]]), 6, -1, False),
    ]
    only_input = [True, False, False]
    for stride, padding, dilation, groups in (([2, 1], [1, 2], [1, 2], 1), ([2, 2], [0, 1], [2, 1], 2)):
        x, w = r(2, 4, 9, 8), r(6, 4 // groups, 3, 3)
        out = aten.convolution.default(x, w, None, stride, padding, dilation, False, [0, 0], groups)
        conv = (stride, padding, dilation, False, [0, 0], groups, only_input)
        cases.append((aten.convolution_backward.default, torch.randn_like(out), x, w, None, *conv))
        w = r(4, 6 // groups, 3, 3)
        out = aten.convolution.default(x, w, None, stride, padding, dilation, True, [0, 0], groups)
        conv = (stride, padding, dilation, True, [0, 0], groups, only_input)
        cases.append((aten.convolution_backward.default, torch.randn_like(out), x, w, None, *conv))
    for op, *args in cases:
        want, got = _one_op(op, *args)
        assert got.shape == want.shape, op
        assert float((got - want).norm() / want.norm()) < 2e-6, op


def test_lowered_attention_equals_the_fused_kernel_even_where_every_key_is_masked() -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 3, 5, 4) for _ in range(3))
    mask = torch.zeros(2, 1, 5, 5)
    mask[0, :, :, 3:] = float("-inf")
    mask[1, :, 2] = float("-inf")
    for causal, bias in ((False, mask), (True, None), (False, None)):
        want, lse = aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, causal, attn_mask=bias)
        graph = torch.fx.Graph()
        holes = [graph.placeholder(n) for n in ("q", "k", "v", "mask")]
        extra: dict[str, Any] = {"attn_mask": holes[3] if bias is not None else None}
        op = aten._scaled_dot_product_flash_attention_for_cpu.default
        graph.output(graph.call_function(op, (*holes[:3], 0.0, causal), extra))
        got = Lowered(torch.fx.GraphModule(torch.nn.Module(), graph))(q, k, v, mask)[0]
        rows = torch.ones(2, 5, dtype=torch.bool)
        torch.testing.assert_close(got.movedim(1, 2)[rows], want.movedim(1, 2)[rows], rtol=1e-5, atol=1e-6)
        assert lse.shape == (2, 3, 5) or lse.numel() == 30


def test_a_query_whose_every_key_is_masked_gives_and_takes_no_gradient_in_lowered_attention() -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 3, 5, 4, requires_grad=True) for _ in range(3))
    mask = torch.zeros(2, 1, 5, 5)
    mask[0, :, :, 3:] = float("-inf")
    mask[1, :, 2] = float("-inf")
    dead = torch.isinf(mask).all(-1, keepdim=True)
    weights = torch.softmax((q @ k.transpose(-2, -1) / 2.0 + mask).masked_fill(dead, 0.0), -1)
    out, upstream = (weights @ v).masked_fill(dead, 0.0), torch.randn(2, 3, 5, 4)
    want = torch.autograd.grad(out, (q, k, v), upstream)
    graph = torch.fx.Graph()
    given = [upstream, q.detach(), k.detach(), v.detach(), out.detach(), torch.zeros(2, 5, 3)]
    holes = [graph.placeholder(f"given_{i}") for i in range(len(given))]
    hole = graph.placeholder("mask")
    op = aten._scaled_dot_product_flash_attention_for_cpu_backward.default
    graph.output(graph.call_function(op, (*holes, 0.0, False), {"attn_mask": hole}))
    got = Lowered(torch.fx.GraphModule(torch.nn.Module(), graph))(*given, mask)
    for ours, theirs in zip(got, want, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    assert not got[0].movedim(1, 2)[1, 2].any()


def test_onnxruntime_joins_each_gelu_of_the_forward_pass_into_one_kernel(tmp_path: Path) -> None:
    linear, gelu = torch.nn.Linear, torch.nn.GELU
    net = torch.nn.Sequential(linear(5, 8), gelu(), linear(8, 8), gelu(), linear(8, 3))

    def loss(model: Any, batch: Any) -> torch.Tensor:
        return torch.nn.functional.cross_entropy(model(batch["x"]), batch["y"], reduction="none")

    batch = {"x": torch.randn(4, 5), "y": torch.tensor([0, 1, 2, 0])}
    step = compile_step(net, loss, batch, noise_multiplier=1.0, expected_batch_size=8.0)
    folder = export_onnx(step, tmp_path / "out")
    assert not any(n.op_type == "Gelu" for n in onnx.load(folder / "grad_step.onnx").graph.node)  # plain ONNX in the file
    options = ort.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    ort.InferenceSession(folder / "grad_step.onnx", options, providers=["CPUExecutionProvider"])
    kinds = [n.op_type for n in onnx.load(tmp_path / "optimized.onnx").graph.node]
    assert sum(kind in ("Gelu", "BiasGelu") for kind in kinds) == 2 and kinds.count("Erf") == 2  # one each for the backward pass


def test_a_step_whose_gradients_stay_factored_exports_and_names_its_clipping(tmp_path: Path) -> None:
    """A lookup, a product and their cross term; export_onnx itself compares the files with the PyTorch step."""
    torch.manual_seed(0)
    table = torch.nn.Embedding(9, 6)

    def loss(model: Any, batch: Any) -> torch.Tensor:
        logits = model(batch["tokens"]) @ model.weight.t()
        return torch.nn.functional.cross_entropy(logits.transpose(1, 2), batch["tokens"], reduction="none").sum(1)

    batch = {"tokens": torch.randint(0, 9, (4, 3))}
    clipping = PerLayerClipping(0.5)
    step = compile_step(
        table, loss, batch, trainable="all", clipping=clipping, ghost_norms=True, noise_multiplier=1.0,
        expected_batch_size=8.0,
    )  # fmt: skip
    assert [why[:10] for _, why in step.report().ghosts] == ["ghost norm"]
    manifest = json.loads((export_onnx(step, tmp_path / "out") / "manifest.json").read_text())
    assert manifest["clipping"]["type"] == "PerLayerClipping" and manifest["max_grad_norm"] == 0.5


def test_a_manifest_with_a_clipping_that_nobody_knows_gives_no_statement() -> None:
    with pytest.raises(ArtifactError, match="clipping 'Mine', which this version does not know"):
        clipping_of({"clipping": {"type": "Mine"}})


def test_adams_epsilon_survives_the_exporters_optimizer(tmp_path: Path) -> None:
    """onnxscript takes an added constant of 1e-8 for zero; a gradient of 1e-8 then moves twice as far."""
    step = compile_step(mlp(), mlp_loss, (torch.randn(4, 4), torch.tensor([0, 1, 1, 0])))
    step = step.with_noise(1.0, 4.0)
    export_onnx(
        step, tmp_path / "pair", optimizer=AdamW(lr=0.5), sample_rate=0.1, dataset_size=40, steps=4, target_delta=1e-3
    )
    session = ort.InferenceSession(str(tmp_path / "pair" / "update_step.onnx"))
    zeros = np.zeros(step.num_trainable, np.float32)
    feed = {name: zeros for name in ("theta", "m", "v", "noise")}
    feed |= {"accumulator": zeros + np.float32(4e-8), "learning_rate": np.array([0.5], np.float32)}
    theta = session.run(None, feed | {"t": np.zeros(1, np.int64)})[0]
    assert np.allclose(theta, -0.25, rtol=1e-4)


def test_a_gamma_that_the_exporters_optimizer_would_drop_is_refused(tmp_path: Path) -> None:
    batch = (torch.randn(4, 4), torch.tensor([0, 1, 1, 0]))
    step = compile_step(mlp(), mlp_loss, batch, clipping=AutomaticClipping(1.0, gamma=1e-9)).with_noise(1.0, 4.0)
    with pytest.raises(ExportError, match="gamma"):
        export_onnx(step, tmp_path / "pair", sample_rate=0.1, dataset_size=40, steps=4, target_delta=1e-3)
