"""The user's model stays as it was: what a forward writes into its modules is put back, and refused (design §4)."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn.utils.weight_norm import WeightNorm

from .errors import CompileRefused

CONTAINERS = (list, dict, set)
_BatchNorm = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)


def _holds_tensor(value: Any, depth: int = 3) -> bool:
    if isinstance(value, torch.Tensor):
        return True
    if depth and isinstance(value, dict):
        return any(_holds_tensor(v, depth - 1) for v in value.values())
    if depth and isinstance(value, (list, tuple, set, frozenset)):
        return any(_holds_tensor(v, depth - 1) for v in value)
    return False


def _same(a: Any, b: Any) -> bool:
    """Whether two shallow copies of a container hold the same objects."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(a[k] is b[k] for k in a)
    return len(a) == len(b) and (isinstance(a, set) or all(x is y for x, y in zip(a, b, strict=True)))


def _refill(container: Any, content: Any) -> None:
    container.clear()
    (container.extend if isinstance(container, list) else container.update)(content)


def _version(x: torch.Tensor | None) -> int:
    return 0 if x is None or x.is_inference() else x._version


class _Kept:
    """Shallow copies of one module's attributes, buffers and containers, and the contents of its buffers."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.attributes = dict(vars(module))
        hidden = {k for k in self.attributes if k.startswith("_") and isinstance(self.attributes[k], dict)}
        self.contents = {
            k: type(v)(v)
            for k, v in self.attributes.items()
            if type(v) in CONTAINERS and k not in hidden - {"_buffers", "_parameters"}
        }
        self.buffers = {k: b.detach().clone() for k, b in module._buffers.items() if b is not None}
        self.versions = {k: _version(module._buffers[k]) for k in self.buffers}

    def restore(self) -> list[str]:
        """Names of the attributes that had changed; all of them are put back."""
        changed, now = [], vars(self.module)
        for key, content in self.contents.items():
            container = self.attributes[key]
            if not _same(container, content) and (_holds_tensor(container) or _holds_tensor(content)):
                if key in ("_buffers", "_parameters"):
                    names = [k for k in {**container, **content} if container.get(k) is not content.get(k)]
                else:
                    names = [key]
                changed += names
                _refill(container, content)
        for key in list(now):
            before = self.attributes.get(key)
            if now[key] is not before and (_holds_tensor(now[key]) or _holds_tensor(before)):
                changed.append(key)
                if key in self.attributes:
                    now[key] = before
                else:
                    del now[key]
        for key, content in self.buffers.items():
            buffer = self.module._buffers[key]
            if buffer is not None and _version(buffer) != self.versions[key] and not torch.equal(buffer, content):
                changed.append(key)
                with torch.no_grad():
                    buffer.copy_(content)
        # Written anew from parameters at every forward, by torch's own hook: a function of weights, it remembers no data.
        computed = {h.name for h in self.module._forward_pre_hooks.values() if isinstance(h, WeightNorm)}
        changed = [k for k in changed if k not in computed]
        # torch.export swaps an RNN's parameters while it traces, and the RNN keeps its own list of them: put back, no fault.
        return [k for k in changed if not (k == "_flat_weights" and isinstance(self.module, nn.RNNBase))]


@contextlib.contextmanager
def untouched(model: nn.Module) -> Iterator[None]:
    """Runs the user's code; whatever tensors it left in the model's modules are taken out again, and it is refused."""
    kept = [(name, _Kept(module)) for name, module in model.named_modules()]
    found: list[tuple[str, bool]] = []
    try:
        yield
    finally:
        for name, module in kept:
            found += [(f"{name}.{key}".lstrip("."), module.module.training) for key in module.restore()]
        # Also when the body refuses the model for another reason: what it remembers is the cause of that.
        if found:
            refuse_written(*found[0])


def refuse_written(name: str, training: bool) -> None:
    owner = name.rpartition(".")[0] or "the model"
    cure = f"Put the module that owns it ({owner}) in eval mode, or stop it from writing."
    if not training:
        cure = f"The module that owns it ({owner}) is in eval mode already: stop it from writing."
    raise CompileRefused(
        f"The model writes {name!r} in forward: a buffer, cache, memory bank or running statistic that would keep private "
        f"data without noise. {cure}"
    )


def refuse_eval_mode(model: nn.Module) -> None:
    """``dropout=True`` and nothing that draws: modules in eval mode drop nothing, which is not what was asked for."""
    idle = [n or "the model" for n, m in model.named_modules() if not m.training and not isinstance(m, _BatchNorm)]
    if idle:
        raise CompileRefused(
            f"dropout=True, but the model draws no random numbers: {len(idle)} of its modules are in eval mode, first "
            f"{idle[0]}. Call model.train() (and .eval() on its BatchNorm layers), or leave dropout=False."
        )


@contextlib.contextmanager
def no_hidden_randomness(dropout: bool) -> Iterator[None]:
    """Refuses, where dropout is asked for, what Python's or numpy's global generator would steer unseen by the graph."""
    before = (random.getstate(), repr(np.random.get_state()))
    yield
    if dropout and (random.getstate(), repr(np.random.get_state())) != before:
        raise CompileRefused(
            "dropout=True: the model's forward draws from Python's or numpy's random generator. What it drew while it was "
            "captured would stay for all samples and steps. Switch that off (LayerDrop and SpecAugment do it: set "
            "layerdrop=0 and apply_spec_augment=False, or put that module alone in eval mode), or draw with torch."
        )


def refuse_train_mode_batchnorm(model: nn.Module) -> None:
    """BatchNorm in train mode mixes samples and writes un-noised statistics of private data into its buffers."""
    for name, module in model.named_modules():
        if isinstance(module, _BatchNorm) and (module.training or not module.track_running_stats):
            raise CompileRefused(
                f"{name or 'the model'} ({type(module).__name__}) "
                f"{'is in train mode' if module.training else 'keeps no running statistics'}: it mixes the samples of a "
                "batch, and running statistics would absorb private data without noise. Call model.eval() (or that "
                "module's .eval()) before compile, or replace it by GroupNorm."
            )


@contextlib.contextmanager
def dropout_as_asked(model: nn.Module, dropout: bool) -> Iterator[None]:
    """Without dropout, modules that drop are captured in eval mode, and get their own mode back."""
    if dropout:
        yield
        return
    kinds = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout)
    modules = [
        m
        for m in model.modules()
        if m.training and (isinstance(m, kinds) or hasattr(m, "dropout") or hasattr(m, "drop_prob"))
    ]
    for m in modules:
        m.training = False
    try:
        yield
    finally:
        for m in modules:
            m.training = True
