"""`tools/bench side-by-side`: what is compared is comparable, and a system that does not run is told, not left out."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks import side_by_side, systems
from benchmarks.models import Case
from benchmarks.systems import SYSTEMS


def bench(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "tools" / "bench"), "side-by-side", *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT)


def small(rows: int = 3) -> Case:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(6, 5), torch.nn.Tanh(), torch.nn.Linear(5, 2))
    return Case(
        model,
        {"x": torch.randn(rows, 6), "labels": torch.arange(rows) % 2},
        lambda model, batch: model(batch["x"]),
        lambda logits, batch: torch.nn.functional.cross_entropy(logits, batch["labels"], reduction="none"),
        ("bias",),
        6,
        rows,
    )


def moved(case: Case, step: Any) -> dict[str, float]:
    before = {k: v.clone() for k, v in case.model.named_parameters()}
    step()
    return {k: float((v - before[k]).detach().abs().max()) for k, v in case.model.named_parameters()}


@pytest.mark.parametrize("system", ["bias", "ours", "ours-bf16", "ours-unclipped", "vmap", "full"])
def test_a_system_trains_what_it_says(system: str) -> None:
    case = small()
    try:
        step = SYSTEMS[system].build(case)
    except Exception as error:
        if "bf16" in system and "AVX512_BF16" in str(error):
            pytest.skip(str(error))
        raise
    trained = {k for k, far in moved(case, step).items() if far}
    assert trained == (set(dict(case.model.named_parameters())) if system == "full" else {"0.bias", "2.bias"})


def test_our_step_without_dp_is_the_plain_step_and_our_private_one_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(systems, "RATE", 1.0)
    plain, without, private = small(), small(), small()
    for name, case in (("bias", plain), ("ours-unclipped", without), ("ours", private)):
        SYSTEMS[name].build(case)()
    torch.testing.assert_close(without.model[2].bias, plain.model[2].bias)  # type: ignore[index]
    assert not torch.allclose(private.model[2].bias, plain.model[2].bias, atol=1e-3)  # type: ignore[index]


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("transformers") is None, reason="needs transformers")
def test_systems_take_turns_and_one_that_cannot_run_is_told(tmp_path: Path) -> None:
    shape = ["--models", "minilm", "--sizes", "16", "--rows", "4", "--layers", "1", "--alternations", "6"]
    done = bench(*shape, "--systems", "bias", "fastdp-bias", "ours", "--json", str(tmp_path / "b.json"), "--threads", "1")
    assert done.returncode == 0, done.stderr
    (case,) = json.loads((tmp_path / "b.json").read_text())["cases"]
    assert case["turns"] == 6 and list(case["systems"]) == ["bias", "ours"]
    assert "--fastdp" in case["failed"]["fastdp-bias"] and "Does not run: fastDP, bias only" in done.stdout
    ours, bias = case["systems"]["ours"], case["systems"]["bias"]
    assert bias["ratio"] == 1.0 and ours["interval"][0] <= ours["ratio"] <= ours["interval"][1]
    assert ours["peak"] > 0 and 0 < case["floor"]["cpu"] < bias["cpu"]


def test_an_unknown_system_is_an_error_that_lists_the_names() -> None:
    done = bench("--systems", "ours", "orpacus")
    assert done.returncode == 2 and "orpacus" in done.stderr and "opacus-full" in done.stderr


def test_a_lasting_difference_shows_and_an_equal_one_does_not() -> None:
    generator = torch.Generator().manual_seed(0)
    noise = 1 + 0.01 * torch.randn(25, generator=generator).double().numpy()
    same, slower = side_by_side.against(noise), side_by_side.against(1.05 * noise)
    assert same["interval"][0] <= 1 <= same["interval"][1] and slower["interval"][0] > 1.03
