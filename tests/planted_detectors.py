"""What the planted bugs are caught by: each detector runs our real code and returns None, or what it found.

seal, perturbation: compiling refuses. replay: `fit` on neighbouring datasets with frozen randomness. statistics: the noise
and the draws of a `fit`. accounting: epsilon against closed forms. audit: tests/planted_audits.py.
"""

from __future__ import annotations

import contextlib
import math
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from fit_cases import Crash, biases, crash_at, mlp, mlp_loss, run, text_loss, text_model
from rank_cases import of_rank_0, together
from scipy import optimize, stats
from torch import Tensor, nn

from dpbitfit_fx import accounting
from dpbitfit_fx import fit as fit_run
from dpbitfit_fx.compile import PrivateStep
from dpbitfit_fx.compile import compile as compile_step
from dpbitfit_fx.engine import Engine, build_engine
from dpbitfit_fx.errors import CompileRefused, ExportError, PrivacyError, SealBroken
from dpbitfit_fx.passes.clipping import AutomaticClipping, FlatClipping
from dpbitfit_fx.passes.errors import PassError
from dpbitfit_fx.sampling import PoissonSampler

Detector = Callable[[], "str | None"]
R = 0.5
UNLIKELY = 1e-5  # of each test; a right run is deterministic, and passes


# -- what compiling refuses ---------------------------------------------------------------------------------------------


def _compiled(model: nn.Module | None = None, **options: Any) -> PrivateStep:
    batch = (torch.randn(4, 4, generator=torch.Generator().manual_seed(4)), torch.tensor([0, 1, 1, 0]))
    plan: dict[str, Any] = {"clipping": FlatClipping(R), "noise_multiplier": 1.25, "expected_batch_size": 16.0}
    return compile_step(mlp() if model is None else model, mlp_loss, batch, **(plan | options))


def seal() -> str | None:
    """The proof of the finished graph, after each pass."""
    try:
        _compiled()
    except (SealBroken, PassError) as refusal:
        return str(refusal)
    return None


def perturbation() -> str | None:
    """The comparison with the user's own model, and of what finally runs with its neighbours spoiled."""
    try:
        _compiled()
    except (SealBroken, CompileRefused) as refusal:
        return str(refusal)
    return None


def batch_statistics() -> str | None:
    """The same, of a model with BatchNorm."""
    try:
        _compiled(nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Linear(6, 2)).eval())
    except (SealBroken, CompileRefused) as refusal:
        return str(refusal)
    return None


def export() -> str | None:
    """The comparison of the exported files with PyTorch, and their seal."""
    from dpbitfit_fx.onnx_export import SGD, export_onnx

    with tempfile.TemporaryDirectory() as folder:
        try:
            export_onnx(_compiled(), Path(folder) / "out", optimizer=SGD(lr=0.1))
        except (ExportError, SealBroken) as refusal:
            return str(refusal)
    return None


# -- replay on neighbours -----------------------------------------------------------------------------------------------

WIDTH = 200
BATCH = 6.0


def sgd(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=1e-3)


class Offset(nn.Module):
    """A bias and nothing else."""

    def __init__(self, width: int = WIDTH) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.bias


def linear_loss(model: Any, batch: Any) -> Tensor:
    """Gradients that depend on the record alone, whatever the parameters: a replay stays a replay over many steps."""
    losses: Tensor = 100.0 * (model(torch.zeros_like(batch["x"])) * batch["x"]).sum(1)
    return losses


def _neighbours(count: int = 13) -> list[dict[str, Any]]:
    """Records that pull nearly the same way; the last one is unlike the others in every way a record can be."""
    common = torch.randn(WIDTH, generator=torch.Generator().manual_seed(1))
    own = torch.randn(count, WIDTH, generator=torch.Generator().manual_seed(2))
    rows: list[dict[str, Any]] = [{"x": common + 0.3 * own[i]} for i in range(count)]
    rows[-1]["x"] = 50.0 * own[-1]
    return rows


def _releases(rows: list[dict[str, Any]], seed: int) -> list[Tensor]:
    model, seen = Offset(), []

    def watch(info: Any) -> None:
        assert model.bias.grad is not None
        seen.append(model.bias.grad.double().clone())

    fit_run(
        model,
        linear_loss,
        rows,
        noise_multiplier=1.0,
        target_delta=1e-3,
        dataset_size=13,
        max_steps=8,
        expected_batch_size=BATCH,
        physical_batch_size=4,
        clipping=FlatClipping(R),
        optimizer=sgd,
        callbacks=[watch],
        progress=False,
        insecure_seed_for_tests=seed,
    )
    return seen


def replay() -> str | None:
    """Through the whole of `fit`: with and without one record, no release moves by more than R / denominator."""
    return _replayed(_releases)


def _replayed(releases: Callable[[list[dict[str, Any]], int], list[Tensor]]) -> str | None:
    rows = _neighbours()
    whole, without = releases(rows, 3), releases(rows[:-1], 3)
    if len(whole) != len(without):
        return f"{len(whole)} and {len(without)} steps are released"
    largest = max(float((a - b).norm()) for a, b in zip(whole, without, strict=True)) * BATCH / R
    assert largest > 0.5, "the record must be drawn, or the replay replays nothing"
    return f"a release moves by {largest:.2f} R" if largest > 1 + 1e-5 else None


def replay_of_ranks() -> str | None:
    """The same of two processes."""
    return _replayed(lambda rows, seed: of_rank_0(2, lambda: _releases(rows, seed)))


def replay_of_texts() -> str | None:
    """The clipped sum over texts of unequal length, read by a model that sees its padding, with and without the longest."""
    rows = [{"input_ids": [1 + i % 7] * 3, "attention_mask": [1] * 3, "label": 0, "weight": 1e6} for i in range(9)]
    rows.append({"input_ids": [1] * 12, "attention_mask": [1] * 12, "label": 0, "weight": 1e6})

    def reads_its_padding(model: Any, batch: Any) -> Tensor:
        sign = 1.0 if batch["input_ids"].shape[1] == 4 else -1.0
        return text_loss(model, batch) * sign

    engine = _text_engine(rows, reads_its_padding)
    everyone = list(range(len(rows)))
    moved = float((engine.clipped_sum(everyone) - engine.clipped_sum(everyone[:-1])).norm())
    return f"the clipped sum moves by {moved / R:.2f} R" if moved > R * (1 + 1e-5) else None


def _text_engine(rows: list[dict[str, Any]], loss: Any) -> Engine:
    sampler = PoissonSampler(len(rows), 0.5, 1)
    return build_engine(
        text_model(),
        loss,
        rows,
        sampler,
        1.0,
        sampler.expected_batch_size,
        clipping=FlatClipping(R),
        padded_lengths=(4, 12),
        physical_batch_size=4,
    )


def resume() -> str | None:
    """A run that stops after a step that somebody saw, and goes on: bit for bit as if it had not stopped."""
    with tempfile.TemporaryDirectory() as folder:
        with contextlib.suppress(Crash):
            run(folder, callbacks=[crash_at(8)])
        stopped = run(folder)
    straight = run(None)
    if stopped.charged_steps:
        return f"{stopped.charged_steps} steps do not replay, and are charged"
    return None if torch.equal(biases(stopped.model), biases(straight.model)) else "it ends elsewhere"


def resume_under_another_plan() -> str | None:
    """A run that stops after a step that somebody saw, and goes on with another optimizer: that step is charged."""
    with tempfile.TemporaryDirectory() as folder:
        with contextlib.suppress(Crash):
            run(folder, callbacks=[crash_at(8)])
        changed = run(folder, learning_rate=0.05)
    return None if changed.charged_steps else "steps that were seen are taken again, and nobody pays"


# -- statistics ---------------------------------------------------------------------------------------------------------

SIGMA, DRAWN, STEPS, ROWS = 1.3, 20.0, 30, 40


class Watched:
    """Silent records (gradients of exactly zero), and who was read in which step, by this process."""

    def __init__(self, count: int) -> None:
        self.count, self.step = count, -1
        self.member = np.zeros((STEPS, count))

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, row: int) -> dict[str, Any]:
        if 0 <= self.step < STEPS:
            self.member[self.step, row] += 1
        return {"x": torch.zeros(WIDTH)}


def _watched(expected: float) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """(noise [T, D] in units of sigma R, draws [T, N]) of a run on silent records; a rank that only helps sees no noise."""
    rows, model, noise = Watched(ROWS), Offset(), []

    def watch(info: Any) -> None:
        assert model.bias.grad is not None
        noise.append(model.bias.grad.double().numpy() * expected / (SIGMA * R))

    real = Engine.clipped_sum

    def clipped_sum(self: Engine, drawn: Sequence[int], secret: bytes = bytes(32)) -> Tensor:
        rows.step += 1
        return real(self, drawn, secret)

    Engine.clipped_sum = clipped_sum  # type: ignore[method-assign, assignment]
    try:
        fit_run(
            model,
            linear_loss,
            rows,
            noise_multiplier=SIGMA,
            target_delta=1e-3,
            max_steps=STEPS,
            expected_batch_size=expected,
            physical_batch_size=8,
            clipping=AutomaticClipping(R),
            optimizer=sgd,
            callbacks=[watch],
            progress=False,
            insecure_seed_for_tests=5,
        )
    finally:
        Engine.clipped_sum = real  # type: ignore[method-assign]
    return np.array(noise), rows.member


def _of_noise(noise: np.ndarray[Any, Any]) -> str | None:
    value = float(stats.kstest(noise.ravel(), "norm").pvalue)
    if value < UNLIKELY:
        return f"the noise is not N(0, (sigma R)^2): scale {noise.std():.3f}, p = {value:.0e}"
    between = np.corrcoef(noise)[np.triu_indices(len(noise), 1)]
    if float(np.abs(between).max()) > 6 / math.sqrt(noise.shape[1]):
        return f"the noise of two steps is correlated by {np.abs(between).max():.2f}"
    return None


def statistics() -> str | None:
    """One noise of scale sigma R at each step, independent of the others; every record drawn alike, by its own coin."""
    return _of_noise_and_draws(*_watched(DRAWN))


def statistics_of_ranks() -> str | None:
    """The same of two processes: the noise of what is released, and the records that any of them read."""
    both = together(2, lambda rank: _watched(DRAWN))
    return _of_noise_and_draws(both[0].value[0], both[0].value[1] + both[1].value[1])


def _of_noise_and_draws(noise: np.ndarray[Any, Any], member: np.ndarray[Any, Any]) -> str | None:
    found = _of_noise(noise)
    if found is not None:
        return found
    rate, sizes = DRAWN / ROWS, member.sum(1)
    value = float(stats.binomtest(int(member.sum()), member.size, rate).pvalue)
    if member.max() > 1 or value < UNLIKELY:
        return f"records are drawn {member.mean():.3f} times a step, not {rate}: p = {value:.0e}"
    spread = (STEPS - 1) * sizes.var(ddof=1) / (ROWS * rate * (1 - rate))
    if min(stats.chi2.cdf(spread, STEPS - 1), stats.chi2.sf(spread, STEPS - 1)) < UNLIKELY:
        return f"the size of a draw varies by {sizes.std():.2f}, not by {math.sqrt(ROWS * rate * (1 - rate)):.2f}"
    before, after = member[:-1].ravel(), member[1:].ravel()
    if abs(float(np.corrcoef(before, after)[0, 1])) > 5 / math.sqrt(before.size):
        return "who is drawn depends on who was drawn before"
    return None


def statistics_of_empty_draws() -> str | None:
    """The noise where hardly any draw holds a record."""
    noise, member = _watched(0.02)
    assert member.sum() < STEPS / 2
    return _of_noise(noise)


# -- accounting ---------------------------------------------------------------------------------------------------------


def _gaussian_delta(epsilon: float, mu: float) -> float:
    """delta of a Gaussian mechanism with sensitivity / noise = mu, exactly (Balle and Wang, ICML 2018, Theorem 8)."""
    first = stats.norm.cdf(mu / 2 - epsilon / mu)
    return float(first - math.exp(epsilon) * stats.norm.cdf(-mu / 2 - epsilon / mu))


def _sampled_delta(epsilon: float, rate: float, sigma: float) -> float:
    """delta of one Poisson-sampled Gaussian sum when a record is removed, exactly: the density ratio is monotone."""
    cut = 0.5 + sigma**2 * math.log((math.exp(epsilon) - 1 + rate) / rate)
    inside = rate * stats.norm.sf((cut - 1) / sigma) + (1 - rate) * stats.norm.sf(cut / sigma)
    return float(inside - math.exp(epsilon) * stats.norm.sf(cut / sigma))


def accounting_oracle() -> str | None:
    """epsilon is never below the closed form; delta defaults below 1/N; an earlier run is never forgotten."""
    accounting._epsilon.cache_clear()
    accounting._solve.cache_clear()
    try:
        delta, sigma, steps = 1e-5, 6.0, 16
        exact = float(optimize.brentq(lambda e: _gaussian_delta(e, math.sqrt(steps) / sigma) - delta, 1e-3, 50))
        full = PoissonSampler(1000, 1.0, steps)
        stated = accounting.epsilon(full, sigma, delta)
        if stated < exact * (1 - 1e-4):
            return f"epsilon = {stated:.3f} for a Gaussian mechanism that has {exact:.3f}"
        once = float(optimize.brentq(lambda e: _sampled_delta(e, 0.2, 1.0) - delta, 1e-3, 50))
        stated = accounting.epsilon(PoissonSampler(1000, 0.2, 1), 1.0, delta)
        if stated < once * (1 - 1e-4):
            return f"epsilon = {stated:.3f} for one sampled step that has {once:.3f}"
        prior = accounting.PriorRun("earlier", 1.0, sigma, steps)
        both = float(optimize.brentq(lambda e: _gaussian_delta(e, math.sqrt(2 * steps) / sigma) - delta, 1e-3, 50))
        stated = accounting.epsilon(full, sigma, delta, prior=prior)
        if stated < both * (1 - 1e-4):
            return f"epsilon = {stated:.3f} with an earlier run, and together they have {both:.3f}"
        try:
            accounting.check_target_delta(1e-3, 1000)
        except PrivacyError:
            return None
        return "a delta of 1/N is accepted"
    finally:
        accounting._epsilon.cache_clear()
        accounting._solve.cache_clear()


DETECTORS: dict[str, Detector] = {
    "seal": seal,
    "perturbation": perturbation,
    "perturbation (BatchNorm)": batch_statistics,
    "seal (ONNX)": export,
    "replay": replay,
    "replay (ranks)": replay_of_ranks,
    "replay (texts)": replay_of_texts,
    "replay (resume)": resume,
    "replay (changed plan)": resume_under_another_plan,
    "statistics": statistics,
    "statistics (ranks)": statistics_of_ranks,
    "statistics (empty draws)": statistics_of_empty_draws,
    "accounting": accounting_oracle,
}
