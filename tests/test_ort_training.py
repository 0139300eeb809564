"""ONNX Runtime Training follows the PyTorch step; a run without torch, and a resumed one, follow it exactly."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("onnx")
pytest.importorskip("onnxruntime.capi._pybind_state")
if not hasattr(sys.modules["onnxruntime.capi._pybind_state"], "save_checkpoint"):
    pytest.skip("needs onnxruntime-training-cpu", allow_module_level=True)

import onnx
from onnx_cases import CASES, compiled, flat, install

import dpbitfit_fx as dpb
from dpbitfit_fx.files import sha256_file
from dpbitfit_fx.onnx_check import torch_optimizer
from dpbitfit_fx.onnx_export import SGD, AdamW, Optimizer
from dpbitfit_fx.ort_export import export_ort_training, optimizer_model
from dpbitfit_fx.ort_runner import load_artifacts
from dpbitfit_fx.randomness import SecretKey, stream

ADAMW, PLAIN_SGD = AdamW(lr=5e-3, weight_decay=0.01), SGD(lr=0.2)


def with_sgd(folder: Path, target: Path, parameters: int) -> Path:
    """The same artifacts with the SGD optimizer: the other three files do not depend on it."""
    shutil.copytree(folder, target)
    onnx.save(optimizer_model(PLAIN_SGD, parameters, 6.0), target / "optimizer_model.onnx")
    manifest = json.loads((target / "manifest.json").read_text())
    manifest["optimizer"] = {"type": "SGD", "lr": PLAIN_SGD.lr}
    manifest["files"]["optimizer_model.onnx"] = sha256_file(target / "optimizer_model.onnx")
    (target / "manifest.json").write_text(json.dumps(manifest))
    return target


@pytest.mark.parametrize("name", ["bert", "gpt2", "resnet"])
def test_gradient_buffers_agree_over_five_steps_of_micro_batches(name: str, tmp_path: Path) -> None:
    step, data = compiled(name)
    adamw = export_ort_training(step, tmp_path / "adamw", optimizer=ADAMW, target_delta=1e-2)
    sgd = with_sgd(adamw, tmp_path / "sgd", len(step.trainable_names))
    start = {k: v.clone() for k, v in step.model.state_dict().items()}
    runs: list[tuple[Path, Optimizer, float]] = [(adamw, ADAMW, 1.0), (sgd, PLAIN_SGD, 1.0), (sgd, PLAIN_SGD, 0.0)]
    for folder, optimizer, noisy in runs:
        step.model.load_state_dict(start)
        named = dict(step.model.named_parameters())
        moving = torch_optimizer(optimizer, named[step.trainable_names[0]])
        for other in step.trainable_names[1:]:
            moving.param_groups[0]["params"].append(named[other])
        backend = load_artifacts(folder)
        random = np.random.default_rng(5)
        zero = np.zeros(step.num_trainable, np.float32)
        for _ in range(5):
            total = step.zero_accumulator()
            noise = (random.normal(size=step.num_trainable) * noisy).astype(np.float32)
            backend.begin()
            splits = [random.choice(24, size, replace=False) for size in (3, 5)]
            for i, rows in enumerate(splits):
                batch = {k: v[rows] for k, v in data.items()}
                mask = torch.ones(len(rows))
                mask[0] = float(i)
                total = step.accumulate(batch, mask, total)
                last = i == len(splits) - 1
                backend.accumulate({k: v.numpy() for k, v in batch.items()}, mask.numpy(), noise if last else zero)
            private = step.privatize(total, torch.from_numpy(noise))
            want = private.numpy() * 6.0
            got = backend.gradient_buffers()
            assert np.linalg.norm(got - want) <= 1e-5 * np.linalg.norm(want), (name, optimizer, noisy)
            install(step, private)
            moving.step()
            backend.update(zero, optimizer.lr)


RUN = """
import json, sys
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name == "torch" or name.startswith("torch."):
            raise ImportError("torch is blocked")
sys.meta_path.insert(0, Blocker())
import numpy as np
from dpbitfit_fx.ort_runner import OrtTrainer
folder, data, out = sys.argv[1:]
arrays = dict(np.load(data, allow_pickle=False))
def make(**more):
    plan = dict(steps=5, target_delta=1e-2, physical_batch_size=2, insecure_seed_for_tests=7)
    return OrtTrainer(folder, arrays, **plan, **more)
class Stop(Exception):
    pass
def stop(info):
    if info.step == 3:
        raise Stop
straight = make()
straight.train()
try:
    with make(output_dir=out, checkpoint_every=2) as first:
        first.train(callbacks=[stop])
except Stop:
    pass
second = make(output_dir=out, checkpoint_every=2)
assert second.step == 2
second.train()
assert all(np.array_equal(a, b) for a, b in zip(straight.biases().values(), second.biases().values()))
second.finish()
assert "torch" not in sys.modules
"""


@pytest.mark.parametrize("target", ["ort_training", "onnx"])
def test_a_run_without_torch_resumes_exactly_and_its_biases_load_back(target: str, tmp_path: Path) -> None:
    step, data = compiled("mlp")
    export = export_ort_training if target == "ort_training" else dpb.export_onnx
    export(step, tmp_path / "artifacts", optimizer=ADAMW)
    arrays: dict[str, Any] = {k: v.numpy() for k, v in data.items()}
    np.savez(tmp_path / "data.npz", **arrays)
    out = tmp_path / "out"
    command = [sys.executable, "-c", RUN, str(tmp_path / "artifacts"), str(tmp_path / "data.npz"), str(out)]
    root = Path(dpb.__file__).resolve().parent.parent
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr

    key = SecretKey.insecure_for_tests(7)
    sampler = dpb.sampling.PoissonSampler.from_expected_batch_size(24, 6.0, steps=5)
    named = dict(step.model.named_parameters())
    moving = torch.optim.AdamW([named[n] for n in step.trainable_names], lr=5e-3, weight_decay=0.01)
    for i in range(5):
        rows = sampler.draw(key, i)
        total = step.zero_accumulator()
        if len(rows):
            total = step.accumulate({k: v[rows] for k, v in data.items()}, torch.ones(len(rows)), total)
        noise = torch.from_numpy(stream(key, "noise", i).normal(step.num_trainable).astype(np.float32))
        install(step, step.privatize(total, noise))
        moving.step()
    fresh = CASES["mlp"]()[0]
    dpb.load_biases(fresh, out / "biases.safetensors")
    loaded = dict(fresh.named_parameters())
    got = np.concatenate([loaded[n].detach().numpy().ravel() for n in step.trainable_names])
    np.testing.assert_allclose(got, flat(step), rtol=0, atol=1e-6)
    privacy = json.loads((out / "privacy.json").read_text())
    assert privacy["steps"] == 5 and privacy["insecure"] is True and privacy["noise_multiplier"] == 0.8
