"""privacy.json: epsilon is derived, what is read back is what was written, and damage is refused."""

from __future__ import annotations

import dataclasses
import errno
import os
from pathlib import Path
from typing import Any, NoReturn

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dpbitfit_fx.accounting import PriorRun, epsilon, solve_noise_multiplier
from dpbitfit_fx.errors import ArtifactError, PrivacyError
from dpbitfit_fx.passes.numerics import slack
from dpbitfit_fx.privacy_statement import PrivacyStatement
from dpbitfit_fx.randomness import FINITE_PRECISION_CAVEAT, TAIL_CAVEAT
from dpbitfit_fx.sampling import PoissonSampler

SAMPLER = PoissonSampler.from_expected_batch_size(2000, 64, steps=30)
ARGUMENTS: dict[str, Any] = {
    "noise_multiplier": 2.0,
    "delta": 1e-5,
    "max_grad_norm": 0.1,
    "clipping": "automatic",
    "gamma": 0.01,
    "graph_hash": "ab" * 32,
    "num_trainable": 100,
    "num_parameters": 100_000,
    "dataset_size_assumed_public": True,
    "public_declarations": {"label_set": ["neg", "pos"], "padded_lengths": {"values": [32, 48], "from": "argument"}},
}


def make(**changes: Any) -> PrivacyStatement:
    return PrivacyStatement.create(SAMPLER, **{**ARGUMENTS, **changes})


STATEMENT = make(run_id="run-1")
CONTENT: dict[str, Any] = STATEMENT.to_dict()


def test_epsilon_is_derived_from_the_sampler_the_noise_and_the_steps() -> None:
    assert STATEMENT.epsilon == epsilon(SAMPLER, 2.0, 1e-5)
    assert make(steps=10, lost_steps=2).epsilon == epsilon(SAMPLER, 2.0, 1e-5, steps=12)
    assert make(steps=10, lost_steps=2).charged_steps == 12


def test_the_file_states_everything_that_the_guarantee_depends_on() -> None:
    names = (
        "schema schema_version epsilon delta privacy_unit neighboring_relation sampler sample_rate noise_multiplier "
        "max_grad_norm clipping gamma steps lost_steps accountant accountant_version expected_batch_size dataset_size "
        "dataset_size_assumed_public tuning_covered insecure num_trainable trainable_share public_declarations prior "
        "graph_hash backend run_id numeric_caveats library_versions"
    )
    for name in names.split(" "):
        assert name in CONTENT
    assert CONTENT["privacy_unit"] == "one record" and CONTENT["neighboring_relation"] == "add-or-remove-one"
    assert CONTENT["sampler"]["type"] == "poisson" and CONTENT["tuning_covered"] is False
    assert TAIL_CAVEAT in CONTENT["numeric_caveats"] and FINITE_PRECISION_CAVEAT in CONTENT["numeric_caveats"]
    charged = f"The slack, {slack(SAMPLER.expected_batch_size):.3g} here"
    assert any(charged in sentence for sentence in CONTENT["numeric_caveats"])
    assert {"dp-accounting", "numpy", "scipy", "cryptography", "python"} <= CONTENT["library_versions"].keys()


def test_what_is_read_back_is_what_was_written(tmp_path: Path) -> None:
    composed = make(prior=[STATEMENT], lost_steps=3, clipping="flat", gamma=None, insecure=True)
    for statement in (STATEMENT, composed):
        assert PrivacyStatement.from_json(statement.to_json()) == statement
        path = statement.save(tmp_path)
        assert path == tmp_path / "privacy.json"
        assert PrivacyStatement.load(tmp_path, verify=True) == PrivacyStatement.load(path) == statement


def test_composition_through_files_equals_composition_in_one_accountant(tmp_path: Path) -> None:
    first = make(run_id="first")
    first.save(tmp_path / "first.json")
    second = make(run_id="second", prior=[tmp_path / "first.json"])
    second.save(tmp_path / "second.json")
    third = make(run_id="third", prior=[tmp_path / "second.json"])
    assert third.epsilon == epsilon(SAMPLER, 2.0, 1e-5, steps=90)
    assert [run.run_id for run in third.prior] == ["first", "second"]
    # `first` is reached both directly and through `second`, and is the same run.
    assert make(prior=[tmp_path / "first.json", tmp_path / "second.json"]).epsilon == third.epsilon
    assert make(prior=tmp_path / "second.json").epsilon == third.epsilon
    assert third.epsilon < first.epsilon * 3


def test_lost_steps_of_an_earlier_run_are_charged_to_the_later_one() -> None:
    assert make(prior=[make(lost_steps=5)]).epsilon == epsilon(SAMPLER, 2.0, 1e-5, steps=65)


def test_the_printed_epsilon_of_an_earlier_run_is_not_what_composes() -> None:
    doctored = PrivacyStatement.from_dict({**CONTENT, "epsilon": 1e-6})
    assert make(prior=[doctored]).epsilon == make(prior=[STATEMENT]).epsilon
    with pytest.raises(PrivacyError, match="Do not rely on it"):
        doctored.verify()
    STATEMENT.verify()


def test_noise_solved_against_a_file_stays_within_the_joint_target(tmp_path: Path) -> None:
    STATEMENT.save(tmp_path)
    sigma = solve_noise_multiplier(SAMPLER, 3.0, 1e-5, prior=[tmp_path])
    assert make(noise_multiplier=sigma, prior=[tmp_path]).epsilon <= 3.0


def test_an_insecure_run_says_so_and_so_does_everything_composed_with_it() -> None:
    insecure = make(insecure=True)
    assert insecure.any_insecure and "INSECURE" in insecure.numeric_caveats[0]
    assert "NO PRIVACY GUARANTEE" in insecure.summary()
    later = make(prior=[insecure])
    assert not later.insecure and later.any_insecure
    assert "NO PRIVACY GUARANTEE: the noise of an earlier run" in later.summary()
    assert "NO PRIVACY" not in STATEMENT.summary() and not STATEMENT.any_insecure
    hidden = {**insecure.to_dict(), "numeric_caveats": CONTENT["numeric_caveats"]}
    with pytest.raises(PrivacyError, match="insecure run must say so"):
        PrivacyStatement.from_dict(hidden)


def test_the_summary_rounds_epsilon_up_and_names_the_assumptions() -> None:
    text = STATEMENT.summary()
    printed = float(text.split("epsilon = ")[1].split(" ")[0])
    assert STATEMENT.epsilon <= printed < STATEMENT.epsilon + 2e-4
    for words in (
        "one record",
        "add-or-remove-one",
        "assumed public",
        "NOT covered",
        "30 taken of 30",
        "label_set",
        "0.1 %",
    ):
        assert words in text
    assert "4 more charged" in make(lost_steps=4).summary()


@given(name=st.sampled_from(sorted(CONTENT)))
def test_a_statement_without_one_of_its_fields_is_refused_by_name(name: str) -> None:
    with pytest.raises(PrivacyError) as caught:
        PrivacyStatement.from_dict({key: value for key, value in CONTENT.items() if key != name})
    assert name.split("_")[0] in str(caught.value)


WRONG = st.one_of(
    st.none(),
    st.floats(max_value=-1e-9),
    st.just(float("nan")),
    st.just(float("inf")),
    st.lists(st.integers(), min_size=1, max_size=2),
    st.dictionaries(st.text(max_size=3), st.integers(), min_size=1, max_size=2),
)


@given(name=st.sampled_from(sorted(CONTENT)), value=WRONG)
def test_a_field_of_the_wrong_type_or_out_of_range_is_refused(name: str, value: Any) -> None:
    if name == "public_declarations" and isinstance(value, dict):
        return
    with pytest.raises(PrivacyError):
        PrivacyStatement.from_dict({**CONTENT, name: value})


@pytest.mark.parametrize(
    "change",
    [
        {"schema_version": 2},
        {"schema_version": "1"},
        {"schema_version": True},
        {"schema": "something else"},
        {"surprise": 1},
        {"sample_rate": 0.5},
        {"dataset_size": 1000},
        {"expected_batch_size": 63.0},
        {"sampler": {**CONTENT["sampler"], "type": "shuffle"}},
        {"sampler": {**CONTENT["sampler"], "expected_batch_size": 1.0}, "expected_batch_size": 1.0},
        {"delta": 1e-3},
        {"gamma": None},
        {"clipping": "flat"},
        {"clipping": "auto-v"},
        {"clipping": "per-tensor", "gamma": None},
        {"graph_hash": "ab"},
        {"num_trainable": 100_001},
        {"trainable_share": 0.5},
        {"steps": 30.0},
        {"insecure": 0},
        {"privacy_unit": "one token"},
        {"neighboring_relation": "replace-one"},
        {"prior": [{"epsilon": 1.0}]},
        {"prior": [PriorRun("run-1", 0.1, 1.0, 1).to_dict()]},
        {"numeric_caveats": []},
    ],
)
def test_a_statement_that_contradicts_itself_is_refused(change: dict[str, Any]) -> None:
    with pytest.raises(PrivacyError):
        PrivacyStatement.from_dict({**CONTENT, **change})


@given(st.data())
def test_truncated_or_overwritten_text_never_reads_as_another_guarantee(data: st.DataObject) -> None:
    text = STATEMENT.to_json().rstrip()
    cut = data.draw(st.integers(0, len(text) - 1))
    with pytest.raises(PrivacyError):
        PrivacyStatement.from_json(text[:cut])
    damaged = text[:cut] + data.draw(st.text(max_size=4)) + text[cut + data.draw(st.integers(0, 4)) :]
    try:
        read = PrivacyStatement.from_json(damaged)
    except PrivacyError:
        return
    # Only what its checksum does not cover may differ: white space.
    assert read == STATEMENT


@pytest.mark.parametrize("constant", ["NaN", "Infinity", "-Infinity", "1e999"])
def test_numbers_that_are_not_finite_are_refused_in_text(constant: str) -> None:
    text = STATEMENT.to_json().replace('"delta": 1e-05', f'"delta": {constant}')
    assert constant in text
    with pytest.raises(PrivacyError):
        PrivacyStatement.from_json(text)


@pytest.mark.parametrize("text", ["", "null", "[]", "3", "{}", "{" * 100_000, "[" * 100_000, "not json"])
def test_text_that_is_no_statement_is_refused(text: str) -> None:
    with pytest.raises(PrivacyError):
        PrivacyStatement.from_json(text)


def test_a_field_stated_twice_is_refused() -> None:
    text = STATEMENT.to_json().replace('"delta": 1e-05', '"delta": 1e-05, "delta": 1e-06')
    with pytest.raises(PrivacyError, match="twice"):
        PrivacyStatement.from_json(text)


@pytest.mark.parametrize("value", [object(), {1: 2}, float("nan"), (1, 2), b"x"])
def test_declarations_that_json_cannot_keep_are_refused_when_made(value: Any) -> None:
    with pytest.raises(PrivacyError, match="public_declarations"):
        make(public_declarations={"labels": value})


def test_a_full_disk_leaves_the_earlier_statement(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    STATEMENT.save(tmp_path)

    def full(*_args: object) -> NoReturn:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patched:
        patched.setattr(os, "write", full)
        with pytest.raises(ArtifactError, match="disk is full"):
            make().save(tmp_path)
    assert PrivacyStatement.load(tmp_path) == STATEMENT


def test_a_statement_cannot_be_changed_and_a_changed_copy_is_checked() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        STATEMENT.epsilon = 0.1  # type: ignore[misc]
    with pytest.raises(PrivacyError):
        dataclasses.replace(STATEMENT, sample_rate=0.9)
