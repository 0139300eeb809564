"""`dropout=True`: masks are inputs of the graph, drawn by the host for each record, and mean what torch's own mean."""

from __future__ import annotations

import functools
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from fit_cases import biases, run
from scipy import stats
from small_models import Sandwich, losses, points, refusal
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import dpbitfit_fx as dpb
from dpbitfit_fx.dropout import draw_masks
from dpbitfit_fx.engine import Engine, build_engine
from dpbitfit_fx.errors import ExportError
from dpbitfit_fx.passes import random_draws
from dpbitfit_fx.passes.joint_graph import Draw
from dpbitfit_fx.privacy_statement import PrivacyStatement
from dpbitfit_fx.randomness import SecretKey
from dpbitfit_fx.sampling import PoissonSampler

aten = torch.ops.aten
KEY = SecretKey.insecure_for_tests(5)
RECORDS = [11, 2, 40]


def dropping(p: float = 0.5, middle: Any = None) -> Sandwich:
    torch.manual_seed(0)
    return Sandwich(nn.Dropout(p) if middle is None else middle).train()


# -- the oracle ---------------------------------------------------------------------------------------------------------


class Given(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Torch's kernels that draw return the given numbers, one after the other. Written apart from passes/replay.py."""

    def __init__(self, numbers: list[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.numbers = list(numbers)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is aten.bernoulli_.float:
            return args[0].copy_(self.numbers.pop(0).reshape(args[0].shape))
        if func is aten.rand.default:
            return self.numbers.pop(0).reshape(args[0]).to((kwargs or {}).get("dtype") or torch.get_default_dtype())
        if func is aten.rand_like.default:
            return self.numbers.pop(0).reshape(args[0].shape).to(args[0].dtype)
        assert torch.Tag.nondeterministic_seeded not in func.tags, func
        return func(*args, **(kwargs or {}))


def numbers_of(step: Any, masks: dict[str, Tensor], row: int) -> list[Tensor]:
    """What a sample draws, in call order, from its row of the flat masks."""
    start, found = dict.fromkeys(masks, 0), []
    for draw in step.joint.draws:
        name = "dropout_uniform" if draw.keep is None else "dropout_keep"
        found.append(masks[name][row, start[name] : start[name] + draw.size])
        start[name] += draw.size
    return found


def one_at_a_time(step: Any, model: nn.Module, loss: Any, rows: Any, masks: dict[str, Tensor]) -> dict[str, Tensor]:
    """Per-sample gradients by autograd on the original model, each sample alone with its own numbers."""
    named = dict(model.named_parameters())
    chosen = [named[n] for n in step.trainable_names]
    found: list[tuple[Tensor, ...]] = []
    for row in range(len(next(iter(masks.values())))):
        with Given(numbers_of(step, masks, row)) as given:
            value = loss(model, rows(row)).sum()
            gradients = torch.autograd.grad(value, chosen, allow_unused=True)
        assert not given.numbers, "every number was used"
        found.append(tuple(torch.zeros_like(p) if g is None else g for g, p in zip(gradients, chosen, strict=True)))
    return {n: torch.stack([f[i] for f in found]) for i, n in enumerate(step.trainable_names)}


def assert_equal_to_oracle(model: nn.Module, loss: Any, batch: Any, **options: Any) -> Any:
    """Compiles in float64 with dropout; gradients equal the oracle's, and other masks give other gradients."""
    step = dpb.compile(model, loss, batch, dropout=True, **options)
    size = len(batch[0])
    masks = step.dropout_masks(range(size), KEY, 3)
    ours = step.per_sample_gradients(batch, masks)
    theirs = one_at_a_time(step, model, loss, lambda i: tuple(x[i : i + 1] for x in batch), masks)
    whole = max(float(g.norm()) for g in theirs.values())
    for name, expected in theirs.items():
        assert float((ours[name] - expected).norm()) <= 1e-9 * max(float(expected.norm()), 1e-3 * whole), name
    others = step.per_sample_gradients(batch, step.dropout_masks(range(size), KEY, 4))
    assert max(float((ours[n] - others[n]).norm()) for n in ours) > 1e-3 * whole
    return step


# -- the models ---------------------------------------------------------------------------------------------------------


def cross_entropy(model: Any, batch: Any) -> Tensor:
    out = model(batch[0])
    return F.cross_entropy(getattr(out, "logits", out), batch[1], reduction="none")


TOKENS = torch.randint(0, 30, (3, 5), generator=torch.Generator().manual_seed(0))
FLOATS = torch.randn(3, 5, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
IMAGES = torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
LABELS = torch.tensor([0, 1, 1])


def bert() -> nn.Module:
    from transformers import BertConfig, BertForSequenceClassification

    return BertForSequenceClassification(
        BertConfig(
            vocab_size=30,
            hidden_size=8,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=8,
            max_position_embeddings=8,
            hidden_dropout_prob=0.2,
            attention_probs_dropout_prob=0.3,
        )
    )


def gpt2() -> nn.Module:
    from transformers import GPT2Config, GPT2ForSequenceClassification

    return GPT2ForSequenceClassification(
        GPT2Config(vocab_size=30, n_positions=8, n_embd=8, n_layer=1, n_head=2, pad_token_id=0, resid_pdrop=0.2)
    )


def vit() -> nn.Module:
    from transformers import ViTConfig, ViTForImageClassification

    return ViTForImageClassification(
        ViTConfig(
            hidden_size=8,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=8,
            image_size=8,
            patch_size=4,
            hidden_dropout_prob=0.2,
            attention_probs_dropout_prob=0.3,
        )
    )


class Mean(nn.Module):
    """``inner`` on x [B, T, 8], then the mean over T and a head."""

    def __init__(self, inner: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.inner, self.head = nn.Linear(8, 8), inner, nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Any:
        return self.head(self.inner(self.first(x)).mean(1))


class Recurrent(nn.Module):
    def __init__(self, kind: Any) -> None:
        super().__init__()
        self.net = kind(8, 4, 2, dropout=0.4, batch_first=True, bidirectional=True)

    def forward(self, x: Tensor) -> Any:
        return self.net(x)[0]


class DropPath(nn.Module):
    """Stochastic depth as timm and as the Swin Transformer write it, and Dropout's kin."""

    def __init__(self) -> None:
        super().__init__()
        self.block, self.second = nn.Linear(8, 8), nn.Linear(8, 8)
        self.whole, self.alpha = nn.Dropout1d(0.3), nn.AlphaDropout(0.2)

    def forward(self, x: Tensor) -> Any:
        if not self.training:
            return x + self.block(x)
        kept = torch.rand((x.shape[0], 1, 1), dtype=x.dtype) + 0.6
        x = x + self.block(x) / 0.6 * kept.floor_()
        drop = x.new_empty((x.shape[0], 1, 1)).bernoulli_(0.7)
        x = x + self.second(x) * drop.div_(0.7)
        x = x * (torch.rand_like(x) > 0.2)
        return F.dropout(self.alpha(self.whole(x)), 0.1, inplace=True)


class Checkpointed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.block = nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.3), nn.Linear(8, 8), nn.Dropout(0.4))

    def forward(self, x: Tensor) -> Any:
        return checkpoint(self.block, x, use_reentrant=False)


class CausalAttention(nn.Module):
    """Grouped queries, a causal mask, dropout of weights in the fused call."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k = nn.Linear(8, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Any:
        q, k = (m(x).unflatten(-1, (-1, 2)).transpose(1, 2) for m in (self.q, self.k))
        found = F.scaled_dot_product_attention(q, k, k, dropout_p=0.4, is_causal=True, enable_gqa=True)
        return found.transpose(1, 2).flatten(2)


def encoder() -> nn.Module:
    layer = nn.TransformerEncoderLayer(8, 2, 8, 0.3, batch_first=True)
    return Mean(nn.TransformerEncoder(layer, 1, enable_nested_tensor=False))


MODELS: dict[str, tuple[Callable[[], nn.Module], Tensor, int]] = {
    "bert": (bert, TOKENS, 5),
    "gpt2": (gpt2, TOKENS, 4),
    "vit": (vit, IMAGES, 4),
    "encoder": (encoder, FLOATS, 4),
    "lstm": (lambda: nn.Sequential(Mean(Recurrent(nn.LSTM))), FLOATS, 1),
    "gru": (lambda: nn.Sequential(Mean(Recurrent(nn.GRU))), FLOATS, 1),
    "drop path": (lambda: Mean(DropPath()), FLOATS, 6),
    "attention": (lambda: Mean(CausalAttention()), FLOATS, 1),
}


@pytest.mark.parametrize("name", MODELS)
def test_per_sample_gradients_equal_autograd_with_the_same_masks(name: str) -> None:
    make, x, draws = MODELS[name]
    torch.manual_seed(0)
    step = assert_equal_to_oracle(make().double().train(), cross_entropy, (x, LABELS))
    assert len(step.joint.draws) == draws
    assert all(d.origin for d in step.joint.draws)


def test_a_checkpointed_block_drops_the_same_when_it_is_computed_again() -> None:
    torch.manual_seed(0)
    step = dpb.compile(Mean(Checkpointed()).double().train(), cross_entropy, (FLOATS, LABELS), dropout=True)
    assert [d.keep for d in step.joint.draws] == [0.7, 0.6]


class Unused(nn.Module):
    def forward(self, x: Tensor) -> Any:
        F.dropout(x, 0.45)
        return F.dropout(torch.tanh(F.dropout(x, 0.25)), 0.3)


def test_a_draw_that_the_result_does_not_use_is_passed_over() -> None:
    step = dpb.compile(Mean(Unused()), cross_entropy, (FLOATS.float(), LABELS), dropout=True)
    assert [d.keep for d in step.joint.draws] == [0.75, 0.7]


def test_ghost_norms_and_added_biases_work_with_dropout() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8, bias=False), nn.Dropout(0.5), nn.Linear(8, 2)).double().train()

    def loss(model: Any, batch: Any) -> Tensor:
        return F.cross_entropy(model(batch[0]).mean(1), batch[1], reduction="none")

    step = dpb.compile(model, loss, (FLOATS, LABELS), dropout=True, add_bias=True)
    assert {b.name for b in step.added_biases} == {"0.bias"}
    whole = dpb.compile(model, loss, (FLOATS, LABELS), dropout=True, trainable="all", ghost_norms=True)
    masks = whole.dropout_masks(RECORDS, KEY, 0)
    ghosts = whole.clipped_sum((FLOATS, LABELS), dropout_masks=masks)
    assert whole.joint.ghosts
    plain = dpb.compile(model, loss, (FLOATS, LABELS), dropout=True, trainable="all", ghost_norms=False)
    for name, value in plain.clipped_sum((FLOATS, LABELS), dropout_masks=masks).items():
        assert torch.allclose(ghosts[name], value, rtol=1e-9, atol=1e-12)


# -- what the check of the meaning kills -------------------------------------------------------------------------------


def test_a_wrong_scale_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(random_draws, "_noise", lambda keep, p, dtype: keep.to(dtype))
    assert "does not mean the same" in refusal(dropping(), dropout=True)


def test_masks_in_each_others_place_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = random_draws._inputs
    model = dropping(middle=nn.Sequential(nn.Dropout(0.5), nn.Tanh(), nn.Linear(8, 8), nn.Dropout(0.5)))
    dpb.compile(model, losses, points(), dropout=True)
    monkeypatch.setattr(random_draws, "_inputs", lambda *a: (lambda found: (found[0][::-1], found[1]))(inputs(*a)))
    message = refusal(model, dropout=True)
    assert "given the same random numbers" in message and "module middle.0" in message


# -- refused -----------------------------------------------------------------------------------------------------------


class Noisy(nn.Module):
    def forward(self, h: Tensor) -> Any:
        return h + torch.randn_like(h)


class Shared(nn.Module):
    def forward(self, h: Tensor) -> Any:
        return h * (torch.rand(h.shape[1]) > 0.1)


class Chosen(nn.Module):
    def forward(self, h: Tensor) -> Any:
        return h[:, torch.multinomial(torch.ones(8), 8)]


def mixing_when_low(h: Tensor) -> Tensor:
    return h - h.mean(0) * (torch.rand(len(h), 1) < 0.1)


def mixing_when_high(h: Tensor) -> Tensor:
    return h - h.mean(0) * (torch.rand(len(h), 1) > 0.9)


def by_numpy(h: Tensor) -> Tensor:
    return h * float(np.random.rand() > 0.0001)


def by_python(h: Tensor) -> Tensor:
    return h if random.random() > 1e-9 else torch.tanh(h)


def layer_drop(h: Tensor) -> Tensor:
    return h if torch.rand(()) > 0.1 else torch.tanh(h)


def mixing(h: Tensor) -> Tensor:
    return F.dropout(h, 0.1) - h.mean(0)


@pytest.mark.parametrize(
    ("middle", "words"),
    [
        (
            Noisy(),
            ["module middle", "aten.randn_like", "return h + torch.randn_like(h)", "dropout=True does not cover"],
        ),
        (Chosen(), ["module middle", "aten.multinomial", "torch.multinomial(torch.ones(8), 8)"]),
        (Shared(), ["module middle", "share", "torch.rand(h.shape[1])"]),
        (by_numpy, ["Python's or numpy's random generator"]),
        (by_python, ["Python's or numpy's random generator"]),
        (layer_drop, ["if torch.rand(()) > 0.1"]),
        (mixing_when_low, ["does not mean the same sample by sample"]),
        (mixing_when_high, ["does not mean the same sample by sample"]),
        (mixing, ["does not mean the same sample by sample"]),
    ],
)
def test_randomness_that_no_record_owns_is_refused_by_its_line(middle: Any, words: list[str]) -> None:
    message = refusal(dropping(middle=middle), dropout=True)
    assert all(word in message for word in words), message


def test_asked_for_without_effect_is_refused() -> None:
    message = refusal(dropping().eval(), dropout=True)
    assert "eval mode" in message and "model.train()" in message


def test_masks_must_be_given_where_the_step_takes_them_and_only_there() -> None:
    step, plain = (dpb.compile(dropping(), losses, points(), dropout=on) for on in (True, False))
    masks = step.dropout_masks(range(4), KEY, 0)
    with pytest.raises(dpb.CompileRefused, match="dropout_masks"):
        step.clipped_sum(points())
    with pytest.raises(dpb.CompileRefused, match="without dropout"):
        plain.clipped_sum(points(), dropout_masks=masks)
    with pytest.raises(dpb.CompileRefused, match=r"expected \(4, 8\)"):
        step.clipped_sum(points(), dropout_masks={"dropout_keep": masks["dropout_keep"][:3]})
    with pytest.raises(ExportError, match="dropout=True"):
        dpb.export_onnx(step, "nowhere", noise_multiplier=1.0, expected_batch_size=4.0)


# -- leaves the rest alone ---------------------------------------------------------------------------------------------


def test_dropout_that_is_off_or_of_probability_zero_leaves_the_graph_as_it_is() -> None:
    texts = [
        dpb.compile(model, losses, points(), dropout=on).joint.text()
        for model, on in [
            (dropping(0.5).eval(), False),
            (dropping(0.5), False),
            (dropping(0.0), True),
        ]
    ]
    assert texts[0] == texts[1] == texts[2]
    assert dpb.compile(dropping(0.5), losses, points(), dropout=True).joint.text() != texts[0]


def test_compile_neither_draws_from_nor_seeds_the_users_generators() -> None:
    model = dropping()
    torch.manual_seed(9)
    before = torch.get_rng_state()
    dpb.compile(model, losses, points(), dropout=True)
    assert torch.equal(before, torch.get_rng_state())


def test_the_report_names_each_draw_with_the_users_line() -> None:
    report = dpb.compile(dropping(0.25), losses, points(), dropout=True).report()
    assert len(report.dropout) == 1 and "keeps 0.75 [1, 8] a sample" in report.dropout[0]
    assert "module middle" in str(report)


# -- masks -------------------------------------------------------------------------------------------------------------


def test_a_records_mask_is_a_function_of_key_step_and_record_alone() -> None:
    step = dpb.compile(dropping(), losses, points(), dropout=True)
    whole = step.dropout_masks(range(64), KEY, 3)["dropout_keep"]
    for records in ([5], [9, 5, 60], [60, 9, 5, 1, 2]):
        padded = step.dropout_masks(records, KEY, 3, 6)["dropout_keep"]
        assert torch.equal(padded[: len(records)], whole[records])
        assert bool(padded[len(records) :].all()), "rows without a record drop nothing"
    others = [
        step.dropout_masks(range(64), KEY, 4)["dropout_keep"],
        step.dropout_masks(range(64, 128), KEY, 3)["dropout_keep"],
        step.dropout_masks(range(64), SecretKey.insecure_for_tests(6), 3)["dropout_keep"],
    ]
    for other in others:
        agree = int((other == whole).sum())
        assert stats.binomtest(agree, whole.numel(), 0.5).pvalue > 1e-6
    assert stats.binomtest(int((whole == whole).sum()), whole.numel(), 0.5).pvalue < 1e-6, "a repeated mask would show"


def keep_rate_is(p: float, kept: Tensor) -> bool:
    return bool(stats.binomtest(int(kept.sum()), kept.numel(), p).pvalue > 1e-4)


@pytest.mark.parametrize("keep", [0.1, 0.5, 0.9, 0.999])
def test_masks_keep_with_their_probability_and_the_test_would_see_another(keep: float) -> None:
    kept = draw_masks([Draw((50,), keep)], KEY, range(8000), 8000)["dropout_keep"]
    assert keep_rate_is(keep, kept)
    assert not keep_rate_is(keep + 0.25 * (1 - keep), kept)
    columns = kept.sum(0).numpy()
    assert all(stats.binomtest(int(c), len(kept), keep).pvalue > 1e-5 for c in columns)


def test_uniforms_are_uniform_and_the_test_would_see_another_law() -> None:
    draws = [Draw((3,), 0.5), Draw((40,), None)]
    u = draw_masks(draws, KEY, range(2000), 2000)["dropout_uniform"].flatten().double().numpy()
    assert u.min() >= 0 and u.max() < 1
    assert stats.kstest(u, "uniform").pvalue > 1e-4
    assert stats.kstest(u**1.05, "uniform").pvalue < 1e-4


def test_certain_masks_are_certain() -> None:
    masks = draw_masks([Draw((1000,), 1.0), Draw((1000,), 0.0)], KEY, [0], 1)["dropout_keep"]
    assert bool(masks[0, :1000].all()) and not bool(masks[0, 1000:].any())


# -- the mechanism -----------------------------------------------------------------------------------------------------


def mlp() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Dropout(0.5), nn.Linear(6, 2)).train()


@functools.cache
def dataset() -> torch.utils.data.TensorDataset:
    x = torch.randn(120, 4, generator=torch.Generator().manual_seed(1))
    return torch.utils.data.TensorDataset(x, (x.sum(1) > 0).long())


def engine(size: int = 8, **options: Any) -> Engine:
    arguments: dict[str, Any] = {"clipping": dpb.FlatClipping(1.0), "dropout": True} | options
    return build_engine(
        mlp(), losses, dataset(), PoissonSampler(120, 0.1, 5), 1.0, 12.0, physical_batch_size=size, **arguments
    )


def test_the_clipped_sum_of_a_record_is_its_own_whoever_else_is_there_and_however_the_batch_is_split() -> None:
    secret = b"s" * 32
    small, large = engine(3), engine(16)
    rows = [4, 100, 17, 63, 5, 90, 33]
    whole = large.clipped_sum(rows, secret)
    assert torch.allclose(small.clipped_sum(rows, secret), whole, atol=1e-6)
    assert torch.allclose(small.clipped_sum(rows[::-1], secret), whole, atol=1e-6)
    assert torch.allclose(sum(large.clipped_sum([r], secret) for r in rows), whole, atol=1e-6)  # type: ignore[arg-type]
    assert not torch.allclose(large.clipped_sum(rows, b"t" * 32), whole, atol=1e-3), "another step drops otherwise"


@pytest.mark.parametrize("clipping", [dpb.FlatClipping(0.5), dpb.AutomaticClipping(0.5)])
def test_neighbours_are_no_further_apart_than_the_sensitivity(clipping: Any) -> None:
    one, random_rows = engine(8, clipping=clipping), np.random.default_rng(0)
    largest = 0.0
    for step in range(60):
        rows = random_rows.choice(120, size=int(random_rows.integers(1, 12)), replace=False).tolist()
        secret = bytes([step]) * 32
        apart = float((one.clipped_sum(rows, secret) - one.clipped_sum(rows[1:], secret)).norm())
        largest = max(largest, apart)
        assert apart <= 0.5 * (1 + 1e-5)
    assert largest > 0.25, "the bound is not met by gradients of zero"


def fitted(folder: Path | None, **changes: Any) -> Any:
    arguments = {"model": mlp(), "loss_fn": losses, "dataset": dataset(), "dropout": True} | changes
    arguments |= {"target_epsilon": None, "noise_multiplier": 1.0}
    arguments.setdefault("max_steps", 6)
    return run(folder, **arguments)


class _Killed(Exception):
    pass


def test_a_resumed_run_drops_the_same_and_ends_bit_for_bit_the_same(tmp_path: Path) -> None:
    def kill(info: Any) -> None:
        if info.step == 4:
            raise _Killed

    straight = fitted(tmp_path / "straight")
    with pytest.raises(_Killed):
        fitted(tmp_path / "killed", callbacks=[kill])
    resumed = fitted(tmp_path / "killed")
    assert resumed.charged_steps == 0
    assert torch.equal(biases(straight.model), biases(resumed.model))
    off = fitted(None, dropout=False)
    assert not torch.equal(biases(straight.model), biases(off.model))
    assert torch.allclose(biases(straight.model), biases(fitted(None, physical_batch_size=5).model), atol=1e-3)
    statement = PrivacyStatement.load(tmp_path / "straight" / "privacy.json")
    assert "masks" in statement.public_declarations["dropout"]
    assert "dropout" not in off.statement.public_declarations


def test_eval_fn_sees_the_model_in_eval_mode_and_the_model_comes_back_in_its_own() -> None:
    seen: list[bool] = []

    def evaluate(model: nn.Module) -> float:
        seen.append(any(m.training for m in model.modules()))
        return 0.0

    result = fitted(None, eval_fn=evaluate, max_steps=2)
    assert seen and not any(seen)
    assert all(m.training for m in result.model.modules())
