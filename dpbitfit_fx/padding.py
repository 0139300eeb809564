"""Public padded lengths: which one a record gets, and how the records of a draw are split by it. Torch-free.

A record's padded length is the smallest public one that holds it: a function of that record alone (design §6). `fit` and
the runner without torch pad and split alike, because both do it here.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

from dpbitfit_fx.errors import DataError

__all__ = ["bucket_lengths", "bucket_of", "named", "pad_default", "physical_sizes", "split_by_bucket"]

_Row = TypeVar("_Row")


def bucket_lengths(padded_lengths: Any) -> Mapping[str, tuple[int, ...]] | tuple[int, ...] | None:
    """`padded_lengths` as the user gave them, checked: ascending, and as many for one entry as for another.

    Raises:
        DataError: they are not.
    """
    if padded_lengths is None:
        return None

    def one(lengths: Any, name: str) -> tuple[int, ...]:
        values = (lengths,) if isinstance(lengths, int) else tuple(lengths)
        ascending = all(a < b for a, b in itertools.pairwise(values))
        if not values or not all(type(v) is int and v > 0 for v in values) or not ascending:
            raise DataError(f"{name} must be positive integers in ascending order, for example (16, 32, 64).")
        return values

    if not isinstance(padded_lengths, Mapping):
        return one(padded_lengths, "padded_lengths")
    mapping = {str(key): one(value, f"padded_lengths['{key}']") for key, value in padded_lengths.items()}
    if len({len(value) for value in mapping.values()}) != 1:
        raise DataError(
            "padded_lengths gives several keys a different number of lengths. Bucket i pads every key to its i-th "
            "length, so all of them need the same count."
        )
    return mapping


def named(path: str, names: Mapping[str, Any]) -> Any:
    """The entry for a leaf by its whole path, else by its last component, else None."""
    return names.get(path, names.get(path.rsplit("/", 1)[-1]))


def bucket_of(length: int, lengths: Sequence[int]) -> int | None:
    """The number of the smallest public length that holds `length`; None where none does."""
    return next((bucket for bucket, longest in enumerate(lengths) if longest >= length), None)


def pad_default(path: str, integer: bool, padded: bool) -> int:
    """What an entry is padded with where nobody says: -100, which losses ignore, for sequences of labels; else 0."""
    return -100 if integer and padded and path.rsplit("/", 1)[-1] == "labels" else 0


def physical_sizes(physical_batch_size: int | Sequence[int], buckets: int) -> tuple[int, ...]:
    """Rows of a physical batch, one number per padded length.

    Raises:
        DataError: they are not positive, or not as many as there are lengths.
    """
    given = physical_batch_size
    sizes = tuple(given) if isinstance(given, Sequence) else (given,) * buckets
    if len(sizes) != buckets or not all(type(size) is int and size >= 1 for size in sizes):
        raise DataError(
            f"physical_batch_size must be a positive integer, or one per padded length ({buckets} of them); "
            f"it is {physical_batch_size!r}."
        )
    return sizes


def split_by_bucket(rows: Iterable[tuple[int, _Row]], sizes: Sequence[int]) -> Iterator[tuple[int, list[_Row]]]:
    """(bucket, row) in the order of a draw -> (bucket, at most `sizes[bucket]` rows): each row once, no draw truncated.

    At most one group per bucket waits. No row, no group.
    """
    waiting: list[list[_Row]] = [[] for _ in sizes]
    for bucket, row in rows:
        waiting[bucket].append(row)
        if len(waiting[bucket]) == sizes[bucket]:
            yield bucket, waiting[bucket]
            waiting[bucket] = []
    for bucket, rest in enumerate(waiting):
        if rest:
            yield bucket, rest
