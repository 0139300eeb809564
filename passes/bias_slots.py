"""Biases that the user's model has no value for, put onto its modules and taken off again (BiTFiT-Add).

A module with an empty slot of that name (``bias=None``: nn.Linear, nn.Conv*, nn.ConvTranspose*, nn.MultiheadAttention and
what derives from them) gets a real parameter in it, and its own forward adds it. A module without one gets the parameter
and a forward hook that adds it to the module's output. Either way it is in ``named_parameters`` and ``state_dict``, and
the module remembers in ``_added_biases`` (leaf name -> view) which of its parameters are not its own.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import nn

from .joint_graph import AddedBias

MARK = "_added_biases"


class _AddToOutput:
    """Forward hook: ``output + bias``, the bias viewed so that it broadcasts over the trailing axes."""

    def __init__(self, leaf: str, view: tuple[int, ...]) -> None:
        self.leaf, self.view = leaf, view

    def __call__(self, module: nn.Module, args: object, output: torch.Tensor) -> torch.Tensor:
        bias: torch.Tensor = getattr(module, self.leaf)
        return output + bias.reshape(self.view).to(output.dtype)


def fault(model: nn.Module, bias: AddedBias) -> str | None:
    """Why this bias cannot be put onto this model, or None."""
    try:
        module = model.get_submodule(bias.module)
    except AttributeError:
        return f"the model has no module {bias.module!r}"
    if module._parameters.get(bias.leaf) is not None:
        return f"the model has a parameter {bias.name!r} of its own"
    if bias.leaf not in module._parameters and hasattr(module, bias.leaf):
        return f"{bias.module or 'the model'} has an attribute {bias.leaf!r} that is not a parameter"
    width = next(
        (w for w in (getattr(module, k, None) for k in ("out_features", "out_channels")) if w is not None), None
    )
    if bias.leaf == "bias" and isinstance(width, int) and bias.shape != (width,):
        return f"{bias.name!r} has shape {list(bias.shape)} and its layer {width} outputs"
    return None


def attach(model: nn.Module, added: Iterable[AddedBias], parameters: Mapping[str, torch.Tensor]) -> list[AddedBias]:
    """Puts each parameter onto its module; all or none. Returns those that were not there before."""
    done: list[AddedBias] = []
    try:
        for bias in added:
            module, parameter = model.get_submodule(bias.module), parameters[bias.name]
            if module._parameters.get(bias.leaf) is parameter:
                continue
            why = fault(model, bias)
            if why is not None:
                raise ValueError(why)
            assert isinstance(parameter, nn.Parameter)
            slot = bias.leaf in module._parameters
            module.register_parameter(bias.leaf, parameter)
            vars(module).setdefault(MARK, {})[bias.leaf] = list(bias.view)
            done.append(bias)
            if not slot:
                module.register_forward_hook(_AddToOutput(bias.leaf, bias.view))
    except BaseException:
        detach(model, done)
        raise
    return done


def detach(model: nn.Module, added: Iterable[AddedBias]) -> None:
    """Takes them off: the modules are as they were before :func:`attach`."""
    for bias in added:
        module = model.get_submodule(bias.module)
        marks = vars(module)[MARK]
        del marks[bias.leaf]
        if not marks:
            del vars(module)[MARK]
        hooks = [k for k, h in module._forward_hooks.items() if isinstance(h, _AddToOutput) and h.leaf == bias.leaf]
        for key in hooks:
            del module._forward_hooks[key]
        if hooks:
            del module._parameters[bias.leaf]
        else:
            module._parameters[bias.leaf] = None


def attached_biases(model: nn.Module) -> list[AddedBias]:
    """The biases that :func:`attach` has put onto this model (or onto the model it was copied from)."""
    found = []
    for path, module in model.named_modules():
        for leaf, view in vars(module).get(MARK, {}).items():
            p = module._parameters[leaf]
            if p is not None:
                name = f"{path}.{leaf}" if path else leaf
                found.append(AddedBias(name, path, leaf, tuple(p.shape), p.dtype, tuple(view)))
    return found


@contextlib.contextmanager
def applied(model: nn.Module, added: Iterable[AddedBias], parameters: Mapping[str, torch.Tensor]) -> Iterator[None]:
    """The model has these biases inside, and is as it was afterwards."""
    done = attach(model, added, parameters)
    try:
        yield
    finally:
        detach(model, done)


@contextlib.contextmanager
def taken_off(model: nn.Module) -> Iterator[dict[str, torch.Tensor]]:
    """The model is the original inside; yields what it had been given, by name, and gives it back afterwards."""
    added = attached_biases(model)
    kept = {b.name: p for b in added if (p := model.get_submodule(b.module)._parameters[b.leaf]) is not None}
    detach(model, added)
    try:
        yield dict(kept)
    finally:
        attach(model, added, kept)


@contextlib.contextmanager
def moved(parameters: Iterable[torch.Tensor]) -> Iterator[None]:
    """Each parameter holds other values inside (made up, seeded, of size 0.1), and its own again afterwards."""
    generator = torch.Generator().manual_seed(1)  # made-up values for a check; nothing private rides on this seed
    kept = [(p, p.detach().clone()) for p in parameters]
    try:
        with torch.no_grad():
            for p, _ in kept:
                p.add_(torch.randn(p.shape, generator=generator).to(p) * 0.1)
        yield
    finally:
        with torch.no_grad():
            for p, value in kept:
                p.copy_(value)
