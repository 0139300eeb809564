"""precision="bf16" under Inductor: what the backward pass reads of norms and gradients is kept in bfloat16."""

from __future__ import annotations

import shutil
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from memory import peak_bytes
from torch import Tensor, nn

import dpbitfit_fx as dpb
from dpbitfit_fx import lowering
from dpbitfit_fx.passes import bf16_kept, facts
from dpbitfit_fx.passes.bf16_kept import keep_bfloat16
from dpbitfit_fx.passes.opaque import HELD

aten = torch.ops.aten
NORM = aten.native_layer_norm_backward.default
WIDTH, LENGTH = 64, 6


pytestmark = pytest.mark.usefixtures("bfloat16_products")


class Blocks(nn.Module):
    """Feed-forward blocks with norms, as transformers have them; ``norm`` makes those."""

    def __init__(self, depth: int = 3, norm: Any = None) -> None:
        super().__init__()
        made = norm or (lambda: nn.LayerNorm(WIDTH))
        self.norms = nn.ModuleList(made() for _ in range(depth))
        self.wide = nn.ModuleList(nn.Linear(WIDTH, 2 * WIDTH) for _ in range(depth))
        self.back = nn.ModuleList(nn.Linear(2 * WIDTH, WIDTH) for _ in range(depth))
        self.head = nn.Linear(WIDTH, 3)

    def forward(self, x: Tensor) -> Any:
        for norm, wide, back in zip(self.norms, self.wide, self.back, strict=True):
            x = x + back(F.gelu(wide(norm(x))))
        return self.head(x.mean(1))


def loss(model: Any, batch: Any) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1], reduction="none")


def records(size: int, length: int = LENGTH) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(size)
    return 2.0 + 3.0 * torch.randn(size, length, WIDTH, generator=generator), torch.arange(size) % 3


def compiled(length: int = LENGTH, norm: Any = None, depth: int = 3, **options: Any) -> dpb.PrivateStep:
    torch.manual_seed(0)
    return dpb.compile(Blocks(depth, norm), loss, records(4, length), **{"precision": "bf16", **options})


def kept(step: dpb.PrivateStep) -> dpb.PrivateStep:
    """The pass alone: what Inductor would be given, run node by node."""
    runner = step._lowered.runner
    runner.joint = keep_bfloat16(runner.joint)
    facts.partial(runner.joint)
    runner.load(runner.joint)
    return step


def targets(step: dpb.PrivateStep) -> list[Any]:
    return [n.target for n in step._lowered.runner.joint.module.graph.nodes]


def rows(step: dpb.PrivateStep, batch: Any) -> Tensor:
    """[B, D]: what each record contributes."""
    size = len(batch[1])
    return torch.stack([step.accumulate(batch, mask, step.zero_accumulator()) for mask in torch.eye(size)])


def test_norms_keep_what_they_normalised_and_bias_gradients_add_up_what_the_product_reads() -> None:
    step = compiled()
    assert targets(step).count(NORM) == 2 and HELD not in targets(step)
    kept(step)
    assert NORM not in targets(step) and targets(step).count(HELD) == 2
    notes = step._lowered.runner.joint.optimized
    assert "kept in bfloat16: what 2 norms leave for the backward pass" in notes
    assert "kept in bfloat16: what 4 gradients leave for the backward pass" in notes  # wide's, and the last of back's;
    # those of the others are the residual stream, which a norm reads too and which stays float32


@pytest.mark.parametrize(
    "norm",
    [None, lambda: nn.LayerNorm(WIDTH, elementwise_affine=False), lambda: nn.LayerNorm((LENGTH, WIDTH))],
    ids=["usual", "plain", "of two axes"],
)
def test_each_record_points_where_it_does_in_float32(norm: Any) -> None:
    ours, exact, batch = kept(compiled(norm=norm)), compiled(norm=norm, precision="float32"), records(8)
    assert HELD in targets(ours)
    assert (F.cosine_similarity(rows(ours, batch), rows(exact, batch)) >= 0.999).all()


@pytest.mark.parametrize("norm", [None, lambda: nn.LayerNorm((LENGTH, WIDTH))], ids=["usual", "of two axes"])
def test_without_its_rounding_the_rewrite_changes_no_number(norm: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """What bfloat16 hides from the test above would show here."""
    monkeypatch.setattr(lowering, "PRECISIONS", {"bf16": torch.bfloat16, "float32": torch.float32})
    before, batch = compiled(norm=norm), records(8)
    wanted = rows(before, batch)
    real = bf16_kept._cast
    monkeypatch.setattr(bf16_kept, "_cast", lambda graph, x, dtype: real(graph, x, torch.float32))
    monkeypatch.setattr(bf16_kept, "_sum", lambda graph, node: False)
    got = rows(kept(before), batch)
    assert HELD in targets(before)
    # The products between are rounded: a float32 ulp before one can be a bfloat16 ulp behind it, in few entries.
    assert (got - wanted).norm() <= 2e-4 * wanted.norm()


@pytest.mark.parametrize("name", ["DistilBert", "Electra", "GPT2"])
def test_a_gradient_is_added_up_in_its_own_shape_whatever_shape_the_product_reads_it_in(name: str) -> None:
    """In DistilBERT and Electra, whose head reads one token, sums read [B, T, n] where products read [B T, n]."""
    transformers = pytest.importorskip("transformers")
    common = {"vocab_size": 50, "num_labels": 2, "pad_token_id": 0}
    own: dict[str, Any] = {
        "DistilBert": {"dim": 64, "hidden_dim": 128, "n_layers": 2, "n_heads": 2},
        "Electra": {"embedding_size": 64, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2},
        "GPT2": {"n_embd": 64, "n_layer": 2, "n_head": 2},
    }
    config = getattr(transformers, f"{name}Config")(**common, **own[name])
    torch.manual_seed(0)
    model = getattr(transformers, f"{name}ForSequenceClassification")(config).eval()

    def losses(model: Any, batch: Any) -> Tensor:
        found = model(input_ids=batch[0], attention_mask=torch.ones_like(batch[0])).logits
        return F.cross_entropy(found, batch[1], reduction="none")

    batch = torch.randint(1, 50, (4, 8)), torch.arange(4) % 2
    patterns = ["bias", "score.*" if name == "GPT2" else "classifier.*"]
    ours, exact = (dpb.compile(model, losses, batch, trainable=patterns, precision=p) for p in ("bf16", "float32"))
    assert any("gradients" in note for note in kept(ours)._lowered.runner.joint.optimized)
    assert (F.cosine_similarity(rows(ours, batch), rows(exact, batch)) >= 0.999).all()


def test_a_norm_whose_own_weight_is_trained_keeps_its_input() -> None:
    step = kept(compiled(trainable=["bias", "norms.1.weight"]))
    assert targets(step).count(NORM) == 1 and targets(step).count(HELD) == 1


def test_where_nothing_is_rounded_nothing_changes() -> None:
    step = compiled(precision="float32", disable=["packed_weights"])
    before = step._lowered.runner.joint
    (note,) = {*keep_bfloat16(before).optimized} - {*before.optimized}
    assert "norms" in note  # no product reads a rounded gradient
    linear = dpb.compile(nn.Linear(8, 3), lambda m, b: F.cross_entropy(m(b[0]), b[1], reduction="none"), (
        torch.randn(3, 8), torch.arange(3),
    ))
    joint = linear._lowered.runner.joint
    assert keep_bfloat16(joint) is joint


needs_compiler = pytest.mark.skipif(
    not any(map(shutil.which, ("g++", "clang++", "c++"))), reason="Inductor needs a C++ compiler"
)


def peak(step: dpb.PrivateStep, batch: Any) -> int:
    mask, zero = torch.ones(len(batch[1])), step.zero_accumulator()
    step.accumulate(batch, mask, zero)
    return peak_bytes(lambda: step.accumulate(batch, mask, zero))


@needs_compiler
def test_inductor_holds_fewer_bytes_and_the_option_switches_it_off() -> None:
    batch = records(8, 64)
    ours, plain = (compiled(64, depth=4, backend="inductor", disable=d) for d in ((), "bf16_kept"))
    assert any("kept in bfloat16" in note for note in ours.report().optimized)
    assert not any("kept in bfloat16" in note for note in plain.report().optimized)
    assert peak(ours, batch) <= 0.85 * peak(plain, batch)
    assert (F.cosine_similarity(rows(ours, batch), rows(plain, batch)) >= 0.999).all()
    assert ours.graph_hash == plain.graph_hash
