"""Dead tokens: rows that nobody reads are not computed, forward or backward; numbers, proofs and other models stay."""

from __future__ import annotations

import itertools
import math
import random
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from onnx_cases import bert
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import dpbitfit_fx as dpb
from dpbitfit_fx.passes import pipeline, row_wise
from dpbitfit_fx.passes.joint_graph import Source
from dpbitfit_fx.passes.row_wise import ATTENTION, ATTENTION_BACKWARD, Axis, moved
from dpbitfit_fx.randomness import SecretKey

aten = torch.ops.aten
ROWS, LENGTH, WIDTH, HEADS = 4, 7, 8, 2


class Block(nn.Module):
    """Pre-norm attention and feed-forward over [B, T, 8]; what of its output the head reads is a function."""

    def __init__(self, read: Any, causal: bool = False) -> None:
        super().__init__()
        self.norm, self.last = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.query, self.key, self.value, self.out = (nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.up, self.down, self.head = nn.Linear(WIDTH, 16), nn.Linear(16, WIDTH), nn.Linear(WIDTH, 3)
        self.read, self.causal = read, causal

    def forward(self, x: Tensor) -> Any:
        h = self.norm(x)
        q, k, v = (f(h).unflatten(-1, (HEADS, -1)).transpose(1, 2) for f in (self.query, self.key, self.value))
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        x = x + self.out(mixed.transpose(1, 2).flatten(2))
        x = x + self.down(F.gelu(self.up(self.last(x))))
        return self.head(self.read(x))


def first(x: Tensor) -> Tensor:
    return x[:, 0]


def loss(model: Any, batch: Any) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1], reduction="none")


def batch(size: int = ROWS) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(size)
    return torch.randn(size, LENGTH, WIDTH, generator=generator), torch.arange(size) % 3


def block(read: Any, causal: bool = False) -> Block:
    torch.manual_seed(0)
    return Block(read, causal)


def flops(step: dpb.PrivateStep, given: Any) -> int:
    with FlopCounterMode(display=False) as counter:
        step.per_sample_gradients(given)
    return int(counter.get_total_flops())


def both(model: nn.Module, loss_fn: Any = loss, example: Any = None, **options: Any) -> list[dpb.PrivateStep]:
    example = batch() if example is None else example
    return [dpb.compile(model, loss_fn, example, disable=["in_place", *off], **options) for off in ([], ["dead_tokens"])]


def assert_is_the_loop(step: dpb.PrivateStep, given: Any) -> None:
    """Against autograd on one sample at a time: each gradient to 1e-5 of the whole."""
    found = step.per_sample_gradients(given)
    params = dict(step.model.named_parameters())
    for row in range(given[0].shape[0]):
        own = step.loss_fn(step.model, tuple(x[row : row + 1] for x in given)).sum()
        theirs = torch.autograd.grad(own, [params[n] for n in found])
        whole = math.sqrt(sum(float(t.square().sum()) for t in theirs))
        for name, expected in zip(found, theirs, strict=True):
            assert float((found[name][row] - expected).norm()) <= 1e-5 * whole, name


def queries(step: dpb.PrivateStep) -> list[int]:
    """The number of queries in each attention, forward and backward."""
    nodes = step.joint.module.graph.nodes
    at = {ATTENTION: 0, ATTENTION_BACKWARD: 1}
    return [n.args[at[n.target]].meta["shape"][2] for n in nodes if n.target in at]


def test_a_head_that_reads_one_token_has_one_query_and_one_row_of_feed_forward_both_ways() -> None:
    on, off = both(block(first))
    assert queries(on) == [1, 1] and queries(off) == [LENGTH, LENGTH]
    wide = [n for n in on.joint.module.graph.nodes if 16 in (n.meta.get("shape") or ())[-1:] and "mm" in str(n.target)]
    assert len(wide) == 2 and {n.meta["shape"][0] for n in wide} == {wide[0].meta["shape"][0]}
    assert all(n.meta["shape"][0] * LENGTH > 0 and n.meta["shape"][0] % LENGTH for n in wide)
    # 4 + 4 products of [8, 8] a token become 2 + 2 (norm's bias is trained), 2 + 2 of [8, 16] become a seventh.
    assert flops(on, batch()) < 0.55 * flops(off, batch())
    assert_is_the_loop(on, batch())


@pytest.mark.parametrize("size", [1, 2, 9])
def test_the_clipped_sum_is_the_same_for_every_batch_size(size: int) -> None:
    on, off = both(block(first))
    ours, theirs = (torch.cat([v.flatten() for v in s.clipped_sum(batch(size)).values()]) for s in (on, off))
    assert float((ours - theirs).norm()) <= 1e-6 * float(theirs.norm())


READS: dict[str, Any] = {
    "last": lambda x: x[:, -1],
    "middle": lambda x: x[:, 3],
    "some": lambda x: x[:, 2:5].mean(1),
    "the-first-twice": lambda x: x[:, 0] + torch.tanh(x[:, 0]),
}


@pytest.mark.parametrize("read", READS)
@pytest.mark.parametrize("trainable", ["bias", "all"])
def test_other_positions_and_weights_are_the_loops(read: str, trainable: str) -> None:
    on, off = both(block(READS[read]), trainable=trainable)
    assert flops(on, batch()) < 0.8 * flops(off, batch())
    assert_is_the_loop(on, batch())


class ClassToken(nn.Module):
    """Every row is read, but of the gradient behind the first norm only the projected patches' rows."""

    def __init__(self) -> None:
        super().__init__()
        self.project, self.token = nn.Linear(WIDTH, WIDTH), nn.Parameter(torch.randn(1, 1, WIDTH))
        self.block = Block(lambda x: x.mean(1))

    def forward(self, x: Tensor) -> Any:
        return self.block(torch.cat([self.token.expand(x.shape[0], -1, -1), self.project(x)], 1))


def test_a_norm_whose_forward_is_whole_takes_the_backward_of_some_rows() -> None:
    torch.manual_seed(0)
    on, off = both(ClassToken(), trainable=["project.bias"])
    assert flops(on, batch()) < flops(off, batch())
    assert_is_the_loop(on, batch())


def test_of_causal_attention_only_the_last_row_is_taken_alone_and_then_sees_every_key() -> None:
    last, middle = (both(block(READS[name], causal=True))[0] for name in ("last", "middle"))
    assert queries(last) == [1, 1] and queries(middle) == [LENGTH, LENGTH]
    assert flops(middle, batch()) < flops(both(block(READS["middle"], causal=True))[1], batch())  # the feed-forward
    for step in (last, middle):
        assert_is_the_loop(step, batch())


LEFT_ALONE: dict[str, Any] = {
    "mean": lambda x: x.mean(1),
    "every-token": lambda x: x[:, 0] + x.amax(1),
    "data-dependent": lambda x: x.gather(1, x[:, :, :1].argmax(1, keepdim=True).expand(-1, 1, WIDTH))[:, 0],
}


@pytest.mark.parametrize("read", LEFT_ALONE)
def test_a_model_whose_rows_are_all_read_keeps_its_graph(read: str) -> None:
    on, off = both(block(LEFT_ALONE[read]))
    assert on.graph_hash == off.graph_hash


def test_the_report_says_what_was_narrowed_or_who_reads_the_rest() -> None:
    on, off = both(block(first))
    assert off.report().optimized == ()
    (line,) = on.report().optimized
    assert line.startswith("dead tokens: 1 of 7 rows are read; ") and f"  optimized  {line}" in str(on.report())
    (line,) = both(block(LEFT_ALONE["every-token"]))[0].report().optimized
    assert line == "dead tokens: 1 of 7 rows are read, all are computed: aten.amax.default reads them"


def test_one_graph_serves_every_padded_length() -> None:
    size = torch.export.Dim("T", min=4, max=12)
    model = block(first)
    on, off = both(model, lambda m, b: loss(m, (b["x"], b["y"])), dict(zip("xy", batch(), strict=True)),
                   dynamic_shapes={"x": {1: size}})  # fmt: skip
    for length in (4, 7, 12):
        given = {"x": torch.randn(5, length, WIDTH), "y": torch.arange(5) % 3}
        ours, theirs = (torch.cat([v.flatten() for v in s.clipped_sum(given).values()]) for s in (on, off))
        assert float((ours - theirs).norm()) <= 1e-6 * float(theirs.norm())
        assert flops(on, given) < 0.75 * flops(off, given)


def test_a_classifier_of_transformers_with_padding_and_dropout_draws_and_sums_as_before() -> None:
    pytest.importorskip("transformers")
    model, bert_loss, data = bert()
    example = {k: v[:4] for k, v in data.items()}
    for dropout in (False, True):
        on, off = both(model.train(dropout), bert_loss, example, dropout=dropout)
        masks = on.dropout_masks([0, 1, 2, 3], SecretKey.from_bytes(bytes(32)), 0) if dropout else None
        ours, theirs = (s.per_sample_gradients(example, masks) for s in (on, off))
        flat, other = (torch.cat([v.flatten() for v in g.values()]) for g in (ours, theirs))
        assert float((flat - other).norm()) <= 1e-5 * float(other.norm())
        assert on.report().optimized[0].startswith("dead tokens: 1 of 11 rows are read")


def captured(model: nn.Module) -> Any:
    source = Source(model, loss, batch(), "bias")
    return pipeline.run((pipeline.CAPTURE, *pipeline.PIPELINE[: pipeline.DEAD_TOKENS]), source)


def test_a_rewrite_that_the_meaning_check_refuses_is_left_out_and_told(monkeypatch: pytest.MonkeyPatch) -> None:
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.head = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 3)

        def forward(self, x: Tensor) -> Any:
            return self.head(torch.softmax(self.first(x), 1)[:, 0])

    torch.manual_seed(0)
    right = row_wise.operands

    def wrong(node: Any, axis: Axis, rows: int) -> Any:
        if node.target is aten._softmax.default:
            return {0: axis}
        return {0: axis, 1: axis} if node.target is aten._softmax_backward_data.default else right(node, axis, rows)

    assert not any("left out" in note for note in dpb.compile(Mixed(), loss, batch()).report().optimized)
    monkeypatch.setattr(row_wise, "operands", wrong)
    step = dpb.compile(Mixed(), loss, batch())
    assert any("left out" in note for note in step.report().optimized)
    assert_is_the_loop(step, batch())
    with pytest.raises(dpb.CompileRefused, match="does not mean the same sample by sample"):
        pipeline.run(pipeline.PIPELINE[pipeline.DEAD_TOKENS : pipeline.MEANING], captured(Mixed()))


class OneLayer(nn.Module):
    """tanh(linear) over [B, T, 8], something that changes nothing, and a head on the first row."""

    def __init__(self, same: Any) -> None:
        super().__init__()
        self.first, self.head, self.same = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 3), same

    def forward(self, x: Tensor) -> Any:
        return self.head(self.same(torch.tanh(self.first(x)))[:, 0])


def test_a_squeeze_of_an_axis_of_many_rows_would_take_a_single_row_away_and_is_left_alone() -> None:
    torch.manual_seed(0)
    (line,) = dpb.compile(OneLayer(lambda x: x.squeeze(2)), loss, batch(), disable="in_place").report().optimized
    assert line == "dead tokens: 1 of 7 rows are read; 1 products compute no others"
    step = dpb.compile(OneLayer(lambda x: x.squeeze(1)), loss, batch())
    assert not any("left out" in note for note in step.report().optimized)
    assert_is_the_loop(step, batch())


def test_a_pass_that_raises_is_left_out_and_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(node: Any, axis: Axis, rows: int) -> Any:
        raise KeyError("shape")

    monkeypatch.setattr(row_wise, "operands", broken)
    step = dpb.compile(OneLayer(torch.neg), loss, batch(), disable="in_place")
    assert step.report().optimized == ("dead tokens: left out, for the pass failed (KeyError('shape'))",)
    assert_is_the_loop(step, batch())


def test_a_reshape_takes_the_rows_where_the_numbers_say() -> None:
    """Every pair of shapes of 24 entries: the rows found in the target are those of the source, or none are claimed."""
    shapes = [
        s for n in (1, 2, 3, 4) for s in itertools.product((1, 2, 3, 4, 6, 12, 24), repeat=n) if math.prod(s) == 24
    ]
    claimed = 0
    for source, target in random.Random(0).sample(list(itertools.product(shapes, shapes)), 2000):
        for dim, rows in enumerate(source):
            found = moved(source, target, Axis(dim), rows)
            if rows == 1 or found is None:
                continue
            claimed += 1
            x = torch.arange(24).reshape(source)
            apart = [*target[: found.dim], found.outer, rows, found.inner, *target[found.dim + 1 :]]
            for row in range(rows):
                ours = x.reshape(apart).select(found.dim + 1, row)
                assert torch.equal(ours.flatten(), x.select(dim, row).flatten()), (source, target, dim)
    assert claimed > 100
