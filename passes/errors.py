"""What the compiler raises. Pure Python: code that runs without torch imports it too."""

from __future__ import annotations


class DPBitFitError(Exception):
    """Base of every error that this library raises on purpose: one paragraph saying what, where and what to do."""


class CompileRefused(DPBitFitError):
    """The model, the loss or the selection cannot be made private as its author meant it; nothing was compiled."""


class SealBroken(DPBitFitError):
    """A graph does not match the closed template that bounds its sensitivity; it neither runs nor exports."""


class PassError(DPBitFitError):
    """A pass broke a fact that was proved before it ran: a bug in the pass, named with what ran before."""


def too_little_memory(error: BaseException, rows: int) -> CompileRefused | None:
    """The refusal, where an error of torch is that of its allocator."""
    if type(error).__name__ != "OutOfMemoryError" and "allocate memory" not in str(error):
        return None
    return CompileRefused(
        f"There is not enough memory for {rows} rows. Compiling runs the model, and the step, on up to 17 made-up rows of "
        "example_batch's shape, however few a physical batch has. Free memory, take a machine with more, or pad to a shorter "
        "length."
    )
