"""Every error that dpbitfit_fx raises on purpose. Pure Python: importable without torch."""

from __future__ import annotations

from dpbitfit_fx.passes.errors import CompileRefused, DPBitFitError, PassError, SealBroken


class PrivacyError(DPBitFitError):
    """A privacy parameter, budget, secret key or privacy statement cannot back the guarantee that was asked for."""


class PrivacyWarning(UserWarning):
    """The guarantee stands as stated, but the caller may take it for more than it says."""


class DataError(DPBitFitError):
    """The user's data do not fit. Messages give row numbers, never the contents of a row."""


class ExportError(DPBitFitError):
    """An exported graph could not be made, or does not compute what the PyTorch step computes."""


class ArtifactError(DPBitFitError):
    """A file or folder cannot be written, read, or applied; whatever was there before is still there."""


class CheckpointError(DPBitFitError):
    """A checkpoint cannot be resumed from; nothing was changed."""


class RankError(DPBitFitError):
    """Another process of the run stopped, died or disagrees; all of them stop, and rank 0's checkpoint is whole."""


__all__ = [
    "ArtifactError",
    "CheckpointError",
    "CompileRefused",
    "DPBitFitError",
    "DataError",
    "ExportError",
    "PassError",
    "PrivacyError",
    "PrivacyWarning",
    "RankError",
    "SealBroken",
]
