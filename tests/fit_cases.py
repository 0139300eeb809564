"""Small models, data and runs that the tests of `fit` share; run as a script it is a process that kills itself."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dpbitfit_fx.fit import FitResult, fit
from dpbitfit_fx.phases import Phase
from dpbitfit_fx.progress import StepInfo

RECORDS = 120
STEPS = 12


def mlp(inputs: int = 4, width: int = 6) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(inputs, width), nn.Tanh(), nn.Linear(width, 2))


def points() -> torch.utils.data.TensorDataset:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(RECORDS, 4, generator=generator)
    return torch.utils.data.TensorDataset(x, (x.sum(1) > 0).long())


def mlp_loss(model: Any, batch: Any) -> Tensor:
    return nn.functional.cross_entropy(model(batch[0]), batch[1], reduction="none")


def scaled_loss(model: Any, batch: Any) -> Tensor:
    """Of points as mappings, with a weight that scales the loss."""
    losses: Tensor = nn.functional.cross_entropy(model(batch["x"]), batch["y"], reduction="none") * batch["weight"]
    return losses


class TextModel(nn.Module):
    """Embeds, mixes, averages over the real tokens: records of unequal length."""

    def __init__(self, width: int = 5) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, width)
        self.mix = nn.Linear(width, width)
        self.head = nn.Linear(width, 2)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        hidden = torch.tanh(self.mix(self.embed(input_ids)))
        weight = attention_mask.unsqueeze(-1).to(hidden.dtype)
        pooled: Tensor = (hidden * weight).sum(1) / weight.sum(1).clamp(min=1)
        logits: Tensor = self.head(pooled)
        return logits


def text_model(width: int = 5) -> TextModel:
    torch.manual_seed(0)
    return TextModel(width)


def sentences(count: int = 90) -> list[dict[str, Any]]:
    """Lists of numbers of 1 to 12 tokens, with a weight that scales the loss."""
    generator = torch.Generator().manual_seed(2)
    rows = []
    for index in range(count):
        length = int(torch.randint(1, 13, (), generator=generator))
        tokens = torch.randint(0, 20, (length,), generator=generator).tolist()
        rows.append(
            {"input_ids": tokens, "attention_mask": [1] * length, "label": index % 2, "weight": 1.0},
        )
    return rows


def text_loss(model: Any, batch: Any) -> Tensor:
    logits = model(batch["input_ids"], batch["attention_mask"])
    losses: Tensor = nn.functional.cross_entropy(logits, batch["label"], reduction="none") * batch["weight"]
    return losses


class MaskedMean(nn.Module):
    """Reads float sequences through a mask that stops even NaN."""

    def __init__(self, inputs: int = 3, width: int = 4) -> None:
        super().__init__()
        self.mix = nn.Linear(inputs, width)
        self.head = nn.Linear(width, 1)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        keep = mask.unsqueeze(-1) > 0
        hidden = torch.tanh(self.mix(torch.where(keep, x, torch.zeros_like(x))))
        pooled: Tensor = self.head(torch.where(keep, hidden, torch.zeros_like(hidden)).sum(1))
        return pooled


class MaskedAttention(nn.Module):
    """Float sequences that attend to themselves, two heads; the mask stops even NaN."""

    def __init__(self, inputs: int = 3, width: int = 4) -> None:
        super().__init__()
        self.mix = nn.Linear(inputs, width)
        self.qkv = nn.Linear(width, 3 * width)
        self.head = nn.Linear(width, 1)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        keep = mask.unsqueeze(-1) > 0
        hidden = torch.tanh(self.mix(torch.where(keep, x, torch.zeros_like(x))))
        q, k, v = (y.unflatten(-1, (2, -1)).transpose(1, 2) for y in self.qkv(hidden).chunk(3, dim=-1))
        read = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=keep.transpose(1, 2)[:, None])
        hidden = hidden + read.transpose(1, 2).flatten(2)
        pooled: Tensor = self.head(torch.where(keep, hidden, torch.zeros_like(hidden)).sum(1))
        return pooled


def run(folder: Path | str | None, **changes: Any) -> FitResult:
    """The reference run: 12 steps of Adam, checkpoints every 3, deterministic."""
    arguments: dict[str, Any] = {
        "model": mlp(),
        "loss_fn": mlp_loss,
        "dataset": points(),
        "target_epsilon": 8.0,
        "target_delta": 1e-3,
        "max_steps": STEPS,
        "expected_batch_size": 20,
        "physical_batch_size": 8,
        "learning_rate": 0.1,
        "output_dir": folder,
        "checkpoint_every": 3,
        "progress": False,
        "insecure_seed_for_tests": 7,
    }
    arguments |= changes
    model, loss_fn, dataset = (arguments.pop(name) for name in ("model", "loss_fn", "dataset"))
    return fit(model, loss_fn, dataset, **arguments)


def momentum(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.2, momentum=0.9)


# Steps 0 to 4 train the last layer with Adam, steps 5 to 11 the biases of both, on smaller draws.
PHASES = (
    Phase(trainable=["2.*"], max_steps=5, learning_rate=0.05),
    Phase(trainable="bias", max_steps=7, expected_batch_size=12, optimizer=momentum),
)


def run_phases(folder: Path | str | None, **changes: Any) -> FitResult:
    """The reference run in two phases."""
    return run(folder, **({"max_steps": None, "phases": PHASES} | changes))


def biases(model: nn.Module) -> Tensor:
    """Every bias, flat."""
    return torch.cat([p.detach().flatten() for name, p in model.named_parameters() if name.endswith("bias")])


class Crash(Exception):
    """What a callback of ``crash_at`` raises."""


def crash_at(step: int) -> Callable[[StepInfo], None]:
    def callback(info: StepInfo) -> None:
        if info.step == step:
            raise Crash

    return callback


def kill_self() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _kill_on_call(function: Callable[..., Any], number: int, *, after: bool) -> Callable[..., Any]:
    calls = 0

    def wrapped(*arguments: Any, **names: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == number and not after:
            kill_self()
        result = function(*arguments, **names)
        if calls == number:
            kill_self()
        return result

    return wrapped


def _replace_in(module: Any, name: str, number: int, *, after: bool) -> None:
    setattr(module, name, _kill_on_call(getattr(module, name), number, after=after))


def main() -> None:
    """`python fit_cases.py FOLDER MOMENT`: the reference run, killed with SIGKILL at that moment; in two phases where
    the moment is `phases-N`: when step N is in the journal and not yet released."""
    import dpbitfit_fx.checkpoint as checkpoint

    folder, moment = sys.argv[1], sys.argv[2]
    store = checkpoint.CheckpointStore
    if moment == "before-journal":
        store.record = _kill_on_call(store.record, 6, after=False)  # type: ignore[method-assign]
    elif moment == "journaled-not-released":
        store.record = _kill_on_call(store.record, 6, after=True)  # type: ignore[method-assign]
    elif moment == "before-commit":
        _replace_in(checkpoint, "atomic_write_text", 3, after=False)
    elif moment == "after-commit":
        _replace_in(checkpoint, "atomic_write_text", 3, after=True)
    elif moment == "in-optimizer":
        step = torch.optim.Adam.step
        torch.optim.Adam.step = _kill_on_call(step, 8, after=True)  # type: ignore[method-assign]
    elif moment == "results-written":
        store.erase = _kill_on_call(store.erase, 1, after=False)  # type: ignore[method-assign]
    elif moment.startswith("phases-"):
        store.record = _kill_on_call(store.record, int(moment[7:]), after=True)  # type: ignore[method-assign]
        run_phases(folder)
    run(folder)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
