"""Tensors that ``loss_fn`` captures are other people's data until the user says that they are public (design §4)."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from .errors import CompileRefused


def captured_tensors(fn: Callable[..., Any], model: nn.Module) -> Iterator[str]:
    """Names of tensors, and of modules that hold tensors, which ``fn`` reaches by closure, default, global or ``self``."""
    todo: list[tuple[str, Any]] = [("loss_fn", fn)]
    seen: set[int] = {id(model), *(id(m) for m in model.modules())}
    while todo:
        name, value = todo.pop()
        if id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, torch.Tensor):
            yield name
        elif isinstance(value, nn.Module):
            if any(True for _ in value.parameters()) or any(True for _ in value.buffers()):
                yield name
        elif isinstance(value, functools.partial):
            todo += [(f"{name} argument", v) for v in (*value.args, *value.keywords.values(), value.func)]
        elif inspect.ismethod(value):
            todo += [(f"{name}.self", value.__self__), (name, value.__func__)]
        elif inspect.isfunction(value):
            cells = zip(value.__code__.co_freevars, value.__closure__ or (), strict=True)
            for variable, cell in cells:
                try:
                    todo.append((variable, cell.cell_contents))
                except ValueError:  # a cell that is still empty
                    continue
            todo += [
                (f"default of {name}", d) for d in (*(value.__defaults__ or ()), *(value.__kwdefaults__ or {}).values())
            ]
            used = value.__code__.co_names
            todo += [
                (n, value.__globals__[n]) for n in used if n in value.__globals__ and _may_hold(value.__globals__[n])
            ]
        elif isinstance(value, (list, tuple, set)):
            todo += [(name, v) for v in list(value)[:1000]]
        elif isinstance(value, dict):
            todo += [(f"{name}[{k!r}]" if isinstance(k, str) else name, v) for k, v in list(value.items())[:1000]]
        elif not isinstance(value, type) and not inspect.ismodule(value) and hasattr(value, "__dict__"):
            todo += [(f"{name}.{k}", v) for k, v in vars(value).items()]


def _may_hold(value: Any) -> bool:
    own = inspect.isfunction(value) and not (value.__module__ or "").startswith(("torch", "transformers", "numpy"))
    return own or isinstance(value, (torch.Tensor, nn.Module, list, tuple, dict, functools.partial))


def refuse_private_tensors(fn: Callable[..., Any], model: nn.Module) -> None:
    for name in captured_tensors(fn, model):
        raise CompileRefused(
            f"loss_fn uses the tensor (or module with tensors) {name!r} from outside its arguments. It would be baked into the "
            "graph as public. If it holds other people's data (class weights from labels, a memory bank), pass it through "
            "the batch; if it is public, say so with public_tensors=True."
        )
