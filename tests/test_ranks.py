"""`fit` in several processes of a gloo group: one run, as one process makes it; what stops, kills or misleads one stops all."""

from __future__ import annotations

import inspect
import os
import signal
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from fit_cases import (
    PHASES,
    RECORDS,
    STEPS,
    Crash,
    biases,
    crash_at,
    mlp,
    points,
    sentences,
    text_loss,
    text_model,
)
from fit_cases import run as reference
from planted_bugs import BUGS
from rank_cases import Ended, Failing, die, interrupted, of_rank_0, quoting, together
from torch import Tensor, nn

from dpbitfit_fx.biases import load_biases
from dpbitfit_fx.engine import Engine
from dpbitfit_fx.errors import CheckpointError
from dpbitfit_fx.fit import FitResult, fit
from dpbitfit_fx.privacy_statement import PrivacyStatement
from dpbitfit_fx.randomness import SecretKey
from dpbitfit_fx.ranks import Ranks, torchrun_group

pytestmark = pytest.mark.skipif(os.name != "posix", reason="forks")


def run(folder: Path | None, **changes: Any) -> FitResult:
    """The reference run with a given noise multiplier: no process has to solve for it."""
    return reference(folder, **({"target_epsilon": None, "noise_multiplier": 1.0} | changes))


@pytest.fixture(scope="module", autouse=True)
def accounted() -> None:
    """Epsilon is in the accountant's cache, for every process that is forked from this one."""
    run(None)


def bare() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6, bias=False), nn.Dropout(0.3), nn.Tanh(), nn.Linear(6, 2))


def norm(model: nn.Module) -> dict[str, float]:
    return {"norm": float(biases(model).norm())}


def outcome(result: FitResult) -> dict[str, Any]:
    return {
        "values": torch.cat([p.detach().flatten() for p in result.model.parameters()]),
        "epsilon": result.epsilon,
        "sigma": result.noise_multiplier,
        "steps": result.steps,
        "lost": result.charged_steps,
        "history": [entry["step"] for entry in result.history],
        "folder": result.output_dir,
    }


LENGTHS = {"input_ids": (4, 8, 12), "attention_mask": (4, 8, 12)}
TEXTS: dict[str, Any] = {"loss_fn": text_loss, "dataset": sentences(RECORDS), "padded_lengths": LENGTHS}
CASES: dict[str, tuple[int, Callable[[], nn.Module], dict[str, Any]]] = {
    "2 ranks": (2, mlp, {"eval_fn": norm}),
    "4 ranks": (4, mlp, {"eval_fn": norm}),
    "phases and an average": (2, mlp, {"phases": PHASES, "max_steps": None, "average_from": 0.5}),
    "texts of several lengths": (2, text_model, TEXTS),
    "added biases and dropout": (3, lambda: bare().train(), {"add_bias": True, "dropout": True}),
}


@pytest.mark.parametrize("case", CASES)
def test_every_rank_ends_where_one_process_does_to_1e_6(case: str, tmp_path: Path) -> None:
    count, model, changes = CASES[case]
    alone = outcome(run(None, model=model(), **changes))
    folders = [tmp_path, *[tmp_path / "never"] * (count - 1)]
    ranks = together(count, lambda rank: outcome(run(folders[rank], model=model(), **changes)))
    assert [ended.error for ended in ranks] == [None] * count
    for ended in ranks:
        assert torch.equal(ended.value["values"], ranks[0].value["values"])
        assert torch.allclose(ended.value["values"], alone["values"], rtol=0, atol=1e-6)
        assert ended.value["folder"] == tmp_path
        for name in ("epsilon", "sigma", "steps", "lost", "history"):
            assert ended.value[name] == alone[name], name
    assert not (tmp_path / "never").exists() and not (tmp_path / "checkpoint").exists()
    assert PrivacyStatement.load(tmp_path, verify=True).backend == f"pytorch eager, {count} ranks"


def test_ranks_that_all_take_the_whole_draw_end_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    alone = biases(run(None).model)
    BUGS["every rank takes the whole draw"].plant(monkeypatch)
    assert not torch.allclose(of_rank_0(2, lambda: biases(run(None).model)), alone, rtol=0, atol=1e-3)


# -- who does what -----------------------------------------------------------------------------------------------------


def test_rank_0_alone_draws_noise_and_calls_back_and_the_shares_are_each_record_of_the_draw_once() -> None:
    def work(rank: int) -> dict[str, Any]:
        seen: dict[str, Any] = {"noise": 0, "callbacks": 0, "shares": []}
        release, summed = Engine.private_gradient, Engine.clipped_sum

        def private_gradient(self: Engine, *args: Any) -> dict[str, Tensor]:
            seen["noise"] += 1
            return release(self, *args)

        def clipped_sum(self: Engine, rows: Any, secret: bytes) -> Tensor:
            seen["shares"].append(list(rows))
            return summed(self, rows, secret)

        def callback(info: Any) -> None:
            seen["callbacks"] += 1

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Engine, "private_gradient", private_gradient)
            patch.setattr(Engine, "clipped_sum", clipped_sum)
            run(None, callbacks=[callback])
        return seen

    ranks = [ended.value for ended in together(3, work)]
    assert [(seen["noise"], seen["callbacks"]) for seen in ranks] == [(STEPS, STEPS), (0, 0), (0, 0)]
    drawn: list[list[int]] = []
    draw = Engine.drawn

    def watched(self: Engine, key: SecretKey, step: int) -> tuple[list[int], bytes]:
        drawn.append(draw(self, key, step)[0])
        return draw(self, key, step)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Engine, "drawn", watched)
        run(None)
    for step, rows in enumerate(drawn):
        shares = [seen["shares"][step] for seen in ranks]
        assert sorted(row for share in shares for row in share) == rows
        assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_the_key_travels_to_nobody_and_what_does_is_as_small_as_the_trained_parameters() -> None:
    def work(rank: int) -> list[bytes]:
        sent: list[bytes] = []
        send = dist.send

        def watched(tensor: Tensor, *args: Any) -> None:
            sent.append(tensor.numpy().tobytes())
            send(tensor, *args)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(dist, "send", watched)
            run(None, model=mlp(4, 500))
        return sent

    ranks = together(2, work)
    key = SecretKey.insecure_for_tests(7).export_secret()
    for ended in ranks:
        assert not any(key in message or key.hex().encode() in message for message in ended.value)
    trained = 4 * 502
    assert all(len(message) < trained + 1500 for message in ranks[1].value[-2 * STEPS :])
    assert sum(map(len, ranks[0].value[-2 * STEPS :])) < STEPS * (trained + 1500)


def test_trained_parameters_are_rank_0s_though_another_rank_began_elsewhere() -> None:
    def started(rank: int) -> nn.Module:
        model = mlp()
        with torch.no_grad():
            dict(model.named_parameters())["2.bias"].add_(rank)
        return model

    ranks = together(2, lambda rank: biases(run(None, model=started(rank)).model))
    whole = of_rank_0(2, lambda: biases(run(None).model))
    assert all(torch.equal(ended.value, whole) for ended in ranks)


def test_a_run_inside_a_callback_is_alone() -> None:
    def inside(info: Any) -> None:
        if info.step == 2:
            run(None, max_steps=1)

    of_rank_0(2, lambda: run(None, callbacks=[inside], max_steps=3).steps)


# -- ranks that disagree -----------------------------------------------------------------------------------------------


def fewer() -> torch.utils.data.TensorDataset:
    return torch.utils.data.TensorDataset(*(x[:-1] for x in points().tensors))


def relabelled() -> torch.utils.data.TensorDataset:
    x, y = points().tensors
    return torch.utils.data.TensorDataset(x, 1 - y)


def other_weights() -> nn.Module:
    model = mlp()
    with torch.no_grad():
        dict(model.named_parameters())["0.weight"][0, 0] += 1e-6
    return model


DISAGREEMENTS: dict[str, tuple[dict[str, Any], str]] = {
    "length": ({"dataset": fewer(), "dataset_size": RECORDS}, "the number of records"),
    "content": ({"dataset": relabelled()}, "the records"),
    "frozen weights": ({"model": other_weights()}, "the frozen weights"),
    "steps": ({"max_steps": STEPS + 1}, "the privacy plan"),
    "trainable": ({"trainable": ["2.bias"]}, "the compiled step"),
}


@pytest.mark.parametrize("what", DISAGREEMENTS)
def test_a_rank_that_disagrees_is_refused_by_name_before_the_first_step(what: str, tmp_path: Path) -> None:
    changes, name = DISAGREEMENTS[what]
    common = {"dataset_size": RECORDS} if what == "length" else {}
    for ended in together(2, lambda rank: run(tmp_path, **(common | changes if rank else common))):
        assert ended.error is not None and ended.error[0] == "RankError"
        assert name in ended.error[1] and "rank 1" in ended.error[1] and "No step was taken" in ended.error[1]
        assert str(RECORDS - 1) not in ended.error[1], "how many records there really are may be private"
    assert os.listdir(tmp_path) == []


# -- ranks that stop ---------------------------------------------------------------------------------------------------


def failing(folder: Path, bad: Callable[[], Any], on: int, count: int = 2, **changes: Any) -> list[Ended]:
    def work(rank: int) -> Tensor:
        return biases(
            run(folder, dataset=Failing(bad) if rank == on else points(), checkpoint_every=5, **changes).model
        )

    return together(count, work)


@pytest.fixture(scope="module")
def whole() -> Tensor:
    found: Tensor = of_rank_0(2, lambda: biases(run(None).model))
    return found


@pytest.mark.parametrize(("bad", "on"), [(quoting, 0), (quoting, 1), (interrupted, 1), (die, 0), (die, 1)])
def test_what_stops_one_rank_stops_all_by_name_and_the_run_goes_on_bit_for_bit(
    bad: Callable[[], Any], on: int, tmp_path: Path, whole: Tensor
) -> None:
    started = time.monotonic()
    ranks = failing(tmp_path, bad, on)
    assert time.monotonic() - started < 30
    other = ranks[1 - on].error
    assert other is not None and f"Rank {on}" in other[1] and "itself" not in other[1]
    assert {quoting: "of the dataset could not be read", interrupted: "interrupted", die: "gone"}[bad] in other[1]
    assert other[0] == ("DataError" if bad is quoting else "RankError")
    assert ranks[on].exitcode == -signal.SIGKILL if bad is die else ranks[on].error is not None
    assert (tmp_path / "checkpoint" / "checkpoint.json").exists() and not (tmp_path / "privacy.json").exists()
    again = together(2, lambda rank: (lambda r: (biases(r.model), r.charged_steps))(run(tmp_path, checkpoint_every=5)))
    assert all(torch.equal(ended.value[0], whole) and ended.value[1] == 0 for ended in again)
    assert torch.equal(biases(load_biases(mlp(), tmp_path / "biases.safetensors")), whole)


@pytest.mark.parametrize(("before", "after"), [(1, 2), (2, 1)])
def test_a_run_that_goes_on_in_another_number_of_processes_pays_for_the_steps_that_were_seen(
    before: int, after: int, tmp_path: Path
) -> None:
    for ended in together(before, lambda rank: run(tmp_path, callbacks=[crash_at(5)])):
        assert ended.error is not None and "Crash" in " ".join(ended.error)
    # The checkpoint is at step 3; steps 3 and 4 were seen.
    again = together(after, lambda rank: (lambda r: (r.steps, r.charged_steps))(run(tmp_path)))
    assert [ended.value for ended in again] == [(STEPS, 2)] * after


def test_after_an_error_the_same_processes_go_on_with_the_same_models(tmp_path: Path, whole: Tensor) -> None:
    def work(rank: int) -> Tensor:
        model = mlp()
        with pytest.raises(Crash if rank == 0 else Exception):
            run(tmp_path, model=model, callbacks=[crash_at(5)])
        return biases(run(tmp_path, model=model).model)

    assert all(torch.equal(ended.value, whole) for ended in together(2, work))


def test_a_rank_that_fails_before_it_joined_stops_the_others_too(tmp_path: Path) -> None:
    ranks = together(2, lambda rank: run(tmp_path, dataset=[] if rank else points()))
    assert ranks[1].error is not None and "is empty" in ranks[1].error[1]
    assert ranks[0].error is not None and ranks[0].error[0] == "DataError" and "Rank 1" in ranks[0].error[1]


def test_a_refusal_of_rank_0_is_every_ranks(tmp_path: Path) -> None:
    (tmp_path / "privacy.json").write_text("{}")
    for ended in together(2, lambda rank: run(tmp_path)):
        assert ended.error is not None and ended.error[0] == "ArtifactError" and "finished run" in ended.error[1]


def test_a_rank_that_is_silent_for_longer_than_the_groups_timeout_is_named() -> None:
    def work(rank: int) -> Any:
        return run(None, dataset=Failing(lambda: time.sleep(4)) if rank else points())

    started = time.monotonic()
    ranks = together(2, work, patience=2)
    assert time.monotonic() - started < 25
    assert ranks[0].error is not None and ranks[0].error[0] == "RankError" and "Rank 1 is gone" in ranks[0].error[1]


def test_a_ctrl_c_that_reaches_all_ranks_at_once_ends_all_and_loses_nothing(tmp_path: Path, whole: Tensor) -> None:
    def work(rank: int) -> Any:
        def shoot() -> None:
            while not (tmp_path / "checkpoint" / "checkpoint.json").exists():
                time.sleep(0.01)
            os.kill(os.getpid(), signal.SIGINT)

        threading.Thread(target=shoot, daemon=True).start()
        return run(tmp_path, callbacks=[lambda _: time.sleep(0.2)]).steps  # the signal comes before the last step

    for ended in together(2, work):
        assert ended.value is None and (ended.error is None or ended.error[0] in ("KeyboardInterrupt", "RankError"))
    assert torch.equal(of_rank_0(2, lambda: biases(run(tmp_path).model)), whole)


def test_a_single_process_of_a_group_is_alone_and_a_message_without_a_group_is_none() -> None:
    ranks = Ranks()
    assert ranks.first and not ranks.several and ranks.settle({"any": "thing"}) == {"any": "thing"}
    assert ranks.compare(lambda: 1 / 0) == {}  # type: ignore[arg-type, return-value]
    ranks.stop(CheckpointError("nobody hears it"))
    alone = run(None)
    (one,) = together(1, lambda rank: (lambda r: (biases(r.model), r.statement.backend))(run(None)))
    assert torch.equal(one.value[0], biases(alone.model)) and one.value[1] == alone.statement.backend == "pytorch eager"


def test_what_torchrun_started_is_one_group_while_it_lasts_and_nothing_else_is() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]

    def work(rank: int) -> tuple[bool, str, bool]:
        dist.destroy_process_group()
        address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        os.environ.update({"TORCHELASTIC_RUN_ID": "any", "WORLD_SIZE": "2", "RANK": str(rank), **address})
        with torchrun_group() as first:
            backend = run(None, max_steps=2).statement.backend
        return first, backend, dist.is_initialized()

    found = [ended.value for ended in together(2, work)]
    assert found == [(True, "pytorch eager, 2 ranks", False), (False, "pytorch eager, 2 ranks", False)]
    with torchrun_group() as first:
        assert first and not dist.is_initialized()


def test_fit_is_documented_without_the_ranks_that_it_is_given() -> None:
    assert next(iter(inspect.signature(fit).parameters)) == "model"
