"""ATen-level replacements for the operators of a sealed graph that ONNX exporters do not know: mostly backward passes.

The graph that is exported is the *sealed* one, interpreted node by node; only the operators in ``LOWERINGS`` are
replaced,
each by the same mathematics in operators that have an ONNX form. Nothing is captured again from the user's model.

Backward passes of pooling and resizing are linear and separable, so they become one small matrix product per axis; the
matrices come from running the forward operator itself on an identity, never from formulas of our own.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx

from dpbitfit_fx.errors import ExportError
from dpbitfit_fx.onnx_operators import OPERATORS, UNSUPPORTED
from dpbitfit_fx.passes.block_attention import LOWEST
from dpbitfit_fx.passes.unify import where

aten = torch.ops.aten
Tensor = torch.Tensor


class Lowered(torch.nn.Module):
    """``module`` run by an interpreter that replaces the operators of ``LOWERINGS``; same inputs, same outputs.

    Call it once on real tensors before exporting it: that run builds the constants (pooling matrices) that the symbolic
    run then finds as buffers.
    """

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__()
        self.inner = module

    def forward(self, *args: Any) -> Any:
        result = _Interpreter(self).run(*args, enable_io_processing=False)
        return result[0] if isinstance(result, (tuple, list)) and len(result) == 1 else result

    def constant(self, key: str, make: Callable[[], Tensor]) -> Tensor:
        name = "constant_" + key
        if name not in self._buffers:
            self.register_buffer(name, make())
        return self.get_buffer(name)


class _Interpreter(fx.Interpreter):
    def __init__(self, owner: Lowered) -> None:
        super().__init__(owner.inner, garbage_collect_values=True)
        self.owner = owner
        self.node: fx.Node | None = None
        # ONNX counts negative indices from the end, where PyTorch raises: -1 and the last row would be one row of the sum
        # and two of the ghost norm.
        self.rows_of = {
            n.args[1]: n.args[2]
            for n in owner.inner.graph.nodes
            if n.target is aten.embedding_dense_backward.default and n.args[1].target is aten.reshape.default
        }

    def run_node(self, n: fx.Node) -> Any:
        self.node = n
        result = super().run_node(n)
        return torch.remainder(result, self.rows_of[n]) if n in self.rows_of else result

    @property
    def current(self) -> str:
        return self.node.name if self.node is not None else ""

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        lowering = LOWERINGS.get(target)
        if lowering is not None:
            return lowering(self, *args, **kwargs)
        if target in DROPPED:
            return None
        if str(target) in UNSUPPORTED:
            raise ExportError(
                f"The private graph uses {target}, which has no ONNX form here: {UNSUPPORTED[str(target)]}."
                f"{where(self.node) if self.node is not None else ''} Train this model with the PyTorch step, or replace "
                "the operator in the model."
            )
        return super().call_function(target, args, kwargs)

    def matrix(self, axis: int, make: Callable[[], Tensor]) -> Tensor:
        return self.owner.constant(f"{self.current}_{axis}", make)


# -- attention --------------------------------------------------------------------------------------------------------


def _attention_weights(
    q: Tensor, k: Tensor, causal: bool, mask: Tensor | None, scale: float | None
) -> tuple[Tensor, Tensor, Tensor | None, float]:
    """softmax(q kᵀ scale + mask), the scores, the scale, and [.., T, 1]: rows with every key masked, if there can be any. Their
    weights are finite, and mean nothing: the CPU kernel gives zero there."""
    factor = float(scale) if scale is not None else q.shape[-1] ** -0.5
    scores = torch.matmul(q, k.transpose(-2, -1)) * factor
    if causal:
        allowed = torch.ones(q.shape[-2], k.shape[-2], dtype=torch.bool, device=q.device).tril()
        shut = torch.zeros(q.shape[-2], k.shape[-2], dtype=q.dtype, device=q.device).masked_fill(
            ~allowed, float("-inf")
        )
        mask = shut if mask is None else mask + shut
    if mask is None:
        return torch.softmax(scores, -1), scores, None, factor
    dead = mask.amax(-1, keepdim=True) == float("-inf")
    scores = scores + mask.clamp(min=LOWEST)
    return torch.softmax(scores, -1), scores, dead, factor


def _but(dead: Tensor | None, x: Tensor) -> Tensor:
    """Zero in the dead rows; x [.., T, d] is smaller than the weights [.., T, S], as a rule."""
    return x if dead is None else torch.where(dead, torch.zeros((), dtype=x.dtype, device=x.device), x)


def _no_dropout(p: float) -> None:
    if p:
        raise ExportError(
            "The private graph holds attention with dropout. Put the model in eval() or set dropout to 0, and "
            "compile again."
        )


def _flash(
    _: _Interpreter, q: Tensor, k: Tensor, v: Tensor, dropout_p: float = 0.0, is_causal: bool = False, *,
    attn_mask: Tensor | None = None, scale: float | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    _no_dropout(dropout_p)
    weights, scores, dead, _factor = _attention_weights(q, k, is_causal, attn_mask, scale)
    return _but(dead, torch.matmul(weights, v)), torch.logsumexp(scores, -1)


def _flash_backward(
    _: _Interpreter, grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, logsumexp: Tensor, dropout_p:
    float,
    is_causal: bool, *, attn_mask: Tensor | None = None, scale: float | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    _no_dropout(dropout_p)
    weights, _scores, dead, factor = _attention_weights(q, k, is_causal, attn_mask, scale)
    grad_out = _but(dead, grad_out)
    grad_v = torch.matmul(weights.transpose(-2, -1), grad_out)
    grad_weights = torch.matmul(grad_out, v.transpose(-2, -1))
    # The softmax's own term, sum(grad_weights * weights), equals sum(grad_out * out), which is smaller.
    grad_scores = weights * (grad_weights - (grad_out * out).sum(-1, keepdim=True))
    # The scale behind the products: ONNX Runtime joins it to them.
    grad_q, grad_k = torch.matmul(grad_scores, k), torch.matmul(grad_scores.transpose(-2, -1), q)
    return grad_q * factor, grad_k * factor, grad_v


# -- convolution ------------------------------------------------------------------------------------------------------


def _convolution_backward(
    run: _Interpreter, grad_out: Tensor, x: Tensor, weight: Tensor, bias_sizes: Sequence[int] | None, stride:
    Sequence[int],
    padding: Sequence[int], dilation: Sequence[int], transposed: bool, output_padding: Sequence[int], groups: int,
    output_mask: Sequence[bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
    if output_mask[1]:
        raise ExportError(
            f"The private graph needs the gradient of a convolution's weight (node {run.current}), which has no "
            "ONNX form "
            "here yet. Train biases, or leave convolution weights out of `trainable`."
        )
    spatial = weight.dim() - 2
    stride, padding, dilation = (_per_axis(v, spatial) for v in (stride, padding, dilation))
    grad_x = grad_bias = None
    if output_mask[0]:
        extra = [0] * spatial
        if not transposed:
            extra = [
                x.shape[2 + i]
                - (
                    (grad_out.shape[2 + i] - 1) * stride[i]
                    - 2 * padding[i]
                    + dilation[i] * (weight.shape[2 + i] - 1)
                    + 1
                )
                for i in range(spatial)
            ]
        grad_x = aten.convolution.default(
            grad_out, weight, None, stride, padding, dilation, not transposed, extra, groups
        )
    if output_mask[2]:
        grad_bias = grad_out.sum([0, *range(2, grad_out.dim())])
    return grad_x, None, grad_bias


def _per_axis(value: int | Sequence[int], spatial: int) -> list[int]:
    values = [value] if isinstance(value, int) else list(value)
    return values * spatial if len(values) == 1 else values


# -- pooling and resizing: linear and separable -----------------------------------------------------------------------


def _separable_backward(
    run: _Interpreter, grad_out: Tensor, sizes: Sequence[int], forward: Callable[[int, Tensor], Tensor]
) -> Tensor:
    """Undo a separable linear map over the last axes: along axis i, ``forward(i, x)`` maps ``[N, sizes[i]]`` to ``[N,
    out]``."""
    result, first = grad_out, grad_out.dim() - len(sizes)
    for i, size in enumerate(sizes):

        def make(i: int = i, size: int = size) -> Tensor:
            eye = torch.eye(int(size), dtype=torch.float64)
            return forward(i, eye).to(grad_out.dtype)  # [in, out]

        matrix = run.matrix(i, make)
        axis = first + i
        if axis == result.dim() - 1:
            result = torch.matmul(result, matrix.t())
        else:
            result = torch.matmul(result.transpose(axis, -1), matrix.t()).transpose(axis, -1)
    return result


def _avg_pool_backward(spatial: int) -> Callable[..., Tensor]:
    def lower(
        run: _Interpreter, grad_out: Tensor, x: Tensor, kernel_size: Any, stride: Any, padding: Any, ceil_mode: bool,
        count_include_pad: bool, divisor_override: int | None,
    ) -> Tensor:  # fmt: skip
        kernel = _per_axis(kernel_size, spatial)
        stride = _per_axis(stride, spatial) if stride != [] and stride is not None else kernel
        padding = _per_axis(padding, spatial)

        def forward(i: int, eye: Tensor) -> Tensor:
            divisor = None if divisor_override is None else 1
            pooled: Tensor = aten.avg_pool2d.default(
                eye[:, None, :, None],
                [kernel[i], 1],
                [stride[i], 1],
                [padding[i], 0],
                ceil_mode,
                count_include_pad,
                divisor,
            )
            return pooled[:, 0, :, 0]

        grad = grad_out if divisor_override is None else grad_out / divisor_override
        return _separable_backward(run, grad, x.shape[-spatial:], forward)

    return lower


def _adaptive_avg_pool_backward(spatial: int) -> Callable[..., Tensor]:
    def lower(run: _Interpreter, grad_out: Tensor, x: Tensor) -> Tensor:
        out = grad_out.shape[-spatial:]

        def forward(i: int, eye: Tensor) -> Tensor:
            return torch.nn.functional.adaptive_avg_pool1d(eye[:, None, :], int(out[i]))[:, 0]

        return _separable_backward(run, grad_out, x.shape[-spatial:], forward)

    return lower


def _nearest_backward(spatial: int, op: Any) -> Callable[..., Tensor]:
    def lower(
        run: _Interpreter,
        grad_out: Tensor,
        output_size: Sequence[int],
        input_size: Sequence[int],
        *scales: float | None,
    ) -> Tensor:
        def forward(i: int, eye: Tensor) -> Tensor:
            scale = scales[i] if i < len(scales) else None
            resized: Tensor = op(eye[:, None, :], [int(output_size[i])], scale)
            return resized[:, 0]

        return _separable_backward(run, grad_out, list(input_size)[-spatial:], forward)

    return lower


def _linear_backward(spatial: int, op: Any) -> Callable[..., Tensor]:
    def lower(
        run: _Interpreter, grad_out: Tensor, output_size: Sequence[int], input_size: Sequence[int], align_corners: bool,
        *scales: float | None,
    ) -> Tensor:  # fmt: skip
        def forward(i: int, eye: Tensor) -> Tensor:
            scale = scales[i] if i < len(scales) else None
            # Two equal columns, kept as they are: the 2-D operators have no 1-D form for cubic.
            resized: Tensor = op(eye[:, None, :, None], [int(output_size[i]), 1], align_corners, scale, None)
            return resized[:, 0, :, 0]

        return _separable_backward(run, grad_out, list(input_size)[-spatial:], forward)

    return lower


def _replication_pad_backward(spatial: int) -> Callable[..., Tensor]:
    def lower(run: _Interpreter, grad_out: Tensor, x: Tensor, padding: Sequence[int]) -> Tensor:
        def forward(i: int, eye: Tensor) -> Tensor:
            last = spatial - 1 - i  # the pairs begin with the last axis
            sides = (padding[2 * last], padding[2 * last + 1])
            return torch.nn.functional.pad(eye[:, None, :], sides, mode="replicate")[:, 0]

        return _separable_backward(run, grad_out, x.shape[-spatial:], forward)

    return lower


def _adaptive_avg_pool(spatial: int) -> Callable[..., Tensor]:
    def lower(run: _Interpreter, x: Tensor, output_size: Sequence[int]) -> Tensor:
        # The map of the forward is the transpose of its backward's, and the sizes change sides.
        def forward(i: int, eye: Tensor) -> Tensor:
            identity = torch.eye(int(x.shape[i - spatial]), dtype=eye.dtype)
            return torch.nn.functional.adaptive_avg_pool1d(identity[:, None, :], int(output_size[i]))[:, 0].t()

        return _separable_backward(run, x, output_size, forward)

    return lower


def _unfold_backward(
    _: _Interpreter, grad_in: Tensor, input_sizes: Sequence[int], dim: int, size: int, step: int
) -> Tensor:
    """Overlapping windows of one axis, put back by a sum over the window's positions: a one-hot matrix product."""
    dim = dim % len(input_sizes)
    length = int(input_sizes[dim])
    windows = (length - size) // step + 1
    # [windows * size, length]: window w, position p reads w * step + p.
    index = (torch.arange(windows).unsqueeze(1) * step + torch.arange(size).unsqueeze(0)).reshape(-1)
    onehot = (index.unsqueeze(1) == torch.arange(length).unsqueeze(0)).to(grad_in.dtype)
    moved = grad_in.movedim(dim, -2)
    flat = moved.reshape([*moved.shape[:-2], windows * size])
    return torch.matmul(flat, onehot).movedim(-1, dim)


def _reshape(_: _Interpreter, x: Tensor, size: Sequence[int]) -> Tensor:
    # A replaced operator may leave other strides than the kernel it replaces; ONNX has no strides anyway.
    return x.reshape(list(size))


def _bmm(_: _Interpreter, a: Tensor, b: Tensor) -> Tensor:
    # ONNX Runtime fuses a transpose into MatMul for float64 too, and then has no kernel for it: keep them apart. Exported
    # values are float32 before they are widened, so that nothing finite reaches the bound.
    return torch.bmm(a, b.clamp(max=1e300) if b.dtype == torch.float64 else b)


def _exactly(op: Any) -> Callable[..., Tensor]:
    """A comparison in float64 with a number that the exporter would narrow to float32, where 1e60 is infinity."""

    def lower(run: _Interpreter, x: Tensor, bound: float) -> Tensor:
        if x.dtype is not torch.float64:
            return op(x, bound)  # type: ignore[no-any-return]
        return op(x, run.matrix(0, lambda: torch.tensor(bound, dtype=torch.float64)))  # type: ignore[no-any-return]

    return lower


def _diagonal(_: _Interpreter, x: Tensor, offset: int = 0, dim1: int = 0, dim2: int = 1) -> Tensor:
    if (offset, dim1, dim2) != (0, 1, 2) or x.dim() != 3 or x.shape[1] != x.shape[2]:
        return torch.diagonal(x, offset, dim1, dim2)
    # Every (S + 1)-th of [B, S * S]. The exporter's own form multiplies by an identity matrix: twenty nodes, and inf * 0.
    side = int(x.shape[1])
    return x.reshape(-1, side * side)[:, :: side + 1]


def _embedding_dense_backward(
    run: _Interpreter, grad_out: Tensor, index: Tensor, count: int, padding_idx: int, scale_grad_by_freq: bool
) -> Tensor:
    if padding_idx >= 0 or scale_grad_by_freq:
        raise ExportError(f"The private graph scales or drops rows of an embedding's gradient (node {run.current}).")
    rows = grad_out.reshape(-1, grad_out.shape[-1])
    where = index.reshape(-1, 1).expand(-1, rows.shape[-1])
    return rows.new_zeros(count, rows.shape[-1]).scatter_add(0, where, rows)


def _rsub(run: _Interpreter, x: Tensor, other: Any, alpha: Any = 1) -> Tensor:
    """``other - alpha x``; of whole numbers x and a float, torch.onnx leaves a number where its ``sub`` takes a tensor."""
    kind = torch.result_type(x, other)
    return torch.rsub(x, other, alpha=alpha) if x.dtype == kind else torch.add(-alpha * x.to(kind), other)


def _gelu(_: _Interpreter, x: Tensor, *, approximate: str = "none") -> Tensor:
    """As ONNX Runtime knows it, which joins it into one kernel; the exporter's own form stays five passes over x."""
    if approximate != "none" or x.dtype is not torch.float32:
        return torch.nn.functional.gelu(x, approximate=approximate)
    return (torch.erf(x / math.sqrt(2.0)) + 1.0) * x * 0.5


LOWERINGS: dict[Any, Callable[..., Any]] = {
    **OPERATORS,
    aten.bmm.default: _bmm,
    aten.lt.Scalar: _exactly(torch.lt),
    aten.gt.Scalar: _exactly(torch.gt),
    aten.gelu.default: _gelu,
    aten.rsub.Scalar: _rsub,
    aten.diagonal.default: _diagonal,
    aten.embedding_dense_backward.default: _embedding_dense_backward,
    aten.view.default: _reshape,
    aten._unsafe_view.default: _reshape,
    aten._scaled_dot_product_flash_attention_for_cpu.default: _flash,
    aten._scaled_dot_product_flash_attention_for_cpu_backward.default: _flash_backward,
    aten.convolution_backward.default: _convolution_backward,
    aten.avg_pool2d_backward.default: _avg_pool_backward(2),
    aten.avg_pool3d_backward.default: _avg_pool_backward(3),
    aten._adaptive_avg_pool2d_backward.default: _adaptive_avg_pool_backward(2),
    aten._adaptive_avg_pool3d_backward.default: _adaptive_avg_pool_backward(3),
    aten.upsample_nearest1d_backward.default: _nearest_backward(1, aten.upsample_nearest1d.default),
    aten.upsample_nearest2d_backward.default: _nearest_backward(2, aten.upsample_nearest1d.default),
    aten.upsample_nearest3d_backward.default: _nearest_backward(3, aten.upsample_nearest1d.default),
    aten._upsample_nearest_exact1d_backward.default: _nearest_backward(1, aten._upsample_nearest_exact1d.default),
    aten._upsample_nearest_exact2d_backward.default: _nearest_backward(2, aten._upsample_nearest_exact1d.default),
    aten.upsample_linear1d_backward.default: _linear_backward(1, aten.upsample_bilinear2d.default),
    aten.upsample_bilinear2d_backward.default: _linear_backward(2, aten.upsample_bilinear2d.default),
    aten.upsample_trilinear3d_backward.default: _linear_backward(3, aten.upsample_bilinear2d.default),
    aten.replication_pad1d_backward.default: _replication_pad_backward(1),
    aten.replication_pad2d_backward.default: _replication_pad_backward(2),
    aten.replication_pad3d_backward.default: _replication_pad_backward(3),
    aten._adaptive_avg_pool2d.default: _adaptive_avg_pool(2),
    aten._adaptive_avg_pool3d.default: _adaptive_avg_pool(3),
    aten.upsample_bicubic2d_backward.default: _linear_backward(2, aten.upsample_bicubic2d.default),
    aten.unfold_backward.default: _unfold_backward,
}

# Checks on metadata say nothing about values, and have no ONNX form.
DROPPED: frozenset[Any] = frozenset({aten._assert_tensor_metadata.default})
