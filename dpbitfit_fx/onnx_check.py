"""The numeric check of every export: what onnxruntime computes at ORT_ENABLE_ALL against the PyTorch step.

onnxruntime's optimizer has been seen to miscompile correct graphs, silently, so a graph is believed only once it has
run.
The inputs are made from the step's (public) example batch.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import torch

from dpbitfit_fx.errors import ExportError
from dpbitfit_fx.onnx_export import (
    SGD,
    AdamW,
    Layout,
    Optimizer,
    Parameter,
    flat_parameters,
    layout_of,
    live_parameters,
)
from dpbitfit_fx.ort_artifacts import graph_file
from dpbitfit_fx.ort_device import open_session
from dpbitfit_fx.passes.lengths import resized
from dpbitfit_fx.passes.torch_private import leaf_names, tree_flatten, tree_unflatten

BATCH_SIZES: Final = (3, 1, 8)
Array = npt.NDArray[Any]


class Probes:
    """Batches, masks, accumulators and noise for the check: the example's rows, rolled and jittered, seeded."""

    def __init__(self, step: Any, seed: int = 0, more: Sequence[int] = ()) -> None:
        self.step = step
        self.leaves, self.spec = tree_flatten(step.example_batch)
        self.random = np.random.default_rng(seed)
        self.dynamic = step.dynamic_length
        self.lengths = [] if self.dynamic is None else sorted({*self.dynamic.checked, *more})

    def length(self, number: int) -> int | None:
        """In turn every length at which the step was checked, and ``more``; None where its length is fixed."""
        return self.lengths[number % len(self.lengths)] if self.lengths else None

    def batch(self, rows: int, length: int | None = None) -> list[torch.Tensor]:
        """``rows`` rows, of the example's own length or of this one."""
        start = int(self.random.integers(0, 1 << 16))
        result = []
        leaves = self.leaves
        if length is not None:
            leaves = resized(leaves, leaf_names(self.step.example_batch), self.dynamic, length)
        for leaf in leaves:
            index = torch.arange(start, start + rows) % leaf.shape[0]
            x = leaf.detach()[index].clone()
            if x.dtype == torch.float32:
                scale = float(x.std()) if x.numel() > 1 else 1.0
                x = x + torch.from_numpy(self.random.normal(size=tuple(x.shape)).astype(np.float32)) * 0.1 * scale
            elif x.dim() >= 2 and x.dtype == torch.int64 and int(x.max()) > 1:
                # Token ids: other orders of the record's own ids. 0/1 masks stay, so that padding stays padding.
                for row in range(rows):
                    x[row] = torch.roll(x[row], int(self.random.integers(0, x.shape[1])), 0)
            result.append(x)
        return result

    def mask(self, rows: int) -> torch.Tensor:
        mask = torch.ones(rows)
        if rows > 1:
            mask[int(self.random.integers(0, rows))] = 0
        return mask

    def normal(self, size: int) -> torch.Tensor:
        return torch.from_numpy(self.random.normal(size=size).astype(np.float32))

    def tree(self, leaves: Sequence[torch.Tensor]) -> Any:
        return tree_unflatten(list(leaves), self.spec)


@contextmanager
def parameters_set(
    step: Any, layout: Layout, flat: Array, parameters: Sequence[Parameter] | None = None
) -> Iterator[None]:
    """The trainables (or these parameters) of the user's model hold ``flat`` inside, and their own values again afterwards,
    bit for bit."""
    chosen = layout.parameters if parameters is None else parameters
    named = live_parameters(step)
    kept = {p.name: named[p.name].detach().clone() for p in chosen}
    try:
        with torch.no_grad():
            for p in chosen:
                named[p.name].copy_(torch.from_numpy(flat[p.offset : p.offset + p.numel].reshape(p.shape).copy()))
        yield
    finally:
        with torch.no_grad():
            for name, value in kept.items():
                named[name].copy_(value)


def make_session(path: Path) -> Any:
    """An InferenceSession on the CPU at ORT_ENABLE_ALL."""
    try:
        import onnxruntime
    except ImportError as error:
        raise ExportError(
            "An export is handed over only once onnxruntime has run it, and onnxruntime is not installed: pip "
            "install 'dpbitfit_fx[ort]' "
            "(Python 3.11), or onnxruntime for export_onnx alone."
        ) from error
    try:
        return open_session(path)
    except Exception as error:
        raise ExportError(
            f"onnxruntime {onnxruntime.__version__} cannot load {path.name}: {str(error).splitlines()[0][:400]}"
        ) from error


def run_session(session: Any, feed: Mapping[str, Array], what: str) -> list[Array]:
    """``session.run`` on those of ``feed`` that it takes."""
    present = {i.name for i in session.get_inputs()}
    with running(what):
        return [np.asarray(r) for r in session.run(None, {k: v for k, v in feed.items() if k in present})]


@contextmanager
def running(what: str) -> Iterator[None]:
    """An error of onnxruntime inside becomes an ExportError: the graph is wrong, say where a shape follows the batch."""
    try:
        yield
    except Exception as error:
        raise ExportError(
            f"onnxruntime cannot run {what}: {' '.join(str(error).split())[:400]} Nothing was exported. This is a bug of "
            "the export; the PyTorch step is not affected."
        ) from error


def relative_error(got: Array, want: Array, floor: float = 0.0) -> float:
    """‖got - want‖ / max(‖want‖, floor), in float64; infinite where either is not finite."""
    a, b = np.asarray(got, np.float64).ravel(), np.asarray(want, np.float64).ravel()
    if a.shape != b.shape or not (np.isfinite(a).all() and np.isfinite(b).all()):
        return float("inf")
    return float(np.linalg.norm(a - b) / max(np.linalg.norm(b), floor, 1e-30))


def require(error: float, tolerance: float, what: str) -> None:
    if not error <= tolerance:
        raise ExportError(
            f"The exported graph does not compute what the PyTorch step computes: {what} differs by {error:.1e} "
            "relative, and "
            f"{tolerance:.0e} is allowed. Nothing was exported. This is a bug of the export or of onnxruntime; the "
            "PyTorch step is not affected. "
            "If the model amplifies rounding, pass a larger tolerance=."
        )


def _steps_of(step: Any, layout: Layout, probes: Probes, parameters: Sequence[Parameter] | None = None) -> list[Array]:
    """The model's own parameters, and others: a parameter that was folded into the graph is found by the second."""
    own = flat_parameters(step, layout.parameters if parameters is None else parameters)
    moved = own + 0.05 * probes.random.normal(size=own.shape).astype(np.float32)
    return [own, moved.astype(np.float32)]


def check_onnx(step: Any, folder: Path, *, tolerance: float = 1e-5, batch_sizes: Sequence[int] = BATCH_SIZES) -> None:
    """Compare ``grad_step.onnx`` and ``update_step.onnx`` in ``folder`` with the step.

    Raises:
        ExportError: they differ by more than ``tolerance`` relative, or a row's result depends on other rows.
    """
    manifest = json.loads((folder / "manifest.json").read_text())
    check_phase(step, folder, manifest, layout_of(step), tolerance=tolerance, batch_sizes=batch_sizes)


def check_phase(
    step: Any,
    folder: Path,
    phase: Mapping[str, Any],
    layout: Layout,
    *,
    lengths: Sequence[int] = (),
    tolerance: float = 1e-5,
    batch_sizes: Sequence[int] = BATCH_SIZES,
) -> None:
    """``check_onnx`` for one phase of a run (``phases_of``); lengths: where else to compare, besides the checked ones."""
    probes = Probes(step, more=lengths)
    grad = make_session(folder / graph_file(phase, "grad_step"))
    update = make_session(folder / graph_file(phase, "update_step"))
    size = layout.num_trainable
    extra = max(0, len(probes.lengths) - len(batch_sizes))

    def run_grad(leaves: Sequence[torch.Tensor], mask: torch.Tensor, theta: Array, accumulator: Array) -> Array:
        feed = {b.name: x.numpy() for b, x in zip(layout.batch, leaves, strict=True)}
        feed.update(sample_mask=mask.numpy(), theta=theta, held=held, accumulator=accumulator)
        return run_session(grad, feed, f"grad_step.onnx on a batch of {mask.shape[0]}")[0]

    both = zip(_steps_of(step, layout, probes), _steps_of(step, layout, probes, layout.held), strict=True)
    for theta, held in both:
        with parameters_set(step, layout, theta), parameters_set(step, layout, held, layout.held):
            for number, rows in enumerate((*batch_sizes, *[2] * extra)):
                for start in (torch.zeros(size), probes.normal(size) * (float(step.max_grad_norm) / size**0.5)):
                    leaves, mask = probes.batch(rows, probes.length(number)), probes.mask(rows)
                    with torch.no_grad():
                        want = step.accumulate(probes.tree(leaves), mask, start).numpy()
                    got = run_grad(leaves, mask, theta, start.numpy())
                    room = contributions(step, probes, leaves, mask)
                    require(relative_error(got, want, room), tolerance, f"the clipped sum of a batch of {rows}")
            check_rows(run_grad, probes, theta, size)

    check_update(step, update, optimizer_of(phase), layout, probes, tolerance, rates="learning_rates" in phase)


def contributions(step: Any, probes: Probes, leaves: Sequence[torch.Tensor], mask: torch.Tensor) -> float:
    """Σ ‖clipped gradient‖ of the unmasked rows: what a sum's rounding is relative to, also where the rows cancel."""
    total, one = 0.0, torch.ones(1)
    for row in torch.nonzero(mask).ravel().tolist():
        alone = probes.tree([x[row : row + 1] for x in leaves])  # its contribution depends on no other row
        with torch.no_grad():
            total += float(step.accumulate(alone, one, step.zero_accumulator()).norm())
    return total


def check_rows(run: Callable[..., Array], probes: Probes, theta: Array, size: int) -> None:
    """At a fixed shape, a row's clipped gradient stays bitwise the same whatever the other rows hold.

    Raises:
        ExportError: it does not.
    """
    rows, zero = 4, np.zeros(size, np.float32)
    first, second = probes.batch(rows), probes.batch(rows)
    for row in (0, rows - 1):
        mask = torch.zeros(rows)
        mask[row] = 1
        mixed = [b.clone() for b in second]
        for a, b in zip(first, mixed, strict=True):
            b[row] = a[row]
        if not np.array_equal(run(first, mask, theta, zero), run(mixed, mask, theta, zero), equal_nan=True):
            raise ExportError(
                "In the exported graph, the clipped gradient of a row depends on the other rows of its batch, so "
                "its privacy guarantee "
                "would not hold. Nothing was exported. This is a bug of the export or of onnxruntime; please report "
                "it with the model."
            )


def optimizer_of(manifest: Mapping[str, Any]) -> Optimizer:
    fields = dict(manifest["optimizer"])
    kind = fields.pop("type")
    if kind == "SGD":
        return SGD(**fields)
    fields["betas"] = tuple(fields["betas"])
    return AdamW(**fields)


def torch_optimizer(optimizer: Optimizer, parameter: torch.Tensor) -> torch.optim.Optimizer:
    if isinstance(optimizer, SGD):
        return torch.optim.SGD([parameter], lr=optimizer.lr)
    return torch.optim.AdamW(
        [parameter], lr=optimizer.lr, betas=optimizer.betas, eps=optimizer.eps, weight_decay=optimizer.weight_decay
    )


def check_update(
    step: Any,
    session: Any,
    optimizer: Optimizer,
    layout: Layout,
    probes: Probes,
    tolerance: float,
    *,
    rates: bool = False,
) -> None:
    """Three noisy updates against ``step.privatize`` and torch's optimizer; changes are compared, not parameters.

    rates: the graph takes a learning rate per value, to which the change of that value is proportional.
    """
    size = layout.num_trainable
    scale = (1 + np.arange(size) % 3).astype(np.float32) if rates else np.ones(1, np.float32)
    theta = flat_parameters(step)
    parameter = torch.nn.Parameter(torch.from_numpy(theta.copy()))
    reference = torch_optimizer(optimizer, parameter)
    state: dict[str, Array] = {"theta": theta}
    if isinstance(optimizer, AdamW):
        state.update(m=np.zeros(size, np.float32), v=np.zeros(size, np.float32), t=np.zeros(1, np.int64))
    for _ in range(3):
        accumulator, noise = probes.normal(size) * float(step.max_grad_norm), probes.normal(size)
        with torch.no_grad():
            parameter.grad = step.privatize(accumulator, noise).clone()
            if rates:
                parameter.copy_(torch.from_numpy(state["theta"]))
        before = parameter.detach().numpy().copy()
        reference.step()
        feed = {
            **state,
            "accumulator": accumulator.numpy(),
            "noise": noise.numpy(),
            "learning_rate": optimizer.lr * scale,
        }
        old = state["theta"]
        state = dict(zip(state, run_session(session, feed, "update_step.onnx"), strict=True))
        if isinstance(optimizer, AdamW):
            # Adam's steps do not change when all gradients are scaled alike, so a wrong denominator shows only here.
            moments = reference.state[parameter]
            for name, key in (("m", "exp_avg"), ("v", "exp_avg_sq")):
                error = relative_error(state[name], moments[key].numpy())
                require(error, 10 * tolerance, f"the optimizer's moment {name!r}")
        # A change of theta keeps theta's own rounding.
        room = 4e-7 * float(np.linalg.norm(before))
        want = (parameter.detach().numpy() - before) * scale
        error = max(0.0, float(np.linalg.norm((state["theta"] - old) - want)) - room) / max(
            float(np.linalg.norm(want)), 1e-30
        )
        require(error, 10 * tolerance, "the update of the parameters")


def check_ort_training(
    step: Any,
    folder: Path,
    *,
    tolerance: float = 1e-5,
    batch_sizes: Sequence[int] = BATCH_SIZES,
    eval_output: Callable[[Any, Any], Any] | None = None,
) -> None:
    """Train two logical steps from the artifacts in ``folder`` and compare gradient buffers and updates with the step.

    Raises:
        ExportError: they differ by more than ``tolerance`` relative, or a row's result depends on other rows.
    """
    from dpbitfit_fx.ort_runner import load_artifacts

    layout, probes = layout_of(step), Probes(step)
    manifest = json.loads((folder / "manifest.json").read_text())
    optimizer = optimizer_of(manifest)
    size = layout.num_trainable
    try:
        backend = load_artifacts(folder, manifest)
    except Exception as failure:
        reason = str(failure).splitlines()[0][:400]
        raise ExportError(f"ONNX Runtime Training cannot load the artifacts: {reason}") from failure

    def accumulate(leaves: Sequence[torch.Tensor], mask: torch.Tensor, noise: Array) -> None:
        batch = {b.name: x.numpy() for b, x in zip(layout.batch, leaves, strict=True)}
        with running(f"training_model.onnx on a batch of {mask.shape[0]}"):
            backend.accumulate(batch, mask.numpy(), noise)

    def run(leaves: Sequence[torch.Tensor], mask: torch.Tensor, theta: Array, noise: Array) -> Array:
        backend.set_flat(theta)
        backend.begin()
        accumulate(leaves, mask, noise)
        return backend.gradient_buffers()

    for theta in _steps_of(step, layout, probes):
        with parameters_set(step, layout, theta):
            backend.set_flat(theta)
            backend.begin()
            parameter = torch.nn.Parameter(torch.from_numpy(theta.copy()))
            total = torch.zeros(size)
            noise, room = probes.normal(size), 0.0
            for i, rows in enumerate(batch_sizes):
                leaves, mask = probes.batch(rows, probes.length(i)), probes.mask(rows)
                with torch.no_grad():
                    total = step.accumulate(probes.tree(leaves), mask, total)
                room += contributions(step, probes, leaves, mask)
                accumulate(leaves, mask, np.zeros(size, np.float32))
                error = relative_error(backend.gradient_buffers(), total.numpy(), room)
                require(error, tolerance, f"the gradient buffer after {i + 1} micro-batches")
            accumulate(probes.batch(2), torch.zeros(2), noise.numpy())
            with torch.no_grad():
                gradient = step.privatize(total, noise)
            wanted = gradient.numpy() * float(step.expected_batch_size)
            require(relative_error(backend.gradient_buffers(), wanted), tolerance, "the noisy gradient buffer")
            check_rows(run, probes, theta, size)
    check_optimizer_file(step, folder, optimizer, layout)
    # The update, from a fresh load: the moments above were never touched, the optimizer's first step is deterministic.
    backend = load_artifacts(folder, manifest)
    theta = flat_parameters(step)
    parameter = torch.nn.Parameter(torch.from_numpy(theta.copy()))
    reference = torch_optimizer(optimizer, parameter)
    for _ in range(2):
        before = parameter.detach().numpy().copy()
        with parameters_set(step, layout, before), torch.no_grad():
            leaves, mask, noise = probes.batch(3), probes.mask(3), probes.normal(size)
            parameter.grad = step.privatize(
                step.accumulate(probes.tree(leaves), mask, torch.zeros(size)), noise
            ).clone()
        reference.step()
        backend.begin()
        accumulate(leaves, mask, noise.numpy())
        old = backend.flat()
        backend.update(np.zeros(size, np.float32), optimizer.lr)
        want = parameter.detach().numpy() - before
        room = 4e-7 * float(np.linalg.norm(before))
        error = max(0.0, float(np.linalg.norm((backend.flat() - old) - want)) - room) / max(
            float(np.linalg.norm(want)), 1e-30
        )
        # Adam divides tiny gradients by themselves: an update is less exact than its gradient.
        require(error, 100 * tolerance, "the update of the parameters")
    check_eval(step, folder, manifest, layout, probes, eval_output)


def check_optimizer_file(step: Any, folder: Path, optimizer: Optimizer, layout: Layout) -> None:
    """optimizer_model.onnx is the graph that belongs to this step, to the bit.

    Running it cannot tell: Adam's steps do not change when all gradients are divided by another batch size.
    """
    import onnx

    from dpbitfit_fx.ort_export import optimizer_model

    wanted = optimizer_model(optimizer, len(layout.parameters), float(step.expected_batch_size))
    found = onnx.load(folder / "optimizer_model.onnx")
    same = found.SerializeToString(deterministic=True) == wanted.SerializeToString(deterministic=True)
    require(0.0 if same else float("inf"), 0.0, "the optimizer model")


def check_eval(
    step: Any,
    folder: Path,
    manifest: dict[str, Any],
    layout: Layout,
    probes: Probes,
    eval_output: Callable[[Any, Any], Any] | None,
) -> None:
    """eval_model.onnx against the user's model, for two batch sizes and moved parameters."""
    from dpbitfit_fx.onnx_eval import EvalModule, as_trained

    session = make_session(folder / "eval_model.onnx")
    module = EvalModule(step, layout, step.loss_fn if eval_output is None else eval_output)
    theta = _steps_of(step, layout, probes, layout.parameters)[1]
    values = {p.onnx_name: theta[p.offset : p.offset + p.numel].reshape(p.shape).copy() for p in layout.parameters}
    given = [torch.from_numpy(v) for v in values.values()]
    for number, rows in enumerate((3, 8, *[2] * max(0, len(probes.lengths) - 2))):
        leaves, mask = probes.batch(rows, probes.length(number)), probes.mask(rows)
        with as_trained(), step.biases_applied():
            if eval_output is None:  # row by row, so that it does not matter how the user's loss reduces
                kept = [module(*(x[i : i + 1] for x in leaves), *given).mean() for i in range(rows) if mask[i]]
                want = [torch.stack(kept).mean()]
            else:
                want = tree_flatten(module(*leaves, *given))[0]
        feed = {b.name: x.numpy() for b, x in zip(layout.batch, leaves, strict=True)} | values
        if eval_output is None:
            feed["sample_mask"] = mask.numpy()
        got = run_session(session, feed, f"eval_model.onnx on a batch of {rows}")
        for a, b in zip(got, want, strict=True):
            require(
                relative_error(np.asarray(a), b.numpy()), 1e-4, f"an output of eval_model.onnx on a batch of {rows}"
            )
