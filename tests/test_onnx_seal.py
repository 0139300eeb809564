"""The seal of exported files: tampered ones are refused although their hashes are right, and no honest one is."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
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
from onnx_cases import compiled  # noqa: E402

import dpbitfit_fx as dpb  # noqa: E402
from dpbitfit_fx.clipping import AutomaticClipping, AutoVClipping, FlatClipping, PerLayerClipping  # noqa: E402
from dpbitfit_fx.errors import ArtifactError, SealBroken  # noqa: E402
from dpbitfit_fx.files import sha256_file  # noqa: E402
from dpbitfit_fx.onnx_export import SGD, AdamW, export_onnx  # noqa: E402
from dpbitfit_fx.onnx_seal import check_artifacts  # noqa: E402
from dpbitfit_fx.ort_artifacts import WEIGHTS  # noqa: E402
from dpbitfit_fx.ort_runner import OrtTrainingBackend, PlainBackend, load_artifacts, read_manifest  # noqa: E402

TRAINING = hasattr(__import__("onnxruntime.capi._pybind_state", fromlist=["x"]), "save_checkpoint")
needs_training = pytest.mark.skipif(not TRAINING, reason="needs onnxruntime-training-cpu")
Edit = Callable[["File"], None]


class File:
    """An ONNX file in memory, edited by name."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.model = onnx.load(path, load_external_data=False)
        self.graph = self.model.graph

    def node(self, name: str) -> Any:
        return next(n for n in self.graph.node if name in n.output)

    def walk(self, name: str, *inputs: int) -> str:
        """The value reached from ``name`` by going to that input of its node, and so on."""
        for at in inputs:
            name = self.node(name).input[at]
        return name

    def constant(self, array: Any, dtype: Any = np.float32) -> str:
        name = f"tampered_{len(self.graph.initializer)}"
        self.graph.initializer.append(numpy_helper.from_array(np.array(array, dtype), name))
        return name

    def add(self, before: str, op: str, inputs: list[str], domain: str = "", **options: Any) -> str:
        """A new node in front of the one that computes ``before``; returns its output."""
        name = f"tampered_{len(self.graph.node)}"
        at = list(self.graph.node).index(self.node(before))
        self.graph.node.insert(at, helper.make_node(op, inputs, [name], domain=domain, **options))
        return name

    def feed(self, reader: str, at: int, value: str) -> None:
        self.node(reader).input[at] = value

    def replace_constant(self, reader: str, at: int, value: Any) -> None:
        old = next(t for t in self.graph.initializer if t.name == self.node(reader).input[at])
        self.feed(reader, at, self.constant(value, numpy_helper.to_array(old).dtype))

    def save(self) -> None:
        self.path.write_bytes(self.model.SerializeToString())


def rewrite(folder: Path, **changes: Any) -> None:
    """The manifest, with every hash made right again."""
    manifest = json.loads((folder / "manifest.json").read_text())
    there = {*manifest["files"], *({WEIGHTS} if (folder / WEIGHTS).exists() else ())}
    manifest["files"] = {n: sha256_file(folder / n) for n in there}
    (folder / "manifest.json").write_text(json.dumps({**manifest, **changes}))


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    step, _ = compiled("mlp", clipping=AutomaticClipping(0.7))
    return export_onnx(step, tmp_path_factory.mktemp("plain") / "out", optimizer=AdamW(lr=0.01))


@pytest.fixture(scope="module")
def training(tmp_path_factory: pytest.TempPathFactory) -> Path:
    step, _ = compiled("mlp", clipping=FlatClipping(0.7))
    return dpb.export_ort_training(step, tmp_path_factory.mktemp("training") / "out", optimizer=AdamW(lr=0.01))


def ghost_step(**extra: Any) -> Any:
    """A lookup, a product and their cross term."""
    torch.manual_seed(0)

    def loss(model: Any, batch: Any) -> torch.Tensor:
        logits = model(batch["tokens"]) @ model.weight.t()
        return torch.nn.functional.cross_entropy(logits.transpose(1, 2), batch["tokens"], reduction="none").sum(1)

    batch = {"tokens": torch.randint(0, 9, (4, 3))}
    given = {"noise_multiplier": 1.0, "expected_batch_size": 8.0, "trainable": "all", "ghost_norms": True, **extra}
    return dpb.compile(torch.nn.Embedding(9, 6), loss, batch, **given)


@pytest.fixture(scope="module")
def ghost(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return unchecked(ghost_step(clipping=FlatClipping(0.5)), tmp_path_factory.mktemp("ghost") / "out")


def unchecked(step: Any, path: Path, **options: Any) -> Path:
    """``export_onnx`` with its seal, without its numeric comparison, which other tests make."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("dpbitfit_fx.onnx_check.check_onnx", lambda *_, **__: None)
        return export_onnx(step, path, **options)


def refused(
    original: Path, folder: Path, name: str, edit: Edit, reason: str, runs: bool = True, **manifest: Any
) -> None:
    """The untampered twin loads; the tampered one has right hashes, would run, and is refused for this reason."""
    shutil.copytree(original, folder)
    load_artifacts(folder)
    file = File(folder / name)
    edit(file)
    file.save()
    rewrite(folder, **manifest)
    found = read_manifest(folder)
    if runs:
        (OrtTrainingBackend if found["target"] == "ort_training" else PlainBackend)(folder, found)
    with pytest.raises(SealBroken, match=reason):
        load_artifacts(folder)


# -- grad_step.onnx: accumulator_out = Add(accumulator, Reshape(MatMul(Unsqueeze(Cast(Where(keep, c, 0))), Where(.., G, 0))))

SUM, PRODUCT, ROWS = (1,), (1, 0), (1, 0, 1)
FACTOR = (1, 0, 0, 0, 0, 1)  # Mul(Reciprocal(Add(Sqrt(n^2), gamma)), R)
NORM = (*FACTOR, 0, 0, 0, 0)
KEEP = (*ROWS, 0, 0)


def out(f: File, *path: int) -> str:
    return f.walk("accumulator_out", *path)


def scale_the_sum(f: File) -> None:
    f.feed("accumulator_out", 1, f.add("accumulator_out", "Mul", [out(f, *SUM), f.constant(10.0)]))


def bypass_one_bias(f: File) -> None:
    """The last bias's raw gradients are added behind the clipped sum."""
    raw = f.node(out(f, *ROWS, 1)).input[-1]
    summed = f.add("accumulator_out", "ReduceSum", [raw, f.constant([0], np.int64)], keepdims=0)
    placed = f.add("accumulator_out", "Concat", [f.constant([0.0] * 14), summed], axis=0)
    f.feed("accumulator_out", 1, f.add("accumulator_out", "Add", [out(f, *SUM), placed]))


def norm_of_fewer(f: File) -> None:
    cast = out(f, *NORM, 0, 0)
    f.feed(cast, 0, f.add(cast, "Concat", list(f.node(out(f, *ROWS, 1)).input)[:2], axis=1))


def drop_the_mask(f: File) -> None:
    f.feed(out(f, *KEEP), 0, f.walk(out(f, *KEEP), 1))


def add_norms_to_the_outputs(f: File) -> None:
    f.graph.output.append(helper.make_tensor_value_info(out(f, *NORM), TensorProto.DOUBLE, ["batch"]))


def rename_a_leak(f: File) -> None:
    """The per-sample norms take the place of the sum."""
    narrow = f.add("accumulator_out", "Cast", [out(f, *NORM)], to=TensorProto.FLOAT)
    f.node("accumulator_out").op_type = "Sub"
    f.feed("accumulator_out", 1, narrow)


def mask_reaches_the_model(f: File) -> None:
    view = f.node(out(f, *ROWS, 1)).input[0]
    column = f.add(view, "Unsqueeze", ["sample_mask", f.constant([1], np.int64)])
    flat = f.add(view, "Reshape", [f.walk(view, 0), f.constant([-1, 7], np.int64)])
    f.feed(view, 0, f.add(view, "Mul", [flat, column]))


def leak_by_a_subgraph(f: File) -> None:
    branch = [
        helper.make_graph(
            [helper.make_node("Identity", [value], [f"branch_{i}"])],
            f"branch_{i}",
            [],
            [helper.make_tensor_value_info(f"branch_{i}", TensorProto.FLOAT, None)],
        )
        for i, value in enumerate((out(f, *SUM), out(f, *ROWS, 1)))
    ]
    yes = f.constant(True, np.bool_)
    hidden = f.add("accumulator_out", "If", [yes], then_branch=branch[0], else_branch=branch[1])
    f.feed("accumulator_out", 1, hidden)


def draw_noise_inside(f: File) -> None:
    drawn = f.add("accumulator_out", "RandomNormalLike", [out(f, *SUM)], seed=1.0)
    f.feed("accumulator_out", 1, f.add("accumulator_out", "Add", [out(f, *SUM), drawn]))


def hide_in_a_function(f: File) -> None:
    f.model.functions.append(
        helper.make_function(
            "", "Sqrt", ["x"], ["y"], [helper.make_node("Identity", ["x"], ["y"])], f.model.opset_import
        )
    )


def drop_out(f: File) -> None:
    view = f.node(out(f, *ROWS, 1)).input[0]
    mode = [f.constant(0.5), f.constant(True, np.bool_)]
    f.feed(view, 0, f.add(view, "Dropout", [f.walk(view, 0), *mode]))


def call_a_custom_operator(f: File) -> None:
    f.model.opset_import.append(helper.make_opsetid("evil", 1))
    f.feed("accumulator_out", 1, f.add("accumulator_out", "Add", [out(f, *SUM), out(f, *SUM)], domain="evil"))


def call_a_contributed_operator(f: File) -> None:
    f.model.opset_import.append(helper.make_opsetid("com.microsoft", 1))
    f.feed("accumulator_out", 1, f.add("accumulator_out", "Gelu", [out(f, *SUM)], domain="com.microsoft"))


def weight_from_elsewhere(f: File) -> None:
    tensor = next(t for t in f.graph.initializer if t.name == "frozen_0.weight")
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="../records.bin")


def constant_from_elsewhere(f: File) -> None:
    tensor = next(t for t in f.graph.initializer if t.name == f.walk(out(f, *FACTOR), 1))
    (f.path.parent / WEIGHTS).write_bytes(numpy_helper.to_array(tensor).tobytes())
    length = (f.path.parent / WEIGHTS).stat().st_size
    tensor.ClearField("raw_data")
    tensor.ClearField("float_data")
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in {"location": WEIGHTS, "offset": 0, "length": length}.items():
        tensor.external_data.add(key=key, value=str(value))


def weight_as_input(f: File) -> None:
    tensor = next(t for t in f.graph.initializer if t.name == "frozen_0.weight")
    f.graph.initializer.remove(tensor)
    f.graph.input.append(helper.make_tensor_value_info(tensor.name, TensorProto.FLOAT, tensor.dims))


def weight_that_an_input_overrides(f: File) -> None:
    f.graph.input.append(helper.make_tensor_value_info("frozen_0.weight", TensorProto.FLOAT, [7, 5]))


def one_number_for_all(name: str) -> Edit:
    def edit(f: File) -> None:
        value = next(i for i in f.graph.input if i.name == name)
        value.type.tensor_type.shape.dim[0].dim_value = 1

    return edit


def halves_of_a_record(f: File) -> None:
    """[B, 6] read as [2 B, 3]: for B = 1, each half would be clipped alone."""
    view = f.node(out(f, *ROWS, 1)).input[-1]
    f.feed(view, 1, f.constant([-1, 3], np.int64))


GRADIENT: dict[str, tuple[Edit, str]] = {
    "the clipped sum is scaled": (scale_the_sum, "weighted sum: expected Reshape, found Mul"),
    "one bias bypasses the clipping": (bypass_one_bias, "weighted sum: expected Reshape, found Add"),
    "R is ten times larger": (
        lambda f: f.replace_constant(out(f, *FACTOR), 1, 7.0),
        r"clip factor R: found 7\.0, expected .* 0\.7",
    ),
    "gamma is another": (
        lambda f: f.replace_constant(out(f, *FACTOR, 0, 0), 1, 1e-3),
        r"clip factor gamma: found 0\.001, expected",
    ),
    "the clip factor is a constant": (
        lambda f: f.feed(out(f, *FACTOR), 0, f.constant(1.0, np.float64)),
        "clip factor: expected Reciprocal",
    ),
    "the norm is of fewer values": (norm_of_fewer, "norm: it is taken over other values than those that are summed"),
    "the norm forgets to square": (
        lambda f: f.feed(out(f, *NORM, 0), 1, f.constant(1.0, np.float64)),
        "norm: the product is not the square",
    ),
    "the norm is summed over the wrong axis": (
        lambda f: f.replace_constant(out(f, *NORM), 1, [0]),
        r"norm: found \[0\], expected \[1\]",
    ),
    "a record may have two rows": (halves_of_a_record, r"gradient of parameter_3.bias: expected Concat"),
    "sample_mask is ignored": (drop_the_mask, "sample_mask: expected Not, found Less"),
    "sample_mask reaches the model": (mask_reaches_the_model, "'sample_mask' reaches a per-sample gradient"),
    "the norm has no upper bound": (
        lambda f: f.replace_constant(f.walk(out(f, *KEEP), 1), 1, np.inf),
        "range guard of the norm: found inf",
    ),
    "rows that are not finite stay": (
        lambda f: f.feed(out(f, *PRODUCT), 1, out(f, *ROWS, 1)),
        "non-finite rows: expected Where, found Concat",
    ),
    "the norms are an output": (
        add_norms_to_the_outputs,
        "it has the output '.*'; nothing but accumulator_out may leave it",
    ),
    "the norms replace the sum": (rename_a_leak, "accumulation: expected Add, found Sub"),
    "the accumulator is doubled": (lambda f: f.feed("accumulator_out", 1, "accumulator"), "accumulator.*read 2 times"),
    "the accumulator is one number": (
        one_number_for_all("accumulator"),
        r"input 'accumulator' has the type 1 and shape \[1\]",
    ),
    "a subgraph hides the rows": (leak_by_a_subgraph, "it holds If, which runs a graph inside the graph"),
    "noise is drawn inside": (draw_noise_inside, "it holds RandomNormalLike, an operator that draws random numbers"),
    "dropout in training mode": (drop_out, "it holds Dropout, an operator that draws random numbers"),
    "an operator of ONNX Runtime's own": (call_a_contributed_operator, "imports the operator domain 'com.microsoft'"),
    "a frozen weight is an input": (weight_as_input, "it takes the input 'frozen_0.weight'"),
    "a frozen weight can be overridden": (weight_that_an_input_overrides, "a weight can be overridden by an input"),
}
NOT_RUN: dict[str, tuple[Edit, str]] = {
    "a function redefines sqrt": (hide_in_a_function, "it holds 'functions' in a ModelProto"),
    "an operator of a custom domain": (call_a_custom_operator, "imports the operator domain 'evil'"),
    "a weight is read from elsewhere": (
        weight_from_elsewhere,
        r"read from \['../records.bin'\], which is no file of this export",
    ),
    "a constant is kept outside": (constant_from_elsewhere, "clip factor R: the constant is kept outside the graph"),
}


@pytest.mark.parametrize("kind", [*GRADIENT, *NOT_RUN])
def test_a_tampered_gradient_graph_is_refused_at_load_though_its_hash_is_right(
    kind: str, plain: Path, tmp_path: Path
) -> None:
    edit, reason = {**GRADIENT, **NOT_RUN}[kind]
    refused(plain, tmp_path / "copy", "grad_step.onnx", edit, reason, runs=kind in GRADIENT)


# -- update_step.onnx: div = Div(Add(accumulator, Mul(noise, sigma R)), N) feeds the optimizer


def reader(f: File, name: str) -> str:
    return str(next(n for n in f.graph.node if name in n.input).output[0])


def noisy(f: File) -> str:
    return reader(f, "accumulator")


def raw_accumulator(f: File) -> None:
    mean = reader(f, noisy(f))
    node = f.node(reader(f, mean))
    node.input[list(node.input).index(mean)] = "accumulator"


def other_step(f: File) -> None:
    """The noise of one step is added again, with the other sign, to what the next step starts from."""
    f.feed("theta_out", 0, f.add("theta_out", "Sub", [f.walk("theta_out", 0), "noise"]))


def accumulator_as_output(f: File) -> None:
    f.feed("m_out", 0, f.add("m_out", "Mul", ["accumulator", f.constant(1.0)]))


UPDATE: dict[str, tuple[Edit, str]] = {
    "sigma is halved": (
        lambda f: f.replace_constant(reader(f, "noise"), 1, 0.28),
        r"noise scale sigma \* R \* \(1 \+ slack\): found 0\.28",
    ),
    "the noise is dropped": (
        lambda f: f.feed(noisy(f), 1, f.constant(0.0)),
        "noise: the accumulator leaves without its noise|noise: it is read 0 times",
    ),
    "the noise is multiplied by zeros": (
        lambda f: f.replace_constant(reader(f, "noise"), 1, [0.0] * 17),
        r"found numbers of the shape \[17\]",
    ),
    "one draw for all": (one_number_for_all("noise"), r"input 'noise' has the type 1 and shape \[1\]"),
    "the optimizer reads the raw accumulator": (raw_accumulator, "accumulator: it is read 2 times"),
    "a moment holds the raw accumulator": (accumulator_as_output, "accumulator: it is read 2 times"),
    "the noise is taken back": (other_step, "noise: it is read 2 times"),
    "the denominator is another": (
        lambda f: f.replace_constant(reader(f, noisy(f)), 1, 3.0),
        r"denominator: found 3\.0, expected .* 6\.0",
    ),
    "the accumulator leaves": (
        lambda f: f.graph.output.append(helper.make_tensor_value_info(noisy(f), TensorProto.FLOAT, [17])),
        "it has the output",
    ),
}


@pytest.mark.parametrize("kind", UPDATE)
def test_a_tampered_update_graph_is_refused_at_load_though_its_hash_is_right(
    kind: str, plain: Path, tmp_path: Path
) -> None:
    edit, reason = UPDATE[kind]
    refused(plain, tmp_path / "copy", "update_step.onnx", edit, reason)


def test_a_manifest_that_promises_more_than_the_graphs_do_is_refused(plain: Path, tmp_path: Path) -> None:
    shutil.copytree(plain, tmp_path / "copy")
    claims: list[tuple[dict[str, Any], str]] = [
        ({"noise_multiplier": 8.0}, "noise scale"),
        ({"expected_batch_size": 60.0}, "denominator"),
        (
            {"max_grad_norm": 0.1, "clipping": {"type": "AutomaticClipping", "max_grad_norm": 0.1, "gamma": 0.01}},
            "R: found",
        ),
        ({"clipping": {"type": "FlatClipping", "max_grad_norm": 0.7}}, "clip factor R: expected Clip, found Add"),
        ({"clipping": {"type": "AutoVClipping", "max_grad_norm": 0.7}}, "norm: expected Sqrt, found Add"),
    ]
    for changes, reason in claims:
        shutil.copy(plain / "manifest.json", tmp_path / "copy" / "manifest.json")
        load_artifacts(tmp_path / "copy")
        rewrite(tmp_path / "copy", **changes)
        with pytest.raises(SealBroken, match=reason):
            load_artifacts(tmp_path / "copy")
    for changes in (
        {"max_grad_norm": 0.1},
        {"noise_multiplier": 0.0},
        {"clipping": {"type": "Mine"}},
        {"parameters": []},
        {"batch_inputs": [{"name": "noise", "path": "x", "shape": [5], "dtype": "float32"}]},
    ):
        shutil.copy(plain / "manifest.json", tmp_path / "copy" / "manifest.json")
        rewrite(tmp_path / "copy", **changes)
        with pytest.raises(ArtifactError, match="manifest"):
            load_artifacts(tmp_path / "copy")


# -- ghost norms


def ghost_norm(f: File) -> str:
    """H [B, S, S], whose sum is the squared norm."""
    node = next(n for n in f.graph.node if n.op_type == "Max")
    return f.walk(node.input[0], 0)


def without_cross_terms(f: File) -> None:
    below = f.walk(ghost_norm(f), 0, 1)
    f.feed(below, 0, f.add(below, "Mul", [f.walk(below, 0), f.constant(0.0, np.float64)]))


def less_than(f: File, bound: float) -> str:
    for n in f.graph.node:
        if n.op_type == "Less":
            tensor = next(t for t in f.graph.initializer if t.name == n.input[1])
            if float(numpy_helper.to_array(tensor)) == bound:
                return str(n.output[0])
    raise AssertionError(f"nothing is compared with {bound}")


def raw_index(f: File) -> None:
    """Negative indices reach the sum as the last rows, and the norm as rows of their own."""
    mod = next(n for n in f.graph.node if n.op_type == "Mod")
    for node in f.graph.node:
        for at, name in enumerate(node.input):
            if name == mod.output[0]:
                node.input[at] = mod.input[0]


GHOST: dict[str, tuple[Edit, str]] = {
    "a cross term is zero": (without_cross_terms, "ghost norm: expected Transpose, found Mul"),
    "the norm sums the diagonal alone": (
        lambda f: f.replace_constant(next(n for n in f.graph.node if n.op_type == "Max").input[0], 1, [2, 1]),
        r"found \[2, 1\]",
    ),
    "factors have no upper bound": (
        lambda f: f.replace_constant(less_than(f, 1e40), 1, np.inf),
        "range guard of the factors: found inf",
    ),
    "the bound is not used": (
        lambda f: f.replace_constant(f.walk(next(n for n in f.graph.node if n.op_type == "Max").output[0], 1), 1, 1e-9),
        "ghost norm: found 1e-09",
    ),
    "negative indices are not counted from zero": (raw_index, "ghost sum's index: expected Mod"),
    "a factor is cut": (lambda f: f.replace_constant(f.walk(ghost_norm(f), 1, 1), 1, 1.0), r"a factor is cut at 1\.0"),
}


@pytest.mark.parametrize("kind", GHOST)
def test_a_tampered_ghost_norm_is_refused_at_load(kind: str, ghost: Path, tmp_path: Path) -> None:
    edit, reason = GHOST[kind]
    refused(ghost, tmp_path / "copy", "grad_step.onnx", edit, reason)


# -- ONNX Runtime Training: the noise is in training_model.onnx, the denominator in optimizer_model.onnx


def gradient(f: File, at: int = 0) -> str:
    return str([n for n in f.graph.node if n.op_type == "InPlaceAccumulatorV2"][at].output[0])


def noisy_sum(f: File) -> str:
    return f.walk(gradient(f), 1, 0, 0)


def loss_as_output(f: File) -> None:
    f.feed("done", 0, f.walk(noisy_sum(f), 1, 0, 0, 0))


def second_accumulation(f: File) -> None:
    node = f.node(gradient(f))
    extra = f.add("done", "InPlaceAccumulatorV2", list(node.input), domain="com.microsoft")
    f.graph.output.append(helper.make_tensor_value_info(extra, TensorProto.BOOL, [1]))


def write_into_a_weight(f: File) -> None:
    """Raw gradients are added to a parameter, in place; nothing reads the node's output."""
    raw = f.add(
        "done", "ReduceSum", [f.node(f.walk(noisy_sum(f), 1, 0, 1, 1)).input[0], f.constant([0], np.int64)], keepdims=0
    )
    f.add("done", "InPlaceAccumulatorV2", ["parameter_0.bias", raw, "lazy_reset_grad"], domain="com.microsoft")


def second_update(f: File) -> None:
    """The parameters move a second time, by the raw buffers."""
    node = helper.make_node("AdamWOptimizer", list(f.node("updated_flag").input), ["again"], domain="com.microsoft")
    node.input[3] = "gradients"
    node.attribute.extend(f.node("updated_flag").attribute)
    f.graph.node.append(node)


def raw_piece(f: File) -> None:
    """The first buffer takes its piece from before the noise."""
    split = f.node(f.walk(gradient(f), 1, 0))
    names = [f"raw_{i}" for i in range(len(split.output))]
    at = list(f.graph.node).index(split)
    f.graph.node.insert(at, helper.make_node("Split", [f.walk(noisy_sum(f), 1), split.input[1]], names, axis=0))
    f.feed(f.walk(gradient(f), 1), 0, names[0])


def raw_gradients(f: File) -> None:
    f.node("updated_flag").input[3] = "gradients"


def other_momentum(f: File) -> None:
    next(a for a in f.node("updated_flag").attribute if a.name == "alpha").f = 0.5


def other_order(f: File) -> None:
    last = f.graph.input.pop()
    f.graph.input.insert(len(f.graph.input) - 1, last)


MODELS: dict[str, tuple[str, Edit, str]] = {
    "sigma is halved": (
        "training_model.onnx",
        lambda f: f.replace_constant(f.walk(noisy_sum(f), 0), 1, 0.28),
        r"noise scale sigma \* R \* \(1 \+ slack\): found 0\.28",
    ),
    "the noise is dropped": (
        "training_model.onnx",
        lambda f: f.feed(noisy_sum(f), 0, f.constant([0.0] * 17)),
        "noise scale.*: expected Mul, found a constant",
    ),
    "one buffer gets no noise": ("training_model.onnx", raw_piece, "it is cut from another sum"),
    "pieces are swapped": (
        "training_model.onnx",
        lambda f: f.feed(f.walk(gradient(f), 1), 0, f.walk(gradient(f, 1), 1, 0)),
        "takes another parameter's piece",
    ),
    "the factors are the user's output": ("training_model.onnx", loss_as_output, "user output: expected a constant"),
    "raw gradients are written into a weight": ("training_model.onnx", write_into_a_weight, "which write in place"),
    "the optimizer runs twice": ("optimizer_model.onnx", second_update, "which write in place; expected 1 times AdamW"),
    "a buffer grows twice": ("training_model.onnx", second_accumulation, "it has the output"),
    "R is another": (
        "training_model.onnx",
        lambda f: f.replace_constant(f.walk(noisy_sum(f), 1, 0, 0, 0, 0, 1), 1, 7.0),
        "clip factor R: found 7",
    ),
    "the optimizer reads raw buffers": ("optimizer_model.onnx", raw_gradients, "fed the raw gradient buffers"),
    "one buffer has another denominator": (
        "optimizer_model.onnx",
        lambda f: f.replace_constant("mean_1", 1, 0.5),
        r"denominator: found 0\.5",
    ),
    "one buffer is used twice": (
        "optimizer_model.onnx",
        lambda f: f.replace_constant("sum_1", 1, 0),
        r"the elements \[0, 0, 2\]",
    ),
    "another optimizer": ("optimizer_model.onnx", other_momentum, "optimizer: AdamWOptimizer has the options"),
    "parameters are fed in another order": ("eval_model.onnx", other_order, "in the order of training_model.onnx"),
}


@needs_training
@pytest.mark.parametrize("kind", MODELS)
def test_tampered_training_artifacts_are_refused_at_load(kind: str, training: Path, tmp_path: Path) -> None:
    name, edit, reason = MODELS[kind]
    refused(training, tmp_path / "copy", name, edit, reason, runs=edit is not second_update)  # ONNX Runtime refuses two


@needs_training
def test_a_checkpoint_that_feeds_the_noise_itself_is_refused(training: Path, tmp_path: Path) -> None:
    """ONNX Runtime takes whatever the checkpoint names for a weight: a `noise` of zeros there, and none is ever asked for."""
    from onnxruntime.capi import _pybind_state as binding

    shutil.copytree(training, tmp_path / "copy")
    load_artifacts(tmp_path / "copy")
    manifest = read_manifest(tmp_path / "copy")
    tensors = [
        numpy_helper.from_array(np.zeros(p["shape"], np.float32), p["onnx_name"]).SerializeToString()
        for p in manifest["parameters"]
    ]
    silence = numpy_helper.from_array(np.zeros(17, np.float32), "noise").SerializeToString()
    (tmp_path / "copy" / "checkpoint").unlink()
    binding.save_checkpoint(tensors, [silence], str(tmp_path / "copy" / "checkpoint"), False)
    rewrite(tmp_path / "copy")
    with pytest.raises(SealBroken, match="checkpoint: it holds other values than the trainable parameters"):
        load_artifacts(tmp_path / "copy")


# -- honest exports


def added_biases() -> Any:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(5, 7, bias=False), torch.nn.Tanh(), torch.nn.Linear(7, 3))
    batch = {"x": torch.randn(4, 5), "y": torch.randint(0, 3, (4,))}
    return dpb.compile(
        model, lambda m, b: torch.nn.functional.cross_entropy(m(b["x"]), b["y"], reduction="none"), batch,
        add_bias=True, noise_multiplier=0.8, expected_batch_size=6.0,
    )  # fmt: skip


HONEST: dict[str, Callable[[], Any]] = {
    "flat": lambda: compiled("mlp", clipping=FlatClipping(0.3))[0],
    "flat, all constants 1": lambda: compiled(
        "mlp", clipping=FlatClipping(1.0), noise_multiplier=1.0, expected_batch_size=1.0
    )[0],
    "automatic, all constants 1": lambda: compiled(
        "mlp", clipping=AutomaticClipping(1.0, 1.0), noise_multiplier=1.0, expected_batch_size=1.0
    )[0],
    "auto-v": lambda: compiled("mlp", clipping=AutoVClipping(0.7))[0],
    "per-layer": lambda: compiled("mlp", clipping=PerLayerClipping(0.7))[0],
    "layers of two blocks": lambda: compiled(
        "mlp", clipping=PerLayerClipping(layer_norms={"0": 0.5, "2": 0.4, "3": 0.3}), trainable="all", ghost_norms=True
    )[0],
    "one parameter": lambda: compiled("mlp", trainable=["3.bias"])[0],
    "ghost norms, auto-v": lambda: ghost_step(clipping=AutoVClipping(0.5)),
    "added biases": added_biases,
}


@pytest.mark.parametrize("kind", HONEST)
def test_no_honest_export_is_refused(kind: str, tmp_path: Path) -> None:
    """The export matches its own seal before it returns; loading matches it again.

    BERT, GPT-2 and ResNet are exported, sealed and loaded in test_ort_training.py.
    """
    optimizer = SGD(lr=0.1) if kind == "flat" else AdamW()
    load_artifacts(unchecked(HONEST[kind](), tmp_path / "out", optimizer=optimizer))


def test_an_export_whose_graph_breaks_the_template_is_never_handed_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As if the exporter narrowed the range guard to infinity, which torch's does with 1e60."""
    from dpbitfit_fx import onnx_lowering

    monkeypatch.delitem(onnx_lowering.LOWERINGS, torch.ops.aten.lt.Scalar)
    with pytest.raises(SealBroken, match="range guard of the norm: found inf"):
        unchecked(compiled("mlp")[0], tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_a_record_with_an_absurd_gradient_contributes_nothing_to_the_exported_sum(tmp_path: Path) -> None:
    """The gradient of the bias is b["w"]. 1e60 was infinity in exported files: there, a norm of 2e31 still counted."""
    torch.manual_seed(0)
    batch = {"x": torch.randn(4, 2), "w": torch.randn(4, 3)}
    step = dpb.compile(
        torch.nn.Linear(2, 3), lambda m, b: (m(b["x"]) * b["w"]).sum(1), batch, clipping=FlatClipping(0.7),
        noise_multiplier=1.0, expected_batch_size=4.0,
    )  # fmt: skip
    folder = unchecked(step, tmp_path / "out")
    session = ort.InferenceSession(str(folder / "grad_step.onnx"), providers=["CPUExecutionProvider"])
    feed = {"x": np.ones((1, 2), np.float32), "theta": np.zeros(3, np.float32), "accumulator": np.zeros(3, np.float32)}
    feed["sample_mask"] = np.ones(1, np.float32)
    for size, expected in ((1e-3, 1e-3 * 3**0.5), (1.0, 0.7), (1e29, 0.7), (1e31, 0.0), (np.inf, 0.0), (np.nan, 0.0)):
        (found,) = session.run(None, {**feed, "w": np.full((1, 3), size, np.float32)})
        assert np.linalg.norm(found) == pytest.approx(expected, rel=1e-6), size


def test_a_record_with_an_absurd_factor_does_not_poison_the_exported_sum(tmp_path: Path) -> None:
    """The gradient is w x' with w = 3e38 and x = 1e-40: its norm is 0.05, but c w overflows. 1e40 was infinity, too."""
    torch.manual_seed(0)
    batch = {"x": torch.randn(4, 1, 2), "w": torch.randn(4, 1, 3)}
    step = dpb.compile(
        torch.nn.Linear(2, 3, bias=False), lambda m, b: (m(b["x"]) * b["w"]).sum((1, 2)), batch, trainable="all",
        ghost_norms=True, noise_multiplier=1.0, expected_batch_size=4.0,
    )  # fmt: skip
    folder = unchecked(step, tmp_path / "out")
    session = ort.InferenceSession(str(folder / "grad_step.onnx"), providers=["CPUExecutionProvider"])
    feed = {"theta": np.zeros(6, np.float32), "accumulator": np.zeros(6, np.float32)}
    feed |= {"sample_mask": np.ones(2, np.float32), "x": np.ones((2, 1, 2), np.float32)}
    feed["w"] = np.ones((2, 1, 3), np.float32)
    feed["x"][0], feed["w"][0] = 1e-40, 3e38
    (found,) = session.run(None, feed)
    assert np.linalg.norm(found) == pytest.approx(6**0.5 / (6**0.5 + 0.01), rel=1e-6)


def test_negative_token_ids_do_not_escape_the_ghost_norm(ghost: Path, tmp_path: Path) -> None:
    """ONNX takes -1 for the last row: -1 and 8 are one row of the sum, and must be one row of its norm (R = 0.5)."""
    shutil.copytree(ghost, tmp_path / "copy")
    sabotaged = File(tmp_path / "copy" / "grad_step.onnx")
    raw_index(sabotaged)
    sabotaged.save()

    def worst(folder: Path) -> float:
        session = ort.InferenceSession(str(folder / "grad_step.onnx"), providers=["CPUExecutionProvider"])
        feed = {"sample_mask": np.ones(1, np.float32), "accumulator": np.zeros(54, np.float32)}
        random, found = np.random.default_rng(0), []
        for _ in range(200):
            theta = random.normal(size=54).astype(np.float32)
            tokens = random.integers(-9, 9, (1, 3))
            found.append(np.linalg.norm(session.run(None, {**feed, "tokens": tokens, "theta": theta})[0]))
        return float(max(found))

    assert 0.49 < worst(ghost) <= 0.5 * (1 + 1e-5) and worst(tmp_path / "copy") > 0.55


def test_without_onnx_nothing_is_loaded_and_the_seal_needs_no_torch(plain: Path, tmp_path: Path) -> None:
    code = """
import sys
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in sys.argv[2].split(","):
            raise ImportError(name)
sys.meta_path.insert(0, Blocker())
from dpbitfit_fx.errors import ArtifactError
from dpbitfit_fx.ort_runner import load_artifacts
try:
    load_artifacts(sys.argv[1])
except ArtifactError as error:
    sys.exit(str(error))
"""
    root = Path(dpb.__file__).resolve().parent.parent
    for blocked, message in (("torch", ""), ("torch,onnx", "pip install onnx. Nothing was loaded.")):
        command = [sys.executable, "-c", code, str(plain), blocked]
        done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=120)
        assert done.stderr.strip().endswith(message) and (done.returncode == 0) == (not message), done.stderr


def test_what_is_not_an_onnx_file_is_an_artifact_error(plain: Path, tmp_path: Path) -> None:
    shutil.copytree(plain, tmp_path / "copy")
    (tmp_path / "copy" / "update_step.onnx").write_bytes(b"\xff" * 64)
    rewrite(tmp_path / "copy")
    with pytest.raises(ArtifactError, match="not an ONNX file that can be read"):
        check_artifacts(tmp_path / "copy", read_manifest(tmp_path / "copy"))
