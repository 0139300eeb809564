"""ATen-level forms of single operators, forward and backward, in operators that have an ONNX form.

Each is an equality for all inputs without NaN (a NaN gives a NaN somewhere, and its row then counts as zero). What selects
a value gives the index that torch's CPU kernel gives, since a gradient goes there. Sizes other than the batch's are static,
so loops over an axis unroll.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from dpbitfit_fx.errors import ExportError
from dpbitfit_fx.onnx_ctc import CTC

aten = torch.ops.aten
Tensor = torch.Tensor
NEGATIVE_INFINITY = float("-inf")


def _prelu(_: Any, x: Tensor, weight: Tensor) -> Tensor:
    # onnxscript's form takes the weight to lie along axis 1; here it is broadcast already.
    return torch.where(x > 0, x, weight * x)


def _silu_backward(_: Any, grad_out: Tensor, x: Tensor) -> Tensor:
    gate = torch.sigmoid(x)
    return grad_out * gate * (1 + x * (1 - gate))


def _mish_backward(_: Any, grad_out: Tensor, x: Tensor) -> Tensor:
    inner = torch.tanh(torch.nn.functional.softplus(x))
    return grad_out * (inner + x * (1 - inner * inner) * torch.sigmoid(x))


def _shrink_backward(_: Any, grad_out: Tensor, x: Tensor, lambd: float = 0.5) -> Tensor:
    return torch.where(x.abs() <= lambd, torch.zeros_like(grad_out), grad_out)


# -- what selects: pooling maxima, order statistics, running extremes --------------------------------------------------


def _max_pool_backward(spatial: int) -> Callable[..., Tensor]:
    """Every output's gradient goes to its maximum: ``indices`` [.., out] number the cells of the plane [in]."""

    def lower(_: Any, grad_out: Tensor, x: Tensor, *rest: Any) -> Tensor:
        indices = rest[-1]
        flat = x.flatten(-spatial)
        spread = torch.zeros_like(flat).scatter_add(-1, indices.flatten(-spatial), grad_out.flatten(-spatial))
        return spread.reshape(x.shape)

    return lower


def _adaptive_max_pool(spatial: int) -> Callable[..., tuple[Tensor, Tensor]]:
    """Output o of m reads the cells floor(o n / m) .. ceil((o + 1) n / m) of n, the last one again where a window is short.
    Of equals the first in memory counts."""

    def lower(_: Any, x: Tensor, output_size: Sequence[int]) -> tuple[Tensor, Tensor]:
        first, places, plane = x.dim() - spatial, torch.zeros((), dtype=torch.int64), 1
        for axis, outputs in enumerate(output_size):
            at = first + 2 * axis  # [.., n, ..] -> [.., outputs, widest, ..]
            n = int(x.shape[at])
            windows = [range(o * n // outputs, -(-(o + 1) * n // outputs)) for o in range(outputs)]
            widest = max(len(w) for w in windows)
            reads = torch.tensor([min(w.start + i, w.stop - 1) for w in windows for i in range(widest)])
            x = x.index_select(at, reads).reshape(*x.shape[:at], outputs, widest, *x.shape[at + 1 :])
            places = places * n + reads.reshape(outputs, widest, *[1] * (2 * (spatial - axis - 1)))
            plane *= n
        inner = [first + 2 * axis + 1 for axis in range(spatial)]
        # A window of NaN has no maximum: its place is one that exists.
        found = torch.where(x == x.amax(inner, keepdim=True), places, torch.full_like(places, plane - 1))
        return x.amax(inner), found.amin(inner)

    return lower


def _kthvalue(_: Any, x: Tensor, k: int, dim: int = -1, keepdim: bool = False) -> tuple[Tensor, Tensor]:
    values, indices = torch.topk(x, k, dim, largest=False, sorted=True)
    value, index = values.narrow(dim, k - 1, 1), indices.narrow(dim, k - 1, 1)
    return (value, index) if keepdim else (value.squeeze(dim), index.squeeze(dim))


def _median(run: Any, x: Tensor, dim: int = -1, keepdim: bool = False) -> tuple[Tensor, Tensor]:
    return _kthvalue(run, x, (x.shape[dim] + 1) // 2, dim, keepdim)


def _mode(run: Any, x: Tensor, dim: int = -1, keepdim: bool = False) -> tuple[Tensor, Tensor]:
    """The smallest of the most frequent values, at its last place: [.., n] compared with itself, [.., n, n]."""
    count = int(x.shape[dim])
    if count > 16:
        raise ExportError(
            f"The private graph uses aten.mode over {count} values (node {run.current}). Beyond 16 values torch gives any of "
            "the equal ones, so that its gradient cannot be matched. Train this model with the PyTorch step."
        )
    last = x.movedim(dim, -1)
    same = (last.unsqueeze(-1) == last.unsqueeze(-2)).to(x.dtype).sum(-1)
    often = same == same.amax(-1, keepdim=True)
    value = torch.where(often, last, torch.full_like(last, float("inf"))).amin(-1, keepdim=True)
    places = torch.arange(count, device=x.device)
    index = torch.where(last == value, places, torch.full_like(places, -1)).amax(-1, keepdim=True)
    value, index = value.movedim(-1, dim), index.movedim(-1, dim)
    return (value, index) if keepdim else (value.squeeze(dim), index.squeeze(dim))


def _running(sign: float) -> Callable[..., tuple[Tensor, Tensor]]:
    """cummax (1.0) or cummin (-1.0): extremes over every prefix, [.., n] against a triangle [n, n], the latest of equals."""

    def lower(_: Any, x: Tensor, dim: int) -> tuple[Tensor, Tensor]:
        count = x.shape[dim]
        last = x.movedim(dim, -1).unsqueeze(-2)
        seen = torch.ones(count, count, dtype=torch.bool, device=x.device).tril()
        # Not sign * x: an integer, or a zero, would change.
        if sign > 0:
            values = torch.where(seen, last, torch.full_like(last, NEGATIVE_INFINITY)).amax(-1)
        else:
            values = torch.where(seen, last, torch.full_like(last, float("inf"))).amin(-1)
        places = torch.arange(count, device=x.device)
        hit = (last == values.unsqueeze(-1)) & seen
        indices = torch.where(hit, places, torch.full_like(places, -1)).amax(-1)
        return values.movedim(-1, dim), indices.movedim(-1, dim)

    return lower


def _searchsorted(
    run: Any, boundaries: Tensor, x: Tensor, *, out_int32: bool = False, right: bool = False, side: str | None = None,
    sorter: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """How many boundaries lie below (right: at or below) a value."""
    if sorter is not None:
        boundaries = boundaries.gather(-1, sorter)
    values = x.unsqueeze(-1)
    edges = boundaries if boundaries.dim() == 1 else boundaries.unsqueeze(-2)
    below = edges <= values if right or side == "right" else edges < values
    return below.to(torch.int64).sum(-1).to(torch.int32 if out_int32 else torch.int64)


def _where(_: Any, condition: Tensor, x: Tensor, y: Tensor) -> Tensor:
    if not (x.is_complex() or y.is_complex()):
        return torch.where(condition, x, y)
    kind = torch.promote_types(x.dtype, y.dtype)
    shape = torch.broadcast_shapes(condition.shape, x.shape, y.shape)  # type: ignore[no-untyped-call]
    condition, x, y = condition.expand(shape), x.to(kind).expand(shape), y.to(kind).expand(shape)
    return torch.view_as_complex(torch.where(condition.unsqueeze(-1), torch.view_as_real(x), torch.view_as_real(y)))


# -- products and other arithmetic -----------------------------------------------------------------------------------


def _promoted(x: Tensor, dtype: torch.dtype | None) -> Tensor:
    return x.to(dtype or (x.dtype if x.dtype.is_floating_point else torch.int64))


def _prod(_: Any, x: Tensor, dim: int, keepdim: bool = False, *, dtype: torch.dtype | None = None) -> Tensor:
    """Halves times halves, log2(n) products."""
    x = _promoted(x, dtype)
    if x.dim() == 0:
        return x
    if x.shape[dim] == 0:
        return torch.ones_like(x.sum(dim, keepdim))
    while (count := int(x.shape[dim])) > 1:
        half = count // 2
        pairs = x.narrow(dim, 0, half) * x.narrow(dim, half, half)
        x = torch.cat([pairs, x.narrow(dim, count - 1, 1)], dim) if count % 2 else pairs
    return x if keepdim else x.squeeze(dim)


def _cumprod(_: Any, x: Tensor, dim: int, *, dtype: torch.dtype | None = None) -> Tensor:
    """Products of windows of 2, 4, 8 .. that end at each place (Hillis and Steele, 1986)."""
    x = _promoted(x, dtype)
    if x.dim() == 0:
        return x
    count, step = int(x.shape[dim]), 1
    while step < count:
        later = x.narrow(dim, step, count - step) * x.narrow(dim, 0, count - step)
        x, step = torch.cat([x.narrow(dim, 0, step), later], dim), 2 * step
    return x


def _hypot(_: Any, x: Tensor, y: Tensor) -> Tensor:
    """m sqrt(1 + (n/m)^2), m the larger and n the smaller of |x| and |y|: no square overflows."""
    x, y = x.abs(), y.abs()
    large, small = torch.maximum(x, y), torch.minimum(x, y)
    plain = (large > 0) & (large < float("inf"))
    ratio = torch.where(plain, small, torch.zeros_like(small)) / torch.where(plain, large, torch.ones_like(large))
    return large * (1 + ratio * ratio).sqrt()


def _bessel(odd: bool) -> Callable[..., Tensor]:
    """I_0 (or I_1) = 1/pi times the integral over 0 .. pi of cosh(x c), (or c sinh(x c)), c = cos t, by the trapezoidal rule,
    whose error over a period falls exponentially: exp(-64^2 / 2x). Infinite from x = 89 on, where torch's is from 92 on.
    """

    def lower(_: Any, x: Tensor) -> Tensor:
        c = torch.cos(torch.linspace(0, torch.pi / 2, 17, dtype=torch.float64)).to(x.dtype)  # a quarter of 64 points
        weight = torch.tensor([1.0, *[2.0] * 15, 1.0], dtype=x.dtype) / 32
        at = x.unsqueeze(-1) * c
        return ((c * torch.sinh(at) if odd else torch.cosh(at)) * weight).sum(-1)

    return lower


# -- memory as it lies ------------------------------------------------------------------------------------------------


def _storage(
    run: Any, x: Tensor, size: Sequence[int], stride: Sequence[int], offset: int | None
) -> tuple[Tensor, list[int], list[int]]:
    """``x`` as it lies in memory, [B, n]; the order of its axes there; the cells [k] that the view reads of each row.

    ONNX has no strides. A view that stays within a row of the batch is a gather by numbers known now.
    """
    inner = list(zip(x.stride()[1:], x.shape[1:], range(1, x.dim()), strict=True))
    fixed = all(isinstance(v, int) for s, n, _ in inner for v in (s, n))
    order = [0, *(d for _, _, d in sorted(inner, key=lambda t: (-t[0], t[2])))] if fixed else []
    count = 1
    for axis in reversed(order[1:]):
        fixed = fixed and (x.shape[axis] == 1 or x.stride()[axis] == count)
        count *= x.shape[axis]
    cells = [offset or 0]  # in Python: torch would trace them
    for n, step in zip(size[1:], stride[1:], strict=True):
        fixed = fixed and isinstance(n, int) and isinstance(step, int)
        cells = [c + i * step for c in cells for i in range(n)] if fixed else cells
    # The run on real tensors, before the symbolic one, compares the rows; a comparison of a symbol would fix it.
    fixed = fixed and (not isinstance(x.shape[0], int) or size[0] == x.shape[0])
    if not (fixed and x.stride()[0] == stride[0] == count and max(cells) < count):
        raise ExportError(
            f"The private graph views memory by strides across the rows of its batch (node {run.current}), and ONNX has no "
            "strides. Use reshape, transpose or unfold in the model instead of as_strided."
        )
    return x.permute(order).reshape(-1, count), order, cells


def _as_strided(run: Any, x: Tensor, size: Sequence[int], stride: Sequence[int], offset: int | None = None) -> Tensor:
    flat, _, cells = _storage(run, x, size, stride, offset)
    return flat.index_select(1, torch.tensor(cells)).reshape(-1, *size[1:])


def _as_strided_scatter(
    run: Any, x: Tensor, source: Tensor, size: Sequence[int], stride: Sequence[int], offset: int | None = None
) -> Tensor:
    flat, order, cells = _storage(run, x, size, stride, offset)
    origin = dict(zip(cells, range(len(cells)), strict=True))
    places = [origin.get(i, -1) for i in range(flat.shape[1])]
    written = source.reshape(-1, len(cells)).index_select(1, torch.tensor([max(i, 0) for i in places]))
    merged = torch.where(torch.tensor([i >= 0 for i in places]), written, flat)
    back = sorted(range(x.dim()), key=order.__getitem__)
    return merged.reshape(-1, *(x.shape[d] for d in order[1:])).permute(back)


def _diagonal_scatter(_: Any, x: Tensor, source: Tensor, offset: int = 0, dim1: int = 0, dim2: int = 1) -> Tensor:
    """``source`` [.., k] on the diagonal of x [.., n, m], by a table of the k places that each cell would read."""
    axes = dim1 % x.dim(), dim2 % x.dim()
    rows, columns = (int(x.shape[a]) for a in axes)
    row, column = torch.arange(rows).unsqueeze(1), torch.arange(columns).unsqueeze(0)
    cell = (row - max(-offset, 0)).expand(rows, columns).clamp(0, source.shape[-1] - 1)
    spread = source.index_select(-1, cell.flatten()).reshape(*source.shape[:-1], rows, columns)
    return torch.where(column - row == offset, spread, x.movedim(axes, (-2, -1))).movedim((-2, -1), axes)


# -- distances --------------------------------------------------------------------------------------------------------


def _cdist(_: Any, a: Tensor, b: Tensor, p: float, mode: int | None = None) -> Tensor:
    """[.., n, d], [.., m, d] -> [.., n, m]."""
    gap = (a.unsqueeze(-2) - b.unsqueeze(-3)).abs()
    if p == 0:
        return (gap != 0).to(a.dtype).sum(-1)
    if p == float("inf"):
        return gap.amax(-1)
    if p == 1:
        return gap.sum(-1)
    return (gap * gap).sum(-1).sqrt() if p == 2 else gap.pow(p).sum(-1).pow(1 / p)


def _cdist_backward(_: Any, grad_out: Tensor, a: Tensor, b: Tensor, p: float, distance: Tensor) -> Tensor:
    """Of the first argument. A pair at distance 0 has gradient 0, as torch's kernel."""
    difference = a.unsqueeze(-2) - b.unsqueeze(-3)
    grad, far = grad_out.unsqueeze(-1), distance.unsqueeze(-1)
    zero = torch.zeros((), dtype=a.dtype, device=a.device)
    if p == 0:
        return torch.zeros_like(a)
    if p == 1:
        return (grad * difference.sign()).sum(-2)
    if p == float("inf"):
        return (grad * difference.sign() * (difference.abs() == far).to(a.dtype)).sum(-2)
    apart = far != 0
    divisor = torch.where(apart, far, torch.ones_like(far))
    if p == 2:
        return torch.where(apart, grad * difference / divisor, zero).sum(-2)
    size = difference.abs()
    kept = apart & (size != 0) if p < 2 else apart
    base = torch.where(kept, size, torch.ones_like(size))
    slope = difference.sign() * base.pow(p - 1) / divisor.pow(p - 1)
    return torch.where(kept, grad * slope, zero).sum(-2)


# -- sampling a grid --------------------------------------------------------------------------------------------------


def _grid_places(x: Tensor, size: int, padding: int, align: bool) -> tuple[Tensor, Tensor]:
    """Places in cells for coordinates in [-1, 1], and their derivative: ATen's GridSampler, padding 0 zeros, 1 border,
    2 reflection."""
    place = (x + 1) / 2 * (size - 1) if align else ((x + 1) * size - 1) / 2
    slope = torch.full_like(x, (size - 1) / 2 if align else size / 2)
    if padding == 2:
        low, high = (0.0, size - 1.0) if align else (-0.5, size - 0.5)
        if high == low:
            return torch.zeros_like(x), torch.zeros_like(x)
        span = high - low
        slope = torch.where(place < low, -slope, slope)
        offset = (place - low).abs()
        flips = torch.floor(offset / span)
        rest = offset - flips * span
        odd = flips - 2 * torch.floor(flips / 2) != 0
        place = torch.where(odd, span - rest, rest) + low
        slope = torch.where(odd, -slope, slope)
    if padding:
        inside = (place > 0) & (place < size - 1)
        slope = torch.where(inside, slope, torch.zeros_like(slope))
        place = place.clamp(0, size - 1)
    return place, slope


def _grid_sampler_2d_backward(
    run: Any, grad_out: Tensor, x: Tensor, grid: Tensor, mode: int, padding: int, align: bool,
    output_mask: Sequence[bool],
) -> tuple[Tensor | None, Tensor | None]:  # fmt: skip
    """x [N, C, H, W], grid [N, h, w, 2], grad_out [N, C, h, w]; bilinear (0) and nearest (1)."""
    if mode not in (0, 1):
        raise ExportError(
            f"The private graph uses aten.grid_sampler_2d_backward with bicubic interpolation (node {run.current}), which "
            "has no ONNX form here yet. Use bilinear interpolation, or train this model with the PyTorch step."
        )
    height, width = int(x.shape[2]), int(x.shape[3])
    column, slope_x = _grid_places(grid[..., 0], width, padding, align)
    row, slope_y = _grid_places(grid[..., 1], height, padding, align)
    flat = x.flatten(2)  # [N, C, H W]
    grad = grad_out.flatten(2)  # [N, C, h w]
    one = torch.ones_like(column)
    if mode == 1:
        corners = [(torch.round(row), torch.round(column), one, one * 0, one * 0)]
    else:
        top, left = torch.floor(row), torch.floor(column)
        down, right = row - top, column - left
        corners = [
            (top, left, (1 - down) * (1 - right), down - 1, right - 1),
            (top, left + 1, (1 - down) * right, 1 - down, -right),
            (top + 1, left, down * (1 - right), -down, 1 - right),
            (top + 1, left + 1, down * right, down, right),
        ]
    grad_x, to_column, to_row = torch.zeros_like(flat), torch.zeros_like(column), torch.zeros_like(row)
    for i, j, weight, by_column, by_row in corners:
        inside = (i >= 0) & (i <= height - 1) & (j >= 0) & (j <= width - 1)
        # Not by clamp: onnxscript's optimizer fuses two of one value into a graph that does not load.
        cell = torch.where(inside, i * width + j, torch.zeros_like(i)).to(torch.int64)
        index = cell.flatten(1).unsqueeze(1).expand(-1, x.shape[1], -1)
        kept = inside.to(x.dtype)
        grad_x = grad_x.scatter_add(2, index, grad * (weight * kept).flatten(1).unsqueeze(1))
        value = ((flat.gather(2, index) * grad).sum(1) * kept.flatten(1)).reshape(column.shape)
        to_column, to_row = to_column + value * by_column, to_row + value * by_row
    grad_grid = torch.stack([to_column * slope_x, to_row * slope_y], -1)
    return (grad_x.reshape(x.shape) if output_mask[0] else None), (grad_grid if output_mask[1] else None)


OPERATORS: dict[Any, Callable[..., Any]] = {
    aten._prelu_kernel.default: _prelu,
    aten.silu_backward.default: _silu_backward,
    aten.mish_backward.default: _mish_backward,
    aten.hardshrink_backward.default: _shrink_backward,
    aten.softshrink_backward.default: _shrink_backward,
    aten.max_pool2d_with_indices_backward.default: _max_pool_backward(2),
    aten.max_pool3d_with_indices_backward.default: _max_pool_backward(3),
    aten.adaptive_max_pool2d.default: _adaptive_max_pool(2),
    aten.adaptive_max_pool3d.default: _adaptive_max_pool(3),
    aten.adaptive_max_pool2d_backward.default: _max_pool_backward(2),
    aten.adaptive_max_pool3d_backward.default: _max_pool_backward(3),
    aten.kthvalue.default: _kthvalue,
    aten.median.dim: _median,
    aten.mode.default: _mode,
    aten.cummax.default: _running(1.0),
    aten.cummin.default: _running(-1.0),
    aten.where.self: _where,
    aten.as_strided.default: _as_strided,
    aten.as_strided_scatter.default: _as_strided_scatter,
    aten.diagonal_scatter.default: _diagonal_scatter,
    aten.searchsorted.Tensor: _searchsorted,
    aten._cdist_forward.default: _cdist,
    aten._cdist_backward.default: _cdist_backward,
    aten.grid_sampler_2d_backward.default: _grid_sampler_2d_backward,
    aten.prod.dim_int: _prod,
    aten.cumprod.default: _cumprod,
    aten.hypot.default: _hypot,
    aten.i0.default: _bessel(odd=False),
    aten.special_i1.default: _bessel(odd=True),
    **CTC,
}

_FACTORIZATION = "ONNX has no factorization of matrices"
UNSUPPORTED: dict[str, str] = {
    **{
        f"aten.{name}.default": _FACTORIZATION
        for name in (
            "_linalg_solve_ex",
            "_linalg_slogdet",
            "_linalg_det",
            "_linalg_eigh",
            "_linalg_svd",
            "linalg_cholesky_ex",
            "linalg_inv_ex",
            "linalg_lu_factor_ex",
            "linalg_matrix_exp",
            "linalg_qr",
            "linalg_solve_triangular",
        )
    },
    "aten._fused_rms_norm_backward.default": "write the RMS norm in plain operators, as transformers does",
    "aten._scaled_dot_product_efficient_attention.default": "it was compiled for CUDA; compile on the CPU to export",
    "aten._scaled_dot_product_flash_attention.default": "it was compiled for CUDA; compile on the CPU to export",
    "aten._scaled_dot_product_cudnn_attention.default": "it was compiled for CUDA; compile on the CPU to export",
}
