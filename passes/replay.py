"""The user's own code run with given random numbers in place of drawn ones: the oracle of what ``random_draws`` rewrote.

It works one floor below, on the kernels that torch's own dropout, attention and recurrent nets call, so that scales and
placement are proved by other code than that which was rewritten.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from .errors import CompileRefused
from .joint_graph import Draw
from .random_draws import uniform_as
from .torch_private import TorchDispatchMode, draws_numbers, named_arguments

aten = torch.ops.aten


class Replay(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """``draws`` in call order, for ``rows`` samples; ``values`` of one sample, or kept and ``constant`` where None.

    The place among the draws is kept as the seed of torch's own generator: ``torch.utils.checkpoint`` saves and restores
    that, so what it computes again gets the same numbers. A draw of another size than the next is one that the result
    does not use (export took it out); it gets constants.
    """

    def __init__(
        self, draws: Sequence[Draw], rows: int, values: Sequence[Tensor] | None = None, constant: float = 0.5
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.draws, self.rows, self.values, self.constant, self.reached = draws, rows, values, constant, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is aten.native_batch_norm_backward.default:
            # torch 2.13's CPU kernel is wrong for one sample and a gradient of certain strides.
            args = (args[0].clone(memory_format=torch.contiguous_format), *args[1:])
        if not draws_numbers(func, args, kwargs):
            return func(*args, **kwargs)
        given = named_arguments(func, args, kwargs)
        if func in (aten.bernoulli_.float, aten.bernoulli.p):
            x = given["self"]
            keep = self.next(x.shape, given["p"], x.device).to(x.dtype)
            return x.copy_(keep) if func is aten.bernoulli_.float else keep
        if func in (aten.bernoulli.default, aten.bernoulli_.Tensor, aten.bernoulli.Tensor):
            x, q = given["self"], given.get("p", given["self"])
            keep = (self.next(x.shape, None, x.device) < q).to(x.dtype)
            return x.copy_(keep) if func is aten.bernoulli_.Tensor else keep
        if func in (aten.rand.default, aten.rand_like.default):
            like = given.get("self")
            shape = given["size"] if like is None else like.shape
            dtype = given["dtype"] or (torch.get_default_dtype() if like is None else like.dtype)
            device = given["device"] or (None if like is None else like.device)
            return uniform_as(self.next(shape, None, device), dtype)
        if func is aten.uniform_.default:
            x, low, high = given["self"], given["from"], given["to"]
            return x.copy_(low + (high - low) * uniform_as(self.next(x.shape, None, x.device), x.dtype))
        if func is aten.native_dropout.default and 0.0 < given["p"] < 1.0:
            x, p = given["input"], given["p"]
            keep = self.next(x.shape, 1.0 - p, x.device)
            return x * keep / (1.0 - p), keep
        raise CompileRefused(
            f"The model draws random numbers by {func}, which is not among those of its captured graph."
        )

    def next(self, shape: Any, keep: float | None, device: Any) -> Tensor:
        at, size = torch.initial_seed(), torch.Size(shape).numel()
        draw = self.draws[at] if at < len(self.draws) else None
        fits = draw is not None and draw.size * self.rows == size and _same(draw.keep, keep)
        if fits:
            torch.default_generator.manual_seed(at + 1)
            self.reached = max(self.reached, at + 1)
        if fits and self.values is not None:
            return self.values[at].reshape(shape).to(device)
        return torch.full(shape, self.constant if keep is None else True, device=device)


def _same(a: float | None, b: float | None) -> bool:
    return a is b or (a is not None and b is not None and abs(a - b) < 1e-12)


@contextmanager
def replaying(
    draws: Sequence[Draw], rows: int, values: Sequence[Tensor] | None = None, constant: float = 0.5
) -> Iterator[None]:
    """Inside, the user's code gets ``values`` (see :class:`Replay`); nothing happens where there are no draws.

    Raises CompileRefused at the end if the code did not draw, in order, what one sample draws times ``rows``.
    """
    if not draws:
        yield
        return
    with torch.random.fork_rng(devices=[]), sdpa_kernel(SDPBackend.MATH):
        torch.default_generator.manual_seed(0)
        with Replay(draws, rows, values, constant) as mode:
            yield
    if mode.reached < len(draws):
        draw = draws[mode.reached]
        raise CompileRefused(
            f"dropout=True: for {rows} samples the model does not draw {rows} times the random numbers {list(draw.shape)} "
            f"that it draws for one.{draw.origin} Either the samples of a batch share them, or they are drawn in another "
            "order: draw them for each sample, in the batch's shape, or put that module in eval mode."
        )
