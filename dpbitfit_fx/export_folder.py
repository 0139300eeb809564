"""The folder that an export leaves: built and checked beside its place, then moved into it. Torch-free.

    .NAME.<8 hex>.tmp   being built, locked by whoever builds it; manifest.json comes last, over files that are on the disk
    .NAME.<8 hex>.old   what was there before, for the instant between two renames

Killed at any moment, an export leaves the earlier one in its place, or the new one, or (in that instant) nothing there: the
next export then moves the earlier one back before anything else, and removes what was half-built. A file whose bytes have
not changed stays the file that it was, by a hard link: same inode, same time of change.
"""

from __future__ import annotations

import contextlib
import filecmp
import json
import os
import re
import secrets
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from dpbitfit_fx.errors import ArtifactError
from dpbitfit_fx.files import atomic_write_text, describe_os_error, sha256_file, sync
from dpbitfit_fx.onnx_cuda import left_to_cpu
from dpbitfit_fx.onnx_seal import check_artifacts
from dpbitfit_fx.ort_artifacts import MANIFEST, set_aside

__all__ = ["write_folder"]


def write_folder(
    path: str | os.PathLike[str],
    overwrite: bool,
    build: Callable[[Path, Path | None], dict[str, Any]],
    check: Callable[[Path], None],
) -> Path:
    """Build in a folder beside ``path``, check there, then move into place: a failed export leaves what was there.

    Args:
        build: (empty folder, folder of the earlier export or None) -> manifest without its ``files``.
        check: raises where the built folder is not to be handed over.

    Raises:
        ArtifactError: the folder exists and ``overwrite`` is off or it is not an export, or the disk refuses.
    """
    target = Path(path)
    work = target.with_name(f".{target.name}.{secrets.token_hex(4)}.tmp")
    try:
        _recover(target)
        _may_replace(target, overwrite)
        target.parent.mkdir(parents=True, exist_ok=True)
        work.mkdir()
        with _locked(work):
            previous = target if (target / MANIFEST).is_file() else None
            manifest = build(work, previous)
            _keep_unchanged(work, previous)
            manifest["left_to_cpu"] = left_to_cpu(work)
            manifest["files"] = {f.name: sha256_file(f) for f in sorted(work.iterdir())}
            for name in manifest["files"]:
                sync(work / name)
            text = json.dumps(manifest, indent=1) + "\n"
            atomic_write_text(work / MANIFEST, text)
            _keep_unchanged(work, previous)
            check_artifacts(work, json.loads(text))
            check(work)
            _swap(work, target)
    except OSError as error:
        raise ArtifactError(describe_os_error(error, target) + " What was there before is unchanged.") from error
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return target


def _may_replace(target: Path, overwrite: bool) -> None:
    if not target.exists() or (target.is_dir() and not any(target.iterdir())):
        return
    if not overwrite:
        raise ArtifactError(
            f"{os.fspath(target)!r} exists and is not an empty folder. Choose another path, or pass overwrite=True."
        )
    if not (target / MANIFEST).is_file():
        raise ArtifactError(
            f"{os.fspath(target)!r} is not an earlier export (it has no manifest.json), so it will not be overwritten."
        )


def _keep_unchanged(work: Path, previous: Path | None) -> None:
    """Every file of ``work`` that the earlier export holds with the same bytes becomes that very file."""
    for new in sorted(work.iterdir()) if previous is not None else []:
        old = previous / new.name if previous is not None else new
        if old.is_symlink() or not old.is_file() or old.samefile(new) or not filecmp.cmp(old, new, shallow=False):
            continue
        spare = new.with_name(f".{new.name}.link")
        with contextlib.suppress(OSError):  # a file system without links: the new file is as good
            os.link(old, spare)
            os.replace(spare, new)


def _swap(work: Path, target: Path) -> None:
    if not target.exists():
        os.replace(work, target)
    else:
        old = target.with_name(f".{target.name}.{secrets.token_hex(4)}.old")
        os.replace(target, old)
        try:
            os.replace(work, target)
        except OSError:
            os.replace(old, target)
            raise
        shutil.rmtree(old, ignore_errors=True)
    sync(target.parent)


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Held while the folder is built, so that nobody takes it for what a killed export left. Ends with the process."""
    descriptor = _lock(folder)
    try:
        yield
    finally:
        if descriptor is not None:
            os.close(descriptor)


def _lock(folder: Path) -> int | None:
    """A descriptor that holds the folder; None where somebody else does, or where folders cannot be locked (Windows)."""
    try:
        import fcntl
    except ImportError:
        return None
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        return None
    return descriptor


def _recover(target: Path) -> None:
    """Undo what an export into ``target`` that was killed has left beside it."""
    earlier = set_aside(target)
    if earlier and not target.exists():
        os.replace(earlier.pop(), target)
    for folder in [*earlier, *set_aside(target, whole=False)]:
        shutil.rmtree(folder, ignore_errors=True)
    if not target.parent.is_dir():
        return
    name = re.compile(rf"\.{re.escape(target.name)}\.[0-9a-f]{{8}}\.tmp")
    for folder in [f for f in target.parent.iterdir() if name.fullmatch(f.name) and f.is_dir()]:
        descriptor = _lock(folder)
        if descriptor is not None:
            shutil.rmtree(folder, ignore_errors=True)
            os.close(descriptor)
