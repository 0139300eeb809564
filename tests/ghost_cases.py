"""Small models all of whose parameters are trained, and the single-sample oracle of their clipped sums."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Case = tuple[nn.Module, Callable[[Any, Any], Tensor], Any]
ROWS = 4


def bert() -> Case:
    import transformers

    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=50, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24,
        max_position_embeddings=12,
    )  # fmt: skip
    lengths = torch.tensor([7, 5, 3, 6])
    batch = {
        "input_ids": torch.randint(1, 50, (ROWS, 7)),
        "attention_mask": (torch.arange(7)[None] < lengths[:, None]).long(),
        "labels": torch.tensor([0, 1, 1, 0]),
    }
    batch["input_ids"][:, 2] = batch["input_ids"][:, 0]  # a token that occurs twice
    batch["input_ids"][0, 5:] = 0  # the padding token, whose row gets no gradient

    def loss(model: Any, b: Any) -> Tensor:
        logits = model(input_ids=b["input_ids"], attention_mask=b["attention_mask"]).logits
        return F.cross_entropy(logits, b["labels"], reduction="none")

    model: nn.Module = transformers.BertForSequenceClassification(config)
    return model.eval(), loss, batch


def gpt2() -> Case:
    """The output layer is the embedding table: a product and a lookup of one parameter, with a cross term."""
    import transformers

    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=50, n_embd=16, n_layer=2, n_head=2, n_positions=12, bos_token_id=0, eos_token_id=0
    )
    batch = {"input_ids": torch.randint(0, 50, (ROWS, 7))}

    def loss(model: Any, b: Any) -> Tensor:
        logits = model(input_ids=b["input_ids"]).logits[:, :-1]
        return F.cross_entropy(logits.transpose(1, 2), b["input_ids"][:, 1:], reduction="none").mean(1)

    model: nn.Module = transformers.GPT2LMHeadModel(config)
    return model.eval(), loss, batch


class GroupNormResNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.GroupNorm(2, 8)
        self.conv1, self.norm1 = nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.GroupNorm(4, 8)
        self.conv2, self.norm2 = nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.GroupNorm(4, 8)
        self.down = nn.Conv2d(8, 12, 1, stride=2)
        self.head = nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.relu(self.norm(self.stem(x)))
        h = torch.relu(h + self.norm2(self.conv2(torch.relu(self.norm1(self.conv1(h))))))
        result: Tensor = self.head(torch.relu(self.down(h)).mean((2, 3)))
        return result


def resnet() -> Case:
    torch.manual_seed(0)
    batch = {"x": torch.randn(ROWS, 3, 6, 6), "labels": torch.tensor([0, 1, 2, 0])}
    return GroupNormResNet(), lambda m, b: F.cross_entropy(m(b["x"]), b["labels"], reduction="none"), batch


class Shared(nn.Module):
    """One weight used three times, once transposed, beside one that is not shared: tokens [B, 4, 6]."""

    def __init__(self) -> None:
        super().__init__()
        self.core, self.head = nn.Linear(6, 6), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.core(torch.tanh(self.core(x))))
        result: Tensor = self.head((h @ self.core.weight).mean(1))
        return result


def shared() -> Case:
    torch.manual_seed(0)
    batch = {"x": torch.randn(ROWS, 4, 6), "labels": torch.tensor([0, 1, 1, 0])}
    return Shared(), lambda m, b: F.cross_entropy(m(b["x"]), b["labels"], reduction="none"), batch


CASES: dict[str, Callable[[], Case]] = {"bert": bert, "gpt2": gpt2, "resnet": resnet, "shared": shared}


def oracle(case: Case, names: tuple[str, ...]) -> list[Tensor]:
    """One flat gradient per sample, by autograd on that sample alone; parameters in the order of ``names``."""
    model, loss, batch = case
    named = dict(model.named_parameters())
    found = []
    for row in range(ROWS):
        one = loss(model, {k: v[row : row + 1] for k, v in batch.items()}).sum()
        gradients = torch.autograd.grad(one, [named[n] for n in names])
        found.append(torch.cat([g.flatten() for g in gradients]))
    return found
