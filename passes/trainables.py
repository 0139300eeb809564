"""Which parameters are trained: biases by name or by structure, or any by pattern, less the excluded (design §5)."""

from __future__ import annotations

import difflib
import fnmatch
import operator
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import fx, nn

from .errors import CompileRefused
from .joint_graph import AddedBias, Selection, Target

aten = torch.ops.aten
NOT_A_BIAS = {"table", "position", "positional", "pos", "relative", "rel", "embedding", "embeddings", "mask", "weight"}
RESHAPES = {
    aten.view.default,
    aten.reshape.default,
    aten._unsafe_view.default,
    aten.unsqueeze.default,
    aten.squeeze.dim,
    aten.squeeze.default,
    aten.squeeze.dims,
    aten.expand.default,
    aten.slice.Tensor,
    aten.select.int,
    aten.permute.default,
    aten.transpose.int,
    aten._to_copy.default,
    aten.to.dtype,
    aten.to.dtype_layout,
    aten.to.device,
    aten.contiguous.default,
    aten.flatten.using_ints,
    aten.unflatten.int,
    aten.clone.default,
    aten.alias.default,
    aten.split.Tensor,
    aten.split_with_sizes.default,
    aten.chunk.default,
    aten.neg.default,
}
SCALES = {aten.mul.Tensor, aten.mul.Scalar, aten.div.Tensor, aten.div.Scalar}
ADDS = {aten.add.Tensor, aten.sub.Tensor, aten.rsub.Scalar}


def is_bias_name(name: str) -> bool:
    """True when the leaf name is ``bias`` or has it as a whole word, and is not a table of positions."""
    words = set(re.split(r"[_\d]+", name.rsplit(".", 1)[-1]))
    return "bias" in words and not words & NOT_A_BIAS


def select_by_name(
    model: nn.Module, trainable: str | tuple[str, ...] | list[str] = "bias", added: Iterable[str] = ()
) -> list[str]:
    """Names, in ``named_parameters`` order, that ``trainable`` takes by name alone; tied parameters appear once.

    ``added`` are the names of biases that the model lacks and that may be trained all the same.
    """
    added = list(added)
    names = [name for name, _ in model.named_parameters()] + added
    if trainable == "bias":
        return [n for n in names if is_bias_name(n)]
    if trainable == "all":
        return names
    patterns = [trainable] if isinstance(trainable, str) else list(trainable)
    taken: set[str] = set()
    for pattern in patterns:
        matched = _matches(model, pattern, added)
        if not matched and pattern != "bias":
            raise CompileRefused(_no_match(model, "trainable", pattern, added))
        taken |= matched
    return [n for n in names if n in taken]


def _matches(model: nn.Module, pattern: str, added: Sequence[str] = ()) -> set[str]:
    """First names of the parameters of which any name matches; ``"bias"`` is every bias by name."""
    if pattern == "bias":
        return {n for n in (*dict(model.named_parameters()), *added) if is_bias_name(n)}
    first = {id(p): name for name, p in model.named_parameters()}
    every = dict(model.named_parameters(remove_duplicate=False))
    return {first[id(every[a])] for a in every if fnmatch.fnmatchcase(a, pattern)} | set(fnmatch.filter(added, pattern))


def _no_match(model: nn.Module, option: str, pattern: str, added: Sequence[str]) -> str:
    names = [*dict(model.named_parameters(remove_duplicate=False)), *added]
    plain = re.sub(r"[*?!\[\]]", "", pattern).strip(".")

    def likeness(name: str) -> float:
        return max(difflib.SequenceMatcher(None, plain, part).ratio() for part in (name, *name.split(".")))

    near = sorted(names, key=likeness, reverse=True)[:4]
    return (
        f"{option} pattern {pattern!r} matches no parameter of {type(model).__name__}. The nearest names are "
        f"{', '.join(near)}; patterns are shell-style and match the whole name, such as '*bias' or 'classifier.*'."
    )


def _exclude(
    model: nn.Module, exclude: Sequence[str], rules: Mapping[str, str], added: Sequence[str]
) -> dict[str, str]:
    """``{name: pattern}`` of what is taken out of ``rules``; a pattern that takes nothing out is refused."""
    excluded: dict[str, str] = {}
    for pattern in exclude:
        matched = _matches(model, pattern, added)
        if not matched:
            raise CompileRefused(_no_match(model, "exclude", pattern, added))
        if not matched & rules.keys():
            raise CompileRefused(
                f"exclude pattern {pattern!r} takes nothing out: none of what it matches ({', '.join(sorted(matched)[:3])}) "
                f"would be trained. What would be: {', '.join(list(rules)[:3])}. Leave the pattern out, or correct it."
            )
        excluded.update({n: pattern for n in rules if n in matched and n not in excluded})
    return excluded


def added_only(placeholder: fx.Node) -> str | None:
    """None if every use of the parameter ends in an addition, through reshape, slice or scaling; else why not."""
    todo, seen, additions = [placeholder], set(), 0
    while todo:
        node = todo.pop()
        if node in seen:
            continue
        seen.add(node)
        if not node.users:
            continue
        for user in node.users:
            if user.target in ADDS and user.args[0] is not user.args[1]:
                additions += 1
            elif user.target in RESHAPES or user.target is operator.getitem:
                todo.append(user)
            elif user.target in SCALES:
                other = user.args[1] if user.args[0] is node else user.args[0]
                if isinstance(other, fx.Node):
                    return "it is multiplied by another tensor"
                todo.append(user)
            else:
                return f"it is used by {user.target}, not only added"
    return None if additions else "it is never added to an activation"


def select(
    model: nn.Module,
    trainable: str | tuple[str, ...],
    placeholders: dict[str, fx.Node],
    exclude: tuple[str, ...] = (),
    added: Iterable[AddedBias] = (),
    passed_over: Mapping[str, str] | None = None,
) -> Selection:
    """Names, then structure, less ``exclude``. ``placeholders`` maps a parameter's name to its node in the exported graph.

    ``added`` biases are chosen by the same patterns; ``passed_over`` are those that could not be added, with the reason.
    """
    params: dict[str, Any] = dict(model.named_parameters())
    new = {b.name: b for b in added}
    named = select_by_name(model, trainable, new)
    rules = {n: "add_bias" if n in new else "name" if trainable == "bias" else "pattern" for n in named}
    misses: list[tuple[str, str]] = list((passed_over or {}).items())
    if trainable == "bias" or (not isinstance(trainable, str) and "bias" in trainable):
        for name, p in params.items():
            node = placeholders.get(name)
            if name in rules or node is None:
                continue
            words = set(re.split(r"[_\d]+", name.rsplit(".", 1)[-1]))
            wide = sum(size > 1 for size in p.shape) > 1
            reason = added_only(node)
            if reason is None and not wide and p.numel() and _channel_axis(p):
                rules[name] = "structure"
            elif reason is None:
                misses.append((name, "it is added to activations but varies along a token or spatial axis"))
            elif "bias" in words:
                misses.append((name, f"its name says bias, but it is a table or {reason}"))
    excluded = _exclude(model, exclude, rules, list(new))
    rules = {n: rule for n, rule in rules.items() if n not in excluded}
    unused = [n for n in rules if n not in new and (n not in placeholders or not placeholders[n].users)]
    if not isinstance(trainable, str) or trainable not in ("bias", "all"):
        patterns = [trainable] if isinstance(trainable, str) else trainable
        for name in unused:
            if name in patterns:
                raise CompileRefused(
                    f"{name} was asked for by its full name, but the loss does not use it, so it gets no gradient. "
                    "Leave it out of `trainable`, or use it in the model or the loss."
                )
    targets = tuple(
        Target(n, tuple(p.shape), p.dtype, rules[n])
        for n, p in {**params, **new}.items()
        if n in rules and n not in unused
    )
    if not targets:
        less = f" less {list(exclude)!r}" if exclude else ""
        raise CompileRefused(
            f"{type(model).__name__} has no parameter for trainable={trainable!r}{less} that the loss uses: "
            "nothing would be trained. Give name patterns, e.g. trainable=['*norm*', 'classifier.*'], "
            "or add_bias=True for new biases behind the products that lack one."
        )
    for t in targets:
        if not t.dtype.is_floating_point:
            raise CompileRefused(f"{t.name} has dtype {t.dtype}; only floating point parameters can be trained.")
    return Selection(targets, tuple(misses), tuple(unused), tuple(excluded.items()))


def _channel_axis(p: torch.Tensor) -> bool:
    """``[C]``, ``[1, .., C]`` or ``[C, 1, 1]`` (also ``[1, C, 1, 1]``): one axis, last or before trailing spatial ones."""
    wide = [i for i, size in enumerate(p.shape) if size > 1]
    if not wide:
        return True
    behind = p.dim() - 1 - wide[0]
    return behind != 1  # [T, 1] varies along tokens; [C, 1, 1] along channels
