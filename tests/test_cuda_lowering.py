"""What is lowered otherwise on CUDA: bfloat16 without oneDNN's layout, attention by CUDA's kernel, CUDA graphs. No GPU runs here:
the same lowerings run on the CPU, with CUDA's operators written out (``cuda_reference``)."""

from __future__ import annotations

import shutil
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from test_bf16_attention import Attend, loss, records
from torch import Tensor

import dpbitfit_fx as dpb
from dpbitfit_fx import lowering
from dpbitfit_fx.passes import one_sample, packing
from dpbitfit_fx.passes.bf16_attention import CALLS, EFFICIENT
from dpbitfit_fx.passes.joint_graph import JointGraph
from dpbitfit_fx.passes.packing import layout
from dpbitfit_fx.passes.torch_private import LINEAR

aten = torch.ops.aten
CUDA, CPU = torch.device("cuda", 0), torch.device("cpu")
needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="Inductor needs a C++ compiler")


@pytest.fixture
def as_on_cuda(on_cpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Compiled on the CPU as for CUDA."""
    monkeypatch.setattr(packing, "layout", lambda _, dtype: layout(CUDA, dtype))
    monkeypatch.setattr(one_sample, "attention_kernel", lambda *_: "efficient")
    monkeypatch.setattr(lowering, "has_bfloat16_products", lambda: True)


def compiled(kind: str = "padded", **options: Any) -> dpb.PrivateStep:
    torch.manual_seed(0)
    return dpb.compile(Attend(kind), loss, records(3), **{"precision": "bf16", **options})


def targets(step: dpb.PrivateStep) -> list[Any]:
    return [n.target for n in step._lowered.joint.module.graph.nodes]


def rows(step: dpb.PrivateStep, batch: dict[str, Tensor]) -> Tensor:
    size = len(batch["y"])
    return torch.stack([step.accumulate(batch, mask, step.zero_accumulator()) for mask in torch.eye(size)])


def test_weights_are_copied_in_bfloat16_on_cuda_and_otherwise_stay_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packing, "can_pack", lambda: True)
    kinds = torch.float32, torch.bfloat16
    assert [layout(CUDA, kind) for kind in kinds] == ["", "plain"]
    assert [layout(CPU, kind) for kind in kinds] == ["onednn", "onednn"]
    monkeypatch.setattr(packing, "can_pack", lambda: False)
    assert [layout(CPU, kind) for kind in kinds] == ["", ""]


@pytest.mark.usefixtures("as_on_cuda")
class TestAsOnCuda:
    @pytest.mark.parametrize("kind", ["plain", "padded", "causal", "scaled", "biased"])
    def test_each_record_points_where_it_does_in_float32(self, kind: str) -> None:
        rounded, exact, batch = compiled(kind), compiled(kind, precision="float32"), records(8)
        assert [n.target for n in rounded._lowered.joint.module.graph.nodes if n.target in CALLS] == [EFFICIENT]
        assert "attention in bfloat16: 1 by the fused kernel" in rounded.report().optimized
        assert (F.cosine_similarity(rows(rounded, batch), rows(exact, batch)) >= 0.999).all()

    def test_products_read_a_rounded_copy_which_follows_the_weight(self) -> None:
        step, batch = compiled(), records(4)
        assert LINEAR not in targets(step)
        assert step.report().packed_bytes == 2 * 5 * 64 * 64  # q, k, v and out forward, out backward
        before = rows(step, batch)
        with torch.no_grad():
            dict(step.model.named_parameters())["out.weight"].mul_(-1.0)
        after = rows(step, batch)
        assert (after - before).norm() > 0.01 * before.norm()
        again = dpb.compile(step.model, loss, records(3), precision="bf16")
        assert torch.equal(after, rows(again, batch))

    def test_float32_is_left_as_it_is(self) -> None:
        step = compiled(precision="float32")
        assert not step.report().packed and torch.bfloat16 not in {
            n.kwargs.get("dtype") for n in step._lowered.joint.module.graph.nodes
        }

    def test_a_mask_is_rounded_before_it_is_spread_over_heads_and_rows(self) -> None:
        """Rounded behind it, it would be written out: [M, H, T, S]."""
        (call,) = [n for n in compiled()._lowered.joint.module.graph.nodes if n.target is EFFICIENT]
        spread = []
        mask: Any = call.args[3]
        while mask.target is not aten._to_copy.default:
            spread.append(mask.target)
            mask = mask.args[0]
        assert aten.expand.default in spread and mask.kwargs == {"dtype": torch.bfloat16}

    def test_no_row_weighs_more_than_the_clipping_norm(self) -> None:
        step, batch = compiled(clipping=dpb.FlatClipping(1e-3)), records(8)
        batch["x"][3] *= 1e18
        batch["x"][5, 0] = float("nan")
        found = rows(step, batch)
        assert found.isfinite().all() and (found.double().norm(dim=1) <= 1e-3 * (1 + 1e-5)).all()
        assert found[5].count_nonzero() == 0

    @needs_compiler
    def test_under_inductor_the_copies_are_inputs_and_the_rows_the_same_up_to_rounding(self) -> None:
        fused, eager, batch = compiled(backend="inductor"), compiled(), records(8)
        assert fused._lowered.runner._hidden == []
        assert (F.cosine_similarity(rows(fused, batch), rows(eager, batch)) >= 0.999).all()


class Replays:
    """Stands for torch.compile: what it gives writes to the same tensor at every call, as replays of a CUDA graph do."""

    def __init__(self) -> None:
        self.options: list[Any] = []
        self.given: tuple[Tensor, ...] = ()
        self.place = torch.zeros(())

    def __call__(self, module: Any, options: Any = None) -> Any:
        self.options.append(options)
        return self.replay

    def replay(self, *given: Tensor) -> tuple[Tensor]:
        self.given = given
        return (self.place.add_(1.0),)


@pytest.mark.parametrize("off", [(), ("cuda_graphs",)])
def test_on_cuda_inductor_replays_graphs_whose_results_the_next_replay_does_not_touch(
    off: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    step = compiled(precision="float32", disable=["packed_weights"])
    monkeypatch.setattr(JointGraph, "device", CUDA)
    monkeypatch.setattr(torch, "compile", replays := Replays())
    runner = lowering._Runner(step.partial, lowering.How("inductor", packed=False, graphs="cuda_graphs" not in off))
    assert replays.options == [None if off else {"triton.cudagraphs": True}]
    leaves = list(records(3).values())
    first, second = (runner(leaves, torch.ones(3), torch.zeros(step.num_trainable))[0] for _ in range(2))
    assert [float(first), float(second)] == ([2.0, 2.0] if off else [1.0, 2.0])
    weights = {p.data_ptr() for p in step.model.parameters()}
    fixed = {x.data_ptr() for x in replays.given if hasattr(x, "_dynamo_static_input_type")}
    assert fixed == (set() if off else weights)  # read where they are; the batch moves
    assert not any(hasattr(p, "_dynamo_static_input_type") for p in step.model.parameters())


def test_on_the_cpu_there_are_no_cuda_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    step = compiled(precision="float32")
    monkeypatch.setattr(torch, "compile", replays := Replays())
    lowering._Runner(step.partial, lowering.How("inductor", packed=False))
    assert replays.options == [None]


def test_bfloat16_is_refused_on_a_gpu_that_lacks_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lowering, "has_bfloat16_products", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: True)
    lowering.check_lowering("eager", (), "bf16", device=CUDA)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: False)
    with pytest.raises(dpb.CompileRefused, match="a GPU that multiplies bfloat16; cuda:0 does not"):
        lowering.check_lowering("eager", (), "bf16", device=CUDA)
