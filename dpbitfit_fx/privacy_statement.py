"""The privacy statement of a run, and privacy.json: what is guaranteed, for whom, under which assumptions.

Epsilon is always derived from the mechanisms listed beside it, never typed in: ``create`` computes it and ``load``
checks it. Torch-free: the PyTorch ``fit`` and the ONNX Runtime runner write the same file.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import math
import os
import platform
import re
import secrets
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, NoReturn

from dpbitfit_fx import accounting
from dpbitfit_fx.accounting import Prior, PriorRun, format_epsilon
from dpbitfit_fx.errors import PrivacyError
from dpbitfit_fx.files import atomic_write_text, json_digest, read_text
from dpbitfit_fx.passes.clipping import KINDS
from dpbitfit_fx.phases import PhaseRecord, joined_hash
from dpbitfit_fx.randomness import INSECURE_CAVEAT, numeric_caveats
from dpbitfit_fx.sampling import PoissonSampler

SCHEMA: Final = "dpbitfit_fx.privacy"
SCHEMA_VERSION: Final = 1
FILE_NAME: Final = "privacy.json"
PRIVACY_UNIT: Final = "one record"
_PHASE: Final = "/phase-"
_CHECKSUM: Final = "sha256"
_CLIPPINGS: Final = tuple(KINDS)
_PACKAGES: Final = (
    "dpbitfit_fx",
    "torch",
    "transformers",
    "dp-accounting",
    "numpy",
    "scipy",
    "cryptography",
    "safetensors",
    "onnx",
    "onnxruntime",
    "onnxruntime-training-cpu",
)


def library_versions() -> dict[str, str]:
    """Versions of Python and of the libraries installed here that a run may depend on; imports none of them."""
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def new_run_id() -> str:
    """A random name for a run (32 hex digits): says nothing about it, and lets composition count it once."""
    return secrets.token_hex(16)


@dataclass(frozen=True)
class PrivacyStatement:
    """What one private run guarantees, together with the runs before it.

    Guarantee described: (``epsilon``, ``delta``)-differential privacy when one record is added or removed, for
    everything the run released, composed with ``prior``, under the stated numeric caveats.

    Attributes:
        epsilon, delta: of this run and ``prior`` together. steps: logical steps taken; ``lost_steps`` are charged
        besides. sampler: ``PoissonSampler.to_dict()``; its ``steps`` are the planned ones.
        noise_multiplier: standard deviation of the noise over ``max_grad_norm * (1 + slack)``; ``max_grad_norm`` is the L2
        sensitivity R (per layer: ``sqrt(sum R_l^2)``), the slack stands in numeric_caveats. gamma: of automatic clipping, else
        None. expected_batch_size: the public denominator. dataset_size_assumed_public: N was taken from len(dataset).
        tuning_covered: whether epsilon covers the choice of hyper-parameters.
        public_declarations: what else was declared public and where it came from (label set, padded lengths, ...).
        graph_hash: SHA-256 of the sealed graph. num_trainable, num_parameters: counts of scalars.
        insecure: the noise came from a known seed: no guarantee at all.
        phases: empty, or the phases of the run, at least two, in order; in privacy.json only where there are any. Then
        epsilon composes them; steps, lost_steps and num_trainable are totals; sampler, sample_rate and
        expected_batch_size are the largest of any phase, so that whoever leaves the phases out counts too much rather
        than too little; max_grad_norm, clipping and gamma are the last phase's; graph_hash is that of all their hashes.

    Raises:
        PrivacyError: a value is missing, of the wrong type, not finite, or contradicts another.
    """

    epsilon: float
    delta: float
    sampler: dict[str, Any]
    sample_rate: float
    noise_multiplier: float
    max_grad_norm: float
    clipping: str
    gamma: float | None
    steps: int
    lost_steps: int
    expected_batch_size: float
    dataset_size: int
    dataset_size_assumed_public: bool
    tuning_covered: bool
    graph_hash: str
    num_trainable: int
    num_parameters: int
    public_declarations: dict[str, Any] = dataclasses.field(default_factory=dict)
    prior: tuple[PriorRun, ...] = ()
    insecure: bool = False
    backend: str = "pytorch"
    run_id: str = dataclasses.field(default_factory=new_run_id)
    numeric_caveats: tuple[str, ...] = ()
    library_versions: dict[str, str] = dataclasses.field(default_factory=library_versions)
    accountant: str = accounting.ACCOUNTANT
    accountant_version: str = dataclasses.field(default_factory=accounting.accountant_version)
    privacy_unit: str = PRIVACY_UNIT
    neighboring_relation: str = accounting.NEIGHBORING_RELATION
    phases: tuple[PhaseRecord, ...] = ()
    ledger: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        if not self.numeric_caveats:
            # A batch size that is no number is refused in its own words, below.
            size = self.expected_batch_size if _number(self.expected_batch_size) else 0.0
            object.__setattr__(self, "numeric_caveats", numeric_caveats(self.insecure, size))
        _validate(self)

    @classmethod
    def create(
        cls,
        sampler: PoissonSampler,
        *,
        noise_multiplier: float,
        delta: float,
        max_grad_norm: float,
        clipping: str,
        gamma: float | None,
        graph_hash: str,
        num_trainable: int,
        num_parameters: int,
        dataset_size_assumed_public: bool,
        steps: int | None = None,
        lost_steps: int = 0,
        prior: Prior | Iterable[Prior] = (),
        tuning_covered: bool = False,
        public_declarations: Mapping[str, Any] | None = None,
        insecure: bool = False,
        backend: str = "pytorch",
        run_id: str | None = None,
        phases: Sequence[PhaseRecord] = (),
        noise: str = "float",
    ) -> PrivacyStatement:
        """The statement of a run, its epsilon computed from the sampler, the noise and the steps (default: all
        planned).

        Args:
            clipping: "automatic", "flat", "auto-v" or "per-layer". backend: "pytorch" or "onnxruntime", say.
            prior: earlier runs on the same records (paths of privacy.json, statements, runs).
            run_id: keep it across a resume; default a new one.
            phases: of a run with several; ``sampler`` then has the largest sample_rate and all steps.
            noise: "float" or "grid": which numeric caveats hold.

        Raises:
            PrivacyError: an argument is unusable, or no finite epsilon exists.
        """
        runs = accounting.resolve_prior(prior)
        taken = sampler.steps if steps is None else steps
        parts = _mechanisms(sampler, taken + lost_steps, phases)
        value = accounting.epsilon_of_phases(parts, noise_multiplier, delta, runs)
        return cls(
            epsilon=value,
            delta=float(delta),
            sampler=sampler.to_dict(),
            sample_rate=sampler.sample_rate,
            noise_multiplier=float(noise_multiplier),
            max_grad_norm=float(max_grad_norm),
            clipping=clipping,
            gamma=gamma,
            steps=taken,
            lost_steps=lost_steps,
            expected_batch_size=sampler.expected_batch_size,
            dataset_size=sampler.dataset_size,
            dataset_size_assumed_public=dataset_size_assumed_public,
            tuning_covered=tuning_covered,
            graph_hash=graph_hash,
            num_trainable=num_trainable,
            num_parameters=num_parameters,
            public_declarations=dict(public_declarations or {}),
            prior=runs,
            insecure=insecure,
            backend=backend,
            run_id=run_id or new_run_id(),
            phases=tuple(phases),
            numeric_caveats=numeric_caveats(insecure, sampler.expected_batch_size, noise),
        )

    @property
    def charged_steps(self) -> int:
        """Steps that epsilon accounts for: taken and lost."""
        return self.steps + self.lost_steps

    @property
    def trainable_share(self) -> float:
        """Fraction of the model's parameters that was trained."""
        return self.num_trainable / self.num_parameters

    @property
    def any_insecure(self) -> bool:
        """True where this run or one before it drew its noise from a known seed."""
        return self.insecure or any(run.insecure for run in self.prior)

    def as_prior_runs(self) -> tuple[PriorRun, ...]:
        """This run and those before it, for a later run's ``prior``."""
        return (*self.prior, *self.own_runs())

    def own_runs(self) -> tuple[PriorRun, ...]:
        """This run's mechanisms, one for each phase, without the runs before it."""
        if not self.phases:
            own = PriorRun(self.run_id, self.sample_rate, self.noise_multiplier, self.charged_steps, self.insecure)
            return (own,)
        parts = [
            PriorRun(
                phase_run_id(self.run_id, index),
                phase.sample_rate,
                phase.noise_multiplier,
                phase.steps + phase.lost_steps,
                self.insecure,
            )
            for index, phase in enumerate(self.phases)
        ]
        return tuple(parts)

    def recompute_epsilon(self) -> float:
        """Epsilon by the accountant installed here, from the mechanisms alone."""
        parts = _mechanisms(PoissonSampler.from_dict(self.sampler), self.charged_steps, self.phases)
        return accounting.epsilon_of_phases(parts, self.noise_multiplier, self.delta, self.prior)

    def verify(self) -> None:
        """Recompute epsilon and compare.

        Raises:
            PrivacyError: the stated epsilon is lower than the mechanisms give, by more than rounding (one part in
                1000).
        """
        derived = self.recompute_epsilon()
        if self.epsilon < derived * (1 - 1e-3) - 1e-9:
            raise PrivacyError(
                f"The statement claims epsilon = {self.epsilon:.6g}, but its mechanisms give "
                f"{format_epsilon(derived)} at delta = {self.delta:g}: it was edited, or made by something else. Do "
                "not rely on it."
            )

    def to_dict(self) -> dict[str, Any]:
        """The statement as JSON values, the schema and its version first."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        fields["prior"] = [run.to_dict() for run in self.prior]
        fields["numeric_caveats"] = list(self.numeric_caveats)
        fields["trainable_share"] = self.trainable_share
        phases, ledger = [phase.to_dict() for phase in fields.pop("phases")], fields.pop("ledger")
        ordered = {name: fields.pop(name) for name in _ORDER} | ({"phases": phases} if phases else {})
        ordered |= {"ledger": ledger} if ledger is not None else {}
        if fields:
            raise PrivacyError(f"privacy.json has no place for {', '.join(fields)}.")
        return {"schema": SCHEMA, "schema_version": SCHEMA_VERSION, **ordered}

    def to_json(self) -> str:
        """The statement as indented JSON text, ending in a newline; its SHA-256 last, against damage, not against forgery."""
        content = self.to_dict()
        signed = {**content, _CHECKSUM: json_digest(json.loads(json.dumps(content, allow_nan=False)))}
        return json.dumps(signed, indent=2, ensure_ascii=False) + "\n"

    @classmethod
    def from_dict(cls, content: object, where: str = "The privacy statement") -> PrivacyStatement:
        """The statement from ``to_dict``.

        Raises:
            PrivacyError: another schema or version, a field missing, unknown, of the wrong type or out of range.
        """
        if not isinstance(content, dict) or content.get("schema") != SCHEMA:
            raise PrivacyError(f"{where} is not a privacy statement of dpbitfit_fx (schema {SCHEMA!r}).")
        version = content.get("schema_version")
        if type(version) is not int or version != SCHEMA_VERSION:
            raise PrivacyError(
                f"{where} has schema_version {version!r}; this dpbitfit_fx reads version {SCHEMA_VERSION}. Use the "
                "version that wrote it, or a newer one."
            )
        given = {name: value for name, value in content.items() if name not in ("schema", "schema_version")}
        missing = [name for name in _ORDER if name not in given]
        unknown = sorted(given.keys() - {*_ORDER, "phases", "ledger"})
        if missing or unknown:
            parts = [f"lacks {', '.join(missing)}"] if missing else []
            if unknown:
                parts.append(f"has unknown fields ({len(unknown)} of them)")
            raise PrivacyError(f"{where} {' and '.join(parts)}. It is damaged or was edited; restore the original.")
        share = given.pop("trainable_share")
        if not isinstance(given["prior"], list):
            raise PrivacyError(f"{where}: prior must be a list of runs.")
        phases = given.pop("phases", None)
        if phases is not None and not (isinstance(phases, list) and len(phases) > 1):
            raise PrivacyError(f"{where}: phases must be a list of at least two phases, or be left out.")
        if not isinstance(given["numeric_caveats"], list) or not given["numeric_caveats"]:
            raise PrivacyError(f"{where}: numeric_caveats must be a list of sentences, not empty.")
        try:
            given["prior"] = tuple(PriorRun.from_dict(run) for run in given["prior"])
            given["numeric_caveats"] = tuple(given["numeric_caveats"])
            statement = cls(**given, phases=tuple(PhaseRecord.from_dict(phase) for phase in phases or ()))
        except PrivacyError as error:
            raise PrivacyError(f"{where} cannot be used: {error}") from error
        if not _number(share) or not math.isclose(share, statement.trainable_share, rel_tol=1e-6):
            raise PrivacyError(f"{where}: trainable_share contradicts num_trainable and num_parameters.")
        return statement

    @classmethod
    def from_json(cls, text: str, where: str = "The privacy statement") -> PrivacyStatement:
        """The statement from JSON text; NaN, Infinity, repeated fields and a wrong checksum are refused. A text without a
        checksum is not: then only what contradicts itself is.

        Raises:
            PrivacyError: see ``from_dict``.
        """

        def refuse_constant(name: str) -> NoReturn:
            raise PrivacyError(
                f"{where} holds {name}, which is not a number that JSON allows. It is damaged or was edited."
            )

        def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
            content = dict(pairs)
            if len(content) != len(pairs):
                raise PrivacyError(f"{where} states a field twice. It is damaged or was edited.")
            return content

        try:
            content = json.loads(text, parse_constant=refuse_constant, object_pairs_hook=unique)
        except (ValueError, RecursionError):
            raise PrivacyError(f"{where} is not JSON. It is damaged; restore the original.") from None
        if isinstance(content, dict) and _CHECKSUM in content and content.pop(_CHECKSUM) != json_digest(content):
            raise PrivacyError(
                f"{where} does not have its own checksum. It is damaged or was edited; restore the original."
            )
        return cls.from_dict(content, where)

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write privacy.json atomically; a folder gets a file of that name in it. Returns the file's path.

        Raises:
            ArtifactError: it cannot be written; the previous file is unchanged.
        """
        target = Path(path)
        target = target / FILE_NAME if target.is_dir() else target
        atomic_write_text(target, self.to_json())
        return target

    @classmethod
    def load(cls, path: str | os.PathLike[str], verify: bool = False) -> PrivacyStatement:
        """Read privacy.json, or the one in a folder. Its mechanisms, not its epsilon, are what composition uses.

        Raises:
            ArtifactError: the file is absent or unreadable. PrivacyError: it is damaged, or ``verify`` finds epsilon
                too low.
        """
        target = Path(path)
        target = target / FILE_NAME if target.is_dir() else target
        statement = cls.from_json(read_text(target), where=f"The privacy statement {os.fspath(target)!r}")
        if verify:
            statement.verify()
        return statement

    def summary(self) -> str:
        """The statement for people, in Markdown. Epsilon is rounded up."""
        lines = ["# Privacy statement", ""]
        if self.any_insecure:
            which = "of this run" if self.insecure else "of an earlier run composed here"
            lines += [f"**NO PRIVACY GUARANTEE: the noise {which} came from a known seed, for tests.**", ""]
        lines += [
            f"**epsilon = {format_epsilon(self.epsilon)} at delta = {self.delta:g}**, protecting {self.privacy_unit} "
            f"({self.neighboring_relation}).",
            "",
        ]
        planned = self.sampler["steps"]
        taken = f"{self.steps} taken of {planned} planned"
        if self.lost_steps:
            taken += f", {self.lost_steps} more charged because they could not be replayed"
        gamma = "" if self.gamma is None else f", gamma {self.gamma:g}"
        assumed = "assumed public (taken from the dataset)" if self.dataset_size_assumed_public else "declared public"
        tuning = "covered by epsilon" if self.tuning_covered else "NOT covered by epsilon"
        prior = "none"
        if self.prior:
            charged = sum(run.steps for run in self.prior)
            runs = {run.run_id.split(_PHASE)[0] for run in self.prior}
            prior = f"{len(runs)} ({charged} steps in all), included in epsilon"
        rows = {
            "Sampling": f"Poisson, sample_rate {self.sample_rate:.6g}, expected batch size "
            f"{self.expected_batch_size:g}" + (" (the largest of the phases)" if self.phases else ""),
            "Steps": taken,
            "Noise multiplier": f"{self.noise_multiplier:.6g}",
            "Clipping": f"{self.clipping}, max_grad_norm {self.max_grad_norm:g}{gamma}"
            + (" (the last phase's)" if self.phases else ""),
            "Accountant": f"{self.accountant} {self.accountant_version}",
            "Records (N)": f"{self.dataset_size}, {assumed}",
            "Hyper-parameter tuning": tuning,
            "Earlier runs on these records": prior,
            "Trained": f"{self.num_trainable} of {self.num_parameters} parameters ({100 * self.trainable_share:.3g} %)",
            "Backend": self.backend,
            "Graph": self.graph_hash,
            "Run": self.run_id,
        }
        lines += [f"- {name}: {value}" for name, value in rows.items()]
        if self.ledger is not None:
            about = self.ledger
            total = "infinity" if about["epsilon"] is None else format_epsilon(about["epsilon"])
            lines.append(
                f"- Ledger of the dataset: epsilon = {total} at delta = {about['delta']:g} for all its runs, this one among "
                f"them; line {about['lines']} of {about['ledger_id']} is {about['sha256']}"
            )
        if self.phases:
            lines += ["", "Phases, one noise multiplier and one epsilon for all:", ""]
            lines += [f"{number}. {_phase_line(phase)}" for number, phase in enumerate(self.phases, 1)]
        if self.public_declarations:
            lines += ["", "Declared public:", ""]
            lines += [f"- {name}: {_brief(value)}" for name, value in self.public_declarations.items()]
        lines += ["", "Numeric caveats:", "", *[f"- {caveat}" for caveat in self.numeric_caveats]]
        versions = ", ".join(f"{name} {version}" for name, version in self.library_versions.items())
        lines += ["", f"Versions: {versions}.", ""]
        return "\n".join(lines)


_ORDER: Final = (
    "epsilon",
    "delta",
    "privacy_unit",
    "neighboring_relation",
    "sampler",
    "sample_rate",
    "noise_multiplier",
    "max_grad_norm",
    "clipping",
    "gamma",
    "steps",
    "lost_steps",
    "accountant",
    "accountant_version",
    "expected_batch_size",
    "dataset_size",
    "dataset_size_assumed_public",
    "tuning_covered",
    "insecure",
    "num_trainable",
    "num_parameters",
    "trainable_share",
    "public_declarations",
    "prior",
    "graph_hash",
    "backend",
    "run_id",
    "numeric_caveats",
    "library_versions",
)


def phase_run_id(run_id: str, index: int) -> str:
    """Names one phase of a run among earlier runs."""
    return f"{run_id}{_PHASE}{index + 1}"


def mechanism_ids(run_id: str, phases: int) -> list[str]:
    """How the accountant and the ledger name the mechanisms of a run of so many phases."""
    return [phase_run_id(run_id, index) for index in range(phases)] if phases > 1 else [run_id]


def base_id(run_id: str) -> str:
    """The run that a mechanism belongs to: `abc/phase-2` is of the run `abc`."""
    return run_id.split("/")[0]


def _mechanisms(
    sampler: PoissonSampler, charged: int, phases: Sequence[PhaseRecord]
) -> list[tuple[PoissonSampler, int]]:
    if not phases:
        return [(sampler, charged)]
    size = sampler.dataset_size
    return [(PoissonSampler(size, p.sample_rate, p.planned_steps), p.steps + p.lost_steps) for p in phases]


def _phase_line(phase: PhaseRecord) -> str:
    gamma = "" if phase.gamma is None else f", gamma {phase.gamma:g}"
    lost = f", {phase.lost_steps} more charged" if phase.lost_steps else ""
    return (
        f"trainable {_brief(phase.trainable)} ({phase.num_trainable} parameters): {phase.steps} steps of "
        f"{phase.planned_steps} planned{lost}, sample_rate {phase.sample_rate:.6g}, noise multiplier "
        f"{phase.noise_multiplier:.6g}, {phase.clipping} clipping, max_grad_norm {phase.max_grad_norm:g}{gamma}, graph "
        f"{phase.graph_hash}"
    )


def _brief(value: object) -> str:
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 300 else text[:297] + "..."


def _number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _json_problem(value: object, depth: int = 0) -> str | None:
    """Why ``value`` would not come back from JSON as it went in; None where it would."""
    if depth > 16:
        return "is nested too deeply"
    if value is None or isinstance(value, (str, bool)) or _whole(value):
        return None
    if isinstance(value, float):
        return None if math.isfinite(value) else "holds a number that is not finite"
    if isinstance(value, list):
        return next((why for item in value if (why := _json_problem(item, depth + 1))), None)
    if isinstance(value, dict):
        if not all(isinstance(key, str) for key in value):
            return "has a key that is not a string"
        return next((why for item in value.values() if (why := _json_problem(item, depth + 1))), None)
    return f"holds a {type(value).__name__}, which JSON cannot keep"


def _validate(statement: PrivacyStatement) -> None:
    def require(name: str, holds: bool, what: str) -> None:
        if not holds:
            raise PrivacyError(f"In a privacy statement {name} must be {what}; got {getattr(statement, name)!r:.80}.")

    s = statement
    for name in ("delta", "sample_rate", "noise_multiplier", "max_grad_norm", "expected_batch_size"):
        value = getattr(s, name)
        require(name, _number(value) and value > 0, "a finite number above 0")
    require("epsilon", _number(s.epsilon) and s.epsilon >= 0, "a finite number, 0 or more")
    for name in ("steps", "lost_steps"):
        value = getattr(s, name)
        require(name, _whole(value) and value >= 0, "a whole number, 0 or more")
    for name in ("dataset_size", "num_trainable", "num_parameters"):
        value = getattr(s, name)
        require(name, _whole(value) and value >= 1, "a whole number, 1 or more")
    for name in ("dataset_size_assumed_public", "tuning_covered", "insecure"):
        require(name, isinstance(getattr(s, name), bool), "true or false")
    for name in ("backend", "accountant", "accountant_version", "run_id"):
        value = getattr(s, name)
        require(name, isinstance(value, str) and bool(value.strip()), "a string, not empty")
    for name in ("public_declarations", "library_versions", "sampler"):
        value = getattr(s, name)
        require(name, isinstance(value, dict), "an object")
        problem = _json_problem(value)
        if problem:
            raise PrivacyError(f"In a privacy statement {name} must hold JSON values only, but it {problem}.")
    require("library_versions", all(isinstance(v, str) for v in s.library_versions.values()), "an object of strings")
    graph_hash_ok = isinstance(s.graph_hash, str) and re.fullmatch("[0-9a-f]{64}", s.graph_hash) is not None
    require("graph_hash", graph_hash_ok, "a SHA-256 in 64 lower-case hex digits")
    require("clipping", isinstance(s.clipping, str) and s.clipping in _CLIPPINGS, "one of " + ", ".join(_CLIPPINGS))
    if s.clipping == "automatic":
        require("gamma", _number(s.gamma) and (s.gamma or 0) > 0, "a finite number above 0 with automatic clipping")
    else:
        require("gamma", s.gamma is None, "null where the clipping is not automatic")
    require("privacy_unit", s.privacy_unit == PRIVACY_UNIT, repr(PRIVACY_UNIT))
    relation = accounting.NEIGHBORING_RELATION
    require("neighboring_relation", s.neighboring_relation == relation, repr(relation))
    require("num_trainable", s.num_trainable <= s.num_parameters, "at most num_parameters")
    accounting.check_target_delta(s.delta, s.dataset_size)
    sampler = PoissonSampler.from_dict(s.sampler)
    for name in ("sample_rate", "dataset_size", "expected_batch_size"):
        value = getattr(s, name)
        require(name, value == s.sampler[name], f"what the sampler says ({s.sampler[name]!r:.40})")
    require(
        "expected_batch_size", s.expected_batch_size == sampler.expected_batch_size, "sample_rate times dataset_size"
    )
    if not isinstance(s.prior, tuple) or not all(isinstance(run, PriorRun) for run in s.prior):
        raise PrivacyError("In a privacy statement prior must hold the earlier runs.")
    if any(run.run_id.split(_PHASE)[0] == s.run_id for run in s.prior):
        raise PrivacyError(
            "A privacy statement lists its own run among the earlier ones. A resumed run is not its own prior: leave "
            "it out."
        )
    accounting.resolve_prior(s.prior)
    _validate_phases(s)
    _validate_ledger(s.ledger)
    require("numeric_caveats", all(isinstance(c, str) and c for c in s.numeric_caveats), "sentences")
    if s.insecure and INSECURE_CAVEAT not in s.numeric_caveats:
        raise PrivacyError("The privacy statement of an insecure run must say so in numeric_caveats.")


def _validate_ledger(head: object) -> None:
    if head is None:
        return
    names = {"ledger_id", "lines", "sha256", "epsilon", "delta"}
    if not isinstance(head, dict) or head.keys() != names:
        raise PrivacyError(
            f"In a privacy statement ledger must be an object with the fields {', '.join(sorted(names))}."
        )
    sound = isinstance(head["ledger_id"], str) and isinstance(head["sha256"], str) and _whole(head["lines"])
    sound = sound and re.fullmatch("[0-9a-f]{64}", head["sha256"]) is not None and head["lines"] >= 1
    sound = sound and (head["epsilon"] is None or (_number(head["epsilon"]) and head["epsilon"] >= 0))
    if not sound or not _number(head["delta"]) or not 0 < head["delta"] < 1:
        raise PrivacyError("In a privacy statement ledger holds a value that is not usable.")


def _validate_phases(s: PrivacyStatement) -> None:
    """Each phase by itself, then against the totals and bounds that the statement gives for all of them."""
    if not s.phases:
        return
    for number, p in enumerate(s.phases, 1):
        numbers = (p.sample_rate, p.expected_batch_size, p.max_grad_norm)
        whole = (p.steps, p.lost_steps, p.planned_steps, p.num_trainable)
        sound = all(_number(x) and x > 0 for x in numbers) and all(_whole(x) and x >= 0 for x in whole)
        sound = sound and isinstance(p.clipping, str) and p.clipping in _CLIPPINGS
        sound = sound and (_number(p.gamma) and (p.gamma or 0) > 0 if p.clipping == "automatic" else p.gamma is None)
        sound = sound and isinstance(p.graph_hash, str) and re.fullmatch("[0-9a-f]{64}", p.graph_hash) is not None
        if not sound or not 1 <= p.num_trainable <= s.num_trainable:
            raise PrivacyError(f"Phase {number} of the privacy statement holds a value that is not usable.")
        if p.expected_batch_size != PoissonSampler(s.dataset_size, p.sample_rate, p.planned_steps).expected_batch_size:
            raise PrivacyError(f"Phase {number} of the privacy statement contradicts its sample_rate.")
    last = s.phases[-1]
    agree = {
        "steps": sum(p.steps for p in s.phases) == s.steps,
        "lost_steps": sum(p.lost_steps for p in s.phases) == s.lost_steps,
        "planned_steps": sum(p.planned_steps for p in s.phases) == s.sampler["steps"],
        "sample_rate": max(p.sample_rate for p in s.phases) == s.sample_rate,
        "noise_multiplier": all(p.noise_multiplier == s.noise_multiplier for p in s.phases),
        "clipping": (last.max_grad_norm, last.clipping, last.gamma) == (s.max_grad_norm, s.clipping, s.gamma),
        "graph_hash": joined_hash([p.graph_hash for p in s.phases]) == s.graph_hash,
    }
    for name, holds in agree.items():
        if not holds:
            raise PrivacyError(f"The phases of the privacy statement contradict it in {name}.")
