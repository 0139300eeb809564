"""The mean of the last iterates, kept while a private run trains: a function of what it releases anyway, so it costs no ε.

Sources: Polyak and Juditsky, SIAM J. Control Optim. 1992; in private training Shejwalkar et al. 2022 ("uniform tail
averaging"); De et al. 2022 take an exponential average instead, whose decay must be tuned to the length of the run.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping

import torch
from torch import nn

from dpbitfit_fx.errors import PrivacyError

__all__ = ["TailAverage", "check_average_from"]


def check_average_from(average_from: object) -> float | None:
    if average_from is None:
        return None
    number = isinstance(average_from, (int, float)) and not isinstance(average_from, bool)
    if not number or not 0 <= float(average_from) < 1:  # type: ignore[arg-type]
        raise PrivacyError(
            f"average_from must be the share of the (last) phase after which parameters are averaged, at least 0 and "
            f"below 1: 0.5 averages over its second half. Got {average_from!r}."
        )
    return float(average_from)  # type: ignore[arg-type]


class TailAverage:
    """``mean_t p_t`` over the steps t beyond ``share`` of a phase, each value in float32 or better.

    The parameters themselves go on as if nothing were averaged: gradients are taken, and steps replayed, at ``p_t``.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], share: float) -> None:
        self.parameters, self.share = dict(parameters), share
        self.values: dict[str, torch.Tensor] = {}
        self.count = 0

    def update(self, taken: int, steps: int) -> None:
        """Takes in the parameters as they are after ``taken`` of the phase's ``steps``."""
        if taken <= math.floor(self.share * steps):
            self.values, self.count = {}, 0  # a plan that has become longer begins later
            return
        now = {n: p.detach().to(torch.promote_types(p.dtype, torch.float32)) for n, p in self.parameters.items()}
        if not self.count:
            self.values = {name: value.clone() for name, value in now.items()}
        else:
            for name, value in now.items():
                self.values[name].lerp_(value, 1 / (self.count + 1))
        self.count += 1

    def restore(self, values: Mapping[str, torch.Tensor], count: int) -> None:
        """From a checkpoint; values of another average are left out, and this one begins where the run goes on."""
        fits = count > 0 and {n: v.shape for n, v in values.items()} == {n: p.shape for n, p in self.parameters.items()}
        self.values = {n: values[n].to(p.device).clone() for n, p in self.parameters.items()} if fits else {}
        self.count = count if fits else 0

    def apply(self) -> None:
        """Puts the mean into the parameters, where there is one yet."""
        with torch.no_grad():
            for name, value in self.values.items():
                self.parameters[name].copy_(value)

    @contextlib.contextmanager
    def applied(self) -> Iterator[None]:
        """Inside, the parameters hold the mean; afterwards they are, bit for bit, what they were."""
        kept = {name: self.parameters[name].detach().clone() for name in self.values}
        try:
            self.apply()
            yield
        finally:
            with torch.no_grad():
                for name, value in kept.items():
                    self.parameters[name].copy_(value)
