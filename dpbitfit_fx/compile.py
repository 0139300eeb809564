"""The front door: ``compile`` turns a model, a loss and an example batch into a private step (design §8)."""

from __future__ import annotations

import contextlib
import dataclasses
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from .arguments import check_arguments, device_of, names_in
from .dropout import draw_masks
from .dynamic_shapes import dynamic_length
from .errors import CompileRefused, SealBroken
from .lowering import OPTIMIZATIONS, Lowered, check_lowering, prepare
from .passes import bias_slots, facts, random_draws
from .passes.capture import split_batch
from .passes.clipping import AutomaticClipping, Clipping
from .passes.errors import too_little_memory
from .passes.joint_graph import AddedBias, DynamicLength, JointGraph, Noise, Source
from .passes.lengths import resized
from .passes.meaning import check_meaning
from .passes.numerics import NOISES
from .passes.pipeline import CAPTURE, DEAD, DEAD_TOKENS, MEANING, PIPELINE, RELEASE, Observer, run
from .passes.seal import check_update, split
from .passes.sharded_weights import Shard
from .passes.torch_private import tree_flatten
from .randomness import SecretKey, stream
from .report import Report, make_report


class PrivateStep:
    """One private training step of a model, proved before it runs. Made by :func:`compile`.

    The model stays the user's: its parameters are read at every call, so an optimizer updates it in place.
    Guarantee: :meth:`accumulate` has L2 sensitivity ``max_grad_norm`` when one record is added or removed (PARTIAL seal);
    :meth:`privatize` adds ``N(0, noise_scale^2)`` per coordinate (SEALED), where ``noise_scale = noise_multiplier *
    max_grad_norm * (1 + slack)`` and the slack, 1e-4 or more, pays for float rounding (``passes.numerics``).
    """

    def __init__(
        self,
        source: Source,
        captured: JointGraph,
        observer: Observer | None,
        backend: str,
        disable: tuple[str, ...] = (),
        precision: str = "float32",
    ) -> None:
        self.model = source.model
        self.loss_fn = source.loss_fn
        self.example_batch = source.example_batch
        self.backend, self._disable, self.precision = backend, disable, precision
        self._source, self._captured, self._observer = source, captured, observer
        rest = run(PIPELINE[MEANING:], captured, observer)
        self.partial, self.update = rest, None
        if source.noise is not None:
            self.joint = run(RELEASE, rest, observer)
            self.partial, self.update = split(self.joint)
        else:
            self.joint = rest
        self._prove()
        self._spec = captured.batch_spec
        self._examples, self._constants, _, self._leaf_names, size = split_batch(source.example_batch)
        drawn = random_draws.example(captured.draws, size)
        self._example_masks = dict(zip(random_draws.names(captured.draws), drawn, strict=True))
        self._lowered = Lowered(self.partial, backend, disable, precision)
        self._gradients = captured.module

    def _prove(self) -> None:
        """The seals are proved again whenever a step is made: a graph without its seal does not run."""
        facts.partial(self.partial)
        if self.update is not None:
            check_update(self.update)

    @property
    def captured(self) -> JointGraph:
        """The checked graph before the clip: losses [B], then per-sample gradients. PRIVATE and without a seal."""
        return self._captured

    @property
    def trainable_names(self) -> tuple[str, ...]:
        return tuple(t.name for t in self.joint.targets)

    def parameters(self) -> dict[str, torch.nn.Parameter]:
        """``{name: parameter}`` of all that is trained, added biases included: the live ones, in ``trainable_names`` order."""
        found = {}
        for name in self.trainable_names:
            parameter = self.joint.state[name]
            assert isinstance(parameter, torch.nn.Parameter)
            found[name] = parameter
        return found

    @property
    def added_biases(self) -> tuple[AddedBias, ...]:
        """The trained biases that the original model does not have (``add_bias=True``), of this run or an earlier one."""
        known = {b.name: b for b in (*bias_slots.attached_biases(self.model), *self.joint.added)}
        return tuple(known[n] for n in self.trainable_names if n in known)

    def apply_added_biases(self) -> list[AddedBias]:
        """Gives the model its added biases, as ``load_biases`` does: from then on it computes what the step computes.
        Returns those that it did not have before.

        The parameters are the step's own, so what an optimizer writes into them is what the model adds.
        """
        return bias_slots.attach(self.model, self.joint.added, self.joint.state)

    def biases_applied(self) -> contextlib.AbstractContextManager[None]:
        """Inside, the model has its added biases; afterwards it is as it was."""
        return bias_slots.applied(self.model, self.joint.added, self.joint.state)

    def sharing(self, other: PrivateStep) -> PrivateStep:
        """The same step with ``other``'s added biases in place of its own: two steps, one set of parameters."""
        theirs = {b.name: other.joint.state[b.name] for b in other.joint.added}
        state = {n: theirs.get(n, p) for n, p in self._captured.state.items()}
        captured = dataclasses.replace(self._captured, state=state)
        return PrivateStep(self._source, captured, self._observer, self.backend, self._disable, self.precision)

    @property
    def trainable_shapes(self) -> dict[str, torch.Size]:
        return {t.name: torch.Size(t.shape) for t in self.joint.targets}

    @property
    def num_trainable(self) -> int:
        return self.joint.num_trainable

    @property
    def dtype(self) -> torch.dtype:
        return self.joint.flat_dtype

    @property
    def device(self) -> torch.device:
        return self.joint.device

    @property
    def clipping(self) -> Clipping:
        assert self.joint.clipping is not None
        return self.joint.clipping

    @property
    def max_grad_norm(self) -> float:
        """R: the L2 sensitivity of :meth:`accumulate`, whatever the clipping."""
        return self.clipping.sensitivity

    @property
    def noise_multiplier(self) -> float | None:
        return self.joint.noise.noise_multiplier if self.joint.noise else None

    @property
    def expected_batch_size(self) -> float | None:
        return self.joint.noise.expected_batch_size if self.joint.noise else None

    @property
    def grid(self) -> bool:
        """Whether sums and noise are whole numbers (``noise="grid"``)."""
        return self.joint.grid

    @property
    def noise_scale(self) -> float | None:
        """Standard deviation of the noise on the clipped sum; on the grid that of ``2^24`` units."""
        return self.joint.noise.scale(self.clipping) if self.joint.noise else None

    @property
    def dynamic_length(self) -> DynamicLength | None:
        """Which dimensions of the batch may vary, and between which lengths; None: only the batch size may."""
        return self._captured.length

    def check_length(self, length: int) -> None:
        """The meaning and the rows, checked once more at this length: raises as :func:`compile` does."""
        dynamic = self.dynamic_length
        if dynamic is None or not dynamic.checked[0] <= length <= dynamic.checked[-1]:
            raise CompileRefused(f"The step was not compiled for batches of length {length}.")
        if length not in dynamic.checked:
            once = dataclasses.replace(self._source, length=dataclasses.replace(dynamic, checked=(length,)))
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                check_meaning(dataclasses.replace(self._captured, source=once))
            check_rows(self, (length,))

    @property
    def graph_hash(self) -> str:
        """SHA-256 (hex) of the canonical text of the final graph."""
        return self.joint.digest()

    @property
    def dropout(self) -> bool:
        """Whether the step takes random numbers: ``dropout=True``, and the model draws some."""
        return bool(self._captured.draws)

    def dropout_masks(
        self, records: Sequence[int], key: SecretKey, step: int, physical_batch_size: int | None = None
    ) -> dict[str, torch.Tensor]:
        """What the model drops, for a batch whose first rows are these records; the rest, up to the size, drop nothing.

        ``dropout_keep [B, n]`` bool and ``dropout_uniform [B, m]`` float32, each where the model has such draws. A row is
        a function of (key, step, number of the record) alone, independent of noise and Poisson draws; it is what ``fit``
        uses for that record in that step.
        """
        return self._masks(records, stream(key, "records", step).bytes(32), physical_batch_size)

    def _masks(self, records: Sequence[int], secret: bytes, size: int | None = None) -> dict[str, torch.Tensor]:
        if not self.dropout:
            return {}
        masks = draw_masks(self._captured.draws, SecretKey.from_bytes(secret), records, size or len(records))
        return {name: x.to(self.device) for name, x in masks.items()}

    def _leaves(self, batch: Any, masks: Mapping[str, torch.Tensor] | None = None) -> list[torch.Tensor]:
        leaves = self._batch_leaves(batch)
        masks = {} if masks is None else masks
        if masks.keys() != self._example_masks.keys():
            raise CompileRefused(
                f"The step was compiled {'with' if self.dropout else 'without'} dropout and takes the masks "
                f"{sorted(self._example_masks)}; got {sorted(masks)}. Draw them with step.dropout_masks(records, key, step)."
            )
        for name, example in self._example_masks.items():
            x, shape = masks[name], (leaves[0].shape[0], example.shape[1])
            if x.shape != shape or x.dtype != example.dtype:
                raise CompileRefused(f"{name} is {tuple(x.shape)} {x.dtype}, expected {shape} {example.dtype}.")
        return [*leaves, *(masks[name] for name in self._example_masks)]

    def _batch_leaves(self, batch: Any) -> list[torch.Tensor]:
        leaves, spec = tree_flatten(batch)
        if spec != self._spec:
            raise CompileRefused(
                f"The batch has another structure than example_batch: expected {self._spec}, got {spec}."
            )
        for i, value in self._constants.items():
            if leaves[i] is not value and leaves[i] != value:
                raise CompileRefused(
                    f"The batch entry {i} was the constant {value!r} at compile and is {leaves[i]!r} now."
                )
        tensors = [x for i, x in enumerate(leaves) if i not in self._constants]
        for name, x, e in zip(self._leaf_names, tensors, self._examples, strict=True):
            if (
                not isinstance(x, torch.Tensor)
                or x.dim() != e.dim()
                or self._fixed_shape(name, x) != self._fixed_shape(name, e)
                or x.dtype != e.dtype
            ):
                got = f"{tuple(x.shape)} {x.dtype}" if isinstance(x, torch.Tensor) else type(x).__name__
                wanted = ", ".join(map(str, self._fixed_shape(name, e)))
                raise CompileRefused(
                    f"The batch entry {name} is {got}; it was compiled for [B, {wanted}] {e.dtype}. "
                    "Only the batch size may vary: pad to the compiled shape, or compile once more."
                )
        if self.dynamic_length is not None:
            self._check_length(self.dynamic_length, tensors)
        if len({x.shape[0] for x in tensors}) != 1:
            raise CompileRefused("The tensors of the batch differ in their batch size (dim 0).")
        if tensors[0].shape[0] == 0:
            raise CompileRefused(
                "The physical batch is empty; an empty logical batch needs no physical batch, only its noise."
            )
        return tensors

    def _fixed_shape(self, name: str, x: torch.Tensor) -> list[int | str]:
        """The shape without the batch, ``T`` where the padded length may vary."""
        dim = self.dynamic_length.dims.get(name) if self.dynamic_length is not None else None
        return ["T" if d == dim else n for d, n in enumerate(x.shape)][1:]

    def _check_length(self, dynamic: DynamicLength, tensors: list[torch.Tensor]) -> None:
        lengths = {
            x.shape[dynamic.dims[n]] for n, x in zip(self._leaf_names, tensors, strict=True) if n in dynamic.dims
        }
        if len(lengths) != 1 or not dynamic.checked[0] <= min(lengths) <= dynamic.checked[-1]:
            raise CompileRefused(
                f"The batch has the padded lengths {sorted(lengths)}; the step was compiled and checked for one length at a "
                f"time, from {dynamic.checked[0]} to {dynamic.checked[-1]}."
            )

    def _example_leaves(self) -> list[torch.Tensor]:
        return [*self._examples, *(x.to(self.device) for x in self._example_masks.values())]

    def per_sample_gradients(
        self, batch: Any, dropout_masks: Mapping[str, torch.Tensor] | None = None
    ) -> dict[str, torch.Tensor]:
        """``{name: [B, *shape]}``, unclipped and un-noised. PRIVATE and without a seal: for tests and audits only."""
        with torch.no_grad():
            outputs = self._gradients(*self._captured.values(self._leaves(batch, dropout_masks)))
        return dict(zip(self.trainable_names, outputs[1:], strict=True))

    def clipped_sum(
        self,
        batch: Any,
        sample_mask: torch.Tensor | None = None,
        dropout_masks: Mapping[str, torch.Tensor] | None = None,
    ) -> dict[str, torch.Tensor]:
        """``{name: [*shape]}``: the sum of clipped gradients of the rows with a non-zero mask; sensitivity R. PRIVATE."""
        size = self._batch_leaves(batch)[0].shape[0]
        mask = torch.ones(size, device=self.device) if sample_mask is None else sample_mask
        total = self.accumulate(batch, mask, self.zero_accumulator(), dropout_masks)
        noise = self.joint.noise
        return self.unflatten(total * noise.unit(self.clipping) if noise is not None and noise.grid else total)

    def accumulate(
        self,
        batch: Any,
        sample_mask: torch.Tensor,
        accumulator: torch.Tensor,
        dropout_masks: Mapping[str, torch.Tensor] | None = None,
        prefix: Sequence[torch.Tensor] | None = None,
    ) -> torch.Tensor:
        """``accumulator + clipped sum`` [D], a new tensor; secret until :meth:`privatize` (PARTIAL seal).

        ``dropout_masks``: of :meth:`dropout_masks`, where the step was compiled with dropout. ``prefix``: of
        :meth:`frozen_prefix`, each record's own row of each tensor; then what lies before the first trainable is not
        computed again.
        """
        leaves = self._leaves(batch, dropout_masks)
        if sample_mask.shape != (leaves[0].shape[0],):
            raise CompileRefused(f"sample_mask has shape {tuple(sample_mask.shape)}, expected ({leaves[0].shape[0]},).")
        self._check_flat(accumulator, "accumulator")
        more = () if prefix is None else (prefix,)
        return self._lowered(leaves, sample_mask, accumulator, *more)

    def frozen_prefix(self, batch: Any) -> tuple[torch.Tensor, ...]:
        """What no trainable reaches and the rest of the step reads: tensors [B, ..], row b a function of record b. PRIVATE.

        Raises :class:`CompileRefused` where there is nothing of the kind: train the last blocks only
        (``exclude=["*layer.[0-3].*"]``).
        """
        self._lowered.prefix_reads()  # refuses where there is none
        return self._lowered.prefix(self._leaves(batch))

    def check_prefix(self, lengths: Sequence[int] = ()) -> None:
        """:func:`check_rows` of the step in two parts, each record's prefix computed at another place than the rest is."""

        def in_parts(batch: list[torch.Tensor], mask: torch.Tensor, total: torch.Tensor) -> torch.Tensor:
            kept = self._lowered.prefix([x.flip(0) for x in batch])
            return self._lowered(batch, mask, total, [x.flip(0) for x in kept])

        check_rows(self, lengths, in_parts)

    def shard(self, shard_of: Callable[[torch.Tensor], Shard | None], lengths: Sequence[int] = ()) -> tuple[int, ...]:
        """From now on :meth:`accumulate` reads frozen weights as shards, inside ``gathering`` and in all processes that hold them
        at once. Proved and checked as :func:`compile` does, for which the weights are still to be whole. Returns the ids of the
        weights, in the order of the gathers.
        """
        runner, order = self._lowered.sharded(shard_of)
        check_rows(self, lengths, lambda batch, mask, total: runner(batch, mask, total)[0])
        self._lowered.run_as(runner)
        return order

    def privatize(self, accumulator: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        """``(accumulator + noise_scale * noise) / expected_batch_size`` [D], ``noise ~ N(0, I)`` [D]: may leave (SEALED)."""
        if self.update is None:
            raise SealBroken(
                "This step has no noise, so nothing may leave it. Make one with step.with_noise(noise_multiplier=..., "
                "expected_batch_size=...)."
            )
        self._check_flat(accumulator, "accumulator")
        self._check_flat(noise, "noise")
        if self.grid and not all(torch.equal(x, x.trunc()) for x in (accumulator, noise)):
            raise CompileRefused(
                "On the grid the accumulator and the noise are whole numbers: draw it with exact_normal.rounded_normals."
            )
        with torch.no_grad(), torch.autocast(self.device.type, enabled=False):
            result: torch.Tensor = self.update.module(accumulator, noise)[0]
        return result

    def _check_flat(self, x: torch.Tensor, name: str) -> None:
        if x.shape != (self.num_trainable,) or x.dtype != self.dtype:
            raise CompileRefused(
                f"{name} is {tuple(x.shape)} {x.dtype}, expected ({self.num_trainable},) {self.dtype}."
            )

    def zero_accumulator(self) -> torch.Tensor:
        return torch.zeros(self.num_trainable, dtype=self.dtype, device=self.device)

    def unflatten(self, flat: torch.Tensor) -> dict[str, torch.Tensor]:
        """``[D] -> {name: [*shape]}``, views in the order of ``trainable_names``."""
        pieces = torch.split(flat, [t.numel for t in self.joint.targets])
        return {t.name: p.view(t.shape) for t, p in zip(self.joint.targets, pieces, strict=True)}

    def with_noise(
        self, noise_multiplier: float, expected_batch_size: float, noise: str | None = None
    ) -> PrivateStep:
        """The same step with noise of std ``noise_multiplier * max_grad_norm * (1 + slack)`` and a public denominator.

        noise: "float", or "grid": clipped gradients, their sums and the noise are whole numbers in float64, so that the
        guarantee holds to the letter (``passes.numerics``); None: as it is. On the grid :meth:`accumulate` counts in units
        of 2^-24 of the noise, and :meth:`privatize` takes ``rounded_normals(.., scale=24)``.
        """
        grid = self.grid if noise is None else noise == "grid"
        if noise not in (None, *NOISES):
            raise CompileRefused(f"Unknown noise {noise!r}; choose one of {', '.join(NOISES)}.")
        kind = Noise(float(noise_multiplier), float(expected_batch_size), grid)
        source = dataclasses.replace(self._source, noise=kind)
        captured = dataclasses.replace(self._captured, noise=kind, source=source)
        step = PrivateStep(source, captured, self._observer, self.backend, self._disable, self.precision)
        if grid:
            check_rows(step)  # another graph runs than the one that compile has checked
        return step

    def report(self) -> Report:
        return make_report(self.model, self.joint, self._lowered)


def compile(  # the name users of torch.compile expect
    model: torch.nn.Module,
    loss_fn: Callable[[Any, Any], torch.Tensor],
    example_batch: Any,
    *,
    trainable: str | Sequence[str] = "bias",
    exclude: str | Sequence[str] = (),
    add_bias: bool = False,
    clipping: Clipping | None = None,
    backend: str = "eager",
    noise_multiplier: float | None = None,
    expected_batch_size: float | None = None,
    public_tensors: bool = False,
    ghost_norms: bool | None = None,
    dropout: bool = False,
    disable: str | Sequence[str] = (),
    precision: str = "float32",
    memory_budget: float = 1.0,
    dynamic_shapes: Mapping[str, Mapping[int, Any]] | None = None,
    observer: Observer | None = None,
) -> PrivateStep:
    """Compile one private step of an unedited model.

    ``loss_fn(model, batch)`` returns losses [B] (or their mean or sum); ``batch`` is a nest of tensors with dim 0 = batch.
    ``example_batch`` must be made up or public: at least two rows, shapes and dtypes as in training; any batch size works
    afterwards. ``trainable`` is ``"bias"``, ``"all"`` or shell-style name patterns such as ``["bias", "classifier.*"]``;
    ``exclude`` takes names out of it again: ``exclude=["*LayerNorm*"]``, or ``["*layer.[0-9].*"]`` to leave the last blocks
    only. ``add_bias=True`` also trains a new bias, zero at first, behind every product with a parameter that has none
    (linear layers, convolutions, ``matmul`` and ``einsum``), named as its layer would name it. They are the step's
    (:meth:`PrivateStep.parameters`); the model is not touched until :meth:`PrivateStep.apply_added_biases`.
    ``ghost_norms``: large gradients stay factored where that is cheaper (None), wherever it can be, or never.
    ``dropout=True`` leaves dropout on in the modules that are in train mode (call ``model.train()``, and ``.eval()`` on its
    BatchNorm layers): what they draw becomes an input, given for each record by :meth:`PrivateStep.dropout_masks`.
    Otherwise modules with dropout run in eval mode.
    ``disable`` switches optimizations off by name; each leaves the numbers as they are but for rounding: ``"refusion"``
    (fewer, fatter operators), ``"dead_tokens"`` (rows of activations that nobody reads are not computed),
    ``"saved_inputs"`` (what the backward pass does not need is not kept for it), ``"recompute"`` (below),
    ``"packed_weights"`` (a second copy of the frozen weights in the layout that the CPU multiplies fastest; ``report()`` tells
    its size), ``"in_place"`` (eager mode writes over what nobody reads afterwards), ``"bf16_attention"`` and ``"bf16_kept"``
    (below), ``"cuda_graphs"`` (Inductor on CUDA replays the step as one CUDA graph for each batch size).
    ``precision="bf16"`` multiplies with frozen weights in bfloat16, attends in it and, under Inductor, keeps in it what norms
    and products leave for the backward pass, unless that is disabled. All else is float32, the clip and its sums included:
    about half the time on a CPU that has such products, the same sensitivity, gradients rounded to about three digits.
    ``memory_budget`` is a share of the most bytes of intermediate values that the step holds at once, inputs and packed
    weights not counted. Below 1, values are computed again instead of kept, the cheapest first, until it is met; 0 asks for
    the least that can be had. The same numbers, bit for bit; ``report()`` tells the peak. Inductor orders values by itself, and
    refuses a budget below 1. Exports run the graph without it.
    ``dynamic_shapes`` says, as for ``torch.export``, which dimensions have the padded length, a **public** number:
    ``{"input_ids": {1: T}, "attention_mask": {1: T}}`` with ``T = torch.export.Dim("T", min=8, max=128)``. One graph then
    serves every length from min to max; by default the length is that of ``example_batch``.
    Raises :class:`CompileRefused` when the model cannot be made private as its author meant it, and
    :class:`SealBroken` when the rewritten graph does not match the template that bounds its sensitivity.
    """
    check_arguments(model, loss_fn, clipping)
    chosen = trainable if isinstance(trainable, str) else tuple(names_in(trainable, "trainable"))
    left_out, disable = tuple(names_in(exclude, "exclude")), tuple(names_in(disable, "disable"))
    device = device_of(model)
    check_lowering(backend, disable, precision, memory_budget, device)
    prepare(backend, device)
    if (noise_multiplier is None) != (expected_batch_size is None):
        raise CompileRefused("Give noise_multiplier and expected_batch_size together, or neither.")
    noise = None
    if noise_multiplier is not None and expected_batch_size is not None:
        noise = Noise(float(noise_multiplier), float(expected_batch_size))
    clip = AutomaticClipping() if clipping is None else clipping
    if dropout and dynamic_shapes:
        raise CompileRefused(
            "dynamic_shapes and dropout=True cannot be combined: how many random numbers a sample draws depends on its length. "
            "Compile once per length, or leave dropout off."
        )
    length = dynamic_length(dynamic_shapes, example_batch, model)
    source = Source(
        model,
        loss_fn,
        example_batch,
        chosen,
        clip,
        noise,
        public_tensors,
        left_out,
        add_bias,
        ghost_norms,
        dropout,
        length,
        memory_budget,
    )
    # The caller's modes are not the model's: captured under no_grad it would have no gradient.
    modes = torch.inference_mode(False), torch.enable_grad(), torch.autograd.set_detect_anomaly(False)
    with warnings.catch_warnings(), modes[0], modes[1], modes[2]:
        warnings.simplefilter("ignore")
        captured = _capture(source, observer, disable)
        step = PrivateStep(source, captured, observer, backend, disable, precision)
    check_rows(step)
    return step


def _capture(source: Source, observer: Observer | None, disable: Sequence[str] = ()) -> JointGraph:
    """Captured and checked. Biases that an earlier run added are added ones again: same graph, same parameters."""
    if not source.add_bias:
        return _checked(source, observer, disable)
    with bias_slots.taken_off(source.model) as kept:
        captured = _checked(source, observer, disable) if kept else None
    if captured is not None and kept.keys() <= {b.name for b in captured.added}:
        return dataclasses.replace(captured, state={**captured.state, **kept})
    return _checked(source, observer, disable)  # none, or some of them are no longer trained and stay as they are


def _checked(source: Source, observer: Observer | None, disable: Sequence[str]) -> JointGraph:
    """Captured, and its meaning checked. An optimization that fails, or that the check does not believe, is left out, and the
    report says so. What fails without it too is raised."""
    captured = run((CAPTURE, *PIPELINE[:DEAD_TOKENS]), source, observer, disable)
    rest = PIPELINE[DEAD_TOKENS:MEANING]
    try:
        return run(rest, captured, observer, disable)
    except Exception as error:
        if DEAD in disable:
            raise
        refused = isinstance(error, CompileRefused)
        why = "the check of meaning refused the smaller graph" if refused else f"the pass failed ({error!r:.200})"
    plain = run(rest, captured, observer, (*disable, DEAD))
    return dataclasses.replace(plain, optimized=(*plain.optimized, f"dead tokens: left out, for {why}"))


# What the other rows may hold, in turn: a comparison with NaN is false, so NaN alone would hide a mix behind a threshold.
SPOILS = ((float("nan"),), (float("inf"), 1e4, -1e4))


def _spoiled(x: torch.Tensor, others: list[int], values: tuple[float, ...]) -> torch.Tensor:
    garbage = x.clone()
    for at, row in enumerate(others):
        garbage[row] = values[at % len(values)] if x.dtype.is_floating_point else 0
    return garbage


def check_rows(
    step: PrivateStep, lengths: Sequence[int] = (), run: Callable[..., torch.Tensor] | None = None
) -> None:
    """Perturbation of what finally runs (design §4): with one row unmasked, the others may be anything, bit for bit.

    The row may also stand anywhere: twins in other places, and in batches of another size, contribute the same, up to the
    rounding of kernels that split a batch. With a dynamic length: at the lengths given, else at every one that is to be checked.
    ``run``: what computes it, ``(batch, mask, accumulator) -> accumulator'``; by default the lowered step.
    """
    dynamic, run = step.dynamic_length, run or step._lowered
    if dynamic is None:
        _check_rows(step, step._example_leaves(), run)
    else:
        for length in lengths or dynamic.checked:
            _check_rows(step, resized(step._example_leaves(), step._leaf_names, dynamic, length), run)


def _check_rows(step: PrivateStep, example: list[torch.Tensor], run: Callable[..., torch.Tensor]) -> None:
    coarse = step.precision != "float32" or any(t.dtype.itemsize < 4 for t in step.joint.targets)

    def tolerance(*contributions: torch.Tensor) -> float:
        """Relative to the contributions, which a large R does not clip, but for rounding of gradients that nearly cancel."""
        return (2e-2 if coarse else 1e-4) * max(min(step.max_grad_norm, 1.0), *(float(c.norm()) for c in contributions))

    example = _contributing_first(step, example)
    spoils = SPOILS if any(x.dtype.is_floating_point for x in example) else SPOILS[:1]  # integers become 0 in each
    alone: dict[int, torch.Tensor] = {}  # by the example's row: the same in every place of a batch of any size
    # The larger batch costs most, so that each of its rows meets one of the changes, and all of its rows meet all.
    for size, period, rows, all_changes in ((3, example[0].shape[0], (0, 1, 2), True), (8, 2, (0, 1, 4, 7), False)):
        index = torch.arange(size) % period
        leaves = [x[index.to(x.device)] for x in example]
        for turn, row in enumerate(rows):
            others = [i for i in range(size) if i != row]
            flipped = torch.arange(size)
            flipped[others] = flipped[others].flip(0)
            changed = [[_spoiled(x, others, values) for x in leaves] for values in spoils]
            changed.append([x[flipped.to(x.device)] for x in leaves])
            mask = torch.zeros(size, device=step.device)
            mask[row] = 1.0
            results = []
            for batch in (leaves, *(changed if all_changes else [changed[turn % len(changed)]])):
                try:
                    results.append(run(batch, mask, step.zero_accumulator()))
                except RuntimeError as error:
                    refusal = _does_not_run(step, error) if batch is leaves else _stops_at_a_record(error)
                    raise too_little_memory(error, size) or refusal from error
            if not all(torch.equal(results[0], r) for r in results[1:]):
                raise SealBroken(
                    "After lowering, one sample's contribution changes with the other rows of its batch: the backend or "
                    "a pass mixes rows. The step is refused."
                )
            twin = alone.setdefault(int(index[row]), results[0])
            if bool((results[0] - twin).abs().max() > tolerance(results[0], twin)):
                raise SealBroken(
                    "After lowering, one sample's contribution changes with its place in the batch, or with the "
                    "batch's size: the backend or a pass mixes rows. The step is refused."
                )
    mask = torch.ones(example[0].shape[0], device=step.device)
    with torch.no_grad():
        (proved,) = step.partial.module(*step.partial.values(example), mask, step.zero_accumulator())
    runs = run(example, mask, step.zero_accumulator())
    if not torch.allclose(runs, proved, rtol=0.0, atol=tolerance(*alone.values()) * len(mask), equal_nan=True):
        raise SealBroken(
            f"After lowering, the clipped sum is off by {float((runs - proved).abs().max()):.1e} from that of the proved "
            "graph. The step is refused."
        )


def _does_not_run(step: PrivateStep, error: RuntimeError) -> CompileRefused:
    return CompileRefused(
        f"The step does not run as lowered for backend={step.backend!r}, precision={step.precision!r} ({str(error)[:300]}). Try "
        f"another of them, or disable= one of {', '.join(OPTIMIZATIONS)}."
    )


def _stops_at_a_record(error: RuntimeError) -> CompileRefused:
    return CompileRefused(
        f"The step fails when another row of its batch holds NaN, inf or zeros ({str(error)[:200]}): one bad record would stop a "
        "run and show itself. Replace the operator that raises."
    )


def _contributing_first(step: PrivateStep, example: list[torch.Tensor]) -> list[torch.Tensor]:
    """The example from its first row on that contributes something: a sum of nothing is the same whatever it depends on."""
    rows = example[0].shape[0]
    for first, mask in enumerate(torch.eye(rows, device=step.device)):
        try:
            found = step._lowered(example, mask, step.zero_accumulator())
        except RuntimeError:  # a step that runs for some sizes alone, which the checks that follow say better
            return example
        if bool(found.count_nonzero()):
            return [torch.cat([x[first:], x[:first]]) for x in example]
    raise SealBroken(
        "After lowering, no row of example_batch contributes anything, so that it cannot show whether rows mix. The step is "
        "refused."
    )


__all__ = ["PrivateStep", "compile"]
