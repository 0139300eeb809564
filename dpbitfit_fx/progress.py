"""What callers see of a run while it lasts: public numbers only."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from dpbitfit_fx.accounting import format_epsilon

__all__ = ["Progress", "StepInfo"]


@dataclass(frozen=True)
class StepInfo:
    """What a callback may know after a step: public numbers only.

    `step`: steps done; `steps`: planned, in all phases; `phase`: the one that took the step, 0 for the first.
    """

    step: int
    steps: int
    learning_rate: float
    _epsilon: Callable[[], float] = field(repr=False)
    phase: int = 0

    @cached_property
    def epsilon(self) -> float:
        """ε spent so far at the target δ, an upper bound (computed at a coarse grid of steps)."""
        return self._epsilon()


class Progress:
    """A bar on standard error once the run has lasted two seconds: ε spent, speed, time left. Public numbers only."""

    def __init__(self, enabled: bool, done: int, total: int) -> None:
        self._enabled, self._first, self._total = enabled, done, total
        self._start = time.monotonic()
        self._bar: Any = None
        self._task: Any = None

    def update(self, done: int, spent: Callable[[], float]) -> None:
        if not self._enabled or (self._bar is None and time.monotonic() - self._start < 2.0):
            return
        if self._bar is None:
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

            self._bar = Progress(
                TextColumn("private steps"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("epsilon <= {task.fields[epsilon]}"),
                TextColumn("{task.fields[speed]:.2f} steps/s"),
                TimeRemainingColumn(),
                console=Console(stderr=True),
            )
            self._bar.start()
            self._task = self._bar.add_task("", total=self._total, completed=self._first, epsilon="0", speed=0.0)
        speed = (done - self._first) / max(1e-9, time.monotonic() - self._start)
        self._bar.update(self._task, completed=done, epsilon=format_epsilon(spent(), 3), speed=speed)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.stop()
