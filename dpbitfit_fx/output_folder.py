"""The folder that a private run leaves its results in: what other runs left there, and what a killed one did. Torch-free.

biases.safetensors, privacy.json, summary.md      of the run that finished
privacy-earlier-*.json, privacy-abandoned-*.json  of runs that it replaced, of runs that were given up
checkpoint/                                       PRIVATE, while a run is unfinished
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Final

from safetensors import SafetensorError, safe_open

from dpbitfit_fx.checkpoint import CheckpointStore
from dpbitfit_fx.errors import ArtifactError, CheckpointError, PrivacyError
from dpbitfit_fx.files import atomic_write_bytes, atomic_write_text, read_bytes
from dpbitfit_fx.privacy_statement import PrivacyStatement
from dpbitfit_fx.randomness import SecretKey
from dpbitfit_fx.run_statement import abandon, abandoned_name, statement_of_unfinished

__all__ = [
    "BIASES",
    "CHECKPOINT",
    "STATEMENT",
    "SUMMARY",
    "naming_statements",
    "settle",
    "statements_in",
    "write_statement",
]

BIASES: Final = "biases.safetensors"
STATEMENT: Final = "privacy.json"
SUMMARY: Final = "summary.md"
CHECKPOINT: Final = "checkpoint"
_STATEMENTS: Final = "privacy*.json"  # of the run that is finished, of those it replaced, of those given up


def settle(folder: Path, store: CheckpointStore, *, resume: bool, overwrite: bool) -> None:
    """Leaves the open store with an unfinished run that is to be continued, or with none.

    Raises:
        CheckpointError: an unfinished run is there and is neither to be continued nor given up.
        ArtifactError: a finished run is there, and is not to be replaced. Nothing was changed.
    """
    _remove_temporaries(folder, store)
    if store.exists:
        run_id = store.run_id
        if (folder / abandoned_name(run_id)).exists() or (
            not store.has_key and _covers(folder, statement_of_unfinished(store))
        ):
            # Killed while tidying up: what the run spent is written down. Any other run without a key stays unfinished.
            store.erase()
            store.open()
    if store.exists:
        if not resume and not overwrite:
            raise CheckpointError(
                f"{str(folder)!r} holds an unfinished run, and resume=False was asked for. Nothing was changed. Leave "
                f"resume=True to continue it, choose another output_dir, or pass overwrite=True to give it up: what "
                f"it has spent is then kept in the folder and counted in this run."
            )
        if resume:
            return
        abandon(store, folder)
        store.open()
        return
    finished = [name for name in (BIASES, STATEMENT) if (folder / name).exists()]
    if finished and not overwrite:
        raise ArtifactError(
            f"{str(folder)!r} already holds the result of a finished run ({', '.join(finished)}). Nothing was "
            f"changed. Choose another output_dir (if the records are the same, pass this folder's privacy.json as "
            f"prior=), or pass overwrite=True: the finished run is then counted in the new epsilon."
        )


def _covers(folder: Path, spent: PrivacyStatement) -> bool:
    """Whether the statement and the biases in the folder are this run's, and no older one's or an earlier end of it."""
    try:
        with safe_open(folder / BIASES, "np") as file:
            trained: str = file.metadata()["run_id"]
        stated = PrivacyStatement.load(folder / STATEMENT)
        return trained == spent.run_id == stated.run_id and spent.charged_steps <= stated.charged_steps
    except (OSError, KeyError, TypeError, SafetensorError, ArtifactError, PrivacyError):
        return False


def statements_in(folder: Path, store: CheckpointStore) -> dict[str, PrivacyStatement]:
    """What other runs have stated in the folder, by file name; that of the run to be continued is its own."""
    own = store.run_id if store.exists else None
    found = {path.name: PrivacyStatement.load(path) for path in sorted(folder.glob(_STATEMENTS))}
    # A run that went on after its result was written has stated itself twice: the later statement holds both.
    most = {s.run_id: s.charged_steps for s in sorted(found.values(), key=lambda s: s.charged_steps)}
    return {name: s for name, s in found.items() if s.run_id != own and s.charged_steps == most[s.run_id]}


@contextlib.contextmanager
def naming_statements(folder: Path | None, found: Mapping[str, PrivacyStatement]) -> Iterator[None]:
    try:
        yield
    except PrivacyError as error:
        if not found:
            raise
        raise PrivacyError(
            f"{error} Counted as earlier runs on these records: {', '.join(found)} in {str(folder)!r}. If the records "
            f"are others, choose another output_dir."
        ) from error


def write_statement(folder: Path, statement: PrivacyStatement) -> None:
    """privacy.json and summary.md; another run's privacy.json is kept beside them."""
    old = folder / STATEMENT
    if old.exists() and PrivacyStatement.load(old).run_id != statement.run_id:
        kept = read_bytes(old)
        atomic_write_bytes(folder / f"privacy-earlier-{hashlib.sha256(kept).hexdigest()[:12]}.json", kept)
    statement.save(old)
    atomic_write_text(folder / SUMMARY, statement.summary())


def _remove_temporaries(folder: Path, store: CheckpointStore) -> None:
    """What a killed process left half-written, or had not tidied up yet; the lock keeps everybody else from writing there.
    One may hold a key."""
    orphans = [] if store.exists else store.folder.glob("state-*.safetensors")
    for path in [*store.folder.glob(".*.tmp"), *orphans]:
        SecretKey.erase_file(path)
    for name in (BIASES, STATEMENT, SUMMARY, "privacy-*.json"):
        for path in folder.glob(f".{name}.*.tmp"):
            with contextlib.suppress(OSError):
                path.unlink()
