"""`audit_onnx`: the same one-run audit of training from an export, in ONNX Runtime, without torch.

The canaries are records. What is seen of each step is how the parameters moved; a canary's direction is its own clipped
gradient at the parameters that the step began with, which the exported gradient graph computes for it alone.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from dpbitfit_fx.audit_bound import flip_coins, pick, split_guesses
from dpbitfit_fx.audit_report import AuditReport
from dpbitfit_fx.errors import DataError, PrivacyError
from dpbitfit_fx.ort_artifacts import phases_of, read_manifest
from dpbitfit_fx.ort_backends import Array, Backend, load_artifacts
from dpbitfit_fx.ort_records import Records
from dpbitfit_fx.ort_runner import OrtTrainer

__all__ = ["audit_onnx"]


def audit_onnx(
    artifacts: str | os.PathLike[str],
    data: Mapping[str, Any] | Sequence[Mapping[str, Any]],
    *,
    canaries: int | Sequence[Mapping[str, Any]] = 256,
    guesses: int | tuple[int, int] | None = None,
    confidence: float = 0.95,
    seed: int | None = None,
    progress: bool = True,
    **options: Any,
) -> AuditReport:
    """Trains from `artifacts` with canaries among the records, attacks what was released, and reports.

    Args:
        canaries: how many records are taken out of the data, at random; or a sequence of made-up ones.
        guesses, confidence, seed: as for `audit`.
        options: all else that `OrtTrainer` takes. N is that of the data and all canaries, in or out: it depends on no coin.

    Raises:
        ArtifactError, DataError, PrivacyError, SealBroken: before anything is trained.
    """
    began = time.monotonic()
    if options.get("output_dir"):
        raise PrivacyError(
            "audit_onnx does not take output_dir: the model that it trains holds canaries, and is not kept."
        )
    for_coins, for_canaries = (int(n) for n in np.random.SeedSequence(seed).generate_state(2))
    rows = _as_rows(data)
    made_up = not isinstance(canaries, int)
    if isinstance(canaries, int):
        chosen_rows, rest = pick(len(rows), canaries, for_canaries)
        theirs, others = [rows[i] for i in chosen_rows], [rows[i] for i in rest]
    else:
        theirs, others = list(canaries), rows
    chosen = split_guesses(guesses, len(theirs))
    coins = flip_coins(len(theirs), for_coins)
    absent = len(others) + np.flatnonzero(~coins)

    manifest = read_manifest(artifacts)
    if len(phases_of(manifest)) > 1:
        raise PrivacyError(
            "audit_onnx audits an export of one phase, and this run has several: the direction of a canary is another in each. "
            "Audit the run in PyTorch with `audit`, or an export of each phase's step."
        )
    own = Records(manifest, theirs, options.get("pad_values"), options.get("padded_lengths"))
    alone = _Alone(load_artifacts(artifacts, manifest), own)
    steps: list[Array] = []
    with OrtTrainer(artifacts, [*others, *theirs], **options) as trainer:
        trainer.run.records = _Present(trainer.records, absent)
        last = [trainer.flat()]

        def watch(info: Any) -> None:
            now = trainer.flat()
            steps.append(alone.directions(last[0]) @ (last[0] - now).astype(np.float64))
            last[0] = now

        trainer.train(callbacks=[watch], progress=progress)
        statement = trainer.statement()
    return AuditReport.judge(
        np.asarray(steps).sum(0),
        coins,
        chosen,
        statement,
        confidence=confidence,
        attack="white-box",
        score="sum",
        released="parameters",
        records=len(others),
        made_up=made_up,
        seconds=time.monotonic() - began,
    )


def _as_rows(data: Mapping[str, Any] | Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    if not isinstance(data, Mapping):
        return list(data)
    sizes = {len(column) for column in data.values()}
    if len(sizes) != 1:
        raise DataError("The entries of the data set have different numbers of records.")
    return [{name: column[row] for name, column in data.items()} for row in range(sizes.pop())]


class _Present(Records):
    """Records without the absent ones. Whoever trains counts them in N and draws them, and finds nobody there: the size of
    the data set is public, and must not tell of the coins."""

    def __init__(self, records: Records, absent: Array) -> None:
        super().__init__({"batch_inputs": records.inputs}, records.data, records.pad_values)
        self.lengths = records.lengths
        self.absent = {int(row) for row in absent}

    def micro_batches(
        self, rows: Array, size: int | Sequence[int], longest: bool = False
    ) -> Iterator[tuple[dict[str, Array], Array]]:
        there = [row for row in rows if int(row) not in self.absent]
        return super().micro_batches(np.asarray(there, np.int64), size, longest)


class _Alone:
    """The unit directions `[m, D]` of the canaries' own gradients at any parameters; of no use without the canaries."""

    def __init__(self, backend: Backend, records: Records) -> None:
        self.backend, self.records = backend, records
        self.nothing = np.zeros_like(backend.flat())

    def directions(self, theta: Array) -> Array:
        self.backend.set_flat(theta)
        found = []
        for row in range(len(self.records)):
            self.backend.begin()
            for batch, mask in self.records.micro_batches(np.asarray([row]), 1):
                self.backend.accumulate(batch, mask, self.nothing)
            gradient = self.backend.gradient_buffers().astype(np.float64)
            found.append(gradient / max(float(np.linalg.norm(gradient)), 1e-12))
        return np.stack(found)
