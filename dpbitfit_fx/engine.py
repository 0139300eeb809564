"""The private computation of `fit`: records in, one clipped sum, one noisy gradient out."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

import dpbitfit_fx
from dpbitfit_fx.arguments import device_of
from dpbitfit_fx.batching import (
    ItemLayout,
    MapDataset,
    PhysicalBatch,
    PhysicalBatches,
    global_random_state_kept,
    load_item,
)
from dpbitfit_fx.errors import CompileRefused, DataError, DPBitFitError
from dpbitfit_fx.exact_normal import rounded_normals
from dpbitfit_fx.parallel import check_parallel, parallel_sum
from dpbitfit_fx.passes.clipping import Clipping
from dpbitfit_fx.passes.frozen_prefix import NothingFrozen
from dpbitfit_fx.passes.numerics import GRID_BITS, SLACK_PER_RECORD, fits_the_grid
from dpbitfit_fx.passes.torch_private import leaf_names, tree_flatten
from dpbitfit_fx.placement import check_places
from dpbitfit_fx.prefix_cache import PrefixCache
from dpbitfit_fx.randomness import SecretKey, stream
from dpbitfit_fx.sampling import PoissonSampler
from dpbitfit_fx.sharding import FrozenShards

if TYPE_CHECKING:
    from dpbitfit_fx.compile import PrivateStep

__all__ = ["Engine", "build_engine", "graph_hashes", "one_for_every_length"]


class Engine:
    """One logical batch at a time: records -> physical batches -> one clipped sum -> one noisy gradient.

    Args:
        compiled: one PrivateStep per bucket (padded length; the same one for all where it takes them all), same
            trainables in the same order; the first has noise.
        batches: turns rows into physical batches.
        sampler: draws over all records that are really there.
        parallel_batches: how many physical batches are computed at once, each on its share of torch's threads.
        prefix: what lies before the first trainable, kept for every record, or None.

    Guarantee: `clipped_sum(rows)` changes by at most max_grad_norm (L2, in real numbers) when one row is added or
    removed; `private_gradient` adds noise exactly once, whatever the number of physical batches, none included. With
    noise="grid" the sum is in units of the grid, whole numbers in float64, and the bound holds for what is computed.
    """

    def __init__(
        self,
        compiled: Sequence[PrivateStep],
        batches: PhysicalBatches,
        sampler: PoissonSampler,
        parallel_batches: int = 1,
        prefix: PrefixCache | None = None,
    ) -> None:
        first = compiled[0]
        if any(step.trainable_names != first.trainable_names for step in compiled):
            raise DataError("The step compiled for one padded length trains other parameters than for another.")
        self.compiled = tuple(compiled)
        self.batches = batches
        self.sampler = sampler
        self.prefix = prefix
        self.shards: FrozenShards | None = None
        self.parallel_batches = check_parallel(parallel_batches, first.backend, first.device)

    @property
    def update(self) -> PrivateStep:
        return self.compiled[0]

    def shard(self, shards: FrozenShards) -> None:
        """From now on every step gathers its frozen weights from `shards`; proved and checked before, while they are whole.

        Raises CompileRefused where padded lengths were compiled apart and gather in another order: ranks would mix weights up.
        """
        lengths = sorted({n for leaf in self.batches.layout.leaves for n in leaf.lengths or ()})
        with shards.whole_here():
            orders = {
                step.shard(shards.of, lengths if step.dynamic_length is not None else ())
                for step in dict.fromkeys(self.compiled)
            }
        if len(orders) > 1:
            raise CompileRefused(
                "shard_frozen=True: the steps that were compiled for the padded lengths read the frozen weights in different "
                "orders, so processes at work on different lengths cannot gather together. Declare one padded length, or use "
                "shard_frozen=False."
            )
        self.shards = shards

    def clipped_sum(self, rows: Sequence[int], secret: bytes = bytes(32)) -> torch.Tensor:
        """The clipped sum over `rows`, flat, [D]. Private: only noise may follow."""
        with global_random_state_kept(), torch.no_grad():
            if self.prefix is not None and len(rows):
                self.prefix.ready(self._guarded)
            batches, zero = self.batches.split(rows, secret), self.update.zero_accumulator
            if self.parallel_batches > 1:
                return parallel_sum(
                    batches, lambda b, acc: self._accumulate(b, acc, secret), zero, self.parallel_batches, _elements
                )
            accumulator = zero()
            if self.shards is not None:
                return self._sum_together(self.shards, batches, accumulator, secret)
            for batch in batches:
                accumulator = self._accumulate(batch, accumulator, secret)
            return accumulator

    def _sum_together(
        self, shards: FrozenShards, batches: Iterator[PhysicalBatch], accumulator: torch.Tensor, secret: bytes
    ) -> torch.Tensor:
        """As many passes over a physical batch on every rank: where this one has none left, over rows of mask 0, for nothing."""
        filler = self.batches.assemble(0, [], [])
        with shards.gathering():
            for batch in shards.in_step(batches):
                if batch is None:
                    self._accumulate(filler, accumulator, secret)
                else:
                    accumulator = self._accumulate(batch, accumulator, secret)
        return accumulator

    def drawn_sum(self, key: SecretKey, step: int) -> torch.Tensor:
        """The clipped sum of the Poisson draw of `step`; replays bit for bit for the same key, step and parameters."""
        return self.clipped_sum(*self.drawn(key, step))

    def drawn(self, key: SecretKey, step: int) -> tuple[list[int], bytes]:
        """The records of the Poisson draw of `step`, and what their loading is seeded with. Private, both."""
        return self.sampler.draw(key, step).tolist(), stream(key, "records", step).bytes(32)

    def private_gradient(self, key: SecretKey, step: int, accumulator: torch.Tensor) -> dict[str, torch.Tensor]:
        """(clipped sum + noise scale * z) / expected batch size, by parameter name. May be released."""
        update = self.update
        source, count = stream(key, "noise", step), update.num_trainable
        drawn = rounded_normals(source.words, count, GRID_BITS) if update.grid else source.normal(count)
        noise = torch.from_numpy(drawn).to(dtype=update.dtype, device=update.device)
        with torch.no_grad():
            return update.unflatten(update.privatize(accumulator, noise))

    def _accumulate(self, batch: PhysicalBatch, accumulator: torch.Tensor, secret: bytes) -> torch.Tensor:
        step = self.compiled[batch.bucket]

        def work() -> torch.Tensor:
            masks = step._masks(batch.rows, secret, len(batch.sample_mask))
            kept = {} if self.prefix is None else {"prefix": self.prefix.of(batch)}
            return step.accumulate(batch.batch, batch.sample_mask, accumulator, masks, **kept)

        result: torch.Tensor = self._guarded(batch, work, secret)
        return result

    def _guarded(self, batch: PhysicalBatch, work: Callable[[], Any], secret: bytes = bytes(32)) -> Any:
        """What `work` gives; where the model fails on a record of the batch, its row is named and nothing else."""
        try:
            return work()
        except DPBitFitError:
            raise
        except Exception as error:
            if self.shards is not None:
                raise DataError(
                    f"The model fails with {type(error).__name__} on a record of the dataset. Likely a label outside the model's "
                    "classes or a token id outside its vocabulary. Which record cannot be tried out while the frozen weights are "
                    "sharded: the same call with shard_frozen=False names its row. The message is withheld because it may quote "
                    "the record."
                ) from None
            for row in batch.rows:
                self._blame(row, self.compiled[batch.bucket], secret)
            raise DataError(
                f"The model fails with {type(error).__name__} on some records of the dataset together, and on none of them "
                f"alone. The message is withheld because it may quote a record."
            ) from None

    def _blame(self, row: int, step: PrivateStep, secret: bytes) -> None:
        """Names the record, as it was loaded for this step, on which the model fails by itself, and nothing else."""
        bucket, values = self.batches.load(row, secret)
        alone = self.batches.assemble(bucket, [values], [row])
        try:
            masks = step._masks(alone.rows, secret, len(alone.sample_mask))
            step.accumulate(alone.batch, alone.sample_mask, step.zero_accumulator(), masks)
        except Exception as error:
            raise DataError(
                f"The model fails with {type(error).__name__} on row {row} of the dataset. Likely a label outside the "
                f"model's classes or a token id outside its vocabulary. The message is withheld because it may quote "
                f"the record; run the loss on that row alone to see it."
            ) from None


def _elements(batch: PhysicalBatch) -> float:
    """About what a physical batch costs: one shape is as dear as its padded length."""
    return float(sum(x.numel() for x in tree_flatten(batch.batch)[0] if isinstance(x, torch.Tensor)))


def build_engine(
    model: nn.Module,
    loss_fn: Callable[[Any, Any], torch.Tensor],
    dataset: MapDataset,
    sampler: PoissonSampler,
    sigma: float,
    expected_batch_size: float,
    *,
    physical_batch_size: int | Sequence[int] = 32,
    parallel_batches: int = 1,
    trainable: str | Sequence[str] = "bias",
    exclude: str | Sequence[str] = (),
    add_bias: bool = False,
    dropout: bool = False,
    clipping: Clipping,
    backend: str = "eager",
    precision: str = "float32",
    noise: str = "float",
    memory_budget: float = 1.0,
    cache_frozen_prefix: bool = False,
    disable: Sequence[str] = (),
    public_tensors: bool = False,
    collate_fn: Callable[[list[Any]], Any] | None = None,
    padded_lengths: Any = None,
    pad_values: Mapping[str, float] | float | None = None,
    example_batch: Any = None,
) -> Engine:
    """One step for all padded lengths, or one for each, and the batches: everything of `fit` that touches a gradient.

    `sampler` draws over the records that are really there; `disable` is that of `compile`, the other arguments are those of
    `fit`. With cache_frozen_prefix the engine has a `prefix`, unless nothing worth keeping lies before the first trainable.

    Raises:
        CompileRefused: the model is refused; or noise="grid" cannot count so many records, or the machine's kernels give a
            record another gradient at other places of a physical batch: other bits on the grid, or more than the slack in
            bfloat16.
    """
    # Through the package, so that importing the submodule does not leave `dpbitfit_fx.compile` bound to a module.
    compile_step: Callable[..., PrivateStep] = dpbitfit_fx.__getattr__("compile")
    if example_batch is None:
        with global_random_state_kept():
            template = load_item(dataset, collate_fn, 0)
    else:
        template = example_batch
    layout = ItemLayout.build(template, padded_lengths, pad_values, is_example=example_batch is not None)
    device = device_of(model)
    selection = trainable if isinstance(trainable, str) else list(trainable)
    examples = [layout.example_batch(bucket) for bucket in range(layout.buckets)]

    def compiled(example: Any, **options: Any) -> PrivateStep:
        return compile_step(
            model,
            loss_fn,
            layout.on_device(example, device),
            trainable=selection,
            exclude=exclude,
            add_bias=add_bias,
            dropout=dropout,
            clipping=clipping,
            backend=backend,
            precision=precision,
            memory_budget=memory_budget,
            disable=disable,
            public_tensors=public_tensors,
            **options,
        )

    several = layout.buckets > 1 and not dropout  # how much a sample draws depends on its length
    whole = one_for_every_length(layout, examples[-1], compiled) if several else None
    if whole is not None:
        plain = [whole] * layout.buckets
    else:
        plain = [compiled(example) for example in examples]
        plain[1:] = [step.sharing(plain[0]) if step.added_biases else step for step in plain[1:]]
    # On the grid each of them rounds to it; else the first, which makes the release, has all the noise.
    rounds = plain if noise == "grid" else plain[:1]
    made = {step: step.with_noise(sigma, expected_batch_size, noise) for step in dict.fromkeys(rounds)}
    steps = [made.get(step, step) for step in plain]
    batches = PhysicalBatches(
        dataset,
        layout,
        physical_batch_size,
        collate_fn=collate_fn,
        dummies=examples,
        mask_dtype=steps[0].dtype,
        device=device,
    )
    if noise == "grid":
        if not fits_the_grid(sigma, sampler.dataset_size):
            raise CompileRefused(
                f"noise='grid' counts {sampler.dataset_size} records at a noise multiplier of {sigma:g} beyond 2**53 units, "
                "where float64 is no longer exact. Use more noise, or noise='float'."
            )
        for step, example, size in zip(plain, examples, batches.sizes, strict=True):
            # Without noise every bit shows; inductor fuses the two graphs differently, so there it tries both.
            for tried in (step, made[step]) if backend == "inductor" else (step,):
                check_places(tried, layout.on_device(example, device), size)
    elif precision != "float32":
        for step, example, size in zip(plain, examples, batches.sizes, strict=True):
            check_places(step, layout.on_device(example, device), size, within=SLACK_PER_RECORD)
    prefix = None
    if cache_frozen_prefix:
        with contextlib.suppress(NothingFrozen):
            _check_prefix(plain, layout, noise)
            prefix = PrefixCache(steps, batches)
    return Engine(steps, batches, sampler, parallel_batches, prefix)


def _check_prefix(steps: Sequence[PrivateStep], layout: ItemLayout, noise: str) -> None:
    """Each step in two parts, at every padded length that it serves. Raises CompileRefused or SealBroken."""
    if noise == "grid":
        raise CompileRefused(
            "cache_frozen_prefix computes a record's prefix in other physical batches than the rest, where noise='grid' asks for "
            "the same bits everywhere. Use one of the two."
        )
    for step in dict.fromkeys(steps):
        lengths = {n for leaf in layout.leaves for n in leaf.lengths or ()}
        step.check_prefix(sorted(lengths) if step.dynamic_length is not None else ())


def one_for_every_length(layout: ItemLayout, longest: Any, compiled: Callable[..., PrivateStep]) -> PrivateStep | None:
    """One step that was checked at every padded length; None, with a warning, where the model wants one per length."""
    padded = {n: leaf.lengths for n, leaf in zip(leaf_names(longest), layout.leaves, strict=True) if leaf.lengths}
    lengths = next(iter(padded.values()))
    if any(other != lengths for other in padded.values()):
        return None  # entries of unequal lengths, such as a source and its translation
    size = torch.export.Dim("padded_length", min=lengths[0], max=lengths[-1])
    try:
        step = compiled(longest, dynamic_shapes={name: {1: size} for name in padded})
        for length in lengths:
            step.check_length(length)
    except CompileRefused as refusal:
        warnings.warn(
            f"The step is compiled once for each of the padded lengths {list(lengths)}: one graph for all of them was "
            f"refused. {refusal}",
            stacklevel=2,
        )
        return None
    return step


def graph_hashes(compiled: Sequence[PrivateStep]) -> list[str]:
    """Of the one graph for all padded lengths, or of one per length."""
    return [step.graph_hash for step in dict.fromkeys(compiled)]
