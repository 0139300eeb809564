"""Every form that we give an operator for ONNX equals torch's own kernel, alone and in one exported file."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

pytest.importorskip("onnx")
pytest.importorskip("onnxscript")
ort = pytest.importorskip("onnxruntime")

from torch.utils._pytree import tree_flatten, tree_unflatten  # noqa: E402

from dpbitfit_fx.errors import ExportError  # noqa: E402
from dpbitfit_fx.onnx_export import EXPORT_ROWS, to_onnx  # noqa: E402
from dpbitfit_fx.onnx_lowering import LOWERINGS, Lowered  # noqa: E402
from dpbitfit_fx.onnx_operators import UNSUPPORTED  # noqa: E402
from dpbitfit_fx.onnx_weights import save_models  # noqa: E402

aten = torch.ops.aten
Call = tuple[Any, list[Any], dict[str, Any]]
N = EXPORT_ROWS


def graph_of(op: Any, args: list[Any], kwargs: dict[str, Any]) -> tuple[Lowered, list[Tensor]]:
    """The operator alone in a graph whose inputs are the tensors among its arguments; all its results are outputs."""
    leaves, spec = tree_flatten((args, kwargs))
    graph, tensors = torch.fx.Graph(), []
    for i, leaf in enumerate(leaves):
        if isinstance(leaf, Tensor):
            tensors.append(leaf)
            leaves[i] = graph.placeholder(f"x{len(tensors)}")
    given, named = tree_unflatten(leaves, spec)
    graph.output((graph.call_function(op, tuple(given), named),))
    return Lowered(torch.fx.GraphModule(torch.nn.Module(), graph)), tensors


def results(value: Any) -> list[Tensor]:
    return [x for x in tree_flatten(value)[0] if isinstance(x, Tensor)]


def ties(*shape: int) -> Tensor:
    """Few distinct values, so that equals meet."""
    return torch.randint(-2, 3, shape).float()


def pools() -> Iterator[Call]:
    x2, x3 = torch.randn(N, 2, 7, 6), torch.randn(N, 2, 5, 6, 4)
    for op, back, x, spatial in (
        (aten.max_pool2d_with_indices, aten.max_pool2d_with_indices_backward, x2, 2),
        (aten.max_pool3d_with_indices, aten.max_pool3d_with_indices_backward, x3, 3),
    ):
        window = [[3] * spatial, [2] * spatial, [1] * spatial, [1] * spatial, False]
        out, index = op(x, *window)
        yield back.default, [torch.randn_like(out), x, *window, index], {}
    for op, back, x, spatial in (
        (aten.adaptive_max_pool2d, aten.adaptive_max_pool2d_backward, x2, 2),
        (aten.adaptive_max_pool3d, aten.adaptive_max_pool3d_backward, x3, 3),
    ):
        out, index = op(x, [3] * spatial)
        yield back.default, [torch.randn_like(out), x, index], {}
    yield aten._adaptive_avg_pool2d.default, [x2, [3, 4]], {}
    yield aten._adaptive_avg_pool3d.default, [x3, [2, 4, 3]], {}
    for spatial, back in enumerate(
        (aten.replication_pad1d_backward, aten.replication_pad2d_backward, aten.replication_pad3d_backward), 1
    ):
        x, sides = (
            torch.randn(N, 2, 3, 4, 5)[(slice(None),) * 2 + (0,) * (3 - spatial)],
            [1, 2, 0, 3, 2, 1][: 2 * spatial],
        )
        grown = torch.nn.functional.pad(x, sides, mode="replicate")
        yield back.default, [torch.randn_like(grown), x, sides], {}
    for corners in (False, True):
        sizes = [4, 7, 5], [N, 2, 5, 6, 4]
        yield aten.upsample_trilinear3d_backward.default, [torch.randn(N, 2, *sizes[0]), *sizes, corners], {}


def selections() -> Iterator[Call]:
    for x in (torch.randn(N, 7, 4), ties(N, 7, 4)):
        yield aten.cummax.default, [x, 1], {}
        yield aten.cummin.default, [x, -1], {}
        yield aten.mode.default, [x, 1, False], {}
    yield aten.kthvalue.default, [torch.randn(N, 7, 4), 3, 1, True], {}
    yield aten.median.dim, [torch.randn(N, 6, 4), 1, False], {}
    edges = torch.sort(ties(6)).values
    for right in (False, True):
        yield aten.searchsorted.Tensor, [edges, ties(N, 4)], {"right": right}
    yield aten.searchsorted.Tensor, [torch.sort(torch.randn(N, 6)).values, torch.randn(N, 4)], {"side": "right"}
    for op in (aten.hardshrink_backward.default, aten.softshrink_backward.default):
        yield op, [torch.randn(N, 5), torch.randn(N, 5), 0.4], {}
    # Behind vmap, a channel's slope does not lie along axis 1.
    yield aten._prelu_kernel.default, [torch.randn(N, 1, 4, 3), torch.randn(1, 4, 1)], {}
    for op in (aten.silu_backward.default, aten.mish_backward.default):
        yield op, [torch.randn(N, 5), torch.randn(N, 5)], {}
    for x in (torch.randint(0, 3, (N, 5)), torch.randn(N, 5)):
        for other, alpha in ((1.0, 1), (2, 3), (0.5, 2)):
            yield aten.rsub.Scalar, [x, other, alpha], {}


def adaptive_pools() -> Iterator[Call]:
    for x in (torch.randn(N, 2, 7, 6), ties(N, 2, 7, 6)):
        for size in ([3, 4], [7, 6], [1, 1], [9, 2]):
            yield aten.adaptive_max_pool2d.default, [x, size], {}
    yield aten.adaptive_max_pool3d.default, [ties(N, 2, 5, 6, 4), [2, 4, 3]], {}
    yield aten.adaptive_max_pool2d.default, [torch.full((N, 1, 4, 4), -torch.inf), [3, 3]], {}


def products() -> Iterator[Call]:
    for count in (1, 2, 7, 8):
        x = torch.randn(N, count, 3)
        yield aten.prod.dim_int, [x, 1], {}
        yield aten.prod.dim_int, [ties(N, count, 3), -2, True], {}
        yield aten.cumprod.default, [x, 1], {}
        yield aten.cumprod.default, [ties(N, count, 3), -2], {}
    yield aten.prod.dim_int, [torch.randint(-2, 3, (N, 5)), 1], {}
    yield aten.cumprod.default, [torch.randint(0, 2, (N, 5), dtype=torch.int32), 1], {}
    yield aten.hypot.default, [ties(N, 5), ties(N, 5)], {}
    extremes = torch.tensor([[3e30, 1e-30, 0.0, torch.inf, -torch.inf]] * N)
    yield aten.hypot.default, [extremes, torch.full((N, 1), 2e30)], {}
    yield aten.hypot.default, [extremes, extremes], {}
    wide = torch.cat([torch.tensor([0.0, 1e-6, -1e-3]), torch.linspace(-88, 88, 200)])
    yield aten.i0.default, [wide.expand(N, -1).contiguous()], {}
    yield aten.special_i1.default, [wide.expand(N, -1).contiguous()], {}


def memory() -> Iterator[Call]:
    for offset in (-2, 0, 1):
        for x, dims in ((torch.randn(N, 4, 5), (1, 2)), (torch.randn(N, 5, 3, 4), (3, -3))):
            source = torch.randn_like(torch.diagonal(x, offset, *dims))
            yield aten.diagonal_scatter.default, [x, source, offset, *dims], {}
    plain, turned = torch.randn(N, 3, 8), torch.randn(N, 2, 4).transpose(1, 2)
    yield aten.as_strided.default, [plain, [N, 1, 4, 3], [24, 24, 5, 2], 2], {}
    yield aten.as_strided.default, [turned, [N, 4], [8, 2]], {}
    yield aten.as_strided_scatter.default, [plain, torch.randn(N, 4, 2), [N, 4, 2], [24, 5, 2], 1], {}
    kept = torch.rand(N, 1) < 0.5
    yield aten.where.self, [kept, torch.randn(N, 4, dtype=torch.complex64), torch.zeros((), dtype=torch.complex64)], {}
    yield aten.as_strided_scatter.default, [turned, torch.randn(N, 4), [N, 4], [8, 2], 0], {}


def distances() -> Iterator[Call]:
    a, b = torch.randn(N, 4, 3), torch.randn(N, 5, 3)
    b[:, 1] = a[:, 2]  # a pair at distance 0
    for p in (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, float("inf")):
        far = aten._cdist_forward(a, b, p, None)
        yield aten._cdist_forward.default, [a, b, p, None], {}
        yield aten._cdist_backward.default, [torch.randn_like(far), a, b, p, far], {}


def grids() -> Iterator[Call]:
    x, grid, grad = torch.randn(N, 2, 5, 6), torch.randn(N, 4, 3, 2) * 1.2, torch.randn(N, 2, 4, 3)
    for mode in (0, 1):
        for padding in (0, 1, 2):
            for corners in (False, True):
                yield aten.grid_sampler_2d_backward.default, [grad, x, grid, mode, padding, corners, [True, True]], {}


GROUPS: dict[str, Callable[[], Iterator[Call]]] = {
    "pools": pools,
    "adaptive pools": adaptive_pools,
    "selections": selections,
    "products": products,
    "memory": memory,
    "distances": distances,
    "grids": grids,
}


def calls(group: str) -> list[Call]:
    torch.manual_seed(0)
    return list(GROUPS[group]())


@pytest.mark.parametrize("group", GROUPS)
def test_a_form_equals_torchs_kernel_indices_included(group: str) -> None:
    for op, args, kwargs in calls(group):
        assert op in LOWERINGS
        module, tensors = graph_of(op, args, kwargs)
        got, want = results(module(*tensors)), results(op(*args, **kwargs))
        assert len(got) == len(want) > 0
        for a, b in zip(got, want, strict=True):
            told = f"{op} {args[1:]}"
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6, msg=told)


def test_ctc_and_its_gradient_equal_torchs_also_where_no_path_or_no_label_is() -> None:
    """The nll and the gradient; torch leaves log alpha undefined behind a record's own lengths."""
    torch.manual_seed(0)
    ours = torch.ops.dpbitfit
    log_probs, targets = torch.randn(7, N, 4).log_softmax(-1), torch.randint(1, 4, (N, 3))
    targets[0] = torch.tensor([2, 2, 3])
    targets[1] = torch.tensor([3, 0, 1])  # ends in a blank, which no target should
    targets[4] = torch.tensor([2, 2, 2])  # five steps at least, and it has four: no path
    inputs, lengths = torch.tensor([7, 5, 7, 1, 4]), torch.tensor([3, 2, 0, 1, 3])
    given, grad = [log_probs, targets, inputs, lengths], torch.randn(N)
    for zero_infinity in (True, False):
        loss, alpha = ours.ctc_loss(*given, 0, zero_infinity)
        forward, _ = graph_of(ours.ctc_loss.default, [*given, 0, zero_infinity], {})
        our_loss, our_alpha = forward(*given)
        torch.testing.assert_close(our_loss, loss)
        assert loss.isinf().tolist() == [False] * 4 + [True]
        want = ours.ctc_loss_backward(grad, *given, loss, alpha, 0, zero_infinity)
        backward, _ = graph_of(ours.ctc_loss_backward.default, [grad, *given, loss, alpha, 0, zero_infinity], {})
        got = backward(grad, *given, our_loss, our_alpha)
        finite = N if zero_infinity else 4
        torch.testing.assert_close(got[:, :finite], want[:, :finite], rtol=1e-4, atol=1e-6)
        # Without zero_infinity the row is no number, and the clip turns such a row into zero.
        assert zero_infinity or (bool(got[:4, 4].isnan().all()) and bool(want[:4, 4].isnan().all()))


class Several(torch.nn.Module):
    """Graphs side by side, each on its own inputs."""

    def __init__(self, parts: list[tuple[Lowered, int]]) -> None:
        super().__init__()
        self.parts = torch.nn.ModuleList(p for p, _ in parts)
        self.counts = [n for _, n in parts]

    def forward(self, *args: Tensor) -> tuple[Tensor, ...]:
        found, start = [], 0
        for part, count in zip(self.parts, self.counts, strict=True):
            found += results(part(*args[start : start + count]))
            start += count
        return tuple(found)


@pytest.mark.parametrize("group", GROUPS)
def test_in_one_exported_file_they_equal_torchs_kernels_at_another_batch_size(group: str, tmp_path: Path) -> None:
    real = [c for c in calls(group) if c[0] is not aten.where.self]  # a complex number is no output of ONNX
    chosen = real[:: {"grids": 5, "distances": 4}.get(group, 1)]
    parts, inputs, want = [], list[Tensor](), list[Tensor]()
    for op, args, kwargs in chosen:
        module, tensors = graph_of(op, args, kwargs)
        module(*tensors)
        parts.append((module, len(tensors)))
        inputs += tensors
        want += results(op(*args, **kwargs))
    names = [f"x{i}" for i in range(len(inputs))]
    batched = [x.shape[0] == N for x in inputs]
    outputs = [f"y{i}" for i in range(len(want))]
    model = to_onnx(Several(parts), inputs, names, batched, outputs, "The operators")
    save_models({"all.onnx": model}, tmp_path)
    session = ort.InferenceSession(str(tmp_path / "all.onnx"), providers=["CPUExecutionProvider"])
    for rows in (1, 3, N):
        feed = {n: (x[:rows] if b else x).numpy() for n, x, b in zip(names, inputs, batched, strict=True)}
        for value, true, (op, *_rest) in zip(session.run(None, feed), want, _owners(chosen), strict=True):
            assert np.allclose(value, true[:rows].numpy(), rtol=1e-4, atol=1e-5), (op, rows)


def _owners(chosen: list[Call]) -> list[Call]:
    return [call for call in chosen for _ in results(call[0](*call[1], **call[2]))]


def test_what_cannot_be_exported_is_refused_with_the_operators_name_and_why() -> None:
    module, tensors = graph_of(aten.linalg_inv_ex.default, [torch.eye(3)], {})
    with pytest.raises(ExportError, match=r"aten\.linalg_inv_ex\.default.*no factorization"):
        module(*tensors)
    many = torch.randn(2, 17)
    module, tensors = graph_of(aten.mode.default, [many, 1], {})
    with pytest.raises(ExportError, match="17 values"):
        module(*tensors)
    assert not {str(op) for op in LOWERINGS} & set(UNSUPPORTED)


def test_a_view_of_memory_across_rows_is_refused() -> None:
    module, tensors = graph_of(aten.as_strided.default, [torch.randn(4, 6), [3, 6], [6, 1], 2], {})
    with pytest.raises(ExportError, match="across the rows"):
        module(*tensors)


def test_an_operator_that_the_exporter_does_not_know_is_named() -> None:
    module, tensors = graph_of(aten._histogramdd_from_bin_cts.default, [torch.rand(N, 1), [3]], {})
    with pytest.raises(ExportError, match=r"aten\._histogramdd_from_bin_cts\.default has no ONNX form"):
        to_onnx(module, tensors, ["x"], [False], ["y"], "It")
