"""The type that flows through the compiler: a frozen joint forward+backward graph, its roles, facts and trail."""

from __future__ import annotations

import dataclasses
import enum
import hashlib
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, cast

import torch
from torch import fx

from .clipping import Clipping
from .numerics import GRID_BITS, grid_factor, grid_unit, noise_scale


class Role(enum.Enum):
    """What an input of the graph is. BATCH, MASK and ACCUMULATOR are private data; NOISE is the host's secret draw."""

    TRAINABLE = "trainable"
    FROZEN = "frozen"
    BATCH = "batch"
    MASK = "sample_mask"
    ACCUMULATOR = "accumulator"
    NOISE = "noise"


class Fact(enum.Enum):
    """What has been proved of a graph so far; each is one predicate in ``facts.py``, apart from the pass that gives it."""

    FUNCTIONAL = "functional"
    PER_SAMPLE = "per_sample"
    CLIPPED = "clipped"
    PARTIAL = "partial"
    NOISED = "noised"
    SEALED = "sealed"


@dataclasses.dataclass(frozen=True)
class Input:
    """One placeholder: its name in the graph, its role, and the state or batch entry that feeds it."""

    name: str
    role: Role
    target: str


@dataclasses.dataclass(frozen=True)
class Target:
    """One trainable: parameter name, shape and dtype, and the rule that chose it: name, structure, pattern, add_bias."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    rule: str

    @property
    def numel(self) -> int:
        count = 1
        for size in self.shape:
            count *= size
        return count


@dataclasses.dataclass(frozen=True)
class AddedBias:
    """A bias that the user's model lacks: ``y + b.reshape(view)`` behind the product of ``module`` (its path, '' the root).

    Its name is ``module.leaf``; dtype and device are its weight's.
    """

    name: str
    module: str
    leaf: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    view: tuple[int, ...]

    @property
    def numel(self) -> int:
        return math.prod(self.shape)


@dataclasses.dataclass(frozen=True)
class Draw:
    """Random numbers that the forward of one sample takes: bools that are True with probability ``keep``, or uniforms (None).

    ``origin`` says where in the user's model.
    """

    shape: tuple[int, ...]
    keep: float | None
    origin: str = ""

    @property
    def size(self) -> int:
        return math.prod(self.shape)


@dataclasses.dataclass(frozen=True)
class Selection:
    """What is trained and what is not: near misses (name, reason), unused, and what was excluded (name, pattern)."""

    targets: tuple[Target, ...]
    near_misses: tuple[tuple[str, str], ...] = ()
    unused: tuple[str, ...] = ()
    excluded: tuple[tuple[str, str], ...] = ()


@dataclasses.dataclass(frozen=True)
class Noise:
    """Public scale of the noise: std is :meth:`scale`; the sum is divided by the batch size."""

    noise_multiplier: float
    expected_batch_size: float
    grid: bool = False  # sums and noise are whole numbers of ``unit``, in float64: see ``numerics``

    def scale(self, clipping: Clipping) -> float:
        """``sigma R (1 + slack)``, on the grid at least sigma R: see ``numerics``."""
        if self.grid:
            return math.ldexp(self.unit(clipping), GRID_BITS)
        return noise_scale(self.noise_multiplier, clipping.sensitivity, self.expected_batch_size)

    def unit(self, clipping: Clipping) -> float:
        """The grid's unit g."""
        return grid_unit(self.noise_multiplier, clipping.sensitivity)


@dataclasses.dataclass(frozen=True)
class TrailEntry:
    """What one pass did: its name, seconds, and the node count before and after."""

    name: str
    seconds: float
    nodes_before: int
    nodes_after: int
    notes: tuple[str, ...] = ()


class Extent(int):
    """A size that depends on the padded length: its value at the first captured length, and ``other`` at the second.

    It equals no plain integer, and another Extent only where both values do: what is equal by chance at one length is
    told apart. Only ``lengths.Sizes`` turns it into something that a graph may hold.
    """

    other: int

    def __new__(cls, value: int, other: int) -> Extent:
        self = super().__new__(cls, value)
        self.other = int(other)
        return self

    def __eq__(self, that: object) -> bool:
        return isinstance(that, Extent) and int(self) == int(that) and self.other == that.other

    def __ne__(self, that: object) -> bool:
        return not self == that

    def __hash__(self) -> int:
        return hash((int(self), self.other))


@dataclasses.dataclass(frozen=True)
class DynamicLength:
    """The batch entries that have the padded length T, and their dimension; T is public (design §6).

    ``captured``: the two lengths of the captures; ``checked``: where the meaning is checked, ascending. The step accepts
    every length from the first to the last of these.
    """

    dims: Mapping[str, int]
    captured: tuple[int, int]
    checked: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Source:
    """What the user gave ``compile``: the model is never edited."""

    model: torch.nn.Module
    loss_fn: Callable[[Any, Any], torch.Tensor]
    example_batch: Any
    trainable: str | tuple[str, ...] = "bias"
    clipping: Clipping | None = None
    noise: Noise | None = None
    public_tensors: bool = False
    exclude: tuple[str, ...] = ()
    add_bias: bool = False
    ghost_norms: bool | None = None
    dropout: bool = False
    length: DynamicLength | None = None
    memory_budget: float = 1.0


@dataclasses.dataclass(frozen=True)
class JointGraph:
    """A joint graph whose placeholders are ``inputs`` in order, roles grouped as in :class:`Role`'s order.

    Before ``clip`` its outputs are ``(loss [B], gradient [B, *shape] per target ...)``, private data, with no seal; after
    ``ghost`` a large gradient may be a tuple of its factors (``ghost_sum.Ghost``) instead.
    After ``clip`` the one output is the accumulator ``[D]``; after ``add_noise`` it is the private gradient ``[D]``.
    ``state`` maps an input's target to the live tensor of the user's model (by reference, never a copy), and the name of
    each of the ``added`` biases to a parameter that the model does not have. ``folded`` names the operators of the user's
    program that a rule of ours batched, ``slow`` those that it unrolled over time, ``dropped`` the assertions on values
    that were taken out, ``draws`` the random numbers of one sample, which the last batch inputs hold. ``length``: the public
    dimensions of the batch that may vary, if any. ``optimized``: what the optional passes did, for the report.
    """

    module: fx.GraphModule
    inputs: tuple[Input, ...]
    selection: Selection
    batch_spec: Any
    state: Mapping[str, torch.Tensor]
    facts: frozenset[Fact] = frozenset()
    trail: tuple[TrailEntry, ...] = ()
    clipping: Clipping | None = None
    noise: Noise | None = None
    source: Source | None = None
    slow: tuple[str, ...] = ()
    added: tuple[AddedBias, ...] = ()
    folded: tuple[str, ...] = ()
    dropped: tuple[str, ...] = ()
    ghosts: tuple[tuple[str, str], ...] = ()
    draws: tuple[Draw, ...] = ()
    length: DynamicLength | None = None
    optimized: tuple[str, ...] = ()

    @property
    def targets(self) -> tuple[Target, ...]:
        return self.selection.targets

    @property
    def num_trainable(self) -> int:
        return sum(t.numel for t in self.targets)

    @property
    def flat_dtype(self) -> torch.dtype:
        """The dtype of the flat gradient: float64 for float64 trainables and on the grid, else float32."""
        wide = self.grid or any(t.dtype == torch.float64 for t in self.targets)
        return torch.float64 if wide else torch.float32

    @property
    def grid(self) -> bool:
        return self.noise is not None and self.noise.grid

    def factor(self, bound: float) -> float:
        """What a layer's clip factor is multiplied by: its bound R_l, or that in units of the grid."""
        if self.noise is None or self.clipping is None or not self.noise.grid:
            return bound
        return grid_factor(self.noise.noise_multiplier, self.clipping.sensitivity, bound)

    @property
    def device(self) -> torch.device:
        """Of the trainables."""
        return self.state[self.targets[0].name].device

    def with_role(self, role: Role) -> list[Input]:
        return [i for i in self.inputs if i.role is role]

    def values(
        self, batch: Iterable[torch.Tensor], more: Mapping[str, torch.Tensor] | None = None
    ) -> list[torch.Tensor]:
        """What the trainable, frozen and batch inputs get, in order: the live state (and ``more``), and ``batch``'s leaves."""
        state, leaves = {**self.state, **(more or {})}, iter(batch)
        fed = (Role.TRAINABLE, Role.FROZEN, Role.BATCH)
        return [
            next(leaves) if i.role is Role.BATCH else state[i.target].detach() for i in self.inputs if i.role in fed
        ]

    def placeholder(self, name: str) -> fx.Node:
        found: fx.Node = next(n for n in self.module.graph.nodes if n.op == "placeholder" and n.name == name)
        return found

    @property
    def outputs(self) -> tuple[Any, ...]:
        (result,) = self.module.graph.output_node().args
        return tuple(result) if isinstance(result, (tuple, list)) else (result,)

    def text(self) -> str:
        """A canonical text of the graph: one line per node, numbered, with no names that depend on the session."""
        index = {n: f"%{i}" for i, n in enumerate(self.module.graph.nodes)}
        roles = {i.name: i for i in self.inputs}
        lines = []
        for node in self.module.graph.nodes:
            show: Any = fx.node.map_arg((node.args, node.kwargs), lambda n: cast(Any, _Named(index[n])))
            what = (
                f"{roles[node.name].role.value} {roles[node.name].target}"
                if node.op == "placeholder"
                else str(node.target)
            )
            lines.append(f"{index[node]} = {what} {show[0]} {show[1]}")
        return "\n".join(lines)

    def digest(self) -> str:
        """SHA-256 of :meth:`text`, hex: what ``privacy.json`` calls the graph hash."""
        return hashlib.sha256(self.text().encode()).hexdigest()


class _Named:
    def __init__(self, name: str) -> None:
        self.name = name

    def __repr__(self) -> str:
        return self.name


def rows_at_capture(joint: JointGraph) -> int:
    """The size of the batch that the shapes in the graph were taken at."""
    shape: Any = joint.placeholder(joint.with_role(Role.BATCH)[0].name).meta.get("shape") or (1,)
    return int(shape[0])


def copy_graph(module: fx.GraphModule) -> tuple[fx.Graph, dict[fx.Node, fx.Node]]:
    """A copy of the graph to rewrite, with a map from old nodes to new: passes never touch the graph they were given."""
    graph = fx.Graph()
    mapping: dict[fx.Node, fx.Node] = {}
    for node in module.graph.nodes:
        mapping[node] = graph.node_copy(node, lambda n: mapping[n])
    return graph, mapping


def finish(graph: fx.Graph) -> fx.GraphModule:
    """Drop dead nodes, lint, and compile a rewritten graph to a module with no state of its own."""
    graph.eliminate_dead_code()
    graph.lint()
    return fx.GraphModule(torch.nn.Module(), graph, class_name="DPGraph")
