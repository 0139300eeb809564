"""Who is measured. Each takes a case and gives one whole training step: gradients, clip, noise, and SGD on what is trained.

Private steps add noise of multiplier 1. Opacus and fastDP draw theirs from torch's generator, as they do by default; ours
from a cryptographic one, as always. A system that cannot run a model raises, and the table says what it said.
"""

from __future__ import annotations

import importlib
import os
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

import dpbitfit_fx as dpb
from dpbitfit_fx.ort_backends import Backend, load_artifacts
from dpbitfit_fx.ort_runner import read_manifest
from dpbitfit_fx.randomness import SecretKey, stream

from .models import Batch, Case

Step = Callable[[], Any]
RATE = 1e-4


def _loss(case: Case) -> Callable[[nn.Module, Batch], Tensor]:
    forward, criterion = case.forward, case.criterion

    def loss(model: nn.Module, batch: Batch) -> Tensor:
        return criterion(forward(model, batch), batch)

    return loss


def _train_only(case: Case, biases: bool) -> list[nn.Parameter]:
    """requires_grad on for the biases and the head, or for all."""
    wanted = set(case.bias_names())
    for name, p in case.model.named_parameters():
        p.requires_grad_(name in wanted or not biases)
    return [p for p in case.model.parameters() if p.requires_grad]


def _tuning(optimizer: Any, value: Callable[[], Any]) -> Step:
    """The step that all of torch's users write; hooks and optimizers of a privacy library are inside."""

    def step() -> None:
        optimizer.zero_grad()
        value().backward()
        optimizer.step()

    return step


def forward_only(case: Case) -> Step:
    loss = _loss(case)

    def step() -> None:
        with torch.no_grad():
            loss(case.model, case.batch)

    return step


def _plain(case: Case, biases: bool, compiled: bool = False, autocast: bool = False) -> Step:
    trained, loss = _train_only(case, biases), _loss(case)
    optimizer = torch.optim.SGD(trained, lr=RATE)
    mean: Callable[[nn.Module, Batch], Tensor] = lambda model, batch: loss(model, batch).mean()  # noqa: E731
    run = torch.compile(mean) if compiled else mean

    def value() -> Tensor:
        with torch.autocast(case.batch["labels"].device.type, dtype=torch.bfloat16, enabled=autocast):
            return run(case.model, case.batch)

    return _tuning(optimizer, value)


def _hooked(case: Case) -> nn.Module:
    """In train mode, where alone Opacus's hooks see activations; normalisation by batch statistics stays off."""
    case.model.train()
    for module in case.model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.eval()
    return case.model


def _opacus(case: Case, biases: bool) -> Step:
    opacus, optimizers = importlib.import_module("opacus"), importlib.import_module("opacus.optimizers")
    trained, loss = _train_only(case, biases), _loss(case)
    model = opacus.GradSampleModule(_hooked(case))
    optimizer = optimizers.DPOptimizer(
        torch.optim.SGD(trained, lr=RATE),
        noise_multiplier=1.0,
        max_grad_norm=1.0,
        expected_batch_size=len(case.batch["labels"]),
    )

    return _tuning(optimizer, lambda: loss(model, case.batch).mean())


def _opacus_ghost(case: Case) -> Step:
    grad_sample = importlib.import_module("opacus.grad_sample")
    optimizers = importlib.import_module("opacus.optimizers")
    ghost = importlib.import_module("opacus.utils.fast_gradient_clipping_utils")
    trained = _train_only(case, biases=False)
    model = grad_sample.GradSampleModuleFastGradientClipping(_hooked(case), max_grad_norm=1.0, use_ghost_clipping=True)
    optimizer = optimizers.DPOptimizerFastGradientClipping(
        torch.optim.SGD(trained, lr=RATE),
        noise_multiplier=1.0,
        max_grad_norm=1.0,
        expected_batch_size=len(case.batch["labels"]),
    )

    class Criterion:
        reduction = "mean"

        def __call__(self, logits: Tensor, batch: Batch) -> Tensor:
            return case.criterion(logits, batch)

    criterion = ghost.DPLossFastGradientClipping(model, optimizer, Criterion())

    return _tuning(optimizer, lambda: criterion(case.forward(model, case.batch), case.batch))


def vmap_grad(case: Case) -> Step:
    """Per-sample gradients of the biases by torch.func, of the exported model: vmap stops at transformers' masks otherwise."""
    loss, trained = _loss(case), dict.fromkeys(case.bias_names())
    parameters = {f"model.{k}": v.detach() for k, v in case.model.named_parameters() if k in trained}

    class Called(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = case.model

        def forward(self, batch: Batch) -> Tensor:
            return loss(self.model, batch)

    exported = torch.export.export(Called(), ({k: v[:1] for k, v in case.batch.items()},)).module()

    def one(biases: dict[str, Tensor], sample: Batch) -> Tensor:
        value: Tensor = functional_call(exported, biases, ({k: v[None] for k, v in sample.items()},))[0]
        return value

    gradients = vmap(grad(one), in_dims=(None, 0))

    def step() -> None:
        found = gradients(parameters, case.batch)
        norms = torch.stack([g.flatten(1).norm(dim=1) for g in found.values()]).norm(dim=0)
        scale = (1.0 / (norms + 1e-6)).clamp(max=1.0)
        for name, g in found.items():
            total = torch.einsum("b,b...->...", scale, g)
            parameters[name].sub_(RATE * (total + torch.randn_like(total)) / len(scale))

    return step


def _fastdp(case: Case, biases: bool) -> Step:
    checkout = os.environ.get("FASTDP")
    if not checkout:
        raise RuntimeError("no checkout of fast-differential-privacy given (--fastdp)")
    sys.path.insert(0, checkout)
    engine = importlib.import_module("fastDP").PrivacyEngine(
        case.model,
        batch_size=len(case.batch["labels"]),
        sample_size=100_000,
        noise_multiplier=1.0,
        epochs=1,
        clipping_mode="MixOpt",
    )
    trained, loss = _train_only(case, biases), _loss(case)
    optimizer = torch.optim.SGD(trained, lr=RATE)
    engine.attach(optimizer)

    return _tuning(optimizer, lambda: loss(case.model, case.batch).mean())


def _compiled(case: Case, **options: Any) -> dpb.PrivateStep:
    example = {k: v[: max(2, min(3, len(v)))].clone() for k, v in case.batch.items()}
    if len(case.batch["labels"]) < 2:
        example = {k: torch.cat([v, v.roll(1, -1) if v.ndim > 1 else v]) for k, v in case.batch.items()}
    rows = len(case.batch["labels"])
    return dpb.compile(
        case.model,
        _loss(case),
        example,
        trainable=list(case.patterns),
        noise_multiplier=1.0,
        expected_batch_size=rows,
        **options,
    )


def _ours(case: Case, **options: Any) -> Step:
    step, rows = _compiled(case, **options), len(case.batch["labels"])
    if set(step.trainable_names) != set(case.bias_names()):
        raise RuntimeError("ours trains other parameters than the systems beside it")
    mask, zero = torch.ones(rows, device=step.device), step.zero_accumulator()
    optimizer = torch.optim.SGD(list(step.parameters().values()), lr=RATE)
    key, count = SecretKey.generate(), iter(range(10**9))

    def run() -> None:
        with torch.no_grad():
            total = step.accumulate(case.batch, mask, zero)
            noise = torch.from_numpy(stream(key, "noise", next(count)).normal(step.num_trainable))
            released = step.unflatten(step.privatize(total, noise.to(step.device, step.dtype)))
            for name, p in step.parameters().items():
                p.grad = released[name]
        optimizer.step()

    return run


def unclipped(case: Case, **options: Any) -> Step:
    """Our step without DP: in the lowered graph sum_b g[b, :] stands where sum_b c[b] g[b, :] did, [B, D] -> [D].

    Every gradient is summed over the batch where it is made, as ordinary tuning would, so no [B, D] is held and no norm taken.
    """
    with mock.patch.object(importlib.import_module("dpbitfit_fx.compile"), "check_rows"):  # nothing private comes of it
        step, rows = _compiled(case, ghost_norms=False, **options), len(case.batch["labels"])
    lowered = step._lowered
    graph = lowered.joint.module.graph
    aten = torch.ops.aten
    found = 0
    for product in [n for n in graph.nodes if n.target is aten.mm.default]:
        masked = product.args[1]  # where(finite, cat([g_1 [B, d_1], ..], 1), 0)
        if masked.target is not aten.where.ScalarOther or masked.args[1].target is not aten.cat.default:
            continue
        sums = []
        for gradient in masked.args[1].args[0]:
            with graph.inserting_after(gradient):
                sums.append(graph.call_function(aten.sum.dim_IntList, (gradient, [0])))
        with graph.inserting_before(product):
            flat = graph.call_function(aten.cat.default, (sums,))
            product.replace_all_uses_with(graph.call_function(aten.unsqueeze.default, (flat, 0)))
        found += 1
    if not found or any("ghost" in str(i) for i in step.report().optimized):
        raise RuntimeError("the clip of the lowered graph has another shape than this benchmark knows")
    graph.eliminate_dead_code()
    lowered.joint.module.recompile()
    lowered.runner.load(lowered.joint)
    optimizer = torch.optim.SGD(list(step.parameters().values()), lr=RATE)
    mask, zero = torch.ones(rows), step.zero_accumulator()

    def run() -> None:
        total = step.unflatten(step.accumulate(case.batch, mask, zero) / rows)
        for name, p in step.parameters().items():
            p.grad = total[name]
        optimizer.step()

    return run


def load_export(
    export: Callable[..., Path], step: dpb.PrivateStep, folder: Path, batch: Batch
) -> tuple[Backend, dict[str, Any]]:
    """Exports the step to the folder; what runs it, and the batch as it takes it."""
    export(step, folder)
    manifest = read_manifest(folder)
    given = {entry["name"]: batch[entry["path"]].numpy() for entry in manifest["batch_inputs"]}
    return load_artifacts(folder, manifest), given


def in_onnxruntime(case: Case) -> Step:
    """The plain export in ONNX Runtime, a whole logical step of one micro-batch, as the torch-free runner takes it."""
    step, folder = _compiled(case), tempfile.TemporaryDirectory()
    backend, given = load_export(dpb.export_onnx, step, Path(folder.name) / "export", case.batch)
    mask, key, count = np.ones(len(case.batch["labels"]), np.float32), SecretKey.generate(), iter(range(10**9))
    size = step.num_trainable
    del step

    def run() -> None:
        backend.begin()
        backend.accumulate(given, mask, np.zeros(size, np.float32))
        backend.update(stream(key, "noise", next(count)).normal(size).astype(np.float32), RATE)
        assert folder is not None  # lives as long as the step does

    return run


@dataclass(frozen=True)
class System:
    build: Callable[[Case], Step]
    what: str
    cuda: bool = True


SYSTEMS: dict[str, System] = {
    "bias": System(lambda c: _plain(c, True), "non-private bias tuning, eager"),
    "bias-compile": System(lambda c: _plain(c, True, compiled=True), "non-private bias tuning, torch.compile"),
    "bias-autocast": System(lambda c: _plain(c, True, autocast=True), "non-private bias tuning, bfloat16 autocast"),
    "full": System(lambda c: _plain(c, False), "non-private full tuning, eager"),
    "full-compile": System(lambda c: _plain(c, False, compiled=True), "non-private full tuning, torch.compile"),
    "forward": System(forward_only, "forward pass alone"),
    "ours": System(_ours, "**ours**, eager"),
    "ours-bf16": System(lambda c: _ours(c, precision="bf16"), "**ours**, eager, `precision=\"bf16\"`"),
    "ours-inductor": System(lambda c: _ours(c, backend="inductor"), "**ours**, Inductor"),
    "ours-inductor-bf16": System(
        lambda c: _ours(c, backend="inductor", precision="bf16"), "**ours**, Inductor, `precision=\"bf16\"`"
    ),
    "ours-onnx": System(in_onnxruntime, "**ours**, ONNX Runtime", cuda=False),
    "ours-frugal": System(lambda c: _ours(c, memory_budget=0.45), "**ours**, eager, `memory_budget=0.45`"),
    "ours-unpacked": System(lambda c: _ours(c, disable="packed_weights"), "**ours**, eager, without packed weights"),
    "ours-unshared": System(lambda c: _ours(c, disable="in_place"), "**ours**, eager, without writing in place"),
    "ours-unclipped": System(unclipped, "ours without DP (no clip, no noise)"),
    "ours-inductor-unclipped": System(
        lambda c: unclipped(c, backend="inductor"), "ours without DP (no clip, no noise), Inductor"
    ),
    "opacus-bias": System(lambda c: _opacus(c, True), "Opacus, bias only"),
    "opacus-full": System(lambda c: _opacus(c, False), "Opacus, full"),
    "opacus-ghost": System(_opacus_ghost, "Opacus, full, ghost clipping"),
    "vmap": System(vmap_grad, "`vmap(grad)` of the biases"),
    "fastdp-bias": System(lambda c: _fastdp(c, True), "fastDP, bias only"),
    "fastdp-full": System(lambda c: _fastdp(c, False), "fastDP, full"),
}
