"""The result of an audit: numbers, sentences, and a picture of the scores. Torch-free."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from dpbitfit_fx.accounting import format_epsilon
from dpbitfit_fx.audit_bound import epsilon_lower_bound, largest_bound
from dpbitfit_fx.errors import ArtifactError
from dpbitfit_fx.files import atomic_write_text, describe_os_error, ensure_output_folder
from dpbitfit_fx.privacy_statement import PrivacyStatement

__all__ = ["AuditReport"]

SCHEMA: Final = "dpbitfit_fx.audit"
SCHEMA_VERSION: Final = 1
METHOD: Final = "Steinke, Nasr, Jagielski 2023, arXiv:2305.08846v1, Corollary 5.4"
CAVEAT: Final = (
    "An audit is a test, not a proof: it can show that a claim is false, never that it is true. A bound below the claimed "
    "epsilon says that this attack, on this run, saw no more."
)
OWN_RECORDS: Final = (
    "PRIVATE: the canaries were records of the dataset. How many were guessed right is a function of them that no noise "
    "protects: keep this report as you keep the records."
)
_BINS: Final = 24


@dataclass(frozen=True)
class AuditReport:
    """What an audit found. `epsilon_lower_bound`: refuted is every smaller epsilon at `delta`, with `confidence`;
    `largest_bound`: what it would be if all guesses were right; `epsilon`: what the run claims, earlier runs included.

    scores [m], coins [m]: of each canary, for further analysis; not in any file. made_up: no canary is a record of the
    dataset, so the report is as public as the run's results.
    """

    attack: str
    score: str
    released: str
    canaries: int
    included: int
    guesses_in: int
    guesses_out: int
    correct: int
    confidence: float
    epsilon_lower_bound: float
    largest_bound: float
    epsilon: float
    delta: float
    noise_multiplier: float
    sample_rate: float
    steps: int
    records: int
    made_up: bool
    insecure: bool
    graph_hash: str
    run_id: str
    backend: str
    seconds: float
    scores: npt.NDArray[np.float64] = field(repr=False, compare=False)
    coins: npt.NDArray[np.bool_] = field(repr=False, compare=False)

    @classmethod
    def judge(
        cls,
        scores: npt.NDArray[np.float64],
        coins: npt.NDArray[np.bool_],
        guesses: tuple[int, int],
        statement: PrivacyStatement,
        *,
        confidence: float,
        **about: Any,
    ) -> AuditReport:
        """Guesses (in, out) by the scores, compares them with the coins, and holds the run to its statement."""
        count, (k_in, k_out) = len(coins), guesses
        order = np.argsort(scores, kind="stable")
        right = int(coins[order[count - k_in :]].sum() + (~coins[order[:k_out]]).sum())
        return cls(
            canaries=count,
            included=int(coins.sum()),
            guesses_in=k_in,
            guesses_out=k_out,
            correct=right,
            confidence=confidence,
            epsilon_lower_bound=epsilon_lower_bound(count, k_in + k_out, right, statement.delta, confidence),
            largest_bound=largest_bound(count, k_in + k_out, statement.delta, confidence),
            epsilon=statement.epsilon,
            delta=statement.delta,
            noise_multiplier=statement.noise_multiplier,
            sample_rate=statement.sample_rate,
            steps=statement.steps,
            insecure=statement.any_insecure,
            graph_hash=statement.graph_hash,
            run_id=statement.run_id,
            backend=statement.backend,
            scores=scores,
            coins=coins,
            **about,
        )

    @property
    def guesses(self) -> int:
        return self.guesses_in + self.guesses_out

    @property
    def violated(self) -> bool:
        """The claim is refuted, at `confidence`."""
        return self.epsilon_lower_bound > self.epsilon

    @property
    def verdict(self) -> str:
        claimed = f"the claimed epsilon = {format_epsilon(self.epsilon)} at delta = {self.delta:g}"
        bound = f"{100 * self.confidence:g} % lower bound on epsilon: {self.epsilon_lower_bound:.3f}"
        if self.violated:
            return f"VIOLATION: {bound}, above {claimed}. The run leaked more than it says."
        if self.largest_bound <= self.epsilon:
            return (
                f"{bound}. An audit of this size could not have refuted {claimed}: with all {self.guesses} guesses right "
                f"it gives {self.largest_bound:.3f}. Ask for more canaries."
            )
        return f"{bound}, below {claimed}. No violation found."

    @property
    def caveats(self) -> list[str]:
        return [CAVEAT] + ([] if self.made_up else [OWN_RECORDS])

    def to_dict(self) -> dict[str, Any]:
        """The numbers as JSON values; no score and no coin of any canary."""
        held = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name not in ("scores", "coins")}
        more = {"violated": self.violated, "verdict": self.verdict, "caveats": self.caveats}
        return {"schema": SCHEMA, "schema_version": SCHEMA_VERSION, "method": METHOD, **held, **more}

    def to_json(self) -> str:
        """`to_dict` as indented text, ending in a newline."""
        return json.dumps(self.to_dict(), indent=2, allow_nan=False) + "\n"

    def summary(self) -> str:
        """For people: what was done, found, and is not said by it."""
        lines = [
            f"{self.attack} audit of {self.steps} private steps ({self.backend}, noise multiplier "
            f"{self.noise_multiplier:.4g}, sample rate {self.sample_rate:.4g}) on {self.records} records and "
            f"{self.canaries} canaries, {self.included} of them in",
            f"{self.guesses} guesses ({self.guesses_in} in, {self.guesses_out} out) by {self.score} of {self.released}: "
            f"{self.correct} right ({self.correct / self.guesses:.1%}; chance is 50 %)",
            self.verdict,
            *self.caveats,
        ]
        return "\n".join(lines) + "\n"

    # -- the picture --------------------------------------------------------------------------------------------------

    def _histograms(self) -> tuple[npt.NDArray[Any], npt.NDArray[Any], npt.NDArray[Any]]:
        edges = np.histogram_bin_edges(self.scores, _BINS)
        return edges, np.histogram(self.scores[self.coins], edges)[0], np.histogram(self.scores[~self.coins], edges)[0]

    def picture(self) -> str:
        """The scores of the canaries that were in (#) and out (.), and the two epsilons, in text."""
        edges, inside, outside = self._histograms()
        scale = 30 / max(1, int(inside.max()), int(outside.max()))
        rows = ["score       out .                          in #"]
        for low, there, absent in zip(edges[:-1], inside, outside, strict=True):
            rows.append(f"{low:>9.3g} {'.' * round(scale * absent):>31} {'#' * round(scale * there)}".rstrip())
        top = max(self.epsilon, self.largest_bound, 1e-9)
        for name, value in (
            ("claimed", self.epsilon),
            ("bound", self.epsilon_lower_bound),
            ("all right", self.largest_bound),
        ):
            rows.append(f"{name:>9} {'=' * round(50 * value / top)} {value:.3f}")
        return "\n".join(rows) + "\n"

    def write_picture(self, path: str | os.PathLike[str]) -> None:
        """The same as a PNG; needs matplotlib (`pip install 'dpbitfit_fx[plot]'`).

        Raises:
            ArtifactError: matplotlib is not installed, or the file cannot be written.
        """
        if importlib.util.find_spec("matplotlib") is None:
            raise ArtifactError(
                "The picture needs matplotlib, which is not installed: pip install 'dpbitfit_fx[plot]'."
            )
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        figure = Figure(figsize=(9, 3.6), layout="constrained")
        FigureCanvasAgg(figure)
        left, right = figure.subplots(1, 2)
        edges = self._histograms()[0]
        left.hist(
            [self.scores[~self.coins], self.scores[self.coins]],
            edges,
            label=["out", "in"],
            color=["#999999", "#c44e52"],
        )
        left.set_xlabel(f"{self.score} of {self.released}")
        left.set_ylabel("canaries")
        left.legend()
        names = ["claimed", f"{100 * self.confidence:g} % lower bound", "bound if all guesses were right"]
        values = [self.epsilon, self.epsilon_lower_bound, self.largest_bound]
        found = right.barh(names, values, color=["#4c72b0", "#c44e52" if self.violated else "#55a868", "#dddddd"])
        right.bar_label(found, fmt="%.2f", padding=3)
        right.invert_yaxis()
        right.margins(x=0.15)
        right.set_xlabel(f"epsilon at delta = {self.delta:g}")
        figure.suptitle("VIOLATION" if self.violated else "No violation found", fontsize=11)
        try:
            figure.savefig(path, dpi=150)
        except OSError as error:
            raise ArtifactError(describe_os_error(error, path, "write the picture")) from error

    def save(self, folder: str | os.PathLike[str]) -> Path:
        """Writes audit.json and audit.txt, and audit.png where matplotlib is installed; for the owner's eyes alone where
        a canary was a record of the dataset. Returns the folder.

        Raises:
            ArtifactError: it cannot be written.
        """
        target, mode = ensure_output_folder(folder), 0o644 if self.made_up else 0o600
        atomic_write_text(target / "audit.json", self.to_json(), mode=mode)
        atomic_write_text(target / "audit.txt", self.summary() + "\n" + self.picture(), mode=mode)
        if importlib.util.find_spec("matplotlib") is not None:
            self.write_picture(target / "audit.png")
            (target / "audit.png").chmod(mode)
        return target
