"""Differential privacy as a compiler pass: DP-BiTFiT (Bu et al., ICML 2024) for any PyTorch model, unedited.

Names are imported on first use, so that ``dpbitfit_fx.ort_runner`` works where torch is not installed.
"""

from __future__ import annotations

import importlib
import sys
import types
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .audit import AuditReport, audit
    from .biases import load_biases, save_biases
    from .clipping import AutomaticClipping, AutoVClipping, FlatClipping, PerLayerClipping
    from .compile import PrivateStep, compile
    from .errors import CompileRefused, DPBitFitError, PrivacyWarning, SealBroken
    from .fit import FitResult, fit
    from .onnx_export import export_onnx
    from .onnx_run import RunPhase, export_run
    from .ort_export import export_ort_training
    from .ort_plan import Schedule
    from .phases import Phase
    from .rules import sample_rule

__version__ = "0.1.0"

_HOMES = {
    "AuditReport": "audit",
    "AutoVClipping": "clipping",
    "AutomaticClipping": "clipping",
    "CompileRefused": "errors",
    "DPBitFitError": "errors",
    "FitResult": "fit",
    "FlatClipping": "clipping",
    "PerLayerClipping": "clipping",
    "Phase": "phases",
    "PrivacyWarning": "errors",
    "PrivateStep": "compile",
    "RunPhase": "onnx_run",
    "Schedule": "ort_plan",
    "SealBroken": "errors",
    "audit": "audit",
    "compile": "compile",
    "export_onnx": "onnx_export",
    "export_ort_training": "ort_export",
    "export_run": "onnx_run",
    "fit": "fit",
    "load_biases": "biases",
    "sample_rule": "rules",
    "save_biases": "biases",
}

__all__ = [
    "AuditReport",
    "AutoVClipping",
    "AutomaticClipping",
    "CompileRefused",
    "DPBitFitError",
    "FitResult",
    "FlatClipping",
    "PerLayerClipping",
    "Phase",
    "PrivacyWarning",
    "PrivateStep",
    "RunPhase",
    "Schedule",
    "SealBroken",
    "audit",
    "compile",
    "export_onnx",
    "export_ort_training",
    "export_run",
    "fit",
    "load_biases",
    "sample_rule",
    "save_biases",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f".{_HOMES[name]}", __name__), name)
    # Stored, since importing the submodule `compile` or `fit` has just bound that name to the module.
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)


class _Package(types.ModuleType):
    def __setattr__(self, name: str, value: Any) -> None:
        # Importing the submodule `compile` or `fit` binds its name here; the function of that name is what users mean.
        if name in _HOMES and isinstance(value, types.ModuleType):
            value = getattr(value, name)
        super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
