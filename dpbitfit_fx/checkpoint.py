"""Checkpoints from which a killed private run continues, neither spending nor forgetting budget.

A checkpoint folder is private: it holds the secret key. What is in it, each file of mode 0600:

- `checkpoint.json`: the plan's fingerprint, the step, the charged steps, the optimizer's scalars; the commit point. It
  carries its own SHA-256 and the state's, so that a damaged one is never taken for another plan or step;
- `state-<step>-<hash>.safetensors`: the trainables and the optimizer's tensors, named by `checkpoint.json`. Its name tells
  its content, so that no state can be written over the one that is committed;
- `key-<id>.json`: the secret key of the draws and the noise;
- `journal.jsonl`: one line per step, forced to disk **before** that step's noise may be released: which key, and a
  keyed digest of the clipped sum. A resumed run that recomputes the same clipped sum bit for bit releases the very same
  noisy value again, which costs nothing. Any other case is charged as a lost step and redrawn under a new key. Each line
  has a checksum, and the steps have no gap: a damaged journal does not tell what was released, so all is charged then. Only
  a cut end cannot be told from lines that were never written.

No pickle: tensors go to safetensors, everything else to JSON. `fit` and the runner without torch share this file.
"""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import safetensors

from dpbitfit_fx.arrays import is_numpy, is_tensor, own_copy, pack, raw_bytes, unpack
from dpbitfit_fx.errors import ArtifactError, CheckpointError, PrivacyError
from dpbitfit_fx.files import (
    atomic_write_bytes,
    atomic_write_text,
    describe_os_error,
    ensure_output_folder,
    json_digest,
    same_file,
)
from dpbitfit_fx.randomness import SecretKey, stream

if TYPE_CHECKING:
    import torch

__all__ = ["CheckpointStore", "JournalEntry", "SavedState", "decode", "encode", "key_id", "sum_digest"]

FORMAT = "dpbitfit_fx.checkpoint.v4"
_PRIVATE = 0o600


# -- nested state without pickle --------------------------------------------------------------------------------------


def encode(value: Any, tensors: dict[str, Any], name: str, numpy: bool = False) -> Any:
    """`value` as JSON, its tensors put into `tensors` under names that begin with `name`.

    Dictionaries (any simple keys), lists, tuples, tensors (numpy: arrays in their place), numbers, strings, booleans and
    None survive exactly.

    Raises:
        CheckpointError: anything else is in there.
    """
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, float):
        return {"float": value.hex()}
    if is_numpy(value) if numpy else is_tensor(value):
        # A copy: safetensors refuses views that share memory, and the optimizer writes in place.
        tensors[name] = own_copy(value)
        return {"tensor": name}
    if isinstance(value, Mapping):
        pairs = value.items()
        items = [[encode(k, tensors, name), encode(child, tensors, f"{name}.{k}", numpy)] for k, child in pairs]
        return {"dict": items}
    if isinstance(value, (list, tuple)):
        kind = "tuple" if isinstance(value, tuple) else "list"
        return {kind: [encode(child, tensors, f"{name}.{index}", numpy) for index, child in enumerate(value)]}
    raise CheckpointError(
        f"The optimizer's state holds a {type(value).__name__} ('{name}'), which a checkpoint cannot store without "
        f"pickle. Use an optimizer whose state_dict holds tensors, numbers, strings, lists and dictionaries, or run "
        f"without output_dir and save the result yourself."
    )


def decode(value: Any, tensors: Mapping[str, torch.Tensor]) -> Any:
    """The inverse of `encode`."""
    if not isinstance(value, dict):
        return value
    ((kind, content),) = value.items()
    if kind == "float":
        return float.fromhex(content)
    if kind == "tensor":
        return tensors[content]
    if kind == "dict":
        return {decode(key, tensors): decode(child, tensors) for key, child in content}
    children = [decode(child, tensors) for child in content]
    return tuple(children) if kind == "tuple" else children


# -- records ----------------------------------------------------------------------------------------------------------


def key_id(key: SecretKey) -> str:
    """A public name of a key: a stream of its own, so that it tells nothing of the noise."""
    return stream(key, "key id", 0).bytes(8).hex()


def sum_digest(key: SecretKey, step: int, accumulator: Any) -> str:
    """A keyed digest of the clipped sum of `step`: equal only where the sums are, unreadable without the key."""
    return hmac.new(stream(key, "journal", step).bytes(32), raw_bytes(accumulator), hashlib.sha256).hexdigest()


@dataclass(frozen=True)
class JournalEntry:
    """`step`: about to be released under the key named `key`; `digest`: of its clipped sum."""

    step: int
    key: str
    digest: str


@dataclass(frozen=True)
class SavedState:
    """Everything a run needs to go on at `step` (number of steps done).

    mechanism: what ε depends on; another mechanism cannot be continued. fingerprint: what a bit-for-bit replay depends
    on. charged_steps: steps lost, and paid for, before, in each phase. optimizer: of the phase that takes `step`.
    average: mean of `averaged` iterates, where the run keeps one.
    """

    step: int
    charged_steps: list[int]
    mechanism: dict[str, Any]
    fingerprint: dict[str, Any]
    trainables: dict[str, Any]
    optimizer: dict[str, Any]
    history: list[dict[str, Any]] = field(default_factory=list)
    average: dict[str, torch.Tensor] = field(default_factory=dict)
    averaged: int = 0


# -- the folder -------------------------------------------------------------------------------------------------------


class CheckpointStore:
    """The checkpoint folder of one run, locked against a second process while open.

    Every write is atomic: killed at any moment, the folder holds the state before or after it. Errors while writing are
    CheckpointError, and the last good checkpoint is still there. numpy: states hold its arrays, else torch's tensors.
    """

    def __init__(self, folder: str | os.PathLike[str], *, numpy: bool = False) -> None:
        self.folder, self._numpy = Path(folder), numpy
        self._journal: IO[bytes] | None = None
        self._lock: IO[bytes] | None = None

    # -- life -----------------------------------------------------------------------------------------------------

    def open(self) -> CheckpointStore:
        """Create the folder (mode 0700) and lock it.

        Raises ArtifactError where it cannot be written, CheckpointError where another process is running in it.
        """
        while not self._lock_file():
            pass  # who held it removed it at its end
        return self

    def _lock_file(self) -> bool:
        """Whether the file that was locked still has its name: a later process locks the one that has."""
        ensure_output_folder(self.folder)
        with contextlib.suppress(OSError):
            self.folder.chmod(0o700)
        try:
            self._lock = open(self.folder / "lock", "ab")  # noqa: SIM115 - held while the run lasts
        except OSError as error:
            raise ArtifactError(describe_os_error(error, self.folder / "lock")) from error
        try:
            import fcntl
        except ImportError:  # no advisory locks here (Windows)
            return True
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self._lock.close()
            self._lock = None
            raise CheckpointError(
                f"Another process is training in {str(self.folder.parent)!r}. Two runs there would release different "
                f"values under the same noise. Wait for it to end, or choose another output_dir."
            ) from None
        if same_file(self._lock.fileno(), self.folder / "lock"):
            return True
        self._lock.close()
        self._lock = None
        return False

    def close(self) -> None:
        """Unlock. A checkpoint stays on disk; a folder without one is removed."""
        if self._lock is not None and not self.exists:
            with contextlib.suppress(OSError):
                (self.folder / "lock").unlink()
        for handle in (self._journal, self._lock):
            if handle is not None:
                with contextlib.suppress(OSError):
                    handle.close()
        self._journal = self._lock = None
        if not self.exists:
            with contextlib.suppress(OSError):  # not empty, or never made
                self.folder.rmdir()

    @property
    def exists(self) -> bool:
        """Whether an unfinished run is here."""
        return (self.folder / "checkpoint.json").exists()

    @property
    def run_id(self) -> str:
        """Of the unfinished run; raises CheckpointError where its plan cannot be read."""
        return str(self._content()["mechanism"]["statement"]["run_id"])

    @property
    def has_key(self) -> bool:
        """Whether the key that the checkpoint names is there, and is one."""
        try:
            name = self._content()["key"]
            key = SecretKey.load(self._key_path(name))
        except (ArtifactError, PrivacyError):
            return False
        same = bool(key_id(key) == name)
        key.erase()
        return same

    # -- checkpoints ----------------------------------------------------------------------------------------------

    def save(self, state: SavedState, key: SecretKey, pending: Sequence[JournalEntry] = ()) -> None:
        """Commit `state`: it replaces the previous checkpoint in one rename.

        `pending`: steps from `state.step` on that may have been released before; they stay in the journal.
        A key that is not in the folder yet is stored first, and keys no longer named are erased last, so that at every
        moment the committed checkpoint has its key.
        """
        name = key_id(key)
        tensors: dict[str, Any] = {}
        optimizer = encode(state.optimizer, tensors, "optimizer", self._numpy)
        for parameter, value in state.trainables.items():
            tensors[f"trainable.{parameter}"] = own_copy(value)
        for parameter, value in state.average.items():
            tensors[f"average.{parameter}"] = own_copy(value)
        payload = pack(tensors)
        digest = hashlib.sha256(payload).hexdigest()
        file = f"state-{state.step}-{digest[:32]}.safetensors"
        content = {
            "format": FORMAT,
            "step": state.step,
            "charged_steps": state.charged_steps,
            "key": name,
            "state_file": file,
            "state_sha256": digest,
            "mechanism": state.mechanism,
            "fingerprint": state.fingerprint,
            "trainables": list(state.trainables),
            "optimizer": optimizer,
            "history": state.history,
            "average": list(state.average),
            "averaged": state.averaged,
        }
        try:
            if not self._key_path(name).exists():
                key.save(self._key_path(name))
            if not self._journal_path.exists():
                # Before the first commit: a checkpoint without a journal has lost it.
                atomic_write_bytes(self._journal_path, b"", mode=_PRIVATE)
            atomic_write_bytes(self.folder / file, payload, mode=_PRIVATE)
            signed = content | {"sha256": json_digest(json.loads(json.dumps(content)))}
            atomic_write_text(self.folder / "checkpoint.json", json.dumps(signed) + "\n", mode=_PRIVATE)
        except ArtifactError as error:
            raise CheckpointError(
                f"The checkpoint could not be saved. {error} The run stopped; the last checkpoint is intact and "
                f"running the same call again continues from it, at no extra privacy cost."
            ) from error
        self._start_journal(pending)
        for old in self.folder.glob("state-*.safetensors"):
            if old.name != file:
                with contextlib.suppress(OSError):
                    old.unlink()
        for old in self.folder.glob("key-*.json"):
            if old != self._key_path(name):
                SecretKey.erase_file(old)

    def _content(self) -> dict[str, Any]:
        path = self.folder / "checkpoint.json"
        try:
            content = json.loads(path.read_bytes())
            known = isinstance(content, dict) and content.get("format") == FORMAT
            known = known and content.pop("sha256", None) == json_digest(content)
        except (OSError, ValueError, RecursionError):
            known = False
        if not known:
            raise CheckpointError(
                f"The checkpoint in {str(self.folder)!r} is damaged or was written by another version, so the run cannot "
                f"be continued. Nothing was changed. Start in another output_dir, and count what this run has spent: its "
                f"plan is in {str(path)!r}."
            )
        found: dict[str, Any] = content
        return found

    def spent(self) -> tuple[int, list[int], dict[str, Any], int | None]:
        """Steps in the checkpoint, steps charged in each phase, the mechanism, and how many steps may have been released
        since (None: nobody knows). Needs neither the key nor the state.

        Raises:
            CheckpointError: the plan itself is damaged or of another version; nothing was changed.
        """
        content = self._content()
        step: int = content["step"]
        pending = self._pending(content)
        since = None if pending is None else max([0, *(entry.step + 1 - step for entry in pending)])
        return step, content["charged_steps"], content["mechanism"], since

    def load(self) -> tuple[SavedState, SecretKey, list[JournalEntry]]:
        """The last committed state, its key, and the steps that may have been released since.

        Raises:
            CheckpointError: the checkpoint is damaged or of another version; nothing was changed.
        """
        content = self._content()
        pending = self._pending(content)
        damaged = CheckpointError(
            f"The checkpoint in {str(self.folder)!r} is damaged: its state, its key or its journal is missing or is not "
            f"what was written. So the run cannot be continued. Nothing was changed. Pass resume=False, overwrite=True to "
            f"give it up: what it may have spent is then kept in the folder and counted in this run."
        )
        if pending is None:
            raise damaged
        try:
            payload = (self.folder / content["state_file"]).read_bytes()
            if hashlib.sha256(payload).hexdigest() != content["state_sha256"]:
                raise damaged
            tensors = unpack(payload, tensors=not self._numpy)
            key = SecretKey.load(self._key_path(content["key"]))
            if key_id(key) != content["key"]:
                raise damaged
            state = SavedState(
                step=content["step"],
                charged_steps=content["charged_steps"],
                mechanism=content["mechanism"],
                fingerprint=content["fingerprint"],
                trainables={name: tensors[f"trainable.{name}"] for name in content["trainables"]},
                optimizer=decode(content["optimizer"], tensors),
                history=content["history"],
                average={name: tensors[f"average.{name}"] for name in content["average"]},
                averaged=content["averaged"],
            )
        except (OSError, ValueError, KeyError, TypeError, ArtifactError, safetensors.SafetensorError):
            raise damaged from None
        except PrivacyError as error:
            raise CheckpointError(
                f"{error} Nothing was changed. If the key is lost, pass resume=False, overwrite=True: what this run may "
                f"have spent is then kept in the folder and counted."
            ) from error
        return state, key, pending

    def resume_journal(self, pending: Sequence[JournalEntry]) -> None:
        """Write the pending entries afresh, so that a torn last line is never appended to."""
        self._start_journal(pending)

    def erase(self) -> None:
        """The run is finished: the key goes first, then everything else, and the folder is unlocked.

        Raises:
            PrivacyError: the key file could not be erased.
        """
        for path in self.folder.glob("key-*.json"):
            SecretKey.erase_file(path)
        self.tidy()
        self.close()

    def tidy(self) -> None:
        """Removes what a finished run leaves, except the key and the lock."""
        for name in ("journal.jsonl", "checkpoint.json"):
            with contextlib.suppress(FileNotFoundError):
                (self.folder / name).unlink()
        for path in [*self.folder.glob("state-*.safetensors"), *self.folder.glob(".*.tmp")]:
            path.unlink()

    # -- the write-ahead journal ----------------------------------------------------------------------------------

    def record(self, entry: JournalEntry) -> None:
        """Force to disk that `entry.step` is about to be released; only then may its noise be added.

        Raises:
            CheckpointError: the line could not be written; nothing was released.
        """
        if self._journal is None:
            raise CheckpointError("The journal is not open: no checkpoint was saved or resumed in this folder.")
        try:
            self._journal.write(_line(entry))
            self._journal.flush()
            os.fsync(self._journal.fileno())
        except OSError as error:
            raise CheckpointError(
                describe_os_error(error, self.folder / "journal.jsonl")
                + " The run stopped before the step was released; running the same call again continues."
            ) from error

    def _start_journal(self, entries: Sequence[JournalEntry]) -> None:
        if self._journal is not None:
            with contextlib.suppress(OSError):
                self._journal.close()
            self._journal = None
        path = self._journal_path
        try:
            atomic_write_bytes(path, b"".join(_line(entry) for entry in entries), mode=_PRIVATE)
            self._journal = open(path, "ab")  # noqa: SIM115 - open while the run lasts
        except (OSError, ArtifactError) as error:
            reason = describe_os_error(error, path) if isinstance(error, OSError) else str(error)
            raise CheckpointError(f"{reason} The run stopped; running the same call again continues.") from error

    def _pending(self, content: Mapping[str, Any]) -> list[JournalEntry] | None:
        """The steps that may have been released since the checkpoint; None where the journal does not tell."""
        entries = self._read_journal()
        if entries is None:
            return None
        pending = [entry for entry in entries if entry.step >= content["step"] and entry.key == content["key"]]
        steps = {entry.step for entry in pending}
        return pending if steps == set(range(content["step"], content["step"] + len(steps))) else None

    def _read_journal(self) -> list[JournalEntry] | None:
        """None: it is missing or damaged, and does not tell what was released."""
        try:
            *lines, rest = self._journal_path.read_bytes().split(b"\n")
        except FileNotFoundError:
            return None
        except OSError as error:
            raise CheckpointError(describe_os_error(error, self._journal_path, "read")) from error
        # A torn last line was never synced, so its step was never released. It holds no closing brace.
        if rest and (b"}" in rest or not rest.isascii() or not rest.startswith(_LINE_START[: len(rest)])):
            lines.append(rest)
        entries = []
        for line in lines:
            try:
                content = json.loads(line)
                entry = JournalEntry(int(content["step"]), str(content["key"]), str(content["digest"]))
            except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
                return None
            if _line(entry) != line + b"\n":
                return None
            entries.append(entry)
        return entries

    @property
    def _journal_path(self) -> Path:
        return self.folder / "journal.jsonl"

    def _key_path(self, name: str) -> Path:
        return self.folder / f"key-{name}.json"


_LINE_START = b'{"step": '


def _line(entry: JournalEntry) -> bytes:
    content = {"step": entry.step, "key": entry.key, "digest": entry.digest}
    return json.dumps(content | {"check": json_digest(content)[:16]}).encode() + b"\n"
