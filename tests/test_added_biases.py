"""``add_bias=True``: new biases behind the products that lack one, trained, saved and put onto the original model."""

from __future__ import annotations

import copy
import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from small_models import Sandwich, assert_untouched, losses, photograph, points, refusal
from torch import Tensor, nn

import dpbitfit_fx as dpb
from dpbitfit_fx.biases import _checksum
from dpbitfit_fx.errors import ArtifactError
from dpbitfit_fx.passes import added_biases, bias_slots

TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-9}


class Block(nn.Module):
    """Two convolutions without bias, each before a frozen BatchNorm, and a shortcut."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.relu(self.bn1(self.conv1(x)))
        return torch.relu(x + self.bn2(self.conv2(h)))


class SmallResNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.bn = nn.Conv2d(3, 6, 3, stride=2, bias=False), nn.BatchNorm2d(6)
        self.block, self.head = Block(6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Any:
        h = self.block(torch.tanh(self.bn(self.stem(x))))
        return self.head(h.mean((2, 3)))


def resnet(dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    model = SmallResNet().eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            assert module.running_mean is not None and module.running_var is not None
            module.running_mean.normal_(std=0.1)
            module.running_var.uniform_(0.5, 1.5)
    return model.to(dtype)


def llama(dtype: torch.dtype = torch.float32) -> nn.Module:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=24,
        vocab_size=40,
        pad_token_id=0,
        num_labels=2,
    )
    model: nn.Module = transformers.LlamaForSequenceClassification(config).eval()
    if dtype is torch.float64:  # LlamaRMSNorm rounds to float32 whatever its input
        for parent in list(model.modules()):
            for name, child in list(parent.named_children()):
                if type(child).__name__ == "LlamaRMSNorm":
                    theirs: Any = child
                    norm = nn.RMSNorm(16, eps=theirs.variance_epsilon)
                    norm.weight = theirs.weight
                    setattr(parent, name, norm)
    return model.to(dtype)


def images(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(1)
    return torch.randn(5, 3, 9, 9, generator=g).to(dtype), torch.arange(5) % 3


def words(dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(1)
    mask = torch.ones(5, 7, dtype=torch.long)
    mask[1, -3:], mask[4, -1:] = 0, 0
    return {
        "input_ids": torch.randint(3, 40, (5, 7), generator=g),
        "attention_mask": mask,
        "labels": torch.arange(5) % 2,
    }


def text_loss(model: Any, batch: Any) -> Tensor:
    logits = model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    return F.cross_entropy(logits, batch["labels"], reduction="none")


Make = Callable[[torch.dtype], nn.Module]
CASES: dict[str, tuple[Make, Any, Callable[[torch.dtype], Any]]] = {
    "llama": (llama, text_loss, words),
    "resnet": (resnet, losses, images),
}
PER_LAYER = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.gate_proj"]
PER_LAYER += ["mlp.up_proj", "mlp.down_proj"]
NAMES = {
    "llama": [f"model.layers.{i}.{n}.bias" for i in (0, 1) for n in PER_LAYER] + ["score.bias"],
    "resnet": ["stem.bias", "block.conv1.bias", "block.conv2.bias"],
}


def rows(batch: Any, index: list[int]) -> Any:
    if isinstance(batch, dict):
        return {k: v[index] for k, v in batch.items()}
    return tuple(x[index] for x in batch)


def with_real_biases(model: nn.Module, names: list[str]) -> nn.Module:
    """The same model as its author would have written it with ``bias=True``: real parameters, zero."""
    for name in names:
        layer: Any = model.get_submodule(name.removesuffix(".bias"))
        assert layer.bias is None
        layer.bias = nn.Parameter(layer.weight.new_zeros(getattr(layer, "out_features", None) or layer.out_channels))
    return model


def scatter(parameters: dict[str, Any]) -> None:
    g = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name in sorted(parameters):
            parameters[name].copy_(torch.randn(parameters[name].shape, generator=g) * 0.2)


@functools.cache
def compiled(name: str, dtype: torch.dtype) -> tuple[dpb.PrivateStep, dict[str, Any]]:
    make, loss, data = CASES[name]
    model = make(dtype)
    before = photograph(model)
    return dpb.compile(model, loss, data(dtype), add_bias=True), before


def relative(ours: Tensor, theirs: Tensor) -> float:
    return float((ours - theirs).norm() / theirs.norm().clamp(min=1e-30))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", list(CASES))
def test_per_sample_gradients_equal_the_loop_over_a_model_with_real_biases(name: str, dtype: torch.dtype) -> None:
    make, loss, data = CASES[name]
    step, before = compiled(name, dtype)
    assert_untouched(step.model, before)
    assert {b.name for b in step.added_biases} == set(NAMES[name])
    parameters = step.parameters()
    assert all(p.dtype is dtype for p in parameters.values())
    oracle = with_real_biases(make(dtype), NAMES[name])
    theirs = {n: p for n, p in oracle.named_parameters() if n in parameters}
    for values in ("zero", "scattered"):
        if values == "scattered":
            scatter(parameters)
            scatter(theirs)
        ours = step.per_sample_gradients(data(dtype))
        for row in range(5):
            # Twice, and the first loss: torch 2.13 on CPU has wrong gradients of eval BatchNorm for a batch of one.
            found = torch.autograd.grad(loss(oracle, rows(data(dtype), [row, row]))[0], list(theirs.values()))
            want = torch.cat([g.flatten() for g in found])
            have = torch.cat([ours[n][row].flatten() for n in theirs])
            assert relative(have, want) < TOLERANCE[dtype], (values, row)
    with torch.no_grad():
        for p in (p for n, p in parameters.items() if n in NAMES[name]):
            p.zero_()


@pytest.mark.parametrize("name", list(CASES))
def test_compile_leaves_class_module_and_state_dict_alone(name: str) -> None:
    step, before = compiled(name, torch.float32)
    model = step.model
    assert [k for k in model.state_dict() if k in NAMES[name]] == []
    with step.biases_applied():
        assert set(NAMES[name]) <= set(model.state_dict())
    after = photograph(model)
    assert {k: before[k] for k in ("attributes", "hooks", "class", "identity")} == {
        k: after[k] for k in ("attributes", "hooks", "class", "identity")
    }
    assert list(model.state_dict()) == list(before["values"])


def examples(name: str) -> list[Any]:
    data = CASES[name][2](torch.float32)
    return [
        {k: v[i % 5] for k, v in data.items()} if isinstance(data, dict) else tuple(x[i % 5] for x in data)
        for i in range(40)
    ]


def fit(name: str, model: nn.Module, folder: Path | None, **changes: Any) -> dpb.FitResult:
    plan: dict[str, Any] = {
        "noise_multiplier": 1.0,
        "target_delta": 1e-3,
        "max_steps": 4,
        "expected_batch_size": 8,
        "physical_batch_size": 8,
        "learning_rate": 0.05,
        "add_bias": True,
        "output_dir": folder,
        "progress": False,
        "insecure_seed_for_tests": 3,
        "example_batch": CASES[name][2](torch.float32),
    }
    return dpb.fit(model, CASES[name][1], examples(name), **(plan | changes))


@pytest.mark.parametrize("name", list(CASES))
def test_added_biases_train_save_and_load_onto_the_original(name: str, tmp_path: Path) -> None:
    make, loss, data = CASES[name]
    model, batch = make(torch.float32), data(torch.float32)
    cls, original = type(model), loss(model, batch).detach()
    seen = []

    def evaluate(m: nn.Module) -> float:
        seen.append(loss(m, batch))
        return 0.0

    result = fit(name, model, tmp_path / "run", eval_fn=evaluate)
    named = dict(result.model.named_parameters())
    assert result.model is model and type(model) is cls
    assert set(NAMES[name]) <= named.keys() and all(bool(named[n].detach().any()) for n in NAMES[name])
    assert all(p.grad is None for p in named.values())
    trained = loss(model, batch).detach()
    assert torch.equal(seen[-1], trained) and not torch.allclose(trained, original)
    assert result.statement.num_trainable <= result.statement.num_parameters == sum(p.numel() for p in named.values())

    file = tmp_path / "run" / "biases.safetensors"
    assert set(NAMES[name]) <= load_file(file).keys()
    fresh = make(torch.float32)
    for _ in range(2):  # loading twice is loading once
        assert dpb.load_biases(fresh, file) is fresh
        assert torch.equal(loss(fresh, batch), trained)
    assert list(fresh.state_dict()) == list(model.state_dict())
    twin = copy.deepcopy(fresh)
    assert torch.equal(loss(twin, batch), trained)
    again = with_real_biases(make(torch.float32), NAMES[name])
    again.load_state_dict(fresh.state_dict())
    assert torch.equal(loss(again, batch), trained)


class Stop(Exception):
    pass


def stop_after(steps: int) -> Callable[[Any], None]:
    def callback(info: Any) -> None:
        if info.step == steps:
            raise Stop

    return callback


@pytest.mark.parametrize("same_object", [False, True])
def test_an_interrupted_run_goes_on_bit_for_bit(same_object: bool, tmp_path: Path) -> None:
    whole = fit("resnet", resnet(), tmp_path / "whole")
    model = resnet()
    with pytest.raises(Stop):
        fit("resnet", model, tmp_path / "cut", checkpoint_every=2, callbacks=[stop_after(3)])
    result = fit("resnet", model if same_object else resnet(), tmp_path / "cut", checkpoint_every=2)
    assert result.charged_steps == 0
    want = whole.model.state_dict()
    assert list(want) == list(result.model.state_dict())
    assert all(torch.equal(v, want[k]) for k, v in result.model.state_dict().items())


def test_a_second_run_trains_the_same_biases_further_and_its_file_fits_the_original(tmp_path: Path) -> None:
    model = resnet()
    fit("resnet", model, tmp_path / "one")
    first = dict(model.named_parameters())["stem.bias"]
    step = dpb.compile(model, losses, images(), add_bias=True)
    assert step.parameters()["stem.bias"] is first and {b.name for b in step.added_biases} == set(NAMES["resnet"])
    assert step.joint.text() == compiled("resnet", torch.float32)[0].joint.text()
    fit("resnet", model, tmp_path / "two", max_steps=2)
    fresh = dpb.load_biases(resnet(), tmp_path / "two" / "biases.safetensors")
    assert torch.equal(fresh(images()[0]), model(images()[0]))
    # Left out of a later run they stay where they are, frozen.
    later = dpb.compile(model, losses, images(), add_bias=True, exclude=["stem.bias"])
    assert "stem.bias" not in later.trainable_names and bool(first.detach().any())
    assert dict(model.named_parameters())["stem.bias"] is first


def test_padded_lengths_share_one_set_of_added_biases() -> None:
    class Bag(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.mix, self.head = nn.Embedding(20, 5), nn.Linear(5, 5, bias=False), nn.Linear(5, 2)

        def forward(self, ids: Tensor) -> Any:
            return self.head(torch.tanh(self.mix(self.embed(ids))).mean(1))

    def loss(model: Any, batch: Any) -> Tensor:
        return F.cross_entropy(model(batch["ids"]), batch["label"], reduction="none")

    data = [{"ids": list(range(1, 2 + i % 7)), "label": i % 2} for i in range(40)]
    model = Bag()
    result = dpb.fit(
        model,
        loss,
        data,
        noise_multiplier=1.0,
        target_delta=1e-3,
        max_steps=3,
        expected_batch_size=10,
        padded_lengths={"ids": (4, 8)},
        add_bias=True,
        progress=False,
        insecure_seed_for_tests=1,
    )
    assert bool(dict(result.model.named_parameters())["mix.bias"].detach().any())


class Einsum(nn.Module):
    """Its output is the product: a hook can add the bias."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 2, 8) * 0.3)

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("bi,hki->bhk", x, self.weight)


class Buried(nn.Module):
    """A product in the middle of a forward, and a flag called bias."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.table = nn.Parameter(torch.randn(8, 8) * 0.3), nn.Parameter(torch.randn(8, 8) * 0.3)
        self.bias = False

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(x @ self.weight) + torch.tanh(x @ self.table)


def middle(module: Any) -> Sandwich:
    return Sandwich(module)


def einsum() -> nn.Module:
    torch.manual_seed(0)
    return Sandwich(nn.Sequential(Einsum(), nn.Flatten()))


def added(step: dpb.PrivateStep) -> dict[str, tuple[int, ...]]:
    return {b.name: b.shape for b in step.added_biases}


def oracle_agrees(step: dpb.PrivateStep, batch: Any) -> None:
    """The step against single-sample autograd on the very model with its biases applied, at values other than zero."""
    scatter({b.name: step.parameters()[b.name] for b in step.added_biases})
    ours, parameters = step.per_sample_gradients(batch), step.parameters()
    with step.biases_applied():
        assert set(parameters) <= set(dict(step.model.named_parameters()))
        for row in range(len(batch[1])):
            loss = losses(step.model, rows(batch, [row, row]))[0]
            for name, g in zip(parameters, torch.autograd.grad(loss, list(parameters.values())), strict=True):
                assert torch.allclose(ours[name][row], g, rtol=1e-5, atol=1e-6), name


def test_a_module_without_a_slot_gets_a_hook_where_its_output_is_the_product(tmp_path: Path) -> None:
    model = einsum()
    before = photograph(model)
    step = dpb.compile(model, losses, points(), add_bias=True)
    assert_untouched(model, before)
    assert added(step) == {"middle.0.bias": (4, 2)}
    oracle_agrees(step, points())
    step.apply_added_biases()
    from dpbitfit_fx.biases import ADDED_BIASES, describe_added, save_biases

    values = {n: p for n, p in step.parameters().items()}
    save_biases(tmp_path / "b", values, {ADDED_BIASES: describe_added(step.added_biases)})
    fresh = einsum()
    for _ in range(2):
        dpb.load_biases(fresh, tmp_path / "b")
        assert torch.equal(fresh(points()[0]), model(points()[0]))
    twin = copy.deepcopy(fresh)
    with torch.no_grad():
        twin.get_parameter("middle.0.bias").zero_()
    assert not torch.equal(twin(points()[0]), fresh(points()[0]))


def test_a_product_in_the_middle_of_a_forward_is_a_near_miss_with_the_reason() -> None:
    step = dpb.compile(middle(Buried()), losses, points(), add_bias=True)
    reasons = dict(step.report().near_misses)
    assert added(step) == {}
    assert "not a parameter" in reasons["middle.bias"]
    assert "would not add it where the product is" in reasons["middle.table_bias"]


class Deaf(nn.Linear):
    """Keeps a slot for a bias and does not look into it."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight)


def test_a_slot_that_the_layer_ignores_is_a_near_miss_with_the_reason() -> None:
    step = dpb.compile(middle(Deaf(8, 8, bias=False)), losses, points(), add_bias=True)
    assert added(step) == {} and "would not add it" in dict(step.report().near_misses)["middle.bias"]


class Bent(nn.Linear):
    """Right in value and gradient where the bias is zero, and nowhere else."""

    def forward(self, x: Tensor) -> Tensor:
        out = F.linear(x, self.weight)
        return out if self.bias is None else out + torch.expm1(self.bias)


@pytest.mark.parametrize("kind", [Deaf, Bent])
def test_the_check_of_meaning_names_by_itself_a_bias_that_the_model_would_not_add(
    kind: type[nn.Linear], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(added_biases, "_leave_out_doubtful", lambda *_: None)
    message = refusal(middle(nn.Sequential(nn.Linear(8, 8, bias=False), kind(8, 8, bias=False))), add_bias=True)
    assert "middle.1.bias" in message and "middle.0.bias" not in message and "exclude=" in message


def test_a_model_that_mixes_samples_is_still_refused_for_that() -> None:
    class Mixer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(8, 8, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            h: Tensor = self.inner(x)
            return h - h.mean(0)

    message = refusal(middle(Mixer()), add_bias=True)
    assert "sample by sample" in message and "add_bias" not in message


class Shared(Sandwich):
    """One layer used twice, under two names as well, and two layers with one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.same = nn.Linear(8, 8, bias=False)
        self.alias = self.same
        self.tied = nn.Linear(8, 8, bias=False)
        self.tied.weight = self.same.weight

    def transform(self, h: Tensor) -> Tensor:
        out: Tensor = self.tied(torch.tanh(self.alias(torch.tanh(self.same(self.same(h))))))
        return out


def test_a_layer_used_three_times_has_one_bias_and_tied_layers_one_each() -> None:
    step = dpb.compile(Shared(), losses, points(), add_bias=True)
    assert added(step) == {"same.bias": (8,), "tied.bias": (8,)}
    oracle_agrees(step, points())


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (lambda: nn.Conv1d(1, 3, 3, bias=False), (3,)),
        (lambda: nn.Conv1d(1, 3, 3, padding="same", bias=False), (3,)),
        (lambda: nn.ConvTranspose1d(1, 2, 2, stride=2, bias=False), (2,)),
        (lambda: nn.utils.parametrizations.weight_norm(nn.Conv1d(1, 3, 3, bias=False)), (3,)),
    ],
)
def test_every_kind_of_convolution_gets_one_bias_per_output_channel(
    layer: Callable[[], nn.Module], shape: tuple[int, ...]
) -> None:
    model = middle(nn.Sequential(nn.Unflatten(1, (1, 8)), layer(), nn.Tanh(), nn.AdaptiveAvgPool1d(4), nn.Flatten()))
    model.last = nn.Linear(4 * shape[0], 3, bias=False)
    step = dpb.compile(model, losses, points(), add_bias=True)
    assert added(step) == {"middle.1.bias": shape, "last.bias": (3,)}
    oracle_agrees(step, points())


def test_a_layer_that_has_a_bias_of_any_kind_gets_no_second_one() -> None:
    class OwnBias(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight, self.shift = nn.Parameter(torch.randn(8, 8)), nn.Parameter(torch.zeros(8))

        def forward(self, x: Tensor) -> Tensor:
            return x @ self.weight + self.shift

    step = dpb.compile(middle(OwnBias()), losses, points(), add_bias=True)
    assert added(step) == {} and set(step.trainable_names) == {"first.bias", "last.bias", "middle.shift"}


def test_without_add_bias_nothing_is_added() -> None:
    step = dpb.compile(middle(nn.Linear(8, 8, bias=False)), losses, points())
    assert step.added_biases == () and "middle.bias" not in step.trainable_names


def test_patterns_choose_among_added_biases_too() -> None:
    model = middle(nn.Sequential(nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False)))
    step = dpb.compile(model, losses, points(), trainable=["middle.*bias"], exclude=["middle.1.*"], add_bias=True)
    assert step.trainable_names == ("middle.0.bias",)
    assert step.report().excluded == (("middle.1.bias", "middle.1.*"),)
    assert "  trained  middle.0.bias [8] (by add_bias)" in str(step.report()).splitlines()
    assert step.report().share == 8 / (sum(p.numel() for p in model.parameters()) + 8)


def test_the_plain_onnx_pair_of_a_convolutional_step_trains_its_added_biases(tmp_path: Path) -> None:
    pytest.importorskip("onnxscript")
    ort = pytest.importorskip("onnxruntime")
    from dpbitfit_fx.biases import save_biases
    from dpbitfit_fx.ort_runner import read_manifest

    model = resnet()
    before = photograph(model)
    step = dpb.compile(model, losses, images(), add_bias=True, noise_multiplier=0.8, expected_batch_size=4.0)
    folder = dpb.export_onnx(step, tmp_path / "onnx")
    assert_untouched(model, before)
    scatter(step.parameters())
    theta = torch.cat([p.detach().flatten() for p in step.parameters().values()])
    session = ort.InferenceSession(str(folder / "grad_step.onnx"), providers=["CPUExecutionProvider"])
    manifest = read_manifest(folder)
    x, y = (entry["name"] for entry in manifest["batch_inputs"])
    feed = {x: images()[0], y: images()[1], "sample_mask": torch.ones(5), "theta": theta}
    feed["accumulator"] = step.zero_accumulator()
    (got,) = session.run(None, {k: v.numpy() for k, v in feed.items()})
    want = step.accumulate(images(), torch.ones(5), step.zero_accumulator())
    assert relative(torch.from_numpy(got), want) < 1e-5

    # What the runner writes: values by name, with the manifest's fingerprints as metadata.
    save_biases(tmp_path / "b", {n: p.detach().numpy() for n, p in step.parameters().items()}, manifest["fingerprints"])
    fresh = dpb.load_biases(resnet(), tmp_path / "b")
    with step.biases_applied():
        assert torch.equal(fresh(images()[0]), model(images()[0]))


def test_onnx_runtime_training_artifacts_evaluate_with_the_added_biases(tmp_path: Path) -> None:
    pytest.importorskip("onnxscript")
    pytest.importorskip("onnxruntime.training")
    model = middle(nn.Linear(8, 8, bias=False)).eval()
    before = photograph(model)

    def loss(m: Any, b: Any) -> Tensor:
        return losses(m, (b["x"], b["y"]))

    example = dict(zip("xy", points(), strict=True))
    step = dpb.compile(model, loss, example, add_bias=True, noise_multiplier=0.8, expected_batch_size=4.0)
    folder = dpb.export_ort_training(step, tmp_path / "ort", eval_output=lambda m, b: m(b["x"]))
    assert_untouched(model, before)
    from dpbitfit_fx.ort_runner import read_manifest

    assert "middle.bias" in [entry["name"] for entry in read_manifest(folder)["parameters"]]


def saved(folder: Path) -> Path:
    fit("resnet", resnet(), folder)
    return folder / "biases.safetensors"


def test_loading_added_biases_is_all_or_nothing(tmp_path: Path) -> None:
    file = saved(tmp_path / "run")
    tensors = load_file(file)
    metadata = json.loads(file.read_bytes()[8 : 8 + int.from_bytes(file.read_bytes()[:8], "little")])["__metadata__"]
    other = resnet()
    other.block = nn.Identity()  # the block's layers are not there
    narrow = resnet()
    narrow.block = Block(4)
    for model in (other, narrow, resnet().double()):
        before = photograph(model)
        with pytest.raises(ArtifactError, match="Nothing was loaded"):
            dpb.load_biases(model, file, strict=False)
        assert_untouched(model, before)
    elsewhere = resnet()
    with torch.no_grad():
        elsewhere.get_parameter("stem.weight").add_(1.0)
    with pytest.raises(ArtifactError, match="other frozen weights"):
        dpb.load_biases(elsewhere, file)
    for wrong in ("{", '{"stem.bias": {}}', '{"stem.bias": {"module": "block", "leaf": "bias", "view": [6, 1, 1]}}'):
        edited = {**metadata, "added_biases": wrong}
        save_file(tensors, tmp_path / "bad", {**edited, "sha256": _checksum(tensors, edited)})
        model = resnet()
        before = photograph(model)
        with pytest.raises(ArtifactError, match="added biases belong"):
            dpb.load_biases(model, tmp_path / "bad")
        assert_untouched(model, before)


def test_a_failed_fit_before_training_leaves_the_model_as_it_was(tmp_path: Path) -> None:
    model = resnet()
    before = photograph(model)
    with pytest.raises(dpb.DPBitFitError):
        fit("resnet", model, None, optimizer=lambda params: torch.optim.SGD(params[:1], lr=0.1))
    assert_untouched(model, before)


def test_attaching_fails_whole_when_one_bias_does_not_fit() -> None:
    model = resnet()
    before = photograph(model)
    step = compiled("resnet", torch.float32)[0]
    wrong = [*step.joint.added, step.joint.added[0].__class__("head.bias", "head", "bias", (3,), torch.float32, (3,))]
    with pytest.raises(ValueError, match="of its own"):
        bias_slots.attach(model, wrong, {**step.joint.state, "head.bias": nn.Parameter(torch.zeros(3))})
    assert_untouched(model, before)
