"""Sealed graphs edited at random: refused, or measured sound, by a measurement that sees what is not. ``tools/fuzz edits``."""

from __future__ import annotations

import dataclasses
import random
import re
from collections import Counter
from collections.abc import Callable
from typing import Any

import edited_graphs
import pytest
import torch
from edited_graphs import Case, Found, Runs, case, judge, judge_many, measured, one_edit, released
from graph_edits import KINDS, Draft
from torch import fx

from dpbitfit_fx.passes.errors import SealBroken
from dpbitfit_fx.passes.joint_graph import JointGraph

aten = torch.ops.aten
EDITS = 600


def test_edited_graphs_are_refused_or_measured_sound() -> None:
    found = judge_many(EDITS, start=0)
    assert found.bad == []
    assert found.total["refused by the seal"] > EDITS // 2 and sum(accepted(found).values()) >= EDITS // 100, found.total
    assert found.tables["by kind of edit"].keys() == KINDS.keys()
    assert len(found.texts) > 0.9 * EDITS  # a fuzz that repeats itself proves little


def test_edits_before_the_clip_pass_the_seal_and_are_measured_sound_or_refused_for_mixing_rows() -> None:
    found = judge_many(EDITS, start=0, on_the_tail=0.0)
    assert found.bad == []
    assert accepted(found)["sound, other gradients"] > EDITS // 25, found.total
    assert found.total["refused by check_rows"] > 0, found.total


def accepted(found: Found) -> Counter[str]:
    return Counter({kind: n for kind, n in found.total.items() if kind.startswith("sound")})


def test_an_edit_is_a_function_of_its_number() -> None:
    for seed in (5, 6):
        (name, stage, one), (*_, other) = one_edit(seed), one_edit(seed)
        assert one.text == other.text and one.said == other.said
        assert one.text != case(name).graph(stage).text() or one.joint.inputs != case(name).graph(stage).inputs


# --- the measurement sees an unsound graph


def unproved(of: Case, joint: JointGraph, stage: str) -> Runs:
    """What an edited whole graph would compute if nothing were proved of it: its sum is what it releases without noise."""
    joint = dataclasses.replace(joint, module=fx.GraphModule(torch.nn.Module(), joint.module.graph))
    release = released(joint)

    def sums(leaves: Any, mask: Any, accumulator: Any) -> Any:
        return [x * edited_graphs.N for x in release(leaves, mask, accumulator, torch.zeros_like(accumulator))]

    try:
        sums(of.batches[0], torch.ones(len(of.batches[0][0])), of.step.zero_accumulator())
    except Exception as error:
        raise edited_graphs.DoesNotRun(str(error)) from error
    return Runs(sums, of.step.privatize, release)


def test_without_the_seal_many_edits_are_measured_as_unsound(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(edited_graphs, "prove", lambda joint, stage: None)
    monkeypatch.setattr(edited_graphs, "lowered", unproved)
    monkeypatch.setattr(edited_graphs, "STAGES", ("whole",))
    monkeypatch.setattr(edited_graphs, "CASES", {"mlp, flat": edited_graphs.CASES["mlp, flat"]})
    found = judge_many(250, start=0)
    assert found.total["UNSOUND"] > 50, found.total
    reasons = {b["why"].split(":")[0].split(",")[0] for b in found.bad}
    assert {"sensitivity", "the noise", "the output is not one vector [D]", "an output is not finite"} <= reasons


def test_an_edit_after_which_no_example_row_contributes_anything_is_refused() -> None:
    """Gradients divided by the labels of all rows: none of the example is finite, so that none showed whether they mix."""
    found = judge_many(1, start=112099, on_the_tail=0.0)
    assert found.total == {"refused by check_rows": 1}, found.bad


def the(draft: Draft, target: Any, at: int = 0) -> fx.Node:
    return [n for n in draft.calls() if n.target is target][at]


def put(node: fx.Node, at: int, value: Any) -> None:
    node.args = (*node.args[:at], value, *node.args[at + 1 :])


def wrap(d: Draft, user: fx.Node, at: int, target: Any, *args: Any) -> None:
    with d.graph.inserting_before(user):
        put(user, at, d.graph.call_function(target, (user.args[at], *args)))


def between(d: Draft, target: Any, *inputs: Any) -> fx.Node:
    with d.graph.inserting_before(the(d, aten.div.Scalar, -1)):
        return d.graph.call_function(target, inputs)


def named(d: Draft, name: str) -> fx.Node:
    found: fx.Node = next(n for n in d.graph.nodes if n.name == name)
    return found


def second_output(d: Draft) -> None:
    d.graph.output_node().args = ((the(d, aten.div.Scalar, -1), the(d, aten.sqrt.default)),)


def mask_sum_as_denominator(d: Draft) -> None:
    end = the(d, aten.div.Scalar, -1)
    total = between(d, aten.div.Tensor, between(d, aten.mul.Scalar, end.args[0], 4.0),
                    between(d, aten.sum.default, named(d, "sample_mask")))  # fmt: skip
    put(end, 0, total)


def mask_as_a_weight(d: Draft) -> None:
    factor = the(d, aten.where.ScalarOther)
    with d.graph.inserting_before(factor):
        put(factor, 1, d.graph.call_function(aten.mul.Tensor, (factor.args[1], named(d, "sample_mask"))))


def a_larger_bound(d: Draft) -> None:
    for node in (the(d, aten.clamp_min.default), the(d, aten.mul.Scalar)):
        put(node, 1, 0.50001)


UNSOUND: dict[str, tuple[Callable[[Draft], Any], str]] = {
    "R a little too large": (a_larger_bound, "sensitivity"),
    "a factor that is doubled": (lambda d: put(the(d, aten.mul.Scalar), 1, 1.0), "sensitivity"),
    "NaN let through": (lambda d: put(the(d, aten.mm.default, -1), 1, the(d, aten.cat.default, -1)), "not finite|sensitivity"),
    "a norm that is too small": (lambda d: wrap(d, the(d, aten.mul.Tensor, -1), 0, aten.mul.Scalar, 0.5), "sensitivity"),
    "rows added up": (lambda d: wrap(d, the(d, aten.reshape.default, -3), 0, aten.cumsum.default, 0), "sensitivity|masked"),
    "less noise": (lambda d: put(the(d, aten.mul.Scalar, -1), 1, 0.624), "the noise"),
    "noise that is one number": (lambda d: wrap(d, the(d, aten.mul.Scalar, -1), 0, aten.mean.dim, [0], True), "the noise"),
    "noise twice": (lambda d: wrap(d, the(d, aten.div.Scalar, -1), 0, aten.add.Tensor, the(d, aten.mul.Scalar, -1)), "noise"),
    "a norm released": (second_output, "not one vector"),
    "the sum of the mask as denominator": (mask_sum_as_denominator, "a mask of 3|sensitivity"),
    "the mask as a weight": (mask_as_a_weight, "a mask of 3"),
    "the accumulator twice": (lambda d: put(the(d, aten.add.Tensor, -2), 1, named(d, "accumulator")), "accumulator"),
}  # fmt: skip


def by_hand(edit: Callable[[Draft], Any], stage: str = "whole") -> tuple[Case, JointGraph]:
    of = case("mlp, flat")
    draft = Draft(of.graph(stage), of.sizes, random.Random(0))
    edit(draft)
    return of, draft.done()


@pytest.mark.parametrize("kind", UNSOUND)
def test_the_measurement_sees_what_the_seal_refuses(kind: str) -> None:
    edit, why = UNSOUND[kind]
    of, joint = by_hand(edit)
    assert judge(of, joint, "whole").kind.startswith("refused")
    found, _ = measured(of, unproved(of, joint, "whole"))
    assert re.search(why, found), found


@pytest.mark.parametrize("name", edited_graphs.CASES)
def test_the_graphs_themselves_are_measured_as_sound(name: str) -> None:
    of = case(name)
    assert measured(of, unproved(of, of.step.joint, "whole")) == ("", True)
    for stage in ("whole", "partial", "update"):
        joint = Draft(of.graph(stage), of.sizes, random.Random(0)).done()
        assert judge(of, joint, stage).kind == "sound, the same numbers"


def test_another_gradient_is_sound_where_its_rows_stay_apart() -> None:
    of, joint = by_hand(lambda d: wrap(d, the(d, aten.reshape.default, -3), 0, aten.mul.Scalar, 7.0))
    assert judge(of, joint, "whole").kind == "sound, other gradients"


def test_the_measurement_sees_the_rows_that_check_rows_would_let_mix(monkeypatch: pytest.MonkeyPatch) -> None:
    of, joint = by_hand(lambda d: wrap(d, the(d, aten.reshape.default, -3), 0, aten.cumsum.default, 0), "partial")
    assert judge(of, joint, "partial").kind == "refused by check_rows"
    monkeypatch.setattr(edited_graphs, "check_rows", lambda step: None)
    assert judge(of, joint, "partial").kind == "UNSOUND"


@pytest.mark.parametrize(("error", "kind"), [(SealBroken, "refused by the seal"), (KeyError, "raw error")])
def test_an_error_that_is_not_the_librarys_own_is_no_refusal(
    error: type[Exception], kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(joint: JointGraph, stage: str) -> None:
        raise error("x")

    monkeypatch.setattr(edited_graphs, "prove", fail)
    of = case("mlp, flat")
    assert judge(of, of.step.joint, "whole").kind == kind
