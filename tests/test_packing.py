"""Packed weights: fire for frozen products, forward and backward, change no number and no hash, and follow the model."""

from __future__ import annotations

import copy
import gc
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import dpbitfit_fx as dpb
from dpbitfit_fx import lowering
from dpbitfit_fx.compile import check_rows
from dpbitfit_fx.passes import facts
from dpbitfit_fx.passes.torch_private import LINEAR, LINEAR_ADD, pack_linear_weight

pytestmark = pytest.mark.usefixtures("packed_products")


@pytest.fixture(autouse=True)
def nothing_is_kept() -> Iterator[None]:
    """Packs are shared between steps that are alive."""
    yield
    gc.collect()


class Net(nn.Module):
    """Two wide layers with a residual around the second, and a head too small to pack."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Linear(64, 96), nn.Linear(96, 96), nn.Linear(96, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.first(x))
        logits: Tensor = self.head(torch.tanh(x + self.second(x)).mean(1))
        return logits


def loss(model: Any, batch: Any) -> Tensor:
    losses: Tensor = nn.functional.cross_entropy(model(batch["x"]), batch["y"], reduction="none")
    return losses


def rows(size: int, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(size)
    return {"x": torch.randn(size, 5, 64, generator=generator, dtype=dtype), "y": torch.arange(size) % 2}


def net() -> Net:
    torch.manual_seed(0)
    return Net()


def compiled(model: nn.Module, **options: Any) -> dpb.PrivateStep:
    return dpb.compile(model, loss, rows(4), **options)


def calls(step: dpb.PrivateStep) -> dict[Any, int]:
    found: dict[Any, int] = {}
    for node in step._lowered.joint.module.graph.nodes:
        found[node.target] = found.get(node.target, 0) + 1
    return found


def total(step: dpb.PrivateStep, batch: Any) -> Tensor:
    return torch.cat([v.flatten() for v in step.clipped_sum(batch).values()])


def test_products_with_wide_frozen_weights_are_packed_forward_and_backward() -> None:
    step = compiled(net())
    assert step.report().packed == (
        "packed 0: first.weight",
        "packed 1: second.weight",
        "packed 2: second.weight",
    )  # first.weight has no backward product: nothing before it is trained
    assert calls(step)[LINEAR] + calls(step).get(LINEAR_ADD, 0) == 3


def test_the_report_states_the_memory_that_packs_cost() -> None:
    report = compiled(net()).report()
    assert report.packed_bytes == 4 * (64 * 96 + 2 * 96 * 96)
    assert "0.1 MB more memory" in str(report)


def test_numbers_are_those_of_the_proved_graph_for_every_batch_size() -> None:
    model = net()
    packed, plain = compiled(model), compiled(model, disable=["packed_weights"])
    assert not plain.report().packed and plain.report().packed_bytes == 0
    for size in (1, 2, 3, 17):
        ours, theirs = total(packed, rows(size)), total(plain, rows(size))
        assert (ours - theirs).norm() <= 1e-6 * theirs.norm()


def test_the_hash_and_the_proved_graph_are_those_without_packing() -> None:
    model = net()
    packed, plain = compiled(model), compiled(model, disable=["packed_weights"])
    assert packed.graph_hash == plain.graph_hash
    assert packed.partial.text() == plain.partial.text()


def test_the_template_is_matched_again_after_the_lowering() -> None:
    step = compiled(net())
    facts.partial(step._lowered.joint)
    assert step._lowered.joint.targets == step.partial.targets


@pytest.mark.parametrize("change", ["in place", "replaced", "load_state_dict"])
def test_a_frozen_weight_that_changes_is_packed_anew(change: str) -> None:
    model = net()
    step = compiled(model)
    before = total(step, rows(4))
    with torch.no_grad():
        if change == "in place":
            model.second.weight.mul_(2.0)
        elif change == "replaced":
            model.second.weight.set_(model.second.weight * 2.0)  # type: ignore[call-overload]
        else:
            state = copy.deepcopy(model.state_dict())
            state["second.weight"] *= 2.0
            model.load_state_dict(state)
    fresh = total(compiled(model, disable=["packed_weights"]), rows(4))
    assert (total(step, rows(4)) - fresh).norm() <= 1e-6 * fresh.norm() < (before - fresh).norm()


def test_steps_of_one_model_share_their_packs_and_drop_them_with_the_last() -> None:
    model = net()
    one, other = compiled(model), compiled(model)
    assert all(
        one._lowered.runner.packed(a) is other._lowered.runner.packed(b)
        for a, b in zip(one._lowered.packs, other._lowered.packs, strict=True)
    )
    mine = {key for key in lowering._SHARED if id(model.second.weight) in key[0]}
    assert len(mine) == 2
    del one, other
    gc.collect()
    assert not mine & set(lowering._SHARED)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_weights_that_are_not_float32_are_left_alone(dtype: torch.dtype) -> None:
    step = dpb.compile(net().to(dtype), loss, rows(4, dtype))
    assert not step.report().packed


def test_trainable_weights_are_left_alone() -> None:
    step = compiled(net(), trainable=["bias", "second.weight"])
    assert step.report().packed == ("packed 0: first.weight",)


def test_an_unknown_optimization_is_refused_and_the_known_ones_are_listed() -> None:
    with pytest.raises(dpb.CompileRefused, match=r"'packed_wieghts'.*packed_weights"):
        compiled(net(), disable=["packed_wieghts"])


def test_a_lowering_that_changes_the_numbers_is_caught() -> None:
    step = compiled(net())
    wrong = [p for p in step._lowered.packs if "second" in p.target][-1]
    held = step._lowered.runner._held[wrong.target]
    held.tensor = pack_linear_weight(torch.eye(96))
    with pytest.raises(dpb.SealBroken, match="the clipped sum is off by"):
        check_rows(step)


# -- precision="bf16" -------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("bfloat16_products")
class TestBfloat16:
    def test_products_with_frozen_weights_are_rounded_once_and_nothing_else(self) -> None:
        step = compiled(net(), precision="bf16")
        nodes = list(step._lowered.joint.module.graph.nodes)
        products = [n for n in nodes if n.target is LINEAR]
        casts = [n for n in nodes if n.kwargs.get("dtype") is torch.bfloat16]
        assert len(products) == 3 and LINEAR_ADD not in calls(step)
        assert {n.args[0] for n in products} == set(casts)
        for product in products:
            (back,) = product.users
            assert back.kwargs == {"dtype": torch.float32}

    def test_an_input_that_several_products_share_is_cast_once(self) -> None:
        class Shared(Net):
            def forward(self, x: Tensor) -> Tensor:
                x = torch.tanh(self.first(x))
                logits: Tensor = self.head(torch.tanh(self.second(x) * nn.functional.linear(x, self.second.weight.t())).mean(1))
                return logits

        torch.manual_seed(0)
        nodes = list(compiled(Shared(), precision="bf16")._lowered.joint.module.graph.nodes)
        forward = [n for n in nodes if n.target is LINEAR][:3]
        assert forward[1].args[0] is forward[2].args[0] is not forward[0].args[0]

    def test_every_row_is_close_to_its_float32_gradient_at_every_batch_size(self) -> None:
        model = net()
        rounded, exact = compiled(model, precision="bf16"), compiled(model)
        for size in (1, 2, 3, 17):
            for row in range(size):
                mask = torch.zeros(size)
                mask[row] = 1.0
                a, b = (s.accumulate(rows(size), mask, s.zero_accumulator()) for s in (rounded, exact))
                assert torch.cosine_similarity(a, b, dim=0) >= 0.999
                assert not torch.equal(a, b)

    def test_the_sensitivity_is_still_exactly_the_clipping_norm(self) -> None:
        for clipping in (dpb.AutomaticClipping(0.5), dpb.FlatClipping(1e-3)):
            step = compiled(net(), precision="bf16", clipping=clipping)
            batch = rows(17)
            batch["x"][3] *= 1e20
            batch["x"][4] *= 1e-20
            for row in range(17):
                mask = torch.zeros(17)
                mask[row] = 1.0
                norm = step.accumulate(batch, mask, step.zero_accumulator()).double().norm()
                assert norm <= clipping.max_grad_norm * (1 + 1e-5)

    def test_the_sealed_graph_and_its_hash_are_those_of_float32(self) -> None:
        model = net()
        assert compiled(model, precision="bf16").graph_hash == compiled(model).graph_hash

    def test_both_precisions_of_one_model_keep_their_own_packs(self) -> None:
        model = net()
        rounded, exact = compiled(model, precision="bf16"), compiled(model)
        assert rounded.report().packed_bytes * 2 == exact.report().packed_bytes
        kinds = [s._lowered.runner.packed(s._lowered.packs[0]).dtype for s in (rounded, exact)]
        assert kinds == [torch.bfloat16, torch.float32]

    def test_with_noise_keeps_the_precision(self) -> None:
        assert compiled(net(), precision="bf16").with_noise(1.0, 8.0).precision == "bf16"


def test_bfloat16_is_refused_where_it_cannot_pay_and_without_packs(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(dpb.CompileRefused, match=r"'fp8'.*float32, bf16"):
        compiled(net(), precision="fp8")
    with pytest.raises(dpb.CompileRefused, match="'packed_weights' must not be disabled"):
        compiled(net(), precision="bf16", disable=["packed_weights"])
    monkeypatch.setattr(lowering, "has_bfloat16_products", lambda: False)
    with pytest.raises(dpb.CompileRefused, match="AVX512_BF16 or AMX"):
        compiled(net(), precision="bf16")
