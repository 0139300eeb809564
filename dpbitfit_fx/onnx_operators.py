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


# -- CTC --------------------------------------------------------------------------------------------------------------


def _log_add(*terms: Tensor) -> Tensor:
    """log Σ exp, -inf where all are."""
    top = terms[0]
    for term in terms[1:]:
        top = torch.maximum(top, term)
    base = torch.where(top == NEGATIVE_INFINITY, torch.zeros_like(top), top)
    return torch.log(sum((torch.exp(t - base) for t in terms[1:]), torch.exp(terms[0] - base))) + base


def _ctc_states(log_probs: Tensor, targets: Tensor, lengths: Tensor, blank: int) -> tuple[Tensor, Tensor, Tensor]:
    """The labels of the states blank, t_0, blank, ... [N, 2S+1]; who may be entered from two before; which exist."""
    between = torch.full_like(targets, blank)
    labels = torch.cat([torch.stack([between, targets], 2).flatten(1), between[:, :1]], 1)
    jump = torch.nn.functional.pad(labels[:, 2:] != labels[:, :-2], (2, 0), value=False)
    states = torch.arange(labels.shape[1], device=labels.device)
    return labels, jump, states <= 2 * lengths.unsqueeze(1)


def _ctc(
    _: Any, log_probs: Tensor, targets: Tensor, inputs: Tensor, lengths: Tensor, blank: int, zero_infinity: bool
) -> tuple[Tensor, Tensor]:
    """dpbitfit::ctc_loss: nll [N], log alpha [N, T, 2S+1] (Graves et al. 2006, eq. 6-8), unrolled over T."""
    labels, jump, exists = _ctc_states(log_probs, targets, lengths, blank)
    states = torch.arange(labels.shape[1], device=labels.device)
    never = torch.full(labels.shape, NEGATIVE_INFINITY, dtype=log_probs.dtype, device=labels.device)
    alpha = torch.where(exists & (states <= 1), log_probs[0].gather(1, labels), never)
    rows = [alpha]
    for t in range(1, log_probs.shape[0]):
        one = torch.nn.functional.pad(alpha[:, :-1], (1, 0), value=NEGATIVE_INFINITY)
        two = torch.nn.functional.pad(alpha[:, :-2], (2, 0), value=NEGATIVE_INFINITY)
        entered = _log_add(alpha, one, torch.where(jump, two, never))
        alpha = torch.where(exists, entered + log_probs[t].gather(1, labels), never)
        alpha = torch.where(inputs.unsqueeze(1) > t, alpha, never)
        rows.append(alpha)
    table = torch.stack(rows, 1)
    last = (inputs - 1).clamp(min=0).reshape(-1, 1, 1).expand(-1, 1, labels.shape[1])
    final = table.gather(1, last).squeeze(1)
    ends = (states >= 2 * lengths.unsqueeze(1) - 1) & exists
    at_end = torch.where(ends, final, never)
    top = at_end.amax(1)
    base = torch.where(top == NEGATIVE_INFINITY, torch.zeros_like(top), top)
    return -(torch.log(torch.exp(at_end - base.unsqueeze(1)).sum(1)) + base), table


def _ctc_backward(
    _: Any, grad: Tensor, log_probs: Tensor, targets: Tensor, inputs: Tensor, lengths: Tensor, loss: Tensor, alpha: Tensor,
    blank: int, zero_infinity: bool,
) -> Tensor:  # fmt: skip
    """dpbitfit::ctc_loss_backward: ``(exp(lp) - exp(log Σ_{s: l_s = c} alpha beta + nll - lp)) grad`` [T, N, C] (eq. 16)."""
    labels, jump, exists = _ctc_states(log_probs, targets, lengths, blank)
    states = torch.arange(labels.shape[1], device=labels.device)
    never = torch.full(labels.shape, NEGATIVE_INFINITY, dtype=log_probs.dtype, device=labels.device)
    ends = (states >= 2 * lengths.unsqueeze(1) - 1) & exists
    leaves = torch.nn.functional.pad(jump[:, 2:], (0, 2), value=False)
    onehot = (labels.unsqueeze(2) == torch.arange(log_probs.shape[2], device=labels.device)).to(log_probs.dtype)
    # A record that no path explains has no gradient, or one that is no number, as torch's kernel.
    scale = torch.where(loss == float("inf"), torch.full_like(grad, 0.0 if zero_infinity else float("nan")), grad)
    # torch's kernel writes the last label's share over the last blank's: they are one label where the target ends in a blank.
    final_label = labels.gather(1, (2 * lengths - 1).clamp(min=0).unsqueeze(1))
    shadowed = (states == 2 * lengths.unsqueeze(1)) & (final_label == blank) & (lengths > 0).unsqueeze(1)
    beta, rows = never, []
    for t in range(log_probs.shape[0] - 1, -1, -1):
        here = log_probs[t]
        emitted = here.gather(1, labels)
        one = torch.nn.functional.pad(beta[:, 1:], (0, 1), value=NEGATIVE_INFINITY)
        two = torch.nn.functional.pad(beta[:, 2:], (0, 2), value=NEGATIVE_INFINITY)
        inner = torch.where(exists, _log_add(beta, one, torch.where(leaves, two, never)) + emitted, never)
        final = torch.where(ends, emitted, never)
        at_end, before = (inputs == t + 1).unsqueeze(1), (inputs > t + 1).unsqueeze(1)
        beta = torch.where(at_end, final, torch.where(before, inner, never))
        both = alpha[:, t] + beta
        # exp(both + nll - lp) per state, then summed per label: each is a posterior times a label's probability, <= 1.
        share = torch.exp(both + loss.unsqueeze(1) - emitted)
        share = torch.where((both == NEGATIVE_INFINITY) | (shadowed & at_end), torch.zeros_like(share), share)
        summed = torch.bmm(share.unsqueeze(1), onehot).squeeze(1)
        inside = (inputs > t).unsqueeze(1)
        row = (torch.exp(here) - summed) * scale.unsqueeze(1)
        dropped = scale == 0 if zero_infinity else torch.zeros_like(scale, dtype=torch.bool)
        row = torch.where(inside & ~dropped.unsqueeze(1), row, torch.zeros_like(row))
        rows.append(row)
    return torch.stack(rows[::-1], 0)


def _ctc_operators() -> dict[Any, Callable[..., Any]]:
    import dpbitfit_fx.passes.ctc_rule  # noqa: F401  (defines them)

    ours = torch.ops.dpbitfit
    return {ours.ctc_loss.default: _ctc, ours.ctc_loss_backward.default: _ctc_backward}


OPERATORS: dict[Any, Callable[..., Any]] = {
    aten._prelu_kernel.default: _prelu,
    aten.silu_backward.default: _silu_backward,
    aten.mish_backward.default: _mish_backward,
    aten.hardshrink_backward.default: _shrink_backward,
    aten.softshrink_backward.default: _shrink_backward,
    aten.max_pool2d_with_indices_backward.default: _max_pool_backward(2),
    aten.max_pool3d_with_indices_backward.default: _max_pool_backward(3),
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
    aten.searchsorted.Tensor: _searchsorted,
    aten._cdist_forward.default: _cdist,
    aten._cdist_backward.default: _cdist_backward,
    aten.grid_sampler_2d_backward.default: _grid_sampler_2d_backward,
    **_ctc_operators(),
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
