"""The verdict on a drawn network: refused, or what finally runs is private, right for every sample, and what was meant.

Private is tested by perturbation of what finally runs: one row becomes anything, and no other row's part may move. Right
is equality with autograd on one sample at a time. Meant is equality with the model's own batched loss and gradient.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import re
from collections.abc import Callable, Iterable
from typing import Any

import torch
from hypothesis import HealthCheck, Phase, given, seed, settings
from mixes import RARE
from networks import ROWS, Network, networks
from torch import Tensor, nn

import dpbitfit_fx as dpb

SAME = 1e-12  # of what must not move at all: room for a kernel that rounds by address, not for a dependence
RIGHT = 1e-9
MEANT = 5e-8  # the compiler's own check stops at 1e-8, on other rows
COPIES = (2, 1, 3, 4, 5, 8)  # torch's eval BatchNorm is wrong for a batch of one (design §3), so two come first
ORDER = [5, 1, 4, 0, 2, 3]  # of the made-up rows; the compiler has seen 0 to 3
BATCHES = (ORDER[:5], [*ORDER, *ORDER])  # ordinary ones; the second has each row twice, and more than eight
BAD = ("unsound", "meaning missed", "wrong")


@dataclasses.dataclass(frozen=True)
class Verdict:
    """``sealed``, ``refused``, ``invalid`` (the model itself fails), or one of ``BAD``; ``rarely missed`` where a mix of
    :data:`mixes.RARE` shows in a region of values that the example batch does not enter."""

    kind: str
    why: str = ""


def _loss_alone(network: Network, row: int, copies: int) -> Tensor:
    """The loss of a row, from a batch of nothing but copies of it."""
    loss = network.loss(network.model, network.rows([row] * copies))
    return loss[0] if loss.dim() else loss / copies if network.summed else loss


def _own(network: Network, row: int, copies: int, trained: list[nn.Parameter]) -> tuple[Tensor, Tensor]:
    """The model's own loss and gradient [D] of a row, from a batch of copies of it."""
    loss = _loss_alone(network, row, copies)
    return loss.detach(), _flat(torch.autograd.grad(loss, trained, allow_unused=True), trained)


def _flat(gradients: Any, like: Any) -> Tensor:
    """One row: the gradients one after the other, zeros where there is none."""
    return torch.cat(
        [(torch.zeros_like(p) if g is None else g).flatten() for g, p in zip(gradients, like, strict=True)]
    )


def _contributions(step: dpb.PrivateStep, batch: tuple[Tensor, ...]) -> Tensor:
    """[B, D]: what each row alone adds to the clipped sum of this batch."""
    one_hot = torch.eye(batch[0].shape[0])
    return torch.stack([step.accumulate(batch, mask, step.zero_accumulator()) for mask in one_hot])


def _gradients(step: dpb.PrivateStep, batch: tuple[Tensor, ...]) -> Tensor:
    """[B, D], unclipped."""
    return torch.cat([g.flatten(1) for g in step.per_sample_gradients(batch).values()], 1)


def _with_row(batch: tuple[Tensor, ...], row: int, value: float) -> tuple[Tensor, ...]:
    """Another record in the row: entries of the size of ``value``, other ids, another label."""
    x, y = (t.clone() for t in batch)
    x[row] = torch.randn(x[row].shape).to(x) * value + value if x.is_floating_point() else (x[row] * 5 + 3) % 9
    y[row] = (y[row] + 1) % 3
    return x, y


def _moved(before: Tensor, after: Tensor, tolerance: float) -> bool:
    """Whether any row differs by more than the tolerance times its norm; equal NaNs are equal."""
    equal = (before == after) | (before.isnan() & after.isnan())
    apart = torch.where(equal, 0.0, before - after)
    return not bool((apart.norm(dim=-1) <= tolerance * before.nan_to_num().norm(dim=-1)).all())


def unsound(network: Network, step: dpb.PrivateStep, trained: list[nn.Parameter]) -> str:
    """How one row moves another's part of what finally runs, or bounds are not kept; '' if nothing of it is so."""
    batch = network.rows(ORDER[:5])
    parts, gradients = _contributions(step, batch), _gradients(step, batch)
    whole, allowed = step.accumulate(batch, torch.ones(5), step.zero_accumulator()), parts.norm(dim=1).sum()
    if not bool(parts.norm(dim=1).max() <= step.max_grad_norm * (1 + 1e-9)):
        return "one row adds more than the sensitivity"
    if not bool((whole - parts.sum(0)).norm() <= SAME * allowed):
        return "the clipped sum is not the sum of what its rows add"
    kept = {k: v.clone() for k, v in network.model.state_dict().items()}
    for row, value in ((0, 3.0), (4, float("nan")), (2, 1e6)):
        rest = [i for i in range(5) if i != row]
        other = _with_row(batch, row, value)
        with contextlib.suppress(Exception):  # a model may raise on NaN; what it remembers must not reach the step
            network.loss(network.model, other)
        if _moved(parts[rest], _contributions(step, other)[rest], SAME):
            return f"another row {row} moves what the others add"
        if _moved(gradients[rest], _gradients(step, other)[rest], SAME):
            return f"another row {row} moves the others' gradients"
        mask = torch.ones(5)
        mask[row] = 0.0
        masked = step.accumulate(other, mask, step.zero_accumulator())
        if not bool((masked - parts[rest].sum(0)).norm() <= SAME * allowed):
            return f"row {row}, masked out, moves the clipped sum"
        left = tuple(x[rest] for x in batch)
        left_parts, left_gradients = _contributions(step, left), _gradients(step, left)
        for at, i in enumerate(rest):
            if not _moved(parts[i], left_parts[at], RIGHT):
                continue
            # A tie of max, which rounding alone decides, moves the gradient too, to another one of the model's own.
            tie = _moved(gradients[i], left_gradients[at], RIGHT)
            if not tie or _alone(network, ORDER[i], trained, left_gradients[at]) is None:
                return f"without row {row} in the batch, another row adds something else"
    if any(not torch.equal(v, kept[k]) for k, v in network.model.state_dict().items()):
        return "the model's state keeps what it saw"
    return ""


def _alone(network: Network, row: int, trained: list[nn.Parameter], ours: Tensor) -> Tensor | None:
    """The row's loss, in a batch of copies of it where the model's own gradient is ``ours``; None if it is so in none.

    The size may matter: two equal tokens under ``max`` differ by rounding alone, which the batch's size decides.
    """
    for copies in COPIES:
        loss, theirs = _own(network, row, copies, trained)
        if bool((ours - theirs).norm() <= RIGHT * theirs.norm().clamp(min=1e-6)):
            return loss
    return None


def wrong(network: Network, step: dpb.PrivateStep, trained: list[nn.Parameter]) -> tuple[str, list[Tensor]]:
    """What is wrong with the per-sample gradients, '' if nothing; and the loss of each row of ``ORDER`` alone."""
    ours, alone = _gradients(step, network.rows(ORDER)), []
    for at, row in enumerate(ORDER):
        loss = _alone(network, row, trained, ours[at])
        if loss is None:
            return "a per-sample gradient is not the model's own", []
        alone.append(loss)
    params = dict(network.model.named_parameters())
    found = torch.autograd.grad(_loss_alone(network, ORDER[0], 2), list(params.values()), allow_unused=True)
    reached = {n for n, g in zip(params, found, strict=True) if g is not None and n.rsplit(".", 1)[-1] == "bias"}
    if missing := sorted(reached - set(step.trainable_names)):
        return f"biases with a gradient are not trained: {missing}", []
    return "", alone


def missed(network: Network, step: dpb.PrivateStep, trained: list[nn.Parameter], alone: list[Tensor]) -> str:
    """How the model's own loss or gradient of a batch differs from what its samples say alone; '' if it does not."""
    gradients = _gradients(step, network.rows(ORDER))
    for rows in BATCHES:
        at = [ORDER.index(row) for row in rows]
        loss = network.loss(network.model, network.rows(rows))
        wanted = torch.stack([alone[i] for i in at])
        if not loss.dim():
            wanted = wanted.sum() if network.summed else wanted.mean()
        if loss.shape != wanted.shape or not torch.allclose(loss, wanted, rtol=MEANT, atol=MEANT):
            return f"the loss of a batch of {len(rows)} is not that of its samples"
        weights = torch.linspace(0.5, 1.5, len(rows)).double()  # mixed gradients may cancel in a plain sum
        if not loss.dim():
            weights = torch.full_like(weights, 1.0 if network.summed else 1.0 / len(rows))
        objective = (loss * weights).sum() if loss.dim() else loss
        theirs = torch.autograd.grad(objective, trained, allow_unused=True)
        ours, whole, first = weights[:, None] * gradients[at], float(weights @ gradients[at].norm(dim=1)), 0
        for parameter, other in zip(trained, theirs, strict=True):
            part = ours[:, first : first + parameter.numel()]
            first += parameter.numel()
            apart = part.sum(0) - (0.0 if other is None else other.flatten())
            if not bool(apart.norm() <= MEANT * part.norm(dim=1).sum() + 0.1 * MEANT * whole + SAME):
                return f"the gradient of a batch of {len(rows)} is not that of its samples"
    return ""


def _tied(network: Network, trained: list[nn.Parameter]) -> bool:
    """Whether the gradient of a row among copies of itself depends on their number: see :func:`_alone`."""
    for row in range(ROWS):
        found = [_own(network, row, n, trained)[1] for n in COPIES]
        if any(bool((g - found[0]).norm() > RIGHT * found[0].norm().clamp(min=1e-6)) for g in found[2:]):
            return True
    return False


def judge(network: Network) -> Verdict:
    """Compile the network and test what finally runs."""
    try:
        together = network.loss(network.model, network.rows(ORDER[:5])).detach()
        alone = [_loss_alone(network, row, 2).detach() for row in ORDER]
        if not all(bool(torch.isfinite(x).all()) for x in (together, *alone)):
            return Verdict("invalid", "a loss is not finite")
    except Exception as error:
        return Verdict("invalid", f"{type(error).__name__}: {str(error)[:100]}")
    try:
        step = dpb.compile(
            network.model, network.loss, network.rows([0, 1, 2, 3]), noise_multiplier=1.0, expected_batch_size=4
        )
    except dpb.CompileRefused as error:
        return Verdict("refused", str(error))
    except Exception as error:
        return Verdict("wrong", f"compile raised {error!r:.200}")
    try:
        return judge_step(network, step)
    except Exception as error:
        return Verdict("wrong", f"accepted, and then raised {error!r:.200}")


def judge_step(network: Network, step: dpb.PrivateStep) -> Verdict:
    """The verdict on a network that was accepted."""
    if "sealed" not in step.report().facts:
        return Verdict("unsound", "accepted without a seal")
    params = dict(network.model.named_parameters())
    trained = [params[n] for n in step.trainable_names]
    if why := unsound(network, step, trained):
        return Verdict("unsound", why)
    why, alone = wrong(network, step, trained)
    if why:
        return Verdict("wrong", why)
    why = missed(network, step, trained, alone)
    if why and (network.mixes or not _tied(network, trained)):
        return Verdict("rarely missed" if network.way in RARE else "meaning missed", why)
    return Verdict("sealed")


Judged = list[tuple[Network, Verdict]]


def judge_many(count: int, start: int, mixing: float = 0.2, each: Callable[[Judged], None] | None = None) -> Judged:
    """``count`` networks that differ in their layers, drawn by Hypothesis from the seeds ``start``, ``start + 1``, ..."""
    judged: Judged = []
    seen: set[str] = set()
    while len(seen) < count:

        @seed(start)
        @settings(
            max_examples=max(
                20, count
            ),  # never as few as are missing: Hypothesis's first example is always the simplest
            phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
            deadline=None,
            derandomize=False,
            database=None,
        )
        @given(networks(mixing=mixing))
        def run(network: Network) -> None:
            if network.text not in seen and len(seen) < count:
                seen.add(network.text)
                judged.append((network, judge(network)))
                if each is not None:
                    each(judged)

        run()
        start += 1
    return judged


def _reason(why: str) -> str:
    """The first clause of a refusal, numbers and names left out; of a mix what differs."""
    words = why.partition("sample by sample: ")
    return re.split(r"[.,](?: |$)", re.sub(r"'[^']*'|\d+", "", words[2] or words[0]))[0][:90]


Tally = dict[str, dict[str, int]]


def tally(verdicts: Iterable[tuple[Network, Verdict]]) -> Tally:
    """Counts by kind, among mixing networks and the others; refusals by their reason; kinds by way."""
    found: dict[str, collections.Counter[str]] = collections.defaultdict(collections.Counter)
    for network, verdict in verdicts:
        which = "mixing" if network.mixes else "not mixing"
        found["kinds"][verdict.kind] += 1
        found[which][verdict.kind] += 1
        if network.mixes:
            found[f"way: {network.way}"][verdict.kind] += 1
        if verdict.kind == "refused":
            found[f"refused, {which}"][_reason(verdict.why)] += 1
    return {k: dict(v.most_common()) for k, v in sorted(found.items())}


def added(tallies: Iterable[Tally]) -> Tally:
    """One tally of several."""
    found: dict[str, collections.Counter[str]] = collections.defaultdict(collections.Counter)
    for one in tallies:
        for key, counts in one.items():
            found[key].update(counts)
    return {k: dict(v.most_common()) for k, v in sorted(found.items())}
