"""The order of the passes, one literal, and the runner that re-proves every claimed fact after each of them."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Collection
from typing import Any

from .bf16_attention import round_attention
from .capture import capture
from .clip import clip
from .dead_tokens import drop_dead_tokens
from .errors import CompileRefused, DPBitFitError, PassError
from .facts import PREDICATES
from .ghost import ghost
from .joint_graph import Fact, JointGraph, Source, TrailEntry
from .meaning import check_meaning
from .noise import add_noise
from .recompute import recompute
from .refusion import refuse_operators
from .saved_inputs import drop_saved_inputs
from .seal import seal, seal_partial

Observer = Callable[[str, JointGraph | None, JointGraph], None]


@dataclasses.dataclass(frozen=True)
class Pass:
    """A rewrite or a proof: the facts it needs before and gives after; ``option`` is the name that switches it off, if any."""

    name: str
    run: Callable[[Any], JointGraph]
    needs: frozenset[Fact] = frozenset()
    gives: frozenset[Fact] = frozenset()
    option: str = ""


CAPTURE = Pass("capture", capture, gives=frozenset({Fact.FUNCTIONAL, Fact.PER_SAMPLE}))
PIPELINE = (
    Pass("re-fuse", refuse_operators, needs=frozenset({Fact.FUNCTIONAL, Fact.PER_SAMPLE}), option="refusion"),
    Pass("dead_tokens", drop_dead_tokens, needs=frozenset({Fact.FUNCTIONAL, Fact.PER_SAMPLE}), option="dead_tokens"),
    Pass("check_meaning", check_meaning, needs=frozenset({Fact.FUNCTIONAL, Fact.PER_SAMPLE})),
    Pass("ghost", ghost, needs=frozenset({Fact.FUNCTIONAL, Fact.PER_SAMPLE})),
    Pass("clip", clip, needs=frozenset({Fact.PER_SAMPLE}), gives=frozenset({Fact.CLIPPED})),
    Pass("seal_partial", seal_partial, needs=frozenset({Fact.CLIPPED}), gives=frozenset({Fact.PARTIAL})),
)
RELEASE = (
    Pass("add_noise", add_noise, needs=frozenset({Fact.PARTIAL}), gives=frozenset({Fact.NOISED})),
    Pass("seal", seal, needs=frozenset({Fact.NOISED}), gives=frozenset({Fact.SEALED})),
)
LOWERING = (
    Pass("saved_inputs", drop_saved_inputs, needs=frozenset({Fact.PARTIAL}), option="saved_inputs"),
    Pass("recompute", recompute, needs=frozenset({Fact.PARTIAL}), option="recompute"),
)
# With precision="bf16", behind the lowerings that keep every bit.
ROUNDING = (Pass("bf16_attention", round_attention, needs=frozenset({Fact.PARTIAL}), option="bf16_attention"),)
OPTIONS = tuple(item.option for item in (*PIPELINE, *LOWERING, *ROUNDING) if item.option)
# The meaning is checked once per model; what follows runs again for every noise.
MEANING = 1 + [item.name for item in PIPELINE].index("check_meaning")
DEAD = "dead_tokens"
DEAD_TOKENS = [item.name for item in PIPELINE].index(DEAD)


def run(
    passes: tuple[Pass, ...],
    joint: JointGraph | Source,
    observer: Observer | None = None,
    disable: Collection[str] = (),
) -> JointGraph:
    """Runs the passes; after each, every fact claimed so far is proved again, so the pass that breaks one is blamed.

    ``disable``: options that are switched off; their passes do not run and leave no trail.
    """
    for item in passes:
        if item.option and item.option in disable:
            continue
        before = joint if isinstance(joint, JointGraph) else None
        missing = item.needs - (before.facts if before else frozenset())
        if missing:
            ran = [t.name for t in before.trail] if before else []
            raise PassError(f"Pass {item.name} needs {sorted(f.value for f in missing)}; what ran before: {ran}.")
        start = time.perf_counter()
        source = joint if not isinstance(joint, Source) else None
        after = item.run(joint)
        claimed = (before.facts if before else frozenset()) | item.gives
        for fact in sorted(claimed, key=lambda f: list(Fact).index(f)):
            try:
                PREDICATES[fact](after)
            except DPBitFitError as error:
                if item.name == "capture":
                    raise CompileRefused(str(error)) from error
                ran = [t.name for t in before.trail] if before else []
                raise PassError(
                    f"Pass {item.name} broke the fact {fact.value} ({error}); what ran before: {ran}."
                ) from error
        entry = TrailEntry(
            item.name,
            time.perf_counter() - start,
            len(before.module.graph.nodes) if before else 0,
            len(after.module.graph.nodes),
        )
        trail = (before.trail if before else ()) + (entry,)
        joint = dataclasses.replace(after, facts=claimed, trail=trail)
        if observer is not None:
            observer(item.name, source, joint)
    assert isinstance(joint, JointGraph)
    return joint
