"""The models that the compiler must handle unedited, each small, with a loss per sample and a pool of made-up rows."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map

import dpbitfit_fx as dpb

transformers = pytest.importorskip("transformers")

POOL = 6  # distinct rows per model; the example batch is the first four
Loss = Callable[[Any, Any], Tensor]


@dataclasses.dataclass(frozen=True)
class Case:
    """``make()`` gives the untrained model, ``loss(model, batch)`` its losses [B], ``pool`` ``POOL`` rows of data.

    ``attention`` is how many fused attention calls one forward makes, ``family`` what the model is for, ``trainable``
    what is given to ``compile``.
    """

    name: str
    make: Callable[[], nn.Module]
    loss: Loss
    pool: Any
    attention: int = 0
    family: str = ""
    trainable: str | tuple[str, ...] = "bias"

    def rows(self, index: list[int], dtype: torch.dtype = torch.float32) -> Any:
        """A batch of these rows of the pool, floats in ``dtype``."""

        def take(x: Tensor) -> Tensor:
            x = x[torch.tensor(index)]
            return x.to(dtype) if x.dtype.is_floating_point else x

        return tree_map(take, self.pool)


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    losses: Tensor = F.cross_entropy(logits, labels, reduction="none")
    return losses


def text_loss(model: Any, batch: Any) -> Tensor:
    logits = model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    return cross_entropy(logits, batch["labels"])


def language_model_loss(model: Any, batch: Any) -> Tensor:
    """Mean negative log-likelihood over each sequence's own tokens."""
    logits = model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
    targets, kept = batch["input_ids"][:, 1:], batch["attention_mask"][:, 1:].to(logits.dtype)
    losses = F.cross_entropy(logits.transpose(1, 2), targets, reduction="none")
    means: Tensor = (losses * kept).sum(1) / kept.sum(1)
    return means


def image_loss(model: Any, batch: Any) -> Tensor:
    return cross_entropy(model(batch["pixel_values"]).logits, batch["labels"])


def audio_loss(model: Any, batch: Any) -> Tensor:
    return cross_entropy(model(batch["input_values"]).logits, batch["labels"])


class SeqFirstEncoder(nn.Module):
    """Time comes before the batch in every activation."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(100, 32)
        layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=False)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(32, 2)

    def forward(self, ids: Tensor, padding: Tensor) -> Any:
        return self.head(self.encoder(self.embed(ids.t()), src_key_padding_mask=padding).mean(0))


class LSTMClassifier(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(100, 8)
        self.lstm = nn.LSTM(8, 12, 2, batch_first=True, bidirectional=True)
        self.head = nn.Linear(24, 2)

    def forward(self, ids: Tensor) -> Any:
        return self.head(self.lstm(self.embed(ids))[0].mean(1))


def group_norm_cnn() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.GroupNorm(2, 8),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(8, 16, 3),
        nn.GroupNorm(4, 16),
        nn.GELU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(16, 2),
    )


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(10, 16), nn.Tanh(), nn.Linear(16, 2))


@functools.cache
def cases() -> dict[str, Case]:
    g = torch.Generator().manual_seed(0)
    ids = torch.randint(3, 90, (POOL, 10), generator=g)
    kept = torch.ones(POOL, 10, dtype=torch.long)
    kept[0, -4:], kept[2, -2:], kept[5, -1:] = 0, 0, 0
    labels = torch.tensor([0, 1, 1, 0, 1, 0])
    text = {"input_ids": ids, "attention_mask": kept, "labels": labels}
    image = {"pixel_values": torch.randn(POOL, 3, 32, 32, generator=g), "labels": labels}
    audio = {"input_values": torch.randn(POOL, 400, generator=g), "labels": labels}
    t = transformers
    kw: dict[str, Any] = {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 64,
    }
    words = {**kw, "vocab_size": 100}
    roberta = t.RobertaConfig(**words, max_position_embeddings=40)
    distilbert = t.DistilBertConfig(dim=32, n_layers=2, n_heads=4, hidden_dim=64, vocab_size=100)
    gpt2 = t.GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=100, n_positions=64, bos_token_id=1, eos_token_id=1)
    vit = t.ViTConfig(**kw, image_size=32, patch_size=8)
    swin = t.SwinConfig(image_size=32, patch_size=2, embed_dim=16, depths=[2, 2], num_heads=[2, 4], window_size=4)
    convnext = t.ConvNextConfig(hidden_sizes=[8, 16, 16, 32], depths=[1, 1, 1, 1])
    resnet = t.ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic")
    wav2vec2 = t.Wav2Vec2Config(
        **kw,
        conv_dim=(16, 16),
        conv_stride=(5, 2),
        conv_kernel=(10, 3),
        num_feat_extract_layers=2,
        num_conv_pos_embeddings=8,
        num_conv_pos_embedding_groups=4,
        classifier_proj_size=16,
    )
    llama = t.LlamaConfig(**words, num_key_value_heads=2, attention_bias=True, mlp_bias=True, pad_token_id=0)

    def seq_first_loss(model: Any, batch: Any) -> Tensor:
        return cross_entropy(model(batch["input_ids"], batch["attention_mask"] == 0), batch["labels"])

    def lstm_loss(model: Any, batch: Any) -> Tensor:
        return cross_entropy(model(batch["input_ids"]), batch["labels"])

    def cnn_loss(model: Any, batch: Any) -> Tensor:
        return cross_entropy(model(batch["pixel_values"]), batch["labels"])

    def mlp_loss(model: Any, batch: Any) -> Tensor:
        return cross_entropy(model(batch[0]), batch[1])

    found = [
        Case("bert", lambda: t.BertForSequenceClassification(t.BertConfig(**words)), text_loss, text, 2),
        Case("roberta", lambda: t.RobertaForSequenceClassification(roberta), text_loss, text, 2),
        Case("distilbert", lambda: t.DistilBertForSequenceClassification(distilbert), text_loss, text, 2),
        Case("gpt2", lambda: t.GPT2LMHeadModel(gpt2), language_model_loss, {k: text[k] for k in list(text)[:2]}, 2),
        Case("vit", lambda: t.ViTForImageClassification(vit), image_loss, image, 2),
        Case("swin", lambda: t.SwinForImageClassification(swin), image_loss, image),
        Case("convnext", lambda: t.ConvNextForImageClassification(convnext), image_loss, image),
        Case("resnet", lambda: t.ResNetForImageClassification(resnet), image_loss, image),
        Case("wav2vec2", lambda: t.Wav2Vec2ForSequenceClassification(wav2vec2), audio_loss, audio, 2),
        Case("llama", lambda: t.LlamaForSequenceClassification(llama), text_loss, text, 2),
        Case("seq_first_encoder", SeqFirstEncoder, seq_first_loss, text, 2),
        Case("lstm", LSTMClassifier, lstm_loss, {"input_ids": ids[:, :5], "labels": labels}),
        Case("group_norm_cnn", group_norm_cnn, cnn_loss, image),
        Case("mlp", mlp, mlp_loss, (torch.randn(POOL, 10, generator=g), labels)),
    ]
    return {c.name: c for c in found}


def build(case: Case, dtype: torch.dtype = torch.float32) -> nn.Module:
    """The model in eval mode, with biases and norms moved off their zeros and ones so that they matter."""
    torch.manual_seed(1)
    model = case.make().eval()
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() == 1:
                p.add_(torch.randn_like(p) * 0.1)
        for b in model.modules():
            if isinstance(b, nn.BatchNorm2d):
                assert b.running_mean is not None and b.running_var is not None
                b.running_mean.normal_(std=0.1)
                b.running_var.uniform_(0.5, 1.5)
    return model.to(dtype)


class _InFloat64(TorchFunctionMode):
    """Where the model's code asks for float32 by name (norms, softmax, rotations), it gets float64."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.float:
            return args[0].double()

        def widen(x: Any) -> Any:
            return torch.float64 if x is torch.float32 else x

        return func(*tree_map(widen, args), **{k: tree_map(widen, v) for k, v in (kwargs or {}).items()})


def in_dtype(loss: Loss, dtype: torch.dtype) -> Loss:
    """The same loss; for float64 in float64 throughout, since a 1e-10 claim is void across a cast to float32."""

    def exact(model: Any, batch: Any) -> Tensor:
        with _InFloat64():
            return loss(model, batch)

    return exact if dtype is torch.float64 else loss


def compile_case(case: Case, dtype: torch.dtype = torch.float32) -> dpb.PrivateStep:
    model, batch = build(case, dtype), case.rows([0, 1, 2, 3], dtype)
    return dpb.compile(model, in_dtype(case.loss, dtype), batch, trainable=case.trainable)


def loop(case: Case, names: tuple[str, ...], dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """``{parameter: [POOL, *shape]}``: a loop of single-sample autograd on the original model.

    Every sample is given twice and the first loss taken: torch 2.13 on CPU has wrong gradients of eval BatchNorm for a
    batch of one with some strides (design section 3).
    """
    model, loss_fn, found = build(case, dtype), in_dtype(case.loss, dtype), []
    params = dict(model.named_parameters())
    for row in range(POOL):
        loss = loss_fn(model, case.rows([row, row], dtype))
        chosen = [params[k] for k in names]
        grads = torch.autograd.grad(loss[0], chosen, allow_unused=True)
        found.append([torch.zeros_like(p) if g is None else g for g, p in zip(grads, chosen, strict=True)])
    return {k: torch.stack([g[i] for g in found]) for i, k in enumerate(names)}


@functools.cache
def compiled(name: str, dtype: torch.dtype = torch.float32) -> dpb.PrivateStep:
    """One compile per model and dtype for the whole test session."""
    return compile_case(cases()[name], dtype)


@functools.cache
def oracle(name: str, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """The loop's gradients of every parameter that the compiled step trains."""
    return loop(cases()[name], compiled(name).trainable_names, dtype)


def flat(grads: dict[str, Tensor]) -> Tensor:
    """``[B, D]`` in float64."""
    return torch.cat([g.flatten(1).double() for g in grads.values()], 1)


def relative_errors(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> Tensor:
    """[B]: distance of each sample's whole gradient over its norm."""
    a, b = flat(ours), flat(theirs)
    errors: Tensor = (a - b).norm(dim=1) / b.norm(dim=1)
    return errors
