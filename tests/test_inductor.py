"""backend="inductor": the same numbers from one compile, rows apart, and a whole run of fit."""

from __future__ import annotations

import shutil

import pytest
import torch
from fit_cases import mlp, mlp_loss, run, text_loss, text_model

import dpbitfit_fx as dpb

needs_compiler = pytest.mark.skipif(
    not any(map(shutil.which, ("g++", "clang++", "c++"))), reason="Inductor needs a C++ compiler"
)


@needs_compiler
def test_one_inductor_compile_gives_the_eager_sums_for_every_batch_size() -> None:
    model = text_model()
    generator = torch.Generator().manual_seed(0)
    example = {
        "input_ids": torch.randint(1, 20, (4, 6), generator=generator),
        "attention_mask": torch.tensor([[1] * 6, [1] * 4 + [0] * 2, [1] * 6, [1] + [0] * 5]),
        "label": torch.tensor([0, 1, 1, 0]),
        "weight": torch.tensor([1.0, 2.0, 1.0, 0.5]),
    }
    ours, eager = (dpb.compile(model, text_loss, example, backend=name) for name in ("inductor", "eager"))
    for size in (1, 2, 3, 17):
        batch = {name: value[torch.arange(size) % 4] for name, value in example.items()}
        got, wanted = ours.clipped_sum(batch), eager.clipped_sum(batch)
        for name, value in wanted.items():
            assert torch.allclose(got[name], value, rtol=1e-5, atol=1e-6 * size), (size, name)
    assert ours.graph_hash == eager.graph_hash


@needs_compiler
def test_fit_through_inductor_ends_where_the_eager_run_ends() -> None:
    results = [run(None, backend=name) for name in ("inductor", "eager")]
    ours, eager = (dict(r.model.named_parameters()) for r in results)
    assert all(torch.allclose(ours[name], eager[name], atol=1e-4) for name in eager)
    assert results[0].epsilon == results[1].epsilon
    assert results[0].statement.backend == "pytorch inductor"


def test_without_a_compiler_inductor_is_refused_and_the_way_out_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(dpb.CompileRefused, match=r"g\+\+.*backend='eager'"):
        dpb.compile(mlp(), mlp_loss, (torch.zeros(4, 4), torch.zeros(4, dtype=torch.long)), backend="inductor")
