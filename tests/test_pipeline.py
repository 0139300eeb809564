"""The runner: one literal of passes, facts proved again after each, and the pass that breaks one named."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import itertools
from typing import Any

import pytest
import torch
from fit_cases import mlp, mlp_loss
from torch import fx

from dpbitfit_fx.compile import compile as compile_step
from dpbitfit_fx.passes import facts, pipeline
from dpbitfit_fx.passes.clipping import FlatClipping
from dpbitfit_fx.passes.errors import CompileRefused, PassError, SealBroken
from dpbitfit_fx.passes.joint_graph import Fact, JointGraph, Noise, Role, Source, copy_graph, finish
from dpbitfit_fx.passes.pipeline import CAPTURE, MEANING, OPTIONS, PIPELINE, RELEASE, Pass, run

aten = torch.ops.aten
BATCH = (torch.randn(3, 4, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 1, 1]))
ORDER = ["capture", "re-fuse", "dead_tokens", "check_meaning", "ghost", "clip", "seal_partial", "add_noise", "seal"]
CLIP, SEAL = (next(p for p in PIPELINE if p.name == name) for name in ("clip", "seal_partial"))


@pytest.fixture(scope="module")
def captured() -> JointGraph:
    source = Source(mlp(), mlp_loss, BATCH, "bias", FlatClipping(1.0), Noise(1.0, 8.0))
    return run((CAPTURE, *PIPELINE[:MEANING]), source)


@pytest.fixture(scope="module")
def stages(captured: JointGraph) -> dict[str, JointGraph]:
    """The graph after each pass, by the pass's name."""
    seen = {"check_meaning": captured}
    run((*PIPELINE[MEANING:], *RELEASE), captured, lambda name, _old, new: seen.update({name: new}))
    return seen


def rewrite(name: str, change: Any, **facts_of: Any) -> Pass:
    """A pass that edits a copy of the graph, as every pass does."""

    def apply(joint: JointGraph) -> JointGraph:
        graph, _ = copy_graph(joint.module)
        change(graph)
        return dataclasses.replace(joint, module=finish(graph))

    return Pass(name, apply, **facts_of)


def wrap_output(*call: Any) -> Any:
    def change(graph: fx.Graph) -> None:
        output = graph.output_node()
        with graph.inserting_before(output):
            values: Any = output.args[0]
            first, *rest = values
            output.args = ((graph.call_function(call[0], (first, *call[1:])), *rest),)

    return change


def test_the_order_of_the_passes_is_one_literal() -> None:
    tree = ast.parse(inspect.getsource(pipeline))
    literals = {
        n.targets[0].id: n.value for n in tree.body if isinstance(n, ast.Assign) and isinstance(n.targets[0], ast.Name)
    }
    names = []
    for part in ("CAPTURE", "PIPELINE", "RELEASE"):
        value = literals[part]
        for call in value.elts if isinstance(value, ast.Tuple) else [value]:
            assert isinstance(call, ast.Call) and isinstance(call.args[0], ast.Constant)
            names.append(call.args[0].value)
    assert names == ORDER == [p.name for p in (CAPTURE, *PIPELINE, *RELEASE)]


def test_every_fact_has_one_predicate_and_one_pass_that_gives_it() -> None:
    assert set(facts.PREDICATES) == set(Fact)
    given = [f for p in (CAPTURE, *PIPELINE, *RELEASE) for f in p.gives]
    assert sorted(given, key=str) == sorted(Fact, key=str)


def test_what_a_pass_needs_was_given_by_one_before_it() -> None:
    known: set[Fact] = set()
    for item in (CAPTURE, *PIPELINE, *RELEASE):
        assert item.needs <= known, item.name
        known |= item.gives


def test_a_finished_graph_has_every_fact_and_the_whole_trail(stages: dict[str, JointGraph]) -> None:
    sealed = stages["seal"]
    assert sealed.facts == frozenset(Fact)
    assert [t.name for t in sealed.trail] == ORDER
    for earlier, later in itertools.pairwise(sealed.trail):
        assert later.nodes_before == earlier.nodes_after and later.seconds >= 0
    assert sealed.trail[0].nodes_before == 0
    assert sealed.trail[-1].nodes_after == len(sealed.module.graph.nodes)


def test_the_observer_sees_every_pass_with_the_graph_before_and_after() -> None:
    seen: list[tuple[str, JointGraph | None, JointGraph]] = []
    step = compile_step(
        mlp(),
        mlp_loss,
        BATCH,
        noise_multiplier=1.0,
        expected_batch_size=8.0,
        observer=lambda name, old, new: seen.append((name, old, new)),
    )
    assert [name for name, _, _ in seen] == ORDER
    assert seen[0][1] is None and seen[-1][2] is step.joint
    for (_, _, before), (_, old, new) in itertools.pairwise(seen):
        assert old is before and old is not new


def test_no_pass_edits_the_graph_that_it_was_given(captured: JointGraph) -> None:
    joint = captured
    for item in (*PIPELINE, *RELEASE):
        text, inputs = joint.text(), joint.inputs
        after = run((item,), joint)
        assert joint.text() == text and joint.inputs == inputs, item.name
        joint = after


@pytest.mark.parametrize("name", ORDER[1:])
def test_a_pass_whose_needs_are_missing_does_not_run(stages: dict[str, JointGraph], name: str) -> None:
    item = next(p for p in (*PIPELINE, *RELEASE) if p.name == name)
    ran: list[JointGraph] = []

    def count(joint: JointGraph) -> JointGraph:
        ran.append(joint)
        return item.run(joint)

    spy = dataclasses.replace(item, run=count)
    for lost in sorted(item.needs, key=str):
        joint = dataclasses.replace(stages["seal"], facts=frozenset(Fact) - {lost})
        reason = rf"Pass {name} needs \['{lost.value}'\]; what ran before: \['capture'.*'seal'\]"
        with pytest.raises(PassError, match=reason):
            run((spy,), joint)
    assert ran == []


def test_a_pass_that_is_switched_off_leaves_no_trail_and_the_others_run() -> None:
    source = Source(mlp(), mlp_loss, BATCH, "bias", FlatClipping(1.0))
    joint = run((CAPTURE, *PIPELINE), source, disable=OPTIONS)
    skipped = {p.name for p in PIPELINE if p.option}
    assert skipped == {"re-fuse", "dead_tokens"}
    assert [t.name for t in joint.trail] == [n for n in ORDER[:-2] if n not in skipped]


def test_no_proof_can_be_switched_off() -> None:
    proofs = {"capture", "check_meaning", "clip", "seal_partial", "add_noise", "seal"}
    assert not any(p.option for p in (CAPTURE, *PIPELINE, *RELEASE) if p.name in proofs or p.gives)


def test_a_rewrite_cannot_run_before_capture() -> None:
    source = Source(mlp(), mlp_loss, BATCH)
    with pytest.raises(PassError, match=r"Pass clip needs \['per_sample'\]; what ran before: \[\]"):
        run((CLIP,), source)


BREAKERS: list[tuple[str, str, Any]] = [
    ("check_meaning", "functional", wrap_output(aten.mul_.Scalar, 2.0)),
    ("check_meaning", "functional", wrap_output(aten.rand_like.default)),
    ("check_meaning", "per_sample", lambda g: setattr(g.output_node(), "args", (g.output_node().args[0][:-1],))),
    ("clip", "clipped", wrap_output(aten.mul.Scalar, 2.0)),
    ("seal_partial", "clipped", wrap_output(aten.neg.default)),
    ("add_noise", "clipped", wrap_output(aten.mul.Scalar, 0.5)),
    ("seal", "clipped", wrap_output(aten.clone.default)),
]


@pytest.mark.parametrize(("after", "fact", "change"), BREAKERS)
def test_the_pass_that_breaks_a_fact_is_blamed_with_what_ran_before(
    stages: dict[str, JointGraph], after: str, fact: str, change: Any
) -> None:
    ran = ORDER[: ORDER.index(after) + 1]
    with pytest.raises(PassError) as caught:
        run((rewrite("improve", change),), stages[after])
    assert f"Pass improve broke the fact {fact} (" in str(caught.value)
    assert str(caught.value).endswith(f"what ran before: {ran}.")
    assert isinstance(caught.value.__cause__, SealBroken)


def test_an_innocent_pass_after_a_guilty_one_is_not_blamed(captured: JointGraph) -> None:
    idle = Pass("idle", lambda joint: joint)
    guilty = rewrite("improve", wrap_output(aten.mul.Scalar, 2.0))
    with pytest.raises(PassError, match=r"Pass improve broke .*what ran before: .*'clip', 'idle'\]"):
        run((CLIP, idle, guilty, SEAL), captured)


def test_a_pass_that_claims_a_fact_it_did_not_establish_is_refused(captured: JointGraph) -> None:
    boast = Pass("boast", lambda joint: joint, gives=frozenset({Fact.SEALED}))
    with pytest.raises(PassError, match="Pass boast broke the fact sealed"):
        run((boast,), captured)


def test_facts_are_kept_by_the_runner_not_by_the_passes(captured: JointGraph) -> None:
    forged = Pass("forge", lambda joint: dataclasses.replace(joint, facts=frozenset(Fact), trail=()))
    after = run((forged,), captured)
    assert after.facts == captured.facts
    assert [t.name for t in after.trail] == [*(t.name for t in captured.trail), "forge"]


def test_a_capture_that_is_not_functional_is_refused_as_the_models_fault() -> None:
    def broken(source: Source) -> JointGraph:
        joint = CAPTURE.run(source)
        graph, _ = copy_graph(joint.module)
        wrap_output(aten.rand_like.default)(graph)
        return dataclasses.replace(joint, module=finish(graph))

    source = Source(mlp(), mlp_loss, BATCH, "bias", FlatClipping(1.0))
    with pytest.raises(CompileRefused, match="draws random numbers"):
        run((dataclasses.replace(CAPTURE, run=broken),), source)


def test_each_stage_has_the_inputs_and_outputs_that_its_pass_promises(stages: dict[str, JointGraph]) -> None:
    roles = {name: [i.role for i in joint.inputs] for name, joint in stages.items()}
    first = [Role.TRAINABLE] * 2 + [Role.FROZEN] * 2 + [Role.BATCH] * 2
    assert roles["check_meaning"] == first
    assert roles["clip"] == roles["seal_partial"] == [*first, Role.MASK, Role.ACCUMULATOR]
    assert roles["seal"] == [*first, Role.MASK, Role.ACCUMULATOR, Role.NOISE]
    assert [len(stages[n].outputs) for n in ("check_meaning", "clip", "seal")] == [3, 1, 1]
