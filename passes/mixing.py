"""What the user's own model says for a batch, and the name of the module at which its samples mix."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import nn

from .errors import CompileRefused
from .explain import first_line, user_line
from .joint_graph import Source
from .torch_private import is_fake, tree_flatten, tree_unflatten

ROUNDING = {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 0.03, torch.float16: 5e-3}
TOLERANCE = {torch.float64: 1e-8, torch.float32: 1e-3, torch.bfloat16: 0.1, torch.float16: 0.05}


def user_loss(source: Source, batch: list[torch.Tensor]) -> torch.Tensor:
    """What the user's own code says for this batch, in the modes that capture used."""
    leaves, spec = tree_flatten(source.example_batch)
    rest = iter(batch)
    full = [next(rest) if isinstance(x, torch.Tensor) else x for x in leaves]
    loss = source.loss_fn(source.model, tree_unflatten(full, spec))
    if not isinstance(loss, torch.Tensor):
        raise CompileRefused(
            f"loss_fn returned a {type(loss).__name__}; it must return a tensor of losses [B], or their mean or sum."
        )
    return loss


def takes(source: Source, batch: list[torch.Tensor]) -> bool:
    """Whether the user's own code takes this batch: it does not raise, and its loss is finite."""
    try:
        with torch.no_grad():
            return bool(user_loss(source, batch).isfinite().all())
    except Exception:  # the user's code may raise anything
        return False


def fails_anyway(source: Source, batch: list[torch.Tensor]) -> CompileRefused | None:
    """Why the user's own code cannot take this batch, with no capture at work; None if it runs."""
    try:
        with torch.no_grad():
            user_loss(source, batch)
    except Exception as error:
        return CompileRefused(
            f"{type(source.model).__name__} could not be captured on one sample: its own code does not take such a batch, with "
            f"no capture at work either: {first_line(error)}.{user_line(error)} Look at the keys, shapes and dtypes of "
            "example_batch, and at the entries that dynamic_shapes names, if any: loss_fn(model, batch) must run."
        )
    return None


def close(a: torch.Tensor, b: torch.Tensor, coarse: torch.dtype = torch.float64) -> bool:
    dtype = coarse if a.dtype is torch.float64 else a.dtype
    tolerance = TOLERANCE.get(dtype, 1e-3) * (0.1 if dtype is torch.float32 else 1.0)
    return torch.allclose(a.double(), b.double(), rtol=tolerance, atol=tolerance, equal_nan=True)


def mixing_refusal(source: Source, batch: list[torch.Tensor], what: str) -> str:
    module = first_mixing_module(source, batch)
    place = f" The first module whose output for a sample depends on the others is {module}." if module else ""
    return (
        f"{type(source.model).__name__} does not mean the same sample by sample: {what}.{place} A private step treats "
        "every sample alone (batch statistics, in-batch negatives and averages over the tokens of a whole batch have no "
        "per-sample meaning). Return one loss per sample, or replace the module."
    )


def first_mixing_module(source: Source, batch: list[torch.Tensor]) -> str:
    """The first module, in order of return, whose rows in a batch differ from its output for each sample alone."""

    def record(rows: list[torch.Tensor]) -> list[tuple[str, torch.Tensor]]:
        seen: list[tuple[str, torch.Tensor]] = []

        def hook(name: str) -> Any:
            def keep(_m: nn.Module, _i: Any, out: Any) -> None:
                first = next((x for x in tree_flatten(out)[0] if isinstance(x, torch.Tensor)), None)
                # Fake where the model's own code kept what it saw while it was exported: it has no numbers to compare.
                if first is not None and first.dtype.is_floating_point and not is_fake(first):
                    seen.append((name, first.detach()))

            return keep

        handles = [m.register_forward_hook(hook(n or type(m).__name__)) for n, m in source.model.named_modules()]
        try:
            with contextlib.suppress(Exception), torch.no_grad():  # what came before the failure is seen already
                user_loss(source, rows)
        finally:
            for h in handles:
                h.remove()
        return seen

    together = record(batch)
    alone = [record([x[i : i + 1] for x in batch]) for i in range(batch[0].shape[0])]
    for at, (name, out) in enumerate(together):
        singles = [a[at][1] for a in alone if at < len(a) and a[at][0] == name]
        if len(singles) != len(alone) or any(s.dim() != out.dim() for s in singles):
            continue
        axes = [d for d in range(out.dim()) if sum(s.shape[d] for s in singles) == out.shape[d]]
        if axes and not any(
            all(a == b for k, (a, b) in enumerate(zip(torch.cat(singles, d).shape, out.shape, strict=True)) if k != d)
            and close(torch.cat(singles, d), out)
            for d in axes
        ):
            return f"{name} ({type(dict(source.model.named_modules()).get(name, source.model)).__name__})"
    return ""
