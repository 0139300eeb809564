"""Several physical batches at once give the sum of one after the other, and leave torch as it was."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from fit_cases import biases, mlp, mlp_loss, points, run, sentences, text_loss, text_model
from torch import Tensor

from dpbitfit_fx.engine import Engine, build_engine
from dpbitfit_fx.errors import DataError
from dpbitfit_fx.parallel import parallel_sum
from dpbitfit_fx.passes.clipping import AutomaticClipping
from dpbitfit_fx.sampling import PoissonSampler

LENGTHS = (6, 12)


def engine(count: int, **changes: Any) -> Engine:
    data: Any = sentences()
    lengths = {"input_ids": LENGTHS, "attention_mask": LENGTHS}
    plan: dict[str, Any] = {
        "physical_batch_size": 4,
        "clipping": AutomaticClipping(1.0),
        "padded_lengths": lengths,
    } | changes
    sampler = PoissonSampler(len(data), 0.5, 4)
    return build_engine(text_model(), text_loss, data, sampler, 1.0, 20.0, parallel_batches=count, **plan)


@pytest.mark.parametrize("count", (2, 3, 64))
def test_the_sum_is_that_of_one_batch_after_the_other_and_the_same_bits_every_time(count: int) -> None:
    one, several = engine(1), engine(count)
    rows = list(range(len(one.batches.dataset)))
    expected, found = one.clipped_sum(rows), several.clipped_sum(rows)
    assert float((found - expected).norm()) <= 1e-6 * len(rows) and float(expected.norm()) > 0.1
    assert torch.equal(found, several.clipped_sum(rows))
    assert not several.clipped_sum([]).any()


def test_a_run_is_that_of_one_batch_at_a_time() -> None:
    one, other = (biases(run(None, parallel_batches=count).model) for count in (1, 2))
    assert torch.allclose(one, other, atol=1e-4) and not torch.equal(one, biases(mlp()))


def test_an_unfinished_run_goes_on_bit_for_bit(tmp_path: Path) -> None:
    def stop(info: Any) -> None:
        if info.step == 5:
            raise KeyboardInterrupt

    whole = run(tmp_path / "whole", parallel_batches=2)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "cut", parallel_batches=2, callbacks=[stop])
    again = run(tmp_path / "cut", parallel_batches=2)
    assert again.charged_steps == 0 and torch.equal(biases(whole.model), biases(again.model))


def test_batches_really_are_computed_at_once_and_few_of_them_exist() -> None:
    meeting, alive = threading.Barrier(2, timeout=20), 0
    most = 0

    def batches() -> Iterator[int]:
        nonlocal alive, most
        for number in range(20):
            alive += 1
            most = max(most, alive)
            yield number

    def accumulate(number: int, total: Tensor) -> Tensor:
        nonlocal alive
        meeting.wait()  # raises where the other thread never comes
        alive -= 1
        return total + number

    assert parallel_sum(batches(), accumulate, lambda: torch.zeros(()), 2) == 190
    assert most <= 2 * 2 + 1


def test_torch_is_left_as_it_was_and_float32_products_stay_float32_meanwhile() -> None:
    threads, seen = torch.get_num_threads(), list[tuple[str, int]]()

    def accumulate(number: int, total: Tensor) -> Tensor:
        seen.append((torch.get_float32_matmul_precision(), torch.get_num_threads()))
        assert not torch.is_grad_enabled()
        return total + number

    torch.set_num_threads(4)
    torch.set_float32_matmul_precision("medium")
    try:
        assert parallel_sum(range(6), accumulate, lambda: torch.zeros(()), 2) == 15
        assert torch.get_num_threads() == 4 and torch.get_float32_matmul_precision() == "medium"
        assert torch.is_grad_enabled()
    finally:
        torch.set_num_threads(threads)
        torch.set_float32_matmul_precision("highest")
    assert set(seen) == {("highest", 2)}


def test_an_error_in_one_thread_ends_the_step_and_names_the_record() -> None:
    x, y = points().tensors
    data = [(x[row], y[row] if row != 33 else torch.tensor(99)) for row in range(len(y))]
    before = threading.active_count()
    several = build_engine(
        mlp(), mlp_loss, data, PoissonSampler(len(data), 0.5, 4), 1.0, 20.0, physical_batch_size=8, parallel_batches=2,
        clipping=AutomaticClipping(1.0),
    )  # fmt: skip
    with pytest.raises(DataError, match="on row 33 of the dataset"):
        several.clipped_sum(range(len(data)))
    assert threading.active_count() == before


@pytest.mark.parametrize(
    ("asked", "why"),
    [
        ({"parallel_batches": 0}, "positive number of physical batches; got 0"),
        ({"parallel_batches": True}, "positive number of physical batches; got True"),
        ({"parallel_batches": 2, "backend": "inductor"}, "needs backend='eager'"),
    ],
)
def test_what_cannot_be_done_at_once_is_refused_before_anything_is_spent(
    tmp_path: Path, asked: dict[str, Any], why: str
) -> None:
    with pytest.raises(DataError, match=why):
        run(tmp_path / "out", **asked)
    assert not (tmp_path / "out" / "privacy.json").exists()
