"""What a capture costs: one trace, nodes linear in the depth, and nothing that grows with the batch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from small_models import Sandwich, losses, points, refusal
from torch import Tensor, fx, nn

import dpbitfit_fx as dpb
from dpbitfit_fx.passes import capture, torch_private


class Layer(nn.Module):
    """A post-norm transformer layer: x [B, T, 8] -> [B, T, 8]."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out, self.up = (nn.Linear(8, n) for n in (24, 8, 16))
        self.down = nn.Linear(16, 8)
        self.first, self.second = nn.LayerNorm(8), nn.LayerNorm(8)

    def forward(self, x: Tensor, mask: Tensor) -> Any:
        q, k, v = (y.unflatten(-1, (2, 4)).transpose(1, 2) for y in self.qkv(x).chunk(3, -1))
        x = self.first(x + self.out(F.scaled_dot_product_attention(q, k, v, mask).transpose(1, 2).flatten(2)))
        return self.second(x + self.down(F.gelu(self.up(x))))


class Encoder(nn.Module):
    def __init__(self, depth: int) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(20, 8), nn.Linear(8, 3)
        self.layers = nn.ModuleList(Layer() for _ in range(depth))

    def forward(self, ids: Tensor) -> Any:
        x, mask = self.embed(ids), (ids > 0)[:, None, None].expand(-1, 1, ids.shape[1], ids.shape[1])
        for layer in self.layers:
            x = layer(x, mask)
        return self.head(x.mean(1))


def text(size: int) -> tuple[Tensor, Tensor]:
    return torch.randint(1, 20, (size, 5)), torch.arange(size) % 3


def nodes(step: dpb.PrivateStep) -> int:
    return len(step.joint.module.graph.nodes)


def test_nodes_grow_linearly_with_the_depth() -> None:
    one, two, five = (nodes(dpb.compile(Encoder(depth), losses, text(4))) for depth in (1, 2, 5))
    assert five - two == 3 * (two - one) > 0


def test_the_graph_is_the_same_for_every_size_of_the_example_batch() -> None:
    hashes = {dpb.compile(Encoder(1), losses, text(size)).graph_hash for size in (2, 5, 64)}
    assert len(hashes) == 1


@pytest.fixture
def sizes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The batch sizes at which a compile traces."""
    seen: list[int] = []
    trace = torch_private.trace

    def watched(fn: Any, trained: Any, fixed: Any, *batch: Tensor) -> fx.GraphModule:
        seen.append(batch[0].shape[0])
        return trace(fn, trained, fixed, *batch)

    monkeypatch.setattr(capture, "trace", watched)
    return seen


def test_one_trace_is_enough_for_a_model_whose_integers_leave_no_doubt(sizes: list[int]) -> None:
    dpb.compile(Encoder(1), losses, text(4))
    assert len(sizes) == 1


def test_a_model_that_holds_the_first_prime_is_traced_at_another(sizes: list[int]) -> None:
    model = nn.Sequential(nn.Linear(6, 107), nn.Tanh(), nn.Linear(107, 3))
    step = dpb.compile(model, losses, points())
    assert sizes and 107 not in sizes
    assert step.per_sample_gradients(points(107))["0.bias"].shape == (107, 107)


class Loop(nn.Module):
    """An operator without a batching rule: functorch warns of it once in a process, and unrolls it every time."""

    def forward(self, h: Tensor) -> Tensor:
        return h * torch.histc(h, 4)[0]


def test_an_unrolled_operator_is_refused_at_every_compile_not_only_when_torch_warns() -> None:
    for _ in range(2):
        assert "unrolled over samples" in refusal(Sandwich(Loop()))


def test_a_program_with_nothing_to_rewrite_is_not_traced_again(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(self: Any, *args: Any, **kwargs: Any) -> Any:
        raise AssertionError("retraced")

    class Writes(nn.Module):
        def forward(self, h: Tensor) -> Tensor:
            h = h * 1.0
            h[:, 0] = 0.0
            return h

    writes = dpb.compile(Sandwich(Writes()), losses, points()).report().operators
    assert not any(op.endswith("_.default") or "copy_" in op.replace("_copy", "") for op in writes)
    monkeypatch.setattr(torch.export.ExportedProgram, "run_decompositions", never)
    dpb.compile(Encoder(1), losses, text(4))
    with pytest.raises(dpb.CompileRefused, match="retraced"):
        dpb.compile(Sandwich(Writes()), losses, points())
