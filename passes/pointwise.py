"""Operators that work entry by entry and can write over an operand: who does so, and how much memory a step then holds."""

from __future__ import annotations

from typing import Any

import torch

aten = torch.ops.aten
# What each is called where it writes into a given tensor, and what that tensor is called then.
POINTWISE: dict[Any, tuple[Any, str]] = {
    aten.add.Tensor: (aten.add.out, "out"),
    aten.sub.Tensor: (aten.sub.out, "out"),
    aten.mul.Tensor: (aten.mul.out, "out"),
    aten.div.Tensor: (aten.div.out, "out"),
    aten.where.self: (aten.where.self_out, "out"),
    aten.neg.default: (aten.neg.out, "out"),
    aten.exp.default: (aten.exp.out, "out"),
    aten.tanh.default: (aten.tanh.out, "out"),
    aten.sigmoid.default: (aten.sigmoid.out, "out"),
    aten.relu.default: (aten.relu.out, "out"),
    aten.silu.default: (aten.silu.out, "out"),
    aten.gelu.default: (aten.gelu.out, "out"),
    aten.trunc.default: (aten.trunc.out, "out"),
    aten.gelu_backward.default: (aten.gelu_backward.grad_input, "grad_input"),
    aten.silu_backward.default: (aten.silu_backward.grad_input, "grad_input"),
    aten.tanh_backward.default: (aten.tanh_backward.grad_input, "grad_input"),
    aten.sigmoid_backward.default: (aten.sigmoid_backward.grad_input, "grad_input"),
    aten.threshold_backward.default: (aten.threshold_backward.grad_input, "grad_input"),
}
