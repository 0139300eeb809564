"""What a refusal tells the user: the error in one line, the line of their code, and what to write instead."""

from __future__ import annotations

import re
import traceback
from types import FrameType
from typing import Any

from .unify import LIBRARIES

# Functions of libraries that look at values, by name, with the switch of their own that keeps them from it.
SWITCHES = {
    "_detect_is_causal_mask": "Give nn.TransformerEncoder or Decoder is_causal=True or False (tgt_is_causal, "
    "memory_is_causal): without it torch compares the mask with a causal one.",
    "pack_padded_sequence": "Run the recurrent net on the padded batch, and take each sequence's own last step by "
    "output.gather(1, lengths - 1); read the reversed direction of a padded batch from a sequence flipped by its length.",
    "nested_tensor_from_mask": "Give nn.TransformerEncoder enable_nested_tensor=False.",
}
# What the user's line looks like, and what keeps its values in the graph.
ADVICE = (
    (
        r"\.item\(\)|\.tolist\(\)|\.numpy\(\)|\b(float|int|bool)\(",
        "Keep the value a tensor: arithmetic with a 0-dim tensor needs no number of Python.",
    ),
    (
        r"^\s*(if|elif|while|assert)\b|\bif\b.*\belse\b",
        "Compute both branches and choose by torch.where(condition, a, b).",
    ),
    (
        r"nonzero|unique|masked_select|argwhere|\[[^\]]*([<>]|==|!=|mask)[^\]]*\]",
        "Keep every entry and weigh it by the mask (torch.where, a masked sum), so that no size depends on values.",
    ),
)


def first_line(error: BaseException) -> str:
    lines = [x.strip() for x in str(error).splitlines() if x.strip()]
    return f"{type(error).__name__}: {lines[0][:300] if lines else 'no message'}".rstrip(".")


def _frames(error: BaseException) -> list[traceback.FrameSummary]:
    """Frames of the error and of those it came from, the innermost last."""
    found: list[traceback.FrameSummary] = []
    cause: BaseException | None = error
    while cause is not None:
        found += traceback.extract_tb(cause.__traceback__)
        cause = cause.__cause__
    return found


def user_line(error: BaseException) -> str:
    """The innermost frame that is neither torch's nor ours: the user's model or loss."""
    frames = [f for f in traceback.extract_tb(error.__traceback__) if not any(part in f.filename for part in LIBRARIES)]
    if not frames:
        return ""
    return _place(frames[-1])


def frame_line(frame: FrameType) -> str:
    """The line that a running frame is at, as :func:`user_line` tells it."""
    code = frame.f_code
    return _place(traceback.FrameSummary(code.co_filename, frame.f_lineno, code.co_name))


def _place(frame: traceback.FrameSummary) -> str:
    return (
        f' It comes from File "{frame.filename}", line {frame.lineno}, in {frame.name}: `{(frame.line or "").strip()}`.'
    )


def advice(error: BaseException, place: str, node: Any = None) -> str:
    """The library's own switch if a function of its looked at values; else by the user's line, in backticks in ``place``."""
    op = str(node.target) if node is not None and node.op == "call_function" else "aten."
    if "." in op and not op.startswith(("aten.", "<", "higher_order.")):
        return " It is an operator of your own: give it a rule with dpbitfit_fx.sample_rule."
    for frame in _frames(error):
        if frame.name in SWITCHES:
            return " " + SWITCHES[frame.name]
    line = place.partition(": `")[2].rpartition("`")[0]
    return next((f" {text}" for pattern, text in ADVICE if line and re.search(pattern, line)), "")


def unbatched(text: str) -> str:
    """``namespace::op`` from functorch's warning that an operator has no batching rule, else ''."""
    found = re.search(r"batching rule for ([\w]+::[\w]+)", text)
    return found.group(1) if found else ""
