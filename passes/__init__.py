"""The compiler: graph in, graph out. It knows nothing of trainers, files or ONNX Runtime.

Installed as ``dpbitfit_fx.passes``. This file imports nothing, so that code without torch can reach ``passes.errors``.
"""
