"""What leaves `fit` has noise of the right scale, once per logical batch, and tells nothing else."""

from __future__ import annotations

import itertools
import logging
import re
import sys
import types
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from fit_cases import biases, run, sentences, text_loss, text_model
from scipy import stats
from torch import Tensor, nn

from dpbitfit_fx.accounting import epsilon
from dpbitfit_fx.errors import PrivacyError, PrivacyWarning
from dpbitfit_fx.fit import StepInfo, fit
from dpbitfit_fx.passes.clipping import AutomaticClipping
from dpbitfit_fx.passes.numerics import noise_scale
from dpbitfit_fx.privacy_statement import PrivacyStatement
from dpbitfit_fx.randomness import SecretKey
from dpbitfit_fx.sampling import PoissonSampler

SIGMA, R = 1.3, 0.7


def sgd(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=1.0)


def weighted_loss(model: Any, batch: Any) -> Tensor:
    per_record: Tensor = (model(batch["x"]) ** 2).mean(1) * batch["weight"]
    return per_record


def silent_records(count: int) -> list[dict[str, Any]]:
    """Records whose gradient is exactly zero: the update is the noise and nothing else."""
    return [{"x": torch.ones(2), "weight": 0.0} for _ in range(count)]


def one_step_noise(count: int, expected: float, seed: int, steps: int = 1) -> npt.NDArray[np.float64]:
    """-(update) * expected batch size: sigma R z, summed over the steps."""
    torch.manual_seed(0)
    model = nn.Linear(2, 3000)
    before = biases(model)
    fit(
        model,
        weighted_loss,
        silent_records(count),
        noise_multiplier=SIGMA,
        max_steps=steps,
        expected_batch_size=expected,
        physical_batch_size=4,
        clipping=AutomaticClipping(R),
        optimizer=sgd,
        progress=False,
        insecure_seed_for_tests=seed,
    )
    noise: npt.NDArray[np.float64] = ((before - biases(model)).double() * expected).numpy()
    return noise


def test_one_noise_per_logical_batch_of_many_physical_batches_has_scale_sigma_r_over_the_denominator() -> None:
    noise = one_step_noise(count=64, expected=32, seed=1)
    assert stats.kstest(noise / (SIGMA * R), "norm").pvalue > 1e-3
    for wrong in (2 / 3, 3 / 2):
        assert stats.kstest(noise / (SIGMA * R * wrong), "norm").pvalue < 1e-9


def test_empty_logical_batches_step_with_full_noise() -> None:
    key, sampler = SecretKey.insecure_for_tests(2), PoissonSampler(40, 0.02 / 40, 3)
    assert all(len(sampler.draw(key, step)) == 0 for step in range(3)), "choose a seed whose draws are empty"
    noise = one_step_noise(count=40, expected=0.02, seed=2, steps=3)
    scale = SIGMA * R * 3**0.5
    assert stats.kstest(noise / scale, "norm").pvalue > 1e-3
    for wrong in (2 / 3, 3 / 2):
        assert stats.kstest(noise / (scale * wrong), "norm").pvalue < 1e-9


def test_the_noise_is_that_of_the_secret_stream_and_the_denominator_is_public() -> None:
    """Independent oracle: draw, clip one record at a time with autograd, add the stream's noise, divide by q N."""
    from fit_cases import mlp, mlp_loss, points

    from dpbitfit_fx.passes.clipping import FlatClipping
    from dpbitfit_fx.randomness import stream

    data, reference, key = points(), mlp(), SecretKey.insecure_for_tests(7)
    result = run(
        None, optimizer=sgd, max_steps=1, target_epsilon=None, noise_multiplier=SIGMA, clipping=FlatClipping(R)
    )
    named = [(n, p) for n, p in reference.named_parameters() if n.endswith("bias")]
    size = sum(p.numel() for _, p in named)
    total = torch.zeros(size)
    rows = PoissonSampler(len(data), 20 / len(data), 1).draw(key, 0)
    assert 8 < len(rows) != 20, "the draw is split, and is not what is divided by"
    for row in rows:
        x, y = data[int(row)]
        gradients = torch.autograd.grad(mlp_loss(reference, (x[None], y[None])).sum(), [p for _, p in named])
        flat = torch.cat([g.flatten() for g in gradients])
        total += flat * min(1.0, R / flat.norm().item())
    noise = torch.from_numpy(stream(key, "noise", 0).normal(size)).float()
    expected = biases(reference) - (total + noise_scale(SIGMA, R, 20) * noise) / 20
    assert torch.allclose(biases(result.model), expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_a_record_with_a_non_finite_gradient_contributes_zero_and_nothing_tells(
    poison: float, tmp_path: Path, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    def train(weight: float, folder: Path) -> Tensor:
        rows = [{"x": torch.randn(2, generator=torch.Generator().manual_seed(i)), "weight": 1.0} for i in range(30)]
        rows[13]["weight"] = weight
        torch.manual_seed(0)
        model = nn.Linear(2, 3)
        with caplog.at_level(logging.DEBUG, "dpbitfit_fx"), warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            fit(
                model,
                weighted_loss,
                rows,
                noise_multiplier=1.0,
                max_steps=4,
                expected_batch_size=30,
                physical_batch_size=8,
                output_dir=folder,
                checkpoint_every=1,
                insecure_seed_for_tests=3,
            )
        told.append([str(w.message) for w in caught])
        return biases(model)

    told: list[list[str]] = []
    clean, poisoned = train(0.0, tmp_path / "clean"), train(poison, tmp_path / "poisoned")
    assert torch.equal(clean, poisoned) and torch.isfinite(poisoned).all()
    assert told[0] == told[1]
    assert capfd.readouterr() == ("", "")
    assert not [r for r in caplog.records if r.name.startswith("dpbitfit_fx")]
    files = [sorted(p.name for p in (tmp_path / which).rglob("*")) for which in ("clean", "poisoned")]
    assert files[0] == files[1]

    def statement(which: str) -> dict[str, Any]:
        content = PrivacyStatement.load(tmp_path / which).to_dict()
        content.pop("run_id")
        return content

    assert statement("clean") == statement("poisoned")
    for path in (tmp_path / "poisoned").rglob("*"):
        assert b"non-finite" not in path.read_bytes() and b" nan" not in path.read_bytes().lower()


def test_callbacks_and_history_hold_public_numbers_only() -> None:
    seen: list[StepInfo] = []
    result = run(None, callbacks=[seen.append], eval_fn=lambda model: 0.5)
    public = {"step", "steps", "learning_rate", "epsilon", "phase"}
    assert all({name for name in dir(info) if not name.startswith("_")} == public for info in seen)
    assert [info.step for info in seen] == list(range(1, 13))
    assert all(0 < info.epsilon <= 8 for info in seen)
    assert all(set(entry) == {"step", "epoch", "epsilon", "eval"} for entry in result.history)
    forbidden = ("loss", "norm_of", "draw", "non_finite", "micro")
    names = list(result.statement.to_dict())
    assert not [name for name in names if any(word in name for word in forbidden)]


def test_the_model_comes_back_as_itself_with_only_its_biases_changed() -> None:
    from fit_cases import mlp

    model = mlp()
    model[0].eval()
    model[2].weight.requires_grad_(False)
    first = next(iter(model.parameters()))
    first.grad = torch.ones_like(first)
    before = {name: (value.clone(), value.requires_grad, value.grad) for name, value in model.named_parameters()}
    modes = [module.training for module in model.modules()]

    def eval_fn(evaluated: nn.Module) -> float:
        evaluated.eval()
        assert not torch.is_grad_enabled()
        return 0.0

    result = run(None, model=model, eval_fn=eval_fn)
    assert result.model is model and [module.training for module in model.modules()] == modes
    for name, value in model.named_parameters():
        old, flag, gradient = before[name]
        assert value.requires_grad == flag and value.grad is gradient
        assert torch.equal(value, old) != name.endswith("bias")


def test_texts_of_unequal_length_train_and_learn_with_a_collator_and_a_tuple_of_lengths() -> None:
    rows = [{"input_ids": [i % 2 + 1] * (i % 9 + 1), "attention_mask": [1] * (i % 9 + 1)} for i in range(200)]
    labelled = [row | {"label": i % 2, "weight": 1.0} for i, row in enumerate(rows)]

    def collate(items: list[dict[str, Any]]) -> dict[str, Tensor]:
        assert len(items) == 1
        tensors = {name: torch.tensor([value]) for name, value in items[0].items()}
        return tensors | {"weight": torch.ones(1)}

    model = text_model()

    def accuracy(evaluated: nn.Module) -> float:
        ids = torch.tensor([[1, 1, 1], [2, 2, 2]])
        return float((evaluated(ids, torch.ones_like(ids)).argmax(1) == torch.tensor([0, 1])).float().mean())

    result = fit(
        model,
        text_loss,
        labelled,
        target_epsilon=20,
        epochs=15,
        expected_batch_size=50,
        physical_batch_size=(16, 8),
        trainable=["*bias", "head.*"],
        padded_lengths=(4, 9),
        collate_fn=collate,
        eval_fn=accuracy,
        learning_rate=0.1,
        progress=False,
        insecure_seed_for_tests=5,
    )
    assert result.steps == 60 and len(result.history) == 15
    assert result.history[-1]["eval"] == 1.0


def test_a_declared_n_is_the_one_that_counts() -> None:
    result = run(None, dataset_size=100)
    assert result.statement.dataset_size == 100 and not result.statement.dataset_size_assumed_public
    assert result.statement.sample_rate == 0.2
    assert run(None).statement.dataset_size_assumed_public


def test_delta_defaults_to_a_power_of_ten_of_at_most_a_tenth_of_one_over_n() -> None:
    result = run(None, target_delta=None, max_steps=2)
    assert result.delta == pytest.approx(1e-4) and result.delta <= 1 / (10 * 120)
    assert "by default" in result.statement.public_declarations["target_delta"]


def test_earlier_runs_are_composed_and_need_more_noise(tmp_path: Path) -> None:
    first = run(tmp_path / "first", target_epsilon=4.0)
    alone = run(None)
    second = run(tmp_path / "second", prior=[tmp_path / "first" / "privacy.json"])
    assert 4 < second.epsilon <= 8 and second.noise_multiplier > alone.noise_multiplier
    sampler = PoissonSampler(120, 20 / 120, 12)
    assert second.epsilon == epsilon(sampler, second.noise_multiplier, 1e-3, prior=[first.statement])
    with pytest.raises(PrivacyError, match="already spend"):
        run(None, target_epsilon=2.0, prior=first.statement)


def test_a_long_run_shows_epsilon_speed_and_time_left_on_standard_error(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    ticks = itertools.count()
    clock = types.SimpleNamespace(monotonic=lambda: float(next(ticks)))
    monkeypatch.setattr(sys.modules["dpbitfit_fx.progress"], "time", clock)
    run(None, progress=True)
    shown = capfd.readouterr()
    assert shown.out == "" and "epsilon <=" in shown.err and "steps/s" in shown.err
    run(None, progress=False)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"target_epsilon": None, "noise_multiplier": 0.05}, "Epsilon will be .* promises next to nothing"),
        ({"target_epsilon": None, "noise_multiplier": 25.0}, r"noise outweighs all that 20 records .* nothing will be learnt"),
        ({"target_epsilon": 8.0}, None),
        ({"target_epsilon": 1.0}, None),
    ],
)
def test_noise_that_protects_nothing_or_drowns_everything_is_told_before_the_run(
    options: dict[str, Any], told: str | None
) -> None:
    def first(info: StepInfo) -> None:
        raise KeyboardInterrupt

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with pytest.raises(KeyboardInterrupt):
            run(None, max_steps=3, callbacks=[first], **options)
    texts = [str(w.message) for w in caught if issubclass(w.category, PrivacyWarning)]
    found = [t for t in texts if "next to nothing" in t or "be learnt" in t]
    assert len(found) == (told is not None)
    assert told is None or re.search(told, found[0])


def test_a_result_is_shown_in_a_line_without_its_model() -> None:
    result = run(None, max_steps=1)
    assert f"epsilon={result.epsilon}" in repr(result) and "Linear" not in repr(result) and len(repr(result)) < 300


def test_two_runs_share_no_draw_and_no_noise() -> None:
    one = run(None, max_steps=1, insecure_seed_for_tests=None)
    other = run(None, max_steps=1, insecure_seed_for_tests=None)
    assert not torch.equal(biases(one.model), biases(other.model))
    assert not one.statement.insecure and run(None, max_steps=1).statement.insecure


def test_a_float64_model_is_trained_in_float64() -> None:
    from fit_cases import mlp, points

    x, y = points().tensors
    result = run(None, model=mlp().double(), dataset=torch.utils.data.TensorDataset(x.double(), y))
    single = run(None)
    assert biases(result.model).dtype == torch.float64
    assert torch.allclose(biases(result.model).float(), biases(single.model), atol=1e-2)


def test_sentences_without_a_public_example_are_compiled_from_shapes_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """The made-up example does not depend on the values of the first record, only on its structure."""
    from dpbitfit_fx.batching import ItemLayout, load_item

    one, other = sentences()[0], sentences()[0]
    other["input_ids"] = [19 - token for token in other["input_ids"]]
    other["weight"] = -5.0
    examples = [ItemLayout.build(load_item([row], None, 0), (4, 12)).example_batch(1) for row in (one, other)]
    assert {name: value.shape for name, value in examples[0].items()}["input_ids"] == (4, 12)
    assert all(torch.equal(examples[0][name], examples[1][name]) for name in one)
