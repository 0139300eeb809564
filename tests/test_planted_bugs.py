"""Every planted bug is caught by the detector that docs/planted-bugs.md names, which is silent on the code as it is."""

from __future__ import annotations

import functools
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from planted_audits import AUDITED, FULL, HALF, RARE, Plan
from planted_bugs import BUGS, table
from planted_detectors import DETECTORS

from dpbitfit_fx.errors import PrivacyWarning

DOCS = Path(__file__).resolve().parents[1] / "docs" / "planted-bugs.md"
ONNX = "seal (ONNX)"
# What needs no audit, each over the whole run: an audited fault must pass all of it.
OTHERS = ("perturbation", "replay", "statistics", "accounting")


@pytest.fixture(autouse=True)
def no_warnings_of_earlier_runs() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", PrivacyWarning)
        yield


@functools.cache
def silent_on_our_code(detector: str) -> str | None:
    torch.manual_seed(0)
    return DETECTORS[detector]()


@pytest.mark.parametrize("name", BUGS)
def test_a_planted_bug_is_caught_by_its_detector_and_our_own_code_is_not(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    bug = BUGS[name]
    if bug.caught_by == ONNX:
        pytest.importorskip("onnxscript")
    assert silent_on_our_code(bug.caught_by) is None
    torch.manual_seed(0)
    bug.plant(monkeypatch)
    found = DETECTORS[bug.caught_by]()
    assert found, f"{name} was not caught by {bug.caught_by}"


@pytest.mark.parametrize("name", AUDITED)
def test_what_only_an_audit_sees_is_leaked_beyond_the_claim_and_the_audit_shows_it(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    bug = AUDITED[name]
    score = bug.plant(monkeypatch)
    options = {**bug.options, **({"score": score} if score else {})}
    if "clock" in name:
        options["insecure_seed_for_tests"] = None  # the key comes from where it always comes from
    report = bug.plan.audit(**options)
    assert report.violated, report.summary()
    assert report.epsilon_lower_bound > report.epsilon > 0 and "VIOLATION" in report.verdict
    for other in OTHERS:
        assert silent_on_our_code(other) is None
        assert DETECTORS[other]() is None, f"{name} is no fault for the audit alone: {other} sees it"


@pytest.mark.parametrize("plan", [HALF, FULL, RARE], ids=["half", "full", "rare"])
def test_the_same_audits_of_our_own_code_stay_below_the_claim(plan: Plan) -> None:
    report = plan.audit(seed=2)
    assert not report.violated and report.epsilon_lower_bound < report.epsilon
    assert report.largest_bound > 2, "an audit that could show nothing would be no control"


@pytest.mark.parametrize(
    "name", [n for n in AUDITED if AUDITED[n].options.get("released") or "noise" in n or "key" in n]
)
def test_a_special_attack_on_our_own_code_sees_nothing(name: str) -> None:
    """The scores that look for one fault, where the fault is not there."""
    bug = AUDITED[name]
    with pytest.MonkeyPatch.context() as patch:
        score = bug.plant(patch)
    report = bug.plan.audit(seed=3, **{**bug.options, **({"score": score} if score else {})})
    assert report.epsilon_lower_bound < report.epsilon and not report.violated


def test_the_corpus_is_as_large_as_the_issue_asks_and_the_table_is_this_one() -> None:
    assert len(BUGS) + len(AUDITED) >= 30 and len(AUDITED) >= 8
    assert {bug.caught_by for bug in BUGS.values()} == set(DETECTORS)
    assert DOCS.read_text() == table(), "python tests/planted_bugs.py > docs/planted-bugs.md"
