"""Which records a dataset is made of: the privacy unit is one record, however often and through whatever it is reached."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable, Collection
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch.utils.data import ConcatDataset, Subset

from dpbitfit_fx.errors import DataError, PrivacyWarning

__all__ = ["check_distinct", "warn_of_earlier_runs"]

_Rows = npt.NDArray[np.int64]
# Runs of this process: how to recognise the records' dataset, which of its rows (None: all), and the run's name.
_runs: list[tuple[Callable[[Any], bool | None], _Rows | None, str]] = []


def _origins(dataset: Any) -> tuple[list[Any], _Rows, _Rows]:
    """The datasets behind all Subsets and ConcatDatasets, and for every row the number of one and the row in it."""
    if isinstance(dataset, ConcatDataset):
        bases: list[Any] = []
        numbers, rows = [], []
        for part in dataset.datasets:
            theirs, number, row = _origins(part)
            for base in theirs:
                if not any(base is known for known in bases):
                    bases.append(base)
            place = [next(i for i, known in enumerate(bases) if known is base) for base in theirs]
            numbers.append(np.asarray(place, np.int64)[number])
            rows.append(row)
        return bases, np.concatenate(numbers), np.concatenate(rows)
    if isinstance(dataset, Subset):
        chosen = np.asarray(dataset.indices)
        if chosen.dtype.kind in "iu" and chosen.ndim == 1:
            bases, number, row = _origins(dataset.dataset)
            if not chosen.size or (-len(row) <= chosen.min() and chosen.max() < len(row)):
                return bases, number[chosen], row[chosen]
    size = len(dataset)
    return [dataset], np.zeros(size, np.int64), np.arange(size)


def check_distinct(dataset: Any) -> None:
    """Looks through Subset and ConcatDataset, and at the items of a list by identity; reads no record.

    Raises:
        DataError: a record is in there twice. One person's record would then be clipped and counted twice, and epsilon,
            which is that of one row, would not be that of one record.
    """
    if isinstance(dataset, (list, tuple)):
        if not all(isinstance(item, (dict, list, torch.Tensor, np.ndarray)) for item in dataset):
            return  # two equal tuples or numbers may be one object
        names = np.asarray([id(item) for item in dataset])
    elif isinstance(dataset, (Subset, ConcatDataset)):
        _, number, row = _origins(dataset)
        names = number * (row.max() + 1) + row
    else:
        return
    _, first, counts = np.unique(names, return_index=True, return_counts=True)
    if len(first) == len(names):
        return
    one = int(first[counts > 1].min())
    other = int(np.flatnonzero(names == names[one])[1])
    raise DataError(
        f"Rows {one} and {other} of the dataset are the same record ({len(names) - len(first)} rows repeat an earlier "
        f"one). What is protected is one row, so whoever is in several would be protected less than epsilon says. Take "
        f"each record once: sampling here is by Poisson draws and needs no copies; weigh records in loss_fn instead."
    )


def _recogniser(base: Any) -> Callable[[Any], bool | None]:
    """Tells whether another object is ``base``; None once ``base`` is gone."""
    try:
        reference = weakref.ref(base)
    except TypeError:  # a list, say: kept alive by nobody, so recognised by its place and that of its ends

        def mark(other: Any) -> Any:
            return type(other), id(other), len(other), id(other[0]), id(other[-1])

        ours = mark(base)
        return lambda other: type(other) is ours[0] and len(other) > 0 and mark(other) == ours
    return lambda other: None if reference() is None else reference() is other


def warn_of_earlier_runs(dataset: Any, run_id: str, counted: Collection[str]) -> None:
    """Remembers that ``run_id`` trains on these records, and warns of runs of this process on any of them that are not
    ``counted`` in it."""
    bases, number, row = _origins(dataset)
    parts = [(base, None if base is dataset else row[number == i]) for i, base in enumerate(bases)]
    forgotten: dict[str, None] = {}
    for base, rows in parts:
        for same, theirs, earlier in _runs:
            if earlier == run_id or earlier in counted or not same(base):
                continue
            if rows is None or theirs is None or np.isin(rows, theirs).any():
                forgotten[earlier] = None
    _runs[:] = [run for run in _runs if run[0](None) is not None]
    _runs.extend((_recogniser(base), rows, run_id) for base, rows in parts)
    if forgotten:
        warnings.warn(
            f"{len(forgotten)} earlier run(s) of this process trained on records of this dataset and are not counted in "
            f"this one ({', '.join(forgotten)}). Whoever sees the results of both learns what both spent together: pass "
            f"prior=[earlier_result.statement] (or its privacy.json), and the epsilon stated here covers both. A run that "
            f"is never released or used to choose another may be left out.",
            PrivacyWarning,
            stacklevel=4,
        )
