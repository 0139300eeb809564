"""``eval_model.onnx``: what a model says with its trained values, as ONNX.

    losses          batch..., sample_mask[B], parameters... -> their mean over unmasked rows       (private where the records are)
    eval_output     batch..., parameters...                 -> ``eval_output(model, batch)``

The losses are those of the captured graph, which the check of meaning has compared with the model: whatever trains has them.
``eval_output`` is the user's own function and is traced here.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch

from dpbitfit_fx.onnx_export import (
    EXPORT_ROWS,
    Layout,
    export_rows,
    flat_parameters,
    freeze,
    graph_arguments,
    safe_name,
    to_onnx,
    unaliased,
)
from dpbitfit_fx.onnx_lowering import Lowered
from dpbitfit_fx.onnx_weights import INLINE_LIMIT
from dpbitfit_fx.passes.joint_graph import JointGraph, Role, copy_graph, finish
from dpbitfit_fx.passes.torch_private import tree_flatten, tree_unflatten

if TYPE_CHECKING:
    import onnx_ir as ir

    from dpbitfit_fx.onnx_quantize import FrozenWeights

    Exported = tuple[ir.Model, dict[str, torch.Tensor], list[str]]  # the frozen weights still inputs; outputs' names

__all__ = ["EvalModule", "as_trained", "eval_model"]


@contextlib.contextmanager
def as_trained() -> Iterator[None]:
    """Inside, nothing takes a gradient, and torch's encoder layers compute what they compute in training: their fast path gives
    zeros for padded tokens, so that a model that reads those says something else."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with torch.no_grad():
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


class EvalModule(torch.nn.Module):
    """``outputs(model, batch)`` with the trainables as inputs: ``(*leaves, *parameters) -> outputs``."""

    def __init__(self, step: Any, layout: Layout, outputs: Callable[[Any, Any], Any]) -> None:
        super().__init__()
        self.model = step.model
        self.names = [p.name for p in layout.parameters]
        self.spec = tree_flatten(step.example_batch)[1]
        self.outputs = outputs

    def forward(self, *args: torch.Tensor) -> Any:
        count = len(args) - len(self.names)
        given = {f"held.{n}": v for n, v in zip(self.names, args[count:], strict=True)}
        batch = tree_unflatten(list(args[:count]), self.spec)
        return torch.func.functional_call(_Holder(self.model, self.outputs), given, (batch,), tie_weights=True)


class _Holder(torch.nn.Module):
    def __init__(self, model: torch.nn.Module, fn: Callable[[Any, Any], Any]) -> None:
        super().__init__()
        self.held, self.fn = model, fn

    def forward(self, batch: Any) -> Any:
        return self.fn(self.held, batch)


class _WeightsAsInputs(torch.nn.Module):
    """``module(*args[:-n])`` with its n large frozen weights given as the last inputs: what the exporter cannot fold."""

    def __init__(self, module: EvalModule) -> None:
        super().__init__()
        self.module = module
        trained = {f"model.{n}" for n in module.names}
        self.weights = {
            n: p.detach()
            for n, p in module.named_parameters()
            if n not in trained and p.numel() * p.element_size() > INLINE_LIMIT
        }

    def forward(self, *args: torch.Tensor) -> Any:
        count = len(args) - len(self.weights)
        given = dict(zip(self.weights, args[count:], strict=True))
        return torch.func.functional_call(self.module, given, args[:count], tie_weights=True)


class _MeanLoss(torch.nn.Module):
    """The captured graph's losses ``(*leaves, mask [B], *parameters, *frozen) -> []``: their mean where the mask is positive."""

    def __init__(self, joint: JointGraph) -> None:
        super().__init__()
        graph, _ = copy_graph(joint.module)
        output = graph.output_node()
        output.args = ((output.args[0][0],),)  # type: ignore[index]
        self.losses = Lowered(finish(graph))
        order = {Role.BATCH: 0, Role.TRAINABLE: 1, Role.FROZEN: 2}
        roles = [i.role for i in joint.inputs]
        self.order = sorted(range(len(roles)), key=lambda i: order[roles[i]])
        self.rows = roles.count(Role.BATCH)

    def forward(self, *args: torch.Tensor) -> torch.Tensor:
        mask, given = args[self.rows], [*args[: self.rows], *args[self.rows + 1 :]]
        placed = dict(zip(self.order, given, strict=True))
        losses = self.losses(*(placed[i] for i in range(len(given))))
        return torch.where(mask > 0, losses, 0.0).sum() / (mask > 0).sum().clamp(min=1)


def eval_model(
    step: Any, layout: Layout, eval_output: Callable[[Any, Any], Any] | None, weights: FrozenWeights | None = None
) -> tuple[ir.Model, list[str]]:
    """The evaluation graph and its outputs' names; parameters follow the user inputs, in the training graph's order.

    weights: quantizes the frozen ones.

    Raises:
        ExportError: an operator has no ONNX form, or ``eval_output`` cannot be traced.
    """
    with as_trained():
        if eval_output is None:
            model, frozen, outputs = _losses(step, layout)
        else:
            model, frozen, outputs = _outputs(step, layout, eval_output)
    freeze(model, frozen, weights)
    return model, outputs


def _losses(step: Any, layout: Layout) -> Exported:
    leaves, length, padded = export_rows(step, layout)
    joint: JointGraph = step.captured
    values, called, frozen = graph_arguments(joint, step, layout, leaves)
    module = _MeanLoss(joint)
    args, names = [values[i] for i in module.order], [called[i] for i in module.order]
    at = module.rows
    args.insert(at, torch.ones(EXPORT_ROWS))
    names.insert(at, "sample_mask")
    batched = [i <= at for i in range(len(names))]
    module(*args)  # on real tensors once: it builds the constants
    what = "The mean loss (pass eval_output=... for another evaluation model)"
    model = to_onnx(module, unaliased(args), names, batched, ["mean_loss"], what, length, padded)
    return model, frozen, ["mean_loss"]


def _outputs(step: Any, layout: Layout, eval_output: Callable[[Any, Any], Any]) -> Exported:
    module = EvalModule(step, layout, eval_output)
    leaves, length, padded = export_rows(step, layout)
    flat = torch.from_numpy(flat_parameters(step, layout.parameters))
    values = [flat[p.offset : p.offset + p.numel].reshape(p.shape).clone() for p in layout.parameters]
    args, names = [*leaves, *values], [b.name for b in layout.batch] + [p.onnx_name for p in layout.parameters]
    found = tree_flatten(module(*args))[0]
    outputs = ["output"] if len(found) == 1 else [f"output_{i}" for i in range(len(found))]
    whole = _WeightsAsInputs(module)
    taken = set(names)
    frozen = {safe_name(n.removeprefix("model."), taken, "frozen"): w for n, w in whole.weights.items()}
    batched = [i < len(leaves) for i in range(len(names) + len(frozen))]
    args, names = [*args, *frozen.values()], [*names, *frozen]
    model = to_onnx(whole, args, names, batched, outputs, "eval_output", length, padded, users=True)
    return model, frozen, outputs
