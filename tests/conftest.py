"""What every test shares: one thread, no network for Hugging Face, a fixed seed, deterministic property tests."""

from __future__ import annotations

import os
from collections.abc import Iterator

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import cuda_reference
import pytest
import torch
from hypothesis import HealthCheck, settings

from dpbitfit_fx import lowering
from dpbitfit_fx.passes import packing
from dpbitfit_fx.passes.torch_private import LINEAR

# Compiling a graph inside a property takes longer than Hypothesis's default deadline; the seed is fixed so that a red
# run is red again on the next machine.
settings.register_profile(
    "repeatable", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow], database=None
)
settings.load_profile("repeatable")
torch.set_num_threads(1)
# A CUDA build of torch that finds no GPU believes in one behind its first fake tensor, and starts threads for it at its first
# backward; no process forked later could run another. So the first is here.
torch.ones((), requires_grad=True).backward()  # type: ignore[no-untyped-call]


@pytest.fixture(autouse=True)
def fixed_seed() -> Iterator[None]:
    """Models and batches are drawn with torch's global generator; noise and Poisson draws never are."""
    torch.manual_seed(0)
    yield


@pytest.fixture
def packed_products(monkeypatch: pytest.MonkeyPatch) -> None:
    """Packed products exist wherever oneDNN does; only whether they pay depends on the CPU."""
    if LINEAR is None:
        pytest.skip("this build of torch has no oneDNN")
    monkeypatch.setattr(packing, "can_pack", lambda: True)


@pytest.fixture
def bfloat16_products(packed_products: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """oneDNN emulates them on CPUs that lack them: slow, with the same numbers."""
    if not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        pytest.skip("oneDNN has no bfloat16 here")
    monkeypatch.setattr(lowering, "has_bfloat16_products", lambda: True)


@pytest.fixture
def on_cpu() -> Iterator[None]:
    """CUDA's fused attention operators have CPU kernels while a test runs."""
    with cuda_reference.registered():
        yield
