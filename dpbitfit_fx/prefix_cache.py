"""What lies before the first trainable, computed once for each record and kept in memory: `fit(cache_frozen_prefix=True)`."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console
from rich.progress import Progress
from torch import Tensor

from dpbitfit_fx.batching import PhysicalBatch, PhysicalBatches
from dpbitfit_fx.errors import CompileRefused, DataError
from dpbitfit_fx.lowering import MadeFrom

if TYPE_CHECKING:
    from dpbitfit_fx.compile import PrivateStep

__all__ = ["PrefixCache"]

_SHARE = 0.8  # of the memory that is free


class PrefixCache:
    """The frozen prefix of every record of a dataset, in the order of the dataset and in physical batches of fixed sizes.

    So what is kept is a function of the dataset, not of what a run draws, and a resumed run finds the same bits. PRIVATE:
    in memory only. Filled before the first sum, and again when a frozen tensor has changed since.

    Args:
        steps: one per bucket. batches: they load the records; a record has to be the same at every load.
    """

    def __init__(self, steps: Sequence[PrivateStep], batches: PhysicalBatches, show: bool = False) -> None:
        self.steps, self.batches, self.show = tuple(steps), batches, show
        self.bytes = 0
        self._rows: dict[int, tuple[bytes, list[Tensor]]] = {}
        self._dummies: list[list[Tensor]] = []
        self._made_from: MadeFrom | None = None

    def ready(self, guard: Callable[[PhysicalBatch, Callable[[], Any]], Any]) -> None:
        """Fills the cache, where it is empty or out of date; ``guard(batch, work)`` does the work and names a bad record."""
        frozen = [x for step in dict.fromkeys(self.steps) for x in self._frozen(step)]
        if self._made_from is not None and self._made_from.fresh(frozen):
            return
        made_from = MadeFrom(frozen)
        self.bytes, self._rows = 0, {}
        self._dummies = [self._computed(self.batches.assemble(b, [], [])) for b in range(len(self.steps))]
        self._dummies = [[x[0].clone() for x in values] for values in self._dummies]
        with Progress(console=Console(stderr=True), transient=True, disable=not self.show) as bar:
            task = bar.add_task("frozen prefix", total=len(self.batches.dataset))
            for batch in self.batches.split(range(len(self.batches.dataset)), bytes(32)):
                values = guard(batch, lambda batch=batch: self._computed(batch))  # type: ignore[misc]
                for at, (row, digest) in enumerate(zip(batch.rows, self._digests(batch), strict=True)):
                    kept = [x[at].clone() for x in values]
                    self.bytes += sum(x.nbytes for x in kept)
                    self._rows[row] = digest, kept
                bar.advance(task, len(batch.rows))
                if len(self._rows) == len(batch.rows):
                    self._check_room()
        self._made_from = made_from

    def of(self, batch: PhysicalBatch) -> list[Tensor]:
        """For a physical batch of this dataset's records: the tensors [B, ..] that ``PrivateStep.accumulate`` takes."""
        for row, digest in zip(batch.rows, self._digests(batch), strict=True):
            if self._rows[row][0] != digest:
                raise DataError(
                    f"Row {row} of the dataset is not the same at every load, and cache_frozen_prefix keeps what was computed "
                    "from it the first time. Leave cache_frozen_prefix off, or the random transform out."
                )
        dummy = self._dummies[batch.bucket]
        found = [self._rows[row][1] for row in batch.rows]
        found += [dummy] * (len(batch.sample_mask) - len(found))
        return [torch.stack(values) for values in zip(*found, strict=True)]

    def _computed(self, batch: PhysicalBatch) -> list[Tensor]:
        return list(self.steps[batch.bucket].frozen_prefix(batch.batch))

    def _frozen(self, step: PrivateStep) -> list[Tensor]:
        trained = set(step.trainable_names)
        return [x for name, x in step.joint.state.items() if name not in trained]

    def _digests(self, batch: PhysicalBatch) -> list[bytes]:
        """Of what the prefix reads of each real record."""
        step = self.steps[batch.bucket]
        leaves = step._leaves(batch.batch)
        read = [leaves[number].cpu().contiguous() for number in step._lowered.prefix_reads()]
        found = []
        for at in range(len(batch.rows)):
            digest = hashlib.blake2b(digest_size=16)
            for x in read:
                digest.update(x[at].reshape(-1).view(torch.uint8).numpy().tobytes())
            found.append(digest.digest())
        return found

    def _check_room(self) -> None:
        """Told by the first physical batch: a refusal beats a killed process."""
        wanted = self.bytes / len(self._rows) * len(self.batches.dataset)
        free = _free_bytes()
        if free is not None and wanted > _SHARE * free:
            raise CompileRefused(
                f"cache_frozen_prefix would keep {self.bytes / len(self._rows) / 1e3:.1f} kB for each of "
                f"{len(self.batches.dataset)} records, {wanted / 1e9:.1f} GB, and {free / 1e9:.1f} GB of memory are free. Leave "
                "it off, or shorten padded_lengths."
            )


def _free_bytes() -> int | None:
    """Memory that Linux would give without swapping; None elsewhere."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return None
