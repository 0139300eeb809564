"""What ``trainable="bias"`` takes: by whole word in the name, by structure, and what it leaves with a reason (section 5)."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from small_models import Sandwich, losses, points, refusal
from torch import Tensor, nn

import dpbitfit_fx as dpb
from dpbitfit_fx.passes.trainables import is_bias_name


def rules(step: dpb.PrivateStep) -> dict[str, str]:
    return {name: rule for name, _, rule in step.report().trained}


@pytest.mark.parametrize(
    "name", ["bias", "a.bias", "attn.in_proj_bias", "q_bias", "lstm.bias_ih_l0", "bias_hh_l1_reverse"]
)
def test_bias_as_a_whole_word_of_the_leaf_name_counts(name: str) -> None:
    assert is_bias_name(name)


@pytest.mark.parametrize(
    "name",
    [
        "weight",
        "bias.weight",
        "biased",
        "unbias",
        "debiasing",
        "relative_position_bias_table",
        "relative_attention_bias.weight",
    ],
)
def test_bias_elsewhere_in_the_name_does_not(name: str) -> None:
    assert not is_bias_name(name)


class Tokens(nn.Module):
    """x [B, 5, 6] -> logits [B, 3], with every kind of free parameter added or multiplied to the tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(6, 8), nn.Linear(8, 3)
        self.shift = nn.Parameter(torch.randn(8))
        self.spread = nn.Parameter(torch.randn(1, 1, 8))
        self.position = nn.Parameter(torch.randn(1, 5, 8))
        self.per_token = nn.Parameter(torch.randn(5, 1))
        self.cls = nn.Parameter(torch.randn(1, 1, 8))
        self.layer_scale = nn.Parameter(torch.ones(8))
        self.relative_position_bias_table = nn.Parameter(torch.randn(5, 8))

    def forward(self, x: Tensor) -> Any:
        h = self.first(x) * self.layer_scale + self.shift
        h = h + 2.0 * self.spread.expand(1, 5, 8) + self.position + self.per_token
        h = h + self.relative_position_bias_table[torch.arange(5)]
        h = torch.cat([self.cls.expand(h.shape[0], 1, 8), h], 1)
        return self.last(torch.tanh(h).mean(1))


class Channels(nn.Module):
    """x [B, 6] as [B, 6, 1, 1]: a bias of shape [C, 1, 1], as convolutions spell it."""

    def __init__(self) -> None:
        super().__init__()
        self.last, self.shift = nn.Linear(6, 3), nn.Parameter(torch.zeros(6, 1, 1))

    def forward(self, x: Tensor) -> Any:
        return self.last(torch.relu(x[:, :, None, None] + self.shift).mean((2, 3)))


def test_a_free_parameter_broadcast_over_the_tokens_is_a_bias_by_structure() -> None:
    step = dpb.compile(Tokens(), losses, (torch.randn(4, 5, 6), points()[1]))
    assert rules(step) == {"first.bias": "name", "last.bias": "name", "shift": "structure", "spread": "structure"}
    reasons = dict(step.report().near_misses)
    assert "varies along a token" in reasons["position"] and "varies along a token" in reasons["per_token"]
    assert "table" in reasons["relative_position_bias_table"]
    assert not {"cls", "layer_scale"} & {*rules(step), *reasons}
    text = str(step.report())
    assert "shift [8] (by structure)" in text and "near miss  position" in text


def test_a_conv_style_parameter_is_a_bias_by_structure() -> None:
    step = dpb.compile(Channels(), losses, points())
    assert rules(step) == {"shift": "structure", "last.bias": "name"}


def test_position_tables_and_layer_scale_are_trained_by_pattern() -> None:
    step = dpb.compile(Tokens(), losses, (torch.randn(4, 5, 6), points()[1]), trainable=["bias", "pos*", "layer_scale"])
    assert rules(step)["position"] == rules(step)["layer_scale"] == "pattern"
    assert step.trainable_shapes["position"] == (1, 5, 8)


def test_a_norms_bias_is_taken_and_its_weight_is_not() -> None:
    model = Sandwich(nn.LayerNorm(8))
    step = dpb.compile(model, losses, points())
    assert set(step.trainable_names) == {"first.bias", "last.bias", "middle.bias"}


class Shared(Sandwich):
    """One bias under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.again = nn.Linear(8, 8)
        self.again.bias = self.first.bias

    def transform(self, h: Tensor) -> Tensor:
        out: Tensor = self.again(h)
        return out


def test_a_shared_bias_is_trained_once_with_the_gradient_of_both_uses() -> None:
    model = Shared()
    step = dpb.compile(model, losses, points())
    assert step.trainable_names == ("first.bias", "last.bias") and step.num_trainable == 11
    ours = step.per_sample_gradients(points())["first.bias"]
    for row in range(4):
        loss = losses(model, tuple(x[row : row + 1] for x in points()))
        (theirs,) = torch.autograd.grad(loss.sum(), [model.first.bias])
        assert torch.allclose(ours[row], theirs, rtol=1e-5, atol=1e-7)


class Idle(Sandwich):
    def __init__(self) -> None:
        super().__init__()
        self.extra = nn.Linear(2, 2)


def test_a_bias_that_the_loss_does_not_use_is_listed_and_not_trained() -> None:
    step = dpb.compile(Idle(), losses, points())
    assert step.report().unused == ("extra.bias",) and "extra.bias" not in step.trainable_names


def test_a_parameter_asked_for_by_its_full_name_and_unused_is_refused() -> None:
    message = refusal(Idle(), trainable=["bias", "extra.weight"])
    assert "extra.weight" in message and "does not use it" in message


def test_patterns_add_the_weight_of_a_classification_head() -> None:
    step = dpb.compile(Sandwich(), losses, points(), trainable=["bias", "last.*"])
    assert rules(step) == {"first.bias": "pattern", "last.weight": "pattern", "last.bias": "pattern"}
    assert step.trainable_shapes["last.weight"] == (3, 8)
    assert step.per_sample_gradients(points(2))["last.weight"].shape == (2, 3, 8)


def test_a_pattern_that_matches_nothing_is_refused_by_name() -> None:
    message = refusal(Sandwich(), trainable=["bias", "clasifier.*"])
    assert "'clasifier.*'" in message and "first.weight" in message


def test_a_model_without_any_bias_is_refused() -> None:
    assert "nothing would be trained" in refusal(nn.Linear(6, 3, bias=False))
    step = dpb.compile(nn.Linear(6, 3, bias=False), losses, points(), trainable=["weight"])
    assert step.trainable_names == ("weight",)


def test_an_excluded_bias_is_not_trained_and_the_report_says_by_which_pattern() -> None:
    model = Sandwich(nn.LayerNorm(8))
    step = dpb.compile(model, losses, points(), exclude=["middle.*", "last*"])
    assert step.trainable_names == ("first.bias",)
    report = step.report()
    assert report.excluded == (("middle.bias", "middle.*"), ("last.bias", "last*"))
    assert "  excluded  middle.bias (by 'middle.*')" in str(report).splitlines()
    assert report.share == 8 / sum(p.numel() for p in model.parameters())
    assert dpb.compile(model, losses, points(), exclude="middle.*").trainable_names == ("first.bias", "last.bias")


def test_a_bias_by_structure_can_be_excluded_and_is_no_near_miss_then() -> None:
    step = dpb.compile(Tokens(), losses, (torch.randn(4, 5, 6), points()[1]), exclude=["shift", "spread"])
    assert set(step.trainable_names) == {"first.bias", "last.bias"}
    assert not {"shift", "spread"} & dict(step.report().near_misses).keys()


def test_the_last_blocks_only_by_patterns() -> None:
    blocks = nn.Sequential(*(nn.Linear(8, 8) for _ in range(4)))
    only = ("middle.2.bias", "middle.3.bias")
    assert dpb.compile(Sandwich(blocks), losses, points(), trainable=["middle.[23].bias"]).trainable_names == only
    step = dpb.compile(Sandwich(blocks), losses, points(), exclude=["first.*", "last.*", "middle.[01].*"])
    assert step.trainable_names == only


def test_everything_but_the_biases() -> None:
    step = dpb.compile(Sandwich(), losses, points(), trainable="all", exclude="bias")
    assert step.trainable_names == ("first.weight", "last.weight")


def test_an_excluded_name_of_a_tied_parameter_excludes_it_under_every_name() -> None:
    assert dpb.compile(Shared(), losses, points(), exclude=["again.*"]).trainable_names == ("last.bias",)


def test_an_exclude_pattern_that_takes_nothing_out_is_refused_with_near_names() -> None:
    model = Sandwich(nn.LayerNorm(8))
    message = refusal(model, exclude=["midle.*"])
    assert "exclude pattern 'midle.*' matches no parameter" in message and "middle.bias" in message
    message = refusal(model, exclude=["*weight"])
    assert "takes nothing out" in message and "first.bias" in message
    message = refusal(model, exclude=["*bias"])
    assert "nothing would be trained" in message and "*bias" in message


class Criterion(nn.Module):
    """A loss that is itself a module, with a weight of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.tensor([0.5]))

    def forward(self, model: Any, batch: Any) -> Tensor:
        return losses(model, batch) * self.bias


def test_a_parameter_of_the_loss_is_never_trained() -> None:
    step = dpb.compile(Sandwich(), Criterion(), points(), public_tensors=True)
    assert step.trainable_names == ("first.bias", "last.bias")
