"""A model that mixes samples has no per-sample meaning and is refused; one that only looks so is accepted."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from memory import peak_bytes
from small_models import Sandwich, losses, points, refusal
from torch import Tensor, nn

import dpbitfit_fx as dpb
from dpbitfit_fx.compile import check_rows
from dpbitfit_fx.passes.capture import capture
from dpbitfit_fx.passes.joint_graph import Source
from dpbitfit_fx.passes.meaning import check_meaning, run_joint
from dpbitfit_fx.passes.probes import alike, monotonous, recombined, twinned, varied


class BatchNormInside(nn.Module):
    """Standardizes over the batch by hand, inside a named module."""

    def forward(self, h: Tensor) -> Tensor:
        return h - h.mean(0)


def test_the_first_module_that_mixes_is_named() -> None:
    message = refusal(Sandwich(BatchNormInside()))
    assert "The first module whose output for a sample depends on the others is middle (BatchNormInside)" in message


def contrast(model: Any, batch: Any) -> Tensor:
    """In-batch negatives: every sample is every other sample's counter-example."""
    a = F.normalize(model(batch[0]), dim=1)
    found: Tensor = F.cross_entropy(a @ a.T, torch.arange(len(a)), reduction="none")
    return found


BAD_LOSSES: dict[str, tuple[Any, str]] = {
    "in-batch contrast": (contrast, "does not mean the same"),
    "pairs of neighbours": (lambda m, b: (m(b[0]) - m(b[0]).roll(1, 0)).pow(2).sum(1), "does not mean the same"),
    "root of the sum": (lambda m, b: losses(m, b).sum().sqrt(), "neither the mean nor the sum"),
    "worst sample": (lambda m, b: losses(m, b).max(), "neither the mean nor the sum"),
    "log-sum-exp": (lambda m, b: losses(m, b).logsumexp(0), "neither the mean nor the sum"),
    "mean plus sum": (lambda m, b: losses(m, b).mean() + losses(m, b).sum(), "neither the mean nor the sum"),
    "weighted by class counts": (
        lambda m, b: F.cross_entropy(m(b[0]), b[1], weight=torch.tensor([1.0, 2.0, 3.0])),
        "neither the mean nor the sum",
    ),
    "divided by a label count": (lambda m, b: losses(m, b) / (b[1] == 1).sum(), "does not mean the same"),
}


@pytest.mark.parametrize("kind", BAD_LOSSES)
def test_a_loss_that_is_no_sum_or_mean_over_samples_is_refused(kind: str) -> None:
    loss, words = BAD_LOSSES[kind]
    assert words in refusal(Sandwich(), loss)


def over_class_two(model: Any, batch: Any) -> Tensor:
    chosen = batch[1] == 2
    found: Tensor = (losses(model, batch) * chosen).sum() / chosen.sum().clamp(min=1)
    return found


def test_an_example_batch_from_which_nothing_is_learned_is_refused_for_it_proves_nothing() -> None:
    x, labels = points()
    assert "neither the mean nor the sum" in refusal(Sandwich(), over_class_two, (x, labels))
    assert "zero for every row of example_batch" in refusal(Sandwich(), over_class_two, (x, labels % 2))
    dpb.compile(Sandwich(), lambda m, b: losses(m, b) * (b[1] == 2), (x, labels))  # one row of four is enough


@pytest.mark.parametrize("reduce", ["mean", "sum"])
def test_a_scalar_loss_that_is_the_mean_or_the_sum_gives_the_same_gradients(reduce: str) -> None:
    model = Sandwich()
    scalar = dpb.compile(model, lambda m, b: getattr(losses(m, b), reduce)(), points())
    rows = dpb.compile(model, losses, points())
    for key, value in rows.per_sample_gradients(points(5)).items():
        assert torch.allclose(scalar.per_sample_gradients(points(5))[key], value, rtol=1e-6, atol=1e-8)


class Tagger(nn.Module):
    """A label for every token: ids [B, T] -> logits [B, T, 4]."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(20, 8), nn.Linear(8, 4)

    def forward(self, ids: Tensor) -> Any:
        return self.head(self.embed(ids))


def tokens(padded: bool) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 4, (4, 5), generator=g)
    if padded:
        labels[1, 3:] = -100
    return {"ids": torch.randint(0, 20, (4, 5), generator=g), "labels": labels}


def token_mean(model: Any, batch: Any) -> Tensor:
    """What Hugging Face models return for ``labels=``: the mean over all tokens of the batch that count."""
    found: Tensor = F.cross_entropy(model(batch["ids"]).transpose(1, 2), batch["labels"], ignore_index=-100)
    return found


def test_a_mean_over_the_tokens_of_a_padded_batch_is_refused() -> None:
    assert "neither the mean nor the sum" in refusal(Tagger(), token_mean, tokens(padded=True))
    dpb.compile(Tagger(), token_mean, tokens(padded=False))  # here it is the mean over samples


class SharedToken(nn.Module):
    """Divides by the largest of the batch, a token that every example row has: no two of them disagree about it."""

    def __init__(self, ends: bool = False) -> None:
        super().__init__()
        self.embed, self.head, self.ends = nn.Embedding(20, 8), nn.Linear(8, 3), ends
        with torch.no_grad():
            self.embed.weight[7] *= 10

    def forward(self, ids: Tensor) -> Any:
        if self.ends and torch.unique((ids == 7).sum(1)).numel() > 1:
            raise ValueError("every sequence must have as many ends")  # BART's classifier says so too
        h = self.embed(ids)
        return self.head((h if self.ends else h / h.abs().max()).mean(1))


def shared_token() -> tuple[Tensor, Tensor]:
    ids = torch.randint(0, 7, (4, 5), generator=torch.Generator().manual_seed(0))
    ids[torch.arange(4), torch.arange(4)] = 7  # each row has one, each in a place of its own
    return ids, torch.arange(4) % 3


def test_mixing_that_shows_in_no_two_example_rows_is_refused_by_rows_that_are_made_of_them() -> None:
    assert "does not mean the same sample by sample" in refusal(SharedToken(), losses, shared_token())


class Deduplicates(SharedToken):
    """Divides by the number of equal sequences in the batch: no two example rows are equal."""

    def forward(self, ids: Tensor) -> Any:
        copies = (ids[:, None] == ids[None]).all(-1).sum(1)
        return self.head(self.embed(ids).mean(1) / copies[:, None])


def test_a_model_that_looks_for_equal_rows_is_refused_though_no_example_rows_are_equal() -> None:
    assert "does not mean the same sample by sample" in refusal(Deduplicates(), losses, shared_token())


def test_a_model_that_does_not_take_rows_made_of_others_is_judged_by_the_rows_it_was_given() -> None:
    model, (ids, labels) = SharedToken(ends=True), shared_token()
    step = dpb.compile(model, losses, (ids, labels))
    (alone,) = torch.autograd.grad(F.cross_entropy(model(ids[:1]), labels[:1]), [model.head.bias])
    assert torch.allclose(step.per_sample_gradients((ids, labels))["head.bias"][0], alone, atol=1e-6)


def test_a_mask_moves_with_the_ids_that_it_covers_and_labels_stay() -> None:
    ids = torch.arange(20).view(4, 5)
    x = torch.rand(4, 5)
    made = recombined([ids, ids % 3 > 0, torch.arange(4), x])
    assert made is not None and made[0].shape == (4, 5) and not torch.equal(made[0], ids)
    assert torch.equal(made[0] % 5, ids % 5) and torch.equal(made[1], made[0] % 3 > 0)
    assert torch.equal(made[2], torch.arange(4)) and made[3] is x
    assert recombined([x, torch.arange(4)]) is None


def zeros(rows: int = 4) -> tuple[Tensor, Tensor]:
    """The laziest example batch: no row differs from another."""
    return torch.zeros(rows, 6), torch.zeros(rows, dtype=torch.long)


def weighted(reduce: Any) -> Any:
    return lambda model, batch: reduce(losses(model, batch[:2]), batch[2])


@pytest.mark.parametrize(
    ("loss", "batch"),
    [
        (contrast, zeros()),
        (BAD_LOSSES["weighted by class counts"][0], (torch.rand(4, 6), torch.zeros(4, dtype=torch.long))),
        (over_class_two, (torch.rand(4, 6), torch.full((4,), 2))),
        (weighted(lambda each, w: (each * w).sum() / w.sum()), (*points(4), torch.ones(4))),
        (
            weighted(lambda each, w: (each * w).sum() / w.sum().clamp(min=1)),
            (*points(4), torch.ones(4, dtype=torch.bool)),
        ),
    ],
    ids=["zeros", "one class", "one class with a gradient", "equal weights", "all of them counted"],
)
def test_what_mixes_through_a_value_that_all_example_rows_share_is_refused(loss: Any, batch: Any) -> None:
    assert "does not mean the same sample by sample" in refusal(Sandwich(), loss, batch)
    dpb.compile(Sandwich(), losses, batch[:2])  # the control: of the same rows, with a loss of its own for each


def test_batch_statistics_are_refused_though_the_example_is_all_zeros() -> None:
    message = refusal(Sandwich(BatchNormInside()), losses, zeros())
    assert "The first module whose output for a sample depends on the others is middle (BatchNormInside)" in message


class OneToken(nn.Module):
    """Takes no other token than 5."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(4, 3)

    def forward(self, ids: Tensor) -> Any:
        if not torch.compiler.is_exporting() and bool((ids != 5).any()):
            raise ValueError("an unknown token")
        return self.head(ids.float())


def test_a_model_that_takes_no_other_values_is_judged_by_what_still_differs_between_rows() -> None:
    ids = torch.full((4, 4), 5)
    dpb.compile(OneToken(), losses, (ids, torch.arange(4) % 3))
    only_one_label = lambda m, b: losses(m, b) / (b[1] == 1)  # noqa: E731 - no finite loss of another
    assert "All rows of example_batch are the same" in refusal(
        OneToken(), only_one_label, (ids, torch.ones(4).long())
    )


def test_values_that_all_rows_share_are_made_to_differ_and_others_stay() -> None:
    batch = [
        torch.zeros(4, 6),
        torch.rand(4, 6),
        torch.ones(4, 5, dtype=torch.bool),
        torch.full((4,), 7),
        torch.arange(4),
    ]
    assert alike(batch) == [0, 2, 3]
    for at in alike(batch):
        made = varied(batch[at], torch.Generator().manual_seed(0))
        assert made.dtype == batch[at].dtype and made.shape == batch[at].shape and alike([made]) == []
    assert set(varied(batch[3], torch.Generator().manual_seed(0)).tolist()) == {0, 7}
    rows = twinned(torch.arange(17))
    assert rows[0] == rows[1] == rows[16] and rows[2:16].tolist() == list(range(2, 16))


class RemembersTheLargest(SharedToken):
    """Divides by the largest token of the batch before: the same number for all batches with a token that every row holds."""

    largest = 19.0

    def forward(self, ids: Tensor) -> Any:
        before = self.largest
        if not torch.compiler.is_exporting():
            self.largest = float(ids.max())
        return self.head(self.embed(ids).mean(1) / before)


def test_a_model_that_remembers_what_all_example_rows_share_is_refused() -> None:
    ids, labels = shared_token()
    model = RemembersTheLargest()
    model.largest = float(ids.max())
    assert "does not mean the same sample by sample" in refusal(model, losses, (ids, labels))


def test_two_rows_are_made_of_one_id_each_and_masks_stay() -> None:
    ids, mask = torch.arange(20).view(4, 5), torch.ones(4, 5, dtype=torch.long)
    made = monotonous([ids, mask, torch.rand(4, 5)])
    assert [x.tolist() for x, _, _ in made] == [[[i] * 5, [i + 5] * 5] for i in (0, 2, 4)]
    assert all(x.tolist() == mask[:2].tolist() for _, x, _ in made)
    assert monotonous([torch.rand(4, 5), torch.arange(4)]) == []


def test_the_check_holds_the_model_or_the_captured_step_in_memory_not_both_at_once() -> None:
    """Seventeen rows of a long text are the most that compiling asks of a machine."""
    model = nn.Sequential(*(nn.Sequential(nn.Linear(64, 64), nn.GELU()) for _ in range(12)), nn.Linear(64, 3))
    joint = capture(Source(model, lambda m, b: losses(lambda x: m(x).mean(1), b), (torch.randn(3, 64, 64), torch.arange(3))))
    batch = [torch.randn(17, 64, 64), torch.arange(17) % 3]
    biases = [p for n, p in model.named_parameters() if "bias" in n]

    def theirs() -> None:
        torch.autograd.grad(losses(lambda x: model(x).mean(1), batch).sum(), biases)

    apart = peak_bytes(theirs), peak_bytes(lambda: run_joint(joint, batch))
    assert peak_bytes(lambda: check_meaning(joint)) <= 1.2 * max(apart) < 0.8 * sum(apart)


class Greedy(nn.Module):
    """Asks for a petabyte where a batch is wide."""

    def forward(self, h: Tensor) -> Tensor:
        return h + torch.empty(1 << 48)[:1].fill_(0.0) if len(h) >= 17 else h


def test_where_memory_ends_the_refusal_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "not enough memory for 17 rows. Compiling runs the model" in refusal(Sandwich(Greedy()))
    step = dpb.compile(Sandwich(), losses, points())
    monkeypatch.setattr(type(step._lowered), "__call__", lambda *_: torch.empty(1 << 48))
    with pytest.raises(dpb.CompileRefused, match="not enough memory for 3 rows"):
        check_rows(step)
