"""Checkpoints keep every bit, hold no pickle, and say so when they are damaged."""

from __future__ import annotations

import dataclasses
import json
import math
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dpbitfit_fx.checkpoint import CheckpointStore, JournalEntry, SavedState, decode, encode, key_id, sum_digest
from dpbitfit_fx.errors import CheckpointError
from dpbitfit_fx.randomness import SecretKey

simple = st.none() | st.booleans() | st.integers(-(2**60), 2**60) | st.floats(allow_nan=False) | st.text(max_size=8)
nested = st.recursive(
    simple,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.tuples(inner, inner)
        | st.dictionaries(st.integers(0, 9) | st.text(max_size=3), inner, max_size=3)
    ),
    max_leaves=10,
)


@given(nested)
def test_any_nest_of_plain_values_survives_json_exactly(value: Any) -> None:
    assert decode(json.loads(json.dumps(encode(value, {}, "x"))), {}) == value


def test_tensors_and_odd_floats_survive_bit_for_bit() -> None:
    tensors: dict[str, torch.Tensor] = {}
    moments = torch.tensor([0.1, float("nan")])
    state: dict[int, dict[str, Any]] = {0: {"step": torch.tensor(3.0), "m": moments, "lr": 0.1, "inf": math.inf}}
    back = decode(json.loads(json.dumps(encode(state, tensors, "o"))), tensors)[0]
    assert back["lr"].hex() == (0.1).hex() and back["inf"] == math.inf
    assert back["step"].shape == () and torch.equal(back["m"].view(torch.int32), state[0]["m"].view(torch.int32))


def test_what_would_need_pickle_is_refused_by_name() -> None:
    with pytest.raises(CheckpointError, match=r"holds a function \('optimizer\.hook'\)"):
        encode({"hook": lambda: None}, {}, "optimizer")


def state_at(step: int) -> SavedState:
    return SavedState(step, [0], {"m": 1}, {"f": 2}, {"bias": torch.full((3,), float(step))}, {"state": {}})


def test_the_journal_returns_what_may_have_been_released_and_ignores_a_torn_line(tmp_path: Path) -> None:
    key = SecretKey()
    store = CheckpointStore(tmp_path / "c").open()
    store.save(state_at(2), key)
    entries = [JournalEntry(step, key_id(key), sum_digest(key, step, torch.ones(4))) for step in (2, 3)]
    for entry in entries:
        store.record(entry)
    store.close()
    with open(tmp_path / "c" / "journal.jsonl", "ab") as file:
        file.write(b'{"step": 4, "ke')
    store = CheckpointStore(tmp_path / "c").open()
    state, loaded, pending = store.load()
    assert loaded.same_as(key) and pending == entries and state.step == 2
    store.resume_journal(pending)
    store.record(JournalEntry(4, key_id(key), "d"))
    assert [entry.step for entry in store.load()[2]] == [2, 3, 4]
    store.close()


def test_steps_before_the_checkpoint_or_under_an_older_key_are_not_pending(tmp_path: Path) -> None:
    old, new = SecretKey(), SecretKey()
    store = CheckpointStore(tmp_path / "c").open()
    store.save(state_at(0), old)
    store.record(JournalEntry(0, key_id(old), "d"))
    lines = (tmp_path / "c" / "journal.jsonl").read_bytes()
    store.save(state_at(0), new)
    (tmp_path / "c" / "journal.jsonl").write_bytes(lines)
    assert store.load()[2] == []
    assert len(list((tmp_path / "c").glob("key-*.json"))) == 1
    store.close()


def test_the_digest_tells_sums_apart_only_to_the_holder_of_the_key() -> None:
    one, other = SecretKey(), SecretKey()
    accumulator = torch.randn(10)
    changed = accumulator.clone()
    changed[3] = torch.nextafter(changed[3], torch.tensor(math.inf))
    assert sum_digest(one, 4, accumulator) == sum_digest(one, 4, accumulator.clone())
    assert len({sum_digest(one, 4, accumulator), sum_digest(one, 4, changed), sum_digest(one, 5, accumulator)}) == 3
    assert sum_digest(other, 4, accumulator) != sum_digest(one, 4, accumulator)


@pytest.mark.parametrize("file", ["checkpoint.json", "state-2-*.safetensors", "key-*.json"])
def test_a_damaged_checkpoint_is_refused_and_left_as_it_is(file: str, tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path / "c").open()
    store.save(state_at(2), SecretKey())
    (path,) = (tmp_path / "c").glob(file)
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])
    with pytest.raises(CheckpointError, match=r"damaged.*Nothing was changed"):
        store.load()
    assert path.read_bytes() == data[: len(data) // 2]
    store.close()


def test_every_private_file_is_readable_by_its_owner_only(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path / "c").open()
    store.save(state_at(1), SecretKey())
    assert os.stat(tmp_path / "c").st_mode & 0o777 == 0o700
    for path in (tmp_path / "c").iterdir():
        assert path.stat().st_mode & 0o077 == 0 or path.name == "lock", path
    store.close()


def test_a_lock_on_a_file_that_its_last_holder_removed_locks_nobody_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first process ends between another's opening of the lock file and its locking it. Then a third one comes."""
    import fcntl

    first, second, third = (CheckpointStore(tmp_path / "c") for _ in range(3))
    first.open()
    flock = fcntl.flock

    def late(*arguments: Any) -> None:
        first.close()
        flock(*arguments)

    monkeypatch.setattr(fcntl, "flock", late)
    second.open()
    monkeypatch.undo()
    with pytest.raises(CheckpointError, match="Another process is training"):
        third.open()
    second.save(state_at(1), SecretKey())
    second.close()
    assert third.open().exists
    third.close()


def test_no_step_is_journaled_without_a_checkpoint_to_resume_from(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="not open"):
        CheckpointStore(tmp_path / "c").open().record(JournalEntry(0, "k", "d"))


def test_a_journal_that_is_missing_or_damaged_in_the_middle_does_not_pass_for_an_empty_one(tmp_path: Path) -> None:
    key = SecretKey()
    store = CheckpointStore(tmp_path / "c").open()
    store.save(state_at(2), key)
    for step in (2, 3):
        store.record(JournalEntry(step, key_id(key), "d"))
    store.close()
    journal = tmp_path / "c" / "journal.jsonl"
    lines = journal.read_bytes().splitlines(keepends=True)
    assert store.spent() == (2, [0], {"m": 1}, 2)
    for content in (None, lines[0][:9] + b"\n" + lines[1]):
        journal.unlink(missing_ok=True)
        if content is not None:
            journal.write_bytes(content)
        assert store.spent() == (2, [0], {"m": 1}, None)
        with pytest.raises(CheckpointError, match=r"its journal is missing.*resume=False, overwrite=True"):
            store.load()


def test_another_state_of_the_same_step_never_overwrites_the_committed_one(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path / "c").open()
    store.save(state_at(2), SecretKey())
    (first,) = (tmp_path / "c").glob("state-*")
    other = dataclasses.replace(state_at(2), trainables={"bias": torch.ones(3)})
    store.save(other, SecretKey())
    (second,) = (tmp_path / "c").glob("state-*")
    assert first != second and torch.equal(store.load()[0].trainables["bias"], torch.ones(3))
    store.close()


def test_a_store_of_numpy_arrays_gives_back_every_bit_and_takes_nothing_of_torchs(tmp_path: Path) -> None:
    theta = np.array([0.1, -0.0, np.nan], np.float32)
    moments = {"m": np.arange(3.0), "t": np.array([7]), "file": np.array([1, 2], np.uint8)}
    key, store = SecretKey(), CheckpointStore(tmp_path / "c", numpy=True).open()
    store.save(SavedState(3, [0], {"m": 1}, {}, {"theta": theta}, moments), key)
    state = store.load()[0]
    assert state.trainables["theta"].tobytes() == theta.tobytes()
    assert {n: (v.dtype, v.tobytes()) for n, v in state.optimizer.items()} == {
        n: (v.dtype, v.tobytes()) for n, v in moments.items()
    }
    assert sum_digest(key, 1, theta) == sum_digest(key, 1, torch.from_numpy(theta))
    with pytest.raises(CheckpointError, match=r"holds a Tensor \('optimizer\.m'\)"):
        store.save(SavedState(4, [0], {"m": 1}, {}, {"theta": theta}, {"m": torch.ones(1)}), key)
    store.close()


def test_an_optimizer_of_torch_that_holds_numpy_arrays_is_refused_by_name() -> None:
    with pytest.raises(CheckpointError, match=r"holds a ndarray \('optimizer\.h'\)"):
        encode({"h": np.ones(1)}, {}, "optimizer")
