"""What was chosen, rewritten and proved, readable by a person and as a dict."""

from __future__ import annotations

import dataclasses
from typing import Any

from .lowering import Lowered
from .passes.joint_graph import DynamicLength, JointGraph, Role


@dataclasses.dataclass(frozen=True)
class Report:
    """Trainables with the rule that chose each, near misses, facts proved, and what each pass did. All of it public."""

    model: str
    trained: tuple[tuple[str, tuple[int, ...], str], ...]
    near_misses: tuple[tuple[str, str], ...]
    unused: tuple[str, ...]
    num_trainable: int
    num_parameters: int
    facts: tuple[str, ...]
    passes: tuple[tuple[str, float, int, int], ...]
    operators: dict[str, int]
    public_inputs: tuple[str, ...]
    graph_hash: str
    slow: tuple[str, ...] = ()
    ghosts: tuple[tuple[str, str], ...] = ()
    packed: tuple[str, ...] = ()
    packed_bytes: int = 0
    excluded: tuple[tuple[str, str], ...] = ()
    folded: tuple[str, ...] = ()
    dropped: tuple[str, ...] = ()
    dropout: tuple[str, ...] = ()
    padded_length: str = ""
    optimized: tuple[str, ...] = ()

    @property
    def share(self) -> float:
        return self.num_trainable / max(1, self.num_parameters)

    def to_dict(self) -> dict[str, Any]:
        return {**dataclasses.asdict(self), "share": self.share}

    def __str__(self) -> str:
        lines = [
            f"{self.model}: {len(self.trained)} trainables, {self.num_trainable:,} of {self.num_parameters:,} parameters "
            f"({self.share:.3%}); proved: {', '.join(self.facts)}; graph {self.graph_hash[:12]}"
        ]
        lines += [f"  trained  {name} {list(shape)} (by {rule})" for name, shape, rule in self.trained]
        lines += [f"  excluded  {name} (by {pattern!r})" for name, pattern in self.excluded]
        lines += [f"  near miss  {name}: {why}" for name, why in self.near_misses]
        lines += [f"  large  {name}: {how}" for name, how in self.ghosts]
        lines += [f"  unused by the loss  {name}" for name in self.unused]
        lines += [f"  assumed public  {name}" for name in self.public_inputs]
        lines += [f"  dropout  {what}" for what in self.dropout]
        lines += [f"  padded length, public  {self.padded_length}"] if self.padded_length else []
        lines += [f"  assertion on values taken out  {what}" for what in self.dropped]
        lines += [
            f"  pass {name}: {before} -> {after} nodes in {seconds:.2f} s"
            for name, seconds, before, after in self.passes
        ]
        lines += [f"  slow  {operator}" for operator in self.slow]
        lines += [f"  optimized  {what}" for what in self.optimized]
        if self.packed:
            lines += [
                f"  packed  {len(self.packed)} products with frozen weights ({self.packed_bytes / 1e6:.1f} MB more memory)"
            ]
        return "\n".join(lines)


def make_report(model: Any, joint: JointGraph, lowered: Lowered) -> Report:
    params = {**dict(model.named_parameters()), **{b.name: joint.state[b.name] for b in joint.added}}
    operators: dict[str, int] = {}
    for node in joint.module.graph.nodes:
        if node.op == "call_function":
            operators[str(node.target)] = operators.get(str(node.target), 0) + 1
    return Report(
        model=type(model).__name__,
        trained=tuple((t.name, t.shape, t.rule) for t in joint.targets),
        near_misses=joint.selection.near_misses,
        unused=joint.selection.unused,
        num_trainable=joint.num_trainable,
        num_parameters=sum(p.numel() for p in params.values()),
        facts=tuple(sorted(f.value for f in joint.facts)),
        passes=tuple((t.name, t.seconds, t.nodes_before, t.nodes_after) for t in joint.trail),
        operators=operators,
        public_inputs=tuple(i.target for i in joint.with_role(Role.FROZEN) if i.target not in params),
        graph_hash=joint.digest(),
        slow=joint.slow,
        ghosts=joint.ghosts,
        packed=tuple(pack.target for pack in lowered.packs),
        packed_bytes=lowered.packed_bytes,
        excluded=joint.selection.excluded,
        folded=joint.folded,
        dropped=joint.dropped,
        dropout=tuple(
            f"{'uniforms' if d.keep is None else f'keeps {d.keep:g}'} {list(d.shape)} a sample.{d.origin}"
            for d in joint.draws
        ),
        padded_length=_padded_length(joint.length),
        optimized=lowered.joint.optimized,
    )


def _padded_length(length: DynamicLength | None) -> str:
    if length is None:
        return ""
    places = ", ".join(f"dimension {dim} of {name}" for name, dim in length.dims.items())
    return f"{length.checked[0]} to {length.checked[-1]}, checked at {', '.join(map(str, length.checked))}: {places}"
