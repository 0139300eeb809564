"""The user's optimizer and learning-rate schedule, checked: public functions of the step and of private gradients only."""

from __future__ import annotations

import contextlib
import hashlib
import inspect
import json
import math
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from dpbitfit_fx.checkpoint import encode
from dpbitfit_fx.errors import PrivacyError

__all__ = ["build_optimizer", "build_schedule", "optimizer_settings"]


def build_optimizer(optimizer: Any, parameters: list[nn.Parameter], learning_rate: float) -> torch.optim.Optimizer:
    if isinstance(optimizer, torch.optim.Optimizer):
        raise PrivacyError(
            "optimizer is an Optimizer object, which was built before fit knew what is trained. Pass its class, or a "
            "function of the parameters: optimizer=lambda params: torch.optim.SGD(params, lr=0.1, momentum=0.9)."
        )
    if optimizer is not None and not callable(optimizer):
        raise PrivacyError(
            f"optimizer is {optimizer!r:.80}, expected a class such as torch.optim.SGD, or a function of the parameters."
        )
    if not (isinstance(learning_rate, (int, float)) and math.isfinite(learning_rate) and learning_rate > 0):
        raise PrivacyError(f"learning_rate must be a finite number above 0; got {learning_rate!r}.")
    if optimizer is None:
        built: Any = torch.optim.Adam(parameters, lr=learning_rate)
    elif isinstance(optimizer, type):
        built = optimizer(parameters, lr=learning_rate)
    else:
        built = optimizer(parameters)
    if not isinstance(built, torch.optim.Optimizer):
        raise PrivacyError(f"optimizer returned a {type(built).__name__}, not a torch.optim.Optimizer.")
    held = [id(parameter) for group in built.param_groups for parameter in group["params"]]
    if sorted(held) != sorted(map(id, parameters)):
        raise PrivacyError(
            "The optimizer must hold exactly the parameters it was given: those whose gradient is private."
        )
    closure = inspect.signature(built.step).parameters.get("closure")
    if closure is not None and closure.default is inspect.Parameter.empty:
        raise PrivacyError(
            f"{type(built).__name__} evaluates the loss again inside its step, which would release private losses. "
            f"Use an optimizer that needs gradients only."
        )
    return built


_PLATEAU = (
    "ReduceLROnPlateau changes the learning rate by a loss, and the training loss is private data. Use a schedule "
    "that is a function of the step."
)


def build_schedule(lr_schedule: Any, optimizer: torch.optim.Optimizer, steps: int) -> tuple[Callable[[int], None], Any]:
    """A function that sets the learning rates for a step, called with 0, 1, 2, …; and what identifies the schedule."""
    base = [float(group["lr"]) for group in optimizer.param_groups]
    if lr_schedule is None:
        return (lambda step: None), None
    if lr_schedule is torch.optim.lr_scheduler.ReduceLROnPlateau or isinstance(
        lr_schedule, torch.optim.lr_scheduler.ReduceLROnPlateau
    ):
        raise PrivacyError(_PLATEAU)
    if isinstance(lr_schedule, torch.optim.lr_scheduler.LRScheduler) or not callable(lr_schedule):
        raise PrivacyError(
            "lr_schedule must be a function step -> multiplier, or a function optimizer -> LRScheduler (fit makes the "
            "optimizer itself): lr_schedule=lambda opt: CosineAnnealingLR(opt, T_max=100)."
        )
    value: Any = None
    if not isinstance(lr_schedule, type):
        with contextlib.suppress(TypeError, AttributeError):
            value = lr_schedule(0)
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        multipliers = [float(lr_schedule(step)) for step in range(steps)]
        if not all(math.isfinite(multiplier) for multiplier in multipliers):
            raise PrivacyError("lr_schedule gives a multiplier that is not a finite number.")

        def set_rates(step: int) -> None:
            for group, rate in zip(optimizer.param_groups, base, strict=True):
                group["lr"] = rate * multipliers[step]

        return set_rates, hashlib.sha256(json.dumps(multipliers).encode()).hexdigest()
    with warnings.catch_warnings():
        # Schedulers warn when stepped before the optimizer; a resumed run does that on purpose.
        warnings.simplefilter("ignore")
        scheduler = lr_schedule(optimizer)
    if isinstance(scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau):
        raise PrivacyError(_PLATEAU)
    if not isinstance(scheduler, torch.optim.lr_scheduler.LRScheduler):
        raise PrivacyError(f"lr_schedule returned a {type(scheduler).__name__}: neither a number nor an LRScheduler.")
    position = 0

    def advance(step: int) -> None:
        nonlocal position
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            while position < step:
                scheduler.step()
                position += 1

    return advance, type(scheduler).__qualname__


def optimizer_settings(optimizer: torch.optim.Optimizer) -> Any:
    """Hyper-parameters of every group, as JSON."""
    tensors: dict[str, torch.Tensor] = {}
    groups = [{name: value for name, value in group.items() if name != "params"} for group in optimizer.param_groups]
    encoded = encode(groups, tensors, "group")
    return json.loads(json.dumps([encoded, {name: tensor.tolist() for name, tensor in tensors.items()}]))
