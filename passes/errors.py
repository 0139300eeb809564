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
