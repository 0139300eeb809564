"""The public plan of a run from an export: sampler, budget, step sizes. Importable without torch.

Noise multiplier, max_grad_norm and expected batch size are baked into the exported graphs, so a budget cannot be solved
for here as `fit` does: a plan that exceeds it is refused, with the number of steps that would not.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from dpbitfit_fx.accounting import PriorRun, check_target_delta, check_target_epsilon, epsilon, format_epsilon
from dpbitfit_fx.errors import DataError, PrivacyError
from dpbitfit_fx.ort_artifacts import clipping_of
from dpbitfit_fx.privacy_statement import new_run_id
from dpbitfit_fx.sampling import PoissonSampler

__all__ = ["SCHEDULES", "Plan", "Schedule", "most_steps", "plan_for"]

SCHEDULES: Final = ("constant", "linear")


@dataclass(frozen=True)
class Schedule:
    """The learning rate's factor at each step: a public function of the step number, never of a loss.

    It grows over `warmup_steps` as 1/w, 2/w, ..., 1; then stays 1 ("constant") or falls to 1/(T - w) at the last of T
    planned steps ("linear").
    """

    kind: str = "constant"
    warmup_steps: int = 0

    def __post_init__(self) -> None:
        if self.kind not in SCHEDULES:
            raise PrivacyError(f"The learning-rate schedule must be one of {', '.join(SCHEDULES)}; got {self.kind!r}.")
        if type(self.warmup_steps) is not int or self.warmup_steps < 0:
            raise PrivacyError(f"warmup_steps must be a whole number, 0 or more; got {self.warmup_steps!r}.")

    def factor(self, step: int, steps: int) -> float:
        """In (0, 1], for `step` 0, 1, ..., `steps` - 1."""
        if step < self.warmup_steps:
            return (step + 1) / self.warmup_steps
        return 1.0 if self.kind == "constant" else (steps - step) / (steps - self.warmup_steps)

    def to_dict(self) -> dict[str, Any]:
        return {"type": self.kind, "warmup_steps": self.warmup_steps}


@dataclass(frozen=True)
class Plan:
    """Everything that is decided before the first step; all of it public.

    target_epsilon: never exceeded, lost steps included: they are steps that are no longer taken. None: they are charged
    on top of the planned steps. prior: earlier runs on the same records.
    """

    sampler: PoissonSampler
    noise_multiplier: float
    target_delta: float
    learning_rate: float
    physical_batch_size: int
    schedule: Schedule = Schedule()
    target_epsilon: float | None = None
    prior: tuple[PriorRun, ...] = ()
    dataset_size_assumed_public: bool = False

    def rate(self, step: int) -> float:
        """The learning rate of `step`."""
        return self.learning_rate * self.schedule.factor(step, self.sampler.steps)

    def mechanism(
        self, manifest: Mapping[str, Any], insecure: bool, tuning_covered: bool, declared: Mapping[str, Any]
    ) -> dict[str, Any]:
        """What epsilon depends on, and what privacy.json says (see ``run_statement``)."""
        clipping, gamma = clipping_of(manifest)
        shared = {
            "num_trainable": int(manifest["num_trainable"]),
            "max_grad_norm": float(manifest["max_grad_norm"]),
            "clipping": clipping,
            "gamma": gamma,
            "graph_hash": manifest["graph_hash"],
        }
        optimizer = manifest["optimizer"]["type"]
        return {
            "dataset_size": self.sampler.dataset_size,
            "noise_multiplier": self.noise_multiplier,
            "prior": [run.to_dict() for run in self.prior],
            # With a target, steps that were lost are steps that are no longer there to take.
            "shortened": self.target_epsilon is not None,
            "phases": [
                {
                    "sampler": self.sampler.to_dict(),
                    "record": {"trainable": [p["name"] for p in manifest["parameters"]], **shared},
                }
            ],
            "statement": {
                "run_id": new_run_id(),
                "delta": self.target_delta,
                **shared,
                "num_parameters": int(manifest["num_parameters"]),
                "dataset_size_assumed_public": self.dataset_size_assumed_public,
                "tuning_covered": tuning_covered,
                "insecure": insecure,
                "backend": f"onnxruntime ({manifest['target']})",
                "public_declarations": {
                    "padded_lengths": "the artifacts' shapes",
                    "physical_batch_size": self.physical_batch_size,
                    "learning_rate": self.learning_rate,
                    "lr_schedule": self.schedule.to_dict(),
                    "optimizer": optimizer,
                    "target_epsilon": self.target_epsilon,
                    **declared,
                },
            },
        }


def plan_for(
    manifest: Mapping[str, Any],
    records: int,
    *,
    steps: int | None = None,
    epochs: float | None = None,
    dataset_size: int | None = None,
    target_delta: float | None = None,
    target_epsilon: float | None = None,
    learning_rate: float | None = None,
    schedule: Schedule | None = None,
    physical_batch_size: int = 32,
    prior: Sequence[PriorRun] = (),
) -> Plan:
    """The export's plan, completed and overruled by the arguments, for a data set of `records`.

    Raises:
        DataError: the data set is not of the declared size. PrivacyError: the plan is incomplete, contradicts the export,
            or spends more than target_epsilon; nothing was trained.
    """
    known = manifest["plan"]
    declared = dataset_size if dataset_size is not None else known.get("dataset_size")
    size = records if declared is None else int(declared)
    if size != records:
        raise DataError(
            f"The declared dataset_size is {size}, and the data set has another number of records. Declare the size of "
            "the data set that is trained on."
        )
    if steps is None and epochs is None:
        steps = known.get("steps")
    delta = target_delta if target_delta is not None else known.get("target_delta")
    if (steps is None and epochs is None) or delta is None:
        raise PrivacyError("Give steps (or epochs) and target_delta: the export does not hold a plan.")
    expected = float(manifest["expected_batch_size"])
    sampler = PoissonSampler.from_expected_batch_size(size, expected, steps=steps, epochs=epochs)
    rate = known.get("sample_rate")
    if dataset_size is None and rate is not None and abs(rate - sampler.sample_rate) > 1e-9 * rate:
        raise PrivacyError(
            f"The export was planned for sample_rate {rate:g}, and its expected batch of {expected:g} over {size} "
            f"records gives {sampler.sample_rate:g}. Declare dataset_size={size} for this data set, or export again."
        )
    if type(physical_batch_size) is not int or physical_batch_size < 1:
        raise DataError("physical_batch_size must be 1 or more.")
    chosen = float(manifest["optimizer"]["lr"]) if learning_rate is None else learning_rate
    if not (isinstance(chosen, (int, float)) and math.isfinite(chosen) and chosen > 0):
        raise PrivacyError(f"learning_rate must be a finite number above 0; got {chosen!r}.")
    if schedule is not None and schedule.warmup_steps > sampler.steps:
        raise PrivacyError(f"warmup_steps is {schedule.warmup_steps}, more than the {sampler.steps} planned steps.")
    plan = Plan(
        sampler,
        float(manifest["noise_multiplier"]),
        check_target_delta(float(delta), size),
        float(chosen),
        physical_batch_size,
        schedule or Schedule(),
        None if target_epsilon is None else check_target_epsilon(target_epsilon),
        tuple(prior),
        declared is None,
    )
    _check_budget(plan)
    return plan


def most_steps(spent: Callable[[int], float], target: float, beyond: int) -> int:
    """The largest number of steps, 0 or more, whose epsilon `spent` is within `target`; that of `beyond` steps is not."""
    fits = 0
    while beyond - fits > 1:
        middle = (fits + beyond) // 2
        fits, beyond = (middle, beyond) if spent(middle) <= target else (fits, middle)
    return fits


def _check_budget(plan: Plan) -> None:
    """Also without a target: it tells whether the noise suffices for a finite epsilon."""

    def spent(steps: int) -> float:
        return epsilon(plan.sampler, plan.noise_multiplier, plan.target_delta, steps=steps, prior=plan.prior)

    planned, target = plan.sampler.steps, plan.target_epsilon
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
