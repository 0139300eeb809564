"""`fit(shard_frozen=True)`: each rank keeps 1/N of the large frozen weights; the same bits, and what stops one stops all."""

from __future__ import annotations

import gc
import os
import signal
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from fit_cases import PHASES, RECORDS, TextModel, biases, crash_at, mlp_loss, points, sentences, text_loss
from fit_cases import run as reference
from memory import peak_bytes
from rank_cases import Failing, die, interrupted, of_rank_0, quoting, together
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

import dpbitfit_fx as dpb
from dpbitfit_fx import sharding
from dpbitfit_fx.compile import PrivateStep
from dpbitfit_fx.engine import Engine
from dpbitfit_fx.errors import CompileRefused, SealBroken
from dpbitfit_fx.fit import FitResult
from dpbitfit_fx.passes import packing
from dpbitfit_fx.passes.opaque import gathering
from dpbitfit_fx.passes.sharded_weights import Shard
from dpbitfit_fx.sharding import FrozenShards

pytestmark = pytest.mark.skipif(os.name != "posix", reason="forks")
WIDE = 80


@pytest.fixture(autouse=True)
def unpacked(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is compared with sharded runs reads whole weights through the same kernels."""
    monkeypatch.setattr(packing, "can_pack", lambda: False)


def run(folder: Path | None, **changes: Any) -> FitResult:
    changes = {"target_epsilon": None, "noise_multiplier": 1.0, "model": wide(), "max_steps": 8} | changes
    return reference(folder, **changes)


@pytest.fixture(scope="module", autouse=True)
def accounted() -> None:
    """Epsilon is in the accountant's cache, for every process that is forked from this one."""
    run(None)
    run(None, max_steps=None, phases=PHASES, model=tied())


def wide() -> nn.Sequential:
    """Three weights that are sharded, one of a number of rows that no number of ranks divides, and two that are too small."""
    torch.manual_seed(0)
    inner = [nn.Linear(WIDE, WIDE + 1), nn.GELU(), nn.Linear(WIDE + 1, WIDE), nn.LayerNorm(WIDE), nn.Linear(WIDE, WIDE)]
    return nn.Sequential(nn.Linear(4, WIDE), nn.Tanh(), *inner, nn.Linear(WIDE, 2))


class Tied(nn.Module):
    """One weight, registered twice and read at both ends, transposed at one; the head is what a first phase trains."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, WIDE), nn.Linear(WIDE, WIDE)
        self.other = nn.Linear(WIDE, WIDE)
        self.again = nn.Linear(WIDE, WIDE)
        self.again.weight = self.second.weight
        self.add_module("2", nn.Linear(WIDE, 2))

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.other(torch.tanh(self.second(self.first(x)))))
        logits: Tensor = self.get_submodule("2")(torch.tanh(self.again(x) + x @ self.second.weight))
        return logits


def tied() -> nn.Module:
    torch.manual_seed(0)
    return Tied()


def bare() -> nn.Module:
    torch.manual_seed(0)
    inner = [nn.Linear(WIDE, WIDE, bias=False), nn.Dropout(0.3), nn.Linear(WIDE, WIDE, bias=False)]
    return nn.Sequential(nn.Linear(4, WIDE), *inner, nn.Tanh(), nn.Linear(WIDE, 2)).train()


def reader() -> nn.Module:
    torch.manual_seed(0)
    return TextModel(WIDE)


def values(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def predictions(model: nn.Module) -> float:
    return float(model(points().tensors[0]).double().sum())


def outcome(result: FitResult) -> dict[str, Any]:
    evaluated = [entry.get("eval") for entry in result.history]
    return {"values": values(result.model), "eval": evaluated, "epsilon": result.epsilon}


LENGTHS = {"input_ids": (4, 8, 12), "attention_mask": (4, 8, 12)}
TEXTS = {"loss_fn": text_loss, "dataset": sentences(RECORDS), "padded_lengths": LENGTHS}
# Shares of no record, of one batch and of two in the same step.
SCARCE = {"expected_batch_size": 5, "physical_batch_size": 1}
CASES: dict[str, tuple[int, Callable[[], nn.Module], dict[str, Any]]] = {
    "2 ranks": (2, wide, {"eval_fn": predictions}),
    "4 ranks": (4, wide, {"eval_fn": predictions}),
    "shares of unequal size, and none": (4, wide, SCARCE),
    "texts of several lengths": (2, reader, TEXTS),
    "phases, tied weights and an average": (2, tied, {"phases": PHASES, "max_steps": None, "average_from": 0.5}),
    "added biases and dropout": (3, bare, {"add_bias": True, "dropout": True}),
    "a memory budget": (2, wide, {"memory_budget": 0.5}),
    "the grid": (2, wide, {"noise": "grid", "physical_batch_size": 1, "max_steps": 3}),
}


@pytest.mark.parametrize("case", CASES)
def test_sharded_ranks_end_where_whole_ones_do_bit_for_bit_and_one_process_does_to_1e_6(case: str) -> None:
    count, model, changes = CASES[case]
    alone = outcome(run(None, model=model(), **changes))
    whole = of_rank_0(count, lambda: outcome(run(None, model=model(), **changes)))
    frozen = {n for n, p in model().named_parameters() if p.numel() >= sharding.SMALLEST}
    assert frozen

    def sharded(rank: int) -> dict[str, Any]:
        gathered = 0
        gather = FrozenShards.gather

        def counted(self: FrozenShards, *args: Any) -> Tensor:
            nonlocal gathered
            gathered += 1
            return gather(self, *args)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(FrozenShards, "gather", counted)
            return outcome(run(None, model=model(), shard_frozen=True, **changes)) | {"gathered": gathered}

    ranks = together(count, sharded)
    assert [ended.error for ended in ranks] == [None] * count
    assert len({ended.value["gathered"] for ended in ranks}) == 1 and ranks[0].value["gathered"] > 20
    for ended in ranks:
        assert torch.equal(ended.value["values"], whole["values"])
        assert torch.allclose(ended.value["values"], alone["values"], rtol=0, atol=1e-6)
        assert ended.value["eval"] == whole["eval"] and ended.value["epsilon"] == alone["epsilon"]


# -- what a rank keeps -------------------------------------------------------------------------------------------------


def live_bytes() -> int:
    """Of all storages that a tensor of this process refers to."""
    gc.collect()
    found = {}
    for x in gc.get_objects():
        if issubclass(type(x), Tensor) and type(x.data) is Tensor and not x.is_mkldnn:  # packs of earlier tests
            storage = x.untyped_storage()
            found[storage.data_ptr()] = storage.nbytes()
    return sum(found.values())


def at_first_step(look: Callable[[], Any], **changes: Any) -> Any:
    """What `look` sees just before a rank's first share."""
    seen: list[Any] = []
    summed = Engine.clipped_sum

    def clipped_sum(self: Engine, *args: Any) -> Tensor:
        if not seen:
            seen.append(look())
        return summed(self, *args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Engine, "clipped_sum", clipped_sum)
        run(None, max_steps=2, **changes)
    return seen[0]


@pytest.mark.parametrize("count", [2, 4])
def test_each_rank_keeps_its_share_of_the_frozen_bytes_and_frees_the_rest(count: int) -> None:
    def big() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(4, 1000), *(nn.Linear(1000, 1000) for _ in range(4)), nn.Linear(1000, 2))

    frozen = sum(p.nbytes for p in big().parameters() if p.numel() >= 10**6)
    assert frozen == 16_000_000
    before = live_bytes()
    whole = together(2, lambda rank: at_first_step(live_bytes, model=big()) - before)
    sharded = together(count, lambda rank: at_first_step(live_bytes, model=big(), shard_frozen=True) - before)
    for ended in whole:
        assert frozen <= ended.value < 1.02 * frozen
    for ended in sharded:
        assert frozen / count <= ended.value < 1.02 * frozen / count + 0.02 * frozen


def test_the_weights_of_one_operator_are_whole_at_a_time() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(256, 256) for _ in range(8)), nn.Linear(256, 2))
    batch = (torch.randn(2, 256), torch.tensor([0, 1]))
    step = dpb.compile(model, mlp_loss, batch)
    mask, zero = torch.ones(2), step.zero_accumulator()
    own = peak_bytes(lambda: step.accumulate(batch, mask, zero))
    order = shard_alone(step, model)
    assert len(order) == 14  # eight and seven; the last is gathered once for both passes
    with gathering(lambda shard, ranks: torch.cat([shard] * ranks)):
        peak = peak_bytes(lambda: step.accumulate(batch, mask, zero))
    weight = 256 * 256 * 4
    assert weight < peak < own + 1.2 * weight


def shard_alone(step: PrivateStep, model: nn.Module, ranks: int = 1) -> tuple[int, ...]:
    """The step reads shards of one rank: the weights themselves."""
    large = {id(p): Shard(p.detach(), p.shape[0], ranks) for p in model.parameters() if p.numel() >= sharding.SMALLEST}
    with gathering(lambda shard, ranks: torch.cat([shard] * ranks)):
        return step.shard(lambda p: large.get(id(p)))


def test_room_is_used_again_only_when_no_tensor_and_no_view_of_it_is_left() -> None:
    room = sharding._Room()
    first = room.take(600, torch.float32)
    place, view = first.data_ptr(), first.view(20, 30)[3:5].t()
    del first
    second = room.take(600, torch.float32)
    assert second.data_ptr() != place
    del view
    third = room.take(500, torch.float32)
    assert third.data_ptr() == place and third.shape == (500,)
    del second, third
    grown = room.take(1000, torch.float64)
    assert grown.nbytes == 8000 and len(room._pieces) == 2


# -- the model ---------------------------------------------------------------------------------------------------------


def test_the_model_comes_back_as_itself_and_shows_shards_of_its_weights_meanwhile() -> None:
    def work(rank: int) -> dict[str, Any]:
        model = tied()
        model.get_parameter("other.weight").requires_grad_(False)
        before = dict(model.named_parameters(remove_duplicate=False))
        bits = {name: p.detach().clone() for name, p in before.items()}
        flags = {name: p.requires_grad for name, p in before.items()}
        shown: dict[str, Any] = {}

        def look() -> None:
            for name, p in model.named_parameters(remove_duplicate=False):
                part = p.to_local() if isinstance(p, DTensor) else p
                shown[name] = (type(p.data).__name__, tuple(p.shape), tuple(part.shape))
            assert list(model.state_dict()) == list(before)
            assert model.get_parameter("again.weight") is model.get_parameter("second.weight")

        at_first_step(look, model=model, shard_frozen=True)
        after = dict(model.named_parameters(remove_duplicate=False))
        assert list(after) == list(before) and all(after[name] is p for name, p in before.items())
        assert {name: p.requires_grad for name, p in after.items()} == flags
        changed = [name for name, p in after.items() if not torch.equal(p, bits[name])]
        assert all(name.endswith("bias") for name in changed) and changed
        return shown

    for ended in together(2, work):
        assert ended.error is None, ended.error
        shares = {name: shown for name, shown in ended.value.items() if shown[0] == "DTensor"}
        assert set(shares) == {"second.weight", "other.weight", "again.weight"}
        assert all(shown == ("DTensor", (WIDE, WIDE), (WIDE // 2, WIDE)) for shown in shares.values())


def test_after_an_error_the_same_processes_go_on_with_the_sharded_models_that_it_left(tmp_path: Path) -> None:
    whole = of_rank_0(2, lambda: values(run(None, shard_frozen=True).model))

    def work(rank: int) -> Tensor:
        model = wide()
        with pytest.raises(Exception, match="Crash" if rank else ""):
            run(tmp_path, model=model, callbacks=[crash_at(5)], shard_frozen=True)
        part: Any = model.get_parameter("2.weight")
        assert isinstance(part, DTensor) and torch.equal(part.full_tensor(), wide().get_parameter("2.weight"))
        with pytest.raises(Exception, match=r"2\.weight is a DTensor"):
            run(tmp_path, model=model)
        return values(run(tmp_path, model=model, shard_frozen=True).model)

    ranks = together(2, work)
    assert [ended.error for ended in ranks] == [None, None]
    assert all(torch.equal(ended.value, whole) for ended in ranks)


def test_in_one_process_nothing_is_sharded() -> None:
    assert torch.equal(values(run(None, shard_frozen=True).model), values(run(None).model))


# -- in lockstep -------------------------------------------------------------------------------------------------------


def test_every_rank_runs_as_many_batches_in_a_step_and_those_that_it_lacks_add_nothing() -> None:
    def work(rank: int) -> list[tuple[int, int]]:
        steps: list[tuple[int, int]] = []
        summed, accumulate = Engine.clipped_sum, PrivateStep.accumulate
        batches: list[bool] = []

        def clipped_sum(self: Engine, rows: Any, secret: bytes) -> Tensor:
            batches.clear()
            found = summed(self, rows, secret)
            steps.append((len(batches), len(rows)))
            assert sum(batches) == len(rows)
            if not len(rows):
                assert not found.any()
            return found

        def counted(self: PrivateStep, batch: Any, mask: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            batches.append(bool(mask.any()))
            return accumulate(self, batch, mask, *args, **kwargs)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Engine, "clipped_sum", clipped_sum)
            patch.setattr(PrivateStep, "accumulate", counted)
            run(None, shard_frozen=True, **SCARCE, max_steps=20)
        return steps

    ranks = [ended.value for ended in together(4, work)]
    records = list(zip(*([rows for _, rows in steps] for steps in ranks), strict=True))
    for (ran, _), *others, drawn in zip(*ranks, records, strict=True):
        assert {ran, *(n for n, _ in others)} == {max(drawn)}
    assert any(min(drawn) < max(drawn) for drawn in records) and any(0 in drawn for drawn in records)


def test_a_draw_of_nobody_is_a_step_of_noise_alone() -> None:
    def work(rank: int) -> int:
        return run(None, shard_frozen=True, expected_batch_size=0.01, max_steps=3).steps

    assert [ended.value for ended in together(2, work)] == [3, 3]


def test_ranks_that_repeat_a_batch_where_they_have_none_left_end_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    in_step = FrozenShards.in_step

    def repeating(self: FrozenShards, batches: Iterable[Any]) -> Iterator[Any]:
        last = None
        for batch in in_step(self, batches):
            last = batch or last
            yield last

    alone = biases(run(None, **SCARCE).model)
    monkeypatch.setattr(FrozenShards, "in_step", repeating)
    found = of_rank_0(4, lambda: biases(run(None, shard_frozen=True, **SCARCE).model))
    assert not torch.allclose(found, alone, rtol=0, atol=1e-3)


# -- ranks that stop ---------------------------------------------------------------------------------------------------


def beyond_the_classes() -> Any:
    return torch.zeros(4), torch.tensor(7)


@pytest.mark.parametrize(
    ("bad", "on", "count"),
    [(quoting, 0, 2), (quoting, 2, 4), (interrupted, 0, 2), (interrupted, 1, 3), (die, 0, 3), (die, 1, 2), (die, 3, 4)],
)
def test_what_stops_a_sharded_rank_stops_all_by_name_and_the_run_goes_on_bit_for_bit(
    bad: Callable[[], Any], on: int, count: int, tmp_path: Path
) -> None:
    def work(rank: int) -> Tensor:
        dataset = Failing(bad, good=30) if rank == on else points()
        return values(run(tmp_path, dataset=dataset, checkpoint_every=2, shard_frozen=True).model)

    started = time.monotonic()
    ranks = together(count, work)
    assert time.monotonic() - started < 30
    for rank, ended in enumerate(ranks):
        if rank == on:
            assert ended.exitcode == -signal.SIGKILL if bad is die else ended.error is not None
            continue
        assert ended.error is not None and f"Rank {on}" in ended.error[1] and "itself" not in ended.error[1]
        assert {quoting: "could not be read", interrupted: "interrupted", die: "gone"}[bad] in ended.error[1]
        assert ended.error[0] == ("DataError" if bad is quoting else "RankError")
    whole = of_rank_0(count, lambda: values(run(None, shard_frozen=True).model))
    again = together(
        count, lambda rank: (lambda r: (values(r.model), r.charged_steps))(run(tmp_path, shard_frozen=True))
    )
    assert all(torch.equal(ended.value[0], whole) and ended.value[1] == 0 for ended in again)


@pytest.mark.parametrize(
    ("bad", "on", "count"),
    [(quoting, {0, 1}, 2), (interrupted, {0, 1, 2}, 3), (die, {1, 2}, 3), (beyond_the_classes, {0, 1}, 2)],
)
def test_several_that_stop_at_once_hold_up_nobody_and_the_run_goes_on_bit_for_bit(
    bad: Callable[[], Any], on: set[int], count: int, tmp_path: Path
) -> None:
    """In the same gather, or one in a gather that the other does not reach."""

    def work(rank: int) -> Tensor:
        dataset = Failing(bad, good=30) if rank in on else points()
        return values(run(tmp_path, dataset=dataset, checkpoint_every=2, shard_frozen=True).model)

    started = time.monotonic()
    ranks = together(count, work)
    assert time.monotonic() - started < 30
    for rank, ended in enumerate(ranks):
        assert ended.exitcode == -signal.SIGKILL if bad is die and rank in on else ended.error is not None
        assert ended.error is None or ("the record itself" not in ended.error[1] and "Target" not in ended.error[1])
    whole = of_rank_0(count, lambda: values(run(None, shard_frozen=True).model))
    again = together(count, lambda rank: values(run(tmp_path, shard_frozen=True).model))
    assert all(torch.equal(ended.value, whole) for ended in again)


def test_a_record_on_which_the_model_fails_stops_all_without_being_quoted_or_run_again(tmp_path: Path) -> None:
    def work(rank: int) -> Any:
        return run(tmp_path, dataset=Failing(beyond_the_classes, good=30) if rank else points(), shard_frozen=True)

    ranks = together(2, work)
    for ended in ranks:
        assert ended.error is not None and ended.error[0] == "DataError" and "shard_frozen=False" in ended.error[1]
        assert "Target" not in ended.error[1]
    assert ranks[0].error is not None and "Rank 1 stopped" in ranks[0].error[1]


def test_a_sharded_rank_that_is_silent_for_longer_than_the_groups_timeout_stops_all() -> None:
    def work(rank: int) -> Any:
        return run(None, dataset=Failing(lambda: time.sleep(5), good=30) if rank == 2 else points(), shard_frozen=True)

    started = time.monotonic()
    ranks = together(3, work, patience=2)
    assert time.monotonic() - started < 25
    for ended in ranks[:2]:
        assert ended.error is not None and ended.error[0] == "RankError"
    assert ranks[0].error is not None and "Rank 2 is gone" in ranks[0].error[1]


def test_a_rank_that_dies_while_rank_0_evaluates_stops_all(tmp_path: Path) -> None:
    def work(rank: int) -> Any:
        give_back = FrozenShards.give_back
        with pytest.MonkeyPatch.context() as patch:
            if rank:
                patch.setattr(FrozenShards, "give_back", lambda self, to_all=True: die())
            else:
                patch.setattr(FrozenShards, "give_back", give_back)
            return run(tmp_path, eval_fn=predictions, shard_frozen=True)

    first = together(2, work)[0]
    assert first.error is not None and first.error[0] == "RankError" and "Rank 1 is gone" in first.error[1]


# -- refused -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes",
    [{"backend": "inductor"}, {"precision": "bf16"}, {"parallel_batches": 2}, {"cache_frozen_prefix": True}],
    ids=lambda changes: str(*changes),
)
def test_what_cannot_be_combined_is_refused_with_what_to_do(changes: dict[str, Any]) -> None:
    (name,) = changes
    with pytest.raises(CompileRefused, match=rf"shard_frozen=True cannot be combined with {name}.* Use {name}="):
        run(None, shard_frozen=True, **changes)


def test_a_model_on_which_fully_shard_was_called_is_refused_by_name() -> None:
    def work(rank: int) -> Any:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        model = wide()
        fully_shard(model.get_submodule("2"), mesh=init_device_mesh("cpu", (2,)))
        return run(None, model=model, shard_frozen=True)

    for ended in together(2, work):
        assert ended.error is not None and ended.error[0] == "CompileRefused"
        assert "fully_shard was called on 2" in ended.error[1] and "before fully_shard" in ended.error[1]


def test_steps_that_gather_in_different_orders_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    orders = iter([(1, 2), (2, 1)] * 2)
    monkeypatch.setattr(PrivateStep, "shard", lambda *args: next(orders))
    monkeypatch.setattr("dpbitfit_fx.engine.one_for_every_length", lambda *args: None)
    for ended in together(2, lambda rank: run(None, model=reader(), shard_frozen=True, **TEXTS)):
        assert ended.error is not None and ended.error[0] == "CompileRefused" and "one padded length" in ended.error[1]


def test_padded_lengths_that_were_compiled_apart_gather_together(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dpbitfit_fx.engine.one_for_every_length", lambda *args: None)
    whole = of_rank_0(2, lambda: values(run(None, model=reader(), **TEXTS).model))
    sharded = of_rank_0(2, lambda: values(run(None, model=reader(), shard_frozen=True, **TEXTS).model))
    assert torch.equal(sharded, whole)


def test_shards_that_do_not_make_up_the_weights_are_refused_before_the_weights_are_freed() -> None:
    def work(rank: int) -> Any:
        model, gather = wide(), FrozenShards.gather

        def turned(self: FrozenShards, shard: Tensor, ranks: int) -> Tensor:
            return gather(self, shard, ranks).flip(0)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(FrozenShards, "gather", turned)
            try:
                return run(None, model=model, shard_frozen=True)
            finally:
                assert torch.equal(values(model), values(wide()))

    for ended in together(2, work):
        assert ended.error is not None and ended.error[0] == "RankError" and "weights differ" in ended.error[1]


def test_a_sharded_graph_that_computes_something_else_is_refused() -> None:
    model = wide()
    step = dpb.compile(model, mlp_loss, (torch.randn(4, 4), torch.tensor([0, 1, 0, 1])))
    weight = model.get_parameter("6.weight")
    wrong = {id(weight): Shard(weight.detach() * 1.1, weight.shape[0], 1)}
    with gathering(lambda shard, ranks: shard), pytest.raises(SealBroken, match="off by"):
        step.shard(lambda p: wrong.get(id(p)))


def test_the_statement_and_the_graph_hash_are_those_of_whole_weights(tmp_path: Path) -> None:
    def stated(shard_frozen: bool) -> dict[str, Any]:
        found = run(tmp_path / str(shard_frozen), shard_frozen=shard_frozen).statement
        return {"hash": found.graph_hash, "backend": found.backend, "epsilon": found.epsilon}

    assert of_rank_0(2, lambda: stated(True)) == of_rank_0(2, lambda: stated(False))


def test_no_group_is_left_behind() -> None:
    def work(rank: int) -> int:
        run(None, shard_frozen=True)
        return len(dist.distributed_c10d._world.pg_map)

    assert [ended.value for ended in together(2, work)] == [1, 1]


