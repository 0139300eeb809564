"""Tensors from outside are other people's data until the user says that they are public (design §4).

What the capture reads is watched, not guessed from the code: no tensor reaches the graph but as an argument of a torch
function or as a constant that the export lifts. Allowed are what the batch brings, what the model holds (parameters,
buffers, tensors in its modules' attributes: the report lists them), and what is made while it runs, from numbers of
Python (``torch.arange``, ``torch.tensor([1., 2.])``). Everything else is refused: a tensor of a closure, a global, an
object, an imported module or another network, and every numpy array but those that an installed library makes itself.

Not seen: numbers of Python, and tensors made of them alone. They are taken for part of the code.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from types import ModuleType
from typing import Any

import torch
from torch import fx, nn
from torch.overrides import TorchFunctionMode

from .errors import CompileRefused
from .explain import frame_line
from .torch_private import is_fake, tree_flatten
from .unify import LIBRARIES, where

aten = torch.ops.aten
T = torch.Tensor
# They tell a tensor's form, not what it holds.
FORM = {
    *(getattr(T, name).__get__ for name in ("shape", "dtype", "device", "ndim", "layout", "requires_grad", "is_leaf")),
    *(T.size, T.dim, T.numel, T.__len__, T.is_floating_point, T.is_complex, T.stride, T.element_size, T.ndimension),
}
INSTALLED = ("/site-packages/", "/dist-packages/")
DEPTH = 3  # of the nests in a module's attributes
MADE_HERE = {aten.lift_fresh_copy.default, aten.lift_fresh.default}  # what the export reads a literal through


class Outside(TorchFunctionMode):
    """While it is entered, the first tensor or array from outside that a torch function is given is refused."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.refusal: CompileRefused | None = None
        self._own = {_address(x) for x in _held(model)}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func not in FORM:
            for value in tree_flatten((args, kwargs or {}))[0]:
                if self._is_outside(value):
                    self._refuse(_name(value), _user_frame_line())
        return func(*args, **(kwargs or {}))

    def check(self, program: torch.export.ExportedProgram, loss_fn: Any) -> None:
        """Refuses what no torch function told of: constants of the program, and the state of a ``loss_fn`` that is a module."""
        if self.refusal is not None:  # the model may have caught it
            raise self.refusal
        for name, value in _state(loss_fn) if isinstance(loss_fn, nn.Module) else ():
            if self._is_outside(value):
                self._refuse(f"loss_fn.{name}", "")
        for node, spec in zip(program.graph.nodes, program.graph_signature.input_specs, strict=False):
            value = program.constants.get(str(spec.target))
            readers = [n for n in node.users if n.target not in MADE_HERE]
            if readers and self._is_outside(value):
                self._refuse(_name(value), where(_line_of(readers)))

    def _is_outside(self, value: Any) -> bool:
        if isinstance(value, torch.Tensor):
            return not is_fake(value) and value.numel() > 0 and _address(value) not in self._own
        array = hasattr(value, "__array_interface__") and getattr(value, "shape", ()) != ()
        return array and not _made_by_a_library(value)

    def _refuse(self, name: str, place: str) -> None:
        self.refusal = CompileRefused(
            f"loss_fn or the model uses the tensor or array {name} from outside the batch and the model.{place} It would be "
            "baked into the graph as public. If it holds other people's data (class weights from labels, a memory bank), "
            "pass it through the batch; if it is public, make it a buffer of the model or say so with public_tensors=True."
        )
        raise self.refusal


def _address(x: torch.Tensor) -> Any:
    try:
        return x.untyped_storage().data_ptr() or id(x)
    except (RuntimeError, NotImplementedError):  # sparse and opaque tensors have no storage
        return id(x)


def _state(module: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    yield from module.named_parameters()
    yield from module.named_buffers()


def _held(model: nn.Module) -> Iterator[torch.Tensor]:
    """What the model holds: its state, and tensors in its modules' attributes, in nests of containers and plain objects."""
    yield from (x for _, x in _state(model))
    todo: list[tuple[Any, int]] = [(v, 0) for m in model.modules() for v in vars(m).values()]
    while todo:
        value, depth = todo.pop()
        if isinstance(value, torch.Tensor):
            yield value
        elif depth == DEPTH or isinstance(value, (str, bytes, type, ModuleType, nn.Module)) or callable(value):
            continue
        elif isinstance(value, dict):
            todo += ((v, depth + 1) for v in value.values())
        elif isinstance(value, (list, tuple, set, frozenset)):
            todo += ((v, depth + 1) for v in value)
        else:
            todo += ((v, depth + 1) for v in getattr(value, "__dict__", {}).values())


def _user_frames() -> Iterator[Any]:
    """Frames that are neither torch's nor ours, the innermost first."""
    frame: Any = sys._getframe(1)
    while frame is not None:
        if not any(part in frame.f_code.co_filename for part in LIBRARIES):
            yield frame
        frame = frame.f_back


def _made_by_a_library(array: Any) -> bool:
    """A library's own line reads the array (BigBird's random blocks), and no frame of the user's code reaches it."""
    frames = [(f, any(part in f.f_code.co_filename for part in INSTALLED)) for f in _user_frames()]
    return (
        bool(frames) and frames[0][1] and not any(h is array for f, own in frames if not own for _, h in _seen_from(f))
    )


def _seen_from(frame: Any) -> Iterator[tuple[str, Any]]:
    used = {n: frame.f_globals[n] for n in frame.f_code.co_names if n in frame.f_globals}
    return _reach({**used, **frame.f_locals}.items())


def _user_frame_line() -> str:
    return next((frame_line(f) for f in _user_frames()), "")


def _name(value: Any) -> str:
    """What the user's code calls this object, with its shape."""
    shape = list(getattr(value, "shape", ()))
    for frame in _user_frames():
        for name, held in _seen_from(frame):
            if held is value:
                return f"{name!r} {shape}"
    return f"{shape}"


def _reach(named: Iterable[tuple[str, Any]]) -> Iterator[tuple[str, Any]]:
    """Names in a frame, and what they hold one step further."""
    for name, held in list(named):
        yield name, held
        if isinstance(held, dict):
            yield from ((f"{name}[{k!r}]", v) for k, v in list(held.items())[:1000])
        elif isinstance(held, (list, tuple)):
            yield from ((f"{name}[{k}]", v) for k, v in enumerate(held[:1000]))
        elif isinstance(held, nn.Module):
            yield from ((f"{name}.{k}", v) for k, v in _state(held))
        elif hasattr(held, "__dict__"):
            yield from ((f"{name}.{k}", v) for k, v in list(vars(held).items())[:1000])


def _line_of(nodes: list[fx.Node]) -> fx.Node:
    return next((n for n in nodes if n.meta.get("stack_trace")), nodes[0])
