"""Every way of writing a network in torch.nn or by hand compiles and equals the loop, or is refused with line and remedy."""

from __future__ import annotations

import pytest
import torch
from small_models import refusal
from torch import Tensor, nn
from zoo import POOL, Case, build, relative_errors
from zoo_torch import cases, refused

import dpbitfit_fx as dpb
from dpbitfit_fx.passes.joint_graph import Fact

NAMES = list(cases())
BATCHES = {1: [4], 2: [5, 0], 3: [2, 5, 1], 17: [(5 * i + 1) % POOL for i in range(17)]}
RECURRENT = {"gru", "rnn", "rnn_relu", "lstm_projected", "lstm_of_lengths"}
# One or more for every rule of ours, and what is closest to the machine's rounding.
FLOAT64 = [
    "lstm_cell",
    "gru_cell",
    "ctc",
    "dlrm",
    "bag_of_maxima",
    "bilinear",
    "windows",
    "writes_slices",
    "writes_everywhere",
    "writes_diagonal",
    "resized",
    "unpooled",
    "every_loss",
    "binned",
    "linear_algebra",
]


def loop(model: nn.Module, case: Case, names: tuple[str, ...], dtype: torch.dtype) -> dict[str, Tensor]:
    """``{parameter: [POOL, *shape]}``, one sample at a time, given twice: torch errs on eval BatchNorm of one row."""
    params, found = dict(model.named_parameters()), []
    for row in range(POOL):
        loss = case.loss(model, case.rows([row, row], dtype))
        found.append(torch.autograd.grad(loss[0], [params[k] for k in names]))
    return {k: torch.stack([g[i] for g in found]) for i, k in enumerate(names)}


def compiled(case: Case, dtype: torch.dtype = torch.float32) -> dpb.PrivateStep:
    model, batch = build(case, dtype), case.rows([0, 1, 2, 3], dtype)
    return dpb.compile(model, case.loss, batch, noise_multiplier=1.0, expected_batch_size=4)


@pytest.mark.parametrize("name", NAMES)
def test_it_is_sealed_and_equals_the_loop_for_batches_of_1_2_3_and_17(name: str) -> None:
    case = cases()[name]
    if name == "statistics" and torch.__version__ < "2.13":
        # torch 2.11 exports no quantile, and 2.12 has no batching rule for count_nonzero.
        with pytest.raises(dpb.CompileRefused, match=r"quantile|count_nonzero"):
            compiled(case)
        return
    step = compiled(case)
    assert Fact.SEALED in step.joint.facts
    biases = {k for k, _ in step.model.named_parameters() if "bias" in k.rsplit(".", 1)[-1]}
    assert biases and biases <= {*step.trainable_names, *step.report().unused}
    assert bool(step.joint.slow) == (name in RECURRENT)  # nothing else is unrolled, over samples or time
    alone = loop(build(case), case, step.trainable_names, torch.float32)
    exact = loop(build(case, torch.float64), case, step.trainable_names, torch.float64)
    own_error = relative_errors(alone, exact)
    for size, rows in BATCHES.items():
        ours = step.per_sample_gradients(case.rows(rows))
        assert {k: v.shape for k, v in ours.items()} == {k: (size, *v.shape[1:]) for k, v in alone.items()}
        error = relative_errors(ours, {k: v[rows] for k, v in alone.items()})
        assert bool((error <= (2 * own_error[rows]).clamp(min=1e-5)).all()), f"batch {size}: {error.max():.1e}"


@pytest.mark.parametrize("name", FLOAT64)
def test_in_float64_it_equals_the_loop_to_1e_minus_9(name: str) -> None:
    case = cases()[name]
    step = compiled(case, torch.float64)
    alone = loop(step.model, case, step.trainable_names, torch.float64)
    for rows in BATCHES.values():
        ours = step.per_sample_gradients(case.rows(rows, torch.float64))
        assert relative_errors(ours, {k: v[rows] for k, v in alone.items()}).max() <= 1e-9


@pytest.mark.parametrize("name", ["transformer_encoder", "autoencoder", "group_norm"])
def test_a_bfloat16_model_errs_no_more_than_the_loop_does_or_by_one_rounding(name: str) -> None:
    case = cases()[name]
    step = compiled(case, torch.bfloat16)
    alone = loop(build(case, torch.bfloat16), case, step.trainable_names, torch.bfloat16)
    rounded = Case(name, case.make, case.loss, case.rows(list(range(POOL)), torch.bfloat16))
    exact = loop(build(case, torch.bfloat16).double(), rounded, step.trainable_names, torch.float64)
    for rows in BATCHES.values():
        ours = step.per_sample_gradients(case.rows(rows, torch.bfloat16))
        assert all(v.dtype == torch.bfloat16 for v in ours.values())
        allowed = max(2 * float(relative_errors(alone, exact).max()), 2**-7)
        assert relative_errors(ours, {k: v[rows] for k, v in exact.items()}).max() <= allowed


@pytest.mark.parametrize("name", list(refused()))
def test_what_has_no_graph_is_refused_with_the_users_line_and_the_remedy(name: str) -> None:
    case, words = refused()[name]
    message = refusal(build(case), case.loss, case.rows([0, 1, 2, 3]))
    assert all(w in message for w in words), message
