"""Physical batches: how the records of one logical batch become tensors of fixed, public shapes.

Rules that keep one record from touching another (design.md, section 6):

- every record is loaded and collated **alone**, so no collator can make a row depend on its neighbours;
- its padded length is the smallest public bucket that holds it: a function of that record alone;
- the number of rows of a physical batch is fixed per bucket; missing rows are a public dummy with mask 0;
- a draw that is larger than a physical batch is split, never truncated.

Randomness that a dataset or a collator takes from `torch`, `random` or `numpy` is seeded per record from the run's
secret, so that a replayed step loads the same rows.
"""

from __future__ import annotations

import contextlib
import hashlib
import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch

from dpbitfit_fx.errors import DataError
from dpbitfit_fx.padding import bucket_lengths, bucket_of, named, pad_default, physical_sizes, split_by_bucket

__all__ = ["ItemLayout", "Leaf", "MapDataset", "PhysicalBatch", "PhysicalBatches", "check_rows"]

EXAMPLE_ROWS = 4


class MapDataset(Protocol):
    """A map-style dataset: a length and items by index."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Any: ...


@dataclass(frozen=True)
class Leaf:
    """One tensor of an item: its path, its shape without the batch dimension, its dtype.

    `lengths` holds the public padded lengths of dimension 0 of the item (dimension 1 of the batch), one per bucket,
    or None where every item must have exactly `shape`.
    """

    path: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    lengths: tuple[int, ...] | None
    pad_value: float

    @property
    def key(self) -> str:
        return self.path.rsplit("/", 1)[-1]


@dataclass(frozen=True)
class PhysicalBatch:
    """`batch`: the pytree the loss sees, dimension 0 = physical batch size; `sample_mask`: [B], 1 for real rows."""

    bucket: int
    batch: Any
    sample_mask: torch.Tensor
    rows: tuple[int, ...]


# -- items ------------------------------------------------------------------------------------------------------------


def _only_numbers(node: Any) -> bool:
    if isinstance(node, list):
        return all(_only_numbers(child) for child in node)
    return isinstance(node, (bool, int, float, np.number, np.bool_))


def _number_type(values: Any) -> torch.dtype:
    """bool for booleans, int64 for integers, torch's default dtype for anything with a float in it."""
    stack, kinds = [values], set()
    while stack:
        node = stack.pop()
        if isinstance(node, list):
            stack.extend(node)
        elif isinstance(node, (bool, np.bool_)):
            kinds.add("bool")
        elif isinstance(node, (int, np.integer)):
            kinds.add("int")
        else:
            kinds.add("float")
    if kinds == {"bool"}:
        return torch.bool
    return torch.get_default_dtype() if "float" in kinds else torch.int64


def _children(node: Any) -> list[tuple[str, Any]] | None:
    """The named children of a container, or None for a leaf. A list of nothing but numbers is one leaf."""
    if isinstance(node, Mapping):
        return [(str(key), value) for key, value in node.items()]
    if isinstance(node, tuple) or (isinstance(node, list) and not _only_numbers(node)):
        return [(str(index), value) for index, value in enumerate(node)]
    return None


def _leaves(node: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    children = _children(node)
    if children is None:
        yield path or "item", node
        return
    for name, child in children:
        yield from _leaves(child, f"{path}/{name}" if path else name)


def _rebuild(node: Any, values: Mapping[str, torch.Tensor], path: str = "") -> Any:
    """`node` again, its leaves taken from `values`; mappings become plain dicts, named tuples stay themselves."""
    children = _children(node)
    if children is None:
        return values[path or "item"]
    built = [_rebuild(child, values, f"{path}/{name}" if path else name) for name, child in children]
    if isinstance(node, Mapping):
        return dict(zip((key for key in node), built, strict=True))
    if isinstance(node, tuple):
        return type(node)(*built) if hasattr(node, "_fields") else tuple(built)
    return built


def _as_tensor(value: Any, where: str, path: str) -> torch.Tensor:
    if isinstance(value, torch.Tensor):
        return value.detach()
    if isinstance(value, (np.ndarray, np.generic)) and np.asarray(value).dtype.kind in "biuf":
        return torch.as_tensor(np.asarray(value).copy())
    if _only_numbers(value):
        try:
            return torch.tensor(value, dtype=_number_type(value))
        except (ValueError, OverflowError):  # the message would quote the values
            raise DataError(
                f"{where}: '{path}' is a list that is not a regular array of numbers (ragged, or out of range). "
                f"Give equally long inner lists, or a collate_fn that makes tensors of them."
            ) from None
    raise DataError(
        f"{where}: '{path}' is a {type(value).__name__}, and a batch can hold only tensors, arrays, numbers and lists "
        f"of numbers. Tokenise or drop that column, or give a collate_fn that turns one item into tensors."
    )


def _where(row: int) -> str:
    return f"Row {row} of the dataset"


def load_item(dataset: MapDataset, collate_fn: Callable[[list[Any]], Any] | None, row: int) -> Any:
    """Row `row` as a pytree whose leaves have a leading dimension of 1.

    Raises DataError naming the row (never its contents: the original exception is not chained for that reason).
    """
    where = _where(row)
    try:
        item = dataset[row]
    except Exception as error:
        raise DataError(
            f"{where} could not be read: the dataset raised {type(error).__name__}. Its message is withheld because it "
            f"may quote the record; call dataset[{row}] yourself to see it."
        ) from None
    if collate_fn is None:
        values = {path: _as_tensor(leaf, where, path).unsqueeze(0) for path, leaf in _leaves(item)}
        return _rebuild(item, values)
    try:
        batch = collate_fn([item])
    except Exception as error:
        raise DataError(
            f"{where} could not be collated: collate_fn([item]) raised {type(error).__name__}. Its message is withheld "
            f"because it may quote the record. fit calls collate_fn on one item at a time."
        ) from None
    values = {path: _as_tensor(leaf, where, path) for path, leaf in _leaves(batch)}
    for path, value in values.items():
        if value.ndim == 0 or value.shape[0] != 1:
            raise DataError(
                f"{where}: collate_fn was given one item and made '{path}' of shape {tuple(value.shape)}; dimension 0 "
                f"must be the batch dimension, of size 1."
            )
    return _rebuild(batch, values)


# -- the public layout ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ItemLayout:
    """The public shape of every record: what is padded, to which lengths, with what.

    Built from `example_batch` (made-up or public). Without one it is built from the structure, dtypes and fixed shapes
    of the first record, never from its values.
    """

    leaves: tuple[Leaf, ...]
    skeleton: Any
    example: Any | None

    @property
    def buckets(self) -> int:
        return max((len(leaf.lengths) for leaf in self.leaves if leaf.lengths), default=1)

    @classmethod
    def build(
        cls,
        template: Any,
        padded_lengths: Any = None,
        pad_values: Mapping[str, float] | float | None = None,
        *,
        is_example: bool = False,
    ) -> ItemLayout:
        """`template`: a batch (leading dimension on every leaf), kept as the example where `is_example`.

        Raises DataError for lengths, pad values or names that fit nothing.
        """
        lengths = bucket_lengths(padded_lengths)
        tensors = {path: _as_tensor(leaf, "example_batch", path) for path, leaf in _leaves(template)}
        if not tensors:
            raise DataError("A record of the dataset holds no tensor or number at all.")
        pads: Mapping[str, float] = pad_values if isinstance(pad_values, Mapping) else {}
        leaves: list[Leaf] = []
        for path, tensor in tensors.items():
            if tensor.ndim == 0:
                raise DataError(
                    f"example_batch: '{path}' has no batch dimension; dimension 0 of every leaf is the batch."
                )
            own: tuple[int, ...] | None = None
            if tensor.ndim >= 2 and isinstance(lengths, Mapping):
                own = named(path, lengths)
            elif tensor.ndim >= 2 and isinstance(lengths, tuple):
                # A public example tells fixed features from padded sequences; without one every sequence is padded.
                own = lengths if not is_example or tensor.shape[1] in lengths else None
            pad = named(path, pads)
            if pad is None and isinstance(pad_values, (int, float)):
                pad = pad_values
            integer = not tensor.dtype.is_floating_point and tensor.dtype != torch.bool
            if pad is None:
                pad = pad_default(path, integer, own is not None)
            if integer and (not float(pad).is_integer() or not _fits(int(pad), tensor.dtype)):
                raise DataError(f"pad_values: '{path}' has dtype {tensor.dtype}, which cannot hold {pad}.")
            leaves.append(Leaf(path, tuple(tensor.shape[1:]), tensor.dtype, own, pad))
        for kind, names in (("padded_lengths", lengths), ("pad_values", pads)):
            for name in names if isinstance(names, Mapping) else ():
                if not any(name in (leaf.path, leaf.key) for leaf in leaves):
                    known = ", ".join(f"'{leaf.path}'" for leaf in leaves)
                    raise DataError(f"{kind} names '{name}', and a record holds only {known}.")
        if lengths is not None and not any(leaf.lengths for leaf in leaves):
            raise DataError(
                "padded_lengths is given, and no tensor of a record has a dimension to pad (each is one number per "
                "record, or the size of its dimension 1 in example_batch is none of these lengths)."
            )
        return cls(tuple(leaves), _rebuild(template, tensors), template if is_example else None)

    def shape(self, leaf: Leaf, bucket: int) -> tuple[int, ...]:
        return leaf.shape if leaf.lengths is None else (leaf.lengths[bucket], *leaf.shape[1:])

    def assemble(self, values: Mapping[str, torch.Tensor]) -> Any:
        """The pytree that the loss sees, from one tensor per leaf path."""
        return _rebuild(self.skeleton, values)

    def on_device(self, batch: Any, device: torch.device) -> Any:
        """The same batch, its tensors on `device`."""
        return self.assemble({path: leaf.to(device) for path, leaf in _leaves(batch)})

    def example_batch(self, bucket: int) -> Any:
        """A public batch of this bucket's shapes: the user's own, cut or repeated to length, or made up from shapes.

        Made-up values: standard normals for floats; ones for integers whose name holds "mask"; else 0 or 1.
        """
        if self.example is not None:
            given = {path: _as_tensor(leaf, "example_batch", path) for path, leaf in _leaves(self.example)}
            values = {}
            for leaf in self.leaves:
                value = given[leaf.path]
                if leaf.lengths is not None:
                    value = value[:, torch.arange(leaf.lengths[bucket]) % max(1, value.shape[1])]
                values[leaf.path] = value
            return self.assemble(values)
        generator = torch.Generator().manual_seed(0)
        made_up = {}
        for leaf in self.leaves:
            shape = (EXAMPLE_ROWS, *self.shape(leaf, bucket))
            if leaf.dtype.is_floating_point:
                made_up[leaf.path] = torch.randn(shape, generator=generator, dtype=torch.float64).to(leaf.dtype)
            elif "mask" in leaf.key:
                made_up[leaf.path] = torch.ones(shape, dtype=leaf.dtype)
            else:
                made_up[leaf.path] = torch.randint(0, 2, shape, generator=generator).to(leaf.dtype)
        return self.assemble(made_up)

    def row(self, item: Any, row: int) -> tuple[int, dict[str, torch.Tensor]]:
        """The bucket of one collated record (dimension 0 of size 1), and its tensors, not yet padded.

        Raises DataError naming the row where its structure, dtype or shape is not the declared one.
        """
        where = _where(row)
        found = dict(_leaves(item))
        expected = {leaf.path for leaf in self.leaves}
        if set(found) != expected:
            missing, extra = sorted(expected - set(found)), sorted(set(found) - expected)
            raise DataError(
                f"{where} has another structure than the first record or example_batch: "
                f"missing {missing or 'nothing'}, unexpected {extra or 'nothing'}."
            )
        bucket = 0
        for leaf in self.leaves:
            tensor = found[leaf.path]
            if tensor.dtype != leaf.dtype:
                raise DataError(
                    f"{where}: '{leaf.path}' has dtype {tensor.dtype}, and {leaf.dtype} was declared by the first "
                    f"record or example_batch. Convert that column to one dtype."
                )
            shape = tuple(tensor.shape[1:])
            if leaf.lengths is None:
                if shape != leaf.shape:
                    raise DataError(
                        f"{where}: '{leaf.path}' has another shape than the first record or example_batch "
                        f"({leaf.shape}). fit does not pad to the longest of a batch, because then one record would "
                        f"change the padding, and so the gradients, of others. Give public padded_lengths=(...): every "
                        f"record is then padded to the smallest of them that holds it."
                    )
                continue
            if len(shape) != len(leaf.shape) or shape[1:] != leaf.shape[1:]:
                raise DataError(
                    f"{where}: '{leaf.path}' differs from the declared shape in more than its length (dimension 1 of "
                    f"the batch); the other dimensions must be {leaf.shape[1:]}."
                )
            fitting = bucket_of(shape[0], leaf.lengths)
            if fitting is None:
                raise DataError(
                    f"{where}: '{leaf.path}' is longer than {leaf.lengths[-1]}, the largest of padded_lengths. "
                    f"Truncate that record, or declare a larger length."
                )
            bucket = max(bucket, fitting)
        return bucket, found


def _fits(value: int, dtype: torch.dtype) -> bool:
    info = torch.iinfo(dtype)
    return info.min <= value <= info.max


# -- physical batches -------------------------------------------------------------------------------------------------


class PhysicalBatches:
    """Turns row numbers into physical batches of fixed, public shapes.

    Args:
        dataset: map-style; item i is loaded by `dataset[i]`, collated alone.
        layout: the public shapes.
        physical_batch_size: rows per physical batch, one number, or one per bucket.
        collate_fn: one item in a list -> a batch of one, or None for plain tensors and numbers.
        dummies: per bucket a batch whose row 0 fills the unused rows (public; its mask is 0).
        mask_dtype, device: of the sample mask; every tensor is moved to `device`.
    """

    def __init__(
        self,
        dataset: MapDataset,
        layout: ItemLayout,
        physical_batch_size: int | Sequence[int],
        *,
        collate_fn: Callable[[list[Any]], Any] | None = None,
        dummies: Sequence[Any] | None = None,
        mask_dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        self.dataset = dataset
        self.layout = layout
        self.collate_fn = collate_fn
        count = layout.buckets
        self.sizes = physical_sizes(physical_batch_size, count)
        self.mask_dtype = mask_dtype
        self.device = torch.device(device)
        batches = [layout.example_batch(bucket) for bucket in range(count)] if dummies is None else dummies
        self.dummies = [{path: leaf[0].cpu() for path, leaf in _leaves(batch)} for batch in batches]

    def assemble(
        self, bucket: int, rows: Sequence[Mapping[str, torch.Tensor]], numbers: Sequence[int]
    ) -> PhysicalBatch:
        """One physical batch: the given rows, padded to the bucket's length, then dummy rows with mask 0."""
        size = self.sizes[bucket]
        values = {}
        for leaf in self.layout.leaves:
            shape = self.layout.shape(leaf, bucket)
            out = torch.full((size, *shape), leaf.pad_value, dtype=leaf.dtype)
            for i, row in enumerate(rows):
                value = row[leaf.path][0]
                if leaf.lengths is None:
                    out[i] = value
                else:
                    out[i, : value.shape[0]] = value
            out[len(rows) :] = self.dummies[bucket][leaf.path]
            values[leaf.path] = out.to(self.device)
        mask = torch.zeros(size, dtype=self.mask_dtype)
        mask[: len(rows)] = 1
        return PhysicalBatch(bucket, self.layout.assemble(values), mask.to(self.device), tuple(numbers))

    def load(self, row: int, secret: bytes) -> tuple[int, dict[str, torch.Tensor]]:
        """One record, alone; randomness in the dataset or collator comes from (secret, row) only."""
        digest = hashlib.sha256(secret + row.to_bytes(8, "big")).digest()
        # Not torch.manual_seed: without a GPU it queues a call per accelerator, with a stack trace, at every record.
        torch.default_generator.manual_seed(int.from_bytes(digest[:7], "big"))
        random.seed(digest[8:16])
        np.random.seed(int.from_bytes(digest[16:20], "big"))
        return self.layout.row(load_item(self.dataset, self.collate_fn, row), row)

    def split(self, rows: Sequence[int], secret: bytes) -> Iterator[PhysicalBatch]:
        """All of `rows`, each in exactly one physical batch. An empty draw gives no batch at all.

        `secret` (32 bytes) seeds what a dataset or collator draws. Memory: at most one physical batch per bucket.
        """

        def load(row: int) -> tuple[int, tuple[int, dict[str, torch.Tensor]]]:
            bucket, values = self.load(row, secret)
            return bucket, (row, values)

        for bucket, group in split_by_bucket((load(int(row)) for row in rows), self.sizes):
            yield self.assemble(bucket, [values for _, values in group], [row for row, _ in group])


@contextlib.contextmanager
def global_random_state_kept() -> Iterator[None]:
    """Leaves torch's, Python's and numpy's global generators as they were found."""
    python, legacy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng():
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(legacy)


def check_rows(batches: PhysicalBatches, seconds: float = 10.0) -> None:
    """Reads records from the front for at most `seconds`, so that a malformed one is named before any budget is spent.

    Raises DataError naming the row.
    """
    end = time.monotonic() + seconds
    with global_random_state_kept():
        for row in range(len(batches.dataset)):
            batches.load(row, b"check")
            if time.monotonic() > end:
                return
