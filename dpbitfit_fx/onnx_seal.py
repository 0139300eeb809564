"""The seal of exported files: the closed template of design §7, matched again on the ONNX graphs that will run.

    PARTIAL  grad_step.onnx        accumulator + clipped sum                       is the one output
             training_model.onnx   buffer += (clipped sum + z * sigma R (1 + slack))[piece]    and nothing else leaves
    SEALED   update_step.onnx      g = (accumulator + z * sigma R (1 + slack)) / N   all else is computed from g and public state
             optimizer_model.onnx  every buffer * (1 / N) feeds the optimizer      z came with the last micro-batch

    clipped sum = [1, B] @ [B, D] of (where(keep, c, 0), where(keep, G, 0)), as ``passes/clip.py`` and ``ghost_sum.py`` say

``training_model.onnx`` alone is PARTIAL: its buffers are secret until the micro-batch that carries z. R, sigma, gamma and N
are compared with the manifest, from which privacy.json is written: files and statement cannot disagree.
Proved: whatever the gradients G are, what leaves is their clipped and noised sum. Not proved here: that row i of G depends on
record i alone. That holds by capture and was tested when the export was made; a hand that rewrites the model itself, and the
hashes, can break it. Reads no weights and no data; needs onnx and numpy, never torch.
"""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import numpy as np

from dpbitfit_fx.errors import ArtifactError
from dpbitfit_fx.onnx_ghost_seal import LARGEST_FACTORS, LEAST_SHARE, Ghost, match_ghost_norm, match_ghost_sum, stacked
from dpbitfit_fx.onnx_graph import LENGTH, MICROSOFT, OnnxGraph
from dpbitfit_fx.ort_artifacts import WEIGHTS, at_lengths, graph_file, phases_of
from dpbitfit_fx.passes.clipping import (
    KINDS,
    SMALLEST_SQUARED_NORM,
    AutomaticClipping,
    AutoVClipping,
    Clipping,
    Layer,
)
from dpbitfit_fx.passes.numerics import noise_scale

LARGEST_SQUARED_NORM: Final = 1e60
# The runner feeds these itself.
RESERVED: Final = ("sample_mask", "noise", "accumulator", "theta", "held", "lazy_reset_grad")
FLOAT, INT64, BOOL, DOUBLE = 1, 7, 9, 11  # of onnx.TensorProto
DTYPES: Final = {"float32": FLOAT, "int64": INT64, "bool": BOOL, "int32": 6, "uint8": 2}


@dataclasses.dataclass(frozen=True)
class Declared:
    """What the manifest says that the graphs do, checked for being consistent."""

    target: str
    clipping: Clipping
    layers: tuple[Layer, ...]
    noise_multiplier: float
    expected_batch_size: float
    names: tuple[str, ...]  # of the parameters in the graphs
    shapes: tuple[tuple[int, ...], ...]
    batch: tuple[tuple[str, int, list[Any]], ...]
    optimizer: Mapping[str, Any]
    files: frozenset[str]
    held: int  # values of parameters that other phases train
    rates: int  # entries of the learning rate: one, or one per value
    graphs: Mapping[str, str]

    @property
    def sizes(self) -> list[int]:
        return [math.prod(s) for s in self.shapes]

    @property
    def noise_scale(self) -> float:
        return noise_scale(self.noise_multiplier, self.clipping.sensitivity, self.expected_batch_size)


def declared(manifest: Mapping[str, Any]) -> Declared:
    """The manifest's claims.

    Raises:
        ArtifactError: one is missing, or they contradict each other.
    """
    try:
        fields = dict(manifest["clipping"])
        kind = fields.pop("type")
        found = {c.__name__: c for c in KINDS.values()}.get(kind)
        if found is None:
            raise ArtifactError(f"The manifest names the clipping {kind!r}, which this version has no seal for.")
        clipping = found(**fields)
        parameters = manifest["parameters"]
        shapes = tuple(tuple(int(n) for n in p["shape"]) for p in parameters)
        free = {str(path): int(dim) for path, dim in manifest.get("dynamic_length", {"dims": {}})["dims"].items()}
        result = Declared(
            target=str(manifest["target"]),
            clipping=clipping,
            layers=clipping.layers([p["name"] for p in parameters]),
            noise_multiplier=float(manifest["noise_multiplier"]),
            expected_batch_size=float(manifest["expected_batch_size"]),
            names=tuple(str(p["onnx_name"]) for p in parameters),
            shapes=shapes,
            batch=tuple(
                (
                    str(b["name"]),
                    DTYPES[b["dtype"]],
                    [LENGTH if free.get(b["path"]) == i else int(n) for i, n in enumerate(b["shape"], start=1)],
                )
                for b in manifest["batch_inputs"]
            ),
            optimizer=dict(manifest["optimizer"]),
            files=frozenset(manifest["files"]),
            held=sum(int(p["numel"]) for p in manifest.get("held", ())),
            rates=int(manifest["num_trainable"]) if "learning_rates" in manifest else 1,
            graphs={name: graph_file(manifest, name) for name in ("grad_step", "update_step")},
        )
        taken = [*result.names, *(name for name, _, _ in result.batch), *RESERVED]
        starts = [sum(result.sizes[:i]) for i in range(len(shapes))]
        consistent = (
            [int(p["offset"]) for p in parameters] == starts
            and [int(p["numel"]) for p in parameters] == result.sizes
            and int(manifest["num_trainable"]) == sum(result.sizes) > 0
            and len(set(taken)) == len(taken)
            and math.isclose(float(manifest["max_grad_norm"]), clipping.sensitivity, rel_tol=1e-12)
            and all(0 < x < math.inf for x in (result.noise_multiplier, result.expected_batch_size))
            and all(
                result.target != "onnx" or (n in result.files and Path(n).name == n) for n in result.graphs.values()
            )
        )
    except (KeyError, TypeError, ValueError) as error:
        raise ArtifactError(
            f"manifest.json does not say what a seal needs to know ({type(error).__name__}). Export again."
        ) from error
    if not consistent:
        raise ArtifactError(
            "manifest.json contradicts itself: its parameters, max_grad_norm, noise_multiplier and expected_batch_size do not "
            "belong to one private step. Export again."
        )
    return result


def check_artifacts(folder: str | os.PathLike[str], manifest: Mapping[str, Any]) -> None:
    """Match every graph of an export against its template and the manifest.

    Raises:
        SealBroken: a graph computes something else; the message says which part of the template broke.
        ArtifactError: a file or the manifest cannot be read, or onnx is not installed.
    """
    root, phases = Path(folder), declared_phases(manifest)
    said = phases[0][0]
    weights = said.files & {WEIGHTS}
    if "phases" in manifest:
        check_phases(manifest, phases)
    if said.target == "onnx":
        for lengths in phases:
            for phase in lengths:
                check_grad_step(OnnxGraph(root / phase.graphs["grad_step"], weights), phase)
            check_update_step(OnnxGraph(root / lengths[0].graphs["update_step"]), lengths[0])
    elif said.target == "ort_training":
        check_training_model(OnnxGraph(root / "training_model.onnx", weights, ["InPlaceAccumulatorV2"]), said)
        optimizers = ["AdamWOptimizer", "SGDOptimizerV2"]
        check_optimizer_model(OnnxGraph(root / "optimizer_model.onnx", (), optimizers, sequences=True), said)
    else:
        raise ArtifactError(f"The manifest names the target {said.target!r}, which this version has no seal for.")
    if said.target == "ort_training" or "eval_model.onnx" in said.files:
        names = [str(p["onnx_name"]) for p in manifest["parameters"]]
        check_eval_model(OnnxGraph(root / "eval_model.onnx", weights), names)


def declared_phases(manifest: Mapping[str, Any]) -> list[list[Declared]]:
    """The claims of every phase, once for each of its gradient graphs."""
    try:
        views = [at_lengths(phase) for phase in phases_of(manifest)]
    except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
        raise ArtifactError(
            f"manifest.json does not say what a seal needs to know ({type(error).__name__}). Export again."
        ) from error
    if not all(views):
        raise ArtifactError("manifest.json names a phase without a gradient graph. Export again.")
    return [[declared(view) for view in lengths] for lengths in views]


def check_phases(manifest: Mapping[str, Any], phases: list[list[Declared]]) -> None:
    """The phases are of one run: one noise multiplier, graphs of their own, and one set of parameters, handed on by name.

    Raises:
        ArtifactError: they are not.
    """
    try:
        every = {p["name"]: (str(p["onnx_name"]), tuple(p["shape"])) for p in manifest["parameters"]}
        own = [[*view["parameters"]] for view in phases_of(manifest)]
        both = [[*view["parameters"], *view.get("held", ())] for view in phases_of(manifest)]
        starts = [int(p["offset"]) for p in manifest["parameters"]]
        sizes = [math.prod(shape) for _, shape in every.values()]
        every_one = [phase for lengths in phases for phase in lengths]
        files = [p.graphs["grad_step"] for p in every_one] + [lengths[0].graphs["update_step"] for lengths in phases]
        consistent = (
            len(every) == len(manifest["parameters"]) == len({name for name, _ in every.values()})
            and starts == [sum(sizes[:i]) for i in range(len(sizes))]
            and int(manifest["num_trainable"]) == sum(sizes)
            and {p["name"] for names in own for p in names} == every.keys()
            and all(every[p["name"]] == (p["onnx_name"], tuple(p["shape"])) for names in both for p in names)
            and all(len({p["name"] for p in names}) == len(names) for names in both)
            and all(int(p["numel"]) == math.prod(p["shape"]) for names in both for p in names)
            and len({phase.noise_multiplier for phase in every_one}) == 1
            and all(phase.target == "onnx" for phase in every_one)
            and len(set(files)) == len(files)
        )
    except (KeyError, TypeError, ValueError) as error:
        raise ArtifactError(
            f"manifest.json does not say what a seal needs to know of its phases ({type(error).__name__}). Export again."
        ) from error
    if not consistent:
        raise ArtifactError(
            "manifest.json contradicts itself: its phases do not belong to one run with one noise multiplier and one set of "
            "parameters. Export again."
        )


# -- PARTIAL ----------------------------------------------------------------------------------------------------------


def check_grad_step(g: OnnxGraph, said: Declared) -> None:
    """``accumulator_out [D] = accumulator [D] + clipped sum``, from theta [D], the values of other phases' parameters
    ``held [H]`` (where there are any), the batch and sample_mask [B] alone."""
    size = sum(said.sizes)
    batch, unused = batch_inputs(said)
    held = {"held": (FLOAT, [said.held])} if said.held else {}
    g.has_inputs({**batch, "theta": (FLOAT, [size]), **held, "accumulator": (FLOAT, [size])}, unused)
    outputs(g, ["accumulator_out"])
    accumulator, total = g.call("accumulator_out", "Add", "accumulation")
    if accumulator != "accumulator":
        g.refuse(f"accumulation: the clipped sum is added to {accumulator!r}, expected the accumulator")
    g.read_once("accumulator", "accumulator")
    sources = match_clip(g, total, said)
    independent(g, sources, ["accumulator", "sample_mask"])


def check_training_model(g: OnnxGraph, said: Declared) -> None:
    """Every gradient buffer grows by its piece of ``z * sigma R (1 + slack) + clipped sum``; the other output is a constant."""
    size = sum(said.sizes)
    batch, unused = batch_inputs(said)
    weights = {n: (FLOAT, list(s)) for n, s in zip(said.names, said.shapes, strict=True)}
    buffers = {f"{n}_grad.accumulation.buffer": (FLOAT, list(s)) for n, s in zip(said.names, said.shapes, strict=True)}
    others: dict[str, Any] = {"noise": (FLOAT, [size]), "lazy_reset_grad": (BOOL, [1])}
    g.has_inputs({**batch, **weights, **buffers, **others}, unused)
    outputs(g, ["done", *(f"{n}_grad.accumulation.out" for n in said.names)])
    g.only_custom("InPlaceAccumulatorV2", len(said.names))
    (one,) = g.call("done", "Identity", "user output", 1)
    g.numbers(one, "user output")
    total = split = ""
    for i, (name, shape) in enumerate(zip(said.names, said.shapes, strict=True)):
        what = f"gradient buffer of {name}"
        buffer, gradient, reset = g.call(
            f"{name}_grad.accumulation.out", "InPlaceAccumulatorV2", what, 3, domain=MICROSOFT
        )
        if buffer != f"{name}_grad.accumulation.buffer" or reset != "lazy_reset_grad":
            g.refuse(f"{what}: {buffer!r} is accumulated, reset by {reset!r}")
        g.read_once(buffer, what)
        piece, sizes = g.call(gradient, "Reshape", what)
        g.integers(sizes, list(shape), what)
        whole, lengths = g.call(piece, "Split", what, outputs=len(said.names), axis=0)
        g.integers(lengths, said.sizes, what)
        if g.producer[piece].output[i] != piece:
            g.refuse(f"{what}: it takes another parameter's piece of the sum")
        if i and (whole, g.producer[piece].output[0]) != (total, split):
            g.refuse(f"{what}: it is cut from another sum than the other gradients")
        total, split = whole, g.producer[piece].output[0]
    noisy, clipped = g.call(total, "Add", "noise")
    noise = g.scaled(noisy, said.noise_scale, "noise scale sigma * R * (1 + slack)")
    if noise != "noise":
        g.refuse(f"noise: expected the input noise, found {noise!r}")
    g.read_once("noise", "noise")
    sources = match_clip(g, clipped, said)
    independent(g, sources, ["noise", "sample_mask", "lazy_reset_grad", *buffers])


def batch_inputs(said: Declared) -> tuple[dict[str, tuple[int, list[Any]]], set[str]]:
    """The inputs with one row per record, and those that a model need not read."""
    rows: dict[str, tuple[int, list[Any]]] = {n: (kind, [None, *shape]) for n, kind, shape in said.batch}
    return {**rows, "sample_mask": (FLOAT, [None])}, set(rows)


def outputs(g: OnnxGraph, expected: list[str]) -> None:
    for name in g.outputs:
        if name not in expected:
            g.refuse(f"it has the output {name!r}; nothing but {', '.join(expected[:3])} may leave it")
    if sorted(g.outputs) != sorted(expected) or g.outputs[0] != expected[0]:
        g.refuse(f"it has the outputs {g.outputs[:5]}, expected {expected[:5]}")


def independent(g: OnnxGraph, sources: list[str], inputs: list[str]) -> None:
    reached = g.reached_by(sources)
    for name in inputs:
        if name in reached:
            g.refuse(f"the input {name!r} reaches a per-sample gradient")


@dataclasses.dataclass
class Block:
    """One piece of the weighted sum: its parameters, the factors [B] and kept rows [B] it read, and what it summed."""

    members: list[int]
    factors: str
    keep: str
    values: str = ""
    sources: list[str] = dataclasses.field(default_factory=list)
    ghost: Ghost | None = None


def match_clip(g: OnnxGraph, total: str, said: Declared) -> list[str]:
    """The clipped sum [D] at ``total``; returns the values that hold the per-sample gradients, or their factors."""
    inner, shape = g.call(total, "Reshape", "weighted sum")
    g.integers(shape, [sum(said.sizes)], "weighted sum")
    pieces = g.call(inner, "Concat", "weighted sum", None, axis=1) if g.op(inner) == "Concat" else [inner]
    if len(set(pieces)) != len(pieces):
        g.refuse("weighted sum: a piece of the sum is there twice")
    blocks: list[Block] = []
    for piece in pieces:
        start = sum(len(b.members) for b in blocks)
        if start >= len(said.names):
            g.refuse(f"gradients: more than {len(said.names)} for as many parameters; one was added")
        blocks.append(match_block(g, piece, start, said, alone=len(pieces) == 1))
    count = sum(len(b.members) for b in blocks)
    if count != len(said.names):
        g.refuse(f"gradients: {count} for {len(said.names)} parameters; one was dropped or added")
    keep = blocks[0].keep
    if any(b.keep != keep for b in blocks):
        g.refuse("kept rows: the blocks do not drop the same samples")
    layers = [[b for b in blocks if set(b.members) <= set(layer.members)] for layer in said.layers]
    if sum(map(len, layers)) != len(blocks):
        g.refuse("weights: gradients of two layers share one factor")
    norms = []
    for layer, own in zip(said.layers, layers, strict=True):
        if any(b.factors != own[0].factors for b in own):
            g.refuse("weights: one layer has two factors")
        norms.append(match_factor(g, own[0].factors, keep, layer.bound, said.clipping))
    traces = match_keep(g, keep, norms, said.clipping, [b.ghost for b in blocks if b.ghost is not None])
    for own, norm in zip(layers, norms, strict=True):
        match_layer(g, own, norm, traces)
    return [s for b in blocks for s in b.sources]


def match_block(g: OnnxGraph, piece: str, start: int, said: Declared, alone: bool) -> Block:
    """``[1, B] @ [B, D']`` over the gradients of the parameters from number ``start`` on, or the ghost sum of one."""
    product = g.producer[piece].input if g.op(piece) == "MatMul" else []
    if not product or g.op(product[0]) != "Unsqueeze":
        ghost = match_ghost_sum(g, piece, said.sizes[start], alone)
        return Block([start], ghost.factors, ghost.keep, sources=ghost.views, ghost=ghost)
    weights, rows = g.call(piece, "MatMul", "weighted sum")
    factors, axes = g.call(weights, "Unsqueeze", "weights")
    g.integers(axes, [0], "weights")
    column, values, zero = g.call(rows, "Where", "non-finite rows", 3)
    g.scalar(zero, 0.0, "non-finite rows")
    keep, axes = g.call(column, "Unsqueeze", "non-finite rows")
    g.integers(axes, [1], "non-finite rows")
    views = g.call(values, "Concat", "gradients", None, axis=1) if g.op(values) == "Concat" else [values]
    names, sizes = said.names[start : start + len(views)], said.sizes[start : start + len(views)]
    if len(names) != len(views):
        g.refuse(f"gradients: {start + len(views)} for {len(said.names)} parameters; one was dropped or added")
    sources = []
    for view, name, size in zip(views, names, sizes, strict=True):
        source, shape = g.rows(view, f"gradient of {name}")
        if shape != [size]:
            g.refuse(f"gradient of {name}: it has {shape} entries per record, expected {size}")
        sources.append(source)
    return Block(list(range(start, start + len(views))), factors, keep, values, sources)


def match_factor(g: OnnxGraph, factors: str, keep: str, bound: float, clipping: Clipping) -> str:
    """``float32(where(keep, R / below(n), 0))`` [B]; returns the squared norm n^2 [B]."""
    (kept,) = g.call(factors, "Cast", "weights", 1, to=FLOAT)
    condition, factor, zero = g.call(kept, "Where", "weights", 3)
    g.scalar(zero, 0.0, "weights")
    if condition != keep:
        g.refuse("weights: the weights and the rows do not drop the same samples")
    (below,) = g.call(g.scaled(factor, bound, "clip factor R"), "Reciprocal", "clip factor", 1)
    if isinstance(clipping, AutomaticClipping):
        below, gamma = g.call(below, "Add", "clip factor gamma")
        g.scalar(gamma, clipping.gamma, "clip factor gamma")
    elif not isinstance(clipping, AutoVClipping):
        below, least = g.call(below, "Clip", "clip factor R")
        g.scalar(least, bound, "clip factor R")
    (squared,) = g.call(below, "Sqrt", "norm", 1)
    return squared


def match_keep(
    g: OnnxGraph, keep: str, norms: list[str], clipping: Clipping, ghosts: list[Ghost]
) -> dict[int, list[str]]:
    """``mask != 0 and n^2 < 1e60`` (AUTO-V: ``and n^2 > 1e-24``; ghosts: ``and sum |G|^2 + |[A; E]|^2 < 1e40``).

    Returns ``|G|^2`` and ``|[A; E]|^2`` [B] by their ghost's id.
    """
    present, sane = g.call(keep, "And", "sample_mask")
    (absent,) = g.call(present, "Not", "sample_mask", 1)
    mask, zero = g.call(absent, "Equal", "sample_mask")
    g.scalar(zero, 0.0, "sample_mask")
    if mask != "sample_mask":
        g.refuse(f"sample_mask: {mask!r} decides which rows are there, expected sample_mask")
    traces: dict[int, list[str]] = {}
    dense = [x for x in ghosts if x.g]
    if dense:
        sane, below = g.call(sane, "And", "range guard of the factors")
        trace, largest = g.call(below, "Less", "range guard of the factors")
        g.scalar(largest, LARGEST_FACTORS, "range guard of the factors")
        each = stacked(g, trace, 2 * len(dense), "range guard of the factors")
        traces = {id(x): each[2 * at : 2 * at + 2] for at, x in enumerate(dense)}
    above = ""
    if isinstance(clipping, AutoVClipping):
        sane, above = g.call(sane, "And", "range guard of the norm")
    whole, largest = g.call(sane, "Less", "range guard of the norm")
    g.scalar(largest, LARGEST_SQUARED_NORM, "range guard of the norm")
    if above:
        same, smallest = g.call(above, "Greater", "range guard of the norm")
        g.scalar(smallest, SMALLEST_SQUARED_NORM, "range guard of the norm")
        if same != whole:
            g.refuse("norm: the two range guards test different norms")
    if stacked(g, whole, len(norms), "norm") != norms:
        g.refuse("norm: the range guard and the factor use different norms")
    return traces


def match_layer(g: OnnxGraph, blocks: list[Block], squared: str, traces: dict[int, list[str]]) -> None:
    """The squared norm [B] of one layer: the sum of its blocks', with ghosts at least a share of their bound."""
    ghosts = [b.ghost for b in blocks if b.ghost is not None]
    bounds: dict[int, str] = {}
    if ghosts:
        squared, share = g.call(squared, "Max", "ghost norm")
        bound = g.scaled(share, LEAST_SHARE, "ghost norm")
        bounds = {id(x): t for x, t in zip(ghosts, stacked(g, bound, len(ghosts), "ghost norm"), strict=True)}
    for block, term in zip(blocks, stacked(g, squared, len(blocks), "norm"), strict=True):
        if block.ghost is None:
            match_square(g, term, block.values)
        else:
            match_ghost_norm(g, term, bounds[id(block.ghost)], traces.get(id(block.ghost), []), block.ghost)


def match_square(g: OnnxGraph, squared: str, values: str) -> None:
    """``sum(x * x, [1])`` in float64 of exactly the values that are summed."""
    square, axes = g.call(squared, "ReduceSum", "norm", keepdims=0)
    g.integers(axes, [1], "norm")
    wide, again = g.call(square, "Mul", "norm")
    if again != wide:
        g.refuse("norm: the product is not the square of the gradients")
    (narrow,) = g.call(wide, "Cast", "norm", 1, to=DOUBLE)
    if narrow != values:
        g.refuse("norm: it is taken over other values than those that are summed")


# -- SEALED -----------------------------------------------------------------------------------------------------------


def check_update_step(g: OnnxGraph, said: Declared) -> None:
    """``g = (accumulator + z * sigma R (1 + slack)) / N``, where accumulator and z are read nowhere else.

    What follows is post-processing.
    """
    size = sum(said.sizes)
    adam = said.optimizer.get("type") == "AdamW"
    state: dict[str, Any] = {"theta": (FLOAT, [size])}
    if adam:
        state |= {"m": (FLOAT, [size]), "v": (FLOAT, [size]), "t": (INT64, [1])}
    secret: dict[str, Any] = {"accumulator": (FLOAT, [size]), "noise": (FLOAT, [size])}
    g.has_inputs({**state, **secret, "learning_rate": (FLOAT, [said.rates])})
    outputs(g, [f"{n}_out" for n in state])
    g.read_once("accumulator", "accumulator")
    g.read_once("noise", "noise")
    scaled = _only(g, "noise") if said.noise_scale != 1 or g.readers["noise"][0].op_type == "Mul" else "noise"
    if g.scaled(scaled, said.noise_scale, "noise scale sigma * R * (1 + slack)") != "noise":
        g.refuse("noise: it is not scaled by sigma * R")
    g.read_once(scaled, "noise")
    noisy = _only(g, "accumulator")
    if g.call(noisy, "Add", "noise") != ["accumulator", scaled]:
        g.refuse("noise: the accumulator leaves without its noise")
    if said.expected_batch_size == 1 and all(r.op_type != "Div" for r in g.readers.get(noisy, [])):
        return  # The exporter drops a division by 1.
    g.read_once(noisy, "denominator")
    total, denominator = g.call(_only(g, noisy), "Div", "denominator")
    if total != noisy:
        g.refuse("denominator: the noisy sum divides something")
    g.scalar(denominator, said.expected_batch_size, "denominator")


def _only(g: OnnxGraph, name: str) -> str:
    return str(g.readers[name][0].output[0])


def check_optimizer_model(g: OnnxGraph, said: Declared) -> None:
    """Every element of ``gradients`` is multiplied by 1/N, once; one optimizer node reads the products and nothing else."""
    adam = said.optimizer.get("type") == "AdamW"
    moments = ["first_order_moments", "second_order_moments"] if adam else ["first_order_moments"]
    expected = ["learning_rate", "step", "params", "gradients", *moments]
    if list(g.inputs) != expected:
        g.refuse(f"it takes the inputs {list(g.inputs)}, expected {expected}")
    outputs(g, ["updated_flag"])
    g.only_custom("AdamWOptimizer" if adam else "SGDOptimizerV2", 1)
    float32 = {k: _float32(v) for k, v in said.optimizer.items() if isinstance(v, (int, float))}
    if adam:
        b1, b2 = said.optimizer["betas"]
        fed = g.call(
            "updated_flag", "AdamWOptimizer", "optimizer", 6, domain=MICROSOFT, alpha=_float32(b1), beta=_float32(b2),
            epsilon=float32["eps"], weight_decay=float32["weight_decay"], correct_bias=1, adam_mode=0,
        )  # fmt: skip
        order = ["learning_rate", "step", "params", fed[3], *moments]
        gradients = fed[3]
    else:
        fed = g.call("updated_flag", "SGDOptimizerV2", "optimizer", 3, domain=MICROSOFT)
        order = ["learning_rate", "params", fed[2]]
        gradients = fed[2]
    if fed != order:
        g.refuse(f"optimizer: it is fed {fed}, expected {order}")
    if gradients == "gradients":
        g.refuse("denominator: the optimizer is fed the raw gradient buffers")
    means = g.call(gradients, "SequenceConstruct", "denominator", None)
    taken = []
    for mean in means:
        total = g.scaled(mean, 1.0 / said.expected_batch_size, "denominator")
        source, index = g.call(total, "SequenceAt", "denominator")
        if source != "gradients":
            g.refuse(f"denominator: the optimizer is fed {source!r}")
        taken.append(g.numbers(index, "denominator").tolist())
    if taken != list(range(len(said.names))):
        g.refuse(
            f"denominator: the elements {taken} of the gradients are used, expected every one of {len(said.names)}"
        )


def _float32(value: Any) -> float:
    return float(np.float32(value))


def check_eval_model(g: OnnxGraph, names: list[str]) -> None:
    """It trains nothing. ONNX Runtime feeds parameters by position, so theirs is checked."""
    if list(g.inputs)[-len(names) :] != names:
        g.refuse("its last inputs are not the parameters in the order of training_model.onnx")


__all__ = ["check_artifacts"]
