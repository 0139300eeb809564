"""Which parameters are trained: biases by name or by structure, or any by pattern (design §5)."""

from __future__ import annotations

import fnmatch
import operator
import re

import torch
from torch import fx, nn

from .errors import CompileRefused
from .joint_graph import Selection, Target

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


def select_by_name(model: nn.Module, trainable: str | tuple[str, ...] | list[str] = "bias") -> list[str]:
    """Names, in ``named_parameters`` order, that ``trainable`` takes by name alone; tied parameters appear once."""
    names = [name for name, _ in model.named_parameters()]
    if trainable == "bias":
        return [n for n in names if is_bias_name(n)]
    if trainable == "all":
        return names
    patterns = [trainable] if isinstance(trainable, str) else list(trainable)
    aliases = [name for name, _ in model.named_parameters(remove_duplicate=False)]
    for pattern in patterns:
        if pattern != "bias" and not fnmatch.filter(aliases, pattern):
            raise CompileRefused(
                f"trainable pattern {pattern!r} matches no parameter of {type(model).__name__}. Names look like "
                f"{', '.join(names[:3])}; patterns are shell-style, such as '*bias' or 'classifier.*'."
            )
    first = {id(p): name for name, p in model.named_parameters()}
    every = dict(model.named_parameters(remove_duplicate=False))
    taken = {first[id(every[a])] for a in aliases if any(fnmatch.fnmatchcase(a, p) for p in patterns)}
    if "bias" in patterns:
        taken |= {n for n in names if is_bias_name(n)}
    return [n for n in names if n in taken]


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


def select(model: nn.Module, trainable: str | tuple[str, ...], placeholders: dict[str, fx.Node]) -> Selection:
    """Names, then structure. ``placeholders`` maps a parameter's name to its node in the exported one-sample graph."""
    params = dict(model.named_parameters())
    named = select_by_name(model, trainable)
    rules = {n: "name" if trainable == "bias" else "pattern" for n in named}
    misses: list[tuple[str, str]] = []
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
    unused = [n for n in rules if n not in placeholders or not placeholders[n].users]
    if not isinstance(trainable, str) or trainable not in ("bias", "all"):
        patterns = [trainable] if isinstance(trainable, str) else trainable
        for name in unused:
            if name in patterns:
                raise CompileRefused(
                    f"{name} was asked for by its full name, but the loss does not use it, so it gets no gradient. "
                    "Leave it out of `trainable`, or use it in the model or the loss."
                )
    targets = tuple(
        Target(n, tuple(p.shape), p.dtype, rules[n]) for n, p in params.items() if n in rules and n not in unused
    )
    if not targets:
        raise CompileRefused(
            f"{type(model).__name__} has no parameter for trainable={trainable!r} that the loss uses: nothing would be "
            "trained. Give name patterns, e.g. trainable=['*norm*', 'classifier.*']."
        )
    for t in targets:
        if not t.dtype.is_floating_point:
            raise CompileRefused(f"{t.name} has dtype {t.dtype}; only floating point parameters can be trained.")
    return Selection(targets, tuple(misses), tuple(unused))


def _channel_axis(p: torch.Tensor) -> bool:
    """``[C]``, ``[1, .., C]`` or ``[C, 1, 1]`` (also ``[1, C, 1, 1]``): one axis, last or before trailing spatial ones."""
    wide = [i for i, size in enumerate(p.shape) if size > 1]
    if not wide:
        return True
    behind = p.dim() - 1 - wide[0]
    return behind != 1  # [T, 1] varies along tokens; [C, 1, 1] along channels
