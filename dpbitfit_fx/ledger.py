"""The privacy budget of one dataset, shared by every run on its records: an append-only, hash-chained file. Torch-free.

One JSON object a line. The first names the dataset's budget; each of the others says what a run may spend (`reserve`), did
spend (`settle`), or had spent before the ledger knew of it (`enter`). A run is charged the most that any of its lines leaves
possible: its reservation while that is open, else what it settled. A line carries the SHA-256 of the line before it and
its own, and is exactly the canonical text of its object, so that an edited, removed, repeated or moved line is refused.

Guarantee: a reservation is on disk before the first noise that it pays for, and ε over **all** lines, composed from the
mechanisms by the accountant of `accounting.py`, stays within the budget for every reservation that was granted. Not seen
from here: a tail that was cut off (the head in privacy.json shows it, `check_holds`), all hashes made anew, or a run that
was not told of the ledger.
"""

from __future__ import annotations

import contextlib
import errno
import getpass
import hashlib
import json
import math
import os
import secrets
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, Final, NoReturn

from dpbitfit_fx.accounting import (
    PriorRun,
    check_target_delta,
    check_target_epsilon,
    enough_noise,
    epsilon_of_runs,
    format_epsilon,
    most_steps,
)
from dpbitfit_fx.errors import ArtifactError, PrivacyError
from dpbitfit_fx.files import atomic_write_bytes, describe_os_error, same_file, sync_folder, write_all
from dpbitfit_fx.privacy_statement import base_id

__all__ = ["Books", "Head", "Ledger", "RunBooks"]

FORMAT: Final = "dpbitfit_fx.ledger.v1"
_START: Final = "0" * 64
_KINDS: Final = ("reserve", "settle", "enter")
_COMMON: Final = frozenset({"kind", "who", "when", "previous", "sha256"})
_FIELDS: Final = {
    "dataset": _COMMON | {"format", "ledger_id", "name", "target_epsilon", "target_delta"},
    "repair": _COMMON | {"dropped_bytes", "dropped_sha256"},
    **dict.fromkeys(_KINDS, _COMMON | {"run_id", "backend", "graph_hash", "run_delta", "runs", "epsilon", "delta"}),
}
_PATIENCE_S: Final = 120.0


@dataclass(frozen=True)
class Head:
    """Where the ledger stood: goes into privacy.json, so that a tail cut off later is missed by somebody.

    epsilon: of all lines up to there at delta; None where it is not finite.
    """

    ledger_id: str
    lines: int
    sha256: str
    epsilon: float | None
    delta: float

    def to_dict(self) -> dict[str, Any]:
        return {f: getattr(self, f) for f in ("ledger_id", "lines", "sha256", "epsilon", "delta")}


@dataclass
class RunBooks:
    """What the ledger knows of one run. runs: its mechanisms (steps as last written). reserved: None when not open."""

    runs: tuple[PriorRun, ...]
    who: str
    when: str
    backend: str | None
    graph_hash: str | None
    reserved: tuple[int, ...] | None = None
    settled: tuple[int, ...] | None = None

    @property
    def charged(self) -> tuple[int, ...]:
        kept = [steps for steps in (self.reserved, self.settled) if steps is not None]
        return tuple(max(each) for each in zip(*kept, strict=True))


@dataclass
class Books:
    """A ledger that was read and found whole."""

    ledger_id: str
    name: str
    target_epsilon: float
    target_delta: float
    runs: dict[str, RunBooks] = field(default_factory=dict)
    hashes: list[str] = field(default_factory=list)
    stated: float | None = 0.0

    def charged(self, but: str | None = None) -> tuple[PriorRun, ...]:
        """Every mechanism with the steps it is charged; without those of the run `but`."""
        found = []
        for run_id, books in self.runs.items():
            if run_id != but:
                found += [_with_steps(run, steps) for run, steps in zip(books.runs, books.charged, strict=True)]
        return tuple(found)

    def epsilon(self) -> float:
        """Over all lines, at target_delta; may be infinite."""
        return epsilon_of_runs(self.charged(), self.target_delta)

    def head(self) -> Head:
        return Head(self.ledger_id, len(self.hashes), self.hashes[-1], self.stated, self.target_delta)

    def enter(self, entry: Mapping[str, Any]) -> None:
        """Books one line that is well-formed by itself.

        Raises:
            ValueError: it contradicts the lines before it.
        """
        run_id, runs = entry["run_id"], tuple(PriorRun.from_dict(run) for run in entry["runs"])
        steps = tuple(run.steps for run in runs)
        known = self.runs.get(run_id)
        if known is None:
            if entry["kind"] == "settle":
                raise ValueError("settles a run that was never reserved")
            books = RunBooks(runs, entry["who"], entry["when"], entry["backend"], entry["graph_hash"])
        else:
            if [_mechanism(run) for run in runs] != [_mechanism(run) for run in known.runs]:
                raise ValueError("describes a run by other mechanisms than before")
            settled = known.settled or (0,) * len(runs)
            if any(now < before for now, before in zip(steps, settled, strict=True)):
                raise ValueError("takes back steps that were settled")
            if entry["kind"] == "reserve" and known.reserved and any(map(int.__lt__, steps, known.reserved)):
                raise ValueError("takes back steps that were reserved")
            insecure = any(run.insecure for run in known.runs)
            runs = tuple(PriorRun(*_mechanism(r), r.steps, r.insecure or insecure) for r in runs)
            books = RunBooks(
                runs, known.who, entry["when"], known.backend, known.graph_hash, known.reserved, known.settled
            )
        if entry["kind"] == "reserve":
            books.reserved = steps
        else:
            books.settled = steps
            books.reserved = None if entry["kind"] == "settle" else books.reserved
        self.runs[run_id] = books
        self.stated = entry["epsilon"]


class Ledger:
    """The ledger file at `path`; every use reads it anew under its lock, and checks the whole chain.

    who: whose name the lines carry; default: the login name.
    """

    def __init__(self, path: str | os.PathLike[str], *, who: str | None = None) -> None:
        self.path = Path(path)
        self.who = _name(who) if who is not None else _login()

    # -- reading --------------------------------------------------------------------------------------------------

    def read(self) -> Books:
        """The whole ledger.

        Raises:
            ArtifactError: it cannot be read. PrivacyError: it is no ledger, was changed, or its last line is torn.
        """
        with self._locked(write=False) as descriptor:
            return self._books(_contents(descriptor))

    def check_holds(self, head: Mapping[str, Any], where: str) -> None:
        """That the ledger still has the line that `head` (of a privacy.json or a checkpoint) names.

        Raises:
            PrivacyError: it has not: its tail was cut off, or it was replaced. Another ledger's head says nothing.
        """
        books = self.read()
        if head.get("ledger_id") != books.ledger_id:
            return
        lines = head.get("lines")
        if not isinstance(lines, int) or books.hashes[lines - 1 : lines] != [head.get("sha256")]:
            raise PrivacyError(
                f"The ledger {str(self.path)!r} has lost lines: {where} saw line {lines} in it, which is gone or is another "
                "now. Its total is too low. Restore the ledger from a backup; nothing was started."
            )

    # -- writing --------------------------------------------------------------------------------------------------

    @classmethod
    def create(
        cls,
        path: str | os.PathLike[str],
        *,
        target_epsilon: float,
        target_delta: float,
        name: str = "",
        who: str | None = None,
    ) -> Ledger:
        """A new ledger with this budget for the dataset called `name`.

        Raises:
            PrivacyError: the budget is unusable. ArtifactError: there is a file already, or it cannot be written.
        """
        ledger = cls(path, who=who)
        budget = {
            "target_epsilon": check_target_epsilon(target_epsilon),
            "target_delta": check_target_delta(target_delta, 1),
        }
        about = {"format": FORMAT, "ledger_id": secrets.token_hex(16), "name": _name(name) if name else ""}
        line, _ = _line({"kind": "dataset", **about, **budget, **ledger._signature()}, _START)
        try:
            descriptor = os.open(ledger.path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o664)
            try:
                write_all(descriptor, line)
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
        except FileExistsError:
            raise ArtifactError(
                f"{str(ledger.path)!r} exists already, and a ledger is never replaced. Nothing was changed."
            ) from None
        except OSError as error:
            raise ArtifactError(describe_os_error(error, ledger.path)) from error
        sync_folder(ledger.path.parent)
        return ledger

    def check(
        self, runs: Sequence[PriorRun], *, dataset_size: int, run_delta: float, prior: Sequence[PriorRun] = ()
    ) -> None:
        """Whether `reserve` would grant this now. Writes nothing.

        Raises:
            PrivacyError: it would not.
        """
        self._grant(self.read(), runs, dataset_size, run_delta, prior, None, None)

    def reserve(
        self,
        runs: Sequence[PriorRun],
        *,
        dataset_size: int,
        run_delta: float,
        prior: Sequence[PriorRun] = (),
        backend: str | None = None,
        graph_hash: str | None = None,
    ) -> Head:
        """Charges the dataset with all that one run may spend; on disk when this returns. Only then may it begin.

        Args:
            runs: the run's mechanisms with the most steps that each may take. Reserving again raises it, never lowers.
            dataset_size, run_delta: the run's, for checks and advice. prior: earlier runs that the run counts in its own
                ε; those that the ledger does not know, or knows with fewer steps, are entered in it first.

        Raises:
            PrivacyError: the budget does not allow it (with what would fit), or the ledger is damaged; nothing was written.
            ArtifactError: it cannot be written.
        """
        with self._locked(write=True) as descriptor:
            before = self._books(_contents(descriptor))
            books, lines = self._grant(before, runs, dataset_size, run_delta, prior, backend, graph_hash)
            self._append(descriptor, lines)
            return books.head()

    def settle(self, runs: Sequence[PriorRun], *, run_delta: float | None = None) -> Head:
        """What a run has really spent, lost steps included, in place of its reservation; never less than settled before.

        Raises:
            PrivacyError: the ledger does not know the run, or is damaged. ArtifactError: it cannot be written.
        """
        run_id = base_id(runs[0].run_id)
        with self._locked(write=True) as descriptor:
            books = self._books(_contents(descriptor))
            known = books.runs.get(run_id)
            if known is None:
                raise PrivacyError(
                    f"The ledger {str(self.path)!r} does not know the run {run_id}. If it was on these records, enter it: "
                    "dpbitfit ledger enter LEDGER PRIVACY_JSON."
                )
            self._check_same(known, runs)
            before = known.settled or (0,) * len(known.runs)
            spent = [_with_steps(run, max(run.steps, least)) for run, least in zip(runs, before, strict=True)]
            if known.reserved is not None or tuple(run.steps for run in spent) != before:
                about = {"backend": known.backend, "graph_hash": known.graph_hash, "run_delta": run_delta}
                self._append(descriptor, [self._book(books, "settle", spent, about)])
            return books.head()

    def enter(self, runs: Sequence[PriorRun], *, run_delta: float | None = None) -> Head:
        """Counts runs that were made without the ledger. They are spent, so this is never refused for the budget.

        Raises:
            PrivacyError: they contradict what the ledger knows, or it is damaged. ArtifactError: it cannot be written.
        """
        with self._locked(write=True) as descriptor:
            books = self._books(_contents(descriptor))
            self._append(descriptor, self._entered(books, runs, run_delta))
            return books.head()

    def repair(self) -> int:
        """Drops a torn last line, after a copy of the whole file was put beside it; returns how many bytes were dropped.

        A line is torn where its writer was stopped, before it could begin to spend; or where the file lost its end. Whoever
        repairs has made sure that it was the former.

        Raises:
            PrivacyError: the ledger is damaged otherwise, or not at all.
        """
        with self._locked(write=True) as descriptor:
            data = _contents(descriptor)
            whole = data[: data.rfind(b"\n") + 1]
            torn = data[len(whole) :]
            if not torn or not whole:
                raise PrivacyError(f"The ledger {str(self.path)!r} has no torn last line to drop. Nothing was changed.")
            books = self._books(whole)
            digest = hashlib.sha256(torn).hexdigest()
            atomic_write_bytes(self.path.with_name(f"{self.path.name}.torn-{digest[:12]}"), data)
            try:
                os.ftruncate(descriptor, len(whole))
                os.fsync(descriptor)
            except OSError as error:
                raise ArtifactError(describe_os_error(error, self.path)) from error
            entry = {"kind": "repair", "dropped_bytes": len(torn), "dropped_sha256": digest, **self._signature()}
            self._append(descriptor, [_line(entry, books.hashes[-1])[0]])
            return len(torn)

    # -- inside ---------------------------------------------------------------------------------------------------

    def _grant(
        self,
        books: Books,
        runs: Sequence[PriorRun],
        dataset_size: int,
        run_delta: float,
        prior: Sequence[PriorRun],
        backend: str | None,
        graph_hash: str | None,
    ) -> tuple[Books, list[bytes]]:
        """The books after the reservation, and the lines that make it so: none where all of it is paid already."""
        check_target_delta(books.target_delta, dataset_size)
        run_id = base_id(runs[0].run_id)
        lines = self._entered(books, [run for run in prior if base_id(run.run_id) != run_id], None)
        known = books.runs.get(run_id)
        asked = list(runs)
        if known is not None:
            self._check_same(known, runs)
            charged = known.charged
            asked = [_with_steps(run, max(run.steps, least)) for run, least in zip(runs, charged, strict=True)]
            # A settled run that asks for no more than it settled has nothing left to spend; an open one holds it already.
            if tuple(run.steps for run in asked) == charged:
                return books, lines
        others = books.charged(but=run_id)
        whole = epsilon_of_runs([*others, *asked], books.target_delta)
        if whole > books.target_epsilon:
            raise PrivacyError(_refusal(self.path, books, others, asked, whole, run_delta, prior, known))
        about = {"backend": backend, "graph_hash": graph_hash, "run_delta": float(run_delta)}
        return books, [*lines, self._book(books, "reserve", asked, about)]

    def _entered(self, books: Books, runs: Sequence[PriorRun], run_delta: float | None) -> list[bytes]:
        """Lines for the runs that the books do not know, or know with fewer steps."""
        grouped: dict[str, list[PriorRun]] = {}
        for run in runs:
            grouped.setdefault(base_id(run.run_id), []).append(run)
        lines = []
        for run_id, parts in grouped.items():
            known = books.runs.get(run_id)
            if known is not None:
                self._check_same(known, parts)
                settled = known.settled or (0,) * len(parts)
                if all(run.steps <= least for run, least in zip(parts, known.charged, strict=True)):
                    continue
                parts = [_with_steps(run, max(run.steps, least)) for run, least in zip(parts, settled, strict=True)]
            about = {"backend": None, "graph_hash": None, "run_delta": run_delta}
            lines.append(self._book(books, "enter", parts, about))
        return lines

    def _book(self, books: Books, kind: str, runs: Sequence[PriorRun], about: Mapping[str, Any]) -> bytes:
        """The next line, which `books` then holds."""
        run_id = base_id(runs[0].run_id)
        entry = {"kind": kind, "run_id": run_id, "runs": [run.to_dict() for run in runs], **about, **self._signature()}
        books.enter({**entry, "epsilon": None})
        epsilon = books.epsilon()
        books.stated = entry["epsilon"] = epsilon if math.isfinite(epsilon) else None
        line, digest = _line({**entry, "delta": books.target_delta}, books.hashes[-1])
        books.hashes.append(digest)
        return line

    def _check_same(self, known: RunBooks, runs: Sequence[PriorRun]) -> None:
        if [_mechanism(run) for run in known.runs] != [_mechanism(run) for run in runs]:
            raise PrivacyError(
                f"The ledger {str(self.path)!r} knows the run {base_id(runs[0].run_id)} by other mechanisms (phases, sample "
                "rate or noise) than it is given now. A run keeps them for life: continue it under its own plan, or start "
                "another."
            )

    def _signature(self) -> dict[str, str]:
        return {"who": self.who, "when": datetime.now(timezone.utc).isoformat(timespec="seconds")}

    def _books(self, data: bytes) -> Books:
        where = f"The ledger {str(self.path)!r}"
        *lines, torn = data.split(b"\n")
        if not lines:
            raise PrivacyError(
                f"{where} is no ledger: it holds no complete line. If making it was interrupted just now, delete it and run "
                "`dpbitfit ledger init` again; else restore it."
            )
        books: Books | None = None
        previous = _START
        for number, line in enumerate(lines, 1):
            try:
                entry = _parse(line)
                if entry["previous"] != previous:
                    raise ValueError("does not follow the line before it")
                if books is None:
                    books = _opened(entry)
                elif entry["kind"] == "dataset":
                    raise ValueError("opens the ledger once more")
                elif entry["kind"] != "repair":
                    if entry["delta"] != books.target_delta:
                        raise ValueError("states another delta than the ledger's")
                    books.enter(entry)
            except (ValueError, PrivacyError) as error:
                raise PrivacyError(
                    f"{where} was changed: its line {number} {str(error) or 'is damaged'}. Nothing in it can be relied on, so no "
                    "run may spend from it. Restore it from a backup."
                ) from None
            previous = entry["sha256"]
            books.hashes.append(previous)
        assert books is not None
        if torn:
            raise PrivacyError(
                f"The last line of the ledger {str(self.path)!r} is torn ({len(torn)} bytes without an end): its writer was "
                "stopped, and had not begun to spend; or the file has lost its end. If you know that it was the former, run "
                "`dpbitfit ledger repair`, which keeps a copy and drops that line; else restore the ledger."
            )
        return books

    def _append(self, descriptor: int, lines: Sequence[bytes]) -> None:
        """Writes and syncs; a write that fails is taken back."""
        if not lines:
            return
        size = os.fstat(descriptor).st_size
        try:
            write_all(descriptor, b"".join(lines))
            os.fsync(descriptor)
        except OSError as error:
            with contextlib.suppress(OSError):
                os.ftruncate(descriptor, size)
                os.fsync(descriptor)
            raise ArtifactError(
                describe_os_error(error, self.path)
                + " The ledger is as it was, and nothing was spent on the strength of it."
            ) from error

    @contextlib.contextmanager
    def _locked(self, *, write: bool) -> Iterator[int]:
        """The open file, under flock: exclusive for writers. Waits for others, for a while."""
        try:
            import fcntl
        except ImportError:
            raise PrivacyError(
                "A ledger needs file locks (flock), which this system does not have: two runs at once could spend the same "
                "budget. Use it on Linux or macOS, or compose the runs with prior=."
            ) from None
        deadline = time.monotonic() + _PATIENCE_S
        while True:
            try:
                descriptor = os.open(self.path, os.O_RDWR | os.O_APPEND if write else os.O_RDONLY)
            except FileNotFoundError:
                raise ArtifactError(
                    f"There is no ledger {str(self.path)!r}. Make one: dpbitfit ledger init {str(self.path)!r} "
                    "--target-epsilon 8 --target-delta 1e-6."
                ) from None
            except OSError as error:
                raise ArtifactError(describe_os_error(error, self.path, "open")) from error
            try:
                try:
                    fcntl.flock(descriptor, (fcntl.LOCK_EX if write else fcntl.LOCK_SH) | fcntl.LOCK_NB)
                except OSError as error:
                    if error.errno not in (errno.EWOULDBLOCK, errno.EAGAIN, errno.EACCES, errno.EINTR):
                        raise PrivacyError(
                            f"The file system of {str(self.path)!r} does not lock files ({error.strerror}), so two runs at "
                            "once could spend the same budget. Keep the ledger on a local disk, or on one that has flock."
                        ) from error
                    if time.monotonic() > deadline:
                        raise PrivacyError(
                            f"Another process has held the ledger {str(self.path)!r} for {_PATIENCE_S:g} s. Nothing was "
                            "started. Try again, or find that process."
                        ) from None
                else:
                    if same_file(descriptor, self.path):  # else it was replaced while we waited
                        yield descriptor
                        return
            finally:
                os.close(descriptor)
            time.sleep(0.02)


def _mechanism(run: PriorRun) -> tuple[str, float, float]:
    return run.run_id, run.sample_rate, run.noise_multiplier


def _with_steps(run: PriorRun, steps: int) -> PriorRun:
    return PriorRun(*_mechanism(run), steps, run.insecure)


def _contents(descriptor: int) -> bytes:
    try:
        os.lseek(descriptor, 0, os.SEEK_SET)
        parts = []
        while part := os.read(descriptor, 1 << 20):
            parts.append(part)
    except OSError as error:
        raise ArtifactError(describe_os_error(error, "the ledger", "read")) from error
    return b"".join(parts)


def _canonical(entry: Mapping[str, Any]) -> bytes:
    return json.dumps(entry, sort_keys=True, separators=(",", ":"), allow_nan=False, ensure_ascii=True).encode()


def _line(entry: Mapping[str, Any], previous: str) -> tuple[bytes, str]:
    """The line, and its hash."""
    chained = {**entry, "previous": previous}
    digest = hashlib.sha256(_canonical(chained)).hexdigest()
    return _canonical({**chained, "sha256": digest}) + b"\n", digest


def _parse(line: bytes) -> dict[str, Any]:
    """One line, checked by itself.

    Raises:
        ValueError, PrivacyError: it is not what this version writes, or its hash is not its own.
    """

    def refuse(name: str) -> NoReturn:
        raise ValueError(f"holds {name}")

    try:
        entry = json.loads(line, parse_constant=refuse)
    except (ValueError, RecursionError):
        raise ValueError("is not the JSON of a ledger line") from None
    if not isinstance(entry, dict) or entry.get("kind") not in _FIELDS or entry.keys() != _FIELDS[entry["kind"]]:
        raise ValueError("is not a line of a ledger that this version reads")
    rest = {name: value for name, value in entry.items() if name != "sha256"}
    if entry["sha256"] != hashlib.sha256(_canonical(rest)).hexdigest() or _canonical(entry) != line:
        raise ValueError("does not have its own hash")
    if not all(isinstance(entry[name], str) for name in ("who", "when", "previous")):
        raise ValueError("does not say who wrote it, and when")
    if entry["kind"] in _KINDS:
        runs, run_id = entry["runs"], entry["run_id"]
        if not isinstance(run_id, str) or not isinstance(runs, list) or not runs:
            raise ValueError("names no run")
        if any(base_id(PriorRun.from_dict(run).run_id) != run_id for run in runs):
            raise ValueError("mixes runs")
        if not all(entry[name] is None or isinstance(entry[name], str) for name in ("backend", "graph_hash")):
            raise ValueError("names no graph")
        if not all(entry[name] is None or _number(entry[name]) for name in ("epsilon", "run_delta")):
            raise ValueError("states no epsilon")
    return entry


def _opened(entry: Mapping[str, Any]) -> Books:
    if entry["kind"] != "dataset" or entry["format"] != FORMAT:
        raise ValueError(f"does not open a ledger of the format {FORMAT}")
    if not all(isinstance(entry[name], str) for name in ("ledger_id", "name")):
        raise ValueError("does not name the dataset")
    budget = check_target_epsilon(entry["target_epsilon"]), check_target_delta(entry["target_delta"], 1)
    return Books(entry["ledger_id"], entry["name"], *budget)


def _number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value < math.inf


def _name(text: str) -> str:
    if not isinstance(text, str) or not text.strip() or not text.isprintable() or len(text) > 200:
        raise PrivacyError("A name in a ledger is one line of at most 200 printable characters.")
    return text.strip()


def _login() -> str:
    try:
        return _name(getpass.getuser())
    except (OSError, KeyError, ImportError, PrivacyError):  # no such user in this container
        return f"uid {os.getuid()}" if hasattr(os, "getuid") else "unknown"


def _refusal(
    path: Path,
    books: Books,
    others: Sequence[PriorRun],
    asked: Sequence[PriorRun],
    whole: float,
    run_delta: float,
    prior: Iterable[PriorRun],
    known: RunBooks | None,
) -> str:
    """Why a reservation was not granted, and what would be."""
    target, delta = books.target_epsilon, books.target_delta
    spent = epsilon_of_runs(others, delta)
    steps, sigmas = sum(run.steps for run in asked), {run.noise_multiplier for run in asked}
    text = (
        f"The budget of the ledger {str(path)!r} does not allow this run. All other runs on these records are charged "
        f"epsilon = {format_epsilon(spent)} of {target:g} at delta = {delta:g}; with up to {steps} steps at noise multiplier "
        f"{', '.join(f'{sigma:.6g}' for sigma in sorted(sigmas))} it would be {format_epsilon(whole)}."
    )
    if spent >= target:
        return (
            f"{text} Nothing is left: train on other records, or raise the budget in a new ledger. Nothing was spent."
        )
    fits = []
    sigma = None if known is not None else enough_noise(asked, others, target, delta)
    if sigma is not None:
        sigma = math.ceil(sigma * 1e4) / 1e4
        own = [PriorRun(run.run_id, run.sample_rate, sigma, run.steps) for run in asked]
        rounded = math.floor(epsilon_of_runs([*prior, *own], run_delta) * 1e3) / 1e3
        fits.append(f"noise_multiplier={sigma:.6g}")
        fits += [f"target_epsilon={rounded:g} (at its delta, {run_delta:g})"] if rounded > 0 else []
    if len(asked) == 1:
        low = most_steps(asked[0], others, target, delta)
        fits.append(f"{low} steps at this noise" if low else "not one step at this noise")
    return f"{text} What would fit: {'; or '.join(fits) or 'nothing that was tried'}. Nothing was spent."
