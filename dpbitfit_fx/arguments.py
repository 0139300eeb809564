"""The arguments that ``compile`` and ``fit`` share: whether they are what they should be, before anything is computed."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from .errors import CompileRefused
from .passes.clipping import Clipping


def check_arguments(model: Any, loss_fn: Any, clipping: Any) -> None:
    """Raises CompileRefused for what is no model, loss or way of clipping, and says what would be."""
    if not isinstance(model, torch.nn.Module):
        what = f"the class {model.__name__}" if isinstance(model, type) else f"a {type(model).__name__}"
        raise CompileRefused(f"model is {what}, expected a torch.nn.Module.")
    if not callable(loss_fn):
        raise CompileRefused(
            f"loss_fn is a {type(loss_fn).__name__}, expected a function (model, batch) -> one loss per record, such as "
            "lambda model, batch: cross_entropy(model(batch['x']), batch['y'], reduction='none')."
        )
    if clipping is not None and not isinstance(clipping, Clipping):
        raise CompileRefused(
            f"clipping is {clipping!r:.80}, expected a Clipping such as AutomaticClipping(max_grad_norm=1.0) or "
            "FlatClipping(1.0)."
        )


def device_of(model: torch.nn.Module) -> torch.device:
    """Where its parameters are; the CPU where it has none."""
    return next((parameter.device for parameter in model.parameters()), torch.device("cpu"))


def names_in(given: Any, argument: str) -> list[str]:
    """Names or patterns, of which one may stand alone. Raises CompileRefused for anything else."""
    names = [given] if isinstance(given, str) else list(given) if isinstance(given, Iterable) else [given]
    if not all(isinstance(name, str) for name in names):
        raise CompileRefused(f"{argument} is {given!r:.80}, expected a name or a list of names.")
    return names
