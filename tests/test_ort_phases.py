"""A run of two phases at three padded lengths without torch: `fit`'s trajectory and statement, kill -9 and all."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch

pytest.importorskip("onnx")
pytest.importorskip("onnxscript")
pytest.importorskip("onnxruntime")
pytest.importorskip("tokenizers")
pytest.importorskip("transformers")

import onnx
import transformers
from fit_cases import Crash, crash_at, sentences, text_loss, text_model
from onnx import numpy_helper
from onnx_cases import has_ort_training
from test_ort_runner import Zygote, finished, results
from test_ort_text import WORDS, word_tokenizer
from torch import Tensor, nn

import dpbitfit_fx as dpb
from dpbitfit_fx.accounting import PriorRun, epsilon_of_phases
from dpbitfit_fx.batching import ItemLayout, PhysicalBatches
from dpbitfit_fx.biases import read_biases
from dpbitfit_fx.data import TextTable
from dpbitfit_fx.errors import ArtifactError, CheckpointError, DataError, ExportError, PrivacyError, SealBroken
from dpbitfit_fx.files import sha256_file
from dpbitfit_fx.ort_evaluate import Evaluator
from dpbitfit_fx.ort_plan import rates_by_parameter
from dpbitfit_fx.ort_records import Records, public_lengths
from dpbitfit_fx.ort_runner import OrtTrainer, load_artifacts
from dpbitfit_fx.ort_text import TextInput, attach_text
from dpbitfit_fx.progress import StepInfo

LENGTHS, RECORDS, DELTA, EPSILON = (4, 6, 9), 60, 1e-3, 8.0
STEPS = (3, 4)  # of the head alone, then of the head and the norms' biases
LATER = ["*LayerNorm.bias", "head.*"]
PHASES = [
    dpb.RunPhase(
        ["head.*"], max_steps=STEPS[0], expected_batch_size=20, learning_rates={"*": 0.05}, schedule=dpb.Schedule("linear")
    ),
    dpb.RunPhase(
        LATER, max_steps=STEPS[1], expected_batch_size=10, learning_rates={"head.*": 0.01, "*": 0.03},
        schedule=dpb.Schedule("product", 1.5),
    ),
]  # fmt: skip


class Classifier(nn.Module):
    """MiniLM in small: the mean of the real tokens' states, and a head."""

    def __init__(self) -> None:
        super().__init__()
        config = transformers.BertConfig(
            vocab_size=len(WORDS), hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24,
            max_position_embeddings=16,
        )  # fmt: skip
        self.encoder, self.head = transformers.BertModel(config, add_pooling_layer=False), nn.Linear(16, 2)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        states = self.encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        weight = attention_mask.unsqueeze(-1).to(states.dtype)
        scores: Tensor = self.head((states * weight).sum(1) / weight.sum(1).clamp(min=1))
        return scores


def classifier() -> Classifier:
    torch.manual_seed(0)
    return Classifier().eval()


def scores(model: Any, batch: Any) -> Tensor:
    found: Tensor = model(batch["input_ids"], batch["attention_mask"])
    return found


def loss(model: Any, batch: Any) -> Tensor:
    return nn.functional.cross_entropy(scores(model, batch), batch["labels"], reduction="none")


def example() -> dict[str, Tensor]:
    ids = torch.arange(27).reshape(3, 9) % len(WORDS)
    mask = (torch.arange(9) < 9 - torch.arange(3)[:, None]).long()
    return {"input_ids": ids, "attention_mask": mask, "labels": torch.tensor([0, 1, 1])}


class Case(NamedTuple):
    folder: Path
    data: Path  # the texts as .csv
    records: list[dict[str, Any]]  # the same, tokenised


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Case:
    root = tmp_path_factory.mktemp("phases")
    lengths = {"input_ids": LENGTHS, "attention_mask": LENGTHS}
    folder = dpb.export_run(
        classifier(), loss, example(), root / "artifacts", phases=PHASES, dataset_size=RECORDS, target_delta=DELTA,
        target_epsilon=EPSILON, padded_lengths=lengths, eval_output=scores,
    )  # fmt: skip
    attach_text(folder, word_tokenizer().to_str(), ["neg", "pos"])
    chance = np.random.default_rng(1)
    texts = [" ".join(chance.choice(WORDS[4:], size=chance.integers(1, 8))) for _ in range(RECORDS)]
    labels = tuple(int(n) for n in chance.integers(0, 2, RECORDS))
    rows = "".join(f"{text},{('neg', 'pos')[label]}\n" for text, label in zip(texts, labels, strict=True))
    (root / "data.csv").write_text("text,label\n" + rows)
    manifest = json.loads((folder / "manifest.json").read_text())
    records = TextInput(folder, manifest).records(TextTable(tuple(texts), labels, ("neg", "pos"), False))
    return Case(folder, root / "data.csv", records)


@pytest.fixture(scope="module")
def trainer(case: Case) -> Callable[..., OrtTrainer]:
    """`trainer(folder, **changes)`: the reference run, deterministic, checkpoints every 2 steps."""

    def make(output: Path | None, **changes: Any) -> OrtTrainer:
        usual: dict[str, Any] = {
            "artifacts": case.folder, "data": case.records, "output_dir": output, "physical_batch_size": 4,
            "checkpoint_every": 2, "insecure_seed_for_tests": 7,
        }  # fmt: skip
        return OrtTrainer(**(usual | changes))

    return make


@pytest.fixture(scope="module")
def whole(trainer: Callable[..., OrtTrainer], tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The uninterrupted run: parameters, folder, and what callbacks saw."""
    folder, infos = tmp_path_factory.mktemp("whole"), list[Any]()
    with trainer(folder) as one:
        one.train(callbacks=[infos.append])
        values = one.biases()
        statement = one.finish()
    return values, folder, infos, statement


# -- fit's trajectory -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def torch_run(case: Case, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The same run by `fit`, in PyTorch: its optimizers and schedules are torch's and Python's."""
    model = classifier()

    def adam(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
        head = {id(p) for p in model.head.parameters()}
        parts = [[p for p in parameters if (id(p) in head) is wanted] for wanted in (True, False)]
        return torch.optim.Adam([{"params": part, "lr": rate} for part, rate in zip(parts, (0.01, 0.03), strict=True)])

    phases = [
        dpb.Phase(["head.*"], max_steps=3, expected_batch_size=20, learning_rate=0.05, lr_schedule=lambda t: 1 - t / 3),
        dpb.Phase(
            LATER, max_steps=4, expected_batch_size=10, optimizer=adam,
            lr_schedule=lambda t: min(1.0, (t + 1) / 1.5) * (1 - t / 4),
        ),
    ]  # fmt: skip
    return dpb.fit(
        model, loss, case.records, phases=phases, target_epsilon=EPSILON, target_delta=DELTA, dataset_size=RECORDS,
        physical_batch_size=4, padded_lengths={"input_ids": LENGTHS, "attention_mask": LENGTHS}, example_batch=example(),
        output_dir=tmp_path_factory.mktemp("torch"), progress=False, insecure_seed_for_tests=7,
    )  # fmt: skip


def test_without_torch_the_run_ends_where_fits_two_phases_do(whole: Any, torch_run: dpb.FitResult) -> None:
    values, start = whole[0], dict(classifier().named_parameters())
    assert {"head.weight", "head.bias", "encoder.embeddings.LayerNorm.bias"} < values.keys()
    for name, value in values.items():
        moved = torch_run.model.get_parameter(name).detach().numpy() - start[name].detach().numpy()
        assert np.linalg.norm(moved) > 1e-2, name
        error = value - start[name].detach().numpy() - moved
        assert np.linalg.norm(error) <= 1e-5 * np.linalg.norm(moved), name


def test_privacy_json_says_what_fits_says(whole: Any, torch_run: dpb.FitResult) -> None:
    assert torch_run.output_dir is not None
    ours, theirs = (json.loads((f / "privacy.json").read_text()) for f in (whole[1], torch_run.output_dir))
    assert ours.keys() == theirs.keys() and ours["phases"][0].keys() == theirs["phases"][0].keys()
    differs = {name for name in ours if ours[name] != theirs[name]}
    # The noise, epsilon and the graphs' hashes do not; sha256 is of the file itself.
    assert differs == {"backend", "public_declarations", "run_id", "sha256"}
    assert ours["public_declarations"]["padded_lengths"] == theirs["public_declarations"]["padded_lengths"]
    assert 0.99 * EPSILON < ours["epsilon"] <= EPSILON


def test_callbacks_see_the_phases_their_rates_and_one_growing_epsilon(whole: Any) -> None:
    infos, statement = whole[2], whole[3]
    assert [(i.step, i.steps, i.phase) for i in infos] == [(n, 7, int(n > 3)) for n in range(1, 8)]
    factors = [1, 2 / 3, 1 / 3, *(min(1, (t + 1) / 1.5) * (1 - t / 4) for t in range(4))]
    rates = [factor * rate for factor, rate in zip(factors, [0.05] * 3 + [0.01] * 4, strict=True)]
    assert [i.learning_rate for i in infos] == pytest.approx(rates)
    spent = [i.epsilon for i in infos]
    assert spent == sorted(spent) and spent[-1] == statement.epsilon


def test_the_exported_evaluation_scores_every_length_as_pytorch_does(case: Case, torch_run: dpb.FitResult) -> None:
    manifest = json.loads((case.folder / "manifest.json").read_text())
    records, named = Records(manifest, case.records), dict(torch_run.model.named_parameters())
    flat = np.concatenate([named[p["name"]].detach().numpy().ravel() for p in manifest["parameters"]])
    ones = [{k: torch.as_tensor(v)[None] for k, v in record.items()} for record in case.records]
    right = sum(int(scores(torch_run.model, one).argmax(1) == one["labels"]) for one in ones)
    found = Evaluator(case.folder, manifest).scores(records, flat, "labels", rows=8)
    assert found == {"accuracy": right / RECORDS}


# -- padded lengths ---------------------------------------------------------------------------------------------------


def test_a_draw_is_split_into_the_very_batches_of_fit(case: Case) -> None:
    manifest = json.loads((case.folder / "manifest.json").read_text())
    layout = ItemLayout.build(example(), {"input_ids": LENGTHS, "attention_mask": LENGTHS}, is_example=True)
    rows, sizes = np.arange(0, RECORDS, 2), (3, 4, 5)
    theirs = list(PhysicalBatches(case.records, layout, sizes).split([int(r) for r in rows], bytes(32)))
    ours = list(Records(manifest, case.records).micro_batches(rows, sizes))
    assert len({batch.bucket for batch in theirs}) == 3 and len(ours) == len(theirs)
    for (batch, mask), batch_of_fit in zip(ours, theirs, strict=True):
        real = int(mask.sum())
        assert mask.tolist() == batch_of_fit.sample_mask.tolist()
        for entry in manifest["batch_inputs"]:
            assert np.array_equal(batch[entry["name"]][:real], batch_of_fit.batch[entry["path"]].numpy()[:real])


def test_an_empty_draw_is_one_masked_batch_and_a_record_beyond_the_longest_is_named(case: Case) -> None:
    manifest = json.loads((case.folder / "manifest.json").read_text())
    ((batch, mask),) = Records(manifest, case.records).micro_batches(np.zeros(0, int), 4)
    assert not mask.any() and batch[manifest["batch_inputs"][0]["name"]].shape[0] == 4
    long = [*case.records[:5], {"input_ids": np.ones(10, int), "attention_mask": np.ones(10, int), "labels": 0}]
    with pytest.raises(DataError, match=r"Row 5 .* has shape \(10,\)"):
        Records(manifest, long).check()


@pytest.mark.parametrize(
    "asked", [(3, 9), (4, 10), (9, 4), {"input_ids": (4, 9)}, {"input_ids": (4,), "attention_mask": (5,)}, {"x": (4,)}], ids=str
)  # fmt: skip
def test_lengths_that_the_export_was_not_checked_for_are_refused(asked: Any, case: Case) -> None:
    manifest = json.loads((case.folder / "manifest.json").read_text())
    assert set(public_lengths(manifest, (5, 9)).values()) == {(5, 9)}
    with pytest.raises(DataError, match=r"padded_lengths|padded lengths"):
        public_lengths(manifest, asked)
    with pytest.raises(DataError, match="the lengths only"):
        public_lengths({k: v for k, v in manifest.items() if k != "dynamic_length"}, (4, 9))


# -- phases -----------------------------------------------------------------------------------------------------------


def test_what_one_phase_trained_the_next_one_takes_as_it_is(case: Case) -> None:
    """Phase 1 holds the biases that phase 2 trains: other values of them give other gradients, PyTorch's."""
    view = json.loads((case.folder / "manifest.json").read_text())
    held = view["phases"][0]["held"]
    assert {p["name"] for p in held} == {p["name"] for p in view["parameters"]} - {"head.weight", "head.bias"}
    assert view["phases"][1]["held"] == []
    backend: Any = load_artifacts(case.folder)
    model, batch = classifier(), example()
    sums = []
    for shift in (0.0, 0.3):
        with torch.no_grad():
            for p in held:
                model.get_parameter(p["name"]).add_(shift)
        backend.set_held(np.concatenate([model.get_parameter(p["name"]).detach().numpy().ravel() for p in held]))
        backend.begin()
        given = {e["name"]: batch[e["path"]].numpy() for e in view["batch_inputs"]}
        backend.accumulate(given, np.ones(3, np.float32), np.zeros(0))
        step = dpb.compile(model, loss, batch, trainable=["head.*"])
        want = step.accumulate(batch, torch.ones(3), step.zero_accumulator()).numpy()
        assert np.linalg.norm(backend.gradient_buffers() - want) <= 1e-5 * np.linalg.norm(want)
        sums.append(want)
    assert np.linalg.norm(sums[0] - sums[1]) > 1e-2 * np.linalg.norm(sums[0])


def crashed(trainer: OrtTrainer, step: int) -> None:
    with trainer, pytest.raises(Crash):
        trainer.train(callbacks=[crash_at(step)])


@pytest.mark.parametrize("step", [2, 3, 4, 6])
def test_a_crash_before_on_and_behind_the_border_costs_nothing(
    step: int, whole: Any, trainer: Callable[..., OrtTrainer], tmp_path: Path
) -> None:
    crashed(trainer(tmp_path), step)
    _, statement = finished(trainer(tmp_path))
    values, _ = read_biases(tmp_path / "biases.safetensors")
    assert all(np.array_equal(values[name], value) for name, value in whole[0].items())
    assert (statement.phases, statement.epsilon) == (whole[3].phases, whole[3].epsilon)


def test_lost_steps_are_charged_to_the_phase_that_took_them_and_the_target_holds(
    trainer: Callable[..., OrtTrainer], tmp_path: Path
) -> None:
    crashed(trainer(tmp_path, checkpoint_every=2), 5)  # checkpoint at 4; step 4, of the second phase, was seen
    _, statement = finished(trainer(tmp_path, physical_batch_size=5))
    assert [(p.steps, p.lost_steps) for p in statement.phases] == [(3, 0), (3, 1)] and statement.epsilon <= EPSILON
    crashed(
        trainer(tmp_path / "border", checkpoint_every=2), 3
    )  # checkpoint at 2; step 2, the first phase's last, was seen
    _, statement = finished(trainer(tmp_path / "border", physical_batch_size=5))
    assert [(p.steps, p.lost_steps) for p in statement.phases] == [(2, 1), (4, 0)]


def test_epsilon_so_far_counts_what_a_later_phase_has_lost_already(
    case: Case, trainer: Callable[..., OrtTrainer], tmp_path: Path
) -> None:
    """Without a target lost steps come on top: the first phase goes on after a crash that lost one step of each phase."""
    folder = shutil.copytree(case.folder, tmp_path / "artifacts")
    rewritten(folder, lambda manifest: manifest["plan"].update(target_epsilon=None))
    crashed(trainer(tmp_path / "out", artifacts=folder), 4)  # checkpoint at 2; steps 2 and 3 were seen
    infos = list[StepInfo]()
    with trainer(tmp_path / "out", artifacts=folder, physical_batch_size=5) as one:
        one.train(callbacks=[infos.append])
        samplers, sigma = [phase.sampler for phase in one.plan.phases], one.plan.noise_multiplier
        statement = one.finish()
    assert [(p.steps, p.lost_steps) for p in statement.phases] == [(3, 1), (4, 1)]
    assert (infos[0].step, infos[0].phase, infos[-1].phase) == (3, 0, 1)
    assert infos[0].epsilon >= epsilon_of_phases(list(zip(samplers, (4, 1), strict=True)), sigma, DELTA)
    assert infos[-1].epsilon >= statement.epsilon


def test_earlier_runs_that_the_export_was_planned_with_are_counted_untold(
    case: Case, trainer: Callable[..., OrtTrainer], tmp_path: Path
) -> None:
    before = PriorRun("before", 0.1, 2.0, 5)
    folder = dpb.export_run(
        nn.Linear(4, 2), lambda m, b: nn.functional.cross_entropy(m(b["x"]), b["y"], reduction="none"),
        {"x": torch.zeros(2, 4), "y": torch.tensor([0, 1])}, tmp_path / "small",
        phases=[dpb.RunPhase(max_steps=2, expected_batch_size=20)], dataset_size=RECORDS, target_delta=DELTA,
        target_epsilon=EPSILON, prior=before,
    )  # fmt: skip
    data = {"x": np.zeros((RECORDS, 4), np.float32), "y": np.zeros(RECORDS, np.int64)}
    for told in ((), before):
        one = trainer(None, artifacts=folder, data=data, prior=told)
        assert one.statement().prior == (before,)
        one.train()
        assert one.statement().epsilon == epsilon_of_phases(
            [(one.plan.sampler, 2)], one.plan.noise_multiplier, DELTA, before
        )
    with pytest.raises(PrivacyError, match="describe the run 'before' differently"):
        trainer(None, artifacts=folder, data=data, prior=PriorRun("before", 0.1, 2.0, 6))
    rewritten(folder, lambda manifest: manifest["plan"].update(prior=7))
    with pytest.raises(ArtifactError, match="'prior' in 'plan'"):
        trainer(None, artifacts=folder, data=data)


@pytest.fixture
def zygote(tmp_path: Path) -> Iterator[Zygote]:
    one = Zygote(tmp_path)
    yield one
    one.process.kill()
    one.process.wait()


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs SIGKILL, fork and /proc")
def test_killed_in_either_phase_the_command_ends_where_the_uninterrupted_one_does(
    case: Case, zygote: Zygote, tmp_path: Path
) -> None:
    def command(output: Path) -> list[str]:
        usual = ["--checkpoint-every", "2", "--physical-batch-size", "4"]
        return ["ort-train", str(case.folder), "--data", str(case.data), "--output", str(output), *usual]

    def begun(folder: Path, step: int) -> Callable[[], bool]:
        def reached() -> bool:
            with contextlib.suppress(OSError, ValueError, IndexError):
                lines = (folder / "checkpoint" / "journal.jsonl").read_text().splitlines()
                return bool(json.loads(lines[-1])["step"] >= step)
            return False

        return reached

    base = tmp_path / "base"
    assert zygote.run(command(base), (base / "checkpoint" / "checkpoint.json").exists) == -9, zygote.errors.read_text()
    shutil.copytree(base, tmp_path / "reference")
    assert zygote.run(command(tmp_path / "reference")) == 0, zygote.errors.read_text()
    wanted = results(tmp_path / "reference")
    assert [(p["steps"], p["lost_steps"]) for p in wanted["phases"]] == [(3, 0), (4, 0)] and not wanted["insecure"]
    killed = 0
    for step in (1, 3, 5):
        folder = tmp_path / f"killed-{step}"
        shutil.copytree(base, folder)
        killed += zygote.run(command(folder), begun(folder, step)) == -9
        code = zygote.run(command(folder))
        assert code == 0 or "finished run" in zygote.errors.read_text(), zygote.errors.read_text()
        assert results(folder) == wanted, step
    assert killed >= 2


# -- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change", [{"steps": 3}, {"epochs": 1.0}, {"learning_rate": 0.1}, {"schedule": dpb.Schedule("linear")}], ids=str
)
def test_one_plan_for_all_phases_is_refused(change: dict[str, Any], trainer: Callable[..., OrtTrainer]) -> None:
    with pytest.raises(PrivacyError, match="of each of its phases"):
        trainer(None, **change)


def test_the_phases_together_are_held_to_the_target(
    trainer: Callable[..., OrtTrainer], whole: Any, tmp_path: Path
) -> None:
    with pytest.raises(PrivacyError, match=r"7 steps .* At most [1-6] steps"):
        trainer(None, target_epsilon=EPSILON - 1)
    with pytest.raises(PrivacyError, match=r"together with 2 earlier run\(s\)"):
        trainer(None, prior=whole[1])
    crashed(trainer(tmp_path), 4)
    with pytest.raises(CheckpointError, match="Nothing was changed"):
        trainer(tmp_path, target_epsilon=30.0, prior=whole[1])


def rewritten(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    change(manifest)
    manifest["files"] = {name: sha256_file(folder / name) for name in manifest["files"]}
    (folder / "manifest.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize("number", [1, 2])
def test_a_graph_of_any_phase_that_was_tampered_with_is_refused_though_its_hash_is_right(
    number: int, case: Case, tmp_path: Path
) -> None:
    folder = shutil.copytree(case.folder, tmp_path / "copy")
    model = onnx.load(folder / f"update_step_{number}.onnx")
    scaling = next(n for n in model.graph.node if n.op_type == "Mul" and "noise" in n.input)
    scale = next(t for t in model.graph.initializer if t.name in scaling.input)
    scale.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(scale) / 2, scale.name))
    onnx.save(model, folder / f"update_step_{number}.onnx")
    rewritten(folder, lambda manifest: None)
    with pytest.raises(SealBroken, match=rf"update_step_{number}.onnx: noise scale"):
        load_artifacts(folder)


def _noise(m: dict[str, Any]) -> None:
    m["phases"][1]["noise_multiplier"] *= 2


def _graphs(m: dict[str, Any]) -> None:
    m["phases"][1]["graphs"] = m["phases"][0]["graphs"]


def _elsewhere(m: dict[str, Any]) -> None:
    m["phases"][1]["graphs"] = {n: "../" + f for n, f in m["phases"][1]["graphs"].items()}


def _parameters(m: dict[str, Any]) -> None:
    m["phases"][0]["held"][0]["name"] = "head.bias"


@pytest.mark.parametrize("change", [_noise, _graphs, _elsewhere, _parameters])
def test_phases_that_contradict_each_other_are_refused(change: Any, case: Case, tmp_path: Path) -> None:
    folder = shutil.copytree(case.folder, tmp_path / "copy")
    rewritten(folder, change)
    with pytest.raises(ArtifactError, match=r"contradicts itself|'graphs' of a phase"):
        load_artifacts(folder)


@pytest.mark.parametrize("rates", [{"head.*": 0.1}, {"*": 0.1, "head.*": 0.2}, {"*": float("nan")}], ids=str)
def test_learning_rates_reach_every_parameter_and_are_all_used(rates: dict[str, float]) -> None:
    names = ["a.bias", "head.weight"]
    assert rates_by_parameter(names, (("head.*", 0.2), ("*", 0.1))) == [0.1, 0.2]
    with pytest.raises(PrivacyError, match=r"learning rate|matches no parameter|learning_rate"):
        rates_by_parameter(names, tuple(rates.items()))


def test_tied_parameters_are_not_split_over_phases(tmp_path: Path) -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(3, 3), nn.Linear(3, 2)
            self.register_buffer("copy", self.last.bias.detach())

        def forward(self, x: Tensor) -> Tensor:
            scores: Tensor = self.last(torch.tanh(self.first(x))) + self.copy
            return scores

    phases = [dpb.RunPhase([f"{name}.bias"], max_steps=1, expected_batch_size=4) for name in ("first", "last")]
    batch = {"x": torch.randn(4, 3), "y": torch.tensor([0, 1, 0, 1])}
    with pytest.raises(ExportError, match=r"Phase 1 of 2: .*'copy'.*'last.bias' of another phase"):
        dpb.export_run(
            Tied().eval(), lambda m, b: nn.functional.cross_entropy(m(b["x"]), b["y"], reduction="none"), batch, tmp_path / "out",
            phases=phases, dataset_size=40, target_delta=1e-3, noise_multiplier=1.0,
        )  # fmt: skip


# -- ONNX Runtime Training: one phase, every length -------------------------------------------------------------------


def test_onnx_runtime_training_takes_every_length_of_one_graph_too(tmp_path: Path) -> None:
    if not has_ort_training():
        pytest.skip("needs onnxruntime-training-cpu")
    size = torch.export.Dim("T", min=4, max=12)
    ids = torch.arange(48).reshape(4, 12) % 20
    batch = {
        "input_ids": ids,
        "attention_mask": (ids > 2).long(),
        "label": torch.tensor([0, 1, 0, 1]),
        "weight": torch.ones(4),
    }
    shapes = {name: {1: size} for name in ("input_ids", "attention_mask")}
    fixed: dict[str, Any] = {"noise_multiplier": 1.0, "expected_batch_size": 15.0}
    step = dpb.compile(text_model(), text_loss, batch, dynamic_shapes=shapes, **fixed)
    folder = dpb.export_ort_training(
        step, tmp_path / "artifacts", eval_output=lambda m, b: m(b["input_ids"], b["attention_mask"])
    )
    lengths, sizes = (4, 8, 12), (2, 3, 4)
    with OrtTrainer(
        folder, sentences(), steps=4, target_delta=DELTA, padded_lengths=lengths, physical_batch_size=sizes,
        insecure_seed_for_tests=7,
    ) as trainer:  # fmt: skip
        trainer.train()
        values, statement = trainer.biases(), trainer.statement()
    result = dpb.fit(
        text_model(), text_loss, sentences(), max_steps=4, target_delta=DELTA, example_batch=batch,
        padded_lengths={"input_ids": lengths, "attention_mask": lengths}, physical_batch_size=sizes, progress=False,
        insecure_seed_for_tests=7, **fixed,
    )  # fmt: skip
    start = dict(text_model().named_parameters())
    for name, value in values.items():
        moved = (result.model.get_parameter(name) - start[name]).detach().numpy()
        assert np.linalg.norm(value - start[name].detach().numpy() - moved) <= 1e-4 * np.linalg.norm(moved), name
    assert statement.public_declarations["physical_batch_size"] == [2, 3, 4]
    assert statement.phases == () and statement.epsilon == result.epsilon


# -- a graph per length -----------------------------------------------------------------------------------------------


class Recurrent(nn.Module):
    """A loop over the tokens: no one graph takes every length."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.cell, self.head = nn.Embedding(20, 3), nn.Linear(3, 3), nn.Linear(3, 2)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        inputs, state = self.embed(input_ids), torch.zeros(input_ids.shape[0], 3)
        for at in range(input_ids.shape[1]):
            state = state + torch.tanh(self.cell(state + inputs[:, at])) * attention_mask[:, at, None].float()
        scores: Tensor = self.head(state)
        return scores


def recurrent() -> Recurrent:
    torch.manual_seed(4)
    return Recurrent().eval()


def test_a_model_that_no_one_graph_serves_has_a_graph_per_length_and_trains_as_fit_does(tmp_path: Path) -> None:
    batch = {n: x[:, :5] for n, x in example().items() if n != "labels"} | {"labels": torch.tensor([0, 1, 1])}
    ids = [np.arange(row % 5 + 1) for row in range(30)]
    records = [{"input_ids": x, "attention_mask": np.ones_like(x), "labels": row % 2} for row, x in enumerate(ids)]
    lengths = {"input_ids": (3, 5), "attention_mask": (3, 5)}
    shared: dict[str, Any] = {
        "target_delta": DELTA,
        "dataset_size": 30,
        "noise_multiplier": 1.0,
        "padded_lengths": lengths,
    }
    phase = dpb.RunPhase("bias", max_steps=3, expected_batch_size=8, learning_rates={"*": 0.05})
    with pytest.warns(UserWarning, match="once for each of the padded lengths"):
        folder = dpb.export_run(
            recurrent(), loss, batch, tmp_path / "artifacts", phases=[phase], eval_output=scores, **shared
        )
    graphs = json.loads((folder / "manifest.json").read_text())["phases"][0]["graphs"]
    assert graphs["grad_step"] == ["grad_step_1_3.onnx", "grad_step_1_5.onnx"]
    with OrtTrainer(folder, records, physical_batch_size=4, insecure_seed_for_tests=7) as trainer:
        trainer.train()
        values, flat, data = trainer.biases(), trainer.flat(), trainer.records
    with pytest.warns(UserWarning, match="once for each of the padded lengths"):
        result = dpb.fit(
            recurrent(), loss, records, max_steps=3, expected_batch_size=8, learning_rate=0.05, physical_batch_size=4,
            example_batch=batch, progress=False, insecure_seed_for_tests=7, **shared,
        )  # fmt: skip
    start = dict(recurrent().named_parameters())
    for name, value in values.items():
        moved = (result.model.get_parameter(name) - start[name]).detach().numpy()
        error = value - start[name].detach().numpy() - moved
        assert np.linalg.norm(error) <= 1e-5 * np.linalg.norm(moved), name
    ones = [{k: torch.as_tensor(v)[None] for k, v in record.items()} for record in records]
    right = sum(int(scores(result.model, one).argmax(1) == one["labels"]) for one in ones)
    found = Evaluator(folder, trainer.manifest).scores(data, flat, "labels", rows=8)
    assert found == {"accuracy": right / 30}

    def swap(manifest: dict[str, Any]) -> None:
        manifest["phases"][0]["graphs"]["grad_step"].reverse()

    rewritten(folder, swap)
    with pytest.raises(SealBroken, match=r"grad_step_1_5.onnx.*input_ids"):
        load_artifacts(folder)
