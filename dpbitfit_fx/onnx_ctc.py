"""CTC (Graves et al. 2006), forward and backward, in operators that have an ONNX form: the recursions unrolled over T."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

import dpbitfit_fx.passes.ctc_rule  # noqa: F401  (defines them)

Tensor = torch.Tensor
NEGATIVE_INFINITY = float("-inf")


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


CTC: dict[Any, Callable[..., Any]] = {
    torch.ops.dpbitfit.ctc_loss.default: _ctc,
    torch.ops.dpbitfit.ctc_loss_backward.default: _ctc_backward,
}
