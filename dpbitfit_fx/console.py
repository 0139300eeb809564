"""What the commands of `dpbitfit` share: where they write to, and lists of names. Torch-free."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console

from dpbitfit_fx.errors import DataError

__all__ = ["busy", "console", "names"]


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
