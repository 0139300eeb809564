"""backend="inductor": the same numbers from one compile, packed weights too, rows apart, and a whole run of fit."""

from __future__ import annotations

import shutil
import threading
from typing import Any

import pytest
import torch
import torch._inductor.cpu_vec_isa
from fit_cases import mlp, mlp_loss, run, text_loss, text_model
from torch import Tensor, nn

import dpbitfit_fx as dpb
from dpbitfit_fx.passes import facts, opaque, torch_private
from dpbitfit_fx.passes.opaque import HELD, PACKED_LINEAR, holding
from dpbitfit_fx.passes.torch_private import LINEAR, LINEAR_ADD, pack_linear_weight

reshape = torch.ops.aten.reshape.default
needs_compiler = pytest.mark.skipif(
    not any(map(shutil.which, ("g++", "clang++", "c++"))), reason="Inductor needs a C++ compiler"
)


@needs_compiler
def test_one_inductor_compile_gives_the_eager_sums_for_every_batch_size() -> None:
    model = text_model()
    generator = torch.Generator().manual_seed(0)
    example = {
        "input_ids": torch.randint(1, 20, (4, 6), generator=generator),
        "attention_mask": torch.tensor([[1] * 6, [1] * 4 + [0] * 2, [1] * 6, [1] + [0] * 5]),
        "label": torch.tensor([0, 1, 1, 0]),
        "weight": torch.tensor([1.0, 2.0, 1.0, 0.5]),
    }
    ours, eager = (dpb.compile(model, text_loss, example, backend=name) for name in ("inductor", "eager"))
    for size in (1, 2, 3, 17):
        batch = {name: value[torch.arange(size) % 4] for name, value in example.items()}
        got, wanted = ours.clipped_sum(batch), eager.clipped_sum(batch)
        for name, value in wanted.items():
            assert torch.allclose(got[name], value, rtol=1e-5, atol=1e-6 * size), (size, name)
    assert ours.graph_hash == eager.graph_hash


@needs_compiler
def test_nothing_is_compiled_again_for_views_or_another_batch_size() -> None:
    counters = torch._dynamo.utils.counters["stats"]
    before = counters["unique_graphs"]
    step = dpb.compile(mlp(), mlp_loss, (torch.randn(4, 4), torch.tensor([0, 1, 1, 0])), backend="inductor")
    wide = torch.randn(20, 8)
    for rows in (2, 3, 9):
        sliced = wide[:rows, :4], (torch.arange(40) % 2)[:rows]
        for given in (sliced, tuple(x.clone() for x in sliced)):
            step.accumulate(given, torch.eye(rows)[0], step.zero_accumulator())
            step.accumulate(given, torch.ones(rows), torch.zeros(2, step.num_trainable)[0])
    assert counters["unique_graphs"] - before == 1


@needs_compiler
def test_fit_through_inductor_ends_where_the_eager_run_ends() -> None:
    results = [run(None, backend=name) for name in ("inductor", "eager")]
    ours, eager = (dict(r.model.named_parameters()) for r in results)
    assert all(torch.allclose(ours[name], eager[name], atol=1e-4) for name in eager)
    assert results[0].epsilon == results[1].epsilon
    assert results[0].statement.backend == "pytorch inductor"


@needs_compiler
@pytest.mark.parametrize("fails", [False, True])
def test_inductor_is_asked_once_what_the_cpu_can_do_before_it_is_needed(
    fails: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It builds and loads programs to find out, seconds in which the main thread has passes to run."""
    asked, at_once = [], threading.Event()
    real = torch._inductor.cpu_vec_isa.pick_vec_isa

    def ask() -> Any:
        if threading.current_thread().name == "look_for_vector_units":
            asked.append(1)
            at_once.set()
            if fails:
                raise OSError("no room for the program")
        return real()

    monkeypatch.setattr("torch._inductor.cpu_vec_isa.pick_vec_isa", ask)
    torch_private.look_for_vector_units.cache_clear()
    given = mlp(), mlp_loss, (torch.zeros(4, 4), torch.zeros(4, dtype=torch.long))
    dpb.compile(*given, backend="eager")
    assert not asked
    for _ in range(2):
        dpb.compile(*given, backend="inductor")
    assert at_once.wait(10) and asked == [1]


def test_without_a_compiler_inductor_is_refused_and_the_way_out_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(dpb.CompileRefused, match=r"g\+\+.*backend='eager'"):
        dpb.compile(mlp(), mlp_loss, (torch.zeros(4, 4), torch.zeros(4, dtype=torch.long)), backend="inductor")


# -- packed weights ---------------------------------------------------------------------------------------------------


class Block(nn.Module):
    """A residual block: one product adds a bias, one adds rows, and the head is too small to pack."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Linear(64, 96), nn.Linear(96, 96), nn.Linear(96, 2)

    def forward(self, x: Tensor) -> Any:
        x = torch.tanh(self.first(x))
        return self.head(nn.functional.gelu(x + self.second(x)).mean(1))


def block_loss(model: Any, batch: Any) -> Tensor:
    return nn.functional.cross_entropy(model(batch[0]), batch[1], reduction="none")


def rows(size: int) -> tuple[Tensor, Tensor]:
    return torch.randn(size, 5, 64, generator=torch.Generator().manual_seed(size)), torch.arange(size) % 2


def block(**options: Any) -> tuple[Block, dpb.PrivateStep]:
    torch.manual_seed(0)
    model = Block()
    return model, dpb.compile(model, block_loss, rows(4), **options)


def total(step: dpb.PrivateStep, batch: Any) -> Tensor:
    return step.accumulate(batch, torch.ones(len(batch[1])), step.zero_accumulator())


@needs_compiler
@pytest.mark.usefixtures("bfloat16_products")
@pytest.mark.parametrize("precision", ["float32", "bf16"])
def test_what_inductor_compiles_reads_packed_weights_and_follows_the_model(precision: str) -> None:
    model, ours = block(backend="inductor", precision=precision)
    _, eager = block(precision=precision)
    assert ours.report().packed == eager.report().packed and len(ours.report().packed) == 3
    for size in (1, 2, 3, 17):
        wanted = total(eager, rows(size))
        assert (total(ours, rows(size)) - wanted).norm() <= (1e-6 if precision == "float32" else 1e-3) * wanted.norm()
    before = total(ours, rows(4))
    with torch.no_grad():
        model.second.weight.mul_(2.0)
    fresh = total(dpb.compile(model, block_loss, rows(4), precision=precision), rows(4))
    close = 1e-6 if precision == "float32" else 1e-3
    assert (total(ours, rows(4)) - fresh).norm() <= close * fresh.norm() < (before - fresh).norm()


@needs_compiler
def test_no_reshape_leaves_its_rows_to_be_worked_out() -> None:
    """Each would hold the quotient that the one before it left, and a deep model takes minutes to simplify them."""
    example = {
        "input_ids": torch.randint(1, 20, (4, 6)),
        "attention_mask": torch.ones(4, 6, dtype=torch.long),
        "label": torch.tensor([0, 1, 1, 0]),
        "weight": torch.ones(4),
    }
    step = dpb.compile(text_model(), text_loss, example, backend="inductor")
    shapes = [n.args[1] for n in step._lowered.runner._inputs.module.graph.nodes if n.target is reshape]
    assert shapes and not any(-1 in shape for shape in shapes)
    before = [n.args[1] for n in step.partial.module.graph.nodes if n.target is reshape]
    assert any(-1 in shape for shape in before)


@needs_compiler
@pytest.mark.usefixtures("bfloat16_products")
def test_packs_are_no_inputs_there_and_the_rows_that_are_clipped_are_made_once() -> None:
    _, step = block(backend="inductor", precision="bf16")
    lowered = step._lowered
    graph = lowered.runner._inputs.module.graph
    targets = [n.target for n in graph.nodes]
    assert targets.count(PACKED_LINEAR) == 3 and LINEAR not in targets and LINEAR_ADD not in targets
    assert not {p.target for p in lowered.packs} & {i.target for i in lowered.runner._inputs.inputs}
    (held,) = (n for n in graph.nodes if n.target is HELD)
    (gradients,) = held.args
    assert list(gradients.users) == [held] and len(held.users) == 2  # the norm and the sum
    facts.partial(lowered.joint)


@needs_compiler
@pytest.mark.usefixtures("bfloat16_products")
def test_with_packs_declined_there_are_none() -> None:
    _, step = block(backend="inductor", disable=["packed_weights"])
    assert not step.report().packed
    assert PACKED_LINEAR not in {n.target for n in step._lowered.runner._inputs.module.graph.nodes}


@pytest.mark.usefixtures("bfloat16_products")
def test_every_thread_reads_the_packs_that_it_holds() -> None:
    def pack(value: float) -> Tensor:
        return pack_linear_weight(torch.full((8, 4), value))

    x, seen = torch.ones(2, 4), dict[float, float]()

    def run(value: float) -> None:
        with holding([pack(value)]):
            together.wait()
            seen[value] = float(PACKED_LINEAR(x, None, 0, 8)[0, 0])

    together = threading.Barrier(2)
    threads = [threading.Thread(target=run, args=(v,)) for v in (1.0, 2.0)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert seen == {1.0: 4.0, 2.0: 8.0}
    with holding([pack(3.0)]):
        with holding([pack(5.0)]):
            assert float(PACKED_LINEAR(x, None, 0, 8)[0, 0]) == 20.0
        assert float(PACKED_LINEAR(x, None, 0, 8)[0, 0]) == 12.0
    with pytest.raises(IndexError):
        PACKED_LINEAR(x, None, 0, 8)


def test_the_operators_that_hide_packs_and_rows_are_what_torch_expects_of_one() -> None:
    torch.library.opcheck(opaque.HELD, (torch.randn(3, 5),))
    if LINEAR is not None:
        with holding([pack_linear_weight(torch.randn(8, 4))]):
            torch.library.opcheck(PACKED_LINEAR, (torch.randn(3, 4), torch.randn(8), 0, 8))
