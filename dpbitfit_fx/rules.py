"""Teach ``compile`` an operator of your own (design §3: nothing is unrolled over samples)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from .passes import user_rules

Rule = TypeVar("Rule", bound=Callable[..., Any])


def sample_rule(op: Any) -> Callable[[Rule], Rule]:
    """Decorator: the function stands for the operator ``op`` in every later :func:`compile`.

    Needed for an operator that ``torch.func.vmap`` cannot batch: a ``torch.library.custom_op``, most of all::

        @torch.library.custom_op("mylib::swish", mutates_args=())
        def swish(x: torch.Tensor) -> torch.Tensor: ...      # with its register_fake and register_autograd

        @dpb.sample_rule(swish)
        def swish_of_one_sample(x):
            return x * torch.sigmoid(x)

    The rule takes the operator's arguments for *one* sample (batch size 1) and returns the same outputs, written in
    operators that vmap batches, whose derivative it follows; or it calls a ``torch.autograd.Function`` with a ``vmap``
    staticmethod that folds the samples into an axis of the operator's own.
    It is believed only after a check, at each compile and for each call, on every row of ``example_batch``: one sample
    and several at once must give the operator's own values and gradients, and a row must stay the same bit for bit
    whatever the other rows hold. Else :class:`CompileRefused`, with the line of the call.
    """

    target = user_rules.overload(op)

    def add(rule: Rule) -> Rule:
        user_rules.register(target, rule)
        return rule

    return add
