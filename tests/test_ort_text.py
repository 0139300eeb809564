"""`dpbitfit ort-train` on a user's own texts, without torch: the tokens, labels and accuracy are PyTorch's."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("onnx")
pytest.importorskip("onnxscript")
pytest.importorskip("onnxruntime")
pytest.importorskip("tokenizers")

import tokenizers
from fit_cases import TextModel
from onnx_cases import has_ort_training

import dpbitfit_fx as dpb
from dpbitfit_fx.data import TextTable, read_table
from dpbitfit_fx.errors import ArtifactError, DataError
from dpbitfit_fx.ort_export import export_ort_training
from dpbitfit_fx.ort_records import Records
from dpbitfit_fx.ort_text import TextInput, attach_text, labels_of

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "good", "bad", "film", "very", "not"]
LENGTH = 6
# A process in which torch cannot be imported runs the command.
COMMAND = """
import sys
from ort_zygote import NoTorch
sys.meta_path.insert(0, NoTorch())
from dpbitfit_fx.cli import main
try:
    main()
finally:
    assert "torch" not in sys.modules and "transformers" not in sys.modules
"""


def word_tokenizer() -> Any:
    """Words between [CLS] and [SEP], as BERT's; padding on, as a tokenizer.json may come."""
    tokenizer = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="[UNK]")
    )
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    tokenizer.enable_padding(pad_id=0)
    return tokenizer


def manifest_for(entries: dict[str, list[int]], **more: Any) -> dict[str, Any]:
    inputs = [{"path": n, "name": n, "shape": shape, "dtype": "int64"} for n, shape in entries.items()]
    return {"batch_inputs": inputs, **more}


TEXT = {"input_ids": [LENGTH], "attention_mask": [LENGTH], "labels": []}


def test_a_text_becomes_its_own_tokens_cut_and_padded_to_the_public_length(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_text(word_tokenizer().to_str())
    manifest = manifest_for(TEXT)
    reader = TextInput(tmp_path, manifest, path)
    table = TextTable(("very good film", "not a very very bad film", "bad"), (1, 0, 0), ("neg", "pos"), False)
    records = Records(manifest, reader.records(table), reader.pad_values)
    ((batch, mask),) = records.micro_batches(np.arange(3), 4)
    assert batch["input_ids"].tolist() == [
        [2, 7, 4, 6, 3, 0],
        [2, 8, 1, 7, 7, 3],
        [2, 5, 3, 0, 0, 0],
        [0, 0, 0, 0, 0, 0],
    ]
    assert batch["attention_mask"].tolist() == [[int(i > 0) for i in row] for row in batch["input_ids"].tolist()]
    assert batch["labels"].tolist() == [1, 0, 0, 0] and mask.tolist() == [1, 1, 1, 0]


def test_transformers_and_tokenizers_give_the_same_ids(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=word_tokenizer(), pad_token="[PAD]")
    texts = ("very good film", "not a very very bad film", "bad")
    (tmp_path / "tokenizer.json").write_text(fast.backend_tokenizer.to_str())
    reader = TextInput(tmp_path, manifest_for(TEXT), tmp_path / "tokenizer.json")
    found = reader.records(TextTable(texts, (0, 0, 1), ("a", "b"), False))
    wanted = fast(list(texts), truncation=True, max_length=LENGTH, padding=False)["input_ids"]
    assert [record["input_ids"].tolist() for record in found] == wanted


@pytest.mark.parametrize("entries", [{"x": [5], "y": []}, TEXT | {"token_type_ids": [LENGTH]}, TEXT | {"labels": [3]}])
def test_artifacts_that_are_not_made_of_text_are_refused_by_their_entries(entries: dict[str, list[int]]) -> None:
    with pytest.raises(DataError, match=next(iter(entries)) + r".*\.npz"):
        TextInput("somewhere", manifest_for(entries))


def test_an_export_without_a_tokenizer_or_with_a_broken_one_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="carries no tokenizer"):
        TextInput(tmp_path, manifest_for(TEXT))
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ArtifactError, match=r"not a tokenizer\.json"):
        TextInput(tmp_path, manifest_for(TEXT), tmp_path / "tokenizer.json")


def test_labels_come_from_the_export_or_are_declared_and_never_contradict_it() -> None:
    known = {"text": {"labels": ["neg", "pos"]}}
    assert labels_of(known, None) == labels_of(known, ["neg", "pos"]) == labels_of({}, ["neg", "pos"]) == ["neg", "pos"]
    assert labels_of({}, None) is None
    with pytest.raises(DataError, match="neg, pos, in this order"):
        labels_of(known, ["pos", "neg"])


def logits(model: Any, batch: Any) -> torch.Tensor:
    found: torch.Tensor = model(batch["input_ids"], batch["attention_mask"])
    return found


def loss(model: Any, batch: Any) -> torch.Tensor:
    return torch.nn.functional.cross_entropy(logits(model, batch), batch["labels"], reduction="none")


@pytest.mark.slow
def test_a_run_on_texts_without_torch_scores_what_pytorch_scores_with_its_biases(tmp_path: Path) -> None:
    if not has_ort_training():
        pytest.skip("needs onnxruntime-training-cpu")
    torch.manual_seed(0)
    model = TextModel().eval()
    example = {name: torch.ones(4, *shape, dtype=torch.long) for name, shape in TEXT.items()}
    step = dpb.compile(model, loss, example, noise_multiplier=0.7, expected_batch_size=8.0)
    folder = export_ort_training(step, tmp_path / "artifacts", eval_output=logits, target_delta=1e-3)
    attach_text(folder, word_tokenizer().to_str(), ["neg", "pos"])
    data = tmp_path / "data.csv"
    rows = [("very good film", "pos"), ("very bad film", "neg"), ("not good", "neg"), ("not bad", "pos")] * 8
    data.write_text("body,verdict\n" + "".join(f"{text},{label}\n" for text, label in rows))

    out = tmp_path / "out"
    plan = ["--epochs", "3", "--target-epsilon", "20", "--lr-schedule", "linear", "--warmup-steps", "2"]
    columns = ["--text-column", "body", "--label-column", "verdict", "--eval-file", data, "--learning-rate", "0.1"]
    words = ["ort-train", folder, "--data", data, "--output", out, *columns, *plan]
    paths = [str(Path(__file__).parent), str(Path(dpb.__file__).resolve().parents[1])]
    done = subprocess.run(
        [sys.executable, "-c", COMMAND, *map(str, words)],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    shown = re.search(r"accuracy on the public file: ([\d.]+)", done.stdout)
    assert shown is not None, done.stdout

    dpb.load_biases(model, out / "biases.safetensors")
    table = read_table(data, "body", "verdict", ["neg", "pos"])
    reader = TextInput(folder, json.loads((folder / "manifest.json").read_text()))
    records = reader.records(table)
    right = 0
    for record in records:
        one = {name: torch.as_tensor(value)[None] for name, value in record.items()}
        right += int((logits(model, one).argmax(1) == one["labels"]).sum())
    assert float(shown[1]) == pytest.approx(right / len(records))
    statement = json.loads((out / "privacy.json").read_text())
    assert statement["steps"] == 12 and statement["epsilon"] <= 20
    assert statement["public_declarations"]["label_set"] == ["neg", "pos"]
    assert statement["public_declarations"]["lr_schedule"] == {"type": "linear", "warmup_steps": 2}
