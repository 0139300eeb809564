"""CTC loss under vmap: the samples are folded into the operator's own batch axis (Graves et al. 2006; design §3).

torch's own has no batching rule, and the size of its second result depends on the lengths, so it cannot be exported. Here
it is an operator of fixed sizes, ``[B, T, N, C]`` folds into ``[T, B*N, C]``: one call forward, one backward. Lengths and
labels are clamped to what the operator takes, so that one bad record cannot stop a run.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

aten = torch.ops.aten
NONE, MEAN = 0, 1
custom_op: Any = torch.library.custom_op


@custom_op("dpbitfit::ctc_loss", mutates_args=())  # type: ignore[untyped-decorator]
def _forward(
    log_probs: Tensor, targets: Tensor, inputs: Tensor, lengths: Tensor, blank: int, zero_infinity: bool
) -> tuple[Tensor, Tensor]:
    """nll [N] and log alpha [N, T, 2 S + 1], the latter padded from the longest target to the S of ``targets``."""
    loss, alpha = aten._ctc_loss.Tensor(log_probs, targets, inputs, lengths, blank, zero_infinity)
    padding = 2 * targets.shape[1] + 1 - alpha.shape[2]
    return loss, torch.nn.functional.pad(alpha, (0, padding), value=float("-inf"))


@_forward.register_fake  # type: ignore[untyped-decorator]
def _(log_probs: Tensor, targets: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    steps, count, _ = log_probs.shape
    return log_probs.new_empty(count), log_probs.new_empty(count, steps, 2 * targets.shape[1] + 1)


@custom_op("dpbitfit::ctc_loss_backward", mutates_args=())  # type: ignore[untyped-decorator]
def _backward(
    grad: Tensor,
    log_probs: Tensor,
    targets: Tensor,
    inputs: Tensor,
    lengths: Tensor,
    loss: Tensor,
    alpha: Tensor,
    blank: int,
    zero_infinity: bool,
) -> Tensor:
    """The gradient of ``log_probs`` [T, N, C]."""
    alpha = alpha[..., : 2 * int(lengths.max()) + 1].contiguous()
    found: Tensor = aten._ctc_loss_backward.Tensor(
        grad.contiguous(), log_probs, targets, inputs, lengths, loss, alpha, blank, zero_infinity
    )
    return found


@_backward.register_fake  # type: ignore[untyped-decorator]
def _(grad: Tensor, log_probs: Tensor, *rest: Any) -> Tensor:
    return torch.empty_like(log_probs, memory_format=torch.contiguous_format)


def _apply(function: Any, *args: Any) -> Any:
    return function.apply(*args)


def _fold(x: Tensor, dim: int | None, batch: Any, axis: int) -> Tensor:
    """``[.., B at dim, ..]`` with the operator's batch at ``axis`` of a sample -> the two merged at ``axis``."""
    x = x.movedim(dim, axis) if dim is not None else x.unsqueeze(axis).expand(*x.shape[:axis], batch, *x.shape[axis:])
    return x.reshape(*x.shape[:axis], x.shape[axis] * x.shape[axis + 1], *x.shape[axis + 2 :])


def _unfold(x: Tensor, batch: Any, axis: int) -> Tensor:
    return x.reshape(*x.shape[:axis], batch, x.shape[axis] // batch, *x.shape[axis + 1 :])


def _batch_size(dims: Any, tensors: Any) -> Any:
    return next(x.shape[d] for x, d in zip(tensors, dims, strict=False) if d is not None)


# Where each tensor has the operator's batch axis N: grad, log_probs, targets, two lengths, nll, log alpha.
BACKWARD_AXES = (0, 1, 0, 0, 0, 0, 0)
FORWARD_AXES = BACKWARD_AXES[1:5]


class _CTCBackward(torch.autograd.Function):
    @staticmethod
    def forward(*args: Any) -> Any:
        return _backward(*args)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass

    @staticmethod
    def vmap(info: Any, in_dims: Any, *args: Any) -> Any:
        batch = _batch_size(in_dims[:7], args[:7])
        folded = [_fold(x, d, batch, a) for x, d, a in zip(args[:7], in_dims[:7], BACKWARD_AXES, strict=True)]
        return _unfold(_apply(_CTCBackward, *folded, *args[7:]), batch, 1), 1


class _CTC(torch.autograd.Function):
    @staticmethod
    def forward(*args: Any) -> Any:
        return _forward(*args)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.save_for_backward(*inputs[:4], *output)
        ctx.rest = inputs[4:]
        ctx.mark_non_differentiable(output[1])

    @staticmethod
    def backward(ctx: Any, grad: Any, _: Any) -> Any:
        return _apply(_CTCBackward, grad, *ctx.saved_tensors, *ctx.rest), None, None, None, None, None

    @staticmethod
    def vmap(info: Any, in_dims: Any, *args: Any) -> Any:
        batch = _batch_size(in_dims[:4], args[:4])
        folded = [_fold(x, d, batch, a) for x, d, a in zip(args[:4], in_dims[:4], FORWARD_AXES, strict=True)]
        loss, alpha = _apply(_CTC, *folded, *args[4:])
        return (_unfold(loss, batch, 0), _unfold(alpha, batch, 0)), (0, 0)


def _in_rule(*args: Any) -> Any:
    return _apply(_CTC, *args)


def ctc_loss(
    log_probs: Tensor,
    targets: Tensor,
    inputs: Any,
    lengths: Any,
    blank: int = 0,
    reduction: int = MEAN,
    zero_infinity: bool = False,
    *,
    op: Callable[..., Any] = _in_rule,
) -> Tensor:
    """``torch.ctc_loss`` over the operator of fixed sizes: log_probs ``[T, N, C]`` or ``[T, C]``, targets ``[N, S]``, ``[S]``."""
    single = log_probs.dim() == 2
    if single:
        log_probs = log_probs.unsqueeze(1)
    steps, count, classes = log_probs.shape
    labels = (targets if targets.dim() == 2 else targets.reshape(count, -1)).clamp(0, classes - 1)
    each = [x if isinstance(x, Tensor) else torch.tensor(x, device=labels.device) for x in (inputs, lengths)]
    sizes = [x.reshape(-1).long().clamp(0, most) for x, most in zip(each, (steps, labels.shape[1]), strict=True)]
    losses: Tensor = op(log_probs, labels, *sizes, blank, zero_infinity)[0]
    if zero_infinity:
        losses = losses.masked_fill(losses.isposinf(), 0.0)
    if reduction == NONE:
        return losses.squeeze(0) if single else losses
    if reduction == MEAN:
        return (losses / sizes[1].clamp_min(1).to(losses)).mean()
    return losses.sum()


def exportable(*args: Any, **kwargs: Any) -> Tensor:
    """``torch.ctc_loss`` as capture exports it: the operator of fixed sizes, for which ``RULES`` has the fold."""
    return ctc_loss(*args, **kwargs, op=_forward)


RULES: dict[Any, Callable[..., Any]] = {torch.ops.dpbitfit.ctc_loss.default: _in_rule}
