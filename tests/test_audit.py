"""`dpbitfit audit`: the bound is the paper's, a right run stays below its claim, and the report says what it is not."""

from __future__ import annotations

import importlib.util
import json
import math
import stat
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from planted_audits import Plan, loss, network, records
from scipy import stats
from torch import nn

from dpbitfit_fx.audit import AuditReport, audit
from dpbitfit_fx.audit_bound import epsilon_lower_bound, largest_bound, p_value
from dpbitfit_fx.audit_scores import losses_of
from dpbitfit_fx.batching import ItemLayout, PhysicalBatches
from dpbitfit_fx.errors import ArtifactError, CompileRefused, DataError, PrivacyError

SMALL = Plan(canaries=40, rate=0.5, noise=4.0, steps=3)


# -- the bound ----------------------------------------------------------------------------------------------------------


def test_the_bound_is_the_one_that_the_paper_prints() -> None:
    """arXiv:2305.08846v1: Appendix D (p. 46) and section 7 (p. 28), to the digits given there."""
    assert epsilon_lower_bound(1000, 100, 75, 1e-4) == pytest.approx(0.673, abs=1e-3)
    assert epsilon_lower_bound(100_000, 1510, 1439, 1e-5) == pytest.approx(2.675, abs=1e-3)


@pytest.mark.parametrize("epsilon", [0.0, 0.5, 2.0, 4.0])
def test_without_delta_the_p_value_is_the_tail_of_randomized_response_and_no_more(epsilon: float) -> None:
    """Randomized response attains it: the number of right answers, by counting all 2^10 outcomes."""
    right = math.exp(epsilon) / (1 + math.exp(epsilon))
    outcomes = [bin(bits).count("1") for bits in range(1 << 10)]
    for correct in range(11):
        exact = sum(right**k * (1 - right) ** (10 - k) for k in outcomes if k >= correct)
        assert p_value(10, 10, correct, epsilon, 0.0) == pytest.approx(exact, rel=1e-9)


@pytest.mark.parametrize("delta", [1e-4, 1e-2, 0.1])
def test_with_delta_no_mechanism_that_gives_itself_away_is_more_often_right_than_the_p_value_allows(
    delta: float,
) -> None:
    """Randomized response that tells one record outright with probability delta, or all m of them at once: both are
    (epsilon, delta)-DP, and their laws are known exactly."""
    m, epsilon = 30, 1.0
    right = math.exp(epsilon) / (1 + math.exp(epsilon))
    for correct in range(1, m + 1):
        bound = p_value(m, m, correct, epsilon, delta)
        each = stats.binom.sf(correct - 1, m, (1 - delta) * right + delta)
        together = (1 - delta) * stats.binom.sf(correct - 1, m, right) + delta
        assert bound >= each - 1e-12 and bound >= together - 1e-12


def test_an_audit_of_randomized_response_is_below_its_epsilon_and_near_it_with_many_canaries() -> None:
    epsilon, generator = 1.5, np.random.default_rng(2)  # one seed in twenty is above, as it says
    right = math.exp(epsilon) / (1 + math.exp(epsilon))
    bounds = [epsilon_lower_bound(m, m, int(generator.binomial(m, right)), 0.0) for m in (100, 10_000, 1_000_000)]
    assert all(bound < epsilon for bound in bounds)
    assert bounds[0] > 0.7 and bounds[1] > 1.4 and bounds[2] > 1.49


def test_the_bound_exceeds_the_truth_in_at_most_one_of_twenty_audits() -> None:
    epsilon, m = 1.0, 400
    right = math.exp(epsilon) / (1 + math.exp(epsilon))
    chances = stats.binom.pmf(np.arange(m + 1), m, right)
    too_high = sum(p for v, p in enumerate(chances) if p > 1e-9 and epsilon_lower_bound(m, m, v, 0.0) > epsilon)
    assert 0.02 < too_high <= 0.05


def test_more_right_guesses_never_lower_the_bound_and_delta_never_raises_it() -> None:
    values = [epsilon_lower_bound(64, 40, v, 1e-5) for v in range(41)]
    assert values == sorted(values) and values[20] == 0.0 and values[-1] == largest_bound(64, 40, 1e-5)
    assert [epsilon_lower_bound(64, 40, 39, d) for d in (0.0, 1e-6, 1e-4, 1e-2)] == sorted(
        (epsilon_lower_bound(64, 40, 39, d) for d in (0.0, 1e-6, 1e-4, 1e-2)), reverse=True
    )


@pytest.mark.parametrize(
    "arguments", [(10, 11, 3, 0.0), (10, 5, 6, 0.0), (10, 5, -1, 0.0), (10, 5, 5, 1.0), (0, 0, 0, 0.0)]
)
def test_impossible_counts_are_refused(arguments: tuple[int, int, int, float]) -> None:
    with pytest.raises(PrivacyError):
        epsilon_lower_bound(*arguments)
    with pytest.raises(PrivacyError, match="confidence"):
        epsilon_lower_bound(10, 5, 5, 0.0, confidence=1.0)


# -- the audit ----------------------------------------------------------------------------------------------------------


def test_nearly_without_noise_the_attack_is_right_every_time_so_it_does_attack() -> None:
    """The very canaries and scores of the other tests; epsilon is honest here, and enormous."""
    report = Plan(canaries=64, rate=0.9, noise=0.05, steps=4).audit()
    assert report.correct == report.guesses == 32
    assert report.epsilon_lower_bound == report.largest_bound > 2 and not report.violated
    assert "could not have refuted" in report.verdict


def test_the_model_of_the_caller_is_not_touched_and_the_claim_is_that_of_fit() -> None:
    model = network()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    report = audit(
        model,
        loss,
        records(),
        canaries=16,
        noise_multiplier=3.0,
        target_delta=1e-4,
        max_steps=2,
        expected_batch_size=16,
        trainable="all",
        progress=False,
        seed=0,
        insecure_seed_for_tests=0,
    )
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    from dpbitfit_fx.accounting import epsilon
    from dpbitfit_fx.sampling import PoissonSampler

    assert report.epsilon == epsilon(PoissonSampler(32, 0.5, 2), 3.0, 1e-4)
    assert report.records == 16 and report.canaries == 16 and report.made_up and report.insecure


def wide(count: int, seed: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Records with labels at random, in so many dimensions that each has a gradient of its own."""
    generator = torch.Generator().manual_seed(seed)
    return [(torch.randn(150, generator=generator), torch.tensor(i % 2)) for i in range(count)]


@pytest.mark.parametrize(("attack", "guesses"), [("white-box", (15, 15)), ("black-box", (0, 8))])
def test_records_are_canaries_too_taken_out_of_the_dataset_or_made_up(attack: str, guesses: tuple[int, int]) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(150, 8), nn.Tanh(), nn.Linear(8, 2))
    options: dict[str, Any] = {"noise_multiplier": 0.05, "target_delta": 1e-4, "progress": False, "trainable": "all"}
    options |= {"attack": attack, "seed": 1, "insecure_seed_for_tests": 1}
    own = audit(model, loss, wide(50, 0), canaries=20, expected_batch_size=40, max_steps=1, **options)
    assert own.records == 30 and not own.made_up
    options |= {"max_steps": 20, "expected_batch_size": 56, "optimizer": torch.optim.SGD, "learning_rate": 3.0}
    made_up = audit(model, loss, wide(10, 1), canaries=wide(60, 2), guesses=guesses, **options)
    assert made_up.records == 10 and made_up.made_up
    chance = stats.binom.sf(made_up.correct - 1, made_up.guesses, 0.5)
    assert chance < 0.01, "nearly without noise, the attack is better than coins"
    assert made_up.released == ("gradient" if attack == "white-box" else "final model")


def test_a_loss_that_is_a_mean_is_read_record_by_record() -> None:
    model, data = network(), records()
    layout = ItemLayout.build((data.tensors[0][:1], data.tensors[1][:1]))

    def mean(model: Any, batch: Any) -> torch.Tensor:
        return loss(model, batch).mean()

    one, other = (losses_of(model, f, lambda rows: PhysicalBatches(data, layout, rows), 8) for f in (loss, mean))
    assert one.shape == (16,) and np.allclose(one, other, atol=1e-6)
    with pytest.raises(CompileRefused, match="a loss for each record"):
        SMALL_AUDIT(loss_fn=mean)


def SMALL_AUDIT(**changes: Any) -> AuditReport:
    arguments: dict[str, Any] = {"model": network(), "loss_fn": loss, "dataset": records(), "canaries": 40}
    arguments |= {"noise_multiplier": 4.0, "target_delta": 1e-4, "max_steps": 2, "expected_batch_size": 20}
    arguments |= {"trainable": "all", "progress": False, "seed": 0, "insecure_seed_for_tests": 0} | changes
    return audit(arguments.pop("model"), arguments.pop("loss_fn"), arguments.pop("dataset"), **arguments)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"attack": "grey-box"}, PrivacyError, "attack must be one of"),
        ({"score": "loss"}, PrivacyError, "does not go with"),
        ({"score": "best"}, PrivacyError, "score must be one of"),
        ({"released": "everything"}, PrivacyError, "released must be"),
        ({"guesses": (30, 30)}, PrivacyError, "of 1 to 40 guesses"),
        ({"canaries": 0}, DataError, "at least one canary"),
        ({"canaries": 703}, DataError, "702 are trained"),
        ({"canaries": [1, 2]}, DataError, "made up here"),
        ({"canaries": 16, "attack": "black-box"}, DataError, "from 1 to 15"),
        ({"output_dir": "somewhere"}, PrivacyError, "is not kept"),
        ({"add_bias": True}, PrivacyError, "does not take add_bias"),
        ({"noise_multiplier": None}, PrivacyError, "target_epsilon or noise_multiplier"),
    ],
)
def test_what_cannot_be_audited_is_refused_with_a_reason(
    changes: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        SMALL_AUDIT(**changes)


def test_a_score_that_is_not_a_number_is_abstained_on_where_there_are_others() -> None:
    marked = np.zeros(40)
    marked[:10], marked[10:20] = np.nan, -1
    report = SMALL_AUDIT(score=lambda seen: marked, guesses=(0, 10))
    assert report.guesses == 10 and report.correct == int((~report.coins[10:20]).sum())
    with pytest.raises(PrivacyError, match="one number for each of 40"):
        SMALL_AUDIT(score=lambda seen: np.zeros(3))


# -- the report ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def report() -> AuditReport:
    return SMALL.audit()


def test_the_report_says_what_it_is_not_and_holds_no_score_of_anybody(report: AuditReport, tmp_path: Path) -> None:
    folder = report.save(tmp_path / "out")
    content = json.loads((folder / "audit.json").read_text())
    assert content["epsilon_lower_bound"] == report.epsilon_lower_bound and content["violated"] is False
    assert not {"scores", "coins"} & content.keys()
    text = (folder / "audit.txt").read_text()
    assert "An audit is a test, not a proof" in text and "claimed" in text and "#" in text and "." in text
    assert "PRIVATE" not in text and stat.S_IMODE((folder / "audit.json").stat().st_mode) == 0o644


def test_a_report_on_the_callers_own_records_is_marked_private_and_readable_by_the_owner_alone(
    report: AuditReport, tmp_path: Path
) -> None:
    import dataclasses

    folder = dataclasses.replace(report, made_up=False).save(tmp_path / "out")
    assert "PRIVATE" in (folder / "audit.txt").read_text()
    assert all(stat.S_IMODE(path.stat().st_mode) == 0o600 for path in folder.iterdir())


def test_the_picture_is_a_png_where_matplotlib_is_installed_and_says_so_where_not(
    report: AuditReport, tmp_path: Path
) -> None:
    if importlib.util.find_spec("matplotlib") is None:
        with pytest.raises(ArtifactError, match="matplotlib"):
            report.write_picture(tmp_path / "audit.png")
        return
    report.write_picture(tmp_path / "audit.png")
    assert (tmp_path / "audit.png").read_bytes().startswith(b"\x89PNG")


def test_two_audits_without_a_seed_flip_other_coins() -> None:
    coins = [Plan(canaries=64, rate=0.5, noise=4.0, steps=1).audit(seed=None).coins for _ in range(2)]
    assert not np.array_equal(coins[0], coins[1])


def test_gradient_canaries_pull_along_their_own_coordinates_clipped_to_their_whole_length() -> None:
    """Through `compile`: one unit vector each, of length R, whatever the record they are made of."""
    from dpbitfit_fx.audit_canaries import GradientCanaries
    from dpbitfit_fx.compile import compile as compile_step
    from dpbitfit_fx.passes.clipping import AutomaticClipping

    model = nn.Linear(4, 2)
    made = GradientCanaries(["weight", "bias"], 10, 6, seed=0)
    batch = ((torch.randn(6, 4), torch.tensor([0, 1] * 3)), torch.from_numpy(made.coordinates))
    step = compile_step(model, made.loss(loss), batch, trainable=["weight", "bias"], clipping=AutomaticClipping(0.7))
    for row in range(6):
        one = step.clipped_sum(batch, torch.eye(6)[row])
        flat = torch.cat([g.flatten() for g in one.values()])
        expected = torch.zeros(10)
        expected[made.coordinates[row]] = -0.7
        assert torch.allclose(flat, expected, atol=1e-5)
