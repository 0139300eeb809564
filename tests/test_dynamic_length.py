"""One graph for every padded length: two captures that differ in nothing but it, checked at lengths that neither saw."""

from __future__ import annotations

import dataclasses
import importlib
import itertools
import operator
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fit_cases
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.export import Dim

import dpbitfit_fx as dpb
from dpbitfit_fx.passes import facts
from dpbitfit_fx.passes.joint_graph import DynamicLength, Extent, JointGraph, copy_graph, finish
from dpbitfit_fx.passes.lengths import at_length

aten = torch.ops.aten
UNSEEN = (5, 9, 16)
TEXT = {"input_ids": {1: Dim("T", min=4, max=16)}, "attention_mask": {1: Dim("T", min=4, max=16)}}


class Tiny(nn.Module):
    """Words and places -> attention over the real tokens -> mean over all -> logits; ``middle`` stands before the mean."""

    def __init__(self, middle: Callable[[Tensor], Tensor] | None = None, width: int = 8) -> None:
        super().__init__()
        self.words, self.places, self.middle = nn.Embedding(30, width), nn.Embedding(20, width), middle
        self.mix, self.norm, self.head = nn.Linear(width, 3 * width), nn.LayerNorm(width), nn.Linear(width, 3)

    def forward(self, ids: Tensor, kept: Tensor) -> Any:
        x = self.norm(self.words(ids) + self.places(torch.arange(ids.shape[1])))
        q, k, v = (y.unsqueeze(1) for y in self.mix(x).chunk(3, -1))
        x = x + F.scaled_dot_product_attention(q, k, v, kept[:, None, None, :].bool()).squeeze(1)
        x = x if self.middle is None else self.middle(x)
        return self.head(torch.tanh(x).mean(1))


def tiny(middle: Callable[[Tensor], Tensor] | None = None, width: int = 8, dtype: torch.dtype = torch.float32) -> Tiny:
    torch.manual_seed(0)
    return Tiny(middle, width).to(dtype)


def loss(model: Any, batch: Any) -> Tensor:
    losses: Tensor = F.cross_entropy(
        model(batch["input_ids"], batch["attention_mask"]), batch["labels"], reduction="none"
    )
    return losses


def words(length: int = 10, rows: int = 4) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(length)
    kept = torch.ones(rows, length, dtype=torch.long)
    kept[0, length // 2 :] = 0
    return {
        "input_ids": torch.randint(0, 30, (rows, length), generator=g),
        "attention_mask": kept,
        "labels": torch.arange(rows) % 3,
    }


def loop(step: dpb.PrivateStep, loss_fn: Any, batch: Any) -> Tensor:
    """[B, D]: single-sample autograd on the original model, each sample twice and the first loss taken."""
    chosen, rows = list(step.parameters().values()), []
    for row in range(len(next(iter(batch.values())))):
        losses = loss_fn(step.model, {k: v[[row, row]] for k, v in batch.items()})
        grads = torch.autograd.grad(losses[0], chosen, allow_unused=True)
        rows.append(
            torch.cat([(torch.zeros_like(p) if g is None else g).flatten() for p, g in zip(chosen, grads, strict=True)])
        )
    return torch.stack(rows)


def worst(step: dpb.PrivateStep, loss_fn: Any, batch: Any) -> float:
    """The largest relative error of a sample's whole gradient."""
    theirs = loop(step, loss_fn, batch)
    ours = torch.cat([g.flatten(1) for g in step.per_sample_gradients(batch).values()], 1)
    return float(((ours - theirs).norm(dim=1) / theirs.norm(dim=1)).max())


# -- it fires ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["bert", "roberta", "distilbert", "gpt2", "llama"])
def test_one_graph_has_the_gradients_of_the_loop_at_three_lengths_that_no_capture_saw(name: str) -> None:
    zoo = pytest.importorskip("zoo")
    case, dtype = zoo.cases()[name], torch.float64
    model, loss_fn = zoo.build(case, dtype), zoo.in_dtype(case.loss, dtype)
    step = dpb.compile(model, loss_fn, case.rows([0, 1, 2, 3], dtype), dynamic_shapes=TEXT)
    dynamic = step.dynamic_length
    assert dynamic is not None and not set(UNSEEN) & set(dynamic.captured) and len(set(dynamic.checked)) == 4
    assert f"{dynamic.checked[0]} to {dynamic.checked[-1]}, checked at " in str(step.report())
    pool = case.rows([1, 2, 3], dtype)
    for length, rows in itertools.product(UNSEEN, (1, 3)):
        batch = {
            k: at_length(v, dynamic.dims[k], length)[:rows] if k in dynamic.dims else v[:rows] for k, v in pool.items()
        }
        assert worst(step, loss_fn, batch) < 1e-10, (length, rows)


class Mean(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words, self.mix = nn.Embedding(30, 4), nn.Linear(4, 3)

    def forward(self, ids: Tensor, kept: Tensor) -> Any:
        return (torch.tanh(self.mix(self.words(ids))) * kept.unsqueeze(2)).mean(1)


GOLDEN = """
%0 = trainable mix.bias () {}
%1 = frozen words.weight () {}
%2 = frozen mix.weight () {}
%3 = batch input_ids () {}
%4 = batch attention_mask () {}
%5 = aten.sym_size.int (%3, 1) {}
%6 = aten.sym_size.int (%3, 0) {}
%7 = aten.unsqueeze.default (%3, 1) {}
%8 = aten.unsqueeze.default (%4, 1) {}
%9 = aten.embedding.default (%1, %7) {}
%10 = aten.t.default (%2,) {}
%11 = aten.reshape.default (%9, [-1, 4]) {}
%12 = aten.addmm.default (%0, %11, %10) {}
%13 = aten.reshape.default (%12, [-1, 1, %5, 3]) {}
%14 = aten.tanh.default (%13,) {}
%15 = aten.unsqueeze.default (%8, 3) {}
%16 = aten.mul.Tensor (%14, %15) {}
%17 = aten.mean.dim (%16, [2]) {}
%18 = aten.pow.Tensor_Scalar (%17, 2) {}
%19 = aten.sum.dim_IntList (%18, [2]) {}
%20 = aten.reshape.default (%19, [-1]) {}
%21 = aten.ones_like.default (%20,) {'pin_memory': False, 'memory_format': torch.preserve_format}
%22 = aten.reshape.default (%21, [-1, 1]) {}
%23 = aten.unsqueeze.default (%22, 2) {}
%24 = aten.reshape.default (%23, [-1, 1, 1]) {}
%25 = aten.expand.default (%24, [%6, 1, 3]) {}
%26 = aten.pow.Tensor_Scalar (%17, 1.0) {}
%27 = aten.mul.Scalar (%26, 2.0) {}
%28 = aten.mul.Tensor (%25, %27) {}
%29 = aten.unsqueeze.default (%28, 2) {}
%30 = aten.reshape.default (%29, [-1, 1, 1, 3]) {}
%31 = aten.expand.default (%30, [%6, 1, %5, 3]) {}
%32 = aten.div.Scalar (%31, %5) {}
%33 = aten.mul.Tensor (%32, %15) {}
%34 = aten.tanh_backward.default (%33, %14) {}
%35 = aten.reshape.default (%34, [-1, %5, 3]) {}
%36 = aten.sum.dim_IntList (%35, [1], True) {}
%37 = aten.reshape.default (%36, [-1, 3]) {}
%38 = output ((%20, %37),) {}
"""


def test_the_golden_graph_reads_the_length_from_its_declared_dimension_and_divides_by_it() -> None:
    def squares(model: Any, batch: Any) -> Tensor:
        found: Tensor = model(batch["input_ids"], batch["attention_mask"]).square().sum(1)
        return found

    for length in (10, 13):  # the example's own length leaves no trace
        batch = {k: words(length)[k] for k in TEXT}
        step = dpb.compile(Mean(), squares, batch, dynamic_shapes=TEXT)
        assert step._captured.text() == GOLDEN.strip(), step._captured.text()


def test_equal_text_of_two_examples_of_other_lengths_is_not_because_sizes_are_written_down() -> None:
    step = dpb.compile(tiny(), loss, words(), dynamic_shapes=TEXT)
    assert step.dynamic_length is not None
    for node in step.joint.module.graph.nodes:
        numbers = [int(n) for n in re.findall(r"(?<![\w.])\d+(?![\w.])", str(node.args))]
        assert not set(numbers) & set(step.dynamic_length.captured), node.format_node()


def test_a_ghost_gradient_keeps_its_tokens_symbolic() -> None:
    model = tiny(width=64)
    step = dpb.compile(model, loss, words(), trainable="all", dynamic_shapes=TEXT, ghost_norms=True)
    plain = dpb.compile(model, loss, words(), trainable="all", dynamic_shapes=TEXT, ghost_norms=False)
    assert sum("ghost norm" in how for _, how in step.report().ghosts) >= 3
    for length, rows in itertools.product(UNSEEN, (1, 3)):
        batch = words(length, rows)
        ours, theirs = step.clipped_sum(batch), plain.clipped_sum(batch)
        assert all(torch.allclose(ours[n], theirs[n], atol=2e-6) for n in ours)


def test_the_length_behind_convolutions_is_read_off_their_strides() -> None:
    class Audio(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Conv1d(1, 4, 5, stride=3, padding=1), nn.Conv1d(4, 4, 3, stride=2, dilation=2)
            self.head = nn.Linear(4, 3)

        def forward(self, x: Tensor, kept: Tensor) -> Any:
            h = self.two(torch.tanh(self.one((x * kept).to(self.head.weight.dtype).unsqueeze(1)))).transpose(1, 2)
            return self.head(torch.tanh(h).flatten(0, 1)).reshape(len(x), -1, 3).mean(1)

    torch.manual_seed(0)
    shapes = {k: {1: Dim("T", min=30, max=80)} for k in TEXT}
    step = dpb.compile(Audio().double(), loss, words(60), dynamic_shapes=shapes)
    assert sum(n.target is operator.floordiv for n in step.joint.module.graph.nodes) == 2
    for length, rows in itertools.product((31, 44, 77), (1, 3)):
        assert worst(step, loss, words(length, rows)) < 1e-10


def test_a_longer_sequence_is_the_same_step_with_packed_weights_and_without() -> None:
    model = tiny(width=64)
    packed = dpb.compile(model, loss, words(), dynamic_shapes=TEXT)
    plain = dpb.compile(model, loss, words(), dynamic_shapes=TEXT, disable=["packed_weights"])
    for length in UNSEEN:
        ours, theirs = packed.clipped_sum(words(length)), plain.clipped_sum(words(length))
        assert all(torch.allclose(ours[n], theirs[n], atol=1e-6) for n in ours)


# -- it refuses -------------------------------------------------------------------------------------------------------


def refusal(middle: Callable[[Tensor], Tensor], **options: Any) -> str:
    with pytest.raises(dpb.CompileRefused) as caught:
        dpb.compile(tiny(middle), loss, words(), **{"dynamic_shapes": TEXT, **options})
    return str(caught.value)


def looped(x: Tensor) -> Tensor:
    h = torch.zeros_like(x[:, 0])
    for t in range(x.shape[1]):
        h = torch.tanh(h + x[:, t])
    return h.unsqueeze(1)


REFUSED: dict[str, tuple[Callable[[Tensor], Tensor], str]] = {
    "a loop over the tokens": (looped, r"aten\.tanh.*loop over the sequence.*test_dynamic_length.py"),
    "a scale that is no line in the length": (
        lambda x: x * x.shape[1] ** -0.5,
        r"aten\.mul.*no multiple.*test_dynamic_length",
    ),
    "half of the tokens": (
        lambda x: x[:, : x.shape[1] // 2],
        r"aten\.slice.*no multiple of the length plus a constant",
    ),
    "a pool over two tokens": (
        lambda x: F.avg_pool1d(x.transpose(1, 2), 2).transpose(1, 2),
        r"aten\.\S+ takes .*no multiple of the length plus a constant",
    ),
    "a constant of that length": (
        lambda x: x + torch.tensor([float(i) for i in range(x.shape[1])]).to(x).unsqueeze(1),
        r"constant .* at the length",
    ),
    "a branch for longer ones": (lambda x: x * 2 if x.shape[1] > 15 else x, r"branches on the length"),
    "a branch for shorter ones": (lambda x: x * 2 if x.shape[1] < 6 else x, r"branches on the length"),
    "a branch on even ones": (lambda x: x * 2 if x.shape[1] % 2 == 0 else x, r"branches on the length"),
    "a window padded to multiples of eight": (
        lambda x: F.pad(x, (0, 0, 0, -x.shape[1] % 8)),
        r"branches on the length|no multiple",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_model_that_depends_on_the_length_otherwise_is_refused_by_name(name: str) -> None:
    middle, says = REFUSED[name]
    dpb.compile(tiny(middle), loss, words())  # at one length it is welcome
    message = refusal(middle)
    assert message.startswith("dynamic_shapes: ") and re.search(says, message), message
    assert "\n" not in message and "per length" in message


def test_a_model_that_mixes_samples_is_refused_as_before() -> None:
    assert "does not mean the same sample by sample" in refusal(lambda x: x - x.mean(0))


T = Dim("T", min=4, max=16)
ARGUMENTS: dict[str, tuple[Any, str]] = {
    "an unknown entry": ({"tokens": {1: T}}, "names 'tokens'"),
    "the batch": ({"input_ids": {0: T}}, "dimension 0 is the batch"),
    "a dimension that is not there": ({"labels": {1: T}}, "marks dimension 1"),
    "two lengths": ({"input_ids": {1: T}, "attention_mask": {1: Dim("S", min=4, max=16)}}, "one padded length"),
    "a derived length": ({"input_ids": {1: 2 * T}}, "one padded length"),
    "no longest": ({"input_ids": {1: Dim("T", min=4)}}, "needs a largest length"),
    "a longest below the example's": ({"input_ids": {1: Dim("T", min=4, max=9)}}, "allows lengths from 4 to 9"),
    "a range of two": ({"input_ids": {1: Dim("T", min=9, max=10)}}, "there must be five"),
    "one of two entries": ({"input_ids": {1: T}}, "could not be captured on one sample"),
    "a table that is too short": ({k: {1: Dim("T", min=4, max=40)} for k in TEXT}, "of length (40|22) .IndexError"),
}


@pytest.mark.parametrize("name", ARGUMENTS)
def test_dynamic_shapes_that_fit_nothing_are_refused(name: str) -> None:
    shapes, says = ARGUMENTS[name]
    with pytest.raises(dpb.CompileRefused, match=says):
        dpb.compile(tiny(), loss, words(), dynamic_shapes=shapes)


def test_dropout_is_not_combined_with_a_dynamic_length() -> None:
    with pytest.raises(dpb.CompileRefused, match="cannot be combined"):
        dpb.compile(tiny().train(), loss, words(), dynamic_shapes=TEXT, dropout=True)


def test_a_batch_of_an_unchecked_length_or_of_two_is_refused() -> None:
    step = dpb.compile(tiny(), loss, words(), dynamic_shapes=TEXT)
    for length in (3, 17):
        with pytest.raises(dpb.CompileRefused, match="from 4 to 16"):
            step.clipped_sum(words(length))
    with pytest.raises(dpb.CompileRefused, match="padded lengths"):
        step.clipped_sum({**words(8), "attention_mask": words(9)["attention_mask"]})
    with pytest.raises(dpb.CompileRefused, match="Only the batch size may vary"):
        step.clipped_sum({**words(8), "labels": words(8)["input_ids"]})
    fixed = dpb.compile(tiny(), loss, words())
    with pytest.raises(dpb.CompileRefused, match="Only the batch size may vary"):
        fixed.clipped_sum(words(8))


# -- the proof --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sealed() -> JointGraph:
    return dpb.compile(tiny(), loss, words(), dynamic_shapes=TEXT).partial


def symbols(graph: fx.Graph) -> tuple[fx.Node, fx.Node]:
    """The nodes of the padded length and of the batch size, the latter added where there is none."""
    length = next(n for n in graph.nodes if n.target is aten.sym_size.int and n.args[1] == 1)
    with graph.inserting_after(length):
        return length, graph.call_function(aten.sym_size.int, (length.args[0], 0))


def divisor(graph: fx.Graph) -> fx.Node:
    """The division by the number of tokens: the length as a value."""
    node: fx.Node = next(n for n in graph.nodes if n.target is aten.div.Scalar and isinstance(n.args[1], fx.Node))
    return node


def test_the_length_may_be_a_value(sealed: JointGraph) -> None:
    assert divisor(sealed.module.graph).args[1].target is aten.sym_size.int  # type: ignore[union-attr]
    facts.partial(sealed)


def by_rows(graph: fx.Graph) -> None:
    node = divisor(graph)
    node.args = (node.args[0], symbols(graph)[1])


def by_rows_and_length(graph: fx.Graph, how: Any) -> None:
    node, (length, rows) = divisor(graph), symbols(graph)
    with graph.inserting_before(node):
        node.args = (node.args[0], graph.call_function(how, (rows, length)))


def by_an_undeclared_size(graph: fx.Graph) -> None:
    node, length = divisor(graph), symbols(graph)[0]
    inner = next(n for n in graph.nodes if n.target is aten.embedding.default)
    with graph.inserting_before(node):
        node.args = (node.args[0], graph.call_function(aten.sym_size.int, (inner, 0)))
    assert length.args[1] == 1


SABOTAGE: dict[str, Callable[[fx.Graph], None]] = {
    "the batch size as a value": by_rows,
    "their product": lambda g: by_rows_and_length(g, operator.mul),
    "their sum": lambda g: by_rows_and_length(g, operator.add),
    "a size of another tensor": by_an_undeclared_size,
}


@pytest.mark.parametrize("name", SABOTAGE)
def test_nothing_but_the_declared_length_may_be_a_value(sealed: JointGraph, name: str) -> None:
    graph, _ = copy_graph(sealed.module)
    SABOTAGE[name](graph)
    with pytest.raises(dpb.SealBroken):
        facts.partial(dataclasses.replace(sealed, module=finish(graph)))


@pytest.mark.parametrize("dims", [{}, {"input_ids": 0, "attention_mask": 0}, {"sample_mask": 0}])
def test_a_length_that_was_not_declared_is_no_value(sealed: JointGraph, dims: dict[str, int]) -> None:
    assert sealed.length is not None
    other = DynamicLength(dims, sealed.length.captured, sealed.length.checked)
    for length in (other, None):
        with pytest.raises(dpb.SealBroken):
            facts.partial(dataclasses.replace(sealed, length=length))


def test_the_length_may_not_stand_for_a_constant_of_the_clipping(sealed: JointGraph) -> None:
    graph, _ = copy_graph(sealed.module)
    length = symbols(graph)[0]
    factor = next(n for n in graph.nodes if n.target is aten.mul.Scalar and n.args[1] == 1.0)
    factor.args = (factor.args[0], length)
    with pytest.raises(dpb.SealBroken, match="clip factor"):
        facts.partial(dataclasses.replace(sealed, module=finish(graph)))


def test_the_tokens_of_a_ghost_may_be_the_length_and_not_the_batch_size() -> None:
    joint = dpb.compile(tiny(width=64), loss, words(), trainable="all", dynamic_shapes=TEXT, ghost_norms=True).partial
    graph, _ = copy_graph(joint.module)
    length, rows = symbols(graph)
    for node in graph.nodes:
        if node.target is aten.reshape.default and len(node.args[1]) == 3 and node.args[1][1] is length:
            node.args = (node.args[0], [rows if s is length else s for s in node.args[1]])
    facts.partial(joint)
    with pytest.raises(dpb.SealBroken, match="public sizes"):
        facts.partial(dataclasses.replace(joint, module=finish(graph)))


def test_a_size_that_depends_on_the_length_equals_no_size_that_happens_to_be_the_same() -> None:
    one, plain = Extent(13, 11), 13
    assert one != plain and plain != one and one != Extent(13, 12)
    assert one == Extent(13, 11) and (2, one) == (2, Extent(13, 11)) != (2, plain)


# -- fit --------------------------------------------------------------------------------------------------------------


def run_fit(monkeypatch: pytest.MonkeyPatch, one_graph: bool) -> tuple[list[Any], list[str], dpb.FitResult]:
    """What every call of compile was given as dynamic_shapes, the warnings, and the run; or one graph is refused."""
    home = importlib.import_module("dpbitfit_fx.compile")
    compile_step, calls = home.compile, []

    def counted(*arguments: Any, **options: Any) -> dpb.PrivateStep:
        calls.append(options.get("dynamic_shapes"))
        if calls[-1] and not one_graph:
            raise dpb.CompileRefused("dynamic_shapes: not today.")
        step: dpb.PrivateStep = compile_step(*arguments, **options)
        return step

    with monkeypatch.context() as patch, warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        patch.setattr(dpb, "compile", counted)  # the package keeps what it finds in the module
        patch.setattr(home, "compile", counted)
        result = fit_cases.run(
            None,
            model=fit_cases.text_model(),
            loss_fn=fit_cases.text_loss,
            dataset=fit_cases.sentences(),
            padded_lengths={"input_ids": (4, 8, 12), "attention_mask": (4, 8, 12)},
        )
    return calls, [str(w.message) for w in caught if "padded lengths" in str(w.message)], result


def test_fit_compiles_once_for_three_padded_lengths_and_trains_what_three_steps_train(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls, told, result = run_fit(monkeypatch, True)
    assert len(calls) == 1 and calls[0].keys() == {"input_ids", "attention_mask"} and told == []
    others, told, other = run_fit(monkeypatch, False)
    assert len(others) == 4 and others[1:] == [None, None, None]
    assert len(told) == 1 and "once for each of the padded lengths [4, 8, 12]" in told[0] and "not today" in told[0]
    ours, theirs = fit_cases.biases(result.model), fit_cases.biases(other.model)
    assert bool((ours != fit_cases.biases(fit_cases.text_model())).all())
    assert torch.allclose(ours, theirs, rtol=0, atol=1e-5)
    assert result.statement.graph_hash != other.statement.graph_hash


# -- what finally runs ------------------------------------------------------------------------------------------------


def test_the_exported_graph_takes_every_length(tmp_path: Path) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    import json

    step = dpb.compile(tiny(), loss, words(), dynamic_shapes=TEXT, noise_multiplier=1.0, expected_batch_size=8.0)
    folder = dpb.export_onnx(step, tmp_path / "out")
    described = json.loads((folder / "manifest.json").read_text())["dynamic_length"]
    assert described == {"dims": {"input_ids": 1, "attention_mask": 1}, "min": 4, "max": 16}
    session = onnxruntime.InferenceSession(str(folder / "grad_step.onnx"), providers=["CPUExecutionProvider"])
    theta = torch.cat([p.detach().flatten() for p in step.parameters().values()])
    for length, rows in itertools.product(UNSEEN, (1, 3)):
        batch, zero = words(length, rows), step.zero_accumulator()
        feed = {k: v.numpy() for k, v in batch.items()}
        feed |= {"sample_mask": torch.ones(rows).numpy(), "theta": theta.numpy(), "accumulator": zero.numpy()}
        got = torch.from_numpy(session.run(None, feed)[0])
        want = step.accumulate(batch, torch.ones(rows), zero)
        assert float((got - want).norm() / want.norm()) < 1e-5, (length, rows)
