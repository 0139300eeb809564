"""Ways of mixing samples that remember, hook or differentiate by hand: each a module, made anew for every network."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch
from mixes import Mix, through_one_bias
from torch import Tensor, nn

Sizes = tuple[int, ...]


class Function(nn.Module):
    """``h`` by a function that may look at the module, its parameters and its buffers."""

    def __init__(self, function: Callable[[Any, Tensor], Tensor], **state: Any) -> None:
        super().__init__()
        self.function = function
        for name, value in state.items():
            if isinstance(value, Tensor) and not isinstance(value, nn.Parameter):
                self.register_buffer(name, value)
            else:
                setattr(self, name, value)

    def forward(self, h: Tensor) -> Any:
        return self.function(self, h)


class MeanInBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, h: Tensor) -> Tensor:
        return h.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return grad - grad.mean(0)


class MeanInForward(MeanInBackward):
    @staticmethod
    def forward(ctx: Any, h: Tensor) -> Tensor:
        return h - h.mean(0)


class SavesTheMean(torch.autograd.Function):
    """The identity, whose backward multiplies by what the forward kept of the whole batch."""

    @staticmethod
    def forward(ctx: Any, h: Tensor) -> Tensor:
        ctx.save_for_backward(h.mean(0))
        return h.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return grad * (1 + ctx.saved_tensors[0])


class Normalized(MeanInBackward):
    """The identity, whose backward divides by the norm of the whole batch's gradient."""

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return grad / (1 + grad.norm())


def custom(function: Any) -> Callable[[Sizes], nn.Module]:
    return lambda sizes: Function(lambda m, h: function.apply(h))


def centred(x: Tensor) -> Tensor:
    return x - x.mean(0)


def running_mean(m: Any, h: Tensor) -> Tensor:
    with torch.no_grad():
        m.mean.lerp_(h.mean(0), 0.1)
    out: Tensor = h - m.mean
    return out


def only_written(m: Any, h: Tensor) -> Tensor:
    m.mean.copy_(h.detach().mean(0))
    return h * 1.0


def counter_in_a_buffer(m: Any, h: Tensor) -> Tensor:
    m.count.add_(h.shape[0])
    out: Tensor = h / m.count
    return out


def every_third(m: Any, h: Tensor) -> Tensor:
    m.calls += 1
    return h - h.mean(0) if m.calls % 3 == 0 else h * 1.0


def attribute(m: Any, h: Tensor) -> Tensor:
    before = m.last
    m.last = h.detach().mean(0)
    return h if before is None else h + before


def a_number(m: Any, h: Tensor) -> Tensor:
    """A number of Python, where the export lets it have one."""
    before = m.scale
    with contextlib.suppress(Exception):
        m.scale = float(h.detach().abs().max())
    out: Tensor = h / before
    return out


def through_numpy(m: Any, h: Tensor) -> Tensor:
    return h + torch.from_numpy(h.detach().numpy().mean(0))


def hidden_from_the_export(m: Any, h: Tensor) -> Tensor:
    return h * 1.0 if torch.compiler.is_compiling() else h - h.mean(0)


def hooked(m: Any, h: Tensor) -> Tensor:
    h = h * 1.0
    if h.requires_grad:
        h.register_hook(centred)  # type: ignore[no-untyped-call]
    return h


def saved_flipped(m: Any, h: Tensor) -> Tensor:
    """What the backward of tanh reads is another row's."""
    with torch.autograd.graph.saved_tensors_hooks(lambda x: x, lambda x: x.flip(0)):
        return torch.tanh(h)


def over_time(m: Any, h: Tensor) -> Tensor:
    out: Tensor = m.cell(h.flatten(1)[:, None])[0][:, 0].reshape(h.shape)
    return out


def folded_attention(m: Any, h: Tensor) -> Tensor:
    """Attention over the whole batch's tokens, as ``batch_first`` forgotten makes it."""
    tokens = h.flatten(1)[:, None]
    out: Tensor = m.of(tokens, tokens, tokens, need_weights=False)[0].reshape(h.shape)
    return out


def closure_list() -> Mix:
    kept: list[Tensor] = []

    def run(h: Tensor) -> Tensor:
        kept.append(h.detach().mean(0))
        return h + kept[max(0, len(kept) - 2)]

    return run


def closure_tensor(sizes: Sizes) -> Mix:
    kept = torch.zeros(sizes, dtype=torch.float64)

    def run(h: Tensor) -> Tensor:
        out = h + kept
        kept.copy_(h.detach().mean(0))
        return out

    return run


def cache_by_size() -> Mix:
    kept: dict[int, Tensor] = {}
    return lambda h: h + kept.setdefault(h.shape[0], h.detach().mean(0))


def closed(mix: Mix) -> nn.Module:
    return Function(lambda m, h: mix(h))


def numel(sizes: Sizes) -> int:
    return int(torch.Size(sizes).numel())


def forward_hook(sizes: Sizes) -> nn.Module:
    module = nn.Identity()
    module.register_forward_hook(lambda m, given, out: centred(out))
    return module


def pre_hook(sizes: Sizes) -> nn.Module:
    module = nn.Identity()
    module.register_forward_pre_hook(lambda m, given: (centred(given[0]),))
    return module


def backward_hook(sizes: Sizes) -> nn.Module:
    module = Function(lambda m, h: h * 1.0)
    module.register_full_backward_hook(lambda m, given, out: tuple(map(centred, given)))
    return module


def parameter_hook(sizes: Sizes) -> nn.Module:
    """One bias, whose gradient is divided by its own norm: no sum over samples any more."""
    bias = nn.Parameter(torch.zeros(sizes[-1], dtype=torch.float64))
    bias.register_hook(lambda grad: grad / (0.1 + grad.norm()))  # type: ignore[no-untyped-call]
    return Function(lambda m, h: h + m.bias, bias=bias)


def one_bias(sizes: Sizes) -> nn.Module:
    bias = nn.Parameter(torch.zeros(sizes[-1], dtype=torch.float64))
    return Function(lambda m, h: through_one_bias(h, m.bias), bias=bias)


def zeros(sizes: Sizes) -> Tensor:
    return torch.zeros(sizes, dtype=torch.float64)


class AlwaysTraining(nn.Module):
    """Batch statistics written into buffers, whatever the mode."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(sizes[0], dtype=torch.float64))
        self.register_buffer("var", torch.ones(sizes[0], dtype=torch.float64))

    def forward(self, h: Tensor) -> Tensor:
        assert isinstance(self.mean, Tensor) and isinstance(self.var, Tensor)
        return nn.functional.batch_norm(h, self.mean, self.var, training=True)


STATEFUL: dict[str, Callable[[Sizes], nn.Module]] = {
    "a buffer with the running mean": lambda sizes: Function(running_mean, mean=zeros(sizes)),
    "a buffer that is only written": lambda sizes: Function(only_written, mean=zeros(sizes)),
    "a counter in a buffer": lambda sizes: Function(counter_in_a_buffer, count=torch.ones(())),
    "a counter of Python": lambda sizes: Function(every_third, calls=0),
    "an attribute that remembers": lambda sizes: Function(attribute, last=None),
    "a number that remembers": lambda sizes: Function(a_number, scale=1.0),
    "a closure's list": lambda sizes: closed(closure_list()),
    "a closure's tensor": lambda sizes: closed(closure_tensor(sizes)),
    "a cache by batch size": lambda sizes: closed(cache_by_size()),
    "numpy": lambda sizes: Function(through_numpy),
    "hidden from the export": lambda sizes: Function(hidden_from_the_export),
    "a custom forward": custom(MeanInForward),
    "a custom backward": custom(MeanInBackward),
    "a custom backward that kept the mean": custom(SavesTheMean),
    "a custom backward that normalizes": custom(Normalized),
    "a gradient hook": lambda sizes: Function(hooked),
    "saved tensors flipped": lambda sizes: Function(saved_flipped),
    "a forward hook": forward_hook,
    "a forward pre-hook": pre_hook,
    "a backward hook": backward_hook,
    "a parameter's hook": parameter_hook,
    "one bias weighted by the batch": one_bias,
    "a recurrence along the batch": lambda sizes: Function(over_time, cell=nn.GRU(numel(sizes), numel(sizes))),
    "attention over the batch": lambda sizes: Function(folded_attention, of=nn.MultiheadAttention(numel(sizes), 1)),
    "batch norm in train mode": AlwaysTraining,
}
