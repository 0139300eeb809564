"""No record moves a clipped sum by more than R, replayed through fit's own sampler, padding, batching and backend."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from fit_cases import MaskedMean, mlp, scaled_loss, sentences, text_loss, text_model
from replay_cases import BUCKETS, CLIPPINGS, R
from torch import Tensor

from dpbitfit_fx.batching import PhysicalBatches
from dpbitfit_fx.fit import Engine, build_engine
from dpbitfit_fx.passes.clipping import Clipping, FlatClipping
from dpbitfit_fx.randomness import SecretKey
from dpbitfit_fx.sampling import PoissonSampler

PAIRS = 1000  # per clipping and kind of model: 2,000 pairs for each clipping, and more below


def name(value: Any) -> str:
    return type(value).__name__


def text_engine(rows: Sequence[Any], clipping: Clipping, physical: Any = (3, 4, 2), **changes: Any) -> Engine:
    sampler = PoissonSampler(len(rows), 0.12, 100)
    return build_engine(
        text_model(),
        text_loss,
        rows,
        sampler,
        1.0,
        sampler.expected_batch_size,
        clipping=clipping,
        padded_lengths=BUCKETS,
        physical_batch_size=physical,
        **changes,
    )


def scaled_engine(rows: Sequence[Any], clipping: Clipping, physical: int = 8, rate: float = 0.15) -> Engine:
    sampler = PoissonSampler(len(rows), rate, 100)
    return build_engine(
        mlp(),
        scaled_loss,
        rows,
        sampler,
        1.0,
        sampler.expected_batch_size,
        clipping=clipping,
        physical_batch_size=physical,
    )


def weighted_points(weights: Sequence[float]) -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(3)
    return [
        {"x": torch.randn(4, generator=generator), "y": index % 2, "weight": weight}
        for index, weight in enumerate(weights)
    ]


def neighbours(engine: Engine, pairs: int) -> tuple[float, int, int]:
    """Replays draws of a fixed key with and without each of their records, until `pairs` pairs are compared.

    Returns the largest distance, the number of pairs, and in how many of them the number of physical batches changed.
    """
    key = SecretKey.insecure_for_tests(11)
    largest, compared, regrouped, step = 0.0, 0, 0, 0
    while compared < pairs:
        rows = engine.sampler.draw(key, step).tolist()
        whole = engine.clipped_sum(rows)
        bucket = {row: engine.batches.load(row, b"")[0] for row in rows}

        def batches(chosen: Sequence[int], bucket: dict[int, int] = bucket) -> int:
            sizes = engine.batches.sizes
            return sum(-(-sum(bucket[row] == b for row in chosen) // sizes[b]) for b in range(len(sizes)))

        for record in rows:
            others = [row for row in rows if row != record]
            distance = (whole.double() - engine.clipped_sum(others).double()).norm().item()
            largest = max(largest, distance)
            compared += 1
            regrouped += batches(others) != batches(rows)
        step += 1
    return largest, compared, regrouped


@pytest.mark.parametrize("clipping", CLIPPINGS, ids=name)
def test_a_thousand_neighbouring_pairs_of_texts_of_unequal_length_differ_by_at_most_r(clipping: Clipping) -> None:
    rows = sentences()
    for index, row in enumerate(rows):
        row["weight"] = 10.0 ** (index % 5 - 1)
    largest, compared, regrouped = neighbours(text_engine(rows, clipping), PAIRS)
    assert compared >= PAIRS
    assert largest <= R * (1 + 1e-5)
    assert largest > 0.9 * R, "the bound must be met by some pair, or the test tests nothing"
    assert regrouped > 100, "some neighbour must change the bucket counts"


@pytest.mark.parametrize("clipping", CLIPPINGS, ids=name)
def test_a_thousand_pairs_with_gradient_norms_from_1e_minus_20_to_1e20_differ_by_at_most_r(clipping: Clipping) -> None:
    rows = weighted_points([10.0 ** (index % 41 - 20) for index in range(82)])
    largest, compared, _ = neighbours(scaled_engine(rows, clipping), PAIRS)
    assert compared >= PAIRS
    assert 0.9 * R < largest <= R * (1 + 1e-5)


@pytest.mark.parametrize("clipping", CLIPPINGS, ids=name)
def test_aligned_gradients_add_up_to_r_each_and_no_more(clipping: Clipping) -> None:
    """Forty copies of one record, all at full norm in one direction: the worst case of rounding, too."""
    row = {"x": torch.ones(4), "y": 1, "weight": 1e6}
    largest, _, _ = neighbours(scaled_engine([row] * 60, clipping, rate=0.5), 200)
    assert 0.999 * R < largest <= R * (1 + 1e-5)


@pytest.mark.parametrize("clipping", CLIPPINGS, ids=name)
@pytest.mark.parametrize("weight", [float("nan"), float("inf"), 3e38, 1e-45, 0.0])
def test_a_record_with_a_hostile_gradient_moves_the_sum_by_at_most_r(clipping: Clipping, weight: float) -> None:
    rows = weighted_points([1.0] * 20 + [weight])
    engine = scaled_engine(rows, clipping)
    everyone = list(range(21))
    difference = engine.clipped_sum(everyone) - engine.clipped_sum(everyone[:-1])
    assert torch.isfinite(difference).all()
    assert difference.norm() <= R * (1 + 1e-5)
    if not 0 < weight < 1e39:
        assert torch.equal(difference, torch.zeros_like(difference))


@pytest.mark.parametrize("clipping", CLIPPINGS, ids=name)
def test_the_neighbour_of_one_record_is_nobody(clipping: Clipping) -> None:
    engine = scaled_engine(weighted_points([1e20] * 5), clipping)
    empty = engine.clipped_sum([])
    assert torch.equal(empty, torch.zeros(engine.update.num_trainable))
    assert (engine.clipped_sum([3]) - empty).norm() <= R * (1 + 1e-5)


@pytest.mark.parametrize("clipping", CLIPPINGS, ids=name)
def test_the_clipped_sum_is_the_same_for_every_split_into_physical_batches(clipping: Clipping) -> None:
    rows = sentences()
    everyone = list(range(len(rows)))
    engines = [text_engine(rows, clipping, physical) for physical in (1, 2, 3, 7, 32, 128, (5, 1, 40))]
    contributions = sum(engines[0].clipped_sum([row]).double().norm().item() for row in everyone)
    sums = [engine.clipped_sum(everyone).double() for engine in engines]
    sums.append(engines[3].clipped_sum(everyone[::-1]).double())
    for other in sums[1:]:
        assert (sums[0] - other).norm().item() <= 1e-6 * contributions


def test_a_records_padded_length_is_a_function_of_that_record_alone() -> None:
    rows = sentences()
    engine = text_engine(rows, FlatClipping(R))
    for chosen in ([0], [0, 1, 2], list(range(90))):
        for batch in engine.batches.split(chosen, b""):
            length = batch.batch["input_ids"].shape[1]
            assert batch.sample_mask.shape[0] == (3, 4, 2)[batch.bucket] and length == BUCKETS[batch.bucket]
            for row in batch.rows:
                assert BUCKETS[batch.bucket] == min(b for b in BUCKETS if b >= len(rows[row]["input_ids"]))


def float_sequences(count: int = 30) -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(5)
    lengths = [1 + index % 12 for index in range(count)]
    return [{"x": torch.randn(n, 3, generator=generator), "mask": torch.ones(n)} for n in lengths]


def padded_engine(pad: float, clipping: Clipping) -> Engine:
    rows = float_sequences()
    torch.manual_seed(0)
    sampler = PoissonSampler(len(rows), 0.5, 10)
    return build_engine(
        MaskedMean(),
        lambda model, batch: model(batch["x"], batch["mask"])[:, 0] ** 2,
        rows,
        sampler,
        1.0,
        sampler.expected_batch_size,
        clipping=clipping,
        padded_lengths=BUCKETS,
        pad_values={"x": pad, "mask": 0},
        physical_batch_size=4,
    )


@pytest.mark.parametrize("clipping", CLIPPINGS, ids=name)
@pytest.mark.parametrize("pad", [float("nan"), float("inf"), -1e30])
def test_nan_and_garbage_in_the_padding_change_nothing(pad: float, clipping: Clipping) -> None:
    everyone = list(range(30))
    clean = padded_engine(0.0, clipping).clipped_sum(everyone)
    dirty = padded_engine(pad, clipping)
    assert torch.equal(dirty.clipped_sum(everyone), clean)
    largest, _, _ = neighbours(dirty, 100)
    assert largest <= R * (1 + 1e-5)


@pytest.mark.parametrize("clipping", CLIPPINGS, ids=name)
def test_nan_and_garbage_in_the_dummy_rows_change_nothing(clipping: Clipping) -> None:
    engine = padded_engine(0.0, clipping)
    clean = engine.clipped_sum(list(range(30)))
    for garbage in (float("nan"), float("inf"), 1e38):
        dummies = [{"x": torch.full((1, length, 3), garbage), "mask": torch.ones(1, length)} for length in BUCKETS]
        batches = PhysicalBatches(engine.batches.dataset, engine.batches.layout, 4, dummies=dummies)
        assert torch.equal(Engine(engine.compiled, batches, engine.sampler).clipped_sum(list(range(30))), clean)


def test_the_test_itself_would_notice_a_record_that_moves_its_neighbours() -> None:
    """Padding to the longest of the draw, seen by a model that reads its padding: what fit refuses to do."""
    rows = [row for row in sentences(60) if len(row["input_ids"]) <= 4]
    rows.append({"input_ids": [1] * 12, "attention_mask": [1] * 12, "label": 0, "weight": 1.0})

    class Longest(PhysicalBatches):
        def load(self, row: int, secret: bytes) -> tuple[int, dict[str, Tensor]]:
            bucket, values = super().load(row, secret)
            return max(bucket, self.floor), values

        floor = 0

        def split(self, chosen: Sequence[int], secret: bytes) -> Any:
            self.floor = 0
            self.floor = max((super(Longest, self).load(row, secret)[0] for row in chosen), default=0)
            return super().split(chosen, secret)

    def reads_its_padding(model: Any, batch: Any) -> Tensor:
        logits = model(batch["input_ids"], batch["attention_mask"])
        sign = 1.0 if batch["input_ids"].shape[1] == BUCKETS[0] else -1.0
        losses: Tensor = logits[:, 0] * batch["weight"] * sign + 0.0 * batch["label"]
        return losses

    for row in rows:
        row["weight"] = 1e6
    sampler = PoissonSampler(len(rows), 0.2, 100)
    engine = build_engine(
        text_model(),
        reads_its_padding,
        rows,
        sampler,
        1.0,
        sampler.expected_batch_size,
        clipping=FlatClipping(R),
        padded_lengths=BUCKETS,
        physical_batch_size=4,
    )
    everyone = list(range(len(rows)))

    def distance() -> float:
        return float((engine.clipped_sum(everyone) - engine.clipped_sum(everyone[:-1])).norm())

    assert distance() <= R * (1 + 1e-5)
    engine.batches = Longest(rows, engine.batches.layout, 4)
    assert distance() > R * 10
