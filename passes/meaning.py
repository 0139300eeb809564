"""Pass 3, check the meaning: sample by sample must be what the author meant (design §4), or the model is refused.

The user's own batched model runs beside the captured step on probes: several sizes, permuted, perturbed, recombined.
Losses and gradients must agree. Rewrites nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NoReturn

import torch
from torch.autograd.function import BackwardCFunction

from .bias_slots import applied, moved
from .errors import CompileRefused, too_little_memory
from .joint_graph import JointGraph
from .lengths import ADVICE, resized
from .mixing import ROUNDING, TOLERANCE, close, mixing_refusal, takes, user_loss
from .model_state import dropout_as_asked, untouched
from .probes import WIDE, alike, differing, first_failing, length_of, monotonous, probes_of, recombined, tensors_of
from .random_draws import example, of_row
from .replay import replaying

SILENT = "silent"  # among what a probe's loss can be: no row of it has a gradient, so that its agreement proves nothing


def check_meaning(joint: JointGraph) -> JointGraph:
    """Refuses a model that mixes samples, or whose batched loss is neither per sample nor their mean or sum."""
    assert joint.source is not None
    kinds, model = {"per sample", "mean", "sum", SILENT}, joint.source.model
    probes, same = probes_of(joint.source), alike(tensors_of(joint.source.example_batch)[0])
    with (
        untouched(model),
        dropout_as_asked(model, joint.source.dropout),
        applied(model, joint.added, joint.state),
    ):
        for batch in probes:
            wide = batch[0].shape[0] == WIDE
            kinds &= _compare_recombined(joint, batch, same) if wide else _compare_probe(joint, batch)
            if not kinds - {SILENT}:
                what = "its scalar loss is neither always the mean nor always the sum"
                raise CompileRefused(mixing_refusal(joint.source, batch, what))
        if SILENT in kinds:
            raise CompileRefused(
                "The gradients of all trainables are zero for every row of example_batch, so it cannot show whether "
                "samples mix. Give rows from which something is learned: labels that the loss does not leave out, and no "
                "weight of zeros between the trainables and the loss (a new head that is not trained, say)."
            )
        _check_added(joint, probes[::3])
        _check_draws(joint, probes[1])
    return joint


def _compare_recombined(joint: JointGraph, batch: list[torch.Tensor], same: list[int]) -> set[str]:
    """The probe with its ids and masks recombined and its floats far from the example's; and what is the ``same`` in all rows
    of the example made to differ. Each of it only where the model takes it: it cannot know every value."""
    base = recombined(batch) or batch
    at = {*same, *(i for i, x in enumerate(batch) if x.dtype.is_floating_point)}
    found = [k for few in monotonous(batch) if (k := _compare_taken(joint, few)) is not None]
    if at and (far := _compare_taken(joint, differing(base, at))) is not None:
        return far.intersection(*found)
    each = [k for i in same if (k := _compare_taken(joint, differing(batch, {i}))) is not None]
    if len(same) == len(batch) and not each:
        raise CompileRefused(
            "All rows of example_batch are the same, and the model takes none of the other values that were tried, so it "
            "cannot show whether samples mix. Give rows that differ (made up or public, never private)."
        )
    near = None if base is batch else _compare_taken(joint, base)
    return (_compare_probe(joint, batch) if near is None else near).intersection(*found, *each)


def _compare_taken(joint: JointGraph, probe: list[torch.Tensor]) -> set[str] | None:
    """None where the model does not take the probe, so that its refusal is not held against it."""
    assert joint.source is not None
    try:
        return _compare_probe(joint, probe)
    except CompileRefused:
        if takes(joint.source, probe):
            raise
        return None


def _compare_probe(joint: JointGraph, batch: list[torch.Tensor]) -> set[str]:
    try:
        return _compare_at_zero(joint, batch)
    except CompileRefused as error:
        _refuse_length(joint, batch, error)
        raise


def _check_draws(joint: JointGraph, batch: list[torch.Tensor]) -> None:
    """Fed the same random numbers, the user's own code on one sample at a time must agree, in scale and in place."""
    if not joint.draws or joint.source is None:
        return
    model = joint.source.model
    rows = batch[0].shape[0]
    given = [x.to(batch[0].device) for x in example(joint.draws, rows)]
    for row in range(rows):
        try:
            _compare(joint, [x[row : row + 1] for x in batch], given=[x[row : row + 1] for x in given])
        except CompileRefused as error:
            raise CompileRefused(
                f"dropout=True: given the same random numbers, {type(model).__name__} and the captured step disagree on one "
                f"sample. The first of its {len(joint.draws)} draws:{joint.draws[0].origin or ' unknown.'} Leave "
                "dropout=False, or put modules that draw out of order, or without using it, in eval mode."
            ) from error


def _refuse_length(joint: JointGraph, batch: list[torch.Tensor], error: CompileRefused) -> None:
    """Refuses the dynamic length where the same rows agree at a captured length: the fault is the length's alone."""
    source, dynamic = joint.source, joint.length
    if source is None or dynamic is None:
        return
    names = tensors_of(source.example_batch)[1]
    if _agrees(joint, [resized(batch, names, dynamic, dynamic.captured[0])]):
        raise CompileRefused(
            f"dynamic_shapes: the graph captured at the lengths {dynamic.captured[0]} and {dynamic.captured[1]} is not the "
            f"model{length_of(source, batch)}: it branches on the length, or depends on it in a way that two lengths do not "
            f"show. {ADVICE} ({str(error)[:600]})"
        ) from error


def _compare_at_zero(joint: JointGraph, batch: list[torch.Tensor]) -> set[str]:
    """:func:`_compare`, in which an added bias that the model does not add is not mistaken for mixed samples."""
    try:
        return _compare(joint, batch)
    except CompileRefused:
        added = [b.name for b in joint.added]
        own = {t.name for t in joint.targets} - set(added)
        if added and _agrees(joint, [batch], own):
            _refuse_added([n for n in added if not _agrees(joint, [batch], own | {n})])
        raise


def _check_added(joint: JointGraph, probes: list[list[torch.Tensor]]) -> None:
    """Biases of zero prove little of themselves: with other values too, the model that has them must agree."""

    def agrees(names: list[str]) -> bool:
        with moved(joint.state[n] for n in names):
            return _agrees(joint, probes)

    names = [b.name for b in joint.added]
    if names and not agrees(names):
        _refuse_added([n for n in names if not agrees([n])] or names)


def _agrees(joint: JointGraph, probes: list[list[torch.Tensor]], names: set[str] | None = None) -> bool:
    try:
        return all(bool(_compare(joint, batch, names)) for batch in probes)
    except CompileRefused:
        return False


def _refuse_added(wrong: list[str]) -> NoReturn:
    raise CompileRefused(
        f"add_bias: {', '.join(wrong[:8])} would act in the model otherwise than in the captured step: the layer's own "
        f"forward does not add a bias to its product alone. Leave it out, e.g. exclude={wrong[:8]!r}."
    )


def run_joint(
    joint: JointGraph, batch: list[torch.Tensor], given: Sequence[torch.Tensor] = ()
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Losses [B] and per-sample gradients of a graph that has not been clipped yet."""
    with torch.no_grad():
        try:
            loss, *gradients = joint.module(*joint.values([*batch, *given]))
        except (RuntimeError, IndexError) as error:
            also = "" if joint.length is None else " and of this length"
            raise too_little_memory(error, batch[0].shape[0]) or CompileRefused(
                f"The captured graph does not run for a batch of {batch[0].shape[0]} samples{also} ({str(error)[:300]}): a "
                f"size in it depends on the batch in a way that is not understood.{first_failing(joint, [*batch, *given])}"
            ) from error
    return loss, gradients


def _compare(
    joint: JointGraph,
    batch: list[torch.Tensor],
    names: set[str] | None = None,
    given: list[torch.Tensor] | None = None,
) -> set[str]:
    """What the loss can be, and whether it is silent; refuses where losses, or gradients (of ``names`` alone, if given), differ.

    given: the random numbers of a batch of one; without them everything is kept, in both, and uniforms are all low, then
    all high: whichever way they are compared, once the branch that they switch is on, and its mixing seen.
    """
    size, draws = batch[0].shape[0], joint.draws
    if given is not None:
        with replaying(draws, size, of_row(draws, given, 0)):
            return _compare_given(joint, batch, names, given)
    kinds = {"per sample", "mean", "sum", SILENT}
    for level in (0.98, 0.02) if any(d.keep is None for d in draws) else (0.98,):
        made_up = [x.to(batch[0].device) for x in example(draws, size, constant=level)]
        with replaying(draws, size, constant=level):
            kinds &= _compare_given(joint, batch, names, made_up)
    return kinds


def _compare_given(
    joint: JointGraph, batch: list[torch.Tensor], names: set[str] | None, given: list[torch.Tensor]
) -> set[str]:
    source, size, coarse = joint.source, batch[0].shape[0], _rounds_to(joint)
    assert source is not None
    params = dict(source.model.named_parameters())
    taken = [i for i, t in enumerate(joint.targets) if names is None or t.name in names]
    chosen = [params[joint.targets[i].name] for i in taken]
    flags = [p.requires_grad for p in chosen]
    try:
        for p in chosen:
            p.requires_grad_(True)
        with torch.enable_grad():
            try:
                loss = user_loss(source, batch)
            except CompileRefused:
                raise
            except Exception as error:
                also = "" if source.length is None else ", and for every length that dynamic_shapes declares"
                raise too_little_memory(error, size) or CompileRefused(
                    f"loss_fn failed on a batch of {size} samples{length_of(source, batch)} ({type(error).__name__}: "
                    f"{str(error)[:300]}). It must work for every batch size, since private batches vary in size{also}."
                ) from error
            per_sample = loss.shape == (size,)
            if loss.dim() and not per_sample:
                raise CompileRefused(
                    f"loss_fn returned shape {list(loss.shape)} for a batch of {size}; it must return one loss per sample, shape "
                    "[B] (or their mean or sum). For a loss per token, reduce over each sample's tokens first, e.g. "
                    "loss.mean(dim=1)."
                )
            weights = torch.linspace(0.5, 1.5, size, dtype=loss.dtype, device=loss.device)
            # What it keeps for its backward is gone before the captured step runs: at 17 rows both are large.
            theirs = _user_gradients((loss * weights).sum() if per_sample else loss, chosen)
    finally:
        for p, flag in zip(chosen, flags, strict=True):
            p.requires_grad_(flag)
    captured, gradients = run_joint(joint, batch, given)
    if per_sample:
        kinds, same = {"per sample"}, close(loss.detach(), captured, coarse)
    else:
        mean, total = (close(loss.detach(), x, coarse) for x in (captured.mean(), captured.sum()))
        kinds = {k for k, ok in (("mean", mean), ("sum", total)) if ok}
        same = bool(kinds)
        weights = torch.full((size,), 1.0 / size if "mean" in kinds else 1.0, dtype=loss.dtype, device=loss.device)
    if not same:
        scalar = "" if loss.dim() else " its scalar loss is neither the mean nor the sum of the per-sample losses, and"
        raise CompileRefused(
            mixing_refusal(source, batch, f"{scalar} losses differ from those of each sample alone".strip())
        )
    if not chosen:
        return kinds
    if theirs is None:
        raise CompileRefused(
            "The loss has no gradient with respect to any trainable: loss_fn or the model detaches it, or runs under "
            "torch.no_grad(). Nothing would be trained."
        )
    if isinstance(theirs, RuntimeError):
        raise too_little_memory(theirs, size) or CompileRefused(
            f"The model's own backward fails ({str(theirs)[:400]}), so the captured one has nothing to agree with."
        ) from theirs
    gradients = [gradients[i] for i in taken]
    ours = [torch.einsum("b,b...->...", weights.to(g), g) for g in gradients]
    others = [torch.zeros_like(p) if g is None else g for g, p in zip(theirs, chosen, strict=True)]
    norms = [(g.double().flatten(1).norm(dim=1) * weights.double()).sum() for g in gradients]
    whole = (torch.cat([g.double().flatten(1) for g in gradients], 1).norm(dim=1) * weights.double()).sum()
    targets = [joint.targets[i] for i in taken]
    for target, mine, other, norm in zip(targets, ours, others, norms, strict=True):
        kind = max((coarse, target.dtype), key=lambda d: TOLERANCE.get(d, 1e-3))
        # A gradient that is zero but for rounding (a key bias under softmax) is measured against the whole.
        allowed = TOLERANCE.get(kind, 1e-3) * norm + ROUNDING.get(kind, 1e-5) * whole + 1e-12
        if not bool((mine.double() - other.double()).norm() <= allowed):
            own = _own_backward(loss)
            what = f"gradients of the batch differ from those of each sample alone, first {target.name}'s"
            if own:
                raise CompileRefused(
                    f"The gradient of {target.name} is not the derivative of the forward: {type(source.model).__name__} "
                    f"uses the autograd.Function {own} with a backward of its own, which a captured graph cannot call. "
                    "Choose the model's switch that avoids it, or write the operation in plain torch."
                )
            raise CompileRefused(mixing_refusal(source, batch, what))
    return kinds | ({SILENT} if whole == 0.0 else set())


def _user_gradients(
    objective: torch.Tensor, chosen: list[torch.nn.Parameter]
) -> Sequence[torch.Tensor | None] | RuntimeError | None:
    """Of the user's own backward; None where the objective has none, and the error where it fails: losses are judged first."""
    if not chosen or not objective.requires_grad:
        return None
    try:
        return torch.autograd.grad(objective, chosen, allow_unused=True)
    except RuntimeError as error:
        return error


def _own_backward(loss: torch.Tensor) -> str:
    """The first custom autograd.Function on the way back from the loss, by its class name; '' if there is none."""
    todo: list[Any] = [loss.grad_fn]
    seen: set[Any] = set()
    while todo:
        node = todo.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if isinstance(node, BackwardCFunction):
            return type(node).__name__.removesuffix("Backward")
        todo += [n for n, _ in node.next_functions]
    return ""


def _rounds_to(joint: JointGraph) -> torch.dtype:
    """float32 when the graph casts to it somewhere (LLaMA's norms do, in a float64 model too), else float64."""
    casts = (x for n in joint.module.graph.nodes for x in (*n.args, *n.kwargs.values()))
    return torch.float32 if any(x is torch.float32 for x in casts) else torch.float64
