"""A new head can start from the meaning of its labels: public, and gradient reaches the biases from the first step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import dpbitfit_fx as dpb
from dpbitfit_fx.errors import DataError
from dpbitfit_fx.huggingface import MeanPooledClassifier, logits_of, made_up_batch, start_head, text_loss

transformers = pytest.importorskip("transformers")
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "good", "bad", "film", "dull", "bright"]
TEXTS = [["good film", "bright"], ["bad film"], ["dull"]]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    path = tmp_path_factory.mktemp("words") / "vocab.txt"
    Path(path).write_text("\n".join(WORDS) + "\n")
    return transformers.BertTokenizerFast(vocab=str(path))


def classifier() -> MeanPooledClassifier:
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=len(WORDS), hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32
    )
    return MeanPooledClassifier(transformers.BertModel(config, add_pooling_layer=False), 16, 3).eval()


def test_each_description_is_labelled_as_what_it_describes(tokenizer: Any) -> None:
    model = classifier()
    start_head(model, tokenizer, [["good film"], ["bad film"], ["dull"]])
    encoded = tokenizer(["good film", "bad film", "dull"], return_tensors="pt", padding=True)
    assert logits_of(model, encoded).argmax(1).tolist() == [0, 1, 2]


def test_the_widest_margin_has_the_norm_that_was_asked_for(tokenizer: Any) -> None:
    model = classifier()
    start_head(model, tokenizer, TEXTS, margin_norm=2.5)
    weight = model.head.weight.detach()
    assert torch.cdist(weight, weight).max() == pytest.approx(2.5, rel=1e-4)
    assert weight.sum(0).abs().max() < 1e-5


def test_gradient_reaches_the_encoders_biases_in_the_first_step_and_with_a_zero_head_it_does_not(
    tokenizer: Any,
) -> None:
    model, batch = classifier(), made_up_batch(6, len(WORDS))
    step = dpb.compile(model, text_loss, batch)
    for started in (False, True):
        if started:
            start_head(model, tokenizer, TEXTS)
        gradients = step.per_sample_gradients(batch)
        assert any(bool(g.any()) for name, g in gradients.items() if name.startswith("encoder.")) is started


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        ([["good"], ["bad"]], "each of the 3 labels"),
        ([["good"], [], ["bad"]], "each of the 3 labels"),
        (["good", "bad", "dull"], "each of the 3 labels"),
        ([["good"], ["good"], ["good"]], "mean the same"),
    ],
)
def test_descriptions_that_cannot_start_a_head_are_refused_and_leave_it_alone(
    tokenizer: Any, texts: Any, message: str
) -> None:
    model = classifier()
    with pytest.raises(DataError, match=message):
        start_head(model, tokenizer, texts)
    assert not model.head.weight.any()
