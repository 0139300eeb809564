"""Whole runs of `fit` and of the runner without torch on two neighbouring datasets; what each step gives the optimizer."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import math
import os
import tempfile
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pytest
import torch
from fit_cases import Crash, biases, crash_at, momentum
from onnx_cases import has_ort_training
from rank_cases import of_rank_0
from replay_cases import BUCKETS, MODELS, SIGMA, Array, Cell, Tally, World, judge, make_world
from torch import Tensor, nn

import dpbitfit_fx as dpb
from dpbitfit_fx.errors import CompileRefused, RankError
from dpbitfit_fx.fit import fit
from dpbitfit_fx.lowering import check_lowering
from dpbitfit_fx.passes.clipping import Clipping
from dpbitfit_fx.progress import StepInfo
from dpbitfit_fx.randomness import SecretKey
from dpbitfit_fx.sampling import PoissonSampler

DELTA, EVERY, RATE = 1e-3, 10, 0.1


@dataclass
class Trace:
    """What a run gave its optimizer in every step, and what it held after it: both released."""

    given: list[Array] = field(default_factory=list)
    held: list[Any] = field(default_factory=list)

    def see(self, step: int, given: Array, held: Any) -> None:
        if step < len(self.given):  # taken again after a resume
            assert np.array_equal(self.given[step], given), "a replayed step releases another value"
            return
        assert step == len(self.given)
        self.given.append(given)
        self.held.append(held)


@dataclass(frozen=True)
class Side:
    """One of the two runs: its records, and the trace that it has to follow (the neighbour's run), or none."""

    world: World
    larger: bool
    follow: Trace | None
    clipping: Clipping
    steps: int
    seed: int
    resume: bool

    def lives(self) -> Iterator[list[Callable[[StepInfo], None]]]:
        """Callbacks of the processes that the run takes; the first one ends between two checkpoints."""
        if self.resume:
            yield [crash_at(max(1, 2 * self.steps // 3 // EVERY * EVERY + 4))]
        yield []


class Engine(Protocol):
    """One backend at one precision. why_not: what this machine lacks for it, or None."""

    @property
    def wide(self) -> bool: ...
    def why_not(self) -> str | None: ...
    def run(self, side: Side, folder: str | None) -> Trace: ...


# -- PyTorch -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Torch:
    backend: str = "eager"
    precision: str = "float32"
    wide: bool = False
    ranks: int = 1
    noise: str = "float"

    def why_not(self) -> str | None:
        if self.ranks > 1 and os.name != "posix":
            return "its processes are forked"
        try:
            check_lowering(self.backend, (), self.precision)
        except CompileRefused as refusal:
            return str(refusal)
        return None

    def run(self, side: Side, folder: str | None) -> Trace:
        trace: Trace = (
            self._run(side, folder) if self.ranks == 1 else of_rank_0(self.ranks, lambda: self._run(side, folder))
        )
        return trace

    def _run(self, side: Side, folder: str | None) -> Trace:
        """Of this process: a rank that only helps sees no release."""
        world, trace = side.world, Trace()
        kind, rows = MODELS[world.model], world.dataset(side.larger)
        optimizer = momentum if world.place % 2 else None
        sequences: dict[str, Any] = {"padded_lengths": BUCKETS, "pad_values": kind.pad_values} if kind.padded else {}
        for callbacks in side.lives():
            model = kind.build(world.wide)
            trained = [p for name, p in model.named_parameters() if name.endswith("bias")]

            def watch(info: StepInfo, model: nn.Module = model, trained: list[nn.Parameter] = trained) -> None:
                given = torch.cat([p.grad.flatten() for p in trained if p.grad is not None])
                trace.see(info.step - 1, given.numpy().copy(), biases(model))
                if side.follow is not None:
                    with torch.no_grad():
                        for parameter, value in zip(
                            trained, _split(side.follow.held[info.step - 1], trained), strict=True
                        ):
                            parameter.copy_(value)

            with contextlib.suppress(Crash, RankError):  # the second where rank 0 crashed
                result = fit(
                    model,
                    kind.loss,
                    rows,
                    noise_multiplier=SIGMA,
                    target_delta=DELTA,
                    dataset_size=len(world.rows),
                    max_steps=side.steps,
                    expected_batch_size=world.expected,
                    physical_batch_size=world.sizes if kind.padded else world.sizes[0],
                    clipping=side.clipping,
                    backend=self.backend,
                    precision=self.precision,
                    noise=self.noise,
                    optimizer=optimizer,
                    learning_rate=RATE,
                    output_dir=folder,
                    checkpoint_every=EVERY,
                    callbacks=[watch, *callbacks],
                    progress=False,
                    insecure_seed_for_tests=side.seed,
                    **sequences,
                )
        assert (result.steps, result.charged_steps) == (side.steps, 0)
        return trace

    def sees_nothing_else(self, side: Side, trace: Trace) -> bool:
        """Whether a new optimizer that is given the releases, and nothing else, comes by every released parameter."""
        trained = [p for n, p in MODELS[side.world.model].build(side.world.wide).named_parameters() if n[-4:] == "bias"]
        optimizer = momentum(trained) if side.world.place % 2 else torch.optim.Adam(trained, lr=RATE)
        for given, held in zip(trace.given, trace.held, strict=True):
            for parameter, gradient in zip(trained, _split(torch.from_numpy(given), trained), strict=True):
                parameter.grad = gradient.clone()
            optimizer.step()
            if not torch.equal(torch.cat([p.detach().flatten() for p in trained]), held):
                return False
        return True


def _split(flat: Tensor, like: list[nn.Parameter]) -> list[Tensor]:
    pieces = torch.split(flat, [p.numel() for p in like])
    return [piece.view(p.shape) for piece, p in zip(pieces, like, strict=True)]


# -- ONNX --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Onnx:
    """AdamW. What the plain pair's optimizer was given is its first moment, which is released, where beta_1 is 0; ONNX Runtime
    Training's is in its gradient buffers."""

    target: str
    wide: bool = False

    def why_not(self) -> str | None:
        missing = [name for name in ("onnx", "onnxscript", "onnxruntime") if importlib.util.find_spec(name) is None]
        if missing:
            return f"{', '.join(missing)} is not installed"
        if self.target == "ort_training" and not has_ort_training():
            return "onnxruntime-training-cpu is not installed"
        return None

    def run(self, side: Side, folder: str | None) -> Trace:
        from dpbitfit_fx.ort_backends import PlainBackend
        from dpbitfit_fx.ort_runner import OrtTrainer

        world, trace = side.world, Trace()
        kind = MODELS[world.model]
        exported = export(self.target, world.model, side.clipping, world.expected, world.wide)
        sequences: dict[str, Any] = {"padded_lengths": BUCKETS} if kind.padded else {}
        for callbacks in side.lives():
            trainer = OrtTrainer(
                exported,
                world.dataset(side.larger),
                steps=side.steps,
                target_delta=DELTA,
                learning_rate=RATE,
                physical_batch_size=world.sizes if kind.padded else world.sizes[0],
                pad_values=dict(kind.pad_values),
                output_dir=folder,
                checkpoint_every=EVERY,
                insecure_seed_for_tests=side.seed,
                **sequences,
            )

            def watch(info: StepInfo, trainer: OrtTrainer = trainer) -> None:
                backend: Any = trainer.run.backend
                plain = isinstance(backend, PlainBackend)
                held = {"theta": backend.flat(), **backend.optimizer_state()} if plain else backend.flat()
                given = held["m"] if plain else backend.gradient_buffers() / np.float64(world.expected)
                trace.see(info.step - 1, given, held)
                if side.follow is None:
                    return
                held = side.follow.held[info.step - 1]
                if plain:
                    backend.restore(held["theta"], {name: value for name, value in held.items() if name != "theta"})
                else:
                    backend.set_flat(held)

            with trainer, contextlib.suppress(Crash):
                trainer.train(callbacks=[watch, *callbacks])
        assert (trainer.step, trainer.statement().lost_steps) == (side.steps, 0)
        return trace


@functools.cache
def _exports() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory()


@functools.cache
def export(target: str, model: str, clipping: Clipping, expected: float, wide: bool) -> Path:
    """One export for each of these; gone when the process ends."""
    from dpbitfit_fx.onnx_export import AdamW
    from dpbitfit_fx.ort_export import export_ort_training

    kind = MODELS[model]
    generator, longest = torch.Generator().manual_seed(0), BUCKETS[-1]
    rows = [kind.record(generator, index, wide) | {"weight": 1.0} for index in range(4)]
    example = {
        name: torch.stack([_stretched(row[name], longest if name in kind.padded else 0) for row in rows])
        for name in rows[0]
    }
    size = torch.export.Dim("padded_length", min=BUCKETS[0], max=longest)
    step = dpb.compile(
        kind.build(wide),
        kind.loss,
        example,
        clipping=clipping,
        noise_multiplier=SIGMA,
        expected_batch_size=expected,
        dynamic_shapes={name: {1: size} for name in kind.padded} or None,
    )
    folder = Path(_exports().name) / f"{target}-{model}-{clipping.kind}-{expected}-{wide}"
    if target == "ort_training":
        return export_ort_training(step, folder)
    made: Path = dpb.export_onnx(step, folder, optimizer=AdamW(betas=(0.0, 0.999)))
    return made


def _stretched(value: Any, length: int) -> Tensor:
    tensor = torch.as_tensor(value)
    return tensor[torch.arange(length) % len(tensor)] if length else tensor


ENGINES: dict[str, Engine] = {
    "eager float32": Torch(wide=True),
    "eager float32, 2 ranks": Torch(ranks=2),
    "eager grid": Torch(wide=True, noise="grid"),
    "eager bf16": Torch(precision="bf16", wide=True),
    "onnx float32": Onnx("onnx"),
    "ort_training float32": Onnx("ort_training"),
    "inductor float32": Torch("inductor", wide=True),
    "inductor bf16": Torch("inductor", precision="bf16", wide=True),
}


# -- pairs -------------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def same_draws(world: World, larger: bool) -> Iterator[None]:
    """The smaller dataset's draws are the larger one's without its own record, whatever the row numbers. The larger one's
    are the sampler's own. The runner without torch takes N from its records; here it is public, and of the larger one."""
    with pytest.MonkeyPatch.context() as patch:
        real = PoissonSampler.draw

        def draw(self: PoissonSampler, key: SecretKey, step: int) -> Array:
            rows = real(PoissonSampler(len(world.rows), world.rate, self.steps), key, step)
            rows = rows[rows != world.place]
            result: Array = rows - (rows > world.place)
            return result

        if not larger:
            patch.setattr(PoissonSampler, "draw", draw)
        yield


def compare(cell: Cell, world: World, steps: int, seed: int) -> Tally:
    """One run on each of the two datasets: as many pairs as steps draw the record."""
    engine = ENGINES[cell.engine]

    def trace(larger: bool, follow: Trace | None) -> tuple[Side, Trace]:
        side = Side(world, larger, follow, cell.clipping, steps, seed, cell.resume)
        with same_draws(world, larger), tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return side, engine.run(side, folder if cell.resume else None)

    try:
        side, ours = trace(not world.added, None)
    except CompileRefused as refusal:  # the grid's, where a kernel's bits differ from place to place of a batch
        if "Pass physical_batch_size=1" not in str(refusal):
            raise
        world = replace(world, sizes=(1,) * len(world.sizes))
        side, ours = trace(not world.added, None)
    _, theirs = trace(world.added, ours)
    key = SecretKey.insecure_for_tests(seed)
    sampler = PoissonSampler(len(world.rows), world.rate, steps)
    found = judge(world, [sampler.draw(key, step).tolist() for step in range(steps)], ours.given, theirs.given)
    found.unseen = int(isinstance(engine, Torch) and not engine.sees_nothing_else(side, ours))
    return found


def examine(cell: Cell, pairs: int, seed: int, first: int = 0) -> Tally:
    """Worlds from the `first` on, until there are `pairs` of them."""
    found, number = Tally(), first
    while found.pairs < pairs:
        world = make_world(cell.model, number, seed, wide=ENGINES[cell.engine].wide)
        wanted = pairs - found.pairs
        steps = math.ceil((wanted + 2 * math.sqrt(wanted)) / world.rate) + 2
        found.add(compare(cell, world, max(steps, 2 * EVERY), seed + number))
        number += 1
    return found
