"""What the tests of the JavaScript examples share: npm packages, small exports with their budget, tables of records."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import dpbitfit_fx as dpb
from dpbitfit_fx.biases import read_biases
from dpbitfit_fx.ort_budget import attach_budget
from dpbitfit_fx.ort_text import attach_text

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
DELTA = 1e-3
LENGTH = 8
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "good", "bad", "film", "very", "not", "##s", "!"]
TEXTS = [("Very good films!", "pos"), ("not good", "neg"), ("bad, bad film", "neg"), ("not a bad film at all", "pos")]
TEXTS += [("very very very very very very very bad", "neg"), ("a 'good' film", "pos")]


def needs(*programs: str) -> pytest.MarkDecorator:
    missing = [program for program in programs if shutil.which(program) is None]
    return pytest.mark.skipif(bool(missing), reason=f"{' and '.join(missing)} not installed")


def examples(which: str, folder: Path) -> Path:
    """A copy of examples/ in `folder` whose `which` has its npm packages, installed once per version into the cache."""
    wanted = EXAMPLES / which / "package.json"
    base = Path(os.environ.get("DPBITFIT_CACHE") or Path.home() / ".cache" / "dpbitfit")
    kept = base / f"npm-{which}-{hashlib.sha256(wanted.read_bytes()).hexdigest()[:16]}"
    if not kept.is_dir():
        base.mkdir(parents=True, exist_ok=True)
        made = Path(tempfile.mkdtemp(dir=base))
        try:
            for name in ("package.json", ".npmrc"):
                shutil.copy2(EXAMPLES / which / name, made)
            done = subprocess.run(["npm", "install"], cwd=made, capture_output=True, text=True)
            assert done.returncode == 0, done.stderr
            # Whoever is first puts them there.
            with contextlib.suppress(OSError):
                made.rename(kept)
        finally:
            shutil.rmtree(made, ignore_errors=True)
    shutil.copytree(EXAMPLES, folder / "examples", ignore=shutil.ignore_patterns("node_modules"))
    (folder / "examples" / which / "node_modules").symlink_to(kept / "node_modules")
    return folder / "examples"


def write_table(path: Path, data: dict[str, torch.Tensor]) -> Path:
    """The table of numbers that the examples read."""
    names = [f"{n}_{i}" if v.dim() > 1 else n for n, v in data.items() for i in range(v[0].numel())]
    rows = zip(*(v.reshape(len(v), -1).tolist() for v in data.values()), strict=True)
    lines = [",".join(repr(x) for part in row for x in part) for row in rows]
    path.write_text("\n".join([",".join(names), *lines]) + "\n")
    return path


def write_texts(path: Path, count: int) -> Path:
    lines = [f'"{text}",{label}' for text, label in (TEXTS * count)[:count]]
    path.write_text("\n".join(["text,label", *lines]) + "\n")
    return path


def word_pieces() -> Any:
    """BERT's tokenizer, of a few words."""
    import tokenizers

    made = tokenizers.Tokenizer(tokenizers.models.WordPiece({w: i for i, w in enumerate(WORDS)}, unk_token="[UNK]"))
    made.normalizer = tokenizers.normalizers.BertNormalizer()
    made.pre_tokenizer = tokenizers.pre_tokenizers.BertPreTokenizer()
    made.post_processor = tokenizers.processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    return made


class TextModel(torch.nn.Module):
    """An embedding large enough to be written as external data, averaged over the real tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = torch.nn.Embedding(len(WORDS), 128)
        self.mix = torch.nn.Linear(128, 6)
        self.head = torch.nn.Linear(6, 2)

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        weight = attention_mask.unsqueeze(-1).float()
        pooled = (torch.tanh(self.mix(self.embed(input_ids))) * weight).sum(1) / weight.sum(1).clamp(min=1)
        logits: torch.Tensor = self.head(pooled)
        return logits


def text_loss(model: Any, batch: Any) -> torch.Tensor:
    logits = model(batch["input_ids"], batch["attention_mask"])
    return torch.nn.functional.cross_entropy(logits, batch["labels"], reduction="none")


def text_export(folder: Path, records: int, steps: int) -> Path:
    """A plain export of texts with its tokenizer and budget."""
    torch.manual_seed(0)
    ones = torch.ones(4, LENGTH, dtype=torch.long)
    batch = {"input_ids": ones, "attention_mask": ones.clone(), "labels": ones[:, 0].clone()}
    step = dpb.compile(TextModel().eval(), text_loss, batch, noise_multiplier=2.0, expected_batch_size=6.0)
    dpb.export_onnx(step, folder, optimizer=dpb.onnx_export.AdamW(lr=0.05))
    attach_text(folder, word_pieces().to_str(), ["neg", "pos"])
    attach_budget(folder, dataset_size=records, target_epsilon=8, target_delta=DELTA, steps=steps)
    return folder


def flat_biases(file: Path, export: Path) -> np.ndarray[Any, Any]:
    """biases.safetensors as one vector, in the manifest's order."""
    values, _ = read_biases(file)
    parameters = json.loads((export / "manifest.json").read_text())["parameters"]
    assert values.keys() == {p["name"] for p in parameters}
    return np.concatenate([values[p["name"]].ravel() for p in parameters])


def furthest(found: np.ndarray[Any, Any], wanted: np.ndarray[Any, Any]) -> float:
    """Largest difference, relative to the largest of the wanted values."""
    return float(np.abs(found - wanted).max() / np.abs(wanted).max())
