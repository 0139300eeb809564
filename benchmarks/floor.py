"""The arithmetic of one bias tuning step, and what this machine's fastest matrix product would need for it."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from dpbitfit_fx.passes import torch_private

from .models import Case
from .systems import _plain


def work(case: Case) -> dict[str, Any]:
    """FLOPs of forward and backward, the best GFLOP/s (of CPU time) of a product [tokens, d] x [d, 4d], CPU seconds at them."""
    step = _plain(case, biases=True)
    with FlopCounterMode(display=False) as counter:
        step()
    flops, found = counter.get_total_flops(), rates(min(case.tokens, 8192), case.width)
    return {"flops": flops, "gflops": found, "cpu": flops / max(found.values()) / 1e9}


def rates(rows: int, width: int) -> dict[str, float]:
    x, weight = torch.randn(rows, width), torch.randn(4 * width, width)
    runs: dict[str, Callable[[], Any]] = {"mm (MKL)": lambda: x @ weight.t()}
    if torch_private.can_pack():
        packed = torch_private.pack_linear_weight(weight)
        runs["oneDNN, packed"] = lambda: torch_private.LINEAR(x, packed, None, "none", [], "")
    session = _session(rows, weight)
    if session is not None:
        given = {"x": x.numpy()}
        runs["ONNX Runtime"] = lambda: session.run(None, given)
    flops = 8 * rows * width**2
    often = math.ceil(1e10 / flops)  # a tenth of a second: of other threads' CPU time the last milliseconds are not counted yet
    best = dict.fromkeys(runs, math.inf)
    for _ in range(6):
        for name, run in runs.items():
            begin = time.process_time()
            for _ in range(often):
                run()
            best[name] = min(best[name], time.process_time() - begin)
    return {name: often * flops / seconds / 1e9 for name, seconds in best.items()}


def _session(rows: int, weight: torch.Tensor) -> Any:
    """One MatMul with a constant weight in ONNX Runtime, where that is installed."""
    try:
        import onnxruntime
        from onnx import TensorProto, helper, numpy_helper
    except ImportError:
        return None

    wide, width = weight.shape
    constant = numpy_helper.from_array(weight.t().contiguous().numpy(), "w")
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["y"])],
        "product",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [rows, width])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [rows, wide])],
        [constant],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    settings = onnxruntime.SessionOptions()
    settings.intra_op_num_threads = torch.get_num_threads()
    return onnxruntime.InferenceSession(model.SerializeToString(), settings, providers=["CPUExecutionProvider"])
