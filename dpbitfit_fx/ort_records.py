"""The user's records as numpy arrays of public shapes, in micro-batches with masks. Torch-free.

A record's padding is a function of that record alone: it is padded to the smallest of the public lengths that holds it, by
the same rules as `fit` does it (``padding``); an export without a free length has one.
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
from dpbitfit_fx.padding import bucket_lengths, bucket_of, named, pad_default, physical_sizes, split_by_bucket

__all__ = ["Lengths", "Records", "public_lengths", "read_arrays"]

Lengths = Mapping[str, tuple[int, ...]]


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


def public_lengths(
    manifest: Mapping[str, Any], asked: Sequence[int] | Mapping[str, Sequence[int]] | None = None
) -> Lengths:
    """The padded lengths of every entry that has several or a free one, by path; of an export with fixed shapes, none.

    Args:
        asked: one tuple for all such entries, or by path or name; default: the export's, else its example's own length.

    Raises:
        DataError: they are no lengths, name no such entry, or lie outside of what the export was checked for.
    """
    free = manifest.get("dynamic_length")
    if free is None:
        fixed = {path: tuple(lengths) for path, lengths in manifest.get("padded_lengths", {}).items()}
        if asked is not None:
            raise DataError(
                "padded_lengths was given, and this export takes the lengths only that it was made with. Leave it out, or "
                "export again from a step compiled with dynamic_shapes."
            )
        return fixed
    own = {e["path"]: (int(e["shape"][0]),) for e in manifest["batch_inputs"] if free["dims"].get(e["path"]) == 1}
    given = bucket_lengths(manifest.get("padded_lengths") if asked is None else asked)
    if given is None:
        return own
    found = {path: given if isinstance(given, tuple) else named(path, given) for path in own}
    strangers = [n for n in given if all(named(p, {n: 1}) is None for p in own)] if isinstance(given, Mapping) else []
    if (
        strangers
        or len(own) != len(free["dims"])
        or any(lengths != found[next(iter(own))] for lengths in found.values())
    ):
        raise DataError(
            f"padded_lengths must give the same lengths to each of {', '.join(sorted(own))}, whose first axis has the free "
            "length, and to nothing else. Give one tuple for all of them."
        )
    low, high = int(free["min"]), int(free["max"])
    lengths = found[next(iter(own))]
    if lengths is None or not low <= lengths[0] <= lengths[-1] <= high:
        raise DataError(
            f"The padded lengths {lengths} must lie between {low} and {high}: the export was checked for those. Export "
            "again for others."
        )
    return found


class Records:
    """The user's records as arrays of the artifacts' public shapes.

    Args:
        manifest: of the artifacts.
        data: path or name of every batch entry to an array [N, ...], or a sequence of records, each such a mapping to
        one
            record's array. Shorter sequences are padded at the end to a public length; longer ones are an error.
        pad_values: by path, what to pad with (default: 0; -100 for sequences of class numbers called "labels").
        padded_lengths: see ``public_lengths``.

    Raises:
        DataError: an entry is missing or has the wrong shape or type. Rows are named by number, never quoted.
    """

    def __init__(
        self,
        manifest: Mapping[str, Any],
        data: Mapping[str, Any] | Sequence[Mapping[str, Any]],
        pad_values: Mapping[str, float] | None = None,
        padded_lengths: Sequence[int] | Mapping[str, Sequence[int]] | None = None,
    ) -> None:
        self.inputs = manifest["batch_inputs"]
        self.lengths = public_lengths(manifest, padded_lengths)
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

    @property
    def buckets(self) -> int:
        """How many padded lengths there are."""
        return max((len(lengths) for lengths in self.lengths.values()), default=1)

    def _shape(self, entry: Mapping[str, Any], bucket: int) -> tuple[int, ...]:
        """Of a padded record, without the batch axis."""
        first = self.lengths.get(entry["path"])
        return tuple(entry["shape"]) if first is None else (first[bucket], *entry["shape"][1:])

    def _column(self, record: Mapping[str, Any], entry: Mapping[str, Any], row: int | None) -> Any:
        for key in (entry["path"], entry["name"]):
            if key in record:
                return record[key]
        where = "The data set" if row is None else f"Row {row} of the data set"
        raise DataError(f"{where} lacks the entry {entry['path']!r}, which the artifacts take.")

    def _value(self, entry: Mapping[str, Any], row: int) -> Array:
        """One record's array, checked, not yet padded."""
        record, single = (self.data, False) if isinstance(self.data, Mapping) else (self.data[row], True)
        column = self._column(record, entry, row if single else None)
        try:
            value = np.asarray(column if single else column[row])
        except (ValueError, TypeError, IndexError):
            raise DataError(
                f"Row {row} of the data set: {entry['path']!r} is not a regular array of numbers."
            ) from None
        wanted, dtype = self._shape(entry, self.buckets - 1), np.dtype(entry["dtype"])
        if value.dtype.kind not in "biuf" or (value.dtype.kind == "f" and dtype.kind != "f"):
            raise DataError(
                f"Row {row} of the data set: {entry['path']!r} has type {value.dtype}; the artifacts take {dtype}."
            )
        if value.shape != wanted and (
            value.ndim != len(wanted) or value.ndim == 0 or value.shape[1:] != wanted[1:] or value.shape[0] > wanted[0]
        ):
            raise DataError(
                f"Row {row} of the data set: {entry['path']!r} has shape {value.shape}; the artifacts take "
                f"{wanted}, or a shorter first "
                "axis, which is padded. Cut longer records yourself, or export with a longer example batch."
            )
        return value.astype(dtype, copy=False)

    def row(self, row: int) -> tuple[int, dict[str, Array]]:
        """The number of the record's padded length, and its arrays by name, not yet padded."""
        values = {entry["name"]: self._value(entry, row) for entry in self.inputs}
        bucket = 0
        for entry in self.inputs:
            if entry["path"] in self.lengths:
                own = bucket_of(values[entry["name"]].shape[0], self.lengths[entry["path"]])
                assert own is not None, "longer records were refused"
                bucket = max(bucket, own)
        return bucket, values

    def check(self) -> None:
        """Every record once, before any budget is spent.

        Raises:
            DataError: one does not fit, or is there twice; the row is given by number.
        """
        known: dict[int, int] = {}
        for row, record in enumerate(self.data if isinstance(self.data, (list, tuple)) else ()):
            first = known.setdefault(id(record), row)
            if first != row:
                raise DataError(
                    f"Rows {first} and {row} of the data set are the same record. What is protected is one row, so whoever is "
                    "in several would be protected less than epsilon says. Take each record once."
                )
        for entry in self.inputs:
            column = self._column(self.data, entry, None) if isinstance(self.data, Mapping) else None
            alike = isinstance(column, np.ndarray) and column.dtype.kind != "O"
            for row in range(1 if alike else self.size):
                self._value(entry, row)

    def micro_batches(
        self, rows: Array, size: int | Sequence[int], longest: bool = False
    ) -> Iterator[tuple[dict[str, Array], Array]]:
        """Batches of exactly ``size`` rows (one number, or one per padded length), dummies (zeros) masked; at least one,
        also for an empty draw. longest: each record at the longest length.
        """
        sizes = physical_sizes(size, self.buckets)
        found = (self.row(int(r)) for r in rows)
        if longest:
            found = ((self.buckets - 1, values) for _, values in found)
        groups = split_by_bucket(found, sizes)
        for bucket, chosen in groups if len(rows) else [(0, list[dict[str, Array]]())]:
            mask = np.zeros(sizes[bucket], np.float32)
            mask[: len(chosen)] = 1
            batch = {}
            for entry in self.inputs:
                name, dtype = entry["name"], np.dtype(entry["dtype"])
                default = pad_default(entry["path"], dtype.kind == "i", bool(entry["shape"]))
                pad = self.pad_values.get(entry["path"], default)
                block = np.zeros((sizes[bucket], *self._shape(entry, bucket)), dtype)
                for i, values in enumerate(chosen):
                    value = values[name]
                    if value.shape == block.shape[1:]:
                        block[i] = value
                    else:
                        block[i] = pad
                        block[i, : value.shape[0]] = value
                batch[name] = block
            yield batch, mask
