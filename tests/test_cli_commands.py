"""The command line on a tiny model and the user's own files, and one paragraph for every bad input."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner, Result

from dpbitfit_fx.cli import app

transformers = pytest.importorskip("transformers")
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "good", "bad", "film", "very", "not"]


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random two-layer BERT with its tokenizer, saved as any Hugging Face directory."""
    folder = tmp_path_factory.mktemp("bert")
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=len(WORDS),
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=32,
    )
    transformers.BertModel(config).save_pretrained(folder)
    (folder / "vocab.txt").write_text("\n".join(WORDS) + "\n")
    transformers.BertTokenizerFast(vocab=str(folder / "vocab.txt")).save_pretrained(folder)
    return folder


@pytest.fixture
def csv_file(tmp_path: Path) -> Path:
    path = tmp_path / "data.csv"
    rows = [("very good film", "pos"), ("very bad film", "neg"), ("not good", "neg"), ("not bad", "pos")] * 10
    path.write_text("text,label\n" + "".join(f"{text},{label}\n" for text, label in rows))
    return path


def invoke(*words: object) -> Result:
    return CliRunner().invoke(app, [str(word) for word in words])


def train(model: Path, data: Path, output: Path, *more: object) -> Result:
    plan = ["--target-epsilon", 8, "--target-delta", "1e-3", "--epochs", 1, "--expected-batch-size", 10]
    usual = ["--padded-lengths", "4,8", "--physical-batch-size", 4]
    return invoke("train", model, data, "--output", output, *plan, *usual, *more)


def one_paragraph(result: Result, *parts: str) -> None:
    assert result.exit_code == 2, result.output
    assert "Traceback" not in result.output
    assert len(result.stderr.strip().splitlines()) == 1, result.stderr
    for part in parts:
        assert part in result.stderr


def test_help_needs_no_torch() -> None:
    code = "import sys; import dpbitfit_fx.cli; assert 'torch' not in sys.modules and 'transformers' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
    assert invoke("--help").exit_code == 0


def test_account_solves_a_noise_multiplier_and_its_epsilon_comes_back() -> None:
    plan = ["--dataset-size", 10000, "--expected-batch-size", 500, "--steps", 20]
    solved = invoke("account", *plan, "--target-epsilon", 2)
    assert solved.exit_code == 0, solved.output
    assert "noise multiplier" in solved.stdout
    one_paragraph(invoke("account", *plan), "--target-epsilon")
    one_paragraph(invoke("account", *plan, "--target-epsilon", 0))
    one_paragraph(invoke("account", *plan, "--target-epsilon", 2, "--target-delta", "0.01"))


@pytest.mark.slow
def test_train_inspect_and_export_work_on_a_users_own_files(model_dir: Path, csv_file: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    result = train(model_dir, csv_file, output, "--labels", "neg,pos", "--eval-file", csv_file)
    assert result.exit_code == 0, result.output
    statement = json.loads((output / "privacy.json").read_text())
    assert statement["epsilon"] <= 8
    assert statement["public_declarations"]["label_set"] == ["neg", "pos"]
    assert statement["public_declarations"]["label_set_source"] == "declared"
    assert (output / "biases.safetensors").is_file()

    seen = invoke("inspect", model_dir, "--length", 8)
    assert seen.exit_code == 0, seen.output
    assert "encoder.encoder.layer.0.attention.self.query.bias" in seen.stdout
    assert "head.weight" in seen.stdout
    less = invoke("inspect", model_dir, "--length", 8, "--exclude", "*LayerNorm*")
    assert less.exit_code == 0, less.output
    assert "excluded  encoder.embeddings.LayerNorm.bias" in " ".join(less.stdout.split("\n"))
    one_paragraph(invoke("inspect", model_dir, "--length", 8, "--exclude", "*LayrNorm*"), "LayerNorm.bias")

    pytest.importorskip("onnxruntime")
    exported = invoke("export", output, model_dir, "--output", tmp_path / "onnx", "--format", "onnx")
    assert exported.exit_code == 0, exported.output
    assert (tmp_path / "onnx" / "grad_step.onnx").is_file()
    small = ["export", output, model_dir, "--output", tmp_path / "small", "--format", "onnx", "--weight-bits", 8]
    one_paragraph(invoke(*small), "no frozen weight of more than")
    further = invoke(
        "ort-train", tmp_path / "onnx", "--data", csv_file, "--output", tmp_path / "further", "--steps", 2,
        "--prior", output / "privacy.json",
    )  # fmt: skip
    assert further.exit_code == 0, further.output
    again = json.loads((tmp_path / "further" / "privacy.json").read_text())
    assert again["public_declarations"]["label_set"] == ["neg", "pos"] and again["steps"] == 2
    assert [run["run_id"] for run in again["prior"]] == [statement["run_id"]]
    assert again["epsilon"] > statement["epsilon"]


def test_a_head_alone_trains_on_what_the_frozen_encoder_made_of_each_record_once(
    model_dir: Path, csv_file: Path, tmp_path: Path
) -> None:
    declared = ("--labels", "neg,pos", "--trainable", "head.*")
    for name, more in (("kept", ["--cache-frozen-prefix"]), ("anew", [])):
        result = train(model_dir, csv_file, tmp_path / name, *declared, *more)
        assert result.exit_code == 0, result.output
        statement = json.loads((tmp_path / name / "privacy.json").read_text())
        assert 0 < statement["epsilon"] <= 8


def test_bad_arguments_and_bad_files_give_one_paragraph_and_leave_nothing(
    model_dir: Path, csv_file: Path, tmp_path: Path
) -> None:
    output = tmp_path / "run"
    one_paragraph(train(model_dir, csv_file, output), "--labels")
    one_paragraph(train(model_dir, csv_file, output, "--labels", "x,y"), "row 1")
    declared = ("--labels", "neg,pos")
    one_paragraph(train(model_dir, csv_file, output, *declared, "--text-column", "body"), "'text', 'label'")
    one_paragraph(
        train(model_dir, csv_file, output, *declared, "--clipping", "abadi"), "automatic, flat, auto-v, per-layer"
    )
    one_paragraph(train(model_dir, csv_file, output, *declared, "--padded-lengths", "8,4"), "increasing")
    one_paragraph(train(tmp_path / "nowhere", csv_file, output, *declared), "does not exist")
    one_paragraph(train(model_dir, csv_file, output, *declared, "--expected-batch-size", 100), "40")
    one_paragraph(train(model_dir, csv_file, output, *declared, "--target-delta", "0.5"), "1/N")
    one_paragraph(train(model_dir, csv_file, output, *declared, "--precision", "fp8"), "float32, bf16")
    one_paragraph(train(model_dir, csv_file, output, *declared, "--backend", "xla"), "eager, inductor")
    one_paragraph(train(model_dir, csv_file, output, *declared, "--cache-frozen-prefix"), "before the first trainable")
    empty = tmp_path / "empty.csv"
    empty.write_text("")
    one_paragraph(train(model_dir, empty, output, *declared), "empty")
    one_paragraph(train(model_dir, csv_file, csv_file, *declared), "not a folder")
    assert not (output / "privacy.json").exists()


def test_pickled_weights_are_never_opened(model_dir: Path, csv_file: Path, tmp_path: Path) -> None:
    folder = tmp_path / "pickled"
    folder.mkdir()
    (folder / "config.json").write_text((model_dir / "config.json").read_text())
    (folder / "pytorch_model.bin").write_bytes(b"anything")
    one_paragraph(invoke("inspect", folder), "safetensors")


def test_debug_shows_the_error_itself(tmp_path: Path) -> None:
    result = invoke("--debug", "inspect", tmp_path / "nowhere")
    assert result.exit_code == 1
    assert type(result.exception).__name__ == "ArtifactError"


def test_audit_attacks_a_private_run_on_the_users_file_and_leaves_its_report(
    model_dir: Path, csv_file: Path, tmp_path: Path
) -> None:
    plan = ["--target-epsilon", 8, "--target-delta", "1e-3", "--epochs", 0.5, "--expected-batch-size", 20]
    usual = ["--labels", "pos,neg", "--padded-lengths", "4,8", "--physical-batch-size", 16, "--canaries", 24]
    ledger = tmp_path / "ledger.jsonl"
    assert invoke("ledger", "init", ledger, "--target-epsilon", 9, "--target-delta", "1e-3").exit_code == 0
    done = invoke("audit", model_dir, csv_file, "--output", tmp_path / "out", *plan, *usual, "--ledger", ledger)
    assert done.exit_code == 0, done.output
    assert [run["reserved"] for run in json.loads(invoke("ledger", "show", ledger, "--json").stdout)["runs"]] == [None]
    assert "lower bound" in done.stdout and "not a proof" in done.stdout
    report = json.loads((tmp_path / "out" / "audit.json").read_text())
    assert report["attack"] == "gradient" and report["epsilon_lower_bound"] <= report["epsilon"] <= 8
    one_paragraph(
        invoke("audit", model_dir, csv_file, "--output", tmp_path / "out", *plan, *usual, "--attack", "x"), "attack"
    )
