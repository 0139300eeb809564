"""What cannot be made private as its author meant it is refused in one paragraph, and the model comes back untouched."""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from small_models import Sandwich, assert_untouched, losses, photograph, points, refusal
from torch import Tensor, nn

import dpbitfit_fx as dpb


class TrainModeBatchNorm(Sandwich):
    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(8, **options)

    def transform(self, h: Tensor) -> Tensor:
        normal: Tensor = self.norm(h)
        return normal


def test_batch_norm_in_train_mode_is_refused_by_name() -> None:
    message = refusal(TrainModeBatchNorm())
    assert "norm (BatchNorm1d) is in train mode" in message and "eval()" in message
    assert "keeps no running statistics" in refusal(TrainModeBatchNorm(track_running_stats=False).eval())


class CountsInPlace(Sandwich):
    seen: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", torch.zeros(()))

    def transform(self, h: Tensor) -> Tensor:
        self.seen += 1
        return h


class CountsAnew(CountsInPlace):
    def transform(self, h: Tensor) -> Tensor:
        self.seen = self.seen + 1
        return h


class Bank(Sandwich):
    seen: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", torch.zeros(5, 8))

    def transform(self, h: Tensor) -> Tensor:
        self.seen = torch.cat([h.detach(), self.seen])[:5]
        return h + self.seen.mean(0)


class PlainAttribute(Sandwich):
    def __init__(self) -> None:
        super().__init__()
        self.seen: Tensor | None = None

    def transform(self, h: Tensor) -> Tensor:
        self.seen = h.detach()
        return h


class GrowingList(Sandwich):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Tensor] = []

    def transform(self, h: Tensor) -> Tensor:
        self.seen.append(h.detach())
        return h


@pytest.mark.parametrize("kind", [CountsInPlace, CountsAnew, Bank, PlainAttribute, GrowingList])
def test_a_model_that_remembers_what_it_saw_is_refused_by_the_buffers_name(kind: type[nn.Module]) -> None:
    model = kind()
    message = refusal(model)
    assert "'seen'" in message and "writes" in message
    assert not isinstance(model.seen, list) or not model.seen


def test_an_embedding_that_renormalizes_its_weight_in_forward_is_refused() -> None:
    model = Sandwich()
    table = nn.Embedding(4, 8, max_norm=0.5)
    model.add_module("table", table)
    model.middle = lambda h: h + table((h[:, 0] > 0).long())
    assert "table.weight" in refusal(model)


class ReadsAValue(nn.Module):
    def forward(self, h: Tensor) -> Tensor:
        value: float = h.sum().item()
        return h * value


class Branches(nn.Module):
    def forward(self, h: Tensor) -> Tensor:
        return h if h.sum() > 0 else -h


class Routes(nn.Module):
    def forward(self, h: Tensor) -> Tensor:
        kinds: int = torch.unique(h.round()).numel()
        return h * kinds


class Inner(nn.Module):
    def forward(self, h: Tensor) -> Tensor:
        return F.dropout(h, 0.3, training=True)


class Histogram(nn.Module):
    def forward(self, h: Tensor) -> Tensor:
        return h * torch.histc(h, 4)[0]


@pytest.mark.parametrize(
    ("kind", "line"),
    [(ReadsAValue, "h.sum().item()"), (Branches, "if h.sum() > 0"), (Routes, "torch.unique(h.round())")],
)
def test_values_that_steer_python_are_refused_with_the_users_line(kind: type[nn.Module], line: str) -> None:
    message = refusal(Sandwich(kind()))
    assert line in message and "test_refusals.py" in message


def test_a_random_operator_is_refused_with_module_and_line() -> None:
    message = refusal(Sandwich(Inner()).eval())
    assert "draws random numbers" in message and "dropout" in message
    assert "module middle" in message and "F.dropout(h, 0.3, training=True)" in message


class Spectrum(Sandwich):
    """torch.linalg.svdvals raises when any matrix of the batch holds NaN."""

    def forward(self, x: Tensor) -> Tensor:
        matrices = self.first(x)[:, :4].reshape(-1, 2, 2)
        scaled: Tensor = self.last(self.first(x) * torch.linalg.svdvals(matrices).sum(1, keepdim=True))
        return scaled


def test_an_operator_that_one_bad_record_would_make_raise_is_refused() -> None:
    message = refusal(Spectrum())
    assert "linalg.svd" in message and "one bad record would stop a run" in message


def test_an_operator_unrolled_over_samples_is_refused_with_module_and_line() -> None:
    message = refusal(Sandwich(Histogram()))
    assert "histc" in message and "unrolled over samples" in message
    assert "module middle" in message and "torch.histc(h, 4)" in message


SHAPES: dict[str, Any] = {
    "per token [B, T]": lambda m, b: m(b[0]),
    "per token [B * T]": lambda m, b: m(b[0]).flatten(),
    "a column [B, 1]": lambda m, b: losses(m, b)[:, None],
    "integers": lambda m, b: m(b[0]).argmax(-1),
}


@pytest.mark.parametrize("kind", SHAPES)
def test_a_loss_that_is_not_one_float_per_sample_is_refused(kind: str) -> None:
    message = refusal(Sandwich(), SHAPES[kind])
    assert "one floating point loss per sample" in message and "shape [B]" in message


def test_a_loss_that_is_no_tensor_or_has_no_gradient_is_refused() -> None:
    assert "must return a tensor" in refusal(Sandwich(), lambda m, b: 3.0)
    assert "tuple" in refusal(Sandwich(), lambda m, b: (losses(m, b),))
    assert "no gradient" in refusal(Sandwich(), lambda m, b: losses(m, b).detach())


def test_a_tensor_that_the_loss_brings_along_is_refused_unless_declared_public() -> None:
    weight = torch.tensor([1.0, 2.0, 1.0])
    criterion = nn.CrossEntropyLoss(weight=weight, reduction="none")

    def closure(model: Any, batch: Any) -> Tensor:
        return F.cross_entropy(model(batch[0]), batch[1], weight=weight, reduction="none")

    def default(model: Any, batch: Any, w: Tensor = weight) -> Tensor:
        return F.cross_entropy(model(batch[0]), batch[1], weight=w, reduction="none")

    def module(model: Any, batch: Any) -> Any:
        return criterion(model(batch[0]), batch[1])

    assert "'weight' [3]" in refusal(Sandwich(), closure) and "weight=weight" in refusal(Sandwich(), closure)
    assert "'w' [3]" in refusal(Sandwich(), default)
    assert "'criterion.weight' [3]" in refusal(Sandwich(), module)
    assert "loss_fn.criterion.weight from outside" in refusal(Sandwich(), Criterion(criterion))
    step = dpb.compile(Sandwich(), closure, points(), public_tensors=True)
    assert len(step.report().public_inputs) == 1


class Criterion(nn.Module):
    def __init__(self, criterion: nn.Module) -> None:
        super().__init__()
        self.criterion = criterion

    def forward(self, model: Any, batch: Any) -> Any:
        return self.criterion(model(batch[0]), batch[1])


class Bunch:
    """A plain object that holds things."""
    kept: Any
    bank: Any
    array: Any
    scale: Any
    nobody: Any

    def __init__(self, **held: Any) -> None:
        vars(self).update(held)


OTHERS = torch.tensor([1.0, 2.0, 3.0])
PLAIN = Bunch(
    bank=OTHERS, kept=Bunch(bank=OTHERS, deep={"bank": [OTHERS]}), array=OTHERS.numpy(), nobody=torch.zeros(0, 3)
)
IMPORTED = types.ModuleType("imported")
vars(IMPORTED)["bank"] = OTHERS
OTHER_NETWORK = nn.Linear(3, 3)


class Adds(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, h: Tensor) -> Tensor:
        found: Tensor = h + PLAIN.kept.bank
        return found

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return grad


def swallowed(h: Tensor) -> Tensor:
    try:
        found: Tensor = h + PLAIN.bank
        return found
    except dpb.CompileRefused:
        return h


def hidden(h: Tensor) -> Tensor:
    with torch._C.DisableTorchFunction():
        result: Tensor = h + PLAIN.bank
    return result


# Each reads other people's data without naming a tensor in the loss itself.
READERS: dict[str, tuple[Callable[[Tensor], Tensor], str]] = {
    "an attribute of a global object": (lambda h: h + PLAIN.bank, "'PLAIN.bank' [3]"),
    "two objects deep": (lambda h: h * PLAIN.kept.deep["bank"][0], "[3]"),
    "an imported module": (lambda h: h + IMPORTED.bank, "'IMPORTED.bank' [3]"),
    "a view of it": (lambda h: h + PLAIN.bank[1:2], "'PLAIN.bank' [3]"),
    "a copy of it": (lambda h: h + torch.tensor(PLAIN.bank), "'PLAIN.bank' [3]"),
    "its numbers": (lambda h: h * PLAIN.bank.tolist()[0], "'PLAIN.bank' [3]"),
    "its largest entry": (lambda h: h * float(PLAIN.bank.max()), "'PLAIN.bank' [3]"),
    "a branch on it": (lambda h: h * 2 if bool((PLAIN.bank > 0).all()) else h, "'PLAIN.bank' [3]"),
    "a numpy array": (lambda h: h + torch.as_tensor(PLAIN.array), "'PLAIN.array' [3]"),
    "a numpy array without a copy": (lambda h: h + torch.from_numpy(PLAIN.array), "[3]"),
    "another network": (lambda h: OTHER_NETWORK(h), "'OTHER_NETWORK.weight' [3, 3]"),
    "an operator called by name": (lambda h: torch.ops.aten.add.Tensor(h, PLAIN.bank), "'PLAIN.bank' [3]"),
    "as an option": (lambda h: torch.add(h, other=PLAIN.bank), "'PLAIN.bank' [3]"),
    "as an index": (lambda h: h[:, PLAIN.bank.long() - 1], "'PLAIN.bank' [3]"),
    "an autograd.Function": (lambda h: Adds.apply(h), "'PLAIN.bank' [3]"),  # type: ignore[no-untyped-call]
    "an error that is caught": (swallowed, "'PLAIN.bank' [3]"),
    "torch functions switched off": (hidden, "[3]"),
}


@pytest.mark.parametrize("way", READERS)
@pytest.mark.parametrize("place", ["loss", "model"])
def test_a_tensor_from_outside_is_refused_by_name_and_line_however_it_is_reached(place: str, way: str) -> None:
    reader, name = READERS[way]

    def loss(model: Any, batch: Any) -> Tensor:
        logits = model(batch[0])
        return F.cross_entropy(logits if place == "model" else reader(logits), batch[1], reduction="none")

    model = Sandwich((lambda h: torch.cat([reader(h[:, :3]), h[:, 3:]], 1)) if place == "model" else None)
    message = refusal(model, loss)
    assert "from outside the batch and the model" in message and "public_tensors=True" in message
    assert name in message and ("test_refusals.py" in message or (reader is hidden and "File" in message))


class Holds(Sandwich):
    """Tensors that the model holds in other ways than as parameters and buffers."""

    def __init__(self) -> None:
        super().__init__()
        self.plain = torch.ones(8)
        self.object = Bunch(scale=torch.ones(8))

    def transform(self, h: Tensor) -> Tensor:
        found: Tensor = h * self.plain * self.object.scale
        return found


ALLOWED: dict[str, Callable[[Tensor], Tensor]] = {
    "literals": lambda h: h * torch.tensor([1.0, 2.0, 3.0]) + torch.as_tensor([0.5, 0.5, 0.5]),
    "ranges and constants": lambda h: h + torch.arange(3) + torch.full((3,), 2.0) + torch.linspace(0, 1, 3),
    "an index of numbers": lambda h: h[:, [2, 0, 1]],
    "the size of a tensor": lambda h: h * PLAIN.bank.shape[0] * len(PLAIN.bank),
    "an empty tensor": lambda h: torch.cat([h, PLAIN.nobody]),
    "torch.func": lambda h: torch.func.vmap(lambda row: row * 2)(h),
}


@pytest.mark.parametrize("way", ALLOWED)
def test_what_is_made_while_the_model_runs_is_no_tensor_from_outside(way: str) -> None:
    def loss(model: Any, batch: Any) -> Tensor:
        return F.cross_entropy(ALLOWED[way](model(batch[0])), batch[1], reduction="none")

    assert dpb.compile(Sandwich(), loss, points()).trainable_names


def test_what_the_model_itself_holds_is_public_and_listed() -> None:
    assert len(dpb.compile(Holds(), losses, points()).report().public_inputs) == 2


def test_a_batch_of_unusable_shape_is_refused() -> None:
    x, y = points()
    assert "one size" in refusal(Sandwich(), batch=(x, y[:3]))
    assert "one size" in refusal(Sandwich(), batch=(x, torch.tensor(1)))
    assert "at least 2 samples" in refusal(Sandwich(), batch=(x[:1], y[:1]))
    assert "no tensor" in refusal(Sandwich(), batch=(1, 2))


def test_a_batch_of_another_shape_than_compiled_for_is_refused() -> None:
    step = dpb.compile(Sandwich(), losses, points())
    x, y = points()
    for bad in [(x[:, :5], y), (x.double(), y), (x, y[:3]), (x[:0], y[:0]), (x,)]:
        with pytest.raises(dpb.CompileRefused):
            step.per_sample_gradients(bad)


def test_a_model_without_biases_is_refused_with_a_way_out() -> None:
    message = refusal(nn.Linear(6, 3, bias=False))
    assert "no parameter" in message and "patterns" in message


def test_a_compiled_model_comes_back_as_it_was() -> None:
    model = nn.Sequential(nn.Linear(6, 8), nn.Dropout(0.5), nn.BatchNorm1d(8), nn.Linear(8, 3))
    model.train()
    model[2].eval()
    model[3].weight.requires_grad_(False)
    model[3].bias.requires_grad_(False)
    before = photograph(model)
    step = dpb.compile(model, losses, points(), noise_multiplier=1.0, expected_batch_size=4)
    step.per_sample_gradients(points(3))
    step.clipped_sum(points(3))
    assert_untouched(model, before)
    assert step.model is model


@pytest.mark.parametrize(
    ("batch", "told"),
    [
        ({"input": torch.zeros(3, 4), "y": torch.zeros(3).long()}, "KeyError: 'x'"),
        ({"x": torch.zeros(3, 5), "y": torch.zeros(3).long()}, "RuntimeError: mat1 and mat2 shapes cannot be multiplied"),
    ],
)
def test_an_example_that_the_users_own_code_does_not_take_is_told_as_just_that(batch: dict[str, Tensor], told: str) -> None:
    """Not as code that steers Python by values."""

    def loss(model: Any, batch: Any) -> Tensor:
        return F.cross_entropy(model(batch["x"]), batch["y"], reduction="none")

    with pytest.raises(dpb.CompileRefused) as refused:
        dpb.compile(nn.Linear(4, 3), loss, batch)
    message = str(refused.value)
    assert "Linear could not be captured" in message and "no capture at work" in message
    assert told in message and ", in loss: " in message
    assert "keys, shapes and dtypes" in message and "steer Python" not in message
