"""How a per-sample gradient is bounded: ``AutomaticClipping`` (AUTO-S, the default) and ``FlatClipping`` (Abadi)."""

from .passes.clipping import AutomaticClipping, Clipping, FlatClipping

__all__ = ["AutomaticClipping", "Clipping", "FlatClipping"]
