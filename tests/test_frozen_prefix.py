"""cache_frozen_prefix: what lies before the first trainable runs once per record, and the run stays the one that it was."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from fit_cases import Crash, crash_at, mlp_loss, run, sentences, text_loss
from torch import Tensor, nn

import dpbitfit_fx as dpb
from dpbitfit_fx import prefix_cache
from dpbitfit_fx.errors import DataError
from dpbitfit_fx.fit import FitResult
from dpbitfit_fx.passes import facts
from dpbitfit_fx.passes.frozen_prefix import HEAVY
from dpbitfit_fx.passes.joint_graph import Role
from dpbitfit_fx.passes.template import single_output


class Deep(nn.Module):
    """Embeds, attends twice and averages: two blocks, of which a run trains one or both."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, width)
        self.first, self.second = (nn.ModuleDict({n: nn.Linear(width, width) for n in "qkv"}) for _ in range(2))
        self.head = nn.Linear(width, 2)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        x = self.embed(input_ids)
        keep = attention_mask[:, None, None, :].bool()
        for block in (self.first, self.second):
            q, k, v = (block[n](x)[:, None] for n in "qkv")
            x = x + torch.tanh(nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=keep)[:, 0])
        weight = attention_mask.unsqueeze(-1).to(x.dtype)
        logits: Tensor = self.head((x * weight).sum(1) / weight.sum(1).clamp(min=1))
        return logits


def deep() -> Deep:
    torch.manual_seed(0)
    return Deep()


def batch(size: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(size)
    return {
        "input_ids": torch.randint(0, 20, (size, 6), generator=generator),
        "attention_mask": (torch.arange(6) <= torch.arange(size)[:, None] % 6).long(),
        "label": torch.arange(size) % 2,
        "weight": torch.ones(size),
    }


def compiled(model: nn.Module | None = None, **options: Any) -> dpb.PrivateStep:
    return dpb.compile(model or deep(), text_loss, batch(4), **{"exclude": ["first.*"], **options})


def total(step: dpb.PrivateStep, given: Any, prefix: Sequence[Tensor] | None = None) -> Tensor:
    return step.accumulate(given, torch.ones(len(given["label"])), step.zero_accumulator(), prefix=prefix)


def heavy(joint: Any) -> int:
    return sum(n.target in HEAVY for n in joint.module.graph.nodes)


def test_products_and_attention_of_frozen_blocks_run_in_the_prefix_and_nowhere_else() -> None:
    step = compiled()
    step.frozen_prefix(batch(3))
    before, rest = (runner.joint for runner in step._lowered._split())
    assert heavy(before) == 4  # q, k, v and attention of the first block
    assert heavy(before) + heavy(rest) == heavy(step._lowered.joint)
    assert not {n.target for n in before.module.graph.nodes} & {torch.ops.aten.native_layer_norm.default}


def test_a_step_given_the_prefix_is_the_whole_step_at_every_batch_size() -> None:
    for options in ({}, {"clipping": dpb.FlatClipping(0.1)}, {"trainable": ["head.*"], "exclude": []}):
        step = compiled(**options)
        for size in (1, 2, 3, 17):
            given = batch(size)
            prefix = step.frozen_prefix(given)
            assert all(len(x) == size for x in prefix)
            assert torch.allclose(total(step, given, prefix), total(step, given), atol=1e-6)


def test_rows_kept_from_other_batches_serve_as_well() -> None:
    step, given = compiled(), batch(17)
    order = torch.randperm(17, generator=torch.Generator().manual_seed(0))
    elsewhere = step.frozen_prefix({k: v[order] for k, v in given.items()})
    back = torch.argsort(order)
    assert torch.allclose(total(step, given, [x[back] for x in elsewhere]), total(step, given), atol=1e-6)


def test_the_rest_is_matched_against_the_template_again_and_keeps_the_sensitivity_whatever_it_is_given() -> None:
    step = compiled(clipping=dpb.FlatClipping(0.5))
    given = batch(5)
    prefix = step.frozen_prefix(given)
    _, rest = (runner.joint for runner in step._lowered._split())
    facts.partial(rest)
    assert single_output(rest) is not None and len(rest.with_role(Role.BATCH)) == 4 + len(prefix)
    for at, value in enumerate((1e30, float("nan"), float("inf"), -1e4, 0.0)):
        mask = torch.zeros(5)
        mask[at] = 1.0
        wild = [torch.full_like(x, value) if x.is_floating_point() else x for x in prefix]
        found = step.accumulate(given, mask, step.zero_accumulator(), prefix=wild)
        assert found.double().norm() <= 0.5 * (1 + 1e-5)


def test_rows_that_change_places_on_the_way_are_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    step = compiled()
    step.check_prefix()
    real = step._lowered.prefix
    monkeypatch.setattr(step._lowered, "prefix", lambda given: tuple(x.roll(1, 0) for x in real(given)))
    with pytest.raises(dpb.SealBroken):
        step.check_prefix()


def test_a_prefix_that_mixes_records_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    step = compiled()
    real = step._lowered.prefix
    monkeypatch.setattr(step._lowered, "prefix", lambda given: tuple(x + 1e-3 * x.mean(0) for x in real(given)))
    with pytest.raises(dpb.SealBroken, match="mixes rows"):
        step.check_prefix()


def test_where_nothing_is_frozen_or_dropout_draws_it_is_refused_with_what_to_do() -> None:
    with pytest.raises(dpb.CompileRefused, match=r"before the first trainable.*exclude="):
        compiled(exclude=[]).frozen_prefix(batch(3))
    model = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5), nn.Linear(4, 2)).train()
    points = torch.randn(4, 4), torch.tensor([0, 1, 1, 0])
    step = dpb.compile(model, mlp_loss, points, trainable=["2.*"], dropout=True)
    with pytest.raises(dpb.CompileRefused, match="Dropout draws anew"):
        step.frozen_prefix(points)


# -- fit --------------------------------------------------------------------------------------------------------------


def trained(folder: Path | None = None, **changes: Any) -> FitResult:
    arguments: dict[str, Any] = {
        "model": deep(),
        "loss_fn": text_loss,
        "dataset": sentences(),
        "exclude": ["first.*"],
        "padded_lengths": {"input_ids": (4, 8, 12), "attention_mask": (4, 8, 12)},
        "cache_frozen_prefix": True,
    }
    return run(folder, **(arguments | changes))


def flat(result: FitResult) -> Tensor:
    return torch.cat([p.detach().flatten() for p in result.model.parameters()])


def count_prefixes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Sizes of the batches that some prefix was computed for by a cache."""
    seen: list[int] = []
    real = prefix_cache.PrefixCache._computed

    def computed(self: Any, given: Any) -> Any:
        seen.append(len(given.rows))
        return real(self, given)

    monkeypatch.setattr(prefix_cache.PrefixCache, "_computed", computed)
    return seen


def test_fit_with_the_cache_ends_where_fit_ends_without_and_computes_every_prefix_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen = count_prefixes(monkeypatch)
    with_cache = trained()
    assert sum(seen) == len(sentences())
    without = trained(cache_frozen_prefix=False)
    assert torch.allclose(flat(with_cache), flat(without), atol=1e-4)
    assert with_cache.epsilon == without.epsilon
    assert not torch.allclose(flat(with_cache), torch.cat([p.detach().flatten() for p in deep().parameters()]), atol=1e-2)


@pytest.mark.parametrize("options", [{"parallel_batches": 2}, {"precision": "bf16"}, {"backend": "inductor"}], ids=str)
def test_so_it_does_in_parallel_in_bfloat16_and_through_inductor(options: dict[str, Any]) -> None:
    try:
        without = trained(cache_frozen_prefix=False, max_steps=4, **options)
    except dpb.CompileRefused as refusal:
        pytest.skip(str(refusal)[:80])
    assert torch.allclose(flat(trained(max_steps=4, **options)), flat(without), atol=1e-3)


def test_a_crashed_run_resumes_bit_for_bit(tmp_path: Path) -> None:
    whole = trained(tmp_path / "whole")
    with pytest.raises(Crash):
        trained(tmp_path / "crashed", callbacks=[crash_at(8)])
    assert torch.equal(flat(trained(tmp_path / "crashed")), flat(whole))


def test_phases_keep_a_prefix_where_there_is_one_and_see_what_earlier_ones_trained(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen = count_prefixes(monkeypatch)
    phases = [dpb.Phase(trainable=["head.*"], max_steps=4), dpb.Phase(trainable="bias", exclude=(), max_steps=4)]
    options: dict[str, Any] = {"max_steps": None, "phases": phases, "exclude": ()}
    assert torch.allclose(flat(trained(**options)), flat(trained(cache_frozen_prefix=False, **options)), atol=1e-4)
    assert sum(seen) == len(sentences())  # of the first phase alone
    options["phases"] = [dpb.Phase(trainable=["first.*", "second.*"], max_steps=4), dpb.Phase(trainable=["head.*"], max_steps=4)]
    assert torch.allclose(flat(trained(**options)), flat(trained(cache_frozen_prefix=False, **options)), atol=1e-4)


def test_a_frozen_weight_that_changes_on_the_way_makes_the_cache_anew() -> None:
    def doubles(model: Deep) -> Any:
        def callback(info: Any) -> None:
            if info.step == 6:
                with torch.no_grad():
                    model.embed.weight.mul_(2.0)

        return callback

    def once(**changes: Any) -> Tensor:
        model = deep()
        return flat(trained(model=model, callbacks=[doubles(model)], **changes))

    assert torch.allclose(once(), once(cache_frozen_prefix=False), atol=1e-4)


def test_what_cannot_be_kept_is_refused_before_anything_is_trained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(dpb.CompileRefused, match="before the first trainable"):
        trained(tmp_path / "a", exclude=())
    with pytest.raises(dpb.CompileRefused, match=r"noise='grid'.*Use one of the two"):
        trained(tmp_path / "b", noise="grid", physical_batch_size=1)
    monkeypatch.setattr(prefix_cache, "_free_bytes", lambda: 1000)
    with pytest.raises(dpb.CompileRefused, match=r"kB for each of 90 records.*memory are free"):
        trained(tmp_path / "c")


def test_a_record_that_changes_from_load_to_load_is_named() -> None:
    class Restless(torch.utils.data.Dataset[Any]):
        def __len__(self) -> int:
            return 90

        def __getitem__(self, row: int) -> dict[str, Any]:
            changes = int(torch.randint(0, 20, ())) if row == 5 else row % 20
            return {"input_ids": [changes, 3], "attention_mask": [1, 1], "label": row % 2, "weight": 1.0}

    with pytest.raises(DataError, match=r"Row 5 of the dataset is not the same at every load"):
        trained(dataset=Restless(), max_steps=30)


def test_a_record_on_which_the_prefix_fails_is_named_and_not_quoted() -> None:
    rows = sentences()
    rows[7] = rows[7] | {"input_ids": [31337], "attention_mask": [1]}
    with pytest.raises(DataError, match=r"row 7 of the dataset") as error:
        trained(dataset=rows)
    assert "31337" not in str(error.value)
