"""What the commands of `dpbitfit` share: options, where they write to, and lists of names. Torch-free."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from dpbitfit_fx.errors import DataError, PrivacyError

if TYPE_CHECKING:
    from dpbitfit_fx.data import TokenizedText

__all__ = [
    "ClippingKind",
    "EvalFile",
    "ExpectedBatchSize",
    "Labels",
    "LabelsFromData",
    "LedgerFile",
    "LedgerUser",
    "Overwrite",
    "ParallelBatches",
    "PhysicalBatchSize",
    "PriorFiles",
    "Resume",
    "TargetDelta",
    "Trainable",
    "TuningCovered",
    "busy",
    "clipping_of",
    "console",
    "names",
    "tokenised",
]

Labels = Annotated[str | None, typer.Option(help="The label set, separated by commas.")]
LabelsFromData = Annotated[
    bool, typer.Option("--labels-from-data", help="Take the label set from the data, and declare it public.")
]
TargetDelta = Annotated[float | None, typer.Option(help="Below 1/N; default at most 1/(10 N).")]
ExpectedBatchSize = Annotated[int, typer.Option(help="Expected records per Poisson draw.")]
ClippingKind = Annotated[str, typer.Option(help="automatic, flat, auto-v or per-layer.")]
Trainable = Annotated[
    str | None, typer.Option(help="Name patterns separated by commas; default: bias, and a new head's weight.")
]
PhysicalBatchSize = Annotated[int, typer.Option(help="Rows per forward and backward pass; memory only.")]
ParallelBatches = Annotated[int, typer.Option(help="Physical batches at once, in threads: faster where they are small.")]
EvalFile = Annotated[Path | None, typer.Option(help="PUBLIC records of the same form, for accuracy.")]
PriorFiles = Annotated[list[Path] | None, typer.Option(help="privacy.json of an earlier run on the same records.")]
LedgerFile = Annotated[Path | None, typer.Option(help="The dataset's ledger: a run beyond its budget does not start.")]
LedgerUser = Annotated[str | None, typer.Option(help="Whose name the ledger takes; default: the login name.")]
Resume = Annotated[bool, typer.Option(help="Continue an interrupted run found in the output folder.")]
Overwrite = Annotated[
    bool, typer.Option("--overwrite", help="Replace the results of a finished run, and count it in epsilon.")
]
TuningCovered = Annotated[
    bool, typer.Option("--tuning-covered", help="Declare that nothing was tuned on these records.")
]


def console(stderr: bool = False) -> Console:
    return Console(stderr=stderr, soft_wrap=True, highlight=False)


@contextmanager
def busy(what: str) -> Iterator[None]:
    with console(stderr=True).status(what):
        yield


def names(text: str | None, option: str) -> list[str] | None:
    """The names in `a,b,c`."""
    if text is None:
        return None
    found = [part.strip() for part in text.split(",")]
    if not all(found):
        raise DataError(f"{option} must be names separated by commas, none of them blank.")
    return found


def clipping_of(kind: str, max_grad_norm: float) -> Any:
    from dpbitfit_fx.passes.clipping import KINDS

    if kind not in KINDS:
        raise PrivacyError(f"--clipping must be one of {', '.join(KINDS)}; got '{kind}'.")
    return KINDS[kind](max_grad_norm=max_grad_norm)


def tokenised(table: Any, tokenizer: Any, longest: int, what: str) -> TokenizedText:
    from rich.progress import Progress

    from dpbitfit_fx.data import tokenize

    with Progress(console=console(stderr=True), transient=True) as progress:
        task = progress.add_task(what, total=len(table))
        return tokenize(table, tokenizer, longest, lambda count: progress.advance(task, count))
