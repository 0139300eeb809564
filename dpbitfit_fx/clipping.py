"""How a per-sample gradient is bounded: AUTO-S (the default), AUTO-V, flat (Abadi), and flat layer by layer."""

from .passes.clipping import AutomaticClipping, AutoVClipping, Clipping, FlatClipping, PerLayerClipping

__all__ = ["AutoVClipping", "AutomaticClipping", "Clipping", "FlatClipping", "PerLayerClipping"]
