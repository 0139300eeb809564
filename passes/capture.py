"""Pass 1, capture: the user's model and loss, unedited, become one joint graph of per-sample gradients.

Private by construction (design §3): what vmap is given was exported from ONE sample; it has never seen the other
samples' values, the batch size or the row's position.

    export(model, loss; x[:1])  ->  vmap(grad_and_value(.))  ->  make_fx at a prime size  ->  one graph for every B
    outputs: loss [B], then g_p [B, *p.shape] for every trainable p
"""

from __future__ import annotations

import contextlib
import dataclasses
import warnings
from typing import Any

import torch
from torch import fx, nn
from torch.export.graph_signature import InputKind, OutputKind
from torch.func import functionalize, grad_and_value, vmap

from . import added_biases, random_draws, recurrent_rules, sample_rules, trainables, user_rules
from .checks import data_dependent_origin, drop_checks
from .errors import CompileRefused
from .explain import advice, first_line, unbatched, user_line
from .exportable import Exportable
from .functional_program import functional_program
from .joint_graph import Input, JointGraph, Role, Source, finish
from .lengths import any_length
from .mixing import fails_anyway
from .model_state import (
    dropout_as_asked,
    no_hidden_randomness,
    refuse_eval_mode,
    refuse_train_mode_batchnorm,
    untouched,
)
from .one_sample import ATTENTION, OneSample, attention_kernels, masks_that_need_gradients, rule_for
from .outside import Outside
from .torch_private import (
    is_random,
    keep_lines_of,
    keep_node_meta,
    leaf_names,
    schema_is_mutable,
    trace,
    tree_flatten,
    tree_unflatten,
)
from .unify import any_batch_size, where

aten = torch.ops.aten


class _Whole(nn.Module):
    """Model and loss as one module, called with the flat leaves of one sample's batch."""

    def __init__(self, source: Source, spec: Any, constants: dict[int, Any], count: int) -> None:
        super().__init__()
        self.model, self._loss_fn, self._spec = source.model, source.loss_fn, spec
        self._constants, self._count = constants, count
        self.watch: contextlib.AbstractContextManager[Any] = contextlib.nullcontext()

    def forward(self, *tensors: torch.Tensor) -> torch.Tensor:
        rest = iter(tensors)
        leaves = [self._constants[i] if i in self._constants else next(rest) for i in range(self._count)]
        with Exportable(), self.watch:
            return self._loss_fn(self.model, tree_unflatten(leaves, self._spec))


def split_batch(batch: Any) -> tuple[list[torch.Tensor], dict[int, Any], Any, list[str], int]:
    """Tensor leaves, public constants by leaf index, tree spec, leaf names, batch size; unequal sizes are refused."""
    leaves, spec = tree_flatten(batch)
    names = leaf_names(batch)
    tensors = [x for x in leaves if isinstance(x, torch.Tensor)]
    if not tensors:
        raise CompileRefused(
            "The batch holds no tensor. Give a tensor, or a dict, list or tuple of tensors with dim 0 = batch."
        )
    sizes = {
        n: x.shape[0] if x.dim() else None for n, x in zip(names, leaves, strict=True) if isinstance(x, torch.Tensor)
    }
    if len(set(sizes.values())) != 1 or None in sizes.values():
        raise CompileRefused(f"Every tensor of the batch must have the batch as dim 0, of one size; got {sizes}.")
    constants = {i: x for i, x in enumerate(leaves) if not isinstance(x, torch.Tensor)}
    for i, value in constants.items():
        if not isinstance(value, (type(None), bool, int, float, str)):
            raise CompileRefused(
                f"The batch entry {names[i]} is a {type(value).__name__}; only tensors and plain constants work."
            )
    return tensors, constants, spec, [n for i, n in enumerate(names) if i not in constants], int(tensors[0].shape[0])


def export_one(source: Source) -> torch.export.ExportedProgram:
    """The exported, functionalized program of model and loss on one sample. Refuses with the user's line."""
    tensors, constants, spec, _, size = split_batch(source.example_batch)
    if size < 2:
        raise CompileRefused("example_batch needs at least 2 samples, made up or public, so that mixing can be seen.")
    whole = _Whole(source, spec, constants, len(tensors) + len(constants))
    watch = None if source.public_tensors else Outside(source.model)
    whole.watch = watch or whole.watch
    keep_lines_of(source.loss_fn)
    one = tuple(x[:1].detach().clone() for x in tensors)
    with untouched(source.model), dropout_as_asked(source.model, source.dropout), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            with no_hidden_randomness(source.dropout):
                exported = torch.export.export(whole, one, strict=False)
            if watch is not None:
                watch.check(exported, source.loss_fn)
            program = functional_program(exported, sample_rules.DECOMPOSED)
        except CompileRefused:
            raise
        except Exception as error:
            if watch is not None and watch.refusal is not None:
                raise watch.refusal from error
            place = user_line(error)
            raise fails_anyway(source, tensors) or CompileRefused(
                f"{type(source.model).__name__} could not be captured on one sample: {first_line(error)}.{place} "
                "Values that steer Python (.item(), `if tensor:`, data-dependent sizes) have no graph; take the branch "
                f"out of the model's forward or choose the model's own switch that avoids it.{advice(error, place)}"
            ) from error
    _refuse_mutation(program)
    return program


def capture(source: Source) -> JointGraph:
    """The joint graph ``(trainables, frozen, batch) -> (loss [B], per-sample gradients)`` for any batch size.

    With ``source.length``, for any padded length too, from two captures."""
    return _capture(source) if source.length is None else any_length(_capture, source)


def _capture(source: Source) -> JointGraph:
    refuse_train_mode_batchnorm(source.model)
    program = export_one(source)
    tensors, _, spec, names, size = split_batch(source.example_batch)
    module = program.graph_module
    dropped = drop_checks(module)
    kernels = attention_kernels(module)
    specs = program.graph_signature.input_specs
    placeholders = [n for n in module.graph.nodes if n.op == "placeholder"]
    # A tied parameter may be exported under its last name; named_parameters() lists it under its first.
    first = {id(p): n for n, p in source.model.named_parameters()}
    named = dict(source.model.named_parameters(remove_duplicate=False))
    canonical = {f"model.{n}": first[id(p)] for n, p in named.items()}
    by_name: dict[str, fx.Node] = {}
    for s, n in zip(specs, placeholders, strict=True):
        name = canonical.get(str(s.target))  # None for a parameter of a loss_fn that is itself a module
        if s.kind is InputKind.PARAMETER and name is not None and (n.users or name not in by_name):
            by_name[name] = n
    _refuse_loss_shape(next(n for n in module.graph.nodes if n.op == "output").args[0])
    targets = [canonical.get(str(s.target), str(s.target or "").removeprefix("model.")) for s in specs]
    slow = tuple(
        f"{n.target}, unrolled over time.{where(n)}" for n in module.graph.nodes if n.target in recurrent_rules.RULES
    )
    folded = {n.target for n in module.graph.nodes if rule_for(n.target) or n.target is ATTENTION}
    draws, drawn = random_draws.feed(module) if source.dropout else ((), [])
    if source.dropout and not draws:
        refuse_eval_mode(source.model)
    random_names = random_draws.names(draws)
    if clash := set(random_names) & set(names):
        raise CompileRefused(
            f"The batch has an entry {clash.pop()!r}; with dropout=True the step's own input has that name."
        )
    state = {**program.constants, **program.state_dict, **dict(source.model.named_parameters(remove_duplicate=False))}
    state = {k.removeprefix("model."): v for k, v in state.items()}
    state.update(dict(source.model.named_buffers(remove_duplicate=False)))
    found = added_biases.Found()
    if source.add_bias:
        whole = _Whole(source, spec, split_batch(source.example_batch)[1], spec.num_leaves)
        found = added_biases.lacking(program, whole, tensors, targets, state, draws, source.dropout)
    selection = trainables.select(source.model, source.trainable, by_name, source.exclude, found.nodes, found.misses)
    chosen = [t.name for t in selection.targets]
    roles = []
    for s, target in zip(specs, targets, strict=True):
        is_trainable = s.kind is InputKind.PARAMETER and target in chosen
        roles.append(Role.BATCH if s.kind is InputKind.USER_INPUT else Role.TRAINABLE if is_trainable else Role.FROZEN)
    placeholders, targets, names = placeholders + drawn, targets + random_names, names + random_names
    roles += [Role.BATCH] * len(drawn)
    tensors = [*tensors, *(x.to(tensors[0].device) for x in random_draws.example(draws, size))]
    added = found.named(chosen)
    placeholders += added_biases.insert(module.graph, added)
    module.recompile()
    roles += [Role.TRAINABLE] * len(added)
    targets += [b.name for b in added]
    state.update(added_biases.zeros(added, source.model))
    frozen = [t for t, r in zip(targets, roles, strict=True) if r is Role.FROZEN]
    interpreter = OneSample(module)
    interpreter.dropout, interpreter.kernels = source.dropout, kernels
    interpreter.trainable_masks = masks_that_need_gradients(
        module, [n for n, r in zip(placeholders, roles, strict=True) if r is Role.TRAINABLE]
    )

    feeding = list(zip(targets, roles, strict=True))
    user_rules.check(
        module,
        [n for n, r in zip(placeholders, roles, strict=True) if r is Role.BATCH],
        [n for n, r in zip(placeholders, roles, strict=True) if r is Role.TRAINABLE],
        [_one_row(feeding, state, [x[i : i + 1] for x in tensors]) for i in range(min(3, size))],
    )

    def loss_of_one(trained: list[Any], fixed: list[Any], *sample: Any) -> Any:
        feeds = {
            Role.TRAINABLE: dict(zip(chosen, trained, strict=True)),
            Role.FROZEN: dict(zip(frozen, fixed, strict=True)),
        }
        rows = iter(x[None] for x in sample)
        values = [next(rows) if r is Role.BATCH else feeds[r][t] for r, t in zip(roles, targets, strict=True)]
        loss = interpreter.run(*values, enable_io_processing=False)[-1]
        return loss.reshape(())

    per_sample = vmap(grad_and_value(loss_of_one), in_dims=(None, None) + (0,) * len(tensors))

    def joint(trained: list[Any], fixed: list[Any], *batch: Any) -> Any:
        gradients, loss = per_sample(trained, fixed, *batch)
        return (loss, *gradients)

    trained = [state[n].detach() for n in chosen]
    fixed = [state[n].detach() for n in frozen]

    def at(size: int) -> fx.GraphModule:
        return _trace(joint, interpreter, trained, fixed, [x.new_empty(size, *x.shape[1:]) for x in tensors])

    graph = any_batch_size(at, module.graph, len(chosen) + len(frozen))
    result = finish(graph)
    nodes = [n.name for n in result.graph.nodes if n.op == "placeholder"]
    labels = (
        [(Role.TRAINABLE, n) for n in chosen] + [(Role.FROZEN, n) for n in frozen] + [(Role.BATCH, n) for n in names]
    )
    inputs = tuple(Input(n, r, t) for n, (r, t) in zip(nodes, labels, strict=True))
    kept = {n: state[n] for n in chosen + frozen}
    joint_graph = JointGraph(result, inputs, selection, spec, kept, clipping=source.clipping, noise=source.noise)
    return dataclasses.replace(
        joint_graph,
        source=source,
        slow=slow,
        added=tuple(added),
        folded=tuple(sorted(map(str, folded))),
        dropped=dropped,
        draws=draws,
    )


def _one_row(feeding: list[tuple[str, Role]], state: dict[str, Any], row: list[torch.Tensor]) -> list[torch.Tensor]:
    """The one-sample program's inputs for this row of the example batch."""
    rest = iter(row)
    return [next(rest) if r is Role.BATCH else state[t].detach() for t, r in feeding]


def _trace(joint: Any, running: OneSample, trained: Any, fixed: Any, batch: list[torch.Tensor]) -> fx.GraphModule:
    with warnings.catch_warnings(record=True) as caught, keep_node_meta():
        warnings.simplefilter("always")
        try:
            graph = trace(joint, trained, fixed, *batch)
            if any(schema_is_mutable(n.target) for n in graph.graph.nodes):
                # functorch's own rules write scratch tensors in place: trace once more without the writes.
                replay = fx.Interpreter(graph)
                graph = trace(
                    functionalize(lambda t, f, *b: replay.run(*t, *f, *b, enable_io_processing=False)),
                    trained,
                    fixed,
                    *batch,
                )
        except CompileRefused:
            raise
        except Exception as error:
            node = running.current
            forward = node is not None and node.op == "call_function"  # else the backward was being traced
            place = where(node) if node is not None and forward else user_line(error)
            origin = data_dependent_origin(node) if node is not None and "data-dependent" in str(error) else None
            if origin is not None:
                raise CompileRefused(
                    f"The operator {origin.target} gives a size or a number that depends on the data.{where(origin)} It "
                    "would differ from sample to sample, so there is no form for many at once: take it out of the "
                    f"forward, or choose the model's own switch that avoids it.{advice(error, where(origin))}"
                ) from error
            if node is not None and "random operation" in str(error):
                raise CompileRefused(_random(node, place, running.dropout)) from error
            raise CompileRefused(
                f"The model's operator{f' {node.target}' if node is not None and forward else 's'} could not be batched over "
                f"samples: {first_line(error)}.{place} Data-dependent values and shapes (.item(), unique, boolean "
                f"indexing) have no form for many samples at once; take them out of the forward.{advice(error, place, node)}"
            ) from error
    for warning in caught:
        op = unbatched(str(warning.message))
        if op:
            raise CompileRefused(
                f"The operator {op} would be unrolled over samples: it has no batching rule."
                f"{_find_operator(running.module, op.partition('::')[2])} Replace it in the model by an operator that has one, "
                "or give it a rule with dpbitfit_fx.sample_rule."
            )
    drop_checks(graph)
    for node in graph.graph.nodes:
        if is_random(node):
            raise CompileRefused(_random(node, where(node), running.dropout))
    graph.graph.eliminate_dead_code()
    return graph


def _random(node: fx.Node, place: str, dropout: bool) -> str:
    if dropout:
        return (
            f"The operator {node.target} draws random numbers that dropout=True does not cover.{place} Those that the host "
            "can draw for each sample are dropout, bernoulli, rand and uniform: write it with one of them, or put that "
            "module in eval mode."
        )
    return (
        f"The operator {node.target} draws random numbers in the model.{place} Call model.eval(), set its dropout "
        "probability to zero, or compile with dropout=True: randomness inside the graph is not part of the privacy proof."
    )


def _find_operator(module: nn.Module, op: str) -> str:
    stem = op.replace("_backward", "").strip("_")
    assert isinstance(module, fx.GraphModule)
    for node in module.graph.nodes:
        if node.op == "call_function" and stem in str(node.target):
            return where(node)
    return ""


def _refuse_mutation(program: torch.export.ExportedProgram) -> None:
    for spec in program.graph_signature.output_specs:
        if spec.kind is OutputKind.BUFFER_MUTATION:
            name = str(spec.target).removeprefix("model.")
            raise CompileRefused(
                f"The model writes its buffer {name!r} in forward: it would keep private data without noise. Put the module "
                f"that owns it ({name.rpartition('.')[0] or 'the model'}) in eval mode, or stop it from writing."
            )
        if spec.kind is not OutputKind.USER_OUTPUT:
            raise CompileRefused(
                f"The model writes one of its inputs or parameters in forward ({spec.target}); that is refused."
            )


def _refuse_loss_shape(outputs: Any) -> None:
    loss = outputs[-1] if outputs else None
    shape = (
        tuple(loss.meta["val"].shape) if isinstance(loss, fx.Node) and hasattr(loss.meta.get("val"), "shape") else None
    )
    if shape is None or not isinstance(loss, fx.Node):
        raise CompileRefused("loss_fn must return a tensor: one loss per sample [B], or their mean or sum.")
    dtype = loss.meta["val"].dtype
    if shape not in ((), (1,)) or not dtype.is_floating_point:
        raise CompileRefused(
            f"loss_fn returned shape {list(shape)} and dtype {dtype} for a batch of one sample; it must return one floating "
            "point loss per sample, shape [B] (or their mean or sum). For a loss per token, reduce over the tokens of each "
            "sample first, e.g. loss.mean(dim=1)."
        )
