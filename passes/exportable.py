"""Functions of torch that look at values before they compute, replaced while the model is exported by ones that do not.

Each replacement is an equality: the same numbers and gradients wherever torch's own returns.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from . import ctc_rule
from .torch_private import tree_flatten, tree_unflatten


def gaussian_nll_loss(
    input: Tensor,
    target: Tensor,
    var: Tensor | float,
    full: bool = False,
    eps: float = 1e-6,
    reduction: str = "mean",
) -> Tensor:
    """``(log v + (x - t)^2 / v) / 2``, ``v = max(var, eps)`` with the gradient of ``var``; a negative variance raises nothing."""
    if not isinstance(var, Tensor):
        var = var * torch.ones_like(input)
    if var.shape != input.shape and var.shape == input.shape[:-1]:
        var = var.unsqueeze(-1)
    clamped = var + (var.clamp(min=eps) - var).detach()
    loss = 0.5 * (torch.log(clamped) + (input - target) ** 2 / clamped)
    if full:
        loss = loss + 0.5 * math.log(2 * math.pi)
    return loss.mean() if reduction == "mean" else loss.sum() if reduction == "sum" else loss


def ctc_loss(
    log_probs: Tensor,
    targets: Tensor,
    input_lengths: Any,
    target_lengths: Any,
    blank: int = 0,
    reduction: str = "mean",
    zero_infinity: bool = False,
) -> Tensor:
    """``torch.nn.functional.ctc_loss`` over the operator of fixed sizes."""
    kind = ("none", "mean", "sum").index(reduction)
    return ctc_rule.exportable(log_probs, targets, input_lengths, target_lengths, blank, kind, zero_infinity)


REPLACED: dict[Any, Callable[..., Any]] = {
    torch.ctc_loss: ctc_rule.exportable,
    F.ctc_loss: ctc_loss,
    F.gaussian_nll_loss: gaussian_nll_loss,
}


def _in_a_function() -> bool:
    """Whether an autograd.Function's own forward runs: torch turns gradients off there, the model's author did not."""
    apply = torch.autograd.Function.apply.__func__.__code__  # type: ignore[attr-defined]
    frame = sys._getframe(1)
    while frame.f_back is not None:
        if frame.f_code is apply:
            return True
        frame = frame.f_back
    return False


class Exportable(TorchFunctionMode):
    """While it is entered, the functions of ``REPLACED`` are ours, and what runs under ``no_grad`` is detached in the graph."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__name__", "") == "_pack_padded_sequence":
            raise RuntimeError("the sizes of a packed sequence depend on the lengths of its samples")
        result = REPLACED.get(func, func)(*args, **(kwargs or {}))
        if torch.is_grad_enabled() or func in (Tensor.detach, torch.detach) or _in_a_function():
            return result
        leaves, spec = tree_flatten(result)
        return tree_unflatten(
            [x.detach() if isinstance(x, Tensor) and x.dtype.is_floating_point else x for x in leaves], spec
        )
