"""BiTFiT-Add in the exported one-sample graph: products with a parameter that lack a bias, and a bias for each.

    y = x W            ->  y = x W + b,           b [n] (and [h, n] where W [h, k, n] is one matrix per head)
    y = conv(x, W)     ->  y = conv(x, W) + b,    b [C], along the channels

One bias per module and parameter, however often it is used; zero at first, so that the model means what it meant
(Bu et al., "Differentially Private Bias-Term Fine-tuning of Foundation Models", ICML 2024). The graph is not the model: where
a module has no slot for its bias, the model's own forward must agree with the graph on a number, or the bias is left out.
"""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import fx, nn
from torch.export.graph_signature import InputKind

from .bias_slots import applied, fault
from .joint_graph import AddedBias, Draw, copy_graph
from .model_state import dropout_as_asked, untouched
from .products import CONVS, LINEARS, product
from .random_draws import example
from .replay import replaying
from .torch_private import module_stack
from .trainables import ADDS, RESHAPES

aten = torch.ops.aten
LAYERS = (
    nn.Linear,
    nn.Conv1d,
    nn.Conv2d,
    nn.Conv3d,
    nn.ConvTranspose1d,
    nn.ConvTranspose2d,
    nn.ConvTranspose3d,
)


@dataclasses.dataclass
class Found:
    """Every bias that could be added, with the products that it goes to, and what was passed over with the reason."""

    nodes: dict[AddedBias, list[fx.Node]] = dataclasses.field(default_factory=dict)
    misses: dict[str, str] = dataclasses.field(default_factory=dict)

    def named(self, names: Sequence[str]) -> dict[AddedBias, list[fx.Node]]:
        return {b: nodes for b, nodes in self.nodes.items() if b.name in names}


def lacking(
    program: torch.export.ExportedProgram,
    whole: Any,
    batch: Sequence[torch.Tensor],
    targets: Sequence[str],
    state: Mapping[str, torch.Tensor],
    draws: Sequence[Draw] = (),
    dropout: bool = False,
) -> Found:
    """What may be added to the exported program of ``whole(*one sample)``, whose inputs are ``targets`` in ``state``,
    followed by those of the ``draws``.
    """
    module, model, specs = program.graph_module, whole.model, program.graph_signature.input_specs
    own = dict(model.named_parameters())
    placeholders = [n for n in module.graph.nodes if n.op == "placeholder"]
    inputs = list(zip(specs, placeholders[: len(specs)], targets, strict=True))
    names = {n: t for s, n, t in inputs if s.kind is InputKind.PARAMETER and t in own}
    own_batch = {n for s, n, _ in inputs if s.kind is InputKind.USER_INPUT}
    found = find(module, model, names, own_batch.union(placeholders[len(specs) :]))
    one = [x[:1].detach().clone() for x in batch]
    rows = iter(one)
    values = [next(rows) if s.kind is InputKind.USER_INPUT else state[t].detach() for s, _, t in inputs]
    values += [x.to(one[0].device) for x in example(draws, 1, constant=0.5)]

    def theirs() -> Any:
        with replaying(draws, 1):
            return whole(*(x.clone() for x in one))

    with untouched(model), dropout_as_asked(model, dropout):
        _leave_out_doubtful(found, module, model, values, theirs)
    return found


def find(module: fx.GraphModule, model: nn.Module, names: Mapping[fx.Node, str], batch: set[fx.Node]) -> Found:
    """The products of ``module`` that lack a bias. ``names``: parameter placeholders; ``batch``: those of the sample."""
    # Of every node that no batch input reaches: the parameters that it is made of.
    made_of: dict[fx.Node, frozenset[fx.Node]] = {}
    for node in module.graph.nodes:
        if node not in batch and all(i in made_of for i in node.all_input_nodes):
            own = frozenset({node}) if node in names else frozenset()
            made_of[node] = own.union(*(made_of[i] for i in node.all_input_nodes))
    parameters, found = dict(model.named_parameters(remove_duplicate=False)), Found()
    paths = {id(m): path for path, m in model.named_modules()}
    for node in module.graph.nodes:
        found_one = product(node, made_of)
        if found_one is None:
            continue
        weight, shape, view = found_one
        sources = {names[p]: parameters[names[p]] for p in made_of[weight]}
        owner = _owner(node, model, sources)
        if owner is None:
            continue
        layer, leaf = owner
        path = paths[id(layer)]
        name = f"{path}.{leaf}" if path else leaf
        first = next(iter(sources.values()))
        bias = AddedBias(name, path, leaf, shape, first.dtype, view)
        if layer._parameters.get(leaf) is not None or _has_one(node, bias.numel, made_of):
            continue
        why = fault(model, bias)
        if why is None and len(sources) == 1 and weight.meta["val"].numel() != first.numel():
            why = f"only a part of {next(iter(sources))} is the weight of one product"
        earlier = next((b for b in found.nodes if b.name == name), bias)
        if why is None and earlier != bias:
            why = "its weight is used by several products of different shapes"
        if why is not None:
            found.misses[name] = why
        else:
            found.nodes.setdefault(bias, []).append(node)
    found.nodes = {b: nodes for b, nodes in found.nodes.items() if b.name not in found.misses}
    return found


def _leave_out_doubtful(
    found: Found, module: fx.GraphModule, model: nn.Module, values: Sequence[torch.Tensor], theirs: Callable[[], Any]
) -> None:
    """Drops each bias that the model's own forward does not add where the graph does (a slot unused, a hook elsewhere).

    ``values`` are the graph's inputs for one sample, ``theirs()`` the user's own loss for it.
    """
    for bias, nodes in list(found.nodes.items()):
        layer = model.get_submodule(bias.module)
        plain = isinstance(layer, LAYERS) and any(type(layer).forward is kind.forward for kind in LAYERS)
        if plain and all(_inside(n, model) is layer for n in nodes):
            continue
        device = values[0].device
        value = nn.Parameter(torch.linspace(0.5, 1.5, bias.numel).reshape(bias.shape).to(device, bias.dtype))
        graph, mapping = copy_graph(module)
        insert(graph, {bias: [mapping[n] for n in nodes]})
        with torch.no_grad():
            ours = fx.Interpreter(fx.GraphModule(module, graph)).run(*values, value, enable_io_processing=False)[-1]
            with applied(model, [bias], {bias.name: value}):
                try:
                    loss = theirs()
                except Exception:
                    loss = None
        tolerance = 1e-3 if bias.dtype.itemsize >= 4 else 0.05
        if loss is None or not torch.allclose(
            ours.double().reshape(()), loss.double().reshape(()), rtol=tolerance, atol=tolerance * 1e-2
        ):
            found.misses[bias.name] = (
                f"the forward of {type(layer).__name__} would not add it where the product is, so it could not be put onto "
                "the original model"
            )
            del found.nodes[bias]


def insert(graph: fx.Graph, added: Mapping[AddedBias, Sequence[fx.Node]]) -> list[fx.Node]:
    """Adds one placeholder per bias, behind the others, and the bias to its products. In place: the caller's graph."""
    last = [n for n in graph.nodes if n.op == "placeholder"][-1]
    result = []
    for number, (bias, nodes) in enumerate(added.items()):
        with graph.inserting_after(last):
            last = graph.placeholder(f"added_bias_{number}")
        result.append(last)
        for node in nodes:
            dtype = node.meta["val"].dtype
            with graph.inserting_before(node):
                value = last
                if dtype != bias.dtype:
                    value = _like(graph.call_function(aten._to_copy.default, (last,), {"dtype": dtype}), node)
            if node.target in LINEARS or node.target in CONVS:
                node.args = (*node.args[:2], value, *node.args[3:])
                node.kwargs = {k: v for k, v in node.kwargs.items() if k != "bias"}
                continue
            with graph.inserting_after(node):
                view = _like(graph.call_function(aten.view.default, (value, list(bias.view))), node)
            with graph.inserting_after(view):
                total = graph.call_function(aten.add.Tensor, (node, view))
            for user in [u for u in node.users if u is not total]:
                user.replace_input_with(node, total)
            _like(total, node).meta["val"] = node.meta["val"]
    return result


def zeros(added: Mapping[AddedBias, Sequence[fx.Node]], model: nn.Module) -> dict[str, nn.Parameter]:
    """``{name: zeros}``, dtype and device of the weight; parameters that the user's model does not have."""
    result = {}
    for bias in added:
        layer = model.get_submodule(bias.module)
        device = next((p.device for p in layer.parameters()), next(model.parameters()).device)
        result[bias.name] = nn.Parameter(torch.zeros(bias.shape, dtype=bias.dtype, device=device))
    return result


def _like(new: fx.Node, old: fx.Node) -> fx.Node:
    new.meta.update({k: v for k, v in old.meta.items() if k in ("nn_module_stack", "stack_trace")})
    return new


def _inside(node: fx.Node, model: nn.Module) -> nn.Module:
    """The innermost module of the user's model in whose forward this node was called."""
    path = module_stack(node.meta).split("@")[0].removeprefix("model").strip(".")
    try:
        return model.get_submodule(path)
    except AttributeError:
        return model


def _owner(node: fx.Node, model: nn.Module, sources: Mapping[str, nn.Parameter]) -> tuple[nn.Module, str] | None:
    """The module that the bias belongs to, and its leaf name; None for a product of activations made of parameters."""
    inside = _inside(node, model)
    direct = [k for k, p in inside._parameters.items() if any(p is s for s in sources.values())]
    if isinstance(inside, LAYERS) and (len(direct) != 1 or direct == ["weight"]):
        return inside, "bias"  # also a weight under a norm or another parametrization
    if len(direct) == 1 and len(sources) == 1:
        return inside, _bias_of(direct[0])
    if len(sources) != 1:
        return None
    path, _, leaf = next(iter(sources)).rpartition(".")
    return model.get_submodule(path), _bias_of(leaf)


def _bias_of(leaf: str) -> str:
    return leaf.replace("weight", "bias") if "weight" in leaf else f"{leaf}_bias"


def _has_one(node: fx.Node, size: int, made_of: Mapping[fx.Node, frozenset[fx.Node]]) -> bool:
    """Whether the product is followed, after reshapes alone, by the addition of a parameter of a bias's size."""
    while len(node.users) == 1:
        (user,) = node.users
        if user.target in ADDS:
            others = [i for i in user.all_input_nodes if i is not node]
            return bool(others) and bool(made_of.get(others[0])) and others[0].meta["val"].numel() == size
        if user.target not in RESHAPES and user.target is not operator.getitem:
            return False
        node = user
    return False
