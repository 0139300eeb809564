"""Writing files so that a crash, a full disk or Ctrl-C leaves either the old file or the new one, never half of one."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dpbitfit_fx.errors import ArtifactError

_CHUNK = 1 << 24


def describe_os_error(error: OSError, path: str | os.PathLike[str], what: str = "write") -> str:
    """One paragraph for an ``OSError`` met while trying to ``what`` ``path``: the cause and what to do."""
    target = os.fspath(path)
    if error.errno == errno.ENOSPC:
        cause, advice = "the disk is full", "Free some space, or choose a folder on another disk, and run again"
    elif error.errno == errno.EDQUOT:
        cause, advice = "your disk quota is used up", "Free some space, or choose another folder, and run again"
    elif error.errno in (errno.EACCES, errno.EPERM):
        cause, advice = "permission was denied", "Choose a folder you may write to, or change its permissions"
    elif error.errno == errno.EROFS:
        cause, advice = "the file system is read-only", "Choose a folder on a file system you may write to"
    elif error.errno == errno.ENOENT:
        cause, advice = "it does not exist", "Check the path"
    elif error.errno == errno.ENOTDIR:
        cause, advice = "a part of the path is a file, not a folder", "Check the path"
    elif error.errno == errno.EISDIR:
        cause, advice = "it is a folder, not a file", "Check the path"
    else:
        cause, advice = error.strerror or type(error).__name__, "Check the path and the disk, and run again"
    return f"Cannot {what} {target!r}: {cause}. {advice}."


def sync_folder(folder: Path) -> None:
    """Forces a new or renamed entry of the folder to disk, where the file system can."""
    # The rename itself lives in the folder; not every file system lets a folder be opened or synced.
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def sync(path: Path) -> None:
    """Force a file, or the names in a folder, to the disk."""
    if path.is_dir():
        sync_folder(path)
        return
    # Windows refuses to sync a descriptor that was opened for reading; elsewhere the file may be one to read only.
    descriptor = os.open(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def same_file(descriptor: int, path: str | os.PathLike[str]) -> bool:
    """Whether the open file is the one that has this name now: a lock on any other locks nobody out."""
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    except OSError:
        return False


def write_all(descriptor: int, data: bytes) -> None:
    """All of it, however little each call takes."""
    view = memoryview(data)
    while view:
        view = view[os.write(descriptor, view[:_CHUNK]) :]


def _temporary_name(target: Path) -> Path:
    return target.with_name(f".{target.name}.{secrets.token_hex(6)}.tmp")


@contextlib.contextmanager
def atomic_replace(path: str | os.PathLike[str], mode: int = 0o644) -> Iterator[Path]:
    """Yield a temporary path beside ``path``; on success sync it to disk and rename it over ``path``.

    For writers that want a file name (ONNX, safetensors). The temporary file exists, empty, with permission ``mode``.
    If the body or the sync fails, the temporary file is removed and ``path`` is left as it was.

    Raises:
        ArtifactError: any ``OSError`` (read-only folder, full disk); other exceptions pass through unchanged.
    """
    target = Path(path)
    temporary = _temporary_name(target)
    try:
        os.close(os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, mode))
        yield temporary
        sync(temporary)
        os.replace(temporary, target)
    except OSError as error:
        raise ArtifactError(
            describe_os_error(error, target) + " The previous file, if there was one, is unchanged."
        ) from error
    finally:
        # Also on KeyboardInterrupt; after the rename there is nothing left to remove.
        with contextlib.suppress(OSError):
            temporary.unlink()
    sync_folder(target.parent)


def atomic_write_bytes(path: str | os.PathLike[str], data: bytes, mode: int = 0o644) -> None:
    """Replace ``path`` by ``data`` in one step: temporary file, fsync, rename, fsync of the folder.

    Raises:
        ArtifactError: the file cannot be written; the previous file is unchanged.
    """
    with atomic_replace(path, mode) as temporary:
        descriptor = os.open(temporary, os.O_WRONLY)
        try:
            write_all(descriptor, data)
        finally:
            os.close(descriptor)


def atomic_write_text(path: str | os.PathLike[str], text: str, mode: int = 0o644) -> None:
    """``atomic_write_bytes`` of ``text`` in UTF-8, line ends as given."""
    atomic_write_bytes(path, text.encode("utf-8"), mode)


def atomic_write(path: str | os.PathLike[str], data: bytes | str, mode: int = 0o644) -> None:
    """``atomic_write_bytes`` or ``atomic_write_text``, by the type of ``data``."""
    if isinstance(data, str):
        atomic_write_text(path, data, mode)
    else:
        atomic_write_bytes(path, data, mode)


def read_bytes(path: str | os.PathLike[str]) -> bytes:
    """The contents of a file.

    Raises:
        ArtifactError: the file is absent or cannot be read.
    """
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise ArtifactError(describe_os_error(error, path, "read")) from error


def read_text(path: str | os.PathLike[str]) -> str:
    """The contents of a UTF-8 text file.

    Raises:
        ArtifactError: the file is absent, cannot be read, or is not UTF-8.
    """
    data = read_bytes(path)
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError:
        # `from None`: the decoding error quotes the bytes, which may be somebody's record.
        raise ArtifactError(
            f"Cannot read {os.fspath(path)!r}: it is not UTF-8 text. Check that it is the right file."
        ) from None


def ensure_output_folder(path: str | os.PathLike[str]) -> Path:
    """Create the folder where needed and prove, by writing and removing a small file, that it takes files.

    Call this before any privacy budget is spent: a run whose result cannot be saved has paid for nothing.

    Raises:
        ArtifactError: the path is a file, or the folder cannot be made or written to.
    """
    folder = Path(path)
    if folder.exists() and not folder.is_dir():
        raise ArtifactError(
            f"Cannot write into {os.fspath(path)!r}: it is a file, not a folder. Nothing was started. Choose another "
            "output folder."
        )
    probe = folder / f".dpbitfit-write-test.{secrets.token_hex(6)}.tmp"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for left in folder.glob(".dpbitfit-write-test.*.tmp"):  # by a process that was killed
            left.unlink(missing_ok=True)
        descriptor = os.open(probe, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600)
        try:
            write_all(descriptor, b"dpbitfit_fx" * 400)
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        raise ArtifactError(
            describe_os_error(error, path, "write into the output folder") + " Nothing was started."
        ) from error
    finally:
        with contextlib.suppress(OSError):
            probe.unlink()
    return folder


def json_digest(content: Any) -> str:
    """SHA-256 (hex) of JSON values, whatever their order and white space in the file."""
    return hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def sha256_file(path: Path) -> str:
    """SHA-256 of a file, hex, read in pieces of 4 MiB."""
    digest = hashlib.sha256()
    with open(path, "rb") as stream:
        while chunk := stream.read(1 << 22):
            digest.update(chunk)
    return digest.hexdigest()
