"""What a tired user types is refused at once, by the argument's name, with what was expected and no warning before it."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from fit_cases import Crash, biases, crash_at, mlp, mlp_loss, points, run

import dpbitfit_fx as dpb
from dpbitfit_fx.compile import check_rows

WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "a class for a model": ({"model": torch.nn.Linear}, "model is the class Linear, expected a torch.nn.Module"),
    "no loss": ({"loss_fn": None}, "loss_fn is a NoneType, expected a function"),
    "no selection": ({"trainable": None}, "trainable is None, expected a name or a list of names"),
    "a number to leave out": ({"exclude": 3}, "exclude is 3, expected a name"),
    "a number for the clipping": ({"clipping": 1.0}, r"clipping is 1.0, expected a Clipping such as .*FlatClipping\(1.0\)"),
    "a name for the optimizer": ({"optimizer": "adam"}, "optimizer is 'adam', expected a class such as torch.optim.SGD"),
    "half a row": ({"physical_batch_size": 2.5}, "physical_batch_size must be a positive integer.*it is 2.5"),
    "a callback alone": ({"callbacks": print}, "callbacks is to be a list of functions"),
    "a misspelt precision": ({"precision": "bfloat16"}, "Unknown precision 'bfloat16'"),
    "a misspelt backend": ({"backend": "Inductor"}, "Unknown backend 'Inductor'"),
    "a misspelt optimization": ({"disable": "dead_token"}, "Unknown optimization 'dead_token'"),
    "no optimization": ({"disable": None}, "disable is None, expected a name"),
    "too large a budget": ({"memory_budget": 1.5}, "memory_budget is 1.5"),
}


@pytest.mark.parametrize("what", WRONG)
def test_it_is_refused_by_name_before_anything_else_is_said(what: str) -> None:
    changes, words = WRONG[what]
    with warnings.catch_warnings(), pytest.raises(dpb.DPBitFitError, match=words):
        warnings.simplefilter("error")
        run(None, **changes)


def test_compile_says_the_same() -> None:
    for what in ("a class for a model", "no loss", "no selection", "a number to leave out", "a number for the clipping"):
        changes, words = WRONG[what]
        batch = torch.randn(4, 4), torch.arange(4) % 2
        given: dict[str, Any] = {"model": mlp(), "loss_fn": mlp_loss, "example_batch": batch} | changes
        with pytest.raises(dpb.CompileRefused, match=words):
            dpb.compile(**given)


def test_fit_switches_optimizations_off_and_ends_where_it_does_with_them() -> None:
    """Eager and in float32 they change no number but for rounding."""
    found = [biases(run(None, disable=names).model) for names in ((), "refusion", ["saved_inputs", "dead_tokens"])]
    assert all(torch.allclose(x, found[0], atol=1e-5) for x in found)


def test_a_run_that_goes_on_with_other_optimizations_is_not_taken_for_the_same(tmp_path: Any) -> None:
    with pytest.raises(Crash):
        run(tmp_path, callbacks=[crash_at(4)])
    assert run(tmp_path, disable="refusion").charged_steps == 1


def test_a_step_that_does_not_run_at_all_is_not_blamed_on_a_record(monkeypatch: pytest.MonkeyPatch) -> None:
    step = dpb.compile(mlp(), mlp_loss, torch.utils.data.default_collate([points()[i] for i in range(4)]))

    def fails(*_: Any) -> Any:
        raise RuntimeError("no such kernel")

    monkeypatch.setattr(type(step._lowered), "__call__", fails)
    with pytest.raises(dpb.CompileRefused, match=r"does not run as lowered for backend='eager'.*no such kernel.*disable="):
        check_rows(step)
