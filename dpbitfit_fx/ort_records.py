"""The user's records as numpy arrays of the artifacts' fixed, public shapes, in micro-batches with masks. Torch-free.

A record's padding is a function of that record alone: every record is padded to the length of the export.
"""

from __future__ import annotations

import os
import zipfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dpbitfit_fx.errors import ArtifactError, DataError
from dpbitfit_fx.files import describe_os_error
from dpbitfit_fx.ort_backends import Array

__all__ = ["Records", "read_arrays"]


def read_arrays(path: str | os.PathLike[str]) -> dict[str, Array]:
    """The arrays of a .npz file; nothing in it is unpickled.

    Raises:
        ArtifactError: it cannot be read. DataError: it is no such file, or holds Python objects.
    """
    try:
        with np.load(Path(path), allow_pickle=False) as archive:
            return {name: archive[name] for name in archive.files}
    except OSError as error:
        raise ArtifactError(describe_os_error(error, path, "read")) from error
    except (ValueError, EOFError, AttributeError, KeyError, RuntimeError, MemoryError, zipfile.BadZipFile, zlib.error):
        # `from None`: numpy's message may quote what it found.
        raise DataError(
            f"'{os.fspath(path)}' is not a .npz file of plain arrays. Write it with numpy.savez(path, name=array, ...)."
        ) from None


class Records:
    """The user's records as arrays of the artifacts' fixed, public shapes.

    Args:
        manifest: of the artifacts.
        data: path or name of every batch entry to an array [N, ...], or a sequence of records, each such a mapping to
        one
            record's array. Shorter sequences are padded at the end to the artifacts' length; longer ones are an error.
        pad_values: by path, what to pad with (0 unless given).

    Raises:
        DataError: an entry is missing or has the wrong shape or type. Rows are named by number, never quoted.
    """

    def __init__(
        self,
        manifest: Mapping[str, Any],
        data: Mapping[str, Any] | Sequence[Mapping[str, Any]],
        pad_values: Mapping[str, float] | None = None,
    ) -> None:
        self.inputs = manifest["batch_inputs"]
        self.pad_values = dict(pad_values or {})
        self.data = data
        if isinstance(data, Mapping):
            sizes = {len(self._column(data, i, None)) for i in self.inputs}
            if len(sizes) != 1:
                raise DataError(
                    "The entries of the data set have different numbers of records. Each must hold one row per record."
                )
            self.size = sizes.pop()
        else:
            self.size = len(data)
        if self.size < 1:
            raise DataError("The data set is empty.")

    def __len__(self) -> int:
        return self.size

    def _column(self, record: Mapping[str, Any], entry: Mapping[str, Any], row: int | None) -> Any:
        for key in (entry["path"], entry["name"]):
            if key in record:
                return record[key]
        where = "The data set" if row is None else f"Row {row} of the data set"
        raise DataError(f"{where} lacks the entry {entry['path']!r}, which the artifacts take.")

    def row(self, entry: Mapping[str, Any], row: int) -> Array:
        record, single = (self.data, False) if isinstance(self.data, Mapping) else (self.data[row], True)
        column = self._column(record, entry, row if single else None)
        try:
            value = np.asarray(column if single else column[row])
        except (ValueError, TypeError, IndexError):
            raise DataError(
                f"Row {row} of the data set: {entry['path']!r} is not a regular array of numbers."
            ) from None
        wanted, dtype = tuple(entry["shape"]), np.dtype(entry["dtype"])
        if value.dtype.kind not in "biuf" or (value.dtype.kind == "f" and dtype.kind != "f"):
            raise DataError(
                f"Row {row} of the data set: {entry['path']!r} has type {value.dtype}; the artifacts take {dtype}."
            )
        if value.shape != wanted:
            if (
                value.ndim != len(wanted)
                or value.ndim == 0
                or value.shape[1:] != wanted[1:]
                or value.shape[0] > wanted[0]
            ):
                raise DataError(
                    f"Row {row} of the data set: {entry['path']!r} has shape {value.shape}; the artifacts take "
                    f"{wanted}, or a shorter first "
                    "axis, which is padded. Cut longer records yourself, or export with a longer example batch."
                )
            padded = np.full(wanted, self.pad_values.get(entry["path"], 0), dtype)
            padded[: value.shape[0]] = value
            value = padded
        return value.astype(dtype, copy=False)

    def check(self) -> None:
        """Every record once, before any budget is spent.

        Raises:
            DataError: one does not fit; the row is given by number.
        """
        for entry in self.inputs:
            column = self._column(self.data, entry, None) if isinstance(self.data, Mapping) else None
            alike = isinstance(column, np.ndarray) and column.dtype.kind != "O"
            for row in range(1 if alike else self.size):
                self.row(entry, row)

    def micro_batches(self, rows: Array, size: int) -> Iterator[tuple[dict[str, Array], Array]]:
        """Batches of exactly ``size`` rows, dummies (zeros) masked; at least one, also for an empty draw."""
        for start in range(0, max(1, len(rows)), size):
            chosen = [int(r) for r in rows[start : start + size]]
            mask = np.zeros(size, np.float32)
            mask[: len(chosen)] = 1
            batch = {}
            for entry in self.inputs:
                block = np.zeros((size, *entry["shape"]), np.dtype(entry["dtype"]))
                for i, r in enumerate(chosen):
                    block[i] = self.row(entry, r)
                batch[entry["name"]] = block
            yield batch, mask
