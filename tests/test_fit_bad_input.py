"""Bad input to `fit` gives one clear paragraph before any budget is spent, names rows, never quotes them."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from fit_cases import biases, mlp, mlp_loss, points, run, sentences, text_loss, text_model
from torch import nn
from torch.optim.lr_scheduler import ReduceLROnPlateau, StepLR

from dpbitfit_fx.batching import ItemLayout, PhysicalBatches
from dpbitfit_fx.errors import ArtifactError, CompileRefused, DataError, DPBitFitError, PrivacyError
from dpbitfit_fx.files import ensure_output_folder

SECRET = 987654321


def text(**changes: Any) -> dict[str, Any]:
    arguments: dict[str, Any] = {"model": text_model(), "loss_fn": text_loss, "dataset": sentences()}
    arguments |= {"padded_lengths": (4, 12), "expected_batch_size": 10}
    return arguments | changes


def with_row(number: int, **changes: Any) -> list[dict[str, Any]]:
    rows = sentences()
    rows[number] |= changes
    return rows


class Broken(torch.utils.data.Dataset[Any]):
    def __len__(self) -> int:
        return 60

    def __getitem__(self, index: int) -> Any:
        if index == 41:
            raise ValueError(f"cannot parse {SECRET}")
        return points()[index]


class Stream(torch.utils.data.IterableDataset[Any]):
    def __iter__(self) -> Iterator[Any]:
        return iter(points())


class NoBias(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 2, bias=False)

    def forward(self, x: torch.Tensor) -> Any:
        return self.linear(x)


BAD: dict[str, tuple[Callable[[], dict[str, Any]], type[DPBitFitError], str]] = {
    "epsilon of zero": (lambda: {"target_epsilon": 0}, PrivacyError, "target_epsilon"),
    "negative epsilon": (lambda: {"target_epsilon": -1.0}, PrivacyError, "target_epsilon"),
    "delta of 1/N": (lambda: {"target_delta": 1 / 120}, PrivacyError, "not below 1/N"),
    "no plan of steps": (lambda: {"max_steps": None}, PrivacyError, "either epochs or"),
    "two plans of steps": (lambda: {"epochs": 2}, PrivacyError, "either epochs or"),
    "epsilon and noise": (lambda: {"noise_multiplier": 1.0}, PrivacyError, "not both"),
    "neither epsilon nor noise": (lambda: {"target_epsilon": None}, PrivacyError, "either target_epsilon or"),
    "noise of zero": (lambda: {"target_epsilon": None, "noise_multiplier": 0.0}, PrivacyError, "noise_multiplier"),
    "fewer records than a batch": (lambda: {"expected_batch_size": 256}, DataError, "fewer than the expected batch"),
    "no records": (lambda: {"dataset": []}, DataError, "dataset is empty"),
    "a data loader": (lambda: {"dataset": torch.utils.data.DataLoader(points())}, DataError, "not a DataLoader"),
    "a stream": (lambda: {"dataset": Stream()}, DataError, "map-style dataset"),
    "physical batch of zero": (lambda: {"physical_batch_size": 0}, DataError, "physical_batch_size"),
    "checkpoints never": (lambda: {"checkpoint_every": 0}, PrivacyError, "checkpoint_every"),
    "an unreadable row": (lambda: {"dataset": Broken()}, DataError, "Row 41 .*ValueError"),
    "a column of strings": (
        lambda: text(dataset=with_row(0, text="Jane Doe")),
        DataError,
        "Row 0 .*'text' is a str",
    ),
    "a row with a column missing": (
        lambda: text(
            dataset=[{k: v for k, v in r.items() if k != "label" or i != 17} for i, r in enumerate(sentences())]
        ),
        DataError,
        r"Row 17 .*missing \['label'\]",
    ),
    "a label of another type": (lambda: text(dataset=with_row(23, label=0.5)), DataError, "Row 23 .*'label' has dtype"),
    "a label out of range": (lambda: text(dataset=with_row(5, label=SECRET)), DataError, "row 5 "),
    "a token out of range": (
        lambda: text(dataset=with_row(5, input_ids=[SECRET], attention_mask=[1])),
        DataError,
        "row 5 ",
    ),
    "a row longer than declared": (lambda: text(padded_lengths=(4, 6)), DataError, "longer than 6"),
    "unequal lengths, none declared": (lambda: text(padded_lengths=None), DataError, "pad to the longest"),
    "lengths out of order": (lambda: text(padded_lengths=(8, 4)), DataError, "ascending"),
    "lengths for an unknown key": (lambda: text(padded_lengths={"tokens": (12,)}), DataError, "names 'tokens'"),
    "lengths where nothing is a sequence": (
        lambda: {"dataset": [{"x": 1.0} for _ in range(50)], "padded_lengths": 4},
        DataError,
        "pad",
    ),
    "padding an integer with NaN": (lambda: text(pad_values={"input_ids": float("nan")}), DataError, "cannot hold"),
    "a ragged list": (lambda: text(dataset=with_row(3, input_ids=[[1], [2, 3]])), DataError, "Row 3 .*regular array"),
    "a collator that fails": (lambda: {"collate_fn": lambda items: 1 / 0}, DataError, "Row 0 .*ZeroDivisionError"),
    "a collator without a batch dimension": (
        lambda: {"collate_fn": lambda items: items[0]},
        DataError,
        "dimension 0",
    ),
    "no biases": (lambda: {"model": NoBias()}, CompileRefused, "bias"),
    "a loss per token": (
        lambda: {"loss_fn": lambda model, batch: model(batch[0])},
        CompileRefused,
        "loss",
    ),
    "a scalar loss that is neither mean nor sum": (
        lambda: {"loss_fn": lambda model, batch: mlp_loss(model, batch).max()},
        CompileRefused,
        "",
    ),
    "BatchNorm in train mode": (
        lambda: {"model": nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Linear(6, 2))},
        CompileRefused,
        "BatchNorm",
    ),
    "an optimizer object": (
        lambda: {"optimizer": torch.optim.SGD(mlp().parameters(), lr=0.1)},
        PrivacyError,
        "built before",
    ),
    "an optimizer of all parameters": (
        lambda: {"optimizer": lambda params: torch.optim.SGD(mlp().parameters(), lr=0.1)},
        PrivacyError,
        "exactly the parameters",
    ),
    "an optimizer that wants the loss": (lambda: {"optimizer": torch.optim.LBFGS}, PrivacyError, "private losses"),
    "a learning rate of zero": (lambda: {"learning_rate": 0.0}, PrivacyError, "learning_rate"),
    "a plateau schedule": (lambda: {"lr_schedule": ReduceLROnPlateau}, PrivacyError, "ReduceLROnPlateau"),
    "a plateau schedule in a function": (
        lambda: {"lr_schedule": lambda optimizer: ReduceLROnPlateau(optimizer)},
        PrivacyError,
        "ReduceLROnPlateau",
    ),
    "a schedule object": (
        lambda: {"lr_schedule": StepLR(torch.optim.SGD(mlp().parameters(), lr=1), 1)},
        PrivacyError,
        "lr_schedule must be",
    ),
    "a prior that is not there": (lambda: {"prior": ["/nowhere/privacy.json"]}, ArtifactError, "does not exist"),
}


@pytest.mark.parametrize("what", BAD)
def test_bad_input_is_refused_in_one_clear_paragraph_and_changes_nothing(what: str, tmp_path: Path) -> None:
    changes, error, message = BAD[what]
    arguments = {"model": mlp()} | changes()
    model = arguments["model"]
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(error, match=f"(?s){message}") as caught:
        run(tmp_path / "out", **arguments)
    shown = str(caught.value)
    assert "\n\n" not in shown.strip() and len(shown) > 40
    chain: BaseException | None = caught.value
    while chain is not None:
        assert str(SECRET) not in str(chain) and "Jane Doe" not in str(chain)
        chain = chain.__cause__ or (None if chain.__suppress_context__ else chain.__context__)
    if "out of range" not in what:  # such a row is met only when it is drawn; the run can then be resumed
        assert not any((tmp_path / "out").rglob("*"))
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items() if "bias" not in name)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_read_only_output_folder_is_refused_before_anything_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = os.open

    def read_only(path: Any, flags: int, *rest: Any, **names: Any) -> int:
        if str(path).startswith(str(tmp_path)) and flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
            raise OSError(errno.EROFS, "Read-only file system")
        return opened(path, flags, *rest, **names)

    monkeypatch.setattr(os, "open", read_only)
    model = mlp()
    before = biases(model)

    def never(model: Any, batch: Any) -> Any:
        raise AssertionError("compiled before the folder was checked")

    with pytest.raises(ArtifactError, match="read-only"):
        run(tmp_path, model=model, loss_fn=never)
    assert torch.equal(biases(model), before)


def test_what_a_killed_process_left_of_its_write_test_is_gone_after_the_next(tmp_path: Path) -> None:
    (tmp_path / ".dpbitfit-write-test.0123456789ab.tmp").write_bytes(b"half")
    (tmp_path / "mine.tmp").write_bytes(b"kept")
    ensure_output_folder(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["mine.tmp"]


def test_an_output_folder_that_is_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("mine")
    with pytest.raises(ArtifactError, match="is a file"):
        run(tmp_path / "out")
    assert (tmp_path / "out").read_text() == "mine"


def test_a_public_example_tells_fixed_features_from_padded_sequences() -> None:
    example = {
        "ids": torch.ones(2, 8, dtype=torch.int64),
        "features": torch.ones(2, 5),
        "labels": torch.ones(2, 8).long(),
    }
    layout = ItemLayout.build(example, (4, 8), is_example=True)
    assert [leaf.lengths for leaf in layout.leaves] == [(4, 8), None, (4, 8)]
    assert [leaf.pad_value for leaf in layout.leaves] == [0, 0, -100]
    rows = [{"ids": [3] * n, "features": torch.zeros(5), "labels": [1] * n} for n in (2, 6)]
    batches = PhysicalBatches(rows, layout, 2)
    small, large = batches.split([0, 1], b"")
    assert small.batch["ids"].tolist() == [[3, 3, 0, 0], [1, 1, 1, 1]] and small.sample_mask.tolist() == [1, 0]
    assert small.batch["labels"][0].tolist() == [1, 1, -100, -100]
    assert large.batch["ids"].shape == (2, 8) and large.batch["features"].shape == (2, 5)
