"""Hugging Face model directories: local files only, safetensors only, no code from the directory. Needs extra [hf]."""

from __future__ import annotations

import inspect
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from dpbitfit_fx.data import TokenizedText
from dpbitfit_fx.errors import ArtifactError, DPBitFitError
from dpbitfit_fx.files import read_text

__all__ = [
    "MeanPooledClassifier",
    "accuracy",
    "default_trainable",
    "load_classifier",
    "load_tokenizer",
    "logits_of",
    "made_up_batch",
    "mean_pool",
    "text_loss",
]


def mean_pool(hidden: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
    """Mean over the tokens whose mask is 1: ``[B, T, H], [B, T] -> [B, H]``. A row without any token gives zeros."""
    weights = attention_mask.unsqueeze(-1).to(hidden.dtype)
    return (hidden * weights).sum(1) / weights.sum(1).clamp(min=1.0)


class MeanPooledClassifier(nn.Module):
    """A bare encoder, masked mean pooling and a new linear head whose weight and bias start at zero.

    Zero keeps the start of training free of random directions, and public: it can be rebuilt from nothing. The head reads
    features of one size for every record and every model (mean 0, standard deviation `FEATURE_STD`): one clipping norm holds
    the gradients of head and biases together, and at the size that encoders happen to give one of the two would drown.
    """

    FEATURE_STD = 1.5

    def __init__(self, encoder: nn.Module, hidden_size: int, num_labels: int) -> None:
        super().__init__()
        self.encoder = encoder
        self.head = nn.Linear(hidden_size, num_labels)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def features(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        """``int64[B, T], int64[B, T] -> float[B, H]``: the mean over tokens."""
        return mean_pool(self.encoder(input_ids=input_ids, attention_mask=attention_mask)[0], attention_mask)

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        """Logits ``[B, num_labels]``."""
        features = self.features(input_ids, attention_mask)
        logits: torch.Tensor = self.head(self.FEATURE_STD * functional.layer_norm(features, features.shape[-1:]))
        return logits


def logits_of(model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Logits ``[B, num_labels]`` of either kind of classifier."""
    output = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
    logits: torch.Tensor = output if isinstance(output, torch.Tensor) else output.logits
    return logits


def text_loss(model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Cross-entropy of each record: ``[B]``."""
    return functional.cross_entropy(logits_of(model, batch), batch["labels"], reduction="none")


@torch.no_grad()
def accuracy(model: nn.Module, data: TokenizedText, rows: int = 64, pad_id: int = 0) -> float:
    """Share of **public** records that the model labels correctly, in [0, 1]."""
    device = next(model.parameters()).device
    right = 0
    for _, batch in data.batches(rows, pad_id):
        moved = {name: value.to(device) for name, value in batch.items()}
        right += int((logits_of(model, moved).argmax(1) == moved["labels"]).sum())
    return right / len(data)


def made_up_batch(length: int, vocab_size: int, rows: int = 4) -> dict[str, torch.Tensor]:
    """A batch of made-up token ids ``[rows, length]`` with rows of different true lengths, for compiling."""
    ids = torch.arange(rows * length).reshape(rows, length) % max(2, vocab_size - 1) + 1
    mask = torch.ones_like(ids)
    for row in range(1, rows):
        mask[row, max(1, length - row) :] = 0
    return {"input_ids": ids.clamp(max=vocab_size - 1), "attention_mask": mask, "labels": torch.arange(rows) % 2}


def default_trainable(model: nn.Module) -> list[str]:
    """All biases; with a new head, its weight too."""
    return ["bias", "head.*"] if isinstance(model, MeanPooledClassifier) else ["bias"]


@contextmanager
def _quiet(transformers: Any) -> Iterator[None]:
    """No progress bars and load reports from transformers: what matters of them is checked here, and said once."""
    logging = transformers.utils.logging
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def _transformers() -> Any:
    try:
        import transformers
    except ImportError as error:
        raise DPBitFitError(
            "This command reads Hugging Face model directories and needs the library transformers: "
            "pip install 'dpbitfit_fx[hf]'."
        ) from error
    return transformers


def _directory(path: str | os.PathLike[str], what: str, needed: str) -> Path:
    folder = Path(path)
    if not folder.is_dir():
        raise ArtifactError(
            f"The {what} directory '{folder}' does not exist. Give a local folder: nothing is ever downloaded by name."
        )
    if not (folder / needed).is_file():
        raise ArtifactError(f"'{folder}' is not a Hugging Face {what} directory: it has no {needed}.")
    return folder


def load_tokenizer(path: str | os.PathLike[str]) -> Any:
    """The fast tokenizer of a local directory; no code from the directory runs.

    Raises:
        ArtifactError: the directory has none. DPBitFitError: transformers is not installed.
    """
    folder = _directory(path, "model", "config.json")
    transformers = _transformers()
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(
            folder, use_fast=True, local_files_only=True, trust_remote_code=False
        )
    except Exception as error:
        raise ArtifactError(
            f"No tokenizer can be loaded from '{folder}': it needs tokenizer.json (or a vocabulary that transformers "
            f"can convert). transformers says: {_first_line(error)}"
        ) from error
    if tokenizer.pad_token_id is None and tokenizer.eos_token is not None:
        # Padding is masked; any id will do.
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_classifier(path: str | os.PathLike[str], num_labels: int, labels: Sequence[str] | None = None) -> nn.Module:
    """A classifier with `num_labels` classes from a local directory, float32, in eval mode.

    A checkpoint that already is a sequence classifier with that many labels is used as it is. Anything else is loaded
    as a bare encoder under `MeanPooledClassifier`.

    Raises:
        ArtifactError: no configuration, no safetensors weights (pickled weights are not read), weights that are
            missing, or an architecture that only comes with code of its own.
        DPBitFitError: transformers is not installed.
    """
    folder = _directory(path, "model", "config.json")
    if not any((folder / name).is_file() for name in ("model.safetensors", "model.safetensors.index.json")):
        raise ArtifactError(
            f"'{folder}' has no model.safetensors. Pickled weights (pytorch_model.bin) can run code when opened and "
            "are not read; convert them with save_pretrained(..., safe_serialization=True)."
        )
    transformers = _transformers()
    try:
        with _quiet(transformers):
            declared = json.loads(read_text(folder / "config.json"))
            architectures = declared.get("architectures") or [""]
            config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
            ready = str(architectures[0]).endswith("ForSequenceClassification") and config.num_labels == num_labels
            options: dict[str, Any] = {
                "local_files_only": True,
                "use_safetensors": True,
                "trust_remote_code": False,
                "output_loading_info": True,
            }
            if ready:
                if config.pad_token_id is None:
                    config.pad_token_id = config.eos_token_id
                model, info = transformers.AutoModelForSequenceClassification.from_pretrained(
                    folder, config=config, **options
                )
            else:
                base = transformers.MODEL_MAPPING.get(type(config), None)
                base = base[0] if isinstance(base, tuple) else base
                if base is not None and "add_pooling_layer" in inspect.signature(base.__init__).parameters:
                    options["add_pooling_layer"] = False  # its bias would be trained and never used
                model, info = transformers.AutoModel.from_pretrained(folder, **options)
    except DPBitFitError:
        raise
    except Exception as error:
        raise ArtifactError(
            f"No model can be loaded from '{folder}'. transformers says: {_first_line(error)}"
        ) from error
    missing = sorted(info.get("missing_keys", ()))
    if missing:
        raise ArtifactError(
            f"The weights in '{folder}' lack {len(missing)} parameter(s) of the architecture ('{missing[0]}' first): "
            "transformers would fill them at random. Use a complete checkpoint."
        )
    if not ready:
        hidden = getattr(model.config, "hidden_size", None) or getattr(model.config, "d_model", None)
        if not isinstance(hidden, int):
            raise ArtifactError(
                f"'{folder}': the configuration gives no hidden_size, so no head can be put on the model."
            )
        model = MeanPooledClassifier(model, hidden, num_labels)
    whole: nn.Module = model.float().eval()
    return whole


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:300]}" if lines else type(error).__name__
