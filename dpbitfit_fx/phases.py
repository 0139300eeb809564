"""Phases of one run: full tuning or a new head first, biases after (X+BiTFiT), under one noise multiplier and one ε.

Source: Bu et al., ICML 2024, section 4 (two-phase training). Torch-free: privacy.json is read and written without it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from dpbitfit_fx.errors import DPBitFitError, PrivacyError

if TYPE_CHECKING:
    from dpbitfit_fx.passes.clipping import Clipping

__all__ = ["Phase", "PhaseRecord", "StepLedger", "joined_hash", "naming_phase", "plan_phases"]


@dataclasses.dataclass(frozen=True)
class Phase:
    """What one phase of `fit` does differently; whatever is None is taken from fit's own arguments.

    Exactly one of `epochs` and `max_steps`. Each phase has a new optimizer, and its schedule starts at step 0. The
    parameters that a phase does not train stay where the phases before left them.
    """

    trainable: str | Sequence[str] | None = None
    exclude: str | Sequence[str] | None = None
    epochs: float | None = None
    max_steps: int | None = None
    expected_batch_size: float | None = None
    clipping: Clipping | None = None
    optimizer: Callable[..., Any] | None = None
    learning_rate: float | None = None
    lr_schedule: Callable[[Any], Any] | None = None


def plan_phases(phases: Sequence[Phase] | None, whole: Phase) -> tuple[Phase, ...]:
    """The phases with every None filled in from `whole`, fit's own arguments; those alone where `phases` is None.

    Raises:
        PrivacyError: `phases` is empty, holds something else, or is given together with epochs or max_steps.
    """
    if phases is None:
        return (whole,)
    if isinstance(phases, Phase) or not isinstance(phases, Sequence) or not all(isinstance(p, Phase) for p in phases):
        raise PrivacyError("phases must be a list of dpbitfit_fx.Phase: phases=[Phase(epochs=1, ...), Phase(...)].")
    if not phases:
        raise PrivacyError("phases is empty: there is nothing to train. Leave it out, or give at least one Phase.")
    if whole.epochs is not None or whole.max_steps is not None:
        raise PrivacyError(
            "With phases, each Phase says its own epochs or max_steps; fit's own would be ambiguous. Move it there."
        )
    names = [field.name for field in dataclasses.fields(Phase) if field.name not in ("epochs", "max_steps")]
    inherited = [{n: getattr(whole, n) for n in names if getattr(phase, n) is None} for phase in phases]
    return tuple(dataclasses.replace(phase, **rest) for phase, rest in zip(phases, inherited, strict=True))


@contextlib.contextmanager
def naming_phase(index: int, count: int) -> Iterator[None]:
    """Errors that this library raises on purpose say in which phase; a run of one phase needs no name."""
    try:
        yield
    except DPBitFitError as error:
        if count == 1:
            raise
        raise type(error)(f"Phase {index + 1} of {count}: {error}") from error


class StepLedger:
    """Which phase each step belongs to, and how many steps each phase has lost.

    Steps are numbered through the whole run, so no two phases share a number, and with it a draw or noise.
    shortened: a lost step is one that its phase no longer takes, so that steps and lost steps together never exceed
    the phase's plan, from which the noise was solved.
    """

    def __init__(self, planned: Sequence[int], charged: Sequence[int] | None = None, *, shortened: bool) -> None:
        self.planned, self.shortened = tuple(planned), shortened
        self.charged = [0] * len(self.planned) if charged is None else list(charged)

    def limit(self, phase: int) -> int:
        """Steps that the phase takes."""
        return max(0, self.planned[phase] - (self.charged[phase] if self.shortened else 0))

    def start(self, phase: int) -> int:
        """Number of the phase's first step."""
        return sum(self.limit(before) for before in range(phase))

    @property
    def total(self) -> int:
        return self.start(len(self.planned))

    def phase_of(self, step: int) -> int:
        """The phase that takes `step`; the last one beyond the end."""
        last = len(self.planned) - 1
        return next((phase for phase in range(last) if step < self.start(phase + 1)), last)

    def taken(self, step: int) -> list[int]:
        """Steps taken in each phase when `step` are done in all; beyond the plan's end they are the last phase's."""
        last = len(self.planned) - 1
        ends = [self.limit(phase) if phase < last else step for phase in range(last + 1)]
        return [min(max(0, step - self.start(phase)), end) for phase, end in enumerate(ends)]

    def at_most(self, step: int = 0, lost: int = 0) -> list[int]:
        """What each phase is charged when the run goes to its end, `lost` more steps from `step` on included."""
        then = StepLedger(self.planned, self.charged, shortened=self.shortened)
        then.charge(step, lost)
        return [then.limit(phase) + then.charged[phase] for phase in range(len(then.planned))]

    def charge(self, step: int, lost: int) -> None:
        """Books `step`, `step` + 1, … as lost, each in its own phase."""
        for phase in [self.phase_of(number) for number in range(step, step + lost)]:
            self.charged[phase] += 1


@dataclasses.dataclass(frozen=True)
class PhaseRecord:
    """One phase in privacy.json.

    trainable: as it was asked for. planned_steps, steps, lost_steps: lost ones are charged besides. The noise added to
    each clipped sum has standard deviation noise_multiplier * max_grad_norm * (1 + slack), see numeric_caveats. graph_hash:
    SHA-256 of the sealed graph.
    """

    trainable: str | Sequence[str]
    num_trainable: int
    planned_steps: int
    steps: int
    lost_steps: int
    sample_rate: float
    expected_batch_size: float
    noise_multiplier: float
    max_grad_norm: float
    clipping: str
    gamma: float | None
    graph_hash: str

    def __post_init__(self) -> None:
        if not isinstance(self.trainable, str):  # JSON gives a list, which would equal no tuple
            object.__setattr__(self, "trainable", tuple(self.trainable))

    def to_dict(self) -> dict[str, Any]:
        """The record as JSON values."""
        fields = dataclasses.asdict(self)
        fields["trainable"] = self.trainable if isinstance(self.trainable, str) else list(self.trainable)
        return fields

    @classmethod
    def from_dict(cls, content: object) -> PhaseRecord:
        """The record from ``to_dict``; its values are checked with the statement that holds it.

        Raises:
            PrivacyError: a field is missing, unknown or of the wrong type.
        """
        names = {field.name for field in dataclasses.fields(cls)}
        if not isinstance(content, dict) or content.keys() != names:
            raise PrivacyError(f"A phase must be a JSON object with exactly the fields {', '.join(sorted(names))}.")
        asked = content["trainable"]
        if not isinstance(asked, str) and not (isinstance(asked, list) and all(isinstance(p, str) for p in asked)):
            raise PrivacyError("In a phase trainable must be a string or a list of strings.")
        return cls(**content)


def joined_hash(hashes: Sequence[str]) -> str:
    """One SHA-256 for several, in order; of one, itself."""
    return hashes[0] if len(hashes) == 1 else hashlib.sha256("\n".join(hashes).encode()).hexdigest()
