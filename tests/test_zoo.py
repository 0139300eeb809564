"""Per-sample gradients are those of a loop of single-sample autograd, on every model family, from one compile."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import zoo_transformers
from torch import nn
from zoo import POOL, cases, compile_case, compiled, flat, loop, oracle, relative_errors

import dpbitfit_fx as dpb

NAMES = list(cases())
BATCHES = {1: [4], 2: [5, 0], 3: [2, 5, 1], 17: [(5 * i + 1) % POOL for i in range(17)]}
# Of the many in zoo_transformers (tools/zoo runs them all), those whose operators no other has.
FAST = (
    "albert",
    "xlnet",
    "funnel",
    "xlm",
    "bloom",
    "mixtral",
    "mamba",
    "t5",
    "beit",
    "efficientnet",
    "segformer",
    "clip",
)
REFUSED = {
    "yoso": r"autograd\.Function YosoCumulation with a backward of its own",
    "longformer": r"modeling_longformer\.py.*if is_global_attn:",
    "levit": r"attention_bias_cache.*eval mode already",
}
FLASH = "aten._scaled_dot_product_flash_attention_for_cpu"


@pytest.mark.parametrize("name", NAMES)
def test_float32_gradients_equal_the_loop_for_batches_of_1_2_3_and_17(name: str) -> None:
    step, loop, exact = compiled(name), oracle(name), oracle(name, torch.float64)
    assert set(step.trainable_names) == set(loop)
    own_error = relative_errors(loop, exact)
    for size, rows in BATCHES.items():
        ours = step.per_sample_gradients(cases()[name].rows(rows))
        assert {k: v.shape for k, v in ours.items()} == {k: (size, *v.shape[1:]) for k, v in loop.items()}
        error = relative_errors(ours, {k: loop[k][rows] for k in ours})
        allowed = (2 * own_error[rows]).clamp(min=1e-5)
        assert bool((error <= allowed).all()), f"batch {size}: {error.max():.1e}"


@pytest.mark.parametrize("name", NAMES)
def test_float64_gradients_equal_the_loop_to_1e_minus_10(name: str) -> None:
    step, loop = compiled(name, torch.float64), oracle(name, torch.float64)
    for size, rows in BATCHES.items():
        ours = step.per_sample_gradients(cases()[name].rows(rows, torch.float64))
        theirs = {k: loop[k][rows] for k in ours}
        assert all(v.dtype == torch.float64 for v in ours.values())
        assert relative_errors(ours, theirs).max() <= 1e-10, f"batch {size}"
        # Each parameter on its own too, where its gradient is not zero up to rounding (a key bias under softmax is).
        whole = flat(theirs).norm(dim=1)
        for key, mine in ours.items():
            apart = (mine - theirs[key]).flatten(1).norm(dim=1)
            assert bool((apart <= 1e-10 * theirs[key].flatten(1).norm(dim=1) + 1e-14 * whole).all()), key


@pytest.mark.parametrize("name", NAMES)
def test_every_parameter_called_bias_is_trained(name: str) -> None:
    step = compiled(name)
    biases = {k for k, _ in step.model.named_parameters() if k.rsplit(".", 1)[-1].startswith("bias")}
    assert biases <= {*step.trainable_names, *step.report().unused}
    assert len(step.trainable_names) >= 2


@pytest.mark.parametrize("name", [n for n, c in cases().items() if c.attention])
def test_attention_stays_fused_forward_and_backward(name: str) -> None:
    layers, counts = cases()[name].attention, compiled(name).report().operators
    assert counts.get(f"{FLASH}.default") == layers
    assert counts.get(f"{FLASH}_backward.default") == layers
    assert not any("softmax" in op and "log_softmax" not in op for op in counts)


@pytest.mark.parametrize("name", NAMES)
def test_the_step_equals_the_clipped_sum_of_the_loop(name: str) -> None:
    step, rows = compiled(name), BATCHES[17]
    loop = {k: v[rows] for k, v in oracle(name).items()}
    norms = flat(loop).norm(dim=1)
    factors = (1.0 / (norms + 0.01)).float()
    total = step.clipped_sum(cases()[name].rows(rows))
    for key, value in total.items():
        expected = torch.einsum("b,b...->...", factors, loop[key])
        assert torch.allclose(value, expected, rtol=1e-4, atol=2e-5), key


@pytest.mark.parametrize("name", FAST)
def test_further_architectures_equal_the_loop_for_batches_of_1_and_3(name: str) -> None:
    case = zoo_transformers.cases()[name]
    step = compile_case(case)
    theirs = loop(case, step.trainable_names)
    for rows in (BATCHES[1], BATCHES[3]):
        error = relative_errors(step.per_sample_gradients(case.rows(rows)), {k: v[rows] for k, v in theirs.items()})
        assert bool((error <= 1e-5).all()), f"{error.max():.1e}"  # NaN fails too


@pytest.mark.parametrize("name", REFUSED)
def test_an_architecture_that_cannot_be_private_is_refused_by_what_is_in_its_way(name: str) -> None:
    with pytest.raises(dpb.CompileRefused, match=REFUSED[name]):
        compile_case(zoo_transformers.cases()[name])


def biases_by_kind_of_layer(model: nn.Module) -> set[str]:
    """Where the layers of torch and transformers keep their bias, read off the modules; a tied one under its first name."""
    layers = (nn.Linear, nn.modules.conv._ConvNd, nn.LayerNorm, nn.GroupNorm, nn.modules.batchnorm._BatchNorm)
    first = {id(p): name for name, p in model.named_parameters()}
    found: list[Any] = []
    for module in model.modules():
        if isinstance(module, layers) or type(module).__name__ == "Conv1D":
            found.append(module.bias)
        elif isinstance(module, nn.MultiheadAttention):
            found += [module.in_proj_bias, module.bias_k, module.bias_v]
        elif isinstance(module, nn.RNNBase):
            found += [p for name, p in module.named_parameters() if name.startswith("bias_")]
    return {first[id(p)] for p in found if p is not None}


@pytest.mark.parametrize("name", NAMES)
def test_what_is_trained_is_what_a_walk_over_the_layers_finds_and_near_misses_have_a_reason(name: str) -> None:
    case, step = cases()[name], compiled(name)
    model, report = step.model, step.report()
    params = dict(model.named_parameters())
    loss = case.loss(model, case.rows([0, 1, 2, 3])).sum()
    grads = torch.autograd.grad(loss, list(params.values()), allow_unused=True)
    used = {k for k, g in zip(params, grads, strict=True) if g is not None}
    trained = {k: rule for k, _, rule in report.trained}
    assert set(trained) == biases_by_kind_of_layer(model) & used
    assert biases_by_kind_of_layer(model) - used <= set(report.unused)
    # A position table is added to activations and is no bias; a table of relative positions only has the name.
    tables = {k for k in used if k.endswith(("position_embeddings", "relative_position_bias_table"))}
    near = dict(report.near_misses)
    assert tables <= set(near) and all(near.values()) and not set(near) & set(trained)
