"""CUDA's three fused attention kernels, folded over samples: graphs and numbers by reference implementations of the same
operators registered for the CPU, shapes on fake CUDA tensors. No GPU runs here.

Fake CUDA tensors cannot be captured by a build of torch without CUDA: autograd aborts in getDeviceGuardImpl.
"""

from __future__ import annotations

import collections
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import vmap

from dpbitfit_fx.passes import one_sample
from dpbitfit_fx.passes.attention_kernels import KERNELS
from dpbitfit_fx.passes.attention_rule import attention
from dpbitfit_fx.passes.capture import capture
from dpbitfit_fx.passes.joint_graph import JointGraph, Source
from dpbitfit_fx.passes.torch_private import attention_kernel, trace

D = torch.float64
CUDA = ["flash", "efficient", "cudnn"]
B = 3


MASKS: dict[str, Any] = {
    "none": lambda n, h, t, s: None,
    "bool, per sample": lambda n, h, t, s: torch.rand(B, 1, 1, 1, s) > 0.3,
    "bool, full": lambda n, h, t, s: torch.rand(B, n, h, t, s) > 0.2,
    "float, over windows": lambda n, h, t, s: torch.randn(B, 1, h, t, s, dtype=D),
    "float, two axes": lambda n, h, t, s: torch.randn(B, t, s, dtype=D),
    "float, over keys": lambda n, h, t, s: torch.randn(B, n, 1, t, 1, dtype=D),
}


def agree(kernel: str, mask: str, windows: int, causal: bool = False, scale: float | None = None) -> bool:
    """Folded attention on this kernel, on tensors of permuted strides, against torch's own on each sample."""
    t, s = 5, 5 if causal else 6
    m = MASKS[mask](windows, 2, t, s)
    if m is not None and m.dtype == torch.bool:
        m[..., 0] = True  # a row with nothing to attend to has no value
    rows = [torch.randn(B, windows, n, 2, 4, dtype=D).transpose(2, 3).requires_grad_() for n in (t, s, s)]
    dims = (0, 0, 0, None if m is None else 0)

    def one(q: Tensor, k: Tensor, v: Tensor, m: Tensor | None) -> Tensor:
        return attention(q, k, v, m, causal=causal, scale=scale, kernel=kernel)

    def folded(*x: Tensor) -> Tensor:
        batched: Any = vmap(one, in_dims=dims)
        value: Tensor = batched(*x, m)
        return value

    def loop(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        masks = [None] * B if m is None else list(m)
        parts = [
            F.scaled_dot_product_attention(q[i], k[i], v[i], masks[i], is_causal=causal, scale=scale) for i in range(B)
        ]
        return torch.stack(parts)

    weights = torch.linspace(-1, 1, B * windows * 2 * t * 4, dtype=D).reshape(B, windows, 2, t, 4)
    pairs = []
    for run in (folded, loop):
        value = run(*rows)
        pairs.append([value, *torch.autograd.grad((value * weights).sum(), rows)])
    return all(a.shape == b.shape and torch.allclose(a, b, rtol=1e-9, atol=1e-10) for a, b in zip(*pairs, strict=True))


@pytest.mark.usefixtures("on_cpu")
@pytest.mark.parametrize("windows", [1, 3])
@pytest.mark.parametrize(("kernel", "mask"), [(k, m) for k in CUDA for m in MASKS if KERNELS[k].masked or m == "none"])
def test_a_folded_kernel_equals_torchs_attention_on_each_sample(kernel: str, mask: str, windows: int) -> None:
    assert agree(kernel, mask, windows)
    assert agree(kernel, mask, windows, scale=0.3)
    assert mask != "none" or agree(kernel, mask, windows, causal=True)


def other_rows(x: Any) -> Any:
    return None if x is None else x.flip(0)


MUTANTS: dict[str, Any] = {
    "the mask of another row": lambda f, b: (
        lambda q, k, v, m, *r: f(q, k, v, other_rows(m), *r),
        lambda go, q, k, v, m, *r: b(go, q, k, v, other_rows(m), *r),
    ),
    "the log-sum-exp of another row": lambda f, b: (f, lambda go, q, k, v, m, o, lse, *r: b(go, q, k, v, m, o, lse.flip(0), *r)),
    "the output of another row": lambda f, b: (f, lambda go, q, k, v, m, o, *r: b(go, q, k, v, m, o.flip(0), *r)),
    "keys and values swapped": lambda f, b: (lambda q, k, v, *r: f(q, v, k, *r), b),
    "a scale forgotten in the backward": lambda f, b: (f, lambda *x: b(*x[:-1], None)),
    "an order forgotten in the backward": lambda f, b: (f, lambda *x: b(*x[:-2], False, x[-1])),
}  # fmt: skip


@pytest.mark.usefixtures("on_cpu")
@pytest.mark.parametrize(
    ("kernel", "mutant"), [(k, m) for k in CUDA for m in MUTANTS if KERNELS[k].masked or "mask" not in m]
)
def test_the_comparison_kills_a_mutant_of_the_folding(
    kernel: str, mutant: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = KERNELS[kernel]
    first, second = MUTANTS[mutant](right.forward, right.backward)
    monkeypatch.setitem(KERNELS, kernel, right._replace(forward=first, backward=second))
    assert not all(
        (
            agree(kernel, "float, over windows" if right.masked else "none", 1),
            agree(kernel, "none", 1, causal=True, scale=0.3),
        )
    )


@pytest.mark.skipif(torch.version.cuda is not None, reason="a CUDA build asks for its driver where a GPU is pretended")
def test_with_a_gpu_torchs_own_choice_is_taken_but_flash_has_no_backward_for_large_heads(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)

    def taken(choice: int, head: int) -> str:
        monkeypatch.setattr(torch, "_fused_sdp_choice", lambda q, k, v, mask, p, causal, scale: choice)
        with FakeTensorMode():
            x = torch.empty(1, 2, 5, head, device="cuda")
            return attention_kernel(x, x, x, None, False, None)

    assert [taken(choice, 64) for choice in range(5)] == ["math", "flash", "efficient", "cudnn", "math"]
    assert [taken(choice, 200) for choice in (1, 2)] == ["efficient", "efficient"]


class Attends(nn.Module):
    """Two layers of attention over ``x`` [B, 5, 8] with two heads of four, and a mask [B, 5] if there is one."""

    def __init__(self, causal: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(2, 24, 8, dtype=D), requires_grad=False)
        self.first_bias, self.second_bias = (
            nn.Parameter(torch.randn(24, dtype=D)),
            nn.Parameter(torch.randn(24, dtype=D)),
        )
        self.causal = causal

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        for weight, bias in zip(self.weight.unbind(0), (self.first_bias, self.second_bias), strict=True):
            q, k, v = (y.reshape(*y.shape[:2], 2, 4).transpose(1, 2) for y in F.linear(x, weight, bias).chunk(3, -1))
            m = None if mask is None else mask.unsqueeze(1).unsqueeze(1)
            x = x + F.scaled_dot_product_attention(q, k, v, m, is_causal=self.causal).transpose(1, 2).flatten(2)
        return x.square().mean((1, 2))


def captured(model: nn.Module, batch: dict[str, Tensor]) -> JointGraph:
    return capture(Source(model, lambda m, b: m(**b), batch, public_tensors=True))


def attention_calls(joint: JointGraph) -> dict[str, int]:
    names = [str(n.target) for n in joint.module.graph.nodes if n.op == "call_function"]
    return dict(collections.Counter(n for n in names if "attention" in n))


def fused(kernel: str) -> dict[str, int]:
    name = f"aten._scaled_dot_product_{kernel}_attention"
    return {f"{name}.default": 2, f"{name}_backward.default": 2}


@pytest.mark.parametrize("kernel", CUDA)
def test_on_fake_cuda_tensors_a_kernel_gives_a_row_per_folded_sample(kernel: str) -> None:
    half = {"device": "cuda", "dtype": torch.float16}
    with FakeTensorMode():
        q, k = torch.empty(6, 2, 5, 8, **half), torch.empty(6, 2, 7, 8, **half)  # type: ignore[call-overload]
        mask = torch.empty(6, 1, 1, 7, **half) if KERNELS[kernel].masked else None  # type: ignore[call-overload]
        out, lse, *rest = KERNELS[kernel].forward(q, k, k, mask, False, None)
        grads = KERNELS[kernel].backward(out, q, k, k, mask, out, lse, rest, False, None)
    assert out.shape == q.shape and lse.shape[:2] == (6, 2) and out.device.type == "cuda"
    assert [g.shape for g in grads] == [q.shape, k.shape, k.shape]


@pytest.mark.parametrize("kernel", [*CUDA, "math"])
def test_on_fake_cuda_tensors_the_forward_is_one_fused_call_or_plain_products(kernel: str) -> None:
    with FakeTensorMode():
        q = torch.empty(3, 1, 2, 5, 4, device="cuda", dtype=torch.float16)
        graph = trace(lambda q: vmap(lambda x: attention(x, x, x, kernel=kernel))(q), q).graph
    names = [str(n.target) for n in graph.nodes if n.op == "call_function"]
    wanted = [] if kernel == "math" else [f"aten._scaled_dot_product_{kernel}_attention.default"]
    assert [n for n in names if "attention" in n] == wanted
    assert names.count("aten.bmm.default") == (2 if kernel == "math" else 0)


def test_without_a_gpu_to_ask_cuda_attention_takes_the_kernel_that_takes_masks() -> None:
    def taken(device: str, dtype: torch.dtype) -> str:
        with FakeTensorMode():
            x = torch.empty(1, 2, 5, 8, device=device, dtype=dtype)
            return attention_kernel(x, x, x, None, False, None)

    assert not torch.cuda.is_available()
    assert [taken("cuda", t) for t in (torch.float16, torch.float32, D)] == ["efficient", "efficient", "math"]
    assert taken("cpu", torch.float32) == "cpu" and taken("meta", torch.float32) == "math"


@pytest.mark.usefixtures("on_cpu")
@pytest.mark.parametrize("kernel", CUDA)
def test_the_captured_graph_has_one_call_per_layer_and_direction_and_each_samples_gradients(
    kernel: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(one_sample, "attention_kernel", lambda *_: kernel)
    model = Attends(causal=kernel == "flash")
    batch = {"x": torch.randn(4, 5, 8, dtype=D)}
    if kernel != "flash":
        batch["mask"] = torch.arange(5) <= torch.tensor([[0], [2], [4], [3]])
    joint = captured(model, {n: x[:2] for n, x in batch.items()})
    assert attention_calls(joint) == fused(kernel)
    losses, *gradients = joint.module(*joint.values(batch.values()))
    for i in range(4):
        model.zero_grad()
        loss = model(**{n: x[i : i + 1] for n, x in batch.items()}).sum()
        loss.backward()
        assert torch.allclose(losses[i], loss.detach(), rtol=1e-10)
        for target, gradient in zip(joint.targets, gradients, strict=True):
            expected = model.get_parameter(target.name).grad
            assert expected is not None and torch.allclose(gradient[i], expected, rtol=1e-9, atol=1e-12)
