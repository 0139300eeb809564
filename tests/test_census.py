"""The bias census of the DP-BiTFiT paper (Bu et al., ICML 2024, table of trainable shares), on meta tensors."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from dpbitfit_fx.passes.trainables import select_by_name

transformers = pytest.importorskip("transformers")


def roberta(hidden: int, layers: int, heads: int) -> nn.Module:
    config = transformers.RobertaConfig(
        vocab_size=50265,
        max_position_embeddings=514,
        type_vocab_size=1,
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        intermediate_size=4 * hidden,
    )
    return transformers.RobertaModel(config, add_pooling_layer=False)  # type: ignore[no-any-return]


def gpt2(hidden: int, layers: int, heads: int) -> nn.Module:
    return transformers.GPT2Model(  # type: ignore[no-any-return]
        transformers.GPT2Config(n_embd=hidden, n_layer=layers, n_head=heads)
    )


def vit(hidden: int, layers: int, heads: int) -> nn.Module:
    config = transformers.ViTConfig(
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        intermediate_size=4 * hidden,
        num_labels=1000,
    )
    return transformers.ViTForImageClassification(config)  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("build", "size", "biases", "percent"),
    [
        (roberta, (768, 12, 12), 102_144, 0.082),
        (roberta, (1024, 24, 16), 271_360, 0.077),
        (gpt2, (768, 12, 12), 102_144, 0.082),
        (gpt2, (1024, 24, 16), 271_360, 0.076),
        (gpt2, (1280, 36, 20), 508_160, 0.066),
        (vit, (768, 12, 12), 103_912, 0.120),
        (vit, (1024, 24, 16), 273_384, 0.090),
    ],
    ids=["roberta-base", "roberta-large", "gpt2", "gpt2-medium", "gpt2-large", "vit-base", "vit-large"],
)
def test_the_bias_census_equals_the_papers(
    build: Callable[..., nn.Module], size: tuple[int, int, int], biases: int, percent: float
) -> None:
    with torch.device("meta"):
        model = build(*size)
    shapes = {name: p.numel() for name, p in model.named_parameters()}
    counted = sum(shapes[name] for name in select_by_name(model, "bias"))
    assert counted == biases
    assert round(100 * counted / sum(shapes.values()), 3) == pytest.approx(percent, abs=0.0011)


def test_a_layernorm_bias_and_a_conv1d_bias_are_counted_like_any_other() -> None:
    with torch.device("meta"):
        names = select_by_name(gpt2(64, 1, 2), "bias")
    assert "h.0.ln_1.bias" in names and "h.0.attn.c_attn.bias" in names and "ln_f.bias" in names


def test_weights_and_position_tables_are_not_counted_as_biases() -> None:
    with torch.device("meta"):
        names = select_by_name(roberta(64, 1, 2), "bias")
    assert not [n for n in names if n.endswith("weight") or "embeddings.position" in n]
