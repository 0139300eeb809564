"""Small models whose steps are exported, and the PyTorch loop that the exports must follow."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

import dpbitfit_fx as dpb

ROWS = 24


def has_ort_training() -> bool:
    from dpbitfit_fx.errors import ArtifactError
    from dpbitfit_fx.ort_artifacts import training_api

    try:
        training_api()
    except ArtifactError:
        return False
    return True


def bert() -> tuple[torch.nn.Module, Callable[[Any, Any], torch.Tensor], dict[str, torch.Tensor]]:
    """A MiniLM-shaped classifier, with padding."""
    import transformers

    torch.manual_seed(0)
    config = transformers.BertConfig(
        hidden_size=48, num_hidden_layers=2, num_attention_heads=4, intermediate_size=96, vocab_size=60
    )
    model = transformers.BertForSequenceClassification(config).train(False)
    data = {
        "input_ids": torch.randint(2, 60, (ROWS, 11)),
        "attention_mask": torch.ones(ROWS, 11, dtype=torch.long),
        "labels": torch.randint(0, 2, (ROWS,)),
    }
    data["attention_mask"][::3, -4:] = 0

    def loss(m: Any, b: Any) -> torch.Tensor:
        logits = m(b["input_ids"], attention_mask=b["attention_mask"]).logits
        return torch.nn.functional.cross_entropy(logits, b["labels"], reduction="none")

    return model, loss, data


def gpt2() -> tuple[torch.nn.Module, Callable[[Any, Any], torch.Tensor], dict[str, torch.Tensor]]:
    """A language model, one loss per sequence."""
    import transformers

    torch.manual_seed(1)
    config = transformers.GPT2Config(
        n_embd=32, n_layer=2, n_head=4, vocab_size=50, n_positions=16, bos_token_id=0, eos_token_id=0
    )
    model = transformers.GPT2LMHeadModel(config).train(False)

    def loss(m: Any, b: Any) -> torch.Tensor:
        logits = m(b["input_ids"], use_cache=False).logits[:, :-1]
        each = torch.nn.functional.cross_entropy(logits.transpose(1, 2), b["input_ids"][:, 1:], reduction="none")
        return each.mean(1)

    return model, loss, {"input_ids": torch.randint(1, 50, (ROWS, 9))}


def resnet() -> tuple[torch.nn.Module, Callable[[Any, Any], torch.Tensor], dict[str, torch.Tensor]]:
    """Convolutions, pooling, BatchNorm in eval mode with statistics that matter."""
    import transformers

    torch.manual_seed(2)
    config = transformers.ResNetConfig(embedding_size=8, hidden_sizes=[8, 12], depths=[1, 1], layer_type="basic")
    config.num_labels = 3
    model = transformers.ResNetForImageClassification(config).train(False)
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.normal_(module.running_mean, 0, 0.1)  # type: ignore[arg-type]
            torch.nn.init.uniform_(module.running_var, 0.5, 1.5)  # type: ignore[arg-type]

    def loss(m: Any, b: Any) -> torch.Tensor:
        logits = m(b["pixel_values"]).logits
        return torch.nn.functional.cross_entropy(logits, b["labels"], reduction="none")

    return model, loss, {"pixel_values": torch.randn(ROWS, 3, 20, 20), "labels": torch.randint(0, 3, (ROWS,))}


def mlp() -> tuple[torch.nn.Module, Callable[[Any, Any], torch.Tensor], dict[str, torch.Tensor]]:
    """Small enough to export many times."""
    torch.manual_seed(3)
    model = torch.nn.Sequential(torch.nn.Linear(5, 7), torch.nn.SiLU(), torch.nn.LayerNorm(7), torch.nn.Linear(7, 3))

    def loss(m: Any, b: Any) -> torch.Tensor:
        return torch.nn.functional.cross_entropy(m(b["x"]), b["y"], reduction="none")

    return model.eval(), loss, {"x": torch.randn(ROWS, 5), "y": torch.randint(0, 3, (ROWS,))}


CASES = {"bert": bert, "gpt2": gpt2, "resnet": resnet, "mlp": mlp}


def compiled(name: str, **extra: Any) -> tuple[Any, dict[str, torch.Tensor]]:
    model, loss, data = CASES[name]()
    given: dict[str, Any] = {"noise_multiplier": 0.8, "expected_batch_size": 6.0, **extra}
    example = {k: v[:4].clone() for k, v in data.items()}
    return dpb.compile(model, loss, example, **given), data


def flat(step: Any) -> np.ndarray[Any, Any]:
    named = dict(step.model.named_parameters())
    return np.concatenate([named[n].detach().numpy().ravel() for n in step.trainable_names])


def install(step: Any, gradient: torch.Tensor) -> None:
    named = dict(step.model.named_parameters())
    for name, value in step.unflatten(gradient).items():
        named[name].grad = value.clone()
