"""The public plan of a run from an export: phases, samplers, budget, step sizes. Importable without torch.

Noise multiplier, max_grad_norm and expected batch size are baked into the exported graphs, so a budget cannot be solved
for here as `fit` does: a plan that exceeds it is refused, with the number of steps that would not.
"""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from dpbitfit_fx.accounting import (
    PriorRun,
    check_target_delta,
    check_target_epsilon,
    epsilon_of_phases,
    format_epsilon,
    resolve_prior,
)
from dpbitfit_fx.errors import ArtifactError, DataError, PrivacyError
from dpbitfit_fx.ort_artifacts import clipping_of, phases_of
from dpbitfit_fx.padding import physical_sizes
from dpbitfit_fx.phases import StepLedger, joined_hash, naming_phase
from dpbitfit_fx.privacy_statement import mechanism_ids, new_run_id
from dpbitfit_fx.sampling import PoissonSampler

__all__ = ["SCHEDULES", "PhasePlan", "Plan", "Rates", "Schedule", "most_steps", "plan_for", "rates_by_parameter"]

SCHEDULES: Final = ("constant", "linear", "product")
# (name pattern, learning rate): of each parameter the first pattern counts that matches it.
Rates = tuple[tuple[str, float], ...]


@dataclass(frozen=True)
class Schedule:
    """The learning rate's factor at each step: a public function of the step number, never of a loss. Numbers, no code.

    It grows over `warmup_steps` as 1/w, 2/w, ..., 1; then stays 1 ("constant") or falls to 1/(T - w) at the last of T
    planned steps ("linear"). "product" falls from the first step on, min(1, (t + 1) / w) (1 - t / T), and w may be a fraction.
    """

    kind: str = "constant"
    warmup_steps: float = 0

    def __post_init__(self) -> None:
        if self.kind not in SCHEDULES:
            raise PrivacyError(f"The learning-rate schedule must be one of {', '.join(SCHEDULES)}; got {self.kind!r}.")
        number = type(self.warmup_steps) in ((int, float) if self.kind == "product" else (int,))
        if not number or not 0 <= self.warmup_steps < math.inf:
            raise PrivacyError(f"warmup_steps must be a whole number, 0 or more; got {self.warmup_steps!r}.")

    def factor(self, step: int, steps: int) -> float:
        """In (0, 1], for `step` 0, 1, ..., `steps` - 1."""
        if self.kind == "product":
            return min(1.0, (step + 1) / max(1.0, self.warmup_steps)) * (1.0 - step / steps)
        if step < self.warmup_steps:
            return (step + 1) / self.warmup_steps
        return 1.0 if self.kind == "constant" else (steps - step) / (steps - self.warmup_steps)

    def to_dict(self) -> dict[str, Any]:
        return {"type": self.kind, "warmup_steps": self.warmup_steps}

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> Schedule:
        return cls(content["type"], content["warmup_steps"])


def check_rate(rate: object) -> float:
    if not (isinstance(rate, (int, float)) and math.isfinite(rate) and rate > 0):
        raise PrivacyError(f"learning_rate must be a finite number above 0; got {rate!r}.")
    return float(rate)


def rates_by_parameter(names: Sequence[str], rates: Rates) -> list[float]:
    """The learning rate of each of the `names`.

    Raises:
        PrivacyError: one has no rate, or a pattern matches none.
    """
    hits = [next((i for i, (pattern, _) in enumerate(rates) if fnmatch.fnmatchcase(n, pattern)), None) for n in names]
    missing = [name for name, hit in zip(names, hits, strict=True) if hit is None]
    idle = [pattern for i, (pattern, _) in enumerate(rates) if i not in hits]
    if missing or idle:
        what = (
            f"{missing[0]!r} has no learning rate" if missing else f"The pattern {idle[0]!r} matches no parameter first"
        )
        raise PrivacyError(
            f"{what}. learning_rates gives (pattern, rate) pairs, of which the first that matches a trained parameter "
            "counts; let the last one be ('*', rate)."
        )
    return [check_rate(rates[hit][1]) for hit in hits if hit is not None]


@dataclass(frozen=True)
class PhasePlan:
    """One phase: which records are drawn, how often, and the learning rates of the parameters that it trains."""

    sampler: PoissonSampler
    learning_rates: Rates
    schedule: Schedule = Schedule()

    def rate(self, step: int) -> float:
        """The learning rate (of the first pattern) of the phase's `step`."""
        return self.learning_rates[0][1] * self.factor(step)

    @property
    def per_epoch(self) -> int:
        return max(1, round(1 / self.sampler.sample_rate))

    def factor(self, step: int) -> float:
        return self.schedule.factor(step, self.sampler.steps)

    def to_dict(self) -> dict[str, Any]:
        rates = [list(pair) for pair in self.learning_rates]
        return {
            "learning_rate": rates[0][1] if len(rates) == 1 else rates,
            "lr_schedule": self.schedule.to_dict(),
        }


@dataclass(frozen=True)
class Plan:
    """Everything that is decided before the first step; all of it public.

    physical_batch_sizes: one per padded length. target_epsilon: never exceeded, lost steps included: they are steps that
    are no longer taken. None: they are charged on top of the planned steps. prior: earlier runs on the same records.
    """

    phases: tuple[PhasePlan, ...]
    noise_multiplier: float
    target_delta: float
    physical_batch_sizes: tuple[int, ...]
    padded_lengths: Mapping[str, tuple[int, ...]]
    target_epsilon: float | None = None
    prior: tuple[PriorRun, ...] = ()
    dataset_size_assumed_public: bool = False

    def as_runs(self, run_id: str) -> list[PriorRun]:
        """Each phase with all its planned steps, as the accountant and the ledger name it."""
        return [
            PriorRun(
                name,
                phase.sampler.sample_rate,
                self.noise_multiplier,
                phase.sampler.steps,
            )
            for name, phase in zip(mechanism_ids(run_id, len(self.phases)), self.phases, strict=True)
        ]

    @property
    def sampler(self) -> PoissonSampler:
        """Of a run of one phase."""
        (phase,) = self.phases
        return phase.sampler

    def mechanism(
        self, manifest: Mapping[str, Any], insecure: bool, tuning_covered: bool, declared: Mapping[str, Any]
    ) -> dict[str, Any]:
        """What epsilon depends on, and what privacy.json says (see ``run_statement``)."""
        views = phases_of(manifest)
        records = []
        for view in views:
            clipping, gamma = clipping_of(view)
            records.append(
                {
                    "trainable": view.get("trainable", [p["name"] for p in view["parameters"]]),
                    "num_trainable": int(view["num_trainable"]),
                    "max_grad_norm": float(view["max_grad_norm"]),
                    "clipping": clipping,
                    "gamma": gamma,
                    "graph_hash": view["graph_hash"],
                }
            )
        last = records[-1]
        described = [
            p.to_dict() | {"optimizer": v["optimizer"]["type"]} for p, v in zip(self.phases, views, strict=True)
        ]
        lengths: Any = [f"{path}: {list(lengths)}" for path, lengths in self.padded_lengths.items()]
        sizes = self.physical_batch_sizes
        return {
            "dataset_size": self.phases[0].sampler.dataset_size,
            "noise_multiplier": self.noise_multiplier,
            "prior": [run.to_dict() for run in self.prior],
            # With a target, steps that were lost are steps that are no longer there to take.
            "shortened": self.target_epsilon is not None,
            "phases": [
                {"sampler": phase.sampler.to_dict(), "record": record}
                for phase, record in zip(self.phases, records, strict=True)
            ],
            "statement": {
                "run_id": new_run_id(),
                "delta": self.target_delta,
                **{name: last[name] for name in ("max_grad_norm", "clipping", "gamma")},
                "graph_hash": joined_hash([record["graph_hash"] for record in records]),
                "num_trainable": int(manifest["num_trainable"]),
                "num_parameters": int(manifest["num_parameters"]),
                "dataset_size_assumed_public": self.dataset_size_assumed_public,
                "tuning_covered": tuning_covered,
                "insecure": insecure,
                "backend": f"onnxruntime ({manifest['target']})",
                "public_declarations": {
                    "padded_lengths": lengths or "the artifacts' shapes",
                    "physical_batch_size": sizes[0] if len(set(sizes)) == 1 else list(sizes),
                    **(described[0] if len(described) == 1 else {"phases": described}),
                    "target_epsilon": self.target_epsilon,
                    **({"frozen_weights": manifest["frozen_weights"]} if "frozen_weights" in manifest else {}),
                    **declared,
                },
            },
        }


def plan_for(
    manifest: Mapping[str, Any],
    records: int,
    *,
    padded_lengths: Mapping[str, tuple[int, ...]] | None = None,
    steps: int | None = None,
    epochs: float | None = None,
    dataset_size: int | None = None,
    target_delta: float | None = None,
    target_epsilon: float | None = None,
    learning_rate: float | None = None,
    schedule: Schedule | None = None,
    physical_batch_size: int | Sequence[int] = 32,
    prior: Sequence[PriorRun] = (),
) -> Plan:
    """The export's plan, completed and overruled by the arguments, for a data set of `records`.

    Args:
        padded_lengths: of ``ort_records.public_lengths``. prior: besides the earlier runs that the export was planned with.

    Raises:
        DataError: the data set is not of the declared size. PrivacyError: the plan is incomplete, contradicts the export,
            or spends more than target_epsilon; nothing was trained.
    """
    known, views = manifest["plan"], phases_of(manifest)
    declared = dataset_size if dataset_size is not None else known.get("dataset_size")
    size = records if declared is None else int(declared)
    if size != records:
        raise DataError(
            f"The declared dataset_size is {size}, and the data set has another number of records. Declare the size of "
            "the data set that is trained on."
        )
    if "phases" in manifest and any(given is not None for given in (steps, epochs, learning_rate, schedule)):
        raise PrivacyError(
            "This export holds a whole run with the steps, learning rates and schedule of each of its phases, so steps, "
            "epochs, learning_rate and schedule cannot be given for all of them. Leave them out, or export another run."
        )
    delta = target_delta if target_delta is not None else known.get("target_delta")
    if delta is None:
        raise PrivacyError("Give steps (or epochs) and target_delta: the export does not hold a plan.")
    planned = []
    for index, view in enumerate(views):
        with naming_phase(index, len(views)):
            own = dict(view["plan"])
            if dataset_size is not None:
                own["sample_rate"] = None
            if steps is not None or epochs is not None:
                own["steps"] = steps
            given = [["*", view["optimizer"]["lr"] if learning_rate is None else learning_rate]]
            chosen = schedule or Schedule.from_dict(view.get("schedule", Schedule().to_dict()))
            planned.append(_phase(view, size, own, epochs, view.get("learning_rates", given), chosen))
    noise = {float(view["noise_multiplier"]) for view in views}
    if len(noise) != 1:
        raise ArtifactError("The phases of the export have different noise multipliers. Export again.")
    lengths = dict(padded_lengths or {})
    buckets = max((len(each) for each in lengths.values()), default=1)
    target = known.get("target_epsilon") if target_epsilon is None else target_epsilon
    plan = Plan(
        tuple(planned),
        noise.pop(),
        check_target_delta(float(delta), size),
        physical_sizes(physical_batch_size, buckets),
        lengths,
        None if target is None else check_target_epsilon(target),
        resolve_prior([*(PriorRun.from_dict(run) for run in known.get("prior") or ()), *prior]),
        declared is None,
    )
    _check_budget(plan)
    return plan


def _phase(
    view: Mapping[str, Any],
    size: int,
    known: Mapping[str, Any],
    epochs: float | None,
    rates: Sequence[Sequence[Any]],
    schedule: Schedule,
) -> PhasePlan:
    steps = known.get("steps")
    if steps is None and epochs is None:
        raise PrivacyError("Give steps (or epochs) and target_delta: the export does not hold a plan.")
    expected = float(view["expected_batch_size"])
    sampler = PoissonSampler.from_expected_batch_size(size, expected, steps=steps, epochs=epochs)
    rate = known.get("sample_rate")
    if rate is not None and abs(rate - sampler.sample_rate) > 1e-9 * rate:
        raise PrivacyError(
            f"The export was planned for sample_rate {rate:g}, and its expected batch of {expected:g} over {size} "
            f"records gives {sampler.sample_rate:g}. Declare dataset_size={size} for this data set, or export again."
        )
    pairs = tuple((str(pattern), value) for pattern, value in rates)
    rates_by_parameter([p["name"] for p in view["parameters"]], pairs)
    if schedule.warmup_steps > sampler.steps:
        raise PrivacyError(f"warmup_steps is {schedule.warmup_steps}, more than the {sampler.steps} planned steps.")
    return PhasePlan(sampler, tuple((pattern, float(value)) for pattern, value in pairs), schedule)


def most_steps(spent: Callable[[int], float], target: float, beyond: int) -> int:
    """The largest number of steps, 0 or more, whose epsilon `spent` is within `target`; that of `beyond` steps is not."""
    fits = 0
    while beyond - fits > 1:
        middle = (fits + beyond) // 2
        fits, beyond = (middle, beyond) if spent(middle) <= target else (fits, middle)
    return fits


def _check_budget(plan: Plan) -> None:
    """Also without a target: it tells whether the noise suffices for a finite epsilon."""
    samplers = [phase.sampler for phase in plan.phases]
    ledger = StepLedger([sampler.steps for sampler in samplers], shortened=True)

    def spent(steps: int) -> float:
        parts = list(zip(samplers, ledger.taken(steps), strict=True))
        return epsilon_of_phases(parts, plan.noise_multiplier, plan.target_delta, plan.prior)

    planned, target = ledger.total, plan.target_epsilon
    whole = spent(planned)
    if target is None or whole <= target:
        return
    fits = most_steps(spent, target, planned)
    possible = f"At most {fits} steps stay within it" if fits else "Not even one step stays within it"
    earlier = f" together with {len(plan.prior)} earlier run(s)" if plan.prior else ""
    raise PrivacyError(
        f"{planned} steps with the noise multiplier {plan.noise_multiplier:g} of this export spend epsilon = "
        f"{format_epsilon(whole)}{earlier}, more than the target of {target:g}. {possible}. Take fewer steps, or export "
        "again with more noise. Nothing was trained."
    )
