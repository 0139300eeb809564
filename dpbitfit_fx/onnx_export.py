"""The export core, and ``export_onnx``: a private step as two plain ONNX graphs that any current onnxruntime runs.

``grad_step.onnx``    batch..., sample_mask[B], theta[D], accumulator[D] -> accumulator_out[D]     (a SECRET sum)
``update_step.onnx``  theta, (m, v, t,) accumulator, noise[D], learning_rate -> theta_out, (m_out, v_out, t_out)

Both come from the sealed halves of the step: R, sigma and the expected batch size are constants of the graphs, the
batch
size is free, and the noise is an input that the host draws from a secure source (no exported graph may hold an operator
that draws random numbers).
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import itertools
import logging
import math
import os
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from dpbitfit_fx.biases import fingerprints
from dpbitfit_fx.errors import ExportError
from dpbitfit_fx.export_folder import write_folder
from dpbitfit_fx.onnx_lowering import Lowered
from dpbitfit_fx.onnx_quantize import FrozenWeights, check_bits, in_torch
from dpbitfit_fx.onnx_rows import pin_rows
from dpbitfit_fx.onnx_weights import constant, read_transposed, save_models
from dpbitfit_fx.passes.clipping import AutomaticClipping
from dpbitfit_fx.passes.joint_graph import DynamicLength, JointGraph, Role
from dpbitfit_fx.passes.lengths import resized
from dpbitfit_fx.passes.torch_private import leaf_names, tree_flatten
from dpbitfit_fx.passes.unify import where

if TYPE_CHECKING:
    import onnx_ir as ir

FORMAT: Final = "dpbitfit_fx.onnx.v1"
OPSET: Final = 18  # every runtime since 2023, and below the 21 that ONNX Runtime Training 1.19.2 reads
IR_VERSION: Final = 10
SMALLEST_CONSTANT: Final = 1e-6  # onnxscript's optimizer takes an added constant of 1e-8 for zero
EXPORT_ROWS: Final = 5  # a size that no other dimension of a model is likely to have
RANDOM_OPS: Final = frozenset(
    ["RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike", "Multinomial", "Bernoulli", "Dropout"]
)
_RESERVED: Final = frozenset(
    [
        "sample_mask",
        "accumulator",
        "accumulator_out",
        "noise",
        "theta",
        "held",
        "m",
        "v",
        "t",
        "learning_rate",
        "lazy_reset_grad",
        "step",
    ]
)
_DTYPES: Final = {
    torch.float32: "float32",
    torch.int64: "int64",
    torch.bool: "bool",
    torch.int32: "int32",
    torch.uint8: "uint8",
}


@dataclasses.dataclass(frozen=True)
class AdamW:
    """torch.optim.AdamW's update. ``weight_decay=0`` (the default here) makes it Adam, which is what ``fit`` uses."""

    lr: float = 5e-3
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0


@dataclasses.dataclass(frozen=True)
class SGD:
    """Plain stochastic gradient descent: ``theta - lr * gradient``, no momentum."""

    lr: float = 0.1


Optimizer = AdamW | SGD


def resolve_optimizer(optimizer: str | Optimizer) -> Optimizer:
    """The optimizer by name ("adamw" or "sgd") or as it is; every number checked."""
    if isinstance(optimizer, str):
        named: dict[str, Optimizer] = {"adamw": AdamW(), "adam": AdamW(), "sgd": SGD()}
        if optimizer.lower() not in named:
            raise ExportError(
                f"optimizer={optimizer!r} cannot be exported. Use 'adamw' or 'sgd', or AdamW(lr=...) or SGD(lr=...)."
            )
        return named[optimizer.lower()]
    numbers = [optimizer.lr] + (
        [*optimizer.betas, optimizer.eps, optimizer.weight_decay] if isinstance(optimizer, AdamW) else []
    )
    if not all(math.isfinite(x) and x >= 0 for x in numbers) or (
        isinstance(optimizer, AdamW) and max(optimizer.betas) >= 1
    ):
        raise ExportError(f"{optimizer} has a setting that is negative, not finite, or a beta of 1 or more.")
    return optimizer


# -- what is exported -------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Parameter:
    """One trainable: its torch name, its name in the graphs, its shape, and where it starts in the flat vector."""

    name: str
    onnx_name: str
    shape: tuple[int, ...]
    offset: int

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    def to_dict(self) -> dict[str, Any]:
        return {**dataclasses.asdict(self), "shape": list(self.shape), "numel": self.numel}


@dataclasses.dataclass(frozen=True)
class BatchInput:
    """One leaf of the batch: its path in the user's pytree, its name in the graphs, its shape without the batch
    axis."""

    name: str
    path: str
    shape: tuple[int, ...]
    dtype: str


@dataclasses.dataclass(frozen=True)
class Layout:
    """Names, shapes and order of everything that goes in and out of the graphs.

    held: parameters that other phases of a run train and this one takes as they are then, in a flat vector of their own.
    """

    parameters: tuple[Parameter, ...]
    batch: tuple[BatchInput, ...]
    held: tuple[Parameter, ...] = ()

    @property
    def num_trainable(self) -> int:
        return sum(p.numel for p in self.parameters)


def safe_name(wanted: str, taken: set[str], fallback: str) -> str:
    """``wanted`` where ONNX Runtime gives it no meaning of its own and nobody has it; else a variant. Adds it to
    ``taken``."""
    name = re.sub(r"[^A-Za-z0-9_.]", "_", wanted)
    if not name or not (name[0].isalpha() or name[0] == "_"):
        name = f"{fallback}_{name}"
    if name.endswith("_grad") or name.endswith(".buffer") or name.endswith(".out") or name in _RESERVED:
        name += "_"
    while name in taken:
        name += "_"
    taken.add(name)
    return name


def layout_of(step: Any, trained: Mapping[str, torch.Tensor] | None = None) -> Layout:
    """The layout of a compiled step, or of all that the phases of its run trained. Raises ExportError for dtypes that the
    exported graphs cannot hold."""
    taken: set[str] = set()
    shapes = step.trainable_shapes if trained is None else {name: x.shape for name, x in trained.items()}
    parameters = placed([(name, safe_name(name, taken, "parameter"), tuple(shape)) for name, shape in shapes.items()])
    leaves, _spec = tree_flatten(step.example_batch)
    batch = []
    for path, leaf in zip(leaf_names(step.example_batch), leaves, strict=True):
        if leaf.dtype not in _DTYPES:
            raise ExportError(
                f"The batch entry {path!r} is {leaf.dtype}; exported graphs take float32, int64, int32, uint8 or bool."
            )
        batch.append(BatchInput(safe_name(path, taken, "batch"), path, tuple(leaf.shape[1:]), _DTYPES[leaf.dtype]))
    return Layout(parameters, tuple(batch))


def placed(parameters: Sequence[tuple[str, str, tuple[int, ...]]]) -> tuple[Parameter, ...]:
    """Parameters of these names, names in the graphs, and shapes, one behind the other in a flat vector."""
    sizes = [math.prod(shape) for _, _, shape in parameters]
    return tuple(Parameter(*p, offset=sum(sizes[:i])) for i, p in enumerate(parameters))


def prepare(step: Any, noise_multiplier: float | None, expected_batch_size: float | None) -> Any:
    """The step with its noise baked in; refused where there is none, or where it is not float32 on the CPU."""
    if noise_multiplier is not None or expected_batch_size is not None:
        sigma = noise_multiplier if noise_multiplier is not None else step.noise_multiplier
        expected = expected_batch_size if expected_batch_size is not None else step.expected_batch_size
        if sigma is None or expected is None:
            raise ExportError(
                "Give both noise_multiplier and expected_batch_size: a private step needs its noise and its "
                "denominator."
            )
        step = step.with_noise(float(sigma), float(expected))
    if step.grid:
        raise ExportError(
            "A step with noise='grid' cannot be exported: ONNX Runtime's gradient buffers are float32, in which sums are not "
            "exact. Train it in PyTorch, or export the step with noise='float'."
        )
    if step.noise_multiplier is None or step.expected_batch_size is None:
        raise ExportError(
            "This step adds no noise, so what it trains would not be private, and it cannot be exported. Give "
            "noise_multiplier= "
            "and expected_batch_size= here or to compile()."
        )
    if step.dtype != torch.float32 or torch.device(step.device).type != "cpu":
        raise ExportError(
            f"Exported steps are float32 on the CPU; this one is {step.dtype} on {step.device}. Convert the model with "
            "model.float().cpu() and compile it again."
        )
    if step.dropout:
        raise ExportError(
            "The step was compiled with dropout=True: its masks are drawn by Python for each record, and an exported step has "
            "no one to draw them. Compile with dropout=False to export."
        )
    gamma = step.clipping.gamma if isinstance(step.clipping, AutomaticClipping) else 1.0
    if gamma < SMALLEST_CONSTANT:
        raise ExportError(
            f"AutomaticClipping's gamma of {gamma:g} is so small that onnxscript's optimizer would drop it. Compile with a "
            f"gamma of at least {SMALLEST_CONSTANT:g}, or with AutoVClipping."
        )
    return step


def export_rows(step: Any, layout: Layout) -> tuple[list[torch.Tensor], DynamicLength | None, dict[str, int]]:
    """EXPORT_ROWS rows of the example batch at a length that is no size of the model, no two leaves in one memory; the free
    length; and the dimension that has it, by input name."""
    leaves, _ = tree_flatten(step.example_batch)
    leaves = [torch.cat([x.detach()] * -(-EXPORT_ROWS // max(1, x.shape[0])))[:EXPORT_ROWS].clone() for x in leaves]
    length: DynamicLength | None = step.dynamic_length
    if length is None:
        return leaves, None, {}
    padded = {b.name: length.dims[b.path] for b in layout.batch if b.path in length.dims}
    return resized(leaves, [b.path for b in layout.batch], length, length.captured[0]), length, padded


def flat_parameters(step: Any, parameters: Sequence[Parameter] | None = None) -> np.ndarray[Any, np.dtype[np.float32]]:
    """The current values of the trainables, flat, in the step's order, or of these parameters: float32[D]."""
    named = live_parameters(step)
    names = step.trainable_names if parameters is None else [p.name for p in parameters]
    flat = torch.cat([torch.zeros(0), *(named[n].detach().reshape(-1).float().cpu() for n in names)])
    return np.array(flat.numpy(), dtype=np.float32)


def live_parameters(step: Any) -> dict[str, torch.nn.Parameter]:
    """All parameters of the step's model by name, and what the step trains."""
    return {**dict(step.model.named_parameters(remove_duplicate=False)), **step.parameters()}


# -- torch -> ONNX ----------------------------------------------------------------------------------------------------


@contextmanager
def _quiet() -> Iterator[None]:
    """The exporter reports packages it does not need, and its own deprecations."""
    loggers = [logging.getLogger(n) for n in ("torch.onnx", "onnxscript")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def to_onnx(
    module: torch.nn.Module,
    args: Sequence[torch.Tensor],
    names: Sequence[str],
    batched: Sequence[bool],
    outputs: Sequence[str],
    what: str,
    length: DynamicLength | None = None,
    padded: Mapping[str, int] | None = None,
    users: bool = False,
) -> ir.Model:
    """``module(*args)`` as an ONNX model (opset 18, IR 10) whose inputs and outputs carry the given names.

    Args:
        batched: for every input, whether its dimension 0 is the batch, which stays free.
        what: what is exported, for error messages.
        length, padded: the dimension of each named input that is the padded length, which stays free within its range.
        users: it is the user's code, which is traced first, for its operators to be lowered as a sealed graph's are.

    Raises:
        ExportError: torch cannot trace it with a free batch size, or has no ONNX form for an operator.
    """
    try:
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise ExportError("Exporting needs onnx and onnxscript: pip install 'dpbitfit_fx[ort]'.") from error
    batch = torch.export.Dim("batch", min=1, max=1 << 20)
    size = torch.export.Dim("length", min=length.checked[0], max=length.checked[-1]) if length is not None else None
    at = {name: {dim: size} for name, dim in (padded or {}).items()}
    dynamic = tuple({0: batch, **at.get(n, {})} if b else None for n, b in zip(names, batched, strict=True))
    try:
        # The fused attention kernels have layouts that a free batch size cannot follow; math form exports everywhere.
        with torch.no_grad(), _quiet(), sdpa_kernel(SDPBackend.MATH):
            program = torch.export.export(module.eval(), tuple(args), dynamic_shapes=(dynamic,), strict=False)
            if users:
                module = Lowered(program.module(check_guards=False))
                module(*args)  # on real tensors once: it builds the constants
                program = torch.export.export(module, tuple(args), dynamic_shapes=(dynamic,), strict=False)
            exported = torch.onnx.export(program, (), dynamo=True, opset_version=OPSET, verbose=False, optimize=True)
    except ExportError:
        raise
    except Exception as error:
        raise ExportError(f"{what} could not be turned into ONNX: {_explain(error, module)}") from error
    assert exported is not None
    model = exported.model
    clean(model)
    if len(model.graph.inputs) != len(names) or len(model.graph.outputs) != len(outputs):
        raise ExportError(
            f"{what} lost an input or an output on its way to ONNX ({len(model.graph.inputs)} of {len(names)} "
            "inputs left)."
        )
    rename(model, {v: n for v, n in zip([*model.graph.inputs, *model.graph.outputs], [*names, *outputs], strict=True)})
    return model


_OVERLOAD: Final = re.compile(r"OpOverload\(op='([\w.:]+)', overload='(\w+)'\)")


def _explain(error: Exception, module: torch.nn.Module) -> str:
    """Which operator has no ONNX form and where the user wrote it, as far as the chain of causes tells; else its words."""
    chain: list[BaseException] = []
    link: BaseException | None = error
    while link is not None and link not in chain:
        chain.append(link)
        link = link.__cause__ or link.__context__
    told = next((m for e in chain for m in _OVERLOAD.finditer(str(e))), None)
    if told is not None and any("No ONNX function" in str(e) or "No decompositions" in str(e) for e in chain):
        name = ".".join(told.groups()).replace("::", ".")
        inner = getattr(module, "inner", None)
        nodes = [n for n in inner.graph.nodes if str(n.target) == name] if inner is not None else []
        return (
            f"the operator {name} has no ONNX form here yet.{where(nodes[0]) if nodes else ''} Replace it in the model, or "
            "train this model with the PyTorch step."
        )
    last: BaseException = error
    while last.__cause__ is not None:
        last = last.__cause__
    words = " ".join(f"{type(last).__name__}: {last}".split())[:400]
    operator = f" (at {'.'.join(told.groups()).replace('::', '.')})" if told is not None else ""
    return f"{words}{operator}. The PyTorch step is not affected. If an operator is named, replace it in the model or report it."


def clean(model: ir.Model) -> None:
    """Drop stack traces and other metadata, pin the IR version, and refuse operators that draw random numbers."""
    model.ir_version = IR_VERSION
    model.metadata_props.clear()
    model.graph.metadata_props.clear()
    for node in model.graph.all_nodes():
        node.metadata_props.clear()
        node.doc_string = None
        for value in node.outputs:
            value.metadata_props.clear()
        if node.op_type in RANDOM_OPS:
            raise ExportError(
                f"The graph holds {node.op_type}: ONNX Runtime's generators are not secure, and a private step may "
                "not use them. "
                "Put the model in eval() and compile it again."
            )
    for value in [*model.graph.inputs, *model.graph.outputs, *model.graph.initializers.values()]:
        value.metadata_props.clear()


def rename(model: ir.Model, names: Mapping[ir.Value, str]) -> None:
    """Give values their public names; whatever else had one of these names makes way."""
    wanted = set(names.values())
    graph = model.graph
    taken = wanted | {str(v.name) for n in graph.all_nodes() for v in n.outputs} | {str(v.name) for v in graph.inputs}
    taken |= set(graph.initializers)
    others = [v for n in graph.all_nodes() for v in n.outputs] + list(graph.inputs) + list(graph.initializers.values())
    for value in others:
        if value not in names and value.name in wanted:
            value.name = _unused(f"inner_{value.name}", taken)
    for i, value in enumerate(names):
        value.name = f"dpbitfit_temporary_{i}"
    for value, name in names.items():
        value.name = name


def _unused(name: str, taken: set[str]) -> str:
    """The name, or the first numbered one that nobody has; the same in every export. Adds it to ``taken``."""
    found = next(n for i in itertools.count() if (n := f"{name}_{i}") not in taken)
    taken.add(found)
    return found


def freeze(model: ir.Model, tensors: Mapping[str, torch.Tensor], weights: FrozenWeights | None = None) -> None:
    """Turn the named inputs into initializers that hold ``tensors``, not copied, and are read as they lie; quantized by
    ``weights``. They were inputs so far: nothing folded them."""
    from onnx_ir import tensor_adapters

    for value in list(model.graph.inputs):
        if str(value.name) in tensors:
            model.graph.inputs.remove(value)
            if value.uses():
                tensor = tensors[str(value.name)].detach().cpu()
                value.const_value = tensor_adapters.TorchTensor(tensor, name=value.name)
                model.graph.register_initializer(value)
    read_transposed(model)
    if weights is not None:
        weights.rewrite(model, tensors)


@dataclasses.dataclass(frozen=True)
class Core:
    """The sealed gradient half as ONNX: parameters (by name), batch, sample_mask, accumulator -> accumulator_out."""

    model: ir.Model
    layout: Layout


def export_core(step: Any, layout: Layout, weights: FrozenWeights | None = None) -> Core:
    """The PARTIAL-sealed graph of the step, lowered and exported, frozen weights as initializers, quantized by ``weights``.

    Raises:
        ExportError: an operator has no ONNX form.
    """
    joint: JointGraph = step.partial
    leaves, length, padded = export_rows(step, layout)
    args, names, frozen = graph_arguments(joint, step, layout, leaves)
    batched = [i.role in (Role.BATCH, Role.MASK) for i in joint.inputs]
    lowered = Lowered(joint.module)
    with torch.no_grad():
        lowered(*args)  # on real tensors once: it builds the constants
    what = "The private gradient step"
    model = to_onnx(lowered, unaliased(args), names, batched, ["accumulator_out"], what, length, padded)
    freeze(model, frozen, weights)
    pin_rows(model, [p.numel for p in layout.parameters])
    return Core(model, layout)


def graph_arguments(
    joint: JointGraph, step: Any, layout: Layout, leaves: Sequence[torch.Tensor]
) -> tuple[list[torch.Tensor], list[str], dict[str, torch.Tensor]]:
    """What a joint graph is exported on, its inputs' names, and those of the frozen weights, in the order of its inputs."""
    taken = {p.onnx_name for p in (*layout.parameters, *layout.held)} | {b.name for b in layout.batch} | set(_RESERVED)
    live = live_parameters(step)
    held = {id(live[p.name]): p.onnx_name for p in layout.held}
    parameters, batch, rows = iter(layout.parameters), iter(layout.batch), iter(leaves)
    args: list[torch.Tensor] = []
    names: list[str] = []
    frozen: dict[str, torch.Tensor] = {}
    for entry in joint.inputs:
        if entry.role is Role.TRAINABLE:
            names.append(next(parameters).onnx_name)
            args.append(joint.state[entry.target].detach().clone())
        elif entry.role is Role.FROZEN and id(joint.state[entry.target]) in held:
            names.append(held[id(joint.state[entry.target])])
            args.append(joint.state[entry.target].detach().clone())
        elif entry.role is Role.FROZEN:
            tensor = joint.state[entry.target].detach()
            names.append(safe_name(entry.target, taken, "frozen"))
            frozen[names[-1]] = tensor
            args.append(tensor)
        elif entry.role is Role.BATCH:
            names.append(next(batch).name)
            args.append(next(rows))
        elif entry.role is Role.MASK:
            names.append("sample_mask")
            args.append(torch.ones(EXPORT_ROWS))
        elif entry.role is Role.ACCUMULATOR:
            names.append("accumulator")
            args.append(torch.zeros(layout.num_trainable))
        else:
            raise ExportError(
                f"The gradient half of the step takes an input of role {entry.role.value}, which has no place in an "
                "export."
            )
    return args, names, frozen


def unaliased(args: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    seen: set[int] = set()
    result = []
    for x in args:
        result.append(x.clone() if x.data_ptr() in seen else x)
        seen.add(x.data_ptr())
    return result


class UpdateStep(torch.nn.Module):
    """The SEALED half (accumulator, noise -> private gradient) followed by the optimizer, on flat vectors."""

    def __init__(self, joint: JointGraph, optimizer: Optimizer) -> None:
        super().__init__()
        for entry in joint.inputs:
            if entry.role not in (Role.ACCUMULATOR, Role.NOISE):
                raise ExportError(
                    f"The update half of the step takes an input of role {entry.role.value}, which has no place in "
                    "an export."
                )
        self.order = [entry.role for entry in joint.inputs]
        self.sealed = Lowered(joint.module)
        self.optimizer = optimizer

    def forward(self, *args: torch.Tensor) -> tuple[torch.Tensor, ...]:
        *state, accumulator, noise, learning_rate = args
        given = {Role.ACCUMULATOR: accumulator, Role.NOISE: noise}
        gradient = self.sealed(*(given[role] for role in self.order))
        theta = state[0]
        if isinstance(self.optimizer, SGD):
            return (theta - learning_rate * gradient,)
        _theta, m, v, t = state
        (b1, b2), eps, decay = self.optimizer.betas, self.optimizer.eps, self.optimizer.weight_decay
        t = t + 1
        m = b1 * m + (1 - b1) * gradient
        v = b2 * v + (1 - b2) * gradient * gradient
        steps = t.double()
        # 1 - beta ** t cancels in float32.
        correct1 = (1 - torch.exp(steps * math.log(b1))).float() if b1 else torch.ones(1)
        correct2 = (1 - torch.exp(steps * math.log(b2))).float() if b2 else torch.ones(1)
        theta = theta * (1 - learning_rate * decay)
        # sqrt(v) / sqrt(c) + eps, written so that eps is no constant to be added: onnxscript's optimizer takes one as small
        # as 1e-8 for zero and drops the addition.
        root = torch.sqrt(correct2)
        theta = theta - learning_rate / correct1 * m / ((torch.sqrt(v) + eps * root) / root)
        return theta, m, v, t


def export_update(step: Any, optimizer: Optimizer, layout: Layout, *, rates: bool = False) -> ir.Model:
    """The SEALED half and the optimizer as one ONNX model on flat vectors; with ``rates``, a learning rate per value."""
    size = layout.num_trainable
    state = ["theta"] if isinstance(optimizer, SGD) else ["theta", "m", "v", "t"]
    values = {"t": torch.zeros(1, dtype=torch.int64), "learning_rate": torch.full((size if rates else 1,), 0.1)}
    names = [*state, "accumulator", "noise", "learning_rate"]
    args = [values.get(n, torch.full((size,), 0.5)).clone() for n in names]
    module = UpdateStep(step.update, optimizer)
    return to_onnx(module, args, names, [False] * len(names), [f"{n}_out" for n in state], "The private update step")


# -- the plain pair ---------------------------------------------------------------------------------------------------


def split_flat(
    model: ir.Model, flat: ir.Value, layout: Layout, names: Sequence[str], prefix: str
) -> tuple[list[ir.Node], list[ir.Value]]:
    """Nodes that cut ``flat[D]`` into one tensor per parameter, shaped and named."""
    import onnx_ir as ir

    sizes = constant(model, f"{prefix}_sizes", np.array([p.numel for p in layout.parameters], dtype=np.int64))
    split = ir.node("Split", [flat, sizes], attributes={"axis": 0}, num_outputs=len(names))
    nodes, values = [split], []
    for i, (p, name) in enumerate(zip(layout.parameters, names, strict=True)):
        split.outputs[i].name = f"{prefix}_piece_{i}"
        shape = constant(model, f"{prefix}_shape_{i}", np.array(p.shape, dtype=np.int64))
        reshape = ir.node("Reshape", [split.outputs[i], shape])
        reshape.outputs[0].name = name
        reshape.outputs[0].shape = ir.Shape(p.shape)
        reshape.outputs[0].type = ir.TensorType(ir.DataType.FLOAT)
        nodes.append(reshape)
        values.append(reshape.outputs[0])
    return nodes, values


def graph_input(model: ir.Model, name: str) -> ir.Value:
    return next(v for v in model.graph.inputs if v.name == name)


def plain_gradient_model(core: Core) -> ir.Model:
    """The core with its parameters read from one flat ``theta[D]``, and ``held[H]``. Edits ``core.model`` in place."""
    import onnx_ir as ir

    model, layout = core.model, core.layout
    for name, parameters in (("theta", layout.parameters), ("held", layout.held)):
        if not parameters:
            continue
        size = sum(p.numel for p in parameters)
        flat = ir.Value(name=name, shape=ir.Shape([size]), type=ir.TensorType(ir.DataType.FLOAT))
        old = [graph_input(model, p.onnx_name) for p in parameters]
        for value in old:
            model.graph.inputs.remove(value)
            value.name = f"unused_{value.name}"
        part = Layout(parameters, layout.batch)
        nodes, pieces = split_flat(model, flat, part, [p.onnx_name for p in parameters], name)
        for value, piece in zip(old, pieces, strict=True):
            ir.convenience.replace_all_uses_with(value, piece)
        model.graph.insert_before(model.graph[0], nodes)
        model.graph.inputs.insert(len(model.graph.inputs) - 1, flat)
    return model


def manifest_of(
    step: Any, layout: Layout, optimizer: Optimizer, target: str, plan: Mapping[str, Any], extra: Mapping[str, Any]
) -> dict[str, Any]:
    """Everything the runner needs to know, as JSON values: nothing in it is private."""
    known = fingerprints(step.model, step.added_biases, step.trainable_names)
    return {**run_entries(step, layout, target, known), **phase_entries(step, layout, optimizer, plan), **extra}


def run_entries(step: Any, layout: Layout, target: str, known: Mapping[str, str]) -> dict[str, Any]:
    """What the phases of a run have in common; ``known``: the model's fingerprints."""
    versions = {n: importlib.metadata.version(n) for n in ("torch", "onnx", "onnxscript", "numpy")}
    return {
        "format": FORMAT,
        "target": target,
        "num_parameters": sum(p.numel() for p in {*step.model.parameters(), *step.parameters().values()}),
        "fingerprints": dict(known),
        "batch_inputs": [{**dataclasses.asdict(b), "shape": list(b.shape)} for b in layout.batch],
        **_length_of(step.dynamic_length),
        "opset": OPSET,
        "ir_version": IR_VERSION,
        "libraries": versions,
    }


def phase_entries(step: Any, layout: Layout, optimizer: Optimizer, plan: Mapping[str, Any]) -> dict[str, Any]:
    """What is a phase's own: its graph, its parameters, and what they are trained with."""
    return {
        "graph_hash": step.graph_hash,
        "num_trainable": layout.num_trainable,
        "parameters": [p.to_dict() for p in layout.parameters],
        "max_grad_norm": float(step.max_grad_norm),
        "clipping": {"type": type(step.clipping).__name__, **_public_fields(step.clipping)},
        "noise_multiplier": float(step.noise_multiplier),
        "expected_batch_size": float(step.expected_batch_size),
        "optimizer": {"type": type(optimizer).__name__, **dataclasses.asdict(optimizer)},
        "plan": dict(plan),
    }


def _length_of(length: DynamicLength | None) -> dict[str, Any]:
    """Which dimensions of the batch take other lengths than the shapes say; nothing where none does."""
    if length is None:
        return {}
    return {"dynamic_length": {"dims": dict(length.dims), "min": length.checked[0], "max": length.checked[-1]}}


def _public_fields(value: Any) -> dict[str, Any]:
    return dataclasses.asdict(value) if dataclasses.is_dataclass(value) and not isinstance(value, type) else {}


def plan_metadata(
    sample_rate: float | None, dataset_size: int | None, steps: int | None, target_delta: float | None
) -> dict[str, Any]:
    """The public plan, as far as it is known at export; the runner completes it."""
    return {"sample_rate": sample_rate, "dataset_size": dataset_size, "steps": steps, "target_delta": target_delta}


def save_initial(step: Any, layout: Layout, path: Path) -> None:
    """The trainables' values at export, by their torch names."""
    from safetensors.numpy import save_file

    flat = flat_parameters(step, layout.parameters)
    save_file({p.name: flat[p.offset : p.offset + p.numel].reshape(p.shape).copy() for p in layout.parameters}, path)


def export_onnx(
    step: Any,
    path: str | os.PathLike[str],
    *,
    optimizer: str | Optimizer = "adamw",
    noise_multiplier: float | None = None,
    expected_batch_size: float | None = None,
    sample_rate: float | None = None,
    dataset_size: int | None = None,
    steps: int | None = None,
    target_delta: float | None = None,
    weight_bits: int | None = None,
    overwrite: bool = False,
    tolerance: float = 1e-5,
) -> Path:
    """Write ``grad_step.onnx``, ``update_step.onnx``, ``weights.data`` (frozen, large), ``initial.safetensors`` and
    ``manifest.json`` to the folder ``path``.

    Args:
        step: a ``PrivateStep`` with noise, or give ``noise_multiplier`` and ``expected_batch_size`` here.
        optimizer: "adamw", "sgd", ``AdamW(lr, betas, eps, weight_decay)`` or ``SGD(lr)``; lr is only the default of
        an input.
        sample_rate, dataset_size, steps, target_delta: the public plan, kept in the manifest for the runner.
        weight_bits: 8 or 4: frozen weights are held so (``onnx_quantize``), by ONNX Runtime's quantizer; default: float32.
            Biases are then trained for the quantized model. The PyTorch step that the files are compared with runs on
            the dequantized weights, and the manifest says how far those move the gradients of the example batch.
        overwrite: replace an earlier export at ``path``.
        tolerance: largest error of a clipped sum against the PyTorch step, relative to Σ ‖clipped gradient‖.

    Returns:
        The folder.

    Guarantee: before this returns, the files were run by onnxruntime at ORT_ENABLE_ALL on several batch sizes, with
    parameters, masks and accumulators of many kinds, and agreed with the PyTorch step; rows did not influence one
    another.

    Raises:
        ExportError: the step has no noise, an operator has no ONNX form, or onnxruntime computes something else.
        ArtifactError: the folder cannot be written.
    """
    from dpbitfit_fx.onnx_check import check_onnx

    chosen = resolve_optimizer(optimizer)
    check_bits(weight_bits)
    step = prepare(step, noise_multiplier, expected_batch_size)
    layout = layout_of(step)
    weights = None if weight_bits is None else FrozenWeights([step], weight_bits)

    def build(folder: Path, previous: Path | None) -> dict[str, Any]:
        gradient = plain_gradient_model(export_core(step, layout, weights))
        models = {"grad_step.onnx": gradient, "update_step.onnx": export_update(step, chosen, layout)}
        save_models(models, folder, previous)
        save_initial(step, layout, folder / "initial.safetensors")
        plan = plan_metadata(sample_rate, dataset_size, steps, target_delta)
        extra = {} if weights is None else {"frozen_weights": weights.described([step])}
        return manifest_of(step, layout, chosen, "onnx", plan, extra)

    def check(folder: Path) -> None:
        with in_torch(weights):
            check_onnx(step, folder, tolerance=tolerance)

    return write_folder(path, overwrite, build, check)
